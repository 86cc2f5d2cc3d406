"""Measures of replies as sequences of tokens: how varied they are, how alike, and how often they repeat themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BLEU_ORDER = 4
REPETITION_ORDER = 4
NO_MATCH = 0.1  # counted in place of no match at all: method 1 of Chen and Cherry 2014, with NLTK's default


class NGrams(NamedTuple):
    """All n-grams of some texts, for one n, in their order.

    Attributes:
        ids: int64 `[G]`, the same number for the same n-gram.
        text: int64 `[G]`, the text that each is of.
        different: how many different ones there are.
    """

    ids: Ints
    text: Ints
    different: int


def ngrams(texts: Sequence[Sequence[int]], order: int) -> list[NGrams]:
    """The n-grams of texts for every n from 1 to `order`."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(text, dtype=np.int64) for text in texts)])
    text = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # tokens from here to the text's end
    words, of_word = np.unique(tokens, return_inverse=True)
    place, ids = np.arange(len(tokens)), of_word
    found = [NGrams(ids, text, len(words))]
    for n in range(2, order + 1):
        goes_on = left[place] >= n
        place = place[goes_on]
        different, ids = np.unique(ids[goes_on] * len(words) + of_word[place + n - 1], return_inverse=True)
        found.append(NGrams(ids, text[place], len(different)))
    return found


def unique(numbers: Ints) -> Ints:
    """Sorted and each once. NumPy's own of whole numbers goes by hashes since 2.3, and is several times slower."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def distinct(grams: NGrams, blocks: int, size: int) -> Floats:
    """Distinct-n of blocks of texts: the share of different n-grams among all of a block.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models". It falls as a block
    grows, so that only blocks of one size compare.

    Args:
        grams: of all texts.
        blocks: how many blocks there are.
        size: how many texts each has, one block after the other.

    Returns:
        float64 `[blocks]`; 1 where a block has no n-gram.
    """
    of_block = grams.text // size
    different = unique(of_block * max(grams.different, 1) + grams.ids) // max(grams.different, 1)
    total = np.bincount(of_block, minlength=blocks)
    return np.where(total > 0, np.bincount(different, minlength=blocks) / np.maximum(total, 1), 1.0)


def repetition(grams: NGrams, texts: int) -> Floats:
    """The share of repeated n-grams within each text, 1 - different / all.

    With n = 4 it is the seq-rep-4 of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".

    Returns:
        float64 `[texts]`; 0 where a text has no n-gram.
    """
    different = unique(grams.text * max(grams.different, 1) + grams.ids) // max(grams.different, 1)
    total = np.bincount(grams.text, minlength=texts)
    return np.where(total > 0, 1 - np.bincount(different, minlength=texts) / np.maximum(total, 1), 0.0)


def self_bleu(grams: Sequence[NGrams], lengths: Ints, size: int) -> Floats:
    """Self-BLEU: the BLEU of each text with the others of its block as references.

    Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models"; BLEU as Papineni et al. 2002 have
    it, of each text by itself, with equal weights and the reference of the nearest length, of two as near the shorter.
    An order without a match counts `NO_MATCH`. A text shorter than n tokens has no n-grams, and its mean is over the
    orders that it has, so that of two equal texts each scores 1, however short they are.

    Args:
        grams: of all texts, for n from 1.
        lengths: int64 `[M]`, each text's tokens.
        size: how many texts a block has, one block after the other; M is a multiple of it.

    Returns:
        float64 `[M]`. An empty text has 1 beside another empty one, else 0; so has a text alone in its block.
    """
    if size < 2:
        return np.zeros(len(lengths))
    logs = np.zeros(len(lengths))
    for n, those in enumerate(grams, 1):
        total = np.maximum(lengths - n + 1, 0)
        matches = np.maximum(_matches(those, len(lengths), size), NO_MATCH)
        logs += np.where(total > 0, np.log(matches / np.maximum(total, 1)), 0.0)
    orders = np.minimum(lengths, len(grams))
    own = lengths.reshape(-1, size, 1)
    others = lengths.reshape(-1, 1, size)
    distance = 2 * np.abs(own - others) + (others > own)
    distance[:, np.arange(size), np.arange(size)] = np.iinfo(np.int64).max
    nearest = np.take_along_axis(others[:, 0], distance.argmin(2), 1).reshape(-1)
    shortness = np.minimum(1 - nearest / np.maximum(lengths, 1), 0.0)
    return np.where(lengths > 0, np.exp(logs / np.maximum(orders, 1) + shortness), (nearest == 0).astype(np.float64))


def _matches(grams: NGrams, texts: int, size: int) -> Floats:
    """How many n-grams of each text another text of its block has, each at most as often as that one has it."""
    width = max(grams.different, 1)
    held, counts = np.unique(grams.text * width + grams.ids, return_counts=True)
    text = held // width
    group = text // size * width + held % width  # an n-gram in a block
    order = np.lexsort((-counts, group))
    text, group, counts = text[order], group[order], counts[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))  # of each group, the text that has it most often
    most = np.repeat(counts[first], np.diff(first, append=len(group)))
    shared = np.diff(first, append=len(group)) > 1
    most[first] = 0
    most[first[shared]] = counts[first[shared] + 1]
    return np.bincount(text, np.minimum(counts, most), minlength=texts).astype(np.float64)
