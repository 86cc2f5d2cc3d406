"""Text, replies and conversations as they are in a row. No libraries.

Every function that takes a row or turns raises a RowError where they are not as they should be.
"""

import json
import re
from typing import Any

Prompt = str | list[dict[str, str]]  # text as the model reads it, or the turns {role, content} of a conversation
Row = dict[str, Any]
Record = tuple[Any, ...]  # (prompt, reply), (prompt, chosen, rejected), or (prompt,)

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Which roles may follow a role; None is the beginning.
AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class RowError(Exception):
    """A row lacks something; the message says what, and who reads the rows adds where."""


def text_of(row: Row, column: str) -> str:
    """A column's text, which may not be empty."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(what_is_wrong(column, value))
    return _encodable(value, column)


def _encodable(text: str, column: str) -> str:
    """The text itself. JSON can hold half of a character, where text was cut within an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        raise RowError(f"`{column}` has half of a character, {half}, which is no text") from None
    return text


def reply_of(row: Row, column: str) -> str:
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
    turn = _turn(value[0], column)
    if turn["role"] != "assistant":
        raise RowError(f"the reply in `{column}` is the turn of {turn['role']}, and not of the assistant")
    if not turn["content"].strip():
        raise RowError(f"the reply in `{column}` is empty")
    return turn["content"]


def turns_of(row: Row, column: str) -> list[dict[str, str]]:
    """The turns of a conversation, as {role, content} or as {from, value}.

    Raises:
        RowError: there are none, or one lacks something or is in the wrong place.
    """
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowError(what_is_wrong(column, value, "a list of turns"))
    return _in_order([_turn(turn, column) for turn in value], column)


def _turn(turn: Any, column: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    if "from" in turn and turn.get("role") is None:
        role, content = SPEAKERS.get(str(turn["from"]), turn["from"]), turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    if role not in ("system", "user", "assistant", "tool"):
        raise RowError(f"a turn of `{column}` has the role `{role}`; roles are system, user, assistant and tool")
    return {"role": role, "content": _encodable(content, column)}


def _in_order(turns: list[dict[str, str]], column: str) -> list[dict[str, str]]:
    before = None
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in AFTER[before]:
            there = f"after one of {before}" if before else "at the beginning"
            raise RowError(
                f"turn {number} of `{column}` is of {role}, and {there} comes one of {' or '.join(AFTER[before])}"
            )
        before = role
        may_be_empty = role == "tool" or (role == "assistant" and number == len(turns))  # the reply is looked at later
        if not turn["content"].strip() and not may_be_empty:
            raise RowError(f"turn {number} of `{column}`, of {role}, is empty")
    return turns


def without_reply(turns: list[dict[str, str]], column: str) -> list[dict[str, str]]:
    """A conversation without the assistant's reply that ends it, and has to."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(f"`{column}` does not end with an assistant's reply to a prompt")
    if not turns[-1]["content"].strip():
        raise RowError(f"the reply in `{column}` is empty")
    return turns[:-1]


def conversation(row: Row, column: str) -> Record:
    """A demonstration: a whole conversation, whose last turn is the reply."""
    turns = turns_of(row, column)
    return with_system(without_reply(turns, column), row), turns[-1]["content"]


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


def what_is_wrong(column: str, value: Any, wanted: str = "text") -> str:
    """Why a column's value is not what it should be."""
    if value is None:
        return f"`{column}` is missing"
    if value in ([], {}) or (isinstance(value, str) and not value.strip()):
        return f"`{column}` is empty"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{column}` should be {wanted}, and is {shown if len(shown) <= 60 else shown[:57] + '…'}"


# Before the prompt


def framed(text: str, row: Row, as_turn: bool) -> Prompt:
    """Text as a user's turn after the row's `system`, or as text with that before it."""
    if as_turn:
        return with_system([{"role": "user", "content": text}], row)
    system = _system(row)
    return f"{system}\n\n{text}" if system else text


def typed(text: str, as_turn: bool) -> Prompt:
    r"""What somebody types as a prompt: a user's turn, or text as the model reads it, in which `\n` is a line break."""
    return [{"role": "user", "content": text}] if as_turn else text.replace("\\n", "\n")


def with_system(turns: list[dict[str, str]], row: Row) -> list[dict[str, str]]:
    """A conversation that begins with the row's `system`, where it has one."""
    system = _system(row)
    if not system:
        return turns
    first = {"role": "system", "content": system}
    if turns[0]["role"] == "system":
        if turns[0] != first:
            raise RowError("`system` is another one than the system turn of the conversation")
        return turns
    return [first, *turns]


def is_blank(value: Any) -> bool:
    """Whether a column that need not be there holds nothing, as a cell of a table in which there is only a space."""
    return value is None or (isinstance(value, str) and not value.strip())


def _system(row: Row) -> str:
    value = row.get("system")
    if value is None or is_blank(value):
        return ""
    if not isinstance(value, str):
        raise RowError(what_is_wrong("system", value))
    return _encodable(value, "system")


# Conversations written as text


def is_transcript(text: Any) -> bool:
    """Whether a text begins as one of `Human:` and `Assistant:` does."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def turns_of_transcript(text: str, column: str) -> list[dict[str, str]]:
    """The turns of a text in which `Human:` and `Assistant:` begin paragraphs."""
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if start.strip():
        raise RowError(f"`{column}` does not begin with `Human:`")
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": speakers[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _in_order(turns, column)
