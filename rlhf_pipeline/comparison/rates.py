"""How often one policy's reply is better than another's to the same prompt. No torch."""

import itertools
from collections.abc import Sequence

from rlhf_pipeline.shares import interval


def in_pairs(policies: list[str]) -> list[tuple[str, str]]:
    """Each earlier policy with each later one."""
    return sorted(itertools.combinations(policies, 2), key=lambda pair: policies.index(pair[1]))


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, float] | None:
    """How often one policy's reply is better than another's to the same prompt, a tie counting half.

    The interval is of the share of prompts, which were drawn from a wider world, each with its two replies; see
    `shares.interval`.

    Args:
        ours: a score for each prompt; higher is better.
        theirs: the other policy's, of the same prompts.

    Returns:
        `win_rate`, `low` and `high`, and the share of `ties`; None where no prompt has both scores.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    low, high = interval(wins + ties / 2, len(pairs))
    return {"win_rate": (wins + ties / 2) / len(pairs), "low": low, "high": high, "ties": ties / len(pairs)}
