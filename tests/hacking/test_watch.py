"""Where measurements raise an alarm, which of them is the best, and how often chance alone does either."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_pipeline.hacking.replies import Measured
from rlhf_pipeline.hacking.watch import (
    Measurement,
    best,
    chance_of_excess,
    chance_of_fall,
    raise_alarms,
)

PROMPTS = 50


def series(*rows: Sequence[float], name: str = "gold", steps: int = 10) -> list[Measurement]:
    """Measurements one step after the other, each with its alarms."""
    found: list[Measurement] = []
    for step, values in enumerate(rows):
        found.append(Measurement(step, float(step), {name: list(values)}))
        raise_alarms(found, steps)
    return found


def drifting(*values: tuple[float, float], low: float | None = 4.0, high: float | None = 6.0) -> list[Measurement]:
    """Measurements of one measure: value and standard error."""
    found: list[Measurement] = []
    for step, (value, error) in enumerate(values):
        found.append(Measurement(step, float(step), {}, {"length": Measured(value, error, low, high)}))
        raise_alarms(found, 10)
    return found


@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_chance_of_an_excess_is_the_share_of_draws_that_exceed(count: int) -> None:
    draws = np.random.default_rng(0).standard_normal((200_000, count + 1))
    excess = draws[:, :count].max(1) - draws[:, count]
    for wanted in (0.5, 2.0, 3.5):
        share = float((excess > wanted).mean())
        assert chance_of_excess(wanted, count) == pytest.approx(share, abs=4 * math.sqrt(share / len(draws)) + 1e-5)


def test_of_one_number_it_is_the_chance_of_a_difference_of_two() -> None:
    assert chance_of_excess(2 * math.sqrt(2), 1) == pytest.approx(0.5 * math.erfc(2 / math.sqrt(2)), rel=1e-6)


def test_a_policy_that_stays_the_same_raises_a_confirmed_alarm_in_one_of_25_runs_at_most() -> None:
    """Fifteen measurements of one and the same policy, 400 times over, by a judge who says yes or no."""
    rng = np.random.default_rng(1)
    alarmed = sum(
        any(one.confirmed for one in series(*rng.binomial(1, 0.6, (16, PROMPTS)).astype(float))) for _ in range(400)
    )
    assert alarmed / 400 <= 0.04 + 2 * math.sqrt(0.04 * 0.96 / 400)


def test_a_fall_is_confirmed_where_it_lasts_and_not_where_it_is_made_good() -> None:
    """Of 50 prompts, the judge turns away from half. The way has ten steps, of which a fall must last two."""
    high, low = np.ones(PROMPTS), np.ones(PROMPTS)
    low[:25] = 0
    dips = series(high, low, low, high, low, low, high)
    assert [one.alarms == ["gold"] for one in dips] == [False, True, True, False, True, True, False]
    assert not any(one.confirmed for one in dips)
    falls = series(high, low, low, low)
    assert [one.confirmed for one in falls] == [[], [], [], ["gold"]]
    assert not any(one.confirmed for one in series(high, low, low, low, steps=100))


def test_a_mean_that_rises_or_that_nobody_gave_raises_no_alarm() -> None:
    unknown = [math.nan] * PROMPTS
    rising = series(np.zeros(PROMPTS), unknown, np.full(PROMPTS, 0.5), np.ones(PROMPTS), unknown)
    assert not any(one.alarms for one in rising)
    assert chance_of_fall(series(unknown, unknown), "gold") == 1


def test_a_fall_is_counted_prompt_by_prompt() -> None:
    """Prompts are far apart, and the fall is the same at each: by the spread of the prompts it would be nothing."""
    values = np.linspace(0, 100, PROMPTS)
    falls = series(values, values - 0.5 + 0.1 * np.sin(values))
    assert falls[-1].alarms == ["gold"]


def test_the_best_of_many_is_above_its_mean_by_chance() -> None:
    """The same fall from the best says less after twenty measurements than after one."""
    rng = np.random.default_rng(2)
    rows = [rng.normal(0, 1, PROMPTS) for _ in range(21)]
    highest = max(rows[:-1], key=np.mean)
    assert chance_of_fall(series(*rows), "gold") > 3 * chance_of_fall(series(highest, rows[-1]), "gold")


@pytest.mark.parametrize(
    ("values", "alarms", "confirmed"),
    [
        ([(5, 0.2), (6.1, 0.2), (5.9, 0.2)], [False, True, False], [False, False, False]),
        ([(5, 0.2), (6.1, 0.2), (6.2, 0.2)], [False, True, True], [False, False, True]),
        ([(5, 0.2), (3.3, 0.2)], [False, True], [False, True]),
        ([(5, 0.2), (3.5, 0.2)], [False, True], [False, False]),
        ([(9, 0.2), (9, 0.2)], [False, True], [False, True]),  # the first one is what the others are held against
    ],
)  # fmt: skip
def test_a_measure_outside_its_band(
    values: list[tuple[float, float]], alarms: list[bool], confirmed: list[bool]
) -> None:
    found = drifting(*values)
    assert [bool(one.alarms) for one in found] == alarms
    assert [bool(one.confirmed) for one in found] == confirmed


def test_a_band_of_one_side_has_no_other() -> None:
    assert not any(one.alarms for one in drifting((5, 0.2), (1, 0.2), (1, 0.2), low=None))


def test_the_best_is_the_earliest_of_the_highest_and_none_that_one_stops_for() -> None:
    found = [Measurement(step, 0.0, {"gold": [value]}) for step, value in enumerate((0.5, 0.9, 0.7, 0.9, math.nan))]
    assert best(found, "gold", []).step == 1
    found[1].alarms = ["length"]
    assert best(found, "gold", ["length"]).step == 3
    assert best(found, "gold", ["refusals"]).step == 1
    for one in found:
        one.alarms = ["length"]
    assert best(found, "gold", ["length"]).step == 0  # nothing that was trained may be kept


def test_a_line_is_read_back_as_it_was() -> None:
    measures = {"length": Measured(5.0, 0.1, None, 6.0)}
    one = Measurement(3, 1.5, {"gold": [1.0, math.nan]}, measures, [("so good", 0.5, 4.0)], ["length"], [])
    again = Measurement.from_json(one.as_json())
    assert again.as_json() == one.as_json() and math.isnan(again.by_prompt["gold"][1])
    assert again.measures == measures and again.phrases == one.phrases
