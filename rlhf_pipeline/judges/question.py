"""The question which of two replies is better, as a judge gets it, and its answer. No libraries but Jinja."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_pipeline.data.turns import Prompt, as_text, as_turns
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.text import read_text

TEMPLATE = Path(__file__).with_name("question.jinja")
LETTERS = ("A", "B")  # what the template calls the first reply and the second
VARIABLES = ("prompt", "turns", "first", "second", "question")


class Question(NamedTuple):
    """Which of two replies is better.

    Attributes:
        prompt: what both reply to, text or turns.
        first: the reply that is shown first, as A.
        second: the other one.
        ask: what is asked of the two, as "Which reply is more honest?".
        row: the row that they are from, whose other columns a function may read.
    """

    prompt: Prompt
    first: str
    second: str
    ask: str
    row: Mapping[str, Any]


class Answer(NamedTuple):
    """What a judge says.

    Attributes:
        first: the probability that the first reply is better; 1.0 or 0.0 where only a word is known, None where the
            answer cannot be read.
        text: what was answered, as far as there is text.
    """

    first: float | None
    text: str


Judge = Callable[[Sequence[Question]], list[Answer]]


def read_template(template: str | None, place: str) -> str:
    """The text of a template for questions; without one, of that which ships with the package.

    Args:
        template: the recipe's: the text itself, which has `{{` in it, or the path of its file.
        place: the key of the recipe that names it.

    Raises:
        InputError: it cannot be read, is not Jinja, uses a variable that there is not, or does not show a reply.
    """
    file = TEMPLATE if template is None else Path(template)
    text = template if template and "{{" in template else read_text(file, str(file), place)
    try:
        used = meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(text))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}," if line else ""
        raise InputError(f"the template{where} is not valid Jinja: {error.message}", place=place) from None
    there = "there are `prompt`, `turns`, `first`, `second` and `question`"
    if unknown := sorted(used - set(VARIABLES)):
        raise InputError(f"the template uses `{unknown[0]}`, which a question does not have", place=place, hint=there)
    for name in ("first", "second"):
        if name not in used:
            raise InputError(f"the template does not use `{name}`, so the judge would not see that reply", place=place)
    return text


def asks_a_question(template: str) -> bool:
    """Whether a template from `read_template` shows the question; else it asks the same of every pair."""
    return "question" in meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(template))


def render(question: Question, template: str) -> str:
    """A question as text; what speaks to a chat model sends it as a user's turn.

    Args:
        question: the question.
        template: from `read_template`.

    Raises:
        jinja2.TemplateError: the template fails on it.
    """
    return (
        ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(
            prompt=as_text(question.prompt),
            turns=as_turns(question.prompt),
            first=question.first,
            second=question.second,
            question=question.ask,
        )
    )
