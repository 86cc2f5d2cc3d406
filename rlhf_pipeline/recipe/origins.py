"""Where each value of a recipe was written, and what is wrong with it there."""

import re
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.recipe.yaml import Fault, KeyPath, Mark, Position


@dataclass(frozen=True)
class Source:
    """A recipe's file.

    Attributes:
        name: the file as messages show it.
        folder: the folder that relative paths in it start from.
        level: how often `extends` led to it; 0 for the recipe itself.
        at: of a file that is no recipe, the key path that its content has in the recipe.
    """

    name: str
    folder: Path
    level: int = 0
    at: KeyPath = ()


@dataclass(frozen=True)
class Origin:
    """Where a value was written: in a file, or as an override on the command line."""

    source: Source
    mark: Mark
    override: str | None = None


class Origins:
    """The origin of each key path of a recipe.

    Attributes:
        source: the recipe's own file.
        written: the origin of what was written.
        derived: of what was not, how it came about, where that is no plain default.
        repeated: of each stage of a round, the stage that was written.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.written: dict[KeyPath, Origin] = {}
        self.derived: dict[KeyPath, str] = {}
        self.repeated: dict[str, str] = {}

    def inside(self, path: KeyPath) -> list[KeyPath]:
        """A key path, and all below it, where they were written."""
        return [one for one in self.written if one[: len(path)] == path]

    def forget(self, path: KeyPath) -> None:
        """Take back a value with all below it."""
        for one in self.inside(path):
            del self.written[one]

    def move(self, path: KeyPath, to: KeyPath) -> None:
        """Note that what was written at a path is now at another one below it."""
        moved = {(*to, *one[len(path) :]): self.written[one] for one in self.inside(path)}
        above = self.written[path]
        self.forget(path)
        self.written |= {path: above, **moved}

    def copy(self, path: KeyPath, to: KeyPath) -> None:
        """Note that what was written at a path is now at another one, too."""
        self.written |= {(*to, *one[len(path) :]): self.written[one] for one in self.inside(path)}

    def as_written(self, text: str) -> str:
        """A text in which the stages of rounds have the names that were written."""
        names = "|".join(map(re.escape, self.repeated))
        return re.sub(rf"(?<![\w-])(?:{names})(?![\w-])", lambda one: self.repeated[one[0]], text) if names else text

    def folder(self, path: KeyPath) -> Path:
        """The folder that a relative path starts from."""
        return self.nearest(path)[0].source.folder

    def nearest(self, path: KeyPath) -> tuple[Origin, bool]:
        """The origin of a value, or of the nearest enclosing one that was written; and whether it is its own."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.written:
                return self.written[path[:end]], end == len(path)
        return Origin(self.source, Mark((0, 0), (0, 0))), False

    def place(self, path: KeyPath, *, of_key: bool = False) -> str:
        """The place of a value as messages show it: file, line, column and key path; or the override."""
        origin, own = self.nearest(path)
        if origin.override is not None:
            return f"override `{origin.override}`"
        key = self.as_written(".".join(str(part) for part in path[len(origin.source.at) :]))
        line, column = self._position(origin, own, of_key)
        where = f"{origin.source.name}:{line}:{column}" if line else origin.source.name
        return f"{where}: {key}" if key else where

    def order(self, path: KeyPath, *, of_key: bool = False) -> tuple[int, Position]:
        """Sorts places as they are written: the recipe's, those of what it extends, overrides."""
        origin, own = self.nearest(path)
        return (1_000, (0, 0)) if origin.override else (origin.source.level, self._position(origin, own, of_key))

    def _position(self, origin: Origin, own: bool, of_key: bool) -> Position:
        return origin.mark.value if own and not of_key else origin.mark.key


class Problems:
    """All that is wrong with a recipe.

    A value that is known to be wrong is `broken`: what else seems wrong at it, or below it, only follows from that.
    What is wrong with a stage that is repeated is said once, by the name that was written.
    """

    def __init__(self, origins: Origins) -> None:
        self.origins = origins
        self._found: list[tuple[tuple[int, Position], InputError]] = []
        self._broken: set[KeyPath] = set()

    def add(self, path: KeyPath, message: str, hint: str | None = None, *, of_key: bool = False) -> None:
        """Note what is wrong with a value, unless it is known to be broken, and break it.

        Args:
            path: its key path; where nothing was written there, the place is that of the nearest key above.
            message: what is wrong.
            hint: what to do about it.
            of_key: whether the place is that of the key, not of the value.
        """
        if self.is_broken(path):
            return
        origin, own = self.origins.nearest(path)
        if own and origin.mark.variables and not origin.mark.fault and not of_key:
            message += f" (from {', '.join(f'${{{name}}}' for name in origin.mark.variables)})"
        message, hint = self.origins.as_written(message), hint and self.origins.as_written(hint)
        error = InputError(message, place=self.origins.place(path, of_key=of_key), hint=hint)
        self._found.append((self.origins.order(path, of_key=of_key), error))
        self.break_(path)

    def add_error(self, error: InputError, source: Source, position: Position = (0, 0)) -> None:
        """Note what has a place of its own already."""
        self._found.append(((source.level, position), error))

    def add_fault(self, fault: Fault, source: Source) -> None:
        """Note what is wrong with a document."""
        place = f"{source.name}:{fault.position[0]}:{fault.position[1]}: {'.'.join(map(str, fault.path))}"
        self.add_error(InputError(fault.message, place=place, hint=fault.hint), source, fault.position)

    def add_override(self, override: str, message: str, hint: str | None = None) -> None:
        """Note what is wrong with an override that could not be applied."""
        error = InputError(message, place=f"override `{override}`", hint=hint)
        self._found.append(((1_000, (0, 0)), error))

    def break_(self, path: KeyPath) -> None:
        """Note that a value cannot be relied on, without a message of its own."""
        self._broken.add(path)

    def is_broken(self, path: KeyPath) -> bool:
        """Whether a value, or one that it is part of, is known to be wrong."""
        return any(path[:end] in self._broken for end in range(len(path) + 1))

    def within(self, path: KeyPath) -> bool:
        """Whether a value, one that it is part of, or one that is part of it, is known to be wrong."""
        return self.is_broken(path) or any(one[: len(path)] == path for one in self._broken)

    def raise_if_any(self) -> None:
        """End here if anything was found.

        Raises:
            InputError: all that was found, in the order in which it is written.
        """
        found = [error for _, error in sorted(self._found, key=lambda one: one[0])]
        if found:
            raise found[0] if len(InputErrors(found).all) == 1 else InputErrors(found)
