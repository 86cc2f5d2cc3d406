"""What a run is doing, read again and again from its directory while that grows. No torch."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.plan import weights
from rlhf_pipeline.recipe import Recipe, of_run
from rlhf_pipeline.rundir.headline import headline, is_number
from rlhf_pipeline.rundir.jsonl import parse
from rlhf_pipeline.rundir.layout import PROGRESS, RunDirectory, read_json

MOST_BYTES = 2**18  # read at once: of a file that is longer, its end
VALUES = 60  # kept of each number, for its trend
PACE_S, PACE_STEPS = 60.0, 5  # how far back the pace is measured: the longer of the two


class Growing:
    """The objects that come to a `.jsonl` file, each read once.

    Args:
        file: the file; it need not be there yet, and may be cut or replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0
        self._mark = b""  # what stood before the offset: if that is something else now, so is the file

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The objects that came since, of many the last; and whether what was read before counts no more."""
        try:
            with self.file.open("rb") as file:
                return self._read(file)
        except OSError:
            began_anew = self._offset > 0
            self._offset, self._mark = 0, b""
            return [], began_anew

    def _read(self, file: IO[bytes]) -> tuple[list[dict[str, Any]], bool]:
        file.seek(self._offset - len(self._mark))
        began_anew = file.read(len(self._mark)) != self._mark
        if began_anew:
            self._offset, self._mark = 0, b""
        size = os.fstat(file.fileno()).st_size
        start = max(self._offset, size - MOST_BYTES)
        file.seek(start)
        content = file.read(MOST_BYTES)
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return [], began_anew
        lines = whole.split(b"\n")[:-1]
        if start > self._offset:
            del lines[0]  # of which the beginning is missing
        self._offset, self._mark = start + len(whole), whole[-64:]
        rows = (parse(line.decode("utf-8", "replace")) for line in lines)
        return [row for row in rows if row is not None], began_anew


class Pace:
    """How fast steps follow one another just now."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, int]] = deque()

    def note(self, at: float, step: int) -> None:
        """Note that a step was reached, in Unix seconds; what is no news is passed over."""
        if self.marks and (step <= self.marks[-1][1] or at < self.marks[-1][0]):
            return
        self.marks.append((at, step))
        while len(self.marks) > 2 and self.marks[1][0] <= at - PACE_S and self.marks[1][1] <= step - PACE_STEPS:
            self.marks.popleft()

    def seconds_left(self, of: int | None, now: float) -> float | None:
        """How long the rest will take if it goes on like this; None where that cannot be known yet."""
        if of is None or len(self.marks) < 2:
            return None
        (first, first_step), (last, last_step) = self.marks[0], self.marks[-1]
        of_one = (last - first) / (last_step - first_step)
        begun = min(max(now - last, 0.0), of_one)  # the step that is at work
        return max((of - last_step) * of_one - begun, 0.0)


class StageView:
    """One stage as its folder shows it.

    Args:
        directory: the run directory.
        name: the stage's.
        kind: the stage's.

    Attributes:
        record: its `stage.json`, or nothing.
        phase: what it does just now: `starting` until it says so itself.
        step, of: how far it is in that phase; `of` is None where nobody knows.
        values: the last values of its numbers, by their short names.
        samples: of the latest step that has some.
        elapsed: seconds that it has worked, in all.
        left: seconds that its phase will go on; None where that cannot be known yet.
    """

    def __init__(self, directory: RunDirectory, name: str, kind: str) -> None:
        self.directory, self.name, self.kind = directory, name, kind
        self.record: dict[str, Any] = {}
        self.written: tuple[int, int] | None = None
        self._metrics = Growing(directory.stage(name) / "metrics.jsonl")
        self._samples = Growing(directory.stage(name) / "samples.jsonl")
        self._began: float | None = None
        self.values: dict[str, deque[float]] = {}
        self.samples: deque[dict[str, Any]] = deque(maxlen=16)
        self._start_over()

    def _start_over(self) -> None:
        self.phase, self.step = "starting", 0
        self.of: int | None = None
        self.pace, self.pace_of_phase = Pace(), Pace()
        self.elapsed = 0.0
        self.left: float | None = None

    @property
    def state(self) -> str:
        """As the record says: `done`, `running`, `stopped`, `failed`; `waiting` where there is none."""
        state = str(self.record.get("state", "waiting"))
        return "stopped" if state == "failed" and self.record.get("error") == "stopped" else state

    @property
    def bound_of_kl(self) -> float | None:
        """The KL that PPO's settings want: its budget, or what it is steered to."""
        inputs = self.record.get("inputs") or {}
        bounds = (inputs.get(f"trainer.{key}") for key in ("kl_budget", "target_kl"))
        return next((bound for bound in bounds if isinstance(bound, (int, float))), None)

    @property
    def final(self) -> dict[str, float]:
        """The numbers to show of a stage that is done."""
        return {number.name: number.after for number in headline(self.kind, self.record.get("metrics") or {})}

    @property
    def logged(self) -> dict[str, str]:
        """The numbers to show of a stage at work: their short names, and TRL's."""
        known = kinds.find(self.kind)
        return {number.name: number.logged for number in known.numbers if number.logged} if known else {}

    def read_record(self) -> None:
        """Read the record, if it was written since."""
        try:
            status = (self.directory.stage(self.name) / "stage.json").stat()
            written = (status.st_mtime_ns, status.st_ino)
        except OSError:
            written = None
        if written is None or written != self.written:
            self.written = written
            self.record = (self.directory.record(self.name) or {}) if written else {}

    def read_work(self, now: float) -> None:
        """Read what a stage at work tells.

        Args:
            now: Unix seconds.
        """
        work = self.directory.work(self.name)
        began = _changed(work / "job.json")
        if began != self._began:  # another worker
            self._began = began
            self._start_over()
        rows, began_anew = self._metrics.read()
        if began_anew:
            self.values.clear()
        for row in rows:
            self._take(row)
        self._read_samples()
        told = read_json(work / PROGRESS) or {}
        if began is None or (_changed(work / PROGRESS) or 0.0) < began:
            told = {}  # of an earlier worker
        phase, step, of, at = (told.get(key) for key in ("phase", "step", "of", "time"))
        if isinstance(phase, str) and isinstance(step, int) and is_number(at):
            if phase != self.phase or step < self.step:
                self.pace_of_phase = Pace()
            self.phase, self.step, self.of = phase, step, of if isinstance(of, int) else None
            self.pace_of_phase.note(at, step)
            if phase == "training":
                self.pace.note(at, step)
        pace = self.pace if self.phase == "training" else self.pace_of_phase
        self.left = pace.seconds_left(self.of, now)
        before = self.record.get("wall_s")
        self.elapsed = (before if is_number(before) else 0.0) + (max(now - began, 0.0) if began else 0.0)

    def _take(self, row: dict[str, Any]) -> None:
        at, step = row.get("time"), row.get("step")
        if is_number(at) and isinstance(step, int) and self._began is not None and at >= self._began:
            self.pace.note(at, step)
        for name, key in self.logged.items():
            if is_number(row.get(key)):
                self.values.setdefault(name, deque(maxlen=VALUES)).append(row[key])

    def _read_samples(self) -> None:
        rows, began_anew = self._samples.read()
        if began_anew:
            self.samples.clear()
        for row in rows:
            if self.samples and self.samples[-1].get("step") != row.get("step"):
                self.samples.clear()
            self.samples.append(row)


class RunView:
    """A run as its directory shows it.

    Args:
        run: the run directory; it need not be there yet.
        recipe: the run's; by default what the directory holds.
        locked: whether a run is going on; by default one is, and a stage is at work if its record says so and was
            written since this was made: a record of an earlier run may say so too.

    Attributes:
        stages: in the recipe's order.
        at_work: the stage that is, if one is.
    """

    def __init__(self, run: Path, recipe: Recipe | None = None, locked: Callable[[], bool] | None = None) -> None:
        self.directory = RunDirectory(run)
        self.stages: list[StageView] = []
        self.at_work: StageView | None = None
        self._recipe, self._locked = recipe, locked
        self._resolved: float | None = None
        self._read_stages()
        for stage in self.stages:
            stage.read_record()
        self._before = {} if locked else {stage.name: stage.written for stage in self.stages}

    def refresh(self, now: float | None = None) -> None:
        """Read what is new.

        Args:
            now: Unix seconds.
        """
        if self._recipe is None:
            self._read_stages()
        for stage in self.stages:
            stage.read_record()
        going_on = self._locked is None or self._locked()
        running = [stage for stage in self.stages if stage.state == "running"]
        current = [stage for stage in running if self._before.get(stage.name, ()) != stage.written]
        self.at_work = current[-1] if current and going_on else None
        if self.at_work:
            self.at_work.read_work(time.time() if now is None else now)

    def state(self, stage: StageView) -> str:
        """A stage's state, as one word or two."""
        if stage is self.at_work:
            return stage.phase
        if stage.state == "running":
            return "broke off"
        if stage.state == "done" and self._outdated(stage):
            return "stale"
        return stage.state

    def _outdated(self, stage: StageView) -> bool:
        """Whether a stage was built on something that is not there any more, and so will run again."""
        records = {other.name: other.record for other in self.stages}
        built_on = stage.record.get("built_on") or {}
        return any(
            records[name].get("state") != "done" or weights(records[name]) != made_of
            for name, made_of in built_on.items()
            if name in records and made_of is not None
        )

    def _read_stages(self) -> None:
        """Find the stages: in the recipe; where that cannot be read, those that have begun."""
        recipe = self._recipe
        if recipe is None:
            resolved = _changed(self.directory.path / "recipe.yaml")
            if self.stages and resolved == self._resolved:
                return
            self._resolved = resolved
            with contextlib.suppress(InputError):
                recipe = of_run(self.directory.path)
        if recipe is not None:
            kind_of = {name: str(stage.kind) for name, stage in recipe.stages.items()}
        else:
            records = {file.parent.name: read_json(file) or {} for file in self.directory.path.glob("*/stage.json")}
            begun = sorted(records, key=lambda name: str(records[name].get("started_at")))
            kind_of = {name: str(records[name].get("kind")) for name in begun if "." not in name}
        known = {stage.name: stage for stage in self.stages if kind_of.get(stage.name) == stage.kind}
        self.stages = [known.get(name) or StageView(self.directory, name, kind) for name, kind in kind_of.items()]


def _changed(file: Path) -> float | None:
    """When a file was last changed, in Unix seconds; None where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None
