"""A recipe's rewards, before anything trains: functions are tried on two rows, classifiers without their weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import user_code
from rlhf_pipeline.data.encode import row_of
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.rewards import classifier as classifier_of
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rewards import classifier, mixture
from rlhf_pipeline.rewards.batch import Batch
from rlhf_pipeline.rewards.functions import Function, try_function
from rlhf_pipeline.rundir.layout import members

REPLY_COLUMNS = ("completion", "response", "answer", "chosen", "output")  # where a row may have a reply to try it on
PROMPTS = 100  # whose columns count, and that a classifier's chat template is tried on


def try_rewards(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """See that a stage's rewards can be used; reward stages themselves are seen to elsewhere.

    Args:
        recipe: the recipe.
        name: the stage's.
        tokenizer: the policy's.

    Returns:
        Warnings: that no reward applies to the rows on which the functions were tried.

    Raises:
        InputError: for all that cannot.
    """
    stage, found = recipe.stages[name], list[InputError]()
    for place, reward in enumerate(stage.rewards):
        value = str(reward.stage)
        combines = outside.is_one(reward.stage) and reward.combine != "mean"
        if combines and len(members(outside.folder(value))) == 1:
            said = f"`combine` has no effect: `{outside.label(value)}` is one reward model, not several"
            found.append(InputError(said, place=f"stages.{name}.rewards.{place}.combine", hint="remove it"))
    others = [(place, reward) for place, reward in enumerate(stage.rewards) if reward.stage is None]
    asked = first_prompts(stage.data, PROMPTS) if others else []
    applies = any(reward.stage is not None for reward in stage.weighed)
    for place, reward in others:
        try:
            if reward.function is not None:
                function = Function(reward.function, recipe.folders, f"stages.{name}.rewards.{place}.function")
                given = try_function(function, _tried(asked, tokenizer))
                applies = applies or (bool(reward.weight) and any(value is not None for value in given))
            if reward.model is not None:
                applies = applies or bool(reward.weight)
                classifier.check(classifier_of(recipe, name, place), [prompt for prompt, _ in asked])
        except InputError as error:
            found += error.all
    if found:
        raise InputErrors(found)
    said = (
        f"stages.{name}.rewards: none applies to the first rows of `data`, as every function returned None there, and "
        "a reply to which none applies has the reward 0: see whether the rows have the columns that the functions read"
    )
    return [said] if others and not applies else []


def _tried(asked: Sequence[tuple[Prompt, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The first two of some prompts with replies, as training gives them, and with the columns of all."""
    rows = [json.loads(row_of(prompt, row)) for prompt, row in asked]
    replies = [a_reply(row) for _, row in asked[:2]]
    ids = [tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]
    columns = user_code.columns([row["columns"] for row in rows], mixture.NOT_GIVEN)
    batch = mixture.batch_of(rows[:2], replies, ids, step=0, max_steps=1)
    return replace(batch, columns={name: values[:2] for name, values in columns.items()})


def a_reply(row: dict[str, Any]) -> str:
    """A reply that a row has beside its prompt, or one made up."""
    return next((row[name] for name in REPLY_COLUMNS if isinstance(row.get(name), str)), "A reply.")
