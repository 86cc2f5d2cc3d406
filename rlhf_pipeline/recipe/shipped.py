"""Where recipes are found: at a path, or among those that ship with the package."""

import difflib
import importlib.resources
from pathlib import Path

from rlhf_pipeline.errors import InputError

PACKAGE = Path(str(importlib.resources.files("rlhf_pipeline")))
TINY = PACKAGE / "models" / "tiny"


def shipped_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def find(recipe: str) -> tuple[Path, Path]:
    """Locate a recipe.

    Returns:
        Its file, and the folder that its relative paths start from: the file's own, or for a shipped recipe, called
        by name, the current one.

    Raises:
        InputError: there is no such file and no shipped recipe of that name.
    """
    path = Path(recipe)
    if path.is_file():
        return path, path.resolve().parent
    if recipe in shipped():
        return shipped()[recipe], Path.cwd()
    if path.is_dir():
        raise InputError("this is a folder, not a recipe", place=recipe, hint="name the .yaml file in it")
    near = difflib.get_close_matches(recipe, shipped(), n=1)
    hint = f"did you mean the shipped recipe `{near[0]}`?" if near else "`rlhf-pipeline ls` lists the shipped recipes"
    raise InputError("there is no such recipe", place=recipe, hint=hint)
