"""The few numbers that sum up a stage: the same ones, under the same names, wherever a run is shown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.rundir.strict_json import is_number
from rlhf_pipeline.rundir.words import ends, short

FEW = 200  # pairs: an accuracy over fewer is shown with their number; its 95 % interval is more than 0.14 wide


@dataclass(frozen=True)
class Headline:
    """One of these numbers.

    Attributes:
        name: what people read.
        metric: its name among the final metrics.
        before: where it began; None where it has no beginning, or nobody knows it.
        after: what it came to.
        rests_on: what that rests on, as ` (7 of 8 pairs)` or ` ± 0.049`; empty where nobody knows it.
    """

    name: str
    metric: str
    before: float | None
    after: float
    rests_on: str

    @property
    def text(self) -> str:
        """What it came to, in words."""
        return short(self.after) + self.rests_on

    @property
    def change(self) -> str:
        """Where it began, if that is known, and what it came to."""
        return self.text if self.before is None else f"{short(self.before)} → {self.text}"


def headline(
    kind: object,
    metrics: Mapping[str, Any],
    logged: Mapping[str, Sequence[float]] | None = None,
    judged_before: object = None,
) -> list[Headline]:
    """The numbers of a finished stage that matter, the first one most; those that it does not have are left out.

    What a number came to always is the final value in `stage.json`: held out where it is measured held out, else what
    was logged last. Where it began is the mean of the first twentieth of what was logged, for one batch is noise; of
    the judge, what the stage came to that this one started from.

    Args:
        kind: the stage's; one that this version does not know has none of these numbers.
        metrics: `metrics` of its `stage.json`.
        logged: from `series`; without it `before` is None, except for the judge's number.
        judged_before: the final judge's mean of the stage that it started from, if it is a number.
    """
    known, found = kinds.find(kind), []
    for number in known.numbers if known else ():
        after, before = metrics.get(number.metric), None
        if number.metric == kinds.JUDGED:
            before = judged_before if is_number(judged_before) else None
        elif number.changes and logged and len(values := logged.get(number.logged or "", ())) > 1:
            before = ends(values)[0]
        if is_number(after):
            found.append(Headline(number.name, number.metric, before, after, rests_on(number.metric, after, metrics)))
    return found


def rests_on(metric: str, value: float, metrics: Mapping[str, Any]) -> str:
    """What a final number rests on, to stand after it: of how many pairs a share is, else its standard error.

    Args:
        metric: its name.
        value: it.
        metrics: `metrics` of its `stage.json`, those of earlier versions included.
    """
    pairs, error = metrics.get(kinds.PAIRS), metrics.get(f"{metric}_se")
    if metric in kinds.SHARES and is_number(pairs) and 0 < pairs < FEW:
        return f" ({short(round(value * pairs, 1))} of {short(pairs)} pairs)"
    return f" ± {error:.2g}" if is_number(error) and error > 0 else ""


def series(kind: object, rows: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """What was logged of the numbers of a kind.

    Args:
        kind: the stage's.
        rows: of its `metrics.jsonl`.
    """
    known = kinds.find(kind)
    found: dict[str, list[float]] = {number.logged: [] for number in known.numbers if number.logged} if known else {}
    for row in over_members(rows) if found else ():
        for key, values in found.items():
            if is_number(row.get(key)):
                values.append(row[key])
    return found


def over_members(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, those of an ensemble's members made one for each step: the mean of what each logged.

    A number that one of them has as null is null.
    """
    listed = list(rows)
    if not any("member" in row for row in listed):
        return listed
    together: dict[Any, list[dict[str, Any]]] = {}
    seen: Counter[Any] = Counter()
    for row in listed:
        member, step = (str(row.get(key)) for key in ("member", "step"))
        seen[member, step] += 1  # training and evaluation both log at some steps
        together.setdefault((step, seen[member, step]), []).append(row)
    return [_mean(same) for same in together.values()]


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several of the same step."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "member"):
        values = [row[name] for row in rows if name in row]
        known = all(is_number(value) for value in values)
        found[name] = values[0] if name in ("step", "time") else sum(values) / len(values) if known else None
    return found


def shown_as(kind: object, metric: str) -> str:
    """A metric's name where all of a stage's are listed: TRL's, after the one that people read where it has one."""
    known = kinds.find(kind)
    name = next((number.name for number in known.numbers if number.metric == metric), metric) if known else metric
    return metric if name == metric else f"{name} ({metric})"


def order(kind: object) -> list[str]:
    """The metrics that matter of a kind, the first one most; none of a kind that this version does not know."""
    known = kinds.find(kind)
    return [number.metric for number in known.numbers] if known else []
