"""What a model knows of replies: its last hidden state at the token that closes each, for heads that learn quickly."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rlhf_pipeline.data.encode import Ids, encode_records
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import attention
from rlhf_pipeline.models.roles import PolicyView
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.schema import BASE, Data, Recipe
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.finished import model_of
from rlhf_pipeline.rundir.items import FEATURES, Item

BATCH = 16


def features(recipe: Recipe, run: Path, init: str, items: Sequence[Item], batch_size: int = BATCH) -> Tensor:
    """The features of all replies, read where a reward model reads its score: at the one EOS that closes a reply.

    A reward stage's score is its head times these, as they are under its own adapter; of an ensemble, that of its first
    member. What is longer than the model takes loses its beginning.

    Args:
        recipe: the run's recipe.
        run: the run directory.
        init: whose model: a stage that is done and has made a policy or a reward model, an adapter from outside, or
            `base`.
        items: prompts with their replies.
        batch_size: how many replies go through the model at once; those of like length together.

    Returns:
        Float32 `[replies in the order of items, d]`, on the CPU.

    Raises:
        InputError: the model cannot be loaded, its chat template refuses a prompt, or it gives numbers that are not
            finite.
    """
    spec = recipe.model if init == BASE or outside.is_one(init) else model_of(run, recipe, init)
    spec, _ = attention.available(spec)
    adapters = artifacts(run, [] if init == BASE else [init])
    if init != BASE and init not in adapters:
        raise InputError(f"`{init}` has no adapter", place=str(run), hint="`rlhf-pipeline status` says what is done")
    staged = StagedBase(spec, adapters)
    records = [(item.prompt, *item.replies) for item in items]
    encoded = encode_records(staged.tokenizer, Data(path=init), records)
    longest = getattr(staged.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    rows = [[*prompt, *reply] for prompt, *replies in encoded for reply in replies]
    rows = [row[-longest:] if longest else row for row in rows]
    return _at_the_end(staged.policy(init), rows, staged.tokenizer.pad_token_id, batch_size)


@torch.no_grad()
def _at_the_end(view: PolicyView, rows: Sequence[Ids], pad_token_id: int, batch_size: int) -> Tensor:
    """The last hidden state of each row's last token, float32 `[rows, d]`."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # the longest first: too little memory shows soon
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(rows[batch[0]])
        ids = torch.tensor([[*rows[row], *[pad_token_id] * (width - len(rows[row]))] for row in batch])
        hidden = view.hidden_states(ids.to(view.device))
        last = torch.tensor([len(rows[row]) - 1 for row in batch], device=hidden.device)
        states = hidden[torch.arange(len(batch), device=hidden.device), last].float().cpu()
        found |= dict(zip(batch, states, strict=True))
    made = torch.stack([found[row] for row in range(len(rows))])
    if not made.isfinite().all():
        raise InputError(
            "the model's hidden states are not finite numbers", hint="`model.dtype: bfloat16` has a wider range"
        )
    return made


def write(folder: Path, made: Tensor) -> None:
    """Write features beside their items, so that they are there whole or not at all."""
    durable.write_bytes(folder / FEATURES, save({"features": made.contiguous()}))
