"""The judge: replies of a policy to held-out prompts, scored by a function of the user's."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Evaluate
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.layout import SAMPLES
from rlhf_pipeline.stages.job import Job

Judge = Callable[..., Sequence[float]]


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


def prepare(job: Job) -> tuple[Evaluate, Judge, list[tuple[Prompt, dict[str, Any]]]] | None:
    """The judge and the first `n` prompts, each with its row; None where the recipe has no `evaluate`.

    Raises:
        InputError: judge or data cannot be used.
    """
    spec = job.recipe.evaluate
    if spec is None:
        return None
    judge = load_judge(spec.judge, [Path(job.recipe.folder), Path.cwd()])
    return spec, judge, first_prompts(spec.data, spec.n)


def judge_policy(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Sample a reply to each prompt and have it judged; writes them to `samples.jsonl`, after those of training.

    Every stage samples with the recipe's seed, so that stages differ by their weights alone.

    Args:
        job: the stage.
        model: what has `generate` and answers as the stage's policy.
        tokenizer: the stage's tokenizer.

    Returns:
        `judge_mean`, or nothing where the recipe has no `evaluate`.

    Raises:
        JudgeError, Exception: see `ask`.
    """
    prepared = prepare(job)
    if prepared is None:
        return {}
    spec, judge, asked = prepared
    prompts = [prompt for prompt, _ in asked]
    replies = sample_replies(
        model, tokenizer, spec, prompts, job.recipe.seed, lambda done: job.progress.tell("judging", done, len(prompts))
    )
    scores = ask(judge, asked, replies)
    judged = (
        {"prompt": prompt, "completion": reply, "judge": score}
        for prompt, reply, score in zip(prompts, replies, scores, strict=True)
    )
    jsonl.rewrite(job.folder / SAMPLES, lambda row: "judge" not in row, judged)
    return {"judge_mean": sum(scores) / len(scores)}


def ask(judge: Judge, asked: Sequence[tuple[Prompt, dict[str, Any]]], replies: Sequence[str]) -> list[float]:
    """Have replies judged.

    Args:
        judge: from `load_judge`.
        asked: prompts, each with its row, whose other columns the judge gets.
        replies: one to each.

    Raises:
        JudgeError: it returned something other than one number per reply, or called `sys.exit`.
        Exception: what it raises.
    """
    prompts = [prompt for prompt, _ in asked]
    completions = [
        [{"role": "assistant", "content": reply}] if isinstance(prompt, list) else reply
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    names = dict.fromkeys(name for _, row in asked for name in row if name not in ("prompt", "completion"))
    others = {name: [row.get(name) for _, row in asked] for name in names}
    try:
        scores = [float(score) for score in judge(prompts=prompts, completions=completions, **others)]
    except SystemExit as error:
        raise JudgeError(f"the judge called {said(error)}") from None
    if len(scores) != len(prompts):
        raise JudgeError(f"the judge returned {len(scores)} scores for {len(prompts)} replies")
    return scores


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
    tell: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One reply per prompt, without special tokens; greedy where the temperature is 0.

    `tell` is called before each batch with how many replies there are.
    """
    sampling = {"do_sample": True, "temperature": spec.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=spec.max_new_tokens, **(sampling if spec.temperature else {"do_sample": False})
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
