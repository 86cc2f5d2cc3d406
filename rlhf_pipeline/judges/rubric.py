"""The dimensions that an AI judge is asked about, one by one, and their weights. No torch."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.text import read_text
from rlhf_pipeline.recipe.yaml import parse_document

SHIPPED = Path(__file__).with_name("rubric.yaml")
DEFAULT = "default"  # as a value of `rubric`: the shipped one
HINT = "it is a YAML list of mappings with `name`, `question` and perhaps `weight`, a number above 0"


class Dimension(NamedTuple):
    """One dimension: `question` asks which of two replies is better in it, `weight` is its part in the verdict."""

    name: str
    question: str
    weight: float


def load(file: str | Path, place: str) -> list[Dimension]:
    """Read a rubric.

    Args:
        file: its path, or `default`.
        place: the key of the recipe that names it.

    Returns:
        At least one dimension; their names differ.

    Raises:
        InputError: the file cannot be read, or is no rubric.
    """
    path = SHIPPED if str(file) == DEFAULT else Path(file)
    text = read_text(path, str(file), place)
    value, _ = parse_document(text, str(path))
    if not isinstance(value, list) or not value:
        raise InputError(f"`{file}` holds no dimension", place=place, hint=HINT)
    found = [_dimension(item, number, str(file), place) for number, item in enumerate(value, 1)]
    names = [dimension.name for dimension in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"`{file}` has the dimension `{twice}` twice", place=place, hint="remove or rename one")
    return found


def _dimension(item: Any, number: int, file: str, place: str) -> Dimension:
    def wrong(problem: str) -> InputError:
        return InputError(f"dimension {number} of `{file}` {problem}", place=place, hint=HINT)

    if not isinstance(item, dict):
        raise wrong("is no mapping")
    if unknown := next((key for key in item if key not in Dimension._fields), None):
        raise wrong(f"has the key `{unknown}`, which is not read")
    for key in ("name", "question"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise wrong(f"has no text under `{key}`")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise wrong("has a `weight` that is no number above 0")
    return Dimension(item["name"], " ".join(item["question"].split()), float(weight))
