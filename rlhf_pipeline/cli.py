"""The door: commands that parse, call and print. Data goes to standard output, everything else to standard error."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline import __version__
from rlhf_pipeline.errors import InputError, Interrupted, RunError

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
RunArgument = Annotated[
    str, typer.Argument(help="A run directory, or the recipe it was made with.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, as ppo.trainer.kl_coef=0.1.")
]
TrustVersions = Annotated[
    bool, typer.Option("--trust-versions", help="Keep stages that other versions of the libraries made.")
]
IgnoreGates = Annotated[bool, typer.Option("--ignore-gates", help="Go on past gates that are closed.")]
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
    trust_versions: TrustVersions = False,
    ignore_gates: IgnoreGates = False,
) -> None:
    """Run the stages of a recipe that are not done yet, each from where it broke off.

    Ctrl-C or SIGTERM stops after the current step, with a checkpoint; the same command goes on from there. A second
    one stops at once.

    For example: rlhf-pipeline run tiny --until reward
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables
    from rlhf_pipeline.run import runner

    loaded = recipes.load(recipe, overrides or [])
    try:
        plans = runner.run(
            loaded,
            until=until,
            only=only,
            force=force,
            trust_versions=trust_versions,
            ignore_gates=ignore_gates,
            say=_say,
        )
    except KeyboardInterrupt:  # typer has an answer of its own to it
        raise Interrupted("interrupted") from None
    tables.results(loaded.run, plans, Console())


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="Run this stage even if it is done.")] = None,
    trust_versions: TrustVersions = False,
    ignore_gates: IgnoreGates = False,
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
    stages = plans.make(loaded, trust_versions=trust_versions, ignore_gates=ignore_gates)
    chosen = [
        stage
        for stage in plans.select(stages, until, only, force or [])
        if not stage.stands or stage.state == "done"  # else its gate is closed, which ends the run
    ]
    if as_json:
        object_ = tables.as_json(loaded.run, stages) | {"trust_remote_code": loaded.model.trust_remote_code}
        for stage in object_["stages"]:
            stage["will_run"] = stage["name"] in {plan.name for plan in chosen}
        typer.echo(json.dumps(object_, indent=2))
    else:
        tables.intentions(stages, chosen, loaded.model.path if loaded.model.trust_remote_code else None, Console())


@app.command()
def status(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    trust_versions: TrustVersions = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing; exit with 0 if every stage is done, else 1.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each stage made: state, time and final numbers.

    For example: rlhf-pipeline status tiny --json
    """
    from rich.console import Console

    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables

    loaded = recipes.load(recipe, overrides or [])
    stages = plans.make(loaded, trust_versions=trust_versions)
    if quiet:
        raise typer.Exit(0 if all(stage.state == "done" and not stage.to_judge for stage in stages) else 1)
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
    runner.check(loaded, _say)
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


@app.command()
def diff(run_a: RunArgument, run_b: RunArgument, as_json: AsJson = False) -> None:
    """Show what differs between two runs: settings, data, versions, final numbers.

    For example: rlhf-pipeline diff runs/first runs/second
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import diff as diffs

    difference = diffs.compare(recipes.run_directory(run_a), recipes.run_directory(run_b))
    if as_json:
        typer.echo(json.dumps(difference, indent=2))
    else:
        diffs.show(difference, Console())


@app.command()
def prune(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List former results that later runs moved aside, and remove them if you say so.

    For example: rlhf-pipeline prune runs/tiny
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables
    from rlhf_pipeline.run import prune as pruning

    directory = recipes.run_directory(run)
    asides = pruning.find(directory)
    names = [aside["name"] for aside in asides]
    if as_json:  # never asks
        if yes:
            pruning.remove(directory, names)
        total = sum(aside["bytes"] for aside in asides)
        typer.echo(json.dumps({"run": str(directory), "folders": asides, "bytes": total, "removed": yes}, indent=2))
        return
    if not asides:
        typer.echo(f"{directory}: nothing was moved aside")
        return
    pruning.show(asides, tables.KEY_METRICS, Console())
    if not yes and not sys.stdin.isatty():
        _say(f"to remove them: rlhf-pipeline prune {shlex.quote(run)} --yes")
    elif yes or typer.confirm("Remove them for good?", err=True):
        pruning.remove(directory, names)
        _say("removed")


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none found"
    return "; ".join(answer.stdout.strip().splitlines())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed must not end a run
        typer.echo(line, err=True)


def _complain(message: str, hint: str | None) -> None:
    _say(f"error: {message}")
    if hint:
        _say(f"hint: {hint}")


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
    except Interrupted as stop:
        _say(stop.message)
        _say("the same command goes on from here")
        sys.exit(130)
