"""What runs have moved aside: how much of it there is, and how it goes away. No torch."""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.run.directory import RunDirectory

ASIDE = re.compile(r"(?P<stage>\w[\w-]*)\.(?P<stamp>[0-9]{8}-[0-9]{6})(-([2-9]|[1-9][0-9]+))?")


def find(run: Path) -> list[dict[str, Any]]:
    """List what was moved aside in a run directory, oldest first; see `RunDirectory.set_aside`.

    Returns:
        For each folder: its `name`; the `stage` it was of; `moved_at`, in Unix seconds; its `bytes`; and from its
        record, null where there is none, its `kind`, its `state` and its final `metrics`.

    Raises:
        RunError: a run is going on there.
    """
    directory = RunDirectory(run)
    directory.refuse_if_locked()
    asides = []
    for folder in run.iterdir():
        moved_at = _moved_at(run, folder.name)
        if moved_at is not None:
            record = directory.record(folder.name) or {}
            if record.get("state") == "running":  # the run ended before the stage did
                record["state"] = "failed"
            asides.append(
                {
                    "name": folder.name,
                    "stage": folder.name.partition(".")[0],
                    "moved_at": moved_at,
                    "bytes": _size(folder),
                    **{key: record.get(key) for key in ("kind", "state", "metrics")},
                }
            )
    return sorted(asides, key=lambda aside: (aside["moved_at"], aside["name"]))


def remove(run: Path, names: list[str]) -> None:
    """Remove folders that `find` listed, while no run can start.

    Raises:
        RunError: a run is going on there, or a folder cannot be removed.
    """
    directory = RunDirectory(run)
    with directory.locked():
        for name in names:
            if _moved_at(run, name) is None:
                raise RunError(f"{run / name} is not what was moved aside", hint="nothing was done to it")
            try:
                shutil.rmtree(run / name)
            except OSError as error:
                raise RunError(f"{run / name} cannot be removed: {error.strerror}") from None


def show(asides: list[dict[str, Any]], metrics: dict[str, list[str]], console: Console) -> None:
    """Print what `find` listed, and how much it is in all.

    Args:
        asides: from `find`.
        metrics: for each kind of stage the metrics that matter, the first of which is shown.
        console: where to.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("moved aside", "was", "age", "size"):
        table.add_column(column, overflow="fold", justify="right" if column in ("age", "size") else "left")
    for aside in asides:
        was = aside["state"] or "without a record"
        numbers = aside["metrics"] if isinstance(aside["metrics"], dict) else {}
        known = [name for name in metrics.get(str(aside["kind"]), []) if isinstance(numbers.get(name), (int, float))]
        if known:
            was += f", {known[0]} {numbers[known[0]]:.3g}"
        age = _age(time.time() - aside["moved_at"])
        table.add_row(escape(aside["name"]), escape(was), age, size_text(aside["bytes"]))
    console.print(table)
    total = size_text(sum(aside["bytes"] for aside in asides))
    console.print(f"{len(asides)} {'folder' if len(asides) == 1 else 'folders'}, {total}", highlight=False)


def size_text(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _moved_at(run: Path, name: str) -> float | None:
    """When a folder was moved aside, by its name; None for anything else, links to such folders too."""
    aside = ASIDE.fullmatch(name)
    if aside is None or (run / name).is_symlink() or not (run / name).is_dir():
        return None
    try:
        return time.mktime(time.strptime(aside["stamp"], "%Y%m%d-%H%M%S"))
    except (OverflowError, ValueError):  # these digits are no date
        return None


def _size(folder: Path) -> int:
    """The bytes of all files in a folder; what a link leads to is not in it."""
    paths = (Path(root) / file for root, _, files in os.walk(folder) for file in files)
    return sum(path.lstat().st_size for path in paths)


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "just now"
