"""What runs have moved aside, as a table. No torch."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_pipeline.rundir.headline import headline
from rlhf_pipeline.rundir.words import duration


def show(asides: list[dict[str, Any]], console: Console) -> None:
    """Print what `find` listed, and how much it is in all.

    Args:
        asides: from `find`.
        console: where to.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("moved aside", "was", "age", "size"):
        table.add_column(column, overflow="fold", justify="right" if column in ("age", "size") else "left")
    for aside in asides:
        was = aside["state"] or "without a record"
        numbers = aside["metrics"] if isinstance(aside["metrics"], dict) else {}
        for number in headline(aside["kind"], numbers)[:1]:
            was += f", {number.name} {number.text}"
        seconds = time.time() - aside["moved_at"]
        age = duration(seconds) if seconds >= 60 else "just now"
        table.add_row(escape(aside["name"]), escape(was), age, size_text(aside["bytes"]))
    console.print(table)
    total = size_text(sum(aside["bytes"] for aside in asides))
    console.print(f"{len(asides)} {'folder' if len(asides) == 1 else 'folders'}, {total}", highlight=False)


def size_text(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
