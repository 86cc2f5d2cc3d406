"""What scores the replies of a stage that samples them: `reward`, or the list `rewards`. No torch."""

import re
from collections.abc import Callable, Mapping

from rlhf_pipeline.kinds import numbered
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import Model, Recipe, Reward, Stage
from rlhf_pipeline.recipe.yaml import KeyPath

SOURCES = ("stage", "function", "model")
COMBINE = re.compile(r"min|mean(?:\s*-\s*(?:(?P<k>\d+(?:\.\d+)?|\.\d+)\s*\*\s*)?(?P<std>std))?")
COMBINE_WORDS = "`mean`, `min`, or `mean - k*std` with a number for k"
Named = Callable[[KeyPath, str], str]  # what a reward stage's name means, at the place where it is written


def deviations(combine: str) -> float | None:
    """How many standard deviations of the members `combine` takes off their mean: its k, 0 for `mean`; None for `min`.

    Raises:
        ValueError: it says something else.
    """
    found = COMBINE.fullmatch(combine.strip())
    if found is None:
        raise ValueError(f"expected {COMBINE_WORDS}, got {combine!r}")
    if combine.strip() == "min":
        return None
    return float(found["k"] or 1) if found["std"] else 0.0


def key_of(stage: Stage, role: str) -> str:
    """The key, from the stage on, that names the stage in a role: `init`, `reward`, or `rewards.1.stage`."""
    stages = [f"rewards.{place}.stage" for place, reward in enumerate(stage.rewards) if reward.stage is not None]
    return {numbered("reward", number): key for number, key in enumerate(stages, 1)}.get(role, role)


def uses_of_columns(stage: Stage, used_as: dict[str, str | None]) -> dict[str, str | None]:
    """What each column of a stage's rows is taken for, where its reward functions get those that nothing else reads."""
    if not any(reward.function for reward in stage.rewards):
        return used_as
    return {name: use or "for the reward functions" for name, use in used_as.items()}


def classifier(recipe: Recipe, stage: str, place: int) -> Model:
    """The model of a reward that names one, as a base is said: quantized as the recipe's, and none of its code is run.

    Args:
        recipe: the recipe.
        stage: the name of the stage that it is a reward of.
        place: its number among the stage's `rewards`, from 0.
    """
    reward, like = recipe.stages[stage].rewards[place], recipe.model
    spec = Model(path=str(reward.model), revision=reward.revision, quantization=like.quantization, dtype=like.dtype)
    spec._key = f"stages.{stage}.rewards.{place}.model"
    return spec


def resolve_rewards(
    name: str,
    stage: Stage,
    latest: str | None,
    is_certain: bool,
    earlier: Mapping[str, Stage],
    named: Named,
    problems: Problems,
) -> None:
    """Fill in what scores a stage's replies; what is wrong is noted.

    Args:
        name: the stage's.
        stage: of a kind whose replies are scored.
        latest: the latest reward stage before it, if there is one.
        is_certain: whether the kinds of all stages before it are known.
        earlier: the stages before it, by name.
        named: looks up the name of a reward stage, or of a reward model from outside.
        problems: where to note what is wrong.
    """
    path: KeyPath = ("stages", name, "reward")
    if not stage.rewards and ("stages", name, "rewards") in problems.origins.written:
        problems.add(
            ("stages", name, "rewards"), "`rewards` is empty", "name at least one reward, or remove it", of_key=True
        )
    if stage.rewards or problems.within(("stages", name, "rewards")):
        if stage.reward is not None:
            problems.add(
                path, "`reward` and `rewards` exclude each other", "name the reward stage in `rewards`", of_key=True
            )
            stage.reward = None
        for place, reward in enumerate(stage.rewards):
            _resolve_one(reward, ("stages", name, "rewards", place), earlier, named, problems)
        _require_own_labels(name, stage, problems)
        if stage.rewards and not stage.weighed and not problems.within(("stages", name, "rewards")):
            problems.add(
                ("stages", name, "rewards"),
                "all rewards have weight 0, so that they are measured, and replies have no score",
                "give one of them a weight",
                of_key=True,
            )
    elif stage.reward is not None:
        stage.reward = named(path, stage.reward)
    else:
        stage.reward = latest
        problems.origins.derived[path] = "the latest reward stage before"
        if latest is None and is_certain:  # else one of unknown kind may be meant
            problems.add(
                path,
                f"stage `{name}` needs a reward, and no `reward` stage comes before it",
                "add a stage of kind `reward` before it, or name a function of yours in `rewards`",
            )


def _resolve_one(reward: Reward, path: KeyPath, earlier: Mapping[str, Stage], named: Named, problems: Problems) -> None:
    given = [key for key in SOURCES if getattr(reward, key) is not None or problems.is_broken((*path, key))]
    if len(given) != 1:
        said = " and ".join(f"`{key}`" for key in given)
        problems.add(
            path,
            f"{said} exclude each other: one entry is one reward" if given else "this entry names no reward",
            "give `stage`, `function` or `model`, each in an entry of its own",
        )
        return
    if reward.stage is not None:
        reward.stage = named((*path, "stage"), reward.stage)
    if reward.revision is not None and reward.model is None:
        problems.add((*path, "revision"), "`revision` has an effect beside `model` alone", "remove it", of_key=True)
    if reward.stage is None and reward.combine != "mean":
        problems.add(
            (*path, "combine"), "`combine` has no effect: only a reward stage has members", "remove it", of_key=True
        )
        return
    try:
        deviations(reward.combine)
    except ValueError as error:
        problems.add((*path, "combine"), str(error), "std is the standard deviation over the members")
        return
    scored_by = earlier.get(str(reward.stage))
    is_known = not problems.is_broken(("stages", str(reward.stage), "members"))
    if scored_by and scored_by.members is None and is_known and reward.combine != "mean":
        problems.add(
            (*path, "combine"),
            f"`combine` has no effect: stage `{reward.stage}` trains one reward model, not several",
            f"set `members` in stage `{reward.stage}`, or remove it",
            of_key=True,
        )


def _require_own_labels(name: str, stage: Stage, problems: Problems) -> None:
    """See that each reward is logged under a name of its own."""
    labels: set[str] = set()
    for place, reward in enumerate(stage.rewards):
        if problems.within(("stages", name, "rewards", place)):
            continue
        if reward.label in labels:
            problems.add(
                ("stages", name, "rewards", place),
                f"two rewards are called `{reward.label}`, and each is logged under its name",
                "give one of them a `name`",
            )
        labels.add(reward.label)
