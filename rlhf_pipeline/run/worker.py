"""One job in one process: check a recipe, train a stage, judge one that is done, or compare all. Here torch lives.

The job is a JSON file; the answer is written beside it as `result.json`.
"""

import contextlib
import functools
import json
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer import utils as trl_utils

from rlhf_pipeline import stages
from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.comparison import measure
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_config, without_weights
from rlhf_pipeline.recipe import BASE, Recipe, Stage
from rlhf_pipeline.run import trackers
from rlhf_pipeline.run.explain import explain, recognise
from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, die_with
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RESULT, TRAINED, read_json
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.stages import check as data_report
from rlhf_pipeline.stages import judge
from rlhf_pipeline.stages.job import Job

# Newer versions of TRL compute the losses of SFT and DPO from the output embedding's own weights, without its adapter.
FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")


def main(job_file: str) -> int:
    """Do the job and write its result.

    Returns:
        0, or 2 for a fault of the recipe or its data, 3 if it was asked to stop, or 1 for any other fault, whose
        traceback is in the log.
    """
    job = json.loads(Path(job_file).read_text())
    recipe = Recipe.model_validate(job["recipe"])
    recipe._folder = Path(job["folder"])
    result: dict[str, Any]
    try:
        if job["task"] == "check":
            result, code = {"warnings": check(recipe, job["stages"])}, 0
        elif job["task"] == "compare":
            settings = job["settings"]
            asked, spec = measure.default_prompts(recipe, settings["n"])
            result, code = {"comparison": measure.compare(recipe, recipe.run, asked, spec, settings)}, 0
        else:
            stage = Job(recipe, job["stage"], recipe.run)
            if job["task"] == "train":
                with trackers.reporting(recipe.report_to, recipe.name, stage.folder, job["record"]["started_at"]):
                    metrics = train(stage)
            else:
                metrics = judge.judge_artifact(stage, stage.published)
            result, code = {"metrics": metrics, "peak_memory_bytes": peak_memory(), "device": device_name()}, 0
    except Stopped as stopped:
        result, code = {"step": stopped.step}, STOPPED
    except InputError as error:
        problems = [{"message": one.message, "place": one.place, "hint": one.hint} for one in error.all]
        result, code = {"message": str(error), "hint": error.hint, "problems": problems}, 2
    except Exception as error:  # the runner says which, and shows the end of the log if it is an unknown one
        traceback.print_exc()
        name = job.get("stage")
        place = recipe.run / (name or "")
        message, hint = explain(error, recipe, name, place)
        known = recognise(error, recipe, name, place) is not None
        result, code = {"message": redact(message), "hint": hint, "known": known}, 1
    try:
        durable.write_text(Path(job_file).with_name(RESULT), json.dumps(result))
    except OSError as error:  # a full disk, a folder made read-only: the log, which ends with it, has what happened
        traceback.print_exc()
        print(explain(error, recipe, job.get("stage"), Path(job_file).parent)[0], file=sys.stderr)
        code = code or 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def train(job: Job) -> dict[str, Any]:
    """Train a stage and judge it, or judge what an earlier worker trained; returns its final metrics."""
    trained = read_json(job.work / TRAINED)
    if trained is not None:
        return trained["metrics"] | (judge.judge_artifact(job, job.artifact) if job.stage.facts.is_policy else {})
    return stages.BY_KIND[job.stage.kind].run(job)


def check(recipe: Recipe, names: list[str]) -> list[str]:
    """Find what is wrong with the settings and data of every stage that shall run, before the first one trains.

    Returns:
        Warnings: what may be as it should, and is worth a look.

    Raises:
        InputError: for all that is wrong, as far as it can be told while other things are.
    """
    load_config(recipe.model)
    used = [recipe.stages[name].facts for name in names]
    if any("reward" in (kind.makes, *(parent.role for parent in kind.parents)) for kind in used):
        load_config(recipe.model, head="score")
    problems: list[InputError] = []

    def attempt(task: Callable[[], Any]) -> Any:
        try:
            return task()
        except InputError as error:
            problems.append(error)

    attempt(lambda: check_lora(recipe, names))
    jobs = [Job(recipe, name, recipe.run) for name in names]
    for job in jobs:
        attempt(functools.partial(stages.BY_KIND[job.stage.kind].prepare, job))
    policies = [job for job in jobs if job.stage.facts.is_policy]
    if policies:
        attempt(lambda: judge.prepare(policies[0]))
    report, wrong = data_report.of_recipe(recipe, names)
    problems += wrong
    if problems:
        raise InputErrors(problems)
    return report["warnings"]


def check_lora(recipe: Recipe, names: list[str]) -> None:
    """See that each stage's `lora` makes an adapter, with room for the one it starts from, on models without weights.

    Raises:
        InputError: PEFT refuses it, it matches no layer, it is too small, or TRL would not train all of it.
    """
    known: dict[str, tuple[dict[str, torch.Size], bool]] = {}

    def made(name: str) -> tuple[dict[str, torch.Size], bool]:
        stage = recipe.stages[name]
        key = json.dumps([stage.facts.makes, stage.lora], sort_keys=True)
        if key not in known:
            try:
                known[key] = _made_without_weights(recipe, stage)
            except (TypeError, ValueError) as error:
                raise InputError(
                    str(error).strip().splitlines()[0],
                    place=_written_at(recipe, name),
                    hint="`target_modules: all-linear` fits every architecture",
                ) from None
        return known[key]

    for name in names:
        (ours, on_head), init = made(name), recipe.stages[name].init
        if FUSED_HEAD and on_head and recipe.stages[name].kind != "ppo":
            raise InputError(
                f"an adapter on the output embedding cannot be trained in stage `{name}`: TRL computes the loss from "
                "the embedding's own weights",
                place=_written_at(recipe, name),
                hint="`target_modules: all-linear` leaves it out",
            )
        problem = adapters.misfit(made(init)[0], ours) if init in recipe.stages else None
        if problem:
            raise InputError(
                f"the adapter of stage `{name}` cannot begin as that of `{init}`, which it starts from: {problem}",
                place=_written_at(recipe, name),
                hint=f"it needs every module of `{init}` at no smaller rank, or to start from the base: `init: {BASE}`",
            )


def _made_without_weights(recipe: Recipe, stage: Stage) -> tuple[dict[str, torch.Size], bool]:
    """The shapes of a stage's LoRA weights, and whether there are some on the output embedding."""
    with torch.device("meta"):
        if stage.facts.makes == "reward":
            scorer = without_weights(recipe.model, head="score")
            return adapters.adapter_shapes(adapters.with_reward_adapter(scorer, stage.lora, None), "default"), False
        model = adapters.with_policy_adapter(without_weights(recipe.model), stage.lora, None)
        on_head = isinstance(model.get_output_embeddings(), BaseTunerLayer)
        return adapters.adapter_shapes(model, "default"), on_head


def _written_at(recipe: Recipe, name: str) -> str:
    """The key under which a stage's `lora` was written: its own, or that of what it took the whole shape over from."""
    stage = recipe.stages[name]
    init = stage.init if stage.init in recipe.stages else None
    if stage.lora != (recipe.stages[init].lora if init else recipe.lora):
        return f"stages.{name}.lora"
    return _written_at(recipe, init) if init else "lora"


def device_name() -> str:
    """What trained: the GPU, or how many threads of the CPU, on which the rounding of sums depends."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads != 1)}"


def peak_memory() -> int:
    """The most memory this process held, in bytes: the GPU's where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        # On Linux; there, `ru_maxrss` begins with what the process held that started this one.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    if sys.platform == "linux":
        die_with(int(sys.argv[2]))
    try:
        REQUEST.listen(STOP_SIGNAL)
        status = main(sys.argv[1])
    except Stopped:  # it was asked just before its job began, or when that was over
        status = STOPPED
    sys.exit(status)
