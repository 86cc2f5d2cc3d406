"""The runs of a sweep as a table on the terminal."""

import os
import shlex

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.rundir.words import duration, short
from rlhf_pipeline.sweep.keys import as_text
from rlhf_pipeline.sweep.results import Change, Result, Results
from rlhf_pipeline.terminal.console import Console
from rlhf_pipeline.terminal.tables import STYLES

BESIDE = ("reply/length", "reply/ended")  # numbers that are not what a sweep is about


def show(found: Results, console: Console) -> None:
    """Print the values of each run, what its numbers came to from start to end, its time and its state."""
    done = [one for one in found.runs if one.numbers.get(found.stage)]
    metrics = list(dict.fromkeys(metric for one in done for metric in one.numbers[found.stage] if metric not in BESIDE))
    names = {
        metric: one.numbers[found.stage][metric].name
        for metric in metrics
        for one in done[::-1]
        if metric in one.numbers[found.stage]
    }
    goal = found.goal
    apart = [] if goal is None or goal.metric in metrics else [goal.metric]
    best = found.best
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in (*(key.rpartition(".")[2] for key in found.keys), *(names[metric] for metric in metrics), *apart):
        table.add_column(escape(column), overflow="fold")
    table.add_column("time", no_wrap=True)
    table.add_column("state", overflow="fold")
    for one in found.runs:
        numbers = one.numbers.get(found.stage, {})
        cells = [as_text(one.combination.values[key]) for key in found.keys]
        cells += [_change(numbers.get(metric)) for metric in metrics]
        cells += ["" if one.value is None else short(one.value) for _ in apart]
        style = STYLES.get("failed" if one.state == "gate closed" else one.state, "default")
        state = f"[{style}]{one.state}[/]" + (f": {escape(one.why)}" if one.why else "")
        state += ", best" if one is best else ""
        time = "" if not one.wall_s else duration(one.wall_s)
        table.add_row(*map(escape, cells), time, state, style="bold" if one is best else None)
    shared = (
        f"; {', '.join(found.shared)} {'is' if len(found.shared) == 1 else 'are'} the same in all"
        if found.shared
        else ""
    )
    console.print(f"stage {found.stage}, start → end{shared}", style="dim", highlight=False, soft_wrap=True)
    console.print(table)
    if best is not None and goal is not None:
        console.print(Text(f"the best by {goal}: {best.combination}{_as_good(found)}"), soft_wrap=True)
    elif goal is None:
        console.print("no run is marked as the best: `--maximize STAGE.METRIC` says by what", soft_wrap=True)
    for command, does in _next(found):
        console.print(Text.assemble("  ", command, (f"  # {does}", "dim")), soft_wrap=True)


def _change(number: Change | None) -> str:
    if number is None:
        return ""
    after = short(number.after) + number.rests_on
    return after if number.before is None else f"{short(number.before)} → {after}"


def _as_good(found: Results) -> str:
    """The runs that may be as good, in a few words."""
    others = found.as_good
    if not others:
        return ""
    named = ", ".join(str(one.combination) for one in others[:3]) + (" and others" if len(others) > 3 else "")
    return f"; within the noise as good: {named}"


def _next(found: Results) -> list[tuple[str, str]]:
    """The commands that make sense now, each with what it does."""
    best, commands = found.best, []
    if found.command:
        commands.append((found.command, "the best as a run of its own, which is taken from here"))
    if best is not None:
        commands.append((f"rlhf-pipeline chat {_quoted(best)}", "talk to it"))
    if found.report:
        commands.append((f"file://{found.report.absolute()}", "all runs overlaid"))
    widest = max((len(command) for command, _ in commands), default=0)
    return [(f"{command:<{widest}}", does) for command, does in commands]


def _quoted(one: Result) -> str:
    return shlex.quote(min(str(one.path), os.path.relpath(one.path), key=len))
