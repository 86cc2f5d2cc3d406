"""The console that all commands print tables and displays on. No torch."""

from collections.abc import Iterator
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

from rlhf_pipeline.rundir.words import printable


class Console(rich.console.Console):
    """Rich's console, where text cannot steer the terminal: data, errors and names of folders are not always ours."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of a string, as wide as it will be shown."""
        return super().render_str(printable(text), **how)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Rich's segments, which are text and style apart; those of its own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
