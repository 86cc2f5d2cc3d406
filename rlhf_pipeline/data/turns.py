"""Text, replies and conversations as they are in a row. No libraries.

Every function that takes a row or turns raises a RowError where they are not as they should be.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.data.parts import (
    CALLS,
    ROLES,
    Row,
    RowError,
    Turn,
    encodable,
    is_good,
    is_trained,
    one_turn,
    tools_of,
    what_is_wrong,
)

# Text as the model reads it, or the turns {role, content} of a conversation. Their first one has the `tools` of the
# conversation, if there are any; see `parts` for what else a turn may hold.
Prompt = str | list[Turn]
Reply = str | Turn  # a turn where there is more than text: `reasoning_content`, `tool_calls`
Record = tuple[Any, ...]  # (prompt, reply), (prompt, chosen, rejected), or (prompt,)

PAIRED = ("chosen", "preferred", "rejected", "rejected_response")  # of which a turn may say what the column says

# What a column is taken for that may hold the turns before a reply. Where several do, they are those of the first.
WITH_TURNS = (
    "chosen conversation", "chosen reply", "conversation", "conversation before the replies", "prompt",
    "turns before the prompt",
)  # fmt: skip

# Which roles may follow a role; None is the beginning.
AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def as_text(prompt: Prompt) -> str:
    """A prompt as one text: of a conversation the user's turn, of a longer one all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def as_turns(prompt: Prompt) -> list[Turn]:
    """A prompt as turns; text is a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def columns_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the columns of a row: `prompt`, and `tools` where it is a conversation with some."""
    if isinstance(prompt, str) or "tools" not in prompt[0]:
        return {"prompt": prompt}
    first = {key: value for key, value in prompt[0].items() if key != "tools"}
    return {"prompt": [first, *prompt[1:]], "tools": prompt[0]["tools"]}


def text_of(row: Row, column: str) -> str:
    """A column's text, which may not be empty."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(what_is_wrong(column, value))
    return encodable(value, column)


def reply_of(row: Row, column: str) -> Reply:
    """A reply: text, one turn, or a list of one turn."""
    value = row.get(column)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return text_of(row, column)
    if len(value) != 1:
        raise RowError(
            f"`{column}` should be one turn beside a prompt, and has {len(value)}"
            if value
            else what_is_wrong(column, value)
        )
    turn = one_turn(value[0], column)
    if turn["role"] != "assistant":
        raise RowError(f"the reply in `{column}` is the turn of {turn['role']}, and not of the assistant")
    if not is_trained(value[0], column):
        raise RowError(f"the reply in `{column}` has the weight 0, so it may not be trained")
    if column not in PAIRED and not is_good(value[0], column):
        raise RowError(f"the reply in `{column}` says of itself that it is a bad one")
    return as_reply(turn, column)


def as_reply(turn: Turn, column: str) -> Reply:
    """An assistant's turn as a reply."""
    if "tool_calls" in turn:
        return turn
    if not turn["content"].strip():
        raise RowError(f"the reply in `{column}` is empty")
    return turn if "reasoning_content" in turn else turn["content"]


def turns_of(row: Row, column: str) -> list[Turn]:
    """The turns of a conversation, as {role, content} or as {from, value}.

    Raises:
        RowError: there are none, or one lacks something or is in the wrong place.
    """
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowError(what_is_wrong(column, value, "a list of turns"))
    if len(value) > 1 and _is_empty_system(value[0]):
        value = value[1:]
    return _in_order(_with_calls([one_turn(turn, column) for turn in value]), column)


def _is_empty_system(turn: Any) -> bool:
    """Whether a turn is a system turn that says nothing, as those have it who write one in each row."""
    if not isinstance(turn, dict) or ROLES.get(str(turn.get("role") or turn.get("from")).strip().lower()) != "system":
        return False
    return all(is_blank(turn.get(name)) for name in ("content", "value", "parts"))


def _with_calls(turns: list[Turn]) -> list[Turn]:
    """The same, with the calls of tools that are turns of their own in the assistant's turn before them."""
    found: list[Turn] = []
    for turn in turns:
        if "tool_calls" in turn and not turn["content"] and found and found[-1]["role"] == "assistant":
            found[-1] = found[-1] | {"tool_calls": [*found[-1].get("tool_calls", []), *turn["tool_calls"]]}
        else:
            found.append(turn)
    return found


def _in_order(turns: list[Turn], column: str) -> list[Turn]:
    before = None
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in AFTER[before]:
            there = f"after one of {before}" if before else "at the beginning"
            raise RowError(
                f"turn {number} of `{column}` is of {role}, and {there} comes one of {' or '.join(AFTER[before])}"
            )
        before = role
        # The reply is looked at later, and a call of a tool needs no words.
        may_be_empty = role == "tool" or "tool_calls" in turn or (role == "assistant" and number == len(turns))
        if not turn["content"].strip() and not may_be_empty:
            raise RowError(f"turn {number} of `{column}`, of {role}, is empty")
    return turns


def without_reply(turns: list[Turn], column: str) -> list[Turn]:
    """A conversation without the assistant's reply that ends it, and has to."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(f"`{column}` does not end with an assistant's reply to a prompt")
    as_reply(turns[-1], column)
    return turns[:-1]


def demonstration(row: Row, column: str, judged: bool = True) -> list[Record]:
    """A whole conversation up to its last reply that may be trained; nothing where none may.

    Args:
        row: of the data.
        column: with the conversation.
        judged: whether a turn that says of itself that it is bad is left out.
    """
    value = row.get(column)
    if isinstance(value, list):
        last = len(value)
        while last and _is_assistants(value[last - 1]) and not _is_learned(value[last - 1], column, judged):
            last -= 1
            while last and not _is_assistants(value[last - 1]):
                last -= 1
        if value and not last:
            turns_of(row, column)  # which is sound, or an error
            return []
        row = row | {column: value[:last]}
    turns = turns_of(row, column)
    return [(with_system(without_reply(turns, column), row), as_reply(turns[-1], column))]


def with_marks(record: Record, row: Row, used_as: Mapping[str, str | None]) -> Record:
    """A demonstration in whose prompt `learned: False` marks the assistant's turns that may not be trained.

    Args:
        record: the prompt and the reply.
        row: of which it was made, its lists as lists.
        used_as: what each column is taken for; see `shapes.Shape`.

    Raises:
        RowError: a turn does not say clearly whether it may be.
    """
    prompt = record[0]
    if isinstance(prompt, str):
        return record
    columns = [name for use in WITH_TURNS for name, taken_for in used_as.items() if taken_for == use]
    column = next((name for name in columns if isinstance(row.get(name), list) and len(row[name]) > 1), None)
    learned = iter(_learned_turns(row[column], column) if column else [])
    marked = [
        turn | {"learned": False} if turn["role"] == "assistant" and not next(learned, True) else turn
        for turn in prompt
    ]
    return (marked, *record[1:])


def _learned_turns(turns: list[Any], column: str) -> list[bool]:
    """Of each of the assistant's turns whether it may be trained, in the order in which `turns_of` has them."""
    found: list[bool] = []
    follows = False  # another one of the assistant's
    for turn in turns:
        if _is_assistants(turn):
            made, may_be = one_turn(turn, column), _is_learned(turn, column, judged=True)
            if follows and "tool_calls" in made and not made["content"]:  # becomes a part of that; see `_with_calls`
                found[-1] = found[-1] and may_be
            else:
                found.append(may_be)
        follows = _is_assistants(turn)
    return found


def _is_assistants(turn: Any) -> bool:
    who = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    who = str(who).strip().lower()
    return ROLES.get(who) == "assistant" or who in CALLS


def _is_learned(turn: Any, column: str, judged: bool) -> bool:
    return is_trained(turn, column) and (not judged or is_good(turn, column))


def before_reply(row: Row, column: str) -> Prompt:
    """The prompt of a conversation, whether or not a reply ends it."""
    turns = turns_of(row, column)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return to_be_answered(with_system(turns, row))


def to_be_answered(prompt: Prompt) -> Prompt:
    """The prompt itself, where it is the assistant's turn after it."""
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"the prompt ends with a turn of {prompt[-1]['role']}, to which there is no reply")
    return prompt


# Before the prompt


def framed(text: str, row: Row, as_turn: bool) -> Prompt:
    """Text as a user's turn after the row's `system`, or as text with that before it."""
    if as_turn:
        return with_system([{"role": "user", "content": text}], row)
    if tools_of(row):
        raise RowError(
            "`tools` go through a chat template, and this prompt is plain text: `chat: true` makes it a turn"
        )
    system = _system(row)
    return f"{system}\n\n{text}" if system else text


def typed(text: str, as_turn: bool) -> Prompt:
    r"""What somebody types as a prompt: a user's turn, or text as the model reads it, in which `\n` is a line break."""
    return [{"role": "user", "content": text}] if as_turn else text.replace("\\n", "\n")


def with_system(turns: list[Turn], row: Row) -> list[Turn]:
    """A conversation that begins with the row's `system`, and has its `tools`, where there are some."""
    system, tools = _system(row), tools_of(row)
    if system:
        first: Turn = {"role": "system", "content": system}
        if turns[0]["role"] != "system":
            turns = [first, *turns]
        elif turns[0] != first:
            raise RowError("`system` is another one than the system turn of the conversation")
    return [turns[0] | {"tools": tools}, *turns[1:]] if tools else turns


def is_blank(value: Any) -> bool:
    """Whether a column that need not be there holds nothing, as a cell of a table in which there is only a space."""
    return value is None or (isinstance(value, str) and not value.strip())


def _system(row: Row) -> str:
    value = row.get("system")
    if value is None or is_blank(value):
        return ""
    if not isinstance(value, str):
        raise RowError(what_is_wrong("system", value))
    return encodable(value, "system")


# Conversations written as text


def is_transcript(text: Any) -> bool:
    """Whether a text begins as one of `Human:` and `Assistant:` does."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def turns_of_transcript(text: str, column: str) -> list[Turn]:
    """The turns of a text in which `Human:` and `Assistant:` begin paragraphs."""
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if start.strip():
        raise RowError(f"`{column}` does not begin with `Human:`")
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": speakers[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _in_order(turns, column)
