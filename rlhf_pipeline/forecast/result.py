"""What a forecast says: stages, their phases, and the parts of each phase, in bytes. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

from rlhf_pipeline.rundir.words import memory

Part = Literal["weights", "gathered", "adapters", "optimizer", "activations", "logits", "cache", "engine", "overhead"]
PARTS: tuple[Part, ...] = get_args(Part)
# In the order in which a stage comes to them.
PHASES = ("load", "sampling", "scoring", "backward", "optimizer", "evaluation", "judging")


def not_counted(keys: Sequence[str]) -> str:
    """What is said of keys of `launch` by which a process holds less than is forecast."""
    return f"what {' and '.join(f'`{key}`' for key in keys)} saves is not counted"


@dataclass(frozen=True)
class Phase:
    """What a stage does, and what it holds while it holds most.

    Attributes:
        name: one of `PHASES`.
        parts: bytes by what they are for; gradients count as the optimizer's.
    """

    name: str
    parts: dict[Part, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Change:
    """A setting that saves memory.

    Attributes:
        overrides: keys of the recipe and new values, as the command line takes them.
        peak: bytes of the stage's peak then, with the changes before it.
        costs: what it costs.
    """

    overrides: dict[str, Any]
    peak: int
    costs: str


@dataclass(frozen=True)
class StageForecast:
    """One stage.

    Attributes:
        name, kind: of the stage.
        phases: those that it has, in their order.
        prompt_tokens, whole_tokens: how long the longest prompt, and a prompt with its reply, are taken to be.
        batch_size: `per_device_train_batch_size`, or the `batch_size` of a stage that samples; None where it has none.
        largest_batch: the largest that fits on the card; 0 where none does, None where no card is asked about.
        changes: what to change where it does not fit, one after the other until it does, or nothing is left.
        notes: what the forecast does not know, or took for granted.
        engine_share: the share of the card that an engine of its own takes while it samples; see `on`.
        divided_by: the key of `launch` by which processes divide what they hold; None without.
        processes: how many train it; all numbers are of one of them.
        uncounted: keys of `launch` by which a process holds less than is said here.
    """

    name: str
    kind: str
    phases: tuple[Phase, ...]
    prompt_tokens: int
    whole_tokens: int
    batch_size: int | None
    largest_batch: int | None = None
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    engine_share: float = 0.0
    divided_by: str | None = None
    processes: int = 1
    uncounted: tuple[str, ...] = ()

    def on(self, usable: int | None) -> "StageForecast":
        """The same on a card, where an engine takes its share of that while it samples."""
        if usable is None or not self.engine_share:
            return self
        taken: dict[Part, int] = {"engine": round(self.engine_share * usable)}
        phases = [replace(one, parts=one.parts | taken) if one.name == "sampling" else one for one in self.phases]
        return replace(self, phases=tuple(phases))

    @property
    def highest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes at the peak of the stage, what CUDA itself takes among them."""
        return self.highest.total

    @property
    def allocated(self) -> int:
        """The same as `torch.cuda.max_memory_allocated` counts it: without what CUDA itself takes."""
        return max(phase.total - phase.parts.get("overhead", 0) for phase in self.phases)

    def in_short(self, usable: int | None) -> dict[str, Any]:
        """What `plan --json` says of it, with a card's bytes."""
        fits = None if usable is None else self.peak <= usable
        return {"peak": self.peak, "phase": self.highest.name, "fits": fits}

    def without_advice(self) -> "StageForecast":
        """The same for any card."""
        phases = [
            replace(one, parts={part: n for part, n in one.parts.items() if part != "engine"}) for one in self.phases
        ]
        return replace(self, phases=tuple(phases), largest_batch=None, changes=())

    @property
    def way_out(self) -> str:
        """Where it does not fit."""
        if self.uncounted:
            return not_counted(self.uncounted)
        return "`rlhf-pipeline forecast` says what to change"

    def phase(self, name: str) -> Phase | None:
        """One phase; None where the stage has no such."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclass(frozen=True)
class Forecast:
    """A recipe's.

    Attributes:
        card: the GPU that is asked about, in words.
        usable: its bytes for a process; None where none is asked about.
        stages: of the recipe, in its order, those that hold a model.
        notes: what concerns all of them.
        advised: whether the largest batches, and changes where a stage does not fit, were looked for.
    """

    card: str
    usable: int | None
    stages: tuple[StageForecast, ...]
    notes: tuple[str, ...] = field(default=())
    advised: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether all stages do; None where no card is asked about."""
        return None if self.usable is None else all(stage.peak <= self.usable for stage in self.stages)

    @property
    def highest(self) -> StageForecast | None:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.peak, default=None)

    @property
    def doubts(self) -> list[str]:
        """A sentence on each stage that does not fit."""
        return [
            f"stages.{stage.name} is forecast to take {memory(stage.peak)} in {stage.highest.name}, and {self.card} "
            f"has {memory(self.usable)}: {stage.way_out}"
            for stage in self.stages
            if self.usable is not None and stage.peak > self.usable
        ]

    def as_json(self) -> dict[str, Any]:
        """For scripts; docs/json.md has its keys."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self))) | {"fits": self.fits}  # with lists for tuples
        for stage, one in zip(self.stages, found["stages"], strict=True):
            one |= {"peak": stage.peak, "allocated": stage.allocated, "peak_phase": stage.highest.name}
            one["fits"] = None if self.usable is None else stage.peak <= self.usable
            for phase, shown in zip(stage.phases, one["phases"], strict=True):
                shown["total"] = phase.total
        return found

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """What `as_json` said."""
        stages = []
        for one in said["stages"]:
            phases = tuple(Phase(phase["name"], phase["parts"]) for phase in one["phases"])
            changes = tuple(Change(change["overrides"], change["peak"], change["costs"]) for change in one["changes"])
            names = ("name", "kind", "prompt_tokens", "whole_tokens", "batch_size", "largest_batch", "engine_share",
                     "divided_by", "processes")  # fmt: skip
            own = {name: one[name] for name in names}
            stages.append(StageForecast(**own, phases=phases, changes=changes, notes=tuple(one["notes"]),
                                        uncounted=tuple(one["uncounted"])))  # fmt: skip
        return cls(said["card"], said["usable"], tuple(stages), tuple(said["notes"]), said["advised"])
