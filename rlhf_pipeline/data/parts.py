"""What one turn of a conversation holds beside its text: content in parts, calls of tools, reasoning. No libraries.

A turn becomes `{role, content}`, an assistant's perhaps with `reasoning_content` and `tool_calls` too, and a tool's
with `name` and `tool_call_id`. What no stage can use, as an image, is refused by its name.
"""

import json
from typing import Any

from rlhf_pipeline.data.words import THUMBS, as_word

Row = dict[str, Any]
Turn = dict[str, Any]

# The roles that people write, and what chat templates call them. A developer's turn is what a system turn is.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant",
    "agent": "assistant", "chatbot": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # who speaks where a call of a tool is a turn of its own
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "cot", "rationale")
NO_TEXT = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos", "file", "files")
# What says of a turn whether it is trained: 0 or false under the first names says no, 1 or true under the second ones.
TRAINED = (
    "weight", "train", "loss", "train_on_turn", "trainable", "learnable", "trained", "training", "calculate_loss",
    "compute_loss", "loss_weight",
)  # fmt: skip
NOT_TRAINED = ("masked", "ignore", "ignored", "no_loss")
MASKS = ("mask", "loss_mask")  # of which 1 means the one to some, and the other to others
# What says of a turn whether it is good. A bad one is not trained.
JUDGED = (
    "is_correct", "correct", "label", "rating", "score", "reward", "thumbs", "thumb", "feedback", "quality", "accepted",
    "is_good",
)  # fmt: skip
YES_OR_NO = {word: THUMBS[word] for word in ("0", "false", "no", "1", "true", "yes")}
READ = (
    "role", "content", "from", "value", "parts", "tool_calls", "function_call", "name", "tool_call_id",
    *REASONING, *NO_TEXT, *TRAINED, *NOT_TRAINED, *MASKS, *JUDGED,
)  # fmt: skip


class RowError(Exception):
    """A row lacks something; the message says what, and who reads the rows adds where."""


def what_is_wrong(column: str, value: Any, wanted: str = "text") -> str:
    """Why a column's value is not what it should be."""
    if value is None:
        return f"`{column}` is missing"
    if value in ([], {}) or (isinstance(value, str) and not value.strip()):
        return f"`{column}` is empty"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{column}` should be {wanted}, and is {shown if len(shown) <= 60 else shown[:57] + '…'}"


def encodable(text: str, column: str) -> str:
    """The text itself. JSON can hold half of a character, where text was cut within an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        raise RowError(f"`{column}` has half of a character, {half}, which is no text") from None
    return text


def one_turn(turn: Any, column: str) -> Turn:
    """A turn, as `{role, content}`, as `{from, value}`, or as `{role, parts}`; see the module.

    Raises:
        RowError: it lacks something, or holds what cannot be used.
    """
    if not isinstance(turn, dict):
        raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
    elif content is None:
        content = turn.get("parts")
    if not isinstance(role, str):
        raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    if role.strip().lower() in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(_from_json(content, column), column)}
    role = role.strip().lower()
    if role not in ROLES:
        raise RowError(
            f"a turn of `{column}` has the role `{role}`; roles are system, user, assistant and tool, or are called "
            f"{', '.join(name for name, role in ROLES.items() if name != role)}"
        )
    for name in NO_TEXT:
        if turn.get(name):
            raise RowError(f"a turn of `{column}` has `{name}`, and only text can be used")
    made: Turn = {"role": ROLES[role], "content": ""}
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), None)
    if isinstance(content, list):
        content, thought = _text_of_parts(content, column)
        reasoning = reasoning or thought
    if made["role"] == "assistant":
        calls = turn.get("tool_calls") or turn.get("function_call")
        if calls:
            made["tool_calls"] = _calls(_from_json(calls, column), column)
        if reasoning:
            if not isinstance(reasoning, str):
                raise RowError(f"a turn of `{column}` has a `reasoning_content` that is no text")
            made["reasoning_content"] = encodable(reasoning, column)
    elif reasoning:
        raise RowError(f"a turn of `{column}`, of {made['role']}, has `reasoning_content`, which is an assistant's")
    elif made["role"] == "tool":
        made |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
        content = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content
    if content is None and ("tool_calls" in made or "reasoning_content" in made):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"a turn of `{column}` is not {{role: text, content: text}}")
    return made | {"content": encodable(content, column)}


def is_trained(turn: Any, column: str) -> bool:
    """Whether a reply may be learned: `weight: 0` says no, as do `train: false`, `masked: true` and others.

    Raises:
        RowError: a weight between the two, which no stage can use, or a mask that may mean either.
    """
    found = True
    for name in (*TRAINED, *NOT_TRAINED):
        value = turn.get(name)
        if value is None:
            continue
        said = said_of(value)
        if said is None:
            what = "weight" if name in TRAINED else f"`{name}`"
            raise RowError(f"a turn of `{column}` has the {what} {_shown(value)}; a turn is trained, 1, or not, 0")
        found = found and said == (name in TRAINED)
    for name in MASKS:
        if turn.get(name) is not None:
            raise RowError(
                f"a turn of `{column}` has `{name}`, of which 1 may mean that it is trained, or that it is not: "
                "`weight`, 1 or 0, says it"
            )
    return found


def is_good(turn: Any, column: str) -> bool:
    """Whether nothing in a reply's turn says that it is a bad one, as `label: bad`. Other words are no marks.

    Raises:
        RowError: a number of which it is not known how good it is.
    """
    found = True
    for name in JUDGED:
        value = turn.get(name)
        said = THUMBS.get(as_word(value))
        if said is None and isinstance(value, int | float):
            raise RowError(
                f"a turn of `{column}` has the `{name}` {value}, which may mean that it is bad: `weight`, 1 or 0, "
                f"in its place says whether it is trained"
            )
        found = found and said is not False
    return found


def others_in_turns(turns: Any) -> list[str]:
    """The keys of turns that are not looked at."""
    keys = [key for turn in turns if isinstance(turn, dict) for key in turn] if isinstance(turns, list) else []
    return [key for key in dict.fromkeys(keys) if key not in READ]


def said_of(value: Any) -> bool | None:
    """Whether a value says yes, as 1, true and "1" do, or no; None where it says neither."""
    return YES_OR_NO.get(as_word(value))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The tools of a row, each as `{type: function, function: {name, …}}`; none where it has none.

    They are in `tools`, or in `functions`, as they were called before, where that is a list of them.

    Raises:
        RowError: `tools` is something else.
    """
    found = row.get("tools")
    if not found and has_functions(row.get("functions")):
        found = row["functions"]
    if found is None or (isinstance(found, str) and not found.strip()):
        return []
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise RowError(what_is_wrong("tools", found, "a list of functions")) from None
    if not isinstance(found, list):
        raise RowError(what_is_wrong("tools", found, "a list of functions"))
    return [_tool(_from_json(one, "tools")) for one in found]


def has_functions(value: Any) -> bool:
    """Whether a value is a list of functions, perhaps as JSON, as `[{name: …, parameters: …}]`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def _tool(tool: Any) -> dict[str, Any]:
    tool = _without_nulls(tool)
    if isinstance(tool, dict) and isinstance(tool.get("name"), str) and "function" not in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("an entry of `tools` is not {type: function, function: {name: text, parameters: …}}")
    return {"type": "function"} | tool


def _text_of_parts(parts: list[Any], column: str) -> tuple[str, str | None]:
    """The text of parts, one after the other as chat templates write them, and the reasoning that is among them."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise RowError(f"a turn of `{column}` has a part that is neither text nor {{type: text, text: …}}")
        kind = part.get("type") or next((name for name, value in part.items() if value is not None), "nothing")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            (thoughts if part.get("thought") is True else texts).append(part["text"])
        elif kind in REASONING and isinstance(part.get(kind), str):
            thoughts.append(part[kind])
        else:
            raise RowError(f"a turn of `{column}` has a part of type `{kind}`, and only text can be used")
    return "".join(texts), "".join(thoughts) or None


def _calls(calls: Any, column: str) -> list[dict[str, Any]]:
    """Calls of tools, one or several, as chat templates take them: with arguments as a mapping, not as JSON."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = _without_nulls(_from_json(call, column))
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"a call of a tool in `{column}` is not {{name: text, arguments: …}}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _from_json(arguments, column) if arguments.strip() else {}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _from_json(value: Any, column: str) -> Any:
    """A value that may be written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        shown = value if len(value) <= 60 else value[:57] + "…"
        raise RowError(f"a call of a tool in `{column}` is not JSON: {shown}") from None


def _without_nulls(value: Any) -> Any:
    """The same without the keys that are null: tables give every mapping of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
