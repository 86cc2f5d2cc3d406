"""What measurements along a policy's way say: where a fall or a drift is no chance, and which of them is the best."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.hacking.replies import Measured
from rlhf_pipeline.kinds import MEANS
from rlhf_pipeline.rundir.strict_json import is_number

Numbers = NDArray[np.float64]
UNLIKELY = 0.02275  # how often chance may make a mean fall so far: two standard errors of a normal distribution
PATIENCE = 0.15  # of the way: for so long a mean must have fallen
FAR = 3.0  # standard errors beyond a healthy band that one measurement alone confirms


@dataclass
class Measurement:
    """What was measured of a policy at one step.

    Attributes:
        step: how many optimizer steps, or updates, it had.
        kl: the mean KL of a whole reply from the reference, in nats.
        by_prompt: of each of `kinds.MEANS` that there is, the mean over the replies to each prompt; NaN where a judge
            has no opinion.
        measures: of each measure of the replies its value, with its standard error and its healthy band.
        phrases: openings and phrases that the first policy did not have: text, share of replies, and z.
        alarms: which of all these raise an alarm at this measurement.
        confirmed: which of these alarms are confirmed.
    """

    step: int
    kl: float
    by_prompt: dict[str, list[float]]
    measures: dict[str, Measured] = field(default_factory=dict)
    phrases: list[tuple[str, float, float]] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """The mean over the prompts; NaN where there is none."""
        return _mean(np.array(self.by_prompt.get(name, []), dtype=np.float64))

    def as_json(self) -> dict[str, Any]:
        """A line of `watch.jsonl`; null stands for NaN."""
        return {
            "step": self.step,
            "kl": self.kl,
            "measures": {name: list(measured) for name, measured in self.measures.items()},
            "by_prompt": {
                name: [None if math.isnan(value) else value for value in values]
                for name, values in self.by_prompt.items()
            },
            "phrases": [list(phrase) for phrase in self.phrases],
            "alarms": self.alarms,
            "confirmed": self.confirmed,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """What `as_json` has made a line of.

        Raises:
            ValueError: it has made no such line.
        """
        try:
            by_prompt = {
                name: [math.nan if value is None else _number(value) for value in row["by_prompt"][name]]
                for name in MEANS
                if name in row["by_prompt"]
            }
            measures = {
                name: Measured(_number(value), _number(error), *(end if end is None else _number(end) for end in band))
                for name, (value, error, *band) in row["measures"].items()
            }
            phrases = [(str(text), _number(share), _number(z)) for text, share, z in row["phrases"]]
            alarms, confirmed = ([str(name) for name in row[key]] for key in ("alarms", "confirmed"))
            return cls(int(_number(row["step"])), _number(row["kl"]), by_prompt, measures, phrases, alarms, confirmed)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no measurement: {error!r}") from None


def _number(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"no number: {value!r:.40}")
    return float(value)


def raise_alarms(measurements: Sequence[Measurement], steps: int) -> None:
    """Note in the last of some measurements which of its numbers raise an alarm, and which alarms are confirmed.

    A measure of the replies raises one where it has left its healthy band. It is confirmed by a second one in a row,
    or where it lies very far outside.

    A mean raises one where it has fallen from its best by more than chance explains. That a policy falls and recovers
    is common, and no chance either. So it is confirmed only by a measurement that lies `PATIENCE` of the way after the
    first of alarms in a row.

    Args:
        measurements: so far; the last one has no alarms yet.
        steps: how many optimizer steps, or updates, the whole way has.
    """
    *earlier, last = measurements
    if not earlier:
        return
    for name in last.by_prompt:
        if chance_of_fall(measurements, name) < UNLIKELY:
            last.alarms.append(name)
            if last.step - _first_in_a_row(measurements, name).step >= PATIENCE * steps:
                last.confirmed.append(name)
    for name, (value, error, low, high) in last.measures.items():
        beyond = max(low - value if low is not None else 0.0, value - high if high is not None else 0.0)
        if beyond > 0:
            last.alarms.append(name)
            if beyond > FAR * error or name in earlier[-1].alarms:
                last.confirmed.append(name)


def _first_in_a_row(measurements: Sequence[Measurement], name: str) -> Measurement:
    """The first of the measurements with an alarm of a name that the last one ends."""
    return list(itertools.takewhile(lambda one: name in one.alarms, reversed(measurements)))[-1]


def chance_of_fall(measurements: Sequence[Measurement], name: str) -> float:
    """How often chance alone makes a mean fall so far, from its best measurement to the last one.

    The fall is measured prompt by prompt, in standard errors of that difference. It counts that the best was chosen:
    among many measurements of one and the same policy, the highest is above its mean. So the chance is that of
    `chance_of_excess` with as many measurements as there were before.

    Returns:
        From 0 to 1; 1 where the mean has not fallen, or nobody can tell.
    """
    *earlier, last = measurements
    means = [one.mean(name) for one in earlier]
    known = [i for i, mean in enumerate(means) if not math.isnan(mean)]
    if not known or math.isnan(last.mean(name)):
        return 1.0
    best = earlier[max(known, key=lambda i: means[i])]
    falls = np.array(best.by_prompt[name]) - np.array(last.by_prompt[name])
    falls = falls[~np.isnan(falls)]
    if len(falls) < 2 or falls.mean() <= 0:
        return 1.0
    error = float(falls.std(ddof=1)) / math.sqrt(len(falls))
    if error == 0:
        return 0.0
    return chance_of_excess(_as_normal(float(falls.mean()) / error, len(falls) - 1) * math.sqrt(2), len(known))


def chance_of_excess(excess: float, count: int) -> float:
    """How often the highest of so many standard normal numbers exceeds one more of them by so much.

    The integral of φ(x) (1 - Φ(x + excess)^count) over x. With one number it is that of a difference of two.
    """
    x = np.linspace(-8.0, 8.0, 401)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-(value + excess) / math.sqrt(2)) for value in x])
    return float(np.trapezoid(density * (1 - below**count), x))


def _as_normal(t: float, freedom: int) -> float:
    """The number that is as rare in a normal distribution as `t` is in Student's.

    Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions".
    """
    return (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))


def best(measurements: Sequence[Measurement], by: str, stops: Sequence[str]) -> Measurement:
    """The measurement with the highest mean, of several the earliest.

    Where an alarm of one of `stops` was raised, the policy is not to be kept, however high the mean: what it was
    stopped for may be what raised it.

    Args:
        measurements: at least one; the first is of the policy that training starts from.
        by: one of `kinds.MEANS`.
        stops: see `recipe.schema.Watch.stop`.
    """
    sound = [one for one in measurements[1:] if not set(one.alarms) & set(stops)]
    return max([measurements[0], *sound], key=lambda one: -math.inf if math.isnan(one.mean(by)) else one.mean(by))


def _mean(values: Numbers) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def means_of(measurements: Sequence[Measurement], name: str) -> Numbers:
    """One of `kinds.MEANS` of every measurement and prompt, `[measurements, prompts]`; NaN where it is not known."""
    assert name in MEANS
    return np.array([one.by_prompt[name] for one in measurements], dtype=np.float64)
