"""The files that a recipe's `path` means: one, those that match a glob, or those of a folder. No torch."""

import glob
import re
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
# Files that people have, and what to do with them.
NOT_READ = {
    ".txt": "write one JSON object a line, and call it .jsonl", ".tsv": "save it with commas, as .csv",
    ".xlsx": "export it as .csv", ".xls": "export it as .csv", ".yaml": "write it as .jsonl",
    ".arrow": "write it with the datasets library: `Dataset.to_parquet`",
    ".pkl": "write it as .jsonl or .parquet; a pickle can run any code when it is opened",
    ".zst": "decompress it, or compress it as .gz, .bz2 or .xz", ".lz4": "decompress it, or compress it as .gz",
    ".zip": "unpack it", ".tar": "unpack it", ".tgz": "unpack it", ".7z": "unpack it",
}  # fmt: skip
SPLIT = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-zA-Z])", re.IGNORECASE)


def is_local(path: str) -> bool:
    """Whether a path of a loaded recipe is of files; else it is a hub dataset."""
    return Path(path).is_absolute()


def matching(path: str) -> list[Path]:
    """The data files that an absolute path means, sorted; a folder's are those directly in it.

    Returns:
        Perhaps none. A path that names one file means that file, whatever its type.
    """
    file = Path(path)
    return [file] if file.is_file() else [one for one in _candidates(path) if file_type(one)]


def not_read(path: str) -> list[Path]:
    """The files that a glob or a folder has beside those that are read, sorted."""
    return [one for one in _candidates(path) if not file_type(one)]


def file_type(file: Path) -> str | None:
    """One of `SUFFIXES`, whether the file is compressed or not; None where it is not read."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def splits(files: list[Path]) -> list[str]:
    """The splits that the names of files begin with, such as `test` of `test-00000.parquet`, each once."""
    found = (SPLIT.match(file.name) for file in files)
    return sorted({match[1].lower() for match in found if match})


def _candidates(path: str) -> list[Path]:
    file = Path(path)
    found = file.iterdir() if file.is_dir() else (Path(one) for one in glob.iglob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
    return sorted(one for one in found if one.is_file() and not one.name.startswith("."))
