"""A reward that a program can check: whether a reply comes to the right answer."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def exact(
    completions: Sequence[str | Sequence[Mapping[str, Any]]], answer: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 for a reply whose final answer is that of the row's column `answer`, else 0; as a reward or as a judge.

    Args:
        completions: texts, or turns of which the last one counts.
        answer: the right answers; a worked solution will do, as GSM8K has it (Cobbe et al. 2021, "Training Verifiers to
            Solve Math Word Problems").

    Returns:
        A number for each reply; None where the row has no answer.
    """
    return [
        None if right is None else float(_same(final_answer(_text(reply)), final_answer(str(right))))
        for reply, right in zip(completions, answer or [None] * len(completions), strict=True)
    ]


def final_answer(text: str) -> str:
    r"""What a text comes to: what is behind its last `####`, else in its last `\boxed{}`, else its last number.

    Where it has none of them, all of it.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    found = BOXED.findall(text) or NUMBER.findall(text)
    return str(found[-1] if found else text).strip()


def _same(one: str, other: str) -> bool:
    """Whether two answers are the same number, or the same words but for case and a full stop."""
    numbers = [_number(one), _number(other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return one.strip(" .").casefold() == other.strip(" .").casefold()


def _number(text: str) -> Decimal | None:
    """The number that a text is, whatever sign of a currency stands before it, or unit behind it."""
    found = NUMBER.search(text)
    words = re.sub(r"[\W\d_]", "", text[: found.start()]) if found else ""
    if found is None or words:
        return None
    try:
        return Decimal(found[0].replace(",", ""))
    except InvalidOperation:
        return None


def _text(reply: str | Sequence[Mapping[str, Any]]) -> str:
    return reply if isinstance(reply, str) else str(reply[-1]["content"])
