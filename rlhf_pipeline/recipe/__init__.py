"""From a path and overrides to a validated recipe, or to messages that name file, line, key and remedy.

`layers` reads the files, `rounds` writes out what is repeated, `validation` compares all with the schema and the
libraries' keys, `resolve` fills in what stages take from one another, `gates` and `paths` look at gates and at the
disk. Nothing here imports torch.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import resolved
from rlhf_pipeline.recipe import gates, outside
from rlhf_pipeline.recipe.launch import resolve_launch
from rlhf_pipeline.recipe.layers import OF_SOURCE, read
from rlhf_pipeline.recipe.origins import Origins, Problems
from rlhf_pipeline.recipe.paths import resolve_paths
from rlhf_pipeline.recipe.resolve import resolve_stages
from rlhf_pipeline.recipe.schema import BASE, AIJudge, Data, Evaluate, Model, Recipe, Stage
from rlhf_pipeline.recipe.shipped import PACKAGE, TINY, find, shipped, shipped_folder
from rlhf_pipeline.recipe.validation import check_library_keys, validate
from rlhf_pipeline.recipe.yaml import KeyPath, dump, parse_document

__all__ = [
    "BASE",
    "PACKAGE",
    "TINY",
    "Data",
    "Evaluate",
    "Model",
    "Recipe",
    "Stage",
    "as_far_as_read",
    "content_of",
    "find",
    "is_run",
    "load",
    "load_with_origins",
    "of_run",
    "run_directory",
    "run_to_watch",
    "shipped",
    "shipped_folder",
    "to_yaml",
]


def load(recipe: str, overrides: Sequence[str] = (), *, weights: bool = True) -> Recipe:
    """Read, override, resolve and check a recipe.

    Args:
        recipe: a path, or the name of a shipped recipe, or a run directory, for the recipe that `run` has left there.
        overrides: `key=value` strings; a key may start at the top (`model.dtype`) or with a stage (`ppo.trainer.lam`).
        weights: whether the model's folder must have weights; else `config.json` is enough.

    Returns:
        The recipe with absolute paths and every default filled in.

    Raises:
        InputError: with place and hint, for all that the recipe alone, or a look at the files it names, shows to be
            wrong; of several problems, as `InputErrors`, in the order in which they are written.
    """
    return load_with_origins(recipe, overrides, weights=weights)[0]


def load_with_origins(recipe: str, overrides: Sequence[str] = (), *, weights: bool = True) -> tuple[Recipe, Origins]:
    """As `load`, with the origin of each value."""
    loaded, origins, problems = _read(recipe, overrides, weights)
    problems.raise_if_any()
    loaded._place, loaded._as_written = origins.place, origins.as_written
    loaded.locate_rows()
    return loaded, origins


def as_far_as_read(recipe: str, overrides: Sequence[str] = ()) -> Recipe | None:
    """A recipe in which something is wrong, as far as it tells where its run is and which of several machines this is.

    Args:
        recipe: see `load`.
        overrides: see `load`.

    Returns:
        The recipe; other things in it may be stand-ins. None where it does not tell that.
    """
    try:
        loaded, _, problems = _read(recipe, overrides, weights=True)
    except InputError:
        return None
    needed: list[KeyPath] = [("name",), ("output_dir",), ("launch", "machine_rank"), ("launch", "num_machines")]
    needed += [("stages", name, "launch", "num_machines") for name in loaded.stages]
    says = "machine_rank" in (loaded.launch or {}) or not problems.within(("launch",))
    return loaded if says and not any(problems.is_broken(path) for path in needed) else None


def _read(recipe: str, overrides: Sequence[str], weights: bool) -> tuple[Recipe, Origins, Problems]:
    """A recipe, the origin of each value, and what is wrong.

    Raises:
        InputError: what is wrong leaves nothing to check further.
    """
    run = Path(recipe) if recipe not in shipped() and is_run(Path(recipe)) else None
    file, folder = _file_of_run(run) if run else find(recipe)
    content, origins, problems = read(file, folder, overrides)
    if run and not any(override.partition("=")[0] in ("name", "output_dir") for override in overrides):
        content |= {"name": run.absolute().name, "output_dir": str(run.absolute().parent)}  # it may have been moved
    if "name" not in content:
        content["name"] = file.stem
        origins.derived["name",] = "from the file's name"
    loaded = validate(content, problems)
    loaded.rounds = None  # its stages are written out
    check_library_keys(loaded, content, problems)
    resolve_stages(loaded, problems)
    gates.check(loaded, problems)
    resolve_paths(loaded, problems, weights)
    resolve_launch(loaded, content, problems)
    return loaded, origins, problems


def run_directory(text: str) -> Path:
    """The run directory that is meant: a folder that is one, or that of a recipe, by path or shipped name.

    Raises:
        InputError: there is none, or the recipe is wrong.
    """
    path = Path(text)
    if path.is_dir() and (text not in shipped() or is_run(path)):
        if not is_run(path):
            raise InputError("this folder is not a run directory", place=text, hint="name a folder that `run` has made")
        return path
    run = load(text).run
    if not is_run(run):
        raise InputError(f"there is no run of it at {run}", place=text, hint=f"`rlhf-pipeline run {text}` makes one")
    return run


def run_to_watch(text: str) -> Path:
    """The run directory that is meant, as in `run_directory`, which a run may be about to make.

    Raises:
        InputError: it is neither that of a recipe nor in a folder that is there, or the recipe is wrong.
    """
    path = Path(text)
    if path.is_dir():
        return path if not any(path.iterdir()) else run_directory(text)
    if text in shipped() or path.is_file() or path.suffix in (".yaml", ".yml"):
        return load(text).run
    if path.parent == Path():
        return run_directory(text)  # which says what is wrong
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", place=text, hint="name the recipe to wait for its run")
    return path


def of_run(run: Path) -> Recipe:
    """The resolved recipe of a run directory, as the last `run` left it; what it names need not be there any more.

    A stage's `lora` is what the file says of it: what differs from the one it takes over.

    Raises:
        InputError: there is none that can be read.
    """
    file = run / "recipe.yaml"
    try:
        recipe = Recipe.model_validate(parse_document(file.read_text(encoding="utf-8"), str(file))[0])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the run's recipe cannot be read: {error}", place=str(file)) from None
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(
            "this is no recipe that `run` has written", place=f"{file}: {key}", hint="another version may have made it"
        ) from None
    folder = _folder_of_run(run)
    recipe._folders = [folder] if folder else recipe._folders
    recipe.locate_rows(run)
    return recipe


def _file_of_run(run: Path) -> tuple[Path, Path]:
    """The recipe that `run` left in a run directory, and the folder that relative paths started from."""
    file = run / "recipe.yaml"
    if not file.is_file():
        raise InputError("there is no recipe in this run directory yet", place=str(file), hint="name the recipe itself")
    return file, _folder_of_run(run) or resolved(run)


def _folder_of_run(run: Path) -> Path | None:
    """The folder of the recipe that a run was made with, as its records have it; None where none does."""
    for record in run.glob("*/stage.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Path(json.loads(record.read_text(encoding="utf-8"))["recipe_folder"])
    return None


def is_run(folder: Path) -> bool:
    """Whether a run was ever started in a folder."""
    return (folder / ".lock").is_file() or any(folder.glob("*/stage.json"))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; of a stage's `lora` only what differs from the one it takes over.

    Of one that starts from outside it is the whole `lora`: what it names need not be there when this is read.
    """
    content = content_of(recipe)
    for name, stage in recipe.stages.items():
        if "lora" not in stage.facts.takes:
            continue
        before = recipe.stages[stage.start].lora if stage.start in recipe.stages else recipe.lora
        if outside.is_one(stage.start):
            before = {}
        own = {key: value for key, value in stage.lora.items() if key not in before or before[key] != value}
        content["stages"][name]["lora"] = own
    return dump(content)


def content_of(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as it would be written: every default visible, but no key that says nothing."""
    content = recipe.model_dump()
    if recipe.model.chat_template is None:
        del content["model"]["chat_template"]
    if not recipe.model.chat_template_kwargs:
        del content["model"]["chat_template_kwargs"]
    for name, stage in recipe.stages.items():
        own = content["stages"][name]
        own["rewards"] = [reward.model_dump(exclude_defaults=True) for reward in stage.rewards]
        if stage.judge:
            own["judge"] = _content_of_ai_judge(stage.judge)
        if stage.until:
            own["until"] = stage.until.says
        if stage.people:
            own["people"] = stage.people.says
        for key, data in stage.tables.items():
            own[key] = _content_of_data(data, stage.reads(key) == "demonstrations")
        unsaid = {key for key in kinds.KEYS if key not in stage.facts.takes}
        unsaid |= {
            key
            for key in ("rewards", "value_model", "members", "pairs", "human", "watch", "check", "people", "launch")
            if not getattr(stage, key)
        }
        unsaid |= {"bootstrap"} if stage.members is None else set()
        unsaid |= {"reference"} if stage.reference is None else set()
        content["stages"][name] = {key: value for key, value in own.items() if key not in unsaid}
    del content["rounds"]
    if recipe.launch is None:
        del content["launch"]
    if recipe.evaluate:
        own = content["evaluate"]
        own["data"] = _content_of_data(recipe.evaluate.data, bear_loss=False)
        if recipe.evaluate.ai_judge:
            own["ai_judge"] = _content_of_ai_judge(recipe.evaluate.ai_judge)
        content["evaluate"] = {key: value for key, value in own.items() if value is not None}
    return content


def _content_of_ai_judge(judge: AIJudge) -> dict[str, Any]:
    return {"model": judge.model} | judge.model_dump(exclude_defaults=True)


def _content_of_data(data: Data, bear_loss: bool) -> dict[str, Any]:
    """The keys of one section of data; `bear_loss` says whether its replies are trained on as they are."""
    content = data.model_dump(exclude=None if bear_loss else {"loss"})
    if data.mix:
        for key in OF_SOURCE:
            del content[key]
        content["mix"] = [source.model_dump(exclude_defaults=True) for source in data.mix]
    if data.eval_data:
        content["eval_data"] = data.eval_data.model_dump(exclude_defaults=True)
    unsaid = [
        key
        for key in ("subset", "limit", "mix", "eval_data", "chat", "pairs", "part")
        if content.get(key) in (None, [])
    ]
    return {key: value for key, value in content.items() if key not in unsaid}
