"""How far people are with a stage that waits for them. No torch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.rundir import choices, items, strict_json
from rlhf_pipeline.rundir.choices import Progress, Target, item_of_pairs
from rlhf_pipeline.rundir.items import ITEMS
from rlhf_pipeline.rundir.labels import LABELS, Label, Labels
from rlhf_pipeline.rundir.layout import RunDirectory


@dataclass(frozen=True)
class Labelled:
    """What people have labelled of a stage's items.

    Attributes:
        labels: what they said of these items, in their order; what was taken back apart.
        progress: how far that is from the recipe's `until`.
        accuracy: of the reward that learns along, as it was measured last; None where it was not.
    """

    labels: tuple[Label, ...]
    progress: Progress
    accuracy: float | None

    @property
    def digest(self) -> str:
        """The SHA-256 of the labels as `choices.jsonl` has them."""
        return hashlib.sha256(lines(self.labels).encode("utf-8")).hexdigest()


def of_stage(directory: RunDirectory, stage: str, until: Mapping[str, Any]) -> Labelled:
    """How far people are with a stage of a run, by its `until`.

    Raises:
        InputError: the file of labels, or the stage's items, cannot be read.
    """
    files = [folder / ITEMS for folder in (directory.work(stage), directory.stage(stage))]
    asked = next((items.read(file) for file in files if file.is_file()), [])
    known, made, learnt = item_of_pairs(asked), [], None
    labels = Labels.open_existing(directory.path / LABELS)
    if labels is not None:
        with labels:
            made, learnt = [label for label in labels.of(stage) if label.pair in known], labels.learnt(stage)
    accuracy = learnt and learnt.accuracy
    return Labelled(tuple(made), choices.count(Target(**until), asked, known, made, accuracy), accuracy)


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
