"""What merging changed: the written model beside the stage's own, on real prompts.

The two are in memory one after the other, never together: each is on the GPU where there is one with room for it.
"""

import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline import stages
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.comparison.measure import BATCH_SIZE, default_prompts, prompts_of
from rlhf_pipeline.data.encode import Ids, encode_prompts
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import Head, device
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.roles import ScoreView
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.rollout import Episodes, sample
from rlhf_pipeline.recipe.schema import BASE, Recipe
from rlhf_pipeline.rundir.finished import model_of, trained_with
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.use.score import context_of, score_tokens

KEPT_LOGITS = 2**28  # elements that wait for the merged model: 1 GiB in float32
LOGITS_AT_ONCE = 2**26  # elements of one forward pass
Found = dict[str, Any]
OF_POLICY = ("tokens", "kl", "kl_of_training", "equal_replies")
OF_REWARD = ("score_difference", "score_difference_max", "score_spread", "same_order")


@torch.no_grad()
def of_policy(run: Path, recipe: Recipe, stage: str, start: Path | None, folder: Path, n: int) -> Found:
    """Compare the merged policy with the stage's own, the one that was judged.

    Both answer the first `n` prompts of `evaluate`, else of the stage's own data, greedily. Along the replies of the
    stage's own, `kl` is the mean over tokens of KL(own || merged), of the whole distribution at temperature 1, in nats;
    `kl_of_training` is the same from its own to the model that it started from, as a scale. Of long replies of models
    with a large vocabulary, the first tokens count.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the stage.
        start: the adapter that it started from; None for the base.
        folder: what `write_merged` wrote.
        n: how many prompts.

    Returns:
        `prompts`, the key of the recipe that they are from; `n`, `tokens`, `kl`, `kl_of_training`, `equal_replies`; and
        None for what `of_reward` measures.

    Raises:
        InputError: the data or the model cannot be read.
    """
    asked, spec = default_prompts(recipe, n) if recipe.evaluate else prompts_of(recipe, stage, n)
    folders = {stage: RunDirectory(run).adapter(stage)} | ({"its start": start} if start else {})
    base = StagedBase(model_of(run, recipe, stage), folders)
    ids = encode_prompts(base.tokenizer, spec, [prompt for prompt, _ in asked])
    own = base.policy(stage)
    asking = {
        "response_length": wanted.default_settings(recipe)["max_new_tokens"],
        "temperature": 0,
        "stop_token_id": stop_tokens(base.tokenizer, own.generation_config, trained_with(run, stage)),
        "pad_token_id": base.tokenizer.pad_token_id,
        "at_once": recipe.evaluate.batch_size if recipe.evaluate else BATCH_SIZE,
    }
    episodes = sample(own, ids, **asking)
    longest = max(1, KEPT_LOGITS // (len(ids) * base.causal_lm.config.get_text_config().vocab_size))
    ours = list(_logits(own, episodes, longest))
    of_start = _logits(base.policy("its start" if start else BASE), episodes, longest)
    of_training = torch.cat([_kl(one, other) for one, other in zip(ours, of_start, strict=True)])
    episodes = _moved(episodes, torch.device("cpu"))
    del base, own, of_start
    merged = _load(folder, recipe, "causal")
    again = _moved(sample(merged, ids, **asking), torch.device("cpu"))
    theirs = _logits(merged, _moved(episodes, merged.device), longest)
    kl = torch.cat([_kl(one, other) for one, other in zip(ours, theirs, strict=True)])
    return {
        "prompts": "evaluate.data" if recipe.evaluate else f"{stage}.data",
        "n": len(ids),
        "tokens": len(kl),
        "kl": _finite(kl.mean().item()),
        "kl_of_training": _finite(of_training.mean().item()),
        "equal_replies": sum(one == other for one, other in zip(_replies(episodes), _replies(again), strict=True)),
        **dict.fromkeys(OF_REWARD),
    }


@torch.no_grad()
def of_reward(run: Path, recipe: Recipe, stage: str, folder: Path, n: int) -> Found:
    """Compare the scores of the merged reward model with those of the stage's own.

    Both score the two replies of the first `n` pairs of the stage's data; held-out ones where it has some.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the reward stage.
        folder: what `write_merged` wrote.
        n: how many pairs.

    Returns:
        `prompts`, the key of the recipe that the pairs are from; `n`; `score_difference`, the mean of the absolute
        differences; `score_difference_max`; `score_spread`, the standard deviation of the stage's own scores; and
        `same_order`, how many pairs both put in the same order; and None for what `of_policy` measures.

    Raises:
        InputError: the data or the model cannot be read.
    """
    model, data = model_of(run, recipe, stage), recipe.stages[stage].data
    prepared = stages.BY_KIND["reward"].read(data, load_tokenizer(model), recipe.seed)
    table = prepared.train if prepared.held_out is None else prepared.held_out
    base = StagedBase(model, {stage: RunDirectory(run).adapter(stage)})
    context = context_of(base) or math.inf
    rows = table[: min(n, len(table))]
    pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    replies = [ids for pair in pairs if max(map(len, pair)) <= context for ids in pair]
    if not replies:
        raise InputError("there is no pair that the model can take", place=f"stages.{stage}.data")
    (own,), padding = base.reward(stage), base.tokenizer.pad_token_id
    ours = _in_batches(replies, partial(_own_scores, own, padding))
    del base, own
    merged, tokenizer = _load(folder, recipe, "score"), AutoTokenizer.from_pretrained(folder)

    theirs = _in_batches(replies, partial(_merged_scores, merged, tokenizer))
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    margins = [[of[row] - of[row + 1] for row in range(0, len(replies), 2)] for of in (ours, theirs)]
    return {
        "prompts": f"{stage}.data",
        "n": len(replies) // 2,
        "score_difference": _finite(statistics.fmean(differences)),
        "score_difference_max": _finite(max(differences)),
        "score_spread": _finite(statistics.stdev(ours)),
        "same_order": sum((one > 0) == (other > 0) for one, other in zip(*margins, strict=True)),
        **dict.fromkeys(OF_POLICY),
    }


def _load(folder: Path, recipe: Recipe, head: Head) -> Any:
    """The merged model, as others load it; on the CPU where it does not fit on the GPU."""
    gc.collect()  # what was measured before it is in circles
    place = device()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        place = place if size * 1.2 < torch.cuda.mem_get_info(place)[0] else torch.device("cpu")
    auto: Any = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    code = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    ours_alone = list(code) == [AutoModelForSequenceClassification.__name__]  # see `weights.write_merged`
    trusted = recipe.model.trust_remote_code or ours_alone
    options = {"trust_remote_code": trusted, "dtype": "auto", "device_map": {"": place}}
    return auto.from_pretrained(folder, **options).eval()


def _logits(model: Any, episodes: Episodes, longest: int) -> Iterator[Tensor]:
    """Of each row the logits before its first `longest` reply tokens: float32 `[t, vocabulary]`, on the CPU."""
    at_once = max(1, LOGITS_AT_ONCE // (episodes.ids.shape[1] * model.config.get_text_config().vocab_size))
    for rows in torch.arange(len(episodes), device=episodes.ids.device).split(at_once):
        some = episodes.select(rows)
        logits = model(input_ids=some.ids).logits
        for row, prompt, reply in zip(logits, some.prompt_lengths, some.reply_lengths, strict=True):
            yield row[int(prompt) - 1 :][: min(int(reply), longest)].float().cpu()


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of distributions given as logits `[t, vocabulary]`, in nats, float64 `[t]`."""
    log_p, log_q = one.double().log_softmax(1), other.double().log_softmax(1)
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(1)


def _moved(episodes: Episodes, place: torch.device) -> Episodes:
    return Episodes(*(getattr(episodes, name).to(place) for name in Episodes.__dataclass_fields__))


def _replies(episodes: Episodes) -> list[list[int]]:
    """The token ids of each reply."""
    lengths = episodes.reply_lengths.tolist()
    return [row[:length] for row, length in zip(episodes.replies.tolist(), lengths, strict=True)]


def _own_scores(view: ScoreView, pad_token_id: int, replies: Sequence[Ids]) -> list[float]:
    return score_tokens([view], [([], ids) for ids in replies], pad_token_id)[0].tolist()


def _merged_scores(model: Any, tokenizer: PreTrainedTokenizerBase, replies: Sequence[Ids]) -> list[float]:
    batch = tokenizer.pad({"input_ids": list(replies)}, return_tensors="pt").to(model.device)
    return model(**batch).logits[:, 0].float().tolist()


def _in_batches(replies: Sequence[Ids], scores: Callable[[Sequence[Ids]], list[float]]) -> list[float]:
    """The scores of replies in their order, those of like length taken together."""
    order = sorted(range(len(replies)), key=lambda row: len(replies[row]))
    found = [0.0] * len(replies)
    for start in range(0, len(order), BATCH_SIZE):
        some = order[start : start + BATCH_SIZE]
        for row, score in zip(some, scores([replies[row] for row in some]), strict=True):
            found[row] = score
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
