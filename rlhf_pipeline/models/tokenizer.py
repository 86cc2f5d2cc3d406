"""One tokenizer for all stages: left padding, a pad token that is nothing else, and a chat template."""

import contextlib
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import check_files, load_config, refuse_untrusted_code
from rlhf_pipeline.recipe.schema import Model

# The chat template of a model that has none. Prompt and reply are encoded apart; here they meet at a line break, so
# that a reply's first word is encoded as at the beginning of any line.
DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


class TemplateError(Exception):
    """A chat template cannot render a conversation; the message says why, in the template's words."""


def load_tokenizer(model: Model | str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and make it fit for every stage.

    PPO finds the end of a reply by its padding, so pad must differ from EOS: with pad == EOS, TRL masks EOS out and
    takes padding for the end of a reply. Where the tokenizer has no pad token of its own, a special token that text
    never contains takes its place. The embedding is never resized: it belongs to the base.

    The chat template is the recipe's `chat_template`, else the tokenizer's own, else a plain default; see
    `has_default_template`. It is saved with the tokenizer.

    Args:
        model: the recipe's `model`; a folder or hub id alone means one with all else as by default.

    Returns:
        The tokenizer, padding on the left, with `pad_token_id` different from `eos_token_id`.

    Raises:
        InputError: the model has no tokenizer, one whose code is not trusted, no EOS, nothing that can serve as
            padding, or an invalid chat template.
    """
    spec = Model(path=model) if isinstance(model, str) else model
    path = spec.path
    check_files(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError) as error:
        refuse_untrusted_code(spec, error)
        raise InputError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            place=f"model.path: {path}",
            hint="a model folder needs its tokenizer files; a hub id needs the network once",
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so replies could never end",
            place=f"model.path: {path}",
            hint="set `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _pad_token(tokenizer, spec)
    _set_chat_template(tokenizer, spec)
    return tokenizer


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, spec: Model) -> None:
    place = f"model.path: {spec.path}"
    if spec.chat_template is not None:
        place = spec.chat_template
        try:
            tokenizer.chat_template = Path(spec.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"the chat template cannot be read: {reason}", place=place) from None
        if not tokenizer.chat_template.strip():
            raise InputError("the chat template is empty", place=place)
    elif not tokenizer.chat_template:
        # Other templates write the BOS themselves, since what they render is encoded without special tokens.
        bos = "{{- bos_token }}" if begins_with_bos(tokenizer, tokenizer("a")["input_ids"]) else ""
        tokenizer.chat_template = bos + DEFAULT_TEMPLATE
    try:
        with contextlib.suppress(TemplateError):  # it may refuse this conversation and render those of the data
            render(tokenizer, [{"role": "user", "content": "a"}])
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid Jinja: {error.message}", place=f"{place}:{error.lineno}"
        ) from None


def has_default_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer from `load_tokenizer` has the plain default for want of a chat template of its own."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.endswith(DEFAULT_TEMPLATE)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], times: int = 1) -> bool:
    """Whether token ids begin with BOS, so many times."""
    return tokenizer.bos_token_id is not None and ids[:times] == [tokenizer.bos_token_id] * times


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """A conversation as text, up to where the assistant's reply begins.

    The text has all the special tokens it shall have: encode it with `add_special_tokens=False`.

    Raises:
        TemplateError: the chat template refuses the conversation, or fails on it.
    """
    return _apply(tokenizer, turns, add_generation_prompt=True)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a chat template writes behind an assistant's turn, or None where that is not known."""
    content = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": content}]
    try:
        _, found, after = _apply(tokenizer, turns).rpartition(content)
    except TemplateError:
        return None
    return after.strip() if found else None


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateSyntaxError:  # found when the tokenizer is loaded
        raise
    except (JinjaError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TemplateError(f"the chat template cannot render this conversation: {words}") from None


def _pad_token(tokenizer: PreTrainedTokenizerBase, spec: Model) -> str:
    """A token for padding that exists, that is neither EOS nor BOS, and that text does not contain."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if str(token) not in taken]
    for wanted in ("pad", "unk", "reserved"):
        for token in special:
            if wanted in token.lower():
                return token
    # Many models have more embedding rows than tokens; such a row serves without resizing anything.
    if load_config(spec).get_text_config().vocab_size > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return "<|pad|>"
    raise InputError(
        "the tokenizer has no pad token, and none that could serve as one",
        place=f"model.path: {spec.path}",
        hint="add one with `tokenizer.add_special_tokens`, resize the model's embedding, and save both to a folder",
    )
