"""`launch`: by how many processes a stage is trained, and where, in Accelerate's own keys. No torch."""

import ast
import copy
import difflib
import functools
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_pipeline import devices
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import expanded, resolved
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.recipe.deepspeed import zero_stage
from rlhf_pipeline.recipe.origins import Origin, Problems, Source
from rlhf_pipeline.recipe.schema import Recipe, Stage
from rlhf_pipeline.recipe.validation import check_section
from rlhf_pipeline.recipe.yaml import KeyPath, Mark, dump_inline, read_document, shown

KEY = "launch"
SHARDING = {"fsdp_config": "FSDP", "deepspeed_config": "DeepSpeed"}  # keys, and what divides the model by them
INSTALL = "pip install 'deepspeed>=0.19', as the extra `deepspeed` does"
BATCH = "per_device_train_batch_size"
# What `accelerate config` writes for a key that says nothing.
_UNSET: tuple[Any, ...] = (None, False, "no", "NO", "main", {}, [], {"dynamo_backend": "NO"}, {"dynamo_backend": "no"})
# Keys that FSDP2 passes over, or ends at; a file that has them was written for FSDP's first version.
_FSDP_1 = tuple(
    f"fsdp_{key}"
    for key in ("sharding_strategy", "backward_prefetch", "forward_prefetch", "sync_module_states", "use_orig_params")
)
_TO_FSDP_2 = "`accelerate to-fsdp2` converts a file of `accelerate config`"
# Keys that Accelerate had before: what replaced them, or why they do nothing.
_FORMER = {
    "fp16": "`mixed_precision: fp16` says it now",
    "dynamo_backend": library_keys.refusal(KEY, "dynamo_config"),
    "ipex_config": "Accelerate does not read it any more",
}
_FORMS = "`auto`, or a mapping: {num_processes: 2}"
# Keys that Accelerate does not take beside a file of DeepSpeed's own, where they stand.
_OF_DEEPSPEED = {
    "zero_stage", "gradient_accumulation_steps", "gradient_clipping", "offload_optimizer_device",
    "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path", "zero3_save_16bit_model",
}  # fmt: skip
# Which policy of dividing a model by layers reads a key.
_OF_POLICY = {
    "fsdp_min_num_params": "SIZE_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip
# What keys of the two sections take, where Accelerate would only fail as it starts processes, or take it for a default.
_SWITCH = (True, False)
_DEVICES = ("none", "cpu", "nvme")
_TAKES: dict[str, tuple[Any, ...]] = {
    "fsdp_offload_params": _SWITCH, "fsdp_reshard_after_forward": _SWITCH, "fsdp_activation_checkpointing": _SWITCH,
    "fsdp_activation_checkpointing_offload": _SWITCH,
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "zero_stage": (0, 1, 2, 3), "offload_optimizer_device": _DEVICES, "offload_param_device": _DEVICES,
    "zero3_init_flag": _SWITCH, "zero3_save_16bit_model": _SWITCH,
}  # fmt: skip
# By which DeepSpeed's own launchers start processes on several machines.
_OF_STARTING = ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter")
# What PyYAML, by which Accelerate reads its files, takes for true or false, and recipes take for words.
_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
_LAST = 999  # the level of files that are no recipes: what is wrong with them is said after the recipes' own faults
# Of `model.dtype`, by `mixed_precision`: what agrees with it. `auto` is bfloat16 where a GPU computes in it.
_AGREE = {"no": ("auto", "float32"), "bf16": ("auto", "bfloat16"), "fp16": ("float16",), "fp8": ()}


def resolve_launch(recipe: Recipe, content: dict[str, Any], problems: Problems) -> None:
    """Read the files that `launch` names, work out `auto`, and see that stages can train so; what is wrong is noted.

    Args:
        recipe: the recipe.
        content: what it was made of, for hints.
        problems: takes what is wrong.
    """
    own = [stage for stage in recipe.stages.values() if stage.launch is not None and stage.facts.trains]
    only_number = recipe.launch is not None and recipe.launch.keys() == {"machine_rank"} and bool(own)
    if recipe.launch is not None and not only_number:
        _require_stage_without_own(recipe, own, problems)
        recipe.launch = _resolved(recipe, recipe.launch, (KEY,), content, problems)
    for name, stage in recipe.stages.items():
        path: KeyPath = ("stages", name, KEY)
        if stage.launch is None:
            path = (KEY,)
        elif stage.facts.trains:
            _require_whole_base(recipe, name, path, stage.launch, problems)  # before what else it lacks
            stage.launch = _resolved(recipe, stage.launch, path, content, problems)
            if stage.launch.pop("machine_rank", None) is not None and not problems.within(path):
                hint = "`launch.machine_rank` at the top is that of all stages"
                problems.add((*path, "machine_rank"), "a machine has one number in a whole run", hint, of_key=True)
        if not problems.within(path):
            _require_possible(recipe, name, path, problems)
    broken = any(problems.within(("stages", name, KEY)) for name in recipe.stages)
    if recipe.launch is not None and only_number and not broken:  # of the machines that stages are trained on
        machines = max((stage.launch or {}).get("num_machines", 1) for stage in own)
        if machines == 1:
            recipe.launch = _resolved(recipe, recipe.launch, (KEY,), content, problems)
            return
        recipe.launch = _checked(recipe.launch, (KEY,), content, problems)
        if not problems.within((KEY,)):
            _require_machine(recipe.launch, machines, (KEY,), problems)


def _require_stage_without_own(recipe: Recipe, own: Sequence[Stage], problems: Problems) -> None:
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


def _require_machine(values: dict[str, Any], machines: int, path: KeyPath, problems: Problems) -> None:
    """See that there is a machine of this number."""
    rank = values.get("machine_rank", 0)
    if rank >= machines:
        most = f"it is from 0 to {machines - 1}" if machines > 1 else "set `num_machines`, too"
        problems.add((*path, "machine_rank"), f"there is no machine {rank} among {machines}", most)


def _resolved(
    recipe: Recipe, written: dict[str, Any], path: KeyPath, content: dict[str, Any], problems: Problems
) -> dict[str, Any]:
    """What a section says in the end, without what says nothing and what was only written down for Accelerate."""
    values = _checked(written, path, content, problems)
    _locate_deepspeed(values, path, problems)
    file = values.pop("config_file", None)
    if file is not None:
        of_file: KeyPath = (*path, "config_file")
        unset = [key for key, value in written.items() if value is None]  # so that a file's own can be taken back
        of_it = {key: value for key, value in _read(file, of_file, problems).items() if key not in unset}
        found = _checked(of_it, of_file, content, problems)
        _locate_deepspeed(found, of_file, problems)
        for key in found.keys() - values.keys():
            problems.origins.derived[*path, key] = f"from {Path(file).name}"
            _locate(key, of_file, path, problems)
        values = found | values
    if problems.within(path):
        return values
    if "fsdp_config" in values and "deepspeed_config" in values:
        problems.add(path, "`fsdp_config` and `deepspeed_config` exclude each other", "remove one of them")
    _require_what_the_cpu_takes(values, path, problems)
    _require_what_divides(values, path, problems)
    _check_precision(recipe, values, path, problems)
    _count(recipe, values, path, problems)
    return values


def _require_what_the_cpu_takes(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that nothing stands beside `use_cpu` that is about GPUs alone."""
    about_gpus = dict.fromkeys(SHARDING, "Accelerate divides a model among GPUs alone")
    about_gpus["gpu_ids"] = "no process gets a GPU"
    about_gpus["enable_cpu_affinity"] = "Accelerate gives a process the cores that are near its GPU"
    for key, why in about_gpus.items():
        if values.get("use_cpu") and values.get(key) not in (None, False, "all"):
            message = f"{why}, so that beside `use_cpu` `{key}` would change nothing"
            problems.add((*path, key), message, "remove one of the two", of_key=True)


def _require_what_divides(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that each key of `fsdp_config` and `deepspeed_config` changes something beside the others."""

    def refuse(section: str, key: str, why: str, hint: str) -> None:
        problems.add((*path, section, key), f"`{key}` would change nothing: {why}", hint, of_key=True)

    fsdp, deepspeed = values.get("fsdp_config") or {}, values.get("deepspeed_config") or {}
    policy = str(fsdp.get("fsdp_auto_wrap_policy")).upper()
    for key, needed in _OF_POLICY.items():
        if fsdp.get(key) and policy != needed:
            refuse("fsdp_config", key, f"only `fsdp_auto_wrap_policy: {needed}` reads it", "set that, or remove it")
    for key in ("fsdp_activation_checkpointing", "fsdp_activation_checkpointing_offload"):
        if (
            fsdp.get(key) is True
        ):  # Accelerate's wrapper renames the adapters' weights, and draws other masks of dropout
            message = (
                f"`{key}` is not used here: `gradient_checkpointing` in a stage's `trainer`, on by default, does it"
            )
            problems.add((*path, "fsdp_config", key), message, "remove it", of_key=True)
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


def _locate_deepspeed(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """Have the path of a file of DeepSpeed's own start from the folder of the file that has it; in place."""
    name = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if isinstance(name, str):
        of_name: KeyPath = (*path, "deepspeed_config", "deepspeed_config_file")
        file = resolved(problems.origins.folder(of_name) / expanded(name))
        values["deepspeed_config"]["deepspeed_config_file"] = str(file)
        for key in [key for key in values["deepspeed_config"] if key in _OF_DEEPSPEED]:
            said = f"`{key}` is what the `deepspeed_config_file` says, and Accelerate takes one of the two"
            problems.add((*path, "deepspeed_config", key), said, "remove one of them", of_key=True)
        if not file.is_file():
            problems.add(of_name, f"there is no file {file}", "the path starts from the folder of the file that has it")


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


def _checked(written: dict[str, Any], path: KeyPath, content: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Keys of Accelerate that have an effect; what is wrong with others is noted."""
    values = _tidied(written, path, problems)
    check_section(KEY, values, path, content, problems, holds_out=False)
    for section in SHARDING:
        config = values.get(section)
        if not isinstance(config, dict):
            continue
        known = options(section)
        is_former = str(config.get("fsdp_version", config.get("version", 2))) != "2"  # which is said below
        for key in list(config):
            name = f"fsdp_{key}" if section == "fsdp_config" and not str(key).startswith("fsdp_") else str(key)
            if name in known:
                config[name] = config.pop(key)
                takes = None if is_former else _TAKES.get(name)
                if takes and not any(type(config[name]) is type(one) and config[name] == one for one in takes):
                    expected = " or ".join([", ".join(map(dump_inline, takes[:-1])), dump_inline(takes[-1])])
                    message = f"expected {expected}, got {shown(config[name])}"
                    problems.add((*path, section, key), message, "see `accelerate config`")
            else:  # `accelerate launch` would pass over it in silence
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"the keys are {', '.join(known)}"
                problems.add((*path, section, key), f"unknown key `{key}`", hint, of_key=True)
    if "fsdp_config" in values:
        values["fsdp_config"] = {"fsdp_version": 2} | values["fsdp_config"]  # Accelerate's own default is 1
        former = [key for key in _FSDP_1 if key in values["fsdp_config"]]
        if str(values["fsdp_config"]["fsdp_version"]) != "2":
            said = "FSDP's first version is not used here"
            problems.add((*path, "fsdp_config", "fsdp_version"), said, f"set `fsdp_version: 2`; {_TO_FSDP_2}")
        elif former:
            said = f"{_words(former)} of FSDP's first version, and not read by FSDP2"
            hint = f"remove {'them' if former[1:] else 'it'}; {_TO_FSDP_2}"
            problems.add((*path, "fsdp_config", former[0]), said, hint, of_key=True)
    return values


def _words(keys: Sequence[str]) -> str:
    """Keys, and whether it is one or several."""
    quoted = [f"`{key}`" for key in keys]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]} are" if keys[1:] else f"{quoted[0]} is"


def _read(name: str, path: KeyPath, problems: Problems) -> dict[str, Any]:
    """What `accelerate config` wrote; nothing where it cannot be read."""
    hint = "`accelerate config --config_file FILE` writes one; the path starts from the recipe's folder"
    file = resolved(problems.origins.folder(path) / expanded(name))
    source = Source(min(str(file), os.path.relpath(file), key=len), file.parent, _LAST, at=path)
    marks: dict[KeyPath, Mark] = {(): Mark((0, 0), (0, 0))}
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text)
        else:
            document = read_document(text, source.name, look_up=False)
            content, marks = document.value, document.marks | marks
            for fault in document.all_faults:
                problems.add_fault(fault, source)
                problems.break_((*path, *fault.path))
    except FileNotFoundError:
        problems.add(path, f"there is no file {name}", _instead_of_file(name) or f"{hint}; or write {_FORMS}")
        return {}
    except InputError as error:
        problems.add_error(error, source)
        problems.break_(path)
        return {}
    except (OSError, ValueError) as error:
        problems.add(path, f"{name} cannot be read: {str(error).splitlines()[0]}", hint)
        return {}
    if not isinstance(content, dict):
        problems.add(path, f"{name} is no file of `accelerate config`: it holds {shown(content)}", hint)
        return {}
    problems.origins.written |= {(*path, *inner): Origin(source, mark) for inner, mark in marks.items()}
    if content.get("compute_environment") == "AMAZON_SAGEMAKER":
        said = "this file is for SageMaker, which starts machines of its own: nothing runs there"
        problems.add((*path, "compute_environment"), said, "`accelerate config` writes one for `This machine`, too")
        return {}
    if content.pop("config_file", None) is not None:
        problems.add(
            (*path, "config_file"), "a file of `accelerate config` names no other one", "remove it", of_key=True
        )
    return {key: _with_booleans(key, value) for key, value in content.items()}


def _with_booleans(key: str, value: Any) -> Any:
    """A value as Accelerate has it: where it means true or false, also by a word."""
    if key in SHARDING and isinstance(value, dict):
        return {name: _BOOLEANS.get(str(one).lower(), one) for name, one in value.items()}
    is_boolean = "bool" in library_keys.accepted(KEY).get(key, "")
    return _BOOLEANS.get(str(value).lower(), value) if is_boolean else value


def _locate(key: str, of_file: KeyPath, path: KeyPath, problems: Problems) -> None:
    """Note that a value of a section is where its file has it."""
    for one in problems.origins.inside((*of_file, key)):
        origin = problems.origins.written[one]
        source = replace(origin.source, at=path)
        problems.origins.written[*path, *one[len(of_file) :]] = replace(origin, source=source)


def _instead_of_file(name: str) -> str | None:
    """A hint on a word that names no file, and was not meant to."""
    if name.isdecimal():
        return f"write {{num_processes: {int(name)}}}"
    if name.lower() == "auto":
        return "did you mean `auto`?"
    if name.lower() in ("none", "no", "off", "false"):
        return "{num_processes: 1} trains by one process"
    return None


def _tidied(values: dict[str, Any], path: KeyPath, problems: Problems) -> dict[str, Any]:
    """Without keys that say nothing, and those that only say again what others do."""
    values = copy.deepcopy(values)
    if values.get("compute_environment") == "LOCAL_MACHINE":
        del values["compute_environment"]
    for key in [key for key in values if key != "distributed_type" and values[key] in _UNSET]:
        if key in library_keys.accepted(KEY) and (values[key] is None or library_keys.refusal(KEY, key)):
            del values[key]
    for key in SHARDING:
        if key in values and not values[key]:
            del values[key]
    for key, reason in _FORMER.items():
        value = values.pop(key, None)
        if value not in _UNSET and not (isinstance(value, dict) and not any(value.values())):
            problems.add((*path, key), f"`{key}` cannot be set: {reason}", "remove it", of_key=True)
    said = values.pop("distributed_type", None)
    if said is None:
        return values
    sharded = next((name.upper() for key, name in SHARDING.items() if key in values), None)
    several = values.get("num_processes") not in (1, None)
    multi = "MULTI_CPU" if values.get("use_cpu") is True else "MULTI_GPU"
    fits = (sharded,) if sharded else (multi,) if several else ("NO", multi)
    if said == "NO" and values.get("num_processes") is None and "config_file" not in values:
        values["num_processes"] = 1  # as Accelerate has it
    if said in fits:
        return values
    if said in ("XLA", "TPU"):
        message = f"`distributed_type: {said}` is of TPUs, on which nothing is trained here"
        problems.add((*path, "distributed_type"), message, f"it may be {', '.join(fits)}", of_key=True)
    elif said == "NO" and several and not sharded:
        problems.add(
            (*path, "distributed_type"),
            f"`distributed_type: NO` contradicts `num_processes: {values['num_processes']}`",
            "remove it to train by so many; else set `num_processes: 1`", of_key=True,
        )  # fmt: skip
    elif said in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
        problems.add(
            (*path, "distributed_type"), f"`distributed_type: {said}` contradicts the other keys",
            "remove it: `num_processes`, `use_cpu`, `fsdp_config` and `deepspeed_config` tell it", of_key=True,
        )  # fmt: skip
    else:
        problems.add(
            (*path, "distributed_type"), f"nothing is trained with `distributed_type: {dump_inline(said)}` here",
            f"it may be {', '.join(fits)}", of_key=True,
        )  # fmt: skip
    return values


@functools.cache
def options(section: str) -> tuple[str, ...]:
    """The keys of `fsdp_config` or `deepspeed_config`, read from the source of `accelerate launch`."""
    group = {"fsdp_config": "fsdp_args", "deepspeed_config": "deepspeed_args"}[section]
    found = []
    for node in ast.walk(library_keys.tree("accelerate", "commands/launch.py")):
        if (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
            and isinstance(node.func.value, ast.Name) and node.func.value.id == group
        ):  # fmt: skip
            found += [str(word.value).removeprefix("--") for word in node.args if isinstance(word, ast.Constant)]
    return tuple(found)


def _check_precision(recipe: Recipe, values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """`model.dtype` decides the precision of every stage; another word for it may only agree."""
    said = values.pop("mixed_precision", None)
    if said is not None and recipe.model.dtype not in _AGREE[said] and not problems.is_broken(("model", "dtype")):
        wanted = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(said)
        problems.add(
            (*path, "mixed_precision"),
            f"`mixed_precision: {said}` is not what `model.dtype: {recipe.model.dtype}` says",
            f"remove it, or set `model.dtype: {wanted}`" if wanted else "remove it: 8-bit floats are not used here",
        )


def _count(recipe: Recipe, values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """Work out how many processes there are, and see that they fit on the machines; in place."""
    machines = values.get("num_machines", 1)
    number: KeyPath = (*path, "num_processes")
    processes = values.get("num_processes")
    if processes is None:
        hint = "set it, or write `launch: auto` for all devices here"
        hint += "; a stage's own `launch` replaces that at the top" if path != (KEY,) and recipe.launch else ""
        problems.add(number, "`num_processes` is missing", hint)
        return
    if processes == "auto":
        here = 0 if values.get("use_cpu") else len(set(gpu_names(values)) or devices.gpus(os.environ))
        processes = max(1, here) * machines
    values["num_processes"] = processes
    if processes < machines:
        problems.add(
            number, f"{processes} process{'es' * (processes != 1)} on {machines} machines leave one without",
            f"`num_processes` counts those of all machines: at least {machines}",
        )  # fmt: skip
    elif processes % machines:
        problems.add(number, f"{processes} processes do not divide by {machines} machines", "each starts as many")
    _require_machine(values, machines, path, problems)
    address = values.get("main_process_ip") or ""
    if re.search(r"[\s/]|^[^:]*:[^:]*$", address):
        problems.add(
            (*path, "main_process_ip"), f"expected an IP address or the name of a machine, got {shown(address)}",
            "a port has a key of its own, `main_process_port`" if ":" in address else None,
        )  # fmt: skip
    if machines > 1 and values.get("main_process_port") == 0:
        message = "of several machines none would know which port another one has found free"
        problems.add(
            (*path, "main_process_port"), message, "set it to one that is free on the first machine, or remove it"
        )
    if machines > 1 and values.get("rdzv_backend", "static") != "static":
        message = f"`{values['rdzv_backend']}` numbers machines as they come, and here `machine_rank` does"
        problems.add((*path, "rdzv_backend"), message, "set `rdzv_backend: static`, or remove it")
    if machines > 1 and not address:
        problems.add(
            (*path, "main_process_ip"), "`main_process_ip` is missing, by which other machines find the first one",
            "set it to the address of the machine with `machine_rank: 0`",
        )  # fmt: skip
    if machines == 1:
        # With a `num_machines: 1` that was written down it is known that there are no others: scripts for any number of
        # machines say so, and `accelerate config` writes the other two anyway.
        if values.get("main_process_ip") and "num_machines" not in values:
            message = "`main_process_ip` is of several machines, and without `num_machines` there is one"
            problems.add((*path, "main_process_ip"), message, "set `num_machines`, or remove it", of_key=True)
        for key in ("main_process_ip", "same_network", "machine_rank", "rdzv_backend"):
            values.pop(key, None)
    alone = processes == 1 and not SHARDING.keys() & values.keys()
    if values.get("gpu_ids") in (None, "all") or (alone and values["gpu_ids"] == "0"):
        values.pop("gpu_ids", None)
    if alone:
        _require_several(values, path, problems)
    named = len(set(gpu_names(values)))
    if "gpu_ids" in values and named < processes // machines:
        problems.add(
            (*path, "gpu_ids"), f"`gpu_ids` names {named} of the {processes // machines} GPUs that the processes of a "
            "machine need", "name one for each, or remove it",
        )  # fmt: skip


def _require_several(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """See that nothing is said of the GPUs of several processes where there is one, which Accelerate does not start."""
    if "gpu_ids" in values:
        first = next(iter(gpu_names(values)), "0")
        message = "`gpu_ids` is of several processes: one alone trains on the first GPU that it sees"
        hint = f"remove it, and start the command with CUDA_VISIBLE_DEVICES={first} to train on that one"
        problems.add((*path, "gpu_ids"), message, hint, of_key=True)
    if values.get("enable_cpu_affinity"):
        message = "`enable_cpu_affinity` is of several processes, and one trains"
        problems.add((*path, "enable_cpu_affinity"), message, "remove it", of_key=True)


def gpu_names(keys: Mapping[str, Any]) -> list[str]:
    """The GPUs that `gpu_ids` names; none where it names all."""
    return [name.strip() for name in (keys.get("gpu_ids") or "").split(",") if name.strip() not in ("", "all")]


def _require_possible(recipe: Recipe, name: str, path: KeyPath, problems: Problems) -> None:
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
    _require_whole_base(recipe, name, path, keys, problems)


def _require_whole_base(recipe: Recipe, name: str, path: KeyPath, keys: dict[str, Any], problems: Problems) -> None:
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


def launch_inputs(recipe: Recipe, name: str, digest_of: Any) -> dict[str, Any]:
    """What of `launch` decides a stage's result, as flat keys; nothing where one process trains it.

    That is the rows of a step over all processes, in place of those of each; and how the model is divided, since
    it decides the rounding. Where the processes are decides nothing.

    Args:
        recipe: the recipe.
        name: the stage's.
        digest_of: tells what a file holds.
    """
    keys = recipe.launch_of(name)
    if not keys:
        return {}
    stage = recipe.stages[name]
    batch = stage.trainer.get(BATCH, library_keys.keys(stage.kind)[BATCH].default)
    inputs: dict[str, Any] = {f"trainer.{BATCH}": batch * recipe.processes(name)}
    for section in SHARDING:
        for key, value in (keys.get(section) or {}).items():
            is_file = key == "deepspeed_config_file"
            inputs[f"launch.{section}.{key}"] = f"{Path(value).name}@{digest_of(Path(value))}" if is_file else value
    return inputs
