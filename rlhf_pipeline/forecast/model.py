"""A base of shapes: what `models.base.load_base` gives, with nothing read but a configuration."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from rlhf_pipeline.forecast.shapes import empty
from rlhf_pipeline.models import base, experts, layer_count
from rlhf_pipeline.models.layers import untouched
from rlhf_pipeline.recipe.schema import Model

BLOCK, BLOCK_OF_SCALES = 64, 256  # of NF4: weights under one scale, and scales under one of theirs (QLoRA, section 3)


def build(
    spec: Model,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    layers: int,
    head: base.Head,
) -> PreTrainedModel:
    """A base whose weights are shapes, quantized as the recipe has it, frozen and in evaluation mode.

    Args:
        spec: the recipe's `model`.
        config: of the model, which may say that it is stored in few bits.
        tokenizer: any; only its special tokens are read.
        dtype: of what is not quantized, and of what is computed with.
        layers: how many of its layers there shall be; all by default.
        head: see `base.load_base`.
    """
    config = copy.deepcopy(config)
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        vars(one).pop("quantization_config", None)
    if layers < config.get_text_config().num_hidden_layers:
        layer_count.keep(config.get_text_config(), layers)
    with torch.device("meta"):
        model = base.without_weights(spec, config=config)
    _to_shapes(model, dtype)
    if spec.quantization != "none":
        _quantize(model, spec.quantization, dtype)
    return base.frozen(model, tokenizer, head)


def _to_shapes(model: nn.Module, dtype: torch.dtype) -> None:
    """Put shapes in the place of parameters on `meta`; tied ones stay one. Buffers become real, and zero."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = dtype if parameter.is_floating_point() else parameter.dtype
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(empty(*parameter.shape, dtype=own), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _quantize(model: PreTrainedModel, quantization: str, dtype: torch.dtype) -> None:
    """Put packed layers in the place of the linear ones that bitsandbytes would pack."""
    apart = {*get_keys_to_not_convert(model), *untouched(model)}
    packed = Packed4bit if quantization == "nf4" else Packed8bit
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not any(
            name == one or name.startswith(f"{one}.") for one in apart
        ):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, packed(module, dtype))
    for _, module, name in list(experts.parameters(model)):
        whole = module._parameters[name]
        assert whole is not None
        weights = whole.numel() // 2 if quantization == "nf4" else whole.numel()
        setattr(module, name, nn.Parameter(empty(weights, dtype=torch.uint8), requires_grad=False))
        experts.unpack_when_read(module, name, _Unpack(tuple(whole.shape), dtype))
    marks: Any = model
    marks.is_loaded_in_4bit, marks.is_loaded_in_8bit = quantization == "nf4", quantization == "int8"


def _features(linear: Any) -> tuple[int, int]:
    """How many numbers go into a layer and come out of it; GPT-2's layers have their weights the other way round."""
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    return linear.in_features, linear.out_features


class Packed4bit(bnb.nn.Linear4bit):
    """A linear layer in NF4 with double quantization: half a byte a weight, a byte for 64, four more for 16,384."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = _features(linear)
        weights = linear.weight.numel()
        weight: Any = nn.Parameter(empty(-(-weights // 2), 1, dtype=torch.uint8), requires_grad=False)
        weight.compress_statistics, weight.quant_type, weight.quant_state = True, "nf4", None
        self.weight, self.bias = weight, linear.bias
        scales = -(-weights // BLOCK)
        self.register_buffer("scales", empty(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", empty(-(-scales // BLOCK_OF_SCALES), dtype=torch.float32))
        self.compute_dtype = dtype
        self.forward = self.compute  # of the object: by its class's it is known as a linear layer, see `models.layers`

    def compute(self, x: Tensor) -> Tensor:
        """What `bnb.nn.Linear4bit` computes."""
        shape = self.out_features, self.in_features
        bias = self.bias if self.bias is None else self.bias.to(self.compute_dtype)
        out: Tensor = _FourBit.apply(x.to(self.compute_dtype), self.weight, bias, shape)
        return out.to(x.dtype)


class _FourBit(torch.autograd.Function):
    """As bitsandbytes' `MatMul4Bit`: the whole weight for the length of one product, here and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.packed, ctx.shape = packed, shape
        return nn.functional.linear(x, _unpacked(packed, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0] @ _unpacked(ctx.packed, ctx.shape, gradients[0].dtype), None, None, None


class _Unpack(nn.Module):
    """Makes the whole of an expert's packed weights."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, packed: Tensor) -> Tensor:
        """The weights."""
        return _unpacked(packed, self.shape, self.dtype)


def _unpacked(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


class Packed8bit(bnb.nn.Linear8bitLt):
    """A linear layer in 8 bits: a byte a weight, and a scale for each row."""

    def __init__(self, linear: Any, _: torch.dtype) -> None:
        nn.Module.__init__(self)
        (self.in_features, self.out_features), self.index = _features(linear), None
        self.state = bnb.MatmulLtState()
        self.state.has_fp16_weights, self.state.threshold = False, 6.0
        self.weight = nn.Parameter(empty(self.out_features, self.in_features, dtype=torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scales", empty(self.out_features, dtype=torch.float32))
        self.forward = self.compute

    def compute(self, x: Tensor) -> Tensor:
        """What `bnb.nn.Linear8bitLt` computes."""
        out: Tensor = _EightBit.apply(x, self.weight, self.bias)
        return out


class _EightBit(torch.autograd.Function):
    """As bitsandbytes' `MatMul8bitLt`: the input in 8 bits for the product, and the whole weight to go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed, ctx.dtype = packed, x.dtype
        ctx.x = x  # it is kept for the backward pass
        in_half = x.to(torch.float16)
        rows = in_half.new_empty(x.shape, dtype=torch.int8)
        out = x.new_empty((*x.shape[:-1], packed.shape[0]))
        del rows, in_half
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = _unpacked(ctx.packed, tuple(ctx.packed.shape), ctx.dtype)
        return gradients[0].to(ctx.dtype) @ whole, None, None
