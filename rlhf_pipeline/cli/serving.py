"""The command that answers over HTTP: serve."""

import secrets
from typing import Annotated

import typer

from rlhf_pipeline.cli import completion
from rlhf_pipeline.cli.shared import RunArgument, app, examples, quiet_libraries, require_web, say
from rlhf_pipeline.errors import InputError


@app.command(
    epilog=examples(
        ("serve my-recipe.yaml", "the last reward model that is done, for programs on this machine"),
        ("serve runs/first reward --port 0", "that of a stage, at a port that is free"),
        ("serve my-recipe.yaml --host 0.0.0.0", "for other machines, with a token that is printed"),
    )
)
def serve(
    run: RunArgument,
    stage: Annotated[
        str | None,
        typer.Argument(
            help="The reward stage.", show_default="the last that is done", autocompletion=completion.stages
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to open; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Of it; 0 for one that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            help="What requests have to bring along.",
            envvar="RLHF_PIPELINE_TOKEN",
            show_default="none on this machine alone, else a new one",
            show_envvar=True,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many replies are scored at once.")] = 16,
) -> None:
    """Answer with a reward model's scores over HTTP.

    POST /score takes prompts and replies, or messages; requests that come at the same time are scored together.
    OpenRLHF and LLaMA-Factory can use it as their remote reward model. Ctrl-C ends it when all who have asked are
    answered. See `rlhf-pipeline docs serve`.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir import finished

    if token is not None and not token.strip():
        hint = "leave it out: on this machine alone none is needed, and else a new one is printed"
        raise InputError("an empty token would let everybody in", place="--token", hint=hint)

    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    chosen = finished.choose(directory, loaded, "reward", stage)
    require_web("`serve`", {"starlette": "starlette", "uvicorn": "uvicorn"})
    with quiet_libraries():
        from rlhf_pipeline.use import score, serve, web

        listening = web.listen(host, port)
        about = finished.warning(directory, chosen)
        if about:
            say(about)
        chat = score.chat_of(directory, loaded, chosen)
        scorer = score.Scorer(directory, loaded, chosen, chat)
        if scorer.instead:
            say(f"note: {scorer.instead}")
        shown = web.reached_at(host)
        if host not in web.LOOPBACK:
            token = token or secrets.token_urlsafe(24)
            say(f"open to all who can reach {shown}, without encryption; each request needs the token {token}")
        typer.echo(f"{web.url(shown, listening.getsockname()[1])}/score")
        say(f"scores of `{chosen}` of {directory}; Ctrl-C ends it")
        serve.serve(serve.Batches(scorer, chat, batch_size), chosen, host, token, listening)
        say("ended")
