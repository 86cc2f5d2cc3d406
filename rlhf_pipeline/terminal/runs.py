"""The runs in a folder as a table on the terminal."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_pipeline.rundir.listing import Listed
from rlhf_pipeline.rundir.words import duration, memory
from rlhf_pipeline.terminal.tables import STYLES

ORDERS = ("name", "state", "age", "size")  # of which the table has columns anyway


def show(found: Sequence[Listed], key: str, console: Console) -> None:
    """Print runs: state, age, size, and of each stage its key number, or its state where it is not done.

    Args:
        found: in the order in which to show them.
        key: what they are sorted by; a number has a column of its own.
        console: where to.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("run", "state", "age", "size", *([] if key in ORDERS else [escape(key)]), "stages"):
        table.add_column(column, overflow="fold")
    for one in found:
        word = one.run.state
        age = "" if one.changed_at is None else duration(max(0.0, time.time() - one.changed_at))
        value = one.number(key)
        number = [] if key in ORDERS else ["" if value is None else f"{value:.3g}"]
        style = STYLES.get("failed" if word == "gate closed" else word, "default")
        table.add_row(escape(one.name), f"[{style}]{word}[/]", age, memory(one.bytes), *number, escape(_stages(one)))
    console.print(table)


def _stages(one: Listed) -> str:
    told = []
    for stage in one.run.stages:
        number = one.key_number(stage)
        words = [stage.name] if stage.state == "done" else [stage.name, stage.state]
        told.append(" ".join([*words, *([f"{number.name} {number.after:.3g}"] if number else [])]))
    return "; ".join(told)
