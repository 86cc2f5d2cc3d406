"""The experts of a mixture in 4 or 8 bits.

Transformers keeps all experts of a layer in a few parameters of three dimensions, and bitsandbytes quantizes linear
layers only, so that over nine tenths of a mixture's weights would stay as they are. Here such parameters are quantized
one by one as they are loaded, and made whole again for the length of one layer's computation.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from rlhf_pipeline.models.layers import untouched


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights of experts that are not linear layers: the module's name, the module, and the parameter's name."""
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False) if _is_expert(module, name)]
        for name in names:
            yield path, module, name


def _is_expert(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    if "Expert" not in type(module).__name__ or isinstance(module, nn.Linear) or parameter is None:
        return False
    return parameter.ndim >= 2 and "bias" not in name


@contextlib.contextmanager
def quantized_as_well() -> Iterator[None]:
    """While Transformers loads a model, have it quantize experts, too, but nothing that `layers.untouched` names."""
    ours = {"bitsandbytes_4bit": _FourBit, "bitsandbytes_8bit": _EightBit}
    usual = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in ours}
    auto.AUTO_QUANTIZER_MAPPING.update(ours)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(usual)


def dequantize(model: nn.Module) -> None:
    """Make quantized experts whole again, for good: as they are computed with."""
    module: Any
    for module in list(model.modules()):
        if "Expert" in type(module).__name__ and parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                weight = getattr(module, name)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))


class _Quantized(nn.Parameter):
    """An expert's parameter in its packed form, until the whole model is loaded.

    Attributes:
        unpack: the module that makes the whole of it.
    """

    unpack: nn.Module


class _Int8(nn.Module):
    """What makes numbers of 8-bit integers: each row times its own scale."""

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        """The weights, in the scale's dtype."""
        return integers * self.scale


def _in_four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, nn.Module]:
    """NF4 with double quantization, like the linear layers; see `base.quantization_config`."""
    packed, state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return packed, Bnb4bitParametrization(state)


def _in_eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, nn.Module]:
    """Each row by its largest absolute value, as LLM.int8() does with weights (Dettmers et al. 2022, section 2.1)."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), _Int8(scale)


def _quantized(weight: torch.Tensor, four_bits: bool) -> _Quantized:
    packed, unpack = (_in_four_bits if four_bits else _in_eight_bits)(weight.detach())
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.unpack = unpack
    return parameter


class _Quantize(ConversionOps):
    """Quantizes the parameters of experts; any other as bitsandbytes does."""

    def __init__(self, usual: ConversionOps, four_bits: bool) -> None:
        self.usual = usual
        self.four_bits = four_bits

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Of weights by their names, the quantized ones."""
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            if _is_expert(*get_module_from_name(model, name)):
                result[name] = _quantized(value[0] if isinstance(value, list) else value, self.four_bits)
            else:
                result |= self.usual.convert({name: value}, model=model, **kwargs)
        return result


class _WithExperts:
    """What the quantizers of both widths do beyond what Transformers does."""

    four_bits: bool

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether that parameter is quantized while it is loaded."""
        usual: Any = super()
        is_expert = _is_expert(*get_module_from_name(model, param_name))
        return is_expert or usual.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes a parameter."""
        usual: Any = super()
        return _Quantize(usual.get_quantize_ops(), self.four_bits)

    @staticmethod
    def get_modules_to_not_convert(model: PreTrainedModel, *args: Any, **kwargs: Any) -> list[str]:
        """The layers that stay as they are."""
        return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *untouched(model)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        usual: Any = super()
        model = usual._process_model_after_weight_loading(model, **kwargs)
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not hasattr(parameter, "unpack") and _is_expert(module, name):  # of a checkpoint in 4-bit already
                    parameter = _quantized(parameter, self.four_bits)
                    setattr(module, name, parameter)
                if hasattr(parameter, "unpack"):
                    unpack_when_read(module, name, parameter.unpack)
        return model


class _FourBit(_WithExperts, Bnb4BitHfQuantizer):
    four_bits = True


class _EightBit(_WithExperts, Bnb8BitHfQuantizer):
    four_bits = False


def unpack_when_read(module: Any, name: str, unpack: nn.Module) -> None:
    """Have reading a parameter give the whole of it, which is kept until the module's computation ends."""
    parametrize.register_parametrization(module, name, unpack, unsafe=True)
    if len(module.parametrizations) > 1:
        return  # the hooks are there

    def begin(*_: Any) -> None:
        module._kept = parametrize.cached()
        module._kept.__enter__()

    def end(*_: Any) -> None:
        module._kept.__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    # Also where recomputed activations end the computation early, which they do with an exception.
    module.register_forward_hook(end, always_call=True)
