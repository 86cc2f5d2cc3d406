"""`value_model`: what tells the value in a PPO stage."""

from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, stage_inputs
from rlhf_pipeline.recipe import Recipe, content_of, load

TEXT = """
model: {path: tiny, quantization: none}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
  dpo: {data: tiny:preferences}
"""


def written(folder: Path, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(TEXT)
    return load(str(folder / "recipe.yaml"), list(overrides))


def test_only_a_head_is_in_the_fingerprint(tmp_path: Path) -> None:
    """What was trained before there was the key had an adapter, and is not trained again."""
    earlier = {"sft": "a", "reward": "b"}
    unsaid, adapter, head = (
        stage_inputs(written(tmp_path, *said), "ppo", earlier, Digests())
        for said in ([], ["ppo.value_model=adapter"], ["ppo.value_model=head"])
    )
    assert unsaid == adapter and "value_model" not in unsaid
    assert head == unsaid | {"value_model": "head"}


def test_the_resolved_recipe_says_which_it_is_where_there_is_a_value(tmp_path: Path) -> None:
    for said, expected in ([], "adapter"), (["ppo.value_model=head"], "head"):
        stages = content_of(written(tmp_path, *said))["stages"]
        assert [stage.get("value_model") for stage in stages.values()] == [None, None, expected, None]
        assert "value_model" not in stages["sft"]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_it_has_no_effect_where_no_value_is_trained(tmp_path: Path, stage: str) -> None:
    with pytest.raises(InputError, match=f"`value_model` has no effect in a stage of kind `{stage}`") as caught:
        written(tmp_path, f"{stage}.value_model=adapter")
    assert caught.value.hint == "remove it: it is a key of kind ppo"


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="heads") as caught:
        written(tmp_path, "ppo.value_model=heads")
    assert "adapter" in f"{caught.value.message} {caught.value.hint}"
