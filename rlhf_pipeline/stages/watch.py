"""Watching a policy while it trains: is it still getting better, or does it game what scores it?

Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization": the further a policy is from where it
began, √KL, the higher its score, while what people think of it rises, peaks and falls.
"""

import json
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf_pipeline import ranks
from rlhf_pipeline.data.encode import encode_prompts, row_of
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.hacking.forecast import Forecast, forecast
from rlhf_pipeline.hacking.replies import Reply, Usual
from rlhf_pipeline.hacking.watch import Measurement, best, means_of, raise_alarms
from rlhf_pipeline.judges.load import load
from rlhf_pipeline.judges.question import Judge
from rlhf_pipeline.models.roles import PolicyView, Roles
from rlhf_pipeline.ppo import checkpoint, over_ranks
from rlhf_pipeline.ppo.numbers import Scored, Scores, concatenated
from rlhf_pipeline.ppo.prompts import seeds
from rlhf_pipeline.recipe.schema import Evaluate, Watch
from rlhf_pipeline.recipe.watch import AUTO
from rlhf_pipeline.rewards.mixture import Rewards
from rlhf_pipeline.rundir import jsonl, strict_json
from rlhf_pipeline.rundir.layout import ADAPTER, ANSWERS, WATCH
from rlhf_pipeline.stages import evaluate, win_rates
from rlhf_pipeline.stages.job import Job

MEMORY, WEIGHTS = "watch.json", "watch.safetensors"  # in a checkpoint
REPLIES_OF_START = 4  # to each prompt: from how they differ, the healthy bands are learnt
MOST_PROMPTS = 100  # of those that a stage holds out
TIMES = Evaluate.model_fields["along"].default
FURTHEST = 1.5  # times the largest √KL measured: a forecast is not followed further


class Prompts(NamedTuple):
    """What a policy is measured on.

    Attributes:
        ids: the token ids of each prompt.
        rows: each prompt's row, for rewards that read it; None where none does.
        asked: each prompt with its row, for judges; empty where the prompts are not those of `evaluate`.
        samples: how often each is answered.
        temperature: of the replies.
        length: the most tokens of a reply; None for that of training.
        batch_size: how many replies are sampled at once.
        times: how often it is measured at even distances.
    """

    ids: list[list[int]]
    rows: list[str] | None
    asked: evaluate.Asked
    samples: int
    temperature: float | None
    length: int | None
    batch_size: int
    times: int


class Sampled(NamedTuple):
    """One measurement's replies: to all prompts once, then to all once more, and so on.

    Attributes:
        replies: as texts and tokens, with their scores.
        scores: by all rewards.
        kl: of each reply from the reference, in nats.
    """

    replies: list[Reply]
    scores: Scores
    kl: NDArray[np.float64]

    @property
    def texts(self) -> list[str]:
        """What the policy replied."""
        return [reply.text for reply in self.replies]


def watch(trainer: Any, job: Job, held_out: Dataset | None) -> "Watcher | None":
    """Have a policy measured on its way, on the prompts of `evaluate`, else on those that its stage holds out.

    Args:
        trainer: a `PPOTrainer` or a `GroupTrainer`.
        job: the stage.
        held_out: the prompts that it holds out.

    Returns:
        What measures; None where the recipe has no prompts for it, or `evaluate.along` is 0.
    """
    prompts = _prompts(trainer, job, held_out)
    if prompts is None or not prompts.times:
        return None
    trainer.watch = watcher = Watcher(trainer, job, prompts)
    trainer.add_callback(watcher)
    return watcher


def _prompts(trainer: Any, job: Job, held_out: Dataset | None) -> Prompts | None:
    spec = job.recipe.evaluate
    if spec is not None:
        asked = first_prompts(spec.data, spec.n)
        ids = encode_prompts(trainer.processing_class, spec.data, [prompt for prompt, _ in asked])
        rows = [row_of(prompt, row) for prompt, row in asked]
        return Prompts(
            ids, rows, asked, spec.samples, spec.temperature, spec.max_new_tokens, spec.batch_size, spec.along
        )
    if held_out is None or not (job.stage.watch or getattr(trainer.args, "target_kl", None) == AUTO):
        return None
    some = held_out[:MOST_PROMPTS]
    at_once = trainer.args.per_device_eval_batch_size
    return Prompts(some["input_ids"], some.get("row"), [], 1, None, None, at_once, TIMES)


class Watcher(TrainerCallback):
    """Measures the policy before the first update, at even distances of √KL and of steps, and at the end.

    Each time it replies to the same prompts with the same random numbers, none of training's, so that training is the
    same with it and without. Every measurement is a line of the stage's `watch.jsonl`; its numbers are logged, too, as
    `gold/…` what judge, rewards and KL say, and as `watch/…` all else. A judge that fails leaves a gap, and its
    traceback in the log: training must not end for it.

    What the stage's `watch` says is done: training ends with a confirmed alarm, and in the end the policy of the best
    measurement is put back. Measurements and that policy are in every checkpoint.

    Several processes divide the replies among them, and all have the same measurements. The first one writes them down
    and asks judges, which may cost money.

    Args:
        trainer: whose policy is measured.
        job: its stage.
        prompts: to measure on.

    Attributes:
        measurements: so far.
        kept_step: in the end, the step of the policy that is left.
    """

    def __init__(self, trainer: Any, job: Job, prompts: Prompts) -> None:
        self.trainer, self.prompts, self.recipe = trainer, prompts, job.recipe
        self.spec = job.stage.watch
        acts = self.spec is not None and self.spec.acts
        # An AI, which may cost money, is asked only where something follows from what it says.
        by = self.spec.best_by if self.spec and acts else None
        self.by: str = by or ("gold" if job.recipe.has_judge else "pessimistic")
        self.stops: list[str] = self.spec.stop if self.spec else []
        self.every = self.spec.every if self.spec else Watch.model_fields["every"].default
        self.keeps_best = self.spec is not None and self.spec.keep == "best"
        self.file = job.folder / WATCH
        self.measurements: list[Measurement] = []
        self.usual: Usual | None = None
        self.first_replies: list[str] = []
        self.reached = 0.0  # the largest √KL of a batch at a measurement
        self.weights: dict[str, Tensor] = {}
        self.kept_step = 0
        prepared = evaluate.prepare(job) if prompts.asked else None
        self.gold = prepared[1] if prepared else None
        self.ai: Judge | None = self._judge(job) if "judge" in (self.by, *self.stops) else None

    def _judge(self, job: Job) -> Judge:
        """The AI judge of `evaluate`, on the base of training where it is not elsewhere."""
        assert self.recipe.evaluate and self.recipe.evaluate.ai_judge
        spec, roles = self.recipe.evaluate.ai_judge, self.trainer.policy.shared
        if spec.stage is not None:
            roles.add_frozen(spec.stage, job.run / spec.stage / ADAPTER, self.recipe.stages[spec.stage].lora)
        on_base = _OnBase(roles, self.trainer.processing_class) if spec.is_local else None
        return load(spec, self.recipe, win_rates.PLACE, on_base, job.run / ANSWERS)

    # When it measures, and what follows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the start, unless training resumes from later; it may resume where it had just been stopped."""
        if state.global_step == 0:
            self._write_down([], anew=True)
            self.measure()
        control.should_training_stop = self.stopped is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where √KL has grown far enough, or a share of the way is done."""
        step, of, times = state.global_step, state.max_steps, self.prompts.times
        kls = ranks.gathered(self.trainer.latest_kl)  # a rank of GRPO or RLOO has that of its own replies
        now = math.sqrt(max(0.0, sum(kls) / len(kls)))
        if step * times // of > (step - 1) * times // of or now >= self.reached + self.every:
            self.reached = max(self.reached, now)
            wanted = control.should_log  # what is logged here takes it back
            self.measure()
            control.should_log = wanted
            control.should_training_stop |= self.stopped is not None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the best policy back, where it is to be kept and is not the last one."""
        self.kept_step = state.global_step
        if self.keeps_best and self.measurements and self.best.step != state.global_step:
            checkpoint.put_back(self.trainer.policy, self.weights)
            self.kept_step = self.best.step

    @property
    def best(self) -> Measurement:
        """The best measurement so far."""
        return best(self.measurements, self.by, self.stops)

    @property
    def stopped(self) -> Measurement | None:
        """The measurement that has ended training."""
        last = self.measurements[-1] if self.measurements else None
        return last if last and set(last.confirmed) & set(self.stops) else None

    @property
    def outcome(self) -> dict[str, float]:
        """The final metrics of a stage that was watched.

        Returns:
            `watch/best_step` and `watch/last_step`, of the best and of the last measurement; `watch/kept_step` where
            the best policy is kept, and `watch/stopped_at_step` where an alarm has ended training; of each that was
            confirmed `watch/alarm/NAME`, the first step at which it was; and `watch/peak_kl`, the KL in nats at which a
            forecast has its peak, where that is within reach. Nothing where nothing was measured, as after the last
            checkpoint of an earlier version, which holds no measurements.
        """
        if not self.measurements:
            return {}
        found: dict[str, float] = {
            "watch/best_step": self.best.step,
            "watch/last_step": self.measurements[-1].step,
        }
        if self.keeps_best:
            found["watch/kept_step"] = self.kept_step
        if self.stopped:
            found["watch/stopped_at_step"] = self.stopped.step
        for one in reversed(self.measurements):
            found |= {f"watch/alarm/{name}": one.step for name in one.confirmed}
        peak = self.forecast.within_reach if self.forecast else None
        return found | ({} if peak is None else {"watch/peak_kl": peak**2})

    @property
    def forecast(self) -> Forecast | None:
        """How what says which policy is the best goes on with √KL; None where too little is measured."""
        measured = [one for one in self.measurements if self.by in one.by_prompt]
        return forecast([one.kl for one in measured], means_of(measured, self.by)) if measured else None

    # Measuring

    @torch.no_grad()
    def measure(self) -> None:
        """Sample, score, judge, compare with what was measured before, and write it down."""
        sampled = self._sample(0)
        first = not self.measurements and self.trainer.state.global_step == 0
        if first:
            self._learn(sampled)
        by_prompt, numbers = self._means(sampled)
        measures = self.usual.measures(sampled.replies) if self.usual else {}
        new = self.usual.new_phrases(sampled.replies) if self.usual else []
        phrases = [(phrase.text, phrase.share, phrase.z) for phrase in new]
        kl = float(sampled.kl.mean())
        step = self.trainer.state.global_step
        self.measurements.append(Measurement(step, kl, by_prompt, measures, phrases))
        raise_alarms(self.measurements, self.trainer.state.max_steps)
        self._write_down([self.measurements[-1].as_json()])
        of_measures = {f"watch/{name}": measured.value for name, measured in measures.items()}
        self.trainer.log(numbers | {"gold/kl": kl} | of_measures)
        if self.keeps_best and self.best is self.measurements[-1]:
            self.weights = checkpoint.weights(self.trainer.policy)
        self._steer()

    def _sample(self, repeat: int) -> Sampled:
        """Replies to all prompts; those of another `repeat` are drawn with other random numbers."""
        trainer, prompts = self.trainer, self.prompts
        ids = prompts.ids * prompts.samples
        rows = None if prompts.rows is None else prompts.rows * prompts.samples
        replies: list[Reply] = []
        parts: list[Scores] = []
        kls: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(trainer.args.seed + repeat)
            at_once = prompts.batch_size * ranks.count()
            for start in range(0, len(ids), at_once):
                part = slice(start, start + at_once)
                scored = self._scored(ids[part], rows and rows[part], repeat, start)
                episodes = scored.episodes
                tokens = episodes.tokens
                texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
                differ = _disagreement(scored.rewards)
                replies += [
                    Reply(
                        (start + i) % len(prompts.ids), texts[i], tokens[i], ended, score, differ[i] if differ else None
                    )
                    for i, (ended, score) in enumerate(
                        zip(episodes.ended.tolist(), scored.scores.tolist(), strict=True)
                    )
                ]
                parts.append(scored.rewards)
                kls += scored.kl.sum(1).tolist()
        return Sampled(replies, concatenated(parts), np.array(kls))

    def _scored(self, prompts: list[list[int]], rows: list[str] | None, repeat: int, first: int) -> Scored:
        """A reply to each prompt with its scores; each rank makes its share. The first prompt's place is `first`."""
        trainer, temperature = self.trainer, self.prompts.temperature
        mine = ranks.share(len(prompts))
        scored = None
        if some := prompts[mine]:
            drawn: dict[str, Any] = {}
            if ranks.count() > 1:  # the same replies by any number of them
                places = range(first + mine.start, first + mine.stop)
                drawn["seeds"] = seeds(trainer.args.seed, "watch", repeat, places=places)
            episodes = trainer.roll_out(some, temperature, self.prompts.length, **drawn)
            scored = trainer.score(episodes, rows and rows[mine], temperature or 1.0)
        return over_ranks.of_all(scored, trainer.policy.device)

    def _learn(self, sampled: Sampled) -> None:
        """Learn from more replies of the policy that training starts from what is usual."""
        self.first_replies = sampled.texts
        more = [self._sample(repeat) for repeat in range(1, math.ceil(REPLIES_OF_START / self.prompts.samples))]
        self.usual = Usual.of([reply for one in (sampled, *more) for reply in one.replies])

    def _means(self, sampled: Sampled) -> tuple[dict[str, list[float]], dict[str, float]]:
        """What rewards and judges say: means of each prompt, and what is logged of them."""
        total = sampled.scores.total.double().cpu().numpy()
        found = {"reward": total, "pessimistic": total - _discount(self.trainer.rewards, sampled.scores)}
        numbers = {"gold/score_mean": float(total.mean())}
        for name, values in sampled.scores.by_name.items():
            own = values[~values.isnan()]
            numbers |= {f"watch/reward/{name}": own.mean().item()} if len(own) else {}
        if sampled.scores.disagreement:
            numbers["watch/pessimistic"] = float(found["pessimistic"].mean())
        asked = [one for _ in range(self.prompts.samples) for one in self.prompts.asked]
        if self.gold is not None:
            found["gold"], about = ranks.from_first(lambda: self._judged(asked, sampled.texts))
            numbers |= {f"gold/{name}": value for name, value in about.items() if name != "judge_replies"}
        if self.ai is not None:
            found["judge"] = ranks.from_first(lambda: self._points(asked, sampled.texts))
            if not np.isnan(found["judge"]).all():
                numbers["watch/win_rate"] = float(np.nanmean(found["judge"]))
        prompts = len(self.prompts.ids)
        return {name: _by_prompt(values, prompts).tolist() for name, values in found.items()}, numbers

    def _judged(self, asked: evaluate.Asked, ours: Sequence[str]) -> tuple[NDArray[np.float64], dict[str, float]]:
        """What the user's function says of each reply, NaN where it says nothing, and a summary."""
        assert self.gold
        try:
            judged = evaluate.ask(self.gold, asked, ours)
            about = evaluate.summary(judged, self.prompts.samples)
        except Exception:  # a user's function may fail in any way
            traceback.print_exc()
            return np.full(len(asked), math.nan), {}
        return np.array([math.nan if one is None else one for one in judged]), about

    def _points(self, asked: evaluate.Asked, ours: Sequence[str]) -> NDArray[np.float64]:
        """Of each reply, whether the AI prefers it to the first policy's: 1, 0, or a half for a tie; else NaN."""
        assert self.ai and self.recipe.evaluate and self.recipe.evaluate.ai_judge
        try:
            judged = win_rates.compared(
                self.ai, self.recipe.evaluate.ai_judge, self.recipe, asked, ours, self.first_replies
            )
        except Exception:  # an address may be gone for a while
            traceback.print_exc()
            return np.full(len(asked), math.nan)
        return np.array([math.nan if (won := win_rates.points(one.verdict)) is None else won for one in judged])

    def _steer(self) -> None:
        """With `target_kl: auto`, steer towards the KL at which the forecast has its peak, once there is one."""
        if getattr(self.trainer.args, "target_kl", None) != AUTO:
            return
        ahead = self.forecast
        if ahead is not None and ahead.peak is not None:
            measured = [math.sqrt(one.kl) for one in self.measurements if one.kl > 0]
            least, most = min(measured, default=0.0), FURTHEST * max(measured, default=0.0)
            self.trainer.memory.kl_control.target = min(max(ahead.peak, least), most) ** 2 or None

    # Checkpoints

    def write(self, folder: Path) -> None:
        """Write measurements, what is usual, and the policy to put back into a checkpoint's folder."""
        memory = {
            "measurements": [one.as_json() for one in self.measurements],
            "usual": self.usual and self.usual.as_json(),
            "first_replies": self.first_replies,
            "reached": self.reached,
        }
        (folder / MEMORY).write_text(strict_json.dumps(memory), encoding="utf-8")
        if self.weights:
            save_file(self.weights, folder / WEIGHTS)

    def read(self, folder: Path) -> None:
        """Take up what `write` has written; a checkpoint of an earlier version has none of it."""
        if not (folder / MEMORY).is_file():
            return
        memory = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        self.measurements = [Measurement.from_json(row) for row in memory["measurements"]]
        self.usual = memory["usual"] and Usual.from_json(memory["usual"])
        self.first_replies, self.reached = memory["first_replies"], memory["reached"]
        if (folder / WEIGHTS).is_file():
            self.weights = load_file(folder / WEIGHTS)
        self._write_down(memory["measurements"], anew=True)
        self._steer()

    def _write_down(self, rows: list[dict[str, Any]], anew: bool = False) -> None:
        """Add rows to the stage's file, which the first rank writes."""
        if ranks.is_first() and anew:
            jsonl.rewrite(self.file, lambda row: False, rows)
        elif ranks.is_first():
            jsonl.append(self.file, rows)


class _OnBase(NamedTuple):
    """The models that an AI judge on this machine may be, on the base of training."""

    roles: Roles
    tokenizer: PreTrainedTokenizerBase

    def policy(self, name: str) -> PolicyView:
        """The base, or the base under a stage's adapter."""
        return PolicyView(self.roles, name)


def _disagreement(scores: Scores) -> list[float] | None:
    """By how much the members of ensembles disagree about each reply, of several ensembles the sum."""
    if not scores.disagreement:
        return None
    return torch.stack(list(scores.disagreement.values())).sum(0).tolist()


def _discount(rewards: Rewards, scores: Scores) -> NDArray[np.float64]:
    """What is taken off each score where members disagree: once the standard deviation, times the reward's weight.

    Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization". Of an ensemble that is combined by `min`
    or `mean - k*std` nothing is: its score is pessimistic already.
    """
    found = torch.zeros_like(scores.total)
    for part in rewards.parts:
        if part.label in scores.disagreement and part.combine == "mean":
            found += abs(part.weight) * scores.disagreement[part.label]
    return found.double().cpu().numpy()


def _by_prompt(values: NDArray[np.float64], prompts: int) -> NDArray[np.float64]:
    """Means over the replies to each prompt, of replies to all prompts once, then once more, and so on; NaN of none."""
    rounds = values.reshape(-1, prompts)
    known = ~np.isnan(rounds)
    return np.where(known, rounds, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
