"""How sure a share is: what so many cases say of all that there could be. No torch."""

import math

Z = 1.959964  # of a normal distribution, 95 % lies within so many standard deviations


def interval(successes: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share: Wilson's score interval with continuity correction.

    Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 4. Without the correction it
    covers the true share in 0.92 of the cases instead of 0.95 at 16 cases, and in less near 0 and 1.

    Args:
        successes: how many cases; one that is a tie may count as half. Ties make the interval wider than it need be.
        count: of how many, at least 1.

    Returns:
        The lower and the upper end, from 0 to 1.
    """
    share = successes / count
    within = 2 * (count + Z * Z)
    low = high = Z * Z - 1 / count
    low += -2 + 4 * share * (count * (1 - share) + 1)
    high += 2 + 4 * share * (count * (1 - share) - 1)
    middle = 2 * successes + Z * Z
    return (
        max(0.0, (middle - 1 - Z * math.sqrt(max(low, 0.0))) / within) if successes > 0 else 0.0,
        min(1.0, (middle + 1 + Z * math.sqrt(max(high, 0.0))) / within) if successes < count else 1.0,
    )


def standard_error(successes: float, count: int) -> float:
    """The standard error of a share, √(p (1 - p) / n).

    Where all cases are successes, or none is, that would be 0, as if nothing else could come. It is then the one of
    Agresti and Coull 1998, "Approximate is better than exact": with two cases of each kind added.

    Args:
        successes: how many cases.
        count: of how many, at least 1.
    """
    if successes in (0, count):
        successes, count = successes + 2, count + 4
    share = successes / count
    return math.sqrt(share * (1 - share) / count)
