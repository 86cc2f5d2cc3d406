"""What is said of a recipe's rewards before anything trains."""

from pathlib import Path

import pytest

from rlhf_pipeline.recipe import load
from rlhf_pipeline.rewards.trial import try_rewards
from rlhf_pipeline.stages.job import Reader

RECIPE = """
model: {path: tiny, quantization: none}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts, rewards: [%s]}
"""
NEVER = "{function: 'mine:never'}"
ON_LONG_ONES = "{function: 'mine:on_long_ones'}"
EXACT = "{function: 'rlhf_pipeline.rewards.answers:exact', name: exact}"


@pytest.mark.parametrize(
    ("rewards", "warned"),
    [
        (NEVER, True), (f"{NEVER}, {ON_LONG_ONES}", True), (EXACT, True), (f"{NEVER}, {{stage: reward}}", False),
        (f"{NEVER}, {{function: 'mine:always', weight: 0.1}}", False), ("{function: 'mine:once'}", False),
        ("{stage: reward}", False), (f"{NEVER}, {{function: 'mine:always', weight: 0}}", True),
        (f"{NEVER}, {{stage: reward, weight: 0}}", True),
    ],
)  # fmt: skip
def test_rewards_of_which_none_applies_are_warned_of(tmp_path: Path, rewards: str, warned: bool) -> None:
    """The prompts have no column `answer`, which `exact` reads where there is one."""
    (tmp_path / "mine.py").write_text(
        "def never(prompts): return [None for _ in prompts]\n"
        "def on_long_ones(completions): return [1.0 if len(one) > 1000 else None for one in completions]\n"
        "def always(prompts): return [0.0 for _ in prompts]\n"
        "def once(prompts): return [0.0, *[None] * (len(prompts) - 1)]\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE % rewards)
    recipe = load(str(tmp_path / "recipe.yaml"))
    said = try_rewards(recipe, "ppo", Reader(recipe).tokenizer)
    assert [one.partition(": ")[0] for one in said] == ["stages.ppo.rewards"] * warned
    assert try_rewards(recipe, "sft", Reader(recipe).tokenizer) == []
