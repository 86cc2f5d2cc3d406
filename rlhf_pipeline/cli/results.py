"""Commands on what runs have made: report, diff, compare, chat, score, export."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rlhf_pipeline.cli import completion
from rlhf_pipeline.cli.shared import AsJson, RunArgument, app, examples, quiet_libraries, say, show
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import strict_json

Dtype = Literal["float32", "bfloat16", "float16"]


@app.command(
    epilog=examples(
        ("report my-recipe.yaml", "the page again, for a run in any state"),
        ("report runs/first runs/second", "both in one page, overlaid; 60 runs as well as two"),
        ("report runs/first -o first.html", "a file elsewhere, to send to somebody"),
    )
)
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run directories, or the recipes they were made with.", show_default=False)
    ],
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write; by default report.html in the run, of several here.",
            show_default=False,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Write report.html: curves, samples, and what was made from what.

    One file that needs no other, to read in a browser, on paper or on a phone. It is made from the run directory
    alone, so also of a run that is running, has failed, or was made elsewhere.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline import report as reports
    from rlhf_pipeline.rundir.layout import REPORT

    folders = [recipes.run_directory(run) for run in runs]
    default = (folders[0] if len(folders) == 1 else Path.cwd()) / REPORT
    file = out / REPORT if out and out.is_dir() else out or default
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}", place=f"--out {out}")
    reports.write(folders, file)
    typer.echo(str(file))
    if open_:
        show(file.absolute().as_uri())


@app.command(
    epilog=examples(
        ("diff runs/first runs/second", "settings, data, versions and final numbers that differ"),
        ("diff first.yaml second.yaml", "the runs of two recipes"),
        ("diff runs/first runs/second --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def diff(run_a: RunArgument, run_b: RunArgument, as_json: AsJson = False) -> None:
    """Show what differs between two runs.

    Settings, data, versions of the libraries, and final numbers.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir import diff as diffs
    from rlhf_pipeline.terminal import diff as shown
    from rlhf_pipeline.terminal.console import Console

    difference = diffs.compare(recipes.run_directory(run_a), recipes.run_directory(run_b))
    if as_json:
        typer.echo(strict_json.dumps(difference, indent=2))
    else:
        shown.show(difference, Console())


@app.command(
    epilog=examples(
        ("compare my-recipe.yaml", "base, SFT, PPO and DPO on the prompts of `evaluate`"),
        ("compare runs/my-recipe --prompts questions.jsonl --n 200", "on prompts of your own"),
        ('compare my-recipe.yaml -p "Who are you?" --temperature 0', "on one, greedily"),
        ("compare runs/first runs/second --stages ppo", "the PPO stages of two runs, or of more"),
    )
)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, or the recipes they were made with.",
            show_default=False,
            autocompletion=completion.recipes,
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="A file with prompts, in any shape that recipes read.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="A prompt, \\n for a line break; may be given several times."
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="The first so many prompts.", show_default="evaluate's, at most 64")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of sampling; 0 is greedy.", show_default="evaluate's")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where a reply is cut.", show_default="evaluate's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.", show_default="the recipe's")] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="These alone; `base` is one too.", show_default="all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send the same prompts through models of runs.

    Means of reward, judge, KL and length, how often each model's reply beats another's, and replies side by side. With
    the default settings it shows what `run` has left in comparison.json. A prompt given by -p is a user's turn where
    the recipe's prompts are conversations, else text as the model reads it. Of several runs, the prompts, settings and
    judges of the first one count, and what they share is shown once.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.terminal import comparison as reports
    from rlhf_pipeline.terminal.console import Console
    from rlhf_pipeline.use import compare as comparing

    changes = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    folders, texts = [recipes.run_directory(run) for run in runs], prompt or []
    wanted: dict[str, Any] = {"file": prompts, "texts": texts, "stages": stages, "changes": changes}
    try:
        found = (
            comparing.compare(folders[0], **wanted, quiet=quiet_libraries, say=say)
            if len(folders) == 1
            else comparing.compare_runs(folders, **wanted, quiet=quiet_libraries, say=say)
        )
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(strict_json.dumps(found, indent=2, ensure_ascii=False))
    elif len(folders) == 1:
        reports.show(found, None if texts else reports.SHOWN, Console())
    else:
        reports.show_runs(found, None if texts else reports.SHOWN, Console())
    for note in found["notes"]:
        say(f"note: {note}")


@app.command(
    epilog=examples(
        ("chat my-recipe.yaml", "with the model of the last stage that is done"),
        ("chat runs/my-recipe --stage sft", "with that of another stage"),
        ('chat my-recipe.yaml -p "What is the capital of France?"', "one answer"),
    )
)
def chat(
    run: RunArgument,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Whose model answers: a stage, or `base`.", show_default=False, autocompletion=completion.stages
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Print the answer to this alone.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of sampling; 0 is greedy.", show_default="evaluate's, or 0.7")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where a reply is cut.", show_default="evaluate's, or 256")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same one gives the same replies.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="A system turn to begin with.", show_default=False)] = None,
) -> None:
    """Talk to a run's models in the terminal.

    /help there lists commands: /stage NAME switches models, /reward scores the last reply. Lines that are piped in
    are answered one by one.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir import finished

    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    chosen = finished.choose(directory, loaded, "policy", stage)
    with quiet_libraries():
        import torch

        from rlhf_pipeline.use import chat as chats

        torch.manual_seed(seed) if seed is not None else torch.seed()
        conversation = chats.Chat(directory, loaded, chosen, temperature, max_new_tokens, system, say)
        if prompt is not None:
            interrupted = conversation.ask(prompt)
        else:
            conversation.greet()
            interrupted = chats.converse(conversation)
    if interrupted:
        raise typer.Exit(130)


@app.command(
    epilog=examples(
        ("score my-recipe.yaml replies.jsonl", "a line for each row, with its score"),
        ("score runs/my-recipe pairs.parquet -o scores.jsonl", "of preferences: both scores, and the accuracy"),
        ("score my-recipe.yaml qa.csv --columns prompt=q,completion=a", "columns with names of their own"),
    )
)
def score(
    run: RunArgument,
    file: Annotated[str, typer.Argument(help="Replies to prompts: a file, folder or glob.", show_default=False)],
    stage: Annotated[
        str | None,
        typer.Option(help="The reward stage.", show_default="the last that is done", autocompletion=completion.stages),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write to this file.", show_default="standard output")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="EXPECTED=YOURS,…", help="Your names of columns.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many replies are scored at once.")] = 16,
) -> None:
    """Score replies with a trained reward model.

    Takes demonstrations and preferences in every shape that a recipe does, and writes JSON lines in the same order:
    a reply and its score, or two and their margin. With --out, the same command goes on where it was stopped. The
    accuracy on pairs that the model was trained on is told apart.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.rundir import finished

    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    chosen = finished.choose(directory, loaded, "reward", stage)
    with quiet_libraries():
        from rlhf_pipeline.use import score

        source = score.source(file, columns, out)
        try:
            score.score_file(directory, loaded, chosen, source, out, batch_size, say)
        except KeyboardInterrupt:
            say("interrupted; with `-o FILE` the same command would go on from here")
            raise typer.Exit(130) from None


@app.command(
    epilog=examples(
        ("export runs/my-recipe ppo my-model --merge", "base and adapter as one model, for any tool"),
        ("export runs/my-recipe ppo my-adapter", "the adapter alone, a few MB, which names its base"),
        ("export my-recipe.yaml reward my-reward --merge", "a reward model, as a sequence classifier"),
        ("export my-recipe.yaml ppo out --merge --push-to-hub ME/NAME", "and push it to the hub, private"),
    )
)
def export(
    run: RunArgument,
    stage: Annotated[
        str, typer.Argument(help="The stage whose model it is.", show_default=False, autocompletion=completion.stages)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write: a new or an empty one.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the base, which is not quantized for it.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of merged weights.", show_default="the base's, or float32 where that loses the change"),
    ] = None,
    dequantized: Annotated[
        bool, typer.Option("--dequantized", help="Merge into the base as training read it, rounded to nf4 or int8.")
    ] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=0, help="Measure what merging changed on so many prompts.", show_default="evaluate's, at most 64"
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Push it to this hub repository, too.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let all see a repository that is made for it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a stage's model as a folder that others load.

    Transformers, and so vLLM and TGI, load it without rlhf-pipeline. Its model card says what it was made of, what was
    measured, and how to use it.
    """
    from rlhf_pipeline import recipe as recipes

    with quiet_libraries():
        from rlhf_pipeline.use import export as exports

        found = exports.export(
            recipes.run_directory(run),
            stage,
            out,
            merge=merge,
            dtype=dtype,
            dequantized=dequantized,
            n=n,
            push_to=push_to_hub,
            public=public,
            say=say,
        )
    typer.echo(strict_json.dumps(found, indent=2) if as_json else str(out))
