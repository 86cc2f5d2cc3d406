"""Every token that a stage reads has a row in the model's embedding; else training ends with an IndexError."""

from collections.abc import Sequence

import pyarrow.compute
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import OTHER_TOKENIZER, beyond_embedding


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str) -> None:
    """See to the tokens that every text and every batch may end with.

    Args:
        tokenizer: from `load_tokenizer`.
        config: the model's.
        model: its path, for the message.

    Raises:
        InputError: one is at or beyond the end of the embedding.
    """
    tokens = config.get_text_config().vocab_size
    for what, token in (("padding token", tokenizer.pad_token_id), ("EOS", tokenizer.eos_token_id)):
        if token is not None and token >= tokens:
            word = tokenizer.convert_ids_to_tokens(token)
            raise InputError(
                f"the tokenizer's {what} `{word}` is token {token:,}, and the model has {tokens:,} tokens",
                place=f"model.path: {model}",
                hint=OTHER_TOKENIZER,
            )


def check_rows(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: str
) -> list[InputError]:
    """An error where encoded rows have a token at or beyond the end of the embedding."""
    for rows in (prepared.train, prepared.held_out):
        if rows is None or not len(rows):
            continue
        for name, kind in zip(rows.column_names, rows.data.schema.types, strict=True):
            if not pyarrow.types.is_list(kind):
                continue
            largest = pyarrow.compute.max(pyarrow.compute.list_flatten(rows.data.column(name))).as_py()
            if error := beyond_embedding(largest, tokenizer, config, place):
                return [error]
    return []


def check_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: str
) -> None:
    """See that encoded prompts have no such token.

    Raises:
        InputError: they do.
    """
    error = beyond_embedding(max(map(max, prompts), default=None), tokenizer, config, place)
    if error:
        raise error
