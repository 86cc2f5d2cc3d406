"""Stages as a table on the terminal, and as one JSON object."""

import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_pipeline import kinds
from rlhf_pipeline.data import balance
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.recipe import Recipe, outside
from rlhf_pipeline.recipe.launch_rules import require_devices
from rlhf_pipeline.run.to_do import ToDo
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.headline import headline, series
from rlhf_pipeline.rundir.layout import METRICS, RunDirectory
from rlhf_pipeline.rundir.pace import ToGo, to_go
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record
from rlhf_pipeline.rundir.state import UP_TO_DATE
from rlhf_pipeline.rundir.words import duration, memory_beside, short

STYLES = {
    "done": "green", GATE_CLOSED: "red", "done, to be judged again": "yellow",
    "stale": "yellow", "partial": "yellow", "failed": "red", "blocked": "red", "running": "cyan",
    "waiting": "yellow",
}  # fmt: skip


def as_json(run: Path, plans: list[StagePlan]) -> dict[str, Any]:
    """The object that `plan --json` and `status --json` print: `{"run": …, "stages": [{…}, …]}`."""
    run = run.absolute()
    stages = [plan.summary() | {"to_go": None} for plan in plans]
    for plan, stage in zip(plans, stages, strict=True):
        if left := _to_go(run, plan):
            stage["to_go"] = left.as_json()
    for stage in stages:
        stage["log"] = stage["log"] and str(run / stage["log"])  # the record has it from the run directory
    return {"run": str(run), "stages": stages}


def _to_go(run: Path, plan: StagePlan) -> ToGo | None:
    """What is left of a stage that has begun and is not done."""
    begun = plan.state in ("partial", "running")
    return to_go(RunDirectory(run), plan.name, None if plan.state == "running" else plan.progress) if begun else None


def say_what_is_left(run: Path, plans: list[StagePlan], console: Console) -> None:
    """Print a line for each stage that has begun and is not done."""
    for plan in plans:
        if left := _to_go(run, plan):
            console.print(Text(f"{plan.name}: {in_words(left)}"), highlight=False, soft_wrap=True)


def in_words(left: ToGo) -> str:
    """How long a training will take yet, and how that is known."""
    if left.steps is None:
        return f"{duration(left.step_s)} a step"
    return f"{duration(left.seconds)} to go, {left.steps:,} steps at {duration(left.step_s)} each"


def results(run: Path, plans: list[StagePlan], console: Console) -> None:
    """Print what each stage made: state, time, numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "state", "time", "numbers"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        summary = plan.summary()
        wall_s = summary["wall_s"]
        numbers = "  ".join(f"{number.name} {number.text}" for number in headline(plan.kind, summary["metrics"]))
        about = numbers if numbers and _is_unremarkable(plan) else escape(_why(plan))
        if plan.is_current and numbers and not _is_unremarkable(plan) and not plan.record.gates_ignored:
            about += "\n" + numbers
        time = "" if wall_s is None else duration(wall_s)
        table.add_row(plan.name, f"[{STYLES.get(plan.state, 'default')}]{plan.state}[/]", time, about)
    console.print(table)
    for plan in plans:
        if plan.record.forecast_memory_bytes is not None:
            said = memory_beside(plan.record.peak_memory_bytes, plan.record.forecast_memory_bytes)
            console.print(Text(f"memory of {plan.name}: {said}"), highlight=False, soft_wrap=True)
    say_what_is_left(run, plans, console)
    console.print(f"run directory: {run}", style="dim", highlight=False, soft_wrap=True)


def _is_unremarkable(plan: StagePlan) -> bool:
    """Whether nothing is to be said of a stage but its numbers."""
    return plan.state == "done" and plan.reason == UP_TO_DATE


def _why(plan: StagePlan) -> str:
    """Why a stage is in its state, and where there is a result of it that `run` takes."""
    return f"{plan.reason}; to be taken from {plan.earlier.name}" if plan.earlier else plan.reason


def finished(run: Path, plans: list[StagePlan], console: Console) -> None:
    """Print what each stage of a run made: time, memory, numbers before and after; and what one may do with it next."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "state", "time", "memory"):
        table.add_column(column, no_wrap=True)
    table.add_column("numbers, before → after", overflow="fold")
    judged: dict[str, float] = {}  # what each stage came to by the judge
    for plan in plans:
        record = plan.record if plan.is_current else Record()
        metrics = record.metrics
        changes = _changes(plan, run, metrics, judged.get(plan.parents.get("init", ""))) if metrics else []
        if (mean := metrics.get(kinds.JUDGED)) is not None:
            judged[plan.name] = mean
        about = "\n".join(changes) if plan.state == "done" and changes else escape(plan.reason)
        if not _is_unremarkable(plan):
            about = "\n".join([*changes, escape(plan.reason)])
        if record.taken_from:
            about = "\n".join([about, escape(f"taken from {record.taken_from}: time and memory are of that training")])
        wall_s = record.wall_s
        table.add_row(
            plan.name,
            f"[{STYLES.get(plan.state, 'default')}]{plan.state}[/]",
            "" if wall_s is None else duration(wall_s),
            memory_beside(record.peak_memory_bytes, record.forecast_memory_bytes),
            about,
        )
    console.print(table)
    console.print(f"run directory: {run}", style="dim", highlight=False, soft_wrap=True)
    for command, does in _next(run, plans):
        console.print(Text.assemble("  ", command, (f"  # {does}", "dim")), soft_wrap=True)


def _changes(plan: StagePlan, run: Path, metrics: dict[str, Any], judged: float | None) -> list[str]:
    """The numbers that tell what a stage did, with where they began."""
    numbers = headline(plan.kind, metrics, series(plan.kind, jsonl.rows(run / plan.name / METRICS)), judged)
    return [f"{number.name} {number.change}" for number in numbers]


def _next(run: Path, plans: list[StagePlan]) -> list[tuple[str, str]]:
    """The commands that make sense for what a run has made, each with what it does."""
    done = [plan for plan in plans if plan.is_current]
    policies = [plan.name for plan in done if kinds.get(plan.kind).is_policy]
    short = min(str(run), os.path.relpath(run), key=len)
    path = shlex.quote(short)
    commands = []
    if policies:
        commands += [(f"chat {path}", "talk to the model"), (f"compare {path}", "its stages side by side")]
    if done:
        commands.append((f"report {path} --open", "curves and samples"))
    if policies:
        out = shlex.quote(f"{run.name}-{policies[-1]}")
        commands.append((f"export {path} {policies[-1]} {out}", "for other tools"))
    widest = max((len(command) for command, _ in commands), default=0)
    return [(f"rlhf-pipeline {command:<{widest}}", does) for command, does in commands]


def _balance(name: str, found: dict[str, Any]) -> str:
    """How the good and the bad replies of a stage are weighed, in one line."""
    known = [f"{key} {short(found[key])}" for key in balance.KEYS if found[key] is not None]
    if found["good"] is None:
        later = " and ".join(key for key in balance.KEYS if found[key] is None)
        return f"{name}: " + ", ".join([*known, *([f"{later} by the rows, when it runs"] if later else [])])
    return f"{name}: {', '.join(known)}, for {found['good']:,} good and {found['bad']:,} bad replies"


def say_processes(recipe: Recipe, console: Console) -> None:
    """Print by how many processes stages are trained, a line for those of which the same is to be said."""
    alike: dict[str, list[str]] = {}  # the names of stages, by Accelerate's keys
    for name in recipe.stages:
        if keys := recipe.launch_of(name):
            alike.setdefault(repr(keys), []).append(name)
    lines: dict[str, list[str]] = {}
    for names in alike.values():
        number, machines = recipe.processes(names[0]), recipe.launch_of(names[0]).get("num_machines", 1)
        said = f"{number} process{'es' * (number != 1)}" + (f" on {machines} machines" if machines > 1 else "")
        try:
            require_devices(recipe, names)
        except InputError as error:
            said += f"; `run` refuses that here: {error.message}"
        lines.setdefault(said, []).extend(names)
    for said, names in lines.items():
        console.print(Text(f"{', '.join(names)}: trained by {said}"), highlight=False, soft_wrap=True)


def columns(used_as: dict[str, str | None]) -> str:
    """What became of each column of rows, in one line."""
    used = [f"{name} ({use})" for name, use in used_as.items() if use is not None]
    left = [name for name, use in used_as.items() if use is None]
    return f"columns: {', '.join(used) or 'none'}" + (f"; not used: {', '.join(left)}" if left else "")


def intentions(
    plans: list[StagePlan],
    wanted: ToDo,
    shapes: dict[str, list[dict[str, Any]]],
    weights: dict[str, dict[str, Any]],
    remote_code: str | None,
    console: Console,
) -> None:
    """Print what a run would do and why, and how its data are read.

    Args:
        plans: every stage.
        wanted: what `run` would do.
        shapes: from `plan.shapes`.
        weights: from `plan.class_weights`.
        remote_code: the model whose own code would be run; None where none would.
        console: where to.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "kind", "from", "state", "run will", "why"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        start = " + ".join(outside.said_of_parents(plan.parents))
        state = f"[{STYLES.get(plan.state, 'default')}]{plan.state}[/]"
        task = wanted.stages.get(plan.name, "nothing")
        members = plan.inputs.get("members")
        kind = f"{plan.kind}, {members} members" if members else plan.kind
        table.add_row(plan.name, kind, start, state, task, escape(_why(plan)))
    console.print(table)
    if wanted.compares:
        console.print("afterwards `run` compares the policies on the same prompts", soft_wrap=True)
    console.print()
    read = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    read.add_column("stage", no_wrap=True)
    for column in ("data", "read as"):
        read.add_column(column, overflow="fold")
    for plan in plans:
        for source in shapes[plan.name]:
            key = "" if source["key"] == "data" else f"{source['key']}: "
            path = str(source["path"])
            known = source["shape"] or "known once it is downloaded"
            if source["used_as"]:
                known += f"\n{columns(source['used_as'])}"
            read.add_row(
                plan.name, escape(key + (Path(path).name if Path(path).is_absolute() else path)), escape(known)
            )
    console.print(read)
    for name, found in weights.items():
        console.print(Text(_balance(name, found)), soft_wrap=True)
    if remote_code:
        console.print(
            f"trust_remote_code: code that comes with {remote_code} will be run", style="bold", soft_wrap=True
        )
