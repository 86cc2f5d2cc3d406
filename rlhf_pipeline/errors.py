"""The ways a command can end early."""

from collections.abc import Sequence


class InputError(Exception):
    """Something the user wrote or pointed to is wrong; the command exits with 2.

    Args:
        message: one sentence that says what is wrong.
        place: where: a file, a file and line, or a key of the recipe.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, place: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message

    @property
    def all(self) -> "list[InputError]":
        """Everything that was found wrong; of a single fault, itself."""
        return [self]


class ColumnsError(InputError):
    """The columns of data are not those that are needed; the place is a file, or what else the rows come from.

    Args:
        message: see `InputError`.
        place: see `InputError`.
        hint: see `InputError`.
        ways: where the columns can be read in more ways than one, how to say which: new names for columns, names that
            are expected with those that they have, and what that does.
    """

    def __init__(
        self,
        message: str,
        *,
        place: str | None = None,
        hint: str | None = None,
        ways: Sequence[tuple[dict[str, str], str]] = (),
    ) -> None:
        super().__init__(message, place=place, hint=hint)
        self.ways = ways

    def in_recipe(self, place: str) -> InputError:
        """The same with the place in a recipe that the data are for."""
        return InputError(f"{self.place}: {self.message}", place=place, hint=self.hint)


class InputErrors(InputError):  # noqa: N818  it is several
    """Several things are wrong; the first one is used where only one can be shown.

    Args:
        errors: what was found, in the order in which to show it; at least one. What was found twice is shown once: two
            stages may share their data, and so its faults.
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        super().__init__(errors[0].message, place=errors[0].place, hint=errors[0].hint)
        self.errors = list({str(inner): inner for error in errors for inner in error.all}.values())

    @property
    def all(self) -> list[InputError]:
        """Everything that was found wrong."""
        return self.errors


class RunError(Exception):
    """A run that was sound on paper failed; the command exits with 1.

    Args:
        message: what happened, in one sentence; further lines may quote a log.
        hint: what is safe and what to do next.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Interrupted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has; the command exits with 130.

    Args:
        message: how far it is, in one sentence.
        then: what the same command does after that, in one sentence.
        at_once: it was asked twice, and nothing more is to be done before the command ends.
    """

    def __init__(
        self, message: str, *, then: str = "the same command resumes from here", at_once: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.then = then
        self.at_once = at_once


class Waiting(Exception):  # noqa: N818  it is no error
    """The run has come to a stage that people do, who are not done; the command exits with 3.

    Args:
        message: how far they are, in one sentence.
        hint: how they go on.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
