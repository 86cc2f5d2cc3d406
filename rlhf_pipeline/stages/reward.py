"""Reward modelling: TRL's RewardTrainer (Bradley-Terry) on preference pairs, from the SFT adapter.

With `members`, an ensemble of such models, one after the other on one loaded base (Coste et al. 2023, "Reward Model
Ensembles Help Mitigate Overoptimization"). Each has its own head, order of data and, with `bootstrap`, sample of pairs.
"""

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from trl import RewardConfig, RewardTrainer

from rlhf_pipeline import kinds, ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import ADAPTER, MEMBER, METRICS, PAIRS
from rlhf_pipeline.stages import ensemble
from rlhf_pipeline.stages.batches import is_spare
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.resumable import Resumable

CONFIG = RewardConfig
read = rows.whole_preferences  # the rows of such a stage
MOST_PAIRS = 2000  # of the held-out ones, whose scores are written down


class ResumableRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer, from exact checkpoints.

    Attributes:
        held_out: of the last evaluation, for each batch the scores of its chosen and its rejected replies, float32
            `[2, pairs]`, in the order of the held-out rows.
    """

    kind = kinds.get("reward")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held_out: list[Tensor] = []

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on all batches, and keep their scores."""
        self.held_out = []
        output = super().evaluation_loop(*args, **kwargs)
        of_ranks = ranks.gathered(self.held_out)  # of one batch, each has neighbouring rows
        self.held_out = [scores for shares in zip(*of_ranks, strict=True) for scores in shares]
        return output

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The pairs; chosen replies are the first half of a batch."""
        return {"rows": len(inputs["input_ids"]) // 2}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """TRL's loss, which of the parts of a divided batch takes the mean, though the last may be smaller."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.model.training:
            loss = loss * self.weight(inputs, "rows")
        else:
            scores = outputs.logits.detach().float().cpu().view(2, -1)
            self.held_out.append(scores[:, :0] if is_spare(inputs) else scores)
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

    Resumes from the last checkpoint; an ensemble at the first member that is not trained.
    """
    job.progress.tell("loading")
    inputs = prepare(job)
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, inputs.tokenizer, head="score", to_divide=True)
    if job.stage.members:
        return run_ensemble(job, base, inputs, job.stage.members)
    trainer = train(job, base, inputs)
    pairs = scores_of_pairs(trainer, inputs.data)
    adapters.save_adapter(trainer.model, "default", job.artifact, inputs.tokenizer)
    if not ranks.is_first():
        return {}
    if pairs:
        ensemble.write_pairs(pairs, inputs.data, job.folder / PAIRS)
    dropped = ensemble.too_long(inputs.data.train, inputs.args.max_length)
    return job.trained(final(trainer.state.log_history) | {"dropped_pairs": dropped})


def train(job: Job, base: PreTrainedModel, inputs: Inputs, member: int | None = None) -> ResumableRewardTrainer:
    """Train an adapter and a head over a base, from the last checkpoint if there is one, and evaluate.

    Args:
        job: the stage.
        base: from `load_base`, without any adapter.
        inputs: what it trains with; checkpoints are in `args.output_dir`.
        member: the number of a member of an ensemble; None where it is no ensemble.
    """
    model = adapters.with_reward_adapter(base, job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS, member), job.checkpoints(), job.progress]
    data = inputs.data
    trainer = ResumableRewardTrainer.over(model, inputs.args, inputs.tokenizer, data.train, data.held_out, callbacks)
    trainer.train(resume_from_checkpoint=job.last_checkpoint(Path(inputs.args.output_dir)))
    if data.held_out is not None:
        trainer.evaluate()
    return trainer


def run_ensemble(job: Job, base: PreTrainedModel, inputs: Inputs, members: int) -> dict[str, Any]:
    """Train each member and put the artifact together; returns the final metrics, see `ensemble.metrics`.

    A member that is trained lies in `work/member-<number>/adapter`, whole or not at all, and is not trained again.
    Without `bootstrap`, the first one is exactly the reward model that the stage would make without `members`.
    """
    folders = [job.work / f"{MEMBER}{number}" for number in range(1, members + 1)]
    for number, folder in enumerate(folders, 1):
        if durable.damage(folder / ADAPTER) is None:
            continue
        job.progress.member = number, members
        own = ensemble.inputs_of(number, inputs, folder, job.recipe.seed, job.stage.bootstrap)
        if number > 1:
            set_seed(own.args.seed)  # whatever was trained before, all that this one draws is its own
        trainer = train(job, base, own, number)
        pairs, weights = scores_of_pairs(trainer, own.data), adapters.whole_weights(trainer.model, "default")
        if ranks.is_first():
            durable.write_folder(folder / ADAPTER, partial(_write_member, trainer, pairs, weights))
        base = trainer.model.unload().requires_grad_(False).eval()  # as it was loaded, but for the head, drawn anew
        del trainer, weights
        gc.collect()  # the optimizer's state
    if not ranks.is_first():
        return {}
    job.progress.member = None
    trained = [ensemble.read_member(folder / ADAPTER) for folder in folders]
    if inputs.data.held_out is not None:
        ensemble.write_pairs(ensemble.of_pairs(trained), inputs.data, job.folder / PAIRS)
    ensemble.put_together([folder / ADAPTER for folder in folders], job.artifact)
    inputs.tokenizer.save_pretrained(str(job.artifact))
    dropped = ensemble.too_long(inputs.data.train, inputs.args.max_length)
    numbers = ensemble.metrics(trained, inputs.args.center_rewards_coefficient)
    return job.trained(numbers | {"dropped_pairs": dropped})


def _write_member(
    trainer: ResumableRewardTrainer, pairs: dict[str, list[float]], weights: dict[str, Tensor], folder: Path
) -> None:
    """Write a member's adapter, and what the ensemble's numbers are made of."""
    adapters.write_weights(weights, trainer.model, "default", folder)
    held_out = torch.cat(trainer.held_out, dim=1).tolist() if pairs else []
    ensemble.write_member(folder, ensemble.Trained(final(trainer.state.log_history), pairs, held_out))


@torch.no_grad()
def scores_of_pairs(trainer: RewardTrainer, pairs: rows.Prepared) -> dict[str, list[float]]:
    """What the model says of held-out pairs, the first 2000: the scores of `chosen` and `rejected`, in their order.

    Nothing where none are held out. All ranks read all of them, for they may have divided the model among them.
    """
    held_out = pairs.held_out
    if held_out is None:
        return {}
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
    return scores
