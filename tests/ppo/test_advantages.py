"""From scores and log-probabilities to advantages, against slow loops, closed forms and exact expectations."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_pipeline.ppo.advantages import (
    estimate_advantages,
    explained_variance,
    kl_per_token,
    masked_mean,
    shape_rewards,
    whiten,
)

LENGTHS = torch.tensor([6, 1, 4, 2, 6])
MASK = torch.arange(6) < LENGTHS[:, None]


def draw(seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Random numbers on the tokens of replies, 0 elsewhere."""
    return (torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed)) + offset) * MASK


def replies(values: torch.Tensor) -> list[list[float]]:
    """The numbers of each reply's tokens."""
    return [row[:length].tolist() for row, length in zip(values, LENGTHS.tolist(), strict=True)]


def assert_rows(values: torch.Tensor, expected: list[list[float]]) -> None:
    """`expected` on the tokens of replies, and 0 elsewhere."""
    for row, numbers in zip(values, expected, strict=True):
        assert_close(row, torch.tensor(numbers + [0.0] * (MASK.shape[1] - len(numbers))), rtol=1e-5, atol=1e-5)


class TestAdvantages:
    @pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
    def test_lam_1_gives_discounted_returns_less_values(self, gamma):
        """What the whole rest of the reply brought, less what was expected; the returns do not depend on values."""
        rewards, values = draw(0), draw(1)
        advantages, returns = estimate_advantages(rewards, values, gamma, 1.0)
        expected = [
            [sum(gamma ** (k - t) * reward[k] for k in range(t, len(reward))) for t in range(len(reward))]
            for reward in replies(rewards)
        ]
        assert_rows(returns, expected)
        assert_rows(
            advantages,
            [
                [one - value for one, value in zip(of, values_of, strict=True)]
                for of, values_of in zip(expected, replies(values), strict=True)
            ],
        )

    @pytest.mark.parametrize("gamma", [1.0, 0.9])
    def test_lam_0_gives_errors_of_one_step(self, gamma):
        """The reward and the next value, less the value; no value follows the last token."""
        rewards, values = draw(0), draw(1)
        advantages, _ = estimate_advantages(rewards, values, gamma, 0.0)
        expected = []
        for reward, value in zip(replies(rewards), replies(values), strict=True):
            following = [*value[1:], 0.0]
            expected.append([reward[t] + gamma * following[t] - value[t] for t in range(len(reward))])
        assert_rows(advantages, expected)

    def test_between_it_is_the_mean_of_all_horizons(self):
        """(1 - lam) times the sum of lam^(n-1) times the n-step advantage: the definition."""
        rewards, values = draw(0), draw(1)
        gamma, lam, far = 0.97, 0.6, 200
        advantages, returns = estimate_advantages(rewards, values, gamma, lam)
        expected = []
        for reward, value in zip(replies(rewards), replies(values), strict=True):
            # Beyond its end, a reply goes on with rewards and values of 0.
            reward, value = ([*numbers, *[0.0] * 2 * far] for numbers in (reward, value))
            expected.append([])
            for t in range(reward.index(0.0)):
                total = ahead = 0.0
                for n in range(1, far):
                    ahead += gamma ** (n - 1) * reward[t + n - 1]
                    total += (1 - lam) * lam ** (n - 1) * (ahead + gamma**n * value[t + n] - value[t])
                expected[-1].append(total)
        assert_rows(advantages, expected)
        assert_close(returns, advantages + values)

    def test_each_reply_is_on_its_own(self):
        """A reply's advantages are those it has alone and without padding."""
        rewards, values = draw(0), draw(1)
        advantages, returns = estimate_advantages(rewards, values, 0.9, 0.8)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = estimate_advantages(rewards[row : row + 1, :length], values[row : row + 1, :length], 0.9, 0.8)
            for together, expected in zip((advantages, returns), alone, strict=True):
                assert_close(together[row, :length], expected[0], rtol=0, atol=0)
                assert not together[row, length:].any()

    def test_inputs_stay_as_they_are(self):
        """Rewards and values are read again after the advantages are known."""
        rewards, values = draw(0), draw(1)
        estimate_advantages(rewards, values, 0.9, 0.8)
        assert_close((rewards, values), (draw(0), draw(1)), rtol=0, atol=0)


class TestWhiten:
    def test_mean_and_variance_over_the_tokens_of_replies(self):
        """Mean 0 and unbiased variance 1 over all tokens of all replies; padding stays 0."""
        whitened = whiten(draw(offset=5.0) * 3, MASK)
        assert_close(whitened[MASK].mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
        assert_close(whitened[MASK].var(), torch.tensor(1.0), rtol=1e-5, atol=0)
        assert not whitened[~MASK].any()

    def test_mean_stays_where_it_shall(self):
        """Rewards are scaled, and keep their sign: their mean stays."""
        values = draw(offset=5.0) * 3
        whitened = whiten(values, MASK, shift_mean=False)
        assert_close(whitened[MASK].mean(), values[MASK].mean(), rtol=1e-5, atol=0)
        assert_close(whitened[MASK].var(), torch.tensor(1.0), rtol=1e-5, atol=0)
        assert not whitened[~MASK].any()

    def test_what_stands_in_the_padding_does_not_count(self):
        values = draw(offset=5.0)
        assert_close(whiten(values + 1e3 * ~MASK, MASK), whiten(values, MASK), rtol=0, atol=0)

    @pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, False]])])
    def test_nothing_to_tell_apart_is_0(self, mask):
        """Equal numbers, or a single one, have no variance to divide by."""
        assert_close(whiten(torch.full(mask.shape, 4.0), mask), torch.zeros(mask.shape), rtol=0, atol=0)


def test_masked_mean_is_over_the_tokens_of_all_replies():
    """Not a mean of replies' means: every token weighs the same."""
    numbers = [number for reply in replies(draw()) for number in reply]
    assert masked_mean(draw(), MASK).item() == pytest.approx(sum(numbers) / len(numbers), rel=1e-5)


class TestKL:
    @pytest.fixture
    def policies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a policy and a reference over a vocabulary of seven, in four states."""
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(4, 7, generator=generator).double().log_softmax(1) for _ in range(2))

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_is_right_on_average(self, policies, estimator):
        """Weighted by how likely the policy is to sample each token, the estimates add up to the divergence."""
        policy, reference = policies
        exact = [
            sum(math.exp(p) * (p - q) for p, q in zip(*rows, strict=True))
            for rows in zip(policy.tolist(), reference.tolist(), strict=True)
        ]
        assert min(exact) > 0.1
        estimates = kl_per_token(policy, reference, estimator)
        assert_close((policy.exp() * estimates).sum(1), torch.tensor(exact, dtype=torch.double))

    def test_k1_is_signed_and_k3_is_not(self, policies):
        """k1 is negative where the reference is more likely to say it; k3 never is."""
        policy, reference = policies
        assert_close(kl_per_token(policy, reference, "k1").sign(), (policy - reference).sign())
        assert (kl_per_token(policy, reference, "k3") > 0).all()

    def test_k3_has_less_variance(self, policies):
        """That is what it is for."""
        policy, reference = policies
        variances = []
        for estimator in ("k1", "k3"):
            estimates = kl_per_token(policy, reference, estimator)
            mean = (policy.exp() * estimates).sum(1, keepdim=True)
            variances.append((policy.exp() * (estimates - mean) ** 2).sum())
        assert variances[1] < variances[0]

    def test_k3_of_almost_equal_policies_is_no_rounding_error(self):
        """exp(x) - 1 - x of a small x is x²/2; float32 would lose it in exp(x) - 1."""
        difference = torch.tensor([1e-4, -1e-4, 0.0])
        before = torch.zeros(3)
        assert_close(kl_per_token(before, difference, "k3"), torch.tensor([5e-9, 5e-9, 0.0]), rtol=0.01, atol=0)

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_of_equal_policies_is_0(self, policies, estimator):
        assert not kl_per_token(policies[0], policies[0].clone(), estimator).any()


class TestRewards:
    def test_score_is_the_last_tokens_alone(self):
        """Every token pays for its KL; the score is added at each reply's own end, and padding gets nothing."""
        kl, scores = draw(), torch.tensor([3.0, -1.0, 0.5, 7.0, 2.0])
        rewards = shape_rewards(scores, kl, 0.1, LENGTHS)
        expected = [[-0.1 * number for number in reply] for reply in replies(kl)]
        for reply, score in zip(expected, scores.tolist(), strict=True):
            reply[-1] += score
        assert_rows(rewards, expected)
        assert_close(kl, draw(), rtol=0, atol=0)

    def test_without_a_kl_coefficient_the_score_is_all(self):
        rewards = shape_rewards(torch.ones(5), draw(), 0.0, LENGTHS)
        assert rewards.nonzero().tolist() == [[row, length - 1] for row, length in enumerate(LENGTHS.tolist())]


class TestExplainedVariance:
    def test_perfect_values_explain_all(self):
        assert explained_variance(draw(), draw(), MASK).item() == 1.0

    @pytest.mark.parametrize("constant", [0.0, 5.0])
    def test_a_constant_explains_nothing(self, constant):
        """The mean, or any other number: a variance does not see where its centre is."""
        assert explained_variance(constant * MASK, draw(offset=5.0), MASK).item() == pytest.approx(0.0, abs=1e-5)

    def test_half_of_the_deviation_explains_three_quarters(self):
        """Half of it is left, which is a quarter of the variance."""
        assert explained_variance(draw() / 2, draw(), MASK).item() == pytest.approx(0.75, rel=1e-5)

    def test_worse_than_the_mean_is_negative(self):
        assert explained_variance(-draw(), draw(), MASK).item() == pytest.approx(-3.0, rel=1e-5)

    def test_padding_does_not_count(self):
        values = draw() / 2 + 1e3 * ~MASK
        assert explained_variance(values, draw(), MASK).item() == pytest.approx(0.75, rel=1e-5)

    def test_of_equal_returns_is_finite(self):
        """As where all scores are equal and lam is 1; there is nothing to divide by."""
        returns = MASK.float()
        assert explained_variance(returns, returns, MASK).item() == 1.0
        assert explained_variance(draw(), returns, MASK).isfinite()
