"""How far people are with a stage that waits for them. No torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import gates
from rlhf_pipeline.recipe.schema import People, Until
from rlhf_pipeline.rundir import agreement, choices, items, strict_json
from rlhf_pipeline.rundir.choices import Progress, Target, item_of_pairs
from rlhf_pipeline.rundir.items import ITEMS
from rlhf_pipeline.rundir.labels import LABELS, Label, Labels, Pair
from rlhf_pipeline.rundir.layout import RECIPE, RunDirectory


@dataclass(frozen=True)
class Labelled:
    """What people have labelled of a stage's items.

    Attributes:
        labels: what they said of these items, in their order; what was taken back apart.
        pairs: those that were ever asked, by their keys.
        left_out: the names of those whose labels do not count, by the recipe's `people`.
        progress: how far those that count are from the recipe's `until`.
        accuracy: of the reward that learns along, as it was measured last; None where it was not.
    """

    labels: tuple[Label, ...]
    pairs: dict[str, Pair]
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


def of_stage(directory: RunDirectory, stage: str, until: Any, people: Any = None) -> Labelled:
    """How far people are with a stage of a run, by its `until` and its `people`, as its recipe has them.

    Raises:
        InputError: the file of labels, or the stage's items, cannot be read; or `until` or `people` are none.
    """
    target, counting = _as_set(directory, stage, until, people)
    files = [folder / ITEMS for folder in (directory.work(stage), directory.stage(stage))]
    asked = next((items.read(file) for file in files if file.is_file()), [])
    known, made, pairs, learnt = item_of_pairs(asked), list[Label](), dict[str, Pair](), None
    labels = Labels.open_existing(directory.path / LABELS)
    if labels is not None:
        with labels:
            made, learnt = [label for label in labels.of(stage) if label.pair in known], labels.learnt(stage)
            pairs = labels.pairs(stage)
    out = agreement.left_out(counting, agreement.figures(pairs, made)["people"]) if counting else set()
    accuracy = learnt and learnt.accuracy
    progress = choices.count(target, asked, known, made, accuracy, out)
    return Labelled(tuple(made), pairs, frozenset(out), progress, accuracy)


def _as_set(directory: RunDirectory, stage: str, until: Any, people: Any) -> tuple[Target, dict[str, Any]]:
    """What `until` and `people` set; the recipe of a run directory may have been changed by hand.

    Raises:
        InputError: they are none.
    """
    try:
        target = Target(**Until.model_validate(until or {}).says)
        if target.reward_accuracy is not None:
            gates.parse("reward_accuracy", target.reward_accuracy)
        return target, People.model_validate(people or {}).says
    except ValueError as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"`until` or `people` of stage `{stage}` cannot be read: {said}", place=str(directory.path / RECIPE)
        ) from None


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
