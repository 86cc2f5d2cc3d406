"""One job in one process: check or forecast a recipe, train a stage, judge or compare what is done, read features.

Here torch lives.

The job is a JSON file; the answer is written beside it as `result.json`.
"""

import contextlib
import json
import resource
import signal
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline import ranks, stages
from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.comparison import measure
from rlhf_pipeline.errors import InputError, Waiting
from rlhf_pipeline.forecast import measured
from rlhf_pipeline.forecast.cards import Card
from rlhf_pipeline.forecast.rows import longest
from rlhf_pipeline.forecast.work import first_change, forecast
from rlhf_pipeline.models.tokenizer import pinned_day
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import meeting, trackers
from rlhf_pipeline.run.explain import explain, is_of_gpu_memory, recognise
from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, WAITING, die_with
from rlhf_pipeline.rundir import durable, items, strict_json
from rlhf_pipeline.rundir.layout import RESULT, TRAINED, read_json
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.rundir.words import memory
from rlhf_pipeline.stages import check, evaluate, features, win_rates
from rlhf_pipeline.stages.job import Job


def main(job_file: str, result_file: Path | None = None) -> int:
    """Do the job and write its result.

    Args:
        job_file: the job.
        result_file: of one of several processes, where to write its own; by default `result.json` beside the job.

    Returns:
        0, or 2 for a fault of the recipe or its data, 3 if it was asked to stop, 4 if it waits for people, or 1 for any
        other fault, whose traceback is in the log.
    """
    job = json.loads(Path(job_file).read_text())
    recipe = Recipe.model_validate(job["recipe"])
    recipe._folders = [Path(folder) for folder in job["folders"]]
    recipe.locate_rows()
    result: dict[str, Any]
    try:
        if job["task"] == "check":
            warnings = check.check(recipe, job["stages"], job["current"])
            result, code = {"warnings": warnings, "forecast": foresee(recipe, job["card"])}, 0
        elif job["task"] == "forecast":
            found = forecast(recipe, Card(**job["card"]), rows=longest(recipe))
            result, code = {"forecast": found.as_json()}, 0
        elif job["task"] == "measure":
            result, code = {"to_go": asdict(measured.step(recipe, job["stage"], longest(recipe)))}, 0
        elif job["task"] == "compare":
            settings = job["settings"]
            asked, spec = measure.default_prompts(recipe, settings["n"])
            result, code = {"comparison": measure.compare(recipe, recipe.run, asked, spec, settings)}, 0
        elif job["task"] == "features":
            made = features.features(recipe, recipe.run, job["init"], items.read(Path(job["items"])))
            features.write(Path(job["folder"]), made)
            result, code = {"replies": len(made)}, 0
        else:
            stage = Job(recipe, job["stage"], recipe.run)
            if job.get("launch"):
                meeting.meet(recipe)
                stage = replace(stage, shared=meeting.SameRows(recipe))
            if job["task"] == "train":
                report_to = recipe.report_to if ranks.is_first() else []
                with trackers.reporting(report_to, recipe.name, stage.folder, job["record"]["started_at"]):
                    metrics = train(stage)
            else:
                metrics = evaluate.judge_artifact(stage, stage.published)
                metrics |= win_rates.against_start(stage) if ranks.is_first() else {}
            day = pinned_day(stage.reader.tokenizer.chat_template)
            result = {"metrics": metrics, "peak_memory_bytes": peak_memory(), "device": device_name()}
            result, code = result | {"allocator": torch.cuda.is_available(), "template_day": day}, 0
    except Waiting as waiting:
        result, code = {"waits": waiting.message}, WAITING
    except Stopped as stopped:
        result, code = {"step": stopped.step}, STOPPED
    except durable.CheckpointError as error:
        traceback.print_exc()
        unusable = {"checkpoint": error.checkpoint, "why": error.why}
        result, code = {"message": str(error), "hint": None, "unusable": unusable}, 1
    except InputError as error:
        # A judge that was tried may have said anything.
        problems = [{"message": redact(one.message), "place": one.place, "hint": one.hint} for one in error.all]
        result, code = {"message": redact(str(error)), "hint": error.hint, "problems": problems}, 2
    except Exception as error:  # the runner says which, and shows the end of the log if it is an unknown one
        traceback.print_exc()
        name = job.get("stage")
        place = recipe.run / (name or "")
        saving = first_saving(recipe, name) if is_of_gpu_memory(error) and name else None
        message, hint = explain(error, recipe, name, place, saving)
        known = recognise(error, recipe, name, place) is not None
        result, code = {"message": redact(message), "hint": hint, "known": known}, 1
    try:
        durable.write_text(result_file or Path(job_file).with_name(RESULT), strict_json.dumps(result))
    except OSError as error:  # a full disk, a folder made read-only: the log, which ends with it, has what happened
        traceback.print_exc()
        print(explain(error, recipe, job.get("stage"), Path(job_file).parent)[0], file=sys.stderr)
        code = code or 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def foresee(recipe: Recipe, card: dict[str, Any] | None) -> dict[str, Any] | None:
    """The forecast of a recipe that was found to be right, as JSON; None where none is asked for.

    It also is None where a library does not run on shapes: that is no fault of the recipe.
    """
    if card is None:
        return None
    try:
        return forecast(recipe, Card(**card), advise=False, rows=longest(recipe)).as_json()
    except Exception:
        traceback.print_exc()
        return None


def first_saving(recipe: Recipe, name: str) -> str | None:
    """What the forecast would change first in a stage whose memory ran out, with what it saves, in words."""
    try:
        found, change = first_change(recipe, name, longest(recipe))
    except Exception:
        traceback.print_exc()
        return None
    if change is None:
        return None
    keys = " ".join(f"{key}={value}" for key, value in change.overrides.items())
    return f"`{keys}` (by the forecast {memory(change.peak)} in place of {memory(found.peak)}; costs {change.costs})"


def train(job: Job) -> dict[str, Any]:
    """Train a stage and judge it, or judge what an earlier worker trained; returns its final metrics.

    Of several processes only the first one has metrics; the others judge with it where they have divided the model.
    """
    trained = read_json(job.work / TRAINED)
    if trained is None:
        metrics = stages.BY_KIND[job.stage.kind].run(job)
    else:
        policy = job.stage.facts.is_policy
        metrics = trained["metrics"] | (evaluate.judge_artifact(job, job.artifact) if policy else {})
    return metrics | win_rates.against_start(job) if ranks.is_first() else {}


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
    die_with(int(sys.argv[2]))
    try:
        REQUEST.listen(STOP_SIGNAL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})  # as the server has left it
        status = main(sys.argv[1])
    except Stopped:  # it was asked just before its job began, or when that was over
        status = STOPPED
    sys.exit(status)
