"""What a checkpoint of PPO holds beside the trainer's counters and random states, and how it is taken up again."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from transformers import Trainer, TrainerState

from rlhf_pipeline import ranks
from rlhf_pipeline.models.roles import TRAINED, SharedBase
from rlhf_pipeline.ppo.control import KLControl, ScoreStatistics


@dataclass
class PPOState(TrainerState):
    """The trainer's counters.

    Attributes:
        episode: how many episodes were trained on.
    """

    episode: int = 0


@dataclass
class Best:
    """The policy with the highest score within the KL budget.

    Attributes:
        step: how many updates it had.
        score, kl: means over the batch that it was measured on.
        weights: on the CPU.
    """

    step: int
    score: float
    kl: float
    weights: dict[str, Tensor]


@dataclass
class Memory:
    """What goes over from update to update beside weights and optimizer.

    Attributes:
        kl_control: the KL coefficient.
        score_statistics: of all scores so far.
        skipped_in_row, skipped_steps: optimizer steps that were skipped, since the last that was not and in all.
        best: the best policy so far; only with a KL budget.
        unreported: the numbers of updates that are not logged yet.
    """

    kl_control: KLControl
    score_statistics: ScoreStatistics = field(default_factory=ScoreStatistics)
    skipped_in_row: int = 0
    skipped_steps: int = 0
    best: Best | None = None
    unreported: list[dict[str, float]] = field(default_factory=list)


class Kept(Protocol):
    """What else a checkpoint keeps; see `stages.watch.Watcher`."""

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""

    def read(self, folder: Path) -> None:
        """Take it up from there."""


def write(folder: Path, shared: SharedBase, memory: Memory) -> None:
    """Write the trained roles' weights and the memory into a checkpoint's folder."""
    for role in TRAINED:
        save_file(weights(getattr(shared, role)), folder / f"{role}.safetensors")
    best = memory.best
    if best is not None:
        save_file(best.weights, folder / "best.safetensors")
    noted = {
        "frozen": shared.checksums(*shared.frozen),
        "kl_control": asdict(memory.kl_control),
        "score_statistics": asdict(memory.score_statistics),
        "skipped": [memory.skipped_in_row, memory.skipped_steps],
        "best": best and {"step": best.step, "score": best.score, "kl": best.kl},
        "unreported": memory.unreported,
    }
    (folder / "ppo_state.json").write_text(json.dumps(noted, indent=1))


def read(folder: Path, shared: SharedBase, memory: Memory) -> None:
    """Take up weights and memory from a checkpoint's folder; KL target and horizon stay as the settings have them.

    Raises:
        ValueError: it is of another reference or reward, or of weights of other shapes.
    """
    noted = json.loads((folder / "ppo_state.json").read_text())
    for role, checksum in shared.checksums(*shared.frozen).items():
        if noted["frozen"].get(role) != checksum:
            raise ValueError(f"its {role} is not the one of this run")
    for role in TRAINED:
        put_back(getattr(shared, role), load_file(folder / f"{role}.safetensors"), role)
    memory.kl_control.coefficient = noted["kl_control"]["coefficient"]
    memory.score_statistics = ScoreStatistics(**noted["score_statistics"])
    memory.skipped_in_row, memory.skipped_steps = noted["skipped"]
    memory.unreported = noted["unreported"]
    if noted["best"]:
        memory.best = Best(**noted["best"], weights=load_file(folder / "best.safetensors"))


def random_states(trainer: Trainer) -> dict[str, bytes]:
    """The files with the random states of all ranks, by the names that Transformers gives them."""
    with TemporaryDirectory() as folder:
        trainer._save_rng_state(folder)
        own = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return {name: content for one in ranks.gathered(own) for name, content in one.items()}


def ranks_of(folder: Path) -> int:
    """How many ranks have their random states in a checkpoint's folder."""
    return len(list(folder.glob("rng_state*.pth")))


def weights(view: Module) -> dict[str, Tensor]:
    """A copy of the weights of a role that train, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _trained(view).items()}


def put_back(view: Module, former: dict[str, Tensor], role: str = "policy") -> None:
    """Overwrite the weights of a role that train.

    Raises:
        ValueError: they are not the same weights.
    """
    ours = _trained(view)
    if {name: one.shape for name, one in ours.items()} != {name: one.shape for name, one in former.items()}:
        raise ValueError(f"these are not the weights of this {role}: names or shapes differ")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(former[name])


def _trained(view: Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in view.named_parameters() if parameter.requires_grad}
