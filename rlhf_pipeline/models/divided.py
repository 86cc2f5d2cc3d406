"""A model that ranks divide among them: it is loaded whole by each, gets its adapters, and is divided for training."""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping

from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed


def by_fsdp() -> bool:
    """Whether FSDP2 divides what is trained in this process: so `accelerate launch` says."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def by_zero_3() -> bool:
    """Whether DeepSpeed's ZeRO-3 does."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and int(DeepSpeedPlugin().zero_stage) == 3


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Have Transformers load models whole inside the block: where one is divided at once, no adapter can be made."""
    before, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in one piece on the CPU, as they are updated: DeepSpeed computes with copies that may be in 16 bits.

    Where ranks have divided them, each must take part.
    """
    updated = {name: one for name, tensor in tensors.items() if (one := _as_updated(tensor)) is not None}
    with _gathered(tensor for name, tensor in tensors.items() if name not in updated):
        found = {**tensors, **updated}
        return {name: _in_one_piece(tensor.detach()).cpu().contiguous() for name, tensor in found.items()}


def _as_updated(tensor: Tensor) -> Tensor | None:
    """What an optimizer of DeepSpeed's updates in place of a weight, float32; None for what none updates."""
    if not hasattr(tensor, "_hp_mapping") and not (hasattr(tensor, "_z3_optimizer") and tensor.requires_grad):
        return None
    return importlib.import_module("deepspeed.utils").safe_get_full_fp32_param(tensor)


def _in_one_piece(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Have those of some tensors that are divided by ZeRO-3 in one piece inside the block, on all ranks."""
    divided = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not divided:
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(divided)
