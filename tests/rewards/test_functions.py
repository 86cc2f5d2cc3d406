"""Reward functions: what they get, how they are called, what they may return, and what is said where they fail."""

import asyncio
import functools
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoTokenizer

from rlhf_pipeline.data.encode import row_of
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.ppo.numbers import concatenated, of_rewards
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.rewards.batch import Batch
from rlhf_pipeline.rewards.functions import Function, call_all, try_function
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.user_code import FunctionError

PLACE = "stages.ppo.rewards.0.function"
TEXTS = Batch(["a", "b"], [" x", " yy"], [[5], [6, 7]], {"answer": ["x", "y"]}, step=3, max_steps=10)
CHATS = Batch(
    [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
    [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "yy"}]],
    [[5], [6, 7]],
    {},
    step=0,
)


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Function]:
    """Make a reward of some source, with a function `reward`, or of an object that is there already."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    def made(what: Any) -> Function:
        if isinstance(what, str):
            (tmp_path / "my_rewards.py").write_text(what)
            monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
            return Function("my_rewards:reward", [tmp_path], PLACE)
        monkeypatch.setattr(sys.modules[__name__], "reward", what, raising=False)
        return Function(f"{__name__}:reward", [tmp_path], PLACE)

    return made


def test_one_written_for_trl_gets_what_trl_gives(function: Callable[[Any], Function]) -> None:
    given: dict[str, Any] = {}

    def keeps(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        given.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_metric"]("length", 2)
        kwargs["log_extra"]("note", ["", ""])
        return [0.0] * len(prompts)

    reward = function(keeps)
    assert reward(TEXTS) == [0.0, 0.0]
    state = given.pop("trainer_state")
    assert (state.global_step, state.max_steps) == (3, 10)
    assert {name: given[name] for name in ("prompts", "completions", "completion_ids", "answer")} == {
        "prompts": ["a", "b"], "completions": [" x", " yy"], "completion_ids": [[5], [6, 7]], "answer": ["x", "y"]
    }  # fmt: skip
    assert given.keys() == {"prompts", "completions", "completion_ids", "answer", "log_metric", "log_extra"}
    assert (reward.take_logged(), reward.take_logged()) == ({"length": 2.0}, {})
    reward(CHATS)
    assert (given["prompts"], given["completions"]) == (CHATS.prompts, CHATS.completions)


class Object:
    """What is called and is no function."""

    def __call__(self, completions: list[str], missing: float = 0.25) -> list[float]:
        return [missing] * len(completions)


class AsyncObject:
    """The same, async: nothing but what calling it returns says so."""

    async def __call__(self, completions: list[str]) -> list[float]:
        return [1.0] * len(completions)


async def lengths(completions: list[str], factor: float = 1.0) -> list[float | None]:
    await asyncio.sleep(0)
    return [factor * len(one) for one in completions]


@pytest.mark.parametrize(
    ("returns", "rewards"),
    [
        (lambda completions: [len(one) for one in completions], [2.0, 3.0]),
        (lambda answer, **_: [one == "x" for one in answer], [1.0, 0.0]),
        (lambda **_: [None, 0.5], [None, 0.5]),
        (lambda **_: (0.5, -1), [0.5, -1.0]),
        (lambda **_: (one for one in (1, 2)), [1.0, 2.0]),
        (lambda **_: numpy.array([0.5, 1.5]), [0.5, 1.5]),
        (lambda **_: [numpy.float32(0.5), numpy.bool_(True)], [0.5, 1.0]),
        (lambda **_: torch.tensor([0.5, 2.0]), [0.5, 2.0]),
        (lambda **_: [torch.tensor(0.5), Decimal("0.25")], [0.5, 0.25]),
        (lambda step=9, **_: [step, step], [9.0, 9.0]),
        (lambda trainer_state: [trainer_state.global_step] * 2, [3.0, 3.0]),
        (Object(), [0.25, 0.25]),
        (AsyncObject(), [1.0, 1.0]),
        (lengths, [2.0, 3.0]),
        (functools.partial(lengths, factor=2.0), [4.0, 6.0]),
    ],
)
def test_what_counts_as_rewards(function: Callable[[Any], Function], returns: Any, rewards: list[float | None]) -> None:
    assert function(returns)(TEXTS) == rewards


async def ends(**_: Any) -> list[float]:
    sys.exit(3)


def of_a_set(**_: Any) -> Any:
    return {1.0, 2.0}


WHO = f"the reward function `{__name__}:reward`"


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        (lambda **_: [1.0], f"{WHO} returned 1 number for 2 replies"),
        (lambda **_: [1.0, 2.0, 3.0], f"{WHO} returned 3 numbers for 2 replies"),
        (lambda **_: None, f"{WHO} returned None, not a list of numbers"),
        (lambda **_: 0.5, f"{WHO} returned 0.5, not a list of numbers"),
        (lambda **_: "01", f"{WHO} returned '01', not a list of numbers"),
        (lambda **_: {"a": 1, "b": 2}, f"{WHO} returned {{'a': 1, 'b': 2}}, not a list of numbers"),
        (of_a_set, f"{WHO} returned {{1.0, 2.0}}, not a list of numbers"),
        (lambda **_: [1.0, "0.5"], f"{WHO} returned '0.5' for reply 2, to the prompt 'b': it is no finite number"),
        (lambda **_: [b"1", 1], f"{WHO} returned b'1' for reply 1, to the prompt 'a': it is no finite number"),
        (lambda **_: [math.nan, 1], f"{WHO} returned nan for reply 1, to the prompt 'a': it is no finite number"),
        (lambda **_: [1, -math.inf], f"{WHO} returned -inf for reply 2, to the prompt 'b': it is no finite number"),
        (lambda **_: [1, 1e39], f"{WHO} returned 1e+39 for reply 2, to the prompt 'b': it is no finite number"),
        (lambda **_: [1, 10**400], f"{WHO} returned 1{'0' * 76}... for reply 2, to the prompt 'b': it is no finite"),
        (lambda **_: [[1.0], [2.0]], f"{WHO} returned [1.0] for reply 1, to the prompt 'a': it is no finite number"),
        (lambda **_: torch.ones(2, 3), f"{WHO} returned tensor([1., 1., 1.]) for reply 1, to the prompt 'a': it is no"),
        (ends, f"{WHO} called sys.exit(3)"),
        (lambda **_: sys.exit(), f"{WHO} called sys.exit()"),
    ],
)
def test_what_is_no_reward_is_said(function: Callable[[Any], Function], returns: Any, said: str) -> None:
    reward = function(returns)
    with pytest.raises(FunctionError) as caught:
        reward(TEXTS)
    assert str(caught.value).startswith(said)
    assert caught.value.place == PLACE


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def reward(completions):\n    return [int(one) for one in completions]", 2),
        ("async def reward(completions):\n    return [int(one) for one in completions]", 2),
        ("def reward(completions):\n    for one in completions:\n        yield int(one)", 3),
        (
            "class Own:\n    def __call__(self, completions):\n        return [int(completions[0])]\nreward = Own()",
            3,
        ),
    ],
)
def test_what_one_raises_is_said_with_its_line_and_kept(
    function: Callable[[Any], Function], source: str, line: int
) -> None:
    with pytest.raises(FunctionError) as caught:
        function(source)(TEXTS)
    said = f"`my_rewards:reward` raised ValueError: invalid literal for int() with base 10: ' x' (my_rewards.py:{line})"
    assert str(caught.value) == f"the reward function {said}"
    assert isinstance(caught.value.__cause__, ValueError)  # its traceback goes to the log
    with pytest.raises(InputError) as refused:
        try_function(function(source), TEXTS)
    assert refused.value.message == f"on the first rows of `data`, the reward function {said}"
    assert refused.value.place == PLACE


def test_the_line_is_the_functions_own_where_a_library_raises(function: Callable[[Any], Function]) -> None:
    with pytest.raises(FunctionError, match=r"JSONDecodeError: .* \(my_rewards.py:4\)$"):
        function("import json\n\ndef reward(completions):\n    return [json.loads(one) for one in completions]")(TEXTS)


def test_async_ones_wait_together_in_one_loop_that_stays(function: Callable[[Any], Function]) -> None:
    """Each waits for the other: one after the other, they would do so for ever."""
    loops, met = [], [asyncio.Event(), asyncio.Event()]

    def waits(own: int) -> Callable[..., Any]:
        async def reward(completions: list[str]) -> list[float]:
            loops.append((asyncio.get_running_loop(), threading.current_thread()))
            met[own].set()
            await asyncio.wait_for(met[1 - own].wait(), 10)
            return [float(own)] * len(completions)

        return reward

    both = [function(waits(0)), function(waits(1)), function(lambda completions: [5, None])]
    assert call_all(both, TEXTS) == [[0.0, 0.0], [1.0, 1.0], [5.0, None]]
    assert call_all(both, CHATS) == [[0.0, 0.0], [1.0, 1.0], [5.0, None]]
    assert len(set(loops)) == 1 and loops[0][1] is not threading.main_thread()


def test_one_that_changes_what_it_gets_changes_nothing_for_others(function: Callable[[Any], Function]) -> None:
    def spoils(completions: Any, completion_ids: Any, prompts: Any) -> list[float]:
        completions[0][0]["content"] = "spoiled"
        completion_ids[0].clear()
        prompts.clear()
        return [0.0, 0.0]

    function(spoils)(CHATS)
    assert CHATS.completions[0] == [{"role": "assistant", "content": "x"}]
    assert CHATS.completion_ids[0] == [5]
    assert len(CHATS.prompts) == 2


def test_a_column_named_as_what_is_given_is_not_given(function: Callable[[Any], Function]) -> None:
    batch = Batch(["a"], ["x"], [[5]], {"prompts": ["theirs"], "trainer_state": [1]}, step=2)
    seen = function(lambda prompts, trainer_state: [len(prompts[0]) + trainer_state.global_step])
    assert seen(batch) == [3.0]


def test_a_column_that_the_data_lack_is_refused_and_one_that_a_batch_lacks_is_none(
    function: Callable[[Any], Function],
) -> None:
    """Rows of several sources are mixed, and those of a batch may all be of the same."""
    reward = function(lambda answer, solution: [float(one is None) for one in solution])
    assert reward(TEXTS) == [1.0, 1.0]
    with pytest.raises(InputError) as caught:
        try_function(reward, TEXTS)
    said = f"{WHO} wants `solution`, and the data have no such column"
    assert caught.value.message == f"on the first rows of `data`, {said}"
    try_function(reward, replace(TEXTS, columns={"answer": ["x", "y"], "solution": [None, 1]}))


def test_one_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, message in (
        ("nowhere_at_all:reward", "`nowhere_at_all` cannot be imported: ModuleNotFoundError"),
        ("json:no_such", "module `json` has no function `no_such`"),
        ("json:__name__", "module `json` has no function `__name__`"),
    ):
        with pytest.raises(InputError) as caught:
            Function(name, [tmp_path], PLACE)
        assert caught.value.message.startswith(message)
        assert caught.value.place == PLACE


def test_what_it_logs_is_logged_under_its_name(function: Callable[[Any], Function]) -> None:
    def reward(completions: list[str], log_metric: Any) -> list[float]:
        for number in (1, 2):
            log_metric("rude", number)
        return [0.0] * len(completions)

    lengths = torch.tensor([1])
    episodes = Episodes(torch.tensor([[4, 5]]), lengths, lengths, lengths > 0, torch.zeros(1, 1))
    rewards = Rewards([Part("tone", 1.0, function(reward))], AutoTokenizer.from_pretrained(TINY / "checkpoint"))
    first = rewards(episodes, [row_of("a", {"prompt": "a"})], at_once=1)
    assert of_rewards(first) == {"rewards/tone/mean": 0.0, "rewards/tone/std": 0.0, "rewards/tone/rude": 1.5}
    both = concatenated([first, replace(first, logged={"tone/rude": 4.5})])
    assert of_rewards(both)["rewards/tone/rude"] == 3.0
