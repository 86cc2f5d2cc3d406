"""What was read and encoded, kept as Arrow files in the datasets library's cache.

A file's name is a hash of everything that decides its content, so that a worker finds what the check before it has
encoded, and takes it from there without reading the source again.
"""

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import ROW, Layout, Notes, encode, hash_of
from rlhf_pipeline.data.files import Located, local_files
from rlhf_pipeline.data.shapes import Shape, Wanted
from rlhf_pipeline.data.sources import BATCH, batched, count_labels, load_hub, open_source, records
from rlhf_pipeline.data.turns import Record
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.recipe.schema import Data, Source

TOKENS, LABEL, NUMBER, KEY = pa.list_(pa.int32()), pa.bool_(), pa.int32(), pa.int64()


class Encoded(NamedTuple):
    """One source's rows as tokens.

    Attributes:
        table: the columns of a layout, with keys and lengths.
        shape: what was recognised in the source: its `name`, what it `says`, and what each column is `used_as`.
        counts: see `prepare.Prepared`.
        unlike_template: see `encode.Notes`.
    """

    table: Dataset
    shape: dict[str, Any]
    counts: dict[str, int]
    unlike_template: dict[str, str] | None = None


class Known:
    """What a process has read for one tokenizer: each distinct reading once, however many stages ask for it.

    Distinct are readings of another source, with other columns or limits, into other records or tokens.
    """

    def __init__(self) -> None:
        self.digests = Digests()
        self.tokenizer: str | None = None  # its hash
        self.read: dict[str, Encoded | InputError] = {}


def encoded(layout: Layout, source: Source, spec: Data, tokenizer: PreTrainedTokenizerBase, known: Known) -> Encoded:
    """A source's rows as tokens: from this process, from the cache, or read and encoded now.

    Raises:
        InputError: with file and row, where the source cannot be read or lacks something.
    """
    key = json.dumps(_settings(layout, source, spec) | {"source": source.model_dump(exclude={"weight"})})
    if key not in known.read:
        try:
            known.read[key] = _from_cache(layout, source, spec, tokenizer, known)
        except InputError as error:
            known.read[key] = error
    found = known.read[key]
    if isinstance(found, InputError):
        raise found
    return found


def _from_cache(
    layout: Layout, source: Source, spec: Data, tokenizer: PreTrainedTokenizerBase, known: Known
) -> Encoded:
    hub = load_hub(source)
    if hub is None:
        local_files(source)  # raises where there are none
    folder = _cache_folder()
    file = folder / f"{_fingerprint(layout, source, hub, spec, tokenizer, known)}.arrow"
    notes = file.with_suffix(".json")
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            written = Path(place) / file.name
            about = _encode_source(layout, source, hub, spec, tokenizer, written)
            (Path(place) / notes.name).write_text(json.dumps(about))
            (Path(place) / notes.name).replace(notes)
            written.replace(file)  # last, so that what is there is whole
    about = json.loads(notes.read_text())
    table, counts = Dataset.from_file(str(file)), about["counts"]
    if not len(table):
        raise InputError(
            f"none of the {counts['rows']} rows can be used",
            place=source.path,
            hint=", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()),
        )
    return Encoded(table, about["shape"], counts, about["unlike_template"])


def _encode_source(
    layout: Layout, source: Source, hub: Dataset | None, spec: Data, tokenizer: PreTrainedTokenizerBase, file: Path
) -> dict[str, Any]:
    """Read a source and write its rows as tokens; returns its shape and counts."""
    rows, shape = open_source(source, layout.wanted, spec, hub)
    if source is spec and spec.pairs and shape.of_replies is None and "replies" not in shape.used_as.values():
        raise InputError(
            "`pairs` has no effect on these rows: each is a pair already", place=source.path, hint="remove it"
        )
    notes = Notes(Counter())
    counts = notes.counts
    found = records(rows, shape, layout.wanted, spec, counts)
    if shape.of_replies is not None:
        found = _of_all_replies(found, shape, layout.wanted, counts, file.parent)
    schema = pa.schema(
        dict.fromkeys(layout.columns, TOKENS)
        | dict.fromkeys(layout.texts, pa.string())
        | dict.fromkeys(layout.labels, LABEL)
        | dict.fromkeys(("prompt_key", "row_key"), KEY)
        | dict.fromkeys(layout.lengths, NUMBER)
        | ({ROW: pa.string()} if layout.keeps_row else {})
    )
    _write(file, schema, (encode(layout, batch, spec, tokenizer, notes) for batch in batched(found)))
    # Counts of nothing are left out, as a counter has them where nothing was found.
    counted = {name: count for name, count in counts.items() if count}
    shown = {"name": shape.name, "says": shape.says_with(spec.loss), "used_as": shape.used_as}
    return {"shape": shown, "counts": counted, "unlike_template": notes.unlike_template}


def _of_all_replies(
    found: Iterator[tuple[Located, Record]], shape: Shape, wanted: Wanted, counts: Counter[str], folder: Path
) -> Iterator[tuple[Located, Record]]:
    """The records of shapes in which the replies to a prompt are in several rows, wherever those are in the data.

    The rows wait on the disk; only their prompts' hashes are held.
    """
    assert shape.of_replies is not None
    schema = pa.schema(
        {"prompt": pa.string(), "reply": pa.string(), "score": pa.float64(), "place": pa.string(), "number": KEY}
    )
    keys: list[np.ndarray] = []

    def batches() -> Iterator[dict[str, list[Any]]]:
        for batch in batched(found):
            keys.append(np.array([hash_of(prompt) for _, (prompt, _, _) in batch]))
            yield {
                "prompt": [json.dumps(prompt) for _, (prompt, _, _) in batch],
                "reply": [json.dumps(reply) for _, (_, reply, _) in batch],
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
            made = shape.of_replies([(json.loads(row["reply"]), row["score"]) for row in replies])
            if not made:
                counts["rows_without_pair"] += len(replies)
            if wanted == "feedback":
                count_labels(made, counts)
            for record in made:
                yield Located(replies[0]["place"], replies[0]["number"], {}), (json.loads(text), *record)


def joined(pairs: Encoded) -> Encoded:
    """Pairs as the reward model reads them: `chosen_ids` and `rejected_ids` hold the prompt, too.

    Made of the table that `PREFERENCES` encodes, so that a recipe that trains on pairs twice reads them once.
    """
    source = Path(pairs.table.cache_files[0]["filename"])
    file = source.with_stem(f"{source.stem}-joined")
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=file.parent) as place:
            written = Path(place) / file.name
            table = pairs.table.data.table
            schema = table.drop_columns("prompt_ids").schema
            with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
                for batch in table.to_batches():
                    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                    prompts = columns.pop("prompt_ids")
                    for name in ("chosen_ids", "rejected_ids"):
                        columns[name] = _row_by_row(prompts, columns[name])
                    stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            written.replace(file)
    return pairs._replace(table=Dataset.from_file(str(file)))


def _row_by_row(first: pa.ListArray, second: pa.ListArray) -> pa.ListArray:
    """Each row of one column of lists, and behind it the same row of another."""
    in_turn = np.arange(2 * len(first)).reshape(2, -1).T.ravel()  # row 0 of both, row 1 of both, …
    both = pa.concat_arrays([first, second]).take(pa.array(in_turn))
    return pa.ListArray.from_arrays(both.offsets.take(pa.array(np.arange(0, len(both) + 1, 2))), both.values)


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


def _settings(layout: Layout, source: Source, spec: Data) -> dict[str, Any]:
    """What a recipe says of how a source is read and encoded."""
    found: dict[str, Any] = {}
    if layout.wanted == "demonstrations" and spec.loss != "last":
        found["loss"] = spec.loss
    if layout.wanted == "preferences" and spec.pairs is not None:
        found["pairs"] = spec.pairs
    return found | {
        "columns": source.columns,
        "limit": source.limit,
        "layout": (layout.wanted, layout.columns, *([ROW] if layout.keeps_row else []), *layout.texts),
        **spec.model_dump(include={"chat", "max_prompt_length", "max_completion_length", "too_long", "bad_rows"}),
    }


def _fingerprint(
    layout: Layout,
    source: Source,
    hub: Dataset | None,
    spec: Data,
    tokenizer: PreTrainedTokenizerBase,
    known: Known,
) -> str:
    """A hash of everything that decides what is encoded."""
    known.tokenizer = known.tokenizer or _tokenizer_hash(tokenizer)
    decisive = {
        "content": known.digests.of_source(source) if hub is None else hub._fingerprint,
        **_settings(layout, source, spec),
        "tokenizer": known.tokenizer,
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
    """A hash of the code that reads and encodes: of this folder, so that no list of its modules can lack one."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "models" / "tokenizer.py"]
    sources = [file.read_bytes() for file in files]
    libraries = [version(name).encode() for name in ("transformers", "tokenizers", "datasets")]
    return hashlib.blake2b(b"\0".join(sources + libraries), digest_size=16).hexdigest()


def _write(file: Path, schema: pa.Schema, batches: Iterable[dict[str, list[Any]]]) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))
