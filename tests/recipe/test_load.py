"""From a recipe's text and overrides to a resolved recipe, or to one message with its place."""

from pathlib import Path

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError

FULL = """\
model: {path: tiny, quantization: none}
stages:
  sft:
    data: tiny:demonstrations
    trainer:
      learning_rate: 2e-5
  reward:
    data: tiny:preferences
  ppo:
    data: tiny:prompts
  dpo:
    data: tiny:preferences
"""


@pytest.fixture
def write(tmp_path):
    """Write a recipe into a folder and return its path."""

    def to(text: str, name: str = "my.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return to


def problem(path: str, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        recipe.load(path, overrides)
    return caught.value


def test_the_run_to_watch_need_not_be_there_yet(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe.run_to_watch(write(FULL)) == tmp_path / "runs" / "my"
    assert recipe.run_to_watch("tiny") == tmp_path / "runs" / "tiny"
    for wrong, message in (("tinny", "no such recipe"), ("runs/my", "no folder runs"), ("gone.yaml", "no such recipe")):
        with pytest.raises(InputError, match=message):
            recipe.run_to_watch(wrong)
    (tmp_path / "runs").mkdir()
    assert recipe.run_to_watch("runs/my") == Path("runs/my")
    assert recipe.run_to_watch("runs/") == Path("runs")  # empty: it may become one
    (tmp_path / "runs" / "my").mkdir()
    with pytest.raises(InputError, match="not a run directory"):
        recipe.run_to_watch("runs")


def test_every_default_is_filled_in(write, tmp_path):
    loaded = recipe.load(write(FULL))
    assert loaded.name == "my"
    assert loaded.run == tmp_path / "runs" / "my"
    assert {name: stage.kind for name, stage in loaded.stages.items()} == {
        name: name for name in ("sft", "reward", "ppo", "dpo")
    }
    assert {name: stage.init for name, stage in loaded.stages.items()} == {
        "sft": "base",
        "reward": "sft",
        "ppo": "sft",
        "dpo": "sft",
    }
    assert loaded.stages["ppo"].reward == "reward"
    assert loaded.stages["dpo"].reward is None
    assert loaded.stages["ppo"].trainer == {"stop_token": "eos"}
    assert loaded.stages["sft"].trainer == {"learning_rate": 2e-5}
    assert loaded.lora["target_modules"] == "all-linear"


def test_init_and_reward_default_to_the_latest_earlier_stage(write):
    loaded = recipe.load(
        write("""\
model: {path: tiny}
stages:
  first: {kind: sft, data: tiny:demonstrations}
  judge_a: {kind: reward, data: tiny:preferences, init: base}
  second: {kind: sft, data: tiny:demonstrations}
  judge_b: {kind: reward, data: tiny:preferences}
  play: {kind: ppo, data: tiny:prompts}
  replay: {kind: ppo, data: tiny:prompts, init: play, reward: judge_a}
""")
    )
    inits = {name: stage.init for name, stage in loaded.stages.items()}
    assert inits == {
        "first": "base",
        "judge_a": "base",
        "second": "first",
        "judge_b": "second",
        "play": "second",
        "replay": "play",
    }
    assert (loaded.stages["play"].reward, loaded.stages["replay"].reward) == ("judge_b", "judge_a")


def test_a_stop_token_of_ones_own_is_kept(write):
    path = write(FULL)
    assert recipe.load(path, ["ppo.trainer.stop_token_id=7"]).stages["ppo"].trainer == {"stop_token_id": 7}
    several = recipe.load(path, ["ppo.trainer.stop_token_id=[7, 8]"])
    assert several.stages["ppo"].trainer == {"stop_token_id": [7, 8]}
    assert recipe.load(path, ["ppo.trainer.stop_token_id=null"]).stages["ppo"].trainer["stop_token"] == "eos"
    assert recipe.load(path, ["ppo.trainer.stop_token=null"]).stages["ppo"].trainer == {"stop_token": None}


def test_relative_paths_start_from_the_recipes_folder(write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write("model: {path: tiny}\noutput_dir: out\nstages: {sft: {data: data/rows.jsonl}}\n")
    monkeypatch.chdir(elsewhere)
    loaded = recipe.load(path)
    assert loaded.stages["sft"].data.path == str(tmp_path / "data" / "rows.jsonl")
    assert loaded.run == tmp_path / "out" / "my"
    assert loaded.folder == tmp_path
    assert recipe.load("../my.yaml").run == loaded.run


def test_a_shipped_recipe_called_by_name_runs_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe.load("tiny").run == tmp_path / "runs" / "tiny"


def test_a_file_in_the_current_folder_goes_before_a_shipped_recipe(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("name: mine\nmodel: {path: tiny}\nstages: {sft: {data: tiny:demonstrations}}\n", name="tiny")
    assert recipe.load("tiny").name == "mine"


@pytest.mark.parametrize("override", ["sft.trainer.learning_rate=1e-3", "stages.sft.trainer.learning_rate=1e-3"])
def test_an_override_reaches_a_stage_with_and_without_the_prefix(write, override):
    assert recipe.load(write(FULL), [override]).stages["sft"].trainer == {"learning_rate": 0.001}


def test_overrides_reach_the_top_and_make_missing_sections(write):
    loaded = recipe.load(
        write(FULL), ["seed=7", "model.dtype=float32", "lora.r=4", "dpo.trainer.beta=.3", "name=other", "seed=8"]
    )
    assert (loaded.seed, loaded.model.dtype, loaded.name) == (8, "float32", "other")
    assert loaded.model.quantization == "none"
    assert loaded.stages["dpo"].trainer == {"beta": 0.3}
    assert loaded.lora["r"] == 4


def test_an_override_can_refine_data_given_as_a_path_alone(write):
    data = recipe.load(write(FULL), ["dpo.data.eval_fraction=0.25"]).stages["dpo"].data
    assert data.eval_fraction == 0.25
    assert Path(data.path).name == "preferences.jsonl"


def test_an_override_can_replace_data_by_a_path(write):
    text = FULL.replace("tiny:demonstrations", "{path: tiny:demonstrations, eval_fraction: 0.5}")
    data = recipe.load(write(text), ["sft.data=tiny:preferences"]).stages["sft"].data
    assert (Path(data.path).name, data.eval_fraction) == ("preferences.jsonl", 0.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate", "form key=value"),
        ("=3", "form key=value"),
        ("a..b=3", "form key=value"),
        ("seed=[1", "not a YAML value"),
        ("model.path.deep=1", "`model.path` has no keys below"),
        ("seed=abc", "expected a whole number"),
        ("tempo=1", "unknown key `tempo`"),
        ("sft.trainer.learning_rte=1", "unknown key `learning_rte`"),
        ("ppo.init=dpo", "comes after it"),
        ("model.path=./nowhere", "no model folder"),
        ("sft.data=nowhere.jsonl", "no data file"),
        ("sft.data.path=nowhere.jsonl", "no data file"),
        ("sft.trainer={learning_rate: fast}", "expected a number"),
    ],
)
def test_a_bad_override_is_named_as_the_place(write, override, message):
    found = problem(write(FULL), override)
    assert message in found.message
    assert found.place == f"override `{override}`"


def test_an_error_of_the_file_names_its_line_even_beside_overrides(write):
    path = write(FULL.replace("learning_rate", "learning_rte"))
    assert problem(path, "seed=3").place == f"{path}:6:7: stages.sft.trainer.learning_rte"


ONE = "model: {path: tiny}\nstages:\n"
SFT = "  sft: {data: tiny:demonstrations}\n"


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("just text\n", None, "a recipe is a mapping", "cp tiny"),
        ("", None, "a recipe is a mapping", "cp tiny"),
        (ONE, 2, "expected a mapping", None),
        ("model: {path: tiny}\n", None, "`stages` is missing", None),
        (f"stages:\n{SFT}", None, "`model` is missing", None),
        (ONE + "  7: {data: tiny:prompts}\n", 3, "kind of stage `7` is not given", "sft, reward, ppo, dpo"),
        (ONE + "  -7: {data: tiny:prompts}\n", 3, "cannot name a stage", "letters"),
        (ONE + "  a b: {kind: sft, data: tiny:prompts}\n", 3, "cannot name a stage", "letters"),
        (ONE + "  model: {kind: sft, data: tiny:prompts}\n", 3, "has a meaning of its own", None),
        (ONE + "  base: {kind: sft, data: tiny:prompts}\n", 3, "has a meaning of its own", None),
        (ONE + "  warmup: {data: tiny:prompts}\n", 3, "kind of stage `warmup` is not given", "sft, reward, ppo, dpo"),
        (ONE + "  a: {kind: rlo, data: tiny:prompts}\n", 3, "expected 'sft'", "did you mean `rloo`?"),
        (ONE + "  sft: {trainer: {}}\n", 3, "`data` is missing", None),
        (ONE + SFT + "  dpo:\n    init: sff\n    data: tiny:preferences\n", 5, "not in the recipe", "`sft`"),
        (ONE + "  dpo: {init: sft, data: tiny:preferences}\n" + SFT, 3, "comes after it", "in order"),
        (ONE + "  sft: {init: sft, data: tiny:preferences}\n", 3, "cannot depend on itself", None),
        (
            ONE + "  reward: {data: tiny:preferences}\n  dpo: {init: reward, data: tiny:preferences}\n",
            4,
            "`reward` is of kind `reward`",
            None,
        ),
        (ONE + SFT + "  ppo: {data: tiny:prompts}\n", 4, "needs a reward", "kind `reward`"),
        (ONE + SFT + "  ppo: {data: tiny:prompts, reward: sft}\n", 4, "needs reward", None),
        (ONE + "  sft: {data: tiny:demonstrations, reward: x}\n", 3, "`reward` has no effect", "remove"),
        (ONE + "  sft:\n    data: tiny:replies\n", 4, "no data `tiny:replies`", "tiny:demonstrations"),
        (ONE + "  sft:\n    data: nowhere.jsonl\n", 4, "no data file", "folder of the file"),
        (ONE + "  sft:\n    data: ./hub/name\n", 4, "no data file", "folder of the file"),
        (ONE + "  sft:\n    data: rows.txt\n", 4, "type `.txt`", ".jsonl"),
        (ONE + "  sft:\n    data: empty.jsonl\n", 4, "is empty", None),
        (ONE + "  sft:\n    data: folder\n", 4, "no data files in", ".jsonl"),
        ("model: {path: folder}\nstages:\n" + SFT, 1, "no config.json", None),
        ("model: {path: half}\nstages:\n" + SFT, 1, "no *.safetensors", "save_pretrained"),
        ("model: {path: ./none}\nstages:\n" + SFT, 1, "no model folder", None),
        (ONE + SFT + "lora: {init_lora_weights: pissa}\n", 4, "initialisation changes the base", "gaussian"),
        (ONE + SFT + "lora: {bias: all}\n", 4, "`bias` cannot be set: the base is never changed", "remove"),
        (ONE + SFT + "  dpo: {data: tiny:preferences, lora: {rank: 8}}\n", 4, "unknown key `rank`", None),
        (ONE + SFT + "  dpo: {data: tiny:preferences, lora: {r: big}}\n", 4, "expected a whole number", "LoraConfig"),
        (ONE + SFT + "  dpo: {data: tiny:preferences, lora: [r]}\n", 4, "expected a mapping", None),
        (
            ONE + SFT + "  dpo: {data: tiny:preferences, lora: {init_lora_weights: pissa}}\n",
            4,
            "initialisation changes the base",
            "gaussian",
        ),
        (
            ONE + SFT + "  dpo: {data: tiny:preferences, lora: {r: 16, bias: all}}\n",
            4,
            "`bias` cannot be set",
            "remove",
        ),
        (ONE + SFT + "  dpo: {data: tiny:preferences, lora: {r: 8}}\n", 4, "rank 8 is less than 16", "16 or more"),
        (
            ONE + SFT + "  dpo: {data: tiny:preferences, lora: {use_dora: true}}\n",
            4,
            "`use_dora` is not that of",
            "base",
        ),
        (ONE + SFT + "name: a/b\n", 4, "expected letters", "run directory"),
        (ONE + "  sft: {data: {path: tiny:prompts, eval_fraction: 1.0}}\n", 3, "less than 1", None),
    ],
)
def test_every_rule_has_a_message_with_its_place(write, tmp_path, text, line, message, hint):
    (tmp_path / "rows.txt").write_text("a\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    path = write(text)
    found = problem(path)
    assert message in str(found).replace("*.safetensors weights", "*.safetensors").replace("holds no", "no")
    assert found.place == path or found.place.startswith(f"{path}:{line}:" if line else f"{path}: ")
    if hint:
        assert hint in found.hint


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ("stages:\n", "output_dirr: x\nstages:\n", "output_dir"),
        ("path: tiny", "path: tiny, quantisation: none", "quantization"),
        ("    trainer:\n", "    inti: base\n    trainer:\n", "init"),
        ("      learning_rate", "      learning_rte", "learning_rate"),
        ("data: tiny:demonstrations", "data: {path: tiny:prompts, colums: {}}", "columns"),
        ("stages:\n", "lora: {target_module: all-linear}\nstages:\n", "target_modules"),
        ("stages:\n", "evaluate: {data: tiny:heldout, judge: 'a:b', temprature: 1.0}\nstages:\n", "temperature"),
        ("stages:\n", "evaluate: {data: {path: tiny:heldout, splt: x}, judge: 'a:b'}\nstages:\n", "split"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(write, old, new, nearest):
    path = write(FULL.replace(old, new, 1))
    found = problem(path)
    assert found.message.startswith("unknown key")
    assert found.hint == f"did you mean `{nearest}`?"
    assert found.place.startswith(f"{path}:")


def test_a_key_like_no_other_is_answered_with_all_that_are_known(write):
    found = problem(write(FULL), "model.zzz=1")
    assert found.hint == "the keys here are path, revision, trust_remote_code, chat_template, " + (
        "chat_template_kwargs, quantization, dtype, attention"
    )


def test_a_missing_recipe_is_answered_with_the_nearest_shipped_one():
    assert problem("tinny").hint == "did you mean the shipped recipe `tiny`?"
    assert "ls" in problem("zzzzz.yaml").hint


def test_a_folder_is_no_recipe(tmp_path):
    assert "folder" in problem(str(tmp_path)).message


def test_a_recipe_in_another_encoding_cannot_be_read(tmp_path):
    (tmp_path / "r.yaml").write_bytes("name: \xe9\n".encode("latin-1"))
    found = problem(str(tmp_path / "r.yaml"))
    assert found.message == "this cannot be read: it is not UTF-8 (line 1)"
    assert found.place == str(tmp_path / "r.yaml")


def test_the_resolved_recipe_loads_to_itself(write, tmp_path):
    evaluate = "evaluate: {data: tiny:heldout, judge: 'rlhf_pipeline.models.tiny.world:judge', temperature: 0.7}\n"
    loaded = recipe.load(write(evaluate + FULL), ["ppo.trainer.stop_token_id=3", "dpo.data.eval_fraction=0.1"])
    again = recipe.load(write(recipe.to_yaml(loaded), name="recipe.yaml"))
    assert again.model_dump() == loaded.model_dump()
    assert recipe.to_yaml(again) == recipe.to_yaml(loaded)


@pytest.mark.parametrize("name", ["08", "1e3", "no", "true", "null", "1_000", ".5e1"])
def test_text_that_looks_like_a_number_is_still_text_in_the_resolved_recipe(write, name):
    """The words of YAML 1.1 and 1.2 differ; what is written must be quoted for the reader that reads it back."""
    loaded = recipe.load(
        write(FULL.replace("tiny:preferences", f"{{path: tiny:preferences, columns: {{chosen: '{name}'}}}}"))
    )
    again = recipe.load(write(recipe.to_yaml(loaded), name="recipe.yaml"))
    assert again.stages["dpo"].data.columns == {"chosen": name}


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_loads_and_its_resolved_form_too(name, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(name)
    again = recipe.load(write(recipe.to_yaml(loaded), name="recipe.yaml"))
    assert again.model_dump() == loaded.model_dump()
    assert loaded.stages


@pytest.mark.parametrize(
    ("stages", "place"),
    [
        (
            "ppo: {data: tiny:prompts, ptx_data: {path: tiny:demonstrations, eval_fraction: 0.1}, "
            "trainer: {ptx_coef: 0.1}}",
            "stages.ppo.ptx_data.eval_fraction",
        ),
        (
            "ppo: {data: tiny:prompts, ptx_data: {path: tiny:demonstrations, split: test}, trainer: {ptx_coef: 0.1}}",
            "stages.ppo.ptx_data.split",
        ),
        ("ppo: {data: tiny:prompts, ptx_data: tiny:demonstrations}", "stages.ppo.trainer.ptx_coef"),
        ("ppo: {data: tiny:prompts, trainer: {ptx_coef: 0.1}}", "4:39: stages.ppo.trainer.ptx_coef"),
        ("ppo: {data: {path: tiny:prompts, max_completion_length: 9}}", "stages.ppo.data.max_completion_length"),
        ("dpo: {data: {path: tiny:preferences, split: test}}", "stages.dpo.data.split"),
    ],
)
def test_data_keys_without_effect_are_refused(tmp_path, stages, place):
    """A key that would be ignored is an error that says so."""
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: tiny}}\nstages:\n  reward: {{data: tiny:preferences}}\n  {stages}\n"
    )
    with pytest.raises(InputError, match="has no effect") as error:
        recipe.load(str(tmp_path / "r.yaml"))
    assert place in error.value.place


def test_demonstrations_for_ppo_are_data_like_any_other(write, tmp_path):
    """A path alone or a mapping, relative to the recipe, refined by overrides, and written down whole."""
    (tmp_path / "shown.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = write(FULL.replace("data: tiny:prompts", "data: tiny:prompts\n    ptx_data: shown.jsonl"))
    loaded = recipe.load(path, ["ppo.ptx_data.max_completion_length=9", "ppo.trainer.ptx_coef=0.1"])
    assert loaded.stages["ppo"].ptx_data.path == str(tmp_path / "shown.jsonl")
    assert loaded.stages["ppo"].ptx_data.max_completion_length == 9
    again = recipe.load(write(recipe.to_yaml(loaded), name="recipe.yaml"))
    assert again.model_dump() == loaded.model_dump()
    assert recipe.load(write(FULL)).stages["ppo"].ptx_data is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.ptx_data=nowhere.jsonl", "no data file"),
        ("ppo.ptx_data={path: tiny:demonstrations, colums: {}}", "unknown key `colums`"),
        ("sft.ptx_data=tiny:demonstrations", "`ptx_data` has no effect in a stage of kind `sft`"),
        ("reward.ptx_data=tiny:demonstrations", "`ptx_data` has no effect in a stage of kind `reward`"),
        ("dpo.ptx_data=tiny:demonstrations", "`ptx_data` has no effect in a stage of kind `dpo`"),
    ],
)
def test_demonstrations_that_cannot_be_read_or_used_are_refused(write, override, message):
    weight = ["ppo.trainer.ptx_coef=0.1"] if override.startswith("ppo.") else []
    found = problem(write(FULL), override, *weight)
    assert message in found.message
    assert found.place == f"override `{override}`"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("reward.members=1", "expected a number of at least 2, got 1", "from 2 to 32 reward models make an ensemble"),
        ("reward.members=0", "expected a number of at least 2, got 0", "without `members` there is one alone"),
        ("reward.members=1000", "expected a number of at most 32, got 1000", "from 2 to 32"),
        ("reward.members=two", "expected a whole number, got 'two'", None),
        ("reward.bootstrap=true", "`bootstrap` has no effect without `members`", "set `members`"),
        ("sft.members=4", "`members` has no effect in a stage of kind `sft`", "it is a key of kind reward"),
        ("ppo.bootstrap=true", "`bootstrap` has no effect in a stage of kind `ppo`", "kind reward"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused(write, override, message, hint):
    found = problem(write(FULL), override)
    assert found.message.endswith(message)
    assert hint is None or hint in found.hint
    assert found.place == f"override `{override}`"


def test_members_are_in_the_resolved_recipe_where_there_are_some(write):
    loaded = recipe.load(write(FULL), ["reward.members=3", "reward.bootstrap=true"])
    text = recipe.to_yaml(loaded)
    assert recipe.load(write(text, name="recipe.yaml")).model_dump() == loaded.model_dump()
    assert text.count("members:") == text.count("bootstrap:") == 1
    assert "members:" not in recipe.to_yaml(recipe.load(write(FULL)))


def test_a_stage_takes_over_the_shape_of_the_adapter_it_starts_from(write):
    """Its own keys come on top, and stages that start from it take over both."""
    text = ONE + (
        "  sft: {data: tiny:demonstrations, lora: {r: 24}}\n"
        "  reward: {data: tiny:preferences, lora: {r: 32}}\n"
        "  ppo: {data: tiny:prompts}\n"
        "  dpo: {init: ppo, data: tiny:preferences, lora: {lora_dropout: 0.1}}\n"
        "  alone: {kind: dpo, init: base, data: tiny:preferences, lora: {r: 2}}\n"
    )
    loaded = recipe.load(write(text), ["ppo.lora.r=48"])
    assert {name: stage.lora["r"] for name, stage in loaded.stages.items()} == {
        "sft": 24, "reward": 32, "ppo": 48, "dpo": 48, "alone": 2,
    }  # fmt: skip
    assert loaded.lora["r"] == 16
    assert loaded.stages["dpo"].lora == loaded.stages["ppo"].lora | {"lora_dropout": 0.1}
    assert all(stage.lora["target_modules"] == "all-linear" for stage in loaded.stages.values())


def test_the_recipes_lora_reaches_every_stage_that_says_nothing(write):
    """Also from the command line; a stage that has its own value keeps it."""
    loaded = recipe.load(write(FULL), ["lora.r=4", "reward.lora.r=8"])
    assert {name: stage.lora["r"] for name, stage in loaded.stages.items()} == {
        "sft": 4,
        "reward": 8,
        "ppo": 4,
        "dpo": 4,
    }


def test_an_override_of_the_shape_reaches_every_stage_of_a_resolved_recipe(write):
    """The resolved recipe must not say again what a stage takes over, or such an override would do nothing."""
    again = write(recipe.to_yaml(recipe.load(write(FULL), ["dpo.lora.r=64"])), name="recipe.yaml")
    loaded = recipe.load(again, ["lora.r=32"])
    assert {name: stage.lora["r"] for name, stage in loaded.stages.items()} == {
        name: 64 if name == "dpo" else 32 for name in loaded.stages
    }


def test_shapes_of_stages_survive_being_resolved(write):
    """Values shared by several stages are written out for each, and read back as they were."""
    lora = "lora: {r: 4, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 6}}\n"
    loaded = recipe.load(
        write(lora + FULL), ["dpo.lora.alpha_pattern={v_proj: 3}", "dpo.lora.target_modules=all-linear"]
    )
    text = recipe.to_yaml(loaded)
    assert "&" not in text and "*" not in text
    again = recipe.load(write(text, name="recipe.yaml"))
    assert again.model_dump() == loaded.model_dump()
    assert again.stages["dpo"].lora["rank_pattern"] == {"q_proj": 6}


@pytest.mark.parametrize(
    ("top", "own", "message", "hint"),
    [
        ("{r: 16}", "r: 8", "rank 8 is less than 16", "use 16 or more"),
        ("{use_dora: true}", "use_dora: false", "`use_dora` is not that of stage `sft`", "`init: base`"),
        ("{r: 16}", "lora_bias: true", "`lora_bias` is not that of stage `sft`", "leave it as in `sft`"),
        ("{r: 16}", "alora_invocation_tokens: [5, 6]", "`alora_invocation_tokens` is not that", "leave it as"),
        ("{r: 4, target_parameters: [w]}", "r: 8", "with `target_parameters` a change of size", "leave it as"),
        ("{r: 4, target_parameters: [w]}", "lora_alpha: 8", "`lora_alpha` is not that", "leave it as"),
    ],
)
def test_an_adapter_that_could_not_begin_as_the_one_it_starts_from_is_refused(write, top, own, message, hint):
    """With the place of the key; in a stage that starts from the base the same key is fine."""
    stages = ONE + SFT + f"  dpo:\n    data: tiny:preferences\n    lora:\n      {own}\n"
    path = write(stages + f"lora: {top}\n")
    found = problem(path)
    key = own.partition(":")[0]
    assert found.place == f"{path}:7:{len(own) + 7 - len(own.partition(': ')[2])}: stages.dpo.lora.{key}"
    assert message in found.message
    assert hint in found.hint
    assert recipe.load(path, ["dpo.init=base"]).stages["dpo"].init == "base"
    override = f"dpo.lora={{{own}}}"
    assert problem(path, override).place == f"override `{override}`"


@pytest.mark.parametrize(
    "own",
    [
        "r: 16",
        "use_dora: false",  # what PEFT takes anyway
        "lora_alpha: 3, use_rslora: true, lora_dropout: 0.5",
        "r: 8, rank_pattern: {'.*': 32}",  # which modules it concerns only the model can tell
    ],
)
def test_what_leaves_an_adapter_room_is_accepted(write, own):
    loaded = recipe.load(write(ONE + SFT + f"  dpo: {{data: tiny:preferences, lora: {{{own}}}}}\nlora: {{r: 16}}\n"))
    assert loaded.stages["dpo"].lora == {"r": 16} | recipe.yaml.parse_value(f"{{{own}}}")
