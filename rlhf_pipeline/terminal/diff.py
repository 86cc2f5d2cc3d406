"""What differs between two runs, as a table. No torch."""

import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_pipeline.rundir.diff import SECTIONS, SIDES
from rlhf_pipeline.rundir.headline import order, shown_as

DIGEST = re.compile(r"(.+)@([0-9a-f]{32,})")


def show(difference: dict[str, Any], console: Console) -> None:
    """Print a comparison; a difference that is the same in every common stage is shown once, at the top."""
    for side in SIDES:
        console.print(f"{side.upper()}  {escape(difference['runs'][side])}", highlight=False, soft_wrap=True)
    console.print()
    if difference["same"]:
        console.print("nothing differs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "what", "A", "B"):
        # Keys have no spaces to break at; values fold instead.
        table.add_column(column, overflow="fold", no_wrap=column in ("stage", "what"))
    table.add_column("B - A", justify="right", no_wrap=True)
    stages = difference["stages"]
    everywhere = _everywhere([stage for stage in stages if stage["only_in"] is None])
    for key, values in everywhere.items():
        _add(table, "all", key, values)
    for stage in stages:
        name = stage["name"]
        if stage["only_in"]:
            _add(table, name, "state", stage["state"], absent="no such stage")
        elif stage["state"]:
            _add(table, name, "state", stage["state"])
        for side, why in stage["unreadable"].items():
            _add(table, name, "record", {side: why}, absent="")
        for section in SECTIONS[:-1]:
            for key, values in stage[section].items():
                if everywhere.get(key) != values:
                    _add(table, name, key, values)
        first = order(stage["kind"])
        for key in sorted(stage["metrics"], key=lambda key: (first.index(key) if key in first else len(first), key)):
            _add(table, name, shown_as(stage["kind"], key), stage["metrics"][key], absent="none")
    console.print(table)


def _everywhere(stages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings, data and versions that differ in the same way in every one of several stages."""
    compared = [stage["settings"] | stage["data"] | stage["versions"] for stage in stages if not stage["unreadable"]]
    if len(compared) < 2:
        return {}
    return {key: values for key, values in compared[0].items() if all(one.get(key) == values for one in compared)}


def _add(table: Table, stage: str, what: str, values: dict[str, Any], absent: str = "not set") -> None:
    cells = [escape(_shown(values[side], "difference" in values) if side in values else absent) for side in SIDES]
    difference = values.get("difference")
    table.add_row(escape(stage), escape(what), *cells, "" if difference is None else f"{difference:+.3g}")


def _shown(value: Any, rounded: bool) -> str:
    if isinstance(value, str) and (digest := DIGEST.fullmatch(value)):
        return f"{digest[1]} ({digest[2][:8]})"
    if isinstance(value, float) and rounded:
        return f"{value:.4g}"
    return "null" if value is None else str(value)
