"""A prompt and two replies that are written as two whole conversations, or as two whole texts. No libraries."""

import re

from rlhf_pipeline.data.advice import OTHER_NAMES
from rlhf_pipeline.data.columns import CONTEXT, SYSTEM, Seen, UnclearError, is_turns
from rlhf_pipeline.data.turns import (
    Record,
    Row,
    RowError,
    as_reply,
    reply_of,
    turns_of,
    turns_of_transcript,
    with_system,
    without_reply,
)


def whole_conversations(row: Row, better: str) -> Record:
    """The prompt and the two replies of conversations that differ in their last turn alone."""
    chosen, rejected = turns_of(row, better), turns_of(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError(f"`{better}` and `rejected` differ before their last turn")
    for column in (better, "rejected"):
        reply_of(row | {column: row[column][-1]}, column)  # which may be trained
    before = with_system(without_reply(chosen, better), row)
    without_reply(rejected, "rejected")
    return before, as_reply(chosen[-1], better), as_reply(rejected[-1], "rejected")


def whole_transcripts(chosen: str, rejected: str, row: Row, better: str) -> Record:
    """The same of texts in which `Human:` and `Assistant:` begin paragraphs."""
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


def require_common_beginnings(seen: Seen, better: str) -> None:
    """See that two texts begin with a prompt, and that no other column looks like the one that holds it.

    Raises:
        UnclearError: they may be replies to what is in another column.
    """
    turns = [name for name in seen.values if name not in (better, "rejected") and seen.mostly(name, is_turns)]
    if turns:
        raise UnclearError(
            f"`{better}` and `rejected` may be replies to `{turns[0]}`",
            ({"messages": turns[0]}, "takes it for the conversation before them"),
        )
    ends, rows = [], [row for row in seen.rows if isinstance(row.get(better), str)]
    for row in rows:
        try:
            ends.append(split_texts(row[better], str(row.get("rejected")), better)[0].rstrip(" ")[-1:])
        except RowError:
            ends.append("")
    asks = sum(re.fullmatch(r"[^\w,;]", end, re.DOTALL) is not None for end in ends)
    others = [
        name
        for name in seen.values
        if name not in (better, "rejected", *SYSTEM)
        and seen.share(name, lambda value: isinstance(value, str) and len(value.split()) > 1) > 0.5
        and seen.repeats(name, [better]) is None
    ]
    likely = [name for name in others if name.lower() in (*OTHER_NAMES["prompt"], *CONTEXT)] or others
    if (likely and 2 * asks < len(rows)) or (likely and likely != others):
        raise UnclearError(
            f"`{better}` and `rejected` may be replies to `{likely[0]}`, or texts that begin with their prompt",
            ({"prompt": likely[0]}, f"takes `{likely[0]}` for the prompt"),
        )
    if 2 * ends.count("") > len(rows):
        raise UnclearError(
            f"`{better}` and `rejected` do not begin with one prompt in most of the rows, and no column holds it",
            hint="give the prompt in a column, or at the beginning of both texts",
        )
