"""What TRL's SFT, reward, DPO and KTO trainers lack to be stopped anywhere and resumed to the same end."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf_pipeline.kinds import Kind, Over
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.adapters import DivergedError
from rlhf_pipeline.models.base import remove_dropout
from rlhf_pipeline.ppo.checkpoint import Kept
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.shares import standard_error

REFERENCE = "ref"  # what TRL calls the adapter that it compares with
MEMORY = "memory.json"
EPOCH_START = "epoch_start.pt"


def with_room_for_replies(dataset: Dataset, max_length: int | None) -> Dataset:
    """Rows without those, as in TRL, whose prompt alone fills `max_length`: no token of their replies would be left."""
    if max_length is None:
        return dataset
    return dataset.filter(lambda ids: [len(one) < max_length for one in ids], batched=True, input_columns="prompt_ids")


class Resumable(Trainer):
    """A base class to put before a TRL trainer: exact checkpoints, numbers over rows, and an end to training on NaN.

    Transformers writes a checkpoint file by file into its final place, forgets the sums behind the next logged means
    and behind `train_loss`, and draws a new order when it resumes within an epoch. Here a checkpoint is there
    whole or not at all, and training that resumes from it computes and logs what it would have without a break. The
    adapter `default` lies in it as PEFT would load it.

    What TRL and Transformers call a number of an evaluation is the mean of its batches, of which the last may be
    smaller. Here it is over all held-out rows, or tokens, as `Kind.batch_metrics` says. In training it is over those of
    a whole optimizer step, however `gradient_accumulation_steps` divides it; the mean of such steps is logged.
    """

    kind: Kind
    watch: Kept | None = None

    @classmethod
    def over(
        cls,
        model: PeftModel,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        held_out: Dataset | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Self:
        """The trainer of a model with an adapter `default`, from encoded rows.

        Where TRL compares with a frozen copy of that, `ref`, it is whole: TRL's own leaves out what is not named
        `.default.` within.
        """
        if getattr(args, "disable_dropout", False):
            remove_dropout(model)  # TRL leaves the dropout that models pass to functions
        with adapters.exact_adapters(model):
            trainer = cls(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
        if REFERENCE in model.peft_config:
            adapters.copy_adapter(model, "default", REFERENCE)
        return trainer

    def refer_to(self, artifact: Path | None) -> None:
        """Compare with another adapter than the one that training starts from; with the bare base for None.

        Raises:
            ValueError: the adapter has no room in one of the policy's shape.
        """
        adapters.replace_weights(self.model, REFERENCE, artifact)

    def counts(self, inputs: Mapping[str, torch.Tensor]) -> dict[Over, float]:
        """How many rows or tokens the numbers of a batch are over."""
        raise NotImplementedError

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoint = Path()
        self._memory: dict[str, Any] | None = None
        self._epoch_start = torch.get_rng_state()
        self._usual: dict[Over, float] = {}  # what a batch is over on average, among those that it is weighed against
        self._parts: dict[str, list[tuple[float, float]]] = defaultdict(list)  # the numbers of an unfinished step
        self.add_callback(_Remember(self))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches that one optimizer step is divided into; see `weight`."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.weigh_against(batches)
        return batches, items

    def weigh_against(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Let `weight` be that of a batch among these."""
        counts = [self.counts(batch) for batch in batches]
        names = counts[0] if counts else ()
        self._usual = {over: sum(one[over] for one in counts) / len(counts) for over in names}

    def weight(self, inputs: Mapping[str, torch.Tensor], over: Over) -> float:
        """What a mean over a batch must be multiplied by for the mean of such batches to be that over all of them.

        TRL gives every batch of an optimizer step the same weight, however many rows or tokens it has.
        """
        usual = self._usual.get(over)
        return self.counts(inputs)[over] / usual if usual else 1.0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            DivergedError: its loss is not finite. Transformers would log the mean of the earlier losses in its place.
        """
        counts, means = self.counts(inputs), self._metrics["train"]
        before = {name: len(values) for name, values in means.items()}
        loss = super().training_step(model, inputs, *args, **kwargs)
        for name, values in means.items():
            if len(values) > before.get(name, 0):
                self._parts[name].append((values.pop(), counts.get(self.kind.batch_metrics.get(name, "rows"), 1)))
        if self.accelerator.sync_gradients:  # the last part of the step
            for name, parts in self._parts.items():
                means[name].append(_over_all(self.kind.batch_metrics.get(name, "rows"), parts))
            self._parts.clear()
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss became {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on one batch, and keep its numbers with what they are over."""
        counts, means = self.counts(inputs), self._metrics["eval"]
        before = {name: len(values) for name, values in means.items()}
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        new = {name: values[-1] for name, values in means.items() if len(values) > before.get(name, 0)}
        for name, value in ({"loss": loss.item()} | new).items():
            over = self.kind.batch_metrics.get(name, "rows")
            self._evaluated[name].append((value, counts.get(over, 1)))
        return loss, *rest

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on all batches. The standard error of the accuracy is that of a share of so many pairs."""
        self._evaluated: dict[str, list[tuple[float, float]]] = defaultdict(list)
        output = super().evaluation_loop(*args, **kwargs)
        numbers = {
            name: _over_all(self.kind.batch_metrics.get(name, "rows"), batches)
            for name, batches in self._evaluated.items()
        }
        output.metrics["eval_loss"] = numbers.pop("loss")
        self._metrics["eval"].update({name: [value] for name, value in numbers.items()})
        if self.kind.accuracy:
            pairs = int(sum(count for _, count in self._evaluated["loss"]))
            error = standard_error(round(numbers[self.kind.accuracy] * pairs), pairs)
            output.metrics.update({"eval_pairs": pairs, f"eval_{self.kind.accuracy}_se": error})
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        durable.write_checkpoint(
            Path(self.args.output_dir), self.state.global_step, self._write_checkpoint, self.args.save_total_limit
        )

    def _write_checkpoint(self, folder: Path) -> None:
        adapters.save_weights(self.model, "default", folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        torch.save(self._epoch_start, folder / EPOCH_START)
        self.store_flos()
        self.state.save_to_json(str(folder / durable.STATE))
        memory = {
            "running_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "means": {mode: dict(values) for mode, values in self._metrics.items()},
            "train_tokens": self._total_train_tokens,
            "training": self.model.training,  # what is logged at the end depends on whether evaluation came last
        }
        (folder / MEMORY).write_text(json.dumps(memory))
        if self.watch is not None:
            self.watch.write(folder)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            CheckpointError: what it shall resume from cannot be read, or is of something else.
        """
        if resume_from_checkpoint:
            self._checkpoint = Path(resume_from_checkpoint)
            with durable.taking_up(self._checkpoint):
                durable.check_state(self._checkpoint)
                TrainerState.load_from_json(str(self._checkpoint / durable.STATE))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with durable.taking_up(folder):
            adapters.restore(self.model, "default", folder)
            self._memory = json.loads((folder / MEMORY).read_text())
            if self.watch is not None:
                self.watch.read(folder)
        self.args.eval_on_start = False  # that was then

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with durable.taking_up(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with durable.taking_up(checkpoint or ""):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with durable.taking_up(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def recall(self) -> None:
        """Take up the sums where the checkpoint left them; Transformers has just set them to zero."""
        if self._memory is None:
            return
        memory, self._memory = self._memory, None
        with durable.taking_up(self._checkpoint):
            self._take_up(memory)

    def _take_up(self, memory: dict[str, Any]) -> None:
        self._tr_loss += memory["running_loss"]
        self._total_loss_scalar = memory["total_loss"]
        self._globalstep_last_logged = memory["last_logged"]
        self._initial_global_step = 0  # `train_loss` is the mean over all steps, not over those since the break
        for mode, values in memory["means"].items():
            self._metrics[mode].update(values)
        self._total_train_tokens = memory["train_tokens"]
        self.model.train(memory["training"])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return  # from the last checkpoint of all, Transformers would train beyond the end
        resumed = kwargs["resume_from_checkpoint"]
        within = kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["steps_trained_in_current_epoch"]
        if resumed is not None and within:
            # Some samplers draw their order from the global generator when an epoch begins. Transformers restores the
            # generator's later state itself, once it has skipped what was trained on.
            with durable.taking_up(resumed):
                torch.set_rng_state(torch.load(Path(resumed) / EPOCH_START, weights_only=True))
        self._epoch_start = torch.get_rng_state()
        super()._run_epoch(*args, **kwargs)


def _over_all(over: Over, batches: list[tuple[float, float]]) -> float:
    """One number of all batches, from each one's and what that is over."""
    values = [value for value, _ in batches]
    if over in ("least", "most", "last"):
        return {"least": min(values), "most": max(values), "last": values[-1]}[over]
    whole = sum(count for _, count in batches)
    return sum(value * count for value, count in batches) / whole if whole else 0.0


class _Remember(TrainerCallback):
    """Tells the trainer when it may take up its sums: after they were set to zero, before the first step."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.recall()
