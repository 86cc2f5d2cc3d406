"""Decoding with a cache whose rows come and go: a reply that has ended leaves it, and a waiting prompt takes its place.

`generate` computes every row of a batch until its longest reply has ended. Where one reply in twenty is six times as
long as the others, most of that is thrown away.
"""

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

FREE = 1 / 8  # of the rows: once so many have ended they leave, and prompts take their places


class Replies:
    """Replies as they are written, to N prompts, of up to R tokens.

    There is one row more, for what is computed of rows that have ended and still are in the batch.

    Attributes:
        tokens: int64 `[N + 1, R]`.
        log_probs: float32 `[N + 1, R]`, of each token when it was chosen.
        lengths: int64 `[N + 1]`, how many tokens there are so far.
        ended: bool `[N + 1]`, whether the last of them is a stop token.
    """

    def __init__(self, count: int, response_length: int, stops: Sequence[int], device: torch.device) -> None:
        self.tokens = torch.zeros(count + 1, response_length, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(count + 1, response_length, device=device)
        self.lengths = torch.zeros(count + 1, dtype=torch.long, device=device)
        self.ended = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self.stops = torch.tensor(stops, dtype=torch.long, device=device)

    def add(self, rows: Tensor, running: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Add a token to each row that is running; returns which still are, bool `[n]`."""
        kept = torch.where(running, rows, len(self.lengths) - 1)
        places = self.lengths[kept].clamp(max=self.tokens.shape[1] - 1)
        self.tokens[kept, places] = tokens
        self.log_probs[kept, places] = log_probs
        self.lengths[kept] += 1
        at_stop = torch.isin(tokens, self.stops)
        self.ended[kept] = at_stop
        return running & ~at_stop & (self.lengths[rows] < self.tokens.shape[1])


class Choice:
    """Chooses tokens from the whole distribution at a temperature, by inversion.

    A number is drawn evenly from [0, 1); chosen is the first token at which the sum of the probabilities up to it is
    over that number. Sums are in float64, so that a token among a hundred thousand comes as often as it should.

    Args:
        temperature: of the distribution; 0 chooses the likeliest token, and log-probabilities are those at 1.
        seeds: of each row of the replies; None for torch's own generator, asked for all rows together.
        length: how many tokens a row has at most.
        device: of the logits.
    """

    def __init__(self, temperature: float, seeds: Sequence[int] | None, length: int, device: torch.device) -> None:
        self.temperature, self.drawn = temperature, None
        if seeds is not None and temperature:
            draws = (torch.Generator().manual_seed(seed % 2**64) for seed in seeds)
            numbers = [torch.rand(length, generator=draw, dtype=torch.float64) for draw in draws]
            self.drawn = torch.stack(numbers).to(device)

    def __call__(self, logits: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            logits: `[n, vocabulary]`.
            rows: int64 `[n]`, which replies these are.
            places: int64 `[n]`, how many tokens each has already.

        Returns:
            Tokens, int64 `[n]`, and their log-probabilities, float32 `[n]`.
        """
        logits = logits.float()
        highest, likeliest = logits.max(1, keepdim=True)
        temperature = self.temperature or 1.0
        p = (logits - highest).div_(temperature).exp_()  # probabilities, times a number of each row
        if self.temperature:
            sums = p.cumsum(1, dtype=torch.float64)
            total = sums[:, -1:]
            tokens = torch.searchsorted(sums, self._draw(rows, places)[:, None] * total, right=True)
            tokens = tokens.clamp_(max=p.shape[1] - 1)  # rounding may bring a number up to the total
        else:
            tokens, total = likeliest, p.sum(1, keepdim=True, dtype=torch.float64)
        log_probs = (logits.gather(1, tokens) - highest).double() / temperature - total.log()
        return tokens[:, 0], log_probs[:, 0].float()

    def _draw(self, rows: Tensor, places: Tensor) -> Tensor:
        """A number for each row, float64 `[n]`."""
        if self.drawn is None:
            return torch.rand(len(rows), dtype=torch.float64, device=rows.device)
        return self.drawn[rows, places.clamp(max=self.drawn.shape[1] - 1)]


@dataclass
class _Batch:
    """The n rows that are computed together, with W columns in the cache; padding is on the left.

    Attributes:
        cache: of the model.
        mask: int64 `[n, W]`, 1 on what a row sees.
        rows: int64 `[n]`, which replies they are.
        running: bool `[n]`, whether they have not ended.
        last: int64 `[n, 1]`, the last token of each, which is not in the cache yet.
    """

    cache: DynamicCache
    mask: Tensor
    rows: Tensor
    running: Tensor
    last: Tensor

    @property
    def movable(self) -> bool:
        """Whether columns of the cache can be moved: it holds keys and values by column, and nothing else."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers)

    def drop_ended(self) -> None:
        """Leave out the rows that have ended, and the columns that no other row needs."""
        kept = self.running.nonzero()[:, 0]
        self.cache.reorder_cache(kept)
        self.mask, self.rows, self.last = self.mask[kept], self.rows[kept], self.last[kept]
        self.running = self.running[kept]
        unused = int(self.mask.argmax(1).min())
        if unused and self.movable:
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                _set_width(layer, self.mask.shape[1])

    def join(self, other: "_Batch") -> None:
        """Take up the rows of another batch."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for layer, others in zip(self.cache.layers, other.cache.layers, strict=True):
            _set_width(layer, width)
            _set_width(others, width)
            layer.keys = torch.cat([layer.keys, others.keys])
            layer.values = torch.cat([layer.values, others.values])
            others.keys = others.values = None
        masks = [pad(one.mask, (width - one.mask.shape[1], 0)) for one in (self, other)]
        self.mask = torch.cat(masks)
        self.rows, self.running = torch.cat([self.rows, other.rows]), torch.cat([self.running, other.running])
        self.last = torch.cat([self.last, other.last])


def _set_width(layer: Any, width: int) -> None:
    """Add columns on the left of a layer's cache, or take some away, so that it has seen `width` tokens."""
    held = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width
        held = min(width, layer.sliding_window - 1)
    missing = held - layer.keys.shape[-2]
    if missing:
        layer.keys, layer.values = (pad(one, (0, 0, missing, 0)) for one in (layer.keys, layer.values))


def decode(
    model: Any, prompts: Sequence[Sequence[int]], replies: Replies, choose: Choice, pad_token_id: int, at_once: int
) -> bool:
    """Write replies to prompts, `at_once` of them together, by a cache whose rows can be left out.

    Equal prompts that begin together are read once.

    Args:
        model: a causal LM in evaluation mode.
        prompts: token ids, at least one each.
        replies: where they are written.
        choose: chooses each token.
        pad_token_id: fills prompts up.
        at_once: how many rows are computed together.

    Returns:
        False, with nothing written, where the model has no such cache: see `generate`.
    """
    accepts = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in accepts), None)
    usual = GenerationMixin.prepare_inputs_for_generation
    if name is None or model.prepare_inputs_for_generation.__func__ is not usual:
        return False

    def read(ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """The logits behind the last column `[n, vocabulary]`, and the cache."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, name: cache, "use_cache": True}
        if "position_ids" in accepts:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in accepts:
            inputs["logits_to_keep"] = 1
        output = model(**inputs)
        return output.logits[:, -1], getattr(output, name, None)

    def begin(taken: list[int]) -> _Batch | None:
        unlike = list(dict.fromkeys(tuple(prompts[row]) for row in taken))
        ids, mask = left_padded(unlike, pad_token_id, model.device)
        logits, cache = read(ids, mask, None)
        if type(cache) is not DynamicCache:
            return None
        if len(unlike) < len(taken):
            place = {prompt: number for number, prompt in enumerate(unlike)}
            which = torch.tensor([place[tuple(prompts[row])] for row in taken], device=model.device)
            cache.reorder_cache(which)
            logits, mask = logits[which], mask[which]
        rows = torch.tensor(taken, device=model.device)
        batch = _Batch(cache, mask, rows, torch.ones_like(rows, dtype=torch.bool), rows[:, None])
        write(batch, logits)
        return batch

    def write(batch: _Batch, logits: Tensor) -> None:
        tokens, log_probs = choose(logits, batch.rows, replies.lengths[batch.rows])
        batch.running = replies.add(batch.rows, batch.running, tokens, log_probs)
        batch.last = tokens[:, None]

    waiting = deque(sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), tuple(prompts[row]))))
    batch: _Batch | None = None
    while waiting or batch is not None:
        free = at_once - (0 if batch is None else len(batch.rows))
        if waiting and (batch is None or (free >= at_once * FREE and batch.movable)):
            new = begin([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if new is None:
                return False
            if batch is None:
                batch = new
            else:
                batch.join(new)
        elif batch is not None:
            # What is computed of a row that has ended is seen by no other; it must not count as longer, either.
            batch.mask = torch.cat([batch.mask, batch.running[:, None].long()], 1)
            write(batch, read(batch.last, batch.mask, batch.cache)[0])
        if batch is not None:
            running = int(batch.running.sum())
            if running == 0:
                batch = None
            elif len(batch.rows) - running >= len(batch.rows) * FREE:
                batch.drop_ended()
    return True


def generate(
    model: Any, prompts: Sequence[Sequence[int]], replies: Replies, choose: Choice, pad_token_id: int, at_once: int
) -> None:
    """What `decode` does, for any model: by its own `generate`, which computes all rows until the last one ends."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), at_once):
        taken = order[start : start + at_once]
        ids, mask = left_padded([prompts[row] for row in taken], pad_token_id, model.device)
        settings = GenerationConfig(
            max_new_tokens=replies.tokens.shape[1],
            eos_token_id=replies.stops.tolist(),  # also where there are none: else it would take the model's own
            pad_token_id=pad_token_id,
            do_sample=False,
        )
        writes = _Writes(torch.tensor(taken, device=model.device), replies, choose)
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([writes]),
            synced_gpus=False,  # else ranks that have divided a model would have to sample as many batches each
        )


class _Writes(LogitsProcessor):
    """Chooses each token, writes it down, and leaves it alone to `generate`."""

    def __init__(self, rows: Tensor, replies: Replies, choose: Choice) -> None:
        self.rows, self.replies, self.choose = rows, replies, choose
        self.running = torch.ones_like(rows, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens, log_probs = self.choose(scores, self.rows, self.replies.lengths[self.rows])
        self.running = self.replies.add(self.rows, self.running, tokens, log_probs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts filled up on the left, int64 `[n, W]`, and a mask with 1 on what is theirs."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return ids.to(device), mask.to(device)
