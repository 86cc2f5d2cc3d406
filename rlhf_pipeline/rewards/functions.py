"""Rewards that are functions of the user's, called as TRL calls its reward functions."""

import asyncio
import copy
import functools
import inspect
import threading
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from rlhf_pipeline import user_code
from rlhf_pipeline.data.turns import as_text
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rewards.batch import Batch
from rlhf_pipeline.user_code import FunctionError

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
HINT = (
    "it gets `prompts`, `completions`, `completion_ids` and the data's other columns as keywords, as TRL's reward "
    "functions do, and returns a number for each reply, or None where it does not apply"
)


class Function:
    """A function of the user's, or any object that is called like one; also async.

    It gets these keywords as far as its parameters name them, or all of them with `**kwargs`: `prompts`, `completions`,
    `completion_ids` and the other columns of the rows, all as in a `Batch`; and what TRL gives beside them:
    `trainer_state`, of which `global_step` and `max_steps` are set; `log_metric(name, value)`, see `take_logged`; and
    `log_extra(column, values)`, which keeps nothing. A parameter that names a column which none of these rows has gets
    None for each, unless it has a default. What it gets is its own copy.

    Args:
        name: `module:function`.
        folders: the recipe's; see `user_code`.
        place: the key of the recipe that names it.

    Raises:
        InputError: it cannot be imported or is not a function.
    """

    def __init__(self, name: str, folders: Sequence[Path], place: str) -> None:
        self.name, self.place = name, place
        self.who = f"the reward function `{name}`"
        self.call = user_code.load(name, folders, place)
        self._logged: dict[str, list[float]] = defaultdict(list)

    def __call__(self, batch: Batch) -> list[float | None]:
        """The rewards of B replies: see `call_all`."""
        return call_all([self], batch)[0]

    def take_logged(self) -> dict[str, float]:
        """The means of what it has logged since this was last asked, by name."""
        found = {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        return found

    def require_columns(self, batch: Batch) -> None:
        """See that a batch has all that it wants.

        Raises:
            FunctionError: it wants a column that is not there.
        """
        if lacking := user_code.lacking(self.call, (*GIVEN, *batch.columns)):
            raise user_code.no_column(lacking, self.who, self.place)

    def _begin(self, batch: Batch) -> Any:
        """What it returns; of one that is async, what is to be awaited."""
        given: dict[str, Any] = copy.deepcopy(
            {
                **batch.columns,
                "prompts": list(batch.prompts),
                "completions": list(batch.completions),
                "completion_ids": list(batch.completion_ids),
            }
        )
        given["trainer_state"] = TrainerState(global_step=batch.step, max_steps=batch.max_steps)
        given["log_metric"] = lambda name, value: self._logged[name].append(float(value))
        given["log_extra"] = lambda column, values: None
        given |= {name: [None] * len(batch.prompts) for name in user_code.lacking(self.call, given)}
        given = user_code.taken(self.call, given, self.who, self.place)
        try:
            return self.call(**given)
        except (Exception, SystemExit) as error:  # a user's function may fail in any way
            raise self._failed(error) from error

    def _numbers(self, returned: Any, batch: Batch) -> list[float | None]:
        asked = [as_text(prompt) for prompt in batch.prompts]
        try:
            return user_code.numbers(returned, asked, self.who, self.place)
        except FunctionError:
            raise
        except (Exception, SystemExit) as error:  # a generator runs only now
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> FunctionError:
        line = user_code.line_of(error, self.call)
        did = "called" if isinstance(error, SystemExit) else "raised"
        said = f"{self.who} {did} {user_code.said(error)}"
        return FunctionError(f"{said} ({line})" if line else said, self.place)


def call_all(functions: Sequence[Function], batch: Batch) -> list[list[float | None]]:
    """The rewards that functions give the same replies: one after the other, and those that are async together.

    Args:
        functions: the functions.
        batch: B replies.

    Returns:
        For each function B finite numbers, or None where it does not apply.

    Raises:
        FunctionError: one raised something or called `sys.exit`, or returned something other than B finite numbers or
            None. What was raised is its cause.
    """
    returned: list[Any] = []
    try:
        for function in functions:
            returned.append(function._begin(batch))
    except FunctionError:
        for begun in filter(inspect.iscoroutine, returned):  # else Python warns that nobody awaited it
            begun.close()
        raise
    waiting = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
    if waiting:
        together = asyncio.run_coroutine_threadsafe(_together([returned[i] for i in waiting]), _loop())
        for i, (value, error) in zip(waiting, together.result(), strict=True):
            if error is not None:
                raise functions[i]._failed(error) from error
            returned[i] = value
    return [function._numbers(value, batch) for function, value in zip(functions, returned, strict=True)]


async def _together(waiting: Sequence[Awaitable[Any]]) -> list[tuple[Any, BaseException | None]]:
    """What each gives, or has raised; all are over then."""

    async def settled(one: Awaitable[Any]) -> tuple[Any, BaseException | None]:
        try:
            return await one, None
        except (Exception, SystemExit) as error:  # the latter would end the loop, and who waits would do so for ever
            return None, error

    return await asyncio.gather(*map(settled, waiting))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for as long as the process lives: a client that a function keeps belongs to the loop it began in.

    It runs in a thread of its own, since functions that are not async may run loops themselves.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def try_function(function: Function, batch: Batch) -> list[float | None]:
    """Call a function on a few rows of its data, as training will; returns what it does.

    Raises:
        InputError: it wants a column that the data do not have, fails, or returns something else than it should.
    """
    try:
        function.require_columns(batch)
        return function(batch)
    except FunctionError as error:
        raise InputError(f"on the first rows of `data`, {error}", place=function.place, hint=HINT) from None
