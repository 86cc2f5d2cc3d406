"""An engine whose replies are given, so that any number of processes learns from the same."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_pipeline.ppo.rollout import Episodes

Reply = tuple[list[int], bool]  # its tokens, and whether it has ended


class Given:
    """See `Engine`; a prompt's reply follows from the prompt alone."""

    def __init__(self, reply: Callable[[Sequence[int]], Reply]) -> None:
        self.reply = reply

    def sample(self, policy: Any, prompts: Sequence[Sequence[int]], *_: Any) -> Episodes:
        replies = [self.reply(prompt) for prompt in prompts]
        rows = [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, replies, strict=True)]
        width, lengths = max(map(len, rows)), torch.tensor([len(tokens) for tokens, _ in replies])
        return Episodes(
            torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            torch.tensor([len(prompt) for prompt in prompts]),
            lengths,
            torch.tensor([ended for _, ended in replies]),
            torch.zeros(len(prompts), int(lengths.max())),
        )


def of_unlike_length(longest: int, stop: int) -> Callable[[Sequence[int]], Reply]:
    """Replies of random tokens: half of them have one or two, and the others many."""

    def reply(prompt: Sequence[int]) -> Reply:
        draw = random.Random(repr(list(prompt)))
        tokens = [draw.randrange(5, 1024) for _ in range(draw.choice([1, 2, longest - 1, longest]))]
        ended = draw.random() < 0.5
        return ([*tokens[:-1], stop] if ended else tokens), ended

    return reply
