"""Rows of local files, one after the other, and what is wrong with a file, by file and line. No torch, no datasets."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.data_files import COMPRESSED, SUFFIXES, file_type, matching
from rlhf_pipeline.recipe.model_files import is_pointer
from rlhf_pipeline.recipe.schema import Source

CHUNK = 1 << 20  # bytes of a .json file that are read at once
LONGEST_ROW = 1 << 26  # a row of a .json file that has no end by then has none


class Located(NamedTuple):
    """A row and where it is: the file or hub dataset, and its number there, counted from 1."""

    place: str
    number: int
    row: dict[str, Any]


def local_files(source: Source) -> list[Path]:
    """The files of a source.

    Raises:
        InputError: there are none, or one is of a type that is not read.
    """
    files = matching(source.files)
    if not files and source.stage is not None:
        raise InputError(
            f"stage `{source.stage}` has not made its rows yet",
            place=source.path,
            hint=f"`run --until {source.stage}` makes them",
        )
    if not files:
        raise InputError(
            "there is no data file",
            place=source.path,
            hint=f"data files end in {', '.join(SUFFIXES)}, compressed in {', '.join(COMPRESSED)} after that",
        )
    for file in files:
        if file_type(file) is None:
            raise InputError(
                f"data files of type `{file.suffix}` are not read", place=str(file), hint=f"use {', '.join(SUFFIXES)}"
            )
    return files


def rows_of_file(file: Path) -> Iterator[Located]:
    """The rows of one file.

    Raises:
        InputError: with file and line where possible, when what cannot be read is come to.
    """
    if is_pointer(file):
        hint = "get the files with `git lfs pull` there"
        raise InputError("this is a Git LFS pointer and not the file itself", place=str(file), hint=hint)
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[str(file_type(file))]
    try:
        with _opened(file) as content:
            for number, row in enumerate(read(file, content), 1):
                yield Located(str(file), number, row)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"the compressed file is damaged: {error}", place=str(file)) from None
    except OSError as error:
        damaged = _is_compressed(file) and error.errno is None  # as bz2 says it
        what = "the compressed file is damaged" if damaged else "the file cannot be read"
        raise InputError(f"{what}: {error.strerror or error}", place=str(file)) from None


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def _opened(file: Path) -> IO[bytes]:
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix.lower())
    return opened(file, "rb") if opened else file.open("rb")  # type: ignore[operator]


def _lines(file: Path, content: IO[bytes]) -> Iterator[str]:
    """Lines of text, with their ends."""
    for number, line in enumerate(content, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(error, line, file, number) from None


def _not_utf8(error: UnicodeDecodeError, content: bytes, file: Path, line: int | None = None) -> InputError:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        what, encoding = "the file is UTF-16, and should be UTF-8", "UTF-16"
    else:
        # Latin-1 has control characters from 0x80 on, where Windows has quotes and dashes, and is alike beyond.
        what, encoding = f"the file is not UTF-8: there is a byte 0x{content[error.start]:02x}", "CP1252"
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(file.name)} > utf-8{file.suffix}"
    place = str(file) if line is None else f"{file}:{line}"
    return InputError(what, place=place, hint=f"save it as UTF-8, for example with `{command}`")


def _json_lines(file: Path, content: IO[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file, content), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            place = f"{file}:{number}"
            if line.lstrip().startswith("[") and number == 1:
                hint = "a file with one list of rows ends in .json, not .jsonl"
                raise InputError("this line is not JSON: it begins a list", place=place, hint=hint) from None
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            several = "rows over several lines are a .json file, not .jsonl" if line.strip() == "{" else None
            raise InputError(f"this line is not JSON: {_why(error)}{column}", place=place, hint=several) from None
        if not isinstance(row, dict):
            listed = "a file with one list of rows ends in .json, not .jsonl" if isinstance(row, list) else None
            raise InputError("this line is not a JSON object", place=f"{file}:{number}", hint=listed)
        yield row


def _json(file: Path, content: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a list, or objects one after the other, without holding them all."""
    reader = io.TextIOWrapper(content, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    text, position, line, begun, listed, ended = "", 0, 1, False, False, False

    def more() -> bool:
        nonlocal text, position, ended
        try:
            new = reader.read(max(CHUNK, len(text) - position))
        except UnicodeDecodeError as error:
            raise _not_utf8(error, error.object, file) from None
        text, position, ended = text[position:] + new, 0, not new
        return bool(new)

    while True:
        while position < len(text) and (text[position].isspace() or (begun and text[position] == ",")):
            line += text[position] == "\n"
            position += 1
        if position == len(text):
            if not more():
                break
            continue
        if text[position] == "[" and not begun:
            begun, listed, position = True, True, position + 1
            continue
        if text[position] == "]" and listed:
            _require_end(file, text[position + 1 :], reader, line)
            return
        if text[position] != "{":
            raise InputError("expected a JSON object here", place=f"{file}:{line}")
        begun = True
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if len(text) - position < LONGEST_ROW and not ended and more():
                continue
            line += text.count("\n", position, getattr(error, "pos", position))
            raise InputError(f"this is not JSON: {_why(error)}", place=f"{file}:{line}") from None
        line += text.count("\n", position, end)
        position = end
        yield row
    if listed:
        raise InputError("this is not JSON: the list has no end", place=f"{file}:{line}")


def _require_end(file: Path, rest: str, reader: IO[str], line: int) -> None:
    """See that nothing follows a list of rows, as where two files were joined: those rows would be lost.

    Raises:
        InputError: something does.
    """
    while rest:
        if rest.strip():
            line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
            hint = "a file has one list of rows, or rows one after the other"
            raise InputError("something follows the end of the list", place=f"{file}:{line}", hint=hint)
        line += rest.count("\n")
        rest = reader.read(CHUNK)


def _why(error: Exception) -> str:
    """What is wrong with JSON, without the place, which is that in a line or in a part of a file."""
    return str(getattr(error, "msg", error)).removesuffix(" at").removesuffix(" starting")


def _csv(file: Path, content: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Rows of text; a first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    lines = _lines(file, content)
    first = next(lines, "")
    if re.fullmatch(r"sep=.\s*", first):  # which Excel writes for itself
        hint = f"remove it: `tail -n +2 {shlex.quote(file.name)} > rows.csv`"
        raise InputError("the first line is one for Excel, and should name the columns", place=f"{file}:1", hint=hint)
    other = next((sign for sign in (";", "\t", "|") if sign in first and "," not in first), None)
    if other:
        raise InputError(
            f"the columns are separated by {other!r}, and should be by commas",
            place=f"{file}:1",
            hint='write it with commas: `python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader('
            f'sys.stdin, delimiter={other!r}))" < {shlex.quote(file.name)} > commas.csv`',
        )
    reader = csv.reader(itertools.chain([first], lines), strict=True)
    try:
        names = next(reader, [])
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"there are two columns `{twice}`", place=f"{file}:1")
        for values in reader:
            if len(values) != len(names) and values:
                raise InputError(
                    f"this row has {len(values)} values, and there are {len(names)} columns",
                    place=f"{file}:{reader.line_num}",
                    hint="put quotes around a value with commas or line breaks, and double every quote inside it",
                )
            if any(value for name, value in zip(names, values, strict=False) if not name):
                raise InputError("a value stands in a column without a name", place=f"{file}:{reader.line_num}")
            if values:
                yield {name: value for name, value in zip(names, values, strict=True) if name}
    except csv.Error as error:
        raise InputError(f"this is not CSV: {error}", place=f"{file}:{reader.line_num}") from None


def _parquet(file: Path, content: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content.read()) if _is_compressed(file) else content)
        for batch in table.iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        line = (str(error).strip().splitlines() or ["?"])[0]
        raise InputError(f"the file cannot be read as parquet: {line}", place=str(file)) from None
