"""One job in one process: check a whole recipe, train one stage, or judge one that is done. This is where torch lives.

The job is a JSON file; the answer is written beside it as `result.json`.
"""

import json
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_config
from rlhf_pipeline.recipe import BASE, Recipe, Stage
from rlhf_pipeline.stages import evaluation
from rlhf_pipeline.stages.job import Job


def main(job_file: str) -> int:
    """Do the job and write its result.

    Returns:
        0, or 2 for a fault of the recipe or its data, or 1 for any other, whose traceback is in the log.
    """
    job = json.loads(Path(job_file).read_text())
    recipe = Recipe.model_validate(job["recipe"])
    recipe._folder = Path(job["folder"])
    result: dict[str, Any]
    try:
        if job["task"] == "check":
            check(recipe, job["stages"])
            result, code = {}, 0
        else:
            stage = Job(recipe, job["stage"], recipe.run)
            train = stages.BY_KIND[stage.stage.kind].run
            metrics = train(stage) if job["task"] == "train" else evaluation.judge_artifact(stage)
            result, code = {"metrics": metrics, "peak_memory_bytes": peak_memory()}, 0
    except InputError as error:
        result, code = {"message": error.message, "place": error.place, "hint": error.hint}, 2
    except Exception as error:  # the runner shows the end of the log, and this line above it
        traceback.print_exc()
        result, code = {"message": f"{type(error).__name__}: {error}"}, 1
    Path(job_file).with_name("result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def check(recipe: Recipe, names: list[str]) -> None:
    """Find what is wrong with the settings and data of every stage that shall run, before the first one trains.

    Raises:
        InputError: for the first thing found.
    """
    load_config(recipe.model)
    if any(recipe.stages[name].kind in ("reward", "ppo") for name in names):
        load_config(recipe.model, head="score")
    check_lora(recipe, names)
    for name in names:
        job = Job(recipe, name, recipe.run)
        stages.BY_KIND[job.stage.kind].prepare(job)
        if job.stage.kind != "reward":
            evaluation.prepare(job)


def check_lora(recipe: Recipe, names: list[str]) -> None:
    """See that each stage's `lora` makes an adapter, with room for the one it starts from, on models without weights.

    Raises:
        InputError: PEFT refuses it, it matches no layer, or it is too small.
    """
    known: dict[str, dict[str, torch.Size]] = {}

    def shapes(name: str) -> dict[str, torch.Size]:
        stage = recipe.stages[name]
        key = json.dumps([stage.kind == "reward", stage.lora], sort_keys=True)
        if key not in known:
            try:
                known[key] = _shapes_without_weights(recipe, stage)
            except (TypeError, ValueError) as error:
                raise InputError(
                    str(error).strip().splitlines()[0],
                    place=_written_at(recipe, name),
                    hint="`target_modules: all-linear` fits every architecture",
                ) from None
        return known[key]

    for name in names:
        ours, init = shapes(name), recipe.stages[name].init
        problem = adapters.misfit(shapes(init), ours) if init in recipe.stages else None
        if problem:
            raise InputError(
                f"the adapter of stage `{name}` cannot begin as that of `{init}`, which it starts from: {problem}",
                place=_written_at(recipe, name),
                hint=f"it needs every module of `{init}` at no smaller rank, or to start from the base: `init: {BASE}`",
            )


def _shapes_without_weights(recipe: Recipe, stage: Stage) -> dict[str, torch.Size]:
    """The shapes of a stage's LoRA weights."""
    with torch.device("meta"):
        if stage.kind == "reward":
            scorer = AutoModelForSequenceClassification.from_config(load_config(recipe.model, head="score"))
            return adapters.adapter_shapes(adapters.with_reward_adapter(scorer, stage.lora, None), "default")
        model = AutoModelForCausalLM.from_config(load_config(recipe.model))
        return adapters.adapter_shapes(adapters.with_policy_adapter(model, stage.lora, None), "default")


def _written_at(recipe: Recipe, name: str) -> str:
    """The key under which a stage's `lora` was written: its own, or that of what it took the whole shape over from."""
    stage = recipe.stages[name]
    init = stage.init if stage.init in recipe.stages else None
    if stage.lora != (recipe.stages[init].lora if init else recipe.lora):
        return f"stages.{name}.lora"
    return _written_at(recipe, init) if init else "lora"


def peak_memory() -> int:
    """The most memory this process held, in bytes: the GPU's where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
