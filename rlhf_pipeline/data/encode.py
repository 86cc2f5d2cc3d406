"""From records to token ids: one encoding for all stages.

The prompt's tokens, then the reply's tokens and one EOS. So the reward is trained at the same token, the last of the
reply, where PPO reads it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.files import Located
from rlhf_pipeline.data.shapes import Wanted
from rlhf_pipeline.data.sources import bad_row, where
from rlhf_pipeline.data.turns import Prompt, Record
from rlhf_pipeline.models.tokenizer import TemplateError, render
from rlhf_pipeline.recipe.schema import Data

Ids = list[int]


@dataclass(frozen=True)
class Layout:
    """What a trainer reads, and how it is put together from the tokens of a prompt and its replies."""

    wanted: Wanted
    columns: tuple[str, ...]
    lengths: tuple[str, ...]
    join: Callable[..., tuple[Ids, ...]]


DEMONSTRATIONS = Layout(
    "demonstrations",
    ("input_ids", "labels"),
    ("prompt_length", "reply_length"),
    lambda prompt, reply: (prompt + reply, [-100] * len(prompt) + reply),
)
PREFERENCES = Layout(
    "preferences",
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_length", "chosen_length", "rejected_length"),
    lambda prompt, chosen, rejected: (prompt, chosen, rejected),
)
PROMPTS = Layout("prompts", ("input_ids",), ("prompt_length",), lambda prompt: (prompt,))


def encode(
    layout: Layout,
    batch: list[tuple[Located, Record]],
    spec: Data,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> dict[str, list[Any]]:
    """A batch of records as the columns of a layout."""
    asked = _prompt_ids(tokenizer, spec, batch, counts)
    batch, asked = (
        [one for one, ids in zip(batch, asked, strict=True) if ids is not None],
        [ids for ids in asked if ids is not None],
    )
    replies = [_reply_ids(tokenizer, [record[which] for _, record in batch]) for which in range(1, len(layout.lengths))]
    limits = [spec.max_prompt_length, *[spec.max_completion_length] * len(replies)]
    columns: dict[str, list[Any]] = {name: [] for name in (*layout.columns, "prompt_key", "row_key", *layout.lengths)}
    for (_, record), *parts in zip(batch, asked, *replies, strict=True):
        lengths = [len(part) for part in parts]
        if spec.too_long == "drop" and any(
            limit and length > limit for length, limit in zip(lengths, limits, strict=True)
        ):
            counts["too_long"] += 1
            continue
        counts["conversations"] += isinstance(record[0], list)
        cut = [_last(parts[0], limits[0]), *(part[: limits[1]] for part in parts[1:])]
        row_key = hash_of(record)
        values = [*layout.join(*cut), hash_of(record[0]) if record[0] else row_key, row_key, *lengths]
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns


def encode_prompts(tokenizer: PreTrainedTokenizerBase, spec: Data, asked: Sequence[Prompt]) -> list[Ids]:
    """Prompts' token ids: text as the tokenizer encodes it, or turns through the model's chat template.

    A prompt longer than `max_prompt_length` keeps its last tokens.

    Raises:
        InputError: the chat template refuses a prompt.
    """
    located = [(Located(where(spec), number, {}), (prompt,)) for number, prompt in enumerate(asked, 1)]
    strict = spec.model_copy(update={"bad_rows": "error"})
    found = _prompt_ids(tokenizer, strict, located, Counter())
    return [_last(ids, spec.max_prompt_length) for ids in found if ids is not None]


def _last(ids: Ids, limit: int | None) -> Ids:
    return ids[-limit:] if limit else ids


def encode_replies(tokenizer: PreTrainedTokenizerBase, spec: Data, replies: Sequence[str]) -> list[Ids]:
    """Replies' token ids, encoded apart from their prompts as they are in generation; each ends in one EOS.

    A reply longer than `max_completion_length` is cut and has no EOS: it did not end there.
    """
    return [ids[: spec.max_completion_length] for ids in _reply_ids(tokenizer, replies)]


def _reply_ids(tokenizer: PreTrainedTokenizerBase, replies: Sequence[str]) -> list[Ids]:
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id  # each look-up costs as much as a short reply's encoding
    bare = []
    for reply in replies:
        while reply.endswith(eos):
            reply = reply.removesuffix(eos)
        bare.append(reply)
    if not bare:
        return []
    return [[*ids, eos_id] for ids in tokenizer(bare, add_special_tokens=False)["input_ids"]]


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, spec: Data, batch: list[tuple[Located, Record]], counts: Counter[str]
) -> list[Ids | None]:
    """The token ids of prompts, not cut; None for a bad row that is left out."""
    found: list[Ids | None] = [None] * len(batch)
    texts = [i for i, (_, record) in enumerate(batch) if isinstance(record[0], str)]
    if texts:
        written = [batch[i][1][0] for i in texts]
        eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        # Some tokenizers close every text; a prompt is not closed.
        for i, text, ids in zip(texts, written, tokenizer(written)["input_ids"], strict=True):
            found[i] = ids[:-1] if ids and ids[-1] == eos_id and not text.endswith(eos) else ids
    rendered: dict[int, str] = {}
    for i, (located, record) in enumerate(batch):
        if isinstance(record[0], str):
            continue
        try:
            rendered[i] = render(tokenizer, record[0])
        except TemplateError as error:
            if spec.bad_rows == "error":
                raise bad_row(str(error), located) from None
            counts["bad_rows"] += 1
    if rendered:
        for i, ids in zip(
            rendered, tokenizer(list(rendered.values()), add_special_tokens=False)["input_ids"], strict=True
        ):
            found[i] = ids
    return found


def hash_of(value: Any) -> int:
    """64 bits of a prompt or a record, as a signed number."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
