"""How many rows of each source of a mix are used. No libraries."""

from collections.abc import Sequence

from rlhf_pipeline.recipe.schema import Data


def shares(spec: Data) -> list[float] | None:
    """Each source's share of the mix; None without weights."""
    weights = [source.weight for source in spec.mix if source.weight is not None]  # of all sources, or of none
    return [weight / sum(weights) for weight in weights] or None


def taken(lengths: Sequence[int], spec: Data) -> list[int]:
    """How many rows of each source are used: all, or as many as the weights allow with none twice.

    Args:
        lengths: how many rows each has.
        spec: the recipe's `data`.
    """
    parts = shares(spec)
    if parts is None:
        return list(lengths)
    total = min(length / share for length, share in zip(lengths, parts, strict=True))
    return [min(length, max(1, round(total * share))) for length, share in zip(lengths, parts, strict=True)]
