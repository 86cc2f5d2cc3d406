"""Functions of the user's, named `module:function`: judges, and what rewards replies. No torch.

A module is looked for in the installed packages, then beside the files of the recipe that name one, then in the current
folder.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import InputError

LARGEST = 3.4028234e38  # of the numbers that 32 bits hold


class FunctionError(Exception):
    """A function of the user's did, or gave, what it may not; the message says so in one sentence.

    Args:
        message: the sentence.
        place: the key of the recipe that names the function.
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


def load(name: str, folders: Sequence[Path], place: str) -> Callable[..., Any]:
    """Import `module:function`.

    Args:
        name: of module and function; the latter may be any object that can be called.
        folders: `Recipe.folders`.
        place: the key of the recipe that names it.

    Raises:
        InputError: it cannot be imported or is not a function.
    """
    module_name, _, function_name = name.partition(":")
    for folder in (*folders, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        raise InputError(
            f"`{module_name}` cannot be imported: {said(error)}",
            place=place,
            hint="put the module beside the recipe, in the current folder, or install it",
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"module `{module_name}` has no function `{function_name}`", place=place, hint=f"it is {module.__file__}"
        )
    return function


def source(name: str, folders: Sequence[Path]) -> Path | None:
    """The file that `load` would import; nothing is imported. None where there is none to be found.

    Args:
        name: `module:function`.
        folders: `Recipe.folders`.
    """
    here = Path.cwd()
    search = [entry for entry in sys.path if Path(entry).resolve() != here]
    search += [*map(str, folders), str(here)]
    importlib.invalidate_caches()
    top, *inner = name.partition(":")[0].split(".")
    found = (finder.find_spec(top, search) for finder in sys.meta_path)
    spec = next((one for one in found if one), None)
    if spec is None:
        return None
    files = [Path(spec.origin)] if spec.has_location and spec.origin else []
    if inner:
        inside = [Path(location).joinpath(*inner) for location in spec.submodule_search_locations or []]
        files = [file for folder in inside for file in (folder / "__init__.py", folder.with_suffix(".py"))]
    return next((file for file in files if file.is_file()), None)


def columns(rows: Sequence[Mapping[str, Any]], replaced: Collection[str]) -> dict[str, list[Any]]:
    """The columns of rows that functions get: each a list with a value of every row, None where a row lacks it.

    Args:
        rows: the rows.
        replaced: the columns that are not given, since other keywords have what is in them.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in replaced)
    return {name: [row.get(name) for row in rows] for name in names}


def taken(function: Callable[..., Any], given: dict[str, Any], who: str, place: str) -> dict[str, Any]:
    """Of the keywords that there are for a function, those that its parameters take.

    Args:
        function: the function.
        given: what there is, by name.
        who: names it in a sentence.
        place: the key of the recipe that names it.

    Raises:
        FunctionError: it wants more.
    """
    if wanted := lacking(function, given):
        raise no_column(wanted, who, place)
    parameters = _parameters(function)
    if parameters is None or any(one.kind is one.VAR_KEYWORD for one in parameters):
        return given
    return {one.name: given[one.name] for one in parameters if one.name in given}


def lacking(function: Callable[..., Any], given: Collection[str]) -> list[str]:
    """The parameters without which a function cannot be called, and which are not among those that are given."""
    positional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = (one for one in _parameters(function) or () if one.kind not in positional)
    return [one.name for one in named if one.default is one.empty and one.name not in given]


def no_column(names: Sequence[str], who: str, place: str) -> FunctionError:
    """What to say of a function that wants columns which are not there."""
    return FunctionError(f"{who} wants `{'`, `'.join(names)}`, and the data have no such column", place)


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter] | None:
    try:
        return [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # of something that is called and has none, as some built in C
        return None


def numbers(returned: Any, asked: Sequence[str], who: str, place: str) -> list[float | None]:
    """What a function returned, as numbers.

    Args:
        returned: a list, or whatever gives one after the other, as an array, a tensor and a generator do, of numbers,
            booleans, or None; also those of NumPy and PyTorch.
        asked: the prompt of each reply, as text.
        who: names the function in a sentence.
        place: the key of the recipe that names it.

    Returns:
        A finite number that fits in 32 bits for each reply, or None.

    Raises:
        FunctionError: it is something else. What a generator raises is raised here.
    """
    if not hasattr(returned, "__iter__") or isinstance(returned, str | bytes | Mapping | Set):
        raise FunctionError(f"{who} returned {_short(returned)}, not a list of numbers", place)
    values = list(returned)
    if len(values) != len(asked):
        count = f"{len(values)} number{'s' * (len(values) != 1)}"
        raise FunctionError(f"{who} returned {count} for {len(asked)} replies", place)
    found = []
    for row, (value, prompt) in enumerate(zip(values, asked, strict=True), 1):
        number = _number(value)
        if number is not None and not abs(number) <= LARGEST:
            about = f"for reply {row}, to the prompt {prompt[:60]!r}"
            raise FunctionError(f"{who} returned {_short(value)} {about}: it is no finite number", place)
        found.append(number)
    return found


def _number(value: Any) -> float | None:
    """A number; NaN for what is none. `float` reads text, too, which is no number here."""
    try:
        return None if value is None else float("nan" if isinstance(value, str | bytes) else value)
    except (OverflowError, TypeError, ValueError, RuntimeError):  # the last one is PyTorch's
        return float("nan")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def said(error: BaseException) -> str:
    """What a user's code raised, in a few words; of `sys.exit`, the call."""
    if isinstance(error, SystemExit):
        return f"sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"


def line_of(error: BaseException, function: Callable[..., Any]) -> str | None:
    """`file.py:LINE` where a function's own module was when something was raised; None where that is not known."""
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    file = getattr(module, "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}:{lines[-1]}" if file and lines else None
