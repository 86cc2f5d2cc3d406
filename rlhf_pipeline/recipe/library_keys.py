"""The keys that TRL's and PEFT's own config classes take, read from their source files without importing them.

Importing TRL costs seconds and pulls in torch; parsing five files costs milliseconds. What a recipe may not set, and
why, is here too: a key that would be ignored is an error, never silence.
"""

import ast
import contextlib
import functools
import importlib.util
import math
import re
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rlhf_pipeline import kinds

_LORA = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)
_LAUNCH = (
    ("accelerate", "commands/config/config_args.py", "BaseConfig"),
    ("accelerate", "commands/config/config_args.py", "ClusterConfig"),
)
# Names that the annotations use for a choice of words, and where Transformers lists them.
_CHOICES = {
    "IntervalStrategy": "trainer_utils.py",
    "SaveStrategy": "trainer_utils.py",
    "SchedulerType": "trainer_utils.py",
    "OptimizerNames": "training_args.py",
}
_RUN_DIRECTORY = "the run directory decides where a stage writes"
_DTYPE = "the recipe's `model.dtype` decides the precision of every stage"
_TOKENIZER = "the pipeline prepares one tokenizer for all stages, so that they read the same tokens"
_ENCODED = "the pipeline encodes the data itself: loss on replies only, one EOS behind each, in every stage alike"
_MODEL = "the pipeline loads one base for all stages; see the recipe's `model`"
_CHECKPOINTS = "checkpoints are always complete, and a run resumes from them by itself"
_BEST = "a stage's result is its last step; the best checkpoint is not kept"
_LAUNCH_SAYS = "`launch` says how many processes train, and how"
_WAIT = "processes wait for each other for five minutes"
_ONE_GPU = "it is worked out from `launch`, which says how many processes train"
_HUB = "publishing is not part of a run"
_NO_METRICS = "evaluation measures TRL's own numbers, and this changes nothing about them"
_TRACKED_AS = "a tracker's runs are named after recipe and stage; set `report_to` at the top of the recipe"
_TRACKIO = "Trackio logs to a local folder, or where TRACKIO_SPACE_ID says; set `report_to` at the top of the recipe"

_DECIDED: dict[str, str] = {
    "output_dir": _RUN_DIRECTORY,
    "seed": "set `seed` at the top of the recipe; it seeds every stage",
    "bf16": _DTYPE, "fp16": _DTYPE, "bf16_full_eval": _DTYPE, "fp16_full_eval": _DTYPE,
    "model_init_kwargs": _MODEL, "trust_remote_code": _MODEL, "use_cache": _MODEL,
    "chat_template_path": _TOKENIZER, "eos_token": _TOKENIZER, "pad_token": _TOKENIZER,
    "dataset_text_field": _ENCODED, "dataset_kwargs": _ENCODED, "completion_only_loss": _ENCODED,
    "assistant_only_loss": _ENCODED, "remove_unused_columns": _ENCODED, "label_names": _ENCODED,
    "save_only_model": _CHECKPOINTS, "resume_from_checkpoint": _CHECKPOINTS, "ignore_data_skip": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS, "save_on_each_node": _ONE_GPU,
    "enable_jit_checkpoint": "SIGTERM always leaves a checkpoint",
    "auto_find_batch_size": "a stage trains with the batch size of its recipe, also after it is resumed",
    "prediction_loss_only": _NO_METRICS, "include_for_metrics": _NO_METRICS, "batch_eval_metrics": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS, "eval_use_gather_object": _ONE_GPU,
    "length_column_name": "the encoded rows have no column of lengths: they are counted",
    "load_best_model_at_end": _BEST, "metric_for_best_model": _BEST, "greater_is_better": _BEST,
    "logging_nan_inf_filter": "a loss that is not finite ends the stage",
    "report_to": "set `report_to` at the top of the recipe; every stage reports to the same trackers",
    "run_name": _TRACKED_AS, "project": _TRACKED_AS, "trackio_space_id": _TRACKIO, "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO, "disable_tqdm": "progress is shown from the stage's `metrics.jsonl`",
    "push_to_hub": _HUB, "hub_token": _HUB, "hub_private_repo": _HUB, "hub_model_id": _HUB, "hub_strategy": _HUB,
    "hub_always_push": _HUB, "hub_revision": _HUB,
    "use_cpu": _LAUNCH_SAYS, "local_rank": _ONE_GPU, "ddp_find_unused_parameters": _ONE_GPU,
    "ddp_bucket_cap_mb": _ONE_GPU, "ddp_broadcast_buffers": _ONE_GPU, "ddp_static_graph": _ONE_GPU,
    "ddp_backend": _ONE_GPU, "ddp_timeout": _WAIT, "fsdp": _LAUNCH_SAYS, "fsdp_config": _LAUNCH_SAYS,
    "deepspeed": _LAUNCH_SAYS, "accelerator_config": _ONE_GPU, "parallelism_config": _ONE_GPU,
    "average_tokens_across_devices": _ONE_GPU, "log_on_each_node": _ONE_GPU, "log_level_replica": _ONE_GPU,
    "ds3_gather_for_generation": _ONE_GPU,
    "do_train": "it has no effect in TRL's trainers", "do_eval": "it has no effect in TRL's trainers",
    "do_predict": "it has no effect in TRL's trainers",
    "sync_ref_model": "the reference is a frozen adapter",
    "ref_model_mixup_alpha": "the reference is a frozen adapter",
    "ref_model_sync_steps": "the reference is a frozen adapter",
}  # fmt: skip

# What of the recipe decides instead.
_INSTEAD = {
    "output_dir": "output_dir", "seed": "seed", "report_to": "report_to", "run_name": "name", "project": "name",
    "bf16": "model.dtype: bfloat16", "bf16_full_eval": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16", "fp16_full_eval": "model.dtype: float16", "tf32": "model.dtype",
    "trust_remote_code": "model.trust_remote_code", "chat_template_path": "model.chat_template",
    "assistant_only_loss": "data.loss: all",
    "fsdp": "launch.fsdp_config", "fsdp_config": "launch.fsdp_config", "deepspeed": "launch.deepspeed_config",
    "use_cpu": "launch.use_cpu",
}  # fmt: skip

_NO_MEGATRON = "nothing is trained with Megatron-LM here"
_BASE_STAYS = "the base is never changed: only adapters are trained"
_START = "it belongs to an initialisation that changes the base's weights, or its output from the start"
_LORA_DECIDED = {
    "task_type": "each stage sets it", "inference_mode": "each role sets it", "peft_type": "it is always LoRA",
    "auto_mapping": "PEFT sets it", "base_model_name_or_path": "PEFT sets it", "revision": _MODEL,
    "peft_version": "PEFT sets it", "modules_to_save": _BASE_STAYS, "trainable_token_indices": _BASE_STAYS,
    "bias": _BASE_STAYS, "kasa_config": _BASE_STAYS, "layer_replication": _BASE_STAYS,
    "runtime_config": "it is not saved with the adapter", "megatron_config": _NO_MEGATRON,
    "megatron_core": _NO_MEGATRON,
    "eva_config": _START, "corda_config": _START, "lora_ga_config": _START, "loftq_config": _START,
}  # fmt: skip

_TPU = "it is of TPUs, on which nothing is trained here"
_SAGEMAKER = "it is of SageMaker, which starts machines of its own"
_LAUNCH_DECIDED = {
    "compute_environment": _SAGEMAKER, "distributed_type": "the other keys tell it",
    "main_training_function": _TPU, "downcast_bf16": _TPU, "tpu_name": _TPU, "tpu_zone": _TPU, "tpu_use_cluster": _TPU,
    "tpu_use_sudo": _TPU, "tpu_vm": _TPU, "tpu_env": _TPU, "command_file": _TPU, "commands": _TPU,
    "megatron_lm_config": _NO_MEGATRON, "mpirun_config": "processes are started by torchrun, not by mpirun",
    "fp8_config": _DTYPE, "dynamo_config": "`torch_compile` in a stage's `trainer` compiles it",
    "parallelism_config": "each process has rows of its own, and whole ones",
}  # fmt: skip

# How Transformers makes its optimizers (trainer_optimizer.py): which do not take Adam's keys, and which take
# `optim_args`. What SGD & co. take of them; `weight_decay` is not among it, since the key of that name always wins.
_WITHOUT_ADAM_KEYS = ("adafactor", "sgd", "adagrad", "rmsprop", "galore", "lomo", "adalomo", "grokadamw",
                      "schedule_free_sgd")  # fmt: skip
_WITH_OPTIM_ARGS = ("sgd", "adagrad", "rmsprop", "ademamix", "paged_ademamix", "adamw_anyprecision", "adamw_torch_4bit",
                    "adamw_torch_8bit", "galore", "apollo", "schedule_free", "grokadamw", "stable_adamw")  # fmt: skip
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
_DPO_LOSS_KEYS = {
    "label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}

_LOSS_KEYS = {
    "sapo": ("sapo_temperature_neg", "sapo_temperature_pos"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
_CLIPS_OTHERWISE = {
    "cispo": ("epsilon", "delta"), "sapo": ("epsilon", "epsilon_high", "delta"),
    "vespo": ("epsilon", "epsilon_high", "delta"),
}  # fmt: skip

# The least, and the most, that a number may be: where the libraries do not say so, or only when a stage trains.
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf), "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf), "precompute_ref_batch_size": (1, math.inf),
    "max_length": (1, math.inf), "data_seed": (0, 2**32 - 1),
    "learning_rate": (0, math.inf), "weight_decay": (0, math.inf), "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf), "adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (0, math.inf),
    "desirable_weight": (0, math.inf), "undesirable_weight": (0, math.inf),
    "beta": (0, math.inf), "label_smoothing": (0, 1), "label_smoothing_factor": (0, 1), "ld_alpha": (0, 1),
    "num_generations": (2, math.inf), "num_generations_eval": (1, math.inf), "num_iterations": (1, math.inf),
    "steps_per_generation": (1, math.inf), "generation_batch_size": (2, math.inf),
    "max_completion_length": (1, math.inf), "top_entropy_quantile": (0, 1),
    "num_processes": (1, math.inf), "num_machines": (1, math.inf), "machine_rank": (0, math.inf),
    "main_process_port": (0, 65_535),
    "r": (1, math.inf), "lora_dropout": (0, 1),
}  # fmt: skip

# These change what is written or how fast, not what is learned; the fingerprint leaves them out.
WITHOUT_EFFECT_ON_RESULT = {
    "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "include_num_input_tokens_seen", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "skip_memory_metrics", "torch_empty_cache_steps", "debug",
    # The same numbers in less memory: a stage that ran out of it resumes from its checkpoint.
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "eval_accumulation_steps",
    "num_sample_generations", "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip


# Where this project's default is another than the library's, with what its help then says.
OURS: dict[str, tuple[Any, str]] = {
    "router_aux_loss_coef": (
        0.0,
        "Weight of the auxiliary loss that has a mixture's routers spread tokens evenly over its experts. By default "
        "0: routers are frozen here, and it would only bend the adapters, and begin DPO's loss elsewhere than at ln 2.",
    ),
    "desirable_weight": (
        None,
        "Weight of the losses of good replies. By default what balances them with the bad ones: 1, or more where they "
        "are fewer.",
    ),
    "undesirable_weight": (
        None,
        "Weight of the losses of bad replies. By default what balances them with the good ones: 1, or more where they "
        "are fewer.",
    ),
}


class Key(NamedTuple):
    """A key of a library's config class, as its source file has it, but for the defaults that are ours."""

    annotation: str
    """Its type; a `Literal` where the library lists the words that its command line takes."""

    help: str
    """What the library says about it, in one line; empty where it says nothing."""

    default: Any
    """Its default; `...` where the file alone does not show it."""

    package: str
    """The package that decides the default, such as `trl`, or `rlhf_pipeline`."""


_LAUNCH_OWN = {
    "config_file": Key("Optional[str]", "A file that `accelerate config` wrote; the other keys go before it.", None,
                       "rlhf_pipeline"),
    "num_processes": Key("int | Literal['auto']", "How many processes train, on all machines together; `auto`, as many "
                         "as devices are visible.", ..., "rlhf_pipeline"),
    "mixed_precision": Key("Literal['no', 'bf16', 'fp16', 'fp8', None]", "As `model.dtype`, which decides it.", None,
                           "rlhf_pipeline"),
    "rdzv_backend": Key("Literal['static', 'c10d']", "How several machines find each other.", "static", "accelerate"),
}  # fmt: skip
_OTHERS: dict[str, tuple[tuple[tuple[str, str, str], ...], dict[str, str], str]] = {
    "lora": (_LORA, _LORA_DECIDED, "peft.LoraConfig"),
    "launch": (_LAUNCH, _LAUNCH_DECIDED, "`accelerate config`"),
}


@functools.cache
def keys(config: str) -> dict[str, Key]:
    """Every key that a library's config class takes, in its order.

    Args:
        config: the name of a kind, or `lora`, or `launch`.
    """
    found: dict[str, Key] = {}
    for package, file, class_name in _OTHERS[config][0] if config in _OTHERS else kinds.get(config).config.sources:
        for item in _class(package, file, class_name).body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                name, details = item.target.id, {"default": item.value}
                if isinstance(item.value, ast.Call):
                    details = {str(keyword.arg): keyword.value for keyword in item.value.keywords}
                metadata = details.get("metadata")
                if isinstance(metadata, ast.Dict):
                    words = [key.value for key in metadata.keys if isinstance(key, ast.Constant)]
                    details |= dict(zip(map(str, words), metadata.values, strict=True))
                # A word of a choice may be given as text, but not any text.
                annotation = re.sub(rf"({'|'.join(_CHOICES)}) \| str", r"\1", ast.unparse(item.annotation))
                annotation = re.sub(r"tuple\[(\w+), \1\]", r"list[\1]", annotation)  # YAML has lists
                if choices := _literal(details.get("choices"), []):
                    annotation = f"Literal[{', '.join(map(repr, choices))}]{' | None' * ('None' in annotation)}"
                text = " ".join(str(_literal(details.get("help"), "")).replace("%%", "%").split())
                found[name] = Key(annotation, text, _literal(details.get("default"), ...), package)
                if name in OURS:
                    found[name] = Key(annotation, OURS[name][1], OURS[name][0], "rlhf_pipeline")
    if config == "launch":
        found |= _LAUNCH_OWN
    return {name: key for name, key in found.items() if not name.startswith("_")}


def accepted(config: str) -> dict[str, str]:
    """Every key that a library's config class takes, with its type as written there; see `keys`."""
    return {name: key.annotation for name, key in keys(config).items()}


@functools.cache
def _class(package: str, file: str, name: str) -> ast.ClassDef:
    body = tree(package, file).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


@functools.cache
def tree(package: str, file: str) -> ast.Module:
    """The source of a library's file, which is not imported."""
    return ast.parse(_source(package, file).read_text(encoding="utf-8"))


def _literal(node: ast.expr | None, otherwise: Any) -> Any:
    """The value that an expression spells out; something else where it has to be computed."""
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """The words of a choice that annotations name, such as `SchedulerType`; empty for any other name."""
    if name not in _CHOICES:
        return ()
    body = _class("transformers", _CHOICES[name], name).body
    values = (_literal(item.value, None) for item in body if isinstance(item, ast.Assign))
    return tuple(value for value in values if isinstance(value, str))


def _source(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent / file


def settable(config: str) -> list[str]:
    """The keys that a recipe may set, sorted."""
    return sorted(key for key in accepted(config) if refusal(config, key) is None)


def refusal(config: str, key: str) -> str | None:
    """Why a recipe may not set a key that the library takes; None where it may."""
    if config in _OTHERS:
        return _OTHERS[config][1].get(key)
    kind = kinds.get(config)
    if kind.config.reads is not None and key in kind.config.reads:
        return None
    otherwise = None if kind.config.reads is None else f"{kind.title} does not read it"
    return (_DECIDED | dict(kind.config.refused)).get(key, otherwise)


def instead(config: str, key: str, value: Any) -> str:
    """What to do about a key that a recipe may not set: which one of the recipe to set, if there is one.

    Args:
        config: the name of a kind, or `lora`.
        key: a key that `refusal` refuses.
        value: what it is set to; nothing is put in the place of `bf16: false`.
    """
    own = None if config in _OTHERS or value in (None, False) else _INSTEAD.get(key)
    if own is None:
        return "remove it"
    return f"set `{own}` instead" if "." in own else f"set `{own}` at the top of the recipe instead"


def defaults(config: str, given: Collection[str], holds_out: bool = True) -> dict[str, Key]:
    """The keys that a recipe may set, has not set, and whose default decides the result; sorted.

    Left out are those whose default is null, would have no effect beside the other defaults, or is computed by the
    library.

    Args:
        config: the name of a kind, or `lora`.
        given: the keys that are set.
        holds_out: whether there are rows to evaluate on.
    """
    found = keys(config)
    rest = {name: found[name] for name in settable(config) if name not in given}
    useless = without_effect(config, {name: key.default for name, key in rest.items()}, holds_out)
    return {
        name: key
        for name, key in rest.items()
        if key.default not in (None, ...) and name not in useless and name not in WITHOUT_EFFECT_ON_RESULT
    }


def documented(config: str) -> str:
    """What to look up the keys of a library's config class under."""
    return _OTHERS[config][2] if config in _OTHERS else kinds.get(config).config.documented


def without_effect(config: str, values: dict[str, Any], holds_out: bool = True) -> dict[str, str]:
    """Keys that would have no effect beside the others.

    Args:
        config: the name of a kind; of `lora` there are none.
        values: what a recipe sets there. A null counts as not set; values of a wrong type are tolerated.
        holds_out: whether there are rows to evaluate on.

    Returns:
        For each such key the end of a sentence that begins with "it has no effect".
    """
    given = {key: value for key, value in values.items() if value is not None}
    reasons: dict[str, str] = {}
    kind = kinds.find(config)
    own_loop = kind is not None and kind.own_loop

    def useless(reason: str, *keys: str) -> None:
        for key in keys:
            if key in given:
                reasons.setdefault(key, reason)

    for what in ("logging", "eval", "save"):
        if given.get(f"{what}_strategy", "steps") != "steps":
            useless(f"unless `{what}_strategy` is `steps`", f"{what}_steps")
    if given.get("save_strategy") == "no":
        useless("without `save_strategy`", "save_total_limit")
    if given.get("eval_strategy", "steps" if "eval_steps" in given else "no") == "no":
        useless("without `eval_strategy`", "eval_delay")
        if own_loop:  # the others evaluate at the end as well
            useless("without `eval_strategy`", "eval_on_start", "per_device_eval_batch_size")
    if not own_loop and not holds_out:
        evaluating = ("eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps")
        own = ("eval_packing", "num_generations_eval")
        useless("without `eval_fraction` or `eval_data` in `data`", *evaluating, *own)
    _optimizer_keys_without_effect(given, useless)
    if own_loop:
        for key in ("total_episodes", "max_steps"):  # elsewhere `max_steps` is there to end the epochs early
            if isinstance(given.get(key), int) and given[key] > 0:
                useless(f"beside `{key}`", "num_train_epochs")
        if "target_kl" not in given:
            useless("without `target_kl`", "kl_horizon")
        return reasons

    _trainer_keys_without_effect(given, useless)
    if kind is not None and kind.samples:
        _group_keys_without_effect(given, useless)
    if "max_length" in values and values["max_length"] is None:
        useless("without `max_length`", "truncation_mode")
    if "packing" in accepted(config):
        if not given.get("packing") and not given.get("eval_packing"):
            useless("without `packing`", "packing_strategy")
        smoothed, default = {"nll"}, keys(config)["loss_type"].default
        if default == "nll":  # in newer versions of TRL it names the same loss
            smoothed.add("chunked_nll")
        if given.get("loss_type", default) not in smoothed:
            useless("unless `loss_type` is `nll`", "label_smoothing_factor")
    if "discopop_tau" in accepted(config):
        losses = given.get("loss_type", ["sigmoid"])
        for key, readers in _DPO_LOSS_KEYS.items():
            if isinstance(losses, list) and not any(loss in readers for loss in losses):
                useless(f"unless `loss_type` has {' or '.join(f'`{loss}`' for loss in readers)}", key)
        if given.get("f_divergence_type") != "alpha_divergence":
            useless("unless `f_divergence_type` is `alpha_divergence`", "f_alpha_divergence_coef")
        if not given.get("precompute_ref_log_probs"):
            useless("without `precompute_ref_log_probs`", "precompute_ref_batch_size")
    return reasons


def _optimizer_keys_without_effect(given: dict[str, Any], useless: Callable[..., None]) -> None:
    """Of the keys for optimizer and schedule, those that Transformers passes to neither."""
    optimizer = str(given.get("optim", "adamw_torch"))
    with_it = f"with `optim: {optimizer}`"
    if optimizer.startswith(_WITHOUT_ADAM_KEYS):
        useless(with_it, "adam_beta1", "adam_beta2", "adam_epsilon")
    if "lion" in optimizer:
        useless(with_it, "adam_epsilon")
    if not optimizer.startswith(("galore", "apollo")):
        useless(with_it, "optim_target_modules")
    if optimizer in words("OptimizerNames") and not optimizer.startswith(_WITH_OPTIM_ARGS):
        useless(with_it, "optim_args")
    elif optimizer in _OPTIM_ARGS:
        options = str(given.get("optim_args", "")).replace(" ", "").split(",")
        unread = [option.split("=")[0] for option in options if option.split("=")[0] not in _OPTIM_ARGS[optimizer]]
        if unread:
            useless(f"with `{unread[0]}`: `{optimizer}` reads {', '.join(_OPTIM_ARGS[optimizer])}", "optim_args")

    schedule = given.get("lr_scheduler_type", "linear")
    if schedule in ("constant", "reduce_lr_on_plateau", "greedy") and "schedule_free" not in optimizer:
        useless(f"with `lr_scheduler_type: {schedule}`", "warmup_steps")
    if schedule in ("constant", "constant_with_warmup"):
        useless(f"with `lr_scheduler_type: {schedule}`", "lr_scheduler_kwargs")


def _trainer_keys_without_effect(given: dict[str, Any], useless: Callable[..., None]) -> None:
    """Of the other keys of Transformers' Trainer, those that need another one."""
    if "activation_checkpointing" in given:
        useless("beside `activation_checkpointing`, its new name", "gradient_checkpointing")
    if "activation_checkpointing_kwargs" in given:
        useless("beside `activation_checkpointing_kwargs`, its new name", "gradient_checkpointing_kwargs")
    name = "activation_checkpointing" if "activation_checkpointing" in given else "gradient_checkpointing"
    if given.get(name, True) is False:
        useless(f"without `{name}`", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    if given.get("torch_compile") is False:
        for key in ("torch_compile_backend", "torch_compile_mode"):
            if key in given:
                useless(f"beside `{key}`, which turns it on", "torch_compile")
    if not given.get("use_liger_kernel"):
        useless("without `use_liger_kernel`", "liger_kernel_config")
    if given.get("dataloader_num_workers", 0) == 0:
        of_workers = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "in_order")
        useless("without `dataloader_num_workers`", *(f"dataloader_{key}" for key in of_workers))
    order = given.get("train_sampling_strategy", "random")
    if order in ("sequential", "group_by_length"):
        useless(f"with `train_sampling_strategy: {order}`", "data_seed")


def _group_keys_without_effect(given: dict[str, Any], useless: Callable[..., None]) -> None:
    """Of GRPO's and RLOO's keys, those that need another one."""
    loss = given.get("loss_type", "dapo")
    for one, keys_of_it in _LOSS_KEYS.items():
        if loss != one:
            useless(f"unless `loss_type` is `{one}`", *keys_of_it)
    useless(f"with `loss_type: {loss}`", *_CLIPS_OTHERWISE.get(loss, ()))
    if not given.get("use_adaptive_entropy"):
        of_entropy = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
        useless("without `use_adaptive_entropy`", *of_entropy)
    if given.get("beta") in (None, 0):
        useless("without `beta`", "use_bias_correction_kl")
    if given.get("multi_objective_aggregation") == "normalize_then_sum":
        useless("with `multi_objective_aggregation: normalize_then_sum`", "scale_rewards")
    steps, batch = given.get("gradient_accumulation_steps", 1), given.get("per_device_train_batch_size", 8)
    passes = given.get("steps_per_generation", steps)
    with contextlib.suppress(TypeError, ZeroDivisionError):
        passes = given["generation_batch_size"] // batch if "generation_batch_size" in given else passes
        if steps % (passes * given.get("num_iterations", 1)) == 0:  # each reply is trained on by the policy it is of
            several = "where each batch of replies makes one step (`num_iterations`, `steps_per_generation`)"
            useless(several, "epsilon", "epsilon_high", "delta", "off_policy_mask_threshold")


# What the names in annotations mean, beside the choices; the library itself checks values of any other type.
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "Literal": Literal,
          "Optional": typing.Optional, "Union": typing.Union, "typing": typing}  # fmt: skip


def out_of_range(key: str, value: Any) -> str | None:
    """What a number should be instead, as `a number of at least 1`; None where it is right, or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if key == "num_train_epochs" and value <= 0:
        return "a number more than 0"
    least, most = _RANGES.get(key, (-math.inf, math.inf))
    if least <= value <= most:
        return None
    return f"a number of at least {least}" if most == math.inf else f"a number from {least} to {most:,}"


def type_errors(annotation: str, value: Any) -> list[ErrorDetails]:
    """Why a value is not of a library's type, for each type that it might be of; empty where it is."""
    try:
        adapter(annotation).validate_python(value)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


@functools.cache
def adapter(annotation: str) -> TypeAdapter[Any]:
    """Checks values of a library's type, as strictly as our own keys are checked, and describes it as JSON Schema."""
    names = {
        name: Literal[words(name)] if name in _CHOICES else _TYPES.get(name, Any)
        for name in re.findall(r"\w+", annotation)
    }
    # Unlike `eval`, this resolves names in quotes as well.
    holder = SimpleNamespace(__annotations__={"value": annotation})
    return TypeAdapter(typing.get_type_hints(holder, {}, names)["value"], config=ConfigDict(strict=True))
