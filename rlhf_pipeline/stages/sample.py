"""Several replies of one or more policies to each prompt, as rows that later stages read; with rewards, scored.

Of scored rows, `sft` learns the best reply to each prompt, which is best-of-n, `dpo` the best against the worst.
"""

import json
import math
import time
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.columns import SAMPLED
from rlhf_pipeline.data.encode import hash_of
from rlhf_pipeline.data.prepare import prompts_with_rows as read  # the rows of such a stage
from rlhf_pipeline.data.turns import columns_of
from rlhf_pipeline.hacking.forecast import best_of, of_best, order
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.ppo import numbers
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import Episodes, concatenate, diversity, sample
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.stages import engine
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import Asked, Made, prompts_of, publish, with_columns

CONFIG = None

__all__ = ["CONFIG", "prepare", "read", "run"]


class Inputs(NamedTuple):
    """What the stage works with: the recipe's tokenizer, and the prompts."""

    tokenizer: PreTrainedTokenizerBase
    asked: list[Asked]


def prepare(job: Job) -> Inputs:
    """Read the prompts.

    Raises:
        InputError: they cannot be read.
    """
    return Inputs(job.reader.tokenizer, prompts_of(job))


def run(job: Job) -> dict[str, Any]:
    """Sample, score and write rows; returns the final metrics. Resumes after the last batch that is done.

    Raises:
        InputError: no reply can be used.
        FunctionError: a reward of the user's fails; see `mixture.Rewards`.
    """
    job.progress.tell("loading")
    inputs = prepare(job)
    sampler = Sampler(job, inputs)
    asked, at_once = inputs.asked, max(1, sampler.sampling.batch_size // sampler.n)
    with Made(job, len(asked), "sampling") as made:
        while (done := len(made.items)) < len(asked):
            made.add(sampler.answer(asked[done : done + at_once]))
        items = made.items
    rows, figures = rows_of(asked, items), metrics_of(items)
    if job.stage.gold and len(job.stage.inits) == 1:
        figures |= metrics_of_gold(items, job.stage.gold)
    return publish(job, rows, figures | {"prompts/left_out": len(asked) - len(rows)})


class Sampler:
    """The policies that reply, and the rewards that score what they say, all adapters on one base."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        tokenizer, asked = inputs
        stage, recipe = job.stage, job.recipe
        assert stage.sampling is not None
        self.n, self.sampling, self.names = stage.n or 1, stage.sampling, stage.inits
        self.tokenizer, self.seed = tokenizer, recipe.seed
        scored_by = [reward.stage for reward in stage.scored_by if reward.stage is not None]
        staged = StagedBase(recipe.model, artifacts(job.run, list(dict.fromkeys([*self.names, *scored_by]))))
        self.views = [staged.policy(name) for name in self.names]
        of_stages = [recipe.stages[name].trainer if name in recipe.stages else {} for name in self.names]
        self.stops = [
            stop_tokens(tokenizer, view.generation_config, trainer)
            for view, trainer in zip(self.views, of_stages, strict=True)
        ]
        views_of = {name: staged.reward(name) for name in dict.fromkeys(scored_by)}
        models = [views_of[name] for name in scored_by]
        self.rewards = mixture.load(recipe, job.name, models, tokenizer) if stage.scored_by else None
        self.weighed = [reward.label for reward in stage.weighed]
        longest = max(len(one.ids) for one in asked) + self.sampling.max_new_tokens
        place, scores = f"stages.{job.name}.rollout", bool(stage.scored_by)
        self.engine = engine.start(recipe, stage.rollout, place, self.names, longest, shares_gpu=scores)

    def answer(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """All replies to some prompts.

        A reply's random numbers follow from the recipe's seed, its prompt, the policy's place and the reply's number.

        Returns:
            An object for each prompt: of all `replies` the text, the number of `tokens`, and whether they have `ended`;
            where there are rewards, the `scores`, their weighted sums, None where none that has a weight applies, and
            by name the `rewards`, an ensemble's `disagreement`, and what functions have `logged`; how many `distinct_2`
            pairs of tokens, and how many `unique` replies there are, as shares; and how many `seconds` it took.
        """
        started = time.monotonic()
        parts = [self._replies(asked, place) for place in range(len(self.views))]
        episodes = concatenate(parts, self.tokenizer.pad_token_id)
        scores = self._scores(episodes, [one.row for one in asked])
        texts = self.tokenizer.batch_decode(episodes.tokens, skip_special_tokens=True)
        seconds = (time.monotonic() - started) / len(asked)
        items = []
        for place in range(len(asked)):
            policies = torch.arange(len(self.views))[:, None] * len(asked) * self.n
            own = (policies + place * self.n + torch.arange(self.n)).flatten().to(episodes.ids.device)
            some = episodes.select(own)
            distinct_2, unique = diversity(some)
            item = {
                "replies": [texts[row] for row in own.tolist()],
                "policies": [name for name in self.names for _ in range(self.n)],
                "tokens": some.reply_lengths.tolist(),
                "ended": some.ended.tolist(),
                "distinct_2": distinct_2,
                "unique": unique,
                "seconds": seconds,
            }
            items.append(item | (_as_object(scores.select(own), self.weighed) if scores else {}))
        return items

    def _replies(self, asked: Sequence[Asked], place: int) -> Episodes:
        """The `n` replies of a policy to each prompt, those to the same one together."""
        draws = [(one, one.number * self.n + number) for one in asked for number in range(self.n)]
        return sample(
            self.views[place],
            [one.ids for one, _ in draws],
            response_length=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            stop_token_id=self.stops[place],
            pad_token_id=self.tokenizer.pad_token_id,
            at_once=self.sampling.batch_size,
            seeds=[hash_of([self.seed, one.prompt, place, number]) for one, number in draws],
            engine=self.engine,
        )

    def _scores(self, episodes: Episodes, rows: Sequence[str]) -> Scores | None:
        if self.rewards is None:
            return None
        of_replies = [row for row in rows for _ in range(self.n)] * len(self.views)
        return self.rewards(episodes, of_replies, at_once=self.sampling.batch_size)


def _as_object(scores: Scores, weighed: Sequence[str]) -> dict[str, Any]:
    """The scores of the replies to one prompt, as `Sampler.answer` says; those that are weighed decide."""
    applies = torch.stack([scores.by_name[name] for name in weighed]).isnan().logical_not().any(0).tolist()
    total = [value if is_scored else None for value, is_scored in zip(scores.total.tolist(), applies, strict=True)]
    by_name, disagreement = (
        {name: [None if math.isnan(value) else value for value in values.tolist()] for name, values in named.items()}
        for named in (scores.by_name, scores.disagreement)
    )
    return {"scores": total, "rewards": by_name, "disagreement": disagreement, "logged": scores.logged}


def rows_of(asked: Sequence[Asked], items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that later stages read, one for each prompt, in order.

    An empty reply, which no stage reads, and one to which no reward applies are left out, and a prompt that has none
    left; without scores a prompt needs two, unless it got one. Replies of the same text have the same score, that of
    the first one that ended by itself: they are the same reply to all who read them, and so no pair is made of them.
    """
    rows, made = [], []
    for one, item in zip(asked, items, strict=True):
        scores = _of_texts(item)
        kept = [i for i, text in enumerate(item["replies"]) if text.strip() and (scores is None or text in scores)]
        if len(kept) < (min(2, len(item["replies"])) if scores is None else 1):
            continue
        row = columns_of(one.prompt) | {"replies": [item["replies"][i] for i in kept]}
        if scores is not None:
            row["scores"] = [scores[text] for text in row["replies"]]
        row[SAMPLED] = {name: [item[name][i] for i in kept] for name in ("policies", "tokens", "ended")}
        if scores is not None:
            row[SAMPLED]["rewards"] = {name: [of[i] for i in kept] for name, of in item["rewards"].items()}
        rows.append(row)
        made.append(json.loads(one.row)["columns"])
    return with_columns(rows, made)


def _of_texts(item: dict[str, Any]) -> dict[str, float] | None:
    """The score of each text among the replies to a prompt; None where nothing scores them."""
    if "scores" not in item:
        return None
    found: dict[str, float] = {}
    for ended in (True, False):
        for text, score, has_ended in zip(item["replies"], item["scores"], item["ended"], strict=True):
            if has_ended == ended and score is not None:
                found.setdefault(text, score)
    return found


def metrics_of(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The final metrics.

    Returns:
        `replies`, how many there are, and of them `reply/length` in tokens and `reply/ended`, the share that something
        ended before `max_new_tokens`; `reply/empty`, the share of empty ones. `reply/distinct_2` and `reply/unique` are
        those of `rollout.diversity` among the replies to one prompt, as means over prompts. `tokens_per_second` is of
        sampling and scoring. Where there are rewards, `scores/mean` and `scores/std` over all replies that have a
        score; `scores/best`, the mean over prompts of the best score, and `scores/gain`, that less the mean score of
        the prompt: what taking the best of them gains; and what `numbers.of_rewards` says.
    """
    lengths = [length for item in items for length in item["tokens"]]
    texts = [text for item in items for text in item["replies"]]
    found: dict[str, float] = {
        "replies": len(texts),
        "reply/length": fmean(lengths),
        "reply/ended": fmean(ended for item in items for ended in item["ended"]),
        "reply/empty": fmean(not text.strip() for text in texts),
        "reply/distinct_2": fmean(item["distinct_2"] for item in items),
        "reply/unique": fmean(item["unique"] for item in items),
        "tokens_per_second": sum(lengths) / max(sum(item["seconds"] for item in items), 1e-9),
    }
    scores = [own for item in items if (own := [one for one in item.get("scores", ()) if one is not None])]
    if not scores:
        return found
    found |= {
        "scores/mean": fmean(score for own in scores for score in own),
        "scores/std": pstdev(score for own in scores for score in own),
        "scores/best": fmean(map(max, scores)),
        "scores/gain": fmean(max(own) - fmean(own) for own in scores),
    }

    def joined(key: str) -> dict[str, Tensor]:
        return {
            name: torch.tensor([math.nan if value is None else value for item in items for value in item[key][name]])
            for name in items[0][key]
        }

    logged = numbers.means([item["logged"] for item in items])
    return found | numbers.of_rewards(
        Scores(torch.zeros(len(texts)), joined("rewards"), joined("disagreement"), logged)
    )


def metrics_of_gold(items: Sequence[dict[str, Any]], gold: str) -> dict[str, float]:
    """The final metrics of choosing the best reply by score, by what gold says of it.

    Args:
        items: as `Sampler.answer` makes them, of one policy.
        gold: the name of that reward.

    Returns:
        `best_of_n/order`, see `forecast.order`; `best_of_n/gain`, what the reply with the highest score has more of
        gold than one that is drawn; each with its standard error, `_se`; and `best_of_n/peak_kl`, the KL in nats of
        the best of so many that gold is highest, if that is foreseen. What cannot be told is left out.
    """
    scores, values = (
        np.array([[math.nan if one is None else one for one in own] for own in listed], dtype=np.float64)
        for listed in ([item["scores"] for item in items], [item["rewards"][gold] for item in items])
    )
    found: dict[str, float] = {}
    in_order, best = order(scores, values), best_of(scores, values)
    if in_order is not None:
        found |= {"best_of_n/order": in_order.share, "best_of_n/order_se": in_order.se}
    if len(best) > 1 and len(best[-1].by_prompt) > 1:
        gains = best[-1].by_prompt - best[0].by_prompt
        found["best_of_n/gain"] = float(gains.mean())
        found["best_of_n/gain_se"] = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    foreseen = of_best(best)
    if foreseen is not None and (peak := foreseen.within_reach) is not None:
        found["best_of_n/peak_kl"] = peak**2
    return found
