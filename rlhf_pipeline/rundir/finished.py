"""What a run has to use: its stages that are done, and the base model under them. No torch."""

from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Makes
from rlhf_pipeline.recipe.schema import BASE, Model, Recipe
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import WEIGHTS, RunDirectory
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record


def done(run: Path, recipe: Recipe, makes: Makes) -> list[str]:
    """The stages that were done, have made a policy or a reward model, and have their adapter; see `warning`.

    They are in the recipe's order.
    """
    directory = RunDirectory(run)
    return [
        name
        for name, stage in recipe.stages.items()
        if stage.facts.makes == makes
        and (directory.record(name) or Record()).state in ("done", GATE_CLOSED)
        and (directory.adapter(name) / WEIGHTS).is_file()
    ]


def trained_with(run: Path, name: str) -> dict[str, Any]:
    """The `trainer` settings that a stage was trained with, those that decide its result; none of the base."""
    record, prefix = RunDirectory(run).record(name) or Record(), "trainer."
    return {key.removeprefix(prefix): value for key, value in record.inputs.items() if key.startswith(prefix)}


def warning(run: Path, name: str) -> str | None:
    """What to know of a stage before its model is used; None where it is done, and of the base."""
    stage = state.read(run).stage(name)
    if stage is None or stage.state == "done":
        return None
    remedy = "" if stage.is_current else "; `rlhf-pipeline run` brings it up to date"
    return f"warning: stage `{name}` is {stage.state}: {stage.reason}{remedy}"


def choose(run: Path, recipe: Recipe, makes: Makes, wanted: str | None) -> str:
    """The stage that is meant: the one that is wanted, else the last that was done.

    Args:
        run: the run directory.
        recipe: its recipe.
        makes: what the stage must have made. `base` may be wanted too where that is a policy.
        wanted: a stage's name.

    Raises:
        InputError: there is none, or it is not done, or is of another kind.
    """
    candidates = done(run, recipe, makes)
    what = "reward model" if makes == "reward" else "model that answers"
    if wanted is None:
        if candidates:
            return candidates[-1]
        hint = "`rlhf-pipeline status` says how far the run has come"
        if makes == "policy":
            hint += f"; `--stage {BASE}` is the model that it starts from"
        raise InputError(f"no stage with a {what} is done", place=str(run), hint=hint)
    if wanted in candidates or (wanted == BASE and makes == "policy"):
        return wanted
    names = [*([BASE] if makes == "policy" else []), *candidates]
    hint = f"stages with a {what}: {', '.join(names) or 'none yet'}"
    if wanted not in recipe.stages:
        raise InputError(f"there is no stage `{wanted}`", place=str(run), hint=hint)
    if recipe.stages[wanted].facts.makes != makes:
        raise InputError(f"`{wanted}` is a {recipe.stages[wanted].kind} stage", place=str(run), hint=hint)
    found = state.read(run).stage(wanted)
    why = f" but {found.state}: {found.reason}" if found else ""
    raise InputError(f"stage `{wanted}` is not done{why}", place=str(run), hint=hint)


def model_of(run: Path, recipe: Recipe, stage: str) -> Model:
    """The recipe's model, with the chat template that a stage was trained with."""
    template = RunDirectory(run).adapter(stage) / "chat_template.jinja"
    return recipe.model.model_copy(update={"chat_template": str(template)}) if template.is_file() else recipe.model
