"""The reward model that learns as people click: a Bayesian Bradley-Terry head over frozen features. numpy alone.

A reply's reward is a linear function of its features, and the log-odds that one of two replies is better are the
difference of their rewards (Bradley and Terry 1952), with ties as Davidson 1970 has them. The weights have a normal
prior, and Laplace's approximation gives their posterior, which is somewhat too unsure where all labels about something
agree (Nickisch and Rasmussen 2008, "Approximations for Binary Gaussian Process Classification"). All is worked out in
the space of labels, see `laplace`: with 4,000 features and 1,000 labels a click takes a fraction of a second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_pipeline.arena import asking, laplace
from rlhf_pipeline.arena.laplace import Floats, Triangle
from rlhf_pipeline.shares import interval

Integers = NDArray[np.intp]

# The standard deviation of a reply's reward before anything is known, in log-odds: the one under which the first labels
# are most probable, of these. The second number keeps a few labels from choosing an extreme one: its logarithm is
# normal around that of TYPICAL, with a standard deviation of 1.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TYPICAL = 2.0
# It is chosen by the first 256 labels at most: more would hardly choose otherwise, and would take time. From 64 on it
# is chosen again with each sixteenth one.
CHOOSING, EACH, STEP = 256, 64, 16
NINETY = 1.6448536  # of a normal distribution, 90 % lies within so many standard deviations
UNDECIDED = 1e-6  # in log-odds: replies that differ by less are equal but for rounding
BINS = 5  # of calibration, between one half and 1


class Bin(NamedTuple):
    """The labels of which the learner was about equally sure.

    Attributes:
        start: the least probability that it gave to the reply that it found better.
        end: the greatest.
        labels: how many.
        said: the mean of these probabilities.
        true: how often people chose that reply.
    """

    start: float
    end: float
    labels: int
    said: float
    true: float


class Accuracy(NamedTuple):
    """How often the learner chooses as people do, on labels that it did not learn from.

    Attributes:
        accuracy: the share; where it finds both replies equal, it counts half.
        low: of the 95 % interval; see `shares.interval`.
        high: of the same.
        tested: how many labels: those about pairs that were asked at random, without ties.
        bins: how sure it was, and how often right; without empty ones.
        calibration_error: the expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks"):
            the mean over the labels of how far `said` and `true` of their bin differ.
    """

    accuracy: float
    low: float
    high: float
    tested: int
    bins: list[Bin]
    calibration_error: float


class Learner:
    """Learns the rewards of replies from choices between two of them.

    The same labels give the same beliefs, whether they come one by one or together; only rounding may differ.

    Args:
        features: float32 `[replies, d]`. They are scaled so that each of them varies as much as any other: a few of a
            language model's hidden states are a hundred times as large as the rest, and would be all that counts.
        items: `[replies]`: a number for the prompt of each reply. Then what counts is how much a feature varies between
            replies to one prompt, as nothing else is ever compared; and accuracy is measured with all labels of an item
            left out. Without it, with those of the same pair.
        prior_scale: the standard deviation of a reply's reward, apart from what all replies to its prompt share, before
            anything is known, in log-odds; by default the labels choose it, see `SCALES`.
    """

    def __init__(
        self, features: ArrayLike, *, items: ArrayLike | None = None, prior_scale: float | None = None
    ) -> None:
        self._items = None if items is None else np.unique(np.asarray(items), return_inverse=True)[1]
        self._features = _scaled(np.asarray(features, dtype=np.float32), self._items)
        self._fixed_scale = prior_scale
        self.scale, self.tie = prior_scale or TYPICAL, 0.0
        # Each pair that was labelled once has a row: its products with all replies, and with all such pairs.
        self._rows: dict[tuple[int, int], int] = {}
        self._with_replies = np.empty((0, len(self._features)), np.float32)
        self._with_pairs = np.empty((0, 0))
        self._distances: tuple[Integers, Floats] = np.empty(0, np.intp), np.empty(0)
        self._first = self._second = np.empty(0, np.intp)
        self._outcome, self._honest = np.empty(0), np.empty(0, bool)
        self._mode = laplace.find_mode(np.empty((0, 0)), self._outcome, np.empty(0))
        self._factor = self._mode.factor

    def fit(self, first: ArrayLike, second: ArrayLike, outcome: ArrayLike, honest: ArrayLike) -> None:
        """Learn from all labels there are; quickly where most of them were there the last time.

        Args:
            first: `[n]`: the number of a reply.
            second: `[n]`: that of the reply it was compared with.
            outcome: `[n]`: 1 where the first is better, 0 where the second is, 0.5 for a tie.
            honest: `[n]`: whether the pair was asked at random: those are what accuracy is measured on.
        """
        before = np.stack([self._first, self._second, self._outcome])
        self._first, self._second = np.asarray(first, np.intp), np.asarray(second, np.intp)
        self._outcome, self._honest = np.asarray(outcome, np.float64), np.asarray(honest, bool)
        labels = np.stack([self._first, self._second, self._outcome])
        same = min(before.shape[1], labels.shape[1])
        differ = np.flatnonzero((before[:, :same] != labels[:, :same]).any(0))
        kept = int(differ[0]) if len(differ) else same  # the first labels, which are those of the last time
        gram, choosing = self._gram(), _choosing(labels.shape[1])
        if not kept >= choosing == _choosing(before.shape[1]):
            scales = SCALES if self._fixed_scale is None else (self._fixed_scale,)
            self.scale, self.tie = _likely(gram[:choosing, :choosing], self._outcome[:choosing], scales)
        if not self.tie and (self._outcome == 0.5).any():  # the first one came after those
            self.tie = laplace.likely_tie(np.zeros(labels.shape[1]), self._outcome)
        start = np.append(self._mode.dual[:kept], np.zeros(labels.shape[1] - kept))
        self._mode = laplace.find_mode(self.scale**2 * gram, self._outcome, start, self.tie)
        self._factor = Triangle(self._mode.factor.lower.astype(np.float32))  # for many pairs, in half the time

    def belief(self, first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """What it believes of pairs.

        Args:
            first: `[m]`: numbers of replies.
            second: `[m]`: of those they are compared with.

        Returns:
            Three `[m]`: the probability that people choose the first one if they choose one, by MacKay's approximation
            (1992, "The Evidence Framework Applied to Classification Networks", equation 12); and the 90 % interval of
            that probability, were the weights known.
        """
        mean, variance = self._log_odds(np.asarray(first, np.intp), np.asarray(second, np.intp))
        within = NINETY * np.sqrt(variance)
        return _predictive(mean, variance), laplace.sigmoid(mean - within), laplace.sigmoid(mean + within)

    def rewards(self, replies: ArrayLike | None = None) -> tuple[Floats, Floats]:
        """The mean and the standard deviation of rewards, in log-odds.

        Args:
            replies: `[m]`: of which; by default of all, which takes time where there are thousands.

        Returns:
            Two `[m]`.
        """
        chosen = np.arange(len(self._features)) if replies is None else np.asarray(replies, np.intp)
        products = self._with_replies[: len(self._rows)].take(chosen, 1)
        norms = np.einsum("rd,rd->r", self._features[chosen], self._features[chosen])
        mean, variance = self._posterior(products, norms.astype(np.float64))
        return mean, np.sqrt(variance)

    def means(self) -> Floats:
        """The means of all rewards, `[replies]`, in log-odds; `rewards` says more, and takes longer."""
        dual = self._signs() * self._mode.dual
        return self.scale**2 * (dual @ self._with_replies[self._pair_rows()])

    def informative(self, first: ArrayLike, second: ArrayLike) -> Floats:
        """How much is to be learned from people's answer about pairs, `[m]`, in nats; see `asking.information`."""
        mean, variance = self._log_odds(np.asarray(first, np.intp), np.asarray(second, np.intp))
        return asking.information(mean, variance, self.tie)

    def accuracy(self) -> Accuracy | None:
        """Its accuracy and calibration on labels of pairs that were asked at random, each predicted from the others.

        From the others without those of the same item, or pair. No fit is repeated: what each group of labels has added
        to the mode is taken back by one step of Newton's, the approximate leave-one-out of Rad and Maleki 2020 ("A
        scalable estimate of the out-of-sample prediction error via approximate leave-one-out cross-validation"), which
        holds for many more features than labels, too.

        Returns:
            None where there is no such label.
        """
        tested = np.flatnonzero(self._honest & (self._outcome != 0.5))
        if not len(tested):
            return None
        mean, variance = self._left_out(tested)
        better = mean > 0
        right = np.where(np.abs(mean) < UNDECIDED, 0.5, better == (self._outcome[tested] > 0.5))
        sure = np.maximum(_predictive(mean, variance), _predictive(-mean, variance))
        edges = np.linspace(0.5, 1.0, BINS + 1)
        place = np.minimum((np.maximum(sure - 0.5, 0.0) * 2 * BINS).astype(int), BINS - 1)
        bins = [
            Bin(
                float(edges[i]),
                float(edges[i + 1]),
                int(inside.sum()),
                float(sure[inside].mean()),
                float(right[inside].mean()),
            )
            for i in range(BINS)
            if (inside := place == i).any()
        ]
        error = sum(one.labels * abs(one.said - one.true) for one in bins) / len(tested)
        low, high = interval(float(right.sum()), len(tested))
        return Accuracy(float(right.mean()), low, high, len(tested), bins, error)

    def _left_out(self, tested: Integers) -> tuple[Floats, Floats]:
        """The mean and variance of labels' log-odds without the labels of their own group.

        Laplace's posterior is that of a regression on n noisy numbers, whose leave-one-out is known (Rasmussen and
        Williams, equations 5.12): of a group S the mean is f - D (C⁻¹ - I) D g and the covariance D (C⁻¹ - I) D, with
        D the inverse root of S, g its slope, and C the block of B⁻¹.
        """
        mode = self._mode
        low, high = np.minimum(self._first, self._second), np.maximum(self._first, self._second)
        group = low * len(self._features) + high if self._items is None else self._items[self._first]
        members = np.flatnonzero(np.isin(group, group[tested]))
        members = members[np.argsort(group[members], kind="stable")]
        units = np.zeros((len(group), len(members)), np.float32)
        units[members, np.arange(len(members))] = 1.0
        solved = self._factor.solve(units).astype(np.float64)
        without, spread = np.empty(len(group)), np.empty(len(group))
        starts = np.flatnonzero(np.diff(group[members], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(members)], strict=True):
            own, columns = members[start:end], solved[:, start:end]
            inverse = 1.0 / mode.root[own]
            apart = inverse[:, None] * (np.linalg.inv(columns.T @ columns) - np.eye(end - start)) * inverse
            without[own] = mode.log_odds[own] - apart @ mode.slope[own]
            spread[own] = np.diag(apart)
        return without[tested], np.maximum(spread[tested], 0.0)

    def _log_odds(self, first: Integers, second: Integers) -> tuple[Floats, Floats]:
        """The mean and variance of the log-odds of pairs."""
        known = self._with_replies[: len(self._rows)]
        return self._posterior(known.take(first, 1) - known.take(second, 1), self._squared_distances(first, second))

    def _posterior(self, products: NDArray[np.float32], norms: Floats) -> tuple[Floats, Floats]:
        """The mean and variance of m linear functions of the weights.

        Args:
            products: `[rows, m]`: of the pairs that were ever labelled with them.
            norms: `[m]`: of them with themselves.
        """
        prior, signs, rows = self.scale**2, self._signs(), self._pair_rows()
        if not np.array_equal(rows, np.arange(len(products))):
            products = products[rows]
        mean = prior * ((signs * self._mode.dual) @ products)
        solved = self._factor.solve((signs * prior * self._mode.root).astype(np.float32)[:, None] * products)
        variance = prior * norms - np.einsum("nm,nm->m", solved, solved)
        return mean, np.maximum(variance, 1e-6 * prior * norms)

    def _gram(self) -> Floats:
        """The products of the labelled pairs, `[n, n]`, without the prior's scale."""
        low, high = np.minimum(self._first, self._second), np.maximum(self._first, self._second)
        pairs = list(zip(low.tolist(), high.tolist(), strict=True))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self._rows))
        if new:
            self._remember(new)
        rows, signs = self._pair_rows(), self._signs()
        return self._with_pairs[np.ix_(rows, rows)] * signs[:, None] * signs

    def _remember(self, pairs: list[tuple[int, int]]) -> None:
        """Make a row for each of some pairs."""
        known, total = len(self._rows), len(self._rows) + len(pairs)
        if total > len(self._with_pairs):
            size = max(2 * len(self._with_pairs), total, 64)
            more = np.empty((size, len(self._features)), np.float32)
            more[:known] = self._with_replies[:known]
            square = np.empty((size, size))
            square[:known, :known] = self._with_pairs[:known, :known]
            self._with_replies, self._with_pairs = more, square
        low, high = np.array(pairs).T
        self._with_replies[known:total] = (self._features[low] - self._features[high]) @ self._features.T
        # A new dict: copies of this learner keep theirs.
        self._rows = self._rows | {pair: known + place for place, pair in enumerate(pairs)}
        every = np.array(list(self._rows))
        found = self._with_replies[known:total]
        self._with_pairs[known:total, :total] = found[:, every[:, 0]] - found[:, every[:, 1]]
        self._with_pairs[:total, known:total] = self._with_pairs[known:total, :total].T

    def _pair_rows(self) -> Integers:
        """The row of each label's pair."""
        low, high = np.minimum(self._first, self._second), np.maximum(self._first, self._second)
        return np.array([self._rows[pair] for pair in zip(low.tolist(), high.tolist(), strict=True)], np.intp)

    def _signs(self) -> Floats:
        """Of each label, whether its pair's row is the right way round, 1 or -1."""
        return np.where(self._first < self._second, 1.0, -1.0)

    def _squared_distances(self, first: Integers, second: Integers) -> Floats:
        """Of the features of two replies; those of pairs that were asked for before are remembered."""
        wanted = np.minimum(first, second) * len(self._features) + np.maximum(first, second)
        keys, known = self._distances
        new = np.setdiff1d(wanted, keys)
        if len(new):
            low, high = np.divmod(new, len(self._features))
            apart = self._features[low] - self._features[high]
            keys, known = np.append(keys, new), np.append(known, np.einsum("md,md->m", apart, apart))
            order = np.argsort(keys)
            self._distances = keys, known = keys[order], known[order]
        return known[np.searchsorted(keys, wanted)]


def _scaled(features: NDArray[np.float32], items: Integers | None) -> NDArray[np.float32]:
    """Features of which each has the variance 1/d, so that a reward's prior variance is that of the weights.

    With items, it is that between the replies to one prompt, and what these share is taken away.
    """
    features = features - features.mean(0)
    if items is not None:
        totals = np.zeros((items.max(initial=-1) + 1, features.shape[1]), np.float32)
        np.add.at(totals, items, features)
        features -= totals[items] / np.bincount(items)[items, None].astype(np.float32)
    deviation = features.std(0)
    varies = deviation > 1e-6 * deviation.max(initial=0.0)
    return features[:, varies] / (deviation[varies] * np.float32(np.sqrt(max(varies.sum(), 1))))


def _choosing(labels: int) -> int:
    """How many of so many labels choose the prior."""
    return labels if labels <= EACH else min(labels // STEP * STEP, CHOOSING)


def _likely(gram: Floats, outcome: Floats, scales: Sequence[float]) -> tuple[float, float]:
    """The prior scale, and the likelihood of ties, under which labels are most probable; see `SCALES`."""
    best, chosen, start = -np.inf, (TYPICAL if len(scales) > 1 else scales[0], 0.0), np.zeros(len(outcome))
    tie = laplace.likely_tie(start, outcome)
    for scale in scales:
        for _ in range(2 if tie else 1):
            mode = laplace.find_mode(scale**2 * gram, outcome, start, tie)
            start, used = mode.dual, tie
            tie = laplace.likely_tie(mode.log_odds, outcome)
        found = mode.evidence - 0.5 * np.log(scale / TYPICAL) ** 2
        if found > best:
            best, chosen = found, (scale, used)
    return chosen


def _predictive(mean: Floats, variance: Floats) -> Floats:
    """The mean of sigmoid(f) over a normal f, by MacKay's approximation."""
    return laplace.sigmoid(mean / np.sqrt(1.0 + np.pi / 8 * variance))
