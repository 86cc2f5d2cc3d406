"""Sampling: replies to prompts, and where in their rows they are."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from rlhf_pipeline.models.roles import PolicyView
from rlhf_pipeline.ppo.decoding import Choice, Replies, decode, generate

TOKENS_AT_ONCE = 2048


@dataclass
class Episodes:
    """B prompts with a reply each, T the longest reply's tokens, L the longest prompt and reply together.

    A reply follows its prompt without a gap, and padding is on the right only: then every architecture numbers
    the positions right by itself, and no column is padding for all rows. Where prompt, reply and padding meet is known
    from lengths, never from token ids, so that a policy may sample any token, and padding may be any token too.

    Attributes:
        ids: int64 `[B, L]`.
        prompt_lengths: int64 `[B]`.
        reply_lengths: int64 `[B]`, at least 1; with its stop token, without what comes after it.
        ended: bool `[B]`, whether the reply holds a stop token.
        sampled_log_probs: float32 `[B, T]`, as generation computed them, from its cache.
    """

    ids: Tensor
    prompt_lengths: Tensor
    reply_lengths: Tensor
    ended: Tensor
    sampled_log_probs: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def mask(self) -> Tensor:
        """Bool `[B, T]`, True on the tokens of the reply."""
        places = torch.arange(int(self.reply_lengths.max()), device=self.ids.device)
        return places < self.reply_lengths[:, None]

    @cached_property
    def replies(self) -> Tensor:
        """Int64 `[B, T]`, the replies' tokens; outside them, whatever."""
        places = self.prompt_lengths[:, None] + torch.arange(int(self.reply_lengths.max()), device=self.ids.device)
        return self.ids.gather(1, places.clamp(max=self.ids.shape[1] - 1))

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each reply, with what ended it."""
        lengths = self.reply_lengths.tolist()
        return [row[:length] for row, length in zip(self.replies.tolist(), lengths, strict=True)]

    def on(self, device: torch.device | str) -> "Episodes":
        """The same on a device."""
        kept = (self.ids, self.prompt_lengths, self.reply_lengths, self.ended, self.sampled_log_probs)
        return Episodes(*(one.to(device) for one in kept))

    def by_length(self, rows: Tensor | None = None) -> Tensor:
        """Rows, by default all, from the shortest to the longest, int64: taken in parts, they need little padding."""
        lengths = self.prompt_lengths + self.reply_lengths
        rows = torch.arange(len(self), device=lengths.device) if rows is None else rows
        return rows[lengths[rows].argsort(stable=True)]

    def parts(self, at_once: int) -> list[Tensor]:
        """All rows, int64, in parts that are read together, those of like length in one; the longest come first.

        A part has up to `TOKENS_AT_ONCE` tokens with its padding, which is enough to keep a GPU busy, and never more
        than `at_once` of the longest rows would; or one row that is longer.
        """
        order = self.by_length().flip(0)
        lengths = (self.prompt_lengths + self.reply_lengths)[order].tolist()
        most, parts, start = min(TOKENS_AT_ONCE, at_once * lengths[0]), list[Tensor](), 0
        while start < len(order):
            parts.append(order[start : start + max(1, most // lengths[start])])
            start += len(parts[-1])
        return parts

    def select(self, rows: Tensor) -> "Episodes":
        """Some of the episodes, without the columns that none of them needs."""
        prompts, replies = self.prompt_lengths[rows], self.reply_lengths[rows]
        return Episodes(
            self.ids[rows, : int((prompts + replies).max())],
            prompts,
            replies,
            self.ended[rows],
            self.sampled_log_probs[rows, : int(replies.max())],
        )


class Engine(Protocol):
    """What samples in place of the policy's own `generate`, as `vllm_engine.VLLMEngine`."""

    def sample(
        self,
        policy: Any,
        prompts: Sequence[Sequence[int]],
        response_length: int,
        temperature: float,
        stops: Sequence[int],
        pad_token_id: int,
        seeds: Sequence[int] | None,
    ) -> Episodes:
        """See the function `sample`; `stops` are none where nothing ends a reply."""


@torch.no_grad()
def sample(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    *,
    response_length: int,
    temperature: float,
    stop_token_id: int | list[int] | None,
    pad_token_id: int,
    at_once: int,
    seeds: Sequence[int] | None = None,
    engine: Engine | None = None,
) -> Episodes:
    """Sample one reply to each prompt, from the policy's whole distribution at a temperature.

    All that sample replies here do it by this function: PPO, GRPO and RLOO, `evaluate`, `compare`, `sample`
    and `revise`.

    Without `seeds` the random numbers are torch's own, drawn for all rows of a batch together: the same numbers give
    the same replies only in the same batches. With `seeds` each row has its own, and its reply is the same in a batch
    of any size beside any other rows. Only logits are rounded differently in a batch of another shape: about one token
    in a million may then be its neighbour, and more in bfloat16 or 4 bits.

    Args:
        policy: a view of a policy, or a causal LM in evaluation mode.
        prompts: token ids, at least one each.
        response_length: the most tokens a reply may have.
        temperature: 0 is greedy, and notes log-probabilities at 1.
        stop_token_id: ends a reply, as any of several does; with None, or none, all have `response_length` tokens.
        pad_token_id: fills rows up; it may equal a stop token.
        at_once: how many replies are sampled together; an engine decides that for itself.
        seeds: an integer for each prompt, which decides the random numbers of its reply; at temperature 0 there are
            none.
        engine: what samples, if not the policy itself.

    Returns:
        The episodes, on the policy's device.

    Raises:
        RuntimeError: logits are not finite.
    """
    stops = [] if stop_token_id is None else [stop_token_id] if isinstance(stop_token_id, int) else stop_token_id
    if engine is not None:
        episodes = engine.sample(policy, prompts, response_length, temperature, stops, pad_token_id, seeds)
    else:
        choose = Choice(temperature, seeds, response_length, policy.device)
        replies = Replies(len(prompts), response_length, stops, policy.device)
        with _causal_lm(policy) as model:
            how = (model, prompts, replies, choose, pad_token_id, at_once)
            if not decode(*how):
                generate(*how)
        episodes = _episodes(prompts, replies, pad_token_id)
    if not bool(episodes.sampled_log_probs.isfinite().all()):
        raise RuntimeError("the policy computes numbers that are not finite, so that no reply can be sampled")
    return episodes


@contextlib.contextmanager
def _causal_lm(policy: Any) -> Iterator[Any]:
    """The model under a policy, which takes its inputs by name; PEFT's wrapper hides which ones there are."""
    if isinstance(policy, PolicyView):
        with policy.generating() as model:
            yield model
    else:
        yield policy.get_base_model() if isinstance(policy, PeftModel) else policy


def _episodes(prompts: Sequence[Sequence[int]], replies: Replies, pad_token_id: int) -> Episodes:
    """Prompts with the replies that follow them."""
    count = len(prompts)
    lengths, ended = replies.lengths[:count], replies.ended[:count]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)
    width, longest = int((prompt_lengths + lengths).max()), int(lengths.max())
    filled = [list(prompt) + [pad_token_id] * (width - len(prompt)) for prompt in prompts]
    ids = torch.tensor(filled, device=lengths.device)
    rows, places = (torch.arange(longest, device=lengths.device) < lengths[:, None]).nonzero(as_tuple=True)
    ids[rows, prompt_lengths[rows] + places] = replies.tokens[rows, places]
    return Episodes(ids, prompt_lengths, lengths, ended, replies.log_probs[:count, :longest])


def diversity(episodes: Episodes) -> tuple[float, float]:
    """How varied the replies of a batch are.

    Returns:
        The share of distinct pairs of neighbouring tokens among all of them (distinct-2; Li et al. 2016, "A
        Diversity-Promoting Objective Function for Neural Conversation Models"), 0 where no reply has two tokens; and
        the share of distinct replies. Both fall as batches grow, so that only batches of one size compare.
    """
    replies, mask = episodes.replies.cpu(), episodes.mask.cpu()
    pairs = torch.stack([replies[:, :-1], replies[:, 1:]], 2)[mask[:, 1:]]
    distinct = len(pairs.unique(dim=0)) / len(pairs) if len(pairs) else 0.0
    return distinct, len(replies.masked_fill(~mask, -1).unique(dim=0)) / len(replies)


def concatenate(parts: Sequence[Episodes], pad_token_id: int) -> Episodes:
    """All episodes of several batches, as one."""
    return Episodes(
        one_below_another([part.ids for part in parts], pad_token_id),
        torch.cat([part.prompt_lengths for part in parts]),
        torch.cat([part.reply_lengths for part in parts]),
        torch.cat([part.ended for part in parts]),
        one_below_another([part.sampled_log_probs for part in parts]),
    )


def one_below_another(parts: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """The rows of several `[B, T]`, as many columns as the widest has, filled up on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
