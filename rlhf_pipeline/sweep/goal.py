"""The number by which the runs of a sweep are compared. No torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import Recipe, gates

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Goal:
    """A final metric of one stage, and whether more of it is better.

    Attributes:
        stage: whose.
        metric: its name among the final metrics of `stage.json`.
        direction: whether the greatest or the smallest is the best.
        logged: the names under which training may log it, the likeliest first.
    """

    stage: str
    metric: str
    direction: Direction
    logged: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.stage}.{self.metric}"

    def better(self, value: float, other: float) -> bool:
        """Whether one value is better than another."""
        return value > other if self.direction == "maximize" else value < other


def find(recipe: Recipe, varying: Sequence[str], text: str | None, direction: Direction) -> Goal | None:
    """The goal that is asked for, or the usual one.

    Args:
        recipe: the recipe, with the values of one run.
        varying: the stages that differ between runs, or are judged otherwise.
        text: `STAGE.METRIC`, or the metric alone, then of the last stage that has it. By default it is the judge's mean
            of the last policy that differs, or how often an AI judge prefers it.
        direction: which end is the best.

    Returns:
        The goal; None where nothing is asked for and the recipe has no judge.

    Raises:
        InputError: no such stage writes such a metric, or it is the same in all runs.
    """
    if text is None:
        for metric in (kinds.JUDGED, kinds.WIN_RATE):
            for name in reversed(varying):
                if metric in gates.known_metrics(recipe, name):
                    return _goal(recipe, name, metric, direction)
        return None
    place, stages = f"--{direction} {text}", list(recipe.stages)
    stage, dot, metric = text.partition(".")
    if stage in stages and dot:
        if metric not in _metrics(recipe, stage):
            message = f"stage `{stage}` will have no metric `{metric}`"
            raise InputError(message, place=place, hint=gates.remedy(recipe, stage, metric))
    elif any(text in _metrics(recipe, name) for name in stages):
        having = [name for name in stages if text in _metrics(recipe, name)]
        stage, metric = next((name for name in reversed(having) if name in varying), having[-1]), text
    elif dot and any(metric in _metrics(recipe, name) for name in stages):
        near = difflib.get_close_matches(stage, stages, n=1)
        hint = f"did you mean `{near[0]}.{metric}`?" if near else f"the stages are {', '.join(stages)}"
        raise InputError(f"there is no stage `{stage}`", place=place, hint=hint)
    else:
        known = sorted({one for name in stages for one in _metrics(recipe, name)})
        near = difflib.get_close_matches(text, [*known, *(f"{name}.{one}" for name in stages for one in known)], n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"for example {varying[-1] if varying else stages[-1]}.loss"
        raise InputError(f"no stage writes a metric `{text}`", place=place, hint=hint)
    if stage not in varying:
        hint = f"what the swept keys change is {', '.join(varying)}"
        raise InputError(f"no swept key changes what stage `{stage}` makes", place=place, hint=hint)
    return _goal(recipe, stage, metric, direction)


def _goal(recipe: Recipe, stage: str, metric: str, direction: Direction) -> Goal:
    numbers = {number.metric: number.logged for number in recipe.stages[stage].facts.numbers}
    logged = dict.fromkeys(filter(None, (numbers.get(metric), metric, f"watch/{metric}")))
    return Goal(stage, metric, direction, tuple(logged))


def _metrics(recipe: Recipe, stage: str) -> set[str]:
    return gates.known_metrics(recipe, stage) | gates.possible_metrics(recipe, stage)
