"""PPO on one shared base: roll out, score, shape rewards, estimate advantages, optimise, report."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer_utils import TrainOutput

from rlhf_pipeline import ranks
from rlhf_pipeline.callbacks.metrics import keep_until
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.reply_end import as_eos_token_id, stop_tokens
from rlhf_pipeline.models.roles import TRAINED, PolicyView, SharedBase
from rlhf_pipeline.ppo import checkpoint, numbers, over_ranks
from rlhf_pipeline.ppo.advantages import estimate_advantages, kl_per_token, shape_rewards, whiten
from rlhf_pipeline.ppo.checkpoint import Best, Kept, Memory, PPOState
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.control import KLControl
from rlhf_pipeline.ppo.forward import demonstration_loss, reply_log_probs, reply_log_probs_and_values, reply_values
from rlhf_pipeline.ppo.losses import policy_loss, value_loss
from rlhf_pipeline.ppo.numbers import Reward, Scored
from rlhf_pipeline.ppo.prompts import check_data, padded, permutation, seeds, shuffled
from rlhf_pipeline.ppo.rollout import Engine, Episodes, sample
from rlhf_pipeline.rundir import durable


class PPOTrainer(Trainer):
    """Transformers' Trainer with PPO's loop in place of its own; `docs/ppo.md` says what differs from TRL's and why.

    Of the Trainer there are the callbacks and their control, the log, the accelerator, the optimizers and schedules.

    Several processes make the updates that one would make with the whole batch: see `over_ranks`. Each has the base and
    all roles, samples and scores its share of the prompts, and reads its share of every mini-batch. With several, each
    reply has random numbers of its own, from the seed and its place, so that any number of them has the same replies.
    The first one writes: samples, checkpoints, and what callbacks write.

    Args:
        args: the settings.
        processing_class: the tokenizer; its padding side and pad token do not matter.
        shared: the base with its roles.
        rewards: what scores replies, as `rewards.mixture.Rewards`.
        train_dataset: rows with `input_ids`, a prompt's token ids; and `row`, where a reward reads it.
        eval_dataset: held-out prompts, for `eval_strategy`.
        ptx_dataset: demonstrations for `ptx_coef`, rows with `input_ids` and `labels`.
        callbacks: further callbacks; setting `control.should_training_stop` ends training.
        samples_file: where some prompts and replies are written, one JSON object a line.
        engine: what samples, if not the policy itself.

    Raises:
        ValueError: settings and data that do not fit together, such as fewer prompts than one batch.
    """

    control: TrainerControl
    state: PPOState

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        shared: SharedBase,
        rewards: Reward,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        ptx_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        samples_file: Path | None = None,
        engine: Engine | None = None,
    ) -> None:
        check_data(args, train_dataset, eval_dataset, ptx_dataset, ranks.count())  # the settings have connected them
        self.shared, self.rewards = shared, rewards
        super().__init__(
            model=nn.ModuleDict({role: getattr(shared, role) for role in TRAINED}),
            args=args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        args.count(len(train_dataset), ranks.count())
        torch.manual_seed(_own_seed(args.seed))
        self.model.config = shared.policy.config  # for trackers; not before, or Trainer would switch its cache off
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        if args.gradient_checkpointing:
            shared.enable_gradient_checkpointing()
        self.state = PPOState(**vars(self.state))
        target = None if isinstance(args.target_kl, str) else args.target_kl  # `auto` is set by what watches
        self.memory = Memory(KLControl(args.kl_coef, target, args.kl_horizon))
        self.seed = args.seed if args.data_seed is None else args.data_seed  # of the order of prompts and episodes
        self.ptx_dataset = ptx_dataset
        self.samples_file = samples_file
        self.engine = engine
        self.watch: Kept | None = None
        self.trained = {
            role: [parameter for parameter in getattr(shared, role).parameters() if parameter.requires_grad]
            for role in TRAINED
        }
        pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
        ends = {"stop_token": args.stop_token, "stop_token_id": args.stop_token_id}
        self.stop_token_id = as_eos_token_id(stop_tokens(processing_class, shared.causal_lm.generation_config, ends))
        self.pad_token_id = pad if pad is not None else eos if eos is not None else 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe's `optim`, with the value model's own learning rate where it has one."""
        super().create_optimizer(model)
        value = {id(parameter) for parameter in self.shared.value.parameters()}
        groups = []
        for group in self.optimizer.param_groups:
            for of_value, rate in ((False, self.args.learning_rate), (True, self.args.value_learning_rate)):
                own = [parameter for parameter in group["params"] if (id(parameter) in value) == of_value]
                if own:
                    groups.append({**group, "params": own, "lr": self.args.learning_rate if rate is None else rate})
        self.optimizer.param_groups[:] = groups
        self.value_group = next(i for i, group in enumerate(groups) if id(group["params"][0]) in value)
        return self.optimizer

    @property
    def policy(self) -> PolicyView:
        """The policy, as a view of the shared base."""
        return self.shared.policy

    @property
    def latest_kl(self) -> float:
        """The mean KL of a whole reply of the batch that was trained on last, in nats."""
        return self.memory.unreported[-1]["objective/kl"]

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
            ValueError: there is no such checkpoint.
            CheckpointError: it cannot be read, or is of another reference or reward.
            RuntimeError: too many optimizer steps in a row had gradients that were not finite.
            RunError: a rank has other weights than the first.
        """
        self._begin(durable.locate(self.args.output_dir, resume_from_checkpoint))
        within_budget = True
        while (
            within_budget
            and self.state.global_step < self.state.max_steps
            and not self._is_asked("should_training_stop")
        ):
            clock = [time.perf_counter()]
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            scored = self._next_episodes(clock)
            episodes = scored.episodes
            within_budget = self._within_budget(scored)
            if within_budget:
                scores, rewards = self.shape(scored)
                advantages, returns = estimate_advantages(rewards, scored.values, self.args.gamma, self.args.lam)
                clock.append(time.perf_counter())
                losses = self.optimise(scored, whiten(advantages, episodes.mask), returns)
                clock.append(time.perf_counter())
                self.report(scored, scores, returns, losses, clock)
        if within_budget and self.args.kl_budget is not None:  # nothing has measured the last update yet
            self._within_budget(self._next_episodes())
        self._log_means()
        self._require_same_weights(*TRAINED)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _next_episodes(self, clock: list[float] | None = None) -> Scored:
        """The episodes of the update that comes next; `clock` as in `_sample_and_score`."""
        update = self.state.global_step
        return self._sample_and_score(*self._prompts(update), "update", update, clock=clock)

    def _sample_and_score(
        self,
        prompts: list[list[int]],
        rows: list[str] | None,
        *which: Any,
        first: int = 0,
        clock: list[float] | None = None,
    ) -> Scored:
        """Sample a reply to each prompt and score it, each rank its share; those of all ranks.

        Args:
            prompts: token ids.
            rows: that they are from, where a reward reads them.
            which: what the random numbers of several ranks depend on beside the seed and a prompt's place.
            first: the place of the first of the prompts.
            clock: takes the time when this rank has sampled its share.
        """
        mine = ranks.share(len(prompts))
        scored = None
        if some := prompts[mine]:
            drawn: dict[str, Any] = {}
            if ranks.count() > 1:
                drawn["seeds"] = seeds(self.args.seed, *which, places=range(first + mine.start, first + mine.stop))
            episodes = self.roll_out(some, **drawn)
            if clock is not None:
                clock.append(time.perf_counter())
            scored = self.score(episodes, rows and rows[mine])
        return over_ranks.of_all(scored, self.policy.device)

    def roll_out(
        self,
        prompts: list[list[int]],
        temperature: float | None = None,
        response_length: int | None = None,
        seeds: list[int] | None = None,
    ) -> Episodes:
        """Sample a reply to each prompt, by default as training does; `seeds` as in `sample`."""
        with self._precision():
            return sample(
                self.shared.policy,
                prompts,
                response_length=response_length or self.args.response_length,
                temperature=self.args.temperature if temperature is None else temperature,
                stop_token_id=self.stop_token_id,
                pad_token_id=self.pad_token_id,
                at_once=self.args.local_rollout_forward_batch_size,
                seeds=seeds,
                engine=self.engine,
            )

    @torch.no_grad()
    def score(self, episodes: Episodes, rows: Sequence[str] | None = None, temperature: float | None = None) -> Scored:
        """Have the roles and the rewards read the episodes: log-probabilities, values and scores.

        The policy's log-probabilities come from the pass that optimisation uses, not from generation, whose cache
        makes them differ in low precision. So the first KL is 0, and the first ratio is 1 but for the rounding of a
        batch of another shape.

        Args:
            episodes: the episodes.
            rows: those that their prompts are from, where a reward reads them.
            temperature: that they were sampled with, if not training's.
        """
        shared, temperature = self.shared, temperature or self.args.temperature
        log_probs, ref_log_probs, values = (torch.zeros_like(episodes.sampled_log_probs) for _ in range(3))
        at_once = self.args.local_rollout_forward_batch_size
        for part in episodes.parts(at_once):
            some = episodes.select(part)
            columns = slice(some.mask.shape[1])
            with self._precision():
                if shared.one_trunk:
                    of_policy, _, of_value = reply_log_probs_and_values(shared.policy, shared.value, some, temperature)
                else:
                    of_policy, _ = reply_log_probs(shared.policy, some, temperature)
                    of_value = reply_values(shared.value, some)
                log_probs[part, columns], values[part, columns] = of_policy, of_value
                ref_log_probs[part, columns] = reply_log_probs(shared.reference, some, temperature)[0]
        kl = kl_per_token(log_probs, ref_log_probs, self.args.kl_estimator)
        state = self.state
        with self._precision():
            rewards = self.rewards(episodes, rows, at_once=at_once, step=state.global_step, max_steps=state.max_steps)
        return Scored(episodes, log_probs, ref_log_probs, values, rewards, kl)

    def shape(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """The scores to train on, float32 `[B]`, and the reward of each token, float32 `[B, T]`."""
        args, scores = self.args, scored.scores
        if args.normalize_scores:
            self.memory.score_statistics.update(scores)
            scores = self.memory.score_statistics.normalize(scores)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        scores = self._penalize_missing_eos(scores, scored.episodes)
        rewards = shape_rewards(scores, scored.kl, self.memory.kl_control.coefficient, scored.episodes.reply_lengths)
        if args.whiten_rewards:
            rewards = whiten(rewards, scored.episodes.mask, shift_mean=False)
        return scores, rewards

    def optimise(self, scored: Scored, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Make `num_ppo_epochs` passes over the episodes, one optimizer step per mini-batch.

        A mini-batch is dealt out to the ranks by length, so that each has as much to do, and read in parts of
        `per_device_train_batch_size`. Every token of a mini-batch weighs the same, however it is divided, so the number
        of ranks and the size of the parts change nothing but time and memory.

        Returns:
            Means over the tokens of all passes, by the names they are logged under.
        """
        args, batch = self.args, len(scored.episodes)
        train_policy = self.state.global_step >= args.value_warmup_updates
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=advantages.device))
        norms: dict[str, list[float]] = defaultdict(list)
        for epoch in range(args.num_ppo_epochs):
            order = permutation(batch, self.seed, self.state.global_step, 1 + epoch).to(advantages.device)
            for number, mini_batch in enumerate(order.split(batch // args.num_mini_batches)):
                tokens = scored.episodes.reply_lengths[mini_batch].sum()
                mine = scored.episodes.by_length(mini_batch)[ranks.index() :: ranks.count()]
                for rows in mine.split(args.per_device_train_batch_size) if len(mine) else ():
                    for loss in self._losses(scored, rows, advantages, returns, train_policy, sums):
                        (loss / tokens).backward()
                if train_policy and self.ptx_dataset is not None:
                    self._learn_demonstrations(
                        self.ptx_dataset, len(mini_batch), epoch * args.num_mini_batches + number, sums
                    )
                for role, norm in self._step().items():
                    norms[role].append(norm)
        return numbers.of_training(over_ranks.total(sums), norms)

    def _losses(
        self,
        scored: Scored,
        rows: Tensor,
        advantages: Tensor,
        returns: Tensor,
        train_policy: bool,
        sums: dict[str, Tensor],
    ) -> Iterator[Tensor]:
        """The losses of policy and value on some episodes, summed over tokens, the value's times `vf_coef`.

        With an adapter for each they share no weights; the first is to have its backward pass before the second's
        forward pass, which halves the activations. On one trunk they are one loss of one pass. While the value alone
        learns, its loss there reaches its head and no further, since all else belongs to the policy.
        """
        args, shared, part = self.args, self.shared, scored.episodes.select(rows)
        columns = slice(part.mask.shape[1])
        old_log_probs, advantage = scored.log_probs[rows, columns], advantages[rows, columns]
        old_values, target = scored.values[rows, columns], returns[rows, columns]
        if train_policy and shared.one_trunk:
            with self._precision():
                new, entropy, values = reply_log_probs_and_values(shared.policy, shared.value, part, args.temperature)
            loss = policy_loss(new, old_log_probs, entropy, advantage, part.mask, args, sums)
            yield loss + args.vf_coef * value_loss(values, old_values, target, part.mask, args, sums)
            return
        if train_policy:
            with self._precision():
                new, entropy = reply_log_probs(shared.policy, part, args.temperature)
            yield policy_loss(new, old_log_probs, entropy, advantage, part.mask, args, sums)
        with self._precision():
            values = reply_values(shared.value, part, trunk_learns=not shared.one_trunk)
        yield args.vf_coef * value_loss(values, old_values, target, part.mask, args, sums)

    def _learn_demonstrations(self, dataset: Dataset, rows: int, number: int, sums: dict[str, Tensor]) -> None:
        """Add to the policy's gradient that of `ptx_coef` times the mean loss on as many demonstrations as episodes."""
        steps = self.args.num_ppo_epochs * self.args.num_mini_batches
        taken = (self.state.global_step * steps + number) * rows
        chosen = dataset.select(shuffled(len(dataset), taken, rows, self.seed, "ptx"))
        labelled = sum(label != -100 for labels in chosen["labels"] for label in labels[1:])
        device = self.policy.device
        mine = chosen.select(range(rows)[ranks.share(rows)])
        for start in range(0, len(mine), self.args.per_device_train_batch_size):
            part = mine[start : start + self.args.per_device_train_batch_size]
            ids = padded(part["input_ids"], self.pad_token_id).to(device)
            with self._precision():
                labels = padded(part["labels"], -100).to(device)
                loss = demonstration_loss(self.shared.policy, ids, labels) / labelled
            (self.args.ptx_coef * loss).backward()
            sums["loss/ptx"] += loss.detach()
        sums["ptx_steps"] += ranks.is_first()

    def _step(self) -> dict[str, float]:
        """Take one optimizer step, or skip it if a gradient is not finite; returns the norm of each role's gradient.

        Each role's gradient is clipped by itself: the value model's is often the larger by far, and would decide how
        far the policy moves.

        Raises:
            RuntimeError: `max_skipped_steps` were skipped in a row.
        """
        over_ranks.add_up_gradients([parameter for parameters in self.trained.values() for parameter in parameters])
        limit = self.args.max_grad_norm or math.inf
        norms = {
            role: torch.nn.utils.clip_grad_norm_(parameters, limit).item()
            for role, parameters in self.trained.items()
            if any(parameter.grad is not None for parameter in parameters)
        }
        if all(math.isfinite(norm) for norm in norms.values()):
            self.optimizer.step()
            self.memory.skipped_in_row = 0
        else:
            self.memory.skipped_in_row += 1
            self.memory.skipped_steps += 1
        self.optimizer.zero_grad()
        if (skipped := self.memory.skipped_in_row) >= self.args.max_skipped_steps:
            raise RuntimeError(
                f"{skipped} optimizer steps in a row had gradients that were not finite, the last at "
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
        args, episodes, ended = self.args, scored.episodes, self._ended(scored.episodes)
        beta, eos = self.memory.kl_control.coefficient, self.processing_class.eos_token_id
        rates = self.lr_scheduler.get_last_lr()
        self.memory.unreported.append(
            numbers.of_rollout(scored, scores, returns, ended, beta, eos)
            | losses
            | numbers.of_speed(episodes, clock, args.num_ppo_epochs)
            | {"skipped_steps": self.memory.skipped_steps, "lr": rates[0], "lr_value": rates[self.value_group]}
            | {"episode": self.state.episode + len(episodes)}
        )
        times = args.num_sample_generations
        if times and self.state.global_step % max(1, args.num_total_batches // times) == 0:
            self._write_samples(scored, "train", self.state.global_step + 1)
        self.memory.kl_control.update(scored.mean_kl, len(episodes))
        passes = self.state.episode // len(self.train_dataset)
        self.state.global_step += 1
        self.state.episode += len(episodes)
        self.state.epoch = self.state.episode / len(self.train_dataset)
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.state.episode // len(self.train_dataset) > passes:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        if self._is_asked("should_log"):
            self._log_means()
        if self._is_asked("should_evaluate"):
            self.evaluate()
        if self._is_asked("should_save"):
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    def _is_asked(self, flag: str) -> bool:
        """Whether a callback has set a flag of `control` on any rank: then all act, or some would wait."""
        return ranks.any_of(getattr(self.control, flag))

    def _log_means(self) -> None:
        """Log means over the updates since the last time, if there were any."""
        updates, self.memory.unreported = self.memory.unreported, []
        if updates:
            self.log(numbers.means(updates))

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample replies to held-out prompts and score them; the same random numbers every time, none of training's.

        Several ranks divide the prompts; all get the same numbers.

        Args:
            eval_dataset: rows with `input_ids`; by default those given to the trainer.
            ignore_keys: as in other trainers; nothing is ignored.
            metric_key_prefix: put before every name.

        Returns:
            Means over the replies. Scores are neither normalised nor clipped, so that they compare over time.

        Raises:
            ValueError: there are no held-out prompts.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("there are no held-out prompts to evaluate on")
        totals: dict[str, float] = defaultdict(float)
        rewards = []
        at_once = self.args.per_device_eval_batch_size * ranks.count()
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            for start in range(0, len(dataset), at_once):
                taken = dataset[start : start + at_once]
                scored = self._sample_and_score(taken["input_ids"], taken.get("row"), "eval", first=start)
                episodes = scored.episodes
                totals["objective/scores"] += self._penalize_missing_eos(scored.scores, episodes).sum().item()
                totals["objective/kl"] += scored.kl.sum().item()
                totals["reply/length"] += episodes.reply_lengths.sum().item()
                totals["reply/ended"] += self._ended(episodes).sum().item()
                rewards.append(scored.rewards)
                if start == 0:
                    self._write_samples(scored, metric_key_prefix, self.state.global_step)
        means = {name: total / len(dataset) for name, total in totals.items()}
        means["objective/rlhf_reward"] = (
            means["objective/scores"] - self.memory.kl_control.coefficient * means["objective/kl"]
        )
        means |= numbers.of_rewards(numbers.concatenated(rewards))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy's adapter as PEFT would load it, with the tokenizer."""
        folder = Path(output_dir or self.args.output_dir)
        adapters.save_adapter(self.shared.peft, self.shared.names["policy"], folder, self.processing_class)

    def _penalize_missing_eos(self, scores: Tensor, episodes: Episodes) -> Tensor:
        missing = ~self._ended(episodes)
        if self.args.missing_eos_score is not None:
            return torch.where(missing, self.args.missing_eos_score, scores)
        return scores - (self.args.missing_eos_penalty or 0.0) * missing

    def _ended(self, episodes: Episodes) -> Tensor:
        """Bool `[B]`: the reply holds a stop token, or EOS where there is none. TRL always looks for EOS."""
        if self.stop_token_id != []:
            return episodes.ended
        return ((episodes.replies == self.processing_class.eos_token_id) & episodes.mask).any(1)

    def _within_budget(self, scored: Scored) -> bool:
        """Remember the best policy within `kl_budget`; False, with that policy put back, once KL is over it."""
        budget, kl, best = self.args.kl_budget, scored.mean_kl, self.memory.best
        if budget is None:
            return True
        if not kl > budget:
            score = self._penalize_missing_eos(scored.scores, scored.episodes).mean().item()
            if math.isfinite(kl) and (best is None or score > best.score):
                weights = checkpoint.weights(self.shared.policy)
                self.memory.best = Best(self.state.global_step, score, kl, weights)
            return True
        if best is None or best.step <= self.args.value_warmup_updates:
            raise RuntimeError(
                f"KL is {kl:.3g}, over the `kl_budget` of {budget}, and no update within it scored better than the "
                "start: lower `learning_rate`, or raise the budget"
            )
        checkpoint.put_back(self.shared.policy, best.weights)
        self._log_means()
        self.log(
            {
                "objective/kl": best.kl,
                "objective/scores": best.score,
                "kl_budget/best_step": best.step,
                "kl_budget/exceeded_at_step": self.state.global_step,
                "kl_budget/exceeded_with": kl,
            }
        )
        return False

    def _begin(self, resume_from: Path | None) -> None:
        """Set the counters, from a checkpoint where there is one, and evaluate the start if that is wanted."""
        args = self.args
        if resume_from is not None:
            self._load_checkpoint(resume_from)
        self._require_same_weights()
        if self.samples_file is not None and ranks.is_first():
            keep_until(self.samples_file, self.state.global_step)
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = args.total_episodes / len(self.train_dataset)
        self.state.compute_steps(args, self.state.max_steps)
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and resume_from is None:
            self.evaluate()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-<step>`, whole or not at all, and remove older ones beyond `save_total_limit`.

        The first rank does, for all.
        """
        self._require_same_weights(*TRAINED)
        states = checkpoint.random_states(self)
        if ranks.is_first():
            durable.write_checkpoint(
                Path(self.args.output_dir),
                self.state.global_step,
                lambda folder: self._write_checkpoint(folder, states),
                self.args.save_total_limit,
            )

    def _require_same_weights(self, *roles: str) -> None:
        """See that all ranks have the same weights of some roles, by default of all and of the base."""
        if ranks.count() > 1:
            over_ranks.require_same(self.shared.checksums(*roles), self.state.global_step)

    def _write_checkpoint(self, folder: Path, random_states: dict[str, bytes]) -> None:
        checkpoint.write(folder, self.shared, self.memory)
        if self.watch is not None:
            self.watch.write(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        for name, content in random_states.items():
            (folder / name).write_bytes(content)
        self.state.save_to_json(str(folder / durable.STATE))

    def _load_checkpoint(self, folder: Path) -> None:
        with durable.taking_up(folder):
            durable.check_state(folder)
            checkpoint.read(folder, self.shared, self.memory)
            if self.watch is not None:
                self.watch.read(folder)
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", "cpu", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", "cpu", weights_only=True))
            self.state = PPOState.load_from_json(str(folder / durable.STATE))
            self.state.is_world_process_zero = self.is_world_process_zero()
            self.state.is_local_process_zero = self.is_local_process_zero()
            if checkpoint.ranks_of(folder) == ranks.count():
                self._load_rng_state(str(folder))
            else:
                set_seed(_own_seed(self.args.seed, self.state.global_step))

    def _prompts(self, update: int) -> tuple[list[list[int]], list[str] | None]:
        """The prompts of an update, counted from 0, and their rows, where the dataset has them.

        They follow from the seed alone, so that a resumed run has the same.
        """
        batch = self.args.batch_size
        taken = self.train_dataset[shuffled(len(self.train_dataset), update * batch, batch, self.seed, "prompts")]
        return taken["input_ids"], taken.get("row")

    def _precision(self) -> contextlib.AbstractContextManager:
        """The arithmetic of every forward pass alike: with `bf16`, adapters over a bfloat16 base compute in it too."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _write_samples(self, scored: Scored, split: str, step: int) -> None:
        if self.samples_file is not None and ranks.is_first():
            ended = self._ended(scored.episodes)
            numbers.write_samples(self.samples_file, scored, ended, self.processing_class, split, step)


def _own_seed(seed: int, step: int = 0) -> int:
    """Of what a rank draws beside replies, which with several ranks have seeds of their own."""
    return (seed + 100_003 * ranks.index() + 1_000_003 * step) % 2**32
