"""From a recipe's file, those that it extends, and overrides to one content, with the origin of every value."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml as pyyaml

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import DATA_KEYS
from rlhf_pipeline.local import expanded, resolved
from rlhf_pipeline.recipe import rounds
from rlhf_pipeline.recipe.origins import Origin, Origins, Problems, Source
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.recipe.shipped import shipped
from rlhf_pipeline.recipe.yaml import KeyPath, Mark, parse_value, read_document, shown

# A new path leaves behind what named a place inside the former one.
KEYS_TIED_TO_PATH = ("subset", "revision", "split")
OF_SOURCE = ("path", *KEYS_TIED_TO_PATH, "columns", "limit")
EXCLUDED = {
    "path": ("mix", *KEYS_TIED_TO_PATH),
    "mix": OF_SOURCE,
    "eval_data": ("eval_fraction",),
    "eval_fraction": ("eval_data",),
}


def read(file: Path, folder: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Origins, Problems]:
    """Read a recipe, with what it extends and what overrides it.

    Args:
        file: the recipe.
        folder: the folder that its relative paths start from.
        overrides: `key=value` strings.

    Returns:
        The content, in which data are mappings whichever short form they were written in; the origin of each value;
        and what was found wrong, which does not keep the rest from being checked.

    Raises:
        InputError: a file is missing or no YAML, or files extend one another in a circle.
    """
    origins = Origins(Source(str(file), folder))
    problems = Problems(origins)
    content, origins.written = _read_file(file, origins.source, problems, [])
    for override in overrides:
        if rounds.round_of(override, content) is None:
            _apply(override, content, origins, problems)
    _write_out_short_forms(content, origins)
    of_rounds = [(override, found) for override in overrides if (found := rounds.round_of(override, content))]
    rounds.expand(content, origins, problems)
    for override, (name, number) in of_rounds:
        if f"{name}-{number}" in content["stages"]:
            _apply(override, content, origins, problems)
        elif origins.repeated:
            there = f"{name}-1 to {name}-{content['rounds']['n']}"
            problems.add_override(override, f"stage `{name}` has no round {number}", f"the stages there are {there}")
    for path, origin in origins.written.items():
        if origin.mark.fault:
            problems.add(path, origin.mark.fault.message, origin.mark.fault.hint)
    return content, origins, problems


def _read_file(
    file: Path, source: Source, problems: Problems, chain: list[Path]
) -> tuple[dict[str, Any], dict[KeyPath, Origin]]:
    """The content of a file on top of what it extends; `chain` are the files that led here."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"this cannot be read: it is not UTF-8 (line {line})", place=source.name, hint="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"this cannot be read: {error.strerror}", place=source.name) from None
    document = read_document(text, source.name)
    if not isinstance(document.value, dict):
        raise InputError(
            "a recipe is a mapping with `model` and `stages`", place=source.name, hint="see `rlhf-pipeline cp tiny`"
        )
    for fault in document.faults:
        problems.add_fault(fault, source)
    content, origins = document.value, Origins(source)
    origins.written = {path: Origin(source, mark) for path, mark in document.marks.items() if path}
    if "extends" not in content:
        _write_out_short_forms(content, origins)
        return content, origins.written
    base_file, base_source = _extended(content.pop("extends"), origins, problems, [*chain, resolved(file)])
    origins.forget(("extends",))
    _write_out_short_forms(content, origins)
    base, base_origins = _read_file(base_file, base_source, problems, [*chain, resolved(file)])
    base.pop("name", None)  # or two recipes would share a run directory
    below = Origins(base_source)
    below.written = base_origins
    below.forget(("name",))
    _merge(base, below, content, origins, (), problems)
    return base, below.written


def _extended(value: Any, origins: Origins, problems: Problems, chain: list[Path]) -> tuple[Path, Source]:
    """The file that `extends` names. What is wrong with it ends the reading: nothing is known of the rest.

    Raises:
        InputError: there is no such file, or the files extend one another in a circle.
    """
    place, mark = origins.place(("extends",)), origins.written[("extends",)].mark
    level = origins.source.level + 1
    error = None
    if mark.fault:
        error = InputError(mark.fault.message, place=place, hint=mark.fault.hint)
    elif not isinstance(value, str) or not value:
        error = InputError(
            f"expected the path of one recipe, or the name of a shipped one, got {shown(value)}",
            place=place,
            hint="one recipe extends one other, which may extend a further one",
        )
    else:
        file = Path(origins.source.name).parent / expanded(value)
        if not file.is_file() and value in shipped():
            return shipped()[value], Source(str(shipped()[value]), origins.source.folder, level)
        if not file.is_file():
            names = {name: name for name in shipped()} | _beside(file)
            near = difflib.get_close_matches(file.stem, names, n=1)
            hint = f"did you mean `{names[near[0]]}`?" if near else "the path starts from the folder of this file"
            error = InputError(f"there is no recipe {file}", place=place, hint=hint)
        elif resolved(file) in chain:
            circle = [*chain[chain.index(resolved(file)) :], resolved(file)]
            said = " → ".join(one.name for one in circle)
            error = InputError(f"a recipe cannot extend itself: {said}", place=place, hint="remove one `extends`")
        else:
            return file, Source(str(file), resolved(file).parent, level)
    problems.add_error(error, origins.source, mark.value)
    problems.raise_if_any()
    raise error


def _beside(file: Path) -> dict[str, str]:
    """The recipes in a file's folder, by their names without suffix."""
    return {one.stem: one.name for one in file.parent.glob("*.yaml")} if file.parent.is_dir() else {}


def _merge(
    base: dict[str, Any],
    base_origins: Origins,
    top: dict[str, Any],
    top_origins: Origins,
    path: KeyPath,
    problems: Problems,
) -> None:
    """Write one content over another, in place: mappings merge, everything else is replaced."""
    for key, value in top.items():
        here = (*path, key)
        if path == ("stages",) and value is None and not top_origins.written[here].mark.fault:
            _leave_out(base, base_origins, key, top_origins, problems)
            continue
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _leave_behind(base[key], base_origins, value, here)
            _merge(base[key], base_origins, value, top_origins, here, problems)
            base_origins.written[here] = top_origins.written[here]
            continue
        base_origins.forget(here)
        base[key] = value
        base_origins.written |= {one: top_origins.written[one] for one in top_origins.inside(here)}


def _leave_out(base: dict[str, Any], base_origins: Origins, name: str, origins: Origins, problems: Problems) -> None:
    """Drop a stage that the recipe gives as null."""
    path = ("stages", name)
    if base.pop(name, None) is None:
        near = difflib.get_close_matches(name, base, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the stages there are {', '.join(base) or 'none'}"
        error = InputError(
            f"there is no stage `{name}` to leave out", place=origins.place(path, of_key=True), hint=hint
        )
        problems.add_error(error, origins.source, origins.written[path].mark.key)
    base_origins.forget(path)


def _leave_behind(base: dict[str, Any], base_origins: Origins, top: dict[str, Any], path: KeyPath) -> None:
    """Take out of data or a model what has no meaning beside the new keys."""
    excluded: dict[str, tuple[str, ...]] = {}
    if _is_data(path):
        excluded = EXCLUDED
    elif path[-1] == "eval_data":
        excluded = {"path": KEYS_TIED_TO_PATH}
    elif path == ("model",):
        excluded = {"path": ("revision",)}
    elif path[-1] == "launch":
        excluded = {"config_file": tuple(base)}  # another file says all of it anew
    elif len(path) == 2 and path[0] == "stages":
        excluded = {"reward": ("rewards",), "rewards": ("reward",)}
    for given, others in excluded.items():
        if given in top:
            for other in others:
                base.pop(other, None)
                base_origins.forget((*path, other))


def _is_data(path: KeyPath) -> bool:
    return path == ("evaluate", "data") or (len(path) == 3 and path[0] == "stages" and path[2] in DATA_KEYS)


def _write_out_short_forms(content: dict[str, Any], origins: Origins) -> None:
    """Make mappings of `data: FILE`, `data: [A, B]`, `eval_data: FILE`, and `launch: auto` or `launch: FILE`."""
    sections: list[tuple[Any, KeyPath, str]] = [(content.get("evaluate"), ("evaluate",), "data")]
    stages = content.get("stages")
    if isinstance(stages, dict):
        sections += [(stage, ("stages", name), key) for name, stage in stages.items() for key in DATA_KEYS]
    _write_out_launch(content, (), origins)
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        _write_out_launch(stage, ("stages", name), origins)
    for section, path, key in sections:
        if isinstance(section, dict):
            _write_out(section, key, (*path, key), origins)
            data = section.get(key)
            if isinstance(data, dict):
                _write_out(data, "eval_data", (*path, key, "eval_data"), origins)
                mix = data.get("mix")
                for i in range(len(mix) if isinstance(mix, list) else 0):
                    _write_out(mix, i, (*path, key, "mix", i), origins)


def _write_out_launch(section: Any, path: KeyPath, origins: Origins) -> None:
    value = section.get("launch") if isinstance(section, dict) else None
    if isinstance(value, str):
        key = "num_processes" if value == "auto" else "config_file"
        section["launch"] = {key: value}
        origins.move((*path, "launch"), (*path, "launch", key))


def _write_out(section: Any, key: Any, path: KeyPath, origins: Origins) -> None:
    value = section[key] if isinstance(key, int) else section.get(key)
    if isinstance(value, str):
        section[key] = {"path": value}
        origins.move(path, (*path, "path"))
    elif isinstance(value, list) and _is_data(path):
        section[key] = {"mix": value}
        origins.move(path, (*path, "mix"))


def _apply(override: str, content: dict[str, Any], origins: Origins, problems: Problems) -> None:
    """Write one `key=value` of the command line into the recipe's content."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w/-]+)*", key):
        problems.add_override(override, "an override has the form key=value", "for example ppo.trainer.kl_coef=0.1")
        return
    try:
        value = parse_value(text)
    except pyyaml.YAMLError:
        hint = "quote text that holds : or [ or begins with >"
        problems.add_override(override, f"{text!r} is not a YAML value", hint)
        return
    except InputError as error:
        problems.add_override(override, error.message, error.hint)
        return
    parts = key.split(".")
    stages = content.get("stages")
    if parts[0] not in Recipe.model_fields and isinstance(stages, dict) and parts[0] in stages:
        parts.insert(0, "stages")
    target: Any = content
    origin = Origin(origins.source, Mark((0, 0), (0, 0)), override)
    for i, part in enumerate(parts[:-1]):
        if target.get(part) is None:
            target[part] = {}
            origins.written[tuple(parts[: i + 1])] = origin
        if not isinstance(target[part], dict):
            problems.add_override(override, f"`{'.'.join(parts[: i + 1])}` has no keys below it")
            return
        target = target[part]
    target[parts[-1]] = value
    path = tuple(parts)
    origins.forget(path)
    origins.written |= dict.fromkeys(_paths(value, path), origin)
    _write_out_short_forms(content, origins)  # the next override may reach into it


def _paths(value: Any, path: KeyPath) -> list[KeyPath]:
    """The key paths of a value and all in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, item in inner for one in _paths(item, (*path, key)))]
