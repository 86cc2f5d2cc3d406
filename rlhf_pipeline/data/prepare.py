"""From rows of any shape to the token columns that TRL's trainers read: encode, filter, mix, split.

One encoding serves all stages: the prompt's tokens, then the reply's tokens and one EOS. So the reward is trained at
the same token, the last of the reply, where PPO reads it.

Rows are read one after the other and written, encoded, to an Arrow file of the datasets library's cache, from where
they are used without being held in memory. The file's name is a hash of everything that decides its content, so that
a worker finds what the check before it has encoded.
"""

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.files import Located, local_files, rows_of_file
from rlhf_pipeline.data.peek import SAMPLE, column_names, first_rows, renamed
from rlhf_pipeline.data.shapes import Prompt, Record, RowError, Shape, Wanted, recognise
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.models.tokenizer import TemplateError, render
from rlhf_pipeline.recipe.data_files import is_local
from rlhf_pipeline.recipe.schema import Data, Source

BATCH = 1000  # rows that are encoded at once
Ids = list[int]
TOKENS, NUMBER, KEY = pa.list_(pa.int32()), pa.int32(), pa.int64()
# What a sound row without a record is counted as.
NO_RECORD: dict[Wanted, str] = {
    "demonstrations": "bad_replies",
    "preferences": "rows_without_pair",
    "prompts": "rows_without_prompt",
}


@dataclass(frozen=True)
class Prepared:
    """Rows for a trainer.

    Attributes:
        train: the trainer's columns of the rows to train on.
        held_out: the same of the rows to evaluate on; None where there are none.
        table: of the rows to train on, also `prompt_key` and `row_key`, hashes of the prompt and of the whole record,
            and the lengths in tokens before any cut: `prompt_length`, and `reply_length` or `chosen_length` and
            `rejected_length`, which count the EOS.
        held_out_table: the same of the rows to evaluate on.
        shapes: what was recognised in each source, those of `eval_data` apart.
        counts: `rows` that were read; `bad_rows`, `too_long` and `rows_without_pair`, which were left out; of rows with
            labels `good_replies` and `bad_replies`, of which demonstrations leave the bad ones out; `conversations`,
            the rows in use whose prompts go through the chat template. Those of `eval_data` have names that begin with
            `eval_`.
    """

    train: Dataset
    held_out: Dataset | None
    table: Dataset
    held_out_table: Dataset | None
    shapes: list[Shape]
    counts: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """What a trainer reads, and how it is put together from the tokens of a prompt and its replies."""

    wanted: Wanted
    columns: tuple[str, ...]
    lengths: tuple[str, ...]
    join: Callable[..., tuple[Ids, ...]]


DEMONSTRATIONS = Layout(
    "demonstrations",
    ("input_ids", "labels"),
    ("prompt_length", "reply_length"),
    lambda prompt, reply: (prompt + reply, [-100] * len(prompt) + reply),
)
PREFERENCES = Layout(
    "preferences",
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_length", "chosen_length", "rejected_length"),
    lambda prompt, chosen, rejected: (prompt, chosen, rejected),
)
WHOLE_PREFERENCES = Layout(
    "preferences",
    ("chosen_ids", "rejected_ids"),
    ("prompt_length", "chosen_length", "rejected_length"),
    lambda prompt, chosen, rejected: (prompt + chosen, prompt + rejected),
)
PROMPTS = Layout("prompts", ("input_ids",), ("prompt_length",), lambda prompt: (prompt,))


def demonstrations(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Rows for SFT: `input_ids` and `labels`, -100 on the prompt, so that only the reply bears loss.

    Raises:
        InputError: with file and row, where the data cannot be read or lack something.
    """
    return _prepare(DEMONSTRATIONS, spec, tokenizer, seed)


def preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Rows for DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`; see `demonstrations`."""
    return _prepare(PREFERENCES, spec, tokenizer, seed)


def whole_preferences(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Rows for the reward model: `chosen_ids` and `rejected_ids`, each prompt and reply; see `demonstrations`."""
    return _prepare(WHOLE_PREFERENCES, spec, tokenizer, seed)


def prompts(spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Rows for PPO: `input_ids` of the prompt alone; see `demonstrations`."""
    return _prepare(PROMPTS, spec, tokenizer, seed)


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
        key = _hash(prompt)
        wanted = key in left
        left.discard(key)
        return wanted

    for share, source in zip(_shares(spec) or [1 / len(spec.sources)] * len(spec.sources), spec.sources, strict=True):
        rows, shape = open_source(source, "prompts", spec.chat, load_hub(source))
        records = _records(rows, shape, "prompts", spec, Counter())
        asked = ((record[0], located.row) for located, record in records if is_wanted(record[0]))
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


def where(spec: Data) -> str:
    """The data as a message names them."""
    return " + ".join(source.path for source in spec.sources)


# Mixing and splitting


def _prepare(layout: Layout, spec: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    tables, shapes, counts, turns = [], [], Counter[str](), []
    for source in spec.sources:
        table, shape, of_source = _encoded(layout, source, spec, tokenizer)
        tables.append(table)
        shapes.append(shape)
        counts.update(of_source)
        turns.append(of_source.get("conversations", 0) / len(table))
    taken = _taken(tables, spec)
    counts["conversations"] = sum(round(share * count) for share, count in zip(turns, taken, strict=True))
    table = _mixed(tables, taken, seed)
    held_out = None
    if spec.eval_data is not None:
        held_out, _, of_source = _encoded(layout, spec.eval_data, spec, tokenizer)
        counts.update({f"eval_{name}": count for name, count in of_source.items()})
    elif spec.eval_fraction:
        table, held_out = _split(table, spec, seed)
    columns = list(layout.columns)
    return Prepared(
        table.select_columns(columns),
        None if held_out is None else held_out.select_columns(columns),
        table,
        held_out,
        shapes,
        dict(counts),
    )


def _shares(spec: Data) -> list[float] | None:
    """Each source's share of the mix; None without weights."""
    weights = [source.weight for source in spec.mix if source.weight is not None]  # of all sources, or of none
    return [weight / sum(weights) for weight in weights] or None


def _taken(tables: list[Dataset], spec: Data) -> list[int]:
    """How many rows of each table are used: all, or as many as the weights allow with none twice."""
    shares = _shares(spec)
    if shares is None:
        return [len(table) for table in tables]
    total = min(len(table) / share for table, share in zip(tables, shares, strict=True))
    return [min(len(table), max(1, round(total * share))) for table, share in zip(tables, shares, strict=True)]


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
    """Hold out `eval_fraction` of the prompts with all their rows, so that no prompt stands on both sides.

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


def _scrambled(keys: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random and depend on key and seed alone (the finaliser of SplitMix64)."""
    start = np.uint64(int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    mixed = keys.view(np.uint64) ^ start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


# Reading


def open_source(
    source: Source, wanted: Wanted, chat: bool | None, hub: Dataset | None = None
) -> tuple[Iterator[Located], Shape]:
    """A source's rows, with the names that are expected, and their shape.

    Args:
        source: where the rows come from.
        wanted: what they shall be.
        chat: the recipe's `data.chat`.
        hub: of a hub dataset, what `load_hub` gave.

    Raises:
        InputError: it cannot be read, has no rows, lacks a column or has no shape; where a later file is broken, as the
            rows are read.
    """
    if hub is not None:
        rows = renamed(_rows_of_hub(hub, source.path), source)
        first = list(itertools.islice(rows, SAMPLE))
        shape = recognise((one.row for one in first), wanted, chat, source.path)
        return itertools.chain(first, rows), shape
    files = local_files(source)
    shape = recognise(first_rows(source) or [], wanted, chat, source.path)
    if len(files) > 1:
        _require_one_shape(files, source, wanted, chat)
    return renamed(itertools.chain.from_iterable(rows_of_file(file) for file in files), source), shape


def _require_one_shape(files: Sequence[Path], source: Source, wanted: Wanted, chat: bool | None) -> None:
    """See that all files of a glob or folder are read alike.

    Raises:
        InputError: they are not.
    """
    first: tuple[Shape, list[str]] | None = None
    for file in files:
        rows = first_rows(Source(path=str(file), columns=source.columns))
        shape, names = recognise(rows or [], wanted, chat, str(file)), column_names(rows or [])
        first = first or (shape, names)
        if shape.says != first[0].says:
            one, other = (shape.name, first[0].name) if shape.name != first[0].name else (shape.says, first[0].says)
            raise InputError(
                f"its columns ({', '.join(names)}) are read as {one}, and those of {files[0].name} "
                f"({', '.join(first[1])}) as {other}",
                place=str(file),
                hint="give files of different columns as several sources under `mix`, with `columns` for each",
            )


def load_hub(source: Source) -> Dataset | None:
    """A hub dataset, downloaded once into the datasets library's cache; None for local files.

    Raises:
        InputError: it cannot be had.
    """
    if is_local(source.path):
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


def _records(
    rows: Iterator[Located], shape: Shape, wanted: Wanted, spec: Data, counts: Counter[str]
) -> Iterator[tuple[Located, Record]]:
    """The records of rows, each with its row; bad rows end it, or are left out and counted.

    Raises:
        InputError: naming the first bad row, and how many more there are.
    """
    for located in rows:
        counts["rows"] += 1
        try:
            records = shape.read(located.row)
        except RowError as problem:
            if spec.bad_rows == "error":
                raise bad_row(str(problem), located, _count_bad(rows, shape)) from None
            counts["bad_rows"] += 1
            continue
        if not records:
            counts[NO_RECORD[wanted]] += 1
        if shape.labelled and records:
            good = wanted == "demonstrations" or records[0][2] > 0
            counts["good_replies" if good else "bad_replies"] += 1
        for record in records:
            yield located, record


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


def bad_row(problem: str, located: Located, more: int = 0) -> InputError:
    """The error of a row that cannot be used."""
    others = f" (and {more} more row{'s' if more > 1 else ''})" if more else ""
    return InputError(
        f"{problem}{others}",
        place=f"{located.place}: row {located.number}",
        hint=f"the row has {', '.join(located.row)}; `columns: {{expected: yours}}` renames, and `bad_rows: drop` "
        "leaves such rows out",
    )


def _of_all_replies(
    records: Iterator[tuple[Located, Record]], shape: Shape, counts: Counter[str], folder: Path
) -> Iterator[tuple[Located, Record]]:
    """The records of shapes in which the replies to a prompt stand in several rows, wherever those are in the data.

    The rows wait on the disk; only their prompts' hashes are held.
    """
    assert shape.of_replies is not None
    schema = pa.schema(
        {"prompt": pa.string(), "reply": pa.string(), "score": pa.float64(), "place": pa.string(), "number": KEY}
    )
    keys: list[np.ndarray] = []

    def batches() -> Iterator[dict[str, list[Any]]]:
        for batch in _batched(records):
            keys.append(np.array([_hash(prompt) for _, (prompt, _, _) in batch]))
            yield {
                "prompt": [json.dumps(prompt) for _, (prompt, _, _) in batch],
                "reply": [reply for _, (_, reply, _) in batch],
                "score": [score for _, (_, _, score) in batch],
                "place": [located.place for located, _ in batch],
                "number": [located.number for located, _ in batch],
            }

    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "replies.arrow"
        _write(file, schema, batches())
        if not keys:
            return
        _, first, which = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        # Prompts in the order in which they first come, and their replies in theirs.
        table = Dataset.from_file(str(file)).select(np.argsort(first[which], kind="stable"))
        rows = (
            dict(zip(batch, values, strict=True))
            for batch in table.iter(BATCH)
            for values in zip(*batch.values(), strict=True)
        )
        for text, of_prompt in itertools.groupby(rows, key=lambda row: row["prompt"]):
            replies = list(of_prompt)
            found = shape.of_replies([(row["reply"], row["score"]) for row in replies])
            if not found:
                counts["rows_without_pair"] += len(replies)
            for record in found:
                yield Located(replies[0]["place"], replies[0]["number"], {}), (json.loads(text), *record)


# Encoding


def _encoded(
    layout: Layout, source: Source, spec: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Shape, dict[str, int]]:
    """A source's rows as tokens, with keys and lengths, from the cache if they are there."""
    hub = load_hub(source)
    rows, shape = open_source(source, layout.wanted, spec.chat, hub)
    folder = _cache_folder()
    file = folder / f"{_fingerprint(layout, source, hub, spec, tokenizer)}.arrow"
    notes = file.with_suffix(".json")
    if not file.is_file():
        if spec.bad_rows == "error":  # in seconds, where encoding takes minutes
            for _ in _records(rows, shape, layout.wanted, spec, Counter()):
                pass
            rows, shape = open_source(source, layout.wanted, spec.chat, hub)
        counts = Counter[str]()
        records = _records(rows, shape, layout.wanted, spec, counts)
        if shape.of_replies is not None:
            records = _of_all_replies(records, shape, counts, folder)
        schema = pa.schema(
            dict.fromkeys(layout.columns, TOKENS)
            | dict.fromkeys(("prompt_key", "row_key"), KEY)
            | dict.fromkeys(layout.lengths, NUMBER)
        )
        batches = (_encode(layout, batch, spec, tokenizer, counts) for batch in _batched(records))
        with tempfile.TemporaryDirectory(dir=folder) as place:
            written = Path(place) / file.name
            _write(written, schema, batches)
            (Path(place) / notes.name).write_text(json.dumps(counts))
            (Path(place) / notes.name).replace(notes)
            written.replace(file)  # last, so that what is there is whole
    counts_of_file: dict[str, int] = json.loads(notes.read_text())
    table = Dataset.from_file(str(file))
    if not len(table):
        raise InputError(
            f"none of the {counts_of_file['rows']} rows can be used",
            place=source.path,
            hint=", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts_of_file.items()),
        )
    return table, shape, counts_of_file


def _encode(
    layout: Layout,
    batch: list[tuple[Located, Record]],
    spec: Data,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> dict[str, list[Any]]:
    """A batch of records as the columns of a layout."""
    asked = _prompt_ids(tokenizer, spec, batch, counts)
    batch, asked = (
        [one for one, ids in zip(batch, asked, strict=True) if ids is not None],
        [ids for ids in asked if ids is not None],
    )
    replies = [_reply_ids(tokenizer, [record[which] for _, record in batch]) for which in range(1, len(layout.lengths))]
    columns: dict[str, list[Any]] = {name: [] for name in (*layout.columns, "prompt_key", "row_key", *layout.lengths)}
    for (_, record), *parts in zip(batch, asked, *replies, strict=True):
        lengths = [len(part) for part in parts]
        limits = [spec.max_prompt_length, *[spec.max_completion_length] * len(replies)]
        if spec.too_long == "drop" and any(
            limit and length > limit for length, limit in zip(lengths, limits, strict=True)
        ):
            counts["too_long"] += 1
            continue
        counts["conversations"] += isinstance(record[0], list)
        cut = [_last(parts[0], limits[0]), *(part[: limits[1]] for part in parts[1:])]
        row_key = _hash(record)
        values = [*layout.join(*cut), _hash(record[0]) if record[0] else row_key, row_key, *lengths]
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns


def encode_prompts(tokenizer: PreTrainedTokenizerBase, spec: Data, asked: Sequence[Prompt]) -> list[Ids]:
    """Prompts' token ids: text as the tokenizer encodes it, or turns through the model's chat template.

    A prompt longer than `max_prompt_length` keeps its last tokens.

    Raises:
        InputError: the chat template refuses a prompt.
    """
    located = [(Located(where(spec), number, {}), (prompt,)) for number, prompt in enumerate(asked, 1)]
    strict = spec.model_copy(update={"bad_rows": "error"})
    found = _prompt_ids(tokenizer, strict, located, Counter())
    return [_last(ids, spec.max_prompt_length) for ids in found if ids is not None]


def _last(ids: Ids, limit: int | None) -> Ids:
    return ids[-limit:] if limit else ids


def encode_replies(tokenizer: PreTrainedTokenizerBase, spec: Data, replies: Sequence[str]) -> list[Ids]:
    """Replies' token ids, encoded apart from their prompts as they are in generation; each ends in one EOS.

    A reply longer than `max_completion_length` is cut and has no EOS: it did not end there.
    """
    return [ids[: spec.max_completion_length] for ids in _reply_ids(tokenizer, replies)]


def _reply_ids(tokenizer: PreTrainedTokenizerBase, replies: Sequence[str]) -> list[Ids]:
    bare = []
    for reply in replies:
        while reply.endswith(tokenizer.eos_token):
            reply = reply.removesuffix(tokenizer.eos_token)
        bare.append(reply)
    if not bare:
        return []
    encoded = tokenizer(bare, add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, spec: Data, batch: list[tuple[Located, Record]], counts: Counter[str]
) -> list[Ids | None]:
    """The token ids of prompts, not cut; None for a bad row that is left out."""
    found: list[Ids | None] = [None] * len(batch)
    texts = [i for i, (_, record) in enumerate(batch) if isinstance(record[0], str)]
    if texts:
        written = [batch[i][1][0] for i in texts]
        eos = tokenizer.eos_token_id
        # Some tokenizers close every text; a prompt is not closed.
        for i, text, ids in zip(texts, written, tokenizer(written)["input_ids"], strict=True):
            found[i] = ids[:-1] if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token) else ids
    rendered: dict[int, str] = {}
    for i, (located, record) in enumerate(batch):
        if isinstance(record[0], str):
            continue
        try:
            rendered[i] = render(tokenizer, record[0])
        except TemplateError as error:
            if spec.bad_rows == "error":
                raise bad_row(str(error), located) from None
            counts["bad_rows"] += 1
    if rendered:
        for i, ids in zip(
            rendered, tokenizer(list(rendered.values()), add_special_tokens=False)["input_ids"], strict=True
        ):
            found[i] = ids
    return found


def _hash(value: Any) -> int:
    """64 bits of a prompt or a record, as a signed number."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


# The cache


def _cache_folder() -> Path:
    """The folder of what was encoded.

    Raises:
        InputError: it cannot be made, or not be written to.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf-pipeline"
    why = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
    if why or not os.access(folder, os.W_OK):
        raise InputError(
            f"encoded rows cannot be written there: {why or 'the folder is read-only'}",
            place=str(folder),
            hint="set HF_DATASETS_CACHE to a folder that can be written to",
        )
    return folder


def _fingerprint(
    layout: Layout, source: Source, hub: Dataset | None, spec: Data, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A hash of everything that decides what is encoded."""
    decisive = {
        "content": Digests().of_source(source) if hub is None else hub._fingerprint,
        "columns": source.columns,
        "limit": source.limit,
        "layout": (layout.wanted, layout.columns),
        **spec.model_dump(include={"chat", "max_prompt_length", "max_completion_length", "too_long", "bad_rows"}),
        "tokenizer": _tokenizer_hash(tokenizer),
        "code": _code_hash(),
    }
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that a tokenizer would save: its vocabulary, its settings and its chat template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digest = hashlib.blake2b(type(tokenizer).__name__.encode(), digest_size=16)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _code_hash() -> str:
    """A hash of the code that reads and encodes."""
    here = Path(__file__).parent
    names = ("files.py", "peek.py", "prepare.py", "shapes.py", "../models/tokenizer.py")
    sources = [(here / name).read_bytes() for name in names]
    libraries = [version(name).encode() for name in ("transformers", "tokenizers", "datasets")]
    return hashlib.blake2b(b"\0".join(sources + libraries), digest_size=16).hexdigest()


def _batched(records: Iterable[tuple[Located, Record]]) -> Iterator[list[tuple[Located, Record]]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def _write(file: Path, schema: pa.Schema, batches: Iterable[dict[str, list[Any]]]) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))
