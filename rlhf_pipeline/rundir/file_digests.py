"""What files hold, as digests that are remembered. No torch."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import IO

from rlhf_pipeline import local
from rlhf_pipeline.errors import InputError

# A file changed within its time stamps' resolution could change again and keep them; 2 s is the coarsest in use.
SETTLED_S = 2.0
MOST_BYTES = 2**20  # of the memory: some 5,000 files, which are read in a hundredth of a second

Known = tuple[int, int, int, str]  # size in bytes, mtime and ctime in ns, digest


class FileDigests:
    """Content digests of files, remembered for the user by path, size and times of change.

    The memory is a file of JSON lines, `[path, size, mtime, ctime, digest]`, to which one is added for each file that
    was read; of several lines on a path the last counts. When it is full, the older half and files that are gone are
    forgotten. Runs beside each other add to it in turn. A line that cannot be read is passed over, and a place that
    cannot be written to is no error: then the file is read again the next time.
    """

    def __init__(self) -> None:
        self.memory = local.caches() / "rlhf-pipeline" / "digests.jsonl"
        self.known: dict[str, Known] = {}
        with contextlib.suppress(OSError), self.memory.open("rb") as lines:
            self.known = _read(lines)

    def of_file(self, path: Path) -> str:
        """The digest of a file's content.

        Raises:
            InputError: it cannot be read.
        """
        now = time.time()
        try:
            state = path.stat()
            stamps = (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            known = self.known.get(str(path))
            if known and known[:3] == stamps:
                return known[3]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from None
        if now - state.st_ctime > SETTLED_S:
            self.known[str(path)] = (*stamps, digest)
            with contextlib.suppress(OSError):
                self._remember(str(path))
        return digest

    def _remember(self, path: str) -> None:
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        with self.memory.open("ab+") as file:
            with contextlib.suppress(OSError):  # of a disk that has no locks: lines are added in one write each
                fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) > MOST_BYTES:
                file.seek(0)
                there = [one for one in _read(file).items() if os.path.exists(one[0])]  # noqa: PTH110 (no errors)
                file.truncate(0)
                file.write(b"".join(_line(*one) for one in there[len(there) // 2 :]))
            # After a line that was cut short, as on a full disk, the line break makes it one that is passed over.
            file.write(b"\n" * (not _ends_a_line(file)) + _line(path, self.known[path]))


def _line(path: str, known: Known) -> bytes:
    return json.dumps([path, *known]).encode() + b"\n"


def _read(lines: IO[bytes]) -> dict[str, Known]:
    """What a memory holds, what was added last at the end."""
    found: dict[str, Known] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            path, size, changed, touched, digest = json.loads(line)
            found.pop(str(path), None)
            found[str(path)] = (int(size), int(changed), int(touched), str(digest))
    return found


def _ends_a_line(file: IO[bytes]) -> bool:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return True
    file.seek(end - 1)
    return file.read(1) == b"\n"
