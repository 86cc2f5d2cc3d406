"""PPO's two losses, and what is logged of them."""

import torch
from torch import Tensor

from rlhf_pipeline.ppo.config import PPOConfig


def policy_loss(
    new: Tensor,
    old: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    args: PPOConfig,
    sums: dict[str, Tensor],
) -> Tensor:
    """PPO's clipped objective, summed over tokens (Schulman et al. 2017, "PPO Algorithms", equation 7).

    Args:
        new: log-probabilities of the tokens now, float32 `[B, T]`.
        old: the same at the rollout.
        entropy: of the choice of each token, float32 `[B, T]`.
        advantages: float32 `[B, T]`.
        mask: bool `[B, T]`, tokens of replies.
        args: `cliprange` and `log_ratio_clamp`.
        sums: what is logged is added here, by name.
    """
    log_ratio = new - old
    if args.log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-args.log_ratio_clamp, args.log_ratio_clamp)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
    loss = (torch.maximum(plain, clipped) * mask).sum()
    with torch.no_grad():
        sums["loss/policy_avg"] += loss
        sums["policy/clipfrac_avg"] += ((clipped > plain) & mask).sum()
        sums["policy/approxkl_avg"] += 0.5 * (log_ratio**2 * mask).sum()
        sums["policy/entropy_avg"] += entropy.sum()
        sums["val/ratio"] += (ratio * mask).sum()
        sums["val/ratio_var"] += ((ratio - 1) ** 2 * mask).sum()
    return loss


def value_loss(
    new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, args: PPOConfig, sums: dict[str, Tensor]
) -> Tensor:
    """Half the squared error, the worse of with and without clipping, summed over tokens.

    Args:
        new: values now, float32 `[B, T]`.
        old: the same at the rollout.
        returns: what they should be, float32 `[B, T]`.
        mask: bool `[B, T]`, tokens of replies.
        args: `cliprange_value`.
        sums: what is logged is added here, by name.
    """
    clip = args.cliprange_value
    plain = (new - returns) ** 2
    clipped = (torch.maximum(torch.minimum(new, old + clip), old - clip) - returns) ** 2
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum()
    with torch.no_grad():
        sums["loss/value_avg"] += loss
        sums["val/clipfrac_avg"] += ((clipped > plain) & mask).sum()
        sums["tokens"] += mask.sum()
    return loss
