"""Which of two replies a judge finds better, from its answers in both orders. No torch.

A judge may favour the reply that it reads first, or last. So each pair is shown in both orders (Zheng et al. 2023,
"Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 3.4; Wang et al. 2023, "Large Language Models are not
Fair Evaluators"): the two probabilities are averaged, and where the two orders name different winners, it is a tie.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges import principles, rubric
from rlhf_pipeline.judges.principles import Principle
from rlhf_pipeline.judges.question import Judge, Question, asks_a_question, read_template
from rlhf_pipeline.judges.rubric import Dimension
from rlhf_pipeline.recipe.schema import AIJudge

OVERALL = "overall"  # the dimension where the template asks the same of every pair


class Pair(NamedTuple):
    """Two replies to one prompt: reply 0 and reply 1, as text, and the row that they are from."""

    prompt: Prompt
    replies: tuple[str, str]
    row: Mapping[str, Any] = {}


class Verdict(NamedTuple):
    """What a judge says of a pair.

    Attributes:
        probability: that reply 0 is better, the mean of both orders; of several dimensions, their mean by weight. None
            where no question was answered legibly in both orders.
        is_tie: whether the two orders name different winners, or one names none.
        by_dimension: the probability of each dimension that could be read; empty with principles.
        principle: the name of the principle that was drawn; None with a rubric.
        asked: each question with its answer, as `judgements.jsonl` has them: `about`, the dimension or the principle;
            `question`; `first`, the number of the reply that was shown first; `probability` that this one is better,
            or None; and `answer`, the text of it.
    """

    probability: float | None
    is_tie: bool
    by_dimension: dict[str, float]
    principle: str | None
    asked: list[dict[str, Any]]

    @property
    def winner(self) -> int | None:
        """The number of the better reply; None of a tie, and where the answers could not be read."""
        return None if self.probability is None or self.is_tie else int(self.probability < 0.5)


def criteria(spec: AIJudge, place: str) -> list[Dimension] | list[Principle]:
    """What a judge is asked: the dimensions of its rubric, or the principles of which each pair draws one.

    Where the recipe's own template asks the same of every pair, that is the one dimension.

    Args:
        spec: the recipe's `judge`.
        place: its key in the recipe.

    Raises:
        InputError: the file cannot be read, or is none, or the template does not ask what it says.
    """
    if spec.template is not None and not asks_a_question(read_template(spec.template, f"{place}.template")):
        for key in ("rubric", "principles"):
            if getattr(spec, key) is not None:
                said = f"`{key}` has no effect: the template does not show the `question`"
                raise InputError(said, place=f"{place}.{key}", hint="add {{ question }} to the template, or remove it")
        return [Dimension(OVERALL, "", 1.0)]
    if spec.principles is not None:
        return principles.load(spec.principles, f"{place}.principles")
    return rubric.load(spec.rubric or rubric.DEFAULT, f"{place}.rubric")


def verdicts(judge: Judge, pairs: Sequence[Pair], spec: AIJudge, seed: int, place: str = "judge") -> list[Verdict]:
    """Ask a judge about pairs, of each every dimension, or the principle that is drawn for it, in both orders.

    Args:
        judge: from `load.load`.
        pairs: the pairs.
        spec: the recipe's `judge`, of which `rubric` and `principles` are read.
        seed: with a pair's prompt and its replies, in whatever order, it decides which principle is drawn.
        place: the key of the recipe that has the `spec`.

    Raises:
        InputError: see `criteria`. What the judge raises is raised, too.
    """
    known = criteria(spec, place)
    chosen = [_of_pair(known, pair, seed) for pair in pairs]
    questions = [
        Question(pair.prompt, pair.replies[first], pair.replies[1 - first], one.question, pair.row)
        for pair, dimensions in zip(pairs, chosen, strict=True)
        for one in dimensions
        for first in (0, 1)
    ]
    answers = iter(judge(questions) if questions else [])
    found = []
    for dimensions in chosen:
        asked = []
        for one, first in itertools.product(dimensions, (0, 1)):
            answer = next(answers)
            asked.append(
                {
                    "about": one.name,
                    "question": one.question,
                    "first": first,
                    "probability": answer.first,
                    "answer": answer.text,
                }
            )
        drawn = dimensions[0].name if spec.principles is not None else None
        found.append(_verdict(dimensions, asked, drawn))
    return found


def _of_pair(known: list[Dimension] | list[Principle], pair: Pair, seed: int) -> list[Dimension]:
    """The dimensions that a pair is asked about; a principle is the only one."""
    if isinstance(known[0], Dimension):
        return [one for one in known if isinstance(one, Dimension)]
    one = known[draw(seed, pair.prompt, pair.replies) % len(known)]
    return [Dimension(one.name, one.judge, 1.0)] if isinstance(one, Principle) else []


def draw(seed: int, prompt: Prompt, replies: Sequence[str]) -> int:
    """A number of 64 bits that looks random, and that seed, prompt and replies decide, in whatever order these are."""
    text = json.dumps([seed, prompt, *sorted(replies)], ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _verdict(dimensions: Sequence[Dimension], asked: list[dict[str, Any]], principle: str | None) -> Verdict:
    by_dimension: dict[str, float] = {}
    orders, total = [0.0, 0.0], 0.0  # in each order, the weighted sum of how likely reply 0 is the better one
    for one, both in zip(dimensions, _in_twos(asked), strict=True):
        shown, swapped = (answer["probability"] for answer in both)
        if shown is None or swapped is None:
            continue
        of_reply_0 = (shown, 1 - swapped)
        by_dimension[one.name] = sum(of_reply_0) / 2
        orders = [sum_ + one.weight * p for sum_, p in zip(orders, of_reply_0, strict=True)]
        total += one.weight
    if not total:
        return Verdict(None, False, {}, principle, asked)
    first, second = (sum_ / total for sum_ in orders)
    is_tie = (first - 0.5) * (second - 0.5) <= 0
    return Verdict((first + second) / 2, is_tie, {} if principle is not None else by_dimension, principle, asked)


def _in_twos(asked: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The same question in both orders."""
    return zip(asked[::2], asked[1::2], strict=True)


def compared(prompt: Prompt, replies: Sequence[str], at_most: int | None, seed: int) -> list[tuple[int, int]]:
    """Which replies to a prompt are compared, by their numbers, the lower one first.

    Of the same reply twice, the first one counts.

    Args:
        prompt: what they reply to.
        replies: as text.
        at_most: how many pairs; which ones, seed and prompt decide. None for all.
        seed: the recipe's.
    """
    distinct = [number for number, reply in enumerate(replies) if reply not in replies[:number]]
    pairs = list(itertools.combinations(distinct, 2))
    if at_most is None or at_most >= len(pairs):
        return pairs
    return sorted(sorted(pairs, key=lambda pair: draw(seed, prompt, [replies[pair[0]], replies[pair[1]]]))[:at_most])
