"""The words, signs and numbers by which people say yes or no, good or bad. No libraries."""

import math
import re
from typing import Any

GOOD = (
    "true", "1", "+1", "up", "good", "yes", "y", "positive", "chosen", "accepted", "accept", "like", "liked", "correct",
    "right", "pass", "desirable", "upvote", "thumbs up", "👍", "✅", "✔", "❤", "🙂", "😀",
)  # fmt: skip
BAD = (
    "false", "0", "-1", "down", "bad", "no", "n", "negative", "rejected", "reject", "dislike", "disliked", "incorrect",
    "wrong", "fail", "undesirable", "downvote", "thumbs down", "👎", "❌", "✖", "🙁", "😡",
)  # fmt: skip
THUMBS = dict.fromkeys(GOOD, True) | dict.fromkeys(BAD, False)


def is_thumb(value: Any) -> bool:
    """Whether it says good or bad."""
    return isinstance(value, str | int | float) and as_word(value) in THUMBS


def as_word(value: Any) -> str:
    """A label in its plainest form: true, 1.0 and "1" are each one word, and a hand of any colour is a hand."""
    if isinstance(value, bool):
        return str(value).lower()
    if is_number(value):
        return f"{float(value):g}"
    word = re.sub(
        "[\N{VARIATION SELECTOR-16}\N{EMOJI MODIFIER FITZPATRICK TYPE-1-2}-\N{EMOJI MODIFIER FITZPATRICK TYPE-6}]",
        "",
        str(value),
    )
    return re.sub(r"[\s_-]+", " ", word).strip().lower()


def is_number(value: Any) -> bool:
    """Whether it is a finite number, or text that says one, as all of a CSV file is text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
