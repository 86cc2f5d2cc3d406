"""The door: commands that parse, call and print. Data goes to standard output, everything else to standard error."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline import __version__
from rlhf_pipeline.errors import InputError, InputErrors, Interrupted, RunError

SCHEMA_HINT = "# yaml-language-server: $schema="  # where editors look for a recipe's JSON Schema


def _examples(*examples: tuple[str, str]) -> str:
    """The end of a command's help: what to type, each with a word on what it does."""
    lines = [line for arguments, does in examples for line in (f"  # {does}", f"  rlhf-pipeline {arguments}")]
    return "\n".join(["\b", "Examples:", *lines])  # \b: lines stay as they are


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it answers at once
    pretty_exceptions_enable=False,
    help="Fine-tune a language model from one YAML recipe: SFT, reward model, PPO and DPO on one GPU.",
    epilog=_examples(
        ("run tiny", "see it work, on the tiny model that ships with it"),
        ("cp full-pipeline my-recipe.yaml", "begin a recipe of your own, every key explained"),
        ("plan my-recipe.yaml", "see what it would do"),
        ("smoke my-recipe.yaml", "see it work, without a GPU"),
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's path, or the name of a shipped one.", show_default=False)
]
RunArgument = Annotated[
    str, typer.Argument(help="A run directory, or the recipe it was made with.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to override, as ppo.trainer.kl_coef=0.1.")
]
TrustVersions = Annotated[
    bool, typer.Option("--trust-versions", help="Keep stages that other versions of the libraries made.")
]
IgnoreGates = Annotated[bool, typer.Option("--ignore-gates", help="Go on past gates that are closed.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Stream the log of the stage at work.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Take the options that stand before a command."""
    if version:
        typer.echo(f"rlhf-pipeline {__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        ("run tiny", "all four stages on the tiny model that ships with it: a minute or two"),
        ("run my-recipe.yaml", "your own recipe; the same again goes on where it broke off"),
        ("run my-recipe.yaml ppo.trainer.kl_coef=0.1 name=milder", "other settings, in a run of their own"),
        ("run my-recipe.yaml --until reward", "the stages up to the reward model, and no further"),
    )
)
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="Run this stage even if it is done.")] = None,
    trust_versions: TrustVersions = False,
    ignore_gates: IgnoreGates = False,
    verbose: Verbose = False,
) -> None:
    """Run the stages of a recipe that are not done yet.

    Each goes on from where it broke off. Ctrl-C or SIGTERM stops after the current step, with a checkpoint; the same
    command goes on from there. A second one stops at once.
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import live, tables
    from rlhf_pipeline.run import runner

    loaded = recipes.load(recipe, overrides or [])
    try:
        with live.following(loaded.run, _say, recipe=loaded, verbose=verbose) as say:
            plans = runner.run(
                loaded,
                until=until,
                only=only,
                force=force,
                trust_versions=trust_versions,
                ignore_gates=ignore_gates,
                say=say,
            )
    except KeyboardInterrupt:  # typer has an answer of its own to it
        raise Interrupted("interrupted") from None
    except (RunError, Interrupted):
        _report(loaded.run)
        raise
    _report(loaded.run)
    tables.finished(loaded.run, plans, Console())


@app.command(
    epilog=_examples(
        ("watch my-recipe.yaml", "how far a run is that goes on elsewhere; Ctrl-C leaves it alone"),
        ("watch runs/my-recipe -v", "what its stage writes to the log"),
    )
)
def watch(run: RunArgument, verbose: Verbose = False) -> None:
    """Watch a run that goes on elsewhere.

    In another terminal, or on another machine that shares the disk. Ends with the run, and shows where it stands then.
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import live

    live.watch(recipes.run_directory(run), _say, Console(), verbose=verbose)


@app.command(
    epilog=_examples(
        ("plan my-recipe.yaml", "what `run` would do, stage by stage, and why"),
        ("plan tiny ppo.trainer.kl_coef=0.1", "what a changed setting would make necessary"),
        ("plan my-recipe.yaml --json", "the same for scripts; see docs/json.md"),
    )
)
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
    """Show which stages would run, and why; takes what `run` takes."""
    from rich.console import Console

    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import tables

    loaded = recipes.load(recipe, overrides or [])
    shapes = plans.shapes(loaded)
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
            stage["data"] = shapes[stage["name"]]
        typer.echo(json.dumps(object_, indent=2))
    else:
        remote_code = loaded.model.path if loaded.model.trust_remote_code else None
        tables.intentions(stages, chosen, shapes, remote_code, Console())


@app.command(
    epilog=_examples(
        ("status my-recipe.yaml", "state, time and final numbers of every stage"),
        ("status my-recipe.yaml --json", "the same for scripts; see docs/json.md"),
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
    """Show what each stage made: state, time and final numbers."""
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


@app.command(
    epilog=_examples(
        ("validate my-recipe.yaml", "everything that can be known without training"),
        ("validate my-recipe.yaml model.path=tiny", "the same with a model that is at hand"),
    )
)
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe, its settings and all its data, without training."""
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.run import runner

    loaded = recipes.load(recipe, overrides or [])
    runner.check(loaded, _say)
    typer.echo(f"{recipe}: {len(loaded.stages)} stages, nothing wrong")


@app.command(
    "ls",
    epilog=_examples(
        ("ls", "their names, each with what it does"),
        ("cp full-pipeline my-recipe.yaml", "and then take one as your own"),
    ),
)
def list_recipes() -> None:
    """List the shipped recipes."""
    from rlhf_pipeline import recipe as recipes

    for name, path in recipes.shipped().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if not line.startswith(SCHEMA_HINT))
        typer.echo(f"{name:<20} {first.lstrip('# ')}")


@app.command(
    "cp",
    epilog=_examples(
        ("cp full-pipeline my-recipe.yaml", "a copy under a name of your own"),
        ("cp tiny", "a copy here, as tiny.yaml"),
    ),
)
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="The name of a shipped recipe.", show_default=False)],
    to: Annotated[Path | None, typer.Argument(help="Where to; by default NAME.yaml here.", show_default=False)] = None,
) -> None:
    """Copy a shipped recipe, to edit it.

    Editors that read YAML schemas (VS Code with the YAML extension, Neovim, …) complete and check the copy.
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
    shipped = recipes.shipped()[recipe]
    schema = shipped.resolve().with_name("recipe.schema.json")
    text = shipped.read_text(encoding="utf-8").replace(SCHEMA_HINT + schema.name, SCHEMA_HINT + schema.as_uri(), 1)
    target.write_text(text, encoding="utf-8")
    typer.echo(str(target))


@app.command(
    epilog=_examples(
        ("env", "one line each for versions, processors and GPU"),
        ("env > env.txt", "in a file, to attach"),
    )
)
def env() -> None:
    """Print versions and hardware, to paste into a bug report."""
    from rlhf_pipeline import plan as plans

    lines = {"rlhf-pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    lines |= {name: version for name, version in plans.versions().items() if name != "rlhf-pipeline"}
    lines |= {"cpus": str(os.cpu_count()), "gpu": _gpu()}
    for name, value in lines.items():
        typer.echo(f"- {name}: {value}")


@app.command(
    epilog=_examples(
        ("diff runs/first runs/second", "settings, data, versions and final numbers that differ"),
        ("diff first.yaml second.yaml", "the runs of two recipes"),
        ("diff runs/first runs/second --json", "the same for scripts; see docs/json.md"),
    )
)
def diff(run_a: RunArgument, run_b: RunArgument, as_json: AsJson = False) -> None:
    """Show what differs between two runs.

    Settings, data, versions of the libraries, and final numbers.
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import diff as diffs

    difference = diffs.compare(recipes.run_directory(run_a), recipes.run_directory(run_b))
    if as_json:
        typer.echo(json.dumps(difference, indent=2))
    else:
        diffs.show(difference, Console())


@app.command(
    epilog=_examples(
        ("report my-recipe.yaml", "the page again, of a run in any state"),
        ("report runs/first runs/second", "both in one page, overlaid"),
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
    """Write report.html: curves, samples, where all came from.

    One file without any other, to look at in a browser, on paper or on a phone. It is made from the run directory
    alone, so also of a run that is going on, has failed, or was made elsewhere.
    """
    import webbrowser

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import report as reports

    folders = [recipes.run_directory(run) for run in runs]
    default = (folders[0] if len(folders) == 1 else Path.cwd()) / reports.FILE
    file = out / reports.FILE if out and out.is_dir() else out or default
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}", place=f"--out {out}")
    reports.write(folders, file)
    typer.echo(str(file))
    if open_ and not webbrowser.open(file.absolute().as_uri()):
        _say("there is no browser here to open it with")


@app.command(
    epilog=_examples(
        ("prune my-recipe.yaml", "list them, and ask whether to remove them"),
        ("prune runs/my-recipe --yes", "remove them without asking"),
        ("prune runs/my-recipe --json", "list them for scripts; never asks; see docs/json.md"),
    )
)
def prune(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what later runs moved aside, and remove it if you say so."""
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


@app.command(
    epilog=_examples(
        ("show my-recipe.yaml", "every setting that counts, and where each was written"),
        ("show tiny sft.trainer.learning_rate=1e-3", "with a setting of the command line"),
        ("show tiny --json", "the same for scripts; see docs/json.md"),
    )
)
def show(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved recipe, and where each value was written.

    It is YAML that loads to the same recipe. The origin of a value, in the comment beside it, is a line of a file, an
    override, a default, a variable of the environment, or another stage.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.recipe import show as shows
    from rlhf_pipeline.run.secrets import redact

    loaded, origins = recipes.load_with_origins(recipe, overrides or [])
    if as_json:
        typer.echo(redact(json.dumps(shows.as_json(loaded, origins), indent=2, ensure_ascii=False)))
    else:
        typer.echo(redact(shows.as_yaml(loaded, origins)), nl=False)


@app.command(
    epilog=_examples(
        ("schema > recipe.schema.json", "a file to point an editor to"),
        ("cp tiny", "a recipe that points to the installed schema already"),
    )
)
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    Shipped recipes and their copies name it in their first line; put such a line into recipes of your own.
    """
    from rlhf_pipeline.recipe import json_schema

    typer.echo(json.dumps(json_schema.recipe_schema(), indent=2, ensure_ascii=False))


@app.command(
    epilog=_examples(
        ("data my-recipe.yaml", "rows, lengths, what is cut, and an example, for every stage"),
        ("data my-recipe.yaml reward", "for one stage, or some"),
        ("data tiny ppo ppo.data.max_prompt_length=8", "with another setting"),
        ("data my-recipe.yaml --json", "the same for scripts; see docs/json.md"),
    )
)
def data(
    recipe: RecipeArgument,
    stage_and_overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGE|KEY=VALUE", help="Stages to show, by default all, and settings to override."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the trainers will see of the data.

    And what is wrong with it: what would spoil training is an error, lesser things are warnings.
    """
    from rich.console import Console

    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import data as reports

    given = stage_and_overrides or []
    chosen = [one for one in given if "=" not in one]
    loaded = recipes.load(recipe, [one for one in given if "=" in one])
    for name in chosen:
        if name not in loaded.stages:
            raise InputError(f"there is no stage `{name}`", hint=f"the stages are {', '.join(loaded.stages)}")
    with _quiet_libraries():
        from rlhf_pipeline.stages import data_report

        report, errors = data_report.of_recipe(loaded, chosen or list(loaded.stages))
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        reports.show(report, Console())
    for warning in report["warnings"]:
        _say(f"warning: {warning}")
    if errors:
        raise InputErrors(errors)


@app.command(
    epilog=_examples(
        ("smoke my-recipe.yaml", "every stage for two steps, without a GPU and in about a minute"),
        ("smoke my-recipe.yaml --tokenizer my-tokenizer", "with a tokenizer at hand, where there is no network"),
        ("smoke my-recipe.yaml --keep smoke", "leave all that it made in a folder, to look at"),
        ("smoke my-recipe.yaml --json", "the same for scripts; see docs/json.md"),
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
    from rlhf_pipeline.run import smoke as smokes

    loaded = recipes.load(recipe, overrides or [])
    try:
        report = smokes.smoke(loaded, tokenizer=tokenizer, keep=keep, say=_say)
    except (KeyboardInterrupt, Interrupted):  # there is nothing to go on from
        _say("interrupted")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({"recipe": recipe, **report.as_json()}, indent=2, ensure_ascii=False))
    else:
        for stage in report.stages:
            typer.echo(str(stage))
    if report.failure:
        raise RunError(report.failure, hint=report.hint)


@app.command(
    epilog=_examples(
        ("shrink Qwen/Qwen3-4B-Base tiny-qwen3", "a tiny random Qwen3 with its own tokenizer"),
        ("shrink ./my-model tiny-model --tokenizer ./my-tokenizer", "of a model folder, with another tokenizer"),
    )
)
def shrink(
    model: Annotated[
        str, typer.Argument(help="A hub id, a folder, or `tiny`; its weights are not read.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write: a new or an empty one.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or hub id with the tokenizer to use.", show_default=False)
    ] = None,
) -> None:
    """Make a tiny random checkpoint, for tests.

    It has the model's architecture and tokenizer, and weights that mean nothing.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.recipe.schema import Model

    with _quiet_libraries():
        from rlhf_pipeline.models import shrink as shrinking

        path = str(recipes.TINY / "checkpoint") if model == "tiny" else model
        for note in shrinking.shrink(Model(path=path), out, tokenizer):
            _say(f"note: {note}")
    typer.echo(str(out))


@app.command(
    epilog=_examples(
        ("export runs/my-recipe ppo my-model --merge", "base and adapter as one model, for any tool"),
        ("export runs/my-recipe ppo my-adapter", "the adapter alone, a few MB, which names its base"),
        ("export my-recipe.yaml reward my-reward --merge", "a reward model, as a sequence classifier"),
        ("export my-recipe.yaml ppo out --merge --push-to-hub ME/NAME", "and push it to the hub, private"),
    )
)
def export(
    run: RunArgument,
    stage: Annotated[str, typer.Argument(help="The stage whose model it is.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write: a new or an empty one.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the base, which is not quantized for it.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Push it to this hub repository, too.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let all see a repository that is made for it.")] = False,
) -> None:
    """Write a stage's model as a folder that others load.

    Transformers, and so vLLM and TGI, load it without rlhf-pipeline. Its model card says what it was made of, what was
    measured, and how to use it.
    """
    from rlhf_pipeline import export as exports
    from rlhf_pipeline import recipe as recipes

    with _quiet_libraries():
        exports.export(
            recipes.run_directory(run), stage, out, merge=merge, push_to=push_to_hub, public=public, say=_say
        )
    typer.echo(str(out))


@app.command(
    epilog=_examples(
        ("compare my-recipe.yaml", "base, SFT, PPO and DPO on the prompts of `evaluate`"),
        ("compare runs/my-recipe --prompts questions.jsonl --n 200", "on prompts of your own"),
        ('compare my-recipe.yaml -p "Who are you?" --temperature 0', "on one, greedily"),
        ("compare my-recipe.yaml --json", "the same for scripts; see docs/json.md"),
    )
)
def compare(
    run: RunArgument,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with prompts, in any shape that recipes read.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be given several times.")
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
    """Send the same prompts through a run's models.

    Means of reward, judge, KL and length, how often each model's reply beats another's, and replies side by side. With
    the default settings it shows what `run` has left in comparison.json. A prompt given by -p is a user's turn where
    the recipe's prompts are conversations, else text as the model reads it.
    """
    from rich.console import Console

    from rlhf_pipeline import compare as comparing
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.reporting import comparison as reports

    changes = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    directory, texts = recipes.run_directory(run), prompt or []
    try:
        found = comparing.compare(
            directory, file=prompts, texts=texts, stages=stages, changes=changes, quiet=_quiet_libraries, say=_say
        )
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        reports.show(found, None if texts else reports.SHOWN, Console())
    for note in found["notes"]:
        _say(f"note: {note}")


@app.command(
    epilog=_examples(
        ("chat my-recipe.yaml", "with the model of the last stage that is done"),
        ("chat runs/my-recipe --stage sft", "with that of another stage"),
        ('chat my-recipe.yaml -p "What is the capital of France?"', "one answer"),
    )
)
def chat(
    run: RunArgument,
    stage: Annotated[
        str | None, typer.Option(help="Whose model answers: a stage, or `base`.", show_default=False)
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
    from rlhf_pipeline.run import finished

    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    chosen = finished.choose(directory, loaded, finished.POLICIES, stage)
    with _quiet_libraries():
        import torch

        from rlhf_pipeline import chat as chats

        torch.manual_seed(seed) if seed is not None else torch.seed()
        conversation = chats.Chat(directory, loaded, chosen, temperature, max_new_tokens, system, _say)
        if prompt is not None:
            interrupted = conversation.ask(prompt)
        else:
            conversation.greet()
            interrupted = chats.converse(conversation)
    if interrupted:
        raise typer.Exit(130)


@app.command(
    epilog=_examples(
        ("score my-recipe.yaml replies.jsonl", "a line for each row, with its score"),
        ("score runs/my-recipe pairs.parquet -o scores.jsonl", "of preferences: both scores, and the accuracy"),
        ("score my-recipe.yaml qa.csv --columns prompt=q,completion=a", "columns with names of their own"),
    )
)
def score(
    run: RunArgument,
    file: Annotated[str, typer.Argument(help="Replies to prompts: a file, folder or glob.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="The reward stage.", show_default="the last that is done")] = None,
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
    a reply and its score, or two and their margin.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.run import finished

    directory = recipes.run_directory(run)
    loaded = recipes.of_run(directory)
    chosen = finished.choose(directory, loaded, ["reward"], stage)
    with _quiet_libraries():
        from rlhf_pipeline.stages import scoring

        source = scoring.source(file, columns, out)
        scoring.score_file(directory, loaded, chosen, source, out, batch_size, _say)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Have the libraries that are imported inside the block keep their chatter to themselves.

    Bars, of downloads and of weights that are read, are for people to look at.
    """
    from rlhf_pipeline.run.launch import ENVIRONMENT

    os.environ.update(ENVIRONMENT | {"TRANSFORMERS_VERBOSITY": "error"})
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.update({"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries', of their own use of each other
        yield


def _report(run: Path) -> None:
    """Write a run's report where something is newer than it. It shows what happened, and never changes what did."""
    file = run / "report.html"
    newest = max((one.stat().st_mtime for one in (*run.glob("*.json"), *run.glob("*/*.json*"))), default=0.0)
    if not newest or (file.is_file() and file.stat().st_mtime >= newest):
        return
    try:
        from rlhf_pipeline.reporting import report as reports

        reports.write([run], file)
    except KeyboardInterrupt:
        _say("warning: there is no new report: it was interrupted")
    except Exception as error:  # a full disk, or a fault of ours
        _say(f"warning: there is no new report: {type(error).__name__}: {error}")


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
    except OSError as error:  # of a file that the command itself writes, or of standard output
        if error.errno is None:
            raise
        _complain(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}", None)
        sys.exit(1)
    except Interrupted as stop:
        _say(stop.message)
        _say("the same command goes on from here")
        sys.exit(130)
