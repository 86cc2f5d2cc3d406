"""Replies that are to be rewarded, as TRL gives them to reward functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Text = str | list[dict[str, Any]]  # or turns, each with `role` and `content`


@dataclass(frozen=True)
class Batch:
    """Replies to prompts, and what is known of each; B of them, in one order.

    Attributes:
        prompts: B texts; where the rows are conversations, B lists of turns.
        completions: the B replies, without special tokens; where the rows are conversations, each as one turn of the
            assistant, `[{"role": "assistant", "content": ...}]`.
        completion_ids: the B replies as the policy sampled them, in token ids, each of a length of its own.
        columns: the other columns of the rows that the prompts are from, by name, each a list of B values.
        step: how many optimizer steps are done.
        max_steps: how many there will be.
    """

    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    step: int
    max_steps: int = 0
