"""The `.jsonl` files of a run directory, which may be growing while they are read. No torch.

They are logs, and a log ends no run: a line that cannot be read is passed over, or put aside before a file is written
anew, and one that cannot be written is lost. Either is said.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.rundir import durable, strict_json

DAMAGED = ".damaged"  # after a file's name: the file that takes the lines of it that cannot be read


class Line(NamedTuple):
    """A line that holds an object.

    Attributes:
        text: as it stands, with the line break.
        row: the object.
    """

    text: str
    row: dict[str, Any]


def read(file: Path, last: int | None = None) -> tuple[list[Line], list[bytes]]:
    """The lines of a file that hold an object, and those that do not; none where there is no file.

    Empty lines are neither, nor is a last one without its line break: it is being written, or was when its writer died.

    Args:
        file: the file.
        last: read so many lines, the last ones; by default all.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], []
    sound, damaged = [], []
    for line in lines[-last:] if last else lines:
        row = parse(line)
        if row is not None:
            sound.append(Line(line.decode("utf-8") + "\n", row))
        elif line.strip():
            damaged.append(line + b"\n")
    return sound, damaged


def sound_lines(file: Path) -> Iterator[Line]:
    """The lines of a file up to the first that cannot be read, or is torn: those that were surely written."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as content:
        for line in content:
            row = parse(line) if line.endswith(b"\n") else None
            if row is None:
                return
            yield Line(line.decode("utf-8"), row)


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line; what cannot be read is passed over."""
    try:
        return [line.row for line in read(file)[0]]
    except OSError:
        return []


def parse(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None where it holds none."""
    try:
        row = strict_json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def put_damage_aside(file: Path) -> str | None:
    """Move the lines that cannot be read to `<name>.damaged`, or the whole file where it cannot be read at all.

    Returns:
        What to say of it, as one phrase; None where there is no damage.
    """
    aside = file.with_name(file.name + DAMAGED)
    what = file.name
    try:
        try:
            sound, damaged = read(file)
        except OSError as error:
            what = f"{file.name} ({error.strerror})"
            file.rename(aside)
        else:
            if not damaged:
                return None
            what = f"{len(damaged)} line{'s' * (len(damaged) != 1)} of {file.name}"
            with aside.open("ab") as lines:
                lines.writelines(damaged)
            durable.write_text(file, "".join(line.text for line in sound))
    except OSError as error:
        return f"{what} cannot be read, nor be put aside ({error.strerror})"
    return f"{what} cannot be read: now in {aside.name}"


def rewrite(file: Path, keep: Callable[[dict[str, Any]], bool], more: Iterable[dict[str, Any]] = ()) -> None:
    """Replace a file, in one step, by some of its rows as they stand, and more.

    What cannot be read is put aside, and standard error says so. A file that is not there is made only for `more`.

    Args:
        file: the file.
        keep: whether a row stays.
        more: rows to write after those.

    Raises:
        OSError: it cannot be written.
    """
    damage = put_damage_aside(file)
    if damage:
        _warn(damage)
    sound: list[Line] = []
    with contextlib.suppress(OSError):  # it has been said just now
        sound = read(file)[0]
    added = _text(more)
    if file.is_file() or added:
        durable.write_text(file, "".join(line.text for line in sound if keep(line.row)) + added)


def append(file: Path, more: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a file, in one write. Where that fails they are lost, and standard error says so."""
    text = _text(more)
    try:
        with file.open("ab+") as lines:
            if lines.tell() and not _ends_with_line_break(lines.fileno()):  # an earlier write was cut short
                text = "\n" + text
            lines.write(text.encode("utf-8"))
    except OSError as error:
        _warn(f"{file.name} cannot be written to ({error.strerror}), so it lacks these rows; training continues")


def _text(more: Iterable[dict[str, Any]]) -> str:
    text = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in more)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written


def _ends_with_line_break(descriptor: int) -> bool:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) == b"\n"


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # it goes to the stage's log, perhaps on the same full disk
        print(f"warning: {text}", file=sys.stderr)
