"""Sampling: replies to prompts, and where in their rows they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


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

    def by_length(self, rows: Tensor | None = None) -> Tensor:
        """Rows, by default all, from the shortest to the longest, int64: taken in parts, they need little padding."""
        lengths = self.prompt_lengths + self.reply_lengths
        rows = torch.arange(len(self), device=lengths.device) if rows is None else rows
        return rows[lengths[rows].argsort(stable=True)]

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


class _SampledLogProbs(LogitsProcessor):
    """Notes the log-probability of each sampled token, and holds the logits of one step alone.

    Generation shows a processor the logits before a token is chosen; which one it was is seen at the next step.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.noted: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.note(input_ids)
        self.last = scores.float() / (self.temperature or 1.0)
        return scores

    def note(self, input_ids: Tensor) -> None:
        """Take note of the token that is now the last one."""
        if self.last is not None:
            chosen = self.last.gather(1, input_ids[:, -1:])[:, 0]
            self.noted.append(chosen - self.last.logsumexp(1))


class _Choice(LogitsProcessor):
    """Chooses each token by the random numbers of its own row, and leaves that one token to generation.

    By inversion: the first token at which the sum of the probabilities up to it is over a number drawn evenly from
    [0, 1). In float64, so that a token among a hundred thousand comes as often as it should.

    Args:
        seeds: of each row.
        length: how many numbers are drawn, at least as many as there will be tokens.
        temperature: of the distribution.
    """

    def __init__(self, seeds: Sequence[int], length: int, temperature: float) -> None:
        draws = (torch.Generator().manual_seed(seed % 2**64) for seed in seeds)
        self.drawn = torch.stack([torch.rand(length, generator=draw, dtype=torch.float64) for draw in draws])
        self.temperature = temperature
        self.step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        sums = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        number = self.drawn[:, self.step, None].to(sums.device) * sums[:, -1:]  # rounding may leave the last one off 1
        self.step += 1
        chosen = torch.searchsorted(sums, number, right=True).clamp(max=sums.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


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
) -> Episodes:
    """Sample one reply to each prompt, from the policy's whole distribution at a temperature.

    All that sample replies here do it by this function: PPO, GRPO and RLOO, `evaluate`, `compare`, `sample`
    and `revise`.

    Without `seeds` the random numbers are torch's own, drawn for all rows of a batch together: the same numbers give
    the same replies only in the same batches. With `seeds` each row has its own, and its reply is the same in a batch
    of any size beside any other rows. Only logits are rounded differently in a batch of another shape: about one token
    in a million may then be its neighbour, and more in bfloat16 or 4 bits.

    Args:
        policy: a view with `generate`.
        prompts: token ids, at least one each.
        response_length: the most tokens a reply may have.
        temperature: 0 is greedy, and notes log-probabilities at 1.
        stop_token_id: ends a reply, as any of several does; with None, or none, all have `response_length` tokens.
        pad_token_id: fills rows up; it may equal a stop token.
        at_once: how many replies are sampled together.
        seeds: an integer for each prompt, which decides the random numbers of its reply; at temperature 0 there are
            none.

    Returns:
        The episodes, on the policy's device.
    """
    order = torch.arange(len(prompts))
    if len(prompts) > at_once:  # prompts of like length together, for less padding
        order = torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)
    stops = [] if stop_token_id is None else [stop_token_id] if isinstance(stop_token_id, int) else stop_token_id
    parts = [
        _sample_together(
            policy,
            [prompts[row] for row in rows],
            response_length,
            temperature,
            stops,
            pad_token_id,
            [seeds[row] for row in rows] if seeds is not None else None,
        )
        for rows in order.split(at_once)
    ]
    return concatenate(parts, pad_token_id).select(order.argsort())


def _sample_together(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    response_length: int,
    temperature: float,
    stops: list[int],
    pad_token_id: int,
    seeds: Sequence[int] | None,
) -> Episodes:
    device = policy.device
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    attention_mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    noted = _SampledLogProbs(temperature)
    processors = LogitsProcessorList([noted])
    choice: dict[str, Any] = {"do_sample": False}
    if temperature and seeds is not None:
        processors.append(_Choice(seeds, response_length, temperature))
    elif temperature:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=response_length,
        eos_token_id=stops,  # also where there are none: `generate` would put the model's own in place of None
        pad_token_id=pad_token_id,
        **choice,
    )
    rows = policy.generate(
        input_ids=padded.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        logits_processor=processors,
    )
    noted.note(rows)
    replies = rows[:, longest:]
    at_stop = torch.isin(replies, torch.tensor(stops, dtype=replies.dtype, device=device))
    ended = at_stop.any(1)
    reply_lengths = torch.where(ended, at_stop.int().argmax(1) + 1, replies.shape[1])
    lengths = lengths.to(device)
    width = int((lengths + reply_lengths).max())
    places = torch.arange(width, device=device) + (longest - lengths)[:, None]  # move each row left over its padding
    ids = rows.gather(1, places.clamp(max=rows.shape[1] - 1))
    ids = ids.masked_fill(torch.arange(width, device=device) >= (lengths + reply_lengths)[:, None], pad_token_id)
    kept = int(reply_lengths.max())
    return Episodes(ids, lengths, reply_lengths, ended, torch.stack(noted.noted, 1)[:, :kept])


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

    def stacked(tensors: list[Tensor], fill: float) -> Tensor:
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1]), value=fill) for one in tensors])

    return Episodes(
        stacked([part.ids for part in parts], pad_token_id),
        torch.cat([part.prompt_lengths for part in parts]),
        torch.cat([part.reply_lengths for part in parts]),
        torch.cat([part.ended for part in parts]),
        stacked([part.sampled_log_probs for part in parts], 0.0),
    )
