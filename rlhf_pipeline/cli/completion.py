"""What a shell completes, besides commands and options: recipes, run directories, stages. No torch."""

import contextlib
from pathlib import Path

import typer


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes by name, recipe files, run directories, and folders on the way to them."""
    from rlhf_pipeline.recipe.shipped import shipped

    return [name for name in shipped() if name.startswith(incomplete)] + _paths(incomplete)


def stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """The stages of the recipe, or of the run, that was named before."""
    from rlhf_pipeline.errors import InputError
    from rlhf_pipeline.recipe import load, of_run

    # Click leaves words unread that come before an option which lacks its value, as the one here does.
    given = ctx.params.get("recipe") or ctx.params.get("run") or next(iter(ctx.args), None)
    with contextlib.suppress(InputError):  # a recipe that is just being written
        if given:
            found = of_run(Path(given)) if Path(given).is_dir() else load(given)
            return [name for name in found.stages if name.startswith(incomplete)]
    return []


def _paths(incomplete: str) -> list[str]:
    folder, _, _ = incomplete.rpartition("/")
    with contextlib.suppress(OSError):
        here = sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).iterdir())
        names = [f"{path.name}/" if path.is_dir() else path.name for path in here if not path.name.startswith(".")]
        paths = [f"{folder}/{name}" if "/" in incomplete else name for name in names]
        return [path for path in paths if path.startswith(incomplete) and path.endswith(("/", ".yaml", ".yml"))]
    return []
