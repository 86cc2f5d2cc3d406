"""From a path and overrides to a validated recipe, or to messages that name file, line, key and remedy.

Nothing here imports torch.
"""

import difflib
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml as pyyaml
from pydantic import ValidationError

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import gates, library_keys
from rlhf_pipeline.recipe.schema import BASE, KINDS, Data, Evaluate, Model, Recipe, Stage
from rlhf_pipeline.recipe.yaml import KeyPath, dump, parse_document, parse_value

__all__ = [
    "BASE",
    "Data",
    "Evaluate",
    "Model",
    "Recipe",
    "Stage",
    "load",
    "run_directory",
    "shipped",
    "shipped_folder",
    "to_yaml",
]

PACKAGE = Path(str(importlib.resources.files("rlhf_pipeline")))
TINY = PACKAGE / "models" / "tiny"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POLICY_KINDS = ("sft", "ppo", "dpo")
# PEFT's keys that make another function of the same weights, or share or repeat them.
FUNCTION_KEYS = (
    "use_dora", "lora_bias", "use_qalora", "qalora_group_size", "alora_invocation_tokens",
    "ensure_weight_tying", "velora_config", "monteclora_config", "use_bdlora", "arrow_config",
)  # fmt: skip
# With one of these, the weights are not two plain factors that a larger rank extends.
RIGID_KEYS = ("target_parameters", "monteclora_config", "use_bdlora", "arrow_config")
SIZE_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


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


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, resolve and check a recipe.

    Args:
        recipe: a path, or the name of a shipped recipe.
        overrides: `key=value` strings; a key may start at the top (`model.dtype`) or with a stage (`ppo.trainer.lam`).

    Returns:
        The recipe with absolute paths and every default filled in.

    Raises:
        InputError: with the place and a hint, for anything that the recipe alone, or a look at the files it names,
            shows to be wrong.
    """
    file, folder = find(recipe)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", place=str(file)) from None
    content, lines = parse_document(text, str(file))
    if not isinstance(content, dict):
        raise InputError(
            "a recipe is a mapping with `model` and `stages`", place=str(file), hint="see `rlhf-pipeline cp tiny`"
        )
    places = _Places(str(file), lines)
    for override in overrides:
        _apply(override, content, places)
    content.setdefault("name", file.stem)
    _name_kinds(content, places)
    try:
        loaded = Recipe.model_validate(content)
    except ValidationError as error:
        raise _first_problem(error, content, places) from None
    _check_library_keys(loaded, places)
    _resolve_stages(loaded, places)
    gates.check(loaded, places.of)
    _resolve_paths(loaded, folder, places)
    return loaded


def run_directory(text: str) -> Path:
    """The run directory that is meant: a folder that is one, or that of a recipe, by path or shipped name.

    Raises:
        InputError: there is none, or the recipe is wrong.
    """
    path = Path(text)
    if path.is_dir() and (text not in shipped() or _is_run(path)):
        if not _is_run(path):
            raise InputError("this folder is not a run directory", place=text, hint="name a folder that `run` has made")
        return path
    run = load(text).run
    if not _is_run(run):
        raise InputError(f"there is no run of it at {run}", place=text, hint=f"`rlhf-pipeline run {text}` makes one")
    return run


def _is_run(folder: Path) -> bool:
    """Whether a run was ever started in a folder."""
    return (folder / ".lock").is_file() or any(folder.glob("*/stage.json"))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; of a stage's `lora` only what differs from the one it takes over."""
    content = recipe.model_dump()
    for name, stage in recipe.stages.items():
        before = recipe.stages[stage.init].lora if stage.init in recipe.stages else recipe.lora
        own = {key: value for key, value in stage.lora.items() if key not in before or before[key] != value}
        content["stages"][name]["lora"] = own
    return dump(content)


class _Places:
    """Where each key was written: a line of the file, or an override."""

    def __init__(self, file: str, lines: dict[KeyPath, int]) -> None:
        self.file = file
        self.lines = lines
        self.overridden: dict[KeyPath, str] = {}

    def override(self, path: KeyPath, override: str) -> None:
        """Note that a key, with all below it, was given on the command line."""
        for known in (self.lines, self.overridden):
            for inner in [key for key in known if key[: len(path)] == path]:
                del known[inner]
        self.overridden[path] = override

    def of(self, *path: str | int) -> str:
        """The place of a key, or of the nearest enclosing key that was written."""
        key = ".".join(str(part) for part in path)
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return f"override `{self.overridden[path[:end]]}`"
            if path[:end] in self.lines and end:
                return f"{self.file}:{self.lines[path[:end]]}: {key}"
        return f"{self.file}: {key}" if key else self.file


def _apply(override: str, content: dict, places: _Places) -> None:
    """Write one `key=value` of the command line into the recipe's content."""
    key, equals, text = override.partition("=")
    place = f"override `{override}`"
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w/-]+)*", key):
        raise InputError("an override has the form key=value", place=place, hint="for example ppo.trainer.kl_coef=0.1")
    try:
        value = parse_value(text)
    except pyyaml.YAMLError:
        hint = "quote text that holds : or [ or begins with >"
        raise InputError(f"{text!r} is not a YAML value", place=place, hint=hint) from None
    parts = key.split(".")
    stages = content.get("stages")
    if parts[0] not in Recipe.model_fields and isinstance(stages, dict) and parts[0] in stages:
        parts.insert(0, "stages")
    target = content
    for i, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if part in ("data", "ptx_data") and isinstance(inner, str):  # `data: FILE` is short for `data: {path: FILE}`
            inner = target[part] = {"path": inner}
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise InputError(f"`{'.'.join(parts[: i + 1])}` has no keys below it", place=place)
        target = inner
    target[parts[-1]] = value
    places.override(tuple(parts), override)


def _name_kinds(content: dict, places: _Places) -> None:
    """Fill in each stage's kind from its name, and catch names that cannot be told apart from the recipe's keys."""
    stages = content.get("stages")
    if not isinstance(stages, dict):
        return
    for name, stage in stages.items():
        place = places.of("stages", name)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise InputError(f"`{name}` cannot name a stage", place=place, hint="use letters, digits, _ and -")
        if name in Recipe.model_fields or name == BASE:
            raise InputError(f"a stage cannot be named `{name}`, which has a meaning of its own", place=place)
        if isinstance(stage, dict) and "kind" not in stage:
            if name not in KINDS:
                raise InputError(
                    f"the kind of stage `{name}` is not given",
                    place=place,
                    hint=f"add `kind:` with one of {', '.join(KINDS)}, or name the stage after its kind",
                )
            stage["kind"] = name


def _first_problem(error: ValidationError, content: dict, places: _Places) -> InputError:
    """Turn pydantic's first complaint into ours; a key misspelt comes before the one that it leaves missing."""
    problems = error.errors()
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    path = tuple(part for part in problem["loc"] if part != "function-before[_path_only(), Data]")
    place = places.of(*path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _keys_beside(path), n=1)
        known = ", ".join(_keys_beside(path))
        hint = f"did you mean `{near[0]}`?" if near else f"the keys here are {known}"
        return InputError(f"unknown key `{path[-1]}`", place=place, hint=hint)
    if problem["type"] == "missing":
        return InputError(f"`{path[-1]}` is missing", place=place)
    message = problem["msg"].replace("Input should be", "expected").replace("dictionary", "mapping")
    given = problem["input"]
    shown = "" if isinstance(given, (dict, list)) else f", got {given!r}"
    return InputError(message[0].lower() + message[1:] + shown, place=place)


def _keys_beside(path: KeyPath) -> list[str]:
    """The keys that are valid where an unknown one stands."""
    model: Any = Recipe
    if path[0] == "stages":
        model = Stage if len(path) == 3 else Data
    elif path[0] == "model":
        model = Model if len(path) > 1 else Recipe
    elif path[0] == "evaluate" and len(path) > 1:
        model = Evaluate if len(path) == 2 else Data
    return list(model.model_fields)


def _check_library_keys(recipe: Recipe, places: _Places) -> None:
    """Hold `trainer:` and every `lora:` against TRL's and PEFT's own classes."""
    sections: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [("lora", recipe.lora, ("lora",))]
    for name, stage in recipe.stages.items():
        sections.append(("lora", stage.lora, ("stages", name, "lora")))
        sections.append((stage.kind, stage.trainer, ("stages", name, "trainer")))
    for config, values, path in sections:
        known, owner = library_keys.accepted(config), library_keys.CONFIG_NAMES[config]
        for key, value in values.items():
            place = places.of(*path, key)
            if key not in known:
                near = difflib.get_close_matches(str(key), library_keys.settable(config), n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"the keys are those of {owner}"
                raise InputError(f"unknown key `{key}`", place=place, hint=hint)
            reason = library_keys.refusal(config, key)
            if reason:
                raise InputError(f"`{key}` cannot be set: {reason}", place=place, hint="remove it")
            problem = library_keys.type_problem(known[key], value)
            if problem:
                raise InputError(problem, place=place, hint=f"see {owner}")
        if config == "lora" and values.get("init_lora_weights", True) not in (True, "gaussian"):
            raise InputError(
                "this initialisation changes the base, or starts away from it",
                place=places.of(*path, "init_lora_weights"),
                hint="use true or `gaussian`: an adapter starts as no change to the base, which is never written again",
            )


def _resolve_stages(recipe: Recipe, places: _Places) -> None:
    """Fill in which earlier stage each stage starts from, its adapter's shape, and which reward it uses."""
    earlier: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        sfts = [other for other, spec in earlier.items() if spec.kind == "sft"]
        stage.init = stage.init or (sfts[-1] if sfts else BASE)
        if stage.init != BASE:
            _require(recipe, earlier, name, "init", stage.init, POLICY_KINDS, places)
        _resolve_lora(recipe, name, stage, places)
        if stage.kind == "ppo":
            rewards = [other for other, spec in earlier.items() if spec.kind == "reward"]
            if stage.reward is None and not rewards:
                raise InputError(
                    f"stage `{name}` needs a reward model, and no `reward` stage stands before it",
                    place=places.of("stages", name),
                    hint="add a stage of kind `reward` before it",
                )
            stage.reward = stage.reward or rewards[-1]
            _require(recipe, earlier, name, "reward", stage.reward, ("reward",), places)
            stage.trainer = (
                {"stop_token": "eos", **stage.trainer} if "stop_token_id" not in stage.trainer else stage.trainer
            )
        for key in ("reward", "ptx_data"):
            if stage.kind != "ppo" and getattr(stage, key) is not None:
                raise InputError(
                    f"`{key}` has no effect in a stage of kind `{stage.kind}`",
                    place=places.of("stages", name, key),
                    hint="remove it",
                )
        earlier[name] = stage


def _resolve_lora(recipe: Recipe, name: str, stage: Stage, places: _Places) -> None:
    """Fill in the whole shape of a stage's adapter, and see that it can begin as the adapter it starts from.

    Only what the keys alone show; the worker's check compares the adapters themselves, module by module.
    """
    before = recipe.lora if stage.init == BASE else recipe.stages[str(stage.init)].lora
    stage.lora = {**before, **stage.lora}
    if stage.init == BASE:
        return
    rigid = next((key for key in RIGID_KEYS if stage.lora.get(key)), None)
    for key in (*FUNCTION_KEYS, *(SIZE_KEYS if rigid else ())):
        if (stage.lora.get(key) or None) != (before.get(key) or None):  # no value and `false` are the same
            why = f"with `{rigid}` a change of size would" if key in SIZE_KEYS else "that would"
            raise InputError(
                f"`{key}` is not that of stage `{stage.init}`, whose adapter stage `{name}` starts from: {why} "
                "change what the adapter computes",
                place=places.of("stages", name, "lora", key),
                hint=f"leave it as in `{stage.init}`, or start from the base: `init: {BASE}`",
            )
    patterned = stage.lora.get("rank_pattern") or before.get("rank_pattern")
    if not patterned and "r" in before and stage.lora["r"] < before["r"]:
        raise InputError(
            f"rank {stage.lora['r']} is less than {before['r']}, that of stage `{stage.init}`, whose adapter stage "
            f"`{name}` starts from and would not fit",
            place=places.of("stages", name, "lora", "r"),
            hint=f"use {before['r']} or more, or start from the base: `init: {BASE}`",
        )


def _require(
    recipe: Recipe,
    earlier: dict[str, Stage],
    name: str,
    key: str,
    wanted: str,
    kinds: tuple[str, ...],
    places: _Places,
) -> None:
    """Check that `wanted` is an earlier stage of one of `kinds`."""
    place = places.of("stages", name, key)
    if wanted == name:
        raise InputError(f"stage `{name}` cannot depend on itself", place=place)
    if wanted not in recipe.stages:
        near = difflib.get_close_matches(wanted, earlier, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"earlier stages: {', '.join(earlier) or 'none'}"
        raise InputError(f"stage `{name}` needs stage `{wanted}`, which is not in the recipe", place=place, hint=hint)
    if wanted not in earlier:
        raise InputError(
            f"stage `{name}` needs stage `{wanted}`, which stands after it", place=place, hint="stages run in order"
        )
    if earlier[wanted].kind not in kinds:
        raise InputError(
            f"`{wanted}` is of kind `{earlier[wanted].kind}`; `{key}` needs {' or '.join(kinds)}", place=place
        )


def _resolve_paths(recipe: Recipe, folder: Path, places: _Places) -> None:
    """Make paths absolute, and see that what is named is there."""
    recipe._folder = folder
    recipe.output_dir = str((folder / Path(recipe.output_dir).expanduser()).resolve())
    recipe.model.path = _model_path(recipe.model.path, folder, places.of("model", "path"))
    if Path(recipe.model.path).is_absolute() and recipe.model.revision is not None:
        raise InputError(
            "`revision` has no effect: a model folder has no revisions",
            place=places.of("model", "revision"),
            hint="remove it",
        )
    data: dict[tuple[str, ...], Data] = {("stages", name, "data"): stage.data for name, stage in recipe.stages.items()}
    for name, stage in recipe.stages.items():
        if stage.ptx_data:
            data["stages", name, "ptx_data"] = stage.ptx_data
    if recipe.evaluate:
        data["evaluate", "data"] = recipe.evaluate.data
    for path, spec in data.items():
        spec.path = _data_path(spec.path, folder, places.of(*path, "path"))
        idle = {}
        if path[0] == "evaluate":
            idle["eval_fraction"] = "all rows are held out here"
        elif path[2] == "ptx_data":
            idle["eval_fraction"] = "nothing evaluates on these rows"
        if path[0] == "evaluate" or (path[2] == "data" and recipe.stages[path[1]].kind == "ppo"):
            idle["max_completion_length"] = "only prompts are read here"
        _refuse_idle_keys(spec, idle, path, places)


def _refuse_idle_keys(spec: Data, idle: dict[str, str], path: KeyPath, places: _Places) -> None:
    """Refuse what would have no effect, each key for its reason: no setting is ignored in silence."""
    if Path(spec.path).is_absolute():
        idle |= {"split": "a data file has no splits", "revision": "a data file has no revisions"}
    for key, reason in idle.items():
        if getattr(spec, key) != Data.model_fields[key].default:
            raise InputError(f"`{key}` has no effect: {reason}", place=places.of(*path, key), hint="remove it")


def _model_path(path: str, folder: Path, place: str) -> str:
    if path == "tiny":
        return str(TINY / "checkpoint")
    local = folder / Path(path).expanduser()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise InputError(
                f"there is no model folder {local}", place=place, hint="relative paths start from the recipe's folder"
            )
        return path  # a hub id
    if not (local / "config.json").is_file():
        raise InputError(
            f"{local} is not a model folder: it has no config.json",
            place=place,
            hint="name the folder that `save_pretrained` wrote",
        )
    pickled = sorted(file.name for file in local.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled and not any(local.glob("*.safetensors")):
        raise InputError(
            f"{local} holds its weights as a pickle, {pickled[0]}, which can run any code when it is opened, so only "
            "*.safetensors are read",
            place=place,
            hint="if you trust who made it, load model and tokenizer once with Transformers and `save_pretrained` both "
            "to a new folder",
        )
    if not any(local.glob("*.safetensors")):
        raise InputError(
            f"{local} holds no *.safetensors weights",
            place=place,
            hint="load the model with Transformers and save it with `save_pretrained`",
        )
    return str(local.resolve())


def _data_path(path: str, folder: Path, place: str) -> str:
    if path.startswith("tiny:"):
        file = TINY / "data" / f"{path.removeprefix('tiny:')}.jsonl"
        if not file.is_file():
            known = ", ".join(f"tiny:{other.stem}" for other in sorted(file.parent.glob("*.jsonl")))
            raise InputError(f"the tiny world has no data `{path}`", place=place, hint=f"it has {known}")
        return str(file)
    local = folder / Path(path).expanduser()
    if local.is_file():
        if local.suffix not in DATA_SUFFIXES:
            raise InputError(
                f"data files of type `{local.suffix}` are not read", place=place, hint=f"use {', '.join(DATA_SUFFIXES)}"
            )
        if local.stat().st_size == 0:
            raise InputError(f"the data file {local} is empty", place=place, hint="put at least one row in it")
        return str(local.resolve())
    if local.exists():
        raise InputError(f"{local} is not a file", place=place, hint="name one data file")
    if local.suffix in DATA_SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(
            f"there is no data file {local}", place=place, hint="relative paths start from the recipe's folder"
        )
    return path  # a hub dataset
