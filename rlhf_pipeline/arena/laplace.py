"""Bayesian logistic regression as a Gaussian process: Laplace's approximation in the space of observations.

Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", chapter 3: algorithms 3.1 and 3.2. All work is
on matrices of n x n, n the number of observations, however many weights there are. numpy alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK = 64  # rows of a triangular system that are solved together
CLOSE = 1e-4  # in log-odds: Newton's steps end with one that is no longer; its error is about the square of that
MOST_STEPS = 50
LEAST_CURVATURE = 1e-12  # of a saturated observation, which is divided by


class Mode(NamedTuple):
    """Laplace's approximation to the posterior of n log-odds f: a normal distribution around its mode.

    Attributes:
        dual: `[n]`: the mode is gram @ dual, and the weights' mode is the sum of dual times the observations.
        log_odds: `[n]`: the mode.
        slope: `[n]`: the derivative of each observation's log-likelihood there.
        root: `[n]`: the square root of its curvature.
        factor: the lower Cholesky factor of B = I + root gram root, `[n, n]`.
        evidence: the approximation to the log marginal likelihood (equation 3.32).
    """

    dual: Floats
    log_odds: Floats
    slope: Floats
    root: Floats
    factor: "Triangle"
    evidence: float


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def answers(log_odds: Floats, tie: float) -> tuple[Floats, Floats, Floats]:
    """The probabilities of the first, the second and a tie (Davidson 1970, "On extending the Bradley-Terry model to
    accommodate ties"): they are as exp(f/2), exp(-f/2) and `tie`, which is 0 where there are none.
    """
    small = np.exp(-0.5 * np.abs(log_odds))
    total = 1.0 + small * small + tie * small
    larger, smaller = 1.0 / total, small * small / total
    first = log_odds > 0
    return np.where(first, larger, smaller), np.where(first, smaller, larger), tie * small / total


def log_likelihood(log_odds: Floats, outcome: Floats, tie: float) -> float:
    """Of answers: the sum of the logarithms of their probabilities."""
    small = np.exp(-0.5 * np.abs(log_odds))
    found = (outcome - 0.5) * log_odds - 0.5 * np.abs(log_odds) - np.log1p(small * small + tie * small)
    return float(np.sum(found)) + (float(np.sum(outcome == 0.5)) * float(np.log(tie)) if tie else 0.0)


def likely_tie(log_odds: Floats, outcome: Floats) -> float:
    """The `tie` under which as many ties are expected as there are, which is the most probable one; at most 100."""
    ties, tie = float(np.sum(outcome == 0.5)), 1.0
    if not ties:
        return 0.0
    for _ in range(MOST_STEPS):
        tie = min(tie * ties / float(np.sum(answers(log_odds, tie)[2])), 100.0)
    return tie


def find_mode(gram: Floats, outcome: Floats, start: Floats, tie: float = 0.0) -> Mode:
    """Find the mode of the posterior by Newton's method, and the normal distribution around it.

    Steps that would lower the posterior are halved, so that it is found from any start.

    Args:
        gram: `[n, n]`: the prior covariance of the log-odds.
        outcome: `[n]`: 1, 0, or 0.5 for a tie.
        start: `[n]`: a `dual` to begin from: zeros, or that of fewer observations with zeros behind.
        tie: how likely ties are, see `answers`; above 0 where there are any.
    """
    identity = np.eye(len(outcome))
    dual, log_odds = start, gram @ start
    posterior = log_likelihood(log_odds, outcome, tie) - 0.5 * float(dual @ log_odds)
    for _ in range(MOST_STEPS):
        first, second, _ = answers(log_odds, tie)
        slope = outcome - 0.5 - 0.5 * (first - second)
        curvature = 0.25 * (first + second - (first - second) ** 2) + LEAST_CURVATURE
        root = np.sqrt(curvature)
        factor = Triangle(np.linalg.cholesky(identity + root[:, None] * gram * root))
        target = curvature * log_odds + slope
        wanted = target - root * factor.solve_transposed(factor.solve(root * (gram @ target)))
        step, length = wanted - dual, 1.0
        moved = gram @ step
        for _ in range(MOST_STEPS):
            better, there = dual + length * step, log_odds + length * moved
            found = log_likelihood(there, outcome, tie) - 0.5 * float(better @ there)
            if found >= posterior - 1e-9:
                break
            length *= 0.5
        dual, log_odds, posterior = better, there, found
        if np.max(np.abs(length * moved), initial=0.0) <= CLOSE:
            break
    evidence = posterior - float(np.sum(np.log(np.diag(factor.lower))))
    first, second, _ = answers(log_odds, tie)
    return Mode(dual, log_odds, outcome - 0.5 - 0.5 * (first - second), root, factor, evidence)


class Triangle:
    """A lower triangular L `[n, n]`, to solve systems with, a block of rows at a time.

    numpy has no routine for that, and its general one takes n³ operations. Blocks on the diagonal are inverted once.

    Attributes:
        lower: L itself.
    """

    def __init__(self, lower: NDArray) -> None:
        self.lower = lower
        self._starts = range(0, len(lower), BLOCK)
        full = len(lower) // BLOCK
        blocks = np.array([lower[start : start + BLOCK, start : start + BLOCK] for start in self._starts[:full]])
        self._inverses = list(np.linalg.inv(blocks)) if full else []
        if len(lower) % BLOCK:
            self._inverses.append(np.linalg.inv(lower[full * BLOCK :, full * BLOCK :]))

    def solve(self, right: NDArray) -> NDArray:
        """The x of L x = b, for b `[n]` or `[n, m]`."""
        solved = right.copy()
        for start, inverse in zip(self._starts, self._inverses, strict=True):
            end = start + len(inverse)
            if start:
                solved[start:end] -= self.lower[start:end, :start] @ solved[:start]
            solved[start:end] = inverse @ solved[start:end]
        return solved

    def solve_transposed(self, right: NDArray) -> NDArray:
        """The x of Lᵀ x = b."""
        solved = right.copy()
        for start, inverse in zip(self._starts[::-1], self._inverses[::-1], strict=True):
            end = start + len(inverse)
            if end < len(solved):
                solved[start:end] -= self.lower[end:, start:end].T @ solved[end:]
            solved[start:end] = inverse.T @ solved[start:end]
        return solved
