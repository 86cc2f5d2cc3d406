"""Layers that are no plain linear ones though they look so: routers, and those whose weight is read past an adapter."""

import inspect
import re
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The classes of routers in Transformers: `MixtralTopKRouter`, `JetMoeTopKGating`, `HunYuanMoEV1Gate`.
_ROUTER_CLASS = re.compile(r"Router|TopK|MoE.*Gat(e|ing)")
_ROUTER_NAMES = ("router", "router_gate")
_GATE = "gate"  # of a mixture in a model's own code; a layer of that name elsewhere is none
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LINEAR = (torch.nn.Linear, Conv1D)


def untouched(model: PreTrainedModel) -> list[str]:
    """The linear layers that `all-linear` does not mean, and that stay as they are in a quantized base.

    Routers: they are a few numbers for each expert, a rounded one sends tokens elsewhere, and some return a tuple. What
    a subclass of `nn.Linear` computes otherwise. And in Mamba's mixers, the layers whose weight the mixer reads itself
    to pass it to a kernel: there an adapter would do nothing, and packed weights would be taken for numbers.

    Args:
        model: with or without weights, and before or after adapters were added.

    Returns:
        Their names.
    """
    config = model.config.get_text_config()
    experts = {value for name in _EXPERTS if isinstance(value := getattr(config, name, None), int)}
    found, routers = [], set[str]()
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if parent in routers or own in _ROUTER_NAMES or _ROUTER_CLASS.search(type(module).__name__):
            routers.add(name)
        if not isinstance(module, _LINEAR):
            continue
        if (
            name in routers
            or (own == _GATE and getattr(module, "out_features", None) in experts)
            or _computes_otherwise(module.__class__)
            or _is_read_past(model.get_submodule(parent), own)
        ):
            found.append(name)
    return found


def _computes_otherwise(layer: Any) -> bool:
    """Whether a class of layers computes something else than `nn.Linear`, by trying one: Falcon's does not."""
    own = (torch.nn.Linear, Conv1D, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if layer.forward in [one.forward for one in own]:
        return False
    plain: Any = torch.nn.Linear(3, 2, device="cpu")
    states = torch.tensor([[0.5, -2.0, 4.0]], device="cpu")
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]], device="cpu"))
        plain.bias.copy_(torch.tensor([0.5, 1.5], device="cpu"))
        expected = plain(states)
        plain.__class__ = layer
        try:
            return not torch.allclose(plain(states), expected)
        except Exception:  # it wants what a linear layer does not have
            return True


def _is_read_past(mixer: torch.nn.Module, name: str) -> bool:
    """Whether a Mamba mixer reads the weight of one of its layers itself, other than to ask for its dtype or device."""
    if not (hasattr(mixer, "A_log") and hasattr(mixer, "conv1d")):
        return False
    reads = rf"self\.{name}\.weight\b(?!\s*\.\s*(dtype|device|shape))"
    return re.search(reads, _source(type(mixer))) is not None


def gives_router_loss(model: PreTrainedModel) -> bool:
    """Whether a causal LM computes the loss that has its routers spread tokens evenly; by far not all mixtures do."""
    return "load_balancing_loss_func(" in _source(type(model).forward)


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # of what no file has
        return ""
