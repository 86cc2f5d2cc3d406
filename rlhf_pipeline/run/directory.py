"""The run directory: what a run has made so far, and the truth about it. No torch."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import RunError


class RunDirectory:
    """The folder of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.path / name

    def record(self, name: str) -> dict[str, Any] | None:
        """A stage's `stage.json`; None where there is none, or it cannot be read."""
        try:
            record = json.loads((self.stage(name) / "stage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Replace a stage's `stage.json` in one step."""
        write_atomically(self.stage(name) / "stage.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def set_aside(self, name: str) -> Path | None:
        """Move a stage's folder to `<stage>.<time>`, so that nothing is lost; None where there is none."""
        folder = self.stage(name)
        if not folder.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path / f"{name}.{stamp}"
        count = 1
        while aside.exists():
            count += 1
            aside = self.path / f"{name}.{stamp}-{count}"
        folder.rename(aside)
        return aside

    def publish(self, name: str) -> None:
        """Move a stage's finished adapter from its working folder into place, and clear that folder away."""
        work = self.stage(name) / "work"
        (work / "adapter").rename(self.stage(name) / "adapter")
        shutil.rmtree(work)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory; the lock goes with the process, however it ends.

        Raises:
            RunError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            for patience in range(50, -1, -1):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    self.refuse_if_locked()
                    if not patience:
                        raise
                    time.sleep(0.01)  # someone else was only looking; see `is_locked`
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def refuse_if_locked(self) -> None:
        """Raise `RunError`, naming the process, if a run is going on here."""
        if self.is_locked():
            holder = (self.path / ".lock").read_text().strip()
            raise RunError(
                f"{self.path} is in use by process {holder}", hint="wait for it, or give this recipe another `name`"
            )

    def is_locked(self) -> bool:
        """Whether a run is going on here."""
        try:
            with (self.path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new and nothing between."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
