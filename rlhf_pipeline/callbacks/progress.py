"""Where a stage is, kept in a small file for those who watch."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import ranks
from rlhf_pipeline.rundir.layout import PROGRESS

SECONDS_BETWEEN = 1.0
Phase = Literal["loading", "training", "evaluating", "judging", "sampling", "revising"]


class ProgressFile(TrainerCallback):
    """Keep `progress.json` in a stage's working folder: `phase`, `step`, `of` (or null) and `time` (Unix seconds).

    While a member of an ensemble trains, or is evaluated, it has `member`, from 1, and `members`, too.

    It is replaced at once where the phase changes, at its first and last step, and else at most once a second. It tells
    nobody whether a stage is done, so nothing waits for the disk, and a disk that takes nothing harms no run.

    Args:
        work: the stage's working folder; where it is not there, nothing is written.

    Attributes:
        member: the number of the member at work, and how many there are; None where it is no ensemble.
    """

    def __init__(self, work: Path) -> None:
        self.file = work / PROGRESS
        self.phase: Phase | None = None
        self.written = 0.0
        self.evaluated = 0
        self.training = False
        self.member: tuple[int, int] | None = None

    def tell(self, phase: Phase, step: int = 0, of: int | None = None) -> None:
        """Say where the stage is.

        Args:
            phase: what it does.
            step: how much of that is done.
            of: how much there is to do; None where nobody knows.
        """
        now = time.monotonic()
        if not ranks.is_first():
            return
        if phase == self.phase and step not in (0, of) and now - self.written < SECONDS_BETWEEN:
            return
        self.phase, self.written = phase, now
        temporary = self.file.with_name(f"{PROGRESS}.new")
        with contextlib.suppress(OSError):
            said = {"phase": phase, "step": step, "of": of, "time": round(time.time(), 3)}
            said |= {"member": self.member[0], "members": self.member[1]} if self.member else {}
            temporary.write_text(json.dumps(said))
            temporary.replace(self.file)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Training begins, or resumes from a checkpoint."""
        self.training = True
        self.tell("training", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step more."""
        self.tell("training", state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is evaluated from now on is not followed by training."""
        self.training = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """One batch of held-out rows more."""
        self.evaluated += 1
        try:
            batches = len(given["eval_dataloader"])
        except (KeyError, TypeError):  # rows that are streamed have no number
            batches = None
        self.tell("evaluating", self.evaluated, batches)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Back to training, if that is not over."""
        self.evaluated = 0
        if self.training:
            self.tell("training", state.global_step, state.max_steps)
