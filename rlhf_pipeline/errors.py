"""The ways a command can end early."""


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
        message: where it stands, in one sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
