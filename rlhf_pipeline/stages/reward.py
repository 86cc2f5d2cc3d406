"""Reward modelling: TRL's RewardTrainer (Bradley-Terry) on preference pairs, from the SFT adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from rlhf_pipeline import kinds
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.rundir import durable, strict_json
from rlhf_pipeline.rundir.layout import METRICS, PAIRS
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.resumable import Resumable

CONFIG = RewardConfig
read = rows.whole_preferences  # the rows of such a stage
MOST_PAIRS = 2000  # of the held-out ones, whose scores are written down


class ResumableRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer, from exact checkpoints."""

    kind = kinds.get("reward")

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The pairs; chosen replies are the first half of a batch."""
        return {"rows": len(inputs["input_ids"]) // 2}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """TRL's loss, which of the parts of a divided batch takes the mean, though the last may be smaller."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss * self.weight(inputs, "rows") if self.model.training else loss
        return (loss, outputs) if return_outputs else loss


TRAINER = ResumableRewardTrainer


def prepare(job: Job) -> Inputs:
    """See `sft.prepare`."""
    args = job.trainer_config(CONFIG)
    data = job.reader.read(read, job.stage.data)
    job.require_eval_data(args, data.held_out)
    return Inputs(args, job.reader.tokenizer, data)


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs and save the adapter with its score head; returns the final metrics.

    Resumes from the last checkpoint.
    """
    job.progress.tell("loading")
    args, tokenizer, pairs, _ = prepare(job)
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, tokenizer, head="score")
    model = adapters.with_reward_adapter(base, job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = ResumableRewardTrainer.over(model, args, tokenizer, pairs.train, pairs.held_out, callbacks)
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if pairs.held_out is not None:
        trainer.evaluate()
        write_pairs(trainer, pairs, job.folder / PAIRS)
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    # TRL drops pairs longer than `max_length` without a word.
    dropped = len(pairs.train) - len(trainer.train_dataset)
    return job.trained(final(trainer.state.log_history) | {"dropped_pairs": dropped})


@torch.no_grad()
def write_pairs(trainer: RewardTrainer, pairs: rows.Prepared, file: Path) -> None:
    """Write what the model says of held-out pairs, the first 2000: one JSON object a line, in the data's order.

    Each has the scores of both replies, `chosen` and `rejected`, and the tokens of each with its EOS, before any cut,
    `chosen_length` and `rejected_length`.
    """
    held_out, table = pairs.held_out, pairs.held_out_table
    assert held_out is not None and table is not None
    count, tokenizer, model = min(len(held_out), MOST_PAIRS), trainer.processing_class, trainer.model.eval()
    scores: dict[str, list[float]] = {}
    for name in ("chosen", "rejected"):
        ids = held_out[:count][f"{name}_ids"]
        by_length = sorted(range(count), key=lambda row: len(ids[row]))
        scores[name] = [0.0] * count
        for start in range(0, count, trainer.args.per_device_eval_batch_size):
            some = by_length[start : start + trainer.args.per_device_eval_batch_size]
            batch = tokenizer.pad({"input_ids": [ids[row] for row in some]}, return_tensors="pt", padding_side="right")
            with trainer.accelerator.autocast():
                logits = model(**batch.to(model.device)).logits[:, 0]
            for row, score in zip(some, logits.tolist(), strict=True):
                scores[name][row] = score
    lengths = {f"{name}_length": rows.column(table, f"{name}_length")[:count].tolist() for name in scores}
    lines = zip(*(scores | lengths).values(), strict=True)
    written = (strict_json.dumps(dict(zip(scores | lengths, line, strict=True))) + "\n" for line in lines)
    durable.write_text(file, "".join(written))
