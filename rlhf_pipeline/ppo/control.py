"""What PPO remembers from update to update beside weights: the KL coefficient, and what scores look like."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class KLControl:
    """The KL coefficient β, fixed or steered.

    Attributes:
        coefficient: β now.
        target: the KL per episode to steer towards, in nats; None keeps β fixed.
        horizon: the episodes over which β is steered.
    """

    coefficient: float
    target: float | None
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """Move β in proportion to the error: β ← β (1 + clip(kl/target - 1, ±0.2) · episodes/horizon).

        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
        """
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * episodes / self.horizon


@dataclass
class ScoreStatistics:
    """Running mean and variance of all scores so far.

    Batches are merged by the formula of Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances".
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared deviations from the mean

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores, float `[B]`; those that are not finite are left out."""
        scores = scores[scores.isfinite()].double()
        if not len(scores):
            return
        total, difference = self.count + len(scores), float(scores.mean()) - self.mean
        self.squares += float(((scores - scores.mean()) ** 2).sum()) + difference**2 * self.count * len(scores) / total
        self.mean += difference * len(scores) / total
        self.count = total

    def normalize(self, scores: Tensor) -> Tensor:
        """Scores less their mean, over their standard deviation; left alone as long as all were equal."""
        deviation = math.sqrt(self.squares / max(self.count - 1, 1))
        return (scores - self.mean) / deviation if deviation > 0 else scores
