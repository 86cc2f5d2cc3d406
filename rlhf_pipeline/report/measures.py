"""What a reward model's held-out pairs say of it. No torch."""

import numpy as np

from rlhf_pipeline.report.charts import Share
from rlhf_pipeline.report.gather import Numbers, Pairs
from rlhf_pipeline.shares import interval

MOST_BINS = 10
LEAST_IN_BIN = 20  # fewer pairs say little: an interval of 20 is about 0.4 wide


def right(pairs: Pairs) -> Numbers:
    """`[n]`: 1 where the chosen reply has the higher score, 0.5 where both have the same, else 0."""
    return (np.sign(pairs.margins) + 1) / 2


def accuracy_by(values: Numbers, correct: Numbers) -> list[Share]:
    """Accuracy in bins of equal count, each at the mean of its values; equal values are never parted."""
    bins = max(1, min(MOST_BINS, len(values) // LEAST_IN_BIN))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    which = np.searchsorted(edges, values, side="left")
    found = []
    for i in np.unique(which):
        inside = which == i
        found.append(_share(float(values[inside].mean()), correct[inside]))
    return found


def calibration(pairs: Pairs) -> list[Share]:
    """How often the higher score is the chosen reply's, by how sure the model is of that.

    Labels always say that the chosen reply wins, so the probability of a pair is folded: of the two replies, the one
    with the higher score wins with probability `sigmoid(|margin|)`, which is at least one half. Five bins of equal
    width, those without a pair left out; each at the mean of its predictions.
    """
    predicted, correct = probability(np.abs(pairs.margins)), right(pairs)
    which = np.minimum(((predicted - 0.5) * 10).astype(int), 4)  # 0.5 to 0.6, …, 0.9 to 1
    return [_share(float(predicted[which == i].mean()), correct[which == i]) for i in np.unique(which)]


def probability(margins: Numbers) -> Numbers:
    """The chance that Bradley and Terry give the better reply."""
    return 1 / (1 + np.exp(-np.clip(margins, -500, 500)))


def by_length(pairs: Pairs) -> dict[str, Share]:
    """Accuracy where the chosen reply is the longer one, the shorter one, or as long; at x 0."""
    difference, correct = pairs.chosen_length - pairs.rejected_length, right(pairs)
    groups = {"longer": difference > 0, "shorter": difference < 0, "as long": difference == 0}
    return {name: _share(0.0, correct[inside]) for name, inside in groups.items() if inside.any()}


def _share(x: float, correct: Numbers) -> Share:
    low, high = interval(float(correct.sum()), len(correct))
    return Share(x, float(correct.mean()), low, high, len(correct))
