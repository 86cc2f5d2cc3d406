"""JSON as everybody reads it: Python's own has NaN and Infinity, which JSON has not. No libraries.

What is a number in a run directory, this file says for all that read one.
"""

import json
import math
from typing import Any, TypeGuard

LARGEST = 1e100  # a number beyond is no measurement: its powers would overflow, and nobody could draw it
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def loads(text: str) -> Any:
    """What a JSON text holds; NaN and Infinity, which earlier versions wrote, become None.

    Raises:
        ValueError: it is no JSON.
    """
    return _DECODER.decode(text)


def dumps(value: Any, **options: Any) -> str:
    """A value as JSON; a number that is not finite becomes null.

    Args:
        value: what `json.dumps` takes.
        options: those of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # it is rare, and looking at each number takes time
        return json.dumps(_finite(value), allow_nan=False, **options)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value that was read from a run directory is a number that can be computed with, and shown."""
    # False for NaN. A whole number may have any number of digits, and then is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def number(value: object) -> float | None:
    """Such a value as a float; None where it is no number."""
    return float(value) if is_number(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
