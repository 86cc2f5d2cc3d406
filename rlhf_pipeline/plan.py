"""Recipe and run directory in, stages out: which will run, and why. No torch."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import BASE, Data, Recipe
from rlhf_pipeline.recipe.library_keys import WITHOUT_EFFECT_ON_RESULT
from rlhf_pipeline.run.directory import RunDirectory

State = Literal["done", "stale", "failed", "missing", "blocked", "running"]
LIBRARIES = ("trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "torch")


@dataclass
class StagePlan:
    """One stage as the plan sees it.

    Attributes:
        state: `done` needs nothing; `stale` is done with other inputs; `failed` broke off; `missing` never ran;
            `blocked` waits for a failed stage; `running` is at work now.
        reason: why it is in that state, as old → new values where something changed.
        inputs: everything that decides the stage's result.
        fingerprint: their hash.
        judging: what decides how its policy is judged; None where it is not.
        record: what the run directory says of the stage.
    """

    name: str
    kind: str
    state: State
    reason: str
    init: str
    reward: str | None
    inputs: dict[str, Any]
    fingerprint: str
    judging: dict[str, Any] | None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def to_judge(self) -> bool:
        """Whether the stage stands but its judgement is of other settings."""
        return self.state == "done" and self.judging is not None and self.record.get("judging") != self.judging

    def summary(self) -> dict[str, Any]:
        """The stage as `plan --json` and `status --json` show it."""
        record = self.record if self.state in ("done", "stale") else {}
        shown = asdict(self)
        del shown["record"], shown["inputs"], shown["judging"]
        return {
            **shown,
            "wall_s": record.get("wall_s"),
            "peak_memory_bytes": record.get("peak_memory_bytes"),
            "metrics": record.get("metrics", {}),
            "artifact": record.get("artifact"),
            "log": self.record.get("log"),
        }


def make(recipe: Recipe, at_work: bool | None = None) -> list[StagePlan]:
    """Compare a recipe with what its run directory holds.

    Args:
        recipe: from `recipe.load`.
        at_work: whether a run is going on there; by default the run directory's lock tells.

    Raises:
        InputError: a data file cannot be read.
    """
    directory = RunDirectory(recipe.run)
    digests = Digests(recipe.run / ".digests.json")
    busy = directory.is_locked() if at_work is None else at_work
    plans: dict[str, StagePlan] = {}
    for name, stage in recipe.stages.items():
        inputs = stage_inputs(recipe, name, plans, digests)
        fingerprint = _hash(json.dumps(inputs, sort_keys=True).encode())
        record = directory.record(name) or {}
        judging = judging_inputs(recipe, stage.kind, digests)
        plan = StagePlan(
            name, stage.kind, "missing", "", stage.init or BASE, stage.reward, inputs, fingerprint, judging, record
        )
        plan.state, plan.reason = _state(plan, plans, directory, busy)
        if plan.to_judge:
            plan.reason = "`evaluate` changed: it will be judged again"
        plans[name] = plan
    return list(plans.values())


def stage_inputs(recipe: Recipe, name: str, earlier: dict[str, StagePlan], digests: "Digests") -> dict[str, Any]:
    """Everything that decides a stage's result, as flat keys; where and how often things are written is left out."""
    stage = recipe.stages[name]
    inputs: dict[str, Any] = {
        "kind": stage.kind,
        "seed": recipe.seed,
        "model": digests.of_model(recipe.model.path),
        "model.quantization": recipe.model.quantization,
        "model.dtype": recipe.model.dtype,
        "init": earlier[stage.init].fingerprint if stage.init in earlier else BASE,
    }
    if stage.reward:
        inputs["reward"] = earlier[stage.reward].fingerprint
    inputs |= {f"lora.{key}": value for key, value in stage.lora.items()}
    inputs |= {f"trainer.{key}": value for key, value in stage.trainer.items() if key not in WITHOUT_EFFECT_ON_RESULT}
    inputs |= _data_inputs("data", stage.data, digests)
    if stage.ptx_data:
        inputs |= _data_inputs("ptx_data", stage.ptx_data, digests)
    return inputs


def judging_inputs(recipe: Recipe, kind: str, digests: "Digests") -> dict[str, Any] | None:
    """What decides `judge_mean` beside the weights; None for a stage that is not judged.

    Apart from the other inputs: when only these change, a stage is judged again, not trained again.
    """
    if recipe.evaluate is None or kind == "reward":
        return None
    settings = recipe.evaluate.model_dump(exclude={"data", "batch_size"})
    return settings | _data_inputs("data", recipe.evaluate.data, digests)


def _data_inputs(prefix: str, data: Data, digests: "Digests") -> dict[str, Any]:
    settings = {f"{prefix}.{key}": value for key, value in data.model_dump(exclude={"path"}).items()}
    return {prefix: digests.of_data(data.path), **settings}


def _state(plan: StagePlan, earlier: dict[str, StagePlan], directory: RunDirectory, busy: bool) -> tuple[State, str]:
    record = plan.record
    parents = [earlier[name] for name in (plan.init, plan.reward) if name in earlier]
    if record.get("state") == "running":
        return ("running", "at work now") if busy else ("failed", "the run ended before the stage did")
    if record.get("state") == "failed":
        return "failed", record.get("error") or "see its log"
    broken = [parent.name for parent in parents if parent.state in ("failed", "blocked")]
    if broken:
        return "blocked", f"waits for {' and '.join(broken)}"
    if record.get("state") != "done":
        unreadable = directory.stage(plan.name).exists()
        return "missing", "its record cannot be read" if unreadable else "has not run yet"
    if not (directory.stage(plan.name) / "adapter" / "adapter_model.safetensors").is_file():
        return "missing", "its adapter is gone"
    if record.get("fingerprint") != plan.fingerprint:
        return "stale", "; ".join(_changes(record.get("inputs", {}), plan)) or "its inputs changed"
    rerun = [parent.name for parent in parents if parent.state != "done"]
    if rerun:
        return "stale", f"{' and '.join(rerun)} will run again"
    return "done", "up to date"


def _changes(old: dict[str, Any], plan: StagePlan) -> list[str]:
    """What differs between the inputs of a record and those of now."""
    changes = []
    for key in sorted(old.keys() | plan.inputs.keys()):
        before, now = old.get(key), plan.inputs.get(key)
        if before == now:
            continue
        if key in ("init", "reward"):
            former, parent = plan.record.get(key), plan.init if key == "init" else plan.reward
            changes.append(f"{parent} changed" if former == parent else f"{key} {former} → {parent}")
        elif (isinstance(now, str) and "@" in now) or (isinstance(before, str) and "@" in before):
            changes.append(f"{key} changed: {_named(before)} → {_named(now)}")
        else:
            changes.append(f"{key} {_shown(before)} → {_shown(now)}")
    return changes


def _named(identity: Any) -> str:
    path, _, digest = str(identity).rpartition("@")
    return f"{path} ({digest[:8]})"


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)


def select(plans: list[StagePlan], until: str | None, only: str | None, force: list[str]) -> list[StagePlan]:
    """The stages that a run shall execute, in order.

    Args:
        plans: from `make`.
        until: stop after this stage.
        only: this stage alone.
        force: stages to run even if done; those that depend on them follow.

    Raises:
        InputError: a name is no stage of the recipe, or `only` needs a stage that is not done.
    """
    names = [plan.name for plan in plans]
    for option, given in (("--until", until), ("--only", only), *(("--force", name) for name in force)):
        if given is not None and given not in names:
            raise InputError(f"there is no stage `{given}`", place=option, hint=f"the stages are {', '.join(names)}")
    chosen: list[StagePlan] = []
    for plan in plans:
        parent_runs = any(other.name in (plan.init, plan.reward) for other in chosen)
        if plan.state != "done" or plan.name in force or parent_runs:
            chosen.append(plan)
        if plan.name == until:
            break
    if only is None:
        return chosen
    by_name = {plan.name: plan for plan in plans}
    for needed in (by_name[only].init, by_name[only].reward):
        if needed in by_name and by_name[needed].state != "done":
            raise InputError(
                f"stage `{only}` needs `{needed}`, which is {by_name[needed].state}",
                place="--only",
                hint=f"run `--until {only}` instead",
            )
    return [plan for plan in chosen if plan.name == only]


def versions() -> dict[str, str]:
    """The installed versions of the libraries that decide results, without importing them."""
    found = {}
    for name in ("rlhf-pipeline", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Digests:
    """Content digests of files, remembered by path, size and time of change.

    Args:
        memory: a JSON file to remember them in; used only if its folder exists.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            self.known: dict[str, list] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self.known = {}

    def of_data(self, path: str) -> str:
        """`path@digest` of a data file; of a hub dataset only its id, whose commit is not looked up."""
        return f"{Path(path).name}@{self._of_file(Path(path))}" if Path(path).is_file() else path

    def of_model(self, path: str) -> str:
        """`path@digest` of a model folder's weights, configuration and tokenizer; of a hub model its id."""
        if not Path(path).is_dir():
            return path
        files = sorted(
            file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".json", ".model", ".jinja")
        )
        digest = _hash("".join(f"{file.name}={self._of_file(file)}\n" for file in files).encode())
        return f"{Path(path).name}@{digest}"

    def _of_file(self, path: Path) -> str:
        state = path.stat()
        known = self.known.get(str(path))
        if known and known[:2] == [state.st_size, state.st_mtime_ns]:
            return known[2]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from None
        self.known[str(path)] = [state.st_size, state.st_mtime_ns, digest]
        if self.memory.parent.is_dir():
            self.memory.write_text(json.dumps(self.known, indent=1))
        return digest


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
