"""What a judge favours apart from quality: positions, length, its own replies; and how far it agrees with people."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_pipeline.judges.verdicts import Verdict
from rlhf_pipeline.shares import interval

CHI_SQUARE = 3.841459  # below this, 95 % of the chi-square distribution of one degree of freedom lie
LENGTH_UNIT = 100  # characters: the coefficient is for so many more
FURTHEST = 1e6  # of coefficients that are looked at


class Judged(NamedTuple):
    """A pair that a judge was asked about.

    Attributes:
        replies: reply 0 and reply 1, as text.
        verdict: what it said.
        own: the number of the reply that the judge's own stage sampled; None where it sampled neither, or both.
    """

    replies: tuple[str, str]
    verdict: Verdict
    own: int | None = None


def figures(judged: Sequence[Judged], human: Sequence[Judged] = ()) -> dict[str, float]:
    """The numbers by which a judge is judged, with 95 % intervals as `_low` and `_high`.

    Args:
        judged: the pairs.
        human: pairs that people have judged, who found reply 0 the better one.

    Returns:
        Those that can be worked out of:
        `judge/pairs`, how many pairs it was asked about; `judge/ties`, the share of the pairs with a verdict on which
        the two orders disagree; `judge/unread`, the share of answers that could not be read; `judge/first_position`,
        the share of legible answers that favour the reply shown first, 0.5 without a bias, where one of exactly one
        half counts as half; `judge/agreement`, the share of questions whose two orders name the same winner;
        `judge/length_coefficient`, see `length_coefficient`, over pairs that are no ties; `judge/own_replies`, the
        share of those pairs, of which one reply is its own, that this one wins; `judge/human_agreement`, the share of
        people's pairs on which it names the same winner, and `judge/human_kappa`, see `kappa`.
    """
    answers = [answer["probability"] for one in judged for answer in one.verdict.asked]
    read = [p for p in answers if p is not None]
    both = [
        (shown["probability"], swapped["probability"])
        for one in judged
        for shown, swapped in zip(one.verdict.asked[::2], one.verdict.asked[1::2], strict=True)
    ]
    agree = [(p - 0.5) * (q - 0.5) < 0 for p, q in both if p is not None and q is not None]
    with_verdict = [one for one in judged if one.verdict.probability is not None]
    decided = [one for one in judged if one.verdict.winner is not None]
    found: dict[str, float] = {"judge/pairs": len(judged)}
    if with_verdict:
        found["judge/ties"] = sum(one.verdict.is_tie for one in with_verdict) / len(with_verdict)
    if answers:
        found["judge/unread"] = 1 - len(read) / len(answers)
    found |= _share("judge/first_position", [_half_where_even(p) for p in read])
    found |= _share("judge/agreement", agree)
    longer = [(len(first) - len(second)) / LENGTH_UNIT for first, second in (one.replies for one in decided)]
    if any(longer):
        coefficient, low, high = length_coefficient(longer, [one.verdict.winner == 0 for one in decided])
        found["judge/length_coefficient"] = coefficient
        found |= {"judge/length_coefficient_low": low, "judge/length_coefficient_high": high}
    found |= _share("judge/own_replies", [one.verdict.winner == one.own for one in decided if one.own is not None])
    legible = [one.verdict for one in human if one.verdict.probability is not None]
    if legible:
        agreed, ties = sum(verdict.winner == 0 for verdict in legible), sum(verdict.is_tie for verdict in legible)
        found |= _share("judge/human_agreement", [verdict.winner == 0 for verdict in legible])
        value, low, high = kappa(agreed, ties, len(legible))
        found |= {"judge/human_kappa": value, "judge/human_kappa_low": low, "judge/human_kappa_high": high}
    return found


def _half_where_even(probability: float) -> float:
    return 0.5 if probability == 0.5 else float(probability > 0.5)


def _share(name: str, cases: Sequence[float]) -> dict[str, float]:
    """A share with its interval, nothing of no cases."""
    if not cases:
        return {}
    low, high = interval(sum(cases), len(cases))
    return {name: sum(cases) / len(cases), f"{name}_low": low, f"{name}_high": high}


def kappa(agreed: int, ties: int, count: int) -> tuple[float, float, float]:
    """Cohen's kappa of a judge and of people who compared the same pairs, with its 95 % interval.

    Cohen 1960, "A coefficient of agreement for nominal scales": κ = (p - e) / (1 - e), where p is the share of
    agreement and e the one that chance gives. The categories are the first reply, the second, and, of the judge, a tie.
    Which of two replies is the first one means nothing, so each pair is counted in both orders: people then choose
    each with a half, the judge with (1 - ties)/2, and e = (1 - ties)/2. Without ties, κ = 2p - 1. The interval is that
    of p, see `shares.interval`, at the given share of ties.

    Args:
        agreed: on how many pairs both name the same winner.
        ties: on how many the judge names none.
        count: of how many, at least 1.

    Returns:
        κ and the ends of the interval: 1 is full agreement, 0 what chance gives.
    """
    by_chance = (1 - ties / count) / 2
    low, high = interval(agreed, count)
    value, low, high = ((share - by_chance) / (1 - by_chance) for share in (agreed / count, low, high))
    return value, low, high


def length_coefficient(longer: Sequence[float], wins: Sequence[bool]) -> tuple[float, float, float]:
    """How much longer replies win: a logistic regression of winning on the difference in length.

    ln(p / (1 - p)) = b * difference, where p is the probability that the first reply of a pair wins. There is no
    constant, since which reply is the first one means nothing. b maximises the likelihood times √information, which
    Firth 1993, "Bias reduction of maximum likelihood estimates", proposes; it is finite even where the longer reply
    always wins. The interval holds all b whose penalised likelihood is not significantly lower (Heinze and Schemper
    2002, "A solution to the problem of separation in logistic regression").

    Args:
        longer: by how much the first reply of each pair is longer; not all 0.
        wins: whether it wins.

    Returns:
        b, in log-odds for a difference of 1, and the ends of its 95 % interval.
    """
    x, y = np.asarray(longer, float), np.asarray(wins, float)
    x, y = x[x != 0], y[x != 0]

    def penalised(b: float) -> float:
        """The logarithm of the likelihood times √information."""
        z = b * x
        log_likelihood = (y * z - np.logaddexp(0, z)).sum()
        log_weights = -np.logaddexp(0, z) - np.logaddexp(0, -z) + 2 * np.log(np.abs(x))
        most = log_weights.max()
        return float(log_likelihood + (most + np.log(np.exp(log_weights - most).sum())) / 2)

    unit = 1 / np.abs(x).max()
    best = _highest(penalised, unit)
    enough = penalised(best) - CHI_SQUARE / 2
    return best, _where_below(penalised, enough, best, -unit), _where_below(penalised, enough, best, unit)


def _highest(f: Callable[[float], float], step: float) -> float:
    """Where a function of one peak is highest, by golden section; `step` is a small distance on its scale."""
    reach = step
    while reach < FURTHEST * step and max(f(-reach), f(reach)) > max(f(-reach / 2), f(reach / 2)):
        reach *= 2
    low, high, ratio = -reach, reach, (math.sqrt(5) - 1) / 2
    while high - low > 1e-9 * reach:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if f(left) >= f(right) else (left, high)
    return (low + high) / 2


def _where_below(f: Callable[[float], float], value: float, inside: float, step: float) -> float:
    """Where a function that falls in the direction of `step` reaches a value, by halving."""
    outside = inside + step
    while f(outside) > value and abs(outside) < FURTHEST * abs(step):
        outside += outside - inside
    while abs(outside - inside) > 1e-9 * max(abs(step), abs(outside)):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if f(middle) > value else (inside, middle)
    return (inside + outside) / 2
