"""Which pair a person sees next, and on which side its replies are."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from rlhf_pipeline.rundir.choices import counted
from rlhf_pipeline.rundir.labels import Asked, How, Label

# Of all that a person sees, about these shares:
AGAIN = 1 / 12  # what they have labelled, in the other order
CHECK = 1 / 10  # checks, until they have seen all
# Of the rest:
RANDOM = 1 / 5  # any pair, so that the accuracy of what learns can be measured
SHARED = 1 / 6  # where there are several people: what another one has labelled, so that agreement can be measured
FIRST_CHECK, CHECK_AT_LATEST = 5, 20  # after so many labels the first one comes at the latest, and the next ones
AGAIN_AFTER = 6  # labels later at the earliest
AT_MOST = 1000  # pairs are scored by what can be learned of them: drawn where there are more

Informative = Callable[[Sequence[str]], str]  # of the keys of some pairs, the one of which most is to be learned


class Next(NamedTuple):
    """What to show.

    Attributes:
        pair: its key.
        left: the reply that is shown left, as in a `Label`.
        how: why, as in a `Label`.
    """

    pair: str
    left: int
    how: How


def choose(
    person: str,
    items: Mapping[str, str],
    checks: Collection[str],
    labels: Sequence[Label],
    asked: Mapping[str, Asked],
    *,
    per_item: int | None,
    several: bool,
    draw: random.Random,
    informative: Informative | None = None,
) -> Next | None:
    """The next pair for a person: none that they have seen, unless it is shown again in the other order.

    Another person who is at work has another pair, as long as there are enough. Where the items still want labels, by
    `per_item` or by having none, pairs of those that do are shown, first those that others have labelled already.

    Args:
        person: who.
        items: the key of the item of each pair, by the key of the pair.
        checks: the keys of the pairs whose answer is known.
        labels: of these pairs, in the order in which they were made.
        asked: what people have on the page, by name.
        per_item: how many labels each item shall have; None for one.
        several: whether several people label.
        draw: where chance comes from.
        informative: tells of which pair most is to be learned; None where nothing learns.

    Returns:
        None where nothing is left.
    """
    own = [label for label in labels if label.person == person]
    seen = {label.pair for label in own}
    side, kind = draw.randrange(2), draw.random()
    repeated = _again(own) if kind < AGAIN else None
    if repeated:
        before = draw.choice(repeated)
        return Next(before.pair, 1 - before.left, "again")
    unseen_checks = [key for key in checks if key not in seen]
    unseen = [key for key in items if key not in seen and key not in checks]
    since = next((place for place, label in enumerate(reversed(own)) if label.how == "check"), None)
    late = len(own) >= FIRST_CHECK if since is None else since >= CHECK_AT_LATEST
    if unseen_checks and (late or kind < AGAIN + CHECK or not unseen):
        return Next(draw.choice(unseen_checks), side, "check")
    if not unseen:
        return None
    made = counted(labels)
    elsewhere = {one.pair for name, one in asked.items() if name != person}
    by_others = {label.pair for label in made if label.person != person}
    if several and (per_item or 1) == 1 and draw.random() < SHARED:
        shared = [key for key in unseen if key in by_others and key not in elsewhere]
        if shared:
            return Next(draw.choice(shared), side, "shared")
    own_items = {items[key] for key in seen if key in items}
    pool, is_shared = _wanted(unseen, items, made, elsewhere, by_others, own_items, per_item or 1)
    if informative is None or draw.random() < RANDOM:
        return Next(draw.choice(pool), side, "shared" if is_shared else "random")
    if len(pool) > AT_MOST:
        pool = draw.sample(pool, AT_MOST)
    return Next(informative(pool), side, "shared" if is_shared else "informative")


def _again(own: Sequence[Label]) -> list[Label]:
    """A person's labels whose pairs may be shown again: old enough, and not shown again before."""
    repeated = {label.pair for label in own if label.how == "again"}
    return [
        label
        for label in own[: max(0, len(own) - AGAIN_AFTER + 1)]
        if label.choice != "skip" and label.how != "again" and label.pair not in repeated
    ]


def _wanted(
    unseen: Sequence[str],
    items: Mapping[str, str],
    made: Sequence[Label],
    elsewhere: Collection[str],
    by_others: Collection[str],
    own_items: Collection[str],
    per_item: int,
) -> tuple[list[str], bool]:
    """The pairs that are wanted most, and whether others have labelled all of them.

    What people have on the page counts as labelled, as long as anything is left without it. Where an item wants several
    labels, they should be of several people.
    """
    labelled = Counter(items[label.pair] for label in made if label.pair in items)
    at_work = Counter(items[key] for key in elsewhere if key in items)
    for counts in (labelled + at_work, labelled):
        lacking = [key for key in unseen if counts[items[key]] < per_item]
        begun = [key for key in lacking if key in by_others] if per_item > 1 else []
        if begun:
            return begun, True
        if lacking:
            return [key for key in lacking if items[key] not in own_items] or lacking, False
    new = [key for key in unseen if key not in by_others and key not in elsewhere]
    free = [key for key in unseen if key not in elsewhere]
    return new or free or list(unseen), False
