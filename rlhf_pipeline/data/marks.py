"""How good replies are: labels and scores of single ones, and the order of several. No libraries."""

import itertools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from rlhf_pipeline.data.columns import (
    NO_LIST,
    OF_THE_PROMPT,
    RANKED,
    RANKED_IN_NO_ORDER,
    SAMPLED,
    TEXT_OF_REPLY,
    UNUSED,
    WHOLE,
    WRITE_LISTS,
    Seen,
    UnclearError,
    is_empty,
    literal,
    plain,
)
from rlhf_pipeline.data.turns import Record, Reply, Row, RowError, reply_of, what_is_wrong
from rlhf_pipeline.data.words import THUMBS, as_word, is_number, is_thumb

Scored = list[tuple[Reply, float]]  # replies to one prompt, each with its score

SCORE = ("score", "rating", "reward", "overall_score")
THUMB = ("label", "thumbs", "thumb", "kto_tag", "feedback", "correct", "is_correct", "accepted", "is_good")
# Numbers of several replies, beside their list or within it.
RANKS = ("ranks", "rank")
SCORES = ("scores", "ratings", "rewards", "overall_scores", *SCORE)
# The number or the text of the best reply.
BEST = re.compile(
    r"(best|better|chosen|preferred|winner|winning|selected|top)(_(answer|response|reply|completion|output))?"
    r"(_(id|idx|index|from_0|from_1))?"
)
MAY_BE_BEST = ("label", "choice", "preference", "human_preference", "vote")
# Numbers that say nothing of how good a reply is.
NO_MARK = re.compile(
    r"(^|_)(ids?|idx|index|num|n|counts?|tokens?|len|lengths?|words?|chars?|seeds?|temperatures?|top_[pk]|turns?|times?|"
    r"latency|costs?|logprobs?|created|timestamps?|years?|start|end)(_|$)"
)
# Of these the least is the best, so that they are no scores as they are.
LOWER_IS_BETTER = re.compile(
    r"(^|_)(ranks?|ranking|order|place|position|bad|reject(ed)?|flag(ged)?|harm(ful)?|toxic(ity)?|unsafe|incorrect|"
    r"wrong|hallucinat(ed|ions?)|discard(ed)?|downvotes?|dislikes?|spam|invalid|failed|errors?|loss|unhelpful|"
    r"refus(al|ed))(_|$)"
)


def lower_is_better(name: str) -> bool:
    """Whether a column's name says that less of it is better, as of a rank or of harm."""
    return LOWER_IS_BETTER.search(plain(name)) is not None


# One reply in each row


class Mark(NamedTuple):
    """The column that says how good a row's reply is.

    Attributes:
        says: "label", good or bad; or "score".
        column: its name.
    """

    says: Literal["label", "score"]
    column: str


def mark(seen: Seen, reply: str | None, pairs: bool, needed: bool) -> Mark | None:
    """How single replies are marked.

    Args:
        seen: the first rows.
        reply: the column with the reply, which a label may repeat; None of conversations.
        pairs: whether pairs are to be made: then a score counts before a label, since it says more.
        needed: whether rows are of no use without a mark: each that has another value is named then.

    Raises:
        UnclearError: a column marks some of the replies, and holds something else of others.
    """
    labels = [Mark("label", name) for name in THUMB if _labels(seen, name, reply)]
    scores = [
        Mark("score", name) if _scores(seen, name, pairs) else Mark("label", name)
        for name in SCORE
        if _scores(seen, name, pairs) or _labels(seen, name, reply)
    ]
    found = [*scores, *labels] if pairs else [*labels, *scores]
    others = [
        Mark("label", name) for name in THUMB[:2] if needed and name in seen and not repeats_reply(seen, name, reply)
    ]
    return next(iter([*found, *others]), None)


def _scores(seen: Seen, name: str, pairs: bool) -> bool:
    """Whether a column holds scores. Where no pairs are made, 1 and 0 alone, or 1 and -1, are good and bad."""
    values = {as_word(value) for value in seen.values.get(name, ()) if is_number(value)}
    return seen.mostly(name, is_number) and (pairs or values not in ({"0", "1"}, {"-1", "1"}))


def _labels(seen: Seen, name: str, reply: str | None) -> bool:
    """Whether a column says of each reply if it is good.

    Raises:
        UnclearError: it does of some rows, and has other numbers, or mostly other words, in others.
    """
    if not seen.share(name, is_thumb) or repeats_reply(seen, name, reply):
        return False
    values = {as_word(value) for value in seen.values[name] if isinstance(value, str | int | float)}
    numbers = [as_word(value) for value in seen.values[name] if is_number(value) and not is_thumb(value)]
    # One odd row is an error of its own.
    others = sorted(numbers) if len(numbers) > 1 or 4 * len(numbers) > len(seen.values[name]) else []
    if {"0", "-1"} <= values:
        others = ["-1, 0 and 1"]
    if not others and seen.mostly(name, is_thumb):
        return True
    other = (others or [str(value) for value in seen.values[name] if not is_empty(value) and not is_thumb(value)])[0]
    ways: list[tuple[dict[str, str], str]] = [({UNUSED: name}, "leaves it out")]
    if others and not any(score in seen for score in SCORE):
        ways.insert(0, ({"score": name}, "takes it for a score, the more the better"))
    raise UnclearError(f"`{name}` may say whether a reply is good, and may not: it has {other}", *ways)


def repeats_reply(seen: Seen, name: str, reply: str | None) -> bool:
    """Whether a column holds the reply itself, as where the class of a text is what is asked for."""
    if reply is None:
        return False
    rows = [row for row in seen.rows if not is_empty(row.get(name)) and isinstance(row.get(reply), str)]
    same = sum(str(row[name]).strip().lower() == row[reply].strip().lower() for row in rows)
    return 2 * same >= max(len(rows), 1)


def thumb(row: Row, column: str) -> bool:
    """Whether a reply is good."""
    value: Any = row.get(column)
    if not is_thumb(value):
        raise RowError(what_is_wrong(column, value, "true or false, 1 or 0, up or down"))
    return THUMBS[as_word(value)]


def number(value: Any, column: str) -> float:
    """A score."""
    if not is_number(value):
        raise RowError(what_is_wrong(column, value, "a number"))
    return float(value)


# Several replies in each row


def pairs_of(replies: Scored) -> list[Record]:
    """Every pair of a better and a worse reply, the best ones first; equal scores make none."""
    ranked = sorted(replies, key=lambda reply: -reply[1])
    return [(better, worse) for (better, high), (worse, low) in itertools.combinations(ranked, 2) if high > low]


def best_against_worst(replies: Scored) -> list[Record]:
    """The pair of the best and the worst reply, the first of several such; none where all scores are equal."""
    return pairs_of([max(replies, key=lambda reply: reply[1]), min(replies, key=lambda reply: reply[1])])


def best(replies: Scored) -> list[Record]:
    """The reply with the highest score, the first of several."""
    return [(max(replies, key=lambda reply: reply[1])[0],)]


def best_and_worst(replies: Scored) -> list[Record]:
    """Each reply with the highest score, which is good, and each with the lowest, which is not; none where all equal.

    What is between them is left out: it is neither.
    """
    scores = [score for _, score in replies]
    high, low = max(scores), min(scores)
    return [(reply, score == high) for reply, score in replies if score in (high, low)] if high > low else []


class Ranking(NamedTuple):
    """Several replies in each row, and what gives their order.

    Attributes:
        column: the list.
        scored: whether its replies have scores.
        says: what gives the order, in words.
        uses: what each column is taken for.
        read: the replies of one row with their scores, the best the highest. Raises RowError.
    """

    column: str
    scored: bool
    says: str
    uses: dict[str, str]
    read: Callable[[Row], Scored]


def candidates(seen: Seen) -> tuple[str, Callable[[Row], list[Reply]]] | None:
    """The list of replies in whatever order: its column, and what reads those of one row, which may raise RowError."""
    column = _column_of_replies(seen)
    if column is None:
        return None

    def read(row: Row) -> list[Reply]:
        is_scored = any(isinstance(row.get(name), list) for name in SCORES)
        return [_text(one, column) for one in _replies(row, column, 1 if is_scored else 2)]

    return column, read


def ranking(seen: Seen) -> Ranking | None:
    """The list of replies, and the column that gives its order.

    Raises:
        UnclearError: the order may be in a column or a key that is not known to give it.
    """
    column = _column_of_replies(seen)
    if column is None:
        return None
    uses = {column: "replies"}

    def made(order: str | None, says: str, read: Callable[[Row, list[Any]], list[float]], scored: bool) -> Ranking:
        used = uses | ({order: "order of the replies"} if order else {})

        def read_row(row: Row) -> Scored:
            replies = _replies(row, column, 1 if scored else 2)
            return list(zip([_text(reply, column) for reply in replies], read(row, replies), strict=True))

        return Ranking(column, scored, says, used, read_row)

    found: dict[str, Ranking] = {}
    for order in (*RANKS, *SCORES):
        is_rank = order in RANKS
        words = "their ranks, 1 the best," if is_rank else "their scores"
        if any(isinstance(value, list) for value in seen.values.get(order, ())):
            says = f"with {words} under `{order}`"
            found[order] = made(order, says, _beside(column, order, is_rank), not is_rank)
        elif any(order in reply for reply in _of_dicts(seen, column)):
            says = f"with {words} under `{order}` in each"
            found[order] = made(None, says, _within(column, order, is_rank), not is_rank)
    if found:
        _require_one_order(seen, column, found)
        return next(iter(found.values()))
    for name in seen.values:
        if BEST.fullmatch(name) and seen.mostly(name, lambda value: isinstance(value, str | int) or is_number(value)):
            from_one = seen.mostly(name, is_number) and _counts_from_one(seen, column, name)
            says = f"of which `{name}` is the best"
            if seen.mostly(name, is_number):
                says += f", counted from {int(from_one)}"
            return made(name, says, _best_of(column, name, from_one), False)
    if seen.mostly(SAMPLED, lambda value: isinstance(value, dict)):
        raise UnclearError(
            f"`{column}` were sampled, and nothing says which of them is better",
            hint="set `rewards` in the stage of kind sample, or have one of kind judge choose",
        )
    _require_no_other_order(seen, column)
    return made(None, "from best to worst", lambda _, replies: [float(-i) for i in range(len(replies))], False)


def _column_of_replies(seen: Seen) -> str | None:
    """The column with several replies in each row.

    Raises:
        UnclearError: there is one that should be a list, and is text.
    """
    names = [name for name in (*RANKED, *RANKED_IN_NO_ORDER) if name in seen]
    lists = [name for name in names if any(isinstance(value, list) for value in seen.values[name])]
    if lists:
        return lists[0]
    texts = [name for name in names if seen.mostly(name, lambda value: str(value).lstrip().startswith("["))]
    if texts:
        raise UnclearError(f"`{texts[0]}` begins as a list does, and {NO_LIST}", hint=WRITE_LISTS)
    return None


def _replies(row: Row, column: str, least: int = 2) -> list[Any]:
    """A row's replies; with scores, one is a demonstration, and none is worse or better than it."""
    values = row.get(column)
    if not isinstance(values, list):
        raise RowError(what_is_wrong(column, values, "a list of replies"))
    if len(values) < least:
        wanted = "two replies or more" if least > 1 else "one reply or more"
        raise RowError(f"`{column}` should be {wanted}, and has {len(values)}")
    return values


def _text(reply: Any, column: str) -> Reply:
    if not isinstance(reply, dict) or "role" in reply:
        return reply_of({column: reply}, column)
    name = next((name for name in TEXT_OF_REPLY if reply.get(name) is not None), None)
    if name is None:
        raise RowError(f"a reply of `{column}` has no text under {', '.join(f'`{one}`' for one in TEXT_OF_REPLY)}")
    return reply_of(reply, name)


def _of_dicts(seen: Seen, column: str) -> list[dict[str, Any]]:
    """The replies of the first rows that are neither text nor turns."""
    lists = [value for value in seen.values[column] if isinstance(value, list)]
    return [reply for replies in lists for reply in replies if isinstance(reply, dict) and "role" not in reply]


def _beside(column: str, order: str, is_rank: bool) -> Callable[[Row, list[Any]], list[float]]:
    def read(row: Row, replies: list[Any]) -> list[float]:
        values = row.get(order)
        if not isinstance(values, list):
            raise RowError(what_is_wrong(order, values, "a list of numbers"))
        if len(values) != len(replies):
            raise RowError(f"`{column}` has {len(replies)} replies, and `{order}` {len(values)} numbers")
        return [(-1.0 if is_rank else 1.0) * _number_or_truth(value, order) for value in values]

    return read


def _within(column: str, order: str, is_rank: bool) -> Callable[[Row, list[Any]], list[float]]:
    def read(row: Row, replies: list[Any]) -> list[float]:
        values = [reply.get(order) if isinstance(reply, dict) else None for reply in replies]
        return [(-1.0 if is_rank else 1.0) * _number_or_truth(value, order) for value in values]

    return read


def _number_or_truth(value: Any, column: str) -> float:
    return float(value) if isinstance(value, bool) else number(value, column)


def _best_of(column: str, name: str, from_one: bool) -> Callable[[Row, list[Any]], list[float]]:
    def read(row: Row, replies: list[Any]) -> list[float]:
        value = row.get(name)
        if is_number(value):
            place = int(number(value, name)) - from_one if number(value, name).is_integer() else -1
        else:
            texts = [_text(reply, column) for reply in replies]
            place = texts.index(value) if value in texts else -1
        if not 0 <= place < len(replies):
            counted = f"a number from {int(from_one)} to {len(replies) - (not from_one)}, or the reply itself"
            raise RowError(what_is_wrong(name, value, counted))
        return [float(i == place) for i in range(len(replies))]

    return read


def _counts_from_one(seen: Seen, column: str, name: str) -> bool:
    """Whether the number of the best reply is counted from 1, as it is where one is as large as there are replies.

    Raises:
        UnclearError: none is, and none is 0, so that all may be counted from 0 or from 1.
    """
    if name.endswith(("_from_0", "_from_1")):
        return name.endswith("_from_1")
    rows = [row for row in seen.rows if is_number(row.get(name)) and isinstance(row.get(column), list)]
    found = [(float(row[name]), len(row[column])) for row in rows]
    if any(value == 0 for value, _ in found):
        return False
    if any(value == count for value, count in found):
        return True
    raise UnclearError(
        f"`{name}` may number the replies of `{column}` from 0 or from 1: it has neither 0 nor the number of the last",
        *_ways_to_count(name),
    )


def _ways_to_count(name: str) -> list[tuple[dict[str, str], str]]:
    return [
        ({"best_from_0": name}, "takes it for the number of the best, counted from 0"),
        ({"best_from_1": name}, "counted from 1"),
        ({UNUSED: name}, "leaves it out"),
    ]


def _require_one_order(seen: Seen, column: str, orders: dict[str, Ranking]) -> None:
    """See that ranks and scores of the same replies do not say the opposite of each other, in half of the rows or more.

    Raises:
        UnclearError: two do.
    """
    first, *others = orders
    for other in others:
        opposed = []
        for row in seen.rows:
            try:
                scores, more = ([score for _, score in orders[name].read(row)] for name in (first, other))
            except RowError:
                continue
            pairs = itertools.combinations(zip(scores, more, strict=True), 2)
            opposed.append(any((a - c) * (b - d) < 0 for (a, b), (c, d) in pairs))
        if opposed and 2 * sum(opposed) >= len(opposed):
            raise UnclearError(
                f"`{first}` and `{other}` give the replies of `{column}` different orders",
                *[({UNUSED: name}, f"leaves `{name}` out") for name in (other, first) if name in orders[name].uses],
                hint=f"keep one of them, in which 1 is the best if it is called `{RANKS[0]}`, and else the most",
            )


def _require_no_other_order(seen: Seen, column: str) -> None:
    """See that no column holds what may be the order, before the order of the list is taken for it.

    Raises:
        UnclearError: one does.
    """
    for name in seen.values:
        rows = [row for row in seen.rows if row.get(name) is not None and isinstance(row.get(column), list)]
        beside = [row for row in rows if isinstance(row[name], list) and len(row[name]) == len(row[column])]
        marks = [row for row in beside if all(_is_mark(value) for value in row[name])]
        if name != column and not NO_MARK.search(name) and 2 * len(marks) >= len(rows) > 0:
            steps = all(isinstance(value, bool) for row in marks for value in row[name])
            raise UnclearError(
                f"`{name}` may give the order of `{column}`, which else are from best to worst"
                + (", or say which steps of one reply are right, which no stage reads" if steps else ""),
                *(
                    []
                    if lower_is_better(name)
                    else [({"scores": name}, "takes it for each reply's score, the more the better")]
                ),
                ({"ranks": name}, "takes it for each reply's rank, the less the better"),
                ({UNUSED: name}, "leaves it out"),
            )
        holding = [row for row in rows if _holds_order(row[name], len(row[column]))]
        known = (column, "tools", *WHOLE, *OF_THE_PROMPT)
        if name not in known and not NO_MARK.search(name) and 2 * len(holding) >= len(rows) > 0:
            raise UnclearError(
                f"`{name}` holds what may give the order of `{column}`, which else are from best to worst: "
                "the list belongs in a column of its own, called `scores` or `ranks`",
                ({UNUSED: name}, "leaves it out"),
            )
        if name in MAY_BE_BEST or BEST.fullmatch(name):
            raise UnclearError(
                f"`{name}` may say which of `{column}` is the best, which else are from best to worst",
                *_ways_to_count(name),
            )
    for reply in _of_dicts(seen, column):
        for name, value in reply.items():
            nested = isinstance(value, dict | list) and bool(_numbers_in(value))
            if name not in TEXT_OF_REPLY and not NO_MARK.search(name) and (_is_mark(value) or nested):
                raise UnclearError(
                    f"`{name}` in each of `{column}` may give their order, which else are from best to worst",
                    hint="call it `score` (the more the better) or `rank` (1 the best) in the data, or take it out",
                )
    if column in RANKED_IN_NO_ORDER:
        raise UnclearError(
            f"nothing gives the order of `{column}`", ({"replies": column}, "says that they are from best to worst")
        )


def _holds_order(value: Any, count: int) -> bool:
    """Whether there is a list of as many marks as there are replies, in a mapping, in a list, or written as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = literal(value.strip())
        except ValueError:
            return False
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if not NO_MARK.search(str(name))}
        each = list(value.values())
        return (len(each) == count and all(map(is_number, each))) or any(_holds_order(one, count) for one in each)
    if not isinstance(value, list):
        return False
    marks = [_is_mark(one) or (isinstance(one, dict) and bool(_numbers_in(one))) for one in value]
    return (len(value) == count and all(marks)) or any(_holds_order(one, count) for one in value)


def _is_mark(value: Any) -> bool:
    return isinstance(value, bool) or is_number(value) or is_thumb(value)


def _numbers_in(value: Any) -> list[Any]:
    """The numbers within a dict or a list."""
    if isinstance(value, dict):
        value = [one for name, one in value.items() if not NO_MARK.search(name)]
    if isinstance(value, list):
        return [found for one in value for found in _numbers_in(one)]
    return [value] if is_number(value) else []
