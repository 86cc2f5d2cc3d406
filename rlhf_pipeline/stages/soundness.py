"""What is measured of a model before it is trusted: do packing, its cache and left padding change what it computes?

Whether they do depends on the architecture, on the kernels that are installed and on the versions of the libraries. So
it is measured on the model itself, with a few short rows, and no list is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.ppo.rollout import Engine, sample

MOST_LEAK = 0.1  # of what rows see of each other as one text
ROWS, TOKENS = 3, 256  # at most; what is measured on
SAMPLED = 16  # tokens of a reply
LONGEST_TRIED = TOKENS + SAMPLED  # a prompt and its reply
FIRST = 8  # tokens of a row, which the row before it changes most
PROMPTS = 64  # of which the longest and the shortest are taken

_NOT_PACKED = "remove it: without packing, rows are padded"


class Leak(NamedTuple):
    """How far packed rows see each other: the largest change of the log-probability of a row's first tokens, in nats.

    Attributes:
        packed: from a row alone to the same row packed behind others.
        as_one_text: from a row alone to the same row where all rows are one text.
    """

    packed: float
    as_one_text: float


@torch.no_grad()
def generation_gap(
    policy: Any, prompts: Sequence[Sequence[int]], pad_token_id: int, engine: Engine | None = None
) -> float:
    """How far the log-probabilities that generation samples with are from those of whole passes, in nats a token.

    Generation pads prompts on the left and takes up a cache; a whole pass over one row alone does neither. Another
    engine has kernels of its own. In float32 they are equal but for rounding.

    Args:
        policy: what has `generate` and gives logits: a causal LM in evaluation mode, or a view of one.
        prompts: token ids; a few of different length are made of them.
        pad_token_id: fills them up.
        engine: what samples, if not the policy itself.

    Returns:
        The mean over sampled tokens of the absolute difference.
    """
    longest = max(prompts, key=len)[-TOKENS:]
    asked = [longest, longest[-(len(longest) + 1) // 2 :], min(prompts, key=len)[-TOKENS:]]
    with torch.random.fork_rng():
        episodes = sample(
            policy,
            asked,
            response_length=SAMPLED,
            temperature=1.0,
            stop_token_id=None,
            pad_token_id=pad_token_id,
            at_once=len(asked),
            engine=engine,
        )
    gaps = []
    for row, start in enumerate(episodes.prompt_lengths.tolist()):
        end = start + int(episodes.reply_lengths[row])
        whole = _log_probs(policy, {"input_ids": episodes.ids[row : row + 1, :end]})
        gaps.append((whole[start - 1 :] - episodes.sampled_log_probs[row, : end - start].cpu()).abs())
    return torch.cat(gaps).mean().item()


@torch.no_grad()
def packing_leak(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: Sequence[Any]) -> Leak:
    """Measure how far rows see each other when they are packed.

    Args:
        model: a causal LM in evaluation mode.
        collate: the trainer's, which makes a batch of packed rows.
        rows: token ids, two or more rows.
    """
    rows = [list(row[:TOKENS]) for row in rows[:ROWS]]
    ids = [token for row in rows for token in row]
    together = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}])
    together.pop("labels")
    as_one = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    alone = [_log_probs(model, {"input_ids": torch.tensor([row])}) for row in rows]
    packed, one_text = (_log_probs(model, batch | {"use_cache": False}) for batch in (together, as_one))
    start, leaks = len(rows[0]), Leak(0.0, 0.0)
    for row, expected in zip(rows[1:], alone[1:], strict=True):
        count = min(FIRST, len(row) - 1)  # the first token of a row has nothing before it
        here = slice(start, start + count)
        found = ((one[here] - expected[:count]).abs().max().item() for one in (packed, one_text))
        leaks = Leak(*(max(pair) for pair in zip(leaks, found, strict=True)))
        start += len(row)
    return leaks


def check_packing(
    model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: Sequence[Any], place: str
) -> None:
    """See that packed rows do not see each other.

    Args:
        model: see `packing_leak`.
        collate: see there.
        rows: token ids; with fewer than two rows of two tokens nothing is measured.
        place: the recipe's key.

    Raises:
        InputError: they do.
    """
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 2:
        return
    try:
        leak = packing_leak(model.eval(), collate, rows)
    except (RuntimeError, TypeError, ValueError) as error:  # as where a kernel is not installed that keeps them apart
        raise InputError(
            f"this model does not take packed rows: {str(error).strip().splitlines()[0]}", place=place, hint=_NOT_PACKED
        ) from None
    if leak.packed > MOST_LEAK * leak.as_one_text:
        raise InputError(
            f"with this model, packed rows see each other: next to others, a token's log-probability is off by up to "
            f"{leak.packed:.2g} nats, and by {leak.as_one_text:.2g} where all rows are one text",
            place=place,
            hint=_NOT_PACKED,
        )


def check_generation(
    policy: Any, prompts: Sequence[Sequence[int]], pad_token_id: int, place: str, engine: Engine | None = None
) -> None:
    """See that replies are sampled with the log-probabilities that are trained on.

    Raises:
        InputError: they are not; see `generation_gap`.
    """
    gap = generation_gap(policy, prompts, pad_token_id, engine)
    if not gap <= kinds.MOST_GAP:
        why = "Its cache, or padding on the left, changes what it computes"
        raise InputError(
            f"this model samples with other log-probabilities than it is trained on: they are {gap:.2g} nats a token "
            f"apart, and {kinds.MOST_GAP} is the most. {why if engine is None else 'vLLM computes something else'}",
            place=place,
            hint="PPO would learn from replies that its policy does not give: use another model, or `dpo`"
            if engine is None
            else "sample without it: `rollout: {engine: transformers}`",
        )


def _log_probs(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The log-probability of each token of one row but its first, float32 `[length - 1]`."""
    device = model.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    logits = model(**inputs).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0].cpu()
