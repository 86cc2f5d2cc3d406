"""The policy that a reward would give, exactly, over the replies that were sampled. numpy alone."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.arena.laplace import Floats


class Drift(NamedTuple):
    """How far a policy goes from the one that it is measured from, over k replies to one prompt.

    Attributes:
        probabilities: `[k]`: that it gives each reply; their sum is 1.
        expected_reward: under it.
        base_reward: the same under the policy that it is measured from.
        kl: its KL divergence from that policy, in nats; at most -log of the least base probability.
    """

    probabilities: Floats
    expected_reward: float
    base_reward: float
    kl: float


def tilted(rewards: ArrayLike, beta: float, base: ArrayLike | None = None) -> Drift:
    """The policy π ∝ π_ref exp(r/β), which of all has the most reward less β times its KL from π_ref.

    It is what PPO with `kl_coef: β` and DPO with `beta: β` would reach if they could (Rafailov et al. 2023, "Direct
    Preference Optimization", equation 4), and here exact, because there are no other replies than these k.

    Args:
        rewards: `[k]`: of each reply. A constant that is added changes nothing but the mean rewards.
        beta: the weight of the KL, above 0.
        base: `[k]`: what π_ref gives each reply, up to a factor; by default all the same, as of samples.

    Raises:
        ValueError: `beta` is not above 0, or there is no reply, or `base` is not of positive numbers.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    weight = np.ones_like(reward) if base is None else np.asarray(base, dtype=np.float64)
    if not beta > 0:
        raise ValueError(f"beta is {beta}, and has to be above 0")
    if not len(reward) or weight.shape != reward.shape or not (weight > 0).all():
        raise ValueError("each of one or more replies needs a probability above 0")
    before = np.log(weight) - np.log(weight.sum())
    # The quotient is infinite for the smallest β; the differences to the best reply are what counts.
    scores = before + (reward - reward.max()) / beta
    top = scores.max()
    after = scores - (top + np.log(np.sum(np.exp(scores - top))))
    probabilities = np.exp(after)
    taken = probabilities > 0
    kl = float(np.sum(probabilities[taken] * (after[taken] - before[taken])))
    return Drift(probabilities, float(probabilities @ reward), float(np.exp(before) @ reward), max(kl, 0.0))
