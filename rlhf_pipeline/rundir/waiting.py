"""How far people are with a stage that waits for them. No torch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.rundir import agreement, choices, items, strict_json
from rlhf_pipeline.rundir.choices import Progress, Target, item_of_pairs
from rlhf_pipeline.rundir.items import ITEMS
from rlhf_pipeline.rundir.labels import LABELS, Label, Labels, Pair
from rlhf_pipeline.rundir.layout import RunDirectory


@dataclass(frozen=True)
class Labelled:
    """What people have labelled of a stage's items.

    Attributes:
        labels: what they said of these items, in their order; what was taken back apart.
        left_out: the names of those whose labels do not count, by the recipe's `people`.
        progress: how far those that count are from the recipe's `until`.
        accuracy: of the reward that learns along, as it was measured last; None where it was not.
    """

    labels: tuple[Label, ...]
    left_out: frozenset[str]
    progress: Progress
    accuracy: float | None

    @property
    def counted(self) -> list[Label]:
        """The labels of those whose labels count."""
        return [label for label in self.labels if label.person not in self.left_out]

    @property
    def digest(self) -> str:
        """The SHA-256 of the labels as `choices.jsonl` has them."""
        return hashlib.sha256(lines(self.labels).encode("utf-8")).hexdigest()


def of_stage(
    directory: RunDirectory, stage: str, until: Mapping[str, Any], people: Mapping[str, Any] | None = None
) -> Labelled:
    """How far people are with a stage of a run, by its `until` and its `people`.

    Raises:
        InputError: the file of labels, or the stage's items, cannot be read.
    """
    files = [folder / ITEMS for folder in (directory.work(stage), directory.stage(stage))]
    asked = next((items.read(file) for file in files if file.is_file()), [])
    known, made, pairs, learnt = item_of_pairs(asked), list[Label](), dict[str, Pair](), None
    labels = Labels.open_existing(directory.path / LABELS)
    if labels is not None:
        with labels:
            made, learnt = [label for label in labels.of(stage) if label.pair in known], labels.learnt(stage)
            pairs = labels.pairs(stage)
    out = agreement.left_out(people, agreement.figures(pairs, made)["people"]) if people else set()
    accuracy = learnt and learnt.accuracy
    progress = choices.count(Target(**until), asked, known, made, accuracy, out)
    return Labelled(tuple(made), frozenset(out), progress, accuracy)


def lines(labels: Sequence[Label]) -> str:
    """Labels as lines of JSON, as `choices.jsonl` has them."""
    return "".join(strict_json.dumps(label._asdict(), ensure_ascii=False) + "\n" for label in labels)


def has_labels(directory: RunDirectory, stage: str) -> bool:
    """Whether people have labelled for a stage of a run.

    Raises:
        InputError: the file of labels cannot be read.
    """
    labels = Labels.open_existing(directory.path / LABELS)
    if labels is None:
        return False
    with labels:
        return labels.count(stage) > 0
