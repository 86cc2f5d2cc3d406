"""Accelerate's keys, as `launch` and files of `accelerate config` write them. No torch."""

import ast
import copy
import difflib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import expanded, resolved
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.recipe.origins import Origin, Problems, Source
from rlhf_pipeline.recipe.validation import check_section
from rlhf_pipeline.recipe.yaml import KeyPath, Mark, dump_inline, read_document, shown

KEY = "launch"
WRAP_POLICY = "fsdp_auto_wrap_policy"
SHARDING = {"fsdp_config": "FSDP", "deepspeed_config": "DeepSpeed"}  # keys, and what divides the model by them
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
# What keys of the two sections take, where Accelerate would only fail as it starts processes, or take it for a default.
_SWITCH = (True, False)
_DEVICES = ("none", "cpu", "nvme")
_TAKES: dict[str, tuple[Any, ...]] = {
    "fsdp_offload_params": _SWITCH, "fsdp_reshard_after_forward": _SWITCH, "fsdp_activation_checkpointing": _SWITCH,
    "fsdp_activation_checkpointing_offload": _SWITCH,
    WRAP_POLICY: ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "zero_stage": (0, 1, 2, 3), "offload_optimizer_device": _DEVICES, "offload_param_device": _DEVICES,
    "zero3_init_flag": _SWITCH, "zero3_save_16bit_model": _SWITCH,
}  # fmt: skip
# What PyYAML, by which Accelerate reads its files, takes for true or false, and recipes take for words.
_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
_LAST = 999  # the level of files that are no recipes: what is wrong with them is said after the recipes' own faults


def checked(written: dict[str, Any], path: KeyPath, content: dict[str, Any], problems: Problems) -> dict[str, Any]:
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


def read_file(name: str, path: KeyPath, problems: Problems) -> dict[str, Any]:
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


def locate(key: str, of_file: KeyPath, path: KeyPath, problems: Problems) -> None:
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


def gathers_all_layers(launch: Mapping[str, Any]) -> bool:
    """Whether FSDP2 divides a model as one, so that a pass gathers the whole of it; of a stage's `launch`."""
    fsdp = launch.get("fsdp_config") or {}
    return bool(fsdp) and fsdp.get(WRAP_POLICY, "NO_WRAP") == "NO_WRAP"


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


def locate_deepspeed(values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
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
