"""AI feedback: a judge says which of two replies is better. Out come preferences, and figures of its biases."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.data.encode import ROW
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.data.turns import Prompt, Reply, columns_of
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.judges.bias import Judged, figures
from rlhf_pipeline.judges.function import FunctionJudge, try_function
from rlhf_pipeline.judges.load import load
from rlhf_pipeline.judges.local import tokens_of
from rlhf_pipeline.judges.question import Question, read_template
from rlhf_pipeline.judges.verdicts import Pair, Verdict, compared, criteria, verdicts
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.recipe.schema import AIJudge
from rlhf_pipeline.rundir.layout import ANSWERS, JUDGEMENTS
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import Made, publish

CONFIG = None
read = rows.candidates  # the rows of such a stage
TRIED = 2  # pairs that a function is tried on
OF_FUNCTION = 256  # questions that a function gets at once


class Compared(NamedTuple):
    """A pair of replies that the judge is asked about.

    Attributes:
        prompt: what they reply to.
        replies: both, as they are in the row.
        row: the row's columns.
        own: the number of the reply that the judge's own stage sampled; None where it sampled neither, or both.
        by_people: whether it is of `human`; people found reply 0 the better one.
    """

    prompt: Prompt
    replies: tuple[Reply, Reply]
    row: Mapping[str, Any]
    own: int | None = None
    by_people: bool = False

    @property
    def texts(self) -> tuple[str, str]:
        """Both replies as the judge sees them."""
        return text_of(self.replies[0]), text_of(self.replies[1])


def check(job: Job) -> None:
    """See that the judge, and the pairs that people judged, can be used; that needs no candidates and no weights.

    Raises:
        InputError: for what cannot.
    """
    spec, place = _judge_of(job)
    criteria(spec, place)
    if spec.is_function:
        FunctionJudge(spec.model, job.recipe.folders, f"{place}.model")
    else:
        read_template(spec.template, f"{place}.template")
    if spec.is_local:
        for word in spec.answers:
            tokens_of(job.reader.tokenizer, word, f"{place}.answers")
    human = job.stage.human
    if human is not None and all(source.stage is None for source in human.sources):
        job.reader.read(rows.preferences_as_text, human)


def prepare(job: Job) -> list[Compared]:
    """Read the candidates, and what people judged, and try a judge that is a function.

    Returns:
        The pairs of replies to each prompt, and behind them those that people judged.

    Raises:
        InputError: for a judge or data that cannot work, or where no row has two different replies.
    """
    check(job)
    spec, place = _judge_of(job)
    found = list(_pairs(job, job.reader.read(read, job.stage.data)))
    if not found:
        raise InputError(
            "no row has two replies that differ, so there is nothing to compare", place=f"stages.{job.name}.data"
        )
    if spec.is_function:
        questions = [Question(one.prompt, *one.texts, "Which reply is better?", one.row) for one in found[:TRIED]]
        try_function(FunctionJudge(spec.model, job.recipe.folders, f"{place}.model"), questions)
    if job.stage.human is not None:
        found += _by_people(job.reader.read(rows.preferences_as_text, job.stage.human))
    return found


def run(job: Job) -> dict[str, Any]:
    """Ask about every pair in both orders, and publish the preferences and all that was answered.

    Returns:
        The final metrics: `rows`, and what `bias.figures` says.

    Raises:
        RunError: no pair has a winner.
        FunctionError: the judge is a function that fails.
    """
    job.progress.tell("loading")
    pairs = prepare(job)
    spec, place = _judge_of(job)
    staged = None
    if spec.is_local:
        staged = StagedBase(job.recipe.model, artifacts(job.run, [spec.stage] if spec.stage else []))
    judge = load(spec, job.recipe, place, staged, job.run / ANSWERS)
    with Made(job, len(pairs), "judging") as made:
        for start in range(len(made.items), len(pairs), step := at_once(spec, place)):
            asked = [Pair(one.prompt, one.texts, one.row) for one in pairs[start : start + step]]
            made.add([verdict._asdict() for verdict in verdicts(judge, asked, spec, job.recipe.seed, place)])
    judged = [(one, Verdict(**item)) for one, item in zip(pairs, made.items, strict=True)]
    metrics = figures(
        [Judged(one.texts, verdict, one.own) for one, verdict in judged if not one.by_people],
        [Judged(one.texts, verdict) for one, verdict in judged if one.by_people],
    )
    found = [row for one, verdict in judged if (row := preference(one, verdict, job.stage.ties == "keep"))]
    if not found:
        kept = "; `ties: keep` keeps pairs on which both orders disagree" if job.stage.ties == "drop" else ""
        raise RunError(
            f"no pair has a winner: {metrics.get('judge/ties', 0):.0%} are ties, {metrics['judge/unread']:.0%} of the "
            f"answers could not be read, and {metrics.get('judge/first_position', 0):.0%} of the others favour the "
            "reply that was shown first",
            hint=f"another model, template or question may do better{kept if metrics.get('judge/ties') else ''}",
        )
    return publish(job, found, metrics, {JUDGEMENTS: [judgement(one, verdict) for one, verdict in judged]})


def preference(one: Compared, verdict: Verdict, keeps_ties: bool) -> dict[str, Any] | None:
    """The row that a verdict makes; None of a tie, unless these are kept, and where the answers could not be read.

    `confidence` is the probability that the chosen reply is better, the mean of both orders; `margin` how much that is
    above the rejected one's; `dimensions` the probability of each that the chosen reply is better in it.
    """
    p = verdict.probability
    if p is None or one.by_people or p == 0.5 or (verdict.is_tie and not keeps_ties):
        return None
    better = int(p < 0.5)
    confidence = 1 - p if better else p
    row = columns_of(one.prompt) | {"chosen": one.replies[better], "rejected": one.replies[1 - better]}
    row |= {"confidence": confidence, "margin": 2 * confidence - 1}
    if verdict.principle is not None:
        return row | {"principle": verdict.principle}
    return row | {"dimensions": {name: 1 - q if better else q for name, q in verdict.by_dimension.items()}}


def judgement(one: Compared, verdict: Verdict) -> dict[str, Any]:
    """A line of `judgements.jsonl`; of a pair that people judged it has `people`, the reply that they chose."""
    return {
        "prompt": one.prompt,
        "replies": one.replies,
        **({"people": 0} if one.by_people else {}),
        "winner": verdict.winner,
        "probability": verdict.probability,
        "is_tie": verdict.is_tie,
        "dimensions": verdict.by_dimension,
        "principle": verdict.principle,
        "asked": verdict.asked,
    }


def at_once(spec: AIJudge, place: str) -> int:
    """How many pairs are asked about before what was answered is put down, at least 1."""
    questions = 4 * spec.batch_size if spec.is_local else OF_FUNCTION if spec.is_function else 4 * spec.concurrency
    known = criteria(spec, place)
    return max(1, questions // (2 * (1 if spec.principles is not None else len(known))))


def text_of(reply: Reply) -> str:
    """A reply as the judge sees it: of one with reasoning or calls, the text alone."""
    return reply if isinstance(reply, str) else str(reply["content"])


def _judge_of(job: Job) -> tuple[AIJudge, str]:
    """The stage's judge and its key in the recipe."""
    assert job.stage.judge is not None
    return job.stage.judge, f"stages.{job.name}.judge"


def _pairs(job: Job, data: Prepared) -> Iterator[Compared]:
    spec, _ = _judge_of(job)
    for line in data.train:
        row, replies = json.loads(line[ROW]), json.loads(line["replies"])
        texts = [text_of(reply) for reply in replies]
        policies = (row["columns"].get("sampled") or {}).get("policies") or []
        is_own = [policy == spec.model for policy in policies] if spec.is_local else []
        for first, second in compared(row["prompt"], texts, job.stage.pairs, job.recipe.seed):
            own = None
            if len(is_own) == len(replies) and is_own[first] != is_own[second]:
                own = int(is_own[second])
            yield Compared(row["prompt"], (replies[first], replies[second]), row["columns"], own)


def _by_people(data: Prepared) -> Iterator[Compared]:
    for line in data.train:
        row = json.loads(line[ROW])
        replies = json.loads(line["chosen"]), json.loads(line["rejected"])
        yield Compared(row["prompt"], replies, row["columns"], by_people=True)
