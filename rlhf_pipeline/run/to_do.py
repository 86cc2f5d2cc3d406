"""What `run` will do: the one answer, for the runner itself, for `plan`, and for people. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rlhf_pipeline import kinds, plan
from rlhf_pipeline.comparison import wanted as comparison
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.recipe import Recipe, gates
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record

Task = Literal[
    "train",
    "make rows",
    "resume",
    "take",
    "take, judge again",
    "judge again",
    "update record",
    "remove checkpoints",
    "stop: gate closed",
    "wait for people",
]
WAIT: Final = "wait for people"
RUNS = ("train", "make rows", "resume", "take, judge again", "judge again")  # those that need a worker


@dataclass(frozen=True)
class ToDo:
    """What a run has to do.

    Attributes:
        stages: the task of each stage that has one, in order; it ends at a closed gate, and where it waits for
            people.
        compares: whether it sends prompts through all policies afterwards.
    """

    stages: dict[str, Task]
    compares: bool


def find(
    recipe: Recipe,
    plans: Sequence[StagePlan],
    *,
    until: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
    trust_versions: bool = False,
    ignore_gates: bool = False,
) -> ToDo:
    """What `run` would do with these options.

    Args:
        recipe: the recipe.
        plans: from `plan.make`, with the same `trust_versions` and `ignore_gates`.
        until: stop after this stage; see `plan.select`.
        only: this stage alone.
        force: stages to train even if done.
        trust_versions: keep stages that other versions of the libraries made.
        ignore_gates: continue past closed gates.

    Raises:
        InputError: see `plan.select`.
    """
    directory = RunDirectory(recipe.run)
    chosen = plan.select(list(plans), until, only, list(force))
    taken = {stage.name for stage in chosen if stage.earlier}
    trained = {stage.name for stage in chosen} - taken
    found: dict[str, Task] = {}
    for stage in plans:
        if only in (None, stage.name):
            fresh = stage.name in force or trained.intersection(stage.parents.values())
            if stage.name in trained:
                if stage.state == "waiting" and not fresh:
                    found[stage.name] = WAIT
                    break
                anew: Task = "train" if kinds.get(stage.kind).trains else "make rows"
                found[stage.name] = "resume" if stage.state == "partial" and not fresh else anew
            elif stage.earlier and stage.name in taken:
                judged = stage.judging in (None, stage.earlier.record.judging)
                found[stage.name] = "take" if judged else "take, judge again"
            elif stage.state == GATE_CLOSED:
                found[stage.name] = "stop: gate closed"
                break
            elif stage.is_current and stage.needs_judging:
                found[stage.name] = "judge again"
            elif stage.is_current and settled(recipe, stage.name, stage.record, trust_versions, ignore_gates) != (
                stage.record
            ):
                found[stage.name] = "update record"
            elif stage.is_current and not recipe.keep_checkpoints and directory.work(stage.name).exists():
                found[stage.name] = "remove checkpoints"  # it was killed between its end and theirs
        if stage.name == until:
            break
    stops = not {"stop: gate closed", WAIT}.isdisjoint(found.values())
    has_policy = any(kinds.get(stage.kind).is_policy for stage in plans if stage.is_current or stage in chosen)
    compares = not stops and has_policy and (bool(chosen) or comparison.due(recipe.run, recipe) is not None)
    return ToDo(found, compares)


def settled(recipe: Recipe, name: str, record: Record, trust_versions: bool, ignore_gates: bool) -> Record:
    """A finished stage's record by its gates, and by what the user decided about gates and versions."""
    outcomes = gates.outcomes(recipe.stages[name].gates, record.metrics)
    closed = {metric: outcome["bound"] for metric, outcome in outcomes.items() if not outcome["passed"]}
    before = record.gates_ignored
    ignored = {metric: bound for metric, bound in closed.items() if ignore_gates or before.get(metric) == bound}
    error = None if ignored == closed else f"a gate is closed: {gates.describe(outcomes, record.metrics)}"
    changes = {
        "state": GATE_CLOSED if error else "done", "error": error, "gates": outcomes, "gates_ignored": ignored,
    }  # fmt: skip
    if trust_versions and plan.other_versions(record, plan.versions()):
        changes["trusted_versions"] = plan.versions()
    return record.updated(**changes)
