"""Verdicts: both orders, ties, dimensions and principles."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.principles import load
from rlhf_pipeline.judges.question import Answer, Question
from rlhf_pipeline.judges.verdicts import Pair, Verdict, compared, verdicts
from rlhf_pipeline.recipe.schema import AIJudge

PAIR = Pair("Why?", ("short", "a longer one"))


def answering(probability: Callable[[Question], float | None]) -> Callable[[Sequence[Question]], list[Answer]]:
    return lambda questions: [Answer(probability(question), "") for question in questions]


@pytest.fixture
def spec(tmp_path) -> AIJudge:
    (tmp_path / "one.yaml").write_text("- {name: good, question: Which}")
    return AIJudge(model="base", rubric=str(tmp_path / "one.yaml"))


@pytest.fixture
def two(tmp_path) -> AIJudge:
    (tmp_path / "two.yaml").write_text(
        "- {name: truth, question: T, weight: 3}\n- {name: brevity, question: B, weight: 1}"
    )
    return AIJudge(model="base", rubric=str(tmp_path / "two.yaml"))


def one(spec: AIJudge, probability: Callable[[Question], float | None], pair: Pair = PAIR) -> Verdict:
    (found,) = verdicts(answering(probability), [pair], spec, 0)
    return found


def test_both_orders_are_asked_and_averaged(spec) -> None:
    found = one(spec, lambda question: 0.9 if question.first == "short" else 0.3)
    assert found.probability == pytest.approx((0.9 + 0.7) / 2) and not found.is_tie and found.winner == 0
    assert found.by_dimension == {"good": found.probability} and found.principle is None
    assert [(answer["first"], answer["probability"]) for answer in found.asked] == [(0, 0.9), (1, 0.3)]


def test_the_order_of_a_pair_means_nothing(spec) -> None:
    def prefers(question: Question) -> float:
        return 0.8 if len(question.first) < len(question.second) else 0.4

    turned = one(spec, prefers, PAIR._replace(replies=PAIR.replies[::-1]))
    assert turned.probability == pytest.approx(1 - one(spec, prefers).probability) and turned.winner == 1


@pytest.mark.parametrize("always", [0.99, 0.02, 0.5])
def test_what_favours_a_position_or_nothing_gives_ties(spec, always) -> None:
    found = one(spec, lambda question: always)
    assert found.is_tie and found.winner is None and found.probability == pytest.approx(0.5)


def test_dimensions_are_asked_apart_and_weighted(two) -> None:
    found = one(two, lambda question: {"T": 0.8, "B": 0.1}[question.ask] if question.first == "short" else 0.4)
    true, brief = (0.8 + 0.6) / 2, (0.1 + 0.6) / 2
    assert found.by_dimension == {"truth": pytest.approx(true), "brevity": pytest.approx(brief)}
    assert found.probability == pytest.approx((3 * true + brief) / 4)
    assert [answer["about"] for answer in found.asked] == ["truth", "truth", "brevity", "brevity"]


def test_a_dimension_on_which_the_orders_disagree_does_not_make_a_tie_of_the_whole(two) -> None:
    """`brief` favours the reply shown first; by weight, both orders name the same winner."""
    found = one(two, lambda question: 0.9 if question.ask == "B" or question.first == "short" else 0.1)
    assert not found.is_tie and found.winner == 0 and found.by_dimension["brevity"] == pytest.approx(0.5)


def test_what_cannot_be_read_in_one_order_is_left_out(two) -> None:
    found = one(two, lambda question: None if (question.ask, question.first) == ("T", "short") else 0.7)
    assert list(found.by_dimension) == ["brevity"] and found.probability == found.by_dimension["brevity"]
    assert [answer["probability"] for answer in found.asked] == [None, 0.7, 0.7, 0.7]
    nothing = one(two, lambda question: None)
    assert nothing.probability is None and not nothing.is_tie and nothing.winner is None


def test_each_pair_draws_one_principle_whatever_else_is_asked() -> None:
    spec = AIJudge(model="base", principles="default")
    pairs = [Pair(f"Why {number}?", ("a", "b")) for number in range(300)]
    judge = answering(lambda question: 0.7 if question.first == "a" else 0.2)
    found = verdicts(judge, pairs, spec, 0)
    drawn = [verdict.principle for verdict in found]
    known = {principle.name: principle.judge for principle in load("default", "")}
    assert all(answer["question"] == known[answer["about"]] for verdict in found for answer in verdict.asked)
    assert set(drawn) == set(known) and max(Counter(drawn).values()) < 3 * 300 / len(known)
    assert [verdict.principle for verdict in verdicts(judge, pairs[100:], spec, 0)] == drawn[100:]
    turned = [pair._replace(replies=("b", "a")) for pair in pairs]
    assert [verdict.principle for verdict in verdicts(judge, turned, spec, 0)] == drawn
    assert [verdict.principle for verdict in verdicts(judge, pairs, spec, 1)] != drawn


def test_a_template_that_shows_no_question_asks_once(tmp_path) -> None:
    spec = AIJudge(model="base", template="{{ prompt }}{{ first }} or {{ second }}?")
    found = one(spec, lambda question: 0.8 if question.first == "short" else 0.2)
    assert list(found.by_dimension) == ["overall"] and len(found.asked) == 2
    for key in ("rubric", "principles"):
        with pytest.raises(InputError, match=f"`{key}` has no effect: the template does not show the `question`"):
            one(spec.model_copy(update={key: "default"}), lambda question: 0.5)


def test_which_pairs_are_compared() -> None:
    assert compared("p", ["a", "b", "c"], None, 0) == [(0, 1), (0, 2), (1, 2)]
    assert compared("p", ["a", "b", "a", "a"], None, 0) == [(0, 1)] and compared("p", ["a", "a"], None, 0) == []
    few = [compared(f"p{number}", ["a", "b", "c", "d"], 2, 0) for number in range(100)]
    assert all(len(pairs) == 2 and pairs == sorted(pairs) for pairs in few)
    assert len({pair for pairs in few for pair in pairs}) == 6  # all are drawn for some prompt
    assert few == [compared(f"p{number}", ["a", "b", "c", "d"], 2, 0) for number in range(100)]
