"""How often an AI finds a policy's replies better than those of another one to the same prompts."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_pipeline import kinds
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.judges.bias import Judged, figures
from rlhf_pipeline.judges.function import FunctionJudge, try_function
from rlhf_pipeline.judges.load import load
from rlhf_pipeline.judges.local import tokens_of
from rlhf_pipeline.judges.question import Judge, Question, read_template
from rlhf_pipeline.judges.verdicts import Pair, Verdict, criteria, verdicts
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.recipe.schema import AIJudge, Recipe
from rlhf_pipeline.rewards.trial import a_reply
from rlhf_pipeline.rundir import finished, jsonl
from rlhf_pipeline.rundir.layout import ANSWERS, JUDGEMENTS, SAMPLES
from rlhf_pipeline.shares import interval
from rlhf_pipeline.stages.evaluate import sample_replies
from rlhf_pipeline.stages.job import Job, Reader
from rlhf_pipeline.stages.judge import Compared, at_once, judgement

PLACE = "evaluate.ai_judge"
Asked = Sequence[tuple[Prompt, dict[str, Any]]]  # prompts, each with its row


def try_judge(recipe: Recipe, asked: Asked, reader: Reader) -> None:
    """See that the AI of the recipe's `evaluate` can be asked; an address is asked elsewhere.

    Args:
        recipe: the recipe.
        asked: the prompts of `evaluate`, each with its row.
        reader: has the tokenizer.

    Raises:
        InputError: it cannot.
    """
    spec = recipe.evaluate.ai_judge if recipe.evaluate else None
    if spec is None:
        return
    criteria(spec, PLACE)
    if spec.is_function:
        judge = FunctionJudge(spec.model, recipe.folders, f"{PLACE}.model")
        try_function(judge, [Question(prompt, a_reply(row), "", "Which is better?", row) for prompt, row in asked[:2]])
    elif spec.is_local:
        read_template(spec.template, f"{PLACE}.template")
        for word in spec.answers:
            tokens_of(reader.tokenizer, word, f"{PLACE}.answers")


def against_start(job: Job) -> dict[str, float]:
    """Have an AI compare the replies of a stage's policy, in its `samples.jsonl`, with those of what it starts from.

    That one, a stage, an adapter from outside or the base, replies to the same prompts with the same random numbers.
    Everything asked and answered is in the stage's `judgements.jsonl` then.

    Returns:
        `win_rate` with `win_rate_low`, `win_rate_high` and `win_rate_ties`, see `rate`, and the judge's `figures`; or
        nothing where the recipe has no AI for this stage.

    Raises:
        RunError: none of the judge's answers can be read, or its address does not answer.
    """
    spec, ai = job.recipe.evaluate, job.recipe.ai_judge_of(job.name)
    if spec is None or ai is None:
        return {}
    asked = [one for _ in range(spec.samples) for one in first_prompts(spec.data, spec.n)]
    prompts = [prompt for prompt, _ in asked]
    ours = [str(row["completion"]) for row in jsonl.rows(job.folder / SAMPLES) if "judge" in row]
    start = job.stage.start
    job.progress.tell("loading")
    gc.collect()  # what has trained in this process is not needed any more
    torch.cuda.empty_cache()
    staged = StagedBase(job.recipe.model, artifacts(job.run, [name for name in (start, ai.stage) if name]))
    view = staged.policy(start)
    theirs = sample_replies(
        view,
        staged.tokenizer,
        spec,
        prompts,
        job.recipe.seed,
        stop_tokens(staged.tokenizer, view.generation_config, finished.trained_with(job.run, start)),
        lambda done: job.progress.tell("judging", done, len(prompts)),
        by_place=job.recipe.divides(job.name),
    )
    judge = load(ai, job.recipe, PLACE, staged, job.run / ANSWERS)
    own = {job.name: 0, start: 1}.get(ai.model)
    judged = compared(
        judge, ai, job.recipe, asked, ours, theirs, own, lambda done, of: job.progress.tell("judging", done, of)
    )
    pairs = [Compared(prompt, one.replies, row) for (prompt, row), one in zip(asked, judged, strict=True)]
    said = [judgement(pair, one.verdict) for pair, one in zip(pairs, judged, strict=True)]
    jsonl.rewrite(job.folder / JUDGEMENTS, lambda row: False, said)
    found = rate([one.verdict for one in judged], spec.samples)
    if found is None or not is_legible(judged):
        raise RunError(
            f"{PLACE}: none of the answers of the judge can be read",
            hint=f"{JUDGEMENTS} has what it said; another model, or a `template` that it follows, may answer",
        )
    named = {f"{kinds.WIN_RATE}_{name}": value for name, value in found.items() if name != "win_rate"}
    return {kinds.WIN_RATE: found["win_rate"]} | named | figures(asked_of(judged))


def compared(
    judge: Judge,
    spec: AIJudge,
    recipe: Recipe,
    asked: Asked,
    ours: Sequence[str],
    theirs: Sequence[str],
    own: int | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Judged]:
    """What an AI says of each two replies, in both orders; two that are the same are a tie, and it is not asked.

    Args:
        judge: from `judges.load`.
        spec: what the recipe says of it.
        recipe: the recipe.
        asked: prompts, each with its row.
        ours: a reply to each.
        theirs: another one's.
        own: 0 where ours are the judge's own replies, 1 where theirs are.
        tell: is told how many pairs are judged, and of how many.
    """
    pairs = [Pair(prompt, (one, other), row) for (prompt, row), one, other in zip(asked, ours, theirs, strict=True)]
    different = [pair for pair in pairs if pair.replies[0] != pair.replies[1]]
    found: list[Verdict] = []
    for start in range(0, len(different), step := at_once(spec, PLACE)):
        tell(start, len(different))
        found += verdicts(judge, different[start : start + step], spec, recipe.seed, PLACE)
    said = iter(found)
    same = Verdict(0.5, True, {}, None, [])
    return [Judged(pair.replies, next(said) if pair.replies[0] != pair.replies[1] else same, own) for pair in pairs]


def asked_of(judged: Sequence[Judged]) -> list[Judged]:
    """Those of `compared` that the judge was asked about: the two replies are not the same."""
    return [one for one in judged if one.replies[0] != one.replies[1]]


def is_legible(judged: Sequence[Judged]) -> bool:
    """Whether an answer of the judge could be read, or nothing had to be asked, since all replies are the same."""
    different = asked_of(judged)
    return not different or any(one.verdict.probability is not None for one in different)


def rate(found: Sequence[Verdict], times: int = 1) -> dict[str, float] | None:
    """How often the first of two replies is better by a judge, a tie counting half.

    The interval is of the share of prompts; see `shares.interval`. Of a prompt with several pairs, their mean counts.

    Args:
        found: the verdicts, those of all prompts once, then of all once more, and so on.
        times: how often.

    Returns:
        `win_rate`, `low` and `high`, and the share of `ties`; None where no verdict could be read.
    """
    won = [points(one) for one in found]
    prompts = len(won) // times
    by_prompt = [[point for point in won[prompt::prompts] if point is not None] for prompt in range(prompts)]
    means = [sum(own) / len(own) for own in by_prompt if own]
    if not means:
        return None
    low, high = interval(sum(means), len(means))
    read = [one for one in found if one.probability is not None]
    ties = sum(one.winner is None for one in read) / len(read)
    return {"win_rate": sum(means) / len(means), "low": low, "high": high, "ties": ties}


def points(verdict: Verdict) -> float | None:
    """What the first of two replies gets: 1 where it is better, 0.5 for a tie, else 0; None where nobody can tell."""
    return None if verdict.probability is None else 0.5 if verdict.winner is None else 1.0 - verdict.winner
