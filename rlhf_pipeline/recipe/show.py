"""The resolved recipe with the origin of every value: a place in a file, an override, a default."""

import textwrap
from pathlib import Path
from typing import Any

from rlhf_pipeline.recipe import content_of, library_keys
from rlhf_pipeline.recipe.origins import Origins
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.recipe.yaml import KeyPath, dump_inline

WIDEST = 72  # columns up to which the origins are aligned; beyond a longer value they follow it
WIDTH = 110  # columns of the lines with the libraries' defaults
LIBRARIES = {"transformers": "Transformers", "trl": "TRL", "peft": "PEFT", "rlhf_pipeline": "rlhf-pipeline"}


def as_yaml(recipe: Recipe, origins: Origins) -> str:
    """YAML that loads to the same recipe, with each value's origin in a comment.

    What the libraries do by default where the recipe says nothing stands in comments below `lora` and `trainer`.
    """
    lines: list[tuple[str, str]] = []
    _write(content_of(recipe), (), "", origins, lines, library_defaults(recipe))
    width = max((len(text) for text, origin in lines if origin and len(text) <= WIDEST), default=0)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def as_json(recipe: Recipe, origins: Origins) -> dict[str, Any]:
    """The recipe, the origin of each value by its dotted key path, and the libraries' defaults likewise."""
    content = content_of(recipe)
    said = {".".join(map(str, path)): origin_of(path, origins) for path in _leaves(content, ())}
    by_path = {
        ".".join((*map(str, path), name)): {"value": key.default, "from": key.package}
        for path, keys in library_defaults(recipe).items()
        for name, key in keys.items()
    }
    return {"recipe": content, "origins": said, "library_defaults": by_path}


def library_defaults(recipe: Recipe) -> dict[KeyPath, dict[str, library_keys.Key]]:
    """What the libraries do where the recipe says nothing, as far as it decides a result; by the path of `trainer`."""
    found: dict[KeyPath, dict[str, library_keys.Key]] = {("lora",): library_keys.defaults("lora", recipe.lora)}
    for name, stage in recipe.stages.items():
        found["stages", name, "trainer"] = library_keys.defaults(stage.kind, stage.trainer, stage.data.holds_out)
    return found


def origin_of(path: KeyPath, origins: Origins) -> str:
    """Where a value comes from, such as `recipe.yaml:12`, `override`, `default`, `from sft`."""
    origin = origins.written.get(path)
    if origin is None:
        return origins.derived.get(path, "default")
    if origin.override is not None:
        return "override"
    place = f"{_short(origin.source.name, origins)}:{origin.mark.value[0]}"
    return ", ".join([place, *(f"${{{name}}}" for name in origin.mark.variables)])


def _short(name: str, origins: Origins) -> str:
    """A file's name, with its folder only where another file is called the same."""
    called_so = {one.source.name for one in origins.written.values() if Path(one.source.name).name == Path(name).name}
    return Path(name).name if len(called_so) == 1 else name


def _is_leaf(value: Any) -> bool:
    """Whether a value is written on one line: no mapping with keys, and no list of mappings."""
    if isinstance(value, list):
        return not any(isinstance(item, dict) for item in value)
    return not value if isinstance(value, dict) else True


def _leaves(value: Any, path: KeyPath) -> list[KeyPath]:
    if _is_leaf(value):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]


def _write(
    value: Any,
    path: KeyPath,
    indent: str,
    origins: Origins,
    lines: list[tuple[str, str]],
    defaults: dict[KeyPath, dict[str, library_keys.Key]],
) -> None:
    """Add the lines of a mapping, or of a list of mappings."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        here = (*path, key)
        head = f"{indent}{dump_inline(key)}:" if isinstance(value, dict) else f"{indent}-"
        if _is_leaf(item):
            lines.append((f"{head} {dump_inline(item)}", origin_of(here, origins)))
        elif isinstance(value, list):
            first = len(lines)
            _write(item, here, f"{indent}  ", origins, lines, defaults)
            lines[first] = (f"{head} {lines[first][0].lstrip()}", lines[first][1])
        else:
            if not path or path == ("stages",):
                lines.append(("", ""))
            lines.append((head, ""))
            _write(item, here, f"{indent}  ", origins, lines, defaults)
        lines += [(line, "") for line in _comments(defaults.get(here, {}), f"{indent}  ")]


def _comments(keys: dict[str, library_keys.Key], indent: str) -> list[str]:
    """Lines with the libraries' defaults, one paragraph for each library."""
    lines = []
    for package, library in LIBRARIES.items():
        said = [f"{name}:\0{dump_inline(key.default)}" for name, key in keys.items() if key.package == package]
        if said:
            wrapped = textwrap.wrap(
                f"default in {library}: {', '.join(said)}",
                WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines += [line.replace("\0", " ") for line in wrapped]  # no line ends between a key and its value
    return lines
