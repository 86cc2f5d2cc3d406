"""`rewards`: what a stage's replies are scored by."""

import shutil
from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, judging_inputs, stage_inputs
from rlhf_pipeline.recipe import TINY, Recipe, content_of, load
from rlhf_pipeline.recipe.rewards import deviations, uses_of_columns
from rlhf_pipeline.recipe.schema import Stage

HEAD = """
model: {path: tiny, quantization: none}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: tiny:preferences}
  other: {kind: reward, data: tiny:preferences}
"""
FUNCTION = "rlhf_pipeline.models.tiny.world:judge"


def written(folder: Path, ppo: str, head: str = HEAD) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(f"{head}  ppo: {{data: tiny:prompts, {ppo}}}\n")
    return load(str(file))


@pytest.mark.parametrize(
    ("text", "k"),
    [("mean", 0.0), ("min", None), ("mean - std", 1.0), ("mean-2*std", 2.0), ("mean - .5 * std", 0.5), (" mean ", 0.0)],
)
def test_what_combine_says(text: str, k: float | None) -> None:
    assert deviations(text) == k


@pytest.mark.parametrize("text", ["max", "mean + std", "std", "mean - two*std", "mean -", "", "mean - std*2"])
def test_what_combine_may_not_say(text: str) -> None:
    with pytest.raises(ValueError, match="expected `mean`"):
        deviations(text)


def test_the_short_form_is_a_list_of_one(tmp_path: Path) -> None:
    short, long = written(tmp_path, "reward: other"), written(tmp_path, "rewards: [{stage: other}]")
    assert short.stages["ppo"].scored_by == long.stages["ppo"].scored_by
    assert short.stages["ppo"].parents == long.stages["ppo"].parents == {"init": "sft", "reward": "other"}
    earlier = {"sft": "a", "reward": "b", "other": "c"}
    assert stage_inputs(short, "ppo", earlier, Digests()) == stage_inputs(long, "ppo", earlier, Digests())


def test_several_reward_stages_are_parents_of_their_own(tmp_path: Path) -> None:
    recipe = written(tmp_path, f"rewards: [{{stage: other}}, {{function: '{FUNCTION}'}}, {{stage: reward}}]")
    assert recipe.stages["ppo"].parents == {"init": "sft", "reward": "other", "reward.2": "reward"}
    inputs = stage_inputs(recipe, "ppo", {"sft": "a", "reward": "b", "other": "c"}, Digests())
    assert (inputs["reward"], inputs["reward.2"]) == ("c", "b")


def test_a_function_needs_no_reward_stage(tmp_path: Path) -> None:
    head = HEAD.partition("  reward:")[0]
    recipe = written(tmp_path, f"rewards: [{{function: '{FUNCTION}'}}]", head)
    assert recipe.stages["ppo"].parents == {"init": "sft"}
    inputs = stage_inputs(recipe, "ppo", {"sft": "a"}, Digests())
    assert inputs["rewards.0.source"].startswith("world.py@")


@pytest.mark.parametrize("change", ["weight: 0.5", "combine: min", "name: another"])
def test_what_decides_the_sum_is_in_the_fingerprint(tmp_path: Path, change: str) -> None:
    earlier = {"sft": "a", "reward": "b", "other": "c"}
    head = HEAD.replace("tiny:preferences}", "tiny:preferences, members: 2}", 1)
    plain = stage_inputs(written(tmp_path, "reward: reward", head), "ppo", earlier, Digests())
    changed = stage_inputs(
        written(tmp_path, f"rewards: [{{stage: reward, {change}}}]", head), "ppo", earlier, Digests()
    )
    assert changed.keys() - plain.keys() == {"rewards.0.stage", f"rewards.0.{change.partition(':')[0]}"}


def test_labels(tmp_path: Path) -> None:
    recipe = written(tmp_path, f"rewards: [{{stage: other}}, {{function: '{FUNCTION}'}}, {{model: org/name, name: x}}]")
    assert [reward.label for reward in recipe.stages["ppo"].scored_by] == ["other", "judge", "x"]


def test_a_reward_of_weight_0_is_measured_alone(tmp_path: Path) -> None:
    gold = f"{{function: '{FUNCTION}', weight: 0, name: %s}}"
    recipe = written(tmp_path, f"rewards: [{{stage: other}}, {gold % 'gold'}]")
    stage = recipe.stages["ppo"]
    assert [one.label for one in stage.scored_by] == ["other", "gold"] and stage.gold == "gold"
    assert [one.label for one in stage.weighed] == ["other"]
    assert written(tmp_path, f"rewards: [{{stage: other}}, {gold % 'silver'}]").stages["ppo"].gold is None
    assert written(tmp_path, "rewards: [{stage: other, name: gold}]").stages["ppo"].gold is None


def test_it_is_written_as_it_was_said(tmp_path: Path) -> None:
    recipe = written(tmp_path, "rewards: [{stage: other, weight: 2.0}]")
    assert content_of(recipe)["stages"]["ppo"]["rewards"] == [{"stage": "other", "weight": 2.0}]
    assert "rewards" not in content_of(recipe)["stages"]["sft"]


@pytest.mark.parametrize(
    ("ppo", "place", "message"),
    [
        ("reward: other, rewards: [{stage: reward}]", "stages.ppo.reward", "exclude each other"),
        ("rewards: [{stage: nothing}]", "stages.ppo.rewards.0.stage", "which is not in the recipe"),
        ("rewards: [{stage: sft}]", "stages.ppo.rewards.0.stage", "`stage` needs reward"),
        ("rewards: [{stage: reward, function: 'a:b'}]", "stages.ppo.rewards.0", "`stage` and `function` exclude"),
        ("rewards: [{weight: 2.0}]", "stages.ppo.rewards.0", "names no reward"),
        ("rewards: [{stage: reward, weight: 0}]", "stages.ppo.rewards", "all rewards have weight 0"),
        ("rewards: [{stage: reward, revision: main}]", "stages.ppo.rewards.0.revision", "beside `model` alone"),
        ("rewards: [{stage: reward, combine: min}]", "stages.ppo.rewards.0.combine", "`reward` trains one reward"),
        ("rewards: [{stage: reward, combine: max}]", "stages.ppo.rewards.0.combine", "got 'max'"),
        ("rewards: [{stage: reward}, {stage: reward}]", "stages.ppo.rewards.1", "two rewards are called `reward`"),
        ("rewards: [{function: nothing}]", "stages.ppo.rewards.0.function", "expected `module:function`"),
        ("rewards: [{function: 'a:b', combine: min}]", "stages.ppo.rewards.0.combine", "only a reward stage has mem"),
        ("rewards: []", "stages.ppo.rewards", "`rewards` is empty"),
        ("rewards: [{model: ./nowhere}]", "stages.ppo.rewards.0.model", "there is no model folder"),
        ("rewards: [{model: ./adapter}]", "stages.ppo.rewards.0.model", "is an adapter, not a model"),
        ("rewards: [{model: ./empty}]", "stages.ppo.rewards.0.model", "it has no config.json"),
        ("rewards: [{model: ./pickle}]", "stages.ppo.rewards.0.model", "as a pickle"),
        ("rewards: [{model: ./pointer}]", "stages.ppo.rewards.0.model", "is a Git LFS pointer"),
        ("rewards: [{model: ./good, revision: v1}]", "stages.ppo.rewards.0.revision", "a model folder has no revis"),
    ],
)
def test_what_is_wrong_is_refused_at_its_place(tmp_path: Path, ppo: str, place: str, message: str) -> None:
    for name in ("adapter", "empty", "pickle", "pointer", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(TINY / "checkpoint", tmp_path / "good", dirs_exist_ok=True)
    for name, weights in (("pickle", "pytorch_model.bin"), ("pointer", "model.safetensors")):
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / weights).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=message) as caught:
        written(tmp_path, ppo)
    assert str(caught.value.place).endswith(f": {place}")


@pytest.mark.parametrize(
    ("ppo", "hint"),
    [
        ("rewards: reward", "write [{stage: reward}]"),
        ("rewards: [my:own]", "write {function: 'my:own'}"),
        ("rewards: {stage: reward}", "put [ ] around it, or `- ` before it"),
        ("rewards: [{stage: reward, name: a b}]", "it is a part of the names of what is logged"),
    ],
)
def test_a_hint_says_how_it_is_written(tmp_path: Path, ppo: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        written(tmp_path, ppo)
    assert caught.value.hint == hint


def test_an_adapter_in_place_of_a_classifier_is_sent_to_its_key(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        written(tmp_path, "rewards: [{model: .}]")
    assert caught.value.hint == "one over this recipe's base is named by `stage`, in place of `model`"


@pytest.mark.parametrize("metric", ["rewards/reward/mean", "rewards/reward/std", "rewards/reward/disagreement"])
@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_what_is_logged_of_an_ensemble_can_have_a_gate(tmp_path: Path, kind: str, metric: str) -> None:
    file = tmp_path / "recipe.yaml"
    head = HEAD.replace("reward: {data: tiny:preferences}", "reward: {data: tiny:preferences, members: 2}", 1)
    file.write_text(f'{head}  {kind}: {{data: tiny:prompts, reward: reward, gates: {{{metric}: "< 9"}}}}\n')
    assert metric in load(str(file)).stages[kind].gates


def test_members_that_are_wrong_are_all_that_is_said(tmp_path: Path) -> None:
    """How many there will be is not known, so nothing is said of `combine`."""
    head = HEAD.replace("reward: {data: tiny:preferences}", "reward: {data: tiny:preferences, members: 1}", 1)
    with pytest.raises(InputError) as caught:
        written(tmp_path, "rewards: [{stage: reward, combine: min}]", head)
    assert [str(error.place).rpartition(": ")[2] for error in caught.value.all] == ["stages.reward.members"]


def test_rewards_have_no_effect_where_nothing_is_sampled(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + "  dpo: {data: tiny:preferences, rewards: [{stage: reward}]}\n")
    with pytest.raises(InputError, match="`rewards` has no effect in a stage of kind `dpo`"):
        load(str(file))


def test_a_recipe_that_extends_another_replaces_one_form_by_the_other(tmp_path: Path) -> None:
    written(tmp_path, "reward: other")
    (tmp_path / "more.yaml").write_text("extends: recipe.yaml\nstages: {ppo: {rewards: [{stage: reward}]}}\n")
    assert load(str(tmp_path / "more.yaml")).stages["ppo"].parents["reward"] == "reward"


def test_functions_are_looked_for_beside_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one recipe extends another of another folder, that may be two."""
    for name in ("team", "mine", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    written(tmp_path / "team", "rewards: [{function: 'of_the_team:f'}]")
    (tmp_path / "team" / "of_the_team.py").write_text("1")
    (tmp_path / "mine" / "of_mine.py").write_text("2")
    evaluate = "evaluate: {data: tiny:heldout, judge: 'of_mine:f'}"
    (tmp_path / "mine" / "mine.yaml").write_text(f"extends: ../team/recipe.yaml\n{evaluate}\n")
    recipe = load(str(tmp_path / "mine" / "mine.yaml"))
    assert recipe.folders == [tmp_path / "mine", tmp_path / "team"]
    inputs = stage_inputs(recipe, "ppo", {"sft": "a", "reward": "b", "other": "c"}, Digests())
    judging = judging_inputs(recipe, "ppo", {}, Digests())
    assert inputs["rewards.0.source"].startswith("of_the_team.py@")
    assert judging is not None and judging["judge_source"].startswith("of_mine.py@")


def test_columns_that_reward_functions_get_are_not_called_unused() -> None:
    used_as = {"prompt": "prompt", "answer": None}
    scored, functions = (
        Stage.model_validate({"kind": "ppo", "data": {"path": "x"}, "rewards": [reward]})
        for reward in ({"stage": "reward"}, {"function": "mine:right"})
    )
    assert uses_of_columns(scored, used_as) == used_as
    assert uses_of_columns(functions, used_as) == {"prompt": "prompt", "answer": "for the reward functions"}
