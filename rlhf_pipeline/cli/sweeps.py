"""The command that makes a run for each of several values: sweep."""

import os
from typing import Annotated

import typer

from rlhf_pipeline.cli.shared import AsJson, RecipeArgument, app, examples, say
from rlhf_pipeline.errors import Interrupted, RunError
from rlhf_pipeline.rundir import strict_json


@app.command(
    epilog=examples(
        ("sweep tiny ppo.trainer.kl_coef=0.01,0.1,1.0", "three runs, which share all but PPO, and a table"),
        ("sweep my-recipe.yaml ppo.trainer.kl_coef=0.05,0.2 seed=1,2,3", "all combinations"),
        ("sweep tiny ppo.trainer.kl_coef=0.01..1:log --trials 20", "values that Optuna proposes"),
        ("sweep my-recipe.yaml sft.lora.r=8,16 --minimize sft.loss", "the best by another number"),
    )
)
def sweep(
    recipe: RecipeArgument,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=V1,V2,…",
            help="Settings with several values, or a range low..high[:log]; one value holds for all runs.",
            show_default=False,
        ),
    ],
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many runs Optuna proposes.", show_default="20 with a range, else all combinations"
        ),
    ] = None,
    maximize: Annotated[
        str | None,
        typer.Option(metavar="STAGE.METRIC", help="What the best run has most of.", show_default="the judge's number"),
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="STAGE.METRIC", help="What it has least of.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time: each has a GPU, or its share of the cores.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a recipe with several values of some settings, and compare.

    Each combination is a run of its own, in a folder NAME.sweep beside other runs. Stages that no swept setting touches
    are trained once. Ctrl-C or SIGTERM stops with checkpoints; the same command goes on from there, and one with more
    values trains only what is new.
    """
    from rlhf_pipeline.sweep import run as sweeps
    from rlhf_pipeline.terminal import sweeps as shown
    from rlhf_pipeline.terminal.console import Console

    try:
        found = sweeps.sweep(
            recipe,
            settings,
            trials=trials,
            maximize=maximize,
            minimize=minimize,
            at_once=jobs,
            environment=os.environ,
            say=say,
        )
    except KeyboardInterrupt:  # typer has an answer of its own to it
        raise Interrupted("interrupted") from None
    if as_json:
        typer.echo(strict_json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        shown.show(found, Console())
    if found.failed:
        first, why = next(iter(found.failed.items()))
        more = f", and {len(found.failed) - 1} more" if len(found.failed) > 1 else ""
        raise RunError(
            f"{len(found.failed)} of {len(found.runs)} runs failed: {first}: {why}{more}",
            hint=f"what each said is in its output.txt in {found.folder}; the same command tries them again",
        )
