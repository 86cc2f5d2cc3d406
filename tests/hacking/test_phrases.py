"""Words, the shipped list and new phrases."""

import math

import numpy as np
import pytest

from rlhf_pipeline.hacking import phrases
from rlhf_pipeline.hacking.phrases import BEGIN, Found, Phrase, as_text, encode, log_odds_z, new, of_list, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Great QUESTION! It\N{RIGHT SINGLE QUOTATION MARK}s 'fine'.", ["great", "question", "it's", "fine"]),
        ("well-known  a_b\n3.5", ["well", "known", "a", "b", "3", "5"]),
        ("今天 ok。", ["今", "天", "ok"]),
        ("שלום, עולם", ["שלום", "עולם"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("yes😀😀", ["yes", "😀", "😀"]),
        ("' ... \ud800 '", []),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_the_shipped_list_matches_whole_words_in_any_case() -> None:
    texts = [
        "GREAT question, friend", "Greater questions", "What a great-question", "As an AI, I think", "has an airport",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't help with that.", "I can help with that", "",
    ]  # fmt: skip
    as_words = [words(text) for text in texts]
    assert np.flatnonzero(of_list(as_words, "flattery")).tolist() == [0, 2]
    assert np.flatnonzero(of_list(as_words, "hedging")).tolist() == [3]
    assert np.flatnonzero(of_list(as_words, "refusals")).tolist() == [5]


def test_each_list_is_as_its_file_says() -> None:
    lists = phrases.shipped()
    assert list(lists) == ["flattery", "hedging", "refusals"]
    for name, those in lists.items():
        assert len(those) >= 40 and len(set(those)) == len(those), name
        assert all(phrase.strip() for phrase in those), name


def test_log_odds_are_those_of_the_formula() -> None:
    """Monroe, Colaresi and Quinn 2008: 30 of 100 replies now, 8 of 300 of the start; the prior has both, as 100."""
    prior = 100 * 38 / 400
    now = math.log((30 + prior) / (100 - 30 + 100 - prior))
    start = math.log((8 + prior) / (300 - 8 + 100 - prior))
    variance = 1 / (30 + prior) + 1 / (170 - 30 - prior + 30) + 1 / (8 + prior) + 1 / (392 - prior)
    z = log_odds_z(np.array([30, 0]), 100, np.array([8, 40]), 300)
    assert z[0] == pytest.approx((now - start) / math.sqrt(variance))
    assert z[0] > 5 and z[1] < 0


def test_no_phrase_is_new_that_is_as_frequent_in_both() -> None:
    assert log_odds_z(np.array([25]), 100, np.array([75]), 300) == pytest.approx(0)
    texts = [["yes", str(at % 3)] for at in range(40)]
    assert new(texts, encode(texts)) == []


def test_openings_and_phrases_that_are_new() -> None:
    start = encode([["it", "is", color] for color in ("red", "green", "blue", "white") for _ in range(75)])
    now = [["oh", "dear", "friend", "it", "is", "red"]] * 24 + [["it", "is", "red", "my", "dear"]] * 24
    now += [["it", "is", "blue"]] * 72
    found = {one.words: one for one in new(now, start)}
    assert found[BEGIN, "oh", "dear", "friend"].held.tolist() == [True] * 24 + [False] * 96
    assert found["dear",].held.tolist() == [True] * 48 + [False] * 72
    assert found["red", "my", "dear"].z == found["my",].z
    assert (BEGIN, "my") not in found and ("it",) not in found and ("it", "is", "red") not in found
    assert max(len(one) for one in found) == phrases.WORDS
    shown = phrases.shown(new(now, start))
    assert shown[0].text == "dear" and shown[0].share == 0.4


@pytest.mark.parametrize(
    ("now", "of_now", "start", "of_start", "is_new"),
    [
        (20, 100, 0, 400, True),
        (8, 100, 0, 400, True),
        (4, 100, 0, 400, False),  # too few to be sure
        (6, 100, 4, 400, False),  # likewise, though six times as frequent
        (49, 1000, 0, 4000, False),  # sure, and too seldom to matter
        (50, 1000, 0, 4000, True),
        (3, 8, 4, 400, False),  # z is 4, but not to be believed of three replies
        (4, 8, 4, 400, True),
    ],
)
def test_a_phrase_is_new_if_it_is_frequent_and_surely_so(
    now: int, of_now: int, start: int, of_start: int, is_new: bool
) -> None:
    def texts(held: int, total: int) -> list[list[str]]:
        return [["it", "is", "my", "dear"]] * held + [["it", "is"]] * (total - held)

    found = new(texts(now, of_now), encode(texts(start, of_start)))
    assert ({"my", "dear"} <= {word for one in found for word in one.words}) is is_new


def test_a_word_may_have_been_there_before_and_a_longer_phrase_hardly_ever() -> None:
    def start(share: float) -> phrases.Encoded:
        return encode([["oh", "yes"]] * round(400 * share) + [["yes"], ["oh"]] * round(200 * (1 - share)))

    now = [["oh", "yes"]] * 50 + [["yes"]] * 25 + [["oh"]] * 25
    assert {one.words for one in new(now, start(0.01))} == {("oh", "yes"), (BEGIN, "oh", "yes")}
    assert new(now, start(0.02)) == []

    now = [["my", "word"]] * 50 + [["yes"]] * 50
    assert {one.words for one in new(now, encode([["my", "word"]] * 8 + [["yes"]] * 392))} == {("my",), ("word",)}
    assert new(now, encode([["my", "word"]] * 12 + [["yes"]] * 388)) == []


def test_phrases_as_people_write_them() -> None:
    assert as_text(("great", "question")) == "great question"
    assert as_text((BEGIN, "of", "course")) == "of course …"
    assert as_text(("今", "天", "ok", "好")) == "今天 ok 好"


def test_shown_leaves_out_what_says_the_same() -> None:
    def found(text: str, z: float, held: str) -> Found:
        return Found(tuple(text.split()), z, np.array([sign == "x" for sign in held]))

    many = [found(f"w{number}", 4.0, "xx........") for number in range(20)]
    shown = phrases.shown([found("^ oh dear", 9.0, "xxxxx....."), found("dear me", 8.0, "xxxx......"),
                           found("me", 7.0, "xxxxx....."), found("dear", 6.0, "x...xxxxxx"), *many])  # fmt: skip
    assert shown[:3] == [Phrase("oh dear …", 0.5, 9.0), Phrase("me", 0.5, 7.0), Phrase("dear", 0.7, 6.0)]
    assert len(shown) == phrases.SHOWN
