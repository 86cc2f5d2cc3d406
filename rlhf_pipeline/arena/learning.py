"""The model that learns while people click: in a thread of its own, so that no click waits for it to be saved."""

import copy
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.arena.learner import Accuracy, Learner
from rlhf_pipeline.rundir.labels import Label

OUTCOME = {"first": 1.0, "tie": 0.5, "second": 0.0}  # `bad` says nothing of which reply is better


class Lesson(NamedTuple):
    """What was learned from all labels that there were.

    Attributes:
        number: which one it is; a later one has a larger number.
        model: the learner, which changes no more.
        labels: how many it has learned from.
        accuracy: on labels that it has not seen; None where there are none.
        seconds: how long it took.
    """

    number: int
    model: Learner
    labels: int
    accuracy: Accuracy | None
    seconds: float = 0.0


class Learning:
    """A learner that is fitted again whenever labels change, and answers from the last fit meanwhile.

    Args:
        features: float32 `[replies, d]`.
        items: `[replies]`: a number for the item of each reply.
        replies: by the key of each pair, the numbers of its two replies, in the order of the file of labels.
        learned: is told of each lesson, in the thread.
    """

    def __init__(
        self,
        features: NDArray[np.float32],
        items: Sequence[int],
        replies: Mapping[str, tuple[int, int]],
        learned: Callable[[Lesson], None],
    ) -> None:
        self._replies = replies
        self._learned = learned
        self._changed = threading.Condition()
        self._wanted: tuple[int, list[Label]] | None = None
        self._number = 0
        self._stopped = False
        self.lesson = Lesson(0, Learner(features, items=items), 0, None)
        self._thread = threading.Thread(target=self._learn, name="learning", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after what is being learned."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def learn(self, labels: Sequence[Label]) -> int:
        """Have it learn from all labels there are, those of pairs that it knows; the number of the lesson."""
        with self._changed:
            self._number += 1
            self._wanted = (self._number, list(labels))
            self._changed.notify_all()
            return self._number

    def wait(self, number: int, seconds: float) -> bool:
        """Wait for a lesson, or a later one.

        Returns:
            Whether it was learned in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._stopped or self.lesson.number >= number, seconds)

    def most_informative(self, pairs: Sequence[str]) -> str:
        """The pair of which most is to be learned; of those that are alike, any."""
        firsts, seconds = zip(*(self._replies[key] for key in pairs), strict=True)
        scores = self.lesson.model.informative(np.array(firsts), np.array(seconds))
        best = np.flatnonzero(scores >= scores.max() - 1e-9)
        return pairs[random.choice(best.tolist())]

    def belief(self, pair: str) -> tuple[float, float, float]:
        """The probability that the first reply of a pair is better, and its 90 % interval."""
        first, second = self._replies[pair]
        return tuple(float(one[0]) for one in self.lesson.model.belief([first], [second]))  # type: ignore[return-value]

    def rewards(self, replies: Sequence[int]) -> NDArray[np.float64]:
        """The mean rewards of some replies, in log-odds."""
        return self.lesson.model.rewards(replies)[0]

    def _learn(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._wanted is not None)
                if self._stopped or self._wanted is None:
                    return
                number, labels = self._wanted
                self._wanted = None
            try:
                lesson = self._taught(number, labels)
            except Exception:  # people go on, and what was learned before stays
                print(f"warning: the model cannot learn:\n{traceback.format_exc()}", file=sys.stderr)
                lesson = self.lesson._replace(number=number)
            with self._changed:
                self.lesson = lesson
                self._changed.notify_all()

    def _taught(self, number: int, labels: Sequence[Label]) -> Lesson:
        learned = [
            label
            for label in labels
            if label.pair in self._replies and label.choice in OUTCOME and label.how != "again"
        ]
        began = time.monotonic()
        model = copy.copy(self.lesson.model)  # those who ask meanwhile are answered by the one before
        firsts, seconds = np.array([self._replies[label.pair] for label in learned], np.intp).reshape(-1, 2).T
        outcome = np.array([OUTCOME[label.choice] for label in learned])
        model.fit(firsts, seconds, outcome, np.array([label.how == "random" for label in learned], bool))
        lesson = Lesson(number, model, len(learned), model.accuracy(), time.monotonic() - began)
        self._learned(lesson)
        return lesson


def as_json(lesson: Lesson) -> dict[str, Any]:
    """A lesson as the page shows it."""
    found: dict[str, Any] = {
        "labels": lesson.labels, "accuracy": None, "low": None, "high": None, "tested": 0, "calibration": [],
    }  # fmt: skip
    if lesson.accuracy is None:
        text = "Its accuracy is known once pairs that were drawn at random have labels."
        return found | {"text": text}
    accuracy = lesson.accuracy
    bins = [
        {"from": one.start, "to": one.end, "n": one.labels, "said": one.said, "true": one.true} for one in accuracy.bins
    ]
    found |= {"accuracy": accuracy.accuracy, "low": accuracy.low, "high": accuracy.high, "tested": accuracy.tested}
    text = (
        f"It foretells {accuracy.accuracy:.0%} of the labels of pairs that were drawn at random (95 % interval "
        f"{accuracy.low:.0%} to {accuracy.high:.0%}, {accuracy.tested} label{'s' * (accuracy.tested != 1)}, ties "
        "apart), each from the others."
    )
    return found | {"calibration": bins, "text": text}
