"""Direct preference optimization: TRL's DPOTrainer on preference pairs, relative to a frozen reference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from rlhf_pipeline import kinds, ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters, divided
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import METRICS
from rlhf_pipeline.stages import sharded
from rlhf_pipeline.stages.evaluate import judge_policy
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.resumable import Resumable, with_room_for_replies

CONFIG = DPOConfig
ON_CHOSEN = "sft"  # what TRL calls the loss that is over the tokens of the chosen replies
read = rows.preferences  # the rows of such a stage


class EncodedDPOTrainer(Resumable, DPOTrainer):
    """TRL's DPOTrainer, from exact checkpoints, for encoded rows, which TRL's other trainers take and it does not.

    Its loss does not depend on how a batch is divided by `gradient_accumulation_steps`. Terms are over pairs, `sft` is
    over the tokens of the chosen replies; of both TRL takes the mean of each part. (Its `aot` sorts within each part.)
    """

    kind = kinds.get("dpo")
    loss_weights: list[float]

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The pairs, and the tokens of their replies; chosen ones are the first half of a batch."""
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        tokens: dict[Over, float] = {"chosen tokens": chosen.sum().item(), "rejected tokens": rejected.sum().item()}
        return {"rows": len(chosen), "tokens": sum(tokens.values()), **tokens}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, each of its terms weighed by what it is over; see `Resumable.weight`."""
        usual = self.loss_weights
        losses: list[str] = self.loss_types
        if self.model.training or ON_CHOSEN in losses:
            weights = [self.weight(inputs, "chosen tokens" if loss == ON_CHOSEN else "rows") for loss in losses]
            # In evaluation, the loss is over rows.
            rows = 1.0 if self.model.training else self.weight(inputs, "rows") or 1.0
            self.loss_weights = [one * weight / rows for one, weight in zip(usual, weights, strict=True)]
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = usual

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """See `Resumable.evaluation_loop`."""
        if ON_CHOSEN in self.loss_types:
            with torch.random.fork_rng():  # a pass over the batches draws a number
                self.weigh_against(dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, _name: str, _batch_size: int) -> Dataset:
        """See `add_reference`; TRL's reference is not whole yet, and its cache does not know `max_length`."""
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Resumable.train`."""
        if self.args.precompute_ref_log_probs:
            self.add_reference()
        return super().train(*args, **kwargs)

    def add_reference(self) -> None:
        """Have what the reference, adapter `ref`, says of all pairs; a stage that is resumed finds it in a file."""
        file = Path(self.args.output_dir) / "reference.safetensors"
        datasets = {"train": self.train_dataset, "eval": self.eval_dataset}
        known = load_file(file) if ranks.gathered(file.is_file())[0] else {}
        if not known:
            with sharded.computing(self.model, self.accelerator):
                known = {name: self._reference_log_probs(rows) for name, rows in datasets.items() if rows is not None}
            if ranks.is_first():
                durable.write_bytes(file, save(known))
        for name, (chosen, rejected) in known.items():
            rows = datasets[name].add_column("ref_chosen_logps", chosen.tolist())
            setattr(self, f"{name}_dataset", rows.add_column("ref_rejected_logps", rejected.tolist()))

    def _reference_log_probs(self, dataset: Dataset) -> Tensor:
        """The log-probabilities of all chosen and all rejected replies under the reference, float32 `[2, pairs]`."""
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        own = range(len(dataset))[ranks.share(len(dataset))]
        self.model.eval()
        found = [torch.empty(2, 0)]
        for some in batched(own, size):
            batch = self.data_collator([dataset[row] for row in some or (0,)])
            said = torch.stack(self.compute_ref_log_probs(self.model, self._prepare_inputs(batch)))
            found.append(said[:, : len(some)].float().cpu())
        return torch.cat(ranks.gathered(torch.cat(found, dim=1)), dim=1)

    def _prepare_dataset(self, dataset: Dataset, _tokenizer: Any, args: DPOConfig, _name: str) -> Dataset:
        return with_room_for_replies(dataset, args.max_length) if args.truncation_mode == "keep_start" else dataset


TRAINER = EncodedDPOTrainer


def batched(own: range, size: int) -> list[range]:
    """Rows of this rank in batches, of which all ranks have as many: with a divided model, none can do without another.

    The last ones may be empty.
    """
    most = max(ranks.gathered(len(own)))
    return [own[start : start + size] for start in range(0, most, size)]


def prepare(job: Job) -> Inputs:
    """See `sft.prepare`."""
    args = job.trainer_config(CONFIG)
    data = job.reader.read(read, job.stage.data)
    job.require_eval_data(args, data.held_out)
    return Inputs(args, job.reader.tokenizer, data)


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Resumes from the last checkpoint.

    The adapter is loaded under the name `default`, of which TRL makes a frozen copy, `ref`: the reference is what the
    stage starts from, not the bare base, unless the recipe names another one.
    """
    job.progress.tell("loading")
    args, tokenizer, data, _ = prepare(job)
    set_seed(job.recipe.seed)
    whole = args.precompute_ref_log_probs and not divided.by_zero_3()  # which divides it before; see `add_reference`
    base = load_base(job.recipe.model, tokenizer, to_divide=True, computes_whole=whole)
    model = adapters.with_policy_adapter(base, job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = EncodedDPOTrainer.over(model, args, tokenizer, data.train, data.held_out, callbacks)
    if job.stage.reference is not None:
        trainer.refer_to(job.reference)
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if data.held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    dropped = len(data.train) - len(trainer.train_dataset)
    metrics = final(trainer.state.log_history) | {"dropped_pairs": dropped}
    return (job.trained(metrics) if ranks.is_first() else {}) | judge_policy(job, model, tokenizer)
