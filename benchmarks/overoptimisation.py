"""Does PPO against a poor reward model end where it was best, if it is watched? Exits with 1 where a goal is missed.

A reward model that learned from 200 pairs, a quarter of them with the wrong label, is optimised much further than it is
worth, for five values of `kl_coef`, by the score of one model and by that of four in three ways. Gold is the share of
replies that are right and polite. Half of the held-out questions are the watch's, to stop and to choose by. Gold in the
tables is of the other half, which ask for other facts, and which no choice was made by.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.hacking import watch
from rlhf_pipeline.hacking.forecast import Order, forecast, order
from rlhf_pipeline.hacking.watch import Measurement
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.ppo import checkpoint
from rlhf_pipeline.ppo.advantages import kl_per_token
from rlhf_pipeline.ppo.forward import reply_log_probs
from rlhf_pipeline.ppo.rollout import Episodes, sample
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.report.charts import Axes
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.rundir.layout import WATCH
from rlhf_pipeline.stages import ppo, reward, sft
from rlhf_pipeline.stages.job import Job, Reader

Numbers = NDArray[np.float64]

RECIPE = """
name: overoptimisation
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
evaluate:
  data: watched.jsonl
  judge: rlhf_pipeline.models.tiny.world:judge
  n: 52
  samples: 4
  max_new_tokens: 24
  temperature: 0.7
  batch_size: 208
  along: 6
stages:
  sft:
    data: {path: tiny:demonstrations, chat: false}
    trainer: {learning_rate: 4e-3, num_train_epochs: 1, per_device_train_batch_size: 32, gradient_checkpointing: false}
  one:
    kind: reward
    data: {path: pairs.jsonl, chat: false, eval_fraction: 0.15}
    trainer: {learning_rate: 3e-3, num_train_epochs: 3, per_device_train_batch_size: 16, gradient_checkpointing: false}
  four:
    kind: reward
    data: {path: pairs.jsonl, chat: false, eval_fraction: 0.15}
    members: 4
    bootstrap: true
    trainer:
      learning_rate: 3e-3
      num_train_epochs: 3
      per_device_train_batch_size: 16
      center_rewards_coefficient: 0.01
      gradient_checkpointing: false
  ppo:
    data: {path: tiny:prompts, chat: false}
    rewards: [{stage: one}]
    value_model: head
    watch: {keep: last}
    trainer:
      learning_rate: 1e-3
      total_episodes: 1280
      per_device_train_batch_size: 32
      local_rollout_forward_batch_size: 208
      num_ppo_epochs: 2
      response_length: 16
      temperature: 1.0
      missing_eos_penalty: 1.0
      gradient_checkpointing: false
      num_sample_generations: 0
      save_steps: 1
      save_total_limit: 1000
"""
# The reward model of recipes/tiny.yaml, sound, and its PPO with its largest kl_coef: nothing there is to be stopped.
HEALTHY = [
    "one.data.path=tiny:preferences", "one.trainer.num_train_epochs=1", "ppo.trainer.kl_coef=0.5",
    "ppo.trainer.learning_rate=2e-3", "ppo.value_model=adapter",
    "ppo.trainer.per_device_train_batch_size=64", "ppo.trainer.num_ppo_epochs=4", "ppo.trainer.total_episodes=1280",
]  # fmt: skip
PAIRS, NOISE = 200, 0.25
BETAS = [0.0, 0.05, 0.1, 0.2, 0.5]
SCORED_BY = {
    "one": "{stage: one}",
    "mean": "{stage: four, combine: mean}",
    "min": "{stage: four, combine: min}",
    "mean - std": "{stage: four, combine: mean - std}",
}
# What is stopped by, and what the policy to keep is chosen by. With the last two, nobody has gold.
WATCHES: dict[str, tuple[list[str], str]] = {
    "keep best": ([], "gold"),
    "gold": (["gold"], "gold"),
    "pessimistic": (["pessimistic", "disagreement"], "pessimistic"),
    "replies": (["length", "self_bleu", "repetition", "new_phrases", "ended"], "pessimistic"),
}
SAMPLES, OF_REWARD = 8, 2  # replies to each question of the second half, and how many of them are scored
MARGIN = 0.05
SURE = 1.645  # standard errors: one side of 95 %
COLORS = ["#c4520a", "#a3427e", "#0072b2", "#00805c", "#6b7280"]
TITLES = [("gold: share of right and polite replies", 46), ("gain in reward, which PPO optimises", 426)]
LEGEND = (
    "square: where PPO ends without a watch; disc: what the watch keeps. Thick: means over the seeds, thin: each run"
)
STEPS = 19
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 366" width="770" height="366" role="img">
<title>Gold and reward over the distance from SFT, with and without a watch</title>
<style>
text {{ font: 11px system-ui, sans-serif; fill: #59626e; }} .ink {{ fill: #1d232b; }}
.middle {{ text-anchor: middle; }} .end {{ text-anchor: end; }}
path {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
.grid {{ stroke: #dcdcd6; stroke-width: .7; }} .level {{ stroke: #59626e; stroke-width: 1; stroke-dasharray: 3 3; }}
</style>
<rect width="770" height="366" fill="#ffffff"/>
{parts}
</svg>
"""


class Point(NamedTuple):
    """A policy, measured on the second half of the questions.

    Attributes:
        step: how many updates it had.
        kl: of a whole reply from SFT, in nats; the mean, as all of these.
        reward: what PPO optimises.
        gold: of each question.
    """

    step: int
    kl: float
    reward: float
    gold: list[float]

    @property
    def mean(self) -> float:
        """Gold."""
        return statistics.fmean(self.gold)


@dataclass
class Outcome:
    """One run of PPO without a watch, and what each watch would have made of it.

    Attributes:
        seed, scored_by, beta: what it was run with.
        points: every policy that was measured on the way; the first is SFT's.
        lines: of `watch.jsonl`.
        repeated: for the watches that it was also run with: whether all came out the same.
        seconds: of CPU.
    """

    seed: int
    scored_by: str
    beta: float
    points: list[Point]
    lines: list[dict[str, Any]]
    repeated: dict[str, bool]
    seconds: float

    @classmethod
    def read(cls, row: dict[str, Any]) -> Self:
        """What was written as a row."""
        return cls(**{**row, "points": [Point(*one) for one in row["points"]]})

    @cached_property
    def measurements(self) -> list[Measurement]:
        """What the watch saw, and the alarms that it raised."""
        return with_alarms(self.lines)

    def stopped(self, name: str) -> int | None:
        """The update at which one of `WATCHES` stops the run; None where it does not, or for any other name."""
        stop = WATCHES[name][0] if name in WATCHES else []
        return next((one.step for one in self.measurements if set(one.confirmed) & set(stop)), None)

    def seen(self, name: str) -> list[Point]:
        """The policies that the run has measured until it is stopped or over."""
        end = self.stopped(name)
        return [point for point in self.points if end is None or point.step <= end]

    def left(self, name: str) -> Point:
        """The policy that the run leaves with one of `WATCHES`; for any other name, without one."""
        if name not in WATCHES:
            return self.points[-1]
        stop, by = WATCHES[name]
        kept = watch.best(self.measurements[: len(self.seen(name))], by, stop).step
        return next(point for point in self.points if point.step == kept)


def with_alarms(lines: Sequence[dict[str, Any]]) -> list[Measurement]:
    """The measurements of a whole run, from the lines of its `watch.jsonl`, with the alarms that are raised by now."""
    seen: list[Measurement] = []
    for line in lines:
        seen.append(Measurement.from_json({**line, "alarms": [], "confirmed": []}))
        watch.raise_alarms(seen, lines[-1]["step"])
    return seen


def exchange(pairs: Sequence[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Some of the pairs, a quarter of them with the labels exchanged."""
    some = rng.sample(pairs, PAIRS)
    wrong = {*rng.sample(range(PAIRS), round(NOISE * PAIRS))}
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if i in wrong else pair
        for i, pair in enumerate(some)
    ]


def halves() -> tuple[list[str], list[str]]:
    """The held-out questions for the watch, and those for the tables; each asks for a fact of its own."""
    prompts = sorted(row["prompt"] for row in rows_of(TINY / "data" / "heldout.jsonl"))
    random.Random(0).shuffle(prompts)
    return prompts[:52], prompts[52:]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class World:
    """A seed's folder, with a recipe, its data, and the stages that all runs of PPO share.

    Args:
        folder: where to work; what is there already is not trained again.
        seed: of the pairs, of their labels, and of all that is trained.
        settings: overrides of the recipe.
    """

    def __init__(self, folder: Path, seed: int, settings: Sequence[str] = ()) -> None:
        self.folder, self.seed, self.settings = folder, seed, settings
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "pairs.jsonl", exchange(rows_of(TINY / "data" / "preferences.jsonl"), random.Random(seed)))
        write_rows(folder / "watched.jsonl", [{"prompt": prompt} for prompt in halves()[0]])
        (folder / "recipe.yaml").write_text(RECIPE)
        self.metrics: dict[str, dict[str, Any]] = {}

    def job(self, stage: str, *settings: str) -> Job:
        """A stage of the recipe, with further overrides."""
        written = [f"seed={self.seed}", f"output_dir={self.folder}/runs", *self.settings, *settings]
        recipe = recipes.load(str(self.folder / "recipe.yaml"), written)
        return Job(recipe, stage, recipe.run, Reader(recipe))

    def share(self, name: str) -> None:
        """Train SFT or a reward stage, unless that is done, and put its adapter where PPO looks for it."""
        job, run = self.job(name), {"sft": sft.run}.get(name, reward.run)
        noted = job.folder / "metrics.json"
        if not noted.exists():
            start_afresh(job)
            with silence():
                metrics = run(job)
            shutil.rmtree(job.published, ignore_errors=True)
            job.artifact.rename(job.published)
            noted.write_text(json.dumps(metrics))
        self.metrics[name] = json.loads(noted.read_text())

    def train(self, *settings: str) -> Job:
        """Run the stage of PPO, afresh."""
        job = self.job("ppo", *settings)
        start_afresh(job)
        with silence():
            ppo.run(job)
        return job


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what trainers print of every update."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def start_afresh(job: Job) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    job.work.mkdir(parents=True)


class Scale:
    """Measures policies on the second half of the questions, always with the same random numbers.

    Args:
        job: a stage of PPO.
    """

    def __init__(self, job: Job) -> None:
        recipe, tokenizer = job.recipe, job.reader.tokenizer
        assert recipe.evaluate is not None
        self.questions = halves()[1] * SAMPLES
        self.prompts = encode_prompts(tokenizer, recipe.evaluate.data, self.questions)
        self.tokenizer, self.evaluate = tokenizer, recipe.evaluate
        self.shared = SharedBase(load_base(recipe.model, tokenizer), job.stage.lora, job.init, job.reward_models)
        self.stops = stop_tokens(tokenizer, self.shared.causal_lm.generation_config, job.stage.trainer)
        self.rewards = mixture.load(recipe, job.name, self.shared.rewards, tokenizer)

    def weigh(self, step: int, weights: dict[str, Tensor] | Path | None) -> Point:
        """Measure a policy.

        Args:
            step: its own.
            weights: those of a checkpoint, or an adapter's folder; None for where PPO starts.
        """
        if isinstance(weights, Path):
            adapters.load_weights(self.shared.peft, weights, self.shared.names["policy"])
        elif weights is not None:
            checkpoint.put_back(self.shared.policy, weights)
        episodes, gold = self.replies()
        some = episodes.select(torch.arange(OF_REWARD * len(gold)))
        with torch.no_grad():
            log_probs, log_ref = (
                reply_log_probs(one, some, self.evaluate.temperature)[0]
                for one in (self.shared.policy, self.shared.reference)
            )
            scores = self.rewards(some, at_once=self.evaluate.batch_size).total
        kl = kl_per_token(log_probs, log_ref, "k1").sum(1).mean().item()
        return Point(step, kl, scores.mean().item(), gold.mean(1).tolist())

    @torch.no_grad()
    def replies(self) -> tuple[Episodes, Numbers]:
        """The policy's replies, to all questions once, and so on; and their gold, `[questions, SAMPLES]`."""
        torch.manual_seed(0)
        episodes = sample(
            self.shared.policy,
            self.prompts,
            response_length=self.evaluate.max_new_tokens,
            temperature=self.evaluate.temperature,
            stop_token_id=self.stops,
            pad_token_id=self.tokenizer.pad_token_id,
            at_once=self.evaluate.batch_size,
        )
        texts = self.tokenizer.batch_decode(episodes.tokens, skip_special_tokens=True)
        return episodes, np.array(world.judge(self.questions, texts)).reshape(SAMPLES, -1).T

    def order(self) -> Order | None:
        """How well the reward puts SFT's replies to a question in the order of their gold."""
        checkpoint.put_back(self.shared.policy, start_of(self))
        episodes, gold = self.replies()
        scores = self.rewards(episodes, at_once=self.evaluate.batch_size).total.double().numpy()
        return order(scores.reshape(SAMPLES, -1).T, gold)


def run(world_: World, scored_by: str, beta: float, scale: Scale, repeat: Sequence[str]) -> Outcome:
    """Run PPO without a watch, and measure every policy that a watch would have measured.

    What is measured changes nothing of training, so a watched run is the same until it stops: which policy it leaves
    follows from the measurements. With each of `repeat` it is also run, and all weights are compared.
    """
    settings = [f"ppo.trainer.kl_coef={beta}", f"ppo.rewards=[{SCORED_BY[scored_by]}]"]
    start = time.process_time()
    job = world_.train(*settings)
    seconds = time.process_time() - start
    lines, folders, points = rows_of(job.folder / WATCH), checkpoints(job), []
    for step in (line["step"] for line in lines):
        points.append(scale.weigh(step, load_file(folders[step] / "policy.safetensors") if step else start_of(scale)))
    outcome = Outcome(world_.seed, scored_by, beta, points, lines, {}, seconds)
    digests = {step: digest(folder) for step, folder in folders.items()}
    for name in repeat:
        stop, by = WATCHES[name]
        again = world_.train(*settings, f"ppo.watch={{stop: {stop}, keep: best, best_by: {by}}}")
        left, further = outcome.left(name), checkpoints(again)
        outcome.repeated[name] = (
            max(further) == (outcome.stopped(name) or max(folders))
            and all(digest(folder) == digests[step] for step, folder in further.items())
            and scale.weigh(left.step, again.artifact).gold == left.gold
        )
    shutil.rmtree(job.folder)
    return outcome


def start_of(scale: Scale) -> dict[str, Tensor]:
    """The weights that the policy starts from, which are the reference's."""
    adapters.copy_adapter(scale.shared.peft, scale.shared.names["reference"], scale.shared.names["policy"])
    return checkpoint.weights(scale.shared.policy)


def checkpoints(job: Job) -> dict[int, Path]:
    """Those of a run, by step."""
    return {int(path.name.rpartition("-")[2]): path for path in job.work.glob("checkpoint-*")}


def digest(folder: Path) -> str:
    """Of the policy's weights."""
    weights = load_file(folder / "policy.safetensors")
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


class Difference(NamedTuple):
    """Of gold between two policies, with its standard error over questions."""

    value: float
    error: float

    @property
    def surely(self) -> float:
        """What it is at least, but for one case in twenty."""
        return self.value - SURE * self.error


def difference(one: Point, other: Point) -> Difference:
    """Gold of one less that of the other."""
    by_question = np.array(one.gold) - np.array(other.gold)
    return Difference(float(by_question.mean()), float(by_question.std(ddof=1)) / len(by_question) ** 0.5)


def fall(points: Sequence[Point], kept: Point, draws: int = 200) -> Difference:
    """How far a policy is below the best one of its run.

    The highest of many measurements is chosen for its luck, too. So the best is chosen by one half of the questions,
    and compared by the other half; the mean over many ways to halve them. The error is that of the comparison with the
    policy that all questions choose.
    """
    gold, own = np.array([point.gold for point in [*points, kept]]), np.array(kept.gold)
    rng, questions, found = np.random.default_rng(0), gold.shape[1], []
    for _ in range(draws):
        order = rng.permutation(questions)
        chosen_by, rest = order[: questions // 2], order[questions // 2 :]
        best = gold[int(gold[:, chosen_by].mean(1).argmax())]
        found.append(float((best - own)[rest].mean()))
    best = max([*points, kept], key=lambda point: point.mean)
    return Difference(statistics.fmean(found), difference(best, kept).error)


class Row(NamedTuple):
    """Some runs together, with one of `WATCHES` or without any.

    Attributes:
        runs: how many.
        under_start, surely_under_start: how many end with gold under SFT's; and by more than the error explains.
        fallen, surely_fallen: how many end more than `MARGIN` below the best policy that they had; and surely, beyond
            the error.
        worst: the furthest that one is below it.
        missed: how many end surely more than `MARGIN` below the best policy of the same run without a watch, which may
            have come after the stop.
        stopped: how many were stopped.
        start, best, end: means of gold: of SFT, of the best policy of each run, and of what it left. The best is the
            end and what `fall` says that it is below the best.
        error: of the mean of `end`, over the seeds.
    """

    runs: int
    under_start: int
    surely_under_start: int
    fallen: int
    surely_fallen: int
    worst: float
    missed: int
    stopped: int
    start: float
    best: float
    end: float
    error: float


def summarise(outcomes: Sequence[Outcome], name: str) -> Row:
    """See `Row`."""
    left = [one.left(name) for one in outcomes]
    gains = [difference(point, one.points[0]) for point, one in zip(left, outcomes, strict=True)]
    falls = [fall(one.seen(name), point) for point, one in zip(left, outcomes, strict=True)]
    of_all = [fall(one.points, point) for point, one in zip(left, outcomes, strict=True)]
    by_seed: dict[int, list[float]] = {}
    for one, point in zip(outcomes, left, strict=True):
        by_seed.setdefault(one.seed, []).append(point.mean)
    means = [statistics.fmean(values) for values in by_seed.values()]
    end = statistics.fmean(point.mean for point in left)
    return Row(
        runs=len(outcomes),
        under_start=sum(gain.value < 0 for gain in gains),
        surely_under_start=sum(gain.value + SURE * gain.error < 0 for gain in gains),
        fallen=sum(one.value > MARGIN for one in falls),
        surely_fallen=sum(one.surely > MARGIN for one in falls),
        worst=max(one.value for one in falls),
        missed=sum(one.surely > MARGIN for one in of_all),
        stopped=sum(one.stopped(name) is not None for one in outcomes),
        start=statistics.fmean(one.points[0].mean for one in outcomes),
        best=end + statistics.fmean(one.value for one in of_all),
        end=end,
        error=statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def outcome_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The main table: for each way to score and each watch, what the runs come to."""
    rows = []
    for scored_by in SCORED_BY:
        some = [one for one in outcomes if one.scored_by == scored_by]
        for name in ["none", *WATCHES] if some else []:
            row = summarise(some, name)
            rows.append(
                [
                    scored_by, name, str(row.runs), f"{row.under_start} ({row.surely_under_start})",
                    f"{row.fallen} ({row.surely_fallen})", f"{row.worst:.3f}", str(row.missed), str(row.stopped),
                    f"{row.start:.3f}", f"{row.best:.3f}", f"{row.end:.3f} ± {row.error:.3f}",
                ]
            )  # fmt: skip
    return rows


def beta_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Of one way to score: means over seeds by `kl_coef`."""
    rows = []
    for beta in sorted({one.beta for one in outcomes}):
        some = [one for one in outcomes if one.beta == beta]
        none, gold = summarise(some, "none"), summarise(some, "gold")
        kl, kept_kl = (statistics.fmean(one.left(name).kl for one in some) for name in ("none", "gold"))
        rewards = [
            statistics.fmean(point.reward for point in points)
            for points in zip(*[(one.points[0], one.points[-1]) for one in some], strict=True)
        ]
        rows.append(
            [
                f"{beta:g}", f"{rewards[0]:.2f} → {rewards[1]:.2f}", f"{kl:.1f}", f"{none.start:.3f}",
                f"{none.best:.3f}", f"{none.end:.3f} ± {none.error:.3f}", f"{gold.end:.3f} ± {gold.error:.3f}",
                f"{kept_kl:.1f}",
            ]
        )  # fmt: skip
    return rows


class Foreseen(NamedTuple):
    """What the first half of a run forecasts of the whole of it.

    Attributes:
        peak, low, high: the distance √KL where gold is forecast to be highest; see `forecast.Forecast`.
        furthest: the distance at the half of the way.
        real: the distance of the policy with the highest gold of the whole run, on the second half of the questions.
        lost: how far under that one the measured policy is that is nearest to the forecast.
    """

    peak: float
    low: float | None
    high: float | None
    furthest: float
    real: float
    lost: Difference


def foresee(one: Outcome) -> Foreseen | None:
    """Forecast from the measurements of the first half of the updates; None where no peak is forecast."""
    last = one.points[-1].step
    early = [measured for measured in one.measurements if measured.step <= last / 2]
    found = forecast([measured.kl for measured in early], watch.means_of(early, "gold"))
    if found is None or found.peak is None or not found.describes:
        return None
    best = max(one.points, key=lambda point: point.mean)
    near = min(one.points, key=lambda point: abs(max(point.kl, 0.0) ** 0.5 - found.peak))
    return Foreseen(found.peak, found.low, found.high, found.furthest, max(best.kl, 0.0) ** 0.5, difference(best, near))


def healthy(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs of PPO that nothing should stop, as in recipes/tiny.yaml: five with other seeds for each reward model.

    Returns:
        For each run the alarms that were confirmed, and the gold of all measurements.
    """
    found = []
    for seed in seeds:
        world_ = World(folder / f"healthy-{seed}", seed, HEALTHY)
        for stage in ("sft", "one"):
            world_.share(stage)
        for number in range(5):
            noted = world_.folder / f"{number}.json"
            if not noted.exists():
                job = world_.train(f"seed={seed + 1000 * number}")
                noted.write_text(json.dumps(rows_of(job.folder / WATCH)))
                shutil.rmtree(job.folder)
            seen = with_alarms(json.loads(noted.read_text()))
            confirmed = sorted({name for one in seen for name in one.confirmed})
            found.append({"seed": seed, "confirmed": confirmed, "gold": [one.mean("gold") for one in seen]})
            print(f"healthy, seed {seed}, {number}: {found[-1]}", file=sys.stderr)
    return found


def picture(outcomes: Sequence[Outcome]) -> str:
    """Gold, and the gain in reward, over √KL as SVG: each run thin, the means of each `kl_coef` thick."""
    betas = sorted({one.beta for one in outcomes})
    runs = {beta: [along(one) for one in outcomes if one.beta == beta] for beta in betas}
    kept = {
        beta: np.mean([triple(one.left("gold"), one.points[0]) for one in outcomes if one.beta == beta], axis=0)
        for beta in betas
    }
    everything = np.concatenate([*itertools.chain(*runs.values()), *(one[None] for one in kept.values())])
    least, most = everything.min(0), everything.max(0) * 1.03
    parts: list[str] = []
    for number, (title, left) in enumerate(TITLES, 1):
        low, high = (0.0, 1.0) if number == 1 else (least[2] - 0.03 * most[2], most[2])
        axes = Axes(30, 280, (0, most[0]), (low, high), left, left + 320, parts)
        axes.scale_y()
        axes.scale_x("√KL from SFT (KL in nats a reply)")
        axes.text(left, 18, title, "ink")
        if number == 1:
            start = float(np.mean([one.points[0].mean for one in outcomes]))
            axes.rule("level", y=start)
            axes.text(axes.right, float(axes.down(start)) - 4, "SFT", "end")
        for color, own in zip(COLORS, runs.values(), strict=False):
            for run_ in own:
                axes.line(run_[:, 0], run_[:, number], f"stroke:{color};stroke-width:.8;opacity:.35")
        for color, beta in zip(COLORS, betas, strict=False):
            mean = np.mean(runs[beta], axis=0)
            axes.line(mean[:, 0], mean[:, number], f"stroke:{color}")
            axes.marks(mean[-1:, 0], mean[-1:, number], 1, 8, color)
            axes.marks(kept[beta][:1], kept[beta][number : number + 1], 0, 10, color)
    for place, (color, beta) in enumerate(zip(COLORS, betas, strict=False)):
        across = 46 + 118 * place
        parts.append(f'<path d="M{across} 330h24" style="stroke:{color}"/>')
        parts.append(f'<text class="ink" x="{across + 29}" y="334">kl_coef {beta:g}</text>')
    parts.append(f'<text x="46" y="354">{LEGEND}</text>')
    return SVG.format(parts="\n".join(parts))


def triple(point: Point, start: Point) -> Numbers:
    """√KL, gold, and what the reward is above that of the start."""
    return np.array([max(point.kl, 0.0) ** 0.5, point.mean, point.reward - start.reward])


def along(one: Outcome) -> Numbers:
    """These three along a run, `[STEPS, 3]`, at even distances of updates, between two measurements on a line."""
    measured = np.array([triple(point, one.points[0]) for point in one.points])
    steps = [point.step for point in one.points]
    at = np.linspace(0, steps[-1], STEPS)
    return np.stack([np.interp(at, steps, measured[:, i]) for i in range(3)], axis=1)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--scored-by", nargs="+", choices=SCORED_BY, default=list(SCORED_BY))
    parser.add_argument("--repeat", nargs="*", choices=WATCHES, default=[], help="watches that are run themselves, too")
    parser.add_argument("--healthy", type=int, nargs="*", default=[], help="seeds of runs that nothing should stop")
    parser.add_argument("--folder", type=Path, help="to go on with what was done there; by default a temporary one")
    parser.add_argument("--picture", type=Path, help="write the figure here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overoptimisation-")))
        with contextlib.redirect_stdout(sys.stderr):
            outcomes = list(measure(folder.absolute(), arguments))
            others = healthy(folder.absolute(), arguments.healthy)
            models = model_rows(folder.absolute(), arguments.seeds)
    show(outcomes, others, models)
    if arguments.picture:
        arguments.picture.write_text(picture([one for one in outcomes if one.scored_by == "one"]), encoding="utf-8")
    missed = goals(outcomes, others)
    print("\n".join(["", *(f"missed: {one}" for one in missed)] if missed else ["", "all goals are met"]))
    sys.exit(1 if missed else 0)


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Run what is not in `folder/outcomes.jsonl` yet, and yield all."""
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / "outcomes.jsonl"
    known = [Outcome.read(row) for row in rows_of(noted)] if noted.exists() else []
    for seed in arguments.seeds:
        world_ = World(folder / f"seed-{seed}", seed)
        for stage in ("sft", "one", "four"):
            world_.share(stage)
        for scored_by in arguments.scored_by:
            scale = None
            for beta in arguments.betas:
                done = [one for one in known if (one.seed, one.scored_by, one.beta) == (seed, scored_by, beta)]
                if not done:
                    scale = scale or Scale(world_.job("ppo", f"ppo.rewards=[{SCORED_BY[scored_by]}]"))
                    done = [run(world_, scored_by, beta, scale, arguments.repeat)]
                    with noted.open("a") as file:
                        file.write(json.dumps(asdict(done[0])) + "\n")
                print(describe(done[0]), flush=True)
                yield done[0]


def model_rows(folder: Path, seeds: Sequence[int]) -> list[list[str]]:
    """How good the reward models are: by their own held-out pairs, and by gold of SFT's replies."""
    rows = []
    for seed in seeds:
        world_, cells = World(folder / f"seed-{seed}", seed), [str(seed)]
        for stage, scored_by in (("one", "one"), ("four", "mean")):
            world_.share(stage)
            numbers = world_.metrics[stage]
            cells.append(f"{numbers['eval_accuracy']:.2f} ± {numbers['eval_accuracy_se']:.2f}")
            ordered = Scale(world_.job("ppo", f"ppo.rewards=[{SCORED_BY[scored_by]}]")).order()
            cells.append(f"{ordered.share:.2f} ± {ordered.se:.2f}" if ordered else "")
        rows.append(cells)
    return rows


def describe(one: Outcome) -> str:
    """A line on a run, for those who wait."""
    way = " ".join(f"{point.step}:{point.mean:.2f}/{point.kl:.1f}" for point in one.points)
    left = {name: one.left(name) for name in WATCHES}
    kept = ", ".join(f"{name} keeps {point.step}: {point.mean:.2f}" for name, point in left.items())
    return f"seed {one.seed}, {one.scored_by}, {one.beta:g}: {way}; {kept}; {one.repeated} {one.seconds:.0f} s"


def show(outcomes: Sequence[Outcome], others: Sequence[dict[str, Any]], models: Sequence[Sequence[str]]) -> None:
    """Print the tables."""
    head = ["seed", "accuracy, one", "by gold, one", "accuracy, four", "by gold, four"]
    print(table(head, models) + "\n")
    head = [
        "scored by",
        "watch",
        "runs",
        "end under SFT",
        f"end over {MARGIN} under their best",
        "worst",
        "of the whole run",
        "stopped",
    ]
    print(table([*head, "gold SFT", "best", "end"], outcome_rows(outcomes)))
    for scored_by in SCORED_BY:
        some = [one for one in outcomes if one.scored_by == scored_by]
        if some:
            print(f"\nScored by {scored_by}:\n")
            head = ["kl_coef", "reward", "KL at the end", "gold SFT", "best", "end", "end, watched", "KL, watched"]
            print(table(head, beta_rows(some)))
    rows = [(one, foreseen) for one in outcomes if (foreseen := foresee(one))]
    head = ["scored by", "kl_coef", "seed", "furthest √KL", "forecast √KL", "95 %", "real √KL", "gold lost"]
    print(f"\nForecasts of the first half, {len(rows)} of {len(outcomes)} runs have one:\n")
    print(table(head, [
        [one.scored_by, f"{one.beta:g}", one.seed, f"{it.furthest:.2f}", f"{it.peak:.2f}",
         " to ".join("none" if end is None else f"{end:.2f}" for end in (it.low, it.high)),
         f"{it.real:.2f}", f"{it.lost.value:.3f} ± {it.lost.error:.3f}"]
        for one, it in rows
    ]))  # fmt: skip
    if others:
        names = sorted({name for row in others for name in row["confirmed"]})
        print(f"\nAlarms confirmed in {len(others)} healthy runs: " + (", ".join(
            f"{name} {sum(name in row['confirmed'] for row in others)}" for name in names) or "none"))  # fmt: skip
    checked = [same for one in outcomes for same in one.repeated.values()]
    if checked:
        print(f"\n{sum(checked)} of {len(checked)} watched runs have the weights of the runs without a watch")


def goals(outcomes: Sequence[Outcome], others: Sequence[dict[str, Any]]) -> list[str]:
    """What was not reached."""
    missed: list[str] = []
    some = [one for one in outcomes if one.scored_by == "one"]
    if not some:
        return ["no run is scored by one reward model"]
    none, gold = summarise(some, "none"), summarise(some, "gold")
    if gold.surely_fallen:
        missed.append(f"{gold.surely_fallen} watched runs end more than {MARGIN} under their best")
    if gold.surely_under_start:
        missed.append(f"{gold.surely_under_start} watched runs end under SFT")
    if none.surely_fallen < none.runs / 4:
        missed.append(f"only {none.surely_fallen} of {none.runs} runs without a watch end under their best")
    alarms = sum("gold" in row["confirmed"] for row in others)
    if alarms > len(others) / 25:
        missed.append(f"{alarms} of {len(others)} healthy runs would be stopped")
    if not all(same for one in outcomes for same in one.repeated.values()):
        missed.append("a watched run has other weights than the run without a watch")
    return missed


if __name__ == "__main__":
    main()
