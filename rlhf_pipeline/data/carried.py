"""Columns that rows keep which are made of other rows: those that every reader passes over. No libraries."""

from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.data.columns import CHOSEN, OF_THE_PROMPT, RANKED, RANKED_IN_NO_ORDER, REPLY, WHOLE, is_empty
from rlhf_pipeline.data.marks import SCORE, SCORES, THUMB
from rlhf_pipeline.data.shapes import WANTED, recognise
from rlhf_pipeline.data.turns import PAIRED, Row
from rlhf_pipeline.errors import ColumnsError

# What is read under these is of the row that a prompt is from: its prompt, its own replies, and how good they are.
OF_THE_ROW = {
    *OF_THE_PROMPT, *REPLY, *RANKED, *RANKED_IN_NO_ORDER, *WHOLE, *CHOSEN, *PAIRED, *THUMB, *SCORE, *SCORES,
    "tools", "functions", "text",
}  # fmt: skip
TRIED = 100  # rows that each column is tried on


def carried(rows: Sequence[Row], made: Sequence[Row]) -> list[str]:
    """The columns of rows that may stand in the rows that are made of them: they change nothing of how those are read.

    A function that judges or rewards gets them from there, as the answer that a question has under a name of its own.

    Args:
        rows: the rows.
        made: what is made of each, in the same order.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in OF_THE_ROW)
    names = dict.fromkeys(name for name in names if not any(name in one for one in made))
    found = []
    for name in names:
        both = [(row, one) for row, one in zip(rows, made, strict=True) if not is_empty(row.get(name))][:TRIED]
        plain = [one for _, one in both]
        if both and _readings(plain) == _readings([one | {name: row[name]} for row, one in both], name):
            found.append(name)
    return found


def _readings(rows: Sequence[Row], passed_over: str | None = None) -> list[Any]:
    """How each reader reads rows, or why it does not; a column that is passed over is left out."""
    found: list[Any] = []
    for wanted in WANTED:
        try:
            shape = recognise(rows, wanted)
        except ColumnsError as error:
            found.append(
                bool(error.ways)
            )  # what is not read is not read with the column either, and no more is unclear
            continue
        used_as = {name: use for name, use in shape.used_as.items() if (name, use) != (passed_over, None)}
        found.append((shape.name, shape.says, used_as))
    return found
