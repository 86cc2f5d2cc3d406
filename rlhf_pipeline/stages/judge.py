"""The judge: replies of a policy to held-out prompts, scored by a function of the user's."""

import importlib
import inspect
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_pipeline import kinds
from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Evaluate
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.layout import SAMPLES
from rlhf_pipeline.shares import standard_error
from rlhf_pipeline.stages import soundness
from rlhf_pipeline.stages.job import Job

Judge = Callable[..., Sequence[float | None]]
Asked = Sequence[tuple[Prompt, dict[str, Any]]]  # prompts, each with its row, whose other columns the judge gets
# What a judge gets beside the columns of the data; a column of such a name is not given.
GIVEN = ("prompts", "completions", "messages")
REPLY_COLUMNS = ("completion", "response", "answer", "chosen", "output")  # where a row may have a reply to try it on


class JudgeError(Exception):
    """A judge did, or gave, what no judge may; the message says so in one sentence."""


def load_judge(name: str, folders: Sequence[Path]) -> Judge:
    """Import `module:function`, looking in `folders` after the installed packages.

    Raises:
        InputError: it cannot be imported or is not a function.
    """
    module_name, function_name = name.split(":")
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    place = "evaluate.judge"
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        raise InputError(
            f"`{module_name}` cannot be imported: {said(error)}",
            place=place,
            hint="put the module beside the recipe, in the current folder, or install it",
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"module `{module_name}` has no function `{function_name}`", place=place, hint=f"it is {module.__file__}"
        )
    return function


def prepare(job: Job) -> tuple[Evaluate, Judge, Asked] | None:
    """The judge and the first `n` prompts, each with its row; None where the recipe has no `evaluate`.

    Raises:
        InputError: judge or data cannot be used.
    """
    spec = job.recipe.evaluate
    if spec is None:
        return None
    judge = load_judge(spec.judge, [Path(job.recipe.folder), Path.cwd()])
    return spec, judge, first_prompts(spec.data, spec.n)


def try_judge(spec: Evaluate, judge: Judge, asked: Asked) -> None:
    """Call the judge on two rows of its data, as it will be called after training.

    The replies are those of the rows where they have some, else made up.

    Args:
        spec: the recipe's `evaluate`.
        judge: from `load_judge`.
        asked: its prompts.

    Raises:
        InputError: it fails, or returns something other than two numbers.
    """
    replies = [
        next((row[name] for name in REPLY_COLUMNS if isinstance(row.get(name), str)), "A reply.")
        for _, row in asked[:2]
    ]
    try:
        ask(judge, asked[:2], replies)
    except Exception as error:  # a user's function may fail in any way
        what = str(error) if isinstance(error, JudgeError) else f"it raised {said(error)}"
        raise InputError(
            f"`{spec.judge}` fails on the first rows of `evaluate.data`: {what}",
            place="evaluate.judge",
            hint="it gets lists of texts, `prompts` and `completions`, of turns, `messages`, and all other columns; it "
            "returns a number for each reply",
        ) from None


def judge_policy(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Sample a reply to each prompt and have it judged; writes them to `samples.jsonl`, after those of training.

    Every stage samples with the recipe's seed, so that stages differ by their weights alone.

    Args:
        job: the stage.
        model: what has `generate` and answers as the stage's policy.
        tokenizer: the stage's tokenizer.

    Returns:
        What `summary` says, and `generation_gap`, see `soundness.generation_gap`; or nothing where the recipe has no
        `evaluate`.

    Raises:
        JudgeError: see `ask`.
    """
    prepared = prepare(job)
    if prepared is None:
        return {}
    spec, judge, asked = prepared
    times = spec.samples
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
    )
    scores = ask(judge, asked, replies)
    judged = (
        {"prompt": prompt, "completion": reply, "judge": score}
        for prompt, reply, score in zip(prompts, replies, scores, strict=True)
    )
    jsonl.rewrite(job.folder / SAMPLES, lambda row: "judge" not in row, judged)
    some = encode_prompts(tokenizer, spec.data, prompts[: soundness.PROMPTS])
    gap = soundness.generation_gap(model, some, tokenizer.pad_token_id)
    return summary(scores, times) | {kinds.GAP: gap}


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
        JudgeError: none has.
    """
    prompts = len(scores) // times
    by_prompt = [[score for score in scores[prompt::prompts] if score is not None] for prompt in range(prompts)]
    means = [statistics.fmean(own) for own in by_prompt if own]
    if not means:
        raise JudgeError("the judge has no opinion on any reply: it returned None for all")
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
        judge: from `load_judge`.
        asked: the prompts.
        replies: one to each.

    Returns:
        A finite number for each reply, or None where the judge has no opinion.

    Raises:
        JudgeError: it returned something else, wants a column that the data do not have, or called `sys.exit`.
    """
    names = dict.fromkeys(name for _, row in asked for name in row if name not in ("prompt", "completion", *GIVEN))
    given: dict[str, Any] = {name: [row.get(name) for _, row in asked] for name in names}
    given |= {
        "prompts": [as_text(prompt) for prompt, _ in asked],
        "completions": list(replies),
        "messages": [
            [*as_turns(prompt), {"role": "assistant", "content": reply}]
            for (prompt, _), reply in zip(asked, replies, strict=True)
        ],
    }
    given = _taken(judge, given)
    scores = None
    try:
        returned: Any = judge(**given)
        if hasattr(returned, "__iter__") and not isinstance(returned, (str, bytes, Mapping)):
            scores = list(returned)  # a generator runs only now
    except SystemExit as end:
        raise JudgeError(f"the judge called {said(end)}") from end
    if scores is None:
        raise JudgeError(f"the judge returned {returned!r}, not a list of numbers")
    if len(scores) != len(replies):
        raise JudgeError(f"the judge returned {len(scores)} scores for {len(replies)} replies")
    return [_score(score, row, asked[row][0]) for row, score in enumerate(scores)]


def _taken(judge: Judge, given: dict[str, Any]) -> dict[str, Any]:
    """Of what there is for a judge, what its parameters take.

    Raises:
        JudgeError: it wants more.
    """
    try:
        parameters = inspect.signature(judge).parameters.values()
    except (TypeError, ValueError):  # of something that is called and has none, as some built in C
        return given
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    lacking = [one.name for one in named if one.default is one.empty and one.name not in given]
    if lacking:
        raise JudgeError(f"the judge wants `{'`, `'.join(lacking)}`, and the data have no such column")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return given
    return {one.name: given[one.name] for one in named if one.name in given}


def _score(score: Any, row: int, prompt: Prompt) -> float | None:
    """A judge's score of one reply.

    Raises:
        JudgeError: it is no finite number, nor None.
    """
    try:
        number = None if score is None else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        begin = as_text(prompt)[:60]
        raise JudgeError(f"the judge returned {score!r} for reply {row + 1}, to the prompt {begin!r}: it is no number")
    return number


def as_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: of a conversation the user's turn, of a longer one all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def as_turns(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as turns; text is a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def said(error: BaseException) -> str:
    """What a user's code raised, in a few words; of `sys.exit`, the call."""
    if isinstance(error, SystemExit):
        return f"sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"


def judge_artifact(job: Job, artifact: Path) -> dict[str, float]:
    """Judge the policy that a stage left; see `judge_policy`."""
    if job.recipe.evaluate is None:
        return {}
    job.progress.tell("loading")
    tokenizer = load_tokenizer(job.recipe.model)
    base = load_base(job.recipe.model, tokenizer)
    policy = adapters.with_policy_adapter(base, job.stage.lora, artifact)
    return judge_policy(job, policy, tokenizer)


@torch.no_grad()
def sample_replies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    spec: Evaluate,
    prompts: Sequence[Prompt],
    seed: int,
    stops: list[int],
    tell: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One reply per prompt, without special tokens; greedy where the temperature is 0.

    `stops` are from `reply_end.stop_tokens`. `tell` is called before each batch with how many replies there are.
    """
    sampling = {"do_sample": True, "temperature": spec.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if spec.temperature else {"do_sample": False}),
    )
    device = model.device
    torch.manual_seed(seed)
    model.eval()
    replies: list[str] = []
    for start in range(0, len(prompts), spec.batch_size):
        tell(len(replies))
        batch = encode_prompts(tokenizer, spec.data, prompts[start : start + spec.batch_size])
        inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(device)
        output = model.generate(**inputs, generation_config=settings)
        replies += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies
