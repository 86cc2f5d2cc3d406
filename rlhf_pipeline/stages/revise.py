"""Constitutional AI: a policy answers, criticises its reply by a principle, and writes the reply again.

Section 3.1 of Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback" (arXiv 2212.08073). The rows
that come out are read as demonstrations of the last replies, or as pairs of after and before.
"""

import json
import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import Ids, encode_prompts, hash_of
from rlhf_pipeline.data.prepare import prompts_with_rows as read  # the rows of such a stage
from rlhf_pipeline.data.turns import Prompt, columns_of
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges import principles
from rlhf_pipeline.judges.principles import Principle
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.stages import engine
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import Asked, Made, prompts_of, publish, with_columns

CONFIG = None
CRITIQUES = "critiques.jsonl"
# How a model begins that talks about the reply which it was to write: "Here is the revised reply:".
ANNOUNCED = re.compile(
    r".*\b(revis|rewrit|rewrote|improved|updated|new (reply|response|version)).*:\**\s*$", re.I | re.M
)

__all__ = ["CONFIG", "prepare", "read", "run"]


class Inputs(NamedTuple):
    """What the stage works with.

    Attributes:
        tokenizer: the recipe's.
        principles: those that have both requests.
        asked: the prompts.
        too_long: how many further prompts are left out, since with their requests they outgrow the model's context.
    """

    tokenizer: PreTrainedTokenizerBase
    principles: list[Principle]
    asked: list[Asked]
    too_long: int


class Written(NamedTuple):
    """What the policy wrote: a text, its tokens with what ended it, and whether anything did."""

    text: str
    tokens: int
    ended: bool

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not self.text.strip()


def critique_request(prompt: Prompt, reply: str, principle: Principle) -> Prompt:
    """The prompt to which the answer is a critique of a reply: as turns, or as text where the prompt is text."""
    if isinstance(prompt, str):
        return f"{prompt}{reply}\n\n{principle.critique}\n\n"
    return [*prompt, {"role": "assistant", "content": reply}, {"role": "user", "content": principle.critique}]


def revision_request(prompt: Prompt, reply: str, critique: str, principle: Principle) -> Prompt:
    """The prompt to which the answer is the reply written again.

    As text it ends with the prompt itself, so that the reply begins as replies to it do.
    """
    before = critique_request(prompt, reply, principle)
    if isinstance(prompt, str):
        return f"{before}{critique.strip()}\n\n{principle.revision}\n\n{prompt}"
    return [*before, {"role": "assistant", "content": critique}, {"role": "user", "content": principle.revision}]


def check(job: Job) -> list[Principle]:
    """Read the principles, which needs no prompts.

    Raises:
        InputError: they cannot be read, or none has both requests.
    """
    place = f"stages.{job.name}.principles"
    return principles.load(str(job.stage.principles), place, needs=("critique", "revision"))


def prepare(job: Job) -> Inputs:
    """Read the principles and the prompts.

    Raises:
        InputError: for settings or data that cannot work.
    """
    found = check(job)
    asked = prompts_of(job)
    fitting = _fitting(job, asked, found)
    if not fitting:
        raise InputError(
            f"no prompt of stage `{job.name}` fits the model's context of {_context(job):,} tokens together with a "
            "reply, a critique and a revision",
            place=f"stages.{job.name}.sampling.max_new_tokens",
            hint="lower it: each of the three may be that long",
        )
    return Inputs(job.reader.tokenizer, found, fitting, len(asked) - len(fitting))


def doubts(job: Job, inputs: Inputs) -> list[str]:
    """A sentence on the prompts that are left out, where there are some."""
    if not inputs.too_long:
        return []
    count = inputs.too_long + len(inputs.asked)
    return [
        f"stages.{job.name}: {inputs.too_long:,} of {count:,} prompts are left out: with a reply, a critique and a "
        f"revision they may outgrow the model's context of {_context(job):,} tokens"
    ]


def run(job: Job) -> dict[str, Any]:
    """Answer, criticise and revise; returns the final metrics. Resumes after the last prompt that is done."""
    job.progress.tell("loading")
    inputs = prepare(job)
    for doubt in doubts(job, inputs):
        print(doubt)
    policy = _Policy(job, inputs)
    with Made(job, len(inputs.asked), "revising") as made:
        while len(made.items) < len(inputs.asked):
            done = len(made.items)
            made.add(_revise(job, inputs, policy, inputs.asked[done : done + policy.sampling.batch_size]))
        items = made.items
    both = [(row, one) for one, item in zip(inputs.asked, items, strict=True) if (row := row_of(item))]
    rows = with_columns([row for row, _ in both], [json.loads(one.row)["columns"] for _, one in both])
    return publish(job, rows, figures(items) | {"prompts/too_long": inputs.too_long}, {CRITIQUES: _critiques(items)})


class _Policy:
    """The policy whose replies are revised, and which revises them."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        tokenizer = inputs.tokenizer
        name, seed = job.stage.start, job.recipe.seed
        self.view = StagedBase(job.recipe.model, artifacts(job.run, [name])).policy(name)
        of_init = job.recipe.stages[name].trainer if name in job.recipe.stages else {}
        self.stops = stop_tokens(tokenizer, self.view.generation_config, of_init)
        self.tokenizer, self.seed = tokenizer, seed
        assert job.stage.sampling is not None
        self.sampling = job.stage.sampling
        self.spec = job.stage.data.model_copy(update={"max_prompt_length": None})
        longest = max(_lengths(job, inputs.asked, inputs.principles))
        self.engine = engine.start(
            job.recipe, job.stage.rollout, f"stages.{job.name}.rollout", [name], longest, shares_gpu=False
        )

    def write(self, prompts: Sequence[Ids], asked: Sequence[Asked], what: str, number: int) -> list[Written]:
        """One text to each of some prompts' tokens, each by random numbers of its own.

        Args:
            prompts: their tokens.
            asked: what these are about.
            what: which text it is, which decides the random numbers.
            number: the pass, which does so, too.
        """
        if not prompts:
            return []
        episodes = sample(
            self.view,
            prompts,
            response_length=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            stop_token_id=self.stops,
            pad_token_id=self.tokenizer.pad_token_id,
            at_once=self.sampling.batch_size,
            seeds=[hash_of([self.seed, one.prompt, one.number, what, number]) for one in asked],
            engine=self.engine,
        )
        texts = self.tokenizer.batch_decode(episodes.tokens, skip_special_tokens=True)
        return [
            Written(*found)
            for found in zip(texts, episodes.reply_lengths.tolist(), episodes.ended.tolist(), strict=True)
        ]

    def answer(self, prompts: Sequence[Prompt], asked: Sequence[Asked], what: str, number: int) -> list[Written]:
        """The same to prompts that are not encoded yet."""
        return self.write(encode_prompts(self.tokenizer, self.spec, prompts), asked, what, number)


def _revise(job: Job, inputs: Inputs, policy: _Policy, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Answer, criticise and revise some prompts together.

    Returns:
        An object for each: the `prompt`, the first `reply`, and `passes`, each with its requests and answers. An answer
        is a `Written`; there is no revision after an empty critique, and nothing at all after an empty reply.
    """
    first = policy.write([one.ids for one in asked], asked, "reply", 0)
    passes: list[list[dict[str, Any]]] = [[] for _ in asked]
    replies = list(first)
    for number in range(job.stage.passes or 1):
        drawn = [_drawn(inputs.principles, job.recipe.seed, one, number) for one in asked]

        def answers(rows: Sequence[int], prompts: Sequence[Prompt], what: str, number: int) -> dict[int, Written]:
            found = policy.answer(prompts, [asked[row] for row in rows], what, number)
            return dict(zip(rows, found, strict=True))

        rows = [row for row, reply in enumerate(replies) if not reply.is_empty]
        requests = [critique_request(asked[row].prompt, replies[row].text, drawn[row]) for row in rows]
        critiques = answers(rows, requests, "critique", number)
        rows = [row for row in rows if not critiques[row].is_empty]
        requests = [
            revision_request(asked[row].prompt, replies[row].text, critiques[row].text, drawn[row]) for row in rows
        ]
        revisions = answers(rows, requests, "revision", number)
        for row, critique in critiques.items():
            principle, revision = drawn[row], revisions.get(row)
            passes[row].append({
                "principle": principle.name, "critique_request": principle.critique, "critique": critique,
                "revision_request": principle.revision, "revision": revision,
            })  # fmt: skip
            replies[row] = _kept(replies[row], revision)
    return [
        {"prompt": one.prompt, "reply": reply, "passes": of_row}
        for one, reply, of_row in zip(asked, first, passes, strict=True)
    ]


def _drawn(found: Sequence[Principle], seed: int, asked: Asked, number: int) -> Principle:
    """The principle of a pass: of one prompt no two are the same until all were drawn."""
    turn, place = divmod(number, len(found))
    order = sorted(range(len(found)), key=lambda i: hash_of([seed, asked.prompt, asked.number, "principle", turn, i]))
    return found[order[place]]


def _kept(reply: Written, revision: Written | None) -> Written:
    """The reply after a pass: an empty revision is none."""
    return reply if revision is None or revision.is_empty else revision


def replies_of(item: dict[str, Any]) -> list[Written]:
    """A prompt's replies, the first one and what each pass left of it."""
    replies = [Written(*item["reply"])]
    for one in item["passes"]:
        replies.append(_kept(replies[-1], one["revision"] and Written(*one["revision"])))
    return replies


def row_of(item: dict[str, Any]) -> dict[str, Any] | None:
    """The row that later stages read: the distinct replies, the last one best; None where the first one is empty.

    Where no pass changed it there is one reply: a demonstration, and no pair.
    """
    texts = [reply.text for reply in replies_of(item) if not reply.is_empty]
    distinct = [text for place, text in enumerate(texts) if text not in texts[place + 1 :]]
    if not distinct:
        return None
    return columns_of(item["prompt"]) | {"replies": distinct, "scores": list(range(len(distinct)))}


def _critiques(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each pass over a prompt: what was asked and answered, and whether that ended by itself."""
    for item in items:
        for number, (reply, one) in enumerate(zip(replies_of(item), item["passes"], strict=False), 1):
            critique, revision = Written(*one["critique"]), one["revision"] and Written(*one["revision"])
            yield (
                {"prompt": item["prompt"], "pass": number, "reply": reply.text}
                | one
                | {
                    "critique": critique.text,
                    "critique_ended": critique.ended,
                    "revision": revision and revision.text,
                    "revision_ended": revision and revision.ended,
                }
            )


def figures(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The final metrics.

    Returns:
        `revised`, the share of prompts whose last reply is another text than the first; of the last replies
        `reply/length` in tokens and `reply/ended`, the share that did not reach `max_new_tokens`; the same of the first
        ones as `first/…`, and of critiques as `critique/…`; `critique/empty` and `revision/empty`, the shares of empty
        ones, which change nothing; `revision/announced`, the share that begins with words about the revision; and
        `prompts/empty_reply`, how many prompts give no row. What there is none of has no figure.
    """
    replies = [found for item in items if not (found := replies_of(item))[0].is_empty]
    passes = [one for item in items for one in item["passes"]]
    critiques = [Written(*one["critique"]) for one in passes]
    revisions = [Written(*one["revision"]) for one in passes if one["revision"]]
    shares: dict[str, Sequence[float]] = {
        "revised": [found[-1].text != found[0].text for found in replies],
        "critique/empty": [critique.is_empty for critique in critiques],
        "revision/empty": [revision.is_empty for revision in revisions],
        "revision/announced": [bool(ANNOUNCED.match(revision.text.lstrip())) for revision in revisions],
    }
    groups = {
        "first": [found[0] for found in replies],
        "reply": [found[-1] for found in replies],
        "critique": critiques,
    }
    for name, texts in groups.items():
        shares |= {f"{name}/ended": [one.ended for one in texts]}
        shares |= {f"{name}/length": [one.tokens for one in texts]}
    return {name: fmean(values) for name, values in shares.items() if values} | {
        "prompts/empty_reply": len(items) - len(replies)
    }


def _context(job: Job) -> int | None:
    """How many tokens the model has positions for; None where it does not say."""
    return getattr(job.reader.config.get_text_config(), "max_position_embeddings", None)


def _fitting(job: Job, asked: Sequence[Asked], found: Sequence[Principle]) -> list[Asked]:
    """The prompts that with the longest requests, and texts as long as they may be, fit the model's context."""
    context = _context(job)
    if context is None:
        return list(asked)
    return [one for one, length in zip(asked, _lengths(job, asked, found), strict=True) if length <= context]


def _lengths(job: Job, asked: Sequence[Asked], found: Sequence[Principle]) -> list[int]:
    """The tokens of each prompt with the longest requests, and with texts as long as they may be."""
    assert job.stage.sampling is not None
    longest = max(found, key=lambda principle: len(principle.critique) + len(principle.revision))
    requests = encode_prompts(
        job.reader.tokenizer,
        job.stage.data.model_copy(update={"max_prompt_length": None}),
        [revision_request(one.prompt, "x", "x", longest) for one in asked],
    )
    return [len(ids) + 3 * job.stage.sampling.max_new_tokens for ids in requests]
