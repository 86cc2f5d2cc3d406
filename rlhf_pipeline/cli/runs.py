"""Commands that make runs and look after them: run, watch, status, runs, prune, smoke."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline.cli.shared import (
    AsJson,
    Force,
    IgnoreGates,
    NoReuse,
    Only,
    Overrides,
    RecipeArgument,
    RunArgument,
    TrustVersions,
    Until,
    Verbose,
    app,
    examples,
    say,
)
from rlhf_pipeline.errors import InputError, Interrupted, RunError, Waiting
from rlhf_pipeline.rundir import strict_json


@app.command(
    epilog=examples(
        ("run tiny", "all four stages on the tiny model that ships with it: a minute or two"),
        ("run my-recipe.yaml", "your own recipe; the same command again resumes an interrupted run"),
        ("run my-recipe.yaml ppo.trainer.kl_coef=0.1 name=milder", "other settings, in a run of their own"),
        ("run my-recipe.yaml --until reward", "the stages up to the reward model, and no further"),
    )
)
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    trust_versions: TrustVersions = False,
    ignore_gates: IgnoreGates = False,
    no_reuse: NoReuse = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if there are alarms; things to look at do not count.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the stages of a recipe that are not done yet.

    A stage that was interrupted is resumed. One that another run beside this one, or this one formerly, has made with
    the same settings, data and weights is taken from there and not trained again. Ctrl-C or SIGTERM stops after the
    current step, with a checkpoint; the same command resumes from there. A second one stops at once.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.run import machines, runner
    from rlhf_pipeline.terminal import live, tables
    from rlhf_pipeline.terminal.console import Console

    try:
        loaded = recipes.load(recipe, overrides or [])
    except InputError as error:
        machines.tell_of_recipe(recipes.as_far_as_read(recipe, overrides or []), error)
        raise
    first = loaded.machine_rank == 0  # of several machines, this one shows and reports
    following = live.following(loaded.run, say, recipe=loaded, verbose=verbose)
    try:
        with machines.telling(loaded), following if first else contextlib.nullcontext(say) as above:
            plans = runner.run(
                loaded,
                until=until,
                only=only,
                force=force,
                trust_versions=trust_versions,
                ignore_gates=ignore_gates,
                reuse=not no_reuse,
                say=above,
            )
    except KeyboardInterrupt:  # typer has an answer of its own to it
        raise Interrupted("interrupted") from None
    except (RunError, Interrupted, Waiting) as end:
        if first and not (isinstance(end, Interrupted) and end.at_once):
            _report(loaded.run)
            _show_alarms(loaded.run, on_stderr=True)
        raise
    if not first:
        return
    _report(loaded.run)
    tables.finished(loaded.run, plans, Console())
    verdict = _show_alarms(loaded.run)
    if strict and verdict:
        raise RunError(f"--strict: {verdict}", hint=f"`rlhf-pipeline report {recipe}` shows what they are about")


@app.command(
    epilog=examples(
        ("watch my-recipe.yaml", "the progress of a run started elsewhere; Ctrl-C leaves it running"),
        ("watch runs/my-recipe -v", "the log of the stage at work"),
    )
)
def watch(run: RunArgument, verbose: Verbose = False) -> None:
    """Watch a run that was started elsewhere.

    In another terminal, or on another machine that shares the disk. Waits for a run that has not begun. Ends with the
    run, and then shows its final state.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.terminal import live
    from rlhf_pipeline.terminal.console import Console

    live.watch(recipes.run_to_watch(run), say, Console(), verbose=verbose)


@app.command(
    epilog=examples(
        ("status my-recipe.yaml", "state, time and final numbers of every stage"),
        ("status runs/my-recipe", "by the settings that the run was started with"),
        ("status my-recipe.yaml --json", "the same for scripts; see `rlhf-pipeline docs json`"),
        ("status my-recipe.yaml -q && echo done", "only whether every stage is done"),
    )
)
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

    Of a recipe, by what it says now; of a run directory, by the settings that `run` was started with.
    """
    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.terminal import tables
    from rlhf_pipeline.terminal.console import Console

    try:
        loaded = recipes.load(recipe, overrides or [])
        run, stages = loaded.run, plans.make(loaded, trust_versions=trust_versions)
    except InputError as error:
        if overrides or not recipes.is_run(Path(recipe)):
            raise
        say(f"note: this is what the run directory alone says, because its recipe does not hold here: {error}")
        run, stages = Path(recipe), plans.of_run(Path(recipe))
    if quiet:
        raise typer.Exit(0 if all(stage.state == "done" for stage in stages) else 1)
    from rlhf_pipeline.report import alarms
    from rlhf_pipeline.terminal import alarms as shown

    if as_json:
        typer.echo(strict_json.dumps(tables.as_json(run, stages) | shown.as_json(alarms.read(run)), indent=2))
    else:
        console = Console()
        tables.results(run, stages, console)
        if any(stage.record.model_fields_set for stage in stages):
            shown.show_alarms(alarms.read(run), console)


@app.command(
    "runs",
    epilog=examples(
        ("runs", "those in the folder `runs`, the latest first"),
        ("runs --sort judge_mean", "the best judged first"),
        ("runs --sort ppo.KL --reverse", "the smallest KL of the stage `ppo` first"),
        ("runs --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    ),
)
def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder they are in, a recipe's `output_dir`.")] = Path("runs"),
    sort: Annotated[
        str, typer.Option(metavar="KEY", help="age, name, state, size, or a number, as judge_mean or ppo.judge_mean.")
    ] = "age",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    as_json: AsJson = False,
) -> None:
    """List runs with their states and key numbers.

    Of each stage that is done it shows one number, the judge's where there is one. Numbers are sorted from the largest
    to the smallest.
    """
    from rich.console import Console

    from rlhf_pipeline.rundir import listing
    from rlhf_pipeline.terminal import runs as shown

    found = listing.by(listing.find(folder), sort, reverse)
    if as_json:
        runs = [one.as_json() for one in found]
        typer.echo(strict_json.dumps({"folder": str(folder.absolute()), "runs": runs}, indent=2))
    elif found:
        shown.show(found, sort, Console())
    else:
        say(f"there is no run in {folder}")


@app.command(
    epilog=examples(
        ("prune my-recipe.yaml", "list them, and ask whether to remove them"),
        ("prune runs/my-recipe --yes", "remove them without asking"),
        ("prune runs/my-recipe --json", "list them for scripts; never asks; see `rlhf-pipeline docs json`"),
    )
)
def prune(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what later runs moved aside, and remove it if you confirm."""
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir import asides as pruning
    from rlhf_pipeline.terminal import asides as shown
    from rlhf_pipeline.terminal.console import Console

    directory = recipes.run_directory(run)
    asides = pruning.find(directory)
    names = [aside["name"] for aside in asides]
    if as_json:  # never asks
        if yes:
            pruning.remove(directory, names)
        total = sum(aside["bytes"] for aside in asides)
        typer.echo(
            strict_json.dumps(
                {"run": str(directory.absolute()), "folders": asides, "bytes": total, "removed": yes}, indent=2
            )
        )
        return
    if not asides:
        typer.echo(f"{directory}: nothing was moved aside")
        return
    shown.show(asides, Console())
    if not yes and not sys.stdin.isatty():
        say(f"to remove them: rlhf-pipeline prune {shlex.quote(run)} --yes")
    elif yes or typer.confirm("Remove them for good?", err=True):
        pruning.remove(directory, names)
        say("removed")


@app.command(
    epilog=examples(
        ("smoke my-recipe.yaml", "every stage for two steps, without a GPU and in about a minute"),
        ("smoke my-recipe.yaml --tokenizer my-tokenizer", "with a tokenizer at hand, where there is no network"),
        ("smoke my-recipe.yaml --keep smoke", "leave all that it made in a folder, to look at"),
        ("smoke my-recipe.yaml --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def smoke(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or hub id with the tokenizer to use.", show_default=False)
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Work in this new folder, and leave it.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that a recipe works, without a GPU.

    The same stages, settings and templates run for two steps each on the first rows of the same data, with a tiny
    random checkpoint of the model's own architecture and tokenizer. Nothing is left behind.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.smoke import run as smokes

    loaded = recipes.load(recipe, overrides or [])
    try:
        report = smokes.smoke(loaded, tokenizer=tokenizer, keep=keep, say=say)
    except (KeyboardInterrupt, Interrupted):  # there is nothing to resume from
        say("interrupted")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(strict_json.dumps({"recipe": recipe, **report.as_json()}, indent=2, ensure_ascii=False))
    else:
        for stage in report.stages:
            typer.echo(str(stage))
    if report.failure:
        raise RunError(report.failure, hint=report.hint)


def _show_alarms(run: Path, on_stderr: bool = False) -> str:
    """Print a run's alarms. Nothing that goes wrong in it changes how the run ended.

    Args:
        run: the run directory.
        on_stderr: of a run that failed: print them there, and nothing where there are none.

    Returns:
        The verdict where some are bad, or where nobody can tell; else nothing.
    """
    try:
        from rlhf_pipeline.report import alarms
        from rlhf_pipeline.terminal import alarms as shown
        from rlhf_pipeline.terminal.console import Console

        found = alarms.read(run)
        if found or not on_stderr:
            shown.show_alarms(found, Console(stderr=on_stderr))
        return alarms.verdict(found) if any(alarm.level == "bad" for alarm in found) else ""
    except KeyboardInterrupt:
        problem = "it was interrupted"
    except Exception as error:  # a fault of ours
        problem = f"{type(error).__name__}: {error}"
    say(f"warning: nobody has looked for alarms: {problem}")
    return "nobody has looked for alarms"


def _report(run: Path) -> None:
    """Write a run's report where something is newer than it. It never changes how the run ended."""
    from rlhf_pipeline.rundir.layout import REPORT

    file = run / REPORT
    newest = max((one.stat().st_mtime for one in (*run.glob("*.json"), *run.glob("*/*.json*"))), default=0.0)
    if not newest or (file.is_file() and file.stat().st_mtime >= newest):
        return
    try:
        from rlhf_pipeline import report as reports

        reports.write([run], file)
    except KeyboardInterrupt:
        say("warning: there is no new report: it was interrupted")
    except Exception as error:  # a full disk, or a fault of ours
        say(f"warning: there is no new report: {type(error).__name__}: {error}")
