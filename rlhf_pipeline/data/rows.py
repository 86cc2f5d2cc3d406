"""Reading data, and what one row must hold. Messages name the file and the row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data

Prompt = str | list[dict[str, str]]  # text, or the turns of a conversation

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class RowError(Exception):
    """A row lacks something; the message says what, and `check` adds where."""


def load(spec: Data) -> Dataset:
    """Read a data file or hub dataset and rename its columns.

    Raises:
        InputError: it cannot be read, is empty, or lacks a mapped column.
    """
    path = Path(spec.path)
    try:
        if path.is_file():
            table = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(spec.path, split=spec.split, revision=spec.revision)
    except Exception as error:  # whatever its reader stumbled over, the user needs the file and the line
        raise _unreadable(spec, path, error) from None
    if not len(table):
        raise InputError("the data have no rows", place=spec.path)
    for expected, theirs in spec.columns.items():
        if theirs not in table.column_names:
            raise InputError(
                f"there is no column `{theirs}` to use as `{expected}`",
                place=spec.path,
                hint=f"its columns are {', '.join(table.column_names)}",
            )
    renamed = {theirs: expected for expected, theirs in spec.columns.items() if expected != theirs}
    hidden = [name for name in table.column_names if name in renamed.values() and name not in renamed]
    return table.remove_columns(hidden).rename_columns(renamed)


def _unreadable(spec: Data, path: Path, error: Exception) -> InputError:
    if "corresponds to no data" in str(error):
        return InputError("the data have no rows", place=spec.path)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return InputError("this line is not a JSON object", place=f"{path}:{number}")
                except ValueError as problem:
                    return InputError(f"this line is not JSON: {problem}", place=f"{path}:{number}")
    if path.is_file():
        return InputError(f"the file cannot be read: {_last_line(error)}", place=spec.path)
    return InputError(
        f"this is neither a data file nor a hub dataset that can be reached: {_last_line(error)}",
        place=spec.path,
        hint="check the spelling and the network; relative paths start from the recipe's folder",
    )


def _last_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[-1]


def check(table: Dataset, spec: Data, read: Callable[[dict[str, Any]], Any]) -> None:
    """Read every row once, so that a bad one is found before anything trains.

    Raises:
        InputError: naming the first bad row, counted from 1.
    """
    for number, row in enumerate(table, 1):
        try:
            read(row)
        except RowError as problem:
            raise InputError(
                str(problem),
                place=f"{spec.path}: row {number}",
                hint=f"the row has {', '.join(table.column_names)}; `columns: {{expected: yours}}` renames",
            ) from None


def demonstration(row: dict[str, Any]) -> tuple[Prompt, str]:
    """Prompt and reply of a row `{prompt, completion}` or `{messages}`, whose last turn is the reply.

    Raises:
        RowError: something is missing or of the wrong type.
    """
    if row.get("messages") is not None and row.get("completion") is None:
        turns = _turns(row, "messages")
        return _before_reply(turns, "messages"), _content(turns[-1], "messages")
    return prompt(row), _reply(row, "completion")


def preference(row: dict[str, Any]) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected reply of a row `{prompt, chosen, rejected}`.

    Chosen and rejected may be whole conversations that differ in the last turn; `prompt` is then not needed.

    Raises:
        RowError: something is missing or of the wrong type, or the conversations differ before their last turn.
    """
    if isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise RowError("`chosen` and `rejected` differ before their last turn")
        return _before_reply(chosen, "chosen"), _content(chosen[-1], "chosen"), _content(rejected[-1], "rejected")
    return prompt(row), _reply(row, "chosen"), _reply(row, "rejected")


def prompt(row: dict[str, Any]) -> Prompt:
    """The prompt of a row: text or turns under `prompt`, or `messages` without the reply they may end in.

    Raises:
        RowError: there is none, or it is empty or of the wrong type.
    """
    if row.get("prompt") is None and row.get("messages") is not None:
        turns = _turns(row, "messages")
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    value = row.get("prompt")
    if isinstance(value, list):
        return _turns(row, "prompt")
    if not isinstance(value, str) or not value:
        raise RowError(_what_is_wrong("prompt", value))
    return value


def prompt_key(row: dict[str, Any]) -> str:
    """A row's prompt as one string, to tell prompts apart."""
    chosen = row.get("chosen")
    if isinstance(chosen, list) and len(chosen) > 1:
        return json.dumps(_before_reply(_turns(row, "chosen"), "chosen"))
    return json.dumps(prompt(row))


def _reply(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, list):
        turns = _turns(row, column)
        if len(turns) != 1:
            raise RowError(f"`{column}` should be one turn beside a `prompt`, and has {len(turns)}")
        return _content(turns[0], column)
    if not isinstance(value, str) or not value:
        raise RowError(_what_is_wrong(column, value))
    return value


def _turns(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowError(_what_is_wrong(column, value))
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _before_reply(turns: list[dict[str, str]], column: str) -> list[dict[str, str]]:
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(f"`{column}` does not end with an assistant's reply to a prompt")
    return turns[:-1]


def _content(turn: dict[str, str], column: str) -> str:
    if not turn["content"]:
        raise RowError(f"the reply in `{column}` is empty")
    return turn["content"]


def _what_is_wrong(column: str, value: Any) -> str:
    if value is None:
        return f"`{column}` is missing"
    return f"`{column}` is empty" if value in ("", []) else f"`{column}` should be text, and is {value!r}"
