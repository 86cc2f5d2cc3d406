"""From a recipe's `data` to the token columns that TRL's trainers read: encoded, mixed and split.

Rows are read one after the other and written, encoded, to Arrow files, from where they are used without being held in
memory; see `data.cache`.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data import cache, mix
from rlhf_pipeline.data.cache import Encoded, Known
from rlhf_pipeline.data.encode import (
    CANDIDATES,
    DEMONSTRATIONS,
    FEEDBACK,
    PAIRS_AS_TEXT,
    PREFERENCES,
    PROMPTS,
    PROMPTS_WITH_ROWS,
    ROW,
    Layout,
    hash_of,
)
from rlhf_pipeline.data.sources import load_hub, open_source, records, where
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data, Source

OF_USED = ("conversations", "good_replies", "bad_replies")  # counts of rows in use; a mix or a part has its share


@dataclass(frozen=True)
class Prepared:
    """Rows for a trainer.

    Attributes:
        train: the trainer's columns of the rows to train on.
        held_out: the same of the rows to evaluate on; None where there are none.
        table: of the rows to train on, also `prompt_key` and `row_key`, hashes of the prompt and of the whole record,
            and the lengths in tokens before any cut: `prompt_length`, and `reply_length` or `chosen_length` and
            `rejected_length`, which count the EOS; with `loss: all`, `reply_length` is of the longest one that is
            learned.
        held_out_table: the same of the rows to evaluate on.
        shapes: what was recognised in each source, those of `eval_data` apart: its `name`, what it `says`, and what
            each column is `used_as`.
        counts: `rows` that were read; `bad_rows`, `too_long`, `rows_without_pair`, `not_trained` (of weight 0 alone),
            which were left out; of rows with labels `good_replies` and `bad_replies`, of which demonstrations leave the
            bad ones out, and of feedback those in use, before any are held out; `conversations`, the rows in use whose
            prompts go through the chat template. Those of `eval_data` have names that begin with `eval_`;
            `unlike_template`, the rows that the chat template itself writes otherwise; `eos_within`, those with an EOS
            before the end of a reply; and `foreign_end`, those with a reply that ends in the EOS of other models, which
            is text to this one.
        unlike_template: see `encode.Notes`.
    """

    train: Dataset
    held_out: Dataset | None
    table: Dataset
    held_out_table: Dataset | None
    shapes: list[dict[str, Any]]
    counts: dict[str, int]
    unlike_template: dict[str, str] | None = None


def demonstrations(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None) -> Prepared:
    """Rows for SFT: `input_ids` and `labels`, -100 on the prompt, so that only the reply bears loss.

    With `loss: all`, so do the assistant's turns in the prompt that may be trained. The tokens are the same.

    Args:
        spec: the recipe's `data`.
        tokenizer: from `load_tokenizer`.
        seed: of what is drawn of a mix, and of the split.
        known: what this process has read for the same tokenizer; it is not read again.

    Raises:
        InputError: with file and row, where the data cannot be read or lack something.
    """
    return _prepare(DEMONSTRATIONS, spec, tokenizer, seed, known)


def preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None) -> Prepared:
    """Rows for DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`; see `demonstrations`."""
    return _prepare(PREFERENCES, spec, tokenizer, seed, known)


def whole_preferences(
    spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None
) -> Prepared:
    """Rows for the reward model: `chosen_ids` and `rejected_ids`, each prompt and reply; see `demonstrations`."""
    return _prepare(PREFERENCES, spec, tokenizer, seed, known, join=True)


def feedback(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None) -> Prepared:
    """Rows for KTO: `prompt_ids`, `completion_ids` and `label`, whether the reply is good; see `demonstrations`."""
    return _prepare(FEEDBACK, spec, tokenizer, seed, known)


def prompts(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None) -> Prepared:
    """Rows for PPO: `input_ids` of the prompt alone; see `demonstrations`."""
    return _prepare(PROMPTS, spec, tokenizer, seed, known)


def prompts_with_rows(
    spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None
) -> Prepared:
    """The same with a column `row`, from `encode.row_of`, for rewards that read more than token ids."""
    return _prepare(PROMPTS_WITH_ROWS, spec, tokenizer, seed, known)


def candidates(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None) -> Prepared:
    """Rows for a judge: `input_ids` and `row` as in `prompts_with_rows`, and `replies`, a JSON list of all replies."""
    return _prepare(CANDIDATES, spec, tokenizer, seed, known)


def preferences_as_text(
    spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int, known: Known | None = None
) -> Prepared:
    """The same of pairs: `chosen` and `rejected` are the replies as JSON."""
    return _prepare(PAIRS_AS_TEXT, spec, tokenizer, seed, known)


def first_prompts(spec: Data, n: int, among: Iterable[int] | None = None) -> list[tuple[Prompt, dict[str, Any]]]:
    """The first prompts of the data, each with its row; of a mix, each source's share.

    Args:
        spec: the data.
        n: the most prompts.
        among: values of a table's `prompt_key`; then only prompts with one of them are taken, each once.

    Raises:
        InputError: see `demonstrations`.
    """
    found: list[tuple[Prompt, dict[str, Any]]] = []
    left = None if among is None else set(among)

    def is_wanted(prompt: Prompt) -> bool:
        if left is None:
            return True
        key = hash_of(prompt)
        wanted = key in left
        left.discard(key)
        return wanted

    for share, source in zip(
        mix.shares(spec) or [1 / len(spec.sources)] * len(spec.sources), spec.sources, strict=True
    ):
        rows, shape = open_source(source, "prompts", spec, load_hub(source))
        read = records(rows, shape, "prompts", spec, Counter())
        asked = ((record[0], located.row) for located, record in read if is_wanted(record[0]))
        found += itertools.islice(asked, max(1, round(n * share)))
    if not found:
        raise InputError("there is no prompt that can be used", place=where(spec))
    return found[:n]


def column(table: Dataset, name: str) -> np.ndarray:
    """A column of numbers, int64 `[rows]`."""
    values, order = table.data.table[name].to_numpy().astype(np.int64), row_order(table)
    return values if order is None else values[order]


def row_order(table: Dataset) -> np.ndarray | None:
    """Which rows of its Arrow table a dataset has, and in which order; None where it has all as they are.

    The datasets library gathers such rows one by one, which takes minutes for a million.
    """
    return None if table._indices is None else table._indices.column(0).to_numpy()


# Mixing and splitting


def _prepare(
    layout: Layout,
    spec: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    known: Known | None,
    join: bool = False,
) -> Prepared:
    known = known or Known()

    def encoded(source: Source) -> Encoded:
        found = cache.encoded(layout, source, spec, tokenizer, known)
        return cache.joined(found) if join else found

    found = [encoded(source) for source in spec.sources]
    tables, counts = [one.table for one in found], Counter[str]()
    for one in found:
        counts.update(one.counts)
    taken = mix.taken([len(table) for table in tables], spec)
    for name in OF_USED if layout.labels else OF_USED[:1]:
        shares = [one.counts.get(name, 0) / len(one.table) for one in found]
        counts[name] = sum(round(share * count) for share, count in zip(shares, taken, strict=True))
    table = _mixed(tables, taken, seed)
    held_out, apart = None, []
    if spec.eval_data is not None:
        apart = [encoded(spec.eval_data)]
        held_out, of_source = apart[0].table, apart[0].counts
        counts.update({f"eval_{name}": count for name, count in of_source.items()})
    elif spec.eval_fraction:
        table, held_out = _split(table, spec, seed)
    if spec.part is not None:
        whole, table = table, _part(table, spec, seed)
        for name in OF_USED:
            counts[name] = round(counts[name] * len(table) / len(whole))
    columns = [name for name in (*layout.columns, *layout.texts, *layout.labels, ROW) if name in table.column_names]
    return Prepared(
        table.select_columns(columns),
        None if held_out is None else held_out.select_columns(columns),
        table,
        held_out,
        [one.shape for one in found],
        dict(counts),
        next((one.unlike_template for one in [*found, *apart] if one.unlike_template), None),
    )


def _mixed(tables: list[Dataset], counts: list[int], seed: int) -> Dataset:
    """One table of so many rows of each of several; which ones, and their order, is drawn by the seed."""
    if len(tables) == 1:
        return tables[0]
    draw = np.random.default_rng(seed)
    starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
    chosen = [
        start + draw.permutation(len(table))[:count] for start, table, count in zip(starts, tables, counts, strict=True)
    ]
    return concatenate_datasets(tables).select(draw.permutation(np.concatenate(chosen)))


def _split(table: Dataset, spec: Data, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out `eval_fraction` of the prompts with all their rows, so that no prompt is on both sides.

    Seed and prompt alone decide how early a prompt is held out: not the order of the rows, and hardly the other rows.

    Raises:
        InputError: there is only one prompt.
    """
    keys = column(table, "prompt_key")
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise InputError(
            "all rows have the same prompt, so none can be held out",
            place=where(spec),
            hint="give more prompts, or set `eval_fraction: 0`",
        )
    count = min(max(1, round(len(distinct) * spec.eval_fraction)), len(distinct) - 1)
    held_out = np.isin(keys, distinct[np.argsort(_scrambled(distinct, seed), kind="stable")[:count]])
    return table.select(np.flatnonzero(~held_out)), table.select(np.flatnonzero(held_out))


def _part(table: Dataset, spec: Data, seed: int) -> Dataset:
    """One of several equal parts of the prompts, each with all its rows; a prompt is in one part alone.

    Seed and prompts decide which, not the order of the rows. Prompts that are held out are so for all parts alike.

    Raises:
        InputError: there are fewer prompts than parts.
    """
    number, parts = spec.part or (1, 1)
    keys = column(table, "prompt_key")
    distinct = np.unique(keys)
    if len(distinct) < parts:
        count = f"{len(distinct)} different prompt{'s' if len(distinct) > 1 else ''}"
        raise InputError(
            f"{count} cannot be shared out among {parts} rounds",
            place=where(spec),
            hint="give more prompts, or the same ones to each round: `prompts: reuse` under `rounds`",
        )
    order = np.argsort(_scrambled(distinct, seed), kind="stable")
    inside = np.isin(keys, distinct[order[number - 1 :: parts]])
    return table.select(np.flatnonzero(inside))


def _scrambled(keys: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random and depend on key and seed alone (the finaliser of SplitMix64)."""
    start = np.uint64(int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    mixed = keys.view(np.uint64) ^ start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
