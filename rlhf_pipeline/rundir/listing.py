"""The runs in a folder, with their states and key numbers, found without reading large files. No torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import is_run
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.asides import size_of
from rlhf_pipeline.rundir.headline import Headline, headline
from rlhf_pipeline.rundir.layout import METRICS, RECORD
from rlhf_pipeline.rundir.state import RunState, StageState


@dataclass
class Listed:
    """A run of a folder.

    Attributes:
        name: its folder's.
        run: its state; of its artifacts only the sizes of files were looked at.
        numbers: the headline numbers of each stage whose result holds, the most important one first.
        changed_at: when something was last recorded or logged there, in Unix seconds; None where nothing ever was.
        bytes: that removing it would free; see `asides.size_of`.
    """

    name: str
    run: RunState
    numbers: dict[str, list[Headline]]
    changed_at: float | None
    bytes: int

    def key_number(self, stage: StageState) -> Headline | None:
        """The one number to show of a stage: the judge's where there is one, else the first."""
        numbers = self.numbers.get(stage.name, [])
        return next((one for one in numbers if one.metric == kinds.JUDGED), numbers[0] if numbers else None)

    def number(self, key: str) -> float | None:
        """A number by its metric or its name, of the last stage that has it; or of one stage, as `ppo.judge_mean`."""
        for name in reversed(self.numbers):
            for one in self.numbers[name]:
                if key in (one.metric, one.name, f"{name}.{one.metric}", f"{name}.{one.name}"):
                    return one.after
        return None

    def as_json(self) -> dict[str, Any]:
        """The run as `runs --json` prints it."""
        return {
            "name": self.name,
            "path": str(self.run.path.absolute()),
            "state": self.run.state,
            "changed_at": self.changed_at,
            "bytes": self.bytes,
            "stages": [
                {
                    "name": stage.name,
                    "kind": stage.kind,
                    "state": stage.state,
                    "numbers": {one.metric: one.after for one in self.numbers.get(stage.name, [])},
                }
                for stage in self.run.stages
            ],
        }


def find(folder: Path) -> list[Listed]:
    """The runs in a folder, those that changed last first.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", place=str(folder), hint="name the `output_dir` of your recipes")
    found = [_listed(run) for run in sorted(folder.iterdir()) if run.is_dir() and is_run(run)]
    return sorted(found, key=lambda one: one.changed_at or 0.0, reverse=True)


def by(found: list[Listed], key: str, reverse: bool = False) -> list[Listed]:
    """Runs in another order.

    Args:
        found: from `find`.
        key: `name` or `state`; `age`, the latest first; `size`, the largest first; or a number, the largest first: its
            metric or its name, perhaps of one stage, as `ppo.judge_mean`.
        reverse: the other way round; but runs without such a number come last.

    Raises:
        InputError: no kind of stage has such a number.
    """
    orders: dict[str, Callable[[Listed], Any]] = {
        "name": lambda one: one.name,
        "state": lambda one: (one.run.state, one.name),
        "age": lambda one: -(one.changed_at or 0.0),
        "size": lambda one: -one.bytes,
    }
    if key in orders:
        return sorted(found, key=orders[key], reverse=reverse)
    values = {one.name: one.number(key) for one in found}
    numbers = [number for kind in kinds.KINDS for number in kind.numbers]
    known = {word for number in numbers for word in (number.metric, number.name)}
    if not {key, key.partition(".")[2]} & known:
        names = dict.fromkeys([*orders, *(number.metric for number in numbers)])
        raise InputError(f"runs have no number `{key}`", place="--sort", hint=f"there are {', '.join(names)}")
    sign = 1 if reverse else -1
    return sorted(found, key=lambda one: math.inf if (value := values[one.name]) is None else sign * value)


def _listed(run: Path) -> Listed:
    found = state.read(run, by_size=True)
    numbers = {
        stage.name: numbers
        for stage in found.stages
        if stage.is_current and (numbers := headline(stage.kind, stage.record.metrics))
    }
    times = [file.stat().st_mtime for pattern in (RECORD, METRICS) for file in run.glob(f"*/{pattern}")]
    return Listed(run.name, found, numbers, max(times, default=None), size_of(run))
