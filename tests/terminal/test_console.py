"""What is printed cannot steer the terminal, whichever way it comes to the console."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.terminal.console import Console

EVIL = "\x1b[2J\x9b31m\u202eback"


@pytest.mark.parametrize("made", [str, Text], ids=["str", "Text"])
@pytest.mark.parametrize("in_table", [False, True])
def test_only_the_consoles_own_codes_reach_the_terminal(made: type, in_table: bool) -> None:
    output, table = io.StringIO(), Table(box=None)
    table.add_column("what", style="red")
    table.add_row(made(EVIL))
    console = Console(file=output, force_terminal=True, color_system="standard", width=40)
    console.print(table if in_table else made(EVIL), style="red")
    said = output.getvalue()
    assert "␛" in said and "\x1b[31m" in said
    assert not {"\x9b", "\u202e"} & set(said) and "\x1b[2J" not in said
