"""Files and folders that are there whole or not at all, and known to be what was written. No torch.

A checkpoint is `checkpoint-<step>` with a `manifest.json` that holds the size and SHA-256 of every file in it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # in a checkpoint: how far it is, in Transformers' words
MADE = "made.jsonl"  # in `work/`: what a stage that makes rows has made so far
MEMBER = "member-"  # and a number: the folder of a member of an ensemble, in `work/` and in an artifact
# Of an `OSError`, what says that a file is not there, or is damaged; any other is no fault of a checkpoint.
_OF_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
Contents = dict[str, list]  # a file's path inside its folder -> its size in bytes and its SHA-256


class CheckpointError(ValueError):
    """A checkpoint cannot be taken up: its files are what was written, but not what this stage would have written.

    Args:
        checkpoint: its folder.
        why: in one sentence.

    Attributes:
        checkpoint: its path inside `work/`.
    """

    def __init__(self, checkpoint: Path, why: str) -> None:
        of_member = checkpoint.parent.name.startswith(MEMBER)
        self.checkpoint = f"{checkpoint.parent.name}/{checkpoint.name}" if of_member else checkpoint.name
        super().__init__(f"{self.checkpoint} cannot be resumed from: {why}")
        self.why = why


@contextlib.contextmanager
def taking_up(checkpoint: str | Path) -> Iterator[None]:
    """Around all that reads a checkpoint: what goes wrong is a fault of it, except for memory and the system's limits.

    Raises:
        CheckpointError: it cannot be read, or is of something else.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        of_memory = isinstance(error, MemoryError) or "out of memory" in str(error)
        if of_memory or (isinstance(error, OSError) and error.errno not in (None, *_OF_A_FILE)):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(Path(checkpoint), f"{type(error).__name__}: {first[:200]}") from error


def check_state(checkpoint: str | Path) -> None:
    """See that a checkpoint's `trainer_state.json` is of its step.

    Raises:
        ValueError: it is not.
    """
    folder = Path(checkpoint)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("global_step") != step(folder):
        raise ValueError(f"{STATE} is not of step {step(folder)}")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new and nothing between."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same of a file that is not text."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk should get its room back
        raise
    sync([path.parent])


def contents(folder: Path) -> Contents:
    """What every file in a folder holds, but for its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}


def difference(folder: Path, expected: Mapping[str, Sequence[Any]]) -> str | None:
    """How a folder differs from what was written to it, as one phrase; None where every file is as it was.

    Files that came later do not count.
    """
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _sha256(file) != digest:
            return f"{name} has other content than was written"
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as one phrase; None where it can be trusted."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return difference(checkpoint, expected) if expected else f"{MANIFEST} names no file"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"


def newest_first(work: Path) -> list[Path]:
    """The checkpoints in a folder."""
    found = [path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step, reverse=True)


def holds_some(work: Path) -> bool:
    """Whether a stage's `work/` has a checkpoint, sound or not, something of a member, or what rows come from."""
    return any(work.glob("checkpoint-*")) or any(work.glob(f"{MEMBER}*")) or (work / MADE).is_file()


def step(checkpoint: Path) -> int:
    """How many updates a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_sound(work: Path) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint to resume from, and what is wrong with the later ones, by their names."""
    damaged: dict[str, str] = {}
    for checkpoint in newest_first(work):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged[checkpoint.name] = problem
    return None, damaged


def write_checkpoint(work: Path, at_step: int, write: Callable[[Path], None], limit: int | None) -> None:
    """Write a checkpoint, whole or not at all, and remove older ones; see `write_folder` and `remove_others`."""
    folder = work / f"checkpoint-{at_step}"
    write_folder(folder, write)
    remove_others(folder, limit)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder under another name, and rename it when all of it, with its manifest, is on disk.

    Args:
        folder: where it shall be; one that is there already is replaced.
        write: takes the folder to write to.
    """
    temporary, former = folder.with_name(f".new-{folder.name}"), folder.with_name(f".old-{folder.name}")
    for left_over in (temporary, former):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        (temporary / MANIFEST).write_text(json.dumps(contents(temporary), indent=1), encoding="utf-8")
        sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk should get its room back
        raise
    if folder.exists():
        folder.rename(former)
    temporary.rename(folder)
    sync([folder.parent])
    shutil.rmtree(former, ignore_errors=True)


def remove_others(newest: Path, limit: int | None) -> None:
    """Keep the checkpoint just written and the latest others beside it, `limit` in all; every one for None or 0."""
    others = [path for path in newest_first(newest.parent) if path != newest]
    for checkpoint in others[limit - 1 :] if limit else []:
        doomed = checkpoint.with_name(f".old-{checkpoint.name}")
        checkpoint.rename(doomed)  # removing takes a while, and half a checkpoint must not look like one
        shutil.rmtree(doomed)


def locate(folder: str, wanted: str | bool | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: where checkpoints are.
        wanted: a checkpoint's path; True for the latest in `folder`; None or False for none.

    Raises:
        ValueError: there is none.
    """
    if not wanted:
        return None
    found = next(iter(newest_first(Path(folder))), None) if wanted is True else Path(wanted)
    if found is None or not found.is_dir():
        raise ValueError(f"there is no checkpoint {found or 'in ' + folder}")
    return found


def sync_folder(folder: Path) -> None:
    """See that a folder, with all in it, is on disk."""
    sync([*folder.rglob("*"), folder])


def sync(paths: Iterable[Path]) -> None:
    """See that files' content, or folders' lists of names, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
