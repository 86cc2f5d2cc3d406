"""What the trainers of a recipe will see of their data, and what is wrong with it, stage by stage."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from rlhf_pipeline.data import prepare, report
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.data.report import Trainer
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.models.base import load_config
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.recipe.schema import Data, Recipe, Stage
from rlhf_pipeline.stages.job import Job

CONFIGS: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "dpo": DPOConfig,
}  # fmt: skip
READERS: dict[str, Callable[[Data, PreTrainedTokenizerBase, int], Prepared]] = {
    "sft": prepare.demonstrations,
    "reward": prepare.whole_preferences,
    "ppo": prepare.prompts,
    "dpo": prepare.preferences,
}


def of_recipe(recipe: Recipe, names: Sequence[str]) -> tuple[dict[str, Any], list[InputError]]:
    """The report on some of a recipe's stages.

    Returns:
        What `data --json` prints, see `docs/json.md`, and all that is wrong.
    """
    stages: list[dict[str, Any]] = []
    found: list[InputError] = []
    for name in names:
        stage, wrong = of_stage(Job(recipe, name, recipe.run))
        stages.append(stage)
        found += wrong
    errors = InputErrors(found).all if found else []
    measured = {stage["name"]: stage["data"] for stage in stages if stage["data"]}
    warnings = [warning for stage in stages for warning in stage["warnings"]]
    warnings += report.across(measured) + _judged_on_what_is_trained_on(recipe, list(measured))
    return {
        "recipe": recipe.name,
        "model": recipe.model.path,
        "stages": stages,
        "errors": [{"message": error.message, "place": error.place, "hint": error.hint} for error in errors],
        "warnings": list(dict.fromkeys(warnings)),
    }, errors


def of_stage(job: Job) -> tuple[dict[str, Any], list[InputError]]:
    """The report on the rows of one stage, under `data` and `ptx_data`, and all that is wrong with them."""
    stage, errors, warnings = job.stage, [], []
    found: dict[str, Any] = {"name": job.name, "kind": stage.kind, "data": None, "ptx_data": None}
    try:
        tokenizer = load_tokenizer(job.recipe.model)
        positions = getattr(load_config(job.recipe.model).get_text_config(), "max_position_embeddings", None)
        trainer = Trainer.of(job.trainer_config(CONFIGS[stage.kind]), tokenizer, positions)
    except InputError as error:
        return found | {"warnings": []}, error.all
    for key, kind, spec, seen_by in _tables(stage, trainer):
        try:
            prepared = READERS[kind](spec, tokenizer, job.recipe.seed)
        except InputError as error:
            errors += error.all
            continue
        found[key] = report.measure(kind, prepared, spec, tokenizer, seen_by)
        if job.recipe.model.chat_template:
            found[key]["chat_template"] = "recipe"
        wrong, doubtful = report.problems(found[key], f"stages.{job.name}.{key}")
        errors += wrong
        warnings += doubtful
    return found | {"warnings": warnings}, errors


def _tables(stage: Stage, trainer: Trainer) -> list[tuple[str, report.Kind, Data, Trainer]]:
    """What a stage reads: the key, the kind of trainer that reads such rows, the data, and what that sees."""
    tables: list[tuple[str, report.Kind, Data, Trainer]] = [("data", stage.kind, stage.data, trainer)]
    if stage.ptx_data:
        tables.append(("ptx_data", "sft", stage.ptx_data, Trainer(max_positions=trainer.max_positions)))
    return tables


def _judged_on_what_is_trained_on(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A warning for each stage that trains its policy on prompts on which `evaluate` judges it."""
    if recipe.evaluate is None:
        return []
    tokenizer, warnings = load_tokenizer(recipe.model), []
    spec, n = recipe.evaluate.data, recipe.evaluate.n
    if not spec.mix:
        spec = spec.model_copy(update={"limit": min(n, spec.limit or n)})
    try:
        asked = np.unique(prepare.column(prepare.prompts(spec, tokenizer, recipe.seed).table, "prompt_key"))
    except InputError:  # the check of `evaluate` says it
        return []
    for name in names:
        stage = recipe.stages[name]
        if stage.kind == "reward":
            continue
        table = READERS[stage.kind](stage.data, tokenizer, recipe.seed).table
        seen = int(np.isin(asked, prepare.column(table, "prompt_key")).sum())
        if seen:
            warnings.append(
                f"evaluate.data: {report.out_of(seen, len(asked))} of its prompts are trained on in `{name}`, so "
                "`judge_mean` flatters"
            )
    return warnings
