"""How the ranks of a stage come together: connected, on a device each, and agreed on libraries and rows."""

import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import distributed

from rlhf_pipeline import ranks
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.models.base import resolve_dtype
from rlhf_pipeline.plan import versions
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.schema import Data
from rlhf_pipeline.stages.job import Read, Reader

TIMEOUT = "RLHF_PIPELINE_RANK_TIMEOUT"  # an environment variable, in seconds
TIMEOUT_S = 300.0  # how long ranks wait for one another
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}


def meet(recipe: Recipe) -> None:
    """Connect this rank with the others.

    Raises:
        RunError: one of them has other libraries.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_index())
    os.environ["ACCELERATE_MIXED_PRECISION"] = _PRECISIONS[resolve_dtype(recipe.model.dtype)]
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, TIMEOUT_S)))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    require_alike("versions of the libraries", versions() | {"python": platform.python_version()})


def require_alike(what: str, values: Mapping[str, str]) -> None:
    """See that all ranks have the same.

    Args:
        what: it is, in the plural.
        values: this rank's, by name.

    Raises:
        RunError: one has something else; all ranks raise it alike.
    """
    found = ranks.gathered((socket.gethostname(), dict(values)))
    usual = Counter(tuple(sorted(one.items())) for _, one in found).most_common(1)[0][0]
    for rank, (host, one) in enumerate(found):
        if tuple(sorted(one.items())) == usual and one == found[0][1]:
            continue
        other = found[0][1]
        differing = next(name for name in {**other, **one} if other.get(name) != one.get(name))
        raise RunError(
            f"rank {rank} of {len(found)} (on {host}) has other {what} than rank 0 (on {found[0][0]}): {differing} is "
            f"{one.get(differing, 'missing')} there, and {other.get(differing, 'missing')} here",
            hint="all processes of a stage need the same",
        )


class SameRows(Reader):
    """A reader whose rows are those of all ranks, or nothing is trained."""

    def read(self, read: Read, data: Data) -> Prepared:
        """Rows as a function of `data.prepare` makes them.

        Raises:
            RunError: another rank has other ones.
        """
        prepared = super().read(read, data)
        sets = {"rows": prepared.train, "held-out rows": prepared.held_out}
        said = {name: f"{len(rows)} rows with the digest {digest(rows)}" for name, rows in sets.items() if rows}
        require_alike("data", said)
        return prepared


def digest(rows: Dataset) -> str:
    """16 digits of what rows hold."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(rows.column_names):
        hashed.update(name.encode())
        for batch in rows.select_columns(name).with_format("arrow").iter(batch_size=10_000):
            # In one piece, since where the pieces end depends on how the rows came here.
            hashed.update(_bytes(pa.concat_arrays(batch.column(name).chunks)))
    return hashed.hexdigest()


def _bytes(column: pa.Array) -> bytes:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), -1)
        return _bytes(lengths) + _bytes(column.flatten())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False).tobytes()
    return repr(column.to_pylist()).encode("utf-8", "surrogatepass")
