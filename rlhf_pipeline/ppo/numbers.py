"""The numbers of PPO: what an update and an evaluation are logged as, and the replies that are written down."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.ppo.advantages import explained_variance, masked_mean
from rlhf_pipeline.ppo.rollout import Episodes, diversity
from rlhf_pipeline.rundir import jsonl

SAMPLES = 4  # episodes that are written down at a time
LATEST = {"objective/kl_coef", "skipped_steps", "lr", "lr_value", "episode"}  # what only counts, or is set


@dataclass
class Scores:
    """What the rewards say of B replies.

    Attributes:
        total: float32 `[B]`, the weighted sum, which is what the policy learns from.
        by_name: of each reward float32 `[B]`, without its weight; NaN where it does not apply.
        disagreement: of each ensemble float32 `[B]`, the standard deviation over its members.
        logged: what functions have logged themselves, as NAME/METRIC.
    """

    total: Tensor
    by_name: dict[str, Tensor]
    disagreement: dict[str, Tensor]
    logged: dict[str, float] = field(default_factory=dict)

    def select(self, rows: Tensor) -> "Scores":
        """Those of some replies."""
        by_name, disagreement = (
            {name: values[rows] for name, values in named.items()} for named in (self.by_name, self.disagreement)
        )
        return Scores(self.total[rows], by_name, disagreement, self.logged)


class Reward(Protocol):
    """What scores replies; see `rewards.mixture.Rewards`."""

    def __call__(
        self, episodes: Episodes, rows: Sequence[str] | None, *, at_once: int, step: int, max_steps: int
    ) -> Scores:
        """Score the replies of all episodes; `rows` are those that the prompts are from."""


@dataclass
class Scored:
    """Episodes and what the roles and the rewards say of them; tensors as in `advantages`.

    Attributes:
        log_probs, ref_log_probs, values: float32 `[B, T]`.
        rewards: of the replies.
        kl: float32 `[B, T]`, from `kl_per_token`.
    """

    episodes: Episodes
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    rewards: Scores
    kl: Tensor

    @property
    def scores(self) -> Tensor:
        """The sum of the rewards, float32 `[B]`."""
        return self.rewards.total

    @property
    def mean_kl(self) -> float:
        """The mean over episodes of the KL of a whole reply, in nats."""
        return self.kl.sum(1).mean().item()


def of_rollout(
    scored: Scored, scores: Tensor, returns: Tensor, ended: Tensor, kl_coef: float, eos_token_id: int | None
) -> dict[str, float]:
    """What an update's episodes are logged as.

    Args:
        scored: the episodes.
        scores: what they were trained on, float32 `[B]`.
        returns: the targets of the values, float32 `[B, T]`.
        ended: bool `[B]`, whose reply has ended.
        kl_coef: β of this update.
        eos_token_id: the tokenizer's EOS, if it has one.
    """
    episodes, mask = scored.episodes, scored.episodes.mask
    gap = (episodes.sampled_log_probs - scored.log_probs).abs() * mask
    distinct_2, unique = diversity(episodes)
    non_score_reward = -kl_coef * scored.mean_kl
    return {
        "objective/kl": scored.mean_kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-scored.log_probs * mask).sum(1).mean().item(),
        "objective/non_score_reward": non_score_reward,
        "objective/rlhf_reward": non_score_reward + scores.mean().item(),
        "objective/scores": scores.mean().item(),
        "reward/score_mean": scored.scores.mean().item(),
        "reward/score_std": scored.scores.std(correction=0).item(),
        **of_rewards(scored.rewards),
        "value/explained_variance": explained_variance(scored.values, returns, mask).item(),
        "reply/length": episodes.reply_lengths.float().mean().item(),
        "reply/ended": ended.float().mean().item(),
        "reply/distinct_2": distinct_2,
        "reply/unique": unique,
        "val/num_eos_tokens": int(((episodes.replies == eos_token_id) & mask).sum()),
        "rollout/log_prob_gap_mean": masked_mean(gap, mask).item(),
        "rollout/log_prob_gap_max": gap.max().item(),
    }


def of_rewards(rewards: Scores) -> dict[str, float]:
    """Of each reward by its name, the mean and the standard deviation over the replies that it applies to.

    Of an ensemble also the `disagreement`, the mean over replies of the standard deviation over members. A reward that
    applies to none has no numbers. And what functions have logged, under their own names.
    """
    found: dict[str, float] = {}
    for name, values in rewards.by_name.items():
        own = values[~values.isnan()]
        if len(own):
            found[f"rewards/{name}/mean"] = own.mean().item()
            found[f"rewards/{name}/std"] = own.std(correction=0).item()
    found |= {f"rewards/{name}/disagreement": own.mean().item() for name, own in rewards.disagreement.items()}
    return found | {f"rewards/{name}": value for name, value in rewards.logged.items()}


def concatenated(parts: Sequence[Scores]) -> Scores:
    """The rewards of several batches, as of one; what functions have logged are means, weighed by replies."""
    first = parts[0]
    logged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part.logged):
        having = [(len(part.total), part.logged[name]) for part in parts if name in part.logged]
        logged[name] = sum(count * value for count, value in having) / sum(count for count, _ in having)
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.by_name[name] for part in parts]) for name in first.by_name},
        {name: torch.cat([part.disagreement[name] for part in parts]) for name in first.disagreement},
        logged,
    )


def of_training(sums: dict[str, Tensor], norms: dict[str, list[float]]) -> dict[str, float]:
    """What an update's passes over its episodes are logged as.

    Args:
        sums: sums over the tokens of all passes, by name; `tokens` is how many there were. `loss/ptx` is a sum over
            `ptx_steps` steps.
        norms: of each role, the gradient's norm at each optimizer step.
    """
    divided_by = {"loss/ptx": sums["ptx_steps"]}
    means = {name: (value / divided_by.get(name, sums["tokens"])).item() for name, value in sums.items()}
    means = {name: value for name, value in means.items() if name not in ("tokens", "ptx_steps")}
    if "val/ratio" in means:
        means["val/ratio_var"] -= (means["val/ratio"] - 1) ** 2  # it was taken around 1
    return means | {f"{role}/grad_norm": sum(of_role) / len(of_role) for role, of_role in norms.items()}


def of_speed(episodes: Episodes, clock: Sequence[float], epochs: int) -> dict[str, float]:
    """How long an update took.

    Args:
        episodes: the update's.
        clock: seconds at the start, after sampling, after scoring, and after optimising.
        epochs: passes over the episodes.
    """
    sampling, scoring, optimising = (after - before for before, after in itertools.pairwise(clock))
    trained_tokens = epochs * int((episodes.prompt_lengths + episodes.reply_lengths).sum())
    return {
        "eps": len(episodes) / (clock[-1] - clock[0]),
        "rollout/seconds": sampling + scoring,
        "rollout/sampling_seconds": sampling,
        "rollout/tokens_per_second": int(episodes.mask.sum()) / (sampling + scoring),
        "optimise/seconds": optimising,
        "optimise/tokens_per_second": trained_tokens / optimising,
    }


def means(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over updates, each over those that have the number; of what only counts or is set, the latest."""
    found = {}
    for name in dict.fromkeys(name for numbers in updates for name in numbers):
        values = [numbers[name] for numbers in updates if name in numbers]
        found[name] = values[-1] if name in LATEST else sum(values) / len(values)
    return found


def named(values: dict[str, Tensor], row: int) -> dict[str, float | None]:
    """The numbers of one reply by name; None for NaN, where a reward does not apply."""
    found = {name: of_replies[row].item() for name, of_replies in values.items()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def write_samples(
    file: Path, scored: Scored, ended: Tensor, tokenizer: PreTrainedTokenizerBase, split: str, step: int
) -> None:
    """Append the first few episodes to a file, one JSON object a line.

    Its keys: `step`, `split`, `prompt` and `completion` as text, `score`, the reply's `kl` in nats, and `ended`; where
    there are several rewards, `rewards` by name, null where one does not apply; of ensembles `disagreement` by name.
    """
    episodes, rewards = scored.episodes, scored.rewards
    written = []
    for row in range(min(SAMPLES, len(episodes))):
        ids, start = episodes.ids[row].tolist(), int(episodes.prompt_lengths[row])
        end = start + int(episodes.reply_lengths[row])
        written.append(
            {
                "step": step,
                "split": split,
                "prompt": tokenizer.decode(ids[:start], skip_special_tokens=True),
                "completion": tokenizer.decode(ids[start:end], skip_special_tokens=True),
                "score": scored.scores[row].item(),
                **({"rewards": named(rewards.by_name, row)} if len(rewards.by_name) > 1 else {}),
                **({"disagreement": named(rewards.disagreement, row)} if rewards.disagreement else {}),
                "kl": scored.kl[row].sum().item(),
                "ended": bool(ended[row]),
            }
        )
    jsonl.append(file, written)
