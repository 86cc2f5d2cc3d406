"""A forecast of memory as people read it."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.forecast.result import PARTS, Forecast, StageForecast
from rlhf_pipeline.rundir.words import memory
from rlhf_pipeline.terminal.console import Console

_SHORT = {"activations": "activ.", "optimizer": "optim.", "overhead": "CUDA"}  # a table of 80 columns has room for that


def show(forecast: Forecast, console: Console) -> None:
    """Print each stage's phases with their parts, then what fits and what to change."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("stage", "phase"):
        table.add_column(column, no_wrap=True)
    parts = [part for part in PARTS if any(part in phase.parts for stage in forecast.stages for phase in stage.phases)]
    for column in ("GiB", *(_SHORT.get(part, part) for part in parts)):
        table.add_column(column, no_wrap=True, justify="right")
    for stage in forecast.stages:
        for number, phase in enumerate(stage.phases):
            cells = [_gibibytes(phase.parts.get(part, 0)) for part in parts]
            style = "bold" if phase is stage.highest else ""
            name = escape(stage.name) if number == 0 else ""
            table.add_row(name, phase.name, _gibibytes(phase.total), *cells, style=style)
    console.print(table)
    for stage in forecast.stages:
        console.print(Text(f"{stage.name}: {verdict(stage, forecast)}"), highlight=False, soft_wrap=True)
        for change in stage.changes:
            keys = " ".join(f"{key}={value}" for key, value in change.overrides.items())
            console.print(
                Text(f"  {keys}  → {memory(change.peak)} (costs {change.costs})"), highlight=False, soft_wrap=True
            )
        for note in stage.notes:
            console.print(Text(f"  {note}"), style="dim", highlight=False, soft_wrap=True)
    for note in forecast.notes:
        console.print(Text(note), style="dim", highlight=False, soft_wrap=True)
    console.print(line(forecast), highlight=False, soft_wrap=True)


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f}" if size else ""


def verdict(stage: StageForecast, forecast: Forecast) -> str:
    """One stage in a sentence."""
    said = f"{memory(stage.peak)} in {stage.highest.name}, with texts of {stage.whole_tokens:,} tokens"
    if stage.batch_size is not None:
        said += f" in batches of {stage.batch_size}"
    if forecast.usable is None:
        return said
    if stage.peak <= forecast.usable:
        largest = f"; up to {stage.largest_batch} would fit" if stage.largest_batch else ""
        return said + largest
    if not stage.changes:
        return f"{said}: does not fit, and nothing that could be changed would make it"
    enough = stage.changes[-1].peak <= forecast.usable
    return f"{said}: does not fit; {'change' if enough else 'not even this is enough'}, in this order:"


def in_short(forecast: Forecast) -> str:
    """What each stage takes, and whether it fits, in one line."""
    sizes = ", ".join(f"{stage.name} {memory(stage.peak)}" for stage in forecast.stages)
    less = ", ".join(stage.name for stage in forecast.stages if stage.uncounted)
    if less:
        sizes += f" (what is moved off the GPU in {less} is not counted)"
    if forecast.usable is None or not sizes:
        return sizes or "no stage holds a model"
    room = f"the {memory(forecast.usable)} of {forecast.card}"
    too_large = [stage.name for stage in forecast.stages if stage.peak > forecast.usable]
    return f"{sizes}; " + (f"too much for {room}: {', '.join(too_large)}" if too_large else f"all fit in {room}")


def line(forecast: Forecast) -> str:
    """The whole forecast in one line."""
    highest = forecast.highest
    if highest is None:
        return "no stage holds a model"
    said = f"peak {memory(highest.peak)} in {highest.name} ({highest.highest.name})"
    if forecast.usable is None:
        return said
    return f"{said}: {'fits' if forecast.fits else 'does not fit'} in the {memory(forecast.usable)} of {forecast.card}"
