"""The metrics that a recipe lets gates stand on are those that real stages end with, no more and no fewer."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.gates import known_metrics, possible_metrics
from rlhf_pipeline.stages.job import Job

RECIPE = """
name: short
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 2, lora_alpha: 4, target_modules: [q_proj, v_proj]}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, max_length: 256}
  reward:
    init: base
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, max_length: 256}
  ppo:
    init: base
    data: prompts.jsonl
    trainer: {total_episodes: 4, per_device_train_batch_size: 2, num_ppo_epochs: 1, response_length: 2,
              learning_rate: 1e-3, gradient_checkpointing: false}
  grpo:
    init: base
    data: prompts.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, num_generations: 2, max_completion_length: 2,
              learning_rate: 1e-3, gradient_checkpointing: false}
  rloo:
    init: base
    data: prompts.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, num_generations: 2, max_completion_length: 2,
              learning_rate: 1e-3, gradient_checkpointing: false}
  dpo:
    init: base
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, max_length: 256}
  kto:
    init: base
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 16, gradient_checkpointing: false, max_length: 256}
"""
pytestmark = pytest.mark.slow
HELD_OUT = "data.eval_fraction=0.5"
EVALUATE = "evaluate={data: prompts.jsonl, judge: 'gate_judge:judge', n: 2, max_new_tokens: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a little of the tiny world, a judge, and a reward adapter for PPO."""
    folder = tmp_path_factory.mktemp("gates")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, count in (("demonstrations", 8), ("preferences", 16), ("prompts", 16)):
        lines = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    (folder / "gate_judge.py").write_text("def judge(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    train(folder, "reward")
    return folder


def train(folder: Path, stage: str, *overrides: str) -> tuple[recipes.Recipe, set[str]]:
    """Run one stage for real, in this process; the recipe and the names of its final metrics."""
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True)
    metrics = stages.BY_KIND[job.stage.kind].run(job)
    if stage == "reward":
        job.artifact.rename(job.folder / "adapter")
    shutil.rmtree(job.work)
    return recipe, set(metrics)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", []),
        ("sft", [HELD_OUT, EVALUATE, "trainer.logging_first_step=true", "trainer.include_num_input_tokens_seen=all"]),
        ("sft", ["trainer.logging_strategy=no", "trainer.skip_memory_metrics=false"]),
        ("reward", [HELD_OUT, EVALUATE, "trainer.logging_steps=0.5", "trainer.center_rewards_coefficient=0.1"]),
        ("dpo", [HELD_OUT, EVALUATE, "trainer.loss_type=[sigmoid, sft]", "trainer.logging_steps=1"]),
        ("kto", [HELD_OUT, "trainer.logging_steps=1"]),
        ("ppo", [HELD_OUT, EVALUATE, "trainer.eval_steps=9", "trainer.logging_steps=5"]),
        ("ppo", ["ptx_data=demonstrations.jsonl", "trainer.ptx_coef=0.1", "trainer.value_warmup_updates=1",
                 "trainer.normalize_scores=true", "trainer.score_clip=1.0"]),
        ("ppo", ["trainer.value_warmup_updates=2", "trainer.logging_strategy=no"]),
        ("grpo", [HELD_OUT, EVALUATE, "trainer.logging_steps=1"]),
        ("grpo", ["trainer.beta=0.1", "trainer.loss_type=cispo", "trainer.logging_steps=1"]),
        ("rloo", ["trainer.logging_strategy=no"]),
    ],
)  # fmt: skip
def test_the_metrics_that_a_recipe_promises_are_those_of_the_stage(
    folder: Path, tmp_path: Path, stage: str, settings: list[str]
) -> None:
    overrides = [one if one.startswith("evaluate") else f"{stage}.{one}" for one in settings]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if stage == "reward":
        shutil.rmtree(copy / "runs")
    recipe, metrics = train(copy, stage, *overrides)
    assert metrics - possible_metrics(recipe, stage) == known_metrics(recipe, stage)
    # On this model and these data, none of what is merely possible comes about.
    assert not metrics & possible_metrics(recipe, stage)


def test_steps_that_only_the_number_of_rows_decides_are_possible(folder: Path, tmp_path: Path) -> None:
    """Four steps in a pass over eight rows: TRL's ten between logs are too many, three are not."""
    overrides = ["sft.trainer.max_steps=-1", "sft.trainer.num_train_epochs=1", "sft.trainer.logging_steps=3"]
    recipe, metrics = train(Path(shutil.copytree(folder, tmp_path / "copy")), "sft", *overrides)
    assert {"loss", "grad_norm", "learning_rate"} <= possible_metrics(recipe, "sft") & metrics
    assert known_metrics(recipe, "sft") <= metrics <= known_metrics(recipe, "sft") | possible_metrics(recipe, "sft")


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_pairs_that_do_not_fit_are_counted(folder: Path, tmp_path: Path, stage: str) -> None:
    """A gate on their number must hold where there are none, so none is a number too."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("runs")))
    assert "dropped_pairs" in known_metrics(recipes.load(str(copy / "recipe.yaml")), stage)
    rows = [json.loads(line) for line in (copy / "preferences.jsonl").read_text().splitlines()]
    rows[0]["prompt"] *= 40
    (copy / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "dropped_pairs" in train(copy, stage)[1]


def test_a_kl_budget_that_is_exceeded_leaves_the_metrics_that_were_possible(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    overrides = [f"ppo.{HELD_OUT}", "ppo.trainer.eval_steps=1", "ppo.trainer.kl_budget=0.05",
                 "ppo.trainer.total_episodes=64", "ppo.trainer.per_device_train_batch_size=8",
                 "ppo.trainer.response_length=6"]  # fmt: skip
    seen = []
    for learning_rate in (3e-2, 2e-2, 5e-2, 1e-1):  # until one leaves the budget only after a policy worth keeping
        with contextlib.suppress(RuntimeError):
            recipe, metrics = train(copy, "ppo", *overrides, f"ppo.trainer.learning_rate={learning_rate}")
            assert known_metrics(recipe, "ppo") <= metrics
            seen = sorted(metrics & possible_metrics(recipe, "ppo"))
            assert metrics == known_metrics(recipe, "ppo") | set(seen)
        shutil.rmtree(copy / "runs" / "short" / "ppo")
        if "kl_budget/exceeded_with" in seen:
            break
    assert {"kl_budget/best_step", "kl_budget/exceeded_at_step", "kl_budget/exceeded_with"} <= set(seen)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_mixture_of_experts_has_the_auxiliary_loss_that_was_possible(
    folder: Path, tmp_path: Path, stage: str
) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=256,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model.save_pretrained(copy / "experts")
    AutoTokenizer.from_pretrained(TINY / "checkpoint").save_pretrained(copy / "experts")
    overrides = ["model.path=experts", f"{stage}.{HELD_OUT}", f"{stage}.trainer.logging_steps=1"]
    of_experts = {"aux_loss", "eval_aux_loss"}
    # The judge samples after SFT has computed the routers' loss.
    given = [EVALUATE, f"{stage}.trainer.router_aux_loss_coef=0.1"]
    for more, extra in ((given, of_experts), ([], set())):
        recipe, metrics = train(copy, stage, *overrides, *more)
        assert metrics - known_metrics(recipe, stage) == extra
        assert possible_metrics(recipe, stage) & of_experts == extra
        first = json.loads((copy / "runs" / "short" / stage / "metrics.jsonl").read_text().splitlines()[0])
        if stage == "dpo":
            assert (first["loss"] == pytest.approx(math.log(2), abs=1e-6)) == (not extra)
        shutil.rmtree(copy / "runs" / "short" / stage)
