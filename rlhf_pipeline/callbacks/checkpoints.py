"""When a stage writes a checkpoint: as its settings say, else every ten minutes, and when it is asked to stop.

The runner asks by a signal, so that a terminal's Ctrl-C, a cluster's SIGTERM and a closed terminal all mean the same.
"""

import signal
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import ranks

SECONDS_BETWEEN = 600.0


class Stopped(BaseException):
    """The stage was asked to stop and has done so; not an error, so nothing that handles errors shall catch it.

    Args:
        step: of the checkpoint it left; None where it was not training.
    """

    def __init__(self, step: int | None = None) -> None:
        super().__init__(step)
        self.step = step


class StopRequest:
    """Whether this process was asked to stop. While it trains that is only noted; at any other time it stops at once.

    Attributes:
        noted: it was asked.
        training: a trainer is between two checkpoints, and will stop by itself.
    """

    def __init__(self) -> None:
        self.noted = False
        self.training = False

    def listen(self, number: int) -> None:
        """Take the signal `number` for a request, and leave to the runner what reaches the whole process group."""
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(number, self._take)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.noted = True
        self.stop_unless_training()

    def stop_unless_training(self) -> None:
        """Raise `Stopped` if that is due."""
        if self.noted and not self.training:
            raise Stopped


REQUEST = StopRequest()  # a signal reaches the whole process, so there is one


class Checkpoints(TrainerCallback):
    """Ask the trainer for checkpoints, and stop it after one when the process was asked to stop.

    Args:
        every_s: seconds between checkpoints; None where the recipe's `save_*` keys decide.
    """

    def __init__(self, every_s: float | None) -> None:
        self.every_s = every_s
        self.last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on a request waits for the end of a step."""
        self.last = time.monotonic()
        REQUEST.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint where one is due, and after the last step: evaluation may take as long again."""
        elapsed, over = time.monotonic() - self.last, state.global_step >= state.max_steps
        due = self.every_s is not None and (over or elapsed >= self.every_s)
        wanted = ranks.gathered((REQUEST.noted, due))  # ranks have other clocks, and hear of a signal at other times
        if any(stop for stop, _ in wanted) or wanted[0][1]:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if that was asked for: now there is a checkpoint to resume from.

        Raises:
            Stopped: with the checkpoint's step.
        """
        self.last = time.monotonic()
        if ranks.any_of(REQUEST.noted):
            raise Stopped(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on a request is granted at once.

        Raises:
            Stopped: one was noted.
        """
        if ranks.any_of(REQUEST.noted):  # it is only ever set: a request may come while this is found out
            REQUEST.noted = True
        REQUEST.training = False
        REQUEST.stop_unless_training()
