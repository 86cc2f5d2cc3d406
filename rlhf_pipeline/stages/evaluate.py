"""The judge: replies of a policy to held-out prompts, scored by a function of the user's."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import kinds, ranks, user_code
from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.turns import Prompt, as_text, as_turns
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.prompts import seeds
from rlhf_pipeline.ppo.rollout import Engine, sample
from rlhf_pipeline.ppo.vllm_engine import VLLMEngine
from rlhf_pipeline.recipe.schema import Evaluate
from rlhf_pipeline.rewards.trial import a_reply
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.layout import SAMPLES
from rlhf_pipeline.shares import standard_error
from rlhf_pipeline.stages import engine, sharded, soundness
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.user_code import FunctionError

Judge = Callable[..., Sequence[float | None]]
Asked = Sequence[tuple[Prompt, dict[str, Any]]]  # prompts, each with its row, whose other columns the judge gets
# What a judge gets beside the columns of the data; a column of such a name is not given.
GIVEN = ("prompts", "completions", "messages")
PLACE = "evaluate.judge"


def prepare(job: Job) -> tuple[Evaluate, Judge | None, Asked] | None:
    """The judge, if it is a function, and the first `n` prompts, each with its row; None without `evaluate`.

    Raises:
        InputError: judge or data cannot be used.
    """
    spec = job.recipe.evaluate
    if spec is None:
        return None
    judge = user_code.load(spec.judge, job.recipe.folders, PLACE) if spec.judge is not None else None
    return spec, judge, first_prompts(spec.data, spec.n)


def try_judge(spec: Evaluate, judge: Judge, asked: Asked) -> None:
    """Call the judge on two rows of its data, as it will be called after training.

    The replies are those of the rows where they have some, else made up.

    Args:
        spec: the recipe's `evaluate`.
        judge: the function.
        asked: its prompts.

    Raises:
        InputError: it fails, or returns something other than two numbers.
    """
    try:
        ask(judge, asked[:2], [a_reply(row) for _, row in asked[:2]])
    except Exception as error:  # a user's function may fail in any way
        what = str(error) if isinstance(error, FunctionError) else f"it raised {user_code.said(error)}"
        raise InputError(
            f"`{spec.judge}` fails on the first rows of `evaluate.data`: {what}",
            place=PLACE,
            hint="it gets lists of texts, `prompts` and `completions`, of turns, `messages`, and all other columns; it "
            "returns a number for each reply",
        ) from None


def judge_policy(
    job: Job, model: Any, tokenizer: PreTrainedTokenizerBase, of_training: VLLMEngine | None = None
) -> dict[str, float]:
    """Sample a reply to each prompt and have it judged; writes them to `samples.jsonl`, after those of training.

    Without a function to judge them, their `judge` there is null.

    Every stage samples with the recipe's seed, so that stages differ by their weights alone.

    Of several ranks the first one does all that alone, and has the numbers. Where they have divided the model among
    them, each must take part: they share the replies, and the first one alone reads the data and asks the judge.

    Args:
        job: the stage.
        model: what has `generate` and answers as the stage's policy.
        tokenizer: the stage's tokenizer.
        of_training: the engine of training, which samples here as well if it is the one that `evaluate` wants.

    Returns:
        What `summary` says, where the judge is a function, and `generation_gap`, see `soundness.generation_gap`; or
        nothing where the recipe has no `evaluate`.

    Raises:
        FunctionError: see `ask`.
    """
    spec = job.recipe.evaluate
    if spec is None or not (ranks.is_first() or sharded.is_divided(model)):
        return {}
    prepared = prepare(job) if ranks.is_first() else None
    judge, asked = prepared[1:] if prepared else (None, [])
    times, wants_engine = spec.samples, spec.rollout is not None and spec.rollout.is_vllm
    sampler = of_training if wants_engine else None
    if wants_engine and sampler is None:
        sampler = engine.start(
            job.recipe, spec.rollout, engine.EVALUATE, [job.name], engine.of_evaluation(spec, tokenizer)
        )
    asked = [one for _ in range(times) for one in asked]
    prompts = [prompt for prompt, _ in asked]
    replies = sample_replies(
        model,
        tokenizer,
        spec,
        prompts,
        job.recipe.seed,
        stop_tokens(tokenizer, model.generation_config, job.stage.trainer),
        lambda done: job.progress.tell("judging", done, len(prompts)),
        sampler,
        job.recipe.divides(job.name),
    )
    gap: float | None = None
    with sharded.in_step(model) as policy:
        if ranks.is_first():
            some = encode_prompts(tokenizer, spec.data, prompts[: soundness.PROMPTS])
            gap = soundness.generation_gap(policy, some, tokenizer.pad_token_id, sampler)
    if sampler is not None and sampler is not of_training:
        sampler.close()
    if gap is None:
        return {}
    scores = ask(judge, asked, replies) if judge is not None else [None] * len(replies)
    judged = (
        {"prompt": prompt, "completion": reply, "judge": score}
        for prompt, reply, score in zip(prompts, replies, scores, strict=True)
    )
    jsonl.rewrite(job.folder / SAMPLES, lambda row: "judge" not in row, judged)
    return (summary(scores, times) if judge is not None else {}) | {kinds.GAP: gap}


def summary(scores: Sequence[float | None], times: int) -> dict[str, float]:
    """The numbers of a judgement.

    Args:
        scores: of replies, all prompts once, then all once more, and so on; None where the judge had no opinion.
        times: how often each prompt was answered.

    Returns:
        `judge_mean`, the mean over prompts; `judge_mean_se`, its standard error; and `judge_replies`, how many replies
        have a score. The error is that of drawing prompts: the deviation of their means over √prompts. Where all are 0
        or all 1 it is that of a share; see `shares.standard_error`. There is none of a single prompt, nor where all
        are the same number otherwise.

    Raises:
        FunctionError: none has.
    """
    prompts = len(scores) // times
    by_prompt = [[score for score in scores[prompt::prompts] if score is not None] for prompt in range(prompts)]
    means = [statistics.fmean(own) for own in by_prompt if own]
    if not means:
        raise FunctionError("the judge has no opinion on any reply: it returned None for all", PLACE)
    numbers: dict[str, float] = {"judge_mean": sum(means) / len(means), "judge_replies": sum(map(len, by_prompt))}
    if len(set(means)) > 1:
        numbers["judge_mean_se"] = statistics.stdev(means) / math.sqrt(len(means))
    elif len(means) > 1 and means[0] in (0, 1):
        numbers["judge_mean_se"] = standard_error(sum(means), len(means))
    return numbers


def ask(judge: Judge, asked: Asked, replies: Sequence[str]) -> list[float | None]:
    """Have replies judged.

    The judge gets texts: `prompts` and `completions`; under `messages`, of each the turns, the reply the last one; and
    every other column of the data, all as keywords, as far as it takes them. A prompt that is a conversation is, as
    text, the user's turn, or of several turns all, each after its role.

    Args:
        judge: the function.
        asked: the prompts.
        replies: one to each.

    Returns:
        A finite number for each reply, or None where the judge has no opinion.

    Raises:
        FunctionError: it returned something else, wants a column that the data do not have, or called `sys.exit`.
    """
    given: dict[str, Any] = user_code.columns([row for _, row in asked], ("prompt", "completion", *GIVEN))
    prompts = [as_text(prompt) for prompt, _ in asked]
    given |= {
        "prompts": prompts,
        "completions": list(replies),
        "messages": [
            [*as_turns(prompt), {"role": "assistant", "content": reply}]
            for (prompt, _), reply in zip(asked, replies, strict=True)
        ],
    }
    given = user_code.taken(judge, given, "the judge", PLACE)
    try:
        return user_code.numbers(judge(**given), prompts, "the judge", PLACE)
    except SystemExit as end:
        raise FunctionError(f"the judge called {user_code.said(end)}", PLACE) from end


def judge_artifact(job: Job, artifact: Path) -> dict[str, float]:
    """Judge the policy that a stage left; see `judge_policy`. Ranks divide it among them as training did."""
    if job.recipe.evaluate is None:
        return {}
    job.progress.tell("loading")
    tokenizer = load_tokenizer(job.recipe.model)
    base = load_base(job.recipe.model, tokenizer, to_divide=True)
    policy = adapters.with_policy_adapter(base, job.stage.lora, artifact)
    return judge_policy(job, sharded.divide(policy), tokenizer)


def sample_replies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    spec: Evaluate,
    prompts: Sequence[Prompt],
    seed: int,
    stops: list[int],
    tell: Callable[[int], None] = lambda done: None,
    sampler: Engine | None = None,
    by_place: bool = False,
) -> list[str]:
    """One reply per prompt, without special tokens; greedy where the temperature is 0.

    Of a model that ranks have divided among them, each samples some of the batches, and has all replies.

    Args:
        model: what answers.
        tokenizer: its tokenizer.
        spec: the recipe's `evaluate`.
        prompts: of several ranks, those of the first one count.
        seed: decides the random numbers.
        stops: from `reply_end.stop_tokens`.
        tell: is called before each batch with how many replies there are.
        sampler: what samples, if not the model itself: all replies are one batch to it.
        by_place: each reply has random numbers of its own, so that they are the same by any number of ranks; else a
            batch has those that follow on the batch before it.
    """
    torch.manual_seed(seed)
    model.eval()
    given, is_divided = prompts, sharded.is_divided(model)
    prompts = ranks.from_first(lambda: given) if is_divided else given
    at_once = spec.batch_size if sampler is None else len(prompts)
    starts = range(0, len(prompts), at_once)
    mine = starts[ranks.index() :: ranks.count()] if is_divided else starts
    own: dict[int, list[str]] = {}
    with sharded.in_step(model) as policy:
        for start in mine:
            tell(start)
            batch = encode_prompts(tokenizer, spec.data, prompts[start : start + at_once])
            episodes = sample(
                policy,
                batch,
                response_length=spec.max_new_tokens,
                temperature=spec.temperature,
                stop_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                at_once=len(batch),
                seeds=seeds(seed, "evaluate", places=range(start, start + len(batch))) if by_place else None,
                engine=sampler,
            )
            own[start] = tokenizer.batch_decode(episodes.tokens, skip_special_tokens=True)
    parts = ranks.gathered(own) if is_divided else [own]
    by_start = {start: replies for part in parts for start, replies in part.items()}
    return [reply for start in starts for reply in by_start[start]]
