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
# What the datasets library and others write beside rows, which is not rows.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "dev": "dev",
    "valid": "validation", "validation": "validation", "val": "validation", "eval": "eval", "evaluation": "eval",
    "heldout": "held out", "holdout": "held out",
}  # fmt: skip


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


def splits(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that a word of their names says, as `test` of `my_test-0.parquet`; "" where none does."""
    found: dict[str, list[Path]] = {}
    for file in files:
        name = re.sub(r"(held|hold)[-_]?out", "heldout", file.name, flags=re.IGNORECASE)
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
        found.setdefault(next((SPLITS[word] for word in reversed(words) if word in SPLITS), ""), []).append(file)
    return dict(sorted(found.items()))


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the datasets library wrote: Arrow files, or folders of them."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and any(folder.glob("*.arrow"))
    )


def broken_links(path: str) -> list[Path]:
    """The data files that an absolute path means and that are links to nothing, sorted."""
    file = Path(path)
    return [one for one in ([file] if file.is_symlink() else _found(path)) if one.is_symlink() and not one.exists()]


def _candidates(path: str) -> list[Path]:
    return [one for one in _found(path) if one.is_file() and one.name not in NOT_ROWS]


def _found(path: str) -> list[Path]:
    """All that is in a folder, or matches a glob, but for what is hidden."""
    file = Path(path)
    found = file.iterdir() if file.is_dir() else (Path(one) for one in glob.iglob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
    return sorted(one for one in found if not one.name.startswith("."))
