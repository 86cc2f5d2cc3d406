"""What a run is doing, read again and again from its growing directory. No torch."""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.report import alarms
from rlhf_pipeline.rundir.headline import headline
from rlhf_pipeline.rundir.jsonl import parse
from rlhf_pipeline.rundir.layout import JOB, METRICS, PROGRESS, RECIPE, RECORD, SAMPLES, RunDirectory, read_json
from rlhf_pipeline.rundir.pace import Pace
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.state import State, read_recipe, read_stages, stage_at_work, stage_names
from rlhf_pipeline.rundir.strict_json import is_number

MOST_BYTES = 2**18  # read at once: of a file that is longer, its end
VALUES = 60  # kept of each number, for its trend
Written = tuple[int, int]  # mtime in ns and inode: a file that is replaced has another inode


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
            is_new_file = self._offset > 0
            self._offset, self._mark = 0, b""
            return [], is_new_file

    def _read(self, file: IO[bytes]) -> tuple[list[dict[str, Any]], bool]:
        file.seek(self._offset - len(self._mark))
        is_new_file = file.read(len(self._mark)) != self._mark
        if is_new_file:
            self._offset, self._mark = 0, b""
        size = os.fstat(file.fileno()).st_size
        start = max(self._offset, size - MOST_BYTES)
        file.seek(start)
        content = file.read(MOST_BYTES)
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return [], is_new_file
        lines = whole.split(b"\n")[:-1]
        if start > self._offset:
            del lines[0]  # of which the beginning is missing
        self._offset, self._mark = start + len(whole), whole[-64:]
        return [row for row in map(parse, lines) if row is not None], is_new_file


class StageView:
    """One stage as its folder shows it.

    Args:
        directory: the run directory.
        name: the stage's.
        kind: the stage's.

    Attributes:
        state: as `rundir.state` reads it, and the `reason` of it.
        record: its record; an empty one where there is none.
        phase: what it does just now: `starting` until it says so itself.
        step, of: how far it is in that phase; `of` is None where nobody knows.
        member: the number of the member of an ensemble that is at work, and how many there are; None for no ensemble.
        values: the last values of its numbers, by their short names.
        samples: of the latest step that has some.
        elapsed: seconds that it has worked, in all.
        left: seconds until its phase ends; None where that cannot be known yet.
    """

    def __init__(self, directory: RunDirectory, name: str, kind: str) -> None:
        self.directory, self.name, self.kind = directory, name, kind
        self.state: State = "missing"
        self.reason = ""
        self.record = Record()
        self._metrics = Growing(directory.stage(name) / METRICS)
        self._samples = Growing(directory.stage(name) / SAMPLES)
        self._began: float | None = None
        self.values: dict[str, deque[float]] = {}
        self.samples: deque[dict[str, Any]] = deque(maxlen=16)
        self._reset()

    def _reset(self) -> None:
        self.phase, self.step = "starting", 0
        self.of: int | None = None
        self.member: tuple[int, int] | None = None
        self.pace, self.pace_of_phase = Pace(), Pace()
        self.elapsed = 0.0
        self.left: float | None = None

    @property
    def bound_of_kl(self) -> float | None:
        """The KL that PPO's settings ask for: its budget, or its target."""
        bounds = (self.record.inputs.get(f"trainer.{key}") for key in ("kl_budget", "target_kl"))
        return next((bound for bound in bounds if isinstance(bound, (int, float))), None)

    @property
    def final(self) -> dict[str, str]:
        """The numbers to show of a stage that is done, in words."""
        return {number.name: number.text for number in headline(self.kind, self.record.metrics)}

    @property
    def logged(self) -> dict[str, str]:
        """The numbers to show of a stage at work: their short names, and TRL's."""
        known = kinds.find(self.kind)
        return {number.name: number.logged for number in known.numbers if number.logged} if known else {}

    def read_work(self, now: float) -> None:
        """Read what a stage at work has written.

        Args:
            now: Unix seconds.
        """
        work = self.directory.work(self.name)
        began = _changed(work / JOB)
        if began != self._began:  # another worker
            self._began = began
            self._reset()
        rows, is_new_file = self._metrics.read()
        if is_new_file:
            self.values.clear()
        for row in rows:
            self._take(row)
        self._read_samples()
        progress = read_json(work / PROGRESS) or {}
        if began is None or (_changed(work / PROGRESS) or 0.0) < began:
            progress = {}  # of an earlier worker
        phase, step, of, at = (progress.get(key) for key in ("phase", "step", "of", "time"))
        if isinstance(phase, str) and isinstance(step, int) and is_number(at):
            if phase != self.phase or step < self.step:
                self.pace_of_phase = Pace()
            number, count = progress.get("member"), progress.get("members")
            member = (number, count) if isinstance(number, int) and isinstance(count, int) else None
            if member != self.member:
                self.pace = Pace()  # its steps begin anew
            self.phase, self.step, self.of, self.member = phase, step, of if isinstance(of, int) else None, member
            self.pace_of_phase.note(at, step)
            if phase == "training":
                self.pace.note(at, step)
        pace = self.pace if self.phase == "training" else self.pace_of_phase
        # Of an ensemble, the members after this one train as long.
        after = (self.of or 0) * (self.member[1] - self.member[0]) if self.member and self.phase == "training" else 0
        self.left = pace.seconds_left(self.of and self.of + after, now)
        self.elapsed = (self.record.wall_s or 0.0) + (max(now - began, 0.0) if began else 0.0)

    def _take(self, row: dict[str, Any]) -> None:
        at, step = row.get("time"), row.get("step")
        if is_number(at) and isinstance(step, int) and self._began is not None and at >= self._began:
            self.pace.note(at, step)
        for name, key in self.logged.items():
            if is_number(row.get(key)):
                self.values.setdefault(name, deque(maxlen=VALUES)).append(row[key])

    def _read_samples(self) -> None:
        rows, is_new_file = self._samples.read()
        if is_new_file:
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
        doing: what the run does where no stage is at work, as it checks or compares; None where nobody knows, and of a
            run of this process.
        alarms: the bad ones of stages that are finished, their states apart.
    """

    def __init__(self, run: Path, recipe: Recipe | None = None, locked: Callable[[], bool] | None = None) -> None:
        self.directory = RunDirectory(run)
        self.stages: list[StageView] = []
        self.at_work: StageView | None = None
        self.doing: str | None = None
        self.alarms: list[alarms.Alarm] = []
        self._recipe = {"stages": recipe.model_dump()["stages"]} if recipe else {}
        self._locked, self._follows_recipe = locked, recipe is None
        self._recipe_written: Written | None = None
        self._seen: tuple[Any, ...] | None = None
        self._before = None if locked else self._written()
        self._read_stages(None)

    def refresh(self, now: float | None = None) -> None:
        """Read what is new.

        Args:
            now: Unix seconds.
        """
        name = None
        goes_on = self._locked is None or self._locked()
        if goes_on:
            written = self._written()
            name = stage_at_work(self.directory, [name for name in written if self._is_of_this_run(name, written)])
        self._read_stages(name)
        self.at_work = next((stage for stage in self.stages if stage.name == name), None)
        watched = goes_on and self._locked is not None
        self.doing = self.directory.doing() if watched and self.at_work is None else None
        if self.at_work:
            self.at_work.read_work(time.time() if now is None else now)

    def word(self, stage: StageView) -> str:
        """What a stage is doing if it is at work, else its state."""
        return stage.phase if stage is self.at_work else stage.state

    def _written(self) -> dict[str, Written | None]:
        """When the record of each stage was last written."""
        return {name: _written(self.directory.stage(name) / RECORD) for name in self.directory.begun()}

    def _is_of_this_run(self, name: str, written: dict[str, Written | None]) -> bool:
        return self._before is None or self._before.get(name) != written[name]

    def _read_stages(self, at_work: str | None) -> None:
        """Read states and records, if something was written since that they depend on."""
        recipe_written = _written(self.directory.path / RECIPE)
        seen = (self._written(), recipe_written, at_work)
        if seen == self._seen:
            return
        self._seen = seen
        if self._follows_recipe and recipe_written != self._recipe_written:
            self._recipe_written = recipe_written
            self._recipe = read_recipe(self.directory.path)[0]
        names = stage_names(self.directory, self._recipe)
        if not self._follows_recipe:
            names = [name for name in names if name in self._recipe["stages"]]
        views = {stage.name: stage for stage in self.stages}
        self.stages = []
        for found in read_stages(self.directory, self._recipe, names, at_work):
            view = views.get(found.name)
            if view is None or view.kind != found.kind:
                view = StageView(self.directory, found.name, found.kind)
            view.state, view.reason, view.record = found.state, found.reason, found.record
            self.stages.append(view)
        finished = [stage.name for stage in self.stages if stage.record.is_finished]
        listed = alarms.read(self.directory.path) if finished else []
        self.alarms = [
            alarm for alarm in listed if alarm.level == "bad" and alarm.where in finished and not alarm.is_state
        ]


def _written(file: Path) -> Written | None:
    """Changes when a file is written or replaced; None where there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _changed(file: Path) -> float | None:
    """When a file was last changed, in Unix seconds; None where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None
