"""From files and hub datasets to the token columns that TRL's trainers read.

One encoding serves all stages: the prompt's tokens, then the reply's tokens and one EOS. So the reward is trained at
the same token, the last of the reply, where PPO reads it.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data import rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data

Columns = dict[str, list[list[int]]]  # token ids, one list per row


def demonstrations(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for SFT: `input_ids` and `labels`, -100 on the prompt, so that only the reply bears loss.

    Returns:
        Rows to train on and rows held out; None where `eval_fraction` is 0.

    Raises:
        InputError: with file and row, where the data cannot be read or lack something.
    """

    def encode(pairs: list[tuple[rows.Prompt, str]]) -> Columns:
        prompt_ids = encode_prompts(tokenizer, spec, [prompt for prompt, _ in pairs])
        reply_ids = encode_replies(tokenizer, spec, [reply for _, reply in pairs])
        both = list(zip(prompt_ids, reply_ids, strict=True))
        return {
            "input_ids": [prompt + reply for prompt, reply in both],
            "labels": [[-100] * len(prompt) + reply for prompt, reply in both],
        }

    return _prepare(spec, seed, rows.demonstration, encode)


def preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`; see `demonstrations`."""

    def encode(triples: list[tuple[rows.Prompt, str, str]]) -> Columns:
        return {
            "prompt_ids": encode_prompts(tokenizer, spec, [prompt for prompt, _, _ in triples]),
            "chosen_ids": encode_replies(tokenizer, spec, [chosen for _, chosen, _ in triples]),
            "rejected_ids": encode_replies(tokenizer, spec, [rejected for _, _, rejected in triples]),
        }

    return _prepare(spec, seed, rows.preference, encode)


def whole_preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for the reward model: `chosen_ids` and `rejected_ids`, each prompt and reply; see `demonstrations`."""

    def encode(triples: list[tuple[rows.Prompt, str, str]]) -> Columns:
        prompt_ids = encode_prompts(tokenizer, spec, [prompt for prompt, _, _ in triples])
        chosen_ids = encode_replies(tokenizer, spec, [chosen for _, chosen, _ in triples])
        rejected_ids = encode_replies(tokenizer, spec, [rejected for _, _, rejected in triples])
        return {
            "chosen_ids": [prompt + reply for prompt, reply in zip(prompt_ids, chosen_ids, strict=True)],
            "rejected_ids": [prompt + reply for prompt, reply in zip(prompt_ids, rejected_ids, strict=True)],
        }

    return _prepare(spec, seed, rows.preference, encode)


def prompts(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows for PPO: `input_ids` of the prompt alone; see `demonstrations`."""

    def encode(asked: list[rows.Prompt]) -> Columns:
        return {"input_ids": encode_prompts(tokenizer, spec, asked)}

    return _prepare(spec, seed, rows.prompt, encode)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, spec: Data, asked: Sequence[rows.Prompt]) -> list[list[int]]:
    """Prompts' token ids: text as the tokenizer encodes it, or turns through the model's chat template.

    Raises:
        InputError: prompts are conversations and the tokenizer has no chat template.
    """
    if isinstance(asked[0], str):
        encoded = tokenizer(list(asked))["input_ids"]
        eos = tokenizer.eos_token_id
        # Some tokenizers close every text; a prompt is not closed.
        encoded = [
            ids[:-1] if ids and ids[-1] == eos and not str(prompt).endswith(tokenizer.eos_token) else ids
            for ids, prompt in zip(encoded, asked, strict=True)
        ]
    else:
        if not tokenizer.chat_template:
            raise InputError(
                "these are conversations, and the model's tokenizer has no chat template",
                place=spec.path,
                hint="use a model that has one, or rows with text under `prompt`",
            )
        texts = tokenizer.apply_chat_template(list(asked), add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[-spec.max_prompt_length :] for ids in encoded] if spec.max_prompt_length else encoded


def encode_replies(tokenizer: PreTrainedTokenizerBase, spec: Data, replies: Sequence[str]) -> list[list[int]]:
    """Replies' token ids, encoded apart from their prompts as they are in generation; each ends in one EOS.

    A reply longer than `max_completion_length` is cut and has no EOS: it did not end there.
    """
    bare = []
    for reply in replies:
        while reply.endswith(tokenizer.eos_token):
            reply = reply.removesuffix(tokenizer.eos_token)
        bare.append(reply)
    encoded = tokenizer(bare, add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id][: spec.max_completion_length] for ids in encoded]


def _prepare(spec: Data, seed: int, read: Any, encode: Any) -> tuple[Dataset, Dataset | None]:
    """Load, check every row, split by prompt, encode."""
    table = rows.load(spec)
    rows.check(table, spec, read)
    train, held_out = split_by_prompt(table, spec, seed)
    return _encoded(train, read, encode), None if held_out is None else _encoded(held_out, read, encode)


def _encoded(table: Dataset, read: Any, encode: Any) -> Dataset:
    def encode_batch(batch: dict[str, list[Any]]) -> Columns:
        return encode([read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)])

    return table.map(encode_batch, batched=True, remove_columns=table.column_names, desc="Encoding")


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
