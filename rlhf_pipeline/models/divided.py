"""A model that ranks divide among them: the first loads it whole, it gets its adapters, and is divided for training.

The others make it of weights that take no memory, and get their parts when it is divided.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from accelerate.utils import DeepSpeedPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed

from rlhf_pipeline import ranks


def by_fsdp() -> bool:
    """Whether FSDP2 divides what is trained in this process: so `accelerate launch` says."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def by_zero_3() -> bool:
    """Whether DeepSpeed's ZeRO-3 does."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and int(DeepSpeedPlugin().zero_stage) == 3


def first_alone_reads() -> bool:
    """Whether what divides a model gives all ranks the weights of the first one, so that no other needs to have them.

    FSDP2 does unless `fsdp_cpu_ram_efficient_loading` is false, and ZeRO-3 always.
    """
    efficient = str_to_bool(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"))
    return bool(efficient) if by_fsdp() else by_zero_3()


def from_first(load: Callable[[torch.device], PreTrainedModel]) -> PreTrainedModel:
    """Have the first rank alone load a model that is not divided yet; see `first_alone_reads`.

    The others wait for it, however long it reads.

    Args:
        load: loads it on a device: on the CPU, and on other ranks than the first on `meta`, where nothing is read.

    Returns:
        The model on the CPU. On other ranks its weights are zeros that take no memory until one is written to, and its
        buffers, which nothing divides, are those of the first.
    """
    loaded: list[PreTrainedModel] = []

    def read() -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
        loaded.append(load(torch.device("cpu")))
        dtypes = {name: parameter.dtype for name, parameter in loaded[0].named_parameters()}
        return dtypes, dict(loaded[0].named_buffers(remove_duplicate=False))

    dtypes, buffers = ranks.from_first(read)
    if ranks.is_first():
        return loaded[0]
    model = load(torch.device("meta"))
    zeros = {parameter: _zeros(parameter, dtypes[name]) for name, parameter in model.named_parameters()}
    for module in model.modules():
        module._parameters.update({name: zeros[one] for name, one in module._parameters.items() if one is not None})
    for name, buffer in buffers.items():
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._buffers[own] = buffer
    return model


def fit_for_fsdp(model: PreTrainedModel) -> None:
    """Take from a model what Accelerate looks for in vain.

    It wants a part of each buffer that is saved, and buffers have none; and a layer of each class that the model may be
    divided at, though the text model of one that reads pictures has none of those that do.
    """
    for module in model.modules():
        module._non_persistent_buffers_set.update(module._buffers)
    classes = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {*(model._no_split_modules or ())} & classes


def _zeros(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of the same shape that has room for one number."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)


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
