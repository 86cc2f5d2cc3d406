"""A model that ranks divide among them, by FSDP2 or ZeRO-3: passes through it, and what FSDP2's optimizer knows."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, TypeVar

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
from transformers import TrainingArguments

from rlhf_pipeline import ranks
from rlhf_pipeline.models import divided

Config = TypeVar("Config", bound=TrainingArguments)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_divided(model: Any) -> bool:
    """Whether each rank has a part of a model, so that a pass through it takes all of them."""
    return isinstance(model, FSDPModule) or (isinstance(model, nn.Module) and _is_divided_by_zero_3(model))


def _is_divided_by_zero_3(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def divide(model: PeftModel) -> PeftModel:
    """Divide a model of `load_base` as training does, if that does, and have it compute; in place."""
    if divided.by_fsdp():
        model = fsdp2_prepare_model(Accelerator(), model)
        with torch.no_grad():
            model(**_spare(model))  # the first pass has to be one through the whole
    elif divided.by_zero_3():
        accelerator = Accelerator()
        divide_by_zero_3(model, accelerator)
        vars(model)["engine"] = _engine(model, accelerator)  # whose hooks go with it
    return model


def with_fitting_checkpoints(args: Config) -> Config:
    """Have activations be computed anew in the one way that works where frozen weights are divided by ZeRO-3.

    TRL does so, too, but by a name that newer versions of Transformers do not read.
    """
    if divided.by_zero_3():
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if hasattr(args, name):
                setattr(args, name, (getattr(args, name) or {}) | {"use_reentrant": True})
    return args


def divide_by_zero_3(model: PeftModel, accelerator: Accelerator) -> None:
    """Divide a model parameter by parameter, of each those of the first rank; in place, and only once.

    DeepSpeed would do so itself when training begins, but first move all of it to the GPU.

    Args:
        model: on any device. Its parts are then on that of this rank, and so are its buffers, which stay whole.
        accelerator: knows DeepSpeed's settings.
    """
    dtype, parameters = model.get_base_model().dtype, [*model.parameters()]

    def one_by_one(**_: Any) -> Iterator[nn.Parameter]:
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)  # as DeepSpeed has it: it updates others, in float32
            if not parameter.is_contiguous():  # zeros without memory, see `divided.from_first`
                parameter.data = parameter.data.contiguous()
            yield parameter  # which is divided before the next one is asked for

    vars(model)["parameters"] = one_by_one
    importlib.import_module("deepspeed").zero.Init(module=model, config_dict_or_path=_settings(accelerator))
    del vars(model)["parameters"]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


@contextlib.contextmanager
def computing(model: PeftModel, accelerator: Accelerator) -> Iterator[None]:
    """Inside the block, a model that is divided for training, but not yet, can make passes on the GPU.

    FSDP2 needs room for all of it there.
    """
    if divided.by_zero_3():
        divide_by_zero_3(model, accelerator)
        engine = _engine(model, accelerator)
        with _noticing(model):
            yield
        engine.destroy()
    elif model.device.type != accelerator.device.type:
        before = model.device
        model.to(accelerator.device)
        yield
        model.to(before)
    else:
        yield


def _engine(model: PeftModel, accelerator: Accelerator) -> Any:
    """What has each layer of a divided model gathered when it computes, as long as it is there."""
    engine, *_ = importlib.import_module("deepspeed").initialize(model=model, config=_settings(accelerator))
    return engine


@contextlib.contextmanager
def _noticing(model: nn.Module) -> Iterator[None]:
    """Have DeepSpeed notice layers that read weights of others, as Mamba's do; it does so itself in training alone."""
    noticed = [module._parameters for module in model.modules() if hasattr(module._parameters, "_in_forward")]
    for parameters in noticed:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in noticed:
            parameters._in_forward = False


def _settings(accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's, but for those of training."""
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero = {key: value for key, value in zero.items() if value != "auto" and key != "offload_optimizer"}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


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

    if isinstance(model, FSDPModule):
        model.unshard()  # what is of no layer; passes through `base` gather the rest
    hook = base.register_forward_pre_hook(announce, prepend=True)  # before anything is gathered
    with _noticing(model):
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
