"""All rewards of a stage, and their weighted sum, which is what a policy learns from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import user_code
from rlhf_pipeline.models.roles import ScoreView
from rlhf_pipeline.ppo.forward import disagreement, member_scores
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.rewards import classifier as classifier_of
from rlhf_pipeline.recipe.rewards import deviations
from rlhf_pipeline.rewards.batch import Batch
from rlhf_pipeline.rewards.classifier import Classifier
from rlhf_pipeline.rewards.functions import Function, call_all

NOT_GIVEN = ("prompt", "prompts", "completion", "completions", "completion_ids")  # columns that TRL's keywords replace


@dataclass(frozen=True)
class Part:
    """One reward.

    Attributes:
        label: what it is logged under.
        weight: its factor in the sum.
        source: the views of a reward model's members, a function, or a classifier.
        combine: of several members: see `recipe.rewards.deviations`.
    """

    label: str
    weight: float
    source: Sequence[ScoreView] | Function | Classifier
    combine: str = "mean"


class Rewards:
    """The rewards of a stage, all asked about the same replies.

    Args:
        parts: the rewards, at least one.
        tokenizer: makes texts of replies.
    """

    def __init__(self, parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> None:
        self.parts, self.tokenizer = parts, tokenizer

    @property
    def need_rows(self) -> bool:
        """Whether one of them reads more than token ids."""
        return any(isinstance(part.source, Function | Classifier) for part in self.parts)

    @torch.no_grad()
    def __call__(
        self, episodes: Episodes, rows: Sequence[str] | None = None, *, at_once: int, step: int = 0, max_steps: int = 0
    ) -> Scores:
        """Ask all of them.

        Args:
            episodes: B prompts with their replies.
            rows: the rows of the prompts, as `prepare.prompts_with_rows` has them; not read where none `need_rows`.
            at_once: how many replies a model reads together.
            step: how many optimizer steps are done.
            max_steps: how many there will be.

        Returns:
            The sum of weight times reward, over those that apply to a reply; and each reward by its label.

        Raises:
            FunctionError: see `functions.call_all`.
            ClassifierError: see `Classifier`.
        """
        total = torch.zeros(len(episodes), device=episodes.ids.device)
        found = Scores(total, {}, {})
        batch = self._batch(episodes, rows or (), step, max_steps) if self.need_rows else Batch([], [], [], {}, step)
        functions = [part.source for part in self.parts if isinstance(part.source, Function)]
        returned = iter(call_all(functions, batch))
        for part in self.parts:
            applies = torch.ones_like(total, dtype=torch.bool)
            if isinstance(part.source, Function):
                given = next(returned)
                found.logged |= {f"{part.label}/{name}": value for name, value in part.source.take_logged().items()}
                applies = torch.tensor([value is not None for value in given], device=total.device)
                values = torch.tensor([value if value is not None else torch.nan for value in given]).to(total)
            elif isinstance(part.source, Classifier):
                values = torch.tensor(part.source(batch, at_once)).to(total)
            else:
                scores = torch.zeros(len(part.source), len(episodes), device=total.device)
                for some in episodes.parts(at_once):
                    scores[:, some] = member_scores(part.source, episodes.select(some))
                values = combined(scores, part.combine)
                if len(scores) > 1:
                    found.disagreement[part.label] = disagreement(scores)
            found.by_name[part.label] = values
            total += part.weight * torch.where(applies, values, 0.0)
        return found

    def _batch(self, episodes: Episodes, rows: Sequence[str], step: int, max_steps: int) -> Batch:
        ids = episodes.tokens
        replies = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_of([json.loads(row) for row in rows], replies, ids, step, max_steps)


def load(
    recipe: Recipe, stage: str, models: Sequence[Sequence[ScoreView]], tokenizer: PreTrainedTokenizerBase
) -> Rewards:
    """The rewards that a recipe names for a stage.

    Args:
        recipe: the recipe.
        stage: the stage's name.
        models: its reward stages' models on the shared base, in the recipe's order; each the views of its members.
        tokenizer: the stage's.

    Raises:
        InputError: a function or a classifier cannot be loaded.
    """
    parts, left = [], iter(models)
    for place, reward in enumerate(recipe.stages[stage].scored_by):
        source: Any
        if reward.stage is not None:
            source = next(left)
        elif reward.model is not None:
            source = Classifier(classifier_of(recipe, stage, place))
        else:
            source = Function(str(reward.function), recipe.folders, f"stages.{stage}.rewards.{place}.function")
        parts.append(Part(reward.label, reward.weight, source, reward.combine))
    return Rewards(parts, tokenizer)


def combined(scores: Tensor, combine: str) -> Tensor:
    """One score of a reply from those of an ensemble's members.

    After Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization": the mean, the worst case `min`, or
    the mean less k times the standard deviation over the members (theirs is less k times the variance).

    Args:
        scores: float32 `[members, B]`.
        combine: `mean`, `min` or `mean - k*std`, std being what `disagreement` says.

    Returns:
        Float32 `[B]`.
    """
    k = deviations(combine)
    if k is None:
        return scores.amin(0)
    return scores.mean(0) - k * disagreement(scores) if k else scores.mean(0)


def batch_of(
    rows: Sequence[dict[str, Any]], replies: Sequence[str], ids: Sequence[Sequence[int]], step: int, max_steps: int
) -> Batch:
    """Replies with their prompts and rows, as TRL gives them to reward functions.

    Args:
        rows: of each reply its `prompt`, text or turns, and the row's `columns`.
        replies: texts without special tokens.
        ids: their token ids.
        step: how many optimizer steps are done.
        max_steps: how many there will be.
    """
    prompts = [row["prompt"] for row in rows]
    return Batch(
        [prompt if isinstance(prompt, str) else [_plain(turn) for turn in prompt] for prompt in prompts],
        [
            reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}]
            for prompt, reply in zip(prompts, replies, strict=True)
        ],
        ids,
        user_code.columns([row["columns"] for row in rows], NOT_GIVEN),
        step,
        max_steps,
    )


def _plain(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without the tools of its conversation, which are a column where there are some."""
    return {key: value for key, value in turn.items() if key != "tools"}
