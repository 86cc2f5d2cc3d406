"""The alarms of a run on a terminal, and as JSON. No torch."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from rlhf_pipeline.report.alarms import Alarm, verdict
from rlhf_pipeline.rundir.words import one_line
from rlhf_pipeline.terminal.console import Console

STYLES = {"bad": "red", "look": "yellow"}


def style_of(found: Sequence[Alarm]) -> str:
    """The colour of the verdict."""
    return next((STYLES[level] for level in STYLES if any(alarm.level == level for alarm in found)), "green")


def show_alarms(found: Sequence[Alarm], console: Console) -> None:
    """Print the verdict, and a line for each alarm; none for the states of stages, which the table above shows."""
    console.print(Text(one_line(verdict(found)), style=f"bold {style_of(found)}"), soft_wrap=True)
    for alarm in found:
        if not alarm.is_state:
            level = "alarm" if alarm.level == "bad" else "look"
            line = Text.assemble("  ", (f"{level:<7}", STYLES[alarm.level]), one_line(f"{alarm.where}: {alarm.text}"))
            console.print(line, soft_wrap=True)


def as_json(found: Sequence[Alarm]) -> dict[str, Any]:
    """The keys `verdict` and `alarms` of `status --json`."""
    listed = [{key: value for key, value in asdict(alarm).items() if key != "is_state"} for alarm in found]
    return {"verdict": verdict(found), "alarms": listed}
