"""One job in a worker, and what became of it: its result, or in one sentence why there is none. No torch."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import InputError, InputErrors, RunError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run.explain import SAFE, explain_no_room, explain_signal, explain_vanished, full_disk, oom_kills
from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, WAITING, Launcher
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RESULT, end_of, log_of_rank, logged_since, read_json
from rlhf_pipeline.rundir.secrets import redact, scrub

# What a log holds besides what went wrong: progress bars, and warnings with the line of code below each.
_NOISE = re.compile(
    r"^.*?\d+%\|[^|\n]*\|[^]\n]*\]?|^\S+:\d+: \w*Warning: .*(\n  .*)?|^(\[rank\d+\]:)?\[W\d.*"
    r"|^Failed to load CPU gemm_4bit_forward .*",  # of bitsandbytes, which then has its own
    re.MULTILINE,
)


class Ended(NamedTuple):
    """How a job ended that did not fail.

    Attributes:
        result: what the worker handed back.
        stopped: it was asked to stop and has, so that the result has no more than the `step` of a checkpoint.
        waits: what it waits for people to do, in one sentence; None where it does not.
    """

    result: dict[str, Any]
    stopped: bool
    waits: str | None = None


def do(recipe: Recipe, launcher: Launcher, task: str, job_file: Path, log: Path, what: str, **details: Any) -> Ended:
    """Have a worker do a job, and read its result. A result that an earlier job has left there is removed first.

    Args:
        recipe: the recipe.
        launcher: starts the worker.
        task: `check`, `forecast`, `measure`, `train`, `judge`, `compare` or `features`.
        job_file: where to write the job down; the result comes to be beside it.
        log: takes what the worker prints.
        what: the job in words, as the subject of `… failed`.
        details: what else the task needs; see `rlhf_pipeline.run.worker`.

    Raises:
        InputError: the check, a forecast, a measured step or the reading of features found something wrong.
        CheckpointError: the checkpoint that it should resume from cannot be.
        RunError: the job failed, or its worker ended without a result, with whatever exit code.
        OSError: the job cannot be written down.
    """
    file, killed_before = job_file.with_name(RESULT), oom_kills()
    file.unlink(missing_ok=True)
    job = {"task": task, "recipe": recipe.model_dump(), "folders": [str(one) for one in recipe.folders], **details}
    processes = details.get("launch", {}).get("num_processes", 1)
    job |= {"log": str(log)} if details.get("launch") else {}
    logs = [log_of_rank(log, rank) for rank in range(processes)]
    ends = [end_of(one) for one in logs]
    code = launcher.run(job, job_file, log)
    for one in logs:
        scrub(one)
    result = read_json(file)
    if code == 0 and result is not None:
        return Ended(result, stopped=False)
    if code == WAITING and result is not None:
        return Ended({}, stopped=False, waits=str(result["waits"]))
    if code == 2 and task in ("check", "forecast", "measure", "features") and result is not None:
        raise InputErrors([InputError(**_as_written(recipe, problem)) for problem in result["problems"]])
    if code == 1 and result is not None and "unusable" in result:
        raise durable.CheckpointError(Path(result["unusable"]["checkpoint"]), redact(result["unusable"]["why"]))
    # Without a result and without having been asked, a worker that ends with this code was ended by somebody's code.
    stopped = code == STOPPED and (result is not None or launcher.stopping)
    if stopped or (launcher.stopping and (code == -STOP_SIGNAL or task != "train")):
        return Ended(result or {}, stopped=True)
    ran_out = oom_kills() > killed_before
    raise _failure(recipe, what, code, result, logs, ends, ran_out, details.get("stage"), task == "train")


def _failure(
    recipe: Recipe,
    what: str,
    code: int,
    result: dict[str, Any] | None,
    logs: list[Path],
    ends: list[int],
    memory_ran_out: bool,
    name: str | None,
    keep_log: bool,
) -> RunError:
    """Say what failed, with the end of the log where that may tell more; of several processes, also which one did.

    Of each log, only what was written since it ended at `ends` is of this job.
    """
    rank, of_rank = 0, ""
    if result is not None and "rank" in result:
        code, rank = result["code"], result["rank"]
        of_rank = f" in rank {rank} of {result['ranks']}"
    log = logs[rank]
    tail = [line for line in _NOISE.sub("", logged_since(log, ends[rank])).splitlines() if line.strip()][-8:]
    if code < 0:
        cause, hint = explain_signal(-code, memory_ran_out, recipe, name)
    elif result is not None and "message" in result:
        cause, hint = result["message"], result["hint"] or SAFE
    elif full_disk(log.parent):  # the worker could not write, perhaps not even to its log
        cause, hint = explain_no_room(recipe, log.parent, "its worker could not write")
    else:
        cause, hint = explain_vanished(code, tail[-1] if tail else None, recipe, name)
    shown = [] if result and result.get("known") else tail  # where the cause is known, it says all that the log does
    lines = [f"{what} failed{of_rank}: {cause}", *(f"  | {line[:200]}" for line in shown)]
    if keep_log:
        lines.append(f"  the whole log: {log}")
    return RunError(redact("\n".join(lines)), hint=hint)


def _as_written(recipe: Recipe, problem: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a stage that is repeated, by the name that was written: so it is said once."""
    return {key: text and recipe.as_written(text) for key, text in problem.items()}
