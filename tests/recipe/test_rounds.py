"""`rounds`: what is written out of it, from where, and that what is wrong is said once, where it was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, stage_inputs
from rlhf_pipeline.recipe import Recipe, show, to_yaml

HEAD = """\
model: {path: tiny, quantization: none}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: tiny:preferences}
"""
LOOP = """\
  candidates: {kind: sample, data: tiny:prompts, n: 2, rewards: [{stage: reward}]}
  dpo:
    data: stage:candidates
    trainer: {beta: 0.3}
rounds: {n: 3, stages: [candidates, dpo]}
"""
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a recipe that begins with `HEAD`."""

    def of(text: str, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(HEAD + text)
        return recipe.load(str(tmp_path / "r.yaml"), overrides)

    return of


@pytest.fixture
def problems(load, tmp_path) -> Callable[..., list[str]]:
    """What is said of a recipe, each with its place behind the file's name, and its hint."""

    def of(text: str, *overrides: str) -> list[str]:
        with pytest.raises(InputError) as caught:
            load(text, *overrides)
        return [f"{one} ({one.hint})".removeprefix(f"{tmp_path}/r.yaml:") for one in caught.value.all]

    return of


def inits(loaded: Recipe) -> dict[str, Any]:
    return {name: stage.init for name, stage in loaded.stages.items() if name not in ("sft", "reward")}


def references(loaded: Recipe) -> dict[str, str]:
    return {name: stage.reference for name, stage in loaded.stages.items() if stage.reference is not None}


def test_each_round_goes_on_where_the_one_before_ends_and_measures_from_where_the_first_starts(load):
    loaded = load(LOOP)
    assert inits(loaded) == {
        "candidates-1": "sft", "dpo-1": "sft",
        "candidates-2": "dpo-1", "dpo-2": "dpo-1",
        "candidates-3": "dpo-2", "dpo-3": "dpo-2",
    }  # fmt: skip
    assert list(loaded.stages)[2:] == list(inits(loaded))
    assert {name: stage.data.path for name, stage in loaded.stages.items() if stage.kind == "dpo"} == {
        f"dpo-{i}": f"stage:candidates-{i}" for i in (1, 2, 3)
    }
    assert references(loaded) == {"dpo-2": "sft", "dpo-3": "sft"}
    assert loaded.stages["dpo-2"].parents == {"init": "dpo-1", "reference": "sft", "rows": "candidates-2"}
    assert loaded.rounds is None


def test_a_start_that_is_named_moves_on_and_another_one_stays(load):
    """`init: sft` says where the first round starts; what names something else means that in all rounds."""
    named = load(
        LOOP.replace("kind: sample,", "kind: sample, init: sft,").replace(
            "    data: stage", "    init: sft\n    data: stage"
        )
    )
    assert inits(named) == inits(load(LOOP)) and references(named) == {"dpo-2": "sft", "dpo-3": "sft"}
    other = load(LOOP.replace("    data: stage", "    init: base\n    data: stage"))
    assert inits(other) == inits(named) | {f"dpo-{i}": "base" for i in (1, 2, 3)}
    assert references(other) == {}
    from_base = load(LOOP.replace("kind: sample,", "kind: sample, init: base,"))
    assert inits(from_base) == inits(named) | {"candidates-1": "base", "dpo-1": "base"}
    assert references(from_base) == {"dpo-2": "base", "dpo-3": "base"}


def test_reference_previous_is_what_the_stage_starts_from(load):
    loaded = load(LOOP.replace("    trainer", "    reference: previous\n    trainer"))
    assert inits(loaded) == inits(load(LOOP)) and references(loaded) == {}


def test_a_later_stage_of_the_round_is_that_of_the_round_before(load):
    """In the first round there is none, so that it starts as by default."""
    loaded = load(
        LOOP.replace("kind: sample,", "kind: sample, init: dpo,").replace("    trainer", "    init: dpo\n    trainer")
    )
    assert inits(loaded) == inits(load(LOOP))
    several = load(LOOP.replace("kind: sample,", "kind: sample, init: [sft, dpo],"))
    assert [several.stages[f"candidates-{i}"].init for i in (1, 2, 3)] == [["sft"], ["sft", "dpo-1"], ["sft", "dpo-2"]]
    latest = load(LOOP.replace("kind: sample,", "kind: sample, init: [sft, base],"))
    assert [latest.stages[f"candidates-{i}"].init for i in (1, 2)] == [["sft", "base"], ["dpo-1", "base"]]


def test_names_within_a_round_are_of_that_round_and_those_behind_it_of_the_last(load):
    text = """\
  candidates: {kind: sample, data: tiny:prompts, n: 2}
  feedback:
    kind: judge
    data: [{path: stage:candidates, weight: 1}, {path: stage:candidates, weight: 1}]
    judge: {model: base}
    human: tiny:preferences
  again: {kind: reward, data: {path: stage:feedback, eval_data: stage:feedback}}
  ppo: {data: tiny:prompts, rewards: [{stage: again}, {stage: reward, weight: 0.5}]}
  dpo: {data: stage:feedback, init: ppo, reference: ppo}
  last: {kind: dpo, init: dpo, data: stage:feedback}
rounds: {n: 2, stages: [candidates, feedback, again, ppo, dpo]}
evaluate: {data: tiny:heldout, judge: "rlhf_pipeline.models.tiny.world:judge", ai_judge: {model: dpo}}
"""
    loaded = load(text)
    second = {name.removesuffix("-2"): stage for name, stage in loaded.stages.items() if name.endswith("-2")}
    assert list(second) == ["candidates", "feedback", "again", "ppo", "dpo"]
    assert [source.path for source in second["feedback"].data.mix] == ["stage:candidates-2"] * 2
    assert second["again"].data.path == second["again"].data.eval_data.path == "stage:feedback-2"
    assert [one.stage for one in second["ppo"].rewards] == ["again-2", "reward"]
    assert (second["dpo"].init, second["dpo"].reference) == ("ppo-2", None)  # the same as what it starts from
    assert (second["candidates"].init, second["ppo"].init, second["ppo"].reference) == ("dpo-1", "dpo-1", "sft")
    assert second["again"].init == "sft"  # a reward model starts where it always does
    assert loaded.evaluate.ai_judge.model == "dpo-2"
    assert (loaded.stages["last"].init, loaded.stages["last"].data.path) == ("dpo-2", "stage:feedback-2")


def test_a_stage_that_begins_within_the_round_is_where_the_later_ones_of_it_start(load):
    text = """\
  candidates: {kind: sample, data: tiny:prompts, n: 2, rewards: [{stage: reward}]}
  best: {kind: sft, data: stage:candidates}
  dpo: {data: stage:candidates}
rounds: {n: 2, stages: [candidates, best, dpo]}
"""
    loaded = load(text)
    assert inits(loaded) == {
        "candidates-1": "sft", "best-1": "sft", "dpo-1": "best-1",
        "candidates-2": "dpo-1", "best-2": "dpo-1", "dpo-2": "best-2",
    }  # fmt: skip
    assert references(loaded) == {}


@pytest.mark.parametrize(("said", "parts"), [("", [[1, 2], [2, 2]]), (", prompts: reuse", [None, None])])
def test_each_round_has_prompts_of_its_own_unless_they_are_reused(load, said, parts):
    text = f"""\
  candidates: {{kind: sample, data: tiny:prompts, n: 2, rewards: [{{stage: reward}}]}}
  best: {{kind: sft, data: stage:candidates}}
  ppo: {{data: tiny:prompts, ptx_data: tiny:demonstrations, trainer: {{ptx_coef: 1.0}}}}
  kept: {{kind: sample, data: {{path: tiny:prompts, part: [3, 7]}}, n: 2}}
  again: {{kind: grpo, data: stage:kept}}
rounds: {{n: 2, stages: [candidates, best, ppo, kept, again]{said}}}
"""
    stages = load(text).stages
    for name in ("candidates", "ppo"):
        assert [stages[f"{name}-{i}"].data.part for i in (1, 2)] == parts
    assert [stages[f"{name}-{i}"].data.part for name in ("best", "again") for i in (1, 2)] == [None] * 4
    assert [stages[f"kept-{i}"].data.part for i in (1, 2)] == [[3, 7]] * 2
    assert stages["ppo-2"].ptx_data.part is None


def test_an_override_is_for_all_rounds_or_for_the_one_that_it_names(load):
    loaded = load(LOOP, "dpo-2.trainer.beta=0.5", "dpo.trainer.beta=0.4", "stages.dpo-3.init=sft", "rounds.n=4")
    assert [loaded.stages[f"dpo-{i}"].trainer["beta"] for i in (1, 2, 3, 4)] == [0.4, 0.5, 0.4, 0.4]
    assert inits(loaded)["dpo-3"] == "sft" and inits(loaded)["candidates-4"] == "dpo-3"
    assert inits(load(LOOP, "rounds=null")) == {"candidates": "sft", "dpo": "sft"}


def test_what_a_run_is_given_is_written_out_and_is_read_as_the_same(load, tmp_path):
    loaded = load(LOOP)
    (tmp_path / "again.yaml").write_text(to_yaml(loaded))
    again = recipe.load(str(tmp_path / "again.yaml"))
    assert "rounds:" not in to_yaml(loaded)
    assert again.model_dump() == loaded.model_dump()


def test_show_says_where_each_value_was_written(load, tmp_path):
    load(LOOP)
    loaded, origins = recipe.load_with_origins(str(tmp_path / "r.yaml"), ["dpo-3.trainer.beta=0.5"])
    said = show.as_json(loaded, origins)["origins"]
    assert said["stages.dpo-2.trainer.beta"] == said["stages.dpo-1.trainer.beta"] == "r.yaml:8"
    assert said["stages.dpo-3.trainer.beta"] == "override"
    assert said["stages.dpo-2.data.path"] == "r.yaml:7"
    assert said["stages.dpo-1.init"] == "where the first round starts"
    assert said["stages.candidates-2.init"] == "where the round before ends"
    assert said["stages.dpo-2.reference"] == "where the first round starts"
    assert said["stages.candidates-2.data.part"] == "round 2 of 3: its own prompts"
    assert said["stages.dpo-2.kind"] == "from the stage's name"


def test_the_reference_and_the_part_are_in_the_fingerprint_where_they_are_said(load):
    loaded, earlier = load(LOOP), {"sft": "S", "dpo-1": "D", "candidates-2": "C", "reward": "R"}
    found = stage_inputs(loaded, "dpo-2", earlier, Digests())
    assert (found["init"], found["reference"]) == ("D", "S")
    assert stage_inputs(loaded, "candidates-2", earlier, Digests())["data.part"] == [2, 3]
    assert "reference" not in stage_inputs(loaded, "dpo-1", earlier | {"candidates-1": "C"}, Digests())
    named = load("  dpo: {init: sft, reference: sft, data: tiny:preferences}\n")
    assert "reference" not in stage_inputs(named, "dpo", earlier, Digests())  # it is so by default


def test_what_is_wrong_with_a_stage_that_is_repeated_is_said_once_where_it_was_written(problems):
    text = LOOP.replace("beta: 0.3", "bta: 0.3").replace("stage: reward}", "stage: sft}").replace("n: 2", "nn: 2")
    assert problems(text) == [
        "5:50: stages.candidates.nn: unknown key `nn` (did you mean `n`?)",
        "5:75: stages.candidates.rewards.0.stage: `sft` is of kind `sft`; `stage` needs reward (earlier "
        "stages: reward)",
        "8:15: stages.dpo.trainer.bta: unknown key `bta` (did you mean `beta`?)",
    ]


def test_messages_have_the_names_that_were_written(problems):
    assert problems(LOOP.replace("stage:candidates", "stage:candidate")) == [
        "7:11: stages.dpo.data.path: stage `dpo` needs stage `candidate`, which is not in the recipe (did you mean "
        "`candidates`?)"
    ]
    assert problems(LOOP.replace("stage: reward", "stage: dpo")) == [
        "5:74: stages.candidates.rewards.0.stage: stage `candidates` needs stage `dpo`, which comes after it "
        "(stages run in order)"
    ]
    assert problems(LOOP, "dpo-2.trainer.beta=much") == [
        "override `dpo-2.trainer.beta=much`: expected a number, got 'much' (see trl.DPOConfig)"
    ]


def test_a_start_that_is_not_there_is_said_once(problems):
    assert problems(LOOP.replace("kind: sample,", "kind: sample, init: stf,")) == [
        "5:36: stages.candidates.init: stage `candidates` needs stage `stf`, which is not in the recipe (did you mean "
        "`sft`?)"
    ]


def test_a_reference_must_fit(problems, load):
    text = "  dpo: {data: tiny:preferences, init: base, lora: {r: 8}, reference: sft}\n"
    assert problems(text) == [
        "5:70: stages.dpo.reference: the adapter of `sft` has no room in one of the shape of stage `dpo`: `lora.r` is "
        "16 there, and 8 here (set `lora.r` to that of `sft`, or measure from another policy)"
    ]
    assert load(text.replace("reference: sft", "reference: base")).stages["dpo"].reference is None
    assert load(text.replace("r: 8", "r: 16")).stages["dpo"].reference == "sft"
    assert load("  dpo: {data: tiny:preferences, reference: base}\n").stages["dpo"].parents == {
        "init": "sft", "reference": "base",
    }  # fmt: skip
