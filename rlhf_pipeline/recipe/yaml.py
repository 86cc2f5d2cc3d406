"""YAML as people mean it: `2e-5` is a number, `no` is a word, a key written twice is an error, `${VAR}` is looked up.

Beside the values, the place of every key and value is kept, so that each message can point at it.
"""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from rlhf_pipeline.errors import InputError, InputErrors

KeyPath = tuple[str | int, ...]
Position = tuple[int, int]
LIMIT = 100_000  # values in a document: aliases of aliases could expand to any number of them
VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\}|\$\{[^}]*\}?")


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


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """A `${` that is meant literally must not be looked up when it is read back."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text.replace("${", "$${"))


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class Fault:
    """What is wrong with one value, where the others can still be read.

    Attributes:
        path: the value's key path.
        position: line and column of the value, or of the key.
    """

    path: KeyPath
    position: Position
    message: str
    hint: str


@dataclass(frozen=True)
class Mark:
    """Where a value was written; lines and columns count from 1.

    Attributes:
        key: line and column of its key; of an item of a list, those of the item.
        value: line and column of the value itself.
        variables: the environment variables that it was made of.
        fault: why there is no value.
    """

    key: Position
    value: Position
    variables: tuple[str, ...] = ()
    fault: Fault | None = None


@dataclass
class Document:
    """What a YAML text says.

    Attributes:
        value: mappings, lists and scalars; None where a scalar could not be made.
        marks: the place of each key path.
        faults: what is wrong beside the values whose mark has a `fault`.
    """

    value: Any
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def all_faults(self) -> list[Fault]:
        """All that is wrong, in the order in which it is written."""
        of_values = [mark.fault for mark in self.marks.values() if mark.fault]
        return sorted([*self.faults, *of_values], key=lambda fault: fault.position)


def dump(value: Any) -> str:
    """Write a value so that `parse_document` reads the same one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline(value: Any) -> str:
    """Write a value on one line, so that `parse_document` reads the same one."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=True,
        default_style=style,
        allow_unicode=True,
        width=10**9,
    )
    return text.removesuffix("...\n").strip()


def shown(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_value(text: str) -> Any:
    """Read one YAML value, such as the right side of `key=value` on the command line. No variable is looked up.

    Raises:
        yaml.YAMLError: `text` is not YAML.
        InputError: it is YAML that no recipe can mean.
    """
    document = _Reader("", look_up=False).read(text)
    for fault in document.all_faults:
        raise InputError(fault.message, hint=fault.hint)
    return document.value


def parse_document(text: str, source: str) -> tuple[Any, dict[KeyPath, Mark]]:
    """Read a YAML document of which nothing may be wrong; `read_document` is the patient one.

    Args:
        text: the document.
        source: the file's name, for messages.

    Returns:
        The value, and the place of each key path in it.

    Raises:
        InputError: the text is not YAML, a mapping has a key twice or one that is no word, a value contains itself,
            or a variable has no value.
    """
    document = read_document(text, source)
    if document.all_faults:
        raise InputErrors([as_error(fault, source) for fault in document.all_faults])
    return document.value, document.marks


def read_document(text: str, source: str, *, look_up: bool = True) -> Document:
    """Read a YAML document as far as it can be read.

    Args:
        text: the document.
        source: the file's name, for messages.
        look_up: whether `${NAME}` is the variable of that name.

    Raises:
        InputError: nothing of it can be read: it is not YAML, a key is no plain word, or a value contains itself.
    """
    try:
        return _Reader(source, look_up=look_up).read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        hint = "check indentation, colons and quotes"
        if "another document" in str(error.problem):
            message = "a second document begins here"
            raise InputError(message, place=place, hint="a recipe is one document: remove `---`") from None
        if "\\t" in str(error.problem):
            hint = "indent with spaces, not tabs"
        elif "indentation indicators" in str(error.problem):  # a `>` begins folded text
            hint = 'a value that begins with > needs quotes, as ">= 0.65"'
        elif mark and _before(text, mark).endswith("$"):
            hint = (
                'between { } or [ ] a variable needs quotes, as "${NAME}", and is text then; '
                "where a number is meant, write the key on a line of its own"
            )
        raise InputError(f"this is not YAML: {error.problem}", place=place, hint=hint) from None
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        hint = "save the file as plain UTF-8 text"
        raise InputError(f"this is not YAML: {problem}", place=source, hint=hint) from None


def as_error(fault: Fault, source: str) -> InputError:
    """A fault with its place: file, line, column and key path."""
    key = ".".join(str(part) for part in fault.path)
    line, column = fault.position
    return InputError(fault.message, place=f"{source}:{line}:{column}: {key}", hint=fault.hint)


def _before(text: str, mark: yaml.Mark) -> str:
    """What is before a mark on its line."""
    lines = text.splitlines()
    return lines[mark.line][: mark.column] if mark.line < len(lines) else ""


class _Reader:
    """Makes values of one document's nodes, and keeps their places."""

    def __init__(self, source: str, *, look_up: bool) -> None:
        self.source = source
        self.look_up = look_up
        self.document = Document(None)

    def read(self, text: str) -> Document:
        self.loader = _Loader(text)
        node = self.loader.get_single_node()
        if node is not None:
            self.document.marks[()] = Mark(_position(node), _position(node))
            self.document.value = self.value(node, ())
        return self.document

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        line, column = _position(node)
        if len(path) > 50 or len(self.document.marks) > LIMIT:
            holds = "contains itself" if len(path) > 50 else "expands to too many values"
            raise InputError(f"this value {holds}", place=f"{self.source}:{line}:{column}", hint="remove the alias")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.document.marks[*path, i] = Mark(_position(item), _position(item))
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = _position(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                place = f"{self.source}:{position[0]}:{position[1]}"
                raise InputError("a key must be a plain word", place=place, hint="write `key: value`")
            key = key_node.value  # text, even where it looks like a number
            here = (*path, key)
            if key == "<<" and key_node.style is None:
                hint = "write the keys out, or build on another recipe with `extends`"
                self.document.faults.append(Fault(here, position, "YAML's merge key `<<` is not read", hint))
                continue
            if key in result:
                first = self.document.marks[here].key[0]
                message = f"the key `{key}` is written twice here, first on line {first}"
                self.document.faults.append(Fault(here, position, message, "keep one of them"))
                continue
            self.document.marks[here] = Mark(position, _position(value_node))
            result[key] = self.value(value_node, here)
        return result

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, tag, position = node.value, node.tag, _position(node)
        mark = self.document.marks[path]
        if self.look_up and "${" in text:
            variables: list[str] = []
            problems: list[tuple[str, str]] = []
            text = VARIABLE.sub(lambda match: _looked_up(match, variables, problems), text)
            fault = Fault(path, position, *problems[0]) if problems else None
            self.document.marks[path] = replace(mark, variables=tuple(dict.fromkeys(variables)), fault=fault)
            if fault:
                return None
            if node.style is None and tag == "tag:yaml.org,2002:str":  # plain: a number may have come of it
                tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))
        try:
            return _plain(tag, text, node.start_mark)
        except OverflowError:
            hint = "a number has at most 308 digits before the point"
            fault = Fault(path, position, f"`{text}` is too large a number", hint)
            self.document.marks[path] = replace(self.document.marks[path], fault=fault)
            return None


def _position(node: yaml.Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _looked_up(match: re.Match[str], variables: list[str], problems: list[tuple[str, str]]) -> str:
    """What replaces one `${...}`; notes its name, and what is wrong with it."""
    if match[0] == "$${":
        return "${"
    name, default = match["name"], match["default"]
    if name is None:
        hint = "write ${NAME} or ${NAME:-default}; $${ means ${ itself"
        problems.append((f"`{match[0]}` is not a variable", hint))
        return ""
    variables.append(name)
    value = os.environ.get(name)
    if default is not None:
        return value or default.removeprefix(":-")
    if value is None:
        problems.append(
            (f"the environment variable `{name}` is not set", f"set it, or give a default: ${{{name}:-default}}")
        )
    return value or ""


def _plain(tag: str, text: str, mark: yaml.Mark) -> Any:
    """A scalar's value.

    Raises:
        OverflowError: it is a number beyond all that a float can hold.
    """
    if tag == "tag:yaml.org,2002:float":
        number = float(text.replace("_", ""))
        if number in (float("inf"), float("-inf")):
            raise OverflowError
        return number
    if tag == "tag:yaml.org,2002:int":
        if len(text) > 400:
            raise OverflowError
        return int(text.replace("_", ""))  # `010` is ten, not eight
    constructor = yaml.constructor.SafeConstructor()
    return constructor.construct_object(yaml.ScalarNode(tag, text, mark), deep=True)
