"""What is watched of a policy while it trains, and what needs that: `watch`, and `target_kl: auto`. No torch."""

from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import Recipe, Stage
from rlhf_pipeline.recipe.yaml import KeyPath

AUTO = "auto"  # as a value of `target_kl`: where the forecast of the judge's mean has its peak


def resolve_watch(recipe: Recipe, name: str, problems: Problems) -> None:
    """Fill in what is kept and by what; what cannot be watched, or would have no effect, is noted."""
    stage, path = recipe.stages[name], ("stages", name, "watch")
    target = (*path[:2], "trainer", "target_kl")
    if problems.within(("evaluate",)) or problems.within((*path[:2], "data")):
        return
    if stage.trainer.get("target_kl") == AUTO:
        _require_measurements(recipe, stage, target, "`target_kl: auto`", problems)
    watch = stage.watch
    if watch is None:
        return
    _require_measurements(recipe, stage, path, "`watch`", problems)
    watch.keep = watch.keep or ("best" if watch.stop else "last")
    for place, measure in enumerate(watch.stop):
        _require_judge(recipe, name, measure, (*path, "stop", place), problems)
    if watch.best_by is None:
        by_ai = recipe.ai_judge_of(name) is not None
        watch.best_by = "gold" if recipe.has_judge else "judge" if by_ai else "pessimistic"
    elif not watch.acts or watch.keep == "last":
        problems.add(
            (*path, "best_by"), "`best_by` has no effect: the last policy is kept", "set `keep: best`", of_key=True
        )
    else:
        _require_judge(recipe, name, watch.best_by, (*path, "best_by"), problems)
    if watch.keep == "best" and stage.trainer.get("kl_budget") is not None:
        problems.add(
            (*path[:2], "trainer", "kl_budget"),
            "`kl_budget` and `watch` would each put back a policy of its own",
            "remove one of them, or set `watch.keep: last` and no `stop`",
            of_key=True,
        )


def is_watched(recipe: Recipe, stage: Stage) -> bool:
    """Whether a policy is measured while it trains."""
    if "watch" not in stage.facts.takes:
        return False
    if recipe.evaluate is not None:
        return recipe.evaluate.along > 0
    return stage.data.holds_out and (stage.watch is not None or stage.trainer.get("target_kl") == AUTO)


def _require_measurements(recipe: Recipe, stage: Stage, path: KeyPath, what: str, problems: Problems) -> None:
    """There must be prompts to measure on."""
    if recipe.evaluate is None and not stage.data.holds_out:
        hint = f"set `evaluate`, or hold prompts out: `eval_fraction` in stages.{path[1]}.data"
        problems.add(path, f"{what} has no prompts to measure on", hint, of_key=True)
    elif recipe.evaluate is not None and recipe.evaluate.along == 0:
        problems.add(path, f"{what} has no effect with `evaluate.along: 0`", "remove one of them", of_key=True)


def _require_judge(recipe: Recipe, name: str, measure: str, path: KeyPath, problems: Problems) -> None:
    """A judge's mean needs the judge."""
    if measure == "gold" and not recipe.has_judge:
        problems.add(path, "nobody measures `gold`", "it is the mean of a function: set `evaluate.judge`")
    elif measure == "judge" and recipe.ai_judge_of(name) is None:
        there = recipe.evaluate is not None and recipe.evaluate.ai_judge is not None
        hint = "name an earlier stage as `evaluate.ai_judge`" if there else "it is an AI: set `evaluate.ai_judge`"
        problems.add(path, "nobody measures `judge`", hint)
