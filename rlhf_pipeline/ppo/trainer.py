"""PPO on one shared base: roll out, score, shape rewards, estimate advantages, optimise, report."""

import contextlib
import itertools
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, enable_full_determinism, set_seed
from transformers.trainer_utils import TrainOutput
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo.ppo_trainer import OnlineTrainerState

from rlhf_pipeline.callbacks.metrics import keep_until
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.roles import FROZEN, TRAINED, SharedBase
from rlhf_pipeline.ppo.advantages import (
    estimate_advantages,
    explained_variance,
    kl_per_token,
    masked_mean,
    shape_rewards,
    whiten,
)
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.control import KLControl, ScoreStatistics
from rlhf_pipeline.ppo.forward import demonstration_loss, reply_log_probs, reply_scores, reply_values
from rlhf_pipeline.ppo.rollout import Episodes, diversity, sample
from rlhf_pipeline.rundir import durable

SAMPLES = 4  # episodes that are written down at a time


@dataclass
class Scored:
    """Episodes and what the four roles say of them; tensors as in `advantages`.

    Attributes:
        log_probs, ref_log_probs, values: float32 `[B, T]`.
        scores: float32 `[B]`, the reward model's.
        kl: float32 `[B, T]`, from `kl_per_token`.
    """

    episodes: Episodes
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    kl: Tensor

    @property
    def mean_kl(self) -> float:
        """The mean over episodes of the KL of a whole reply, in nats."""
        return self.kl.sum(1).mean().item()


@dataclass
class Best:
    """The policy with the highest score within the KL budget.

    Attributes:
        step: how many updates it had.
        score, kl: means over the batch that it was measured on.
        weights: on the CPU.
    """

    step: int
    score: float
    kl: float
    weights: dict[str, Tensor]


class PPOTrainer(trl_ppo.PPOTrainer):
    """TRL's PPOTrainer with its training loop replaced; `docs/ppo.md` says what differs and why.

    Args:
        args: the settings.
        processing_class: the tokenizer; its padding side and pad token do not matter.
        shared: the base with its four roles.
        train_dataset: rows with `input_ids`, a prompt's token ids.
        eval_dataset: held-out prompts, for `eval_strategy`.
        ptx_dataset: demonstrations for `ptx_coef`, rows with `input_ids` and `labels`.
        callbacks: further callbacks; setting `control.should_training_stop` ends training.
        samples_file: where some prompts and replies are written, one JSON object a line.

    Raises:
        ValueError: settings and data that do not fit together, such as fewer prompts than one batch.
    """

    control: TrainerControl

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        shared: SharedBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        ptx_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        samples_file: Path | None = None,
    ) -> None:
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        check_data(args, train_dataset, eval_dataset, ptx_dataset)
        if args.max_steps > 0:
            args.total_episodes = args.max_steps * batch
        # TRL skips the base class's `__init__`, where this happens in every other trainer.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        self.shared = shared
        super().__init__(
            args=args,
            processing_class=processing_class,
            model=shared.policy,
            ref_model=shared.reference,
            reward_model=shared.reward,
            value_model=shared.value,
            train_dataset=train_dataset,
            callbacks=callbacks,
        )
        if args.gradient_checkpointing:
            shared.enable_gradient_checkpointing()
        self.eval_dataset = eval_dataset
        self.ptx_dataset = ptx_dataset
        self.samples_file = samples_file
        self.trained = {
            role: [parameter for parameter in getattr(shared, role).parameters() if parameter.requires_grad]
            for role in TRAINED
        }
        pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
        self.pad_token_id = pad if pad is not None else eos if eos is not None else 0
        self.kl_control = KLControl(args.kl_coef, args.target_kl, args.kl_horizon)
        self.score_statistics = ScoreStatistics()
        self.skipped_in_row = self.skipped_steps = 0
        self.best: Best | None = None
        self.unreported: list[dict[str, float]] = []

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe's `optim`, with the value model's own learning rate where it has one."""
        super().create_optimizer(model)
        value = {id(parameter) for parameter in self.value_model.parameters()}
        groups = []
        for group in self.optimizer.param_groups:
            for of_value, rate in ((False, self.args.learning_rate), (True, self.args.value_learning_rate)):
                own = [parameter for parameter in group["params"] if (id(parameter) in value) == of_value]
                if own:
                    groups.append({**group, "params": own, "lr": self.args.learning_rate if rate is None else rate})
        self.optimizer.param_groups[:] = groups
        return self.optimizer

    @property
    def trained_roles(self) -> set[str]:
        """The roles whose weights the settings let move."""
        args, roles = self.args, set()
        if args.learning_rate and args.value_warmup_updates < args.num_total_batches:
            roles.add("policy")
        if args.vf_coef and (args.learning_rate if args.value_learning_rate is None else args.value_learning_rate):
            roles.add("value")
        return roles

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: a checkpoint's path, or True for the latest in `output_dir`.

        Raises:
            ValueError: there is no such checkpoint, or it is of another reference or reward.
            RuntimeError: too many optimizer steps in a row had gradients that were not finite.
        """
        self._begin(durable.locate(self.args.output_dir, resume_from_checkpoint))
        within_budget = True
        while within_budget and self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            clock = [time.perf_counter()]
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            episodes = self.roll_out(self._prompts(self.state.global_step))
            clock.append(time.perf_counter())
            scored = self.score(episodes)
            within_budget = self._within_budget(scored)
            if within_budget:
                scores, rewards = self.shape(scored)
                advantages, returns = estimate_advantages(rewards, scored.values, self.args.gamma, self.args.lam)
                clock.append(time.perf_counter())
                losses = self.optimise(scored, whiten(advantages, episodes.mask), returns)
                clock.append(time.perf_counter())
                self.report(scored, scores, returns, losses, clock)
        if within_budget and self.args.kl_budget is not None:  # nothing has measured the last update yet
            self._within_budget(self.score(self.roll_out(self._prompts(self.state.global_step))))
        if self.unreported:
            self._log_means()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, {})

    def roll_out(
        self, prompts: list[list[int]], temperature: float | None = None, response_length: int | None = None
    ) -> Episodes:
        """Sample a reply to each prompt, by default as training does."""
        with self._precision():
            return sample(
                self.shared.policy,
                prompts,
                response_length=response_length or self.args.response_length,
                temperature=self.args.temperature if temperature is None else temperature,
                stop_token_id=self.stop_token_id,
                pad_token_id=self.pad_token_id,
                at_once=self.args.local_rollout_forward_batch_size,
            )

    @torch.no_grad()
    def score(self, episodes: Episodes, temperature: float | None = None) -> Scored:
        """Have the four roles read the episodes: log-probabilities, values and scores.

        The policy's log-probabilities come from the pass that optimisation uses, not from generation, whose cache
        makes them differ in low precision. So the first KL is 0, and the first ratio is 1 but for the rounding of a
        batch of another shape.

        Args:
            episodes: the episodes.
            temperature: that they were sampled with, if not training's.
        """
        shared, temperature = self.shared, temperature or self.args.temperature
        log_probs, ref_log_probs, values = (torch.zeros_like(episodes.sampled_log_probs) for _ in range(3))
        scores = torch.zeros_like(values[:, 0])
        for rows in episodes.by_length().split(self.args.local_rollout_forward_batch_size):
            some = episodes.select(rows)
            columns = slice(some.mask.shape[1])
            with self._precision():
                log_probs[rows, columns] = reply_log_probs(shared.policy, some, temperature)[0]
                ref_log_probs[rows, columns] = reply_log_probs(shared.reference, some, temperature)[0]
                values[rows, columns] = reply_values(shared.value, some)
                scores[rows] = reply_scores(shared.reward, some)
        kl = kl_per_token(log_probs, ref_log_probs, self.args.kl_estimator)
        return Scored(episodes, log_probs, ref_log_probs, values, scores, kl)

    def shape(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """The scores to train on, float32 `[B]`, and the reward of each token, float32 `[B, T]`."""
        args, scores = self.args, scored.scores
        if args.normalize_scores:
            self.score_statistics.update(scores)
            scores = self.score_statistics.normalize(scores)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        scores = self._penalize_missing_eos(scores, scored.episodes)
        rewards = shape_rewards(scores, scored.kl, self.kl_control.coefficient, scored.episodes.reply_lengths)
        if args.whiten_rewards:
            rewards = whiten(rewards, scored.episodes.mask, shift_mean=False)
        return scores, rewards

    def optimise(self, scored: Scored, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Make `num_ppo_epochs` passes over the episodes, one optimizer step per mini-batch.

        A mini-batch is read in parts of `per_device_train_batch_size`. Every token of a mini-batch weighs the same,
        however it is divided, so the size of the parts changes nothing but memory. The losses of policy and value
        share no weights; each has its backward pass before the other's forward pass, which halves the activations.

        Returns:
            Means over the tokens of all passes, by the names they are logged under.
        """
        args, batch = self.args, len(scored.episodes)
        train_policy = self.state.global_step >= args.value_warmup_updates
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=advantages.device))
        norms: dict[str, list[float]] = defaultdict(list)
        for epoch in range(args.num_ppo_epochs):
            order = self._permutation(batch, self.state.global_step, 1 + epoch).to(advantages.device)
            for number, mini_batch in enumerate(order.split(batch // args.num_mini_batches)):
                tokens = scored.episodes.reply_lengths[mini_batch].sum()
                for rows in scored.episodes.by_length(mini_batch).split(args.per_device_train_batch_size):
                    part = scored.episodes.select(rows)
                    columns = slice(part.mask.shape[1])
                    if train_policy:
                        old, advantage = scored.log_probs[rows, columns], advantages[rows, columns]
                        (self._policy_loss(part, old, advantage, sums) / tokens).backward()
                    old, target = scored.values[rows, columns], returns[rows, columns]
                    (args.vf_coef * self._value_loss(part, old, target, sums) / tokens).backward()
                if train_policy and self.ptx_dataset is not None:
                    self._learn_demonstrations(
                        self.ptx_dataset, len(mini_batch), epoch * args.num_mini_batches + number, sums
                    )
                for role, norm in self._step().items():
                    norms[role].append(norm)
        divided_by = {"loss/ptx": sums["ptx_steps"]}
        means = {name: (value / divided_by.get(name, sums["tokens"])).item() for name, value in sums.items()}
        means = {name: value for name, value in means.items() if name not in ("tokens", "ptx_steps")}
        if train_policy:
            means["val/ratio_var"] -= (means["val/ratio"] - 1) ** 2  # it was taken around 1
        return means | {f"{role}/grad_norm": sum(of_role) / len(of_role) for role, of_role in norms.items()}

    def _policy_loss(self, part: Episodes, old: Tensor, advantages: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """PPO's clipped objective, summed over tokens (Schulman et al. 2017, "PPO Algorithms", equation 7)."""
        args, mask = self.args, part.mask
        with self._precision():
            new, entropy = reply_log_probs(self.shared.policy, part, args.temperature)
        log_ratio = new - old
        if args.log_ratio_clamp is not None:
            log_ratio = log_ratio.clamp(-args.log_ratio_clamp, args.log_ratio_clamp)
        ratio = log_ratio.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
        loss = (torch.maximum(plain, clipped) * mask).sum()
        with torch.no_grad():
            sums["loss/policy_avg"] += loss
            sums["policy/clipfrac_avg"] += ((clipped > plain) & mask).sum()
            sums["policy/approxkl_avg"] += 0.5 * (log_ratio**2 * mask).sum()
            sums["policy/entropy_avg"] += entropy.sum()
            sums["val/ratio"] += (ratio * mask).sum()
            sums["val/ratio_var"] += ((ratio - 1) ** 2 * mask).sum()
        return loss

    def _value_loss(self, part: Episodes, old: Tensor, returns: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """Half the squared error, the worse of with and without clipping, summed over tokens."""
        clip, mask = self.args.cliprange_value, part.mask
        with self._precision():
            new = reply_values(self.shared.value, part)
        plain = (new - returns) ** 2
        clipped = (torch.maximum(torch.minimum(new, old + clip), old - clip) - returns) ** 2
        loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum()
        with torch.no_grad():
            sums["loss/value_avg"] += loss
            sums["val/clipfrac_avg"] += ((clipped > plain) & mask).sum()
            sums["tokens"] += mask.sum()
        return loss

    def _learn_demonstrations(self, dataset: Dataset, rows: int, number: int, sums: dict[str, Tensor]) -> None:
        """Add to the policy's gradient that of `ptx_coef` times the mean loss on as many demonstrations as episodes."""
        steps = self.args.num_ppo_epochs * self.args.num_mini_batches
        taken = (self.state.global_step * steps + number) * rows
        chosen = dataset.select(self._order(len(dataset), taken, rows, "ptx"))
        labelled = sum(label != -100 for labels in chosen["labels"] for label in labels[1:])
        device = self.accelerator.device
        for start in range(0, rows, self.args.per_device_train_batch_size):
            part = chosen[start : start + self.args.per_device_train_batch_size]
            ids = _padded(part["input_ids"], self.pad_token_id).to(device)
            with self._precision():
                labels = _padded(part["labels"], -100).to(device)
                loss = demonstration_loss(self.shared.policy, ids, labels) / labelled
            (self.args.ptx_coef * loss).backward()
            sums["loss/ptx"] += loss.detach()
        sums["ptx_steps"] += 1

    def _step(self) -> dict[str, float]:
        """Take one optimizer step, or skip it if a gradient is not finite; returns the norm of each role's gradient.

        Each role's gradient is clipped by itself: the value model's is often the larger by far, and would decide how
        far the policy moves.

        Raises:
            RuntimeError: `max_skipped_steps` were skipped in a row.
        """
        limit = self.args.max_grad_norm or math.inf
        norms = {
            role: torch.nn.utils.clip_grad_norm_(parameters, limit).item()
            for role, parameters in self.trained.items()
            if any(parameter.grad is not None for parameter in parameters)
        }
        if all(math.isfinite(norm) for norm in norms.values()):
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self.skipped_in_row += 1
            self.skipped_steps += 1
        self.optimizer.zero_grad()
        if self.skipped_in_row >= self.args.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_row} optimizer steps in a row had gradients that were not finite, the last at "
                f"update {self.state.global_step + 1}: lower `learning_rate`, set `log_ratio_clamp` or `score_clip`, "
                "and see whether the reward model's scores are finite"
            )
        return norms

    def report(
        self, scored: Scored, scores: Tensor, returns: Tensor, losses: dict[str, float], clock: list[float]
    ) -> None:
        """Count the update, and log, evaluate and save as the settings and callbacks want it.

        Args:
            scored: the update's episodes.
            scores: what they were trained on, float32 `[B]`.
            returns: the targets of the values, float32 `[B, T]`.
            losses: from `optimise`.
            clock: seconds at the start, after sampling, after scoring, and after optimising.
        """
        args, episodes, mask = self.args, scored.episodes, scored.episodes.mask
        sampling, scoring, optimising = (after - before for before, after in itertools.pairwise(clock))
        gap = (episodes.sampled_log_probs - scored.log_probs).abs() * mask
        distinct_2, unique = diversity(episodes)
        rates = self.lr_scheduler.get_last_lr()
        non_score_reward = -self.kl_control.coefficient * scored.mean_kl
        trained_tokens = args.num_ppo_epochs * int((episodes.prompt_lengths + episodes.reply_lengths).sum())
        self.unreported.append(
            {
                "eps": len(episodes) / (clock[-1] - clock[0]),
                "objective/kl": scored.mean_kl,
                "objective/kl_coef": self.kl_control.coefficient,
                "objective/entropy": (-scored.log_probs * mask).sum(1).mean().item(),
                "objective/non_score_reward": non_score_reward,
                "objective/rlhf_reward": non_score_reward + scores.mean().item(),
                "objective/scores": scores.mean().item(),
                "reward/score_mean": scored.scores.mean().item(),
                "reward/score_std": scored.scores.std(correction=0).item(),
                **losses,
                "value/explained_variance": explained_variance(scored.values, returns, mask).item(),
                "reply/length": episodes.reply_lengths.float().mean().item(),
                "reply/ended": self._ended(episodes).float().mean().item(),
                "reply/distinct_2": distinct_2,
                "reply/unique": unique,
                "val/num_eos_tokens": int(((episodes.replies == self.processing_class.eos_token_id) & mask).sum()),
                "rollout/log_prob_gap_mean": masked_mean(gap, mask).item(),
                "rollout/log_prob_gap_max": gap.max().item(),
                "rollout/seconds": sampling + scoring,
                "rollout/sampling_seconds": sampling,
                "rollout/tokens_per_second": int(mask.sum()) / (sampling + scoring),
                "optimise/seconds": optimising,
                "optimise/tokens_per_second": trained_tokens / optimising,
                "skipped_steps": self.skipped_steps,
                "lr": rates[0],
                "lr_value": rates[-1],
                "episode": self.state.episode + len(episodes),
            }
        )
        if args.num_sample_generations and self.state.global_step % self.sample_generations_freq == 0:
            self._write_samples(scored, "train", self.state.global_step + 1)
        self.kl_control.update(scored.mean_kl, len(episodes))
        passes = self.state.episode // self.train_dataset_len
        self.state.global_step += 1
        self.state.episode += len(episodes)
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.state.episode // self.train_dataset_len > passes:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        if self.control.should_log:
            self._log_means()
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    def _log_means(self) -> None:
        """Log the means over the updates since the last time; of what only counts or is set, the latest."""
        latest = {"objective/kl_coef", "skipped_steps", "lr", "lr_value", "episode"}
        means = {}
        for name in dict.fromkeys(name for numbers in self.unreported for name in numbers):
            values = [numbers[name] for numbers in self.unreported if name in numbers]
            means[name] = values[-1] if name in latest else sum(values) / len(values)
        self.unreported = []
        self.log(means)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample replies to held-out prompts and score them; the same random numbers every time, none of training's.

        Args:
            eval_dataset: rows with `input_ids`; by default those given to the trainer.
            ignore_keys: as in other trainers; nothing is ignored.
            metric_key_prefix: stands before every name.

        Returns:
            Means over the replies. Scores are neither normalised nor clipped, so that they compare over time.

        Raises:
            ValueError: there are no held-out prompts.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("there are no held-out prompts to evaluate on")
        totals: dict[str, float] = defaultdict(float)
        at_once = self.args.per_device_eval_batch_size
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            for start in range(0, len(dataset), at_once):
                scored = self.score(self.roll_out(dataset[start : start + at_once]["input_ids"]))
                episodes = scored.episodes
                totals["objective/scores"] += self._penalize_missing_eos(scored.scores, episodes).sum().item()
                totals["objective/kl"] += scored.kl.sum().item()
                totals["reply/length"] += episodes.reply_lengths.sum().item()
                totals["reply/ended"] += self._ended(episodes).sum().item()
                if start == 0:
                    self._write_samples(scored, metric_key_prefix, self.state.global_step)
        means = {name: total / len(dataset) for name, total in totals.items()}
        means["objective/rlhf_reward"] = means["objective/scores"] - self.kl_control.coefficient * means["objective/kl"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy's adapter as PEFT would load it, with the tokenizer."""
        folder = Path(output_dir or self.args.output_dir)
        adapters.save_adapter(self.shared.peft, "policy", folder, self.processing_class)

    def _penalize_missing_eos(self, scores: Tensor, episodes: Episodes) -> Tensor:
        missing = ~self._ended(episodes)
        if self.args.missing_eos_score is not None:
            return torch.where(missing, self.args.missing_eos_score, scores)
        return scores - (self.args.missing_eos_penalty or 0.0) * missing

    def _ended(self, episodes: Episodes) -> Tensor:
        """Bool `[B]`: the reply holds the stop token, or EOS where there is none. TRL always looks for EOS."""
        if self.stop_token_id is not None:
            return episodes.ended
        return ((episodes.replies == self.processing_class.eos_token_id) & episodes.mask).any(1)

    def _within_budget(self, scored: Scored) -> bool:
        """Remember the best policy within `kl_budget`; False, with that policy put back, once KL is over it."""
        budget, kl = self.args.kl_budget, scored.mean_kl
        if budget is None:
            return True
        if not kl > budget:
            score = self._penalize_missing_eos(scored.scores, scored.episodes).mean().item()
            if math.isfinite(kl) and (self.best is None or score > self.best.score):
                self.best = Best(self.state.global_step, score, kl, self._weights("policy"))
            return True
        if self.best is None or self.best.step <= self.args.value_warmup_updates:
            raise RuntimeError(
                f"KL is {kl:.3g}, over the `kl_budget` of {budget}, and no update within it scored better than the "
                "start: lower `learning_rate`, or raise the budget"
            )
        self._put_back("policy", self.best.weights)
        if self.unreported:
            self._log_means()
        self.log(
            {
                "objective/kl": self.best.kl,
                "objective/scores": self.best.score,
                "kl_budget/best_step": self.best.step,
                "kl_budget/exceeded_at_step": self.state.global_step,
                "kl_budget/exceeded_with": kl,
            }
        )
        return False

    def _weights(self, role: str) -> dict[str, Tensor]:
        """A copy of a role's trained weights, on the CPU."""
        view = getattr(self.shared, role)
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in view.named_parameters()
            if parameter.requires_grad
        }

    def _put_back(self, role: str, weights: dict[str, Tensor]) -> None:
        """Overwrite a role's trained weights.

        Raises:
            ValueError: they are not the same weights.
        """
        ours = {name: one for name, one in getattr(self.shared, role).named_parameters() if one.requires_grad}
        if {name: one.shape for name, one in ours.items()} != {name: one.shape for name, one in weights.items()}:
            raise ValueError(f"these are not the weights of this {role}: names or shapes differ")
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(weights[name])

    def _begin(self, resume_from: Path | None) -> None:
        """Set the counters, from a checkpoint where there is one, and evaluate the start if that is wanted."""
        args = self.args
        if resume_from is not None:
            self._load_checkpoint(resume_from)
        if self.samples_file is not None:
            keep_until(self.samples_file, self.state.global_step)
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = args.total_episodes / self.train_dataset_len
        self.state.compute_steps(args, self.state.max_steps)
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and resume_from is None:
            self.evaluate()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-<step>`, whole or not at all, and remove older ones beyond `save_total_limit`."""
        durable.write_checkpoint(
            Path(self.args.output_dir), self.state.global_step, self._write_checkpoint, self.args.save_total_limit
        )

    def _write_checkpoint(self, folder: Path) -> None:
        for role in self.trained:
            save_file(self._weights(role), folder / f"{role}.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.best is not None:
            save_file(self.best.weights, folder / "best.safetensors")
        memory = {
            "frozen": self.shared.checksums(*FROZEN),
            "kl_control": asdict(self.kl_control),
            "score_statistics": asdict(self.score_statistics),
            "skipped": [self.skipped_in_row, self.skipped_steps],
            "best": self.best and {"step": self.best.step, "score": self.best.score, "kl": self.best.kl},
            "unreported": self.unreported,
        }
        (folder / "ppo_state.json").write_text(json.dumps(memory, indent=1))

    def _load_checkpoint(self, folder: Path) -> None:
        memory = json.loads((folder / "ppo_state.json").read_text())
        for role, checksum in self.shared.checksums(*FROZEN).items():
            if memory["frozen"][role] != checksum:
                raise ValueError(f"{folder} cannot be gone on from: its {role} is not the one of this run")
        for role in self.trained:
            self._put_back(role, load_file(folder / f"{role}.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", "cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", "cpu", weights_only=True))
        self.state = OnlineTrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.kl_control.coefficient = memory["kl_control"]["coefficient"]
        self.score_statistics = ScoreStatistics(**memory["score_statistics"])
        self.skipped_in_row, self.skipped_steps = memory["skipped"]
        self.unreported = memory["unreported"]
        if memory["best"]:
            self.best = Best(**memory["best"], weights=load_file(folder / "best.safetensors"))
        self._load_rng_state(str(folder))

    def _prompts(self, update: int) -> list[list[int]]:
        """The prompts of an update, counted from 0; they follow from the seed alone, so a resumed run goes on."""
        batch = self.args.batch_size
        return self.train_dataset[self._order(self.train_dataset_len, update * batch, batch, "prompts")]["input_ids"]

    def _order(self, length: int, start: int, count: int, name: str) -> list[int]:
        """Entries `start` to `start + count` of an endless row of passes over `length` things, each pass shuffled."""
        entries: list[int] = []
        while len(entries) < count:
            number, offset = divmod(start + len(entries), length)
            entries += self._permutation(length, name, number)[offset : offset + count - len(entries)].tolist()
        return entries

    def _permutation(self, length: int, *which: Any) -> Tensor:
        """A random order of `length` things that depends on the seed and on which it is, and on nothing before it."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(random.Random(repr((seed, *which))).getrandbits(63))
        return torch.randperm(length, generator=generator)

    def _precision(self) -> contextlib.AbstractContextManager:
        """The arithmetic of every forward pass alike: with `bf16`, adapters over a bfloat16 base compute in it too."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _write_samples(self, scored: Scored, split: str, step: int) -> None:
        """Append the first few episodes to the samples file."""
        if self.samples_file is None:
            return
        episodes, ended = scored.episodes, self._ended(scored.episodes)
        with self.samples_file.open("a", encoding="utf-8") as lines:
            for row in range(min(SAMPLES, len(episodes))):
                ids = episodes.ids[row].tolist()
                start, end = (
                    int(episodes.prompt_lengths[row]),
                    int((episodes.prompt_lengths + episodes.reply_lengths)[row]),
                )
                written = {
                    "step": step,
                    "split": split,
                    "prompt": self.processing_class.decode(ids[:start], skip_special_tokens=True),
                    "completion": self.processing_class.decode(ids[start:end], skip_special_tokens=True),
                    "score": scored.scores[row].item(),
                    "kl": scored.kl[row].sum().item(),
                    "ended": bool(ended[row]),
                }
                lines.write(json.dumps(written, ensure_ascii=False) + "\n")


def check_data(
    args: PPOConfig, train_dataset: Dataset, eval_dataset: Dataset | None, ptx_dataset: Dataset | None
) -> None:
    """See that there is enough of every kind of data that the settings ask for.

    Raises:
        ValueError: there is not.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if len(train_dataset) < batch:
        raise ValueError(
            f"{len(train_dataset)} prompts are fewer than one batch of {batch}: lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`, or give more prompts"
        )
    if pc.min(pc.list_value_length(train_dataset.data.column("input_ids"))).as_py() == 0:
        raise ValueError("a prompt is empty: a reply needs at least one token to follow")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError("`eval_strategy` is set, and no prompts are held out to evaluate on")
    if bool(args.ptx_coef) != (ptx_dataset is not None):
        raise ValueError("`ptx_coef` and `ptx_data` (demonstrations) go together: one is given without the other")


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of token ids, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
