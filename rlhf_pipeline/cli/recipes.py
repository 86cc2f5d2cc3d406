"""Commands on recipes, before anything is trained: plan, validate, show, data, schema, ls, cp, shrink, env."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline import __version__
from rlhf_pipeline.cli.shared import (
    AsJson,
    Force,
    Gpu,
    IgnoreGates,
    NoReuse,
    Only,
    Overrides,
    RecipeArgument,
    TrustVersions,
    Until,
    app,
    examples,
    quiet_libraries,
    say,
)
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.rundir import strict_json

SCHEMA_HINT = "# yaml-language-server: $schema="  # where editors look for a recipe's JSON Schema


@app.command(
    epilog=examples(
        ("plan my-recipe.yaml", "what `run` would do, stage by stage, and why"),
        ("plan tiny ppo.trainer.kl_coef=0.1", "what a changed setting would make necessary"),
        ("plan my-recipe.yaml --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    trust_versions: TrustVersions = False,
    ignore_gates: IgnoreGates = False,
    no_reuse: NoReuse = False,
    gpu: Gpu = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages would run, and why; takes what `run` takes.

    How much GPU memory they will take is said where `forecast`, `validate` or `run` has found it out before.
    """
    from rlhf_pipeline import plan as plans
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.forecast import cards, known
    from rlhf_pipeline.run import to_do
    from rlhf_pipeline.terminal import forecasts, tables
    from rlhf_pipeline.terminal.console import Console

    card = cards.find(gpu)
    loaded = recipes.load(recipe, overrides or [])
    shapes, weights = plans.shapes(loaded), plans.class_weights(loaded)
    stages = plans.make(loaded, trust_versions=trust_versions, ignore_gates=ignore_gates, reuse=not no_reuse)
    wanted = to_do.find(
        loaded,
        stages,
        until=until,
        only=only,
        force=force or [],
        trust_versions=trust_versions,
        ignore_gates=ignore_gates,
    )
    forecast = known.find(loaded, card)
    if as_json:
        takes = {stage.name: stage for stage in forecast.stages} if forecast else {}
        object_ = tables.as_json(loaded.run, stages)
        object_ |= {"trust_remote_code": loaded.model.trust_remote_code, "will_compare": wanted.compares}
        for stage in object_["stages"]:
            stage["will"] = wanted.stages.get(stage["name"])
            stage["will_run"] = stage["will"] in to_do.RUNS
            stage["data"] = shapes[stage["name"]]
            stage["class_weights"] = weights.get(stage["name"])
            stage["processes"] = loaded.processes(stage["name"])
            stage["memory"] = takes[stage["name"]].in_short(card.usable) if stage["name"] in takes else None
        typer.echo(strict_json.dumps(object_, indent=2))
    else:
        remote_code = loaded.model.path if loaded.model.trust_remote_code else None
        said = forecasts.in_short(forecast) if forecast else f"`rlhf-pipeline forecast {recipe}` says how much"
        console = Console()
        tables.intentions(stages, wanted, shapes, weights, remote_code, console)
        tables.say_processes(loaded, console)
        console.print(f"GPU memory: {said}", markup=False, highlight=False, soft_wrap=True)
        tables.say_what_is_left(loaded.run, stages, console)


@app.command(
    epilog=examples(
        ("validate my-recipe.yaml", "everything that can be known without training"),
        ("validate my-recipe.yaml model.path=tiny", "the same with a model that is at hand"),
    )
)
def validate(recipe: RecipeArgument, overrides: Overrides = None, gpu: Gpu = None) -> None:
    """Check a recipe, its settings and all its data, without training.

    It also says how much GPU memory each stage will take; `forecast` says more of that.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.forecast import cards
    from rlhf_pipeline.run import runner
    from rlhf_pipeline.terminal import forecasts, tables
    from rlhf_pipeline.terminal.console import Console

    card = cards.find(gpu)
    loaded = recipes.load(recipe, overrides or [])
    warnings, forecast = runner.check(loaded, card)
    warnings += forecast.doubts if forecast else []
    for warning in warnings:
        say(f"warning: {warning}")
    if forecast:
        say(f"GPU memory: {forecasts.in_short(forecast)}")
    tables.say_processes(loaded, Console())
    count = f"{len(warnings) or 'no'} warning{'s' * (len(warnings) != 1)}"
    typer.echo(f"{recipe}: {len(loaded.stages)} stages, no errors, {count}")


@app.command(
    epilog=examples(
        ("forecast my-recipe.yaml --gpu 24GB", "whether it fits on such a card, and what to change if not"),
        ("forecast my-recipe.yaml ppo.trainer.response_length=1024", "what a setting would take"),
        ("forecast my-recipe.yaml --measure", "how long it will take here, by a step or two of each stage"),
        ("forecast my-recipe.yaml --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def forecast(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Gpu = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time a step of each stage here, with the model itself.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how much GPU memory each stage will take.

    Nothing is loaded: of the model only its config.json is read. Exits with 1 where a stage does not fit on the card.
    `rlhf-pipeline docs forecast` says how far to trust it.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.forecast import cards
    from rlhf_pipeline.run import runner
    from rlhf_pipeline.terminal import forecasts, tables
    from rlhf_pipeline.terminal.console import Console

    card = cards.find(gpu)
    loaded = recipes.load(recipe, overrides or [], weights=measure)
    found = runner.foresee(loaded, card)
    times = runner.measure(loaded) if measure else {}
    if as_json:
        object_ = found.as_json()
        for stage in object_["stages"]:
            stage["to_go"] = times[stage["name"]].as_json() if stage["name"] in times else None
        typer.echo(strict_json.dumps(object_, indent=2))
    else:
        forecasts.show(found, Console())
        for name, left in times.items():
            typer.echo(f"{name}: {tables.in_words(left)}")
    raise typer.Exit(int(found.fits is False))


@app.command(
    epilog=examples(
        ("show my-recipe.yaml", "every setting that counts, and where each was written"),
        ("show tiny sft.trainer.learning_rate=1e-3", "with a setting of the command line"),
        ("show tiny --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def show(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved recipe, and where each value was written.

    It is YAML that loads to the same recipe. The origin of a value, in the comment beside it, is a line of a file, an
    override, a default, a variable of the environment, or another stage. What is left to the libraries stands in
    comments, with their defaults.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.recipe import show as shows
    from rlhf_pipeline.rundir.secrets import redact

    loaded, origins = recipes.load_with_origins(recipe, overrides or [])
    if as_json:
        typer.echo(redact(strict_json.dumps(shows.as_json(loaded, origins), indent=2, ensure_ascii=False)))
    else:
        typer.echo(redact(shows.as_yaml(loaded, origins)), nl=False)


@app.command(
    epilog=examples(
        ("data my-recipe.yaml", "rows, lengths, what is cut, and an example, for every stage"),
        ("data my-recipe.yaml reward", "for one stage, or some"),
        ("data tiny ppo ppo.data.max_prompt_length=8", "with another setting"),
        ("data my-recipe.yaml --json", "the same for scripts; see `rlhf-pipeline docs json`"),
    )
)
def data(
    recipe: RecipeArgument,
    stage_and_overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE|KEY=VALUE",
            help="Stages to show, or `evaluate`, by default all, and settings to override.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the trainers will see of the data.

    And what is wrong with it: what would spoil training is an error, lesser things are warnings.
    """
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.terminal import data as reports
    from rlhf_pipeline.terminal.console import Console

    given = stage_and_overrides or []
    chosen = [one for one in given if "=" not in one]
    loaded = recipes.load(recipe, [one for one in given if "=" in one])
    there = [*loaded.stages, *(["evaluate"] if loaded.evaluate else [])]
    for name in chosen:
        if name not in there:
            raise InputError(f"there is no stage `{name}`", hint=f"there are {', '.join(there)}")
    with quiet_libraries():
        from rlhf_pipeline.stages import check

        report, errors = check.data_report(loaded, chosen or there)
    if as_json:
        typer.echo(strict_json.dumps(report, indent=2, ensure_ascii=False))
    else:
        reports.show(report, Console())
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    if errors:
        raise InputErrors(errors)


@app.command(
    epilog=examples(
        ("schema > recipe.schema.json", "a file to point an editor to"),
        ("cp tiny", "a recipe with the schema beside it, which editors find"),
    )
)
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    Shipped recipes and their copies name it in their first line; put such a line into recipes of your own.
    """
    from rlhf_pipeline.recipe import json_schema

    typer.echo(strict_json.dumps(json_schema.recipe_schema(), indent=2, ensure_ascii=False))


@app.command(
    "ls",
    epilog=examples(
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
    epilog=examples(
        ("cp full-pipeline my-recipe.yaml", "a copy under a name of your own"),
        ("cp tiny", "a copy here, as tiny.yaml"),
    ),
)
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="The name of a shipped recipe.", show_default=False)],
    to: Annotated[Path | None, typer.Argument(help="Where to; by default NAME.yaml here.", show_default=False)] = None,
) -> None:
    """Copy a shipped recipe, to edit it.

    The JSON Schema of recipes is put beside it, as recipe.schema.json, if there is none: editors that read YAML schemas
    (VS Code with the YAML extension, Neovim, …) complete and check the copy, here and on every machine it is taken to.
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
    target.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    if not target.with_name(schema.name).exists():
        shutil.copyfile(schema, target.with_name(schema.name))
    typer.echo(str(target))


@app.command(
    epilog=examples(
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

    with quiet_libraries():
        from rlhf_pipeline.smoke import shrink as shrinking

        path = str(recipes.TINY / "checkpoint") if model == "tiny" else model
        for note in shrinking.shrink(Model(path=path), out, tokenizer):
            say(f"note: {note}")
    typer.echo(str(out))


@app.command(
    epilog=examples(
        ("docs", "the list of pages"),
        ("docs ppo | less", "PPO: its keys, its numbers and what is healthy"),
    )
)
def docs(
    page: Annotated[str, typer.Argument(help="A page, as it is called in docs/.", show_default=False)] = "README",
) -> None:
    """Print a page of the documentation, which comes with the package."""
    from rlhf_pipeline.recipe.shipped import documentation

    typer.echo(documentation(page.removeprefix("docs/").removesuffix(".md")).read_text(encoding="utf-8"), nl=False)


@app.command(
    epilog=examples(
        ("env", "one line each for versions, processors and GPU"),
        ("env > env.txt", "in a file, to attach"),
    )
)
def env() -> None:
    """Print versions and hardware, to paste into a bug report."""
    from rlhf_pipeline import plan as plans
    from rlhf_pipeline.run.launch import one_device

    lines = {"rlhf-pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    lines |= {name: version for name, version in plans.versions().items() if name != "rlhf-pipeline"}
    lines |= {"cpus": str(os.cpu_count()), "gpu": _gpu()}
    lines["a run uses"] = ", ".join(f"{name}={device}" for name, device in one_device(os.environ).items())
    for name, value in lines.items():
        typer.echo(f"- {name}: {value}")


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=index,name,uuid,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none found"
    return "; ".join(answer.stdout.strip().splitlines())
