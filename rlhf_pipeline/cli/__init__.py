"""The command line: commands that parse, call and print. Data go to standard output, all else to standard error."""

import sys
import traceback

from rlhf_pipeline.cli import runs, recipes, results, sweeps, arena, serving  # isort: skip  the order of their commands in the help
from rlhf_pipeline.cli.shared import app, say
from rlhf_pipeline.errors import InputError, Interrupted, RunError, Waiting

__all__ = ["app", "arena", "main", "recipes", "results", "runs", "serving", "sweeps"]


def _complain(message: str, hint: str | None) -> None:
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")


def _show_fault() -> None:
    """Show a traceback, of a fault of ours or of a library; its words may hold anything, and must not steer either."""
    say(traceback.format_exc().rstrip())


def main() -> None:
    """The `rlhf-pipeline` command."""
    try:
        app()
    except InputError as error:
        for problem in error.all:
            _complain(str(problem), problem.hint)
        sys.exit(2)
    except RunError as error:
        _complain(error.message, error.hint)
        sys.exit(1)
    except OSError as error:  # of a file that the command itself writes, or of standard output
        if error.errno is None:
            _show_fault()
        else:
            _complain(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}", None)
        sys.exit(1)
    except Interrupted as stop:
        say(stop.message)
        say(stop.then)
        sys.exit(130)
    except Waiting as waiting:
        say(waiting.message)
        if waiting.hint:
            say(f"hint: {waiting.hint}")
        sys.exit(3)
    except Exception:
        _show_fault()
        sys.exit(1)
