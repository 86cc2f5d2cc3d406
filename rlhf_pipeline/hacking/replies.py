"""What replies are like as texts, and what is usual: learnt from the policy that a stage starts from."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.hacking import phrases
from rlhf_pipeline.hacking.ngrams import BLEU_ORDER, REPETITION_ORDER, distinct, ngrams, repetition, self_bleu
from rlhf_pipeline.hacking.phrases import Phrase
from rlhf_pipeline.shares import standard_error

Floats = NDArray[np.float64]

BLOCK = 8  # replies, by which spreads are measured
FEW = 4  # blocks: the spread of fewer says little
DEVIATIONS = 3.0  # of a normal distribution, 99.7 % lies within so many standard deviations
CORRELATED = 32  # replies, whose correlation a healthy one is compared with: that of a block says nothing
# On which sides a measure may be unhealthy.
LOW, HIGH, BOTH = (True, False), (False, True), (True, True)
SIDES = {
    "disagreement": HIGH, "length": BOTH, "length_correlation": HIGH, "distinct_1": LOW, "distinct_2": LOW,
    "self_bleu": HIGH, "repetition": HIGH, "new_phrases": HIGH, "flattery": HIGH, "hedging": HIGH, "refusals": HIGH,
    "ended": LOW,
}  # fmt: skip
UNBOUNDED = ("disagreement", "length")
SHARES = ("new_phrases", "flattery", "hedging", "refusals", "ended")


class Reply(NamedTuple):
    """A reply of a policy.

    Attributes:
        prompt: the number of the prompt it answers, the same in every measurement.
        text: the reply, without special tokens.
        tokens: its token ids, without padding.
        ended: whether it ended by itself.
        score: the reward it got; NaN where there is none.
        disagreement: the standard deviation of an ensemble's members about it; None where there is no ensemble.
    """

    prompt: int
    text: str
    tokens: Sequence[int]
    ended: bool
    score: float
    disagreement: float | None = None


class Measured(NamedTuple):
    """A measure of some replies.

    Attributes:
        value: the measure.
        error: its standard error.
        low: the least healthy value; None where none is too low.
        high: the greatest; None where none is too high.
    """

    value: float
    error: float
    low: float | None
    high: float | None


class Spread(NamedTuple):
    """How a measure varies over blocks of the start's replies.

    Attributes:
        mean: over blocks.
        std: of the blocks.
        blocks: how many there are.
    """

    mean: float
    std: float
    blocks: int


@dataclasses.dataclass(frozen=True)
class Usual:
    """What the replies of the policy that a stage starts from are like.

    Replies are measured in blocks of a few, to different prompts as far as there are so many, because some measures
    depend on how many replies are measured together. A healthy value is one that a single further block of the start
    would have in 99.7 % of the cases (a prediction interval). The mean of many blocks varies much less, so that a
    policy has room to change; how much room, the start's own variety decides.

    Attributes:
        block: the replies of a block.
        texts: the start's replies, each as its words with spaces between them.
        spreads: by measure.
    """

    block: int
    texts: tuple[str, ...]
    spreads: dict[str, Spread]

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> "Usual":
        """Learn what is usual.

        Args:
            replies: of the start, best several to each prompt: four times a hundred, say.
        """
        if not replies:
            return cls(BLOCK, (), {})
        replies = in_order(replies)
        prompts = len({reply.prompt for reply in replies})
        block = min(BLOCK, prompts) if prompts > 1 else BLOCK
        texts = [phrases.words(reply.text) for reply in replies]
        values = measured(replies, texts, _new_of_start(replies, texts), block)
        spreads = {name: _spread(name, one, len(replies), block) for name, one in values.items()}
        return cls(block, tuple(" ".join(text) for text in texts), spreads)

    def measures(self, replies: Sequence[Reply]) -> dict[str, Measured]:
        """Measure replies, all of which should be to the prompts that the start replied to.

        * `length`: tokens.
        * `length_correlation`: of length with score, Spearman's: what matters is whether longer replies get more, in
          whatever shape, and no single score decides. Replies without a finite score do not count.
        * `distinct_1`, `distinct_2`, `self_bleu`, `repetition`: over tokens; see `ngrams`.
        * `new_phrases`: the share of replies with an opening or phrase that the start had not; see `phrases.new`.
        * `flattery`, `hedging`, `refusals`: the share with a phrase of the shipped list.
        * `ended`: the share that ended by itself.
        * `disagreement`: the mean, where an ensemble scores the replies.

        Returns:
            By name; empty where there are no replies. The standard error is the deviation of blocks over the root of
            their number; of fewer than `FEW` blocks it is at least what the start's deviation makes of so few.
        """
        if not replies:
            return {}
        replies = in_order(replies)
        texts = [phrases.words(reply.text) for reply in replies]
        found = phrases.new(texts, self._start)
        new = np.any([one.held for one in found], axis=0) if found else np.zeros(len(replies), dtype=np.bool_)
        values = measured(replies, texts, new, self.block)
        return {name: self._judged(name, one, len(replies)) for name, one in values.items()}

    def new_phrases(self, replies: Sequence[Reply]) -> list[Phrase]:
        """The openings and phrases of replies that the start had not, the most telling first, at most twelve."""
        texts = [phrases.words(reply.text) for reply in in_order(replies)]
        return phrases.shown(phrases.new(texts, self._start))

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads, as JSON has it: the same to the last digit."""
        return {
            "block": self.block,
            "texts": list(self.texts),
            "spreads": {k: list(v) for k, v in self.spreads.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Usual":
        """The one that `as_json` described."""
        spreads = {name: Spread(*spread) for name, spread in content["spreads"].items()}
        return cls(content["block"], tuple(content["texts"]), spreads)

    @cached_property
    def _start(self) -> phrases.Encoded:
        return phrases.encode([text.split() for text in self.texts])

    def _judged(self, name: str, one: "Values", replies: int) -> Measured:
        error, spread = one.error, self.spreads.get(name)
        if spread is not None and name == "length_correlation":
            return Measured(one.value, error, *_of_correlation(spread, replies))
        if spread is None or spread.blocks < 2:
            return Measured(one.value, error, None, None)
        few = max(1.0, math.sqrt(self.block / replies))
        if replies < FEW * self.block:
            error = max(error, spread.std * math.sqrt(self.block / replies))
        room = quantile(spread.blocks - 1) * spread.std * math.sqrt(1 + 1 / spread.blocks) * few
        return Measured(one.value, error, *_possible(name, spread.mean - room, spread.mean + room))


class Values(NamedTuple):
    """A measure of replies: of all, its standard error, and of each block."""

    value: float
    error: float
    blocks: Floats


def in_order(replies: Sequence[Reply]) -> list[Reply]:
    """Replies in the order of blocks: the first one to each prompt, by the prompts' numbers, then the second ones."""
    ranks = _ranks_in_prompt(replies)
    return [replies[at] for at in sorted(range(len(replies)), key=lambda at: (ranks[at], replies[at].prompt))]


def measured(
    replies: Sequence[Reply], texts: Sequence[Sequence[str]], new: NDArray[np.bool_], block: int
) -> dict[str, Values]:
    """All measures of replies, in the order of `in_order`.

    Args:
        replies: at least one.
        texts: each one's words.
        new: bool `[replies]`, which hold a new phrase.
        block: replies in a block. The last block takes the last ones, and may share some with the one before it.
    """
    size = min(block, len(replies))
    starts = [*range(0, len(replies) - size, size), len(replies) - size]
    rows = np.array([[start + at for at in range(size)] for start in starts])
    tokens = [replies[row].tokens for row in rows.flat]
    lengths = np.array([len(one) for one in tokens], dtype=np.int64)
    grams = ngrams(tokens, max(BLEU_ORDER, REPETITION_ORDER))
    differ = [reply.disagreement for reply in replies if reply.disagreement is not None]
    each = {
        **({"disagreement": np.array(differ)} if len(differ) == len(replies) else {}),
        "length": np.array([len(reply.tokens) for reply in replies], dtype=np.float64),
        "new_phrases": new,
        **{name: phrases.of_list(texts, name) for name in phrases.shipped()},
        "ended": np.array([reply.ended for reply in replies], dtype=np.bool_),
    }
    of_blocks = {
        "distinct_1": distinct(grams[0], len(rows), size),
        "distinct_2": distinct(grams[1], len(rows), size),
        "self_bleu": self_bleu(grams[:BLEU_ORDER], lengths, size).reshape(rows.shape).mean(1),
        "repetition": repetition(grams[REPETITION_ORDER - 1], len(tokens)).reshape(rows.shape).mean(1),
    }
    count = len(replies) / size
    values = {"length_correlation": length_correlation(replies)}
    for name, one in each.items():
        blocks = one[rows].mean(1)
        error = float(blocks.std(ddof=1)) / math.sqrt(count) if len(rows) > 1 else 0.0
        if name in SHARES:
            error = max(error, standard_error(int(one.sum()), len(one)))
        values[name] = Values(float(one.mean()), error, blocks)
    for name, blocks in of_blocks.items():
        error = float(blocks.std(ddof=1)) / math.sqrt(count) if len(rows) > 1 else 0.0
        values[name] = Values(float(blocks.mean()), error, blocks)
    return {name: values[name] for name in SIDES if name in values}


def length_correlation(replies: Sequence[Reply]) -> Values:
    """Spearman's correlation of length with score, over replies with a finite score.

    The standard error is that of Fisher's z, √(1.06 / (n - 3)) for Spearman's (Fieller, Hartley and Pearson 1957,
    "Tests for rank correlation coefficients"). The correlation is 0 where there is none: of fewer than 4 replies, or
    where all are as long, or have the same score.
    """
    known = [reply for reply in replies if math.isfinite(reply.score)]
    lengths = _ranks(np.array([len(reply.tokens) for reply in known], dtype=np.float64))
    scores = _ranks(np.array([reply.score for reply in known], dtype=np.float64))
    if len(known) < 4:
        return Values(0.0, 1.0, np.zeros(1))
    spread = float(np.sqrt((lengths**2).sum() * (scores**2).sum()))
    value = float(lengths @ scores) / spread if spread > 0 else 0.0
    z, deviation = math.atanh(_inside(value)), _deviation_of_z(len(known))
    return Values(value, (math.tanh(z + deviation) - math.tanh(z - deviation)) / 2, np.array([value]))


def quantile(freedom: int) -> float:
    """How many standard deviations of a sample reach as far as `DEVIATIONS` of a normal distribution.

    Student's t at the same probability, by the expansion of Abramowitz and Stegun 1964, 26.7.5; of few degrees of
    freedom it is somewhat less than it should be: 8.2 for 9.2 at three.
    """
    z, n = DEVIATIONS, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _ranks(values: Floats) -> Floats:
    """Ranks around 0, equal values with the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which] - (len(values) + 1) / 2


def _inside(correlation: float) -> float:
    return max(-0.999, min(0.999, correlation))


def _of_correlation(spread: Spread, replies: int) -> tuple[None, float]:
    """The healthy band of the correlation of length with score: as far up as that of so many replies may be by chance.

    None is too low: what a healthy policy loses first is that its short replies are the bad ones. In the tiny world it
    fell from 0.30 to -0.16 in a PPO that did well.
    """
    room = DEVIATIONS * _deviation_of_z(min(CORRELATED, replies))
    return None, math.tanh(math.atanh(_inside(spread.mean)) + room)


def _deviation_of_z(replies: int) -> float:
    return math.sqrt(1.06 / max(1, replies - 3))


def _possible(name: str, low: float, high: float) -> tuple[float | None, float | None]:
    """A band without the sides that are not unhealthy, and those where no value can be."""
    below, above = SIDES[name]
    most = math.inf if name in UNBOUNDED else 1.0
    return (low if below and low > 0 else None), (high if above and high < most else None)


def _spread(name: str, one: Values, replies: int, block: int) -> Spread:
    """How a measure varies over the start's blocks.

    Of a share it is the binomial deviation, with one reply more of either kind: blocks say less of what is rare, and
    where the start has none, one later is no alarm. For the same reason the deviation of other measures is at least
    that of a share that the start has not.

    Args:
        name: the measure's.
        one: of the start's replies.
        replies: how many.
        block: replies in a block.
    """
    share = (one.value * replies + 1 if name in SHARES else 1) / (replies + 2)
    binomial = math.sqrt(share * (1 - share) / block)
    if name in SHARES or len(one.blocks) < 2:
        return Spread(one.value, binomial, len(one.blocks))
    least = binomial * (one.value if name in UNBOUNDED else 1)
    return Spread(one.value, max(float(one.blocks.std(ddof=1)), least), len(one.blocks))


def _new_of_start(replies: Sequence[Reply], texts: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Which of the start's replies hold a phrase that is new against the other ones, bool `[replies]`.

    That is as the replies of a later policy are held against the start's: of each prompt the first replies against all
    others, then the second ones, and so on. Where each prompt has one reply, every other prompt against the rest.
    """
    rounds = _ranks_in_prompt(replies)
    if not any(rounds):
        rounds = [at % 2 for at in range(len(replies))]
    held = np.zeros(len(replies), dtype=np.bool_)
    for number in sorted(set(rounds)):
        own = [at for at in range(len(replies)) if rounds[at] == number]
        rest = [at for at in range(len(replies)) if rounds[at] != number]
        for one in phrases.new([texts[at] for at in own], phrases.encode([texts[at] for at in rest])):
            held[np.array(own)[one.held]] = True
    return held


def _ranks_in_prompt(replies: Sequence[Reply]) -> list[int]:
    """Of each reply how many before it are to the same prompt."""
    seen: Counter[int] = Counter()
    ranks = []
    for reply in replies:
        ranks.append(seen[reply.prompt])
        seen[reply.prompt] += 1
    return ranks
