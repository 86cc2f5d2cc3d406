"""The forecast of over-optimisation: known curves are found again, and its intervals say how sure that is."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from rlhf_pipeline.hacking.forecast import Form, best_of, forecast, of_best, order, worth, worth_of_best

Numbers = NDArray[np.float64]
ALPHA, BETA = 0.5, 0.25
PEAK = math.exp(ALPHA / BETA - 1)  # 2.72 nats^½, KL 7.4
KL = np.linspace(0, 4, 11) ** 2  # nats


def curve(d: Numbers, form: Form = "rl", alpha: float = ALPHA, beta: float = BETA) -> Numbers:
    if form == "best of n":
        return d * (alpha - beta * d)
    return d * alpha - beta * d * np.log(np.maximum(d, 1e-300))


def simulated(
    draw: np.random.Generator, kl: Numbers = KL, *, prompts: int = 100, noise: float = 0.3, form: Form = "rl",
    alpha: float = ALPHA, beta: float = BETA,
) -> Numbers:  # fmt: skip
    """Gold of replies to prompts that are easy and hard, by more than the curve is high."""
    easy = draw.normal(0, 1, prompts)
    return 0.4 + easy + curve(np.sqrt(kl), form, alpha, beta)[:, None] + draw.normal(0, noise, (len(kl), prompts))


@pytest.mark.parametrize("form", ["rl", "best of n"])
def test_a_known_curve_is_found_again(form: Form) -> None:
    draw = np.random.default_rng(3)
    found = forecast(KL, simulated(draw, prompts=4000, form=form), form)
    assert found is not None and found.describes and found.peak is not None and found.gain is not None
    assert found.form == form and found.furthest == 4
    assert found.alpha == pytest.approx(ALPHA, abs=0.02) and found.beta == pytest.approx(BETA, abs=0.01)
    peak = PEAK if form == "rl" else ALPHA / (2 * BETA)
    assert found.peak == pytest.approx(peak, rel=0.03)
    assert found.gain == pytest.approx(float(curve(np.array([peak]), form)[0]), abs=0.02)
    at = found.at(np.array([0.0, 1.0, found.peak]))
    assert at[0] == found.start and at[2] - at[0] == pytest.approx(found.gain, abs=0.02)
    assert (np.diff(found.at(found.peak + np.array([-0.3, 0, 0.3]))) * [1, -1] > 0).all()  # it is a peak


@pytest.mark.parametrize(("prompts", "measurements", "alpha"), [(100, 9, 0.5), (24, 6, 0.5), (100, 9, 0.25)])
def test_the_interval_covers_the_true_peak_in_95_of_100_runs(prompts: int, measurements: int, alpha: float) -> None:
    """Over three standard deviations of a binomial variable from 0.95 would be no chance."""
    kl, runs, covered = np.linspace(0, 4, measurements) ** 2, 400, 0
    peak = math.exp(alpha / BETA - 1)
    for seed in range(runs):
        found = forecast(kl, simulated(np.random.default_rng([7, seed]), kl, prompts=prompts, alpha=alpha), draws=300)
        assert found is not None
        covered += (found.low or math.inf) <= peak <= (math.inf if found.high is None else found.high)
    assert abs(covered / runs - 0.95) < 3 * math.sqrt(0.95 * 0.05 / runs)


def test_what_is_common_to_all_measurements_of_a_prompt_is_no_noise() -> None:
    draw = np.random.default_rng(0)
    values = simulated(draw)
    apart = forecast(KL, values + 100 * draw.normal(0, 1, values.shape[1]))
    plain = forecast(KL, values)
    assert plain is not None and apart is not None
    assert apart[2:] == pytest.approx(plain[2:], rel=1e-6)


def test_the_first_half_of_a_run_foretells_its_peak() -> None:
    """Measured to 0.8 of the peak's distance, which is 0.64 of its KL."""
    draw = np.random.default_rng(1)
    kl = np.linspace(0, 0.8 * PEAK, 9) ** 2
    peaks = [
        found.peak
        for _ in range(20)
        if (found := forecast(kl, simulated(draw, kl, prompts=2000))) is not None and found.peak is not None
    ]
    assert len(peaks) == 20 and np.median(peaks) == pytest.approx(PEAK, rel=0.05)
    whole = forecast(KL, simulated(draw, prompts=2000))
    half = forecast(kl, simulated(draw, kl, prompts=2000))
    assert whole and half and whole.peak and half.peak and half.low and whole.low and whole.high
    assert half.low < whole.peak and (half.high is None or half.high > whole.peak)
    assert "going on is worth up to 0.0" in worth(half) and "It is past its peak" in worth(whole)


def test_a_mean_that_all_prompts_agree_on_does_not_count_for_everything() -> None:
    """As means do of ones alone: its error by its own prompts is 0."""
    values = simulated(np.random.default_rng(2))
    others = np.delete(values, 4, 0)
    values[4] = others.mean(0) + 0.5
    found, without = forecast(KL, values), forecast(np.delete(KL, 4), others)
    assert found is not None and without is not None
    with_it, without_it = (abs(float(one.at(np.sqrt(KL[4:5]))[0] - values[4].mean())) for one in (found, without))
    assert 0.3 * without_it < with_it < without_it


def test_numbers_without_any_noise_are_fitted_exactly() -> None:
    found = forecast(KL, np.repeat(curve(np.sqrt(KL))[:, None], 5, 1))
    assert found is not None and found.peak is not None
    assert (found.alpha, found.beta) == pytest.approx((ALPHA, BETA)) and found.low == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("alpha", "beta", "peak"),
    [(-0.2, 0.0, 0.0), (-3.0, 0.25, 0.0), (0.2, 0.0, None), (0.2, -0.1, None), (-1.0, -0.1, 0.0)],
)
def test_a_curve_that_only_rises_has_no_peak_and_one_that_only_falls_has_it_at_the_start(
    alpha: float, beta: float, peak: float | None
) -> None:
    draw = np.random.default_rng(0)
    found = forecast(KL, simulated(draw, noise=0.02, prompts=2000, alpha=alpha, beta=beta))
    assert found is not None
    if peak is None:
        assert found.high is None and (found.peak is None or found.peak > 2 * found.furthest)
        assert worth(found).startswith("No peak is in sight up to KL 16 nats")
    else:
        assert found.peak == pytest.approx(peak, abs=1e-3) and worth(found).startswith("It only falls: at KL 16 nats")
        value = float(curve(np.array([4.0]), "rl", alpha, beta)[0])
        assert f"{-value:.2g}" in worth(found)


def test_a_level_curve_says_that_no_peak_can_be_forecast() -> None:
    told = [
        worth(found)
        for seed in range(20)
        if (found := forecast(KL, simulated(np.random.default_rng(seed), alpha=0.0, beta=0.0)))
    ]
    assert sum("no peak can be forecast" in one for one in told) >= 15


def test_measurements_on_another_curve_are_not_forecast() -> None:
    draw = np.random.default_rng(5)
    values = draw.normal(0, 0.3, (len(KL), 100)) + np.where(np.sqrt(KL) < 2, 0, 1)[:, None]  # a step
    found = forecast(KL, values)
    assert found is not None and found.misfit > 5 and not found.describes
    assert "so nothing is forecast" in worth(found)
    assert forecast(KL, values + 3 * curve(np.sqrt(KL))[:, None]).describes  # type: ignore[union-attr]  # fits all but
    true = [forecast(KL, simulated(np.random.default_rng(seed))) for seed in range(200)]
    assert sum(one is not None and not one.describes for one in true) <= 7  # 2 are expected
    assert np.mean([one.misfit for one in true if one]) == pytest.approx(1, abs=0.15)


def test_what_is_missing_or_impossible_is_left_out() -> None:
    draw = np.random.default_rng(0)
    values = simulated(draw)
    plain = forecast(KL, values)
    kl = [-0.01, *KL[1:], math.nan, math.inf]
    with_gaps = np.concatenate([values, np.full((2, 100), 7.0)])
    with_gaps = np.concatenate([with_gaps, np.full((len(kl), 1), 3.0)], 1)
    with_gaps[2, -1] = math.nan
    assert plain is not None and forecast(kl, with_gaps) == plain


@pytest.mark.parametrize(
    ("kl", "prompts"),
    [([0, 1, 2], 9), ([0, 0, 1, 2], 9), ([0, 1, 1, 1], 9), ([0, 1, 2, 3], 1), ([], 4), ([0, 1, math.nan, 2], 9)],
)
def test_too_little_is_no_forecast(kl: list[float], prompts: int) -> None:
    assert forecast(kl, np.random.default_rng(0).normal(0, 1, (len(kl), prompts))) is None


def test_three_measurements_are_enough() -> None:
    assert forecast([0, 1, 4, 9], simulated(np.random.default_rng(0), np.array([0.0, 1, 4, 9]))) is not None


@pytest.mark.parametrize("digits", [0, 3])
def test_the_best_of_n_is_the_mean_over_all_choices(digits: int) -> None:
    """Rounded to whole numbers, scores are often equal."""
    draw = np.random.default_rng(0)
    scores, values = draw.normal(0, 1, (6, 7)).round(digits), draw.normal(0, 1, (6, 7))
    found = best_of(scores, values)
    assert [one.n for one in found] == [1, 2, 3, 4, 5, 6, 7]
    for one in found:
        assert one.kl == pytest.approx(math.log(one.n) - (one.n - 1) / one.n)
        for place in range(6):
            expected = []
            for chosen in itertools.combinations(range(7), one.n):
                best = max(scores[place, i] for i in chosen)
                expected.append(np.mean([values[place, i] for i in chosen if scores[place, i] == best]))
            assert one.by_prompt[place] == pytest.approx(np.mean(expected))


def test_prompts_that_lost_replies() -> None:
    """Nine of ten prompts decide of how many replies the best is taken; the others, of which too few are left, go."""
    nan = np.nan
    scores = np.array([[1.0, 3, 2, nan]] * 9 + [[4, 5, 1, 2], [1, 2, nan, nan], [nan] * 4])
    values = np.array([[1.0, 0, 0, 1]] * 9 + [[0, nan, 1, 1], [1, 1, 1, 1], [1] * 4])
    found = best_of(scores, values)
    assert [one.n for one in found] == [1, 2, 3]
    for one, means in zip(found, [(1 / 3, 2 / 3), (0, 1 / 3), (0, 0)], strict=True):
        np.testing.assert_allclose(one.by_prompt, [means[0]] * 9 + [means[1]], atol=1e-12)
    fewer = best_of(scores[2:], values[2:])  # one of nine is more than a tenth
    assert [one.n for one in fewer] == [1, 2] and fewer[1].by_prompt[-1] == 1
    assert best_of(scores[-1:], values[-1:]) == [] and of_best([]) is None and of_best(found) is None


def test_of_many_replies_the_best_is_still_counted_exactly() -> None:
    scores = np.arange(300.0)[None]
    found = best_of(scores, scores)
    assert [one.by_prompt[0] for one in found] == pytest.approx([n * 301 / (n + 1) - 1 for n in range(1, 301)])


def test_the_best_of_n_by_gold_itself_goes_up_and_by_a_fooled_score_it_turns() -> None:
    draw = np.random.default_rng(0)
    gold = draw.normal(0, 1, (300, 64))
    fooled = 0.6 * gold + np.where(draw.random(gold.shape) < 0.03, 4.0, 0)  # a trick that scores high
    gold = np.where(fooled > 3, -1.0, gold)
    for scores, turns in ((gold, False), (fooled, True)):
        found = best_of(scores, gold)
        curve_of, in_order = of_best(found), order(scores, gold)
        assert curve_of is not None and in_order is not None and not in_order.is_a_guess
        assert worth_of_best(in_order, found).endswith(worth(curve_of))
        assert (curve_of.peak is not None and curve_of.peak < curve_of.furthest) is turns, curve_of
        assert ("past its peak" in worth(curve_of)) is turns and ("No peak is in sight" in worth(curve_of)) is not turns


def test_how_well_scores_order_replies() -> None:
    draw = np.random.default_rng(0)
    gold = draw.integers(0, 2, (400, 6)).astype(float)
    exact, turned, none = order(gold, gold), order(-gold, gold), order(draw.normal(0, 1, gold.shape), gold)
    assert exact and exact[:2] == (1, 0) and turned and turned[:2] == (0, 0) and turned.is_a_guess
    assert none is not None and none.interval[0] < 0.5 < none.interval[1] and none.se < 0.02
    told = worth_of_best(none, best_of(draw.normal(0, 1, gold.shape), gold))
    assert none.is_a_guess and "PPO will hardly be better than this" in told
    told = worth_of_best(exact, best_of(gold, gold))
    assert not exact.is_a_guess and "in 100% of the cases" in told and "The best of 6 has 0.9" in told
    level = order(0 * gold, gold)
    assert level and level.share == 0.5
    scores = np.array([[1.0, 2, 3], [3, 2, 1], [1, 2, 3], [1, 1, 1]])
    some = order(scores, np.array([[0.0, 0, 1]] * 2 + [[0, 0, 0.0]] * 2))
    assert some and some.share == 0.5 and some.prompts == 2
    assert order(gold[:1], gold[:1]) is None and order(gold, 0 * gold) is None
