"""Which prompts and demonstrations come when, and whether there are enough of them."""

import random
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from rlhf_pipeline.ppo.config import PPOConfig

LEAST_WHITENED = 8  # episodes, as in TRL, which counts those of a process's mini-batch


def check_data(
    args: PPOConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    ptx_dataset: Dataset | None,
    processes: int = 1,
) -> None:
    """See that there is enough of every kind of data that the settings ask for, and enough of it in an update.

    Args:
        args: the settings.
        train_dataset: prompts.
        eval_dataset: prompts that are held out; None where there are none.
        ptx_dataset: demonstrations; None where there are none.
        processes: how many train together. An update has the episodes of all, and rewards are whitened over them.

    Raises:
        ValueError: there is not.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if len(train_dataset) < batch:
        of = f", which {processes} processes share" if processes > 1 else ""
        raise ValueError(
            f"{len(train_dataset)} prompts are fewer than one batch of {batch}{of}: lower "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`, or give more prompts"
        )
    if args.whiten_rewards and batch < LEAST_WHITENED:
        raise ValueError(f"`whiten_rewards` needs updates of at least {LEAST_WHITENED} episodes, and they have {batch}")
    if pc.min(pc.list_value_length(train_dataset.data.column("input_ids"))).as_py() == 0:
        raise ValueError("a prompt is empty: a reply needs at least one token to follow")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError("`eval_strategy` is set, and no prompts are held out to evaluate on")
    if bool(args.ptx_coef) != (ptx_dataset is not None):
        raise ValueError("`ptx_coef` and `ptx_data` (demonstrations) go together: one is given without the other")


def shuffled(length: int, start: int, count: int, seed: int, name: str) -> list[int]:
    """Entries `start` to `start + count` of an endless row of passes over `length` things, each pass shuffled."""
    entries: list[int] = []
    while len(entries) < count:
        number, offset = divmod(start + len(entries), length)
        entries += permutation(length, seed, name, number)[offset : offset + count - len(entries)].tolist()
    return entries


def permutation(length: int, seed: int, *which: Any) -> Tensor:
    """A random order of `length` things that depends on the seed and on which it is, and on nothing before it."""
    generator = torch.Generator().manual_seed(random.Random(repr((seed, *which))).getrandbits(63))
    return torch.randperm(length, generator=generator)


def seeds(seed: int, *which: Any, places: range) -> list[int]:
    """What decides the random numbers of the replies at some places of a batch, which is named by `which`."""
    return [random.Random(repr((seed, *which, place))).getrandbits(63) for place in places]


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of token ids, int64 `[B, longest]`, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
