"""The door: commands that parse, call and print. Data goes to standard output, everything else to standard error."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlhf_pipeline import __version__
from rlhf_pipeline.errors import InputError, RunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it answers at once
    pretty_exceptions_enable=False,
    help="Fine-tune a language model from one YAML recipe: SFT, reward model, PPO and DPO on one GPU.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's path, or the name of a shipped one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, as ppo.trainer.kl_coef=0.1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Take the options that stand before a command."""
    if version:
        typer.echo(f"rlhf-pipeline {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="Run this stage even if it is done.")] = None,
) -> None:
    """Run the stages of a recipe that are not done yet.

    For example: rlhf-pipeline run tiny --until reward
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables
    from rlhf_pipeline.run import runner

    loaded = recipes.load(recipe, overrides or [])
    try:
        plans = runner.run(loaded, until=until, only=only, force=force, say=_say)
    except KeyboardInterrupt:
        _fail("interrupted", "stages that are done stay usable; the same command goes on from there", 130)
    tables.results(loaded.run, plans, Console())


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="Run this stage even if it is done.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages would run, and why; takes what `run` takes.

    For example: rlhf-pipeline plan tiny ppo.trainer.kl_coef=0.1
    """
    from rich.console import Console

    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables

    loaded = recipes.load(recipe, overrides or [])
    stages = plans.make(loaded)
    chosen = plans.select(stages, until, only, force or [])
    if as_json:
        object_ = tables.as_json(loaded.run, stages)
        for stage in object_["stages"]:
            stage["will_run"] = stage["name"] in {plan.name for plan in chosen}
        typer.echo(json.dumps(object_, indent=2))
    else:
        tables.intentions(stages, chosen, Console())


@app.command()
def status(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what each stage made: state, time and final numbers.

    For example: rlhf-pipeline status tiny --json
    """
    from rich.console import Console

    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables

    loaded = recipes.load(recipe, overrides or [])
    stages = plans.make(loaded)
    if as_json:
        typer.echo(json.dumps(tables.as_json(loaded.run, stages), indent=2))
    else:
        tables.results(loaded.run, stages, Console())


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe, its settings and all its data, without training.

    For example: rlhf-pipeline validate my-recipe.yaml
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.run import runner

    loaded = recipes.load(recipe, overrides or [])
    runner.check(loaded)
    typer.echo(f"{recipe}: {len(loaded.stages)} stages, nothing wrong")


@app.command("ls")
def list_recipes() -> None:
    """List the shipped recipes."""
    from rlhf_pipeline import recipe as recipes

    for name, path in recipes.shipped().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<20} {first}")


@app.command("cp")
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="The name of a shipped recipe.", show_default=False)],
    to: Annotated[Path | None, typer.Argument(help="Where to; by default NAME.yaml here.", show_default=False)] = None,
) -> None:
    """Copy a shipped recipe, to edit it.

    For example: rlhf-pipeline cp full-pipeline my-recipe.yaml
    """
    from rlhf_pipeline import recipe as recipes

    if recipe not in recipes.shipped():
        raise InputError(f"there is no shipped recipe `{recipe}`", hint=f"there are {', '.join(recipes.shipped())}")
    target = to or Path(f"{recipe}.yaml")
    if target.is_dir():
        target = target / f"{recipe}.yaml"
    if target.exists():
        raise InputError(f"{target} exists already", hint="name another file")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent}")
    shutil.copyfile(recipes.shipped()[recipe], target)
    typer.echo(str(target))


@app.command()
def env() -> None:
    """Print versions and hardware, to paste into a bug report."""
    from rlhf_pipeline import plan as plans

    lines = {"rlhf-pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    lines |= {name: version for name, version in plans.versions().items() if name != "rlhf-pipeline"}
    lines |= {"cpus": str(os.cpu_count()), "gpu": _gpu()}
    for name, value in lines.items():
        typer.echo(f"- {name}: {value}")


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none found"
    return "; ".join(answer.stdout.strip().splitlines())


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    sys.exit(code)


def main() -> None:
    """The `rlhf-pipeline` command."""
    try:
        app()
    except InputError as error:
        _fail(str(error), error.hint, 2)
    except RunError as error:
        _fail(error.message, error.hint, 1)
