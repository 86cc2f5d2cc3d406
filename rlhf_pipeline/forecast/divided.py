"""A model of shapes that processes divide: what of it is whole in one of them, and when.

The passes are those of the whole model, since its operations are; what changes is how many bytes its weights count. The
rules are FSDP2's own (torch.distributed.fsdp._fully_shard, of torch 2.13), hook by hook.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.fsdp
from accelerate.utils import fsdp2_prepare_model
from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import PreTrainedModel

from rlhf_pipeline.forecast.shapes import UNCOUNTED, Ledger, Shape, empty
from rlhf_pipeline.recipe.deepspeed import zero_settings, zero_stage

LEAST_NUMBERS = 10**8  # `--fsdp_min_num_params` of `accelerate launch`
WRAPS = dict(zip(FSDP_AUTO_WRAP_POLICY, (transformer_auto_wrap_policy, size_based_auto_wrap_policy, None), strict=True))

# Between the name of a phase and that of a moment in it, at which what each layer adds is not what it adds elsewhere: a
# forecast from few layers has to look at each.
MOMENT = "/"
FIRST = f"{MOMENT}first"


class Weight:
    """A parameter that processes divide by its first dimension, as FSDP2 does.

    Attributes:
        parameter: whole, with which is computed.
        own: what a process holds of it: of what is trained, what the optimizer updates.
        bytes: of the whole, as it is gathered.
    """

    def __init__(self, parameter: nn.Parameter, processes: int, computes_in: torch.dtype | None) -> None:
        self.parameter, dtype = parameter, parameter.dtype
        rows, *rest = parameter.shape or (1,)
        own_rows = -(-rows // processes)  # the last ones are padded
        own = empty(own_rows, *rest, dtype=dtype)
        self.own = nn.Parameter(own, requires_grad=parameter.requires_grad)
        if computes_in is not None and parameter.is_floating_point() and dtype != computes_in:
            _convert(parameter, computes_in)
            dtype = computes_in
        self.bytes = processes * own.numel() * dtype.itemsize


class Unit:
    """Weights that are gathered together: FSDP2's `FSDPParamGroup`."""

    def __init__(self, modules: tuple[nn.Module, ...], weights: list[Weight], reshards: bool) -> None:
        self.modules, self.weights, self.reshards = modules, weights, reshards
        self.bytes = sum(one.bytes for one in weights)
        self.state = "idle"
        self.gathered = False
        self.arriving: Tensor | None = None  # what was sent, before it is copied to where the weights are
        self.places: list[int] = []  # in `Fsdp2.order`
        self.to_run: set[nn.Module] = set()


class Fsdp2:
    """A model as FSDP2 divides it, while its trainer runs on shapes.

    Args:
        model: with its adapters; it gets hooks.
        keys: `fsdp_config`.
        processes: how many divide it.
        computes_in: the type in which it is gathered, where that is another one than it is kept in.
        ledger: which counts.
        on_gpu: whether the whole model is there already, as one that is quantized is.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: dict[str, Any],
        processes: int,
        computes_in: torch.dtype | None,
        ledger: Ledger,
        on_gpu: bool,
    ) -> None:
        self.model, self.ledger, self.processes = model, ledger, processes
        self.order: list[Unit] = []
        self.sent: Tensor | None = None  # the last that arrived in a forward pass, which is let go with the next
        self.sent_of: Unit | None = None
        self.reducing: Tensor | None = None
        self.head: Tensor | None = None
        self.iterates: Unit | None = None
        self.ending = False
        self.syncs: Callable[[], bool] = lambda: True
        with ledger.during(UNCOUNTED):
            self.units = [
                Unit(modules, weights, reshards)
                for modules, parameters, reshards in _units(model, keys)
                if (weights := [Weight(one, processes, computes_in) for one in parameters])
            ]
            self.weights = {one.parameter: one for unit in self.units for one in unit.weights}
            for one in self.weights.values():
                ledger.count(one.own, "adapters" if one.own.requires_grad else "weights")
                ledger.count(one.parameter, "gathered")
                if not on_gpu:
                    ledger.hold(one.parameter, 0, "gathered")
        for one in self.weights.values():
            ledger.hold(one.parameter, one.bytes, "gathered")  # Accelerate keeps what is there until all is divided
            if not on_gpu:
                ledger.hold(one.parameter, 0, "gathered")
        for one in self.weights.values():
            ledger.hold(one.parameter, 0, "gathered")
        embedding = _causal(model).get_input_embeddings()
        self.first = next((unit for unit in self.units if embedding in unit.modules and unit.reshards), None)
        for unit in self.units:
            self._watch(unit)
        self._watch_head()

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimizer updates."""
        return [one.own for one in self.weights.values() if one.own.requires_grad]

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer update what this process holds, and nothing else."""
        for group in optimizer.param_groups:
            group["params"] = [self.weights[one].own for one in group["params"]]
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())

    def gather_rest(self) -> None:
        """Gather what is of no layer, as `sharded.in_step` does before ranks make passes of their own."""
        root = next((unit for unit in self.units if self.model in unit.modules), None)
        if root is not None:
            self._send(root)
            self._arrive(root)

    def _made(self, size: int) -> Tensor:
        with self.ledger.as_part("gathered"):
            made = empty(size, dtype=torch.uint8)
            self.ledger.count(made)
        return made

    def _watch(self, unit: Unit) -> None:
        for module in unit.modules:
            module.register_forward_pre_hook(
                lambda module, args, kwargs: self._before(unit, args, kwargs), prepend=True, with_kwargs=True
            )
            module.register_forward_hook(lambda module, _, output: self._after(unit, module, output))

    def _mark(self, *, sends: bool = False) -> None:
        """Note a moment at which the embedding is there, which is larger than a layer, while few activations are."""
        first = self.first
        if first is None:
            return
        held = sends or first.gathered or first.arriving is not None or self.sent_of is first
        self.ledger.phase = self.ledger.phase.removesuffix(FIRST) + FIRST * held

    def _send(self, unit: Unit) -> None:
        """All processes send their parts; one type is made of several on the way."""
        if unit.gathered or unit.arriving is not None:
            return
        if unit is self.first:
            self._mark(sends=True)
        unit.arriving = self._made(unit.bytes)
        if any(one.own.dtype != one.parameter.dtype for one in unit.weights):
            self._made(unit.bytes // self.processes)

    def _arrive(self, unit: Unit) -> None:
        if unit.arriving is None:
            return
        for one in unit.weights:
            self.ledger.hold(one.parameter, one.bytes, "gathered")
        unit.gathered = True
        if unit.state == "forward":
            self.sent, self.sent_of = unit.arriving, unit  # the one before is let go after the weights were copied
        unit.arriving = None
        self._mark()

    def _divide(self, unit: Unit) -> None:
        for one in unit.weights:
            self.ledger.hold(one.parameter, 0, "gathered")
        unit.gathered = False
        self._mark()

    def _before(self, unit: Unit, args: Any, kwargs: dict[str, Any]) -> Any:
        """`_pre_forward`."""
        if not unit.to_run:
            unit.to_run = set(unit.modules)
        if unit.state == "backward":  # activations are computed anew
            self._send(unit)
            self._arrive(unit)
            return args, kwargs
        begins, unit.state = unit.state != "forward", "forward"
        self.iterates = self.iterates or unit
        with self.ledger.during(f"{self.ledger.phase}{MOMENT}gathered"):
            self._send(unit)
            self._arrive(unit)
        self._mark()
        if not (begins and torch.is_grad_enabled()):
            return args, kwargs
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad]
        if not given:
            return args, kwargs
        marked = dict(zip(map(id, given), _Mark.apply(lambda: self._after_backward(unit), *given), strict=True))
        return (
            tuple(marked.get(id(one), one) for one in args),
            {name: marked.get(id(one), one) for name, one in kwargs.items()},
        )

    def _after(self, unit: Unit, module: nn.Module, output: Any) -> None:
        """`_post_forward`."""
        unit.to_run.discard(module)
        if unit.to_run or unit.state == "backward":
            return
        self._complete(unit, output)
        if self.iterates is unit:
            for other in self.units:
                if other.to_run and len(other.modules) > 1:
                    self._complete(other, output)
                    other.to_run.clear()
            self.sent = self.sent_of = self.iterates = None
            self._mark()
            if not torch.is_grad_enabled():
                self.head = None

    def _complete(self, unit: Unit, output: Any) -> None:
        if unit.reshards:
            self._divide(unit)
        unit.places.append(len(self.order))
        self.order.append(unit)
        unit.state = "idle"
        if torch.is_grad_enabled():
            for one in _tensors(output):
                if one.requires_grad:
                    one.register_hook(lambda _: self._before_backward(unit))

    def _before_backward(self, unit: Unit) -> None:
        """`pre_backward`: the unit is gathered, and the one before it is sent."""
        if not self.ending:
            self.ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if unit.state == "backward":
            return
        unit.state = "backward"
        self._send(unit)
        self._arrive(unit)
        if unit.places and (place := unit.places.pop()) > 0:
            self._send(self.order[place - 1])

    def _after_backward(self, unit: Unit) -> None:
        """`post_backward`: gradients are reduced where this is the last pass of a step, else they stay whole."""
        unit.state = "done"
        self._divide(unit)
        if not self.syncs():
            return
        self.reducing = None
        whole = [one for one in unit.weights if one.parameter.grad is not None]
        if not whole:
            return
        with self.ledger.as_part("optimizer"):
            self.reducing = empty(sum(one.bytes for one in whole), dtype=torch.uint8)
            self.ledger.count(self.reducing)
            for one in whole:
                one.parameter.grad = None
                one.own.grad = torch.empty_like(one.own)
                self.ledger.count(one.own.grad)

    def _end(self) -> None:
        """`_root_post_backward_final_callback`."""
        for unit in self.units:
            if unit.state != "done":
                self._after_backward(unit)
            unit.state, unit.arriving = "idle", None
            unit.places.clear()
            unit.to_run.clear()
        self.order.clear()
        self.iterates = self.reducing = None
        self._mark()
        self.ending = False

    def _watch_head(self) -> None:
        """TRL's losses that do without logits gather the output embedding themselves, for as long as they need it."""
        causal = _causal(self.model)
        head = causal.get_output_embeddings()
        unit = next((unit for unit in self.units if head in unit.modules), None)
        if unit is None:
            return

        def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            self.fused = bool(kwargs.get("fused_lm_head"))

        def gather(_: nn.Module, __: Any, output: Any) -> None:
            if not self.fused or unit.gathered:
                return
            if output.last_hidden_state.requires_grad:
                kept = [self._made(unit.bytes)]
                output.last_hidden_state.register_hook(lambda _: kept.clear())
            else:
                self.head = self._made(unit.bytes)

        self.fused = False
        causal.register_forward_pre_hook(note, with_kwargs=True)
        causal.base_model.register_forward_hook(gather)


class Zero:
    """A model as DeepSpeed's ZeRO divides it: stages 1 and 2 gradients and the optimizer's state, 3 the weights, too.

    How long ZeRO-3 keeps weights that it has gathered follows from the order in which it has seen them be used, and is
    not repeated here. All that its keys let it have at once counts while passes are made, see `most_gathered`. What a
    rank was seen to hold is up to 30 % more, and differs from run to run: benchmarks/README.md.

    Args:
        model: with its adapters; it gets hooks.
        config: `deepspeed_config`.
        processes: how many divide it.
        computes_in: the type that all its weights get.
        hidden: the model's hidden size.
        ledger: which counts.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        processes: int,
        computes_in: torch.dtype,
        hidden: int,
        ledger: Ledger,
    ) -> None:
        self.ledger, self.of_weights = ledger, zero_stage(config) == 3
        settings = zero_settings(config, hidden)
        phase, ledger.phase, ledger.making = ledger.phase, UNCOUNTED, "optimizer"
        parameters = list(model.parameters())
        for one in parameters:
            if one.is_floating_point() and one.dtype != computes_in:
                _convert(one, computes_in)
                ledger.count(one, "adapters" if one.requires_grad else "weights")
        trained = [one for one in parameters if one.requires_grad]
        share = sum(-(-one.numel() // processes) for one in trained)
        self.trained = [nn.Parameter(empty(share, dtype=torch.float32))]
        self.kept = [empty(share, dtype=computes_in)]  # gradients
        self.gathered: Tensor | None = None
        self.buckets: list[Tensor] = []
        size = int(settings["reduce_bucket_size"]) * computes_in.itemsize if settings["contiguous_gradients"] else 0
        self.bucket_sizes = [size] * (2 if settings["overlap_comm"] and not self.of_weights else 1)
        self.bytes = 0
        if self.of_weights:
            threshold = settings["stage3_param_persistence_threshold"]
            head = getattr(_causal(model).get_output_embeddings(), "weight", None)  # TRL's loss gathers it again
            for one in parameters:
                part = "adapters" if one.requires_grad else "weights"
                self.kept.append(empty(-(-one.numel() // processes), dtype=one.dtype))
                ledger.count(self.kept[-1], part)
                if one.numel() > threshold:
                    self.bytes += one.numel() * one.dtype.itemsize * (2 if one is head else 1)
                    ledger.hold(one, 0, "gathered")
            if computes_in == torch.float32:
                ledger.count(self.trained[0], "optimizer", 0)  # they are the parts themselves
                ledger.hold(self.trained[0], 0, "optimizer")
            self.buckets = [empty(size, dtype=torch.uint8) for size in self.bucket_sizes]
        ledger.phase, ledger.making = phase, None
        ledger.note()
        for one in trained:
            one.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        model.register_forward_pre_hook(lambda *_: self.gather_rest())
        model.register_forward_hook(lambda *_: self._begin_backward())

    def gather_rest(self) -> None:
        """Passes are made now."""
        if self.bytes and self.gathered is None:
            with self.ledger.as_part("gathered"):
                self.gathered = empty(self.bytes, dtype=torch.uint8)

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer update what this process holds, and nothing else."""
        optimizer.param_groups[0]["params"] = self.trained
        optimizer.param_groups[1:] = []
        optimizer.register_step_pre_hook(lambda *_: self._begin_step())
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())

    def _begin_backward(self) -> None:
        if torch.is_grad_enabled() and not self.buckets:
            with self.ledger.as_part("optimizer"):
                self.buckets = [empty(size, dtype=torch.uint8) for size in self.bucket_sizes]

    def _begin_step(self) -> None:
        self.gathered = None
        if not self.of_weights:
            self.buckets = []
        self.trained[0].grad = torch.empty_like(self.trained[0])


def most_gathered(config: dict[str, Any], hidden: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that ZeRO-3 may have gathered at once, of however large a model.

    What it keeps has been used within the last `stage3_max_reuse_distance` weights; it gathers those of one layer, none
    of which has more than the embedding, and `stage3_prefetch_bucket_size` ahead.
    """
    settings = zero_settings(config, hidden)
    ahead = settings["stage3_prefetch_bucket_size"] + hidden * vocabulary
    return int(settings["stage3_max_reuse_distance"] + ahead) * dtype.itemsize


class _Mark(torch.autograd.Function):
    """Gives what it gets; the backward pass says so when it has come there."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.then()
        return None, *gradients


def _causal(model: Any) -> Any:
    """The base inside a `PeftModel`."""
    return model.base_model.model if not isinstance(model, PreTrainedModel) else model


def _convert(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Make a parameter one of another type, in place; small ones are real."""
    other = parameter.data.to(dtype)
    parameter.data = other
    if isinstance(other, Shape):
        parameter.twin = other.twin  # type: ignore[attr-defined]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from itertools.chain.from_iterable(map(_tensors, output.values()))
    elif isinstance(output, tuple | list):
        yield from itertools.chain.from_iterable(map(_tensors, output))


def _units(model: nn.Module, keys: dict[str, Any]) -> list[tuple[tuple[nn.Module, ...], list[nn.Parameter], bool]]:
    """What Accelerate has FSDP2 gather together: modules, their parameters, and whether these are divided after use."""
    names = keys.get("fsdp_transformer_layer_cls_to_wrap")
    plugin = SimpleNamespace(
        set_auto_wrap_policy=lambda _: None,
        reshard_after_forward=keys.get("fsdp_reshard_after_forward", True),
        cpu_offload=None, mixed_precision_policy=None, ignored_modules=None, cpu_ram_efficient_loading=False,
        auto_wrap_policy=WRAPS[keys.get("fsdp_auto_wrap_policy", "NO_WRAP")],
        transformer_cls_names_to_wrap=names.split(",") if isinstance(names, str) else names,
        min_num_params=int(float(keys.get("fsdp_min_num_params") or LEAST_NUMBERS)),
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, mixed_precision="no", is_main_process=False
    )
    found: list[tuple[tuple[nn.Module, ...], list[nn.Parameter], bool]] = []
    taken: set[nn.Parameter] = set()

    def shard(modules: Any, reshard_after_forward: bool = False, **_: Any) -> None:
        """In the place of `fully_shard`; without a word on what is divided after use, the root is not."""
        modules = tuple(modules) if isinstance(modules, list) else (modules,)
        own = dict.fromkeys(one for module in modules for one in module.parameters() if one not in taken)
        taken.update(own)
        found.append((modules, list(own), reshard_after_forward))

    with in_place(torch.distributed.fsdp, "fully_shard", shard):
        fsdp2_prepare_model(accelerator, model)
    return found


@contextlib.contextmanager
def in_place(module: Any, name: str, value: Any) -> Iterator[None]:
    """Have a module something else under a name inside the block."""
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)
