"""What TRL's SFT, reward, DPO and KTO trainers lack to be stopped anywhere and resumed to the same end."""

import contextlib
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from rlhf_pipeline import ranks
from rlhf_pipeline.kinds import Kind, Over
from rlhf_pipeline.models import adapters, divided
from rlhf_pipeline.models.adapters import DivergedError
from rlhf_pipeline.models.base import remove_dropout
from rlhf_pipeline.ppo.checkpoint import Kept, random_states
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.shares import standard_error
from rlhf_pipeline.stages import sharded
from rlhf_pipeline.stages.batches import WithSpare, is_spare, share_out

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

    Several ranks train as one process with a batch as large as all of theirs: on the same rows in the same order, each
    once, with the same weights, logging the same numbers. Only dropout draws otherwise. A checkpoint holds what each
    rank needs; another number of ranks, too, resumes from it on the rows that are left, with new random numbers.

    Attributes:
        neighbours: its collator gets the row before a rank's first one, too; see `batches.Shares`.
        group: so many rows in a row are evaluated together.
        gathers: in training, TRL's own numbers are of all ranks, and need no weights: batches are of one size on all.
    """

    kind: Kind
    control: TrainerControl
    watch: Kept | None = None
    neighbours = False
    group = 1
    gathers = False
    accelerator: Any
    data_collator: Any
    _total_train_tokens: float

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
        if ranks.count() > 1:  # DDP would send all of the base to all ranks, which have read it themselves
            own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            others = [name for of in (model.named_parameters(), model.named_buffers()) for name, _ in of]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*others} - own)
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
        self._last_step: tuple[float | None, float | None] = None, None  # its gradient's norm, and its learning rate
        self._epoch_ended_at, self._ended_after_resuming = -1, False
        self._epoch_start = torch.get_rng_state()
        self._draws_alike = False  # this rank has the random state of the first one
        self._usual: dict[Over, float] = {}  # what a batch is over on average, among those that it is weighed against
        self._parts: dict[str, list[tuple[float, float]]] = defaultdict(list)  # the numbers of an unfinished step
        self._tokens, self._diverged = 0.0, None  # of the same: what this rank read, and a loss that is not finite
        self.add_callback(_Remember(self))

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> DataLoader:
        """Batches of rows; of several ranks each gets its share of a batch that is as large as all of theirs."""
        if ranks.count() == 1:
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        training = dataset is self.train_dataset
        group = 1 if training else self.group
        collate, self.data_collator = self.data_collator, WithSpare(self.data_collator, dataset[0], group)
        try:
            loader = super()._get_dataloader(dataset, description, batch_size * ranks.count(), *args, **kwargs)
        finally:
            self.data_collator = collate
        share_out(loader, group, self.neighbours and training)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= ranks.count()  # rows of like length are to be in one batch of all ranks
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches that one optimizer step is divided into; see `weight`."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._draws_alike:  # the order is drawn: what follows, as dropout, is each rank's own
            self._draws_alike = False
            if not ranks.is_first():
                self._draw_anew(self.state.global_step)
        self.weigh_against(batches)
        return batches, items

    def weigh_against(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Let `weight` be that of a batch among these, and those of the other ranks."""
        own = [self._counts(batch) for batch in batches]
        counts = [one for some in ranks.gathered(own) for one in some]
        names = counts[0] if counts else ()
        self._usual = {over: sum(one[over] for one in counts) / len(counts) for over in names}

    def _counts(self, inputs: Mapping[str, torch.Tensor]) -> dict[Over, float]:
        counts = self.counts(inputs)
        return dict.fromkeys(counts, 0) if is_spare(inputs) else counts

    def weight(self, inputs: Mapping[str, torch.Tensor], over: Over) -> float:
        """What a mean over a batch must be multiplied by for the mean of such batches to be that over all of them.

        TRL gives every batch of an optimizer step the same weight, however many rows or tokens it has.
        """
        usual = self._usual.get(over)
        return self._counts(inputs)[over] / usual if usual else 1.0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            DivergedError: its loss is not finite. Transformers would log the mean of the earlier losses in its place.
        """
        counts, means, tokens = self._counts(inputs), self._metrics["train"], self._total_train_tokens
        before = {name: len(values) for name, values in means.items()}
        with contextlib.nullcontext() if self.gathers else self._alone():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._tokens += 0 if is_spare(inputs) else self._total_train_tokens - tokens
        self._total_train_tokens = tokens if is_spare(inputs) else self._total_train_tokens
        if not torch.isfinite(loss) and self._diverged is None:
            self._diverged = loss.item()
        for name, part in self._new(means, before, counts, inputs).items():
            means[name].pop()
            self._parts[name].append(part)
        if self.accelerator.sync_gradients:  # the last part of the step
            self._end_step(means)
        return loss

    def _new(
        self,
        means: Mapping[str, list[float]],
        before: Mapping[str, int],
        counts: Mapping[Over, float],
        inputs: Mapping[str, torch.Tensor],
    ) -> dict[str, tuple[float, float]]:
        """The numbers that a batch has added, each with what it is over; of a spare one all are over nothing."""
        found = {name: values[-1] for name, values in means.items() if len(values) > before.get(name, 0)}
        over = {name: self.kind.batch_metrics.get(name, "rows") for name in found}
        spare = is_spare(inputs)
        return {
            name: (value, 0 if spare else counts.get(over[name], 1))
            for name, value in found.items()
            if over[name] != "last"  # there is but one value of those, and it is up to date
        }

    def _end_step(self, means: dict[str, list[float]]) -> None:
        """Weigh the numbers of a step over its parts and all ranks, which also tell each other how they are."""
        parts, self._parts = dict(self._parts), defaultdict(list)
        of_ranks = ranks.gathered((parts, self._tokens, self._diverged))
        for name in dict.fromkeys(name for parts, *_ in of_ranks for name in parts):
            everywhere = [part for parts, *_ in of_ranks for part in parts.get(name, [])]
            means[name].append(_over_all(self.kind.batch_metrics.get(name, "rows"), everywhere))
        if not self.gathers:
            self._total_train_tokens += sum(tokens for _, tokens, _ in of_ranks) - self._tokens
            if "num_tokens" in means:
                means["num_tokens"] = [self._total_train_tokens]
        self._tokens = 0.0
        for rank, (*_, diverged) in enumerate(of_ranks):
            if diverged is not None:
                where = f" on rank {rank}" if len(of_ranks) > 1 else ""
                raise DivergedError(f"the loss became {diverged} at step {self.state.global_step + 1}{where}")

    @contextlib.contextmanager
    def _alone(self, **seen: int) -> Iterator[None]:
        """Have TRL compute a batch's numbers of this rank's rows, which it else gathers without their weights.

        Args:
            seen: what else it shall take for true of this process.
        """
        if ranks.count() == 1:
            yield
            return
        accelerator = self.accelerator
        self.accelerator = _Alone(accelerator, seen)
        try:
            yield
        finally:
            self.accelerator = accelerator

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on one batch, and keep its numbers with what they are over."""
        counts, means = self._counts(inputs), self._metrics["eval"]
        before = {name: len(values) for name, values in means.items()}
        of_all, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            with self._alone(process_index=0, num_processes=1):
                loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = of_all
        over = 0 if is_spare(inputs) else counts.get(self.kind.batch_metrics.get("loss", "rows"), 1)
        new = self._new(means, before, counts, inputs)
        for name, part in ({"loss": (loss.item(), over)} | new).items():
            self._evaluated[name].append(part)
        # Transformers gathers the rest, which nothing reads, as if all ranks had batches of one size.
        return (loss, *rest) if ranks.count() == 1 else (loss, None, None)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on all batches. The standard error of the accuracy is that of a share of so many pairs."""
        self._evaluated: dict[str, list[tuple[float, float]]] = defaultdict(list)
        output = super().evaluation_loop(*args, **kwargs)
        of_ranks = ranks.gathered(dict(self._evaluated))
        names = dict.fromkeys(name for one in of_ranks for name in one)
        evaluated = {name: [part for one in of_ranks for part in one.get(name, [])] for name in names}
        numbers = {
            name: _over_all(self.kind.batch_metrics.get(name, "rows"), batches) for name, batches in evaluated.items()
        }
        output.metrics["eval_loss"] = numbers.pop("loss")
        self._metrics["eval"].update({name: [value] for name, value in numbers.items()})
        if self.kind.accuracy:
            pairs = int(sum(count for _, count in evaluated["loss"]))
            error = standard_error(round(numbers[self.kind.accuracy] * pairs), pairs)
            output.metrics.update({"eval_pairs": pairs, f"eval_{self.kind.accuracy}_se": error})
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tr_loss = self._running_loss()  # Transformers would add that of one rank
        return super()._finalize_training(*args, **kwargs)

    def _running_loss(self) -> torch.Tensor:
        """The sum of the losses since the last step that was logged, the mean over ranks."""
        return ranks.total(self._tr_loss) / ranks.count()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, on the first rank, of what all have; the others wait for it."""
        self.store_flos()
        self._held = self._to_hold()
        if ranks.is_first():
            work, step = Path(self.args.output_dir), self.state.global_step
            durable.write_checkpoint(work, step, self._write_checkpoint, self.args.save_total_limit)
        ranks.any_of(False)

    def _to_hold(self) -> dict[str, Any]:
        """What a checkpoint holds of all ranks; each takes part in collecting it."""
        return {
            "deepspeed": self._of_deepspeed() if self.is_deepspeed_enabled else None,
            "weights": adapters.whole_weights(self.model, "default"),
            "optimizer": sharded.optimizer_state(self.model, self.optimizer) if self.is_fsdp_enabled else None,
            "running_loss": self._running_loss().item(),
            "random": random_states(self),
        }

    def _of_deepspeed(self) -> Path:
        """A folder in which all ranks have put what DeepSpeed knows, which writes a part on each."""
        folder = Path(self.args.output_dir) / ".new-deepspeed"
        if ranks.is_first():
            shutil.rmtree(folder, ignore_errors=True)
        ranks.any_of(False)
        self._save_optimizer_and_scheduler(str(folder))
        ranks.any_of(False)
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        adapters.write_weights(self._held["weights"], self.model, "default", folder)
        if self.is_fsdp_enabled:
            torch.save(self._held["optimizer"], folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        elif self.is_deepspeed_enabled:
            shutil.copytree(self._held["deepspeed"], folder, dirs_exist_ok=True, copy_function=shutil.move)
            shutil.rmtree(self._held["deepspeed"])
        else:
            self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        for name, content in self._held["random"].items():
            (folder / name).write_bytes(content)
        torch.save(self._epoch_start, folder / EPOCH_START)
        self.state.save_to_json(str(folder / durable.STATE))
        memory = {
            "running_loss": self._held["running_loss"],
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "means": {mode: dict(values) for mode, values in self._metrics.items()},
            "train_tokens": self._total_train_tokens,
            "training": self.model.training,  # what is logged at the end depends on whether evaluation came last
            "last_step": self._last_step,
            "epoch_ended": self._epoch_ended_at == self.state.global_step,
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
                if self.is_deepspeed_enabled:  # which restores the weights itself, from files of its own
                    self._load_memory(self._checkpoint)
        if divided.by_zero_3():
            sharded.divide_by_zero_3(self.model, self.accelerator)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with durable.taking_up(folder):
            adapters.restore(self.model, "default", folder)
            self._load_memory(folder)

    def _load_memory(self, folder: Path) -> None:
        self._memory = json.loads((folder / MEMORY).read_text())
        if self.watch is not None:
            self.watch.read(folder)
        self.args.eval_on_start = False  # that was then

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with durable.taking_up(checkpoint or ""):
            if checkpoint and self.is_fsdp_enabled:
                folder = Path(checkpoint)
                state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
                sharded.load_optimizer_state(self.model, self.optimizer, state)
                self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with durable.taking_up(checkpoint or ""):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint and not (Path(checkpoint) / self._random_file()).is_file():  # it is of fewer ranks, or of one
            self._draw_anew(durable.step(Path(checkpoint)))
            return
        with durable.taking_up(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _draw_anew(self, step: int) -> None:
        """Begin random numbers that follow from the seed, a step and this rank."""
        drawn = np.random.SeedSequence((self.args.seed, step, ranks.index())).generate_state(1)[0]
        set_seed(int(drawn))

    def _random_file(self) -> str:
        return f"rng_state_{ranks.index()}.pth" if ranks.count() > 1 else "rng_state.pth"

    def recall(self) -> None:
        """Take up the sums where the checkpoint left them; Transformers has just set them to zero."""
        if self._memory is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # Transformers takes over how often it was done then
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
        self._last_step = memory.get("last_step", self._last_step)
        at_end = float(self.state.epoch or 0.0).is_integer() or self.state.global_step >= self.state.max_steps
        if at_end and not memory.get("epoch_ended", True):
            self._end_epoch()

    def _end_epoch(self) -> None:
        """Log, evaluate and save as the end of an epoch wants it, of which the checkpoint has the last step alone."""
        self._load_rng_state(str(self._checkpoint))
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        norm, rate = self._last_step
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, self.model, None, self.state.epoch or 0.0, None, time.time(), learning_rate=rate
        )
        self._ended_after_resuming = True

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None
    ) -> None:
        self._last_step = None if grad_norm is None else float(grad_norm), learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate)

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
        elif resumed is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            # Transformers would do this too late for what follows.
            if not self._ended_after_resuming:  # else what that has drawn counts
                self._load_rng_state(resumed)
            kwargs["resume_from_checkpoint"] = None
        if ranks.count() > 1 and not self.gathers:  # those have an order of their own, and each rank its numbers
            torch.set_rng_state(ranks.gathered(torch.get_rng_state())[0])  # one order of rows
            self._draws_alike = True
        self._epoch_start = torch.get_rng_state()
        super()._run_epoch(*args, **kwargs)


def _over_all(over: Over, batches: list[tuple[float, float]]) -> float:
    """One number of all batches, from each one's and what that is over."""
    counted = [(value, count) for value, count in batches if count]  # over nothing, it may be no number
    if over in ("least", "most"):
        values = [value for value, _ in counted]
        return min(values) if over == "least" else max(values)
    whole = sum(count for _, count in counted)
    return sum(value * count for value, count in counted) / whole if whole else 0.0


class _Alone:
    """Accelerate's object for a process that computes alone."""

    def __init__(self, accelerator: Any, seen: Mapping[str, int]) -> None:
        self._accelerator, self._seen = accelerator, seen

    def __getattr__(self, name: str) -> Any:
        return self._seen[name] if name in self._seen else getattr(self._accelerator, name)

    def gather(self, values: Any, *_: Any, **__: Any) -> Any:
        return values

    gather_for_metrics = reduce = gather


class _Remember(TrainerCallback):
    """Tells the trainer when it may take up its sums, after they were set to zero; and when an epoch has ended."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.recall()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._epoch_ended_at = state.global_step
