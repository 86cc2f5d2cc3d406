"""The shapes that rows come in, recognised from their columns, and what is read of one row. No libraries.

Every shape becomes the same records: a prompt and a reply (demonstrations), a prompt, a chosen and a rejected reply
(preferences), or a prompt (prompts). Where the columns fit several shapes, the first one counts in the order in which
`_demonstrations`, `_preferences` and `_prompts` try them.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_pipeline import kinds
from rlhf_pipeline.data.turns import (
    Prompt,
    Record,
    Reply,
    Row,
    RowError,
    as_reply,
    before_reply,
    demonstration,
    framed,
    is_blank,
    is_transcript,
    reply_of,
    text_of,
    to_be_answered,
    turns_of,
    turns_of_transcript,
    what_is_wrong,
    with_system,
    without_reply,
)
from rlhf_pipeline.errors import ColumnsError
from rlhf_pipeline.recipe.yaml import dump_inline

Wanted = Literal["demonstrations", "preferences", "prompts"]
Scored = list[tuple[Reply, float]]  # replies to one prompt, each with its score

ASKED = ("prompt", "instruction", "question")
REPLY = ("completion", "response", "reply", "output", "answer")
RANKED = ("replies", "completions", "responses", "answers")
TEXT_OF_REPLY = ("reply", "text", "content", "response", "answer", "completion")
SCORE = ("score", "rating")
THUMB = ("label", "thumbs")
THUMBS = {"true": True, "1": True, "up": True, "false": False, "0": False, "down": False}

# What the columns of each kind of rows are at their plainest, and what else people call them.
PLAINEST: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}
OTHER_NAMES = {
    "prompt": (*ASKED, "query", "user", "human", "context", "request"),
    "completion": (*REPLY, "assistant", "gpt", "target", "chosen", "solution"),
    "chosen": ("preferred", "better", "winner", "accepted", "positive", "good"),
    "rejected": ("dispreferred", "worse", "loser", "negative", "bad"),
}
# Under which names each is read without `columns`.
READ_AS_IT_IS = {"prompt": ASKED, "completion": REPLY, "chosen": ("chosen", "preferred"), "rejected": ("rejected",)}


@dataclass(frozen=True)
class Shape:
    """How rows are read.

    Attributes:
        name: what it is called, as "prompt/completion", "messages" or "ranking".
        says: the name and what is taken for what, in one line.
        read: the records of one row, perhaps none. Raises RowError where the row lacks something.
        of_replies: None, or what becomes of all replies to one prompt; `read` then gives (prompt, reply, score), and
            the result is the records without their prompt.
        labelled: each row says of one reply whether it is good.
    """

    name: str
    says: str
    read: Callable[[Row], list[Record]]
    of_replies: Callable[[Scored], list[Record]] | None = None
    labelled: bool = False


def recognise(
    rows: Iterable[Row],
    wanted: Wanted,
    chat: bool | None = None,
    place: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Shape:
    """Tell a shape from the first rows.

    Args:
        rows: some rows; what is null in all of them does not count as a column.
        wanted: what a stage needs.
        chat: the recipe's `data.chat`.
        place: what to name in an error.
        columns: what the recipe has renamed already: yours by expected.

    Raises:
        ColumnsError: these columns are none of the shapes.
    """
    names: Row = {}
    for row in rows:
        for name, value in row.items():
            if names.get(name) is None:
                names[name] = value
    known = {name: value for name, value in names.items() if value is not None}
    find: dict[Wanted, Callable[[Row, bool | None], Shape | None]]
    find = {"demonstrations": _demonstrations, "preferences": _preferences, "prompts": _prompts}
    shape = find[wanted](known, chat)
    if shape is None:
        others = [other for other in find if find[other](known, chat)]
        raise ColumnsError(
            f"the columns ({', '.join(names) or 'none'}) are not {wanted}; those need {_needs(wanted)}",
            place=place,
            hint=_advice(wanted, list(names), [name for name in names if name not in known], columns or {}, others),
        )
    return shape


def _needs(wanted: Wanted) -> str:
    return {
        "demonstrations": "`messages`, or a prompt (`prompt`, `instruction`, `question`) with a reply (`completion`, "
        "`response`, `output`, `answer`), or `text`",
        "preferences": "`chosen` and `rejected`, or a prompt with `replies` from best to worst, or a prompt with a "
        "reply and its `score` or `label`",
        "prompts": "`prompt`, `messages`, `instruction` or `question`",
    }[wanted]


def _advice(
    wanted: Wanted, names: list[str], empty: list[str], columns: Mapping[str, str], others: list[Wanted]
) -> str:
    """What to do about columns that do not fit; never to rename what is read under its own name.

    Args:
        wanted: what they should be.
        names: of all columns, after the recipe's `columns`.
        empty: those that are null in all rows.
        columns: what the recipe renames already.
        others: what the rows are instead.
    """
    found: dict[str, str] = {}
    missing = [expected for expected in PLAINEST[wanted] if not any(name in names for name in READ_AS_IT_IS[expected])]
    for expected in missing:
        left = {name.lower(): name for name in names if name not in (*found.values(), *PLAINEST[wanted])}
        same = next((left[other] for other in (expected, *OTHER_NAMES[expected]) if other in left), None)
        near = difflib.get_close_matches(expected, left, n=1, cutoff=0.7)
        if same or near:
            found[expected] = same or left[near[0]]
    lacking = [name for name in empty if any(name in READ_AS_IT_IS[expected] for expected in PLAINEST[wanted])]
    if lacking:
        return f"`{lacking[0]}` is null in the first rows: fill it in, or give `columns` another one to take for it"
    if missing and len(found) == len(missing):
        renames = {**columns, **found}
        return f"perhaps `columns: {dump_inline(renames)}`"
    if others:
        return f"they are {others[0]}, which a stage of kind {' or '.join(_kinds_that_read(others[0]))} takes"
    return "`columns: {expected: yours}` gives your columns the names that are expected"


def _kinds_that_read(rows: Wanted) -> list[str]:
    return [name for name in kinds.NAMES if kinds.get(name).reads == rows]


# Which shape


def _demonstrations(known: Row, chat: bool | None) -> Shape | None:
    asked, reply = _asked(known, chat), next((name for name in REPLY if name in known), None)
    if "prompt" in known and "completion" not in known and ("messages" in known or "conversations" in known):
        asked = None  # beside a whole conversation, `prompt` repeats its beginning
    if asked and reply:
        label = next((name for name in THUMB if name in known and _is_thumb(known[name])), None)
        score = next((name for name in SCORE if name in known and _is_number(known[name])), None)
        if label:
            return _labelled(asked, reply, label, pairs=False)
        if score:
            return _scored(asked, reply, score, best)
        return Shape(
            f"{asked.name}/{reply}",
            f"{asked.name}/{reply}: {asked.says} and the reply",
            lambda row: [(to_be_answered(asked.read(row)), reply_of(row, reply))],
        )
    column = _whole(known)
    if column and "chosen" not in known:
        says = f"{column}: conversations, whose last turn is the reply"
        return Shape(column, says, lambda row: demonstration(row, column))
    preferences = _preferences(known, chat)
    if preferences is not None:  # rankings and chosen/rejected; labels and scores were looked for above
        if "chosen" in known or "preferred" in known:
            says = f"{preferences.says}; the chosen one is the reply"
            return Shape(preferences.name, says, lambda row: [record[:2] for record in preferences.read(row)])
        return _ranking(known, chat, best)
    if "text" in known:
        return Shape(
            "text", "text: all of it is learned, there is no prompt", lambda row: [("", reply_of(row, "text"))]
        )
    return None


def _preferences(known: Row, chat: bool | None) -> Shape | None:
    asked = _asked(known, chat)
    if "rejected" in known and ("chosen" in known or "preferred" in known):
        return _chosen_and_rejected(known, chat, asked)
    ranking = _ranking(known, chat, pairs_of)
    if ranking or asked is None:
        return ranking
    for reply in (name for name in REPLY if name in known):
        score = next((name for name in SCORE if name in known), None)
        if score:
            return _scored(asked, reply, score, pairs_of)
        label = next((name for name in THUMB if name in known), None)
        if label:
            return _labelled(asked, reply, label, pairs=True)
    return None


def _prompts(known: Row, chat: bool | None) -> Shape | None:
    asked = _asked(known, chat)
    if asked:
        return Shape(asked.name, f"{asked.name}: {asked.says}", lambda row: [(to_be_answered(asked.read(row)),)])
    column = _whole(known)
    if column:
        says = f"{column}: conversations, without the reply that may come last"
        return Shape(column, says, lambda row: [(before_reply(row, column),)])
    if "rejected" in known and ("chosen" in known or "preferred" in known):
        pairs = _chosen_and_rejected(known, chat, None)
        return Shape(pairs.name, f"{pairs.says}; only the prompt is taken", lambda row: [pairs.read(row)[0][:1]])
    return None


def _whole(known: Row) -> str | None:
    """The column with whole conversations."""
    return next((name for name in ("messages", "conversations", "contents") if name in known), None)


# What is asked


@dataclass(frozen=True)
class _Asked:
    """Where a row's prompt is."""

    name: str
    says: str
    read: Callable[[Row], Prompt]


def _asked(known: Row, chat: bool | None) -> _Asked | None:
    """The column with the prompt: `prompt`, `instruction` (with `input`) or `question`, in this order."""
    column = next((name for name in ASKED if name in known), None)
    if column is None:
        return None
    beside_system = "system" in known
    # A prompt is text as the model reads it; an instruction or a question is what somebody says to it.
    as_turn = (column != "prompt" or beside_system) if chat is None else chat

    def read(row: Row) -> Prompt:
        value = row.get(column)
        if isinstance(value, list):
            return with_system(turns_of(row, column), row)
        text = text_of(row, column)
        if column == "instruction" and not is_blank(row.get("input")):
            text += "\n\n" + text_of(row, "input")
        return framed(text, row, as_turn)

    name = "instruction/input" if column == "instruction" and "input" in known else column
    if isinstance(known[column], list):
        return _Asked(name, "a conversation", read)
    return _Asked(name, "a user's turn" if as_turn else "text", read)


# Pairs of replies


def _chosen_and_rejected(known: Row, chat: bool | None, asked: _Asked | None) -> Shape:
    """Chosen and rejected: replies to a prompt, or whole conversations or texts that begin alike."""
    better = "chosen" if "chosen" in known else "preferred"
    whole = isinstance(known[better], list) and len(known[better]) > 1
    before = _whole(known)
    if asked is None and before and not whole:

        def read_before(row: Row) -> Prompt:
            return to_be_answered(with_system(turns_of(row, before), row))

        asked = _Asked(before, "a conversation", read_before)

    def read(row: Row) -> list[Record]:
        chosen, rejected = row.get(better), row.get("rejected")
        if isinstance(chosen, list) and len(chosen) > 1:
            return [_whole_conversations(row, better)]
        if asked is not None:
            return [(to_be_answered(asked.read(row)), reply_of(row, better), reply_of(row, "rejected"))]
        if isinstance(chosen, list):
            raise RowError(f"`{better}` holds a reply alone, and there is no `prompt`")
        chosen, rejected = text_of(row, better), text_of(row, "rejected")
        if chat is not False and is_transcript(chosen):
            return [_whole_transcripts(chosen, rejected, row, better)]
        prompt, *replies = split_texts(chosen, rejected, better)
        return [(framed(prompt, row, bool(chat) or "system" in known), *replies)]

    if whole or (asked is None and isinstance(known[better], list)):
        name, says = f"{better}/rejected", "conversations that differ in their last turn"
    elif asked is not None:
        name, says = f"{asked.name}/{better}/rejected", f"{asked.says} and two replies"
    elif chat is not False and is_transcript(known[better]):
        name, says = f"{better}/rejected", "texts of Human and Assistant, which become turns"
    else:
        name, says = f"{better}/rejected", "texts, whose common beginning is the prompt"
    return Shape(name, f"{name}: {says}", read)


def _whole_conversations(row: Row, better: str) -> Record:
    chosen, rejected = turns_of(row, better), turns_of(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError(f"`{better}` and `rejected` differ before their last turn")
    for column in (better, "rejected"):
        reply_of(row | {column: row[column][-1]}, column)  # which may be trained
    before = with_system(without_reply(chosen, better), row)
    without_reply(rejected, "rejected")
    return before, as_reply(chosen[-1], better), as_reply(rejected[-1], "rejected")


def _whole_transcripts(chosen: str, rejected: str, row: Row, better: str) -> Record:
    before, *replies = (
        turns_of_transcript(text, column) for text, column in ((chosen, better), (rejected, "rejected"))
    )
    if before[:-1] != replies[0][:-1]:
        raise RowError(f"`{better}` and `rejected` differ before their last turn")
    prompt = with_system(without_reply(before, better), row)
    without_reply(replies[0], "rejected")
    return prompt, before[-1]["content"], replies[0][-1]["content"]


def split_texts(chosen: str, rejected: str, better: str = "chosen") -> tuple[str, str, str]:
    """Split two texts into the prompt they begin with, up to a whole word, and two replies.

    Raises:
        RowError: they do not begin alike, or one has no reply.
    """
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    following = chosen[end : end + 1] + rejected[end : end + 1]
    if end == shorter or (re.match(r"\w", chosen[end - 1 : end] or " ") and re.search(r"\w", following)):
        end = re.search(r"\w*\W*$" if end == shorter else r"\w*$", chosen[:end]).start()  # type: ignore[union-attr]
    # A space belongs to the word after it, as tokenizers have it; a line ends with its line break.
    end = len(chosen[:end].rstrip(" "))
    prompt, *replies = chosen[:end], chosen[end:], rejected[end:]
    if not prompt.strip():
        raise RowError(f"`{better}` and `rejected` have no common beginning that could be the prompt")
    for column, reply in zip((better, "rejected"), replies, strict=True):
        if not reply.strip():
            raise RowError(f"the reply in `{column}` is empty")
    return prompt, replies[0], replies[1]


# Several replies to a prompt


def pairs_of(replies: Scored) -> list[Record]:
    """Every pair of a better and a worse reply, the best ones first; equal scores make none."""
    ranked = sorted(replies, key=lambda reply: -reply[1])
    return [(better, worse) for (better, high), (worse, low) in itertools.combinations(ranked, 2) if high > low]


def best(replies: Scored) -> list[Record]:
    """The reply with the highest score, the first of several."""
    return [(max(replies, key=lambda reply: reply[1])[0],)]


def _ranking(known: Row, chat: bool | None, choose: Callable[[Scored], list[Record]]) -> Shape | None:
    """All replies to a prompt in one row: best first, or with ranks or scores."""
    asked = _asked(known, chat)
    column = next((name for name in RANKED if isinstance(known.get(name), list)), None)
    if asked is None or column is None:
        return None
    order: str | None = next((name for name in ("ranks", "scores") if name in known), None)
    if order is None and known[column] and isinstance(known[column][0], dict):
        order = next((name for name in ("rank", *SCORE) if name in known[column][0]), None)
    says = {
        None: "from best to worst",
        "ranks": "with their ranks, 1 the best",
        "rank": "with their ranks, 1 the best",
    }.get(order, "with their scores")

    def read(row: Row) -> list[Record]:
        prompt = to_be_answered(asked.read(row))
        return [(prompt, *record) for record in choose(_scored_replies(row, column, order))]

    name = "scores per reply" if order in ("scores", *SCORE) else "ranking"
    return Shape(name, f"{name}: {asked.says} under `{asked.name}`, `{column}` {says}", read)


def _scored_replies(row: Row, column: str, order: str | None) -> Scored:
    values = row.get(column)
    if not isinstance(values, list):
        raise RowError(what_is_wrong(column, values, "a list of replies"))
    if len(values) < 2:
        raise RowError(f"`{column}` should be two replies or more, and has {len(values)}")
    texts: list[Reply] = []
    within: Any = []
    for value in values:
        if isinstance(value, dict) and "role" not in value:
            name = next((name for name in TEXT_OF_REPLY if value.get(name) is not None), None)
            if name is None:
                raise RowError(
                    f"a reply of `{column}` has no text under {', '.join(f'`{one}`' for one in TEXT_OF_REPLY)}"
                )
            texts.append(reply_of(value, name))
            within.append(value.get(order) if order else None)
        else:
            texts.append(reply_of({column: value}, column))
    if order is None:
        return [(text, float(-i)) for i, text in enumerate(texts)]
    if order in ("ranks", "scores"):
        within = row.get(order)
        if not isinstance(within, list):
            raise RowError(what_is_wrong(order, within, "a list of numbers"))
    if len(within) != len(texts):
        raise RowError(f"`{column}` has {len(texts)} replies, and `{order}` {len(within)} numbers")
    sign = -1.0 if order in ("rank", "ranks") else 1.0
    return [(text, sign * _number(value, order)) for text, value in zip(texts, within, strict=True)]


def _scored(asked: _Asked, reply: str, score: str, choose: Callable[[Scored], list[Record]]) -> Shape:
    """One reply and its score in each row; the rows of a prompt belong together."""
    taken = "the best reply to each prompt" if choose is best else "every better with every worse reply to a prompt"
    return Shape(
        f"{asked.name}/{reply}/{score}",
        f"{asked.name}/{reply}/{score}: {asked.says} and a scored reply in each row; {taken}",
        lambda row: [(to_be_answered(asked.read(row)), reply_of(row, reply), _number(row.get(score), score))],
        choose,
    )


def _labelled(asked: _Asked, reply: str, label: str, pairs: bool) -> Shape:
    """One reply and whether it is good in each row."""
    name = f"{asked.name}/{reply}/{label}"
    if pairs:
        return Shape(
            name,
            f"{name}: {asked.says} and a good or bad reply in each row; every good with every bad reply to a prompt",
            lambda row: [(to_be_answered(asked.read(row)), reply_of(row, reply), float(_thumb(row, label)))],
            pairs_of,
            labelled=True,
        )

    def read(row: Row) -> list[Record]:
        record = to_be_answered(asked.read(row)), reply_of(row, reply)
        return [record] if _thumb(row, label) else []

    return Shape(
        name, f"{name}: {asked.says} and a good or bad reply in each row; the good ones are taken", read, labelled=True
    )


def _thumb(row: Row, column: str) -> bool:
    value: Any = row.get(column)
    if not _is_thumb(value):
        raise RowError(what_is_wrong(column, value, "true or false, 1 or 0, up or down"))
    return THUMBS[_as_word(value)]


def _is_thumb(value: Any) -> bool:
    return isinstance(value, str | int | float) and _as_word(value) in THUMBS


def _as_word(value: str | float) -> str:
    return value.strip().lower() if isinstance(value, str) else f"{float(value):g}"


def _number(value: Any, column: str) -> float:
    if not _is_number(value):
        raise RowError(what_is_wrong(column, value, "a number"))
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or text that says one, as all of a CSV file is text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
