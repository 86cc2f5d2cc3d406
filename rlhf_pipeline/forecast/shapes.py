"""Tensors that have a shape and no numbers, and a count of the bytes that a program over them holds at any time.

A trainer is run as it is, over a model whose weights are `Shape`s: every operation on one gives another, on torch's
`meta` device, for nothing. Token ids, lengths and masks are real, so that the program takes the way that it takes in a
run. What is counted is what the allocator of a GPU would be asked for: each storage once, from when it is made until
nothing refers to it, in whole blocks.
"""

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512  # bytes: CUDA's caching allocator rounds every request up to a multiple of this (kMinBlockSize)
_SCALAR = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_CHOICE = torch.ops.aten._fused_sdp_choice.default
_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
_LOGSUMEXP = torch.ops.aten.logsumexp.default
_FACTORIES = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.zeros.default,
    torch.ops.aten.ones.default, torch.ops.aten.full.default, torch.ops.aten.rand.default,
    torch.ops.aten.randn.default,
)  # fmt: skip
_LARGE = 2**20  # numbers: a tensor of more that is made of nothing becomes a shape
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


class Shape(Tensor):
    """A tensor without numbers, that says it is on the CPU, so that autocast treats it as it would a real one."""

    twin: Tensor  # on `meta`; its storage is what is counted

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Self:
        """Wrap a tensor on `meta`."""
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        made.twin = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Shape({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shape":
        return Shape(torch.empty_like(self.twin), self.requires_grad)

    def numpy(self, **_: Any) -> Any:
        """Ones, as everything that is not known."""
        return torch.ones(self.shape).numpy()

    def tolist(self) -> Any:
        """The same as lists."""
        return torch.ones(self.shape).tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Outside a `Ledger`, the same operations; they are not counted."""
        return run(func, args, kwargs or {})


def empty(*size: int, dtype: torch.dtype) -> Shape:
    """A tensor of a shape."""
    return Shape(torch.empty(size, dtype=dtype, device="meta"))


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: for real where all tensors are, else on `meta`.

    What comes of numbers that are not known: a number is 1, a truth is true, tokens are 0.
    """
    if not (_has_shape(args) or _has_shape(kwargs.values()) or _spreads(args)):
        return func(*args, **kwargs)
    if func is _SCALAR:
        return 1.0 if args[0].dtype.is_floating_point else 1
    if func is _EQUAL:
        return True
    if func is _CHOICE:
        return _FLASH
    if func in _INDEX:
        indices = [part for one in args[1] for part in (one.nonzero(as_tuple=True) if _is_real_mask(one) else (one,))]
        args = (args[0], indices, *args[2:])
    key = (func, _described(args), _described(tuple(kwargs.items())))
    made = _KNOWN.get(key)
    if made is None:
        return _first(key, func, args, kwargs)
    tensors = _tensors((*args, *kwargs.values()))
    outputs = [_again(one, tensors) for one in made.outputs]
    return outputs[0] if made.several is None else made.several(outputs)


class _View(NamedTuple):
    """An output that shows what an input holds."""

    of: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _New(NamedTuple):
    """An output with memory of its own."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Known(NamedTuple):
    """What an operation gives for inputs of some shapes.

    Attributes:
        outputs: each a new tensor, a view, the number of the input that was changed in place, or None for what is none.
        several: tuple or list where there are several outputs, None where there is one.
    """

    outputs: list[_View | _New | int | None]
    several: type | None


# Torch works out the shapes of most operations in Python, which takes longer than all else in a forecast; the layers of
# a model, and the batches of a pass, ask for the same ones again and again.
_KNOWN: dict[Any, _Known] = {}


def _described(value: Any) -> Any:
    """All of an argument that decides the shapes of what comes out."""
    if isinstance(value, Tensor):
        inner = value.twin if isinstance(value, Shape) else value
        return inner.shape, inner.stride(), inner.storage_offset(), inner.dtype, inner is value
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value


def _tensors(values: Any) -> list[Tensor]:
    """All tensors among arguments, in their order."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, tuple | list):
            found.extend(_tensors(one))
    return found


def _first(key: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on `meta`, and keep what shapes come out where that says all about it."""
    ours: dict[int, Tensor] = {}
    on_meta = [_on_meta(one, ours) for one in args]
    meta_kwargs = {name: _on_meta(one, ours) for name, one in kwargs.items()}
    inputs = _tensors((*on_meta, *meta_kwargs.values()))
    shapes = [(one.shape, one.stride()) for one in inputs]
    found = func(*on_meta, **meta_kwargs)
    several = type(found) if isinstance(found, tuple | list) else None
    results = found if several else (found,)
    outputs = [_kept(one, inputs) for one in results]
    if ... not in outputs and shapes == [(one.shape, one.stride()) for one in inputs]:
        _KNOWN[key] = _Known(outputs, several)
    off_meta = [_off_meta(one, ours) for one in results]
    return several(off_meta) if several else off_meta[0]


def _kept(output: Any, inputs: list[Tensor]) -> Any:
    """What makes an output again; `...` where nothing does."""
    if not isinstance(output, Tensor):
        return None if output is None else ...
    storage = output.untyped_storage()
    for number, one in enumerate(inputs):
        if output is one:
            return number
        if storage._cdata == one.untyped_storage()._cdata:
            same = output.dtype == one.dtype
            return _View(number, output.shape, output.stride(), int(output.storage_offset())) if same else ...
    alone = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device="meta")
    whole = output.storage_offset() == 0 and storage.nbytes() == alone.untyped_storage().nbytes()
    return _New(output.shape, output.stride(), output.dtype) if whole else ...


def _again(made: _View | _New | int | None, inputs: list[Tensor]) -> Any:
    """An output as `_first` gave it."""
    if made is None:
        return None
    if isinstance(made, int):
        return _changed(inputs[made])
    if isinstance(made, _New):
        return _as_shape(torch.empty_strided(made.size, made.stride, dtype=made.dtype, device="meta"))
    of = inputs[made.of]
    inner = of.twin if isinstance(of, Shape) else _on_meta(of, {})
    return _as_shape(torch.as_strided(inner, made.size, made.stride, made.offset))


def _spreads(args: Any) -> bool:
    """Whether real tensors are combined to a large one, as positions are to a mask of attention."""
    shapes = [one.shape for one in args if isinstance(one, Tensor)]
    if len(shapes) < 2 or max(map(len, shapes)) < 3:
        return False
    sizes = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return math.prod(map(max, sizes)) >= _LARGE


def _has_shape(values: Any) -> bool:
    return any(
        isinstance(one, Shape) or (isinstance(one, tuple | list) and any(isinstance(part, Shape) for part in one))
        for one in values
    )


def _is_large(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes a large tensor of numbers that are not whole."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return math.prod(args[0]) >= _LARGE and dtype.is_floating_point


def _is_real_mask(one: Any) -> bool:
    return isinstance(one, Tensor) and one.dtype == torch.bool and not isinstance(one, Shape)


def _on_meta(one: Any, ours: dict[int, Tensor]) -> Any:
    """An argument as it is on `meta`; `ours` takes what stands for what."""
    if isinstance(one, Tensor):
        inner = (
            one.twin
            if isinstance(one, Shape)
            else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        )
        ours[id(inner)] = one
        return inner
    if isinstance(one, tuple | list):
        return [_on_meta(part, ours) for part in one]
    return torch.device("meta") if isinstance(one, torch.device) else one


def _off_meta(one: Any, ours: dict[int, Any]) -> Any:
    if not isinstance(one, Tensor):
        return one
    return _changed(ours[id(one)]) if id(one) in ours else _as_shape(one)


def _changed(before: Tensor) -> Tensor:
    """A tensor that an operation has written to."""
    if not isinstance(before, Shape) and before.is_floating_point():
        before.fill_(1.0)  # with numbers that are not known
    return before


def _as_shape(one: Tensor) -> Tensor:
    """What is on `meta` as a shape; small whole numbers and truths as real ones."""
    if one.numel() >= _LARGE or one.is_floating_point() or one.dtype in (torch.uint8, torch.int8) or one.is_complex():
        return Shape(one)
    return (torch.ones if one.dtype == torch.bool else torch.zeros)(one.shape, dtype=one.dtype)


def _blocks(size: int) -> int:
    """Bytes that the allocator gives for so many."""
    return -(-size // BLOCK) * BLOCK


UNCOUNTED = "uncounted"  # a phase that prepares one


class Ledger(TorchDispatchMode):
    """Counts the bytes that are held, by what they are for, and keeps the split at the peak of each phase.

    Attributes:
        held: bytes now, by part.
        peaks: of each phase, the split at its peak.
        phase: what the program is doing.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.held: dict[str, int] = defaultdict(int)
        self.total = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self.highest: dict[str, int] = defaultdict(int)
        self.phase = "load"
        self.making: str | None = None  # the part of whatever is made now
        self._parts: dict[int, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        kwargs = kwargs or {}
        if self.making is None and func in _FACTORIES and _is_large(func, args, kwargs):
            found: Any = Shape(func(*args, **kwargs | {"device": "meta"}))
        else:
            found = run(func, args, kwargs)
        if func is _LOGSUMEXP:  # it makes exp(x - max x) on its way, on every device
            self.count(Shape(torch.empty_like(args[0].twin)) if isinstance(args[0], Shape) else args[0])
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, Tensor):
                self.count(one)
        return found

    def count(self, tensor: Tensor, part: str | None = None, size: int | None = None) -> None:
        """Count a tensor's storage, unless it is; with `part`, as that from now on; with `size`, as so many bytes."""
        storage = (tensor.twin if isinstance(tensor, Shape) else tensor).untyped_storage()
        known = self._parts.get(storage._cdata)
        if known is not None:
            if part is not None and known[0] != part:
                self.held[known[0]] -= known[1]
                self.held[part] += known[1]
                known[0] = part
            return
        if not storage.nbytes():
            return
        size = _blocks(storage.nbytes() if size is None else size)
        part = part or self.making or ("logits" if self._is_logits(tensor) else "activations")
        entry = self._parts[storage._cdata] = [part, size]
        weakref.finalize(storage, self._free, storage._cdata, entry).atexit = False
        self.held[part] += size
        self.total += size
        self.note()

    def hold(self, tensor: Tensor, size: int, part: str) -> None:
        """Count a tensor that is counted already as so many bytes, and as that part, from now on."""
        entry = self._parts[(tensor.twin if isinstance(tensor, Shape) else tensor).untyped_storage()._cdata]
        self._free_of(entry)
        entry[:] = part, _blocks(size)
        self.held[part] += entry[1]
        self.total += entry[1]
        self.note()

    def note(self) -> None:
        """Take what is held now as the peak of the phase, if it is."""
        if self.total > self.highest[self.phase]:
            self.highest[self.phase] = self.total
            self.peaks[self.phase] = {name: bytes_ for name, bytes_ in self.held.items() if bytes_}

    def _is_logits(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()

    def _free(self, key: int, entry: list[Any]) -> None:
        if self._parts.get(key) is entry:
            del self._parts[key]
        self._free_of(entry)

    def _free_of(self, entry: list[Any]) -> None:
        self.held[entry[0]] -= entry[1]
        self.total -= entry[1]

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what the block does as a phase of its own."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextlib.contextmanager
    def as_part(self, part: str) -> Iterator[None]:
        """Count whatever the block makes as one part."""
        before, self.making = self.making, part
        try:
            yield
        finally:
            self.making = before
