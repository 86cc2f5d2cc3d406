"""From a recipe to finished stages: check everything, then one worker after the other. No torch."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_pipeline import plan
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.recipe import Recipe, to_yaml
from rlhf_pipeline.run.directory import RunDirectory, write_atomically
from rlhf_pipeline.run.launch import Launcher

Say = Callable[[str], None]


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    only: str | None = None,
    force: list[str] | None = None,
    say: Say = print,
) -> list[StagePlan]:
    """Bring a recipe's run directory up to date.

    Args:
        recipe: from `recipe.load`.
        until: stop after this stage; see `plan.select`.
        only: run this stage alone.
        force: stages to run even if done.
        say: takes one line at a time, about what is going on.

    Returns:
        The plan afterwards.

    Raises:
        InputError: the check found something wrong; nothing was trained or moved.
        RunError: a stage failed, or another process holds the run directory.
    """
    directory = RunDirectory(recipe.run)
    plans = plan.make(recipe)
    chosen, judged = _to_do(plans, until, only, force)
    if not chosen and not judged:
        return plans
    directory.refuse_if_locked()
    with _scratch() as scratch, Launcher(scratch / "server.log") as launcher:
        say("check   settings and data of every stage")
        _check(recipe, chosen, launcher, scratch)
        with directory.locked():
            # Another run may have come between; what it did counts.
            chosen, judged = _to_do(plan.make(recipe, at_work=False), until, only, force)
            write_atomically(directory.path / "recipe.yaml", to_yaml(recipe))
            trained: set[str | None] = set()
            for stage in chosen:
                fresh = stage.name in (force or []) or bool({stage.init, stage.reward} & trained)
                _train(recipe, stage, directory, launcher, say, fresh)
                trained.add(stage.name)
            for stage in judged:
                _judge(recipe, stage, directory, launcher, scratch, say)
    return plan.make(recipe)


def _to_do(
    plans: list[StagePlan], until: str | None, only: str | None, force: list[str] | None
) -> tuple[list[StagePlan], list[StagePlan]]:
    """The stages to train, and those that stand but are to be judged again."""
    chosen = plan.select(plans, until, only, force or [])
    names = [stage.name for stage in plans]
    asked = [only] if only else names[: names.index(until) + 1] if until else names
    return chosen, [stage for stage in plans if stage.to_judge and stage not in chosen and stage.name in asked]


def check(recipe: Recipe) -> None:
    """Check settings and data of every stage of a recipe, in a worker.

    Raises:
        InputError: for the first thing found wrong.
    """
    with _scratch() as scratch, Launcher(scratch / "server.log", fork=False) as launcher:
        _check(recipe, plan.make(recipe), launcher, scratch)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for jobs that belong to no stage, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlhf-pipeline-") as folder:
        yield Path(folder)


def _check(recipe: Recipe, stages: list[StagePlan], launcher: Launcher, scratch: Path) -> None:
    job = _job(recipe, "check", stages=[stage.name for stage in stages])
    log = scratch / "check.log"
    code = launcher.run(job, scratch / "check.json", log)
    result = _result(scratch / "result.json")
    if code == 2:
        raise InputError(result["message"], place=result["place"], hint=result["hint"])
    if code != 0:
        raise _failure("the check of settings and data", code, result, log, keep_log=False)


def _job(recipe: Recipe, task: str, **details: Any) -> dict[str, Any]:
    return {"task": task, "recipe": recipe.model_dump(), "folder": str(recipe.folder), **details}


def _train(
    recipe: Recipe, stage: StagePlan, directory: RunDirectory, launcher: Launcher, say: Say, fresh: bool
) -> None:
    """Run one stage in a worker and publish what it made; it goes on from a checkpoint of its own unless `fresh`."""
    folder = directory.stage(stage.name)
    resumed_from = None if fresh else _last_checkpoint(stage, folder / "work")
    if resumed_from is not None:
        say(f"{stage.name:<7} goes on from step {resumed_from}")
        shutil.rmtree(folder / "work" / "adapter", ignore_errors=True)
        (folder / "work" / "result.json").unlink(missing_ok=True)
    else:
        aside = directory.set_aside(stage.name)
        if aside:
            say(f"{stage.name:<7} {stage.reason}; the former results are now in {aside.name}/")
        (folder / "work").mkdir(parents=True)
    record: dict[str, Any] = {
        "name": stage.name,
        "kind": stage.kind,
        "state": "running",
        "fingerprint": stage.fingerprint,
        "inputs": stage.inputs,
        "judging": stage.judging,
        "init": stage.init,
        "reward": stage.reward,
        "log": f"{stage.name}/log.txt",
        "started_at": _now(),
        "resumed_from_step": resumed_from,
        "versions": plan.versions(),
    }
    directory.write_record(stage.name, record)
    say(
        f"{stage.name:<7} training, from {stage.init}"
        + (f", with the reward of {stage.reward}" if stage.reward else "")
    )
    started = time.perf_counter()
    try:
        code = launcher.run(_job(recipe, "train", stage=stage.name), folder / "work" / "job.json", folder / "log.txt")
        result = _result(folder / "work" / "result.json")
        if code != 0:
            raise _failure(f"stage `{stage.name}`", code, result, folder / "log.txt")
        directory.publish(stage.name)
    except BaseException as error:
        message = error.message.splitlines()[0] if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted"
        directory.write_record(stage.name, record | {"state": "failed", "finished_at": _now(), "error": message})
        raise
    wall_s = round(time.perf_counter() - started, 2)
    record |= {
        "state": "done",
        "artifact": f"{stage.name}/adapter",
        "metrics": result["metrics"],
        "finished_at": _now(),
        "wall_s": wall_s,
        "peak_memory_bytes": result["peak_memory_bytes"],
    }
    directory.write_record(stage.name, record)
    judged = result["metrics"].get("judge_mean")
    say(f"{stage.name:<7} done in {wall_s:.0f} s" + (f", judge_mean {judged:.3f}" if judged is not None else ""))


def _last_checkpoint(stage: StagePlan, work: Path) -> int | None:
    """The step of the last checkpoint, if the stage broke off with the inputs of now."""
    if stage.state != "failed" or stage.record.get("fingerprint") != stage.fingerprint:
        return None
    return max((int(folder.name.rpartition("-")[2]) for folder in work.glob("checkpoint-*")), default=None)


def _judge(
    recipe: Recipe, stage: StagePlan, directory: RunDirectory, launcher: Launcher, scratch: Path, say: Say
) -> None:
    """Judge a stage that is done by the recipe's new `evaluate`."""
    log = scratch / "judge.log"
    code = launcher.run(_job(recipe, "judge", stage=stage.name), scratch / "judge.json", log)
    result = _result(scratch / "result.json")
    if code != 0:
        raise _failure(f"judging stage `{stage.name}`", code, result, log, keep_log=False)
    metrics = stage.record["metrics"] | result["metrics"]
    directory.write_record(stage.name, stage.record | {"metrics": metrics, "judging": stage.judging})
    say(f"{stage.name:<7} judged again, judge_mean {metrics['judge_mean']:.3f}")


def _result(file: Path) -> dict[str, Any]:
    """A worker's answer; empty where it died before giving one."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _failure(what: str, code: int, result: dict[str, Any], log: Path, keep_log: bool = True) -> RunError:
    """Say what failed, with the end of the log."""
    cause = result.get("message") or (f"its worker was ended by signal {-code}" if code < 0 else f"exit code {code}")
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
    lines = [f"{what} failed: {cause}", *(f"  | {line[:200]}" for line in tail)]
    if keep_log:
        lines.append(f"  the whole log: {log}")
    return RunError("\n".join(lines), hint="stages that are done stay usable; the same command goes on from here")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
