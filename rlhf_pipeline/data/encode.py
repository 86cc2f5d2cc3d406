"""From records to token ids: one encoding for all stages.

The prompt's tokens, then the reply's tokens and one EOS. So the reward is trained at the same token, the last of the
reply, where PPO reads it. A prompt's tokens are the same with and without a reply. A reply's are those that it has
behind its prompt, in the whole text as the chat template writes it: alone, many tokenizers would begin it with a space.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data import every_turn
from rlhf_pipeline.data.files import Located
from rlhf_pipeline.data.shapes import Wanted
from rlhf_pipeline.data.sources import bad_row, where
from rlhf_pipeline.data.turns import Prompt, Record, Reply
from rlhf_pipeline.models.tokenizer import TemplateError, TurnEnd, render, render_reply, turn_end, without_end
from rlhf_pipeline.recipe.schema import Data

Ids = list[int]
# What ends a turn or a text in well-known models.
OTHER_ENDS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
)


@dataclass(frozen=True)
class Layout:
    """What a trainer reads, and how it is put together from the tokens of a prompt and its replies.

    Attributes:
        wanted: what the rows are read as.
        columns: of token ids, as the trainer reads them.
        lengths: columns with the number of tokens, before any cut.
        join: makes the columns of a prompt's tokens and those of its replies.
        keeps_row: there is a column `row`, too; see `row_of`.
        texts: columns that hold what a record has behind its prompt as JSON, where this is not encoded.
        labels: columns of what a record says behind its replies: whether they are good.
    """

    wanted: Wanted
    columns: tuple[str, ...]
    lengths: tuple[str, ...]
    join: Callable[..., tuple[Ids, ...]]
    keeps_row: bool = False
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


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
FEEDBACK = Layout(
    "feedback",
    ("prompt_ids", "completion_ids"),
    ("prompt_length", "reply_length"),
    lambda prompt, reply: (prompt, reply),
    labels=("label",),
)
PROMPTS = Layout("prompts", ("input_ids",), ("prompt_length",), lambda prompt: (prompt,))
PROMPTS_WITH_ROWS = replace(PROMPTS, keeps_row=True)
CANDIDATES = replace(PROMPTS_WITH_ROWS, wanted="candidates", texts=("replies",))
PAIRS_AS_TEXT = replace(PROMPTS_WITH_ROWS, wanted="preferences", texts=("chosen", "rejected"))
ROW = "row"


@dataclass
class Notes:
    """What was found while records were encoded.

    Attributes:
        counts: see `prepare.Prepared`.
        unlike_template: of the first conversation that the chat template itself writes otherwise, `prompt_and_reply`
            and the `template`'s text.
    """

    counts: Counter[str]
    unlike_template: dict[str, str] | None = None


def encode(
    layout: Layout,
    batch: list[tuple[Located, Record]],
    spec: Data,
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
) -> dict[str, list[Any]]:
    """A batch of records as the columns of a layout."""
    limits = [spec.max_prompt_length, *[spec.max_completion_length] * (len(layout.lengths) - 1)]
    names = (*layout.columns, *layout.texts, *layout.labels, "prompt_key", "row_key", *layout.lengths)
    columns: dict[str, list[Any]] = {name: [] for name in (*names, *((ROW,) if layout.keeps_row else ()))}
    places: list[list[int]] = [[] for _ in batch]
    if layout is DEMONSTRATIONS and spec.loss == "all":
        unmarked = [every_turn.without_marks(record) for _, record in batch]
        batch = [(located, record) for (located, _), (record, _) in zip(batch, unmarked, strict=True)]
        places = [of_row for _, of_row in unmarked]
    ends = [len(record) - len(layout.texts) - len(layout.labels) for _, record in batch]
    asked = [(located, record[:end]) for (located, record), end in zip(batch, ends, strict=True)]
    encoded = _tokens(tokenizer, spec, asked, notes)
    within = _replies_within(tokenizer, spec, asked, places, encoded, notes)
    for (located, record), end, parts, spans in zip(batch, ends, encoded, within, strict=True):
        if parts is None:
            continue
        replies = [*(parts[0][start:stop] for start, stop in spans), *parts[1:]]
        lengths = [len(part) for part in parts]
        if spans:
            lengths[1] = max(map(len, replies))
        if spec.too_long == "drop" and any(
            limit and length > limit for length, limit in zip(lengths, limits, strict=True)
        ):
            notes.counts["too_long"] += 1
            continue
        notes.counts["conversations"] += isinstance(record[0], list)
        notes.counts["eos_within"] += any(tokenizer.eos_token_id in reply[:-1] for reply in replies)
        cut = [_last(parts[0], limits[0]), *(part[: limits[1]] for part in parts[1:])]
        row_key = hash_of(record)
        prompt_key = hash_of(record[0]) if record[0] else row_key
        texts = [json.dumps(part, ensure_ascii=False) for part in record[end : end + len(layout.texts)]]
        behind = [*texts, *record[end + len(layout.texts) :]]
        values = [*layout.join(*cut), *behind, prompt_key, row_key, *lengths]
        _put_loss_on(spans, values, len(parts[0]) - len(cut[0]), limits[-1])
        values += [row_of(record[0], located.row)] if layout.keeps_row else []
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns


def row_of(prompt: Prompt, row: dict[str, Any]) -> str:
    """What a reward may read of a row, as JSON: its `prompt`, text or turns, and all its `columns`.

    What JSON has no word for, as a date, is text.
    """
    return json.dumps({"prompt": prompt, "columns": row}, ensure_ascii=False, default=str)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, spec: Data, asked: Sequence[Prompt]) -> list[Ids]:
    """Prompts' token ids: text as the tokenizer encodes it, or turns through the model's chat template.

    A prompt longer than `max_prompt_length` keeps its last tokens.

    Raises:
        InputError: the chat template refuses a prompt.
    """
    return [ids for (ids,) in encode_records(tokenizer, spec, [(prompt,) for prompt in asked])]


def encode_records(tokenizer: PreTrainedTokenizerBase, spec: Data, records: Sequence[Record]) -> list[list[Ids]]:
    """The token ids of each record's prompt and replies; a reply ends in one EOS.

    A prompt longer than `max_prompt_length` keeps its last tokens. A reply longer than `max_completion_length` is cut
    and has no EOS: it did not end there.

    Raises:
        InputError: the chat template refuses a prompt or a reply.
    """
    located = [(Located(where(spec), number, {}), record) for number, record in enumerate(records, 1)]
    found = _tokens(tokenizer, spec.model_copy(update={"bad_rows": "error"}), located, Notes(Counter()))
    return [
        [_last(parts[0], spec.max_prompt_length), *(part[: spec.max_completion_length] for part in parts[1:])]
        for parts in found
        if parts is not None
    ]


def _last(ids: Ids, limit: int | None) -> Ids:
    return ids[-limit:] if limit else ids


def _tokens(
    tokenizer: PreTrainedTokenizerBase, spec: Data, batch: list[tuple[Located, Record]], notes: Notes
) -> list[list[Ids] | None]:
    """The token ids of prompts and replies, not cut; None for a bad row that is left out."""
    found: list[list[Ids] | None] = [None] * len(batch)
    eos = tokenizer.eos_token
    end = turn_end(tokenizer) if any(not isinstance(record[0], str) for _, record in batch) else TurnEnd(None, (eos,))
    texts: dict[int, list[str]] = {}
    turns: dict[int, list[str]] = {}
    for i, (located, record) in enumerate(batch):
        try:
            if isinstance(record[0], str):
                texts[i] = [record[0], *(without_end(_text(reply), eos) for reply in record[1:])]
            else:
                turns[i] = _rendered(tokenizer, record, end, notes)
        except TemplateError as error:
            if spec.bad_rows == "error":
                raise bad_row(str(error), located) from None
            notes.counts["bad_rows"] += 1
    unknown = tuple(one for one in OTHER_ENDS if tokenizer.convert_tokens_to_ids(one) in (None, tokenizer.unk_token_id))
    for written, special in ((texts, True), (turns, False)):
        notes.counts["foreign_end"] += sum(
            any(reply.rstrip().endswith(unknown) for reply in replies) for _, *replies in written.values()
        )
        if written:
            for i, parts in zip(written, _encoded(tokenizer, list(written.values()), special), strict=True):
                found[i] = parts
    return found


def _replies_within(
    tokenizer: PreTrainedTokenizerBase,
    spec: Data,
    batch: list[tuple[Located, Record]],
    places: list[list[int]],
    found: list[list[Ids] | None],
    notes: Notes,
) -> list[list[tuple[int, int]]]:
    """From where up to where in each prompt's tokens there are replies that are learned, each with its EOS.

    Args:
        tokenizer: from `load_tokenizer`.
        spec: the recipe's `data`.
        batch: records without marks.
        places: of each, the turns of its prompt that are to be learned.
        found: from `_tokens`; of a bad row that is left out, None is put there.
        notes: where such rows are counted.

    Raises:
        InputError: a turn has other text or other tokens within the conversation than as the last one.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in batch]
    end = turn_end(tokenizer) if any(places) else TurnEnd(None, ())
    pieces: dict[int, list[list[str]]] = {}

    def refuse(row: int, why: str) -> None:
        if spec.bad_rows == "error":
            raise bad_row(why, batch[row][0], hint=every_turn.HINT)
        notes.counts["bad_rows"] += 1
        found[row], spans[row] = None, []

    for row, (_, record) in enumerate(batch):
        if places[row] and found[row] is not None:
            try:
                pieces[row] = every_turn.in_pieces(tokenizer, record[0], places[row], end)
            except TemplateError as error:
                refuse(row, str(error))
    encoded = iter(_encoded(tokenizer, [piece for of_row in pieces.values() for piece in of_row], special=False))
    for row, of_row in pieces.items():
        parts, ids = found[row], Ids()
        assert parts is not None
        for number, (before, *reply) in enumerate(itertools.islice(encoded, len(of_row))):
            ids += before[1:] if number else before  # without the EOS of the reply before, which that has
            for one in reply:
                spans[row].append((len(ids), len(ids) + len(one)))
                ids += one
        if ids != parts[0]:
            number = next((i for i, (_, stop) in enumerate(spans[row]) if ids[:stop] != parts[0][:stop]), -1)
            refuse(
                row,
                f"turn {places[row][number] + 1} of the conversation, the assistant's, has other tokens where more "
                "turns follow, as it shares one with the text around it",
            )
    return spans


def _put_loss_on(spans: list[tuple[int, int]], values: list[Any], cut: int, limit: int | None) -> None:
    """Put labels on the replies within a demonstration's prompt of which so many tokens were cut.

    One that lost its beginning there has none; and each has as many as the last reply may have.
    """
    for start, stop in spans:
        if start >= cut:
            part = slice(start - cut, min(stop, start + (limit or stop)) - cut)
            values[1][part] = values[0][part]


def _text(reply: Reply) -> str:
    """A reply that follows plain text."""
    if isinstance(reply, str):
        return reply
    part = "tool_calls" if "tool_calls" in reply else "reasoning_content"
    raise TemplateError(f"the reply has `{part}`, and its prompt is plain text, which goes through no chat template")


def _rendered(tokenizer: PreTrainedTokenizerBase, record: Record, end: TurnEnd, notes: Notes) -> list[str]:
    """A conversation's prompt and replies as text."""
    prompt = render(tokenizer, record[0])
    written, differs = [prompt], False
    for reply in record[1:]:
        text, whole = render_reply(tokenizer, record[0], prompt, reply, end)
        written.append(text)
        if whole is not None:
            differs = True
            notes.unlike_template = notes.unlike_template or {"prompt_and_reply": prompt + text, "template": whole}
    notes.counts["unlike_template"] += differs
    return written


def _encoded(tokenizer: PreTrainedTokenizerBase, written: list[list[str]], special: bool) -> list[list[Ids]]:
    """The token ids of prompts and the replies behind them.

    Args:
        tokenizer: from `load_tokenizer`.
        written: of each record the text of its prompt and of its replies.
        special: whether the tokenizer adds its own special tokens, as a BOS.
    """
    asked = _ids(tokenizer, [prompt for prompt, *_ in written], special)
    wholes = iter(_ids(tokenizer, [prompt + reply for prompt, *replies in written for reply in replies], special))
    eos_id = tokenizer.eos_token_id
    return [
        [ids, *([*_behind(tokenizer, ids, next(wholes), reply), eos_id] for reply in replies)]
        for ids, (_, *replies) in zip(asked, written, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[Ids]:
    if not texts:
        return []
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id  # each look-up costs as much as a short text's encoding
    found = tokenizer(texts, add_special_tokens=special)["input_ids"]
    if not special:
        return found
    # Some tokenizers close every text; what is put together here is closed by hand.
    return [
        ids[:-1] if ids and ids[-1] == eos_id and not text.endswith(eos) else ids
        for text, ids in zip(texts, found, strict=True)
    ]


def _behind(tokenizer: PreTrainedTokenizerBase, prompt: Ids, whole: Ids, reply: str) -> Ids:
    """The tokens of a reply in those of the whole.

    Where its beginning and the end of the prompt share a token in the whole, as two line breaks may, they are those
    that it has at the beginning of a line: the prompt's tokens are the same whatever follows.
    """
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    line, behind_it, alone = tokenizer(["\n", "\n" + reply, reply], add_special_tokens=False)["input_ids"]
    return behind_it[len(line) :] if behind_it[: len(line)] == line else alone


def hash_of(value: Any) -> int:
    """64 bits of a prompt or a record, as a signed number."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
