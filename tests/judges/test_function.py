"""Judges that are functions of the user's."""

from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.function import FunctionJudge, try_function
from rlhf_pipeline.judges.question import Answer, Question
from rlhf_pipeline.user_code import FunctionError

TURNS = [{"role": "user", "content": "Why?"}]
QUESTIONS = [
    Question("Who?", "one", "another", "Which is better?", {"prompt": "Who?", "topic": "people"}),
    Question(TURNS, "a", "b", "Which is shorter?", {"replies": []}),
]
PLACE = "stages.feedback.judge.model"


@pytest.fixture
def judge(tmp_path: Path, monkeypatch):
    """A judge of the given source."""
    number = iter(range(100))

    def make(source: str) -> FunctionJudge:
        name = f"own_judge_{tmp_path.name.replace('-', '_')}_{next(number)}"
        (tmp_path / f"{name}.py").write_text(source)
        return FunctionJudge(f"{name}:better", [tmp_path], PLACE)

    return make


def test_it_gets_texts_questions_and_columns_as_far_as_it_takes_them(judge) -> None:
    source = (
        "def better(prompts, firsts, seconds, questions, topic):\n"
        "    assert prompts == ['Who?', 'Why?'] and topic == ['people', None]\n"
        "    assert questions == ['Which is better?', 'Which is shorter?']\n"
        "    return [len(a) / (len(a) + len(b)) for a, b in zip(firsts, seconds)]\n"
    )
    assert judge(source)(QUESTIONS) == [Answer(0.3, "0.3"), Answer(0.5, "0.5")]


@pytest.mark.parametrize(
    ("returned", "firsts"),
    [
        ("['A', 'B']", [1.0, 0.0]),
        ("['B', None]", [0.0, None]),
        ("(x for x in (True, 0.25))", [1.0, 0.25]),
        ("__import__('torch').tensor([0.5, 1.0])", [0.5, 1.0]),
    ],
)
def test_what_it_may_return(judge, returned, firsts) -> None:
    answers = judge(f"def better(firsts):\n    return {returned}\n")(QUESTIONS)
    assert [answer.first for answer in answers] == firsts


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return ['A']", "returned 1 answer to 2 questions"),
        ("return ['A', 'C']", "returned 'C', which is neither"),
        ("return [0.5, 1.5]", "returned 1.5, which is no probability"),
        ("return [0.5, float('nan')]", "returned nan"),
        ("return 'AB'", "returned 'AB', not a list of answers"),
        ("return 0.5", "returned 0.5, not a list of answers"),
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(own_judge_.*\.py:2\)"),
        ("raise SystemExit(3)", r"called sys.exit\(3\)"),
        ("yield 1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_or_returns_nonsense_is_named(judge, body, said) -> None:
    made = judge(f"def better(firsts):\n    {body}\n")
    with pytest.raises(FunctionError, match=said) as caught:
        made(QUESTIONS)
    assert caught.value.place == PLACE and "the judge `own_judge_" in str(caught.value)
    with pytest.raises(InputError, match="on the first rows of `data`, the judge") as found:
        try_function(made, QUESTIONS)
    assert "probability that the first reply is better" in str(found.value.hint)


def test_a_column_that_the_rows_do_not_have_is_named(judge) -> None:
    with pytest.raises(FunctionError, match="wants `answer`, and the data have no such column"):
        judge("def better(firsts, answer):\n    return ['A'] * len(firsts)\n")(QUESTIONS)
