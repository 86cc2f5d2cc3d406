"""The `.jsonl` files of a run directory, which may be growing while they are read. No torch."""

import json
from pathlib import Path
from typing import Any


def whole_lines(file: Path) -> list[str]:
    """The lines of a file, but for a last one that was not written whole; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return [line for line in lines if line.endswith("\n")]


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line; lines that hold none are passed over."""
    return [row for row in map(parse, whole_lines(file)) if row is not None]


def parse(line: str) -> dict[str, Any] | None:
    """The object that a line holds; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
