"""The first rows of local files, for those who need not read them all. No torch, no datasets."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_pipeline.data.files import Located, local_files, rows_of_file
from rlhf_pipeline.errors import ColumnsError, InputError
from rlhf_pipeline.recipe.data_files import is_local
from rlhf_pipeline.recipe.schema import Source

SAMPLE = 100  # rows that tell a shape


def first_rows(source: Source, n: int = SAMPLE) -> list[dict[str, Any]] | None:
    """The first rows of a source, with `columns` applied; None of a hub dataset.

    Raises:
        InputError: a file cannot be read that far, there is none, it has no rows, or lacks a mapped column.
    """
    return [one.row for one in itertools.islice(rows_of(source), n)] if is_local(source.files) else None


def rows_of(source: Source) -> Iterator[Located]:
    """The rows of a source of local files, with `columns` applied, up to its `limit`.

    Raises:
        InputError: see `first_rows`.
    """
    return renamed(itertools.chain.from_iterable(rows_of_file(file) for file in local_files(source)), source)


def renamed(rows: Iterator[Located], source: Source) -> Iterator[Located]:
    """Rows with the names that are expected, up to the source's `limit`.

    A column that already has the name of a mapped one makes room for it.

    Raises:
        InputError: there are no rows, or the first ones lack a mapped column.
    """
    first = list(itertools.islice(rows, min(SAMPLE, source.limit or SAMPLE)))
    if not first:
        raise InputError("the data have no rows", place=source.path)
    names = column_names([one.row for one in first])
    for expected, theirs in source.columns.items():
        if theirs not in names:
            raise ColumnsError(
                f"there is no column `{theirs}` to use as `{expected}`",
                place=source.path,
                hint=f"its columns are {', '.join(names)}",
            )
    taken = {*source.columns, *source.columns.values()}
    for place, number, row in itertools.islice(itertools.chain(first, rows), source.limit):
        if source.columns:
            left = {name: value for name, value in row.items() if name not in taken}
            row = {expected: row[theirs] for expected, theirs in source.columns.items() if theirs in row} | left
        yield Located(place, number, row)


def column_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of all columns of some rows, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))
