"""What is asked: the column with the prompt, and all that other columns add to it. No libraries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.data.columns import (
    ASKED,
    CHOICES,
    CONTEXT,
    MAY_BE_ASKED,
    OF_THE_PROMPT,
    PICTURES,
    SYSTEM,
    UNUSED,
    WHOLE,
    Seen,
    UnclearError,
    is_empty,
    is_turns,
    plain,
)
from rlhf_pipeline.data.turns import (
    Prompt,
    Row,
    RowError,
    framed,
    text_of,
    turns_of,
    what_is_wrong,
    with_system,
)


@dataclass(frozen=True)
class Asked:
    """Where a row's prompt is.

    Attributes:
        name: its columns, as "instruction/input".
        says: what it is, in words.
        read: the prompt of one row. Raises RowError where the row lacks something.
        uses: what each of its columns is taken for.
    """

    name: str
    says: str
    read: Callable[[Row], Prompt]
    uses: dict[str, str] = field(default_factory=dict)


def find(seen: Seen, chat: bool | None) -> Asked | None:
    """The prompt: the first of `ASKED` that there is, or `input` where there is none of these.

    `input` stands under it. A context stands under an instruction, and before anything else that is asked.

    Args:
        seen: the first rows.
        chat: the recipe's `data.chat`.
    """
    column = seen.first_of(ASKED) or seen.first_of(("input",) if not seen.first_of(WHOLE) else ())
    if column is None or not any(isinstance(value, str | list) for value in seen.values[column]):
        return None
    is_list = seen.mostly(column, lambda value: isinstance(value, list))
    more = _more(seen, column)
    below = [name for name in more if name == "input" or column == "instruction"]
    above = [name for name in more if name not in below]
    turns_before = seen.is_filled("history") and any(isinstance(value, list) for value in seen.values["history"])
    # A prompt is text as the model reads it; an instruction or a question is what somebody says to it.
    as_turn = (column != "prompt" or "system" in seen or turns_before) if chat is None else chat

    def read(row: Row) -> Prompt:
        value = row.get(column)
        if isinstance(value, list):
            for name in (*more, "history"):
                if not is_empty(row.get(name)):
                    raise RowError(f"`{column}` holds turns, and there is a `{name}` that has no place in them")
            return with_system(turns_of(row, column), row)
        parts = [*(_text(row, name) for name in above), text_of(row, column), *(_text(row, name) for name in below)]
        text = "\n\n".join(part for part in parts if part)
        before = _history(row)
        if not before:
            return framed(text, row, as_turn)
        if not as_turn:
            raise RowError("`history` holds turns, and `chat: false` says that the prompt is text")
        return with_system([*before, {"role": "user", "content": text}], row)

    uses = {column: "prompt"}
    uses |= dict.fromkeys(below, "under the prompt") | dict.fromkeys(above, "before the prompt")
    if turns_before:
        uses["history"] = "turns before the prompt"
    name = "/".join([column, *sorted(more, key=lambda name: name != "input")])
    if is_list:
        says = "a conversation"
    else:
        says = "a user's turn" if as_turn else "text"
        if above:
            says += f" after `{above[0]}`"
        if [name for name in below if name != "input"]:
            says += f" with `{below[-1]}` under it"
        if turns_before:
            says += ", after the turns of `history`"
    return Asked(name, says, read, uses)


def _more(seen: Seen, column: str) -> list[str]:
    """The columns that stand above or under the prompt's text: `input`, and one with a context.

    One that the prompt's own text has already is none of them, nor is one in which no row has text.
    """
    if seen.mostly(column, lambda value: isinstance(value, list)):
        return []
    context = [name for name in CONTEXT if seen.is_filled(name) and not seen.repeats(name, [column])][:1]
    for name in context:
        if not seen.mostly(name, _is_text):
            raise UnclearError(f"`{name}` is neither text nor a list of texts", ({UNUSED: name}, "leaves it out"))
    below = "input" in seen and column != "input" and not (seen.is_filled("input") and seen.repeats("input", [column]))
    return [*(["input"] if below else []), *context]


def _text(row: Row, name: str) -> str:
    """Text that need not be there, or several texts, with an empty line between."""
    value = row.get(name)
    if is_empty(value):
        return ""
    if not _is_text(value):
        raise RowError(what_is_wrong(name, value, "text, or a list of texts"))
    texts = value if isinstance(value, list) else [value]
    return "\n\n".join(text_of({name: text}, name) for text in texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _history(row: Row) -> list[dict[str, str]]:
    """The turns of `history`: pairs of what the user and the assistant said, or turns."""
    value = row.get("history")
    if is_empty(value):
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = [
            {"role": role, "content": said}
            for pair in value
            for role, said in zip(("user", "assistant"), pair, strict=True)
        ]
    turns = turns_of({"history": value}, "history")
    if turns[-1]["role"] != "assistant":
        raise RowError(f"`history` ends with a turn of {turns[-1]['role']}, and what is asked comes after it")
    return turns


def require_all_used(seen: Seen, uses: dict[str, str]) -> dict[str, str]:
    """What is taken of the columns that belong to a prompt and are not used: each repeats one that is.

    Args:
        seen: the first rows.
        uses: what each column that is used is taken for.

    Raises:
        UnclearError: one does not, so that a part of the prompt would be lost.
    """
    found = {}
    rows = [row for row in seen.rows if any(not is_empty(row.get(name)) for name in uses)]
    left = [name for name in seen.values if name not in uses and any(not is_empty(row.get(name)) for row in rows)]
    for name in OF_THE_PROMPT:
        if name not in left:
            continue
        if name in PICTURES:
            raise UnclearError(
                f"`{name}` holds what no stage can read: prompts are text", ({UNUSED: name}, "leaves it out")
            )
        other = seen.repeats(name, uses)
        if other is None:
            raise UnclearError(f"`{name}` is a part of the prompt, and would be left out", *_ways(seen, name, uses))
        found[name] = f"repeats a part of `{other}`"
    for name in left:
        known = plain(name)
        if known in MAY_BE_ASKED and (seen.mostly(name, _is_text) or seen.mostly(name, _is_history)):
            if seen.repeats(name, uses) is None:
                raise UnclearError(
                    f"`{name}` may be a part of the prompt, and would be left out", *_ways_by_name(seen, name, uses)
                )
            continue
        if known == name or known not in OF_THE_PROMPT or known in seen:
            continue
        other = seen.repeats(name, uses)
        if other is None:
            raise UnclearError(
                f"`{name}` may be a part of the prompt, and would be left out",
                ({known: name}, "uses it"),
                ({UNUSED: name}, "leaves it out"),
            )
        found[name] = f"repeats a part of `{other}`"
    return found


def _ways(seen: Seen, name: str, uses: dict[str, str]) -> list[tuple[dict[str, str], str]]:
    """How a recipe can say what becomes of a column that belongs to the prompt."""
    ways: list[tuple[dict[str, str], str]] = []
    is_text = all(isinstance(value, str) for value in seen.values[name])
    asked = next((column for column, use in uses.items() if use == "prompt"), None)
    in_turns = asked is None or any(isinstance(value, list) for value in seen.values[asked])
    if is_text and not in_turns and "input" not in seen and name not in SYSTEM:
        ways.append(({"input": name}, f"puts it under `{asked}`"))
    elif is_text and in_turns and not seen.first_of(SYSTEM) and name not in CHOICES:
        ways.append(({"system": name}, "makes it the system turn"))
    return [*ways, ({UNUSED: name}, "leaves it out")]


def _ways_by_name(seen: Seen, name: str, uses: dict[str, str]) -> list[tuple[dict[str, str], str]]:
    """The same of one whose name is none that is read."""
    asked = next((column for column, use in uses.items() if use == "prompt"), None)
    if asked is None or seen.mostly(asked, lambda value: isinstance(value, list)):
        return _ways(seen, name, uses)
    ways: list[tuple[dict[str, str], str]] = []
    if seen.mostly(name, _is_history) and "history" not in seen:
        ways.append(({"history": name}, "takes it for the turns before the prompt"))
    elif plain(name) in ("sys", "persona", "preamble") and not seen.first_of(SYSTEM):
        ways.append(({"system": name}, "makes it the system turn"))
    elif seen.mostly(name, _is_text) and not seen.first_of(CONTEXT):
        ways.append(({"context": name}, f"puts it {'under' if asked == 'instruction' else 'before'} `{asked}`"))
    return [*ways, ({UNUSED: name}, "leaves it out")]


def _is_history(value: Any) -> bool:
    """Whether it is turns, or pairs of what the user and the assistant said."""
    return is_turns(value) or (
        isinstance(value, list) and bool(value) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    )
