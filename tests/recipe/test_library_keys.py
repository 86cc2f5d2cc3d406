"""The keys read from the libraries' source, held against the classes that importing gives."""

import dataclasses
import os
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
from peft import LoraConfig
from trl import DPOConfig, RewardConfig, SFTConfig
from trl.experimental import ppo as trl_ppo

from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.recipe import library_keys

CLASSES = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "dpo": DPOConfig, "lora": LoraConfig}


def fields(config: str) -> set[str]:
    """What the real class takes as keywords."""
    return {field.name for field in dataclasses.fields(CLASSES[config]) if field.init}


@pytest.mark.parametrize("config", CLASSES)
def test_the_accepted_keys_are_those_of_the_real_class(config):
    accepted = set(library_keys.accepted(config))
    every_field = {field.name for field in dataclasses.fields(CLASSES[config]) if not field.name.startswith("_")}
    assert fields(config) <= accepted
    assert accepted <= every_field | {"auto_mapping"}


@pytest.mark.parametrize("config", CLASSES)
def test_every_key_that_a_recipe_may_set_is_a_keyword_of_the_real_class(config):
    settable = library_keys.settable(config)
    assert set(settable) <= fields(config)
    assert settable == sorted(settable)


@pytest.mark.parametrize("config", CLASSES)
def test_each_field_can_be_set_or_is_refused_with_a_reason(config):
    settable = set(library_keys.settable(config))
    for name in fields(config) - settable:
        assert library_keys.refusal(config, name), name


@pytest.mark.parametrize(
    ("table", "configs"),
    [
        ("_DECIDED", ("sft", "reward", "ppo", "dpo")),
        ("_PPO_READS", ("ppo",)),
        ("_PPO_REASONS", ("ppo",)),
        ("_LORA_DECIDED", ("lora",)),
    ],
)
def test_the_tables_name_no_key_that_the_libraries_do_not_have(table, configs):
    """A misspelt or outdated name there would let the real key through."""
    everywhere = set().union(*(library_keys.accepted(config) for config in configs))
    assert set(getattr(library_keys, table)) - everywhere == set()


def test_nothing_is_both_read_by_ppo_and_refused():
    refused = library_keys._DECIDED.keys() | library_keys._PPO_REASONS.keys()
    assert library_keys._PPO_READS & refused == set()


@pytest.mark.parametrize("config", ["sft", "reward", "ppo", "dpo"])
def test_when_checkpoints_are_written_can_be_set_for_every_kind(config):
    """They change nothing of the result, so they are no reason to train again."""
    keys = {"save_strategy", "save_steps", "save_total_limit"}
    assert keys <= set(library_keys.settable(config))
    assert keys <= library_keys.WITHOUT_EFFECT_ON_RESULT


def test_what_ppo_has_beyond_trl_can_be_set_and_is_documented():
    ours = fields("ppo") - {field.name for field in dataclasses.fields(trl_ppo.PPOConfig)}
    assert "kl_budget" in ours
    assert ours <= set(library_keys.settable("ppo"))
    text = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
    assert {key for key in ours if f"`{key}`" not in text} == set()


def test_keys_without_effect_on_the_result_are_keys_of_the_libraries():
    everywhere = set().union(*(library_keys.accepted(config) for config in ("sft", "reward", "ppo", "dpo")))
    assert set() == library_keys.WITHOUT_EFFECT_ON_RESULT - everywhere


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("sft", "learning_rate"),
        ("sft", "packing"),
        ("reward", "center_rewards_coefficient"),
        ("ppo", "kl_coef"),
        ("ppo", "response_length"),
        ("ppo", "num_mini_batches"),
        ("ppo", "max_grad_norm"),
        ("ppo", "eval_steps"),
        ("ppo", "kl_budget"),
        ("ppo", "ptx_coef"),
        ("dpo", "beta"),
        ("dpo", "loss_type"),
        ("lora", "r"),
        ("lora", "target_modules"),
    ],
)
def test_the_keys_people_set_can_be_set(config, key):
    assert key in library_keys.settable(config)


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        ("sft", "output_dir", "run directory"),
        ("dpo", "seed", "top of the recipe"),
        ("reward", "bf16", "model.dtype"),
        ("ppo", "gradient_checkpointing_kwargs", "recomputed for its own role"),
        ("ppo", "load_best_model_at_end", "`kl_budget`"),
        ("ppo", "dataloader_num_workers", "nothing left to load"),
        ("ppo", "reward_model_path", "one base for all stages"),
        ("ppo", "bf16", "model.dtype"),
        ("ppo", "mini_batch_size", "computed"),
        ("ppo", "neftune_noise_alpha", "does not read"),
        *((kind, "auto_find_batch_size", "the batch size that its recipe states") for kind in ("sft", "reward", "dpo")),
        *((kind, "logging_nan_inf_filter", "not finite ends the stage") for kind in ("sft", "reward", "ppo", "dpo")),
        *((kind, "load_best_model_at_end", "no checkpoint is kept") for kind in ("sft", "reward", "dpo")),
        ("dpo", "resume_from_checkpoint", "which a run does by itself"),
        ("lora", "modules_to_save", "only adapters are trained"),
    ],
)
def test_the_keys_that_would_mislead_are_refused(config, key, reason):
    assert key in library_keys.accepted(config)
    assert reason in library_keys.refusal(config, key)


def test_a_key_of_a_parent_class_carries_the_type_of_the_class_that_overrides_it():
    """`learning_rate` is a float in TrainingArguments and in each TRL class that gives it another default."""
    for config in ("sft", "reward", "dpo"):
        assert library_keys.type_problem(library_keys.accepted(config)["learning_rate"], 1e-4) is None
        assert "a number" in library_keys.type_problem(library_keys.accepted(config)["learning_rate"], "fast")


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "words"),
    [
        ("int", [0, -3], [1.5, True, "3", None, [1]], "a whole number"),
        ("float", [0, 1.5], [False, "1.5", None], "a number"),
        ("bool", [True, False], [1, 0, "true", None], "true or false"),
        ("str", ["", "a"], [1, None, True], "text"),
        ("list[str]", [["a"], []], ["a", None], "a list"),
        ("dict[str, Any]", [{}], [[], "a"], "a mapping"),
        ("int | None", [1, None], ["1", 1.5], "a whole number"),
        ("Optional[float]", [None, 1], ["x"], "a number"),
        ("typing.Optional[bool]", [None, True], [1], "true or false"),
        ("Union[dict, str, None]", [{}, "a", None], [1, []], "a mapping or text"),
        ("str | list[str]", ["a", ["a"]], [1, None], "text or a list"),
        ("Literal['k1', 'k3']", ["k1", "k3"], ["k2", 1, None], "`k1` or `k3`"),
        ("Optional[Literal['eos']]", ["eos", None], ["bos"], "`eos`"),
        ("bool | Literal['gaussian', 'eva']", [True, "eva"], ["pissa", 3], "true or false or `gaussian` or `eva`"),
        ("'int | None'", [2, None], ["2"], "a whole number"),
    ],
)
def test_type_problem_tells_fitting_values_from_others(annotation, good, bad, words):
    for value in good:
        assert library_keys.type_problem(annotation, value) is None, value
    for value in bad:
        assert library_keys.type_problem(annotation, value) == f"expected {words}, got {value!r}", value


@pytest.mark.parametrize("annotation", ["SchedulerType | str", "Union[SaveStrategy, str]", "Any", "LoftQConfig | dict"])
def test_types_that_only_importing_would_resolve_are_left_to_the_library(annotation):
    for value in ("text", 1, None, [], {}):
        assert library_keys.type_problem(annotation, value) is None


@pytest.mark.parametrize("config", CLASSES)
def test_the_real_defaults_have_no_type_problem(config):
    """Each class's own default of a settable key must pass its own annotation."""
    accepted = library_keys.accepted(config)
    for field in dataclasses.fields(CLASSES[config]):
        plain = isinstance(field.default, (int, float, str, bool, type(None)))
        if field.name in library_keys.settable(config) and plain and type(field.default).__module__ == "builtins":
            assert library_keys.type_problem(accepted[field.name], field.default) is None, field.name
