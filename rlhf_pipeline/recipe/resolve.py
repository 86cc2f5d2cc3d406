"""Which earlier stage each stage starts from, the shape of its adapter, and which reward it uses."""

import difflib
import functools
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.rewards import resolve_rewards
from rlhf_pipeline.recipe.rows import resolve_ai_judge, resolve_row_stage, resolve_rows
from rlhf_pipeline.recipe.schema import BASE, PREVIOUS, Recipe, Rollout, Stage
from rlhf_pipeline.recipe.watch import resolve_watch
from rlhf_pipeline.recipe.yaml import KeyPath, shown

# PEFT's keys that make another function of the same weights, or share or repeat them.
FUNCTION_KEYS = (
    "use_dora", "lora_bias", "use_qalora", "qalora_group_size", "alora_invocation_tokens",
    "ensure_weight_tying", "velora_config", "monteclora_config", "use_bdlora", "arrow_config",
)  # fmt: skip
# With one of these, the weights are not two plain factors that a larger rank extends.
RIGID_KEYS = ("target_parameters", "monteclora_config", "use_bdlora", "arrow_config")
PRECOMPUTE = "precompute_ref_log_probs"
SIZE_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def resolve_stages(recipe: Recipe, problems: Problems) -> None:
    """Fill in `init`, `reference`, `reward` and the whole `lora` of every stage; what is wrong is noted."""
    earlier: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        kind, known = stage.facts, _of_known_kind(earlier, problems)
        _refuse_keys_of_other_kinds(name, stage, problems)
        if "init" in kind.takes:
            _resolve_init(recipe, name, stage, earlier, problems)
        if "lora" in kind.takes:
            _resolve_lora(recipe, name, stage, problems)
        if "reference" in kind.takes and stage.reference is not None:
            _resolve_reference(recipe, name, stage, earlier, problems)
        if "reward" in kind.takes and (kind.trains or stage.reward or stage.rewards):
            latest = next((other for other in reversed(known) if earlier[other].facts.makes == "reward"), None)
            named = functools.partial(_reward_stage, recipe, earlier, problems=problems)
            resolve_rewards(name, stage, latest, len(known) == len(earlier), earlier, named, problems)
        if kind.own_loop and stage.trainer.get("stop_token_id") is None and "stop_token" not in stage.trainer:
            stage.trainer = {"stop_token": "eos", **stage.trainer}
        if "ptx_data" in kind.takes:
            _require_both_of_ptx(name, stage, problems)
        if kind.trains_value:
            stage.value_model = stage.value_model or "adapter"
        if "rollout" in kind.takes:
            _require_engine(stage.rollout, ("stages", name, "rollout"), problems)
        if "watch" in kind.takes:
            resolve_watch(recipe, name, problems)
        if "bootstrap" in kind.takes:
            _require_members_for_bootstrap(name, stage, problems)
        if not kind.trains:
            resolve_row_stage(recipe, name, functools.partial(_require, recipe, earlier), problems)
        resolve_rows(recipe, name, earlier, functools.partial(_require, recipe, earlier), problems)
        earlier[name] = stage
    if recipe.evaluate:
        resolve_ai_judge(recipe.evaluate, functools.partial(_require, recipe, earlier), problems)
    if recipe.evaluate:
        _require_engine(recipe.evaluate.rollout, ("evaluate", "rollout"), problems)
    if recipe.evaluate and recipe.evaluate.samples > 1 and recipe.evaluate.temperature == 0:
        problems.add(
            ("evaluate", "samples"),
            "`samples` has no effect at temperature 0: all replies to a prompt are the same",
            "set `temperature`, or remove it",
            of_key=True,
        )


def _of_known_kind(earlier: dict[str, Stage], problems: Problems) -> list[str]:
    """The earlier stages but those whose kind is wrong."""
    return [other for other in earlier if not problems.is_broken(("stages", other, "kind"))]


def _refuse_keys_of_other_kinds(name: str, stage: Stage, problems: Problems) -> None:
    """A key that has no effect in a stage of its kind is an error."""
    for key in kinds.KEYS:
        if key not in stage.facts.takes and getattr(stage, key):
            takers = kinds.takers(key)
            whose = f"kind {kinds.either(takers)}" if len(takers) < len(kinds.NAMES) - 1 else "other kinds"
            problems.add(
                ("stages", name, key), f"`{key}` has no effect in a stage of kind `{stage.kind}`",
                f"remove it: it is a key of {whose}", of_key=True,
            )  # fmt: skip


def _resolve_init(recipe: Recipe, name: str, stage: Stage, earlier: dict[str, Stage], problems: Problems) -> None:
    """Fill in what a stage starts from; what is wrong is noted."""
    path, known = ("stages", name, "init"), _of_known_kind(earlier, problems)
    if stage.init is None:
        stage.init = next((other for other in reversed(known) if earlier[other].facts.begins), BASE)
        first = kinds.either(tuple(kind.name for kind in kinds.KINDS if kind.begins))
        problems.origins.derived[path] = f"{'the latest' if stage.init != BASE else 'no'} {first} stage before"
    elif isinstance(stage.init, list):
        _resolve_several_inits(recipe, stage, path, earlier, problems)
    elif outside.is_one(stage.init):
        stage.init = _from_outside(path, stage.init, "policy", problems)
    elif stage.init != BASE:
        _require(recipe, earlier, path, stage.init, kinds.makers("policy"), problems)
    if problems.is_broken(path):
        stage.init = BASE
        problems.break_(("stages", name, "lora"))


def _resolve_several_inits(
    recipe: Recipe, stage: Stage, path: KeyPath, earlier: dict[str, Stage], problems: Problems
) -> None:
    """See that several policies can be asked; what is wrong is noted."""
    inits = stage.inits
    if "n" not in stage.facts.takes:
        of = "that trains starts" if stage.facts.trains else f"of kind `{stage.kind}` starts"
        problems.add(path, f"a stage {of} from one policy", "name one")
    elif not inits:
        problems.add(path, "`init` is empty", "name a stage, or `base`")
    elif len(set(inits)) < len(inits):
        problems.add(path, "a policy is named twice", "set `n` for more replies of each")
    for place, one in enumerate(inits):
        if outside.is_one(one):
            inits[place] = _from_outside((*path, place), one, "policy", problems)
        elif one != BASE:
            _require(recipe, earlier, (*path, place), one, kinds.makers("policy"), problems)


def _reward_stage(recipe: Recipe, earlier: dict[str, Stage], path: KeyPath, value: str, problems: Problems) -> str:
    """What the name of a reward stage means; what is wrong with it is noted."""
    if outside.is_one(value):
        return _from_outside(path, value, "reward", problems)
    _require(recipe, earlier, path, value, kinds.makers("reward"), problems)
    return value


def _from_outside(path: KeyPath, value: str, makes: kinds.Makes, problems: Problems) -> str:
    """What the name of an adapter from outside means; what is wrong with it is noted."""
    key = path[-1]
    try:
        value = outside.resolve(value, problems.origins.folder(path))
        found = outside.makes(outside.config(value))
    except InputError as error:
        problems.add(path, error.message, error.hint)
        return value
    if found != makes:
        problems.add(
            path,
            f"`{outside.label(value)}` is the adapter of a {found}{' model' * (found == 'reward')}; `{key}` needs that "
            f"of a {makes}{' model' * (makes == 'reward')}",
            "a reward model's adapter has the task type SEQ_CLS and a score head; a policy's has none",
        )
    return value


def _require_both_of_ptx(name: str, stage: Stage, problems: Problems) -> None:
    """Demonstrations without a weight would not be read, and a weight without them weighs nothing."""
    data, weight = ("stages", name, "ptx_data"), ("stages", name, "trainer", "ptx_coef")
    weighed = stage.trainer.get("ptx_coef", 0)
    if problems.within(data) or problems.within(weight[:-1]) or not isinstance(weighed, int | float):
        return
    if stage.ptx_data and not weighed:
        problems.add(weight, "`ptx_data` has no effect without `ptx_coef`", "set `ptx_coef` in `trainer`")
    elif weighed and not stage.ptx_data:
        problems.add(weight, "`ptx_coef` has no effect without `ptx_data`", "give demonstrations", of_key=True)


def _require_engine(rollout: Rollout | None, path: KeyPath, problems: Problems) -> None:
    """The settings of an engine have no effect on another one."""
    if rollout is None or rollout.is_vllm or problems.is_broken((*path, "engine")):
        return
    for key in rollout.model_dump(exclude={"engine"}, exclude_defaults=True):
        said = f"`{key}` has no effect with `engine: {rollout.engine}`"
        problems.add((*path, key), said, "set `engine: vllm`, or remove it", of_key=True)


def _require_members_for_bootstrap(name: str, stage: Stage, problems: Problems) -> None:
    """Without several members there is nothing to draw a sample for each of."""
    path = ("stages", name)
    if stage.bootstrap and stage.members is None and not problems.is_broken((*path, "members")):
        problems.add((*path, "bootstrap"), "`bootstrap` has no effect without `members`", "set `members`", of_key=True)


def _resolve_lora(recipe: Recipe, name: str, stage: Stage, problems: Problems) -> None:
    """Fill in the whole shape of a stage's adapter, and see that it can begin as the adapter it starts from.

    Only what the keys alone show; the worker's check compares the adapters themselves, module by module.
    """
    init, path = stage.start, ("stages", name, "lora")
    before: dict[str, Any]
    if outside.is_one(init):
        before, whose = outside.lora(outside.config(init)), f"`{outside.label(init)}`"
    else:
        before, whose = (recipe.lora if init == BASE else recipe.stages[init].lora), f"stage `{init}`"
    taken_over = "from lora" if init == BASE else f"from {outside.label(init) if outside.is_one(init) else init}"
    problems.origins.derived |= {(*path, key): taken_over for key in before if key not in stage.lora}
    stage.lora = {**before, **stage.lora}
    if init == BASE or problems.is_broken(path) or problems.is_broken(("stages", init, "lora")):
        return
    rigid = next((key for key in RIGID_KEYS if stage.lora.get(key)), None)
    for key in (*FUNCTION_KEYS, *(SIZE_KEYS if rigid else ())):
        if (stage.lora.get(key) or None) != (before.get(key) or None):  # no value and `false` are the same
            why = f"with `{rigid}` a change of size would" if key in SIZE_KEYS else "that would"
            problems.add(
                (*path, key),
                f"`{key}` is not that of {whose}, whose adapter stage `{name}` starts from: {why} "
                "change what the adapter computes",
                f"leave it as in {whose.removeprefix('stage ')}, or start from the base: `init: {BASE}`",
            )
    patterned = stage.lora.get("rank_pattern") or before.get("rank_pattern")
    if not patterned and "r" in before and stage.lora["r"] < before["r"]:
        problems.add(
            (*path, "r"),
            f"rank {stage.lora['r']} is less than {before['r']}, that of {whose}, whose adapter stage "
            f"`{name}` starts from and would not fit",
            f"use {before['r']} or more, or start from the base: `init: {BASE}`",
        )


def _resolve_reference(recipe: Recipe, name: str, stage: Stage, earlier: dict[str, Stage], problems: Problems) -> None:
    """See that a stage can measure from the policy that it names, which has to fit into an adapter of its own shape."""
    path, named = ("stages", name, "reference"), str(stage.reference)
    if named == PREVIOUS:
        problems.add(
            path,
            f"`{PREVIOUS}` has a meaning for the stages of `rounds` alone",
            "remove it: by default the reference is what the stage starts from",
        )
    elif outside.is_one(named):
        stage.reference = _from_outside(path, named, "policy", problems)
    elif named != BASE:
        _require(recipe, earlier, path, named, kinds.makers("policy"), problems)
    if problems.is_broken(path) or stage.reference == stage.start:
        stage.reference = None  # as by default
        return
    if stage.trainer.get(PRECOMPUTE):
        problems.add(
            ("stages", name, "trainer", PRECOMPUTE),
            f"with it, TRL computes the log-probabilities of what stage `{name}` starts from, and not of its "
            f"reference, `{outside.said(named)}`",
            f"remove it, or have the stage measure from what it starts from: without `reference`, or in rounds "
            f"`reference: {PREVIOUS}`",
            of_key=True,
        )
    theirs = outside.lora(outside.config(str(stage.reference))) if outside.is_one(named) else recipe.lora
    theirs = earlier[named].lora if named in earlier else theirs
    if named == BASE or problems.within(("stages", name, "lora")) or problems.within(("stages", named, "lora")):
        return
    differs = next((key for key in FUNCTION_KEYS if (stage.lora.get(key) or None) != (theirs.get(key) or None)), None)
    patterned = stage.lora.get("rank_pattern") or theirs.get("rank_pattern")
    if differs is None and not patterned and "r" in theirs and stage.lora["r"] < theirs["r"]:
        differs = "r"
    if differs is not None:
        problems.add(
            path,
            f"the adapter of `{outside.said(named)}` has no room in one of the shape of stage `{name}`: "
            f"`lora.{differs}` is {shown(theirs.get(differs))} there, and {shown(stage.lora.get(differs))} here",
            f"set `lora.{differs}` to that of `{outside.said(named)}`, or measure from another policy",
        )


def _require(
    recipe: Recipe,
    earlier: dict[str, Stage],
    path: KeyPath,
    wanted: str,
    wanted_kinds: tuple[str, ...],
    problems: Problems,
) -> None:
    """Check that `wanted` is an earlier stage of one of some kinds."""
    key = next(part for part in reversed(path) if isinstance(part, str) and part != "path")
    name = f"stage `{path[1]}`" if path[0] == "stages" else f"`{path[0]}`"
    if path[:2] == ("stages", wanted):
        problems.add(path, f"{name} cannot depend on itself", _earlier(earlier, wanted_kinds, problems))
    elif wanted not in recipe.stages:
        near = difflib.get_close_matches(wanted, earlier, n=1)
        hint = f"did you mean `{near[0]}`?" if near else _earlier(earlier, wanted_kinds, problems)
        problems.add(path, f"{name} needs stage `{wanted}`, which is not in the recipe", hint)
    elif wanted not in earlier:
        problems.add(path, f"{name} needs stage `{wanted}`, which comes after it", "stages run in order")
    elif earlier[wanted].kind not in wanted_kinds and not problems.is_broken(("stages", wanted, "kind")):
        problems.add(
            path,
            f"`{wanted}` is of kind `{earlier[wanted].kind}`; `{key}` needs {kinds.either(wanted_kinds)}",
            _earlier(earlier, wanted_kinds, problems),
        )


def _earlier(earlier: dict[str, Stage], names: tuple[str, ...], problems: Problems) -> str:
    """The stages that would do, for a hint, by the names that were written."""
    fitting = dict.fromkeys(problems.origins.as_written(name) for name in earlier if earlier[name].kind in names)
    return f"earlier stages: {', '.join(fitting) or f'none of kind {kinds.either(names)}'}"
