"""A model that ranks have divided among them, by FSDP2: what its optimizer knows, in one piece."""

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer that Accelerate has prepared, by the names of parameters; empty but on the first rank.

    Each rank must take part.
    """
    return get_optimizer_state_dict(model, optimizer.optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer what `optimizer_state` returned, of any number of ranks; each must take part with all of it."""
    set_optimizer_state_dict(model, optimizer.optimizer, optim_state_dict=state, options=WHOLE)
