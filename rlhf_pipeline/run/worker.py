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
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_config
from rlhf_pipeline.recipe import Recipe
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
    check_lora(recipe)
    for name in names:
        job = Job(recipe, name, recipe.run)
        stages.BY_KIND[job.stage.kind].prepare(job)
        if job.stage.kind != "reward":
            evaluation.prepare(job)


def check_lora(recipe: Recipe) -> None:
    """See that the recipe's `lora` makes an adapter for its model, on a model without weights.

    Raises:
        InputError: PEFT refuses it, or it matches no layer.
    """
    try:
        LoraConfig(**recipe.lora)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(recipe.model))
            adapters.with_policy_adapter(model, recipe.lora, None)
    except (TypeError, ValueError) as error:
        raise InputError(
            str(error).strip().splitlines()[0],
            place="lora",
            hint="`target_modules: all-linear` fits every architecture",
        ) from None


def peak_memory() -> int:
    """The most memory this process held, in bytes: the GPU's where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
