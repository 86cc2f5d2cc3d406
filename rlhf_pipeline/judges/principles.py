"""The principles that an AI judges and revises replies by: a constitution. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.text import read_text
from rlhf_pipeline.recipe.yaml import parse_document

SHIPPED = Path(__file__).with_name("constitution.yaml")
DEFAULT = "default"  # as a value of `principles`: the shipped ones
PARTS = ("judge", "critique", "revision")
HINT = (
    "it holds one principle a line, or a YAML list whose items are texts or mappings with `judge`, `critique`, "
    "`revision` and perhaps `name`"
)


class Principle(NamedTuple):
    """One principle; a part is empty where the file has none, and `load` was not told that it is needed.

    Attributes:
        name: what it is called in rows and figures.
        judge: the question which of two replies is better.
        critique: the request to criticise a reply.
        revision: the request to write it again.
    """

    name: str
    judge: str
    critique: str
    revision: str


def load(file: str | Path, place: str, needs: Sequence[str] = ("judge",)) -> list[Principle]:
    """Read a constitution.

    Args:
        file: its path, or `default`.
        place: the key of the recipe that names it.
        needs: the parts that are asked for; a principle without one of them is left out.

    Returns:
        At least one principle; their names differ.

    Raises:
        InputError: the file cannot be read, holds no principle with these parts, or something that is none.
    """
    path = SHIPPED if str(file) == DEFAULT else Path(file)
    text = read_text(path, str(file), place)
    found = [_principle(item, number, str(file), place) for number, item in enumerate(_items(text, path), 1)]
    if not found:
        raise InputError(f"`{file}` holds no principle", place=place, hint=HINT)
    names = [principle.name for principle in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"`{file}` has the principle {twice!r} twice", place=place, hint="remove or rename one")
    fitting = [principle for principle in found if all(getattr(principle, part) for part in needs)]
    if not fitting:
        parts = " and ".join(f"`{part}`" for part in needs)
        raise InputError(f"`{file}` has no principle with {parts}", place=place, hint=HINT)
    return fitting


def _items(text: str, path: Path) -> list[Any]:
    """The items of a YAML list, or the lines of a text that are neither empty nor comments."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines or not (lines[0].startswith(("- ", "[")) or lines[0] == "-"):
        return lines
    value, _ = parse_document(text, str(path))
    return value if isinstance(value, list) else [value]


def _principle(item: Any, number: int, file: str, place: str) -> Principle:
    def wrong(problem: str) -> InputError:
        return InputError(f"principle {number} of `{file}` {problem}", place=place, hint=HINT)

    if isinstance(item, str) and item.strip():
        text = " ".join(item.split())
        return Principle(
            text,
            f"Which reply keeps better to this principle: {text}",
            f"Say where your last reply goes against this principle: {text}",
            f"Write the reply again, and nothing else, so that it keeps to this principle: {text}",
        )
    if not isinstance(item, dict):
        raise wrong("is neither text nor a mapping")
    if unknown := next((key for key in item if key not in ("name", *PARTS)), None):
        raise wrong(f"has the key `{unknown}`, which is not read")
    if bad := next((key for key, value in item.items() if not isinstance(value, str) or not value.strip()), None):
        raise wrong(f"has no text under `{bad}`")
    parts = {part: " ".join(item.get(part, "").split()) for part in PARTS}
    if not any(parts.values()):
        raise wrong("has none of `judge`, `critique` and `revision`")
    return Principle(item.get("name") or next(filter(None, parts.values())), **parts)
