"""The JSON Schema that editors read: it takes what loading takes, and marks what loading refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import takers
from rlhf_pipeline.recipe import json_schema, library_keys
from rlhf_pipeline.recipe.schema import Data, Evaluate, Model, Recipe, Stage

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = json_schema.recipe_schema()
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


class EditorLoader(yaml.SafeLoader):
    """YAML 1.2 as editors read it: `1_000`, `no` and `${VAR}` are text, `2e-5` is a number."""


EditorLoader.yaml_implicit_resolvers = {}
for tag, pattern in (
    ("null", r"~|null|"),
    ("bool", r"true|false"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    EditorLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), None)
EditorLoader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def faults(text: str) -> list[str]:
    """What is wrong with a recipe, each with its place."""
    found = Draft7Validator(SCHEMA).iter_errors(yaml.load(text, EditorLoader))
    return [".".join(map(str, error.absolute_path)) + f": {error.message}" for error in found]


def test_it_is_a_json_schema():
    Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_the_committed_file_is_the_commands_output():
    """With the libraries that constraints.txt names."""
    printed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf_pipeline", "schema"],
        capture_output=True,
        text=True,
        check=True,
    )
    committed = (RECIPES / "recipe.schema.json").read_text(encoding="utf-8")
    assert printed.stdout == committed, "renew it: rlhf-pipeline schema > recipes/recipe.schema.json"
    imported = {line.rpartition("|")[2].strip() for line in printed.stderr.splitlines()}
    assert "rlhf_pipeline.recipe.json_schema" in imported
    assert not imported & {"torch", "trl", "transformers", "peft", "datasets"}


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_names_the_schema_and_is_valid(name):
    text = recipe.shipped()[name].read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# ")
    assert faults(text) == []


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_resolved_form_of_every_shipped_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert faults(recipe.to_yaml(recipe.load(name))) == []


GOOD = [
    FULL,
    FULL + "name: mine\noutput_dir: out\nseed: 1_000\nkeep_checkpoints: true\n",
    FULL.replace("2e-5", "1"),
    FULL.replace("data: tiny:prompts", "data: {path: tiny:prompts, columns: {prompt: question}, limit: 10}"),
    FULL.replace("data: tiny:prompts", "data: [tiny:prompts, {path: tiny:demonstrations, weight: null}]"),
    FULL.replace("data: tiny:prompts", "data: {mix: [{path: tiny:prompts, weight: 1}, {path: a/b, weight: 1.5}]}"),
    FULL.replace("data: tiny:demonstrations", "data: {path: tiny:demonstrations, eval_data: tiny:heldout}"),
    FULL.replace("data: tiny:demonstrations", "data: {path: tiny:demonstrations, eval_data: {path: tiny:heldout}}"),
    FULL.replace("data: tiny:demonstrations", "data: {path: tiny:heldout, too_long: drop, max_prompt_length: 9}"),
    FULL + "lora: {r: 8, target_modules: [q_proj, v_proj], init_lora_weights: gaussian, use_rslora: true}\n",
    FULL + "  again: {kind: ppo, init: ppo, data: tiny:prompts, trainer: {kl_coef: 1, stop_token: null}}\n",
    FULL + "  last: {kind: dpo, data: tiny:preferences, trainer: {loss_type: [ipo, sft], loss_weights: [1, 2.5]}}\n",
    FULL.replace("  dpo:\n", "  dpo:\n    trainer: {lr_scheduler_type: cosine, optim: sgd, eval_strategy: no}\n"),
    FULL.replace("  reward:\n", "  reward:\n    gates: {loss: '<= 3'}\n    lora: {r: 32}\n    init: base\n"),
    FULL + "evaluate: {data: tiny:heldout, judge: 'rlhf_pipeline.models.tiny.world:judge', temperature: 0, n: 5}\n",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_what_loading_takes_is_valid(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    recipe.load(str(tmp_path / "r.yaml"))
    assert faults(text) == []


@pytest.mark.parametrize(
    "text",
    [
        FULL.replace("2e-5", "${LR:-2e-5}") + "output_dir: runs/${USER}\nseed: ${SEED}\nkeep_checkpoints: ${KEEP}\n",
        FULL.replace("quantization: none", "quantization: '${BITS}', dtype: '${DTYPE:-auto}'") + "name: run-${N}\n",
        FULL.replace("learning_rate: 2e-5", "lr_scheduler_type: ${SCHEDULE}\n      packing: ${PACK}"),
        "extends: base.yaml\nstages: {dpo: null, sft: {trainer: {max_steps: 3}}}\n",
        "extends: tiny\nmodel: {quantization: nf4}\nstages: {mine: {trainer: {max_steps: 3}}}\n",
        "extends: tiny\n",
    ],
)
def test_variables_and_extending_recipes_are_valid(text):
    assert faults(text) == []


BAD = [
    ("stages:\n", "output_dirr: x\nstages:\n", "'output_dirr' was unexpected"),
    ("stages:\n", "seed: fast\nstages:\n", "seed: 'fast'"),
    ("stages:\n", "keep_checkpoints: 1\nstages:\n", "keep_checkpoints: 1"),
    ("stages:\n", "name: a/b\nstages:\n", "name: 'a/b'"),
    ("path: tiny", "path: tiny, quantisation: nf4", "model: Additional properties"),
    ("quantization: none", "quantization: nf8", "model.quantization: 'nf8'"),
    ("path: tiny, ", "", "model: 'path' is a required property"),
    ("model: {path: tiny, quantization: none}\n", "", "'model' is a required property"),
    ("  sft:\n", "  sft:\n    inti: base\n", "'inti' was unexpected"),
    ("learning_rate: 2e-5", "learning_rte: 2e-5", "stages.sft.trainer: Additional properties"),
    ("2e-5", "fast", "stages.sft.trainer.learning_rate: 'fast'"),
    ("2e-5", "true", "stages.sft.trainer.learning_rate: True"),
    ("learning_rate: 2e-5", "output_dir: x", "'output_dir' was unexpected"),
    ("learning_rate: 2e-5", "lr_scheduler_type: cosin", "stages.sft.trainer.lr_scheduler_type: 'cosin'"),
    ("learning_rate: 2e-5", "kl_coef: 0.1", "'kl_coef' was unexpected"),
    ("learning_rate: 2e-5", "max_steps: 1.5", "stages.sft.trainer.max_steps: 1.5"),
    ("data: tiny:demonstrations", "data: {path: tiny:prompts, colums: {}}", "'colums' was unexpected"),
    ("data: tiny:demonstrations", "data: {path: tiny:prompts, eval_fraction: 2}", "stages.sft.data.eval_fraction: 2"),
    ("data: tiny:demonstrations", "data: {mix: [{weight: 1}]}", "stages.sft.data.mix.0: 'path' is a required"),
    ("data: tiny:demonstrations", "data: {mix: [{path: a, weight: 0}]}", "stages.sft.data.mix.0.weight: 0"),
    ("data: tiny:demonstrations", "data: 3", "stages.sft.data: 3"),
    ("    data: tiny:demonstrations\n", "", "stages.sft: 'data' is a required property"),
    ("  sft:\n", "  sft:\n    reward: reward\n", "stages.sft.reward: 'reward' is not of type 'null'"),
    ("  sft:\n", "  sft:\n    kind: rlo\n", "stages.sft.kind: 'rlo'"),
    ("  sft:\n", "  warmup:\n", "stages.warmup: 'kind' is a required property"),
    ("  sft:\n", "  base:\n    kind: sft\n", "stages: 'base' should not be valid"),
    ("  dpo:\n", "  dpo:\n    lora: {rank: 8}\n", "stages.dpo.lora: Additional properties"),
    ("stages:\n", "lora: {r: big}\nstages:\n", "lora.r: 'big'"),
    ("stages:\n", "lora: {init_lora_weights: pissa}\nstages:\n", "lora.init_lora_weights: 'pissa'"),
    ("stages:\n", "evaluate: {data: x}\nstages:\n", "evaluate: {'data': 'x'} is not valid under any"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "fault"), BAD)
def test_what_loading_refuses_is_marked(old, new, fault, tmp_path):
    """Only what the recipe's own text shows; that loading refuses it too is what makes it a fault."""
    text = FULL.replace(old, new, 1)
    assert text != FULL
    assert any(fault in found for found in faults(text)), faults(text)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError):
        recipe.load(str(tmp_path / "r.yaml"))


def test_a_stages_kind_decides_which_trainer_keys_it_takes():
    """Its `kind` where it has one, else its name."""
    stage = "data: tiny:preferences, trainer: {beta: 0.1}"
    head = "model: {path: tiny}\nstages:\n"
    assert faults(head + f"  dpo: {{{stage}}}\n") == faults(head + f"  sft: {{kind: dpo, {stage}}}\n") == []
    assert faults(head + f"  any: {{kind: dpo, {stage}}}\n") == []
    assert "'beta' was unexpected" in str(faults(head + f"  sft: {{{stage}}}\n"))
    assert "'beta' was unexpected" in str(faults(head + f"  dpo: {{kind: sft, {stage}}}\n"))


def test_every_key_of_ours_is_there_with_a_description():
    definitions = SCHEMA["definitions"]
    for name, model in (("Model", Model), ("Data", Data), ("Evaluate", Evaluate), ("StageOfSomeKind", Stage)):
        assert set(definitions[name]["properties"]) == set(model.model_fields), name
        assert all(value.get("description") for value in definitions[name]["properties"].values()), name
    assert set(SCHEMA["properties"]) == {*Recipe.model_fields, "extends"}
    assert all(value.get("description") for value in SCHEMA["properties"].values())


@pytest.mark.parametrize("config", [*takers("trainer"), "lora"])
def test_exactly_the_settable_keys_of_the_libraries_are_there_with_descriptions(config):
    definition = SCHEMA["definitions"]["Lora" if config == "lora" else f"{config.title()}Trainer"]
    assert sorted(definition["properties"]) == library_keys.settable(config)
    assert definition["additionalProperties"] is False
    for name, key in definition["properties"].items():
        assert key["description"], name
        assert len(key["description"]) < 900, name
        if "default" in key:
            value = {"type": "object", "properties": {name: key}, "definitions": SCHEMA["definitions"]}
            assert Draft7Validator(value).is_valid({name: key["default"]}), name


@pytest.mark.parametrize("config", [*takers("trainer"), "lora"])
def test_the_values_that_editors_take_for_a_librarys_key_are_those_that_loading_takes(config):
    """All but whole numbers such as 2.0, which JSON Schema does not tell from 2."""
    definition = SCHEMA["definitions"]["Lora" if config == "lora" else f"{config.title()}Trainer"]
    values = [True, 0, -3, 0.5, "", "a", "3", "2e-5", None, [], ["a"], [1], [0.5], [True], {}, {"a": True}, {"a": "b"},
              "no", "steps", "best", "cosine", "sgd", "eos", "k1", "keep_end", "random", "gaussian"]  # fmt: skip
    for name, schema in definition["properties"].items():
        editor, annotation = Draft7Validator(schema), library_keys.keys(config)[name].annotation
        for value in values:
            assert name == "init_lora_weights" or editor.is_valid(value) != bool(
                library_keys.type_errors(annotation, value)
            ), (name, value)


def test_variables_may_stand_for_what_is_not_text_within_a_librarys_value_too():
    """`liger_kernel_config: {rope: ${ROPE}}`, and an item of a list of numbers."""
    trainer, lora = (SCHEMA["definitions"][name]["properties"] for name in ("DpoTrainer", "Lora"))
    for schema, good, bad in (
        (trainer["liger_kernel_config"], {"rope": "${ROPE}"}, {"rope": "yes"}),
        (trainer["loss_weights"], [1, "${WEIGHT}"], ["heavy"]),
        (lora["layers_to_transform"], ["${LAYER}", 2], ["last"]),
    ):
        assert Draft7Validator(schema).is_valid(good)
        assert not Draft7Validator(schema).is_valid(bad)


def test_descriptions_and_choices_are_the_libraries():
    trainer = SCHEMA["definitions"]["DpoTrainer"]["properties"]
    assert trainer["beta"]["description"].startswith("Parameter controlling the deviation from the reference model.")
    assert trainer["beta"]["default"] == 0.1
    assert "cosine_with_restarts" in json.dumps(trainer["lr_scheduler_type"])
    assert "paged_adamw_8bit" in json.dumps(trainer["optim"])


def test_long_descriptions_end_with_a_sentence():
    text = "One is e.g. short. Two follows it with words. Three is never shown."
    assert json_schema.first_sentences(text, enough=20) == "One is e.g. short. Two follows it with words."
    assert json_schema.first_sentences(text) == text
