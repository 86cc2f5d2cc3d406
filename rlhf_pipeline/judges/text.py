"""The text of a file that a recipe names for a judge. No libraries."""

from pathlib import Path

from rlhf_pipeline.errors import InputError


def read_text(file: Path, named: str, place: str) -> str:
    """What a file holds.

    Args:
        file: the file.
        named: what the recipe calls it.
        place: the key of the recipe that names it.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"`{named}` cannot be read: {reason}", place=place) from None
