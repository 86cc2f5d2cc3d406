"""What runs have moved aside: its size, and its removal. No torch."""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.state import DONE

ASIDE = re.compile(r"(?P<stage>\w[\w-]*)\.(?P<stamp>[0-9]{8}-[0-9]{6})(-([2-9]|[1-9][0-9]+))?")


def find(run: Path) -> list[dict[str, Any]]:
    """List what was moved aside in a run directory, oldest first; see `RunDirectory.set_aside`.

    Returns:
        For each folder: its `name`; the `stage` it was of; `moved_at`, in Unix seconds; the `bytes` that removing
        it frees; and from its record, null where there is none, its `kind`, its `state` and its final `metrics`.

    Raises:
        RunError: a run is going on there.
    """
    directory = RunDirectory(run)
    directory.refuse_if_locked()
    asides = []
    for folder in run.iterdir():
        moved_at = _moved_at(run, folder.name)
        if moved_at is not None:
            record = directory.record(folder.name)
            asides.append(
                {
                    "name": folder.name,
                    "stage": folder.name.partition(".")[0],
                    "moved_at": moved_at,
                    "bytes": size_of(folder),
                    "kind": (record.kind or None) if record else None,
                    "state": _state(record) if record else None,
                    "metrics": record.metrics if record else None,
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
                raise RunError(f"{run / name} was not moved aside by a run", hint="nothing was done to it")
            try:
                shutil.rmtree(run / name)
            except OSError as error:
                raise RunError(f"{run / name} cannot be removed: {error.strerror}") from None


def _state(record: Record) -> str:
    """A stage's state, now that no run resumes it any more."""
    return record.state if record.state in (*DONE, "waiting") else "failed"


def _moved_at(run: Path, name: str) -> float | None:
    """When a folder was moved aside, by its name; None for anything else, links to such folders too."""
    aside = ASIDE.fullmatch(name)
    if aside is None or (run / name).is_symlink() or not (run / name).is_dir():
        return None
    try:
        return time.mktime(time.strptime(aside["stamp"], "%Y%m%d-%H%M%S"))
    except (OverflowError, ValueError):  # these digits are no date
        return None


def size_of(folder: Path) -> int:
    """The bytes that removing a folder frees: without what a link leads to, and files that others share."""
    files = ((Path(root) / file).lstat() for root, _, names in os.walk(folder) for file in names)
    return sum(file.st_size for file in files if file.st_nlink == 1)
