"""From files and hub datasets to the token columns that TRL's trainers read.

One encoding serves all stages: the prompt's tokens, then the reply's tokens and one EOS. So the reward is trained at
the same token, the last of the reply, where PPO reads it.
"""

import functools
import operator
import random
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data import rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data


def demonstrations(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for SFT: `input_ids` and `labels`, -100 on the prompt, so that only the reply bears loss.

    Returns:
        Rows to train on and rows held out; None where `eval_fraction` is 0.

    Raises:
        InputError: with file and row, where the data cannot be read or lack something.
    """

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, reply = rows.demonstration(row)
        prompt_ids, reply_ids = encode_pair(tokenizer, spec, prompt, reply)
        return {"input_ids": prompt_ids + reply_ids, "labels": [-100] * len(prompt_ids) + reply_ids}

    return _prepare(spec, seed, rows.demonstration, encode)


def preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`; see `demonstrations`."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, chosen, rejected = rows.preference(row)
        prompt_ids, chosen_ids = encode_pair(tokenizer, spec, prompt, chosen)
        return {
            "prompt_ids": prompt_ids,
            "chosen_ids": chosen_ids,
            "rejected_ids": encode_pair(tokenizer, spec, prompt, rejected)[1],
        }

    return _prepare(spec, seed, rows.preference, encode)


def whole_preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for the reward model: `chosen_ids` and `rejected_ids`, each prompt and reply; see `demonstrations`."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, chosen, rejected = rows.preference(row)
        return {
            "chosen_ids": functools.reduce(operator.iadd, encode_pair(tokenizer, spec, prompt, chosen), []),
            "rejected_ids": functools.reduce(operator.iadd, encode_pair(tokenizer, spec, prompt, rejected), []),
        }

    return _prepare(spec, seed, rows.preference, encode)


def prompts(spec: Data, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows for PPO: `input_ids` of the prompt alone."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"input_ids": encode_prompt(tokenizer, spec, rows.prompt(row))}

    return _prepare(spec, 0, rows.prompt, encode)[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, spec: Data, prompt: rows.Prompt) -> list[int]:
    """A prompt's token ids: text as the tokenizer encodes it, or turns through the model's chat template.

    Raises:
        InputError: the prompt is a conversation and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers close every text; a prompt is not closed
    else:
        if not tokenizer.chat_template:
            raise InputError(
                "these are conversations, and the model's tokenizer has no chat template",
                place=spec.path,
                hint="use a model that has one, or rows with text under `prompt`",
            )
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-spec.max_prompt_length :] if spec.max_prompt_length else ids


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, spec: Data, prompt: rows.Prompt, reply: str
) -> tuple[list[int], list[int]]:
    """A prompt's ids and its reply's, encoded apart as they are in generation; the reply ends in one EOS.

    A reply longer than `max_completion_length` is cut and has no EOS: it did not end there.
    """
    text = reply
    while text.endswith(tokenizer.eos_token):
        text = text.removesuffix(tokenizer.eos_token)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return encode_prompt(tokenizer, spec, prompt), ids[: spec.max_completion_length]


def _prepare(spec: Data, seed: int, read: Any, encode: Any) -> tuple[Dataset, Dataset | None]:
    """Load, check every row, split by prompt, encode."""
    table = rows.load(spec)
    rows.check(table, spec, read)
    train, held_out = split_by_prompt(table, spec, seed)
    return _encoded(train, encode), None if held_out is None else _encoded(held_out, encode)


def _encoded(table: Dataset, encode: Any) -> Dataset:
    return table.map(encode, remove_columns=table.column_names, desc="Encoding")


def split_by_prompt(table: Dataset, spec: Data, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold out `eval_fraction` of the prompts with all their rows, so that no prompt stands on both sides.

    Raises:
        InputError: so few prompts that one side would be empty.
    """
    if not spec.eval_fraction:
        return table, None
    keys = [rows.prompt_key(row) for row in table]
    distinct = sorted(set(keys))
    random.Random(seed).shuffle(distinct)
    held_out = set(distinct[: round(len(distinct) * spec.eval_fraction)])
    if not 0 < len(held_out) < len(distinct):
        raise InputError(
            f"{len(distinct)} distinct prompts cannot be split with eval_fraction {spec.eval_fraction}",
            place=spec.path,
            hint="give more prompts, or another fraction",
        )
    return (
        table.select([i for i, key in enumerate(keys) if key not in held_out]),
        table.select([i for i, key in enumerate(keys) if key in held_out]),
    )
