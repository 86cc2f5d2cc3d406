"""The largest batch that fits on a card, and what to change where a stage does not fit. No torch."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rlhf_pipeline.forecast.result import Change, StageForecast
from rlhf_pipeline.recipe.launch_keys import KEY, WRAP_POLICY, gathers_all_layers
from rlhf_pipeline.recipe.library_keys import keys
from rlhf_pipeline.recipe.schema import Recipe, Stage
from rlhf_pipeline.rundir.words import memory

BATCH, EVAL = "per_device_train_batch_size", "per_device_eval_batch_size"
MOST = 256  # rows at once: more are hardly faster
MOST_PROCESSES = 64
Look = Callable[[Recipe, str], StageForecast]
TIME, RESULT = "time alone", "another result"


def setting(stage: Stage, name: str) -> Any:
    """A key of a stage's `trainer`, or the default; None where its kind has no such key."""
    known = keys(stage.kind)
    default = known[name].default if name in known else None
    return stage.trainer.get(name, None if default is ... else default)


def batch_size(stage: Stage) -> int:
    """Rows in one pass."""
    return int(setting(stage, BATCH) or 8)


def advised(recipe: Recipe, found: StageForecast, usable: int | None, look: Look) -> StageForecast:
    """The forecast of a stage with the largest batch, and with changes and a number of GPUs where it does not fit.

    Args:
        recipe: the recipe.
        found: the stage's forecast as it is.
        usable: bytes of the card; None where there is none.
        look: makes the forecast of a stage of another recipe.
    """
    if usable is None:
        return found
    stage = recipe.stages[found.name]
    changes = tuple(_changes(recipe, found, usable, look))
    if found.divided_by and found.peak > usable:
        found = replace(found, notes=(*found.notes, _with_more_gpus(recipe, found, usable, look)))
    if not stage.facts.trains:
        return replace(found, changes=changes)
    return replace(found, changes=changes, largest_batch=_largest(recipe, found, usable, look))


def _with_more_gpus(recipe: Recipe, found: StageForecast, usable: int, look: Look) -> str:
    """From how many processes on a divided stage fits, each with the batch that it has; or that it never does."""
    key, more, fewer = f"{_place_of_launch(recipe, found.name)}.num_processes", found, found.processes
    while more.peak > usable and 2 * more.processes <= MOST_PROCESSES:
        fewer = more.processes
        more = look(_with(recipe, {key: 2 * fewer}), found.name)
    if more.peak > usable:
        return (
            f"more GPUs alone are not enough: of {more.processes}, each still takes {memory(more.peak)} in "
            f"{more.highest.name}"
        )
    return f"it fits as it is on {more.processes} such GPUs, and not on {fewer}: {key}={more.processes}"


def _place_of_launch(recipe: Recipe, name: str) -> str:
    """Where the `launch` of a stage stands."""
    return KEY if recipe.stages[name].launch is None else f"{name}.{KEY}"


def _largest(recipe: Recipe, found: StageForecast, usable: int, look: Look) -> int:
    """The largest batch with which all fits: on the line between two forecasts, and then looked at itself.

    Memory grows by the same for each row, but for where another phase takes over, or a buffer has its full size.
    """
    name, low = found.name, batch_size(recipe.stages[found.name])
    step = _of_groups(recipe.stages[name])

    def peak(batch: int) -> int:
        return look(_with(recipe, {f"{name}.trainer.{BATCH}": batch}), name).peak

    at_low = found.peak
    if at_low > usable:
        if low == step or (at_least := peak(step)) > usable:
            return 0
        low, high, at_low, at_high = step, low, at_least, at_low
    else:
        high = max(low, MOST // step * step)
        at_high = peak(high) if high > low else at_low
    slope = (at_high - at_low) / max(high - low, 1)
    while at_high > usable:  # `low` fits and `high` does not
        too_many = math.ceil((at_high - usable) / slope / step) * step if slope > 0 else step
        guess = max(low, high - max(too_many, step))
        if guess == low:
            return low
        at_guess = peak(guess)
        slope = (at_high - at_guess) / (high - guess)
        high, at_high = guess, at_guess
    return high


def _of_groups(stage: Stage) -> int:
    """What a batch must be a multiple of."""
    return 2 if stage.facts.encoding == "replies" else 1


def _changes(recipe: Recipe, found: StageForecast, usable: int, look: Look) -> list[Change]:
    """Changes, one on top of the other, the cheapest first, until the stage fits; without those that save nothing."""
    changes: list[Change] = []
    while found.peak > usable and (saving := first_saving(recipe, found, look)):
        change, recipe, found = saving
        if changes and changes[-1].overrides.keys() == change.overrides.keys():
            changes.pop()  # the same once more: only the last value is to be set
        changes.append(change)
    return changes


def first_saving(recipe: Recipe, found: StageForecast, look: Look) -> tuple[Change, Recipe, StageForecast] | None:
    """The cheapest change that saves a hundredth, and the recipe and forecast with it; None where there is none."""
    for overrides, costs in _candidates(recipe, found):
        changed = _with(recipe, overrides)
        after = look(changed, found.name)
        if after.peak < 0.99 * found.peak:
            return Change(overrides, after.peak, costs), changed, after
    return None


def _candidates(recipe: Recipe, found: StageForecast) -> Iterator[tuple[dict[str, Any], str]]:
    """What may save memory where the stage takes most, the cheapest first: see also `run.explain`."""
    name, stage, phase = found.name, recipe.stages[found.name], found.highest.name
    own = f"{name}.trainer"
    batch, steps = batch_size(stage), setting(stage, "gradient_accumulation_steps") or 1
    at_once, of_evaluation = (setting(stage, key) for key in ("local_rollout_forward_batch_size", EVAL))
    if phase == "backward" and setting(stage, "gradient_checkpointing") is False:
        yield {f"{own}.gradient_checkpointing": True}, TIME
    if phase in ("sampling", "scoring") and stage.facts.own_loop and at_once > 1:
        yield {f"{own}.local_rollout_forward_batch_size": min(at_once, batch * steps) // 2 or 1}, TIME
    if phase == "evaluation" and of_evaluation > 1:
        yield {f"{own}.{EVAL}": of_evaluation // 2}, TIME
    if phase == "judging" and recipe.evaluate is not None and recipe.evaluate.batch_size > 1:
        yield {"evaluate.batch_size": recipe.evaluate.batch_size // 2}, TIME
    if phase == "sampling" and found.engine_share > 0.2:
        yield {f"{name}.rollout.gpu_memory_utilization": round(found.engine_share - 0.1, 2)}, TIME
    if phase == "sampling" and stage.sampling is not None and stage.sampling.batch_size > 1:
        yield {f"{name}.sampling.batch_size": stage.sampling.batch_size // 2}, TIME
    if phase in ("backward", "scoring", "sampling") and stage.facts.trains and batch >= 2 * _of_groups(stage):
        yield {f"{own}.{BATCH}": batch // 2, f"{own}.gradient_accumulation_steps": 2 * steps}, TIME
    if found.divided_by and gathers_all_layers(recipe.launch_of(name)):
        yield {f"{_place_of_launch(recipe, name)}.fsdp_config.{WRAP_POLICY}": "TRANSFORMER_BASED_WRAP"}, TIME
    if recipe.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}, RESULT
    if recipe.model.quantization != "nf4":
        yield {"model.quantization": "nf4"}, RESULT
    if stage.facts.trains and stage.facts.reply_limit is None:
        yield {f"{own}.max_length": max(2, found.whole_tokens // 2)}, "longer texts are cut, or dropped"
    elif stage.facts.reply_limit is not None:
        limit = setting(stage, stage.facts.reply_limit)
        if limit > 1:
            yield {f"{own}.{stage.facts.reply_limit}": limit // 2}, "shorter replies"
    if stage.lora.get("r", 8) > 1:
        yield {"lora.r": stage.lora.get("r", 8) // 2}, RESULT


def _with(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """The recipe with other values; of `lora`, in all its stages."""
    changed = copy.deepcopy(recipe)
    for key, value in overrides.items():
        first, *rest = key.split(".")
        if first == "lora":
            for stage in changed.stages.values():
                stage.lora[rest[0]] = value
            continue
        holder: Any = changed.stages[first] if first in changed.stages else getattr(changed, first)
        for part in rest[:-1]:
            holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
        if isinstance(holder, dict):
            holder[rest[-1]] = value
        else:
            setattr(holder, rest[-1], value)
    return changed
