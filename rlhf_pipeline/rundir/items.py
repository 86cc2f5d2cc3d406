"""What people are asked about: prompts with replies that differ, one a line of `items.jsonl`. No torch."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import durable, jsonl, strict_json

ITEMS = "items.jsonl"
FEATURES = "features.safetensors"  # beside it: `features`, float32, [replies in the order of items, d]
KEY = 16  # hex digits of a key: 64 bits

Prompt = str | list[dict[str, Any]]  # text, or the turns of a conversation; see `data/turns.py`
Reply = str | dict[str, Any]  # text, or a turn where there is more than text


class Item(NamedTuple):
    """A prompt and two or more replies to it.

    Attributes:
        key: of its prompt and replies, 16 hex digits; the same wherever they come from.
        prompt: text, or turns.
        replies: two or more, no two of them the same.
        better: the number of the better reply, 0 or 1, where somebody knows it; then there are two replies.
    """

    key: str
    prompt: Prompt
    replies: list[Reply]
    better: int | None = None

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        """The numbers of the replies of every pair, the smaller one first."""
        return itertools.combinations(range(len(self.replies)), 2)


def item(prompt: Prompt, replies: Sequence[Reply], better: int | None = None) -> Item:
    """An item; of replies that are the same, but for space around them, the first one is kept.

    Args:
        prompt: text, or turns.
        replies: at least two.
        better: of two replies the number of the better one, where it is known.

    Raises:
        ValueError: fewer than two replies differ, or `better` is no number of one of two.
    """
    seen = [_without_space(reply) for reply in replies]
    different = [reply for number, reply in enumerate(replies) if seen[number] not in seen[:number]]
    if len(different) < 2:
        raise ValueError("an item needs two replies that differ")
    if better is not None and (better not in (0, 1) or len(different) != 2 or len(replies) != 2):
        raise ValueError("only of two replies one can be known to be the better one")
    return Item(_key([prompt, different]), prompt, different, better)


def _without_space(reply: Reply) -> Reply:
    """A reply as people see it: nobody can choose between two that differ in space at their ends."""
    if isinstance(reply, str):
        return reply.strip()
    return {name: value.strip() if isinstance(value, str) else value for name, value in reply.items()}


def pair_key(prompt: Prompt, first: Reply, second: Reply) -> str:
    """The key of two replies to a prompt, 16 hex digits: the same in either order."""
    return _key([prompt, *sorted(map(_canonical, (first, second)))])


def read(file: Path) -> list[Item]:
    """The items of a file.

    Raises:
        InputError: the file cannot be read, or a line of it is no item.
    """
    try:
        lines, damaged = jsonl.read(file)
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", place=str(file)) from None
    if damaged:
        raise InputError(f"a line is no JSON object: {damaged[0][:40]!r}", place=str(file))
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(item(line.row["prompt"], line.row["replies"], line.row.get("better")))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no item: {error}", place=f"{file}:{number}") from None
    return found


def write(file: Path, items: Iterable[Item]) -> None:
    """Write a file of items, in one step.

    Raises:
        OSError: it cannot be written.
    """
    rows = ({name: value for name, value in one._asdict().items() if value is not None} for one in items)
    text = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    durable.write_bytes(file, text.encode("utf-8", "replace"))  # half a surrogate pair cannot be written


def _key(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode("utf-8", "replace")).hexdigest()[:KEY]


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
