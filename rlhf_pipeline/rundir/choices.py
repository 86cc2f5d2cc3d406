"""What labels come to: what people chose of each pair, and how far a stage is from the labels it wants. No libraries.

The label stage, the export and the page all count here, so they count alike.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_pipeline.recipe import gates
from rlhf_pipeline.rundir.items import Item, pair_key
from rlhf_pipeline.rundir.labels import OTHER, Label, Pair

Winner = Literal["first", "second", "tie", "bad"]
SHARE = {"tie": 0.5}  # of a dimension in which both are equal


class Choice(NamedTuple):
    """What people chose of one pair.

    Attributes:
        pair: it.
        winner: what more people chose than anything else; `tie` where two replies were chosen equally often, or being
            equal was chosen by most; `bad` where most found neither any good.
        counts: how many people chose each of `first`, `second`, `tie` and `bad`; those that somebody chose.
        people: their names, in the order in which they chose.
        agreement: the share of them who chose the winner, from 0 to 1; of a tie by count the share of the most chosen.
        dimensions: of each dimension that was judged, `first`, `second` or `tie`, by majority.
    """

    pair: Pair
    winner: Winner
    counts: dict[str, int]
    people: list[str]
    agreement: float
    dimensions: dict[str, str]


def counted(labels: Iterable[Label]) -> list[Label]:
    """The labels that say something of their pair, of each person one a pair: the first.

    Those that were taken back are left out, and skipped pairs, and what a person said when a pair was shown again.
    """
    found: dict[tuple[str, str], Label] = {}
    for label in labels:
        if label.undone_at is None and label.choice != "skip":
            found.setdefault((label.pair, label.person), label)
    return list(found.values())


def choices(
    pairs: Mapping[str, Pair],
    labels: Iterable[Label],
    *,
    people: Collection[str] | None = None,
    checks: bool = False,
) -> list[Choice]:
    """What people chose, of each pair that has a label that counts: see `counted`.

    Args:
        pairs: the pairs by their keys, as `Labels.pairs` has them.
        labels: as `Labels.of` has them; those of other pairs are passed over.
        people: count the labels of these alone; None for all.
        checks: also of pairs whose better reply was known before: people are measured by these.

    Returns:
        The choices in the order of `pairs`.
    """
    of_pair: dict[str, list[Label]] = {}
    for label in counted(label for label in labels if people is None or label.person in people):
        of_pair.setdefault(label.pair, []).append(label)
    return [
        _choice(pair, of_pair[key]) for key, pair in pairs.items() if key in of_pair and (checks or pair.better is None)
    ]


def _choice(pair: Pair, labels: Sequence[Label]) -> Choice:
    counts = Counter[str](label.choice for label in labels)
    dimensions: dict[str, Counter[str]] = {}
    for label in labels:
        for name, value in label.dimensions.items():
            dimensions.setdefault(name, Counter())[value] += 1
    return Choice(
        pair,
        _majority(counts),  # type: ignore[arg-type]
        dict(counts),
        [label.person for label in labels],
        max(counts.values()) / len(labels),
        {name: _majority(values) for name, values in dimensions.items()},
    )


def _majority(counts: Mapping[str, int]) -> str:
    """What is chosen more often than anything else; `tie` where nothing is."""
    most = max(counts.values())
    found = [value for value, count in counts.items() if count == most]
    return found[0] if len(found) == 1 else "tie"


def preference(one: Choice) -> dict[str, Any] | None:
    """The row that a choice makes; None where neither reply is the better one.

    `confidence` is the share of those who chose one of both, a tie counted half, that chose this one; `dimensions` has
    1 where the chosen reply is better in one, 0 where the other is, and 0.5 where they are equal.
    """
    if one.winner not in OTHER:
        return None
    replies = {"first": one.pair.first, "second": one.pair.second}
    votes, ties = one.counts.get(one.winner, 0), one.counts.get("tie", 0)
    told = votes + one.counts.get(OTHER[one.winner], 0) + ties
    return {
        "prompt": one.pair.prompt,
        "chosen": replies[one.winner],
        "rejected": replies[OTHER[one.winner]],
        "confidence": (votes + ties / 2) / told,
        "dimensions": {name: SHARE.get(value, float(value == one.winner)) for name, value in one.dimensions.items()},
    }


class Target(NamedTuple):
    """When a stage has labels enough: where all of these hold that are not None. Without any it never has.

    Attributes:
        labels: so many labels in all.
        per_item: so many labels of each item, of different people where an item has two replies alone.
        reward_accuracy: a condition on the accuracy of the model that learns, as `>= 0.7`; see `gates.parse`.
    """

    labels: int | None = None
    per_item: int | None = None
    reward_accuracy: str | None = None


class Progress(NamedTuple):
    """How far a stage is.

    Attributes:
        labels: how many labels its items have. All count but skipped pairs, also of checks and of pairs shown again:
            a counter that stood still would tell people which these are.
        items: how many items have as many labels as `Target.per_item` says, of those that are no checks; where it says
            nothing, one.
        of: how many items there are that are no checks.
        reached: whether the target is, and there is a pair with a better reply.
        text: one sentence, as "37 of 200 labels".
    """

    labels: int
    items: int
    of: int
    reached: bool
    text: str


def item_of_pairs(items: Iterable[Item]) -> dict[str, str]:
    """The key of the item of each pair, by the key of the pair."""
    return {
        pair_key(one.prompt, one.replies[first], one.replies[second]): one.key
        for one in items
        for first, second in one.pairs
    }


def count(
    target: Target,
    items: Sequence[Item],
    item_of: Mapping[str, str],
    labels: Sequence[Label],
    accuracy: float | None = None,
    left_out: Collection[str] = (),
) -> Progress:
    """How far a stage is from its target.

    Args:
        target: of the stage.
        items: of the stage.
        item_of: `item_of_pairs(items)`; labels of other pairs do not count.
        labels: of the stage, as `Labels.of` has them.
        accuracy: of the model that learns, as `Labels.learnt` has it; None where it is not known.
        left_out: the names of people whose labels do not count.
    """
    here = [label for label in labels if label.pair in item_of and label.person not in left_out]
    made = sum(label.undone_at is None and label.choice != "skip" for label in here)
    of_item = Counter(item_of[label.pair] for label in counted(here))
    asked = [one.key for one in items if one.better is None]
    done = sum(of_item[key] >= (target.per_item or 1) for key in asked)
    goals = []
    if target.labels is not None:
        most = f" (there are {len(item_of)} pairs, so each person can give about {len(item_of)})"
        said = f"{min(made, target.labels)} of {target.labels} labels" + most * (target.labels > len(item_of))
        goals.append((made >= target.labels, said))
    if target.per_item is not None:
        each = f"{target.per_item} label{'s' * (target.per_item != 1)}"
        goals.append((done == len(asked), f"{done} of {len(asked)} items have {each}"))
    if target.reward_accuracy is not None:
        holds = gates.parse("reward_accuracy", target.reward_accuracy).holds(accuracy)
        now = "not known yet" if accuracy is None else f"{accuracy:.3f}"
        goals.append((holds, f"accuracy of the reward {now}, wanted {target.reward_accuracy}"))
    text = ", ".join(text for _, text in goals) or f"{made} label{'s' * (made != 1)}"
    if left_out:
        text += f"; those of {', '.join(sorted(left_out))} do not count"
    reached = bool(goals) and all(holds for holds, _ in goals)
    if reached and not _has_winner(here, item_of, set(asked)):
        reached, text = (
            False,
            f"{text}; in no pair is one reply chosen more often than all else, so there are no rows yet",
        )
    return Progress(made, done, len(asked), reached, text)


def _has_winner(labels: Iterable[Label], item_of: Mapping[str, str], asked: Collection[str]) -> bool:
    """Whether a pair of an item that is no check has a better reply; see `choices`."""
    of_pair: dict[str, Counter[str]] = {}
    for label in counted(labels):
        if item_of[label.pair] in asked:
            of_pair.setdefault(label.pair, Counter())[label.choice] += 1
    return any(_majority(counts) in OTHER for counts in of_pair.values())
