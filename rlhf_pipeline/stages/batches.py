"""What each rank has of a batch: the batches of several ranks together are those that one process would have."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from rlhf_pipeline import ranks

IGNORED = -100  # as a label: a token without loss


class Spare(dict[str, Any]):
    """The batch of a rank for which no row is left: one that counts nothing, so that it takes part in the step."""


class SpareRows(list[Any]):
    """The same, of rows that are not collated yet."""


def is_spare(batch: Any) -> bool:
    """Whether a batch counts nothing."""
    return isinstance(batch, (Spare, SpareRows))


class Shares:
    """The batches of all ranks, of which this one gets its own rows: neighbours, and none where they are too few.

    Accelerate's own shares are the same but for the last batch, which it fills up with rows from the beginning.

    Args:
        whole: batches of the rows of all ranks, the same on each.
        group: how many rows in a row stay together.
        before: begin with the row before the first one, the last of all before the very first, for what needs a
            neighbour; except where a batch has one row alone.
    """

    def __init__(self, whole: BatchSampler, group: int = 1, before: bool = False) -> None:
        self.whole, self.group, self.before = whole, group, before
        self.sampler = whole.sampler  # where Accelerate looks for what takes the number of an epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            groups = ranks.share(len(batch) // self.group)
            own = slice(groups.start * self.group, groups.stop * self.group)
            neighbour = [batch[own.start - 1]] if self.before and len(batch) > 1 and own.start < own.stop else []
            yield neighbour + batch[own]

    def __len__(self) -> int:
        return len(self.whole)


def share_out(loader: DataLoader, group: int = 1, before: bool = False) -> None:
    """Let a loader that Accelerate has prepared, with batches of all ranks' rows, yield `Shares`."""
    shard: Any = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or type(shard.batch_sampler) is not BatchSampler:
        return  # Transformers' sampler that balances lengths is made for ranks
    shard.batch_sampler = Shares(shard.batch_sampler, group, before)
    # All that is yielded is this rank's.
    shard.num_processes, shard.process_index, shard.batch_size, shard.even_batches = 1, 0, None, False


class WithSpare:
    """A collator that makes a `Spare` of no rows.

    Args:
        collate: TRL's collator.
        row: any row, which a spare batch is made of.
        group: of how many.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], row: Any, group: int = 1) -> None:
        self.collate, self.row, self.group = collate, row, group

    def __call__(self, rows: list[Any]) -> Any:
        """A batch of encoded rows."""
        if rows:
            return self.collate(rows)
        found = self.collate([self.row] * self.group)
        if not isinstance(found, Mapping):
            return SpareRows(found)
        batch = Spare(found)
        if isinstance(batch.get("labels"), Tensor):
            batch["labels"] = batch["labels"].new_full(batch["labels"].shape, IGNORED)
        return batch
