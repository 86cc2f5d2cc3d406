"""The columns of rows: what people call them, and what the first rows hold under each name. No libraries."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf_pipeline.data.turns import Row, RowError, is_blank
from rlhf_pipeline.recipe.yaml import dump_inline

ASKED = ("prompt", "instruction", "question", "query")
REPLY = ("completion", "response", "reply", "output", "answer")
RANKED = ("replies", "completions", "responses", "answers")
RANKED_IN_NO_ORDER = ("generations", "candidates", "outputs")  # lists that are read where something gives their order
SAMPLED = "sampled"  # what a stage of kind `sample` notes of a row's replies
WHOLE = ("messages", "conversations", "contents")
CHOSEN = ("chosen", "preferred")
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = ("context", "contexts", "passage", "passages", "document", "documents", "article")
PICTURES = ("images", "image", "image_path", "image_url", "videos", "video", "audios", "audio")
CHOICES = ("options", "choices")
LISTS = ("ranks", "scores", "ratings", "rating", "rewards", "history", "contexts", "passages", "documents", "tools")
# Other names of such, which are not read under these.
MAY_BE_ASKED = (
    "chat_history", "conversation_history", "dialog_history", "dialogue_history", "dialog", "dialogue", "previous",
    "previous_turns", "past", "background", "knowledge", "knowledge_base", "evidence", "ctx", "context_text", "docs",
    "paragraph", "paragraphs", "chunks", "retrieved", "retrieved_documents", "retrieved_docs", "retrieved_context",
    "facts", "premise", "hypothesis", "persona", "personas", "preamble", "schema", "situation", "scenario", "story",
    "table", "body", "code", "few_shot", "fewshot", "examples", "demonstrations", "hint", "hints", "sys",
)  # fmt: skip
# All that belong to a prompt: what is filled in under one of these is used, or is refused by name.
OF_THE_PROMPT = (*ASKED, "input", *SYSTEM, "history", *CONTEXT, *PICTURES, *CHOICES)
UNUSED = "unused"  # a column whose name begins so is not looked at

NO_LIST = "is neither JSON nor a list of Python"
WRITE_LISTS = "save the rows as .jsonl or .parquet, which hold lists as they are (`to_json(..., lines=True)` of pandas)"
TEXT_OF_REPLY = ("reply", "text", "content", "response", "answer", "completion", "output", "generation")
# Text that begins as turns do, and has the keys of one.
TURNS = re.compile(
    r"""\s*\[?\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value|parts|tool_calls)["']\s*:)""", re.DOTALL
)


class UnclearError(Exception):
    """The columns can be read in more ways than one.

    Args:
        message: one sentence.
        *ways: for each way out, what `columns` should have, expected names with these, and what that does.
        hint: what else can be done.
    """

    def __init__(self, message: str, *ways: tuple[dict[str, str], str], hint: str | None = None) -> None:
        super().__init__(message)
        self.ways = ways
        self.hint = hint


class Seen:
    """What the first rows hold, with lists in place of lists written as text.

    Attributes:
        rows: these rows.
        names: of all columns, in the order in which they come.
        values: what is not null under each name that has such.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.names = list(dict.fromkeys(name for row in rows for name in row))
        self.rows = [_as_read(row) for row in rows]
        self.values: dict[str, list[Any]] = {}
        for row in self.rows:
            for name, value in row.items():
                if value is not None:
                    self.values.setdefault(name, []).append(value)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def first_of(self, names: Iterable[str]) -> str | None:
        """The first of some names that there is."""
        return next((name for name in names if name in self.values), None)

    def is_filled(self, name: str) -> bool:
        """Whether any row has more there than null, a blank or an empty list."""
        return any(not is_empty(value) for value in self.values.get(name, ()))

    def share(self, name: str, test: Callable[[Any], bool]) -> float:
        """Of the rows that have something there, how many pass a test; 0 where none has."""
        found = [test(value) for value in self.values.get(name, ()) if not is_empty(value)]
        return sum(found) / len(found) if found else 0.0

    def mostly(self, name: str, test: Callable[[Any], bool]) -> bool:
        """Whether half of the rows or more, of those that have something there, pass a test.

        One odd row does not decide how the others are read.
        """
        return self.share(name, test) >= 0.5

    def repeats(self, name: str, others: Iterable[str]) -> str | None:
        """Which of some other columns holds the text of this one, in half of the rows or more."""
        rows = [row for row in self.rows if not is_empty(row.get(name))]
        for other in others:
            if other != name and 2 * sum(_is_in(row[name], row.get(other)) for row in rows) >= max(len(rows), 1):
                return other
        return None


def plain(name: str) -> str:
    """A name as we write names: `System Prompt` is system_prompt."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, a blank, an empty list."""
    return is_blank(value) or (isinstance(value, list | dict) and not value)


def _is_in(part: Any, whole: Any) -> bool:
    text = "\n".join(_texts(whole))
    return all(" ".join(one.split()) in " ".join(text.split()) for one in _texts(part))


def _texts(value: Any) -> list[str]:
    """All text in a cell."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in ("role", "from")]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def renames(columns: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The `columns` that a recipe should have, as YAML that can be pasted.

    Args:
        columns: what it has: the data's own names by those that are expected.
        found: what to add, with names as they are after those.
    """
    kept = {expected: theirs for expected, theirs in columns.items() if expected not in found.values()}
    for expected, name in found.items():
        free, number = expected, 1
        while expected == UNUSED and free in kept:
            number += 1
            free = f"{UNUSED}_{number}"
        kept[free] = columns.get(name, name)
    return f"`columns: {dump_inline(kept)}`"


# Lists written as text


def _as_read(row: Row) -> Row:
    """A row for the first look: `listed`, where what cannot be read stays as it is."""
    found = {}
    for name, value in row.items():
        if not name.startswith(UNUSED):
            try:
                found[name] = listed(name, value)
            except RowError:
                found[name] = value
    return found


def listed(name: str, value: Any) -> Any:
    """A cell, or the list that it holds as text, as a cell of a CSV file does: JSON, or Python's way to write one.

    Text that is turns counts under any name, and other text in brackets under the name of a list. Replies in a table of
    their own, {text: [...], score: [...]}, become a list of {text, score}.

    Raises:
        RowError: it begins as turns or a list of replies do, and cannot be read.
    """
    replies = name in (*RANKED, *RANKED_IN_NO_ORDER)
    if isinstance(value, str):
        is_list = replies or name in (*WHOLE, *LISTS)
        if (is_list and value.lstrip()[:1] in ("[", "{")) or TURNS.match(value):
            try:
                found = literal(value.strip())
            except ValueError:
                if TURNS.match(value) or replies or name in WHOLE:
                    raise RowError(f"`{name}` begins as a list does, and {NO_LIST}: {WRITE_LISTS}") from None
                return value
            value = found if is_list or is_turns(found) else value
    if replies and isinstance(value, dict) and set(value) - {"text", "answer_start"}:
        columns = [column for column in value.values() if isinstance(column, list)]
        if len(columns) == len(value) and len({len(column) for column in columns}) == 1:
            return [dict(zip(value, one, strict=True)) for one in zip(*columns, strict=True)]
    return value


def is_turns(value: Any) -> bool:
    """Whether it is one turn of a conversation, or a list of turns."""
    turns = value if isinstance(value, list) else [value]
    keys = ({"role", "content"}, {"role", "parts"}, {"role", "tool_calls"}, {"from", "value"})
    return bool(turns) and all(isinstance(turn, dict) and any(these <= set(turn) for these in keys) for turn in turns)


def literal(text: str) -> Any:
    """What a text writes as JSON or as Python does.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None
    if _lacks_commas(text):
        raise ValueError("there are no commas")
    return found


def _lacks_commas(text: str) -> bool:
    """Whether text follows text, as numpy writes lists, which Python would read as one text."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING == before:
            return True
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            before = token.type
    return False
