"""What `score` says at its end: means over all rows, and the accuracy on pairs, those of training apart."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Margins:
    """Pairs of which both replies have a score.

    Attributes:
        pairs: how many.
        total: the sum of chosen less rejected.
        right: how often that is above 0.
    """

    pairs: int = 0
    total: float = 0.0
    right: int = 0

    def count(self, margin: float) -> None:
        """Take a pair into account."""
        self.pairs, self.total, self.right = self.pairs + 1, self.total + margin, self.right + (margin > 0)

    @property
    def accuracy(self) -> str:
        """The share of right pairs, for people."""
        return f"{self.right / self.pairs:.4g}"


@dataclass
class Totals:
    """What was scored.

    Attributes:
        rows: that had something to score.
        last_row: the number of the last of them.
        unscored: replies without a score: too long for the model, or it gave no finite number.
        scores: the number of scores, and their sum.
        deviations: the number of standard deviations of an ensemble's scores, and their sum.
        margins: all pairs.
        by_training: the pairs that the model was trained on under True, others under False.
    """

    rows: int = 0
    last_row: int = 0
    unscored: int = 0
    scores: tuple[int, float] = (0, 0.0)
    deviations: tuple[int, float] = (0, 0.0)
    margins: Margins = field(default_factory=Margins)
    by_training: dict[bool, Margins] = field(default_factory=lambda: {True: Margins(), False: Margins()})

    def __str__(self) -> str:
        said = f"{self.rows} rows"
        if self.scores[0]:
            said += f", mean score {self.scores[1] / self.scores[0]:.4g}"
        if self.deviations[0]:
            said += f", mean disagreement {self.deviations[1] / self.deviations[0]:.4g}"
        if self.margins.pairs:
            mean = self.margins.total / self.margins.pairs
            said += f"; of {self.margins.pairs} pairs the mean margin is {mean:.4g} and the accuracy "
            said += self.margins.accuracy + self._by_training()
        return said

    def _by_training(self) -> str:
        known, others = self.by_training[True], self.by_training[False]
        if known.pairs and others.pairs:
            told = f"{known.accuracy} on the {known.pairs} that the model was trained on, "
            return f": {told}{others.accuracy} on the {others.pairs} others"
        if known.pairs:
            return "; the model was trained on all of them, which says little of others"
        return "; the model was trained on none of them" if others.pairs else ""

    def count(self, line: dict[str, Any]) -> None:
        """Take one line of the output into account."""
        self.rows += line["row"] != self.last_row  # a ranking makes several lines
        self.last_row = line["row"]
        found = [line[name] for name in ("score", "chosen_score", "rejected_score") if name in line]
        known = [score for score in found if score is not None]
        self.unscored += len(found) - len(known)
        self.scores = self.scores[0] + len(known), self.scores[1] + sum(known)
        names = ("score_std", "chosen_score_std", "rejected_score_std")
        deviations: list[float] = [value for name in names if (value := line.get(name)) is not None]
        self.deviations = self.deviations[0] + len(deviations), self.deviations[1] + sum(deviations)
        margin = line.get("margin")
        if margin is not None:
            self.margins.count(margin)
            if "trained_on" in line:
                self.by_training[line["trained_on"]].count(margin)
