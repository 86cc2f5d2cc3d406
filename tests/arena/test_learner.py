"""The learner against independent references: primal Newton, integrals, exact refits, and simulated truths."""

import copy
import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from rlhf_pipeline.arena import laplace
from rlhf_pipeline.arena.asking import information
from rlhf_pipeline.arena.drift import tilted
from rlhf_pipeline.arena.learner import TYPICAL, Learner, _scaled

Floats = NDArray[np.float64]


def world(seed: int, replies: int, width: int, labels: int, size: float = 2.0) -> tuple[Floats, Floats, tuple, Floats]:
    """Features, true rewards, labels (first, second, outcome, honest) drawn by them, and the generator's features."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((replies, width))
    weights = size * rng.standard_normal(width) / math.sqrt(width)
    rewards = _scaled(features.astype(np.float32), None).astype(np.float64) @ weights * math.sqrt(width)
    first = rng.integers(0, replies, labels)
    second = (first + rng.integers(1, replies, labels)) % replies
    outcome = (rng.random(labels) < sigmoid(rewards[first] - rewards[second])).astype(float)
    return features, rewards, (first, second, outcome, np.ones(labels, bool)), weights


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def primal(x: Floats, outcome: Floats, scale: float, tie: float) -> tuple[Floats, Floats]:
    """The mode and covariance of the weights by Newton's method in their own space, in float64."""
    weights = np.zeros(x.shape[1])
    for _ in range(100):
        half = x @ weights / 2
        total = 2 * np.cosh(half) + tie  # of which the logarithm is differentiated once and twice
        slope = outcome - 0.5 - np.sinh(half) / total
        curvature = np.cosh(half) / (2 * total) - np.sinh(half) ** 2 / total**2
        hessian = (x * curvature[:, None]).T @ x + np.eye(x.shape[1]) / scale**2
        weights = weights + np.linalg.solve(hessian, x.T @ slope - weights / scale**2)
    return weights, np.linalg.inv(hessian)


@pytest.mark.parametrize(("width", "labels"), [(3, 40), (12, 12), (40, 10)])
def test_beliefs_are_those_of_newton_in_the_space_of_weights(width: int, labels: int) -> None:
    features, _, (first, second, outcome, honest), _ = world(1, 30, width, labels)
    outcome[:3] = 0.5
    learner = Learner(features, prior_scale=3.0)
    learner.fit(first, second, outcome, honest)
    x = _scaled(features.astype(np.float32), None).astype(np.float64)
    weights, covariance = primal(x[first] - x[second], outcome, 3.0, learner.tie)
    assert learner.tie > 0
    a, b = np.arange(29), np.arange(1, 30)
    apart = x[a] - x[b]
    mean, deviation = apart @ weights, np.sqrt(np.einsum("md,de,me->m", apart, covariance, apart))
    probability, low, high = learner.belief(a, b)
    np.testing.assert_allclose(probability, sigmoid(mean / np.sqrt(1 + np.pi / 8 * deviation**2)), atol=1e-4)
    np.testing.assert_allclose(low, sigmoid(mean - 1.6449 * deviation), atol=1e-4)
    np.testing.assert_allclose(high, sigmoid(mean + 1.6449 * deviation), atol=1e-4)
    rewards, deviations = learner.rewards()
    np.testing.assert_allclose(rewards, x @ weights, atol=1e-3)
    np.testing.assert_allclose(deviations, np.sqrt(np.einsum("rd,de,re->r", x, covariance, x)), rtol=1e-3)


def test_copies_of_a_learner_learn_apart() -> None:
    """One that fails half-way leaves the one before as it was, which the next copy is made of."""
    features, _, labels, _ = world(3, 10, 4, 20)
    first = Learner(features)
    for _ in range(2):
        other = copy.copy(first)
        other.fit(*labels)
        assert len(first.means()) == 10 and not first.means().any()
    alone = Learner(features)
    alone.fit(*labels)
    np.testing.assert_allclose(other.means(), alone.means())


def test_the_mode_is_where_the_posterior_has_no_slope() -> None:
    """Central differences, in one direction after the other."""
    rng = np.random.default_rng(2)
    x, outcome = rng.standard_normal((9, 5)), np.array([1, 0, 1, 1, 0.5, 0, 0, 1, 0.5])
    mode = laplace.find_mode(4 * x @ x.T, outcome, np.zeros(9), 0.8)
    weights = 4 * x.T @ mode.dual

    def posterior(w: Floats) -> float:
        first, second = np.exp(x @ w / 2), np.exp(-x @ w / 2)
        chosen = np.where(outcome == 1, first, np.where(outcome == 0, second, 0.8))
        return float(np.sum(np.log(chosen / (first + second + 0.8))) - w @ w / 8)

    slopes = [(posterior(weights + h) - posterior(weights - h)) / 2e-4 for h in 1e-4 * np.eye(5)]
    np.testing.assert_allclose(slopes, 0, atol=1e-5)


def test_the_evidence_is_close_to_the_integral_over_the_weights() -> None:
    rng = np.random.default_rng(3)
    x, outcome = rng.standard_normal((12, 2)), (rng.random(12) < 0.6).astype(float)
    grid = np.stack(np.meshgrid(*[np.linspace(-9, 9, 361)] * 2), -1).reshape(-1, 2)
    likelihood = np.exp(np.sum(np.where(outcome, np.log(sigmoid(grid @ x.T)), np.log(sigmoid(-grid @ x.T))), 1))
    prior = np.exp(-(grid**2).sum(1) / (2 * 1.5**2)) / (2 * np.pi * 1.5**2)
    integral = float(np.sum(likelihood * prior) * (18 / 360) ** 2)
    assert laplace.find_mode(1.5**2 * x @ x.T, outcome, np.zeros(12)).evidence == pytest.approx(
        math.log(integral), abs=0.1
    )


def test_probabilities_and_intervals_are_close_to_the_integral_over_the_weights() -> None:
    features, _, (first, second, outcome, honest), _ = world(4, 20, 2, 25)
    learner = Learner(features, prior_scale=2.0)
    learner.fit(first, second, outcome, honest)
    x = _scaled(features.astype(np.float32), None).astype(np.float64)
    grid = np.stack(np.meshgrid(*[np.linspace(-12, 12, 401)] * 2), -1).reshape(-1, 2)
    log_odds = grid @ (x[first] - x[second]).T
    weight = np.sum(outcome * log_odds - np.logaddexp(0, log_odds), 1) - (grid**2).sum(1) / 8
    weight = np.exp(weight - weight.max())
    weight /= weight.sum()
    a, b = np.arange(10), np.arange(10, 20)
    shares = sigmoid(grid @ (x[a] - x[b]).T)
    probability, low, high = learner.belief(a, b)
    np.testing.assert_allclose(probability, weight @ shares, atol=0.03)
    for pair in range(10):
        order = np.argsort(shares[:, pair])
        below = np.cumsum(weight[order])
        ends = [shares[order, pair][np.searchsorted(below, share)] for share in (0.05, 0.95)]
        np.testing.assert_allclose([low[pair], high[pair]], ends, atol=0.1)


@pytest.mark.parametrize("mean", [0.0, 0.7, 2.5, 6.0])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 4.0, 12.0])
def test_information_is_the_mutual_information(mean: float, deviation: float) -> None:
    """I(answer; f) as the mean over f of the divergence of its answer from the mean one."""
    z = np.linspace(-9, 9, 40001)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    p = np.clip(sigmoid(mean + deviation * z), 1e-15, 1 - 1e-15)
    q = weight @ p
    expected = weight @ (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert information(np.array([mean]), np.array([deviation**2]))[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("tie", [0.3, 4.0])
def test_information_counts_a_tie_as_an_answer(tie: float) -> None:
    """Against the mean divergence of three answers from the mean ones."""
    z = np.linspace(-9, 9, 40001)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    f = 0.8 + 3.0 * z
    answers = np.stack([np.exp(f / 2), np.exp(-f / 2), np.full_like(f, tie)])
    answers /= answers.sum(0)
    expected = weight @ np.sum(answers * np.log(answers / (answers @ weight)[:, None]), 0)
    assert information(np.array([0.8]), np.array([9.0]), tie)[0] == pytest.approx(expected, abs=1e-3)


def test_ties_are_as_likely_as_they_are_frequent_and_do_not_make_rewards_small() -> None:
    """Half of the answers are ties, by Davidson's model: what is learned of the rewards is as large as without."""
    features, rewards, (first, second, _, honest), _ = world(18, 60, 4, 256, size=4.0)
    apart = rewards[first] - rewards[second]
    weights = np.stack([np.exp(apart / 2), np.full(256, 4.0), np.exp(-apart / 2)])
    drawn = (np.random.default_rng(1).random(256) > np.cumsum(weights / weights.sum(0), 0)).sum(0)
    learner = Learner(features)
    learner.fit(first, second, 1 - drawn / 2, honest)
    assert 2.5 < learner.tie < 6.0
    assert learner.scale in (2.0, 4.0, 8.0)
    learned = learner.rewards()[0]
    assert np.polyfit(rewards, learned, 1)[0] == pytest.approx(1, abs=0.3)


def test_a_pair_of_which_much_was_said_has_less_to_tell() -> None:
    features, _, _, _ = world(5, 20, 6, 1)
    learner = Learner(features)
    before = learner.informative([0, 2], [1, 3])
    learner.fit([0] * 12, [1] * 12, [1, 0] * 6, [False] * 12)
    after = learner.informative([0, 2], [1, 3])
    assert after[0] < 0.3 * before[0]
    assert after[1] > after[0]


def test_intervals_hold_the_truth_nine_times_in_ten() -> None:
    """Over worlds that are drawn from the prior."""
    inside = []
    for seed in range(40):
        features, rewards, labels, _ = world(seed, 60, 8, 60)
        learner = Learner(features, prior_scale=2.0)
        learner.fit(*labels)
        a, b = np.arange(30), np.arange(30, 60)
        _, low, high = learner.belief(a, b)
        true = sigmoid(rewards[a] - rewards[b])
        inside.append(np.mean((low <= true) & (true <= high)))
    assert 0.86 <= np.mean(inside) <= 0.94


@pytest.mark.parametrize("width", [5, 400])
def test_accuracy_is_that_of_fits_without_each_label(width: int) -> None:
    """Refits without each label, with fewer features than labels and with many more."""
    features, _, (first, second, outcome, honest), _ = world(6, 50, width, 120, size=3.0)
    honest[:30] = False
    first[1], second[1], outcome[1] = second[40], first[40], 1 - outcome[40]  # the same pair again, the other way
    learner = Learner(features, prior_scale=2.0)
    learner.fit(first, second, outcome, honest)
    tested = np.flatnonzero(honest)
    mean, variance = learner._left_out(tested)
    means, variances = [], []
    for label in tested:
        pair = {first[label], second[label]}
        others = np.array([{a, b} != pair for a, b in zip(first, second, strict=True)])
        refit = Learner(features, prior_scale=2.0)
        refit.fit(first[others], second[others], outcome[others], honest[others])
        found = refit._log_odds(first[[label]], second[[label]])
        means.append(found[0][0])
        variances.append(found[1][0])
    assert np.abs(mean - means).mean() < 0.04
    np.testing.assert_allclose(variance, variances, rtol=0.25)
    found = learner.accuracy()
    assert found is not None and found.tested == 90
    right = (np.array(means) > 0) == (outcome[tested] > 0.5)
    assert abs(found.accuracy - right.mean()) <= 0.025
    assert found.low < found.accuracy < found.high


def test_accuracy_leaves_out_all_labels_of_an_item() -> None:
    """Rewards are numbers of their own to each prompt, so nothing can be learned from other prompts."""
    items = np.repeat(np.arange(40), 3)
    features = np.zeros((120, 80))
    features[np.arange(120), 2 * items + np.tile([0, 1, 1], 40)] = np.tile([1.0, 1.0, -1.0], 40)
    rng = np.random.default_rng(7)
    sign = rng.choice([-1, 1], 40)
    first, second = np.tile(3 * np.arange(40) + 1, 2), np.tile(3 * np.arange(40) + 2, 2)
    outcome, honest = np.tile((sign > 0).astype(float), 2), np.ones(80, bool)
    by_item = Learner(features, items=items)
    by_item.fit(first, second, outcome, honest)
    found = by_item.accuracy()
    assert found is not None and found.accuracy == 0.5
    probability, _, _ = by_item.belief(first[:40], second[:40])
    assert ((probability > 0.6) == (sign > 0)).all()


def test_ties_and_informative_labels_are_not_what_accuracy_is_measured_on() -> None:
    features, _, (first, second, outcome, honest), _ = world(8, 30, 4, 20)
    learner = Learner(features)
    assert learner.accuracy() is None
    outcome[:5], honest[5:8] = 0.5, False
    learner.fit(first, second, outcome, honest)
    found = learner.accuracy()
    assert found is not None and found.tested == 12
    assert sum(one.labels for one in found.bins) == 12
    error = sum(one.labels * abs(one.said - one.true) for one in found.bins) / 12
    assert found.calibration_error == pytest.approx(error)


def test_a_learner_that_knows_the_prior_is_calibrated() -> None:
    """One that is far too sure of itself is not: the error would be about 0.2."""
    errors = []
    for seed in range(6):
        features, _, labels, _ = world(seed, 80, 10, 300)
        learner = Learner(features, prior_scale=2.0)
        learner.fit(*labels)
        found = learner.accuracy()
        assert found is not None
        errors.append(found.calibration_error)
    assert np.mean(errors) < 0.07


def test_ties_draw_rewards_together() -> None:
    """The more of them, the closer; whichever reply is the first."""
    found = []
    for ties in (0, 2, 8):
        outcome = np.array([1.0] + [0.5] * ties)
        found.append(laplace.find_mode(np.ones((ties + 1, ties + 1)), outcome, np.zeros(ties + 1), 1.0).log_odds[0])
    assert found[0] > found[1] > found[2] > 0


def test_labels_one_by_one_or_all_at_once_or_taken_back_give_the_same() -> None:
    features, _, (first, second, outcome, honest), _ = world(10, 40, 50, 60)
    step_by_step, at_once = Learner(features), Learner(features)
    for count in [*range(61), 30, 45, 60]:
        step_by_step.fit(first[:count], second[:count], outcome[:count], honest[:count])
    at_once.fit(first, second, outcome, honest)
    assert step_by_step.scale == at_once.scale
    a, b = np.arange(20), np.arange(20, 40)
    np.testing.assert_allclose(step_by_step.belief(a, b), at_once.belief(a, b), atol=1e-4)
    np.testing.assert_allclose(step_by_step.informative(a, b), at_once.informative(a, b), atol=1e-4)
    order = np.random.default_rng(0).permutation(60)  # somebody else's labels between, and one's own taken back
    step_by_step.fit(first[order], second[order], outcome[order], honest[order])
    np.testing.assert_allclose(step_by_step.belief(a, b), at_once.belief(a, b), atol=1e-4)


def test_which_reply_comes_first_does_not_matter() -> None:
    features, _, (first, second, outcome, honest), _ = world(11, 30, 6, 30)
    one, other = Learner(features), Learner(features)
    one.fit(first, second, outcome, honest)
    other.fit(second, first, 1 - outcome, honest)
    probability, low, high = one.belief([3, 4], [5, 6])
    turned = other.belief([5, 6], [3, 4])
    np.testing.assert_allclose(probability, 1 - turned[0], atol=1e-5)
    np.testing.assert_allclose((low, high), (1 - turned[2], 1 - turned[1]), atol=1e-5)


def test_the_scale_follows_the_labels() -> None:
    """People of one mind give a large one, guesses a small one; nothing at all the one that is usual."""
    features, rewards, (first, second, _, honest), _ = world(12, 60, 4, 150)
    learner = Learner(features)
    assert learner.scale == TYPICAL
    learner.fit(first, second, (rewards[first] > rewards[second]).astype(float), honest)
    assert learner.scale >= 8
    learner.fit(first, second, np.random.default_rng(0).integers(0, 2, 150), honest)
    assert learner.scale <= 0.5


def test_one_feature_that_is_a_thousand_times_as_large_does_not_drown_the_others() -> None:
    features, _, labels, _ = world(13, 60, 8, 200)
    plain, odd = Learner(features), Learner(features * np.array([1e3, *[1.0] * 7]) + 1e2)
    plain.fit(*labels)
    odd.fit(*labels)
    np.testing.assert_allclose(plain.belief([0, 1], [2, 3]), odd.belief([0, 1], [2, 3]), atol=1e-3)


def test_what_all_replies_to_a_prompt_share_counts_for_nothing() -> None:
    rng = np.random.default_rng(14)
    items, own = np.repeat(np.arange(20), 4), rng.standard_normal((80, 6))
    prompts = 50 * rng.standard_normal((20, 6))
    first = rng.integers(0, 80, 60)
    second = first // 4 * 4 + (first + rng.integers(1, 4, 60)) % 4
    outcome, honest = rng.integers(0, 2, 60), np.ones(60, bool)
    with_prompts, without = Learner(own + prompts[items], items=items), Learner(own, items=items)
    with_prompts.fit(first, second, outcome, honest)
    without.fit(first, second, outcome, honest)
    np.testing.assert_allclose(with_prompts.belief(first, second), without.belief(first, second), atol=1e-3)


@pytest.mark.parametrize("features", [np.zeros((4, 3)), np.ones((4, 1)), np.random.default_rng(0).random((2, 1))])
def test_features_that_say_little_or_nothing_are_no_error(features: Floats) -> None:
    learner = Learner(features)
    learner.fit([0, 0, 1], [1, 1, 0], [1, 0.5, 1], [True, True, False])
    assert np.isfinite(learner.belief([0], [1])).all()
    assert np.isfinite(learner.informative([0], [1])).all()
    assert np.isfinite(learner.rewards()).all()
    assert learner.accuracy() is not None


def test_labels_that_contradict_each_other_a_thousand_times_are_no_error() -> None:
    features, _, _, _ = world(15, 10, 300, 1)
    first, second = np.zeros(600, int), np.ones(600, int)
    learner = Learner(features, prior_scale=4.0)
    learner.fit(first, second, np.ones(600), np.ones(600, bool))
    assert learner.belief([0], [1])[0][0] > 0.95
    learner.fit(first, second, np.arange(600) % 2, np.ones(600, bool))
    assert learner.belief([0], [1])[0][0] == pytest.approx(0.5, abs=0.01)


def test_a_click_with_four_thousand_features_takes_a_fraction_of_a_second() -> None:
    """With 300 labels and 500 pairs, of which the time is a small part of that of `benchmarks/arena.py`."""
    rng = np.random.default_rng(16)
    features = rng.standard_normal((400, 4000), dtype=np.float32)
    first = rng.integers(0, 400, 300)
    second = (first + rng.integers(1, 400, 300)) % 400
    outcome, honest = rng.integers(0, 2, 300), rng.random(300) < 0.2
    learner = Learner(features)
    asked = np.arange(200), np.arange(200, 400)
    learner.fit(first[:298], second[:298], outcome[:298], honest[:298])
    learner.informative(*asked)
    took = []
    for count in (299, 300):
        began = time.process_time()
        learner.fit(first[:count], second[:count], outcome[:count], honest[:count])
        learner.informative(*asked)
        learner.accuracy()
        took.append(time.process_time() - began)
    assert min(took) < 1.0  # 0.05 where nobody else computes


# Drift


def test_the_policy_is_that_of_brute_force() -> None:
    """Of many policies none has more reward less beta times KL; and its numbers are those of their definitions."""
    rng = np.random.default_rng(17)
    rewards, base, beta = rng.standard_normal(5), rng.dirichlet(np.ones(5)), 0.7
    found = tilted(rewards, beta, base)
    expected = base * np.exp(rewards / beta)
    np.testing.assert_allclose(found.probabilities, expected / expected.sum())
    assert found.expected_reward == pytest.approx(found.probabilities @ rewards)
    assert found.base_reward == pytest.approx(base @ rewards)
    assert found.kl == pytest.approx(np.sum(found.probabilities * np.log(found.probabilities / base)))
    best = found.expected_reward - beta * found.kl
    assert best == pytest.approx(beta * np.log(expected.sum()))
    for policy in rng.dirichlet(np.ones(5), 2000):
        assert policy @ rewards - beta * np.sum(policy * np.log(policy / base)) <= best + 1e-12


def test_the_ends_of_beta_are_the_best_reply_and_the_policy_of_before() -> None:
    greedy, same = tilted([1.0, 3.0, 2.0], 1e-300), tilted([1.0, 3.0, 2.0], 1e300)
    np.testing.assert_allclose(greedy.probabilities, [0, 1, 0])
    assert greedy.kl == pytest.approx(math.log(3))
    np.testing.assert_allclose(same.probabilities, 1 / 3)
    assert same.kl == pytest.approx(0)
    assert tilted([1e5, 1e5 + 1], 1.0).probabilities == pytest.approx(tilted([0, 1], 1.0).probabilities)


@pytest.mark.parametrize(("rewards", "beta", "base"), [([1.0], 0.0, None), ([], 1.0, None), ([1, 2], 1.0, [1, 0])])
def test_what_is_no_policy_is_an_error(rewards: list[float], beta: float, base: list[float] | None) -> None:
    with pytest.raises(ValueError, match="above 0"):
        tilted(rewards, beta, base)
