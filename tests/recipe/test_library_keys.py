"""The keys read from the libraries' source, held against the classes that importing gives."""

import dataclasses
import inspect
import os
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from peft import LoraConfig
from transformers import SchedulerType, Trainer, get_scheduler, trainer_optimizer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames
from trl import DPOConfig, RewardConfig, SFTConfig

from rlhf_pipeline import kinds, recipe
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
        ("_DPO_LOSS_KEYS", ("dpo",)),
        ("_LORA_DECIDED", ("lora",)),
    ],
)
def test_the_tables_name_no_key_that_the_libraries_do_not_have(table, configs):
    """A misspelt or outdated name there would let the real key through."""
    everywhere = {"kasa_config"}.union(*(library_keys.accepted(config) for config in configs))  # PEFT 0.20 lacks it
    assert set(getattr(library_keys, table)) - everywhere == set()


@pytest.mark.parametrize("kind", kinds.NAMES)
def test_a_kind_names_no_key_that_its_config_does_not_have(kind):
    config = kinds.get(kind).config
    assert {*config.refused, *(config.reads or ())} - library_keys.accepted(kind).keys() == set()


def test_nothing_is_both_read_by_ppo_and_refused():
    config = kinds.get("ppo").config
    assert config.reads & (library_keys._DECIDED.keys() | config.refused.keys()) == set()


@pytest.mark.parametrize("config", ["sft", "reward", "ppo", "dpo"])
def test_when_checkpoints_are_written_can_be_set_for_every_kind(config):
    """They change nothing of the result, so they are no reason to train again."""
    keys = {"save_strategy", "save_steps", "save_total_limit"}
    assert keys <= set(library_keys.settable(config))
    assert keys <= library_keys.WITHOUT_EFFECT_ON_RESULT


def test_what_ppo_has_beyond_transformers_and_can_be_set_is_documented():
    ours = set(PPOConfig.__annotations__) & set(library_keys.settable("ppo"))
    assert {"kl_budget", "cliprange"} <= ours
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
        *((kind, "auto_find_batch_size", "the batch size of its recipe") for kind in ("sft", "reward", "dpo")),
        *((kind, "logging_nan_inf_filter", "not finite ends the stage") for kind in ("sft", "reward", "ppo", "dpo")),
        *((kind, "load_best_model_at_end", "the best checkpoint is not kept") for kind in ("sft", "reward", "dpo")),
        ("dpo", "resume_from_checkpoint", "a run resumes from them by itself"),
        ("lora", "modules_to_save", "only adapters are trained"),
        ("lora", "eva_config", "its output from the start"),
        ("reward", "label_smoothing_factor", "does not read it"),
        ("dpo", "label_smoothing_factor", "`label_smoothing`"),
        ("dpo", "dataset_num_proc", "nothing left to process"),
        *((kind, "include_for_metrics", "TRL's own numbers") for kind in ("sft", "reward", "dpo")),
    ],
)
def test_the_keys_that_would_mislead_are_refused(config, key, reason):
    assert key in library_keys.accepted(config)
    assert reason in library_keys.refusal(config, key)


def test_a_key_of_a_parent_class_carries_the_type_of_the_class_that_overrides_it():
    """`learning_rate` is a float in TrainingArguments and in each TRL class that gives it another default."""
    for config in ("sft", "reward", "dpo"):
        annotation = library_keys.accepted(config)["learning_rate"]
        assert not library_keys.type_errors(annotation, 1e-4)
        assert library_keys.type_errors(annotation, "fast")


# Values as YAML gives them, and the annotations that take them.
SAMPLES = {
    "bool": [True, False],
    "int": [0, -3, 10**20],
    "float": [0.5, -2.0, 2e-5],
    "str": ["", "a", "3", "true", "2e-5"],
    "None": [None],
    "list[str]": [["a"], ["a", "b"]],
    "list[int]": [[1, 2]],
    "list[float]": [[0.5], [1, 0.5]],
    "list": [[], [["a"]], [None], [True], ["a", 1]],
    "dict[str, bool]": [{}, {"a": True}],
    "dict": [{"a": 1}, {"a": None}, {"a": {"b": "c"}}],
    "no": ["no"],
    "steps": ["steps"],
    "gaussian": ["gaussian"],
}
LISTS = {"list[str]", "list[int]", "list[float]", "list"}


@pytest.mark.parametrize(
    ("annotation", "takes"),
    [
        ("int", {"int"}),
        ("float", {"int", "float"}),
        ("bool", {"bool"}),
        ("str", {"str", "no", "steps", "gaussian"}),
        ("list[str]", {"list[str]"}),
        ("list[float] | None", {"list[int]", "list[float]", "None"}),
        ("list", LISTS),
        ("dict[str, Any]", {"dict[str, bool]", "dict"}),
        ("dict[str, bool] | None", {"dict[str, bool]", "None"}),
        ("int | None", {"int", "None"}),
        ("Optional[float]", {"int", "float", "None"}),
        ("typing.Optional[bool]", {"bool", "None"}),
        ("Union[dict, str, None]", {"dict[str, bool]", "dict", "str", "no", "steps", "gaussian", "None"}),
        ("str | list[str]", {"str", "no", "steps", "gaussian", "list[str]"}),
        ("IntervalStrategy", {"no", "steps"}),
        ("Literal['steps', 'never']", {"steps"}),
        ("Optional[Literal['steps']]", {"steps", "None"}),
        ("bool | Literal['gaussian', 'eva']", {"bool", "gaussian"}),
        ("'int | None'", {"int", "None"}),
        ("Optional['int']", {"int", "None"}),
        # What only importing would resolve is left to the library.
        ("Any", set(SAMPLES)),
        ("LoftQConfig | dict", set(SAMPLES)),
        ("Optional['LoftQConfig']", set(SAMPLES)),
        ("str | list[DebugOption]", {"str", "no", "steps", "gaussian", *LISTS}),
    ],
)
def test_an_annotation_takes_exactly_the_values_that_are_of_its_types(annotation, takes):
    for name, values in SAMPLES.items():
        for value in values:
            # An empty list is one of anything.
            fits = name in takes or (value == [] and bool(takes & LISTS))
            assert (not library_keys.type_errors(annotation, value)) == fits, value


def test_an_enumeration_beside_text_takes_no_other_text():
    words = {"eval_strategy": "epoch", "save_strategy": "best", "lr_scheduler_type": "cosine", "optim": "sgd"}
    for key, word in words.items():
        annotation = library_keys.accepted("sft")[key]
        assert not library_keys.type_errors(annotation, word)
        assert library_keys.type_errors(annotation, "never")


@pytest.mark.parametrize("config", CLASSES)
def test_no_key_takes_any_value_but_those_whose_type_needs_an_import(config):
    """A type that we do not know would let every value through."""
    values = [value for values in SAMPLES.values() for value in values]
    for key in library_keys.settable(config):
        annotation = library_keys.accepted(config)[key]
        if not any(library_keys.type_errors(annotation, value) for value in values):
            assert "Config" in annotation, key


@pytest.mark.parametrize("enumeration", [IntervalStrategy, SaveStrategy, SchedulerType, OptimizerNames])
def test_the_words_of_a_choice_are_those_of_the_real_class(enumeration):
    assert library_keys.words(enumeration.__name__) == tuple(choice.value for choice in enumeration)


@pytest.mark.parametrize("config", CLASSES)
def test_the_real_defaults_have_no_type_problem(config):
    """Each class's own default of a settable key must pass its own annotation."""
    accepted = library_keys.accepted(config)
    for field in dataclasses.fields(CLASSES[config]):
        plain = isinstance(field.default, (int, float, str, bool, type(None)))
        if field.name in library_keys.settable(config) and plain and type(field.default).__module__ == "builtins":
            assert not library_keys.type_errors(accepted[field.name], field.default), field.name


def test_what_the_files_say_of_a_key_is_what_the_class_has():
    for config in CLASSES:
        for field in dataclasses.fields(CLASSES[config]):
            if field.name in library_keys.settable(config):
                key = library_keys.keys(config)[field.name]
                if field.name in library_keys.OURS:
                    assert (key.default, key.package) == (library_keys.OURS[field.name][0], "rlhf_pipeline")
                    continue
                assert key.help == " ".join(field.metadata["help"].replace("%%", "%").split()), field.name
                assert key.default in (field.default, ...), field.name


# Keys without effect beside others


OPTIMIZERS = ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor", "adamw_8bit", "paged_adamw_32bit", "lion_32bit",
              "lion_8bit", "ademamix", "paged_ademamix_8bit", "rmsprop_bnb"]  # fmt: skip
OPTIONS = {"sgd": "momentum=0.5", "adagrad": "eps=0.5", "rmsprop": "alpha=0.5", "rmsprop_bnb": "alpha=0.5"}


def optimizer_settings(tmp_path: Path, **settings) -> dict:
    """What Transformers passes to the optimizer."""
    return Trainer.get_optimizer_cls_and_kwargs(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings))[1]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizers_keys_without_effect_are_those_it_is_not_passed(optim, tmp_path):
    """Of all optimizers that need no further package."""
    changed = {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5, "optim_args": OPTIONS.get(optim, "alpha=7")}
    plain = optimizer_settings(tmp_path, optim=optim)
    without_effect = {
        key for key, value in changed.items() if optimizer_settings(tmp_path, optim=optim, **{key: value}) == plain
    }
    found = library_keys.without_effect("sft", {"optim": optim, **changed})
    assert set(found) == without_effect
    assert all(reason == f"with `optim: {optim}`" for reason in found.values())


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop"])
def test_options_that_an_optimizer_does_not_read_are_found(optim, tmp_path):
    """`weight_decay` as an option is read, and then the key of that name wins."""
    read = library_keys._OPTIM_ARGS[optim]
    plain = optimizer_settings(tmp_path, optim=optim)
    for option in ("momentum", "dampening", "nesterov", "lr_decay", "eps", "alpha", "centered", "mumentum"):
        value = "true" if option in ("nesterov", "centered") else "0.25"
        settings = {"optim": optim, "optim_args": f"{option}={value}"}
        assert (optimizer_settings(tmp_path, **settings) != plain) == (option in read), option
        assert ("optim_args" in library_keys.without_effect("sft", settings)) == (option not in read), option
    reason = library_keys.without_effect("ppo", {"optim": optim, "optim_args": "weight_decay=0.1"})["optim_args"]
    assert reason.startswith(f"with `weight_decay`: `{optim}` reads ")


def test_every_optimizer_is_known_to_read_its_options_or_not():
    """A new name in Transformers must be looked up."""
    for optim in OptimizerNames:
        handler = inspect.getsource(trainer_optimizer._OPTIMIZER_HANDLERS[optim])
        if "optim_args" not in handler:
            assert "optim_args" in library_keys.without_effect("dpo", {"optim": optim.value, "optim_args": "a=1"}), (
                optim
            )
        if not any(word in handler for word in ("adam_kwargs", "adam_beta1")):
            assert "adam_beta1" in library_keys.without_effect("dpo", {"optim": optim.value, "adam_beta1": 0.5}), optim


@pytest.mark.parametrize("schedule", [one.value for one in SchedulerType if "plateau" not in one and one != "greedy"])
def test_a_schedules_keys_without_effect_are_those_it_does_not_read(schedule):
    """`reduce_lr_on_plateau` and `greedy` follow the loss, and read no warm-up either."""
    needed = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }.get(schedule, {})

    def rates(warmup: int, **options) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = get_scheduler(schedule, optimizer, warmup, 10, needed | options)
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    try:
        reads_options = False
        rates(3, an_option_that_no_schedule_has=1)
    except TypeError:
        reads_options = True
    found = library_keys.without_effect(
        "sft", {"lr_scheduler_type": schedule, "warmup_steps": 3, "lr_scheduler_kwargs": {}}
    )
    assert ("warmup_steps" in found) == (rates(0) == rates(3))
    assert ("lr_scheduler_kwargs" in found) == (not reads_options)


ALL = ("sft", "reward", "dpo", "ppo")
OF_TRAINER = ("sft", "reward", "dpo")


@pytest.mark.parametrize(
    ("kinds", "values", "key", "reason"),
    [
        (ALL, {"logging_strategy": "no", "logging_steps": 3}, "logging_steps", "unless `logging_strategy` is `steps`"),
        (ALL, {"save_strategy": "epoch", "save_steps": 3}, "save_steps", "unless `save_strategy` is `steps`"),
        (ALL, {"eval_strategy": "no", "eval_steps": 3}, "eval_steps", "unless `eval_strategy` is `steps`"),
        (ALL, {"save_strategy": "no", "save_total_limit": 3}, "save_total_limit", "without `save_strategy`"),
        (ALL, {"eval_delay": 3}, "eval_delay", "without `eval_strategy`"),
        (("ppo",), {"eval_on_start": True}, "eval_on_start", "without `eval_strategy`"),
        (("ppo",), {"per_device_eval_batch_size": 3}, "per_device_eval_batch_size", "without `eval_strategy`"),
        (("ppo",), {"kl_horizon": 3}, "kl_horizon", "without `target_kl`"),
        (("ppo",), {"total_episodes": 8, "num_train_epochs": 2}, "num_train_epochs", "beside `total_episodes`"),
        (("ppo",), {"max_steps": 8, "num_train_epochs": 2}, "num_train_epochs", "beside `max_steps`"),
        (ALL, {"adam_beta1": 0.8, "optim": "sgd"}, "adam_beta1", "with `optim: sgd`"),
        (ALL, {"optim_args": "a=1"}, "optim_args", "with `optim: adamw_torch`"),
        (ALL, {"lr_scheduler_type": "greedy", "warmup_steps": 3}, "warmup_steps", "with `lr_scheduler_type: greedy`"),
        (OF_TRAINER, {"optim_target_modules": "all-linear"}, "optim_target_modules", "with `optim: adamw_torch`"),
        (OF_TRAINER, {"liger_kernel_config": {}}, "liger_kernel_config", "without `use_liger_kernel`"),
        (OF_TRAINER, {"torch_compile": False, "torch_compile_mode": "default"}, "torch_compile",
         "beside `torch_compile_mode`, which turns it on"),
        (OF_TRAINER, {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {}},
         "gradient_checkpointing_kwargs", "without `gradient_checkpointing`"),
        (OF_TRAINER, {"activation_checkpointing": False, "gradient_checkpointing": True}, "gradient_checkpointing",
         "beside `activation_checkpointing`, its new name"),
        (OF_TRAINER, {"dataloader_in_order": False}, "dataloader_in_order", "without `dataloader_num_workers`"),
        (OF_TRAINER, {"train_sampling_strategy": "sequential", "data_seed": 1}, "data_seed",
         "with `train_sampling_strategy: sequential`"),
        (("sft", "dpo"), {"max_length": None, "truncation_mode": "x"}, "truncation_mode", "without `max_length`"),
        (("sft",), {"packing_strategy": "bfd"}, "packing_strategy", "without `packing`"),
        (("sft",), {"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor",
         "unless `loss_type` is `nll`"),
        (("dpo",), {"label_smoothing": 0.1}, "label_smoothing",
         "unless `loss_type` has `exo_pair` or `robust` or `aot` or `aot_unpaired`"),
        (("dpo",), {"loss_type": ["hinge"], "discopop_tau": 0.1}, "discopop_tau", "unless `loss_type` has `discopop`"),
        (("dpo",), {"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef",
         "unless `f_divergence_type` is `alpha_divergence`"),
        (("dpo",), {"precompute_ref_batch_size": 2}, "precompute_ref_batch_size", "without `precompute_ref_log_probs`"),
    ],
)  # fmt: skip
def test_a_key_without_effect_beside_the_others_is_found(kinds, values, key, reason):
    for kind in kinds:
        assert set(values) <= set(library_keys.settable(kind)), kind
        assert library_keys.without_effect(kind, values) == {key: reason}, kind


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("sft", {"logging_steps": 3, "save_steps": 3, "eval_steps": 3, "save_total_limit": 1, "eval_delay": 1}),
        ("sft", {"max_steps": 2, "num_train_epochs": 1}),  # as an override on the command line would have it
        ("sft", {"eval_on_start": True, "per_device_eval_batch_size": 3}),  # it evaluates at the end
        ("ppo", {"eval_steps": 3, "eval_on_start": True, "per_device_eval_batch_size": 3, "eval_delay": 1}),
        ("ppo", {"target_kl": 6.0, "kl_horizon": 10, "max_steps": -1, "num_train_epochs": 2}),
        ("sft", {"adam_beta1": 0.8, "adam_epsilon": 1e-6, "weight_decay": 0.1, "warmup_steps": 3}),
        ("sft", {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"}),
        ("sft", {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 3}),
        ("sft", {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=8"}),
        ("sft", {"eval_packing": True, "packing_strategy": "wrapped", "truncation_mode": "keep_end"}),
        ("sft", {"loss_type": "nll", "label_smoothing_factor": 0.1}),
        ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "activation_checkpointing": True}),
        ("sft", {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "data_seed": 3}),
        ("dpo", {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1, "max_length": None}),
        ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.1}),
        ("sft", {"max_steps": None, "num_train_epochs": 2, "eval_delay": None, "packing_strategy": None}),
    ],
)
def test_keys_with_an_effect_are_left_alone(kind, values):
    assert library_keys.without_effect(kind, values) == {}


@pytest.mark.parametrize("given", [{}, {"loss_type": "chunked_nll"}, {"loss_type": "nll"}])
def test_labels_are_smoothed_where_trl_resolves_the_loss_to_the_one_that_reads_it(given, tmp_path):
    """In TRL 1.12 the default loss does not read it; later that is `nll`, of which `chunked_nll` is another name."""
    resolved = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **given).loss_type
    found = library_keys.without_effect("sft", {"label_smoothing_factor": 0.1, **given})
    assert (found == {}) == (resolved == "nll")


def test_what_only_evaluation_reads_needs_rows_to_evaluate_on():
    values = {"per_device_eval_batch_size": 2, "eval_accumulation_steps": 2, "eval_on_start": True}
    for kind in OF_TRAINER:
        assert library_keys.without_effect(kind, values, holds_out=True) == {}
        found = library_keys.without_effect(kind, values, holds_out=False)
        assert found == dict.fromkeys(values, "without `eval_fraction` or `eval_data` in `data`")


def test_values_of_a_wrong_type_are_left_to_the_check_of_types():
    values = {"max_steps": "many", "num_train_epochs": 1, "loss_type": "sigmoid", "label_smoothing": 0.1, "optim": 3,
              "optim_args": 5, "lr_scheduler_type": ["constant"], "warmup_steps": {}, "eval_strategy": 1}  # fmt: skip
    for kind in ALL:
        library_keys.without_effect(kind, values)


@pytest.mark.parametrize("name", recipe.shipped())
def test_no_shipped_recipe_sets_a_key_without_effect(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(name)
    for stage in loaded.stages.values():
        assert library_keys.without_effect(stage.kind, stage.trainer, stage.data.holds_out) == {}


@pytest.mark.parametrize(
    ("settings", "useless"),
    [
        ({"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}, {"epsilon", "epsilon_high", "delta"}),
        ({"epsilon": 0.1, "num_iterations": 2}, set()),
        ({"epsilon": 0.1, "steps_per_generation": 4, "gradient_accumulation_steps": 2}, set()),
        ({"epsilon": 0.1, "steps_per_generation": 2, "gradient_accumulation_steps": 2}, {"epsilon"}),
        ({"epsilon": 0.1, "generation_batch_size": 32, "per_device_train_batch_size": 8}, set()),
        ({"epsilon": 0.1, "epsilon_high": 5.0, "loss_type": "cispo", "num_iterations": 2}, {"epsilon"}),
        ({"vespo_k_pos": 2.0, "sapo_temperature_pos": 1.0, "loss_type": "sapo"}, {"vespo_k_pos"}),
        ({"entropy_target": 0.3}, {"entropy_target"}),
        ({"entropy_target": 0.3, "use_adaptive_entropy": True}, set()),
        ({"use_bias_correction_kl": False}, {"use_bias_correction_kl"}),
        ({"use_bias_correction_kl": False, "beta": 0.1}, set()),
        ({"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"}, {"scale_rewards"}),
    ],
)
def test_keys_of_groups_without_effect(settings, useless):
    assert set(library_keys.without_effect("grpo", settings)) == useless


def test_a_pair_of_numbers_is_a_list_in_yaml():
    annotation = library_keys.accepted("rloo")["reward_clip_range"]
    assert not library_keys.type_errors(annotation, [-5.0, 5.0]) and library_keys.type_errors(annotation, "wide")
