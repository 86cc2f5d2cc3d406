"""Texts and numbers as the page shows them."""

import math
import re
from typing import Any

from markupsafe import Markup

from rlhf_pipeline.rundir import words as text

# Controls but for line and tab, what turns the direction of writing by force, halves of surrogates, and the letter that
# stands before ids in pictures.
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ue000]")
LONGEST = 4000  # characters of a prompt or reply; more would be no sample but a book


def clean(words: str) -> str:
    """A text in which nothing steers: control characters are shown as symbols, what no file can hold as a box."""
    if isinstance(words, Markup):
        return words
    return STEERS.sub(lambda found: _shown(found[0]), words)


def short(value: Any) -> str:
    """A number in few characters: 0.9712, 12,345, 1.2M, 2e-05."""
    number = float(value)
    size = abs(number)
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else str(number)
    if size >= 1e15 or size < 1e-4:
        return f"{number:.2g}".replace("e-0", "e-").replace("e+", "e")
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{number / limit:.3g}{letter}"
    if number == int(number) or size >= 1000:
        return f"{number:,.0f}".replace("-", "\N{MINUS SIGN}")
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Seconds as people say them; nothing of what is not known."""
    return "" if seconds is None else text.duration(seconds)


def memory(size: float | None) -> str:
    """Bytes in the unit that fits; nothing of what is not known."""
    return "" if size is None else text.memory(size)


def cut(words: str) -> tuple[str, int]:
    """The beginning of a text, and how many characters are not shown."""
    return words[:LONGEST], max(0, len(words) - LONGEST)


def _shown(letter: str) -> str:
    code = ord(letter)
    return (
        chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
    )
