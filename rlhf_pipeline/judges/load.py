"""Who answers a judge's questions: the base, a stage, a function, or an address."""

from pathlib import Path

from rlhf_pipeline.judges.function import FunctionJudge
from rlhf_pipeline.judges.local import LocalJudge, OnBase
from rlhf_pipeline.judges.question import Judge
from rlhf_pipeline.recipe.schema import AIJudge, Recipe


def load(spec: AIJudge, recipe: Recipe, place: str, staged: OnBase | None, kept: Path) -> Judge:
    """The judge that a recipe names.

    Args:
        spec: what the recipe says of it.
        recipe: the recipe.
        place: the key of the recipe that has the `spec`.
        staged: the base, with the stage's adapter where the judge is one; None where the judge is not local.
        kept: the file that keeps the answers of an address.

    Raises:
        InputError: it cannot be used.
    """
    if spec.is_function:
        return FunctionJudge(spec.model, recipe.folders, f"{place}.model")
    if staged is not None and spec.is_local:
        return LocalJudge(spec, staged, place)
    from rlhf_pipeline.judges.remote import RemoteJudge

    return RemoteJudge(spec, kept, place)
