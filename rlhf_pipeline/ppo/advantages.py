"""From scores and log-probabilities to advantages. Tensors are float32 `[B, T]`: B episodes, T the longest reply.

`mask` is bool `[B, T]`, True on the tokens of a reply; everything else is 0 there and counts for nothing.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over a reply's tokens, a scalar."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance over all tokens of all replies, and to mean 0 unless `shift_mean` is False."""
    count = mask.sum()
    mean = masked_mean(values, mask)
    variance = ((values - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return whitened * mask


def kl_per_token(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(policy || reference) at each token, from the one token that was sampled.

    `k1` is log π/π_ref, `k3` is π_ref/π - 1 + log π/π_ref: both unbiased, `k3` with less variance and never below 0
    (Schulman 2020, "Approximating KL Divergence").
    """
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def shape_rewards(scores: Tensor, kl: Tensor, kl_coef: float, reply_lengths: Tensor) -> Tensor:
    """The reward of each token: -kl_coef · KL, and at the reply's last token its score as well.

    TRL puts the score of a reply that ended one token later, on its first padding (where it also has a value), and
    that of one that was cut short on its last token. The last token is right for both: nothing is decided after it.

    Args:
        scores: float32 `[B]`.
        kl: from `kl_per_token`, 0 outside replies.
        kl_coef: the weight of KL against the score.
        reply_lengths: int64 `[B]`, at least 1.
    """
    rewards = -kl_coef * kl
    rewards[torch.arange(len(scores), device=scores.device), reply_lengths - 1] += scores
    return rewards


def estimate_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. A reply's last token is followed by
    the value 0.

    Args:
        rewards: 0 outside replies.
        values: of the state before each token; 0 outside replies.
        gamma: the discount factor.
        lam: how far rewards reach back: 1 for the whole reply, 0 for one token.

    Returns:
        Advantages, and returns: advantages + values.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * following
        advantages[:, t] = following
        next_values = values[:, t]
    return advantages, advantages + values


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 one that knows only the mean."""
    returns, values = returns[mask], values[mask]
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
