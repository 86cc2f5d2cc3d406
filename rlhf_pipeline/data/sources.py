"""The rows of a source: opened once, their shape recognised by the first ones, and read as records one after the other.

A row that cannot be used is named by file and row, or left out and counted.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
from datasets import Dataset

from rlhf_pipeline.data.columns import listed
from rlhf_pipeline.data.files import Located, local_files, rows_of_file
from rlhf_pipeline.data.peek import SAMPLE, column_names, renamed
from rlhf_pipeline.data.shapes import Shape, Wanted, recognise
from rlhf_pipeline.data.turns import Record, RowError, with_marks
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.data_files import is_local
from rlhf_pipeline.recipe.schema import Data, Source

BATCH = 1000  # rows that are handled at once
# What a sound row without a record is counted as.
NO_RECORD: dict[Wanted, str] = {
    "demonstrations": "not_trained",
    "preferences": "rows_without_pair",
    "prompts": "rows_without_prompt",
    "feedback": "rows_without_pair",
    "candidates": "rows_without_pair",
}


def open_source(
    source: Source, wanted: Wanted, spec: Data, hub: Dataset | None = None
) -> tuple[Iterator[Located], Shape]:
    """A source's rows, with the names that are expected, and their shape. Each file is opened once.

    Args:
        source: where the rows come from.
        wanted: what they shall be.
        spec: the recipe's `data`, which says how they are read.
        hub: of a hub dataset, what `load_hub` gave.

    Raises:
        InputError: it cannot be read, has no rows, lacks a column or has no shape; where a later file is broken or is
            read in another way, as the rows are read.
    """
    if hub is not None:
        rows, shape, _ = _recognised(renamed(_rows_of_hub(hub, source.path), source), wanted, spec, source)
        return rows, shape
    files = local_files(source)
    if len(files) == 1:
        rows, shape, _ = _recognised(renamed(rows_of_file(files[0]), source), wanted, spec, source)
        return rows, shape
    rows, shape, names = _of_file(files[0], source, wanted, spec)
    rows = itertools.chain(rows, _of_later_files(files, source, wanted, spec, shape, names))
    return itertools.islice(rows, source.limit), shape


def _recognised(
    rows: Iterator[Located], wanted: Wanted, spec: Data, source: Source
) -> tuple[Iterator[Located], Shape, list[str]]:
    """Rows, their shape, and the columns of the first ones."""
    first = list(itertools.islice(rows, SAMPLE))
    shape = recognise((one.row for one in first), wanted, spec.chat, source.path, source.columns, spec.pairs)
    return itertools.chain(first, rows), shape, column_names([one.row for one in first])


def _of_file(file: Path, source: Source, wanted: Wanted, spec: Data) -> tuple[Iterator[Located], Shape, list[str]]:
    """The same of one of several files."""
    alone = Source(path=str(file), columns=source.columns)
    return _recognised(renamed(rows_of_file(file), alone), wanted, spec, alone)


def _of_later_files(
    files: Sequence[Path], source: Source, wanted: Wanted, spec: Data, first: Shape, first_names: list[str]
) -> Iterator[Located]:
    """The rows of all files but the first.

    Raises:
        InputError: one is not read as the first file is.
    """
    for file in files[1:]:
        rows, shape, names = _of_file(file, source, wanted, spec)
        if shape.says != first.says:
            one, other = (shape.name, first.name) if shape.name != first.name else (shape.says, first.says)
            raise InputError(
                f"its columns ({', '.join(names)}) are read as {one}, and those of {files[0].name} "
                f"({', '.join(first_names)}) as {other}",
                place=str(file),
                hint="give files of different columns as several sources under `mix`, with `columns` for each",
            )
        yield from rows


def load_hub(source: Source) -> Dataset | None:
    """A hub dataset, downloaded once into the datasets library's cache; None for local files.

    Raises:
        InputError: it cannot be had.
    """
    if is_local(source.files):
        return None
    try:
        return datasets.load_dataset(source.path, name=source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # whatever the library stumbled over, the user needs to know what was asked for
        asked = f" with the subset `{source.subset}`" if source.subset else ""
        raise InputError(
            f"this is neither a data file nor a hub dataset that can be reached{asked}: {_last_line(error)}",
            place=source.path,
            hint="check the spelling and the network; relative paths start from the recipe's folder",
        ) from None


def _last_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[-1]


def _rows_of_hub(table: Dataset, name: str) -> Iterator[Located]:
    number = 0
    for batch in table.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Located(name, number, dict(zip(batch, values, strict=True)))


def records(
    rows: Iterator[Located], shape: Shape, wanted: Wanted, spec: Data, counts: Counter[str]
) -> Iterator[tuple[Located, Record]]:
    """The records of rows, each with its row; bad rows end it, or are left out and counted.

    With `loss: all`, the turns of demonstrations that may not be trained have marks; see `turns.with_marks`.

    Raises:
        InputError: naming the first bad row, and how many more there are.
    """
    for located in rows:
        counts["rows"] += 1
        try:
            found = shape.read(located.row)
            if wanted == "demonstrations" and spec.loss == "all":
                used = {name: listed(name, value) for name, value in located.row.items() if shape.used_as.get(name)}
                found = [with_marks(record, used, shape.used_as) for record in found]
        except RowError as problem:
            if spec.bad_rows == "error":
                raise bad_row(str(problem), located, _count_bad(rows, shape)) from None
            counts["bad_rows"] += 1
            continue
        if not found:
            bad = wanted == "demonstrations" and shape.labelled
            counts["bad_replies" if bad else NO_RECORD[wanted]] += 1
        if wanted == "feedback" and shape.of_replies is None:
            count_labels(found, counts)
        elif shape.labelled and found:
            good = wanted == "demonstrations" or found[0][2] > 0
            counts["good_replies" if good else "bad_replies"] += 1
        for record in found:
            yield located, record


def count_labels(feedback: Iterable[Record], counts: Counter[str]) -> None:
    """Count the good and the bad replies of feedback, in whose records the label comes last."""
    for *_, good in feedback:
        counts["good_replies" if good else "bad_replies"] += 1


def _count_bad(rows: Iterator[Located], shape: Shape) -> int:
    bad = 0
    try:
        for located in rows:
            try:
                shape.read(located.row)
            except RowError:
                bad += 1
    except InputError:  # a file that is broken further on; one fault at a time
        pass
    return bad


def bad_row(problem: str, located: Located, more: int = 0, hint: str | None = None) -> InputError:
    """The error of a row that cannot be used; the hint by default says what may be wrong with its columns."""
    others = f" (and {more} more row{'s' if more > 1 else ''})" if more else ""
    return InputError(
        f"{problem}{others}",
        place=f"{located.place}: row {located.number}",
        hint=hint
        or f"the row has {', '.join(located.row)}; `columns: {{expected: yours}}` renames, and `bad_rows: drop` "
        "leaves such rows out",
    )


def batched(found: Iterable[tuple[Located, Record]]) -> Iterator[list[tuple[Located, Record]]]:
    """Records in lists of so many as are handled at once."""
    iterator = iter(found)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def where(spec: Data) -> str:
    """The data as a message names them."""
    return " + ".join(source.path for source in spec.sources)
