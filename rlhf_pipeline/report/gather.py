"""What a run directory holds, as plain data; what is missing or broken is noted, never raised. No torch."""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline import kinds
from rlhf_pipeline.hacking.watch import Measurement
from rlhf_pipeline.local import resolved
from rlhf_pipeline.rundir import jsonl, state
from rlhf_pipeline.rundir.headline import over_members
from rlhf_pipeline.rundir.layout import (
    COMPARISON,
    METRICS,
    PAIRS,
    PEOPLE,
    PROGRESS,
    RECIPE,
    RECORD,
    SAMPLES,
    WATCH,
    RunDirectory,
    read_json,
)
from rlhf_pipeline.rundir.record import ROWS, Record
from rlhf_pipeline.rundir.state import StageState, State
from rlhf_pipeline.rundir.strict_json import LARGEST, number

Numbers = NDArray[np.float64]
MOST_ROWS = 500  # of those that a stage made: the first ones
MOST_SAMPLES = 1000  # lines of a samples.jsonl that are read: the last ones, where the judged replies are
MOST_READ_WHOLE = 6  # runs whose artifacts are read for their digests
LONGEST_NAME = 80  # characters of a run's name


@dataclass
class Series:
    """A metric over steps: both `[n]`, finite, in the order of the steps."""

    steps: Numbers
    values: Numbers

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Pairs:
    """Held-out pairs of a reward stage, each array `[n]`; empty where not known.

    Attributes:
        chosen, rejected: scores.
        chosen_length, rejected_length: in tokens.
        margin_std: of an ensemble, the standard deviation of its members' margins.
    """

    chosen: Numbers
    rejected: Numbers
    chosen_length: Numbers
    rejected_length: Numbers
    margin_std: Numbers = field(default_factory=lambda: np.empty(0))

    @property
    def margins(self) -> Numbers:
        """How far the chosen reply is ahead."""
        return self.chosen - self.rejected


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        state: as `rundir.state` reads it, and the `reason` of it.
        parents: the stage, or `base`, that it has in each role.
        record: its record; an empty one where there is none.
        series: its metrics by name.
        not_finite: of a metric, how often it was logged as NaN, infinite or null.
        samples: rows of samples.jsonl.
        pairs: held-out pairs with their scores.
        rows: the first rows that it made, of a stage that makes some.
        people: of a stage that people do, what is known of them: `agreement.figures` says what.
        measurements: of a policy that was watched while it trained.
        progress: of a stage at work, where it is.
        notes: what could not be read, one sentence each.
    """

    name: str
    kind: str
    state: State
    reason: str
    parents: dict[str, str]
    record: Record
    series: dict[str, Series] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    pairs: Pairs | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    people: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str) -> float | None:
        """A number among the settings that counted."""
        return number(self.record.inputs.get(key))

    def final(self, metric: str) -> float | None:
        """The metric's final value: of the record, or the last one logged."""
        value = number(self.record.metrics.get(metric))
        if value is None and len(series := self.series.get(metric, EMPTY)):
            return float(series.values[-1])
        return value

    def first(self, metric: str) -> float | None:
        """The value that was logged first."""
        series = self.series.get(metric, EMPTY)
        return float(series.values[0]) if len(series) else None

    @property
    def wall_s(self) -> float | None:
        """Seconds that it took; None while it is running and where it was killed: its record is then from its start."""
        return None if self.record.state == "running" else self.record.wall_s


@dataclass
class Run:
    """One run directory.

    Attributes:
        path: where it is.
        label: its name, made unique among those of a report.
        state: `running`, `failed`, `gate closed`, `done`, or `unfinished`.
        recipe: the resolved recipe as it is written, or nothing.
        stages: in the order of the recipe.
        comparison: the content of comparison.json, or nothing.
        notes: what could not be read.
    """

    path: Path
    label: str
    state: str
    recipe: dict[str, Any]
    stages: list[Stage]
    comparison: dict[str, Any]
    notes: list[str]

    def stage(self, name: str) -> Stage | None:
        """The stage of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def reward_models(self) -> list[Stage]:
        """The stages that make one."""
        return [stage for stage in self.stages if (kind := kinds.find(stage.kind)) and kind.makes == "reward"]


EMPTY = Series(np.empty(0), np.empty(0))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several run directories; those of the same name are numbered.

    Of more than there are colours, artifacts are held against the records by their sizes alone.
    """
    runs = [read_run(folder, by_size=len(folders) > MOST_READ_WHOLE) for folder in folders]
    labels = [run.label for run in runs]
    for i, run in enumerate(runs):
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({labels[: i + 1].count(run.label)})"
    return runs


def read_run(folder: Path, by_size: bool = False) -> Run:
    """Read a run directory, whatever state it is in; `by_size` is as in `state.read`."""
    notes: list[str] = []
    found = state.read(folder, by_size)
    if found.recipe_problem:
        notes.append(f"{RECIPE} {found.recipe_problem}, so stages that never started are not listed.")
    directory = RunDirectory(folder)
    stages = [_stage(directory, stage) for stage in found.stages]
    if not stages:
        notes.append("No stage has written anything here.")
    comparison: dict[str, Any] = {}
    if (folder / COMPARISON).exists():
        comparison = read_json(folder / COMPARISON) or {}
        if not comparison:
            notes.append("comparison.json cannot be read, so policies are not compared.")
        there = {stage.name: stage.record.weights for stage in stages}
        other = [name for name, weights in mapping(comparison.get("made_of")).items() if there.get(name) != weights]
        if other:
            notes.append(
                f"comparison.json compares other weights of {', '.join(other)} than the current ones; "
                "`rlhf-pipeline compare` makes it again."
            )
    named = found.recipe.get("name")
    name = named if isinstance(named, str) else resolved(folder).name
    return Run(folder, _label(name), found.state, found.recipe, stages, comparison, notes)


def _label(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def turns(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as turns, each a role and a text; of plain text the role is empty."""
    if isinstance(prompt, list) and prompt:
        return [
            (str(turn.get("role", "")), content(turn.get("content"))) if isinstance(turn, dict) else ("", str(turn))
            for turn in prompt
        ]
    return [("", content(prompt))]


def comparison_rows(run: Run) -> list[dict[str, Any]]:
    """Prompts with their replies by policy, of comparison.json or, where there is none, what the judge saw.

    Returns:
        Rows as in comparison.json; `replies` may lack policies and numbers.
    """
    rows = run.comparison.get("rows")
    if isinstance(rows, list):
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("replies"), dict)]
    by_prompt: dict[str, dict[str, Any]] = {}
    for stage in run.stages:
        for sample in stage.samples:
            if "judge" in sample and "completion" in sample:
                row = by_prompt.setdefault(repr(sample.get("prompt")), {"prompt": sample.get("prompt"), "replies": {}})
                row["replies"][stage.name] = {"text": content(sample["completion"]), "judge": sample["judge"]}
    return list(by_prompt.values())


def policies(run: Run) -> list[str]:
    """The policies that `comparison_rows` has replies of, in their order."""
    listed = run.comparison.get("policies")
    named = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    seen = dict.fromkeys(str(name) for row in comparison_rows(run) for name in row["replies"])
    return [*(name for name in named if name in seen), *(name for name in seen if name not in named)]


def reply_numbers(run: Run, policy: str, name: str) -> Numbers:
    """A number of every reply of a policy: its `reward`, `judge`, `kl` or `tokens`; `[n]`, those that are known."""
    replies = (mapping(row["replies"].get(policy)) for row in comparison_rows(run))
    values = (number(reply.get(name)) for reply in replies)
    return np.array([value for value in values if value is not None])


def _stage(directory: RunDirectory, found: StageState) -> Stage:
    folder = directory.stage(found.name)
    stage = Stage(
        found.name, found.kind if kinds.find(found.kind) else "", found.state, found.reason, found.parents, found.record
    )  # fmt: skip
    if directory.unreadable(found.name):
        stage.notes.append(f"{RECORD} cannot be read, so its settings and final numbers are not shown.")
    rows = over_members(_rows(folder / METRICS, stage.notes))
    _take_columns(stage, rows)
    kind = kinds.find(found.kind)
    if kind and not kind.trains:
        stage.rows = [line.row for line in itertools.islice(jsonl.sound_lines(folder / ROWS), MOST_ROWS)]
    elif stage.state not in ("running", "failed") and folder.is_dir() and not rows:
        stage.notes.append(f"{METRICS} has no rows, so there are no curves.")
    stage.samples = _rows(folder / SAMPLES, stage.notes, MOST_SAMPLES)
    stage.measurements = _measurements(_rows(folder / WATCH, stage.notes))
    stage.people = read_json(folder / PEOPLE) or {}
    stage.pairs = _pairs(_rows(folder / PAIRS, stage.notes))
    if stage.state == "running":
        stage.progress = read_json(directory.work(found.name) / PROGRESS) or {}
    return stage


def _rows(file: Path, notes: list[str], last: int | None = None) -> list[dict[str, Any]]:
    """The objects in a .jsonl file, whatever bytes it holds."""
    aside = file.with_name(file.name + jsonl.DAMAGED)
    if aside.exists():
        notes.append(f"Lines of {file.name} that could not be read are in {aside.name}, and are left out.")
    try:
        lines, damaged = jsonl.read(file, last)
    except OSError:
        notes.append(f"{file.name} cannot be read.")
        return []
    if damaged:
        broken = len(damaged)
        notes.append(f"{file.name} has {broken:,} line{'s' * (broken != 1)} that cannot be read, left out here.")
    return [line.row for line in lines]


def _take_columns(stage: Stage, rows: list[dict[str, Any]]) -> None:
    """Turn rows into one series for each metric."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for i, row in enumerate(rows):
        step = row.get("step")
        step = step if type(step) is int and 0 <= step < 1e15 else i
        for name, value in row.items():
            if (type(value) is float and abs(value) < LARGEST) or (type(value) is int and abs(value) < 1e15):
                column = columns.get(name)
                if column is None:
                    column = columns[name] = ([], [])
                column[0].append(step)
                column[1].append(value)
            elif value is None or (type(value) is float and not math.isfinite(value)):
                stage.not_finite[name] = stage.not_finite.get(name, 0) + 1
    for name, (steps, values) in columns.items():
        if name not in ("step", "time"):
            x, y = np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)
            order = np.argsort(x, kind="stable")
            stage.series[name] = Series(x[order], y[order])


def _measurements(rows: list[dict[str, Any]]) -> list[Measurement]:
    """Those lines of a watch.jsonl that are measurements of the same prompts, from the first one on."""
    found: list[Measurement] = []
    for row in rows:
        with contextlib.suppress(ValueError):
            one = Measurement.from_json(row)
            prompts = {len(values) for values in (found[0] if found else one).by_prompt.values()}
            if {len(values) for values in one.by_prompt.values()} == prompts != {0} and len(prompts) == 1:
                found.append(one)
    return found


def _pairs(rows: list[dict[str, Any]]) -> Pairs | None:
    scored = [
        (chosen, rejected, number(row.get("chosen_length")), number(row.get("rejected_length")), row.get("margin_std"))
        for row in rows
        if (chosen := number(row.get("chosen"))) is not None and (rejected := number(row.get("rejected"))) is not None
    ]
    if not scored:
        return None
    wins, losses, *lengths, deviations = zip(*scored, strict=True)
    known = all(value is not None for column in lengths for value in column)
    long, short = (np.array(column if known else [], dtype=np.float64) for column in lengths)
    of_ensemble = all(number(value) is not None for value in deviations)
    return Pairs(np.array(wins), np.array(losses), long, short, np.array(deviations if of_ensemble else [], np.float64))


def content(value: Any) -> str:
    """A value as text: turns become their texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(content(mapping(one).get("content", mapping(one).get("text", ""))) for one in value)
    return "" if value is None else str(value)
