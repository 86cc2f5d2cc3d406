"""What GRPO and RLOO share: several replies to each prompt, compared with each other, by TRL's trainers on one base."""

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from rlhf_pipeline import ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final, keep_until
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base, remove_dropout
from rlhf_pipeline.models.reply_end import as_eos_token_id, stop_tokens
from rlhf_pipeline.models.roles import PolicyView, Roles
from rlhf_pipeline.ppo import numbers
from rlhf_pipeline.ppo.advantages import kl_per_token
from rlhf_pipeline.ppo.forward import reply_log_probs
from rlhf_pipeline.ppo.numbers import Reward as Scorer
from rlhf_pipeline.ppo.numbers import Scored, Scores
from rlhf_pipeline.ppo.rollout import Engine, Episodes, concatenate, diversity, sample
from rlhf_pipeline.recipe.library_keys import keys
from rlhf_pipeline.recipe.schema import Reward
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import METRICS, SAMPLES
from rlhf_pipeline.stages import engine, soundness
from rlhf_pipeline.stages.evaluate import judge_policy
from rlhf_pipeline.stages.job import Config, Inputs, Job
from rlhf_pipeline.stages.resumable import REFERENCE, Resumable
from rlhf_pipeline.stages.watch import watch

ROLLOUTS = "rollouts.pt"
SAMPLED_LOG_PROBS = "sampled_log_probs"  # those of `Episodes`, in a batch of TRL's
TIMES_SAMPLED = 10  # how often some replies are written down in the course of training
ENTROPY_CONTROL = ("entropy_coef", "_last_world_entropy")  # of TRL's GRPOTrainer


def prepare(job: Job, config: type[Config]) -> Inputs:
    """See `sft.prepare`.

    Args:
        job: the stage.
        config: TRL's class for its settings.
    """
    check_groups(job)
    args: Any = job.trainer_config(config)
    data = job.reader.read(rows.prompts_with_rows if job.reads_rows else rows.prompts, job.stage.data)
    job.require_eval_data(args, data.held_out)
    # Unless the recipe says how many replies all processes sample, TRL's number is of those that are here.
    of_all = args.generation_batch_size // ranks.count() * job.recipe.processes(job.name)
    replies = job.stage.trainer.get("generation_batch_size") or of_all
    batch = replies // args.num_generations
    if len(data.train) < batch:
        raise InputError(
            f"{len(data.train)} prompts are fewer than the {batch} of one batch, which has "
            f"{replies} replies in groups of {args.num_generations}",
            place=f"stages.{job.name}",
            hint="give more prompts, raise `num_generations`, or lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`",
        )
    for prompts in (data.train, data.held_out):
        if prompts is not None and pc.min(pc.list_value_length(prompts.data.column("input_ids"))).as_py() == 0:
            raise InputError(
                "a prompt is empty: a reply needs at least one token to follow", place=f"stages.{job.name}"
            )
    return Inputs(args, job.reader.tokenizer, data)


def check_groups(job: Job) -> None:
    """See that batches are made of whole groups. TRL says so of numbers that a recipe need not have.

    Raises:
        InputError: they are not.
    """
    defaults, given = {name: key.default for name, key in keys(job.stage.kind).items()}, job.stage.trainer
    settings = defaults | {name: value for name, value in given.items() if value is not None}
    if "max_completion_length" in given and given["max_completion_length"] is None:
        place = f"stages.{job.name}.trainer.max_completion_length"
        raise InputError("a reply that is sampled needs a limit", place=place, hint="give a number of tokens")
    size, group = settings["num_generations"], settings["num_generations_eval"] or settings["num_generations"]
    steps = settings["steps_per_generation"] or settings["gradient_accumulation_steps"]
    replies = settings["generation_batch_size"] or settings["per_device_train_batch_size"] * steps
    makes = "`per_device_train_batch_size` times `steps_per_generation`, or else `gradient_accumulation_steps`,"
    batches = [("num_generations", size, replies, makes)]
    if job.stage.data.holds_out:
        name = "num_generations_eval" if settings["num_generations_eval"] else "num_generations"
        batches.append((name, group, settings["per_device_eval_batch_size"], "`per_device_eval_batch_size`"))
    for name, group, count, makes in batches:
        if count % group:
            raise InputError(
                f"a batch of {count} replies cannot be divided into groups of {group}",
                place=f"stages.{job.name}.trainer.{name}",
                hint=f"make {makes} a multiple of {group}",
            )


def run(job: Job, config: type[Config], trainer_class: type["GroupTrainer"]) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Resumes from the last checkpoint.

    The reference is what the stage starts from, as in `dpo.run`.

    Args:
        job: the stage.
        config: see `prepare`.
        trainer_class: that of its kind.
    """
    job.progress.tell("loading")
    inputs = prepare(job, config)
    args, tokenizer, data, _ = inputs
    set_seed(job.recipe.seed)
    model = adapters.with_policy_adapter(load_base(job.recipe.model, tokenizer), job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = trainer_class.over(model, args, tokenizer, data.train, data.held_out, callbacks)
    if job.stage.reference is not None:
        trainer.refer_to(job.reference)
    for artifact, shape in job.reward_models:
        trainer.roles.add_reward(artifact, shape)
    rewards = mixture.load(job.recipe, job.name, trainer.roles.rewards, tokenizer)
    trainer.score_with(rewards, job.stage.scored_by)
    trainer.samples_file = job.folder / SAMPLES
    trainer.engine = engine.while_training(job, inputs, args.max_completion_length)
    some = data.train[: soundness.PROMPTS]["input_ids"]
    soundness.check_generation(trainer.policy, some, tokenizer.pad_token_id, f"stages.{job.name}", trainer.engine)
    watcher = watch(trainer, job, data.held_out)
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if data.held_out is not None:
        trainer.evaluate()
    if not ranks.is_first():
        return {}
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    metrics = job.trained(final(trainer.state.log_history) | (watcher.outcome if watcher else {}))
    return metrics | judge_policy(job, model, tokenizer, trainer.engine)


class GroupTrainer(Resumable):
    """A base class to put before TRL's GRPOTrainer or RLOOTrainer, whose advantages and losses stay TRL's.

    It samples, reads and scores as PPO does here:

    * Prompts are encoded rows. Replies are sampled by `ppo.rollout.sample`, with the same stop tokens, and everything
      reads the sampled tokens themselves: no text is decoded and encoded again.
    * Policy (`default`), reference (`ref`) and reward models are adapters on one base, and none has dropout.
    * Positions are counted from a prompt's first token. TRL fills prompts up on the left and leaves positions to the
      model, which counts the padding too, as generation does not: a model with learned positions would be trained on
      other log-probabilities than it samples with.
    * Every rollout is logged by PPO's names: `objective/scores`, `objective/kl`, `reply/length`, `reply/ended`,
      `reply/distinct_2`, `reply/unique`, and before the policy moves `rollout/log_prob_gap_mean` and `_max`. KL is that
      of a whole reply in nats, the mean of log π/π_ref, also where `beta` is 0, for one pass of the reference more.
    * A checkpoint between two steps of one batch of replies holds those replies.
    * The order of prompts follows from seed and epoch alone. TRL's follows from how many epochs a process has begun,
      so that one that resumes in a later epoch would see the first one's order.
    * Several ranks sample to the prompts of one process with a batch as large, each to whole groups with random numbers
      of its own. Another number of ranks that resumes amid a batch of
      replies samples new ones to the same prompts. TRL's `bnpo` takes its mean of each rank's tokens; here of all.
    """

    gathers = True

    roles: Roles
    rewards: Scorer
    policy: PolicyView
    reference: PolicyView
    samples_file: Path | None = None
    engine: Engine | None = None  # what samples, if not the policy itself

    @classmethod
    def over(
        cls,
        model: PeftModel,
        args: TrainingArguments,
        tokenizer: Any,
        train: Dataset,
        held_out: Dataset | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Self:
        """The trainer of a model with an adapter `default`, from rows of `input_ids`; it still needs `score_with`."""
        train = train.rename_column("input_ids", "prompt")
        held_out = None if held_out is None else held_out.rename_column("input_ids", "prompt")
        trainer = super().over(model, args, tokenizer, train, held_out, callbacks)
        if REFERENCE not in model.peft_config:  # TRL adds it where `beta` is not 0
            model.add_adapter(REFERENCE, model.peft_config["default"])
            adapters.copy_adapter(model, "default", REFERENCE)
        trainer.roles = Roles(model, {"policy": "default", "reference": REFERENCE})
        remove_dropout(model)
        trainer.group = trainer.num_generations_eval
        trainer.policy, trainer.reference = (PolicyView(trainer.roles, role) for role in ("policy", "reference"))
        return trainer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, reward_funcs=[_no_reward], **kwargs)
        base = self.model.get_base_model()
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._stop_token_id = as_eos_token_id(stop_tokens(self.processing_class, base.generation_config, {}))
        self._read: dict[str, Tensor] = {}  # log-probabilities of the last pass of each adapter
        self._evaluated_batches = 0

    def score_with(self, rewards: Scorer, listed: Sequence[Reward]) -> None:
        """Take the rewards that replies are scored with.

        Args:
            rewards: what scores them, as `rewards.mixture.Rewards`.
            listed: the same as the recipe has them, for TRL: names, and weights.
        """
        self.rewards = rewards
        self._weighed = [reward.label for reward in listed if reward.weight]
        self.reward_func_names = [reward.label for reward in listed]
        self.reward_funcs = self.reward_processing_classes = [_no_reward] * len(listed)
        self.reward_weights = torch.tensor([reward.weight for reward in listed], dtype=torch.float32)

    # Sampling, reading and scoring

    def roll_out(
        self,
        prompts: Sequence[Sequence[int]],
        temperature: float | None = None,
        response_length: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Episodes:
        """Sample a reply to each prompt, by default as training does; `seeds` as in `sample`."""
        with self.accelerator.autocast():
            return sample(
                self.policy,
                prompts,
                response_length=response_length or self.args.max_completion_length,
                temperature=self.args.temperature if temperature is None else temperature,
                stop_token_id=self._stop_token_id,
                pad_token_id=self.processing_class.pad_token_id,
                at_once=len(prompts),
                seeds=seeds,
                engine=self.engine,
            )

    @torch.no_grad()
    def score(
        self,
        episodes: Episodes,
        rows: Sequence[str] | None = None,
        temperature: float | None = None,
        scores: Scores | None = None,
    ) -> Scored:
        """Have policy and reference read the episodes, and the rewards unless their `scores` are known.

        See `PPOTrainer.score`; there are no values.
        """
        temperature = temperature or self.args.temperature
        log_probs, ref_log_probs = (torch.zeros_like(episodes.sampled_log_probs) for _ in range(2))
        for part in episodes.parts(self.args.per_device_eval_batch_size):
            some = episodes.select(part)
            columns = slice(some.mask.shape[1])
            with self.accelerator.autocast():
                log_probs[part, columns] = reply_log_probs(self.policy, some, temperature)[0]
                ref_log_probs[part, columns] = reply_log_probs(self.reference, some, temperature)[0]
        kl = kl_per_token(log_probs, ref_log_probs, "k1")
        return Scored(
            episodes, log_probs, ref_log_probs, torch.zeros_like(kl), scores or self._reward(episodes, rows), kl
        )

    @property
    def latest_kl(self) -> float:
        """The mean KL of a whole reply of the batch that was trained on last, in nats."""
        return float(self._metrics["train"]["objective/kl"][-1])

    def _reward(self, episodes: Episodes, rows: Sequence[str] | None) -> Scores:
        state, at_once = self.state, self.args.per_device_train_batch_size
        with torch.no_grad(), self.accelerator.autocast():
            return self.rewards(episodes, rows, at_once=at_once, step=state.global_step, max_steps=state.max_steps)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def sampled(self, prompts: list[list[int]]) -> list[list[int]]:
        """Sample replies and keep them; returns their tokens, each with its stop token."""
        self._read = {}
        self._episodes = episodes = self.roll_out(prompts)
        return episodes.tokens

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *_: Any) -> Tensor:
        """The rewards by name, float32 `[B, rewards]`, NaN where one does not apply; TRL weighs and sums them."""
        episodes, means = self._episodes, self._metrics["train" if self.model.training else "eval"]
        of_rows = [row["row"] for row in inputs] if "row" in inputs[0] else None
        self._scores = scores = self._reward(episodes, of_rows)
        by_name = torch.stack([scores.by_name[name] for name in self.reward_func_names], 1)
        applies = ~torch.stack([scores.by_name[name] for name in self._weighed], 1).isnan().all(1)
        by_name[~applies] = torch.nan  # TRL leaves those replies out to which no reward applies
        of_all = episodes
        if self.model.training:  # in evaluation, each rank has groups, and numbers, of its own
            of_all = concatenate(ranks.gathered(episodes.on("cpu")), 0)
            by_name, total, applies = (self._of_all(one) for one in (by_name, scores.total, applies))
        else:
            total = scores.total
        distinct_2, unique = diversity(of_all)
        numbers = {
            "objective/scores": total[applies].mean().item(),
            "reply/length": of_all.reply_lengths.float().mean().item(),
            "reply/ended": of_all.ended.float().mean().item(),
            "reply/distinct_2": distinct_2,
            "reply/unique": unique,
            **{f"rewards/{name}/disagreement": one.mean().item() for name, one in scores.disagreement.items()},
            **{f"rewards/{name}": value for name, value in scores.logged.items()},
        }
        for name, value in numbers.items():
            means[name].append(value)
        return by_name

    @staticmethod
    def _of_all(values: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        return torch.cat(ranks.gathered(values.cpu())).to(values.device) if ranks.count() > 1 else values

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        output = super()._generate_and_score_completions(inputs)
        reference = output.get("ref_per_token_logps", self._read.get(REFERENCE))
        if reference is None:
            ids, mask = (torch.cat([output[f"prompt_{of}"], output[f"completion_{of}"]], 1) for of in ("ids", "mask"))
            size = self.args.per_device_train_batch_size
            with torch.no_grad(), self.roles.acting_as("reference"):
                reference = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, output["completion_ids"].shape[1], batch_size=size
                )[0]
        output["ref_per_token_logps"] = reference
        output[SAMPLED_LOG_PROBS] = self._episodes.sampled_log_probs
        self._write_samples()
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with positions counted from a prompt's first token."""

        def numbered(attention_mask: Tensor, **inputs: Any) -> Any:
            if self._takes_positions:
                inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
            return model(attention_mask=attention_mask, **inputs)

        found = super()._get_per_token_logps_and_entropies(numbered, *args, **kwargs)
        self._read[self.model.active_adapter] = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        kl = (self._read["default"] - inputs["ref_per_token_logps"]) * mask
        read = mask.any(1).sum()  # all, unless those that were cut are left out
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["objective/kl"].append(self._mean(kl.sum(), read))
        if self._is_as_sampled and SAMPLED_LOG_PROBS in inputs:  # checkpoints of earlier versions hold none
            gap = (self._read["default"] - inputs[SAMPLED_LOG_PROBS]).abs() * mask
            metrics["rollout/log_prob_gap_mean"].append(self._mean(gap.sum(), mask.sum()))
            metrics["rollout/log_prob_gap_max"].append(gap.max().item())
        if self.model.training and getattr(self, "loss_type", None) == "bnpo" and ranks.count() > 1:
            loss = loss * mask.sum() * ranks.count() / ranks.total(mask.sum()).clamp(min=1)
        return loss

    def _mean(self, total: Tensor, count: Tensor) -> float:
        """The mean of a batch; in training, of those of all ranks."""
        both = torch.stack([total.float(), count.float()])
        total, count = ranks.total(both) if self.model.training else both
        return (total / count.clamp(min=1)).item()

    @property
    def _is_as_sampled(self) -> bool:
        """Whether the policy is still the one that the replies at hand were sampled from."""
        if not self.model.training:
            return True
        every = self.args.steps_per_generation * self.args.num_iterations
        return self._step % every < self.args.gradient_accumulation_steps

    # Rows, evaluation and what is written down

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The replies of a batch, before they are sampled."""
        return {"rows": len(inputs)}

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _ByEpoch(super()._get_train_sampler(dataset), seed)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the same random numbers every time, none of training's."""
        self._evaluated_batches = 0
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + ranks.index())
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with TRL's means since the last time; but what the judge says along the way by itself."""
        if any(name.startswith(("gold/", "watch/")) for name in logs):
            Trainer.log(self, logs)
        else:
            super().log(logs, *args, **kwargs)

    def _write_samples(self) -> None:
        """Write down the first replies: `TIMES_SAMPLED` times in training, and those of an evaluation's first batch.

        Not those of the evaluation at the end, which is repeated where a stage is resumed after its last step.
        """
        if self.samples_file is None or not self.is_in_train or not ranks.is_first():
            return
        step, split = self.state.global_step, "eval"
        if self.model.training:
            every = self.args.steps_per_generation * self.args.num_iterations
            rollouts = self.state.max_steps * self.args.gradient_accumulation_steps // every
            due = self._step // every % max(1, rollouts // TIMES_SAMPLED) == 0
            step, split = step + 1, "train"
        else:
            due, self._evaluated_batches = self._evaluated_batches == 0, self._evaluated_batches + 1
        if due:
            first = torch.arange(min(numbers.SAMPLES, len(self._episodes)), device=self.accelerator.device)
            some = self._episodes.select(first)
            scored = self.score(some, scores=self._scores.select(first))
            numbers.write_samples(self.samples_file, scored, some.ended, self.processing_class, split, step)

    # Checkpoints

    def _to_hold(self) -> dict[str, Any]:
        amid = self._step % (self.args.steps_per_generation * self.args.num_iterations)
        batches = self._buffered_inputs if amid else None
        own = batches and [{name: _on_cpu(value) for name, value in batch.items()} for batch in batches]
        return super()._to_hold() | {"replies": ranks.gathered(own)}

    def _write_checkpoint(self, folder: Path) -> None:
        super()._write_checkpoint(folder)
        control = {name: getattr(self, name) for name in ENTROPY_CONTROL if hasattr(self, name)}
        first, *others = self._held["replies"]
        held = {"passes": self._step, "replies": first, "of_other_ranks": others, "entropy": control}
        torch.save(held, folder / ROLLOUTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with durable.taking_up(resume_from_checkpoint):
            device = "cpu" if self.args.device.type == "cpu" else self.args.device  # with a number it is not known
            held = torch.load(Path(resume_from_checkpoint) / ROLLOUTS, map_location=device, weights_only=True)
            of_ranks = [held["replies"], *held.get("of_other_ranks", [])]
            self._step = held["passes"]
            self._buffered_inputs = of_ranks[ranks.index()] if len(of_ranks) == ranks.count() else None
            for name, value in held["entropy"].items():
                setattr(self, name, value)

    def recall(self) -> None:
        """See `Resumable.recall`; and drop the replies that were written down after the checkpoint."""
        if self.samples_file is not None and ranks.is_first():
            keep_until(self.samples_file, self.state.global_step)
        super().recall()


class _ByEpoch(Sampler):
    """A sampler of TRL's, in an order that follows from the seed and the epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of that epoch from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(random.Random(repr((self.seed, self.epoch))).getrandbits(63))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _no_reward(**_: Any) -> list[float]:
    """In a reward function's place: TRL wants one; `GroupTrainer` calculates the rewards."""
    raise NotImplementedError
