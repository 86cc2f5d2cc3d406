"""A model that ranks divide among them, by FSDP2: passes through it, and what its optimizer knows, in one piece."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from rlhf_pipeline import ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_divided(model: Any) -> bool:
    """Whether each rank has a part of a model, so that a pass through it takes all of them."""
    return isinstance(model, FSDPModule)


def divide(model: PeftModel) -> PeftModel:
    """Divide a model that each rank holds whole as training does, if that does; in place."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return model
    model = fsdp2_prepare_model(Accelerator(), model)
    with torch.no_grad():
        model(**_spare(model))  # the first pass has to be one through the whole
    return model


@contextlib.contextmanager
def in_step(model: Any) -> Iterator[Any]:
    """Let each rank make passes of its own through a divided model, whatever of, and as many as it wants, even none.

    A pass gathers the weights of one layer after the other, from all ranks. So each is announced, and a rank that is
    done makes passes over nothing until all are. Ranks must not tell each other anything else inside the block.

    Where a rank raises an exception, the others wait for it in vain, or find that it has ended.

    Args:
        model: a `PeftModel`; where it is not divided, it may be anything.

    Yields:
        What to pass through: the model itself where it is not divided.
    """
    if not is_divided(model):
        yield model
        return
    base = model.get_base_model()

    def announce(*_: Any) -> None:
        ranks.any_of(True)

    model.unshard()  # what is of no layer; passes through `base` gather the rest
    hook = base.register_forward_pre_hook(announce)
    try:
        yield base
    finally:
        hook.remove()
    with torch.no_grad():
        while ranks.any_of(False):
            base(**_spare(model))


def _spare(model: PeftModel) -> dict[str, Any]:
    """What a pass over nothing reads: one token."""
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device), "use_cache": False}


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer that Accelerate has prepared, by the names of parameters; empty but on the first rank.

    Each rank must take part.
    """
    return get_optimizer_state_dict(model, optimizer.optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer what `optimizer_state` returned, of any number of ranks; each must take part with all of it."""
    set_optimizer_state_dict(model, optimizer.optimizer, optim_state_dict=state, options=WHOLE)
