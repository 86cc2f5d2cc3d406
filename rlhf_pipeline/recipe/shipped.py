"""Where recipes are found: at a path, or among those that ship with the package. Its documentation ships, too."""

import difflib
import importlib.resources
from pathlib import Path

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import resolved

PACKAGE = Path(str(importlib.resources.files("rlhf_pipeline")))
TINY = PACKAGE / "models" / "tiny"


def shipped_folder(name: str = "recipes") -> Path:
    """Where the shipped recipes, or `docs`, are: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def documentation(page: str) -> Path:
    """The file of a page of the documentation, which ships with the package; `README` is its list of pages.

    Raises:
        InputError: there is no such page.
    """
    pages = {path.stem: path for path in sorted(shipped_folder("docs").glob("*.md"))}
    if page not in pages:
        near = difflib.get_close_matches(page, pages, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(name for name in pages)}"
        raise InputError(f"the documentation has no page `{page}`", hint=hint)
    return pages[page]


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
        return path, resolved(path).parent
    if recipe in shipped():
        return shipped()[recipe], Path.cwd()
    if path.is_dir():
        raise InputError("this is a folder, not a recipe", place=recipe, hint="name the .yaml file in it")
    near = difflib.get_close_matches(recipe, shipped(), n=1)
    hint = f"did you mean the shipped recipe `{near[0]}`?" if near else "`rlhf-pipeline ls` lists the shipped recipes"
    raise InputError("there is no such recipe", place=recipe, hint=hint)
