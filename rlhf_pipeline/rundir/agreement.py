"""How far people agree: with each other, with known answers, and with themselves. No libraries."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rlhf_pipeline.rundir.choices import counted
from rlhf_pipeline.rundir.labels import OTHER, Label, Pair


def alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of nominal values: 1 is full agreement, 0 what chance gives, below it is disagreement.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: one less the disagreement within units
    over the one that chance gives. Units of one value have none and do not count. Which of two replies is the first
    means nothing, so each unit counts half in one order and half in the other.

    Args:
        units: of each pair what people chose: `first`, `second`, or anything else that has no order.

    Returns:
        None where no two people chose, or where all chose one thing that has no order, so that chance agrees too.
    """
    coincidences: dict[tuple[str, str], float] = {}
    for values in units:
        for shown in (values, [OTHER.get(value, value) for value in values]):
            counts = Counter(shown)
            for one, other in itertools.product(counts, repeat=2) if len(shown) > 1 else ():
                together = counts[one] * (counts[other] - (one == other)) / (len(shown) - 1) / 2
                coincidences[one, other] = coincidences.get((one, other), 0.0) + together
    totals: dict[str, float] = {}
    for (one, _), count in coincidences.items():
        totals[one] = totals.get(one, 0.0) + count
    n = sum(totals.values())
    expected = n * n - sum(total * total for total in totals.values())
    if not expected:
        return None
    observed = sum(count for (one, other), count in coincidences.items() if one != other)
    return 1 - (n - 1) * observed / expected


def kappa(choices: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two people: κ = (p - e) / (1 - e), with p the share of agreement and e what chance gives.

    Cohen 1960, "A coefficient of agreement for nominal scales". Each pair is counted in both orders, see `alpha`.

    Args:
        choices: what the one and what the other chose, of each pair that both did.

    Returns:
        None where there is no such pair, or where chance alone would agree always.
    """
    if not choices:
        return None
    both = [*choices, *((OTHER.get(one, one), OTHER.get(other, other)) for one, other in choices)]
    ones, others = (Counter(side) for side in zip(*both, strict=True))
    by_chance = sum(ones[value] * others[value] for value in ones) / len(both) ** 2
    return None if by_chance == 1 else (fmean(one == other for one, other in both) - by_chance) / (1 - by_chance)


def figures(pairs: Mapping[str, Pair], labels: Sequence[Label]) -> dict[str, Any]:
    """What is known of the people who labelled.

    Args:
        pairs: by their keys, as `Labels.pairs` has them.
        labels: as `Labels.of` has them, those of one stage.

    Returns:
        `alpha`: Krippendorff's alpha of all choices, and `dimensions`: of those in each dimension; see `alpha`.
        `people`: of each by `name`, sorted: `labels`, how many, skipped pairs apart; `seconds_median` of a label;
        `checks`: how many were `right` `of` those whose answer is known; `agreement`: of what others said of the same
        pairs, the share that is the same, as the mean over the pairs; `consistency`: how many were the `same` `of`
        those that were shown again in the other order.
        `pairs`: of each two people `a` and `b`, Cohen's `kappa` over the `n` pairs that both labelled, where some are.
        What cannot be worked out is None.
    """
    made = [label for label in labels if label.undone_at is None and label.choice != "skip"]
    votes = counted(made)
    of_pair: dict[str, list[Label]] = {}
    for vote in votes:
        of_pair.setdefault(vote.pair, []).append(vote)
    names = sorted({label.person for label in made})
    chosen = {(vote.person, vote.pair): vote.choice for vote in votes}
    between = []
    for a, b in itertools.combinations(names, 2):
        both = [(chosen[a, key], chosen[b, key]) for key in of_pair if (a, key) in chosen and (b, key) in chosen]
        if both:
            between.append({"a": a, "b": b, "kappa": kappa(both), "n": len(both)})
    dimensions = dict.fromkeys(name for vote in votes for name in vote.dimensions)
    return {
        "alpha": alpha([[vote.choice for vote in votes] for votes in of_pair.values()]),
        "people": [_of_person(name, pairs, made, of_pair, chosen) for name in names],
        "pairs": between,
        "dimensions": {
            name: alpha(
                [[vote.dimensions[name] for vote in votes if name in vote.dimensions] for votes in of_pair.values()]
            )
            for name in dimensions
        },
    }


def _of_person(
    name: str,
    pairs: Mapping[str, Pair],
    made: Sequence[Label],
    of_pair: Mapping[str, Sequence[Label]],
    chosen: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    own = [label for label in made if label.person == name]
    times = [label.seconds for label in own if label.seconds is not None]
    checks = [key for person, key in chosen if person == name and key in pairs and pairs[key].better]
    again = [label for label in own if label.how == "again"]
    shared = []
    for (person, key), choice in chosen.items():
        others = [vote.choice for vote in of_pair[key] if vote.person != name]
        if person == name and others:
            shared.append(fmean(other == choice for other in others))
    return {
        "name": name,
        "labels": len(own),
        "seconds_median": median(times) if times else None,
        "checks": {"right": sum(chosen[name, key] == pairs[key].better for key in checks), "of": len(checks)},
        "agreement": fmean(shared) if shared else None,
        "consistency": {"same": sum(label.choice == chosen[name, label.pair] for label in again), "of": len(again)},
    }


def left_out(people: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of those whose labels do not count.

    Args:
        people: whose do, as the recipe's `people` has it. A bound leaves out nobody of whom the number is not known.
        known: the `people` of `figures`.
    """
    least, right_least = people.get("min_agreement"), people.get("min_checks")
    out = set(people.get("leave_out") or ())
    for one in known:
        agrees, (right, of) = one["agreement"], one["checks"].values()
        if least is not None and agrees is not None and agrees < least:
            out.add(one["name"])
        if right_least is not None and of and right / of < right_least:
            out.add(one["name"])
    return out & {one["name"] for one in known}
