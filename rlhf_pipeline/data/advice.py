"""What to do about columns that are not what a stage needs. No libraries."""

import difflib
from collections.abc import Mapping

from rlhf_pipeline import kinds
from rlhf_pipeline.data.columns import (
    ASKED,
    CHOSEN,
    OF_THE_PROMPT,
    RANKED,
    REPLY,
    WHOLE,
    Seen,
    is_turns,
    plain,
    renames,
)
from rlhf_pipeline.data.marks import NO_MARK, SCORE, lower_is_better
from rlhf_pipeline.data.words import is_number

Wanted = kinds.Rows

# What the columns of each kind of rows are at their plainest, and what else people call them.
PLAINEST: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "feedback": ("prompt", "completion"),
    "candidates": ("prompt", "replies"),
}
OTHER_NAMES = {
    "prompt": (*ASKED, "input", "user", "human", "context", "request", "post", "problem", "history", "inputs"),
    "completion": (*REPLY, "assistant", "gpt", "target", "targets", "chosen", "solution", "summary"),
    "chosen": ("preferred", "better", "winner", "accepted", "positive", "good"),
    "rejected": ("dispreferred", "worse", "loser", "negative", "bad"),
    "replies": ("samples", "choices", "options"),
}
# Under which names each is read without `columns`.
READ_BESIDE = ("chosen", "preferred", "rejected", *REPLY)
READ_AS_IT_IS = {
    "prompt": (*ASKED, "input"),
    "completion": REPLY,
    "chosen": CHOSEN,
    "rejected": ("rejected",),
    "replies": RANKED,
}


def needs(wanted: Wanted) -> str:
    """The columns that rows of a kind have."""
    return {
        "demonstrations": "`messages`, or a prompt (`prompt`, `instruction`, `question`) with a reply (`completion`, "
        "`response`, `output`, `answer`), or `text`",
        "preferences": "`chosen` and `rejected`, or a prompt with `replies` from best to worst, or a prompt with a "
        "reply and its `score` or `label`",
        "prompts": "`prompt`, `messages`, `instruction` or `question`",
        "feedback": "a prompt with a reply and its `label`, `thumb` or `rating`, or preferences, as `chosen` and "
        "`rejected`",
        "candidates": "a prompt with `replies`, two or more, or `chosen` and `rejected`",
    }[wanted]


def advice(wanted: Wanted, names: list[str], seen: Seen, columns: Mapping[str, str], others: list[Wanted]) -> str:
    """What to do about columns that do not fit; never to rename what is read under its own name.

    Args:
        wanted: what they should be.
        names: of all columns, after the recipe's `columns`.
        seen: the first rows.
        columns: what the recipe renames already.
        others: what the rows are instead.
    """
    found: dict[str, str] = {}
    missing = [expected for expected in PLAINEST[wanted] if not any(name in names for name in READ_AS_IT_IS[expected])]
    for expected in missing:
        left = {name.lower(): name for name in names if name not in (*found.values(), *PLAINEST[wanted])}
        same = next((left[other] for other in (expected, *OTHER_NAMES[expected]) if other in left), None)
        near = difflib.get_close_matches(expected, left, n=1, cutoff=0.7)
        if same or near:
            found[expected] = same or left[near[0]]
    lacking = [
        name
        for name in names
        if name not in seen and any(name in READ_AS_IT_IS[expected] for expected in PLAINEST[wanted])
    ]
    turns = [name for name in seen.values if seen.mostly(name, is_turns) and name not in (*WHOLE, *READ_BESIDE)]
    if len(turns) == 1 and not seen.first_of((*ASKED, *WHOLE)) and (wanted != "preferences" or "rejected" in seen):
        return f"perhaps {renames(columns, {'messages': turns[0]})}"
    if lacking:
        return f"`{lacking[0]}` is null in the first rows: fill it in, or give `columns` another one to take for it"
    if missing and len(found) == len(missing):
        more = {plain(name): name for name in seen.values if plain(name) != name and name not in found.values()}
        found |= {expected: name for expected, name in more.items() if expected in OF_THE_PROMPT[len(ASKED) :]}
        return f"perhaps {renames(columns, found)}"
    if wanted in ("preferences", "feedback") and others == ["demonstrations", "prompts"]:
        numbers = [
            name
            for name in seen.values
            if seen.share(name, is_number) == 1 and not NO_MARK.search(name) and name not in REPLY
        ]
        if numbers and {"label", *SCORE}.isdisjoint(seen.values):
            if lower_is_better(numbers[0]):
                return (
                    f"if `{numbers[0]}` says how good a reply is, the less the better: give the rows a `score` "
                    "instead, which is the greater for the better ones"
                )
            return f"if `{numbers[0]}` says how good a reply is, {renames(columns, {'score': numbers[0]})}"
    if others:
        return f"they are {others[0]}, which a stage of kind {kinds.either(_kinds_that_read(others[0]))} takes"
    return "`columns: {expected: yours}` gives your columns the names that are expected"


def _kinds_that_read(rows: Wanted) -> list[str]:
    return [name for name in kinds.NAMES if kinds.get(name).reads == rows]
