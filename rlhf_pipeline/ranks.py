"""The processes that train one stage together, its ranks: which one this is, and numbers over all of them.

Accelerate starts them and connects them; until it has, and with a single process, each function here is about this
process alone. What is called on one rank must be called on all, in the same order.
"""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import Tensor, distributed

Value = TypeVar("Value")


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _connected() else 1


def index() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if _connected() else 0


def local_index() -> int:
    """The number of this one among those of its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the rank that writes: files, checkpoints, logs."""
    return index() == 0


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, of the same shape and dtype on each; a new tensor where there are several."""
    if count() == 1:
        return values
    summed = values.detach().clone()
    add_up(summed)
    return summed


def add_up(values: Tensor) -> None:
    """Replace a tensor by its sum over all ranks; it has the same shape and dtype on each."""
    if count() > 1:
        distributed.all_reduce(values)


def gathered(value: Value) -> list[Value]:
    """The values that all ranks have, in the order of ranks; whatever can be pickled."""
    values: list[Value] = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether a flag is set on any rank: the answer is the same on all, so that all decide alike."""
    return any(gathered(flag))


def from_first(work: Callable[[], Value]) -> Value:
    """What the first rank alone works out, which all get; whatever can be pickled.

    The others wait for it however long it takes: a judge may take hours, and other waits here are cut off.
    """
    if count() == 1:
        return work()
    group = _patient()
    found = [work() if is_first() else None]
    distributed.broadcast_object_list(found, group=group)
    return found[0]  # type: ignore[return-value]


def share(rows: int) -> slice:
    """Which of so many rows are this rank's: neighbours, and one more or less where they do not divide."""
    bounds = [rows * rank // count() for rank in range(count() + 1)]
    return slice(bounds[index()], bounds[index() + 1])


def _connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@functools.cache
def _patient() -> Any:
    """The same ranks, where one waits for another for a month."""
    return distributed.new_group(timeout=timedelta(days=30), backend="gloo")
