"""YAML as people mean it: `2e-5` is a number, `no` is a word, a key written twice is an error.

Beside the values, the line of every key is kept, so that each message can point at the place.
"""

import re
from typing import Any

import yaml

from rlhf_pipeline.errors import InputError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 (PyYAML reads 1.1: `2e-5` a string, `no` a boolean)."""


_Loader.yaml_implicit_resolvers = {}  # none of the 1.1 resolvers: those below are all there are
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    None,
)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, quoting what the loader above would read as something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump(value: Any) -> str:
    """Write a value so that `parse_document` reads the same one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_value(text: str) -> Any:
    """Read one YAML value, such as the right side of `key=value` on the command line.

    Raises:
        yaml.YAMLError: `text` is not YAML.
    """
    return _value(_Loader(text).get_single_node(), (), {}, "")


def parse_document(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Read a YAML document.

    Args:
        text: the document.
        source: the file's name, for messages.

    Returns:
        The value, and the line (from 1) of each key path in it.

    Raises:
        InputError: the text is not YAML, a key stands twice in one mapping or is no plain word, or a value holds
            itself.
    """
    lines: dict[KeyPath, int] = {}
    try:
        node = _Loader(text).get_single_node()
        return _value(node, (), lines, source), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        hint = "check indentation, colons and quotes"
        if "\\t" in str(error.problem):
            hint = "indent with spaces, not tabs"
        elif "indentation indicators" in str(error.problem):  # a `>` begins folded text
            hint = 'a value that begins with > needs quotes, as ">= 0.65"'
        raise InputError(f"this is not YAML: {error.problem}", place=place, hint=hint) from None
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        hint = "save the file as plain UTF-8 text"
        raise InputError(f"this is not YAML: {problem}", place=source, hint=hint) from None


def _value(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Any:
    if node is None:
        return None
    lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > 50:  # an anchor that is used inside itself
        raise InputError(
            "this value holds itself", place=f"{source}:{node.start_mark.line + 1}", hint="remove the alias"
        )
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError("a key must be a plain word", place=f"{source}:{line}", hint="write `key: value`")
            key = _scalar(key_node)
            if key in result:
                first = lines[(*path, key)]
                raise InputError(
                    f"the key `{key}` stands twice here, first on line {first}",
                    place=f"{source}:{line}",
                    hint="keep one of them",
                )
            lines[(*path, key)] = line
            result[key] = _value(value_node, (*path, key), lines, source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, i), lines, source) for i, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:float":
        return float(node.value.replace("_", ""))
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int":
        return int(node.value.replace("_", ""))  # `010` is ten, not eight
    constructor = yaml.constructor.SafeConstructor()
    return constructor.construct_object(node, deep=True)
