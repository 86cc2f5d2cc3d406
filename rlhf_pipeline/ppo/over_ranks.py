"""What the ranks of PPO tell each other: episodes with their scores, gradients and sums, and whether they still agree.

Each rank samples and scores its share of an update's prompts, and then has what all have: a few numbers for each token.
So all that follows is worked out on every rank from the whole batch, by the code of one process: statistics of scores,
whitening, KL and its control, budgets, means. Only the passes of optimisation are divided again, and their gradients
summed: those of adapters and heads, since nothing else learns.
"""

import io
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pipeline import ranks
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.ppo.numbers import Scored, concatenated
from rlhf_pipeline.ppo.rollout import concatenate, one_below_another


def of_all(mine: Scored | None, device: torch.device) -> Scored:
    """The episodes of all ranks, in the order of ranks.

    Args:
        mine: this rank's; None where it has none.
        device: of this rank, which the result is on.

    Raises:
        ValueError: no rank has any.
    """
    if ranks.count() == 1 and mine is not None:
        return mine
    packed = io.BytesIO()
    torch.save(mine, packed)
    parts = [torch.load(io.BytesIO(part), device, weights_only=False) for part in ranks.gathered(packed.getvalue())]
    parts = [part for part in parts if part is not None]
    if not parts:
        raise ValueError("there are no episodes")
    by_token = ("log_probs", "ref_log_probs", "values", "kl")
    return Scored(
        episodes=concatenate([part.episodes for part in parts], pad_token_id=0),
        rewards=concatenated([part.rewards for part in parts]),
        **{name: one_below_another([getattr(part, name) for part in parts]) for name in by_token},
    )


def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over all ranks, in one transfer of float32.

    A parameter without a gradient on any rank still has none; on some ranks, as where a rank had no rows, counts as 0.
    """
    if ranks.count() == 1 or not parameters:
        return
    has = parameters[0].new_tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32)
    gradients = [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters
    ]
    summed = torch.cat([has, *(gradient.flatten().float() for gradient in gradients)])
    ranks.add_up(summed)
    has, *sums = summed.split([len(parameters), *(parameter.numel() for parameter in parameters)])
    for parameter, gradient, is_there in zip(parameters, sums, has.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if is_there else None


def total(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name over all ranks, of which some may lack a name."""
    if ranks.count() == 1:
        return sums
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for part in ranks.gathered({name: value.item() for name, value in sums.items()}):
        for name, value in part.items():
            found[name] = found[name] + value
    return found


def require_same(weights: dict[str, int], update: int) -> None:
    """See that all ranks have the same weights.

    Args:
        weights: checksums of them by role, from `SharedBase.checksums`.
        update: how many updates they have behind them.

    Raises:
        RunError: they have not; it names a rank and a role.
    """
    first, *others = ranks.gathered(weights)
    for rank, theirs in enumerate(others, 1):
        for role, checksum in first.items():
            if theirs.get(role) != checksum:
                raise RunError(
                    f"rank {rank} of {ranks.count()} has other weights of `{role}` than rank 0 after {update} updates",
                    hint="all need the same files and libraries, and devices of one kind",
                )
