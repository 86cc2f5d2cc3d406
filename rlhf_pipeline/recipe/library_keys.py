"""The keys that TRL's and PEFT's own config classes take, read from their source files without importing them.

Importing TRL costs seconds and pulls in torch; parsing five files costs milliseconds. What a recipe may not set, and
why, stands here too: a key that would be ignored is an error, never silence.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

_TRAINING_ARGUMENTS = [("transformers", "training_args.py", "TrainingArguments"),
                       ("trl", "trainer/base_config.py", "_BaseConfig")]  # fmt: skip
_CLASSES = {
    "sft": [*_TRAINING_ARGUMENTS, ("trl", "trainer/sft_config.py", "SFTConfig")],
    "reward": [*_TRAINING_ARGUMENTS, ("trl", "trainer/reward_config.py", "RewardConfig")],
    "ppo": [
        *_TRAINING_ARGUMENTS,
        ("trl", "experimental/ppo/ppo_config.py", "PPOConfig"),
        ("rlhf_pipeline", "ppo/config.py", "PPOConfig"),
    ],
    "dpo": [*_TRAINING_ARGUMENTS, ("trl", "trainer/dpo_config.py", "DPOConfig")],
    "lora": [
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ],
}
CONFIG_NAMES = {
    "sft": "trl.SFTConfig",
    "reward": "trl.RewardConfig",
    "ppo": "trl.experimental.ppo.PPOConfig and, beyond it, docs/ppo.md",
    "dpo": "trl.DPOConfig",
    "lora": "peft.LoraConfig",
}

_RUN_DIRECTORY = "the run directory decides where a stage writes"
_DTYPE = "the recipe's `model.dtype` decides the precision of every stage"
_TOKENIZER = "the pipeline prepares one tokenizer for all stages, so that they read the same tokens"
_ENCODED = "the pipeline encodes the data itself: loss on the reply only, one EOS at its end, in every stage alike"
_MODEL = "the pipeline loads one base for all stages; see the recipe's `model`"
_CHECKPOINTS = "a checkpoint is there to go on from, which a run does by itself"
_BEST = "a stage's result is what its last step left; no checkpoint is kept for being the best"
_ONE_GPU = "a stage runs as one process on one device"
_HUB = "publishing is not part of a run"
_REPORTS = "numbers go to the stage's `metrics.jsonl`; trackers are not supported yet"

_DECIDED: dict[str, str] = {
    "output_dir": _RUN_DIRECTORY,
    "seed": "set `seed` at the top of the recipe; it seeds every stage",
    "bf16": _DTYPE, "fp16": _DTYPE, "bf16_full_eval": _DTYPE, "fp16_full_eval": _DTYPE,
    "model_init_kwargs": _MODEL, "trust_remote_code": _MODEL, "use_cache": _MODEL,
    "chat_template_path": _TOKENIZER, "eos_token": _TOKENIZER, "pad_token": _TOKENIZER,
    "dataset_text_field": _ENCODED, "dataset_kwargs": _ENCODED, "completion_only_loss": _ENCODED,
    "assistant_only_loss": _ENCODED, "remove_unused_columns": _ENCODED, "label_names": _ENCODED,
    "padding_free": "it needs a Flash Attention build, which the pipeline does not select",
    "save_only_model": _CHECKPOINTS, "resume_from_checkpoint": _CHECKPOINTS, "ignore_data_skip": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS, "save_on_each_node": _ONE_GPU,
    "enable_jit_checkpoint": "SIGTERM always leaves a checkpoint",
    "auto_find_batch_size": "a stage trains with the batch size that its recipe states, before and after a break",
    "load_best_model_at_end": _BEST, "metric_for_best_model": _BEST, "greater_is_better": _BEST,
    "logging_nan_inf_filter": "a loss that is not finite ends the stage",
    "report_to": _REPORTS, "run_name": _REPORTS, "project": _REPORTS, "trackio_space_id": _REPORTS,
    "trackio_bucket_id": _REPORTS, "trackio_static_space_id": _REPORTS, "disable_tqdm": _REPORTS,
    "push_to_hub": _HUB, "hub_token": _HUB, "hub_private_repo": _HUB, "hub_model_id": _HUB, "hub_strategy": _HUB,
    "hub_always_push": _HUB, "hub_revision": _HUB,
    "use_cpu": _ONE_GPU, "local_rank": _ONE_GPU, "ddp_find_unused_parameters": _ONE_GPU,
    "ddp_bucket_cap_mb": _ONE_GPU, "ddp_broadcast_buffers": _ONE_GPU, "ddp_static_graph": _ONE_GPU,
    "ddp_backend": _ONE_GPU, "ddp_timeout": _ONE_GPU, "fsdp": _ONE_GPU, "fsdp_config": _ONE_GPU,
    "deepspeed": _ONE_GPU, "accelerator_config": _ONE_GPU, "parallelism_config": _ONE_GPU,
    "average_tokens_across_devices": _ONE_GPU, "log_on_each_node": _ONE_GPU, "log_level_replica": _ONE_GPU,
    "ds3_gather_for_generation": _ONE_GPU,
    "do_train": "it has no effect in TRL's trainers", "do_eval": "it has no effect in TRL's trainers",
    "do_predict": "it has no effect in TRL's trainers",
    "sync_ref_model": "the reference is a frozen copy of the adapter that the stage starts from",
    "ref_model_mixup_alpha": "the reference is a frozen copy of the adapter that the stage starts from",
    "ref_model_sync_steps": "the reference is a frozen copy of the adapter that the stage starts from",
}  # fmt: skip

# What our PPO reads of its config; every other key does nothing there.
_PPO_READS = {
    "learning_rate", "value_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim",
    "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "max_skipped_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "num_mini_batches",
    "total_episodes", "max_steps", "num_train_epochs", "num_ppo_epochs", "local_rollout_forward_batch_size",
    "response_length", "stop_token", "stop_token_id", "temperature", "missing_eos_penalty", "missing_eos_score",
    "normalize_scores", "score_clip", "whiten_rewards", "kl_coef", "kl_estimator", "target_kl", "kl_horizon",
    "kl_budget", "cliprange", "cliprange_value", "log_ratio_clamp", "vf_coef", "value_warmup_updates", "ptx_coef",
    "gamma", "lam", "data_seed", "full_determinism",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "logging_strategy", "logging_steps", "logging_first_step", "num_sample_generations",
    "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip
_NAMED = "the pipeline names the adapters"
_COMPUTED = "it is computed"
_NOTHING_TO_LOAD = "prompts are encoded before training starts: there is nothing left to load or to spread over workers"
_PPO_REASONS = {
    "gradient_checkpointing_kwargs": "the shared base needs its own, so that each layer is recomputed for its own role",
    "model_adapter_name": _NAMED, "ref_adapter_name": _NAMED,
    "world_size": _COMPUTED, "num_total_batches": _COMPUTED, "micro_batch_size": _COMPUTED,
    "local_batch_size": _COMPUTED, "batch_size": _COMPUTED, "local_mini_batch_size": _COMPUTED,
    "mini_batch_size": _COMPUTED,
    "sft_model_path": _MODEL, "reward_model_path": _MODEL,
    "dataset_num_proc": _NOTHING_TO_LOAD, "dataloader_num_workers": _NOTHING_TO_LOAD,
    "dataloader_pin_memory": _NOTHING_TO_LOAD, "dataloader_prefetch_factor": _NOTHING_TO_LOAD,
    "dataloader_persistent_workers": _NOTHING_TO_LOAD,
    "dataloader_drop_last": _NOTHING_TO_LOAD,
    "load_best_model_at_end": "set `kl_budget`, which keeps the best policy within it",
    "metric_for_best_model": "set `kl_budget`, which keeps the best policy within it",
    "greater_is_better": "set `kl_budget`, which keeps the best policy within it",
    "tf32": _DTYPE,
}  # fmt: skip

_BASE_STAYS = "the base is never changed: only adapters are trained"
_LORA_DECIDED = {
    "task_type": "each stage sets it", "inference_mode": "each role sets it", "peft_type": "it is always LoRA",
    "auto_mapping": "PEFT sets it", "base_model_name_or_path": "PEFT sets it", "revision": _MODEL,
    "peft_version": "PEFT sets it", "modules_to_save": _BASE_STAYS, "trainable_token_indices": _BASE_STAYS,
    "bias": _BASE_STAYS, "kasa_config": _BASE_STAYS, "layer_replication": _BASE_STAYS,
    "runtime_config": "it is not saved with the adapter", "megatron_config": _ONE_GPU,
    "megatron_core": _ONE_GPU,
}  # fmt: skip

# These change what is written or how fast, not what is learned; the fingerprint leaves them out.
WITHOUT_EFFECT_ON_RESULT = {
    "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "include_num_input_tokens_seen", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "skip_memory_metrics", "torch_empty_cache_steps", "debug",
    # The same numbers in less memory: a stage that ran out of it goes on from its checkpoint.
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "num_sample_generations", "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip


@functools.cache
def accepted(config: str) -> dict[str, str]:
    """Every key that a library's config class takes, with its type as written there.

    Args:
        config: `sft`, `reward`, `ppo`, `dpo` or `lora`.
    """
    keys: dict[str, str] = {}
    for package, file, class_name in _CLASSES[config]:
        tree = ast.parse(_source(package, file).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        keys[item.target.id] = ast.unparse(item.annotation)
    return {name: annotation for name, annotation in keys.items() if not name.startswith("_")}


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
    if config == "lora":
        return _LORA_DECIDED.get(key)
    if config == "ppo":
        return None if key in _PPO_READS else (_DECIDED | _PPO_REASONS).get(key, "PPO does not read it")
    return _DECIDED.get(key)


def type_problem(annotation: str, value: Any) -> str | None:
    """What is wrong with a value's type, given the library's annotation; None where it fits or cannot be told.

    Names that only importing would resolve (`SchedulerType`) are left for the library itself to judge.
    """
    expected = _alternatives(ast.parse(annotation, mode="eval").body)
    if any(_fits(name, value) for name in expected):
        return None
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
             "list": "a list", "dict": "a mapping", "None": "null"}  # fmt: skip
    if any(name not in names and not name.startswith("=") for name in expected):
        return None
    wanted = [f"`{name[1:]}`" if name.startswith("=") else names[name] for name in expected if name != "None"]
    return f"expected {' or '.join(wanted)}, got {value!r}"


def _alternatives(node: ast.expr) -> list[str]:
    """The plain names a type annotation allows; a literal value is written `=value`."""
    if isinstance(node, ast.BinOp):
        return _alternatives(node.left) + _alternatives(node.right)
    if isinstance(node, ast.Constant):
        return ["None"] if node.value is None else _alternatives(ast.parse(str(node.value), mode="eval").body)
    if isinstance(node, ast.Subscript):
        outer, inner = ast.unparse(node.value).removeprefix("typing."), node.slice
        elements = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Optional":
            return ["None", *_alternatives(elements[0])]
        if outer == "Union":
            return [name for element in elements for name in _alternatives(element)]
        if outer == "Literal":
            return [f"={ast.literal_eval(element)}" for element in elements]
        return [outer]
    return [ast.unparse(node)]


def _fits(name: str, value: Any) -> bool:
    if name.startswith("="):
        return str(value) == name[1:]
    if name == "None":
        return value is None
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    kinds: dict[str, type] = {"bool": bool, "str": str, "list": list, "dict": dict}
    return name in kinds and isinstance(value, kinds[name])
