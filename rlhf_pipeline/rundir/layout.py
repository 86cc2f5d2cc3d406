"""The run directory: what a run has made so far, and the truth about it. No torch."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.lock import Lock

TRAINED = "trained.json"  # in a stage's `work/`: its numbers and its artifact's digests, once training is over
RESULT = "result.json"  # in a stage's `work/`: what the worker hands back, once there is nothing left to do
PROGRESS = "progress.json"  # in a stage's `work/`: what it is doing just now, for those who watch
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a stage that broke off has come.

    Attributes:
        point: a run goes on from a `checkpoint`; or it was `trained` and is to be judged; or it was `finished` and is
            to be published.
        step: of the checkpoint.
        of: how many steps there are.
        damaged: later checkpoints that cannot be trusted, with what is wrong.
    """

    point: Literal["checkpoint", "trained", "finished"]
    step: int | None = None
    of: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.point != "checkpoint":
            return "trained, to be judged" if self.point == "trained" else "trained, to be published"
        steps = f"step {self.step}" + (f" of {self.of}" if self.of else "")
        return "; ".join(
            [f"goes on from {steps}", *(f"{name} is damaged: {why}" for name, why in self.damaged.items())]
        )


class RunDirectory:
    """The folder of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.path / name

    def work(self, name: str) -> Path:
        """Where a stage is made until it is done."""
        return self.path / name / "work"

    def record(self, name: str) -> dict[str, Any] | None:
        """A stage's `stage.json`; where it cannot be read, what the stage was started with; None where it never was.

        So a spoilt record of a stage that broke off costs nothing.
        """
        record = read_json(self.stage(name) / "stage.json")
        if record is None:
            record = (read_json(self.work(name) / "job.json") or {}).get("record")
        return record if isinstance(record, dict) else None

    def unreadable(self, name: str) -> str | None:
        """Why a stage's record cannot be read; None where it can, or where nothing needs it."""
        file = self.stage(name) / "stage.json"
        if self.record(name) is not None or not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"stage.json cannot be read: {error}"
        return f"stage.json holds no record but {type(content).__name__}"

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Replace a stage's `stage.json` in one step."""
        durable.write_text(self.stage(name) / "stage.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def progress(self, name: str) -> Progress | None:
        """Where a stage that broke off can go on; None where it has to start over."""
        work = self.work(name)
        note = read_json(work / TRAINED) or {}
        files = note.get("files")
        if isinstance(files, dict) and WEIGHTS in files:
            done = "metrics" in (read_json(work / RESULT) or {})
            for artifact in (work / "adapter", *([self.stage(name) / "adapter"] if done else [])):
                if durable.difference(artifact, files) is None:
                    return Progress("finished" if done else "trained")
        checkpoint, damaged = durable.newest_sound(work)
        if checkpoint is None:
            return None
        state = read_json(checkpoint / "trainer_state.json") or {}
        return Progress("checkpoint", durable.step(checkpoint), state.get("max_steps"), damaged)

    def prepare(self, name: str, progress: Progress | None) -> None:
        """Leave in a stage's `work/` what it goes on from, and nothing else that it could be taken for."""
        work = self.work(name)
        if progress is None:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        if progress is None or progress.point == "finished":
            return
        (work / RESULT).unlink(missing_ok=True)
        if progress.point == "checkpoint":
            (work / TRAINED).unlink(missing_ok=True)
            for unpublished in (work / "adapter", self.stage(name) / "adapter"):  # moved, but never recorded
                shutil.rmtree(unpublished, ignore_errors=True)
            for damaged in progress.damaged:
                shutil.rmtree(work / f"damaged-{damaged}", ignore_errors=True)
                (work / damaged).rename(work / f"damaged-{damaged}")

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

    def publish(self, name: str) -> durable.Contents:
        """Move a stage's finished adapter from its working folder into place, if that is still to do.

        Returns:
            What its files hold.
        """
        if (self.work(name) / "adapter").exists():
            (self.work(name) / "adapter").rename(self.stage(name) / "adapter")
            durable.sync([self.stage(name), self.work(name)])
        return json.loads((self.work(name) / TRAINED).read_text(encoding="utf-8"))["files"]

    def clear(self, name: str) -> None:
        """Remove a stage's working folder."""
        shutil.rmtree(self.work(name), ignore_errors=True)

    def artifact_problem(self, name: str, record: dict[str, Any], digest: Callable[[Path], str]) -> str | None:
        """What is wrong with a stage's artifact, as one phrase; None where its files are those of the record.

        Args:
            name: the stage's.
            record: its record.
            digest: gives the beginning of a file's SHA-256; it may remember.
        """
        folder = self.stage(name) / "adapter"
        for file, (size, sha256) in (record.get("artifact_files") or {WEIGHTS: [None, ""]}).items():
            path = folder / file
            if not path.is_file():
                return "its adapter is gone" if file == WEIGHTS else f"its adapter/{file} is gone"
            if size is not None and (path.stat().st_size != size or not sha256.startswith(digest(path))):
                return f"its adapter/{file} is not what the stage wrote"
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory; see `Lock`.

        Raises:
            RunError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.held():
            yield

    def refuse_if_locked(self) -> None:
        """Raise `RunError`, naming the process, if a run is going on here."""
        self.lock.refuse_if_held()

    def is_locked(self) -> bool:
        """Whether a run is going on here."""
        return self.lock.is_held()


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
