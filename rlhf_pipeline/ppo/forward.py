"""The forward passes of PPO: log-probabilities of reply tokens, values of their states, scores of whole replies.

Logits are what costs memory: one row of them is as long as the vocabulary. They are computed for reply tokens only, a
few at a time, and none is kept: neither for the rollout, nor for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.models.roles import PolicyView, ScoreView
from rlhf_pipeline.ppo.rollout import Episodes

LOGITS_AT_ONCE = 2**25  # elements of one block of logits: 128 MiB in float32


def reply_log_probs(policy: PolicyView, episodes: Episodes, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the replies' tokens under a policy, and the entropy of each choice.

    Args:
        policy: the view of `policy` or `reference`.
        episodes: n of them.
        temperature: that the replies are sampled with; logits are divided by it.

    Returns:
        Two float32 `[n, T]`, 0 outside replies. The second has no gradient, and means nothing where gradients are off.
    """
    return _log_probs(policy, _states(policy, episodes), episodes, temperature)


def reply_values(value: ScoreView, episodes: Episodes, trunk_learns: bool = True) -> Tensor:
    """The value of the state before each reply token, float32 `[n, T]`, 0 outside replies.

    Args:
        value: the view of `value`.
        episodes: n of them.
        trunk_learns: whether there is a gradient for more than the head.
    """
    with torch.set_grad_enabled(trunk_learns and torch.is_grad_enabled()):
        states = _states(value, episodes)
    return _spread(value.scores(states), episodes.mask)


def reply_log_probs_and_values(
    policy: PolicyView, value: ScoreView, episodes: Episodes, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `reply_log_probs` and `reply_values` give, from one pass, where the value is a head on the policy's trunk.

    Returns:
        Log-probabilities, entropies and values.
    """
    states = _states(policy, episodes)
    log_probs, entropies = _log_probs(policy, states, episodes, temperature)
    return log_probs, entropies, _spread(value.scores(states), episodes.mask)


def reply_scores(reward: ScoreView, episodes: Episodes) -> Tensor:
    """The reward model's score of each whole reply, float32 `[n]`, read at the reply's last token."""
    hidden = reward.hidden_states(episodes.ids)
    rows = torch.arange(len(hidden), device=hidden.device)
    return reward.scores(hidden[rows, episodes.prompt_lengths + episodes.reply_lengths - 1])


def member_scores(members: Sequence[ScoreView], episodes: Episodes) -> Tensor:
    """The scores of n whole replies by each member of a reward model, of which most have one, float32 `[members, n]`.

    Without a reward model there are no members.
    """
    scores = [reply_scores(member, episodes).float() for member in members]
    return torch.stack(scores) if scores else torch.empty(0, len(episodes), device=episodes.ids.device)


def disagreement(scores: Tensor) -> Tensor:
    """How far the members of an ensemble differ on each reply: their standard deviation, `[...]` of `[members, ...]`.

    It divides by the number of members, and not by one less: these are all there are, and not a sample of more.
    """
    return scores.std(0, correction=0)


def demonstration_loss(policy: PolicyView, ids: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p over labelled tokens, a scalar; `labels` is -100 on the others, both int64 `[n, L]`."""
    hidden = policy.hidden_states(ids)
    labels = labels[:, 1:]
    labelled = labels != -100
    log_probs, _ = token_log_probs(policy, hidden[:, :-1][labelled], labels[labelled], 1.0)
    return -log_probs.sum()


def _states(view: PolicyView | ScoreView, episodes: Episodes) -> Tensor:
    """The last hidden state before each reply token, `[N, hidden]` of N tokens in all."""
    hidden = view.hidden_states(episodes.ids)
    rows, tokens = episodes.mask.nonzero(as_tuple=True)
    return hidden[rows, episodes.prompt_lengths[rows] - 1 + tokens]


def _log_probs(policy: PolicyView, states: Tensor, episodes: Episodes, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, float32 `[n, T]`, of the states before each reply token."""
    flat, entropies = token_log_probs(policy, states, episodes.replies[episodes.mask], temperature)
    return _spread(flat, episodes.mask), _spread(entropies, episodes.mask)


def token_log_probs(policy: PolicyView, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, given the last hidden states before them.

    Args:
        policy: whose output embedding makes logits of hidden states.
        hidden: `[N, hidden]`.
        tokens: int64 `[N]`.
        temperature: logits are divided by it.

    Returns:
        Log-probabilities and entropies, float32 `[N]`; see `reply_log_probs`.
    """
    if policy.trains_head:
        return _log_probs_and_entropy(policy.head(hidden), tokens, temperature)
    at_once = max(1, LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    return _TokenLogProbs.apply(hidden, tokens, policy.head, temperature, at_once)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities whose gradient is worked out at once, so that no logits wait for the backward pass.

    The log-probability of one token depends on one hidden state alone. Its derivative by that state is therefore a
    vector, which the forward pass computes while it has the logits; the backward pass scales it. The output embedding
    is frozen and needs no gradient itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], temperature: float, at_once: int
    ) -> tuple[Tensor, Tensor]:
        differentiate = ctx.needs_input_grad[0]
        log_probs, entropies, slopes = [], [], []
        for states, chosen in zip(hidden.split(at_once), tokens.split(at_once), strict=True):
            with torch.set_grad_enabled(differentiate):
                states = states.detach().requires_grad_(differentiate)
                logits = head(states)
            scaled = logits.detach().float() / temperature
            total = scaled.logsumexp(1, keepdim=True)
            log_probs.append((scaled.gather(1, chosen[:, None]) - total)[:, 0])
            if not differentiate:
                entropies.append(torch.zeros_like(log_probs[-1]))
                continue
            log_p = scaled.sub_(total)
            p = log_p.exp()
            entropies.append(-(log_p.nan_to_num_(neginf=0.0).mul_(p)).sum(1))
            by_logits = p.neg_().scatter_add_(1, chosen[:, None], torch.ones_like(p[:, :1])).div_(temperature)
            slopes.append(torch.autograd.grad(logits, states, by_logits.to(logits.dtype))[0])
            del logits, scaled, log_p, p, by_logits  # before the next block is made beside them
        if differentiate:
            ctx.save_for_backward(torch.cat(slopes))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None, None


def _log_probs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same, for an output embedding that is trained: autograd keeps the logits."""
    log_p = (logits.float() / temperature).log_softmax(1)
    return log_p.gather(1, tokens[:, None])[:, 0], torch.special.entr(log_p.detach().exp()).sum(1)


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    """One value per True of the mask, in its shape."""
    spread = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    spread[mask] = flat
    return spread
