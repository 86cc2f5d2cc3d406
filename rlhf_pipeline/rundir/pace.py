"""How fast a stage goes, and how long it will take yet. No torch."""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.layout import METRICS, PROGRESS, Progress, RunDirectory, read_json
from rlhf_pipeline.rundir.strict_json import is_number

PACE_S, PACE_STEPS = 60.0, 5  # how far back the pace is measured: the longer of the two


class Pace:
    """How fast steps follow one another just now."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, int]] = deque()

    def note(self, at: float, step: int) -> None:
        """Note that a step was reached, in Unix seconds; a step that is not later than the last one is ignored."""
        if self.marks and (step <= self.marks[-1][1] or at < self.marks[-1][0]):
            return
        self.marks.append((at, step))
        while len(self.marks) > 2 and self.marks[1][0] <= at - PACE_S and self.marks[1][1] <= step - PACE_STEPS:
            self.marks.popleft()

    def seconds_left(self, of: int | None, now: float) -> float | None:
        """How long the rest will take at this pace; None where that cannot be known yet."""
        if of is None or len(self.marks) < 2:
            return None
        (first, first_step), (last, last_step) = self.marks[0], self.marks[-1]
        of_one = (last - first) / (last_step - first_step)
        begun = min(max(now - last, 0.0), of_one)  # the step that is at work
        return max((of - last_step) * of_one - begun, 0.0)


@dataclass(frozen=True)
class ToGo:
    """What is left of a stage's training.

    Attributes:
        step_s: seconds of one optimizer step, or of one update.
        steps: how many there are to go; None where that is not known.
    """

    step_s: float
    steps: int | None

    @property
    def seconds(self) -> float | None:
        """How long they will take."""
        return None if self.steps is None else self.step_s * self.steps

    def as_json(self) -> dict[str, float | int | None]:
        """For scripts; docs/json.md has its keys."""
        seconds = None if self.seconds is None else round(self.seconds, 1)
        return {"step_s": round(self.step_s, 4), "steps": self.steps, "seconds": seconds}


def to_go(directory: RunDirectory, name: str, progress: Progress | None) -> ToGo | None:
    """What is left of the training of a stage that has begun; None where its steps, or its pace, are not known.

    A step takes as long as the middle one of those that were logged, so that breaks between two runs count for nothing.

    Args:
        directory: the run directory.
        name: the stage.
        progress: where it would resume; None of a stage at work.
    """
    if progress is not None:
        at, of, member, members = progress.step, progress.of, progress.member, progress.members
        if progress.point != "checkpoint" or progress.makes_rows:
            return None
    else:
        told = read_json(directory.work(name) / PROGRESS) or {}
        at, of, member, members = (told.get(key) for key in ("step", "of", "member", "members"))
        if told.get("phase") != "training":
            return None
    step_s = seconds_of_a_step(jsonl.rows(directory.stage(name) / METRICS))
    if step_s is None or not isinstance(at, int) or not isinstance(of, int):
        return None
    further = of * (members - member) if isinstance(member, int) and isinstance(members, int) else 0
    return ToGo(step_s, max(0, of - at) + further)


def seconds_of_a_step(rows: list[dict[str, Any]]) -> float | None:
    """The median over rows of `metrics.jsonl` that follow one another; None where there are no two."""
    logged = [
        (row.get("member"), row["step"], row["time"])
        for row in rows
        if isinstance(row.get("step"), int) and is_number(row.get("time"))
    ]
    paces = [
        (later - earlier) / (step - before)
        for (member, before, earlier), (same, step, later) in pairwise(logged)
        if member == same and step > before and later > earlier
    ]
    return median(paces) if paces else None
