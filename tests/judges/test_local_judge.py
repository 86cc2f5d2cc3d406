"""A judge on the shared base reads the probabilities of its answer."""

import contextlib

import pytest
import torch
from peft import PeftModel

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.load import load
from rlhf_pipeline.judges.local import BEGINNING, LocalJudge
from rlhf_pipeline.judges.question import Question, read_template, render
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.models.tokenizer import render as as_turns
from rlhf_pipeline.recipe.schema import AIJudge

SHORT = "{{ prompt }}\nA:{{ first }}\nB:{{ second }}\n{{ question }}"
QUESTIONS = [
    Question("Q: What color is a lemon?", " It is yellow.", " No idea.", "Which", {}),
    Question(
        "Q: Why?", " Stop asking.", " That would be a very long reply, would it not, to so short a question?", "?", {}
    ),
    Question([{"role": "user", "content": "Why?"}], "Who can say?", "It is moo.", "Which", {}),
    Question("Q:", " a", " b", "?", {}),
]


@pytest.fixture(scope="module")
def artifacts(make_artifacts):
    return make_artifacts()


@pytest.fixture(scope="module")
def staged(artifacts) -> StagedBase:
    return StagedBase(artifacts.spec, {"sft": artifacts.init})


def alone(model, tokenizer, text: str, words: tuple[str, str] = ("A", "B")) -> tuple[float, float]:
    """The two words' probabilities behind a text, by the model itself: each with and without a space before it."""
    with torch.no_grad():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        p = model(input_ids=ids).logits[0, -1].float().softmax(0)
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sum(float(p[vocabulary[token]]) for token in (word, f"Ġ{word}") if token in vocabulary) for word in words
    )


def test_it_reads_the_share_of_the_first_letter_of_each_question(staged, artifacts, tokenizer) -> None:
    policy = PeftModel.from_pretrained(load_base(artifacts.spec, tokenizer), str(artifacts.init))
    texts = [render(question, SHORT) for question in QUESTIONS]
    texts[2] = as_turns(tokenizer, [{"role": "user", "content": texts[2]}])
    for named, adapter in (("sft", contextlib.nullcontext()), ("base", policy.disable_adapter())):
        with adapter:
            expected = [alone(policy, tokenizer, text) for text in texts]
        answers = LocalJudge(AIJudge(model=named, template=SHORT, batch_size=2, min_probability=0.0), staged, "judge")(
            QUESTIONS
        )
        assert [answer.first for answer in answers] == pytest.approx([a / (a + b) for a, b in expected], abs=1e-5)


def test_answers_do_not_depend_on_what_is_asked_together(staged) -> None:
    def first(batch_size: int, questions: list[Question]) -> list[float]:
        spec = AIJudge(model="sft", template=SHORT + "{{ '' }}", answers=["It", "Q"], batch_size=batch_size)
        return [answer.first or 0.0 for answer in LocalJudge(spec, staged, "judge")(questions)]

    together = first(4, QUESTIONS)
    assert together == pytest.approx(first(1, QUESTIONS), abs=1e-5)
    assert together[::-1] == pytest.approx(first(3, QUESTIONS[::-1]), abs=1e-5)


def test_plain_text_gets_the_beginning_of_the_answer_and_a_conversation_becomes_a_users_turn(staged) -> None:
    judge = LocalJudge(AIJudge(model="base"), staged, "judge")
    asked = render(QUESTIONS[0], read_template(None, ""))
    assert judge._prompt(QUESTIONS[0]) == asked + BEGINNING
    (turn,) = judge._prompt(QUESTIONS[2])
    assert turn["role"] == "user" and "Reply A:\nWho can say?" in turn["content"]


def test_an_answer_is_not_read_where_the_model_would_say_something_else(staged, artifacts, tokenizer) -> None:
    model = load_base(artifacts.spec, tokenizer)
    judge = LocalJudge(AIJudge(model="base", template=SHORT), staged, "judge")
    for question, answer in zip(QUESTIONS, judge(QUESTIONS), strict=True):
        if isinstance(question.prompt, str):
            legible = sum(alone(model, tokenizer, render(question, SHORT))) >= 0.05
            assert (answer.first is not None) is legible
    assert any(answer.first is None for answer in judge(QUESTIONS))


def test_a_question_longer_than_the_model_reads_is_not_asked(staged) -> None:
    long = QUESTIONS[0]._replace(second=" No idea." * 60)
    of_long, of_short = LocalJudge(AIJudge(model="base", template=SHORT), staged, "judge")([long, QUESTIONS[0]])
    assert of_long.first is None and "not asked, as it is" in of_long.text and "not asked" not in of_short.text


def test_words_that_are_no_tokens_and_templates_that_fail_are_named(staged) -> None:
    with pytest.raises(InputError, match="the tokenizer has no token that is 'antidisestablish' alone") as found:
        LocalJudge(AIJudge(model="base", template=SHORT, answers=["A", "antidisestablish"]), staged, "judge")
    assert found.value.place == "judge.answers"
    failing = AIJudge(model="base", template="{{ first.x.y }}{{ second }}")
    with pytest.raises(InputError, match="the template fails on a question: 'str object' has no attribute 'x'"):
        LocalJudge(failing, staged, "judge")(QUESTIONS)


def test_who_is_asked(staged, tmp_path) -> None:
    found = load(AIJudge(model="sft", template=SHORT), None, "judge", staged, tmp_path / "answers.jsonl")  # type: ignore
    assert isinstance(found, LocalJudge) and found.view.role == "sft"
