"""One run at a time in a run directory, on one machine or several. No torch."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

from rlhf_pipeline.errors import RunError

BEAT_S = 15.0  # how often the holder shows that it is alive
SILENT_S = 120.0  # a holder on another machine that has shown nothing for so long is taken for dead


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

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

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

    def is_held(self) -> bool:
        """Whether a run is going on here."""
        try:
            file = self.file.open()
        except OSError:  # there is none, or it is somebody else's, and then a run will say that it cannot be written to
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return not self._is_silent(time.time())
                if self._lives_here(time.time()):
                    return True
        return self._is_held_elsewhere(time.time())

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
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    dead = self._is_silent(self._time_there()) and self._is_still(file)
                    file.close()
                    if dead:
                        self.file.unlink(missing_ok=True)  # the lock outlived its machine: it stays with the old file
                    elif time.monotonic() > deadline:
                        self._refuse()
                    else:
                        time.sleep(0.02)
                    continue
                if self._lives_here(self._time_there()):  # no locks on this file system: the holder's word has to do
                    file.close()
                    self._refuse()
            if not self._is_still(file):
                file.close()
                continue
            if self._is_held_elsewhere(self._time_there()):
                file.close()
                self._refuse()
            file.truncate(0)
            file.write(
                json.dumps(asdict(Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))))
            )
            file.flush()
            return file

    def _beat(self, file: IO[str], over: threading.Event) -> None:
        """Touch the file now and then; end this process if another machine has taken the directory over."""
        while not over.wait(BEAT_S):
            if not self._is_still(file):
                print(f"error: another run has taken over {self.folder}; this one ends", file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(file.fileno())

    def _is_still(self, file: IO[str]) -> bool:
        """Whether an open file is the lock that others see."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.file.stat())
        except FileNotFoundError:
            return False

    def _is_held_elsewhere(self, now: float) -> bool:
        """Whether a process of another machine shows that it is alive."""
        holder = self.holder()
        return holder is not None and holder.host != socket.gethostname() and not self._is_silent(now)

    def _is_silent(self, now: float) -> bool:
        """Whether the holder is on another machine and has shown nothing for long."""
        holder = self.holder()
        if holder is None or holder.host == socket.gethostname():
            return False
        try:
            return now - self.file.stat().st_mtime > SILENT_S
        except FileNotFoundError:
            return False

    def _lives_here(self, now: float) -> bool:
        """Whether the holder is a process of this machine that is there and shows that it is alive."""
        holder = self.holder()
        if holder is None or holder.host != socket.gethostname():
            return False
        try:
            os.kill(holder.pid, 0)
            return now - self.file.stat().st_mtime <= SILENT_S
        except PermissionError:
            return True
        except OSError:
            return False

    def _time_there(self) -> float:
        """The time by the clock of the disk, which all machines share."""
        probe = self.folder / f".clock-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        except FileNotFoundError:  # whoever takes the lock clears such files away
            return time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _refuse(self) -> NoReturn:
        holder = self.holder()
        hint = "wait for it, or give this recipe another `name`"
        if holder is not None and holder.host != socket.gethostname():
            hint += f"; if it died, its hold ends {SILENT_S:.0f} s after its last sign of life"
        raise RunError(f"{self.folder} is in use by {holder or 'another process'}", hint=hint)
