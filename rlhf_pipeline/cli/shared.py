"""What all commands share: the app, the arguments that several take, and where lines go. No torch."""

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_pipeline import __version__
from rlhf_pipeline.cli import completion
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.words import printable


def examples(*examples: tuple[str, str]) -> str:
    """The end of a command's help: what to type, each with what it does."""
    lines = [line for arguments, does in examples for line in (f"  # {does}", f"  rlhf-pipeline {arguments}")]
    return "\n".join(["\b", "Examples:", *lines])  # \b: lines stay as they are


# What the commands are for, in the order of the help.
GROUPS = {
    "Start": ("ls", "cp", "schema", "docs", "env"),
    "Check": ("plan", "validate", "show", "data", "forecast", "smoke", "shrink"),
    "Run": ("run", "label", "sweep", "watch", "status"),
    "Look": ("runs", "report", "diff", "compare", "chat", "arena", "score", "serve"),
    "Keep": ("export", "prune"),
}


class Grouped(TyperGroup):
    """The command, whose help groups its commands. Typer does that only with Rich, which takes longer to import."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write a section for each group."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", self.commands[name].get_short_help_str(formatter.width - width - 6))
                        for name in names
                        if name in self.commands
                    ]
                )


app = typer.Typer(
    cls=Grouped,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it answers at once
    pretty_exceptions_enable=False,
    help="Fine-tune a language model from one YAML recipe: SFT, reward model, PPO and DPO.",
    epilog=examples(
        ("run tiny", "see it work, on the tiny model that ships with it"),
        ("cp full-pipeline my-recipe.yaml", "begin a recipe of your own, every key explained"),
        ("plan my-recipe.yaml", "see what it would do"),
        ("smoke my-recipe.yaml", "see it work, without a GPU"),
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe's path, the name of a shipped one, or a run directory.", show_default=False,
        autocompletion=completion.recipes,
    ),
]  # fmt: skip
RunArgument = Annotated[
    str,
    typer.Argument(
        help="A run directory, or the recipe it was made with.", show_default=False, autocompletion=completion.recipes
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to override, as ppo.trainer.kl_coef=0.1.")
]
Until = Annotated[str | None, typer.Option(help="Stop after this stage.", autocompletion=completion.stages)]
Only = Annotated[str | None, typer.Option(help="Run this stage alone.", autocompletion=completion.stages)]
Force = Annotated[
    list[str] | None, typer.Option(help="Run this stage even if it is done.", autocompletion=completion.stages)
]
TrustVersions = Annotated[
    bool, typer.Option("--trust-versions", help="Keep stages that other versions of the libraries made.")
]
IgnoreGates = Annotated[bool, typer.Option("--ignore-gates", help="Continue past closed gates.")]
NoReuse = Annotated[bool, typer.Option("--no-reuse", help="Train even what another run, or this one formerly, made.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Stream the log of the stage at work.")]
Gpu = Annotated[
    str | None,
    typer.Option(metavar="SIZE|NAME", help="The card, as `24GB` or `RTX 4090`; by default the one that is here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Take the options that are given before a command."""
    if version:
        typer.echo(f"rlhf-pipeline {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries that are imported inside the block.

    They see one device, as those of a worker do. Progress bars of downloads and of weights that are read are shown only
    on a terminal.
    """
    from rlhf_pipeline.run.launch import ENVIRONMENT, one_device

    os.environ.update(ENVIRONMENT | one_device(os.environ) | {"TRANSFORMERS_VERBOSITY": "error"})
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.update({"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    # On some processors it asks for a package that computes in 4 bits faster, and less exactly; see models.loading.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Accelerate imports it where it is installed, and it writes to standard output, where data are.
    logging.getLogger("DeepSpeed").disabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries', of their own use of each other
        yield


def show(address: str) -> None:
    """Open an address in the browser; where there is none, say so."""
    import webbrowser

    if not webbrowser.open(address):
        say("there is no browser here to open it with")


def require_web(what: str, modules: Mapping[str, str]) -> None:
    """See that what a page or a server needs is installed.

    Args:
        what: is asked for, at the beginning of a sentence.
        modules: that it imports, each with the name of its package.

    Raises:
        InputError: one is not there.
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install {' '.join(missing)}, as the extra `arena` does",
        )


def say(line: str) -> None:
    """Print a line on standard error; it cannot steer the terminal, whatever an error or data may have put into it."""
    with contextlib.suppress(OSError):  # a terminal that was closed must not end a run
        typer.echo(printable(line), err=True)
