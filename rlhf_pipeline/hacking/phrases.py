"""Words and phrases of replies: those of the shipped list, and those that another policy did not use."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

SHIPPED = Path(__file__).with_name("phrases.yaml")
BEGIN = "^"  # stands before a reply's first word; `words` yields no such word
APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
WORDS = 4  # of the longest phrase, or of an opening with `BEGIN`
# A phrase is new if its z is at least this, so large a share of the replies hold it, and it is so much more frequent.
# Thousands of phrases are looked at, of which none should get there by chance.
LEAST_Z = 3.0
LEAST_SHARE = 0.05
TIMES = 10
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


def new(now: Sequence[Sequence[str]], start: Sequence[Sequence[str]]) -> list[Found]:
    """The openings of up to three words, and the phrases of up to four, that are new, the most telling first.

    Of equally telling ones the longest is first.

    Args:
        now: replies as words.
        start: those of the start.
    """
    if not now or not start:
        return []
    numbers: dict[str, int] = {BEGIN: 0}
    texts = [[0, *(numbers.setdefault(word, len(numbers)) for word in text)] for text in [*now, *start]]
    vocabulary = list(numbers)
    lengths = np.array([len(text) for text in texts])
    flat = np.concatenate([np.array(text, dtype=np.int64) for text in texts])
    text = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
    enough = max(2, int(np.ceil(LEAST_SHARE * len(now))))
    place, ids, count = np.arange(len(flat)), flat, len(vocabulary)
    found = []
    for n in range(1, WORDS + 1):
        held = np.unique(ids * len(texts) + text[place])
        phrase, holder = held // len(texts), held % len(texts)
        counts = np.bincount(phrase[holder < len(now)], minlength=count)
        before = np.bincount(phrase[holder >= len(now)], minlength=count)
        frequent = counts >= enough
        telling = frequent.copy()
        telling[frequent] = log_odds_z(counts[frequent], len(now), before[frequent], len(start)) >= LEAST_Z
        telling &= counts / len(now) >= TIMES * (before + 1) / (len(start) + 2)
        if n == 1:
            telling[0] = False
        first = dict(zip(ids[::-1].tolist(), place[::-1].tolist(), strict=True)) if telling.any() else {}
        for number in np.flatnonzero(telling).tolist():
            z = log_odds_z(counts[[number]], len(now), before[[number]], len(start))[0]
            those = np.zeros(len(now), dtype=np.bool_)
            those[holder[(phrase == number) & (holder < len(now))]] = True
            at = first[number]
            found.append(Found(tuple(vocabulary[word] for word in flat[at : at + n]), float(z), those))
        # A phrase is at most as frequent as the one it goes on from.
        goes_on = frequent[ids] & (left[place] > n)
        place = place[goes_on]
        different, ids = np.unique(ids[goes_on] * len(vocabulary) + flat[place + n], return_inverse=True)
        count = len(different)
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
    return share >= ALIKE and bool((set(one.words) & set(other.words)) - {BEGIN})


def as_text(phrase: Sequence[str]) -> str:
    """A phrase as people write it: without spaces where its script has none, an opening with "…" behind it."""
    text = " ".join(word for word in phrase if word != BEGIN)
    unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
    text = re.sub(f"(?<=[{unspaced}]) (?=[{unspaced}])", "", text)
    return f"{text} …" if phrase[0] == BEGIN else text
