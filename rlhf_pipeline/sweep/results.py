"""What the runs of a sweep came to, read from their run directories. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline import kinds
from rlhf_pipeline.rundir import jsonl, state
from rlhf_pipeline.rundir.headline import headline, over_members, series
from rlhf_pipeline.rundir.layout import METRICS
from rlhf_pipeline.rundir.state import RunState, StageState
from rlhf_pipeline.rundir.strict_json import is_number
from rlhf_pipeline.rundir.words import ends
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.keys import Combination

PRUNED = "pruned"  # in place of a reason why a run failed
OF_REWARDS = "rewards/"  # begins what is logged of each reward by its name


class Change(NamedTuple):
    """A number from start to end.

    Attributes:
        name: what people read.
        before: where it began; None where nobody knows.
        after: what it came to.
        rests_on: its standard error, as ` ± 0.049`, or of how many pairs it is; empty where nobody knows.
    """

    name: str
    before: float | None
    after: float
    rests_on: str


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        combination: its values.
        path: its run directory.
        state: `done`, `failed`, `gate closed`, `pruned`, `unfinished`, or `missing` where it never began.
        why: of one that failed, the reason.
        wall_s: seconds that its own stages took; those that it has taken from elsewhere are not counted.
        numbers: of each stage that differs between runs, what its numbers came to, by metric.
        value: of the goal's metric; None where it is not there.
        error: the standard error of that.
    """

    combination: Combination
    path: Path
    state: str
    why: str | None
    wall_s: float
    numbers: dict[str, dict[str, Change]]
    value: float | None = None
    error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The run as `sweep --json` prints it."""
        return {
            "name": self.combination.name,
            "path": str(self.path.absolute()),
            "values": self.combination.values,
            "state": self.state,
            "why": self.why,
            "wall_s": round(self.wall_s, 2),
            "value": self.value,
            "value_se": self.error,
            "numbers": {
                stage: {metric: {"before": one.before, "after": one.after} for metric, one in numbers.items()}
                for stage, numbers in self.numbers.items()
            },
        }


@dataclass(frozen=True)
class Results:
    """All runs of a sweep.

    Attributes:
        folder: the sweep's.
        keys: what was swept.
        shared: the stages that all runs have in common.
        stage: the one whose numbers tell most: the goal's, else the last policy that differs.
        goal: by which they are compared; None where by nothing.
        runs: in the order in which they were proposed.
        command: what makes the best run once more, beside the recipe's others; None where there is no best.
        report: the page with all runs; None where there is none.
        study: Optuna's storage; None of a grid.
    """

    folder: Path
    keys: list[str]
    shared: list[str]
    stage: str
    goal: Goal | None
    runs: list[Result]
    command: str | None = None
    report: Path | None = None
    study: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Result | None:
        """The run that is done and has the best value; None where none has one."""
        found: Result | None = None
        for one in self.runs:
            if self.goal and one.state == "done" and one.value is not None:
                found = one if found is None or self.goal.better(one.value, found.value or 0.0) else found
        return found

    @property
    def as_good(self) -> list[Result]:
        """The runs that the best one is not told apart from: by less than two standard errors of the difference."""
        best = self.best
        if best is None or best.value is None or not best.error:
            return []
        return [
            one
            for one in self.runs
            if one is not best and one.state == "done" and one.value is not None and one.error
            and abs(one.value - best.value) < 2 * (one.error**2 + best.error**2) ** 0.5
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The object that `sweep --json` prints."""
        goal = self.goal
        return {
            "sweep": str(self.folder.absolute()),
            "keys": self.keys,
            "shared": self.shared,
            "goal": goal and {"stage": goal.stage, "metric": goal.metric, "direction": goal.direction},
            "best": self.best and self.best.combination.name,
            "command": self.command,
            "report": self.report and str(self.report.absolute()),
            "study": self.study and str(self.study.absolute()),
            "runs": [one.as_json() for one in self.runs],
        }


def read(
    combination: Combination, path: Path, varying: Sequence[str], goal: Goal | None, failed: Mapping[str, str]
) -> Result:
    """What one run came to.

    Args:
        combination: its values.
        path: its run directory.
        varying: the stages whose numbers to read.
        goal: whose metric is its value.
        failed: of runs that failed, why; and of pruned ones `pruned`, by their names.
    """
    run = state.read(path, by_size=True) if path.is_dir() else None
    if run is None:
        return Result(combination, path, "missing", failed.get(combination.name), 0.0, {})
    why = failed.get(combination.name)
    said: str = run.state if any(stage.record.model_fields_set for stage in run.stages) else "missing"
    if why == PRUNED and said != "done":
        said, why = PRUNED, None
    elif why and said != "gate closed":
        said = "failed"
    found = {name: _numbers(run, stage) for name in varying if (stage := run.stage(name)) and stage.record.metrics}
    walls = [stage.record.wall_s or 0.0 for stage in run.stages if not stage.record.taken_from]
    value, error = None, None
    if goal and (stage := run.stage(goal.stage)) and stage.record.is_finished:
        value, error = (stage.record.metrics.get(f"{goal.metric}{end}") for end in ("", "_se"))
    return Result(
        combination, path, said, why, sum(walls), found,
        value if is_number(value) else None, error if is_number(error) else None,
    )  # fmt: skip


def _numbers(run: RunState, stage: StageState) -> dict[str, Change]:
    """The numbers of a stage by metric: those that sum it up, and where it has several rewards, each by its name."""
    rows = list(jsonl.rows(run.path / stage.name / METRICS))
    start = run.stage(stage.parents.get("init", ""))
    judged = start.record.metrics.get(kinds.JUDGED) if start else None
    found = {
        one.metric: Change(one.name, one.before, one.after, one.rests_on)
        for one in headline(stage.kind, stage.record.metrics, series(stage.kind, rows), judged)
    }
    names = [name for name in stage.record.metrics if name.startswith(OF_REWARDS) and name.endswith("/mean")]
    for name in names if len(names) > 1 else []:
        values = [row[name] for row in over_members(rows) if is_number(row.get(name))]
        after = stage.record.metrics[name]
        if is_number(after):
            before = ends(values)[0] if len(values) > 1 else None
            found[name] = Change(name.removeprefix(OF_REWARDS).removesuffix("/mean"), before, after, "")
    return found
