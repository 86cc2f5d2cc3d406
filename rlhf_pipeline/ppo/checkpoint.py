"""Folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder under another name, and rename it when all of it is on disk.

    Args:
        folder: where it shall be; one that is there already is replaced.
        write: takes the folder to write to.
    """
    temporary, former = folder.with_name(f".new-{folder.name}"), folder.with_name(f".old-{folder.name}")
    for left_over in (temporary, former):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    if folder.exists():
        folder.rename(former)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def remove_others(newest: Path, limit: int | None) -> None:
    """Keep the checkpoint just written and the latest others beside it, `limit` in all; every one for None or 0."""
    others = [path for path in newest.parent.glob("checkpoint-*") if path != newest]
    others.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in others[limit - 1 :] if limit else []:
        doomed = checkpoint.with_name(f".old-{checkpoint.name}")
        checkpoint.rename(doomed)  # removing takes a while, and half a checkpoint must not look like one
        shutil.rmtree(doomed)


def locate(folder: str, wanted: str | bool | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: where checkpoints are.
        wanted: a checkpoint's path; True for the latest in `folder`; None or False for none.

    Raises:
        ValueError: there is none.
    """
    if not wanted:
        return None
    if wanted is True:
        wanted = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if not wanted or not Path(wanted).is_dir():
        raise ValueError(f"there is no checkpoint {wanted or 'in ' + folder}")
    return Path(wanted)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
