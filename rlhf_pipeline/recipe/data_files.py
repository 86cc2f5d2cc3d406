"""The files that a recipe's `path` stands for: one, those that match a glob, or those of a folder. No torch."""

import glob
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")


def is_local(path: str) -> bool:
    """Whether a path of a loaded recipe is of files; else it is a hub dataset."""
    return Path(path).is_absolute()


def is_glob(path: str) -> bool:
    """Whether a path is a pattern, and not the name of a file that happens to look like one."""
    return glob.has_magic(path) and not Path(path).exists()


def matching(path: str) -> list[Path]:
    """The data files that an absolute path stands for, sorted; a folder's are those directly in it.

    Returns:
        Perhaps none. A path that names one file stands for it, whatever its type.
    """
    file = Path(path)
    if file.is_file():
        return [file]
    found = file.iterdir() if file.is_dir() else (Path(one) for one in glob.iglob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
    return sorted(one for one in found if one.is_file() and file_type(one) and not one.name.startswith("."))


def file_type(file: Path) -> str | None:
    """One of `SUFFIXES`, whether the file is compressed or not; None where it is not read."""
    suffixes = file.suffixes[:-1] if file.suffix in COMPRESSED else file.suffixes
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None
