"""What of `launch` cannot work, or would change nothing. No torch."""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline import devices
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.recipe.deepspeed import zero_stage
from rlhf_pipeline.recipe.launch_keys import KEY, SHARDING, WRAP_POLICY
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import Recipe, Stage
from rlhf_pipeline.recipe.yaml import KeyPath, shown

INSTALL = "pip install 'deepspeed>=0.19', as the extra `deepspeed` does"
# Which policy of dividing a model by layers reads a key.
_OF_POLICY = {
    "fsdp_min_num_params": "SIZE_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip
# By which DeepSpeed's own launchers start processes on several machines.
_OF_STARTING = ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter")
# Of `model.dtype`, by `mixed_precision`: what agrees with it. `auto` is bfloat16 where a GPU computes in it.
_AGREE = {"no": ("auto", "float32"), "bf16": ("auto", "bfloat16"), "fp16": ("float16",), "fp8": ()}


def require_stage_without_own(recipe: Recipe, own: Sequence[Stage], problems: Problems) -> None:
    """See that a stage is trained by what `launch` at the top says."""
    if problems.within(("stages",)) or any(
        stage.facts.trains and stage.launch is None for stage in recipe.stages.values()
    ):
        return
    if own:
        message = "each stage that trains has a `launch` of its own, so this one would change nothing"
        hint = "set it in a stage, or remove it; `machine_rank` alone may stand here"
    else:
        message, hint = "no stage of this recipe trains, so `launch` would change nothing", "remove it"
    problems.add((KEY,), message, hint, of_key=True)


def require_machine(values: dict[str, Any], machines: int, path: KeyPath, problems: Problems) -> None:
    """See that there is a machine of this number."""
    rank = values.get("machine_rank", 0)
    if rank >= machines:
        most = f"it is from 0 to {machines - 1}" if machines > 1 else "set `num_machines`, too"
        problems.add((*path, "machine_rank"), f"there is no machine {rank} among {machines}", most)


def require_what_the_cpu_takes(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that nothing stands beside `use_cpu` that is about GPUs alone."""
    about_gpus = dict.fromkeys(SHARDING, "Accelerate divides a model among GPUs alone")
    about_gpus["gpu_ids"] = "no process gets a GPU"
    about_gpus["enable_cpu_affinity"] = "Accelerate gives a process the cores that are near its GPU"
    for key, why in about_gpus.items():
        if values.get("use_cpu") and values.get(key) not in (None, False, "all"):
            message = f"{why}, so that beside `use_cpu` `{key}` would change nothing"
            problems.add((*path, key), message, "remove one of the two", of_key=True)


def require_what_divides(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that there is one of `fsdp_config` and `deepspeed_config`, and each key of it changes something."""

    def refuse(section: str, key: str, why: str, hint: str) -> None:
        problems.add((*path, section, key), f"`{key}` would change nothing: {why}", hint, of_key=True)

    fsdp, deepspeed = values.get("fsdp_config") or {}, values.get("deepspeed_config") or {}
    if fsdp and deepspeed:
        problems.add(path, "`fsdp_config` and `deepspeed_config` exclude each other", "remove one of them")
    for key, needed in _OF_POLICY.items():
        if fsdp.get(key) and fsdp.get(WRAP_POLICY) != needed:
            refuse("fsdp_config", key, f"only `{WRAP_POLICY}: {needed}` reads it", "set that, or remove it")
    for key in ("fsdp_activation_checkpointing", "fsdp_activation_checkpointing_offload"):
        if fsdp.get(key) is True:  # Accelerate's wrapper renames adapters' weights, and draws other masks of dropout
            does = "`gradient_checkpointing` in a stage's `trainer`, on by default, does it"
            problems.add((*path, "fsdp_config", key), f"`{key}` is not used here: {does}", "remove it", of_key=True)
    for key in filter(deepspeed.get, _OF_STARTING):
        hint = "remove it, and start the same command on each machine"
        refuse("deepspeed_config", key, "each machine starts its own processes, on the GPUs that it sees", hint)
    stage = zero_stage(deepspeed)
    for what, least in (("optimizer", 1), ("param", 3)):
        device, file = f"offload_{what}_device", f"offload_{what}_nvme_path"
        if deepspeed.get(device) in (None, "none") or stage is None or "deepspeed_config_file" in deepspeed:
            continue
        if stage < least:
            hint = f"set `zero_stage: {least}`, or remove it"
            refuse("deepspeed_config", device, f"ZeRO-{stage} does not divide what it is about", hint)
        if deepspeed.get(file) and deepspeed[device] != "nvme":
            refuse("deepspeed_config", file, f"`{device}` is `{deepspeed[device]}`", f"set `{device}: nvme`")


def require_precision(recipe: Recipe, values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """`model.dtype` decides the precision of every stage; another word for it may only agree."""
    said = values.pop("mixed_precision", None)
    if said is not None and recipe.model.dtype not in _AGREE[said] and not problems.is_broken(("model", "dtype")):
        wanted = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(said)
        problems.add(
            (*path, "mixed_precision"),
            f"`mixed_precision: {said}` is not what `model.dtype: {recipe.model.dtype}` says",
            f"remove it, or set `model.dtype: {wanted}`" if wanted else "remove it: 8-bit floats are not used here",
        )


def require_shares(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that machines have as many processes each."""
    processes, machines = values["num_processes"], values.get("num_machines", 1)
    number: KeyPath = (*path, "num_processes")
    if processes < machines:
        problems.add(
            number, f"{processes} process{'es' * (processes != 1)} on {machines} machines leave one without",
            f"`num_processes` counts those of all machines: at least {machines}",
        )  # fmt: skip
    elif processes % machines:
        problems.add(number, f"{processes} processes do not divide by {machines} machines", "each starts as many")


def require_meeting(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that several machines can find each other, and that one is not told of others."""

    def refuse(key: str, message: str, hint: str | None, *, of_key: bool = False) -> None:
        problems.add((*path, key), message, hint, of_key=of_key)

    address = values.get("main_process_ip") or ""
    if re.search(r"[\s/]|^[^:]*:[^:]*$", address):
        hint = "a port has a key of its own, `main_process_port`" if ":" in address else None
        refuse("main_process_ip", f"expected an IP address or the name of a machine, got {shown(address)}", hint)
    if values.get("num_machines", 1) == 1:
        # With a `num_machines: 1` that was written down it is known that there are no others: scripts for any number of
        # machines say so, and `accelerate config` writes the other keys anyway.
        if address and "num_machines" not in values:
            message = "`main_process_ip` is of several machines, and without `num_machines` there is one"
            refuse("main_process_ip", message, "set `num_machines`, or remove it", of_key=True)
        return
    if not address:
        message = "`main_process_ip` is missing, by which other machines find the first one"
        refuse("main_process_ip", message, "set it to the address of the machine with `machine_rank: 0`")
    if values.get("main_process_port") == 0:
        message = "of several machines none would know which port another one has found free"
        refuse("main_process_port", message, "set it to one that is free on the first machine, or remove it")
    if values.get("rdzv_backend", "static") != "static":
        message = f"`{values['rdzv_backend']}` numbers machines as they come, and here `machine_rank` does"
        refuse("rdzv_backend", message, "set `rdzv_backend: static`, or remove it")


def require_named_gpus(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that `gpu_ids`, where it is said, names one for each process of a machine."""
    named, needed = len(set(gpu_names(values))), values["num_processes"] // values.get("num_machines", 1)
    if "gpu_ids" in values and named < needed:
        message = f"`gpu_ids` names {named} of the {needed} GPUs that the processes of a machine need"
        problems.add((*path, "gpu_ids"), message, "name one for each, or remove it")


def require_several(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that nothing is said of the GPUs of several processes where there is one, which Accelerate does not start."""
    if "gpu_ids" in values:
        first = next(iter(gpu_names(values)), "0")
        message = "`gpu_ids` is of several processes: one alone trains on the first GPU that it sees"
        hint = f"remove it, and start the command with CUDA_VISIBLE_DEVICES={first} to train on that one"
        problems.add((*path, "gpu_ids"), message, hint, of_key=True)
    if values.get("enable_cpu_affinity"):
        message = "`enable_cpu_affinity` is of several processes, and one trains"
        problems.add((*path, "enable_cpu_affinity"), message, "remove it", of_key=True)


def require_possible(recipe: Recipe, name: str, path: KeyPath, problems: Problems) -> None:
    """See that a stage can be trained so."""
    stage, keys = recipe.stages[name], recipe.launch_of(name)
    if not keys:
        return
    if recipe.processes(name) > 1 and stage.rollout is not None and stage.rollout.is_vllm:
        problems.add(
            ("stages", name, "rollout", "engine"), "vLLM samples for one process alone",
            f"set `engine: transformers`, or have stage `{name}` trained by one: `launch: {{num_processes: 1}}`",
        )  # fmt: skip
    if stage.members and SHARDING.keys() & keys.keys():
        problems.add(
            ("stages", name, "members"),
            "an ensemble is trained one member after the other on one base, which each process must hold whole",
            "train the ensemble without `fsdp_config` and `deepspeed_config`, or one reward model with them",
            of_key=True,
        )  # fmt: skip
    rollout = recipe.evaluate.rollout if recipe.evaluate else None
    if stage.facts.is_policy and recipe.divides(name) and rollout is not None and rollout.is_vllm:
        problems.add(
            ("evaluate", "rollout", "engine"),
            f"vLLM loads the base whole on one GPU, and the processes that train stage `{name}` divide it among them",
            "set `engine: transformers`: then all of them sample",
        )  # fmt: skip
    if recipe.divides(name) and recipe.model.quantization == "int8":
        key = next(key for key in SHARDING if key in keys)
        problems.add(
            (*path, key),
            f"`{key}` cannot divide 8-bit weights: bitsandbytes keeps them in one piece",
            "set `model.quantization` to `nf4`, or to `none`", of_key=True,
        )  # fmt: skip
    if (keys.get("fsdp_config") or {}).get("fsdp_offload_params") is True and recipe.evaluate and stage.facts.is_policy:
        problems.add(
            (*path, "fsdp_config", "fsdp_offload_params"),
            f"the policy of stage `{name}` is judged, and replies cannot be sampled by weights that FSDP2 keeps in the "
            "machine's memory",
            "remove it, or `evaluate`", of_key=True,
        )  # fmt: skip
    _require_what_deepspeed_takes(recipe, name, path, keys, problems)
    if zero_stage(keys.get("deepspeed_config") or {}) == 3:
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (stage.trainer.get(key) or {}).get("use_reentrant") is False:
                problems.add(
                    ("stages", name, "trainer", key),
                    "with DeepSpeed's ZeRO-3, checkpoints are reentrant: others find frozen weights divided again",
                    f"remove `use_reentrant: false` from `{key}`", of_key=True,
                )  # fmt: skip
    require_whole_base(recipe, name, path, keys, problems)


def _require_what_deepspeed_takes(
    recipe: Recipe, name: str, path: KeyPath, keys: dict[str, Any], problems: Problems
) -> None:
    """See that `deepspeed_config` contradicts nothing in a stage's `trainer:`, with which training would not begin."""
    stage, config = recipe.stages[name], keys.get("deepspeed_config") or {}
    for key, own in (("gradient_accumulation_steps",) * 2, ("gradient_clipping", "max_grad_norm")):
        said, ours = config.get(key), stage.trainer.get(own, library_keys.keys(stage.kind)[own].default)
        if isinstance(said, int | float) and said != ours:
            problems.add(
                (*path, "deepspeed_config", key), f"`{key}: {said}` contradicts `{own}: {ours}` of stage `{name}`",
                f"remove it: `{own}` of the stage says it", of_key=True,
            )  # fmt: skip


def require_whole_base(recipe: Recipe, name: str, path: KeyPath, keys: dict[str, Any], problems: Problems) -> None:
    """See that the model is not divided in a stage that samples."""
    stage = recipe.stages[name]
    said = (keys.get("num_processes"), (recipe.launch or {}).get("num_processes"), 2)
    processes = next(one for one in said if isinstance(one, int) or one == "auto")
    for key in SHARDING:
        if keys.get(key) and stage.facts.samples:
            problems.add(
                (*path, key),
                f"a stage of kind `{stage.kind}` samples from a base that each process holds whole, so `{key}` cannot "
                "divide it",
                f"train stage `{name}` without it: `launch: {{num_processes: {processes}}}` in the stage",
                of_key=True,
            )


def gpu_names(keys: Mapping[str, Any]) -> list[str]:
    """The GPUs that `gpu_ids` names; none where it names all."""
    return [name.strip() for name in (keys.get("gpu_ids") or "").split(",") if name.strip() not in ("", "all")]


def require_devices(recipe: Recipe, names: Sequence[str]) -> None:
    """See that each process of this machine gets a GPU of its own, and what divides the model is installed.

    Raises:
        InputError: there are fewer GPUs here than a stage needs, or there is no DeepSpeed.
    """
    launches = {name: keys for name in names if (keys := recipe.launch_of(name))}
    if not launches:
        return
    on_gpus = any(not keys.get("use_cpu") for keys in launches.values())
    seen = devices.gpus(os.environ) if on_gpus else []  # asking for them takes a moment
    there = len(seen)
    for name, keys in launches.items():
        where = ("stages", name, KEY) if recipe.stages[name].launch else (KEY,)
        if keys.get("deepspeed_config") and importlib.util.find_spec("deepspeed") is None:
            place = recipe.place(*where, "deepspeed_config")
            raise InputError("DeepSpeed is not installed", place=place, hint=INSTALL)
        needed = 0 if keys.get("use_cpu") else keys["num_processes"] // keys.get("num_machines", 1)
        if there < needed and (there or devices.can_be_counted()):
            few = f"there {'is' if there == 1 else 'are'} {there or 'none'}"
            raise InputError(
                f"{needed} process{'es' * (needed != 1)} on this machine need a GPU each, and {few} here",
                place=recipe.place(*where),
                hint="lower `num_processes`, or write `launch: auto`; `use_cpu: true` trains on the processor",
            )
        # Others than numbers, as a UUID, may be other names for what is seen.
        hidden = [name for name in gpu_names(keys) if name.isdecimal() and name not in seen]
        if hidden and all(name.isdecimal() for name in seen) and devices.can_be_counted():
            raise InputError(
                f"`gpu_ids` names GPU {hidden[0]}, and those that are visible here are {', '.join(seen)}",
                place=recipe.place(*where, "gpu_ids"),
                hint="name others, or set CUDA_VISIBLE_DEVICES to those that it names",
            )
