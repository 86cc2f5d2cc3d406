"""`launch`: by how many processes a stage is trained, and where, in Accelerate's own keys. No torch."""

import os
from pathlib import Path
from typing import Any

from rlhf_pipeline import devices
from rlhf_pipeline.recipe import launch_keys, launch_rules, library_keys
from rlhf_pipeline.recipe.launch_keys import KEY, SHARDING
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.recipe.yaml import KeyPath

BATCH = "per_device_train_batch_size"


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
        launch_rules.require_stage_without_own(recipe, own, problems)
        recipe.launch = _resolved(recipe, recipe.launch, (KEY,), content, problems)
    for name, stage in recipe.stages.items():
        path: KeyPath = ("stages", name, KEY)
        if stage.launch is None:
            path = (KEY,)
        elif stage.facts.trains:
            launch_rules.require_whole_base(recipe, name, path, stage.launch, problems)  # before what else it lacks
            stage.launch = _resolved(recipe, stage.launch, path, content, problems)
            if stage.launch.pop("machine_rank", None) is not None and not problems.within(path):
                hint = "`launch.machine_rank` at the top is that of all stages"
                problems.add((*path, "machine_rank"), "a machine has one number in a whole run", hint, of_key=True)
        if not problems.within(path):
            launch_rules.require_possible(recipe, name, path, problems)
    broken = any(problems.within(("stages", name, KEY)) for name in recipe.stages)
    if recipe.launch is not None and only_number and not broken:  # of the machines that stages are trained on
        machines = max((stage.launch or {}).get("num_machines", 1) for stage in own)
        if machines == 1:
            recipe.launch = _resolved(recipe, recipe.launch, (KEY,), content, problems)
            return
        recipe.launch = launch_keys.checked(recipe.launch, (KEY,), content, problems)
        if not problems.within((KEY,)):
            launch_rules.require_machine(recipe.launch, machines, (KEY,), problems)


def _resolved(
    recipe: Recipe, written: dict[str, Any], path: KeyPath, content: dict[str, Any], problems: Problems
) -> dict[str, Any]:
    """What a section says in the end, without what says nothing and what was only written down for Accelerate."""
    values = launch_keys.checked(written, path, content, problems)
    launch_keys.locate_deepspeed(values, path, problems)
    file = values.pop("config_file", None)
    if file is not None:
        of_file: KeyPath = (*path, "config_file")
        unset = [key for key, value in written.items() if value is None]  # so that a file's own can be taken back
        read = launch_keys.read_file(file, of_file, problems)
        found = {key: value for key, value in read.items() if key not in unset}
        found = launch_keys.checked(found, of_file, content, problems)
        launch_keys.locate_deepspeed(found, of_file, problems)
        for key in found.keys() - values.keys():
            problems.origins.derived[*path, key] = f"from {Path(file).name}"
            launch_keys.locate(key, of_file, path, problems)
        values = found | values
    if problems.within(path):
        return values
    launch_rules.require_what_the_cpu_takes(values, path, problems)
    launch_rules.require_what_divides(values, path, problems)
    launch_rules.require_precision(recipe, values, path, problems)
    _count(recipe, values, path, problems)
    return values


def _count(recipe: Recipe, values: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """Work out how many processes there are, and on what, and see that this can be; in place."""
    machines = values.get("num_machines", 1)
    number: KeyPath = (*path, "num_processes")
    processes = values.get("num_processes")
    if processes is None:
        hint = "set it, or write `launch: auto` for all devices here"
        hint += "; a stage's own `launch` replaces that at the top" if path != (KEY,) and recipe.launch else ""
        problems.add(number, "`num_processes` is missing", hint)
        return
    if processes == "auto":
        here = 0 if values.get("use_cpu") else len(set(launch_rules.gpu_names(values)) or devices.gpus(os.environ))
        processes = max(1, here) * machines
    values["num_processes"] = processes
    launch_rules.require_shares(values, path, problems)
    launch_rules.require_machine(values, machines, path, problems)
    launch_rules.require_meeting(values, path, problems)
    if machines == 1:
        for key in ("main_process_ip", "same_network", "machine_rank", "rdzv_backend"):
            values.pop(key, None)
    alone = processes == 1 and not SHARDING.keys() & values.keys()
    if values.get("gpu_ids") in (None, "all") or (alone and values["gpu_ids"] == "0"):
        values.pop("gpu_ids", None)
    if alone:
        launch_rules.require_several(values, path, problems)
    launch_rules.require_named_gpus(values, path, problems)


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
