"""Whether a mean that was measured again and again has fallen, or moved by chance alone. No torch."""

import numpy as np

from rlhf_pipeline.report.gather import Numbers

CHANCE = 0.045  # how often noise alone may count as a fall: below 0.05 also where the noise is not quite normal
DRAWS = 10_000  # series of pure noise that a series is held against


def fell_since(means: Numbers, error: float | None) -> int | None:
    """The measurement since which a mean falls, to the last one; None where chance may explain it.

    For each measurement a straight line is drawn from there to the last one. Of those that fall, the steepest by its
    own noise counts. The same is done with series of pure noise: only a line that is steeper than those of 95.5 %
    of them is a fall. So it does not matter how many measurements there are to choose the best one from.

    Args:
        means: the measurements, `[n]`, at even distances.
        error: the standard error of one measurement; None takes it from how they differ from their neighbours.
    """
    if len(means) < (2 if error is not None else 4):
        return None
    noise = np.random.default_rng(0).standard_normal((DRAWS, len(means)))
    unit = np.full(DRAWS, 1.0)
    if error is None:
        error, unit = float(_from_neighbours(means)), _from_neighbours(noise)
    lines = _lines(len(means))
    falls = lines @ means
    of_noise = (noise @ lines.T).max(1) / unit
    start = int(falls.argmax())
    return start if falls[start] > error * float(np.quantile(of_noise, 1 - CHANCE)) else None


def drop(means: Numbers) -> float:
    """How far the straight line through all measurements falls, from the first to the last; negative if it rises."""
    places = np.arange(len(means)) - (len(means) - 1) / 2
    return float(-(places @ means) / (places @ places) * (len(means) - 1))


def _lines(count: int) -> Numbers:
    """`[lines, count]`: times the means, each row is how steeply the line from one measurement on falls.

    Rows are of length 1: noise with a standard deviation of 1 gives a number with a standard deviation of 1.
    """
    shortest = 3 if count > 7 else 2  # of many measurements the last one alone says little
    rows = np.zeros((count - shortest + 1, count))
    for start in range(len(rows)):
        places = np.arange(count - start) - (count - start - 1) / 2
        rows[start, start:] = -places / np.sqrt(places @ places)
    return rows


def _from_neighbours(means: Numbers) -> Numbers:
    """The standard deviation of the noise, from how far each value is from the middle of its neighbours; `[…]`."""
    bends = means[..., :-2] - 2 * means[..., 1:-1] + means[..., 2:]
    return np.asarray(np.sqrt((bends**2).mean(-1) / 6))
