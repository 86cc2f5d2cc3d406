"""What PPO remembers from update to update: the KL coefficient, and what scores look like."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_pipeline.ppo.control import KLControl, ScoreStatistics

SCORES = np.random.default_rng(0).normal(3.0, 2.0, 30).astype(np.float32)


class TestKLControl:
    @pytest.mark.parametrize("kl", [6.5, 7.0, 12.0, 1e6])
    def test_more_kl_than_wanted_costs_more(self, kl):
        control = KLControl(0.05, 6.0, 1000)
        control.update(kl, 100)
        assert 0.05 < control.coefficient <= 0.05 * (1 + 0.2 * 100 / 1000)

    @pytest.mark.parametrize("kl", [5.5, 5.0, 0.0, -3.0])
    def test_less_kl_than_wanted_costs_less(self, kl):
        control = KLControl(0.05, 6.0, 1000)
        control.update(kl, 100)
        assert 0.05 * (1 - 0.2 * 100 / 1000) <= control.coefficient < 0.05

    @pytest.mark.parametrize(("kl", "share"), [(6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (6.0, 0.0)])
    def test_it_moves_by_the_error_and_by_a_fifth_at_most(self, kl, share):
        """10 % off is answered by 10 %, ten times off by 20 %, spread over the horizon."""
        control = KLControl(0.05, 6.0, 1000)
        control.update(kl, 250)
        assert control.coefficient == pytest.approx(0.05 * (1 + share * 0.25))

    def test_it_settles_where_kl_meets_the_target(self):
        """With a KL that falls as it costs more, KL is steered from four times the target to it."""
        control = KLControl(0.05, 2.0, 1000)
        for _ in range(200):
            control.update(0.4 / control.coefficient, 100)
        assert control.coefficient == pytest.approx(0.2, rel=0.01)

    def test_without_a_target_it_is_fixed(self):
        control = KLControl(0.05, None, 1000)
        for kl in (0.0, 1e6, math.nan):
            control.update(kl, 100)
        assert control.coefficient == 0.05

    @pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
    def test_a_kl_that_is_not_finite_says_nothing(self, kl):
        """One such batch would otherwise make every later reward NaN, or push the coefficient for no reason."""
        control = KLControl(0.05, 6.0, 1000)
        control.update(kl, 100)
        assert control.coefficient == 0.05


class TestScoreStatistics:
    @pytest.mark.parametrize("sizes", [[30], [1] * 30, [29, 1], [1, 29], [7, 0, 13, 10]])
    def test_any_split_gives_mean_and_deviation_of_all(self, sizes):
        """After each batch, scores are normalised by everything seen up to then."""
        statistics, seen = ScoreStatistics(), 0
        for size in sizes:
            batch = SCORES[seen : seen + size]
            statistics.update(torch.from_numpy(batch))
            seen += size
            known = SCORES[:seen].astype(np.float64)
            assert statistics.count == seen
            assert statistics.mean == pytest.approx(known.mean())
            if seen > 1:
                expected = (torch.from_numpy(batch) - known.mean()) / known.std(ddof=1)
                assert_close(statistics.normalize(torch.from_numpy(batch)), expected.float(), rtol=1e-5, atol=1e-5)

    def test_a_large_offset_does_not_drown_the_deviation(self):
        """Sums of squares would: in float32 nothing were left of them."""
        statistics = ScoreStatistics()
        for batch in np.split(SCORES + 1e4, 5):
            statistics.update(torch.from_numpy(batch))
        known = (SCORES + 1e4).astype(np.float64)
        assert math.sqrt(statistics.squares / 29) == pytest.approx(known.std(ddof=1), rel=1e-6)

    def test_scores_that_are_not_finite_are_left_out(self):
        """A broken reward of one reply must not spoil all later ones."""
        statistics, clean = ScoreStatistics(), ScoreStatistics()
        statistics.update(torch.tensor([1.0, math.nan, 2.0, math.inf]))
        statistics.update(torch.tensor([-math.inf, math.nan]))
        statistics.update(torch.tensor([6.0]))
        clean.update(torch.tensor([1.0, 2.0, 6.0]))
        assert statistics.count == 3
        assert (statistics.mean, statistics.squares) == pytest.approx((clean.mean, clean.squares))

    @pytest.mark.parametrize("scores", [[2.5], [0.1] * 7])
    def test_equal_scores_are_left_alone(self, scores):
        """There is no deviation to divide by."""
        statistics = ScoreStatistics()
        statistics.update(torch.tensor(scores))
        assert_close(statistics.normalize(torch.tensor(scores)), torch.tensor(scores), rtol=0, atol=0)

    def test_before_any_score_scores_are_left_alone(self):
        assert ScoreStatistics().normalize(torch.tensor([1.0, -4.0])).tolist() == [1.0, -4.0]

    def test_normalised_scores_keep_their_dtype(self):
        statistics = ScoreStatistics()
        statistics.update(torch.from_numpy(SCORES))
        assert statistics.normalize(torch.from_numpy(SCORES)).dtype == torch.float32
