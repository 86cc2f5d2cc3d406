"""How far it is worth optimising against a reward: the curve of gold over the distance from the start, and its peak.

Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760), section 3: with
d = √KL, gold gains d (alpha - beta log d) by RL, and d (alpha - beta d) by taking the best of n replies. These are laws
of experience; so it is also said whether the measurements follow them. No torch.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.rundir.words import short
from rlhf_pipeline.shares import Z

Numbers = NDArray[np.float64]
Form = Literal["rl", "best of n"]
LEAST = 3  # measurements away from the start, for a curve of two numbers
NEAR = 0.05  # nats^½: what lies nearer to the start, or differs by a smaller share, is at the same distance
SHORT = 0.1  # of the prompts, how many may have fewer replies than the best is taken of
STEADY = 0.5  # of the usual standard error: the least that is believed of one mean
MISFIT = 0.01  # how often noise alone may be taken for another curve
FIT = 0.85  # the least share of the measurements' variance that a curve explains which they follow but for noise
FAR = 2.0  # times the furthest distance that was measured (four times its KL): what lies beyond is no forecast


class Forecast(NamedTuple):
    """A curve over the distance d = √KL from the start, in nats^½.

    Attributes:
        form: the curve's; see `forecast`.
        start: its value at d = 0.
        alpha, beta: its numbers.
        peak: the d where it is highest: 0 where it only falls, None where it rises as far as was measured, and does not
            bend down.
        low, high: 95 % bootstrap interval of the peak, over prompts; None is "not seen to end".
        gain: what the peak is above the first measurement; None without a peak.
        furthest: the largest d that was measured.
        fit: the share of the measurements' variance that it explains, R².
        misfit: the squared distances of the measurements from it, by those that noise alone gives. Where it is more
            than noise can explain, `low` and `high` are made wider by √misfit.
        describes: whether the measurements follow it: either noise explains the distances, or they are small.
    """

    form: Form
    start: float
    alpha: float
    beta: float
    peak: float | None
    low: float | None
    high: float | None
    gain: float | None
    furthest: float
    fit: float
    misfit: float
    describes: bool

    @property
    def within_reach(self) -> float | None:
        """The peak, where the measurements tell of it: they follow the curve, and are not too far before it."""
        known = self.describes and self.peak is not None and self.peak <= FAR * self.furthest
        return self.peak if known else None

    def at(self, d: Numbers) -> Numbers:
        """The curve's value at each distance, `[…]` as `d`."""
        return _terms(np.asarray(d, dtype=np.float64), self.form) @ np.array([self.start, self.alpha, self.beta])


def forecast(kl: Sequence[float], by_prompt: Numbers, form: Form = "rl", draws: int = 500) -> Forecast | None:
    """Fit start + d (alpha - beta log d), or for the best of n start + d (alpha - beta d), by weighted least squares.

    Every mean over prompts counts by its standard error, once what is common to all measurements of a prompt is taken
    off. The start is fitted, too: it has its noise as the others have. The interval is of `draws` samples of as many
    prompts, with replacement, from fixed random numbers.

    Args:
        kl: of each measurement the mean KL of a reply from the reference, in nats, `[measurements]`. One that is
            estimated below 0 counts as 0; one that is not finite is left out.
        by_prompt: `[measurements, prompts]`, what is to be high, as gold: of the same prompts every time, the first
            measurement of the policy at the start. A prompt that lacks a number (NaN) somewhere is left out.
        form: `rl` or `best of n`.
        draws: of the bootstrap.

    Returns:
        The curve; None where fewer than three measurements are away from the start, or all these are at the same
        distance, or fewer than two prompts are left.
    """
    distance = np.asarray(kl, dtype=np.float64)
    values = np.asarray(by_prompt, dtype=np.float64)[np.isfinite(distance)]
    d = np.sqrt(np.maximum(distance[np.isfinite(distance)], 0.0))
    values = values[:, np.isfinite(values).all(0)]
    away = d[d > NEAR]
    if len(away) < LEAST or away.max() < (1 + NEAR) * away.min() or values.shape[1] < 2:
        return None
    terms, means = _terms(d, form), values.mean(1)
    errors = _errors(values)
    solve = np.linalg.pinv(terms / errors[:, None]) / errors  # [3, measurements], to be multiplied with the means
    leave = (np.eye(len(d)) - terms @ solve) / errors[:, None]  # of the means, the distances from the curve in errors
    fitted = solve @ means

    prompts = values.shape[1]
    times = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    few = math.sqrt(prompts / (prompts - 1)) * (1 + (Z**2 + 1) / (4 * (prompts - 1)))  # nearly Student's t by normal's
    shifts = ((times @ values.T) / prompts - means) * few  # [draws, measurements]: noise
    by_noise = ((shifts @ leave.T) ** 2).sum(1)
    off = float(((leave @ means) ** 2).sum())
    misfit = off / float(by_noise.mean()) if by_noise.mean() > 1e-12 else 0.0
    by_chance = misfit <= 1 or off <= float(np.quantile(by_noise, 1 - MISFIT))
    drawn = fitted + shifts @ solve.T * (1.0 if by_chance else math.sqrt(misfit))
    fit = 1 - float((means - terms @ fitted).var()) / max(float(means.var()), 1e-300)

    furthest = float(d.max())
    peak = float(_peaks(fitted[None], form, furthest)[0])
    low, high = np.quantile(_peaks(drawn, form, furthest), [0.025, 0.975], method="nearest")
    start, alpha, beta = fitted.tolist()
    found = Forecast(
        form, start, alpha, beta, _ending(peak), _ending(low), _ending(high), None, furthest, fit, misfit,
        by_chance or fit >= FIT,
    )  # fmt: skip
    if found.peak is None:
        return found
    value, began = found.at(np.array([found.peak, d[0]])).tolist()
    return found._replace(gain=value - began)


def _terms(d: Numbers, form: Form) -> Numbers:
    """What start, alpha and beta are multiplied with at each distance, `[…, 3]`."""
    bend = -d * np.log(np.where(d > 0, d, 1.0)) if form == "rl" else -(d**2)
    return np.stack([np.ones_like(d), d, bend], -1)


def _errors(values: Numbers) -> Numbers:
    """The standard error of each mean over prompts, `[measurements]`; see `forecast`.

    A mean that all prompts agree on, as one of ones alone, is not exact for that: none has less than half of the usual.
    """
    apart = values - values.mean(0)
    errors = apart.std(1, ddof=1) / math.sqrt(values.shape[1])
    usual = math.sqrt(float((errors**2).mean()))
    return np.maximum(errors, STEADY * usual) if usual > 1e-12 else np.ones(len(values))


def _peaks(fitted: Numbers, form: Form, furthest: float) -> Numbers:
    """Where curves are highest, `[curves]`; infinite where they do not bend down.

    Args:
        fitted: start, alpha and beta of each, `[curves, 3]`.
        form: theirs.
        furthest: the largest distance that was measured.
    """
    _, alpha, beta = fitted.T
    bends = beta > 1e-12
    ratio = alpha / np.where(bends, beta, 1.0)
    peaks = np.exp(np.minimum(ratio - 1, 300.0)) if form == "rl" else np.maximum(ratio / 2, 0.0)
    end = _terms(np.array([furthest]), form)[0, 1:]
    return np.where(bends, peaks, np.where(fitted[:, 1:] @ end > 0, np.inf, 0.0))


def _ending(peak: float) -> float | None:
    return float(peak) if peak < 1e6 else None


def worth(found: Forecast) -> str:
    """What a forecast says of going on, as a sentence or two; KL is the square of its distances."""
    now = f"KL {short(found.furthest**2)}"
    if not found.describes:
        return (
            f"The measurements do not follow the usual curve (it explains {max(0.0, found.fit):.0%} of their variance, "
            "and noise not the rest), so nothing is forecast."
        )
    reach = FAR * found.furthest
    ends = [None if end is None or end > reach else end for end in (found.low, found.high)]
    near, last = ends
    if near is not None and near < NEAR and last is None:
        return f"Up to {now} nats, it neither rises nor falls by more than noise explains: no peak can be forecast."
    if found.peak is None or found.peak > reach:
        least = "" if near is None else f"; it is not before KL {short(near**2)} nats"
        return f"No peak is in sight up to {now} nats, which was the furthest{least}. Going on is worth a try."
    value, at_last = found.at(np.array([found.peak, found.furthest])).tolist()
    if found.peak < NEAR:
        return f"It only falls: at {now} nats it is {short(value - at_last)} below the start. Going on costs."
    sure = (
        f"KL {short(found.peak**2)} nats "
        f"({short((near or 0.0) ** 2)} to {'beyond what can be told' if last is None else short(last**2)})"
    )
    if last is not None and last < found.furthest:
        return (
            f"It is past its peak, which was at {sure}; now {now}, {short(value - at_last)} below it. Going on costs."
        )
    if near is None or near > found.furthest:
        return f"The peak is forecast at {sure}; now {now}: going on is worth up to {short(value - at_last)}."
    if found.peak > found.furthest:
        return (
            f"The peak is forecast at {sure}; now {now}, which may be there already: going on is worth up to "
            f"{short(value - at_last)}."
        )
    return f"The peak is at {sure}; now {now}, which is about there: going on is worth nothing that can be told."


class BestOf(NamedTuple):
    """What the best of n replies is worth.

    Attributes:
        n: of how many replies the one with the highest score is taken.
        kl: how far that is from the policy which they are of, in nats: log n - (n - 1)/n, which is exact where no two
            replies are alike, and else more than it is (Beirami et al. 2024, arXiv 2401.01879).
        by_prompt: `[prompts]`, the value to expect, of the same prompts for every n.
    """

    n: int
    kl: float
    by_prompt: Numbers


def best_of(scores: Numbers, values: Numbers) -> list[BestOf]:
    """The value to expect of the reply with the highest score among n of N replies, for n = 1 to N.

    It is the mean over all choices of n of the replies, exactly: the reply at rank i from below is the best one in
    C(i - 1, n - 1) of C(N, n) choices. Replies with the same score share equally. Where prompts have lost replies, N is
    what nine tenths of them still have, and the others are left out.

    Args:
        scores: `[prompts, N]`, what the best reply is chosen by; NaN where there is no reply.
        values: `[prompts, N]`, what it is worth, as gold. A reply that lacks either is left out.
    """
    known = np.isfinite(scores) & np.isfinite(values)
    counts = known.sum(1)
    most = int(np.quantile(counts[counts > 0], SHORT, method="lower")) if counts.any() else 0
    rows = np.flatnonzero(counts >= max(most, 1))
    found = np.empty((most, len(rows)))
    for place, row in enumerate(rows):
        own, of_own = scores[row][known[row]], values[row][known[row]]
        ranked = np.sort(own)
        below, up_to = (np.searchsorted(ranked, own, side) for side in ("left", "right"))
        lower, higher = np.ones(len(own)), np.ones(len(own))  # the shares of the choices that are all of these ranks
        for n in range(1, most + 1):
            lower, higher = (
                share * np.maximum(rank - n + 1, 0) / (len(own) - n + 1)
                for share, rank in ((lower, below), (higher, up_to))
            )
            found[n - 1, place] = ((higher - lower) / (up_to - below)) @ of_own
    return [BestOf(n, math.log(n) - (n - 1) / n, found[n - 1]) for n in range(1, most + 1)]


def of_best(found: Sequence[BestOf]) -> Forecast | None:
    """The curve of the best of n, see `forecast`; None of fewer than four."""
    return (
        forecast([one.kl for one in found], np.array([one.by_prompt for one in found]), "best of n") if found else None
    )


class Order(NamedTuple):
    """How well scores put replies in order.

    Attributes:
        share: of the pairs of replies to one prompt with different values, those in which the better one has the higher
            score, equal scores counting half: the mean over prompts. A guess is 0.5.
        se: its standard error, over prompts.
        prompts: how many have such a pair.
    """

    share: float
    se: float
    prompts: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share."""
        return max(0.0, self.share - Z * self.se), min(1.0, self.share + Z * self.se)

    @property
    def is_a_guess(self) -> bool:
        """Whether the scores may be no better than a guess."""
        return self.interval[0] <= 0.5


def order(scores: Numbers, values: Numbers) -> Order | None:
    """How well scores order the replies to a prompt by their values.

    Args:
        scores: `[prompts, N]`; NaN where there is no reply.
        values: `[prompts, N]`, as gold.

    Returns:
        See `Order`; None where fewer than two prompts have replies of different values.
    """
    shares = []
    for own, of_own in zip(scores, values, strict=True):
        known = np.isfinite(own) & np.isfinite(of_own)
        margins, better = (one[known][:, None] - one[known] for one in (own, of_own))
        if (better > 0).any():
            shares.append(float((np.sign(margins[better > 0]).mean() + 1) / 2))
    if len(shares) < 2:
        return None
    return Order(float(np.mean(shares)), float(np.std(shares, ddof=1)) / math.sqrt(len(shares)), len(shares))


def worth_of_best(in_order: Order, best: Sequence[BestOf]) -> str:
    """What the best of n says of training against the scores that it was chosen by.

    Args:
        in_order: how well the scores order replies by gold.
        best: see `best_of`, at least one.
    """
    low, high = in_order.interval
    said = (
        f"Of two replies to a prompt, the one that gold finds better has the higher score in {in_order.share:.0%} of "
        f"the cases ({low:.0%} to {high:.0%}; a guess is 50%)"
    )
    if in_order.is_a_guess:
        return f"{said}: the scores do not order the replies as gold does. PPO will hardly be better than this."
    one, last = float(best[0].by_prompt.mean()), float(best[-1].by_prompt.mean())
    moved = f"{said}. The best of {best[-1].n} has {short(last)} of gold, one reply {short(one)}."
    curve = of_best(best)
    return moved if curve is None else f"{moved} {worth(curve)}"
