"""Measures over tokens: by hand, and against a slow and plain way to count."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_pipeline.hacking.ngrams import NO_MATCH, distinct, ngrams, repetition, self_bleu


def grams_of(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]


def plain_bleu(text: Sequence[int], references: Sequence[Sequence[int]], order: int = 4) -> float:
    """BLEU of one text, as it is defined."""
    if not text:
        return float(any(not one for one in references))
    logs = []
    for n in range(1, min(order, len(text)) + 1):
        own = Counter(grams_of(text, n))
        most = Counter[tuple[int, ...]]()
        for one in references:
            most |= Counter(grams_of(one, n))
        logs.append(math.log(max((own & most).total(), NO_MATCH) / own.total()))
    nearest = min((abs(len(one) - len(text)), len(one)) for one in references)[1]
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / len(text)))


def bleus(texts: Sequence[Sequence[int]], size: int) -> list[float]:
    return self_bleu(ngrams(texts, 4), np.array([len(text) for text in texts]), size).tolist()


def test_ngrams_never_reach_over_the_end_of_a_text() -> None:
    one, two, three = ngrams([[7, 8], [7, 8, 7, 8], [], [9]], 3)
    assert one.text.tolist() == [0, 0, 1, 1, 1, 1, 3] and one.different == 3
    assert two.text.tolist() == [0, 1, 1, 1] and two.different == 2
    assert two.ids[0] == two.ids[1] == two.ids[3] != two.ids[2]
    assert three.text.tolist() == [1, 1] and three.different == 2


def test_distinct_counts_each_block_by_itself() -> None:
    texts = [[1, 2, 1], [1, 2], [1, 1], [1, 1], [], []]
    one, two = ngrams(texts, 2)
    assert distinct(one, 3, 2).tolist() == [2 / 5, 1 / 4, 1]
    assert distinct(two, 3, 2).tolist() == [2 / 3, 1 / 2, 1]


def test_repetition_is_within_a_text() -> None:
    texts = [[1, 2, 1, 2, 1, 2], [1, 2, 1, 2], [3, 3, 3, 3, 3, 3], [1], []]
    assert repetition(ngrams(texts, 4)[3], 5).tolist() == [pytest.approx(1 / 3), 0, pytest.approx(2 / 3), 0, 0]


def test_self_bleu_by_hand() -> None:
    # Of 1 2 3 4: three tokens, one pair and no longer n-gram are in 1 2 9 3; the lengths are the same.
    expected = (3 / 4 * 1 / 3 * NO_MATCH / 2 * NO_MATCH / 1) ** (1 / 4)
    assert bleus([[1, 2, 3, 4], [1, 2, 9, 3]], 2) == pytest.approx([expected, expected])
    # Three equal tokens, of which the other has one; it has a token more: exp(1 - 4 / 3).
    assert bleus([[5, 5, 5], [5, 6, 7, 8]], 2)[0] == pytest.approx(
        (1 / 3 * NO_MATCH / 2 * NO_MATCH / 1) ** (1 / 3) * math.exp(-1 / 3)
    )


def test_self_bleu_of_equal_and_of_empty_texts() -> None:
    assert bleus([[3, 4]] * 3 + [[3]] * 3, 3) == [1] * 6
    assert bleus([[], [], [1, 2], []], 2) == [1, 1, pytest.approx((NO_MATCH / 2 * NO_MATCH) ** 0.5), 0]
    assert bleus([[1, 2, 3]], 1) == [0]
    assert bleus([[1, 2], [9, 9], [1, 2], [1, 2]], 2)[:2] == bleus([[1, 2], [9, 9]], 2)  # another block is none of its


def test_self_bleu_is_the_plain_one() -> None:
    draw = np.random.default_rng(0)
    texts = [(draw.zipf(1.5, draw.integers(0, 12)) % 6).tolist() for _ in range(400)]
    expected = []
    for start in range(0, len(texts), 8):
        block = texts[start : start + 8]
        expected += [plain_bleu(text, block[:at] + block[at + 1 :]) for at, text in enumerate(block)]
    assert bleus(texts, 8) == pytest.approx(expected)
    assert len(set(expected)) > 100
