"""What was measured of a policy while it trained, and what the best of n replies would be worth. No torch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.hacking.forecast import Forecast, best_of, forecast, of_best, order, worth, worth_of_best
from rlhf_pipeline.hacking.watch import Measurement, means_of
from rlhf_pipeline.kinds import MEANS
from rlhf_pipeline.report import charts
from rlhf_pipeline.report.charts import Measurements
from rlhf_pipeline.report.figures import Picture
from rlhf_pipeline.report.gather import Numbers, Run, Stage, mapping, number

GOLD = "gold"
X_LABEL = "√KL from the reference, nats^½ of a reply"
WORDS = {
    GOLD: "judge", "judge": "AI judge: won against the start", "pessimistic": "pessimistic reward", "reward": "reward",
}  # fmt: skip
MOST_PHRASES = 6
PLACES = 60  # of a curve


def pictures(runs: Sequence[Run], name: str) -> list[Picture]:
    """Judge and reward over the distance from the reference, with a forecast; and what has left its healthy band.

    Of a report on one run; those of several have the curves over steps.
    """
    stage = runs[0].stage(name) if len(runs) == 1 else None
    if stage is None or len(stage.measurements) < 2:
        return []
    return [*_forecast(stage), *_bands(stage)]


def by(stage: Stage) -> str:
    """Which mean says how good a policy is."""
    wanted = stage.record.inputs.get("watch.best_by")
    there = [one for one in MEANS if one in stage.measurements[0].by_prompt]
    return wanted if wanted in there else there[0]


def foreseen(stage: Stage) -> Forecast | None:
    """How that mean goes on with the distance; None where too little is measured."""
    which = by(stage)
    found = [one for one in stage.measurements if len(one.by_prompt.get(which, [])) == _prompts(stage, which)]
    return forecast([one.kl for one in found], means_of(found, which)) if len(found) > 1 else None


def _prompts(stage: Stage, which: str) -> int:
    return len(stage.measurements[0].by_prompt[which])


def _forecast(stage: Stage) -> list[Picture]:
    which, found = by(stage), foreseen(stage)
    panels = [_panel(stage, which, 1)]
    if which != "reward":
        panels.append(_panel(stage, "reward", 0))
    panels = [panel for panel in panels if len(panel.x)]
    if not panels:
        return []
    caption = (
        "The same prompts each time, with standard errors, in the order in which they were measured. Red: an alarm, "
        "since the mean has fallen by more than chance explains."
    )
    if found is not None and found.describes:
        places = np.linspace(0, max(float(panels[0].x.max()), 1e-9), PLACES)
        panels[0].curve = (places, found.at(places))
        if found.peak:
            panels[0].peak = (found.peak, found.low, found.high)
        caption += " Dashed: the curve d (alpha - beta log d) over the distance d, its peak with a 95 % interval."
    said = f" {worth(found)}" if found is not None else ""
    title = f"{WORDS[which][0].upper()}{WORDS[which][1:]} over √KL"
    return [Picture(title, caption + said, charts.measurements(f"{stage.name}: {title}", panels, X_LABEL))]


def _panel(stage: Stage, which: str, color: int) -> Measurements:
    known = [one for one in stage.measurements if not math.isnan(one.mean(which))]
    values = [np.array(one.by_prompt[which], dtype=np.float64) for one in known]
    errors = [_error(one[~np.isnan(one)]) for one in values]
    return Measurements(
        WORDS[which], _distances(known), np.array([one.mean(which) for one in known]), np.array(errors), color,
        np.array([which in one.alarms for one in known], dtype=np.bool_),
    )  # fmt: skip


def _error(values: Numbers) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _distances(found: Sequence[Measurement]) -> Numbers:
    return np.sqrt(np.maximum([one.kl for one in found], 0.0))


def _bands(stage: Stage) -> list[Picture]:
    """The measures of the replies that raised an alarm at some time."""
    names = dict.fromkeys(
        name for one in stage.measurements for name in one.measures if name in one.alarms or name in one.confirmed
    )
    panels = []
    for name in names:
        known = [one for one in stage.measurements if name in one.measures]
        measured = [one.measures[name] for one in known]
        panels.append(
            Measurements(
                name.replace("_", " "), _distances(known), np.array([one.value for one in measured]),
                np.array([one.error for one in measured]), 2,
                np.array([name in one.alarms for one in known], dtype=np.bool_),
                (measured[-1].low, measured[-1].high),
            )
        )  # fmt: skip
    if not panels:
        return []
    phrases = [f"“{text}” in {share:.0%}" for text, share, _ in stage.measurements[-1].phrases[:MOST_PHRASES]]
    caption = (
        "What the replies are like, where it has left its healthy band: the one in which a further block of the first "
        "policy's replies would be in 99.7 % of the cases. Every measure is among the small curves below."
    )
    if phrases:
        caption += f" New at last: {', '.join(phrases)} of the replies."
    return [
        Picture("Outside the healthy band", caption, charts.measurements(f"{stage.name}: replies", panels, X_LABEL))
    ]


# The best of n


def best_of_n(stage: Stage) -> tuple[Picture, str] | None:
    """What the best of n replies is worth by score and by gold, with what that says of training; None without gold."""
    table = _scores_and_gold(stage)
    if table is None:
        return None
    scores, gold = table
    in_order, by_gold, by_score = order(scores, gold), best_of(scores, gold), best_of(scores, scores)
    if in_order is None or len(by_gold) < 2:
        return None
    said = worth_of_best(in_order, by_gold)
    curve = of_best(by_gold)
    panels = []
    for title, found, color in (("gold", by_gold, 1), ("score", by_score, 0)):
        x = np.sqrt([one.kl for one in found])
        y = np.array([float(one.by_prompt.mean()) for one in found])
        error = np.array([_error(one.by_prompt) for one in found])
        panels.append(Measurements(title, x, y, error, color, np.zeros(len(x), dtype=np.bool_)))
    if curve is not None and curve.describes:
        places = np.linspace(0, float(panels[0].x.max()), PLACES)
        panels[0].curve = (places, curve.at(places))
    caption = (
        f"The reply with the highest score of n, for n from 1 to {len(by_gold)}: over the root of its KL, log n - "
        f"(n - 1)/n. {said}"
    )
    title = "The best of n"
    return Picture(title, caption, charts.measurements(f"{stage.name}: {title}", panels, "√KL of the best of n")), said


def is_a_guess(stage: Stage) -> bool:
    """Whether the scores of a stage's replies may order them no better than a guess, by gold."""
    table = _scores_and_gold(stage)
    found = order(*table) if table is not None else None
    return found is not None and found.is_a_guess


def _scores_and_gold(stage: Stage) -> tuple[Numbers, Numbers] | None:
    """Scores and gold of the replies to each prompt, `[prompts, N]`, NaN where there is none."""
    rows = [
        (scores, gold)
        for row in stage.rows
        if (scores := _listed(row.get("scores")))
        and (gold := _listed(mapping(mapping(row.get("sampled")).get("rewards")).get(GOLD)))
        and len(scores) == len(gold)
    ]
    if len(rows) < 2:
        return None
    most = max(len(scores) for scores, _ in rows)
    return _filled([scores for scores, _ in rows], most), _filled([gold for _, gold in rows], most)


def _listed(values: Any) -> list[float]:
    if not isinstance(values, list):
        return []
    return [math.nan if (known := number(value)) is None else known for value in values]


def _filled(rows: Sequence[Sequence[float]], most: int) -> NDArray[np.float64]:
    return np.array([[*row, *[math.nan] * (most - len(row))] for row in rows], dtype=np.float64)
