"""Columns beside a prompt and its reply that say more of the reply: its weight, its reasoning. No libraries."""

from collections.abc import Container
from typing import Any

from rlhf_pipeline.data.columns import UNUSED, Seen, UnclearError, is_turns
from rlhf_pipeline.data.parts import REASONING, others_in_turns, said_of
from rlhf_pipeline.data.turns import Row, RowError

WEIGHTS = ("weight", "loss_weight", "sample_weight")


def weights(seen: Seen, uses: Container[str]) -> list[str]:
    """The columns that say of whole rows whether they are trained, 1, or not, 0.

    Raises:
        UnclearError: one has other values, as a share of the loss, which no stage uses.
    """
    found = [name for name in WEIGHTS if name in seen and name not in uses]
    for name in found:
        other = next((value for value in seen.values[name] if said_of(value) is None), None)
        if other is not None:
            raise UnclearError(
                f"`{name}` may say how much a row counts, and has {other}: a row is trained, 1, or not, 0",
                ({UNUSED: name}, "leaves it out"),
            )
    return found


def is_trained(row: Row, columns: list[str]) -> bool:
    """Whether a row may be trained by the columns from `weights`."""
    found = True
    for name in columns:
        value: Any = row.get(name)
        if value is None:
            continue
        said = said_of(value)
        if said is None:
            raise RowError(f"`{name}` is {value}; a row is trained, 1, or not, 0")
        found = found and said
    return found


def require_no_reasoning(seen: Seen, uses: Container[str], reply: str) -> None:
    """See that no column holds the reasoning that leads to a reply, which would be left out.

    Raises:
        UnclearError: one does, and the reply does not repeat it.
    """
    for name in REASONING:
        if name in uses or not seen.mostly(name, lambda value: isinstance(value, str)):
            continue
        if seen.repeats(name, [reply]) is None:
            raise UnclearError(
                f"`{name}` may be the reasoning that leads to the reply in `{reply}`, and would be left out; as a part "
                "of the reply it stands in a turn, {role: assistant, content: …, reasoning_content: …}",
                ({UNUSED: name}, "leaves it out"),
            )


def unused_in_turns(seen: Seen, uses: dict[str, str]) -> dict[str, None]:
    """The keys of turns that are not looked at, as `messages[].id`, each taken for nothing."""
    columns = [name for name in uses if seen.share(name, is_turns)]
    found = [f"{name}[].{key}" for name in columns for value in seen.values[name] for key in others_in_turns(value)]
    return dict.fromkeys(found)
