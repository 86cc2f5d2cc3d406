"""One run at a time in a run directory, on one machine or several. No torch."""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal, NoReturn

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir.words import duration

BEAT_S = 15.0  # how often the holder shows that it is alive
SILENT_S = 120.0  # a holder on another machine that has shown nothing for so long is taken for dead

Kernel = Literal["granted", "refused", "unsupported"]  # its answer when it is asked for a lock; not all disks have one


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where}, since {self.since}"


class Lock:
    """The lock of a run directory: `.lock` in it, locked by the kernel, with the holder's name and heartbeat.

    The kernel's lock goes with its process, however that ends, so on one machine nothing is ever left behind. Between
    machines that share a disk it may not be passed on, or may outlive its machine; there the heartbeat, the file's
    time of change, decides.

    `filelock.SoftFileLease` does without the kernel's lock, and so cannot tell that a process is dead while its parent
    has not collected it, or when it was in another container; a run could not start again at once.

    Args:
        folder: the run directory.
        name: of the file, if another one: a `.lock` makes a folder a run directory.
        hint: what to do where another process holds it; by default what to do about a run.
    """

    def __init__(self, folder: Path, name: str = ".lock", hint: str | None = None) -> None:
        self.folder = folder
        self.file = folder / name
        self.hint = hint

    @contextlib.contextmanager
    def held(self, keep: bool = True) -> Iterator[None]:
        """Hold the lock.

        Args:
            keep: leave the file; else it is removed in the end if there is nothing beside it.

        Raises:
            RunError: another process holds it.
        """
        file = self._take()
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(file, over), daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()
            with file:
                file.truncate(0)
                if not keep and list(self.folder.iterdir()) == [self.file]:
                    self.file.unlink()

    def is_held(self) -> bool:
        """Whether a run is going on here."""
        try:
            file = self.file.open()
        except OSError:  # there is none, or it is somebody else's, and then a run will say that it cannot be written to
            return False
        with file:
            kernel = _flock(file, fcntl.LOCK_SH)
        return self._holder_lives(kernel, time.time())  # without our lock: a run that starts now would wait for it

    def refuse_if_held(self) -> None:
        """Raise `RunError`, naming the holder, if a run is going on here."""
        if self.is_held():
            self._refuse()

    def holder(self) -> Holder | None:
        """Who holds it, or died holding it."""
        try:
            return Holder(**json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _take(self) -> IO[str]:
        deadline = time.monotonic() + 1.0  # someone else may be only looking; see `is_held`
        while True:
            file = self.file.open("a+", encoding="utf-8")
            kernel = _flock(file, fcntl.LOCK_EX)
            lives = self._holder_lives(kernel, self._disk_time())
            if not self._is_current(file):  # another process has replaced it since we opened it
                file.close()
            elif lives:
                file.close()
                if kernel != "refused" or time.monotonic() > deadline:
                    self._refuse()
                time.sleep(0.02)
            elif kernel == "refused":
                file.close()
                self.file.unlink(missing_ok=True)  # the lock outlived its machine: it stays with the old file
            else:
                holder = Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
                file.truncate(0)
                file.write(json.dumps(asdict(holder)))
                file.flush()
                return file

    def _beat(self, file: IO[str], over: threading.Event) -> None:
        """Touch the file now and then; end this process if another machine has taken the directory over."""
        while not over.wait(BEAT_S):
            try:
                if self._is_current(file):
                    os.utime(file.fileno())
                    continue
            except OSError:  # a disk that fails for once is no reason to end
                continue
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"error: another run has taken over {self.folder}; this one ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _is_current(self, file: IO[str]) -> bool:
        """Whether an open file is the lock that others see."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.file.stat())
        except FileNotFoundError:
            return False

    def _holder_lives(self, kernel: Kernel, now: float) -> bool:
        """Whether the process that the file names is alive, as far as can be told from here.

        Args:
            kernel: what the kernel answered to our wish for its lock.
            now: the time that the heartbeat is compared with, in seconds since 1970.
        """
        holder = self.holder()
        if holder is None:  # the file is empty, or someone is just writing it
            return kernel == "refused"
        here = holder.host == socket.gethostname()
        if here and kernel != "unsupported":  # on one machine the kernel knows
            return kernel == "refused"
        try:
            is_silent = now - self.file.stat().st_mtime > SILENT_S
        except FileNotFoundError:
            return False
        return not is_silent and (not here or _is_running(holder.pid))

    def _disk_time(self) -> float:
        """The time by the clock of the disk, which all machines share, in seconds since 1970."""
        import tempfile  # only a run needs it, and `--help` and `status` are to answer at once

        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime

    def _refuse(self) -> NoReturn:
        holder = self.holder()
        watch = f"`rlhf-pipeline watch {shlex.quote(str(self.folder))}` shows it"
        hint = self.hint or f"{watch}; wait for it, or give this recipe another `name`"
        if holder is not None and holder.host != socket.gethostname():
            hint += f"; if it died, its hold ends {duration(SILENT_S)} after its last sign of life"
        raise RunError(f"{self.folder} is in use by {holder or 'another process'}", hint=hint)


def _flock(file: IO[str], kind: int) -> Kernel:
    """Ask the kernel for a lock on an open file, without waiting."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        return "refused" if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else "unsupported"
    return "granted"


def _is_running(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # there is, and it is another user's
        return True
    except OSError:
        return False
    return True
