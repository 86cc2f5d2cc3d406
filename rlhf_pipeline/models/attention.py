"""What computes attention: whether this machine has it, and what else does where a run came from another one.

All of them compute the same up to rounding. Padding on the left, which sampling has, is right with each: the mask says
where it is, and Flash Attention takes it out before it computes.
"""

import importlib.util

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import base
from rlhf_pipeline.recipe.schema import Model

PLACE = "model.attention"
_OTHERWISE = f"`{PLACE}: auto` takes what comes with PyTorch; it computes the same up to rounding"
# The packages, of which one is enough. Where Flash Attention itself is not installed, Transformers takes the build that
# `kernels` fetches from the hub.
_PACKAGES = {"flash_attention_2": ("flash_attn", "kernels"), "flash_attention_3": ("flash_attn_interface", "kernels")}

# https://github.com/Dao-AILab/flash-attention: Ampere and later; of version 3, Transformers says so
# (modeling_flash_attention_utils.py, `cuda_min_major_version`), though it is made for Hopper (9.0).
_LEAST_CAPABILITY = (8, 0)


def require(spec: Model, config: PretrainedConfig) -> None:
    """See that a recipe's `model.attention` can be had here, with its model.

    Args:
        spec: the recipe's `model`.
        config: from `base.load_config`; a model can be made of it.

    Raises:
        InputError: the GPU, the precision or a package is not what it needs; the model has no such attention; or it
            fails on a small model of the same width of heads.
    """
    if spec.attention == "auto":
        return
    if problem := missing(spec):
        raise InputError(problem, place=PLACE, hint=_OTHERWISE)
    try:
        with torch.device("meta"):
            base.from_config(spec, config, attn_implementation=spec.attention)
    except Exception as error:  # Transformers and its models refuse it in many ways
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"this model does not take `{spec.attention}`: {said}"
        raise InputError(message, place=PLACE, hint=_OTHERWISE) from None
    if spec.needs_kernel:
        _try(spec, config)


def missing(spec: Model) -> str | None:
    """What this machine lacks for a recipe's `model.attention`, in one sentence; None where it has all."""
    name = spec.attention
    if not spec.needs_kernel:
        return None
    if not torch.cuda.is_available():
        return f"`{name}` needs an NVIDIA GPU, and PyTorch finds none here"
    capability = torch.cuda.get_device_capability()
    if "flash" in name and capability < _LEAST_CAPABILITY:
        has, least = (".".join(map(str, one)) for one in (capability, _LEAST_CAPABILITY))
        return f"`{name}` needs a GPU of compute capability {least}, and {torch.cuda.get_device_name()} has {has}"
    if "flash" in name and base.resolve_dtype(spec.dtype) == torch.float32:
        return f"`{name}` computes in 16 bits, and `model.dtype` is {spec.dtype}, which is float32 here"
    packages = _PACKAGES.get(name, ("kernels",))
    if not any(importlib.util.find_spec(package) for package in packages):
        return f"`{name}` needs the package {' or '.join(f'`{one}`' for one in packages)}, which is not installed"
    return None


def available(spec: Model) -> tuple[Model, str | None]:
    """A model as it can be loaded here, also where a run came from a machine that has more.

    Args:
        spec: the recipe's `model`.

    Returns:
        The model, with the attention that it has by itself where this machine lacks the recipe's; and what to say then.
    """
    problem = missing(spec)
    if problem is None:
        return spec, None
    other = spec.model_copy(update={"attention": "auto"})
    return other, f"{problem}: PyTorch's attention is used instead, which computes the same up to rounding"


def _try(spec: Model, config: PretrainedConfig) -> None:
    """Compute with it on a model of one layer: of two rows, one padded on the left.

    Raises:
        InputError: it fails, as with a build for another version of PyTorch.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 64)
    small = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=width,
    )  # fmt: skip
    ids = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]], device=base.device())
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model = LlamaForCausalLM._from_config(
                small, attn_implementation=spec.attention, dtype=base.resolve_dtype(spec.dtype)
            )
            model.to(ids.device)(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
    except Exception as error:  # a kernel's own, of any type
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"`{spec.attention}` does not work here: {said}", place=PLACE, hint=_OTHERWISE) from None
