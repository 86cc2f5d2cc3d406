"""Several runs as points: the reward, and the gold judge, that each came to, over its KL. No torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from rlhf_pipeline import kinds
from rlhf_pipeline.report import charts
from rlhf_pipeline.report.figures import Picture
from rlhf_pipeline.report.gather import Run, Stage
from rlhf_pipeline.rundir.state import DONE

KL = "objective/kl"
METRICS = (
    ("objective/scores", "reward over KL",
     "What each run came to: the score that it was trained for, over its KL from the reference. The line joins runs "
     "that no other beats in both; a run below it pays KL for nothing."),
    (kinds.JUDGED, "gold over KL",
     "The same for the judge, who knows better, with standard errors. Where the reward rises to the right and this "
     "falls, the reward is being gamed: take the run at the top."),
)  # fmt: skip
LABELLED = 14  # points: of more, only those on the frontier and the best are labelled, as far as there is room


class Point(NamedTuple):
    """What a run came to.

    Attributes:
        label: the run's, without what all have in common.
        path: its run directory.
        kl: from the reference, in nats a reply.
        value: what is drawn over it.
        error: the standard error of that; 0 where nobody knows it.
    """

    label: str
    path: Path
    kl: float
    value: float
    error: float = 0.0


def across(runs: Sequence[Run], best: Path | None = None) -> list[Picture]:
    """The pictures of runs side by side, of each stage that at least two have finished with another result.

    Args:
        runs: the runs.
        best: the run directory of the best; by default, of each picture, that of the best judged.
    """
    found = []
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        stages = [(run, stage) for run in runs if (stage := run.stage(name)) and stage.state in DONE]
        if len({stage.record.weights for _, stage in stages}) < 2:
            continue
        judged = _points(stages, kinds.JUDGED)
        marked = best or max(judged, key=lambda one: one.value).path if judged else best
        for metric, title, caption in METRICS:
            points = _points(stages, metric)
            if len({(one.kl, one.value) for one in points}) > 1:
                starts = {_start(run, stage, metric) for run, stage in stages}
                start = starts.pop() if len(starts) == 1 else None
                svg = _drawn(f"{name}: {title}", points, marked, start)
                legend = [("the best", charts.BEST, 0, True)] if any(one.path == marked for one in points) else []
                found.append(Picture(f"{name}: {title}", caption, svg, legend))
    return found


def _points(stages: Sequence[tuple[Run, Stage]], metric: str) -> list[Point]:
    """What runs came to in one metric, those that have it and a KL."""
    known = []
    for run, stage in stages:
        kl, value = stage.final(KL), stage.final(metric)
        if kl is not None and value is not None:
            known.append((run, kl, value, stage.final(f"{metric}_se") or 0.0))
    names = _short_labels([run.label for run, *_ in known])
    return [Point(name, run.path, *numbers) for name, (run, *numbers) in zip(names, known, strict=True)]


def _start(run: Run, stage: Stage, metric: str) -> float | None:
    """What a metric was before training: of the judge that of the stage that this one starts from, else of step 1."""
    if metric != kinds.JUDGED:
        return stage.first(metric)
    parent = run.stage(stage.parents.get("init", ""))
    return parent.final(metric) if parent else None


def _short_labels(labels: Sequence[str]) -> list[str]:
    """Names of runs without the words that all begin with: of `kl_coef-0.1` and `kl_coef-1.0`, `0.1` and `1.0`."""
    cut = 0
    for end in re.finditer("[-_ ]", labels[0]) if len(labels) > 1 else ():
        cut = end.end() if all(label.startswith(labels[0][: end.end()]) for label in labels) else cut
    return [label[cut:] or label for label in labels]


def _drawn(title: str, points: Sequence[Point], best: Path | None, start: float | None) -> Markup:
    frontier = _frontier(points)
    chosen = [one for one in points if len(points) <= LABELLED or one in frontier or one.path == best]
    return charts.outcomes(
        title,
        [
            charts.Outcome(one.label, one.kl, one.value, one.error, one.path == best, one in frontier, one in chosen)
            for one in points
        ],
        "KL from the reference, nats a reply",
        start,
    )


def _frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both KL and value, by KL."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (one.kl, -one.value)):
        if not found or one.value > found[-1].value:
            found.append(one)
    return found
