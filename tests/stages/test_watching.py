"""Watching a policy: it leaves training alone, keeps the best policy, stops it, and is resumed as if never stopped."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from together import together

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.hacking.forecast import forecast
from rlhf_pipeline.hacking.watch import Measurement, means_of
from rlhf_pipeline.models import adapters
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.watch import Prompts, Watcher

pytestmark = pytest.mark.slow

RECIPE = """
name: short
seed: 7
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
evaluate: {data: prompts.jsonl, judge: "scripted:judge", n: 8, max_new_tokens: 6, batch_size: 8, along: 6}
stages:
  reward:
    init: base
    data: preferences.jsonl
    members: 2
    trainer: {max_steps: 3, learning_rate: 1e-2, per_device_train_batch_size: 8, gradient_checkpointing: false,
              center_rewards_coefficient: 0.01}
  ppo:
    data: prompts.jsonl
    init: base
    trainer: {learning_rate: 3e-3, total_episodes: 24, per_device_train_batch_size: 4, num_ppo_epochs: 1, kl_coef: 0.3,
              lr_scheduler_type: constant, response_length: 6, gradient_checkpointing: false, save_steps: 1,
              save_total_limit: 9, stop_token: null}
  grpo:
    data: prompts.jsonl
    init: base
    rewards: [{function: "scripted:vowels"}]
    trainer: {learning_rate: 3e-3, max_steps: 6, per_device_train_batch_size: 8, num_generations: 4, logging_steps: 1,
              lr_scheduler_type: constant, max_completion_length: 6, gradient_checkpointing: false, save_steps: 1,
              save_total_limit: 9}
"""
# A judge who gives what the script says, one number after the other, with a little noise that follows from the prompt.
SCRIPT = """
script, asked = {script}, {asked}

def judge(prompts, completions, **_):
    global asked
    mean = script[min(asked, len(script) - 1)]
    asked += 1
    return [mean + 0.01 * (len(prompt) % 5) for prompt in prompts]

def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

def longer(firsts, seconds):
    return [float(first > second) for first, second in zip(firsts, seconds)]
"""
NUMBERS = itertools.count()
PEAK = [0.1, 0.3, 0.6, 0.5, 0.5, 0.4, 0.3]  # of the measurements before training and after each of six steps


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little of the tiny world, and an ensemble of two reward models trained on it."""
    folder = tmp_path_factory.mktemp("watching")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, count in (("preferences", 16), ("prompts", 8)):
        lines = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    (folder / "scripted.py").write_text(SCRIPT.format(script=PEAK, asked=0))
    train(folder, "reward")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def train(folder: Path, stage: str, *overrides: str, script: list[float] = PEAK, asked: int = 0) -> tuple[Job, dict]:
    """Run a stage in this process, from where an earlier one left its `work/`; the job and the final metrics."""
    name = f"script_{next(NUMBERS)}"  # a module that was imported once is not read again
    (folder / f"{name}.py").write_text(SCRIPT.format(script=script, asked=asked))
    text = (folder / "recipe.yaml").read_text().replace("scripted:", f"{name}:")
    (folder / f"{name}.yaml").write_text(text)
    recipe = recipes.load(str(folder / f"{name}.yaml"), ["name=short", *overrides])
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True, exist_ok=True)
    metrics = stages.BY_KIND[job.stage.kind].run(job)
    shutil.rmtree(job.folder / "adapter", ignore_errors=True)
    shutil.copytree(job.artifact, job.folder / "adapter")
    return job, metrics


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.folder / "adapter" / adapters.WEIGHTS)


def measured(job: Job) -> list[Measurement]:
    lines = (job.folder / "watch.jsonl").read_text().splitlines()
    return [Measurement.from_json(json.loads(line)) for line in lines]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fresh(folder: Path, stage: str, *overrides: str, **script: Any) -> tuple[Job, dict]:
    """As `train`, from the beginning."""
    shutil.rmtree(folder / "runs" / "short" / stage, ignore_errors=True)
    return train(folder, stage, *overrides, **script)


SHORT = {"ppo": "ppo.trainer.total_episodes=8", "grpo": "grpo.trainer.max_steps=2"}  # two steps


@pytest.mark.parametrize(("kind", "size"), [("ppo", 2), ("grpo", 4)])
def test_several_ranks_measure_together_and_the_first_asks_and_writes(folder: Path, kind: str, size: int) -> None:
    """Nine prompts of `evaluate` on two ranks, whose judge goes on by its script only where it is asked."""
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "more.jsonl").write_text("".join(lines + lines[:1]))
    (folder / "script_of_ranks.py").write_text(SCRIPT.format(script=PEAK, asked=0))
    text = (folder / "recipe.yaml").read_text().replace("scripted:", "script_of_ranks:")
    (folder / "ranks.yaml").write_text(text.replace("data: prompts.jsonl, judge", "data: more.jsonl, judge"))
    overrides = [
        "name=short",
        f"{kind}.watch={{keep: best}}",
        f"{kind}.trainer.per_device_train_batch_size={size}",
        "evaluate.n=9",
    ]
    recipe = recipes.load(str(folder / "ranks.yaml"), overrides)
    job = Job(recipe, kind, recipe.run)
    job.work.mkdir(parents=True)

    metrics, nothing = together(lambda: stages.BY_KIND[kind].run(job))
    assert nothing == {} and metrics["watch/kept_step"] == metrics["watch/best_step"] == 2
    found = measured(job)
    assert [one.step for one in found] == [0, 1, 2, 3, 4, 5, 6]
    assert [round(one.mean("gold"), 1) for one in found] == PEAK and len(found[0].by_prompt["gold"]) == 9
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "objective/kl" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "gold/kl" in row] == [0, 1, 2, 3, 4, 5, 6]
    assert found[0].kl == pytest.approx(0, abs=1e-5) and abs(found[-1].kl) > 1e-4
    file = "policy.safetensors" if kind == "ppo" else adapters.WEIGHTS
    then = load_file(job.work / "checkpoint-2" / file)
    kept = load_file(job.artifact / adapters.WEIGHTS)
    assert sorted(one.sum().item() for one in kept.values()) == sorted(one.sum().item() for one in then.values())


def test_any_number_of_ranks_measures_the_same(folder: Path) -> None:
    def first(processes: int) -> Measurement:
        recipe = recipes.load(
            str(folder / "recipe.yaml"),
            ["ppo.trainer.per_device_train_batch_size=2", "ppo.trainer.total_episodes=1"],
        )
        job = Job(recipe, "ppo", recipe.run)
        shutil.rmtree(job.folder, ignore_errors=True)
        job.work.mkdir(parents=True)
        together(lambda: stages.BY_KIND["ppo"].run(job), processes=processes)
        return measured(job)[0]

    two, three = first(2), first(3)
    assert two.by_prompt["reward"] == pytest.approx(three.by_prompt["reward"], abs=1e-5)
    assert len(set(two.by_prompt["reward"])) == len(two.by_prompt["reward"]) == 8


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_policy_of_the_best_measurement_is_the_one_that_training_had_then(folder: Path, kind: str) -> None:
    """The judge likes the policy of step 2 best: what is left is what two steps leave that nothing measures."""
    job, metrics = train(folder, kind, f"{kind}.watch={{keep: best}}")
    found, kept = measured(job), weights(job)
    assert [one.step for one in found] == [0, 1, 2, 3, 4, 5, 6]
    assert found[0].kl == pytest.approx(0, abs=1e-5) and max(abs(one.kl) for one in found) > 1e-4
    means = [one.mean("gold") for one in found]
    assert [mean - means[0] for mean in means] == pytest.approx([mean - PEAK[0] for mean in PEAK])
    assert (metrics["watch/best_step"], metrics["watch/kept_step"], metrics["watch/last_step"]) == (2, 2, 6)
    assert same(kept, weights(fresh(folder, kind, SHORT[kind], "evaluate.along=0")[0]))


def test_where_nothing_is_better_than_the_start_the_start_is_left(folder: Path) -> None:
    job, metrics = train(folder, "ppo", "ppo.watch={keep: best}", SHORT["ppo"], script=[0.9, 0.5])
    assert metrics["watch/kept_step"] == 0
    assert not any(weight.any() for name, weight in weights(job).items() if "lora_B" in name)


@pytest.mark.parametrize(("kind", "step"), [("ppo", 2), ("grpo", 4)])
def test_a_confirmed_alarm_ends_training_also_of_a_run_that_is_resumed(folder: Path, kind: str, step: int) -> None:
    """Resumed before the best measurement, or after it, and from the checkpoint of the step that ended training."""
    watch, script = f"{kind}.watch={{stop: [gold]}}", [0.1, 0.3, 0.4, 0.6, 0.2]
    job, metrics = train(folder, kind, watch, script=script)
    lines, kept = (job.folder / "watch.jsonl").read_text(), weights(job)
    assert [one.confirmed for one in measured(job)] == [[], [], [], [], [], ["gold"]]
    assert metrics["watch/stopped_at_step"] == metrics["watch/alarm/gold"] == 5 and metrics["watch/kept_step"] == 3
    for last in (5, step):
        shutil.rmtree(job.artifact)
        (job.work / "trained.json").unlink()
        for checkpoint in job.work.glob("checkpoint-*"):
            if int(checkpoint.name.partition("-")[2]) > last:
                shutil.rmtree(checkpoint)
        again, resumed = train(folder, kind, watch, script=script, asked=last + 1)
        assert (again.folder / "watch.jsonl").read_text() == lines, last  # not one step more was made
        assert same(weights(again), kept), last
        assert {name: value for name, value in resumed.items() if "watch" in name} == {
            name: value for name, value in metrics.items() if "watch" in name
        }, last


def test_a_judge_that_fails_leaves_a_gap_and_the_rest_is_measured(folder: Path) -> None:
    """It fails once; what is measured then is never the best, and raises no alarm of that judge."""
    (folder / "failing.py").write_text(
        "asked = 0\n\ndef judge(prompts, completions, **_):\n    global asked\n    asked += 1\n"
        "    if asked == 3:\n        raise OSError('no line')\n    return [float(asked)] * len(prompts)\n"
    )
    job, metrics = train(folder, "ppo", "evaluate.judge=failing:judge", "ppo.watch={stop: [gold]}")
    found = measured(job)
    assert [np.isnan(one.mean("gold")) for one in found] == [False, False, True, False, False, False, False]
    assert all(one.measures["length"].value > 0 for one in found)
    assert metrics["watch/best_step"] == 6 and "watch/stopped_at_step" not in metrics


def test_the_target_of_kl_is_where_the_forecast_has_its_peak(folder: Path) -> None:
    """β moves by Ziegler's rule from the first forecast with a peak on, and not before."""
    auto = ["ppo.trainer.target_kl=auto", "ppo.trainer.kl_horizon=10", "ppo.trainer.learning_rate=1e-1"]
    job, _ = train(folder, "ppo", *auto, "ppo.trainer.kl_coef=0.01")
    found = measured(job)
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "objective/kl_coef" in row]
    beta, steered = 0.01, 0
    for number, row in enumerate(updates):
        assert row["objective/kl_coef"] == pytest.approx(beta, rel=1e-6)
        so_far = found[: number + 1]  # what was measured before this update
        ahead = forecast([one.kl for one in so_far], means_of(so_far, "gold"))
        if ahead is not None and ahead.peak is not None:
            distances = [one.kl**0.5 for one in so_far if one.kl > 0]
            target = min(max(ahead.peak, min(distances)), 1.5 * max(distances)) ** 2
            beta *= 1 + min(max(row["objective/kl"] / target - 1, -0.2), 0.2) * 4 / 10
            steered += 1
    assert 0 < steered < len(updates)


@pytest.fixture
def watcher(folder: Path) -> Watcher:
    """What keeps the best policy of a stage by the judge, which nothing trains here."""
    recipe = recipes.load(str(folder / "recipe.yaml"), ["ppo.watch={keep: best}"])
    return Watcher(SimpleNamespace(), Job(recipe, "ppo", recipe.run), Prompts([], None, [], 1, None, None, 8, 6))


def test_at_the_last_checkpoint_of_an_earlier_version_there_is_nothing_to_say(watcher: Watcher, tmp_path: Path) -> None:
    """It has no measurements, and after it none is made; the policy that is there is left."""
    watcher.read(tmp_path)
    watcher.on_train_end(SimpleNamespace(), SimpleNamespace(global_step=6), SimpleNamespace())
    assert watcher.outcome == {}


@pytest.mark.parametrize(("peak", "within"), [(2.0, True), (30.0, False)])
def test_a_peak_out_of_reach_is_none(watcher: Watcher, peak: float, within: bool) -> None:
    """Gold follows Gao's curve up to KL 4 nats, √KL 2; a forecast reaches to √KL 4."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (9, 40))
    for step, of_prompts in enumerate(noise):
        d = 0.25 * step
        gold = of_prompts + (d * (1 + np.log(peak) - np.log(d)) if d else 0.0)
        watcher.measurements.append(Measurement(step, d * d, {"gold": gold.tolist(), "reward": [d] * 40}))
    assert watcher.forecast is not None and watcher.forecast.peak == pytest.approx(peak, rel=0.1)
    found = watcher.outcome
    assert found.get("watch/peak_kl") == (pytest.approx(peak**2, rel=0.1) if within else None)
    assert found["watch/best_step"] == found["watch/last_step"] == 8


BASE = "{model: base, answers: [early, late], min_probability: 0, template: '{{ prompt }}{{ first }} A:{{ second }}'}"


@pytest.mark.parametrize(("ai", "moves"), [(BASE, False), ("{model: scripted:longer}", True)])
def test_an_ai_judge_compares_with_the_first_replies(folder: Path, ai: str, moves: bool) -> None:
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace('judge: "scripted:judge"', f"ai_judge: {ai}"))
    job, _ = train(folder, "ppo", "ppo.watch={keep: best}", "ppo.trainer.learning_rate=2e-2")
    found = measured(job)
    assert found[0].by_prompt["judge"] == [0.5] * 8 and "gold" not in found[0].by_prompt
    assert all(0 <= point <= 1 for one in found for point in one.by_prompt["judge"])
    assert not moves or any(one.mean("judge") != 0.5 for one in found)


def test_without_a_judge_an_ensemble_says_what_is_best_on_prompts_that_are_held_out(folder: Path) -> None:
    """Pessimistic is the mean of the members less once their standard deviation."""
    recipe = (folder / "recipe.yaml").read_text()
    start = recipe.index("evaluate:")
    (folder / "recipe.yaml").write_text(recipe[:start] + recipe[recipe.index("stages:") :])
    job, metrics = train(
        folder, "ppo", "ppo.data={path: prompts.jsonl, eval_fraction: 0.5}", "ppo.watch={stop: [pessimistic]}"
    )
    found = measured(job)
    assert set(found[0].by_prompt) == {"reward", "pessimistic"} and len(found[0].by_prompt["reward"]) == 4
    for one in found:
        assert one.mean("reward") - one.mean("pessimistic") == pytest.approx(
            one.measures["disagreement"].value, rel=1e-5
        )
    assert metrics["watch/best_step"] == max(found, key=lambda one: one.mean("pessimistic")).step
