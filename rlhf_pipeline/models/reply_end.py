"""What ends a reply: one definition, for all that sample one and for the folders that are exported."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, checkpoint: GenerationConfig, settings: Mapping[str, Any]
) -> list[int]:
    """The tokens of which any one ends a policy's reply; none where replies go on up to their limit.

    By default they are the tokenizer's EOS, which closes every reply in training, and whatever else ends a text by the
    model's own `generation_config.json`: Llama 3 has several. PPO's `stop_token_id` names others instead, and its
    `stop_token: null` none.

    Give them to `generate` as `eos_token_id` always, an empty list included: in place of None it would take the
    model's own.

    Args:
        tokenizer: from `load_tokenizer`.
        checkpoint: the model's own generation settings, of the base or from `base.load_generation_config`.
        settings: the `trainer` of the stage whose policy it is; of the base, and of kinds without such keys, anything
            without `stop_token` and `stop_token_id`.
    """
    if (chosen := settings.get("stop_token_id")) is not None:
        return _listed(chosen)
    if settings.get("stop_token", "eos") is None:
        return []
    return list(dict.fromkeys([*_listed(tokenizer.eos_token_id), *_listed(checkpoint.eos_token_id)]))


def as_eos_token_id(tokens: list[int]) -> int | list[int]:
    """Stop tokens as Transformers writes its `eos_token_id`: a single one without a list."""
    return tokens[0] if len(tokens) == 1 else tokens


def _listed(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
