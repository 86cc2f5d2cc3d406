"""An ensemble of reward models: what each member is, that none leaves a trace in the next, and the numbers of all."""

import json
import math
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.gates import known_metrics
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import WEIGHTS, members
from rlhf_pipeline.shares import standard_error
from rlhf_pipeline.stages import ensemble
from rlhf_pipeline.stages.job import Job

RECIPE = """
name: short
seed: 7
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, down_proj]}
stages:
  reward:
    data: {path: preferences.jsonl, eval_fraction: 0.25}
    trainer: {max_steps: 3, learning_rate: 1e-2, per_device_train_batch_size: 4, gradient_checkpointing: false,
              logging_steps: 1, save_steps: 1, save_total_limit: 9, max_length: 22, center_rewards_coefficient: 0.01}
"""


def prepare(folder: Path, *overrides: str) -> Job:
    if not (folder / "recipe.yaml").exists():
        (folder / "recipe.yaml").write_text(RECIPE)
        lines = (TINY / "data" / "preferences.jsonl").read_text().splitlines(keepends=True)
        (folder / "preferences.jsonl").write_text("".join(lines[:20]))
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, "reward", recipe.run)
    job.work.mkdir(parents=True, exist_ok=True)
    return job


def run(job: Job) -> dict[str, Any]:
    """Train with the global generators where no run would leave them."""
    torch.manual_seed(999)
    random.seed(999)
    np.random.seed(999)
    return stages.BY_KIND["reward"].run(job)


def logged(job: Job) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "_runtime", "_per_second")
    return [{name: value for name, value in row.items() if not name.endswith(times)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Any]]:
    """An ensemble of two that nothing stopped, and its final numbers."""
    job = prepare(tmp_path_factory.mktemp("whole"), "reward.members=2")
    return job, run(job)


@pytest.mark.slow
def test_the_first_member_is_the_reward_model_that_a_stage_without_members_trains(
    whole: tuple[Job, dict[str, Any]], tmp_path: Path
) -> None:
    job, metrics = whole
    alone = prepare(tmp_path)
    of_one = run(alone)
    first, second = members(job.artifact)
    assert same(weights(first), weights(alone.artifact))
    assert sorted(path.name for path in first.iterdir()) == sorted(
        ["member-2", *(path.name for path in alone.artifact.iterdir())]
    )
    assert sorted(path.name for path in second.iterdir()) == ["adapter_config.json", WEIGHTS]
    rows = [
        {name: value for name, value in row.items() if name != "member"} for row in logged(job) if row["member"] == 1
    ]
    assert rows == logged(alone)
    assert metrics["member/1/eval_accuracy"] == of_one["eval_accuracy"]
    assert metrics["dropped_pairs"] == of_one["dropped_pairs"] > 0


@pytest.mark.slow
def test_the_members_have_heads_and_orders_of_data_of_their_own(whole: tuple[Job, dict[str, Any]]) -> None:
    job, metrics = whole
    of_both = [weights(folder) for folder in members(job.artifact)]
    heads = [next(tensor for name, tensor in one.items() if "lora_" not in name) for one in of_both]
    assert torch.nn.functional.cosine_similarity(*heads).abs() < 0.6  # drawn anew, and moved little in three steps
    tokens = [
        [row["num_tokens"] for row in logged(job) if row["member"] == number and "loss" in row] for number in (1, 2)
    ]
    assert tokens[0] != tokens[1]
    assert metrics["eval_disagreement"] > 0
    assert metrics["loss"] == pytest.approx((metrics["member/1/loss"] + metrics["member/2/loss"]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_ensemble_that_was_stopped_at_its_second_member_ends_the_same(
    whole: tuple[Job, dict[str, Any]], tmp_path: Path, step: int
) -> None:
    """Before it began, in the midst of it and after its last step; so nothing of the first one is in the second."""
    job, metrics = whole
    resumed = prepare(tmp_path, "reward.members=2")
    shutil.copytree(job.work / "member-1", resumed.work / "member-1")
    shutil.copy(job.folder / "metrics.jsonl", resumed.folder)
    if step:
        shutil.copytree(job.work / "member-2" / f"checkpoint-{step}", resumed.work / "member-2" / f"checkpoint-{step}")
    before = durable.contents(resumed.work / "member-1")
    assert run(resumed) == metrics
    assert durable.contents(resumed.work / "member-1") == before
    assert durable.contents(resumed.artifact) == durable.contents(job.artifact)
    assert (resumed.folder / "pairs.jsonl").read_bytes() == (job.folder / "pairs.jsonl").read_bytes()
    assert logged(resumed) == logged(job)


@pytest.mark.slow
def test_an_ensemble_is_evaluated_by_its_mean_scores(whole: tuple[Job, dict[str, Any]]) -> None:
    """What is written of held-out pairs gives the final numbers again, and gates know every metric."""
    job, metrics = whole
    rows = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    held_out = stages.BY_KIND["reward"].prepare(job).data.held_out
    assert held_out is not None
    evaluated = [
        row
        for row, chosen, rejected in zip(rows, held_out["chosen_ids"], held_out["rejected_ids"], strict=True)
        if max(len(chosen), len(rejected)) <= 22  # TRL drops the others
    ]
    assert 0 < metrics["eval_pairs"] == len(evaluated) < len(rows)
    margins = [row["chosen"] - row["rejected"] for row in evaluated]
    assert metrics["eval_margin"] == pytest.approx(statistics.fmean(margins), abs=1e-6)
    assert metrics["eval_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert metrics["eval_disagreement"] == pytest.approx(
        statistics.fmean(row[name] for row in evaluated for name in ("chosen_std", "rejected_std")), abs=1e-6
    )
    assert metrics["eval_margin_disagreement"] == pytest.approx(
        statistics.fmean(row["margin_std"] for row in evaluated), abs=1e-6
    )
    trained = [ensemble.read_member(job.work / f"member-{number}" / "adapter") for number in (1, 2)]
    for row, *scores in zip(rows, *(member.pairs["chosen"] for member in trained), strict=True):
        assert row["chosen"] == pytest.approx(statistics.fmean(scores))
        assert row["chosen_std"] == pytest.approx(statistics.pstdev(scores))
    assert set(metrics) == known_metrics(job.recipe, "reward")


def test_the_numbers_of_an_ensemble_are_those_of_the_formulas() -> None:
    scores = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], [[3.0, -1.0, 0.0], [1.0, 0.0, 0.5]]])
    found = ensemble.held_out_metrics(scores, 0.1)
    chosen, rejected = [2.0, -0.5, 1.0], [0.5, 0.5, 0.75]  # the means of the two
    margins = [1.5, -1.0, 0.25]
    loss = statistics.fmean(math.log(1 + math.exp(-margin)) for margin in margins)
    center = statistics.fmean((a + b) ** 2 for a, b in zip(chosen, rejected, strict=True))
    assert found["eval_loss"] == pytest.approx(loss + 0.1 * center)
    assert found["eval_accuracy"] == pytest.approx(2 / 3)
    assert (found["eval_pairs"], found["eval_accuracy_se"]) == (3, standard_error(2, 3))
    assert found["eval_margin"] == pytest.approx(0.25)
    assert (found["eval_min_reward"], found["eval_max_reward"]) == (-0.5, 2.0)
    # Of two numbers, the standard deviation is half of what lies between them.
    assert found["eval_disagreement"] == pytest.approx(statistics.fmean([1.0, 0.5, 1.0, 0.5, 0.5, 0.25]))
    assert found["eval_margin_disagreement"] == pytest.approx(statistics.fmean([0.5, 0.0, 0.75]))
    assert "eval_disagreement" not in ensemble.metrics([ensemble.Trained({"loss": 1.0}, {}, [])] * 2, None)


def test_seed_and_number_alone_decide_what_a_member_draws() -> None:
    assert ensemble.seed_of(1, 7) == 7
    seeds = [ensemble.seed_of(member, seed) for seed in range(20) for member in range(1, 9)]
    assert len(set(seeds)) == len(seeds)  # so that the ensembles of two seeds have no member in common
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert ensemble.seed_of(3, 7) == ensemble.seed_of(3, 7)


def test_a_sample_of_the_pairs_is_drawn_with_replacement(tmp_path: Path) -> None:
    job = prepare(tmp_path, "reward.members=3", "reward.bootstrap=true", "reward.trainer.data_seed=5")
    inputs = stages.BY_KIND["reward"].prepare(job)

    def drawn(member: int, bootstrap: bool) -> list[list[int]]:
        own = ensemble.inputs_of(member, inputs, tmp_path / "work", 7, bootstrap)
        return own.data.train["chosen_ids"][:]

    pairs = inputs.data.train["chosen_ids"][:]
    samples = [drawn(member, True) for member in (1, 2, 3)]
    assert [len(sample) for sample in samples] == [len(pairs)] * 3
    assert all(row in pairs for sample in samples for row in sample)
    assert all(len({tuple(row) for row in sample}) < len(pairs) for sample in samples)
    assert samples[0] != samples[1] != samples[2] != samples[0]
    assert samples[1] == drawn(2, True)
    assert drawn(2, False) == pairs
    args = [ensemble.inputs_of(member, inputs, tmp_path / "work", 7, True).args for member in (1, 2)]
    assert [one.data_seed for one in args] == [5, ensemble.seed_of(2, 5)]
    assert inputs.args.seed == args[0].seed == 7 != args[1].seed


@pytest.mark.parametrize(("limit", "dropped"), [(None, 0), (4, 0), (3, 2), (2, 3)])
def test_pairs_over_the_greatest_length_are_counted(limit: int | None, dropped: int) -> None:
    pairs = Dataset.from_dict({"chosen_ids": [[1], [2, 2], [3, 3, 3]], "rejected_ids": [[1] * 4, [2], [3]]})
    assert ensemble.too_long(pairs.select([2, 0, 0]), limit) == dropped
