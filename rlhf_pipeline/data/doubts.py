"""Columns that may change what is learned, and that no shape reads: they are refused. No libraries."""

import re
from collections.abc import Container, Iterable
from typing import Any

from rlhf_pipeline.data.advice import OTHER_NAMES
from rlhf_pipeline.data.columns import CHOSEN, TEXT_OF_REPLY, UNUSED, Seen, UnclearError, is_empty, plain
from rlhf_pipeline.data.marks import NO_MARK, SCORE, THUMB, lower_is_better, repeats_reply
from rlhf_pipeline.data.words import is_number, is_thumb

# Words in the names of columns that say how good a reply is.
MARKING = re.compile(
    r"(^|_)(labels?|thumbs?|kto|approved?|accept(ed)?|reject(ed)?|prefer(red|ence)?|chosen|selected|good|bad|best|better|"
    r"verdicts?|votes?|upvotes?|downvotes?|likes?|liked|keep|kept|discard(ed)?|flag(ged)?|harm(ful|less)?|"
    r"toxic(ity)?|(un)?safe|(in)?correct|wrong|hallucinat(ed|ions?)|quality|(un)?helpful(ness)?|feedback|judge?ments?|ratings?|"
    r"scores?|rewards?|grades?|stars?|rank(s|ing)?|weights?|spam|(in)?valid|passed|failed)(_|$)"
)
OF_PAIRS = (*CHOSEN, "rejected", *OTHER_NAMES["chosen"], *OTHER_NAMES["rejected"])  # which may hold replies
BETTER_WORSE = (("chosen", "rejected"), ("preferred", "rejected"), ("winner", "loser"), ("better", "worse"))
PLAIN_WORDS = ("true", "false", "yes", "no", "y", "n")  # which say nothing of what they are about


def require_no_mark(seen: Seen, uses: Container[str], reply: str | None) -> None:
    """See that no column marks the replies in words, or under a name, that no shape reads.

    Args:
        seen: the first rows.
        uses: the columns that are used.
        reply: the column with the reply, which a class may repeat; None of conversations and of text alone.

    Raises:
        UnclearError: one does.
    """
    for name in seen.values:
        if name in uses or name.startswith(UNUSED) or repeats_reply(seen, name, reply) or not seen.is_filled(name):
            continue
        known = plain(name)
        named = known in (*THUMB, *SCORE) or (MARKING.search(known) and not NO_MARK.search(known))
        says = seen.mostly(name, _says_good_or_bad) and not known.endswith(TEXT_OF_REPLY) and not NO_MARK.search(known)
        is_reply = known in OF_PAIRS or known.endswith(TEXT_OF_REPLY)  # as `rejected`, or `correct_answer`
        if not says and not (named and seen.mostly(name, _is_no_text if is_reply else _is_short)):
            continue
        raise UnclearError(
            f"`{name}` may say how good the replies are{_in_words(seen, name)}",
            *ways_to_mark(seen, name),
            ({UNUSED: name}, "leaves it out"),
        )


def ways_to_mark(seen: Seen, name: str) -> list[tuple[dict[str, str], str]]:
    """How `columns` can say that a column marks replies: none where less of it is better, or it is neither."""
    if lower_is_better(name):
        return []
    if seen.share(name, is_thumb) == 1 and name != "label" and "label" not in seen:
        return [({"label": name}, "takes the good ones")]
    if seen.share(name, is_number) == 1 and not {name, *seen.values}.intersection(SCORE):
        return [({"score": name}, "takes it for a score, the more the better")]
    return []


def _in_words(seen: Seen, name: str) -> str:
    """What keeps a column from being read as a label or a score."""
    if lower_is_better(name):
        return ", the less the better: a `score` should be the greater, and a `label` true, for the better ones"
    odd = next((v for v in seen.values[name] if not is_empty(v) and not is_thumb(v) and not is_number(v)), None)
    return "" if odd is None else f", and {odd!r} is neither a number nor a word for good or bad"


def _is_no_text(value: Any) -> bool:
    """Whether it is true or false, or a number."""
    return isinstance(value, bool) or is_number(value) or str(value).lower() in ("true", "false")


def _is_short(value: Any) -> bool:
    """Whether it may be a mark: true or false, a number, or a few words."""
    return _is_no_text(value) or (isinstance(value, str) and len(value.split()) <= 4)


def _says_good_or_bad(value: Any) -> bool:
    """Whether it is a word or a sign for good or bad, whatever its column is called."""
    return isinstance(value, str) and is_thumb(value) and not is_number(value) and value.lower() not in PLAIN_WORDS


def require_replies_themselves(seen: Seen, replies: Iterable[str], lists: Iterable[str] = ()) -> None:
    """See that columns of replies hold these, and not the names or numbers of other columns, or of a list's entries.

    Args:
        seen: the first rows.
        replies: the columns with the replies.
        lists: the columns that may hold a list of replies.

    Raises:
        UnclearError: one does.
    """
    for column in replies:
        texts = [name for name in seen.values if name != column and seen.mostly(name, _is_text_or_turns)]
        found = [{name for name in texts if _is_name_of(value, name)} for value in seen.values[column]]
        if 2 * sum(map(bool, found)) > len(found):
            name = sorted(set.union(*found))[0]
            raise UnclearError(
                f"`{column}` names other columns, as `{name}`, and does not hold the replies themselves",
                hint=f"write the replies under `{column}`, and all that is asked into the prompt",
            )
        for name in lists:
            if name != column and seen.mostly(name, lambda v: isinstance(v, list)) and seen.mostly(column, _is_place):
                more = {UNUSED: "rejected"} if column != "rejected" and "rejected" in seen else {}
                raise UnclearError(
                    f"`{column}` holds numbers of the replies in `{name}`, and not the replies themselves",
                    ({"best_from_0": column, **more}, "takes it for the number of the best, counted from 0"),
                    ({"best_from_1": column, **more}, "counted from 1"),
                )


def _is_name_of(value: Any, name: str) -> bool:
    """Whether a value is a column's name, or what it ends in, as `b` of `response_b`."""
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        return False
    said = plain(str(value))
    end = re.fullmatch(r".*(?:[_\s.-]|(?<=[a-z])(?=[A-Z\d]))(\w)", name)
    return said == plain(name) or (end is not None and said == end[1].lower())


def _is_text_or_turns(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def _is_place(value: Any) -> bool:
    """Whether it is a number of a list's entry, or a letter for one."""
    return (is_number(value) and float(value).is_integer()) or (isinstance(value, str) and len(value.strip()) == 1)


def require_no_prompt_within(
    seen: Seen, prompt: str, replies: list[str], ways: list[tuple[dict[str, str], str]]
) -> None:
    """See that replies do not begin with their prompt, which would stand there twice.

    Args:
        seen: the first rows.
        prompt: the column with the prompt.
        replies: the columns with replies, all of which begin with it in half of the rows or more where it is repeated.
        ways: what `columns` may say.

    Raises:
        UnclearError: they do.
    """
    rows = [row for row in seen.rows if isinstance(row.get(prompt), str) and row[prompt].strip()]
    within = [
        row
        for row in rows
        if all(isinstance(row.get(name), str) and _begins_with(row[name], row[prompt]) for name in replies)
    ]
    if rows and 2 * len(within) >= len(rows):
        names = " and ".join(f"`{name}`" for name in replies)
        begin = "begins" if len(replies) == 1 else "begin"
        raise UnclearError(
            f"{names} {begin} with the text of `{prompt}`, which would stand there twice: cut it off in the data",
            *ways,
            hint="a reply is what comes after its prompt",
        )


def _begins_with(text: str, prompt: str) -> bool:
    text, prompt = text.strip(), prompt.strip()
    return (
        text.startswith(prompt)
        and re.match(r"\W*\w", text[len(prompt) :]) is not None
        and (re.match(r"\w\w", prompt[-1:] + text[len(prompt) :]) is None)
    )


def require_scores_agree(seen: Seen) -> None:
    """See that chosen replies do not have the smaller scores, in more than half of the rows.

    Raises:
        UnclearError: they do.
    """
    for name in seen.values:
        other = next((name.replace(a, b) for a, b in BETTER_WORSE if a in name and name.replace(a, b) in seen), None)
        if other is None or not re.search("score|rating|reward", name):
            continue
        rows = [row for row in seen.rows if is_number(row.get(name)) and is_number(row.get(other))]
        if 2 * sum(float(row[name]) < float(row[other]) for row in rows) > len(rows):
            raise UnclearError(
                f"`{name}` is smaller than `{other}` in most of the rows: the pairs may be the wrong way round",
                ({UNUSED: name}, "takes them as they are"),
            )
