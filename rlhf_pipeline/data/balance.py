"""How many of the replies of feedback are good and bad, and what balances them. No torch, no datasets."""

from collections import Counter
from pathlib import Path

from rlhf_pipeline.data import mix
from rlhf_pipeline.data.peek import first_rows, rows_of
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.data.turns import RowError
from rlhf_pipeline.recipe.schema import Data, Source

KEYS = ("desirable_weight", "undesirable_weight")  # as TRL calls the weights of good and of bad replies


def weights(
    good: float, bad: float, desirable: float | None = None, undesirable: float | None = None
) -> tuple[float, float]:
    """The weights of the losses of good and of bad replies, where a recipe has not given both.

    Weights times replies are to be in a ratio from 1:1 to 4:3 (Ethayarajh et al. 2024, "KTO", eq. 8): here it is 1:1.
    Of two weights that are not given, that of the more frequent kind is 1.

    Args:
        good: how many good replies there are; more than 0.
        bad: how many bad ones; more than 0.
        desirable: the recipe's weight of good ones.
        undesirable: the recipe's weight of bad ones.
    """
    if desirable is None:
        desirable = max(1.0, bad / good) if undesirable is None else undesirable * bad / good
    if undesirable is None:
        undesirable = desirable * good / bad
    return round(desirable, 4), round(undesirable, 4)


def count(data: Data) -> tuple[int, int] | None:
    """The good and the bad replies of feedback, before any are held out.

    Returns:
        None where reading the rows one by one does not tell: of hub datasets, where scores compare replies of several
        rows, and where rows cannot be used.

    Raises:
        InputError: a file cannot be read.
    """
    found = [_of_source(source, data) for source in data.sources]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    taken = mix.taken([good + bad for good, bad in known], data)
    rows = [(good, bad, count / (good + bad)) for (good, bad), count in zip(known, taken, strict=True)]
    return sum(round(good * share) for good, _, share in rows), sum(round(bad * share) for _, bad, share in rows)


def _of_source(source: Source, data: Data) -> tuple[int, int] | None:
    """The same of one source; None also where it has no such rows."""
    awaited = source.stage is not None and not Path(source.files).is_file()
    first = None if awaited else first_rows(source)
    if first is None:
        return None
    shape = recognise(first, "feedback", data.chat, source.path, source.columns)
    if shape.of_replies is not None:
        return None
    labels: Counter[bool] = Counter()
    for located in rows_of(source):
        try:
            labels.update(good for *_, good in shape.read(located.row))
        except RowError:
            if data.bad_rows == "error":
                return None
    return (labels[True], labels[False]) if labels else None
