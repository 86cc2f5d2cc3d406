"""A judge that is a function of the user's, named `module:function`."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline import user_code
from rlhf_pipeline.data.turns import as_text
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.question import LETTERS, Answer, Question
from rlhf_pipeline.user_code import FunctionError

GIVEN = ("prompts", "firsts", "seconds", "questions")
NOT_GIVEN = (*GIVEN, "prompt", "chosen", "rejected")  # columns that are not given under their own name
HINT = (
    "it gets lists of texts, `prompts`, `firsts`, `seconds` and `questions`, and the rows' other columns, as keywords; "
    'it returns for each the probability that the first reply is better, or "A" for the first, "B" for the second, or '
    "None"
)


class FunctionJudge:
    """A function that says which of two replies is better.

    It gets as keywords, as far as its parameters name them, `prompts`, `firsts`, `seconds` and `questions`, lists of
    texts, and the other columns of the rows. It returns for each question the probability that the first reply is
    better, or "A" for the first and "B" for the second, or None where it cannot tell.

    Args:
        name: `module:function`.
        folders: the recipe's; see `user_code`.
        place: the key of the recipe that names it.

    Raises:
        InputError: it cannot be imported or is not a function.
    """

    def __init__(self, name: str, folders: Sequence[Path], place: str) -> None:
        self.place, self.who = place, f"the judge `{name}`"
        self.call = user_code.load(name, folders, place)

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Its answers.

        Raises:
            FunctionError: it raised something or called `sys.exit`, returned something else, or wants a column that
                the rows do not have. What was raised is its cause.
        """
        prompts = [as_text(question.prompt) for question in questions]
        given: dict[str, Any] = copy.deepcopy(
            {
                **user_code.columns([question.row for question in questions], NOT_GIVEN),
                "prompts": prompts,
                "firsts": [question.first for question in questions],
                "seconds": [question.second for question in questions],
                "questions": [question.ask for question in questions],
            }
        )
        given = user_code.taken(self.call, given, self.who, self.place)
        try:
            returned = self.call(**given)
            values = list(returned) if hasattr(returned, "__iter__") else returned  # a generator runs only now
        except (Exception, SystemExit) as error:  # a user's function may fail in any way
            did = "called" if isinstance(error, SystemExit) else "raised"
            line = user_code.line_of(error, self.call)
            said = f"{self.who} {did} {user_code.said(error)}"
            raise FunctionError(f"{said} ({line})" if line else said, self.place) from error
        if isinstance(returned, str) or not isinstance(values, list):
            raise FunctionError(f"{self.who} returned {returned!r:.80}, not a list of answers", self.place)
        words = {letter: float(letter == LETTERS[0]) for letter in LETTERS}
        is_word = [isinstance(value, str) and value.strip() in words for value in values]
        as_numbers = [words[value.strip()] if word else value for value, word in zip(values, is_word, strict=True)]
        if (other := next((value for value in as_numbers if isinstance(value, str)), None)) is not None:
            said = f'{self.who} returned {other!r:.80}, which is neither "A" nor "B" nor a probability'
            raise FunctionError(said, self.place)
        if len(values) != len(prompts):
            count = f"{len(values)} answer{'s' * (len(values) != 1)}"
            raise FunctionError(f"{self.who} returned {count} to {len(prompts)} questions", self.place)
        numbers = user_code.numbers(as_numbers, prompts, self.who, self.place)
        for number, value in zip(numbers, values, strict=True):
            if number is not None and not 0 <= number <= 1:
                raise FunctionError(f"{self.who} returned {value!r:.80}, which is no probability", self.place)
        return [
            Answer(number, "" if value is None else str(value)) for number, value in zip(numbers, values, strict=True)
        ]


def try_function(judge: FunctionJudge, questions: Sequence[Question]) -> None:
    """Ask a function about a few pairs of its data, as the stage will.

    Raises:
        InputError: it fails, or returns something else than it should.
    """
    try:
        judge(questions)
    except FunctionError as error:
        raise InputError(f"on the first rows of `data`, {error}", place=judge.place, hint=HINT) from None
