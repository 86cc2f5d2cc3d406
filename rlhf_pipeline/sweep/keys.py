"""What a sweep tries: `KEY=V1,V2,…` and `KEY=low..high` of the command line, and the runs that they make. No torch."""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.recipe import Recipe, content_of
from rlhf_pipeline.recipe.library_keys import keys as library_keys
from rlhf_pipeline.recipe.yaml import dump_inline, parse_value

NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})(?P<log>:log)?", re.ASCII)
NEARLY = re.compile(rf"{NUMBER}\.\..*|.*\.\.{NUMBER}(?::.*)?", re.ASCII)  # what can only be meant as one
OWN = ("name", "output_dir")  # keys that the sweep itself sets in every run
LONGEST_VALUE, LONGEST_NAME = 48, 180  # characters in the name of a run
MOST_CORNERS = 512


@dataclass(frozen=True)
class Listed:
    """A key with several values.

    Attributes:
        key: as in an override.
        written: the whole argument.
        values: at least two, all different.
    """

    key: str
    written: str
    values: tuple[Any, ...]

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values to check before anything trains: all."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A key with a range of numbers.

    Attributes:
        key: as in an override.
        written: the whole argument.
        low: the least value.
        high: the greatest.
        log: whether values are drawn evenly on a logarithmic scale.
        whole: whether both were written as whole numbers.
    """

    key: str
    written: str
    low: float
    high: float
    log: bool
    whole: bool

    @property
    def corners(self) -> tuple[float, ...]:
        """The values to check before anything trains: the two ends."""
        return (self.low, self.high)


Swept = Listed | Range


@dataclass(frozen=True)
class Combination:
    """The values of one run.

    Attributes:
        name: the run's, which says its values.
        values: of each swept key.
    """

    name: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(overrides(self.values))


def parse(words: Sequence[str]) -> tuple[list[Swept], list[str]]:
    """Read the arguments of a sweep.

    Args:
        words: `KEY=V1,V2,…`, `KEY=low..high`, `KEY=low..high:log`, or `KEY=VALUE` for all runs alike.

    Returns:
        The swept keys, and the overrides that hold for all runs.

    Raises:
        InputError: for all that is wrong with the words themselves, or because none has several values.
    """
    swept: list[Swept] = []
    fixed: list[str] = []
    problems: list[InputError] = []
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        try:
            if not equals or not key:
                raise InputError(
                    "an argument has the form KEY=V1,V2,… or KEY=low..high",
                    hint="for example ppo.trainer.kl_coef=0.01,0.1,1.0",
                )
            if key in seen:
                raise InputError(f"`{key}` is given twice", hint="write all its values in one argument")
            seen.add(key)
            found = _read(key, word, text.strip())
            if found is None:
                fixed.append(word)
            elif key in OWN:
                raise InputError(f"`{key}` cannot be swept", hint="every run of a sweep is named after its values")
            else:
                swept.append(found)
        except InputError as error:
            problems.append(InputError(error.message, place=f"override `{word}`", hint=error.hint))
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    if not swept:
        raise InputError(
            "there is nothing to sweep: no key has several values",
            hint="for example ppo.trainer.kl_coef=0.01,0.1,1.0, or ppo.trainer.kl_coef=0.01..1:log",
        )
    return swept, fixed


def _read(key: str, word: str, text: str) -> Swept | None:
    """The swept key of an argument; None where it has one value, which then is an override like any other."""
    found = RANGE.fullmatch(text)
    if found:
        return _range(key, word, found)
    if "," not in text:
        if NEARLY.fullmatch(text) and "/" not in text:
            raise InputError(f"{text!r} is no range", hint="a range is low..high or low..high:log, with two numbers")
        if not text:
            raise InputError("no value is given", hint="for example 0.01,0.1,1.0")
        return None
    try:
        values = parse_value(f"[{text}]")
    except (yaml.YAMLError, InputError):
        values = None
    if not isinstance(values, list) or text.endswith(","):
        raise InputError(f"{text!r} is no list of values", hint="values stand between commas: 0.01,0.1,1.0")
    if len(values) == 1:
        return None
    for i, value in enumerate(values):
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values[:i]):
            message = f"the value {as_text(value)} is given twice"
            raise InputError(message, hint="each value makes a run: give it once")
    return Listed(key, word, tuple(values))


def _range(key: str, word: str, found: re.Match[str]) -> Range:
    low, high, log = float(found["low"]), float(found["high"]), found["log"] is not None
    whole = all(re.fullmatch(r"[-+]?\d+", found[end]) for end in ("low", "high"))
    if low >= high:
        raise InputError(
            f"the range begins at {found['low']} and ends at {found['high']}", hint="write the smaller number first"
        )
    if log and low <= 0:
        raise InputError(
            f"a logarithmic range cannot begin at {found['low']}", hint="begin it above 0, or leave out `:log`"
        )
    return Range(key, word, int(low) if whole else low, int(high) if whole else high, log, whole)


def as_text(value: Any) -> str:
    """A value as an override has it, a number in one way however it was written."""
    if not isinstance(value, float):
        return dump_inline(value)
    short = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    short = short.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return short if "." in short or "e" in short else f"{short}.0"  # 1 and 1.0 are not the same in a recipe


def grid(swept: Sequence[Swept]) -> list[dict[str, Any]]:
    """All combinations of values, those of the first key's first value first; of ranges, of their ends."""
    product = itertools.product(*(one.corners for one in swept))
    few = itertools.islice(product, MOST_CORNERS if any(isinstance(one, Range) for one in swept) else None)
    return [dict(zip((one.key for one in swept), values, strict=True)) for values in few]


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as `run` takes them."""
    return [f"{key}={as_text(value)}" for key, value in values.items()]


def combination(values: Mapping[str, Any], words: Mapping[str, str]) -> Combination:
    """The run with some values, and its name: the same one in every sweep of the recipe."""
    name = "_".join(f"{words[key]}-{_in_a_name(value)}" for key, value in values.items())
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{_digest(name)}"
    return Combination(name, dict(values))


def words_for(swept: Sequence[Swept], recipe: Recipe) -> dict[str, str]:
    """The word for each swept key in the names of runs: its last part, with its stage where others have that key too.

    It depends on the recipe alone, so that sweeps over different keys cannot give two runs one name.
    """
    known = _keys_of(recipe)
    return {one.key: _word(one.key, known).replace("/", "_") for one in swept}


def _word(key: str, known: Collection[str]) -> str:
    parts = key.split(".")
    first, last = parts[0], parts[-1]
    alike = [other for other in known if other != key and other.split(".")[-1] == last]
    if not alike or key == last:
        return last
    return key if any(other.split(".")[0] == first for other in alike) else f"{first}.{last}"


def _keys_of(recipe: Recipe) -> set[str]:
    """Every key that a recipe has, or could have in `trainer`; those of a stage begin with its name."""
    content = content_of(recipe)
    stages = content.pop("stages")
    found = set(_flat(content)) | set(_flat(stages))
    for name, stage in recipe.stages.items():
        found |= {f"{name}.trainer.{key}" for key in library_keys(stage.kind)}
    return found


def _flat(content: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in content.items():
        found += [f"{above}{key}", *(_flat(value, f"{above}{key}.") if isinstance(value, dict) else [])]
    return found


def _in_a_name(value: Any) -> str:
    text = as_text(value)
    clean = re.sub(r"[^\w.-]+", "_", text).strip("_")
    if clean == text and len(clean) <= LONGEST_VALUE:
        return clean
    return f"{clean[-LONGEST_VALUE:]}-{_digest(text)}".lstrip("-._")


def _digest(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:6]
