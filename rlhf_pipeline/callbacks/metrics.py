"""Numbers written down as training logs them."""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import ranks
from rlhf_pipeline.rundir import jsonl


class MetricsLog(TrainerCallback):
    """Append each logged step to `metrics.jsonl`: TRL's own metric names, plus `step` and `time` (Unix seconds).

    Args:
        file: the file to append to; every line is written at once and whole. See `rundir.jsonl` for what happens where
            it cannot be read or written.
        member: the number of the member of an ensemble that trains, from 1, which each of its lines gets as `member`;
            None where it is no ensemble.
    """

    def __init__(self, file: Path, member: int | None = None) -> None:
        self.file, self.member = file, member

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what an interrupted run wrote after the checkpoint that this one resumes from.

        By the steps that the checkpoint knows of, not by the number of lines: some may have been lost. Those of other
        members stay.
        """
        if not ranks.is_first():
            return
        known = Counter(entry.get("step") for entry in state.log_history)

        def is_known(row: dict[str, Any]) -> bool:
            if row.get("member") != self.member:
                return True
            step = row.get("step")
            if not isinstance(step, int) or not known[step]:
                return False
            known[step] -= 1
            return True

        jsonl.rewrite(self.file, is_known)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line, on the first rank."""
        if not ranks.is_first():
            return
        of = {} if self.member is None else {"member": self.member}
        row = {"step": state.global_step, "time": round(time.time(), 3), **of, **numbers(logs or {})}
        jsonl.append(self.file, [row])


def keep_until(file: Path, step: int) -> None:
    """Drop the rows of a `.jsonl` file whose `step` is later, and a last line that was not written whole."""
    jsonl.rewrite(file, lambda row: not isinstance(row.get("step"), int) or row["step"] <= step)


def numbers(logs: dict[str, Any]) -> dict[str, float | int | None]:
    """The numeric entries; what is not finite becomes null, since JSON has no NaN."""
    plain = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    return {name: value if math.isfinite(value) else None for name, value in plain.items()}


def final(history: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """The last logged value of every metric, evaluation included.

    Without the trainer's own bookkeeping, and without what was measured on the way, `gold/…` and `watch/…`.
    """
    bookkeeping = {
        "step", "epoch", "total_flos", "step_time", "train_runtime", "train_samples_per_second",
        "train_steps_per_second",
    }  # fmt: skip
    latest: dict[str, Any] = {}
    for entry in history:
        latest |= {name: value for name, value in entry.items() if name not in bookkeeping}
    return {
        name: value
        for name, value in numbers(latest).items()
        if not name.endswith(("_runtime", "_per_second")) and not name.startswith(("gold/", "watch/"))
    }
