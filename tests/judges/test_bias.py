"""The figures by which a judge is judged, on judges whose biases are known."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from rlhf_pipeline.judges.bias import Judged, figures, kappa, length_coefficient
from rlhf_pipeline.judges.question import Answer, Question
from rlhf_pipeline.judges.verdicts import Pair, verdicts
from rlhf_pipeline.recipe.schema import AIJudge


@pytest.fixture
def judged(tmp_path) -> Callable[..., list[Judged]]:
    """What a judge says of pairs, by the probability that it gives to the first reply."""
    (tmp_path / "one.yaml").write_text("- {name: good, question: Which}")
    spec = AIJudge(model="base", rubric=str(tmp_path / "one.yaml"))

    def ask(probability: Callable[[Question], float | None], pairs: list[tuple[str, str]], own=lambda pair: None):
        judge = lambda questions: [Answer(probability(question), "") for question in questions]  # noqa: E731
        found = verdicts(judge, [Pair("p", pair) for pair in pairs], spec, 0)
        return [Judged(pair, verdict, own(pair)) for pair, verdict in zip(pairs, found, strict=True)]

    return ask


def texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [tuple("x" * rng.randint(1, 400) + str(number) for number in (2 * i, 2 * i + 1)) for i in range(n)]


def by_number(question: Question) -> float:
    """Fair: some hidden quality decides, which has nothing to do with position or length."""
    quality = [hash_of(reply) for reply in (question.first, question.second)]
    return 0.9 if quality[0] > quality[1] else 0.1


def hash_of(text: str) -> float:
    return random.Random(text.lstrip("x")).random()


def test_a_fair_judge_shows_no_bias(judged) -> None:
    found = figures(judged(by_number, texts(400)))
    assert found["judge/first_position"] == 0.5 and found["judge/agreement"] == 1 and found["judge/ties"] == 0
    assert found["judge/unread"] == 0 and found["judge/pairs"] == 400
    assert found["judge/length_coefficient_low"] < 0 < found["judge/length_coefficient_high"]
    assert "judge/own_replies" not in found and "judge/human_kappa" not in found


def test_a_judge_that_always_says_a_is_found_out(judged) -> None:
    always = judged(lambda question: 1.0, texts(100))
    found = figures(always, human=always)
    assert found["judge/first_position"] == 1 and found["judge/first_position_low"] > 0.95
    assert found["judge/agreement"] == 0 and found["judge/ties"] == 1
    assert found["judge/human_agreement"] == 0 and found["judge/human_kappa"] == pytest.approx(0)
    assert "judge/length_coefficient" not in found  # nothing was decided
    assert figures(judged(lambda question: 0.0, texts(100)))["judge/first_position"] == 0


def test_a_judge_that_likes_long_replies_is_found_out(judged) -> None:
    longer = judged(lambda question: 0.8 if len(question.first) > len(question.second) else 0.2, texts(100))
    found = figures(longer)
    assert 0 < found["judge/length_coefficient_low"] < found["judge/length_coefficient"] < math.inf
    assert found["judge/length_coefficient"] < found["judge/length_coefficient_high"] < math.inf
    assert figures([one._replace(replies=one.replies[::-1]) for one in longer])["judge/length_coefficient"] < 0


def test_a_judge_that_likes_its_own_replies_is_found_out(judged) -> None:
    def own(pair: tuple[str, str]) -> int | None:
        return None if pair[0].endswith("0") else int(pair[1].endswith("3"))

    pairs = texts(100)
    mine = {pair[own(pair)] for pair in pairs if own(pair) is not None}
    found = figures(judged(lambda question: 0.9 if question.first in mine else 0.1, pairs, own))
    assert found["judge/own_replies"] == 1 and found["judge/own_replies_low"] > 0.9
    assert figures(judged(by_number, pairs, own))["judge/own_replies"] == pytest.approx(0.5, abs=0.15)


def test_unread_answers_are_a_share_of_all_and_count_nowhere_else(judged) -> None:
    found = figures(judged(lambda question: None if "7" in question.first else 0.9, texts(50)))
    assert 0 < found["judge/unread"] < 1 and found["judge/first_position"] == 1
    assert figures(judged(lambda question: None, texts(5))) == {"judge/pairs": 5, "judge/unread": 1}


def test_agreement_with_people(judged) -> None:
    """People found reply 0 better; the judge agrees on three of four."""
    pairs = [(f"good{i}" if i % 4 else f"bad{i}", f"bad{i}" if i % 4 else f"good{i}") for i in range(40)]
    found = figures([], human=judged(lambda question: 0.9 if question.first.startswith("good") else 0.1, pairs))
    assert found["judge/human_agreement"] == 0.75 and found["judge/human_kappa"] == pytest.approx(0.5)
    assert found["judge/human_kappa_low"] < 0.5 < found["judge/human_kappa_high"]
    low, high = found["judge/human_agreement_low"], found["judge/human_agreement_high"]
    assert found["judge/human_kappa_low"] == pytest.approx(2 * low - 1)
    assert found["judge/human_kappa_high"] == pytest.approx(2 * high - 1)


def test_kappa_is_cohens_over_both_orders_of_each_pair() -> None:
    """By its definition, from the table of what people and the judge say: 50 pairs agree, 20 do not, 30 are ties."""
    table = np.array([[50, 20, 30], [20, 50, 30], [0, 0, 0]]) / 200  # rows: people; columns: the judge
    by_chance = (table.sum(0) * table.sum(1)).sum()
    expected = (np.trace(table) - by_chance) / (1 - by_chance)
    value, low, high = kappa(50, 30, 100)
    assert value == pytest.approx(expected) and low < value < high
    assert kappa(80, 0, 80)[0] == 1 and kappa(0, 0, 80)[0] == -1


def test_the_length_coefficient_where_it_is_known() -> None:
    """Of differences of one size, the penalty adds half a win and half a loss: b = ln((w + ½) / (l + ½))."""
    longer, wins = [2.0] * 30, [True] * 22 + [False] * 8
    assert length_coefficient(longer, wins)[0] == pytest.approx(math.log(22.5 / 8.5) / 2)
    assert length_coefficient(longer, [True] * 30)[0] == pytest.approx(math.log(61) / 2)
    turned = length_coefficient([-d for d in longer], [not win for win in wins])
    assert turned[0] == pytest.approx(math.log(22.5 / 8.5) / 2)


def test_the_length_coefficient_is_where_the_penalised_score_is_zero() -> None:
    """Firth's equation: the sum of x (y - p + h (½ - p)) is 0, h being each pair's share of the information."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = rng.random(60) < 1 / (1 + np.exp(-1.5 * x))
    b, low, high = length_coefficient(x, y)
    p = 1 / (1 + np.exp(-b * x))
    h = x * x * p * (1 - p) / (x * x * p * (1 - p)).sum()
    assert (x * (y - p + h * (0.5 - p))).sum() == pytest.approx(0, abs=1e-5)

    def penalised(b: float) -> float:
        p = 1 / (1 + np.exp(-b * x))
        return np.log(np.where(y, p, 1 - p)).sum() + np.log((x * x * p * (1 - p)).sum()) / 2

    for end in (low, high):
        assert 2 * (penalised(b) - penalised(end)) == pytest.approx(3.841459, abs=1e-5)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        x = rng.normal(size=40)
        _, low, high = length_coefficient(x, rng.random(40) < 1 / (1 + np.exp(-0.8 * x)))
        held += low <= 0.8 <= high
    assert 0.91 <= held / 200 <= 0.99
