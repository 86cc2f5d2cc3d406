"""Words and phrases of replies: those of the shipped list, and those that another policy did not use."""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from rlhf_pipeline.hacking.ngrams import unique

SHIPPED = Path(__file__).with_name("phrases.yaml")
BEGIN = "^"  # stands before a reply's first word; `words` yields no such word
APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
WORDS = 4  # of the longest phrase, or of an opening with `BEGIN`
# A phrase is new if its z is at least this, so large a share of the replies hold it, and at most so small a share of
# the start's did. Thousands of phrases are looked at, of which none should get there by chance.
LEAST_Z = 3.0
LEAST_SHARE = 0.05
LEAST_REPLIES = 4  # with fewer, log-odds are far from a normal distribution
MOST_BEFORE = 0.01
TIMES = 20  # or, of a single word, if its share is so many times what it was
SHOWN = 12
ALIKE = 0.8
# Scripts that are written without spaces between words: Thai and Lao, Burmese, Khmer, kana, Han.
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)  # fmt: skip


class Phrase(NamedTuple):
    """An opening or a phrase that is new.

    Attributes:
        text: its words in lower case; an opening ends in "…".
        share: of the replies that hold it.
        z: its log-odds against the start, in standard deviations.
    """

    text: str
    share: float
    z: float


class Found(NamedTuple):
    """A new phrase as its words, with which replies hold it, bool `[replies]`."""

    words: tuple[str, ...]
    z: float
    held: NDArray[np.bool_]


class Encoded(NamedTuple):
    """Texts as numbers, each with `BEGIN` before its first word.

    Attributes:
        numbers: of each word, ascending; `BEGIN` has 0.
        words: int64 `[W]`, the words of all texts, one text behind the other.
        lengths: int64 `[texts]`, each text's words, with `BEGIN`.
    """

    numbers: dict[str, int]
    words: NDArray[np.int64]
    lengths: NDArray[np.int64]


class _Signs(dict[int, str]):
    """What `str.translate` puts for each character, found out once."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        category = unicodedata.category(sign)
        if sign in APOSTROPHES:
            put = "'"
        elif any(first <= code <= last for first, last in UNSPACED) or category == "So":
            put = f" {sign} " if category[0] in "LMNS" else " "
        else:
            put = sign if category[0] in "LMN" else " "
        self[code] = put
        return put


_SIGNS = _Signs()


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    In scripts without spaces between words each character is one, as is an emoji in any.
    """
    found = text.lower().translate(_SIGNS).split()
    return [bare for word in found if (bare := word.strip("'"))]


@functools.cache
def shipped() -> dict[str, tuple[str, ...]]:
    """The phrases of the shipped list by the list's name, as `words` has them, with a space before and behind."""
    lists = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return {name: tuple(f" {' '.join(words(phrase))} " for phrase in phrases) for name, phrases in lists.items()}


def of_list(texts: Sequence[Sequence[str]], name: str) -> NDArray[np.bool_]:
    """Which texts, given as words, hold a phrase of a shipped list; bool `[texts]`."""
    phrases = shipped()[name]
    joined = [f" {' '.join(text)} " for text in texts]
    return np.array([any(phrase in text for phrase in phrases) for text in joined], dtype=np.bool_)


def log_odds_z(now: NDArray[np.int64], of_now: int, start: NDArray[np.int64], of_start: int) -> NDArray[np.float64]:
    """The z-score of each phrase's log-odds ratio, with an informative Dirichlet prior.

    Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16, 19 and 22, of replies that hold a phrase instead of
    words in a text. The prior is what both groups say together, and weighs as much as the replies now. The variance is
    the whole one of a log-odds, with the term of the replies without the phrase, as some phrases are in all.

    Args:
        now: how many replies hold each phrase.
        of_now: of how many.
        start: how many replies of the start do; no phrase may be in neither.
        of_start: of how many.
    """
    prior = of_now * (now + start) / (of_now + of_start)
    without = np.maximum(of_now - prior, 1e-9)
    with_now, with_start = now + prior, start + prior
    without_now, without_start = of_now - now + without, of_start - start + without
    odds = np.log(with_now / without_now) - np.log(with_start / without_start)
    variance = 1 / with_now + 1 / without_now + 1 / with_start + 1 / without_start
    return odds / np.sqrt(variance)


def encode(texts: Sequence[Sequence[str]], known: dict[str, int] | None = None) -> Encoded:
    """Texts, given as words, as numbers.

    Args:
        texts: the words of each.
        known: the numbers that words have already.
    """
    numbers = dict(known) if known else {BEGIN: 0}
    flat = [word for text in texts for word in (BEGIN, *text)]
    for word in dict.fromkeys(flat):
        numbers.setdefault(word, len(numbers))
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    return Encoded(numbers, np.array([numbers[word] for word in flat], dtype=np.int64), lengths)


def new(now: Sequence[Sequence[str]], start: Encoded) -> list[Found]:
    """The openings of up to three words, and the phrases of up to four, that are new, the most telling first.

    Of equally telling ones the longest is first. A phrase of several words that the start did use, if seldom, is not
    new: two habits that become more frequent make their combination much more so. With the tiny model, PPO that does
    well by its judge (0.90 after 0.54) begins 46 % of its replies with "Gladly! That would", which 3 % did before.

    Args:
        now: replies as words.
        start: those of the start.
    """
    of_now, of_start = len(now), len(start.lengths)
    if not of_now or not of_start:
        return []
    own = encode(now, start.numbers)
    vocabulary = list(own.numbers)
    words, lengths = np.concatenate([own.words, start.words]), np.concatenate([own.lengths, start.lengths])
    text = np.repeat(np.arange(of_now + of_start), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words from here to the text's end
    enough = max(LEAST_REPLIES, math.ceil(LEAST_SHARE * of_now))
    place, ids, different = np.arange(len(words)), words, len(vocabulary)
    found = []
    for n in range(1, WORDS + 1):
        is_now = text[place] < of_now
        held = unique(ids[is_now] * of_now + text[place[is_now]])
        phrase, holder = held // of_now, held % of_now
        counts = np.bincount(phrase, minlength=different)
        frequent = counts >= enough
        kept = frequent[ids]  # a longer phrase is at most as frequent as its beginning
        place, ids, is_now = place[kept], ids[kept], is_now[kept]
        before = np.bincount(
            unique(ids[~is_now] * of_start + text[place[~is_now]] - of_now) // of_start, minlength=different
        )
        z = log_odds_z(np.maximum(counts, 1), of_now, before, of_start)
        unknown = before <= MOST_BEFORE * of_start
        if n == 1:
            unknown |= counts / of_now >= TIMES * (before + 1) / (of_start + 2)
        telling = frequent & (z >= LEAST_Z) & unknown
        for number in np.flatnonzero(telling).tolist():
            at = int(place[np.argmax(ids == number)])
            those = np.zeros(of_now, dtype=np.bool_)
            those[holder[phrase == number]] = True
            found.append(Found(tuple(vocabulary[word] for word in words[at : at + n]), float(z[number]), those))
        goes_on = left[place] > n
        place, ids = place[goes_on], ids[goes_on]
        if not len(place):
            break
        longer, ids = np.unique(ids * len(vocabulary) + words[place + n], return_inverse=True)
        different = len(longer)
    return sorted(found, key=lambda one: (-one.z, -len(one.words), one.words))


def shown(found: Sequence[Found]) -> list[Phrase]:
    """The most telling of new phrases, without those that share words and nearly all replies with one before them."""
    kept: list[Found] = []
    for one in found:
        if len(kept) == SHOWN:
            break
        if not any(_alike(one, other) for other in kept):
            kept.append(one)
    return [Phrase(as_text(one.words), float(one.held.mean()), one.z) for one in kept]


def _alike(one: Found, other: Found) -> bool:
    both = int((one.held & other.held).sum())
    share = both / max(1, min(int(one.held.sum()), int(other.held.sum())))
    return share >= ALIKE and not set(one.words).isdisjoint(other.words)


def as_text(phrase: Sequence[str]) -> str:
    """A phrase as people write it: without spaces where its script has none, an opening with "…" behind it."""
    text = " ".join(word for word in phrase if word != BEGIN)
    unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
    text = re.sub(f"(?<=[{unspaced}]) (?=[{unspaced}])", "", text)
    return f"{text} …" if phrase[0] == BEGIN else text
