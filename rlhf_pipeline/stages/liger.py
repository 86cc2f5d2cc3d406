"""Liger's kernels for a model's layers, `use_liger_kernel`: which stages can have them, and what they need."""

import importlib.util
from typing import Any

import torch
import trl
from transformers import PretrainedConfig
from trl.trainer import utils as trl_utils

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Kind

KEY, OPTIONS, FUSED_LOSS = "use_liger_kernel", "liger_kernel_config", "fused_linear_cross_entropy"
# Since TRL computes its losses by a fused head of its own, it takes from Liger the kernels of layers alone.
LAYERS_ALONE = hasattr(trl_utils, "add_fused_lm_head")


def options(kind: Kind, given: dict[str, Any]) -> dict[str, Any] | None:
    """What Liger shall do in a stage; None for what it does by itself.

    Args:
        kind: the stage's.
        given: its `trainer`.
    """
    asked: dict[str, Any] | None = given.get(OPTIONS)
    if kind.makes == "reward":  # Liger takes any model of a known type for one that writes, and replaces its forward
        return {FUSED_LOSS: False, **(asked or {})}
    return asked


def is_here() -> bool:
    """Whether this machine has a GPU for it, and the package."""
    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def require(kind: Kind, given: dict[str, Any], config: PretrainedConfig, place: str) -> None:
    """See that a stage can have Liger's kernels where it asks for them.

    Args:
        kind: the stage's.
        given: its `trainer`.
        config: from `base.load_config`.
        place: the recipe's key, `stages.NAME.trainer`.

    Raises:
        InputError: there is no GPU or no package, TRL's loss would not be ours, or nothing would change.
    """
    if not given.get(KEY):
        return
    place, hint = f"{place}.{KEY}", "remove it"
    # Losses that compare with a reference leave out, with Liger, what is weighed here: parts of a batch, good and bad
    # replies.
    if not LAYERS_ALONE and kind.keeps_reference:
        raise InputError(
            f"with TRL {trl.__version__}, Liger replaces the loss of {kind.title} by one that is not weighed as here",
            place=place,
            hint="remove it, or take a newer TRL, which has Liger compute the layers alone",
        )
    if (given.get(OPTIONS) or {}).get(FUSED_LOSS) and kind.makes == "reward":
        said = "the loss of a reward model is not over words, and Liger would put that in its place"
        raise InputError(said, place=place.replace(KEY, f"{OPTIONS}.{FUSED_LOSS}"), hint=hint)
    if not torch.cuda.is_available():
        raise InputError(f"`{KEY}` needs an NVIDIA GPU, and PyTorch finds none here", place=place, hint=hint)
    if importlib.util.find_spec("liger_kernel") is None:
        said = f"`{KEY}` needs the package `liger-kernel`, which is not installed"
        raise InputError(said, place=place, hint="`pip install liger-kernel`, or remove it")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    if config.model_type not in KNOWN:
        said = f"Liger has no kernels for a model of type `{config.model_type}`: nothing would change"
        raise InputError(said, place=place, hint=hint)
