"""From a recipe to finished stages: check everything, then one worker after the other. No torch."""

import contextlib
import dataclasses
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline import hub, kinds, plan
from rlhf_pipeline.comparison import wanted as comparison
from rlhf_pipeline.errors import Interrupted, RunError, Waiting
from rlhf_pipeline.fingerprint import pin
from rlhf_pipeline.forecast import cards, known
from rlhf_pipeline.forecast.cards import Card
from rlhf_pipeline.forecast.result import Forecast
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.recipe import Recipe, Stage, gates, outside, to_yaml
from rlhf_pipeline.recipe.launch_rules import require_devices
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.run import jobs, machines, signals, to_do, trackers
from rlhf_pipeline.run.explain import SAFE, explain
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.run.to_do import ToDo
from rlhf_pipeline.rundir import durable, jsonl
from rlhf_pipeline.rundir.headline import headline
from rlhf_pipeline.rundir.layout import (
    JOB,
    LOG,
    METRICS,
    RECIPE,
    RESULT,
    SAMPLES,
    Progress,
    RunDirectory,
    read_json,
)
from rlhf_pipeline.rundir.pace import ToGo
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.secrets import redact, scrub
from rlhf_pipeline.rundir.state import STOPPED_EARLY
from rlhf_pipeline.rundir.words import duration

Say = Callable[[str], None]
OF_JUDGING = ("judge_", "judge/", "win_rate")  # how the metrics of a policy begin that come of judging it


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    only: str | None = None,
    force: list[str] | None = None,
    trust_versions: bool = False,
    ignore_gates: bool = False,
    reuse: bool = True,
    compare: bool = True,
    also_check: Recipe | None = None,
    say: Say = print,
) -> list[StagePlan]:
    """Bring a recipe's run directory up to date.

    Args:
        recipe: from `recipe.load`.
        until: stop after this stage; see `plan.select`.
        only: run this stage alone.
        force: stages to run even if done.
        trust_versions: keep stages that other versions of the libraries made, from now on.
        ignore_gates: continue past gates that are closed, and record that.
        reuse: take what another run beside this one, or this one formerly, has made of the same inputs.
        compare: at the end, send the same prompts through all policies that are there.
        also_check: of a smoke, the same recipe with settings that are not cut: the warnings are then those about it.
        say: takes one line at a time, about what is going on.

    Returns:
        The plan afterwards.

    Raises:
        InputError: the check found something wrong; nothing was trained or moved.
        Interrupted: it was asked to stop, by SIGINT, SIGTERM, SIGHUP or SIGUSR1, and has.
        KeyboardInterrupt: it was asked twice, and has stopped at once.
        RunError: a stage failed or does not pass its gates, or another process holds the run directory.
        Waiting: people have to label first.
    """
    directory = RunDirectory(recipe.run)

    def make_plan(at_work: bool | None = None) -> list[StagePlan]:
        return plan.make(recipe, at_work, trust_versions=trust_versions, ignore_gates=ignore_gates, reuse=reuse)

    def find_to_do(plans: list[StagePlan]) -> ToDo:
        return to_do.find(
            recipe,
            plans,
            until=until,
            only=only,
            force=force or [],
            trust_versions=trust_versions,
            ignore_gates=ignore_gates,
        )

    plans = make_plan()
    wanted = find_to_do(plans)
    if not wanted.stages and not (compare and wanted.compares):
        if recipe.machine_rank:  # which shows no table
            say(f"machine {recipe.machine_rank}: there is nothing to do in {recipe.run}, all is done")
        return plans
    if recipe.machine_rank:  # the first machine holds the lock and does the rest
        require_devices(recipe, list(wanted.stages))
        try:
            machines.follow(recipe, say)
        except OSError as error:
            raise _explained(error, recipe) from None
        return make_plan()
    directory.refuse_if_locked()
    if to_do.WAIT in list(wanted.stages.values())[:1]:
        raise _waits(next(stage for stage in plans if stage.name in wanted.stages), directory)
    trackers.require(recipe.report_to)
    plan.shapes(recipe)  # what the first rows show needs no worker
    try:
        with (
            _scratch() as scratch,
            Launcher(scratch / "server.log") as launcher,
            signals.stopping(
                lambda: launcher.at_work and not launcher.stopping,
                launcher.stop,
                say,
                lambda: not directory.absent_machines(),
            ),
            directory.locked(),
            machines.leading(recipe),
            machines.reminding(recipe, say),
        ):
            plans = make_plan(at_work=False)  # another run may have finished meanwhile; what it did counts
            wanted = find_to_do(plans)
            to_check = [stage for stage in plans if wanted.stages.get(stage.name) in to_do.RUNS]
            if to_check:
                require_devices(recipe, [stage.name for stage in to_check])
                directory.note("checking settings and data")
                say("check   settings and data of every stage")
                card = cards.find(None)
                found = _check(recipe, to_check, launcher, scratch, card if card.usable else None)
                warnings = found.warnings
                if also_check is not None:
                    warnings = _check(also_check, to_check, launcher, scratch, None).warnings
                for warning in [*warnings, *(found.forecast.doubts if found.forecast else ())]:
                    say(f"warning: {warning}")
            durable.write_text(directory.path / RECIPE, redact(to_yaml(recipe)))
            trained: set[str | None] = set()
            for name in wanted.stages:
                # Its data may have changed since the run began, days ago perhaps.
                stage = next(stage for stage in make_plan(at_work=False) if stage.name == name)
                fresh = stage.name in (force or []) or bool(trained.intersection(stage.parents.values()))
                taken = None if fresh else _take(stage, directory, say)
                if taken:
                    stage = dataclasses.replace(stage, record=taken, is_current=True)
                if stage.state == "waiting" and not fresh and not taken:
                    raise _waits(stage, directory)
                if not stage.is_current or fresh:
                    record = _train(recipe, stage, directory, launcher, say, fresh)
                    trained.add(stage.name)
                elif stage.needs_judging:
                    directory.note(f"judging {stage.name} again")
                    record = _judge(recipe, stage, directory, launcher, scratch, say)
                else:
                    record = stage.record
                record = to_do.settled(recipe, stage.name, record, trust_versions, ignore_gates)
                directory.write_record(stage.name, record)
                if not recipe.keep_checkpoints:
                    directory.clear(stage.name)
                _refuse_closed_gates(stage.name, record, directory, say)
                if launcher.stopping:
                    raise Interrupted(f"stopped after stage `{stage.name}`, which is done")
            if compare:
                directory.note("comparing the policies")
                _compare(recipe, directory, launcher, scratch, say)
    except OSError as error:  # the runner's own; a worker explains its own
        raise _explained(error, recipe) from None
    return make_plan()


def _explained(error: OSError, recipe: Recipe) -> RunError:
    """What an error of the disk in the runner itself is about."""
    message, hint = explain(error, recipe, None, recipe.run)
    return RunError(message, hint=hint)


def _waits(stage: StagePlan, directory: RunDirectory) -> Waiting:
    """What ends a run where people have to label."""
    return Waiting(
        f"stage `{stage.name}` waits for people: {stage.reason}",
        hint=f"`rlhf-pipeline label {directory.path} {stage.name} --open` opens the page; then the same `run` goes on",
    )


def _refuse_closed_gates(name: str, record: Record, directory: RunDirectory, say: Say) -> None:
    """End the run where a stage does not pass its gates.

    Raises:
        RunError: it does not.
    """
    if record.closed_gate:
        raise RunError(
            f"stage `{name}`: a gate is closed: {record.closed_gate}",
            hint=f"its artifact is in {directory.path / str(record.artifact)}, to look at; change its settings or its "
            "gate, or continue with `run --ignore-gates`",
        )
    if record.gates_ignored:
        say(f"{name:<7} gates ignored: {gates.describe(record.gates, record.metrics)}")


class Checked(NamedTuple):
    """What the check of a recipe found that is no error.

    Attributes:
        warnings: a sentence each.
        forecast: how much memory its stages will take; None where that was not asked for, or cannot be said.
    """

    warnings: list[str]
    forecast: Forecast | None


def check(recipe: Recipe, card: Card) -> Checked:
    """Check settings and data of every stage of a recipe, in a worker, and forecast its memory.

    Args:
        recipe: from `recipe.load`.
        card: the GPU that is asked about.

    Raises:
        InputError: for all that was found wrong.
    """
    trackers.require(recipe.report_to)
    plan.shapes(recipe)
    with _scratch() as scratch, Launcher(scratch / "server.log", fork=False) as launcher:
        return _check(recipe, plan.make(recipe), launcher, scratch, card)


def foresee(recipe: Recipe, card: Card) -> Forecast:
    """How much memory each stage of a recipe will take, and what to change where it does not fit.

    It is worked out in a worker, and remembered.

    Args:
        recipe: from `recipe.load`; its hub models and datasets are pinned to the commits that count.
        card: the GPU that is asked about.

    Raises:
        InputError: the configuration of the model cannot be had.
    """
    pin(recipe)
    before = known.find(recipe, card)
    if before is not None and (before.advised or card.usable is None):
        return before
    _require_model(recipe.model)
    with _scratch() as scratch, Launcher(scratch / "server.log", fork=False) as launcher:
        done = jobs.do(
            recipe, launcher, "forecast", scratch / "forecast.json", scratch / "forecast.log", "the forecast",
            card=dataclasses.asdict(card),
        )  # fmt: skip
    if launcher.stopping:
        raise Interrupted("stopped before the forecast was done")
    found = Forecast.from_json(done.result["forecast"])
    known.keep(recipe, found)
    return found


def _require_model(spec: Model) -> None:
    """See that a pinned model is somewhere, before a worker imports all that reads it, which takes seconds."""
    if not Path(spec.path).exists() and not hub.is_commit(spec.revision):
        raise hub.unreachable(spec.place)


def read_features(recipe: Recipe, init: str, items: Path, folder: Path) -> None:
    """Have a worker read the features of replies; see `stages.features`.

    Args:
        recipe: from `recipe.of_run`.
        init: whose model reads them: a stage that is done, or `base`.
        items: a file of `rundir.items`.
        folder: which gets `features.safetensors`; with the items themselves in it, too, both fit each other.

    Raises:
        InputError: the model or the items cannot be read.
        RunError: the worker failed.
        Interrupted: it was stopped.
    """
    with _scratch() as scratch, Launcher(scratch / "server.log", fork=False) as launcher:
        jobs.do(
            recipe, launcher, "features", scratch / "features.json", scratch / "features.log", "reading features",
            init=init, items=str(items.absolute()), folder=str(folder.absolute()),
        )  # fmt: skip
    if launcher.stopping:
        raise Interrupted("stopped before all features were read")


def measure(recipe: Recipe) -> dict[str, ToGo]:
    """How long the stages that train take on this machine, by a step or two of each, in a worker.

    Args:
        recipe: from `recipe.load`; its hub models and datasets are pinned to the commits that count.

    Raises:
        InputError: the model cannot be loaded.
        RunError: a step failed, as for lack of memory.
    """
    pin(recipe)
    found: dict[str, ToGo] = {}
    with _scratch() as scratch, Launcher(scratch / "server.log") as launcher:
        for name in (name for name, stage in recipe.stages.items() if stage.facts.trains):
            done = jobs.do(
                recipe, launcher, "measure", scratch / "measure.json", scratch / "measure.log",
                f"the measured step of stage `{name}`", stage=name,
            )  # fmt: skip
            if launcher.stopping:
                raise Interrupted("stopped before all steps were measured")
            found[name] = ToGo(**done.result["to_go"])
    return found


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for jobs that belong to no stage, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlhf-pipeline-") as folder:
        yield Path(folder)


def _check(recipe: Recipe, stages: list[StagePlan], launcher: Launcher, scratch: Path, card: Card | None) -> Checked:
    """Check the stages; with a card, forecast the recipe's memory, too, unless that is known."""
    forecast = known.find(recipe, card) if card else None
    done = jobs.do(
        recipe, launcher, "check", scratch / "check.json", scratch / "check.log", "the check of settings and data",
        stages=[stage.name for stage in stages], current=[stage.name for stage in stages if stage.is_current],
        card=dataclasses.asdict(card) if card and forecast is None else None,
    )  # fmt: skip
    if launcher.stopping:
        raise Interrupted("stopped before anything was trained")
    if done.result["forecast"] is not None:
        forecast = Forecast.from_json(done.result["forecast"])
        known.keep(recipe, forecast)
    return Checked(list(dict.fromkeys(map(recipe.as_written, done.result["warnings"]))), forecast)


def _train(
    recipe: Recipe, stage: StagePlan, directory: RunDirectory, launcher: Launcher, say: Say, fresh: bool
) -> Record:
    """Run one stage in a worker and publish what it made; it resumes where it was interrupted unless `fresh`.

    Returns:
        Its record.
    """
    folder, work = directory.stage(stage.name), directory.work(stage.name)
    progress = None if fresh or stage.state != "partial" else stage.progress
    begun = stage.record if progress else Record()
    if progress:
        say(f"{stage.name:<7} {progress}")
    else:
        why = "asked for, or a stage that it needs ran again" if fresh else stage.reason
        anew = "is retrained from the start" if kinds.get(stage.kind).trains else "makes its rows anew"
        _make_room(stage, directory, say, anew, why)
    record = _opening_record(recipe, stage, directory, progress, begun)
    directory.prepare(stage.name, progress)
    _put_damage_aside(stage.name, directory, say)
    for log in folder.glob("log*.txt"):
        scrub(log)
    directory.write_record(stage.name, record)
    trains = progress is None or progress.point == "checkpoint"
    launch = _launch(recipe, stage.name, trains)
    began = time.perf_counter()

    def so_far() -> float:
        return round((record.wall_s or 0.0) + time.perf_counter() - began, 2)

    try:
        if trains:
            say(f"{stage.name:<7} {_begins(recipe.stages[stage.name])}{_with(launch)}")
        if progress is None or progress.point != "finished":
            outcome: jobs.Ended | None = None
            while outcome is None:
                try:
                    outcome = jobs.do(
                        recipe, launcher, "train", work / JOB, folder / LOG, f"stage `{stage.name}`",
                        stage=stage.name, record=record.as_json(), **launch,
                    )  # fmt: skip
                except durable.CheckpointError as error:
                    record = record.updated(resumed_from_step=_step_before(stage.name, error, directory, say))
                    directory.write_record(stage.name, record)
            answer = outcome.result
            if outcome.waits:
                raise _waits(dataclasses.replace(stage, reason=outcome.waits), directory)
            if outcome.stopped:
                raise _stopped(stage.name, answer.get("step"), directory)
        else:
            answer = read_json(work / RESULT) or {}
        files = directory.publish(stage.name)
        done = record.updated(
            state="done",
            artifact=f"{stage.name}/{kinds.get(stage.kind).artifact}",
            artifact_files=files,
            template_day=answer.get("template_day"),
            metrics=answer["metrics"],
            finished_at=_now(),
            wall_s=(took := so_far()),
            peak_memory_bytes=max(begun.peak_memory_bytes or 0, answer["peak_memory_bytes"]),
            machine=record.machine | {"device": answer["device"]},
            **_foreseen(recipe, stage.name, answer["allocator"]),
        )
        directory.write_record(stage.name, done)
    except BaseException as error:
        written = directory.record(stage.name)
        if written is None or written.state != "done":  # a signal may come just after that was written
            ended = {"state": "failed", "finished_at": _now(), "wall_s": so_far()}
            if isinstance(error, Waiting):
                ended = {"state": "waiting", "wall_s": so_far()}
            elif isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)):
                ended["stopped"] = True
            elif isinstance(error, RunError):
                ended["error"] = redact(error.message.splitlines()[0])
            else:  # the disk's, or a fault of ours
                ended["error"] = redact(explain(error, recipe, stage.name, folder)[0])
            with contextlib.suppress(OSError):  # a disk that is full stays so; the record of the start is there
                directory.write_record(stage.name, record.updated(**ended))
            if isinstance(error, KeyboardInterrupt) and directory.progress(stage.name) is None:
                raise _stopped(stage.name, None, directory, at_once=True) from None
        raise
    say(f"{stage.name:<7} done in {duration(took)}" + _judged(stage, answer["metrics"]))
    for line in _watched(recipe.stages[stage.name], answer["metrics"]):
        say(f"{stage.name:<7} {line}")
    return done


def _foreseen(recipe: Recipe, name: str, allocator: bool) -> dict[str, int]:
    """What was forecast of a stage, for its record, where its peak was counted by a GPU's allocator: else they do not
    compare.
    """
    forecast = known.find(recipe, cards.ANY) if allocator else None
    found = next((one for one in forecast.stages if one.name == name), None) if forecast else None
    return {"forecast_memory_bytes": found.allocated} if found else {}


def _watched(stage: Stage, metrics: dict[str, Any]) -> Iterator[str]:
    """What came of watching a policy: where its training was stopped and why, and which policy is kept."""
    last, kept, stopped = (metrics.get(f"watch/{name}") for name in ("last_step", "kept_step", "stopped_at_step"))
    if stopped is not None:
        stops = stage.watch.stop if stage.watch else []
        names = [name for name in stops if metrics.get(f"watch/alarm/{name}") == stopped]
        yield f"stopped at step {stopped} by a confirmed alarm: {', '.join(names)}"
    if kept == 0:
        yield "no measurement is better than that of the policy that it started from, which is kept"
    elif kept is not None and kept != last:
        yield f"the policy of step {kept} is kept, the best that was measured"


def _begins(stage: Stage) -> str:
    """What a stage is about to do, and with what."""
    said = [stage.facts.doing]
    if "init" in stage.facts.takes:
        said.append(f"from {' and '.join(outside.said(init) for init in stage.inits)}")
    if stage.judge:
        said.append(f"by {stage.judge.model}")
    if stage.weighed:
        said.append(f"with the reward of {', '.join(reward.label for reward in stage.weighed)}")
    return ", ".join(said)


def _launch(recipe: Recipe, name: str, trains: bool) -> dict[str, dict[str, Any]]:
    """What a job is given beside the rest, where it is one for several processes: one that trains, or that judges what
    they hold in parts alone.
    """
    keys = recipe.launch_of(name) if trains or recipe.divides(name) else {}
    return {"launch": keys} if keys else {}


def _with(launch: dict[str, dict[str, Any]]) -> str:
    """How many processes train a stage, for the end of a line, where there are several."""
    keys = launch.get("launch", {})
    machines = keys.get("num_machines", 1)
    on = f" on {machines} machines" if machines > 1 else ""
    return f", with {keys['num_processes']} processes{on}" if keys.get("num_processes", 1) > 1 else ""


def _step_before(name: str, error: durable.CheckpointError, directory: RunDirectory, say: Say) -> int | None:
    """Put a checkpoint away that cannot be used; the step of the one before, None where there is none."""
    directory.put_away(name, error.checkpoint)
    progress = directory.progress(name)
    goes_on = str(progress) if progress else "there is none before it: trained from the start"
    say(f"{name:<7} {error.checkpoint} is damaged: {error.why}; {goes_on}")
    for damaged in progress.damaged if progress else {}:
        directory.put_away(name, damaged)
    return progress.step if progress else None


def _judged(stage: StagePlan, metrics: dict[str, Any]) -> str:
    """The judge's number, for the end of a line."""
    numbers = headline(stage.kind, metrics)
    return "".join(f", {number.name} {number.text}" for number in numbers if number.metric == kinds.JUDGED)


def _take(stage: StagePlan, directory: RunDirectory, say: Say) -> Record | None:
    """Put in a stage's place what was made of it earlier: a copy, or the former result of this run itself.

    Returns:
        Its record here; None where there is no such result, or no longer.
    """
    if stage.earlier is None:
        return None
    record, former = stage.earlier.record.updated(taken_at=_now()), stage.earlier.is_former_of(directory.path)
    folder = (
        stage.earlier.folder if former else directory.copy_of(stage.name, stage.earlier.folder, record.artifact_files)
    )
    if folder is None:
        return None
    said = f"is taken from {stage.earlier.name}"
    if not _make_room(stage, directory, say, said, stage.reason):
        say(f"{stage.name:<7} {said}")
    directory.put(stage.name, folder, record)
    return record


def _make_room(stage: StagePlan, directory: RunDirectory, say: Say, what: str, why: str) -> bool:
    """Move aside what is there of a stage that begins anew, unless there is nothing to keep.

    Returns:
        Whether something was moved.

    Raises:
        RunError: its record cannot be read, so that nobody can tell what retraining would lose.
    """
    unreadable = directory.unreadable(stage.name)
    same = stage.record.fingerprint == stage.fingerprint and stage.state == "failed"
    if same and not _has_artifact(stage, directory) and not durable.holds_some(directory.work(stage.name)):
        return False
    aside = directory.set_aside(stage.name)
    if aside:
        say(f"{stage.name:<7} {what}: {why}; the former results are now in {aside.name}/")
    if unreadable:
        raise RunError(
            f"stage `{stage.name}`: {unreadable}, so nothing is known of what it made",
            hint=f"all of it is now in {aside}: put a readable stage.json in and move it back, or `run` again to train "
            f"the stage again; {SAFE}",
        )
    return aside is not None


def _has_artifact(stage: StagePlan, directory: RunDirectory) -> bool:
    """Whether what a stage publishes is there, recorded or not."""
    return (directory.stage(stage.name) / kinds.get(stage.kind).artifact).exists()


def _put_damage_aside(name: str, directory: RunDirectory, say: Say) -> None:
    """See that a stage's logs, which its worker will add to, can be read; a power cut may have spoilt some lines."""
    for file in (METRICS, SAMPLES):
        damage = jsonl.put_damage_aside(directory.stage(name) / file)
        if damage:
            say(f"{name:<7} {damage}")


def _opening_record(
    recipe: Recipe, stage: StagePlan, directory: RunDirectory, progress: Progress | None, begun: Record
) -> Record:
    """What is known of a stage when it begins or resumes.

    Args:
        recipe: the recipe.
        stage: its plan.
        directory: the run directory.
        progress: where it resumes.
        begun: its record so far, if it resumes.
    """
    wall_s = begun.wall_s or 0.0
    if progress and begun.state == "running":
        wall_s += _time_to(progress, directory.work(stage.name))
    parents = {name: directory.record(name) for name in stage.parents.values() if name in recipe.stages}
    return Record(
        name=stage.name,
        kind=stage.kind,
        state="running",
        fingerprint=stage.fingerprint,
        inputs=stage.inputs,
        # What is only to be published was judged before.
        judging=begun.judging if progress and progress.point == "finished" else stage.judging,
        **Record.with_parents(stage.parents),
        parent_weights={name: parent.weights if parent else None for name, parent in parents.items()},
        log=f"{stage.name}/{LOG}",
        started_at=begun.started_at or _now(),
        resumed_from_step=progress.step if progress else None,
        versions=plan.versions(),
        command=redact(shlex.join(sys.argv)),
        recipe_folder=str(recipe.folder),
        git=_git(recipe.folder),
        machine={
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            **({"processes": processes} if (processes := recipe.processes(stage.name)) > 1 else {}),
        },
        wall_s=wall_s,
    )


def _time_to(progress: Progress, work: Path) -> float:
    """The seconds that a worker which was killed had spent on what is left of its work."""
    try:
        return round(max(0.0, (work / progress.left).stat().st_mtime - (work / JOB).stat().st_mtime), 2)
    except FileNotFoundError:
        return 0.0


def _stopped(name: str, step: int | None, directory: RunDirectory, at_once: bool = False) -> Interrupted:
    """What ends a run whose stage was stopped, and from where that goes on."""
    progress: Progress | None = directory.progress(name)
    if step is not None and not (progress and progress.makes_rows):
        of_member = f" of member {progress.member} of {progress.members}" if progress and progress.member else ""
        return Interrupted(f"stage `{name}` stopped, with a checkpoint at step {step}{of_member}", at_once=at_once)
    if progress:
        return Interrupted(f"stage `{name}` stopped: {progress}", at_once=at_once)
    then = "stages that are done stay usable; the same command begins this one again"
    return Interrupted(f"stage `{name}` {STOPPED_EARLY}", then=then, at_once=at_once)


def _judge(
    recipe: Recipe, stage: StagePlan, directory: RunDirectory, launcher: Launcher, scratch: Path, say: Say
) -> Record:
    """Judge a stage that is done by the recipe's new `evaluate`; returns its record."""
    launch = _launch(recipe, stage.name, trains=False)
    folder = directory.work(stage.name) / "judging" if launch else scratch  # one that other machines see
    folder.mkdir(parents=True, exist_ok=True)
    done = jobs.do(
        recipe, launcher, "judge", folder / "judge.json", folder / "judge.log", f"judging stage `{stage.name}`",
        stage=stage.name, **launch,
    )  # fmt: skip
    if done.stopped:
        raise Interrupted(f"stopped while stage `{stage.name}` was judged again")
    trained = {name: value for name, value in stage.record.metrics.items() if not name.startswith(OF_JUDGING)}
    metrics = trained | done.result["metrics"]
    say(f"{stage.name:<7} judged again" + _judged(stage, done.result["metrics"]))
    return stage.record.updated(metrics=metrics, judging=stage.judging)


def _compare(recipe: Recipe, directory: RunDirectory, launcher: Launcher, scratch: Path, say: Say) -> None:
    """Write `comparison.json` where it is not of what is there now. If that fails, or is stopped, a line says so.

    Nothing else depends on it, so the run still counts as done.
    """
    try:
        wanted = comparison.due(directory.path, recipe)
        if wanted is None:
            return
        settings, policies = wanted
        say(f"compare {settings['n']} prompts through {', '.join(policies[:-1])} and {policies[-1]}")
        file, log = scratch / "compare.json", scratch / "compare.log"
        done = jobs.do(recipe, launcher, "compare", file, log, "making it", settings=settings)
        if done.stopped:
            raise KeyboardInterrupt
        comparison.write(directory.path, done.result["comparison"])
        for note in done.result["comparison"]["notes"]:
            say(f"compare {note}")
    except KeyboardInterrupt:
        say("warning: there is no new comparison: it was stopped; the next `run` or `compare` makes it")
    except (RunError, OSError) as error:
        message = error.message.splitlines()[0] if isinstance(error, RunError) else str(error)
        say(f"warning: there is no new comparison: {message}")


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit that a recipe's folder is at, and whether files in it differ from that; None outside a repository."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
