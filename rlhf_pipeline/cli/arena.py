"""Commands in which people choose between replies in the browser: label, arena."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_pipeline.cli import completion
from rlhf_pipeline.cli.shared import RunArgument, app, examples, require_web, say, show
from rlhf_pipeline.errors import InputError

if TYPE_CHECKING:
    from rlhf_pipeline.arena.sources import Setup

NEEDS = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py", "pygments": "pygments"}

Open = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]
Host = Annotated[str, typer.Option(help="The address to open; 0.0.0.0 for all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Of it.", show_default="one that is free")]
People = Annotated[
    str | None,
    typer.Option(metavar="ALICE,BOB", help="People who get a link each, beside your own.", show_default=False),
]
Export = Annotated[
    Path | None,
    typer.Option("--export", metavar="FILE", help="Write what people chose, .jsonl or .json.", show_default=False),
]
Shape = Annotated[
    Literal["preferences", "feedback", "labels"] | None,
    typer.Option(
        "--as",
        help="What --export writes: pairs, replies that are good or bad, or every click.",
        show_default="preferences",
    ),
]
Import = Annotated[
    Path | None,
    typer.Option("--import", metavar="FILE", help="Add labels that were made elsewhere.", show_default=False),
]


@app.command(
    epilog=examples(
        ("label my-recipe.yaml --open", "choose between the replies that a run waits for"),
        ("label my-recipe.yaml --people alice,bob --host 0.0.0.0", "three people, from other machines too"),
        ("label my-recipe.yaml --export pairs.jsonl", "what they chose, for any recipe"),
        ("label my-recipe.yaml --import label-studio.json", "labels that were made elsewhere"),
    )
)
def label(
    run: RunArgument,
    stage: Annotated[
        str | None,
        typer.Argument(help="The stage.", show_default="the one that waits", autocompletion=completion.stages),
    ] = None,
    open_: Open = False,
    host: Host = "127.0.0.1",
    port: Port = 0,
    people: People = None,
    export: Export = None,
    shape: Shape = None,
    import_: Import = None,
) -> None:
    """Choose the better of two replies, in the browser.

    A run that comes to a stage of kind `label` waits for people. This prints the link to a page that shows them pairs,
    blind and in random places; a reward learns along. Once there are labels enough, the same `run` goes on. Every
    click is saved as it is made, in labels.db of the run. Ctrl-C ends the page. --import takes what Label Studio,
    Argilla, or --export with --as labels has written.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir.labels import LABELS

    _require_effect(open_, people, export, shape, import_)
    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    if not (export or import_):
        require_web("the page", NEEDS)
    from rlhf_pipeline.arena import sources

    setup = sources.of_stage(directory, loaded, stage)
    _go(setup, directory / LABELS, open_, host, port, people, export, shape, import_)


@app.command(
    epilog=examples(
        ("arena my-recipe.yaml --open", "the replies of a run that is done, side by side and blind"),
        ("arena --data candidates.jsonl --open", "rows from anywhere: prompts with two replies or more"),
        ("arena --data candidates.jsonl --export pairs.jsonl", "what was chosen, for any recipe"),
    )
)
def arena(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run directory, or the recipe it was made with.", show_default=False,
            autocompletion=completion.recipes,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Show the rows of this file.", show_default=False)
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="EXPECTED=YOURS,…", help="Your names of its columns.", show_default=False)
    ] = None,
    open_: Open = False,
    host: Host = "127.0.0.1",
    port: Port = 0,
    people: People = None,
    export: Export = None,
    shape: Shape = None,
    import_: Import = None,
) -> None:  # fmt: skip
    """Choose between replies of a finished run, or of a file.

    To look and play, or to label what came from anywhere. The page is that of `label`. A run's items are those of its
    label stage, else the replies of its sample stage, else those of all policies to the same prompts. No run goes on
    with these labels, which are kept apart from those of stages; those of a file are in FILE.labels.db.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir.labels import LABELS

    if (run is None) == (data is None):
        raise InputError("name a run, or a file with --data", hint="`rlhf-pipeline arena --help` has examples of both")
    if columns and not data:
        raise InputError("--columns is for --data", place="--columns")
    _require_effect(open_, people, export, shape, import_)
    directory = recipes.run_directory(run) if run is not None else None
    loaded = recipes.of_run(directory) if directory else None
    if not (export or import_):
        require_web("the page", NEEDS)
    from rlhf_pipeline.arena import sources

    if directory and loaded:
        setup, file = sources.of_run(directory, loaded), directory / LABELS
        if setup.features is None and not (export or import_):
            setup = sources.with_features(setup, directory, loaded, say)
    else:
        setup, file = sources.of_file(str(data), _renamed(columns)), Path(f"{data}.{LABELS}")
    _go(setup, file, open_, host, port, people, export, shape, import_)


def _require_effect(
    open_: bool, people: str | None, export: Path | None, shape: str | None, import_: Path | None
) -> None:
    """See that no option is given that would have no effect.

    Raises:
        InputError: one is.
    """
    if shape and not export:
        hint = f"for example `--export pairs.jsonl --as {shape}`"
        raise InputError("it says what `--export` writes, and there is no `--export`", place=f"--as {shape}", hint=hint)
    for name, is_given in (("--open", open_), ("--people", people is not None)):
        if is_given and (export or import_):
            raise InputError("no page is shown with `--export` or `--import`", place=name, hint="remove one of them")


def _go(
    setup: "Setup",
    file: Path,
    open_: bool,
    host: str,
    port: int,
    people: str | None,
    export: Path | None,
    shape: Literal["preferences", "feedback", "labels"] | None,
    import_: Path | None,
) -> None:
    """Show the page; or write or read labels, and end."""
    from rlhf_pipeline.rundir.labels import Labels

    if export or import_:
        from rlhf_pipeline.arena import exchange

        if import_:
            say(exchange.take(import_, file, setup))
        if export:
            say(exchange.give(export, file, setup.stage, shape or "preferences", setup.people))
        return
    from rlhf_pipeline.arena import serving

    names = serving.names_of(people)
    with Labels(file) as labels:
        serving.serve(
            setup, labels, names, host=host, port=port, print_link=typer.echo, say=say, show=show if open_ else None
        )


def _renamed(columns: str | None) -> dict[str, str]:
    """From `prompt=q,replies=a`."""
    names = [part.partition("=") for part in columns.split(",")] if columns else []
    if not all(expected and yours for expected, _, yours in names):
        hint = "it is expected=yours, as prompt=question"
        raise InputError(f"`{columns}` names no columns", place="--columns", hint=hint)
    return {expected.strip(): yours.strip() for expected, _, yours in names}
