"""The state of a run and of its stages: the one reading of what a run directory says. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.rounds import sources_of
from rlhf_pipeline.recipe.schema import OF_STAGE
from rlhf_pipeline.recipe.yaml import parse_document
from rlhf_pipeline.rundir import waiting
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.labels import LABELS
from rlhf_pipeline.rundir.layout import CHOICES, RECIPE, RECORD, Progress, RunDirectory
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record
from rlhf_pipeline.rundir.words import machines

State = Literal[
    "done", "done, gate closed", "done, to be judged again",
    "stale", "partial", "failed", "missing", "blocked", "running", "waiting",
]  # fmt: skip
UP_TO_DATE = "up to date"  # the reason of a stage that is done and of which nothing else is to be said
STOPPED_EARLY = "stopped before its first checkpoint"  # the reason of one that somebody stopped too early to resume it
DONE = ("done", GATE_CLOSED, "done, to be judged again")  # those in which nothing is to be trained


@dataclass
class StageState:
    """One stage, and what there is of it.

    Attributes:
        name: the stage's.
        kind: what it does.
        parents: the stage, or `base`, that it has in each role, as its kind needs: `init`, `reward`.
        state: `done` needs nothing; `done, gate closed` was trained to its end and does not pass its gates;
            `done, to be judged again` was judged by other settings than the recipe's, which only a plan knows; `stale`
            was made, or begun, with other inputs; `partial` was interrupted and can be resumed; `failed` was
            interrupted and has to be retrained from the start; `missing` never ran; `blocked` waits for a stage that is
            partial, failed or waiting, or whose gate is closed; `running` is at work now, or waits for other machines;
            `waiting` waits for people.
        reason: why it is in that state, as old → new values where something changed.
        record: its record; an empty one where there is none.
        is_current: its artifact is whole and was built on the weights that are there now, whatever its gates, and those
            of the stages that it needs, say.
        progress: from where it can be resumed, if it is partial.
        until: of a stage that people do, when they have labelled enough, as the recipe's `until` has it.
        people: and whose labels count, as its `people` has it.
        left_out: the names of those whose labels do not count.
    """

    name: str
    kind: str
    parents: dict[str, str]
    state: State = "missing"
    reason: str = ""
    record: Record = field(default_factory=Record)
    is_current: bool = False
    progress: Progress | None = None
    until: Any = None
    people: Any = None
    left_out: list[str] = field(default_factory=list)


@dataclass
class RunState:
    """A run directory.

    Attributes:
        path: the run directory.
        stages: in the recipe's order; where no recipe can be read, in the order in which they began.
        is_locked: whether a run is going on there.
        recipe: what its `recipe.yaml` holds; nothing where that cannot be read.
        recipe_problem: `is missing` or `cannot be read`; None where it can.
    """

    path: Path
    stages: list[StageState]
    is_locked: bool
    recipe: dict[str, Any]
    recipe_problem: str | None

    @property
    def state(self) -> Literal["running", "failed", "gate closed", "waiting", "done", "unfinished"]:
        """The state of the run as a whole."""
        states = {stage.state for stage in self.stages}
        if self.is_locked:
            return "running"
        if "failed" in states:
            return "failed"
        if GATE_CLOSED in states:
            return "gate closed"
        if "waiting" in states:
            return "waiting"
        return "done" if states == {"done"} else "unfinished"

    def stage(self, name: str) -> StageState | None:
        """The stage of that name; None where there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read(run: Path, by_size: bool = False) -> RunState:
    """Read a run directory in whatever condition it is; nothing is raised of what is missing or broken.

    A stage's parents and kind are those of its record; of one without a record, what the run's recipe says.

    Args:
        run: the run directory.
        by_size: of artifacts look at the sizes of files alone, which takes no time, and not at what they hold.
    """
    directory = RunDirectory(run)
    is_locked = directory.is_locked()
    recipe, problem = read_recipe(run)
    names = stage_names(directory, recipe)
    at_work = stage_at_work(directory, names) if is_locked else None
    return RunState(run, read_stages(directory, recipe, names, at_work, by_size), is_locked, recipe, problem)


def read_recipe(run: Path) -> tuple[dict[str, Any], str | None]:
    """What a run's `recipe.yaml` holds, and what is wrong with it."""
    file = run / RECIPE
    if not file.exists():
        return {}, "is missing"
    try:
        content = parse_document(file.read_text(encoding="utf-8"), file.name)[0]
    except (InputError, OSError, ValueError, RecursionError):
        content = None
    return (content, None) if isinstance(content, dict) else ({}, "cannot be read")


def stage_names(directory: RunDirectory, recipe: dict[str, Any]) -> list[str]:
    """The stages of a run: those of its recipe, then others that have begun, the earliest first."""
    planned = recipe.get("stages")
    others = {name: (directory.record(name) or Record()).started_at or "" for name in directory.begun()}
    in_order = sorted(others, key=lambda name: (others[name], name))
    return list(dict.fromkeys([*(str(name) for name in planned), *in_order] if isinstance(planned, dict) else in_order))


def stage_at_work(directory: RunDirectory, names: Sequence[str]) -> str | None:
    """The stage that a run which is going on is at: the last one that was recorded as running; None where none was."""
    running = {}
    for name in names:
        if (directory.record(name) or Record()).state == "running":
            file = directory.stage(name) / RECORD
            running[name] = file.stat().st_mtime_ns if file.exists() else 0
    return max(running, key=lambda name: running[name], default=None)


def read_stages(
    directory: RunDirectory, recipe: dict[str, Any], names: Sequence[str], at_work: str | None, by_size: bool = False
) -> list[StageState]:
    """The state of each stage; see `read`.

    Args:
        directory: the run directory.
        recipe: from `read_recipe`.
        names: from `stage_names`.
        at_work: the stage that is at work now, if one is.
        by_size: see `read`.
    """
    digests = None if by_size else FileDigests()
    planned = recipe.get("stages")
    found: dict[str, StageState] = {}

    def visit(name: str, children: tuple[str, ...]) -> None:
        """Find a stage's state, after those of its parents."""
        if name in found or name in children:
            return
        own = planned.get(name) if isinstance(planned, dict) else None
        stage = _described(directory, name, own if isinstance(own, dict) else {})
        for parent in stage.parents.values():
            if parent in names:
                visit(parent, (*children, name))
        gone = [f"{parent} is gone" for parent in stage.record.parent_weights if parent not in names]
        parents = [found[parent] for parent in stage.parents.values() if parent in found]
        try:
            find_state(stage, parents, directory, digests, at_work, gone)
        except InputError as error:
            stage.state, stage.reason = "failed", str(error)
        if stage.state == "done" and stage.record.closed_gate:
            stage.state, stage.reason = GATE_CLOSED, stage.record.closed_gate
        found[name] = stage

    for name in names:
        visit(name, ())
    return [found[name] for name in names]


def _described(directory: RunDirectory, name: str, planned: dict[str, Any]) -> StageState:
    """A stage with its record, or what the recipe plans of it."""
    record = directory.record(name)
    until, people = planned.get("until"), planned.get("people")
    if record is not None:
        return StageState(name, record.kind or name, record.parents, record=record, until=until, people=people)
    inits = planned.get("init") or []
    named: dict[str, list[Any]] = {"init": inits if isinstance(inits, list) else [inits], kinds.ROWS: _rows_of(planned)}
    judge = planned.get("judge")
    if isinstance(judge, dict) and isinstance(judge.get("model"), str):
        named["judge"] = [judge["model"]] if ":" not in judge["model"] else []
    parents = {role: str(planned[role]) for role in kinds.ROLES if planned.get(role) and role not in named}
    for role, names in named.items():
        parents |= {kinds.numbered(role, number): str(one) for number, one in enumerate(names, 1)}
    rewards = planned.get("rewards")
    stages = [one["stage"] for one in rewards if isinstance(one, dict) and one.get("stage")] if rewards else []
    parents |= {kinds.numbered("reward", number): str(stage) for number, stage in enumerate(stages, 1)}
    return StageState(name, str(planned.get("kind") or name), parents, until=until, people=people)


def _rows_of(planned: dict[str, Any]) -> list[str]:
    """The stages whose rows a stage of a resolved recipe reads."""
    paths = [str(source.get("path")) for key in kinds.DATA_KEYS for source in sources_of(planned.get(key))]
    return list(dict.fromkeys(path.removeprefix(OF_STAGE) for path in paths if path.startswith(OF_STAGE)))


def find_state(
    stage: StageState,
    parents: Sequence[StageState],
    directory: RunDirectory,
    digests: FileDigests | None,
    at_work: str | None,
    changes: Sequence[str] = (),
) -> None:
    """Fill in `state`, `reason`, `is_current` and `progress` of a stage, its gates apart.

    Args:
        stage: it, with its record.
        parents: the stages that it needs, whose states are known.
        directory: the run directory.
        digests: tells what files hold; None to look at their sizes alone.
        at_work: the stage that is at work now, if one is.
        changes: how its inputs differ from what they were, as far as its parents do not tell.

    Raises:
        InputError: a file of its artifact, its labels, or what the recipe says of these cannot be read.
    """
    if stage.name == at_work:
        absent = directory.absent_machines()
        stage.state, stage.reason = "running", f"waits for {machines(absent)}" if absent else "at work now"
    elif stage.record.is_finished:
        stage.state, stage.reason = _of_finished(stage, parents, directory, digests, changes)
        if stage.state == "done" and stage.until is not None:
            stage.state, stage.reason = _by_labels(stage, directory)
        stage.is_current = stage.state == "done"
    else:
        stage.state, stage.reason = _of_unfinished(stage, parents, directory, changes)
    held_up = _held_up(parents)
    if held_up and stage.state not in ("running", "failed"):
        stage.state, stage.reason, stage.progress = "blocked", held_up, None


def _of_finished(
    stage: StageState,
    parents: Sequence[StageState],
    directory: RunDirectory,
    digests: FileDigests | None,
    changes: Sequence[str],
) -> tuple[State, str]:
    """The state of a stage that was trained to its end."""
    waits_for = _waiting_for(parents)
    if waits_for:
        return "blocked", waits_for
    problem = directory.artifact_problem(stage.name, stage.record, digests)
    if problem:
        return "missing" if problem.endswith("is gone") else "stale", problem
    if changes:
        return "stale", "; ".join(changes)
    rerun = [parent.name for parent in parents if not parent.is_current]
    if rerun:
        return "stale", f"{' and '.join(rerun)} will run again"
    other = _ran_again(stage.record, parents)
    if other:
        return "stale", f"{' and '.join(other)} ran again"
    return "done", UP_TO_DATE


def _of_unfinished(
    stage: StageState, parents: Sequence[StageState], directory: RunDirectory, changes: Sequence[str]
) -> tuple[State, str]:
    """The state of a stage that has no artifact yet."""
    record = stage.record
    unreadable = directory.unreadable(stage.name)
    if unreadable:
        return "failed", unreadable
    waits_for = _waiting_for(parents)
    if not record.model_fields_set:
        return ("blocked", waits_for) if waits_for else ("missing", "has not run yet")
    waited = record.state == "waiting"
    happened = (
        "it waited for labels"
        if waited
        else "stopped"
        if record.stopped
        else record.error or "the run ended before the stage did"
    )
    changes = [*changes, *(f"{parent.name} will run again" for parent in parents if not parent.is_current)]
    changes += [f"{name} ran again" for name in _ran_again(record, parents)]
    if changes:
        return "stale", "; ".join([*changes, f"before that, {happened}"])
    stage.progress = directory.progress(stage.name)
    if waited and stage.progress:
        labelled = waiting.of_stage(directory, stage.name, stage.until, stage.people)
        stage.left_out, happened = sorted(labelled.left_out), labelled.progress.text
        if not labelled.progress.reached:
            stage.progress = None
            return "waiting", happened
    if stage.progress:
        return "partial", f"{happened}; {stage.progress}"
    damaged = directory.damaged(stage.name)
    if record.stopped and not damaged:
        return "failed", STOPPED_EARLY
    return "failed", "; ".join([happened, *(f"{name} is damaged: {why}" for name, why in damaged.items())])


def _by_labels(stage: StageState, directory: RunDirectory) -> tuple[State, str]:
    """The state of a finished stage that people did, by the labels that there are now."""
    labelled = waiting.of_stage(directory, stage.name, stage.until, stage.people)
    stage.left_out = sorted(labelled.left_out)
    before, now = stage.record.metrics.get("label/labels"), labelled.progress.labels
    if not labelled.labels:
        if stage.record.taken_from or not before:  # the people of another run made them
            return "done", UP_TO_DATE
        return "done", f"none of the {before} labels that its rows were made of is in {LABELS} any more"
    if not labelled.progress.reached:
        return "waiting", f"{labelled.progress.text}; its former rows stay until then"
    _, digest = stage.record.artifact_files.get(CHOICES, (0, ""))
    if digest == labelled.digest:
        return "done", UP_TO_DATE
    return "stale", "labels have changed" if before == now else f"labels {before} → {now}"


def _ran_again(record: Record, parents: Sequence[StageState]) -> list[str]:
    """The parents whose weights are no longer those that a stage was built on."""
    return [
        parent.name
        for parent in parents
        if parent.is_current and record.parent_weights.get(parent.name) not in (None, parent.record.weights)
    ]


def _waiting_for(parents: Sequence[StageState]) -> str | None:
    names = [
        parent.name
        for parent in parents
        if parent.state in ("partial", "failed", "waiting") or (parent.state == "blocked" and not parent.is_current)
    ]
    return f"waits for {' and '.join(names)}" if names else None


def _held_up(parents: Sequence[StageState]) -> str | None:
    """The parents that are whole, but after which no run goes on, as a gate of theirs or of one before is closed."""
    closed = [parent.name for parent in parents if parent.state == GATE_CLOSED]
    if closed:
        return f"waits for {' and '.join(closed)}, whose gate is closed"
    names = [parent.name for parent in parents if parent.state == "blocked" and parent.is_current]
    return f"waits for {' and '.join(names)}" if names else None
