"""Kahneman-Tversky optimization: TRL's KTOTrainer on good and bad replies, relative to a frozen reference."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import set_seed
from trl import KTOConfig, KTOTrainer
from trl.trainer.utils import use_adapter

from rlhf_pipeline import kinds, ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import balance
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.rundir.layout import METRICS
from rlhf_pipeline.stages.batches import is_spare
from rlhf_pipeline.stages.evaluate import judge_policy
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.resumable import REFERENCE, Resumable, with_room_for_replies

CONFIG = KTOConfig
WITHOUT_KL = "apo_zero_unpaired"  # what TRL calls the loss that has no KL in it
MISMATCHED = "KL_completion_ids"  # and the column of replies to other prompts
read = rows.feedback  # the rows of such a stage


class EncodedKTOTrainer(Resumable, KTOTrainer):
    """TRL's KTOTrainer, from exact checkpoints, for encoded rows, which come in a new order in each epoch.

    KL is estimated on prompts with replies to other prompts of the same batch. TRL makes these pairs of neighbours in
    the data, once, and trains in the order of the data, in which both replies to a prompt may be neighbours. Here they
    are made as each batch is; those of held-out rows once, with replies from the other half of them.

    The loss is the mean over the replies of a step, each with the KL of its own batch, however
    `gradient_accumulation_steps` divides it. In evaluation KL is one number of all held-out rows.
    """

    kind = kinds.get("kto")
    held_out_kl: float | None = None  # while it is evaluated
    _is_spare = False  # the batch at hand

    @classmethod
    def over(cls, model: PeftModel, *args: Any, **kwargs: Any) -> Self:
        """See `Resumable.over`."""
        trainer = super().over(model, *args, **kwargs)
        if trainer.calculate_KL:
            trainer.neighbours = ranks.count() > 1
            trainer.data_collator = functools.partial(
                with_mismatched, trainer.data_collator, neighbour=trainer.neighbours
            )
        return trainer

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The replies and their tokens, of all, of the good and of the bad ones."""
        good, tokens = inputs["label"].bool(), inputs["completion_mask"][:, 1:].sum(1)
        of_good = tokens[good].sum().item()
        return {
            "rows": len(good),
            "chosen rows": good.sum().item(),
            "rejected rows": (~good).sum().item(),
            "tokens": tokens.sum().item(),
            "chosen tokens": of_good,
            "rejected tokens": tokens.sum().item() - of_good,
        }

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, which of the parts of a divided batch takes the mean, though the last may be smaller."""
        self._is_spare = is_spare(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * self.weight(inputs, "rows") if self.model.training else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """See `Resumable.evaluation_loop`."""
        if self.calculate_KL:
            with torch.random.fork_rng():  # a pass over the batches draws a number
                self.held_out_kl = self._kl_over(dataloader)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.held_out_kl = None

    @torch.no_grad()
    def _kl_over(self, dataloader: Any) -> float:
        """The mean log-ratio of policy and reference of mismatched replies, in nats, over all batches."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                ours: Any = super()._compute_kl_logps(self.model, inputs)
                with use_adapter(self.model, REFERENCE):
                    reference: Any = super()._compute_kl_logps(self.model, inputs)
            if not is_spare(batch):
                total, count = total + (ours - reference).sum().item(), count + len(ours)
        sums, counts = zip(*ranks.gathered((total, count)), strict=True)
        return sum(sums) / sum(counts)

    def _compute_kl_logps(self, model: Any, batch: Any) -> Tensor | None:
        """TRL's log-probabilities of mismatched replies; of several ranks, their mean over all.

        Where the KL of them is known, that, and 0 for the reference.
        """
        if self.held_out_kl is not None:
            of_reference = self.model.active_adapter == REFERENCE
            return torch.tensor([0.0 if of_reference else self.held_out_kl], device=batch["label"].device)
        found: Tensor | None = super()._compute_kl_logps(model, batch)
        if found is None or ranks.count() == 1:
            return found
        own = torch.stack([found.sum(), found.new_tensor(len(found))]) * (0.0 if self._is_spare else 1.0)
        total, count = ranks.total(own)
        return (total / count)[None]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the margin between the rewards that are logged; TRL's is of the batches that have both kinds of reply."""
        means = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
        if chosen and rejected:
            means["rewards/margins"] = [sum(chosen) / len(chosen) - sum(rejected) / len(rejected)]
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RandomSampler:
        return RandomSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _prepare_dataset(self, dataset: Dataset, _tokenizer: Any, args: KTOConfig, name: str) -> Dataset:
        dataset = with_room_for_replies(dataset, args.max_length)
        if name == "train" or not self.calculate_KL:
            return dataset
        replies, half = list(dataset["completion_ids"]), len(dataset) // 2
        return dataset.add_column(MISMATCHED, replies[half:] + replies[:half])


TRAINER = EncodedKTOTrainer


def with_mismatched(
    collate: Callable[[list[dict[str, Any]]], Any], examples: list[dict[str, Any]], neighbour: bool = False
) -> Any:
    """A batch in which each prompt comes also with the reply of the row before, the first one with that of the last.

    A row that is alone, as the last of an epoch may be, gets a reply of no tokens, of which KL is 0.

    Args:
        collate: TRL's collator.
        examples: rows, of held-out ones with such replies already.
        neighbour: the first of several rows is not in this batch, but before it in that of all ranks.
    """
    if MISMATCHED not in examples[0]:
        replies = [row["completion_ids"] for row in examples]
        others = [replies[-1], *replies[:-1]] if len(replies) > 1 else [[]]
        if neighbour and len(examples) > 1:
            examples, others = examples[1:], replies[:-1]
        examples = [row | {MISMATCHED: other} for row, other in zip(examples, others, strict=True)]
    return collate(examples)


def prepare(job: Job) -> Inputs:
    """See `sft.prepare`. Weights of good and bad replies that the recipe does not give are what balances the two."""
    args = job.trainer_config(CONFIG)
    batch = args.per_device_train_batch_size * job.recipe.processes(job.name)
    if args.loss_type != WITHOUT_KL and batch < 2:
        raise InputError(
            "a batch of 1 leaves KTO nothing to compare with: it estimates KL on prompts with replies to other prompts "
            "of the same batch",
            place=f"stages.{job.name}.trainer.per_device_train_batch_size",
            hint="set it to 2 or more; 4 or more make the estimate steadier",
        )
    data = job.reader.read(read, job.stage.data)
    job.require_eval_data(args, data.held_out)
    good, bad = (data.counts.get(f"{label}_replies", 0) for label in ("good", "bad"))
    if not (good and bad):
        raise InputError(
            f"all {good or bad:,} replies are {'good' if good else 'bad'}, and KTO learns from both kinds",
            place=f"stages.{job.name}.data",
            hint="`columns` says which column is the `label`; from good replies alone, `sft` learns",
        )
    weights = balance.weights(good, bad, args.desirable_weight, args.undesirable_weight)
    args.desirable_weight, args.undesirable_weight = weights
    return Inputs(args, job.reader.tokenizer, data)


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Resumes from the last checkpoint.

    The adapter is loaded under the name `default`, of which TRL makes a frozen copy, `ref`: the reference is what the
    stage starts from, not the bare base, unless the recipe names another one.
    """
    job.progress.tell("loading")
    args, tokenizer, data, _ = prepare(job)
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, tokenizer, to_divide=True)
    model = adapters.with_policy_adapter(base, job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = EncodedKTOTrainer.over(model, args, tokenizer, data.train, data.held_out, callbacks)
    if job.stage.reference is not None:
        trainer.refer_to(job.reference)
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if data.held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
    dropped = {"dropped_rows": len(data.train) - len(trainer.train_dataset)}
    metrics = final(trainer.state.log_history) | dropped | weights
    return (job.trained(metrics) if ranks.is_first() else {}) | judge_policy(job, model, tokenizer)
