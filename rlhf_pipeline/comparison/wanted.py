"""The comparison of a run's policies: what it is made of, and whether the one that was written holds. No torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, data_inputs, of_ai_judge, short_hash
from rlhf_pipeline.recipe import BASE, Data, Recipe, outside
from rlhf_pipeline.recipe.data_files import is_local, matching
from rlhf_pipeline.recipe.library_keys import keys
from rlhf_pipeline.recipe.schema import AIJudge, Rollout
from rlhf_pipeline.rundir import durable, state, strict_json
from rlhf_pipeline.rundir.layout import COMPARISON, read_json
from rlhf_pipeline.rundir.state import StageState

MOST_PROMPTS = 64  # of a comparison that nobody asked anything special of


class Roles(NamedTuple):
    """Which stage has which role in a comparison.

    Attributes:
        policies: `base` and every policy stage that is there, in the recipe's order.
        reference: the policy from which KL is taken; it may be an adapter from outside.
        reward: the reward stage that scores replies; None where there is none.
    """

    policies: list[str]
    reference: str
    reward: str | None


def weights(run: Path, recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of the weights of every stage that is current, in the recipe's order; see `left_out`."""
    current = {stage.name: stage.record.weights for stage in state.read(run).stages if stage.is_current}
    trained = [name for name, stage in recipe.stages.items() if stage.facts.trains]
    return {name: digest for name in trained if (digest := current.get(name))}


def left_out(run: Path, recipe: Recipe) -> list[StageState]:
    """The stages that have begun and are not compared: they are not done, or wait for a `run` to train them again."""
    trained = [name for name, stage in recipe.stages.items() if stage.facts.trains]
    begun = [stage for stage in state.read(run).stages if stage.name in trained and stage.state != "missing"]
    return [stage for stage in begun if not stage.is_current]


def roles(recipe: Recipe, made: list[str]) -> Roles:
    """The roles of the stages that are there.

    KL is taken from the reference of the first stage that samples, as PPO; without one, of the first that keeps a
    reference, as DPO. The reward is the one that the former learns from, else the last one.
    """
    kind_of = {name: stage.facts for name, stage in recipe.stages.items()}
    referred = [name for name in recipe.stages if kind_of[name].keeps_reference]
    sampling = [name for name in referred if kind_of[name].samples]
    first = next((recipe.stages[name] for name in (*sampling, *referred)), None)
    reference = (first.reference or first.start) if first else BASE
    rewards = [name for name in made if kind_of[name].makes == "reward"]
    learned_from = [one.stage for name in sampling for one in recipe.stages[name].weighed if one.stage in rewards]
    return Roles(
        [BASE, *(name for name in made if kind_of[name].is_policy)],
        reference if reference in made or outside.is_one(reference) else BASE,
        next(iter(learned_from), rewards[-1] if rewards else None),
    )


def default_settings(recipe: Recipe) -> dict[str, Any]:
    """What is asked and how, where nothing else is wanted: as `evaluate` does, else as the first stage that samples.

    Returns:
        The `settings` of `comparison.json`. Their `digest` is of the data and the judge; None where those cannot be
        read.
    """
    evaluate = recipe.evaluate
    sampling = next((stage for stage in recipe.stages.values() if stage.facts.samples), None)
    if evaluate:
        n, temperature, longest = min(evaluate.n, MOST_PROMPTS), evaluate.temperature, evaluate.max_new_tokens
    elif sampling is not None:
        known = {name: key.default for name, key in keys(sampling.kind).items()} | sampling.trainer
        n, temperature, longest = MOST_PROMPTS, known["temperature"], known[str(sampling.facts.reply_limit)]
    else:
        n, temperature, longest = MOST_PROMPTS, 0.7, 128
    name, data = default_data(recipe)
    return {
        "prompts": name,
        "n": n,
        "temperature": float(temperature),
        "max_new_tokens": longest,
        "seed": recipe.seed,
        "digest": _digest(recipe, data),
        **({"engine": rollout.engine} if (rollout := engine(recipe)[1]) and rollout.is_vllm else {}),
    }


def engine(recipe: Recipe) -> tuple[str, Rollout | None]:
    """What a comparison samples with, and where the recipe says so: as `evaluate`, else the first that samples."""
    if recipe.evaluate:
        return "evaluate.rollout", recipe.evaluate.rollout
    for name, stage in recipe.stages.items():
        if stage.facts.samples:
            return f"stages.{name}.rollout", stage.rollout
    return "evaluate.rollout", None


def _digest(recipe: Recipe, data: Data) -> str | None:
    """A hash of prompts and judge; None where one of them is not there, as where a run was made elsewhere."""
    if any(is_local(source.files) and not matching(source.files) for source in data.sources):
        return None
    digests = Digests()
    try:
        content: dict[str, Any] = data_inputs("data", data, digests)
        if recipe.evaluate and recipe.evaluate.ai_judge:
            content["ai_judge"] = of_ai_judge(recipe, recipe.evaluate.ai_judge, digests)
            if recipe.evaluate.ai_judge.is_function and content["ai_judge"]["source"] is None:
                return None
    except InputError:
        return None
    if recipe.evaluate and recipe.evaluate.judge is not None:
        judge = recipe.evaluate.judge
        content |= {"judge": judge, "judge_source": digests.of_function(judge, recipe.folders)}
        if content["judge_source"] is None:
            return None
    return short_hash(json.dumps(content, sort_keys=True).encode())


def name_of(judge: AIJudge) -> str:
    """An AI judge in a few words: the stage, the function, or the model and its address."""
    return f"{judge.served_model} at {judge.model}" if judge.is_remote else judge.model


def default_data(recipe: Recipe) -> tuple[str, Data]:
    """Where prompts come from by default, under the key that the recipe has for it.

    From `evaluate`, else from the first stage that samples, else one with a reference, else of SFT, else of any.
    """
    if recipe.evaluate:
        return "evaluate.data", recipe.evaluate.data
    kind_of = {name: stage.facts for name, stage in recipe.stages.items()}

    def order(name: str) -> tuple[bool, bool, bool]:
        kind = kind_of[name]
        return not kind.samples, not kind.keeps_reference, not kind.is_policy

    name = min(recipe.stages, key=order)
    return f"{name}.data", recipe.stages[name].data


def saved(run: Path, made_of: dict[str, str], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison that was written, where it is of these weights and settings.

    A digest of None is that of data that cannot be read: what was made of them holds.
    """
    found = read_json(run / COMPARISON)
    if found is None or not isinstance(found.get("settings"), dict):
        return None
    unknown = {"digest": None} if settings["digest"] is None else {}
    current = found.get("made_of") == made_of and found["settings"] | unknown == settings
    return found | {"run": str(run.absolute())} if current else None


def due(run: Path, recipe: Recipe) -> tuple[dict[str, Any], list[str]] | None:
    """Settings and policies of the comparison that a run directory lacks; None where it lacks none."""
    made_of, settings = weights(run, recipe), default_settings(recipe)
    policies = roles(recipe, list(made_of)).policies
    return None if policies == [BASE] or saved(run, made_of, settings) else (settings, policies)


def write(run: Path, comparison: dict[str, Any]) -> None:
    """Replace a run's `comparison.json` in one step."""
    durable.write_text(run / COMPARISON, strict_json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")


def choose(run: Path, recipe: Recipe, made: list[str], wanted: str | None) -> list[str]:
    """The policies that are meant, in the recipe's order.

    Args:
        run: the run directory.
        recipe: its recipe.
        made: the stages that are there.
        wanted: names with commas between them; None for all.

    Raises:
        InputError: a name is none of them, or no policy stage is done.
    """
    policies = roles(recipe, made).policies
    if policies == [BASE]:
        raise InputError(
            "no policy stage of this run is done",
            place=str(run),
            hint="`rlhf-pipeline status` says how far it has come",
        )
    names = policies if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in policies:
            raise InputError(
                f"there is no `{name}` to compare", place="--stages", hint=f"there are {', '.join(policies)}"
            )
    return [name for name in policies if name in names]


def only(comparison: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A comparison without the policies that are not named."""
    return comparison | {
        "policies": [name for name in comparison["policies"] if name in names],
        "rows": [
            row | {"replies": {name: reply for name, reply in row["replies"].items() if name in names}}
            for row in comparison["rows"]
        ],
        "means": {name: means for name, means in comparison["means"].items() if name in names},
        "win_rates": [rate for rate in comparison["win_rates"] if rate["a"] in names and rate["b"] in names],
    }
