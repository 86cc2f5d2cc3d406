"""A page of more runs than there are colours, which are drawn in the order of what differs. No torch."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rlhf_pipeline import kinds
from rlhf_pipeline.report import charts, figures, gather
from rlhf_pipeline.report.alarms import Alarm
from rlhf_pipeline.report.charts import SERIES, Line, Panel, Point
from rlhf_pipeline.report.figures import Picture
from rlhf_pipeline.report.gather import EMPTY, Run, Stage, mapping, number
from rlhf_pipeline.rundir.headline import Headline
from rlhf_pipeline.rundir.words import short

MOST_SETTINGS = 8  # columns of the table of runs
MOST_NUMBERS = 12
MOST_SAMPLED = 5  # runs whose replies are shown
MOST_PROMPTS = 8
LONGEST_VALUE = 60  # characters of a setting in the table
MOST_NAMED = 8  # runs in a sentence
WIDE = 20  # times the least number: numbers that go so far are drawn on a scale of powers of ten


def are_many(runs: Sequence[Any]) -> bool:
    """Whether there are more runs than colours, so that they cannot be told apart by colour."""
    return len(runs) > SERIES


@dataclass(frozen=True)
class Setting:
    """A setting that differs between runs.

    Attributes:
        stages: the names of those that have it, with the same values; nothing where all stages do.
        key: of the recipe, without its stage.
        values: of each run, in their order; None where it has none.
    """

    stages: tuple[str, ...]
    key: str
    values: list[Any]

    @property
    def name(self) -> str:
        """What it is called in a heading."""
        key = self.key.removeprefix("trainer.")
        return f"{', '.join(self.stages)}: {key}" if self.stages else key


class Order(NamedTuple):
    """The order in which runs are listed and coloured.

    Attributes:
        runs: in that order.
        shades: of each run's label, its place on the scale from 0 to 1; None where nothing is known of it.
        words: what they are ordered by.
        ends: the least and the greatest of it, in words.
        numbers: of each run's label, the number that it is ordered by, where that is a setting.
    """

    runs: list[Run]
    shades: dict[str, float | None]
    words: str
    ends: tuple[str, str]
    numbers: dict[str, float]


def settings(runs: Sequence[Run]) -> list[Setting]:
    """The settings and data that differ between runs, those of several stages with the same values once.

    Fingerprints of the stages that a stage was built on are none: the names of these stages are.
    """
    found: dict[tuple[str, str], Setting] = {}
    for name in stage_names(runs):
        stages = [run.stage(name) for run in runs]
        inputs = [dict(stage.record.inputs) | stage.record.parents if stage else {} for stage in stages]
        for key in dict.fromkeys(key for one in inputs for key in one if key != "kind"):
            values = [one.get(key) for one in inputs]
            there = [repr(value) for value, one in zip(values, inputs, strict=True) if one]
            if len(set(there)) > 1:
                same = found.setdefault((key, repr(values)), Setting((), key, values))
                found[key, repr(values)] = replace(same, stages=(*same.stages, name))
    names = tuple(stage_names(runs))
    return [replace(one, stages=()) if len(names) > 1 and one.stages == names else one for one in found.values()]


def stage_names(runs: Sequence[Run]) -> list[str]:
    """The names of all stages, in the order of the runs' recipes."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def order(runs: Sequence[Run], differing: Sequence[Setting]) -> Order:
    """Order runs by the setting with the most different numbers, else by the judge's last number, else as they are.

    Seeds are passed over where anything else differs.
    """
    of_numbers = [
        one for one in differing if all(number(value) is not None for value in one.values if value is not None)
    ]
    best = min(of_numbers, key=lambda one: (one.key == "seed", -len({*one.values})), default=None)
    if best is not None:
        known = {run.label: float(value) for run, value in zip(runs, best.values, strict=True) if value is not None}
        words, numbers = best.name, known
    else:
        known = {run.label: value for run in runs if (value := _judged(run)) is not None}
        words, numbers = "the judge's mean of the last stage that it has judged", {}
    if len({*known.values()}) < 2:
        known, words = {run.label: float(i) for i, run in enumerate(runs)}, "the order in which they are given"
        ends, numbers = ("first", "last"), {}
    else:
        ends = (short(min(known.values())), short(max(known.values())))
    ranks = sorted({*known.values()})
    shades = {
        run.label: ranks.index(known[run.label]) / (len(ranks) - 1) if run.label in known else None for run in runs
    }
    in_order = sorted(runs, key=lambda run: known.get(run.label, math.inf))
    return Order(in_order, shades, words, ends, numbers)


def _judged(run: Run) -> float | None:
    values = [value for stage in run.stages if (value := stage.final(kinds.JUDGED)) is not None]
    return values[-1] if values else None


def groups(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs whose stage of a name differs from that of all earlier ones; its label says how many share it."""
    by_weights: dict[str, list[Run]] = {}
    for run in runs:
        if stage := run.stage(name):
            by_weights.setdefault(stage.record.weights or run.label, []).append(run)
    return [
        replace(having[0], label=_and_more(having[0].label, len(having), len(runs))) for having in by_weights.values()
    ]


def _and_more(label: str, count: int, of: int) -> str:
    return label if count == 1 else f"all {of} runs" if count == of else f"{label} and {count - 1} more"


def named(labels: Sequence[str], of: int) -> str:
    """Some of the runs in words."""
    if len(labels) == of:
        return f"all {of} runs"
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return f"{len(labels)} runs: {', '.join(labels[:MOST_NAMED])}{more}" if len(labels) > 1 else labels[0]


def table(
    found: Order,
    differing: Sequence[Setting],
    runs: Sequence[Run],
    alarms: dict[str, list[Alarm]],
    numbers_of: Callable[[Run, Stage], list[Headline]],
) -> dict[str, Any]:
    """A row for each run: its settings that differ, and what its stages came to that differ.

    Args:
        found: the order of the rows.
        differing: from `settings`.
        runs: in the order of the settings' values.
        alarms: of each run's label.
        numbers_of: the numbers of a stage that matter.
    """  # fmt: skip
    places = {run.label: i for i, run in enumerate(runs)}
    differing = sorted(differing, key=lambda one: one.name != found.words)
    columns: dict[tuple[str, str], dict[str, str]] = {}
    ranks: dict[tuple[str, str], int] = {}
    for name in stage_names(runs):
        if len(groups(runs, name)) > 1:
            for run in runs:
                for rank, one in enumerate(numbers_of(run, stage) if (stage := run.stage(name)) else []):
                    columns.setdefault((name, one.name), {})[run.label] = one.text
                    ranks.setdefault((name, one.name), 0 if one.metric == kinds.JUDGED else rank)
    # Of each stage those that matter most, where there is no room for all.
    first = sorted(columns, key=ranks.__getitem__)[:MOST_NUMBERS]
    shown = [key for key in columns if key in first]
    return {
        "settings": [one.name for one in differing[:MOST_SETTINGS]],
        "numbers": [f"{name}: {words}" for name, words in shown],
        "more": [one.name for one in differing[MOST_SETTINGS:]],
        "rows": [
            {
                "label": run.label,
                "shade": found.shades[run.label],
                "state": run.state,
                "alarms": sum(alarm.level == "bad" for alarm in alarms[run.label]),
                "settings": [_value(one.values[places[run.label]]) for one in differing[:MOST_SETTINGS]],
                "numbers": [columns[key].get(run.label, "") for key in shown],
            }
            for run in found.runs
        ],
    }


def _value(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else repr(value)
    name, at, digest = text.rpartition("@")
    text = f"{name} ({digest[:8]})" if at else text
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def alarms_together(found: dict[str, list[Alarm]]) -> list[tuple[str, Alarm]]:
    """Alarms of the same kind in the same stage once: which runs they are of, and the first one in full."""
    together: dict[tuple[str, str, str], list[tuple[str, Alarm]]] = {}
    for label, listed in found.items():
        for alarm in listed:
            together.setdefault((alarm.level, alarm.where, alarm.what), []).append((label, alarm))
    ordered = sorted(together.values(), key=lambda having: (having[0][1].level != "bad", -len(having)))
    listed_once = []
    for having in ordered:
        labels = list(dict.fromkeys(label for label, _ in having))
        first = f"In {labels[0]}: " if len(labels) > 1 else ""
        listed_once.append((named(labels, len(found)), replace(having[0][1], text=first + having[0][1].text)))
    return listed_once


def verdict(found: dict[str, list[Alarm]]) -> str:
    """How many runs have alarms, and which are the most frequent ones."""
    said = []
    for level, words in (("bad", "Alarms"), ("look", "Things to look at")):
        listed = {
            label: {f"{one.what} in {one.where}" for one in of if one.level == level} for label, of in found.items()
        }
        counts: dict[str, int] = {}
        for what in (what for some in listed.values() for what in sorted(some)):
            counts[what] = counts.get(what, 0) + 1
        often = sorted(counts, key=lambda what: -counts[what])[:MOST_NAMED]
        if often:
            having = sum(map(bool, listed.values()))
            named_often = ", ".join(f"{what} ({counts[what]})" for what in often)
            said.append(f"{words} in {having} of {len(found)} runs: {named_often}.")
        elif level == "bad":
            said.append("No alarms.")
    return " ".join(said)


def of_stage(found: Order, name: str, numbers_of: Callable[[Run, Stage], list[Headline]]) -> list[Picture]:
    """The pictures of a stage that has another result in each of many runs: what it came to, and its curves."""
    chosen = [(run, stage) for run in found.runs if (stage := run.stage(name))]
    kind = next((stage.kind for _, stage in chosen if stage.kind), "")
    pictures = list(_over_setting(found, name, chosen, numbers_of))
    for curve in figures.curves_of(kind, [stage for _, stage in chosen]):
        logged = [one for one in curve.metrics if any(one[0] in stage.series for _, stage in chosen)]
        if not logged:
            continue
        metric, label = logged[0]
        lines = [
            Line(run.label, series, shade=found.shades[run.label], many=True)
            for run, stage in chosen
            if len(series := stage.series.get(metric, EMPTY))
        ]
        svg = charts.curves(f"{name}: {curve.title}", Panel(lines, curve.levels, floor=curve.floor))
        caption = curve.caption + (
            f" Of several lines to a run, only that of “{label}” is drawn." if len(logged) > 1 else ""
        )
        pictures.append(Picture(curve.title, caption, svg, scale=found.ends))
    return pictures


def _over_setting(
    found: Order, name: str, chosen: Sequence[tuple[Run, Stage]], numbers_of: Callable[[Run, Stage], list[Headline]]
) -> Iterator[Picture]:
    """What a stage came to over the setting that runs are ordered by."""
    heights: dict[str, list[Point]] = {}
    for run, stage in chosen:
        if run.label in found.numbers:
            for one in numbers_of(run, stage):
                point = Point(run.label, found.numbers[run.label], one.after, found.shades[run.label])
                heights.setdefault(one.name, []).append(point)
    x = np.array([*found.numbers.values()])
    of_powers = len(x) > 0 and x.min() > 0 and x.max() / x.min() > WIDE
    for words, points in heights.items():
        if len({point.y for point in points}) > 1:
            svg = charts.points(f"{name}: {words} over {found.words}", points, found.words, of_powers)
            caption = f"What each run came to, over {found.words}" + (
                ", on a scale of powers of ten." if of_powers else "."
            )
            yield Picture(f"{words[0].upper()}{words[1:]} by setting", caption, svg, scale=found.ends)


def common_settings(runs: Sequence[Run], name: str) -> list[tuple[str, Any]]:
    """The settings of a stage that are the same in all runs that have it."""
    inputs = [stage.record.inputs for run in runs if (stage := run.stage(name)) and stage.record.inputs]
    return [
        (key, value)
        for key, value in (inputs[0] if inputs else {}).items()
        if key not in ("kind", "data") and all(key in one and one[key] == value for one in inputs)
    ]


def of_comparison(found: Order) -> list[Picture]:
    """The judge's mean of each policy over that of the reward model, what several runs share once."""
    points: dict[tuple[str, float, float], list[Run]] = {}
    for run in found.runs:
        stored = mapping(run.comparison.get("means"))
        for policy in gather.policies(run):
            reward, judge = (number(mapping(stored.get(policy)).get(key)) for key in ("reward", "judge"))
            if reward is not None and judge is not None:
                points.setdefault((policy, reward, judge), []).append(run)
    if len(points) < 2:
        return []
    drawn = [
        Point(policy if len(having) > 1 else "", x, y, None if len(having) > 1 else found.shades[having[0].label])
        for (policy, x, y), having in points.items()
    ]
    caption = (
        "Each policy's mean by the judge (upwards) over its mean by the reward model (to the right). A policy further "
        "right but lower has learned what the reward model likes, not what is good. Runs share those with a name."
    ) + figures.of_their_own(found.runs)
    svg = charts.points("Judge over reward by policy", drawn, "mean score of the reward model")
    return [Picture("Judge over reward", caption, svg, scale=found.ends)]


def means_once(rows: Sequence[tuple[str, str, list[str]]], of: int) -> list[tuple[str, str, list[str]]]:
    """Rows of run, policy and numbers, those with the same numbers once, what all runs have first."""
    same: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for label, policy, values in rows:
        same.setdefault((policy, tuple(values)), []).append(label)
    listed = [(len(labels) == of, _and_more(labels[0], len(labels), of), *key) for key, labels in same.items()]
    return [(label, policy, list(values)) for _, label, policy, values in sorted(listed, key=lambda one: not one[0])]


def sampled(found: Order) -> list[Run]:
    """The runs whose replies are shown: from the first to the last, at even distances."""
    having = [run for run in found.runs if gather.comparison_rows(run)]
    places = np.linspace(0, len(having) - 1, min(len(having), MOST_SAMPLED)).round().astype(int).tolist()
    return [having[i] for i in places]


def samples_once(samples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Some samples side by side, a reply that all of so many runs share once."""
    shown = []
    for sample in samples[:MOST_PROMPTS]:
        same: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for reply in sample["replies"]:
            policy = reply["policy"].rpartition(": ")[2]
            same.setdefault((policy, reply["text"], *reply["numbers"]), []).append(reply)
        shared = [having[0] | {"policy": key[0]} for key, having in same.items() if len(having) == count]
        replies = [*shared, *(reply for having in same.values() if len(having) < count for reply in having)]
        shown.append(sample | {"replies": replies})
    return shown


def facts_together(listed: Sequence[tuple[str, list[tuple[str, str]]]]) -> list[tuple[str, str]]:
    """What runs were made from: what all have in common, and of the rest some, and how many there are."""
    values: dict[str, dict[str, None]] = {}
    for _, facts in listed:
        for name, value in facts:
            values.setdefault(name, {})[value] = None
    return [
        (name, "; ".join([*found][:3]) + (f"; and {len(found) - 3} others" if len(found) > 3 else ""))
        for name, found in values.items()
    ]
