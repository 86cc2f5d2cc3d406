"""What a trainer will see of a stage's data: numbers, and one example.

Numbers come from Arrow columns through numpy, a batch at a time, so that millions of rows cost no more memory than one
integer each.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import kinds
from rlhf_pipeline.data.prepare import Prepared, column, row_order
from rlhf_pipeline.kinds import Encoding
from rlhf_pipeline.models.tokenizer import end_of_turn, has_default_template, pinned_day
from rlhf_pipeline.recipe.schema import Data, Source

# The columns of rows in each encoding, and the replies that they hold.
COLUMNS: dict[Encoding, list[str]] = {
    "demonstrations": ["input_ids", "labels"],
    "whole_pairs": ["chosen_ids", "rejected_ids"],
    "pairs": ["prompt_ids", "chosen_ids", "rejected_ids"],
    "replies": ["prompt_ids", "completion_ids"],
    "prompts": ["input_ids"],
}
REPLIES: dict[Encoding, list[str]] = {
    "demonstrations": ["reply"], "whole_pairs": ["chosen", "rejected"], "pairs": ["chosen", "rejected"],
    "replies": ["reply"], "prompts": [],
}  # fmt: skip

AT_ONCE = 10_000  # rows
FEW = 100  # rows whose text is looked at


class Trainer(NamedTuple):
    """What decides, beside the data, what a trainer sees of it.

    Attributes:
        max_length: TRL's limit on prompt and reply together; None where there is none.
        keep_end: whether TRL keeps the end of a row that is longer, and not its beginning.
        batch: the rows of one optimizer step, of all processes; of a policy that samples, the prompts.
        processes: how many share a batch.
        response_length: the limit on sampled replies.
        stop_tokens: the tokens that end sampled replies, from `reply_end.stop_tokens`.
        max_positions: how many tokens the model has positions for; None where it does not say.
    """

    max_length: int | None = None
    keep_end: bool = False
    batch: int = 1
    processes: int = 1
    response_length: int | None = None
    stop_tokens: Sequence[int] = ()
    max_positions: int | None = None

    @classmethod
    def of(
        cls, args: Any, max_positions: int | None = None, reply_limit: str | None = None, processes: int = 1
    ) -> "Trainer":
        """Read it from TRL's config, but for the stop tokens, which that alone does not say.

        Args:
            args: the config.
            max_positions: see there.
            reply_limit: its key for `response_length`; see `Kind.reply_limit`.
            processes: see there.
        """
        # Packed rows are cut into pieces of `max_length` with nothing lost, except by `bfd`.
        packed = getattr(args, "packing", False) and args.packing_strategy != "bfd"
        return cls(
            max_length=None if packed else getattr(args, "max_length", None),
            keep_end=getattr(args, "truncation_mode", "keep_start") == "keep_end",
            batch=(
                args.per_device_train_batch_size
                * args.gradient_accumulation_steps
                * processes
                // getattr(args, "num_generations", 1)
                or 1
            ),
            processes=processes,
            response_length=getattr(args, reply_limit) if reply_limit else None,
            max_positions=max_positions,
        )


def measure(
    kind: str, prepared: Prepared, spec: Data, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
) -> dict[str, Any]:
    """Everything that `data --json` says of one stage's rows; `docs/json.md` lists the keys.

    Args:
        kind: the kind of stage that reads such rows.
        prepared: from `read` of its file in `stages/`.
        spec: what the recipe says of them.
        tokenizer: from `load_tokenizer`.
        trainer: from `Trainer.of`.
    """
    table, held_out = prepared.table, prepared.held_out_table
    prompt_keys, row_keys = column(table, "prompt_key"), column(table, "row_key")
    encoding = kinds.get(kind).encoding
    replies = REPLIES[encoding]
    lengths = {name: column(table, f"{name}_length") for name in ["prompt", *replies]}
    limits = {"prompt": spec.max_prompt_length} | dict.fromkeys(replies, spec.max_completion_length)
    distinct = np.unique(prompt_keys)
    good, bad = (prepared.counts.get(f"{label}_replies", 0) for label in ("good", "bad"))
    return {
        "kind": kind,
        "sources": [
            _source(source) | {"shape": shape["name"], "says": shape["says"], "used_as": shape["used_as"]}
            for source, shape in zip(spec.sources, prepared.shapes, strict=False)
        ],
        "eval_source": _source(spec.eval_data) if spec.eval_data else None,
        "rows": len(table),
        "held_out_rows": None if held_out is None else len(held_out),
        "prompts": len(distinct),
        "chat": spec.chat,
        "loss": spec.loss if encoding == "demonstrations" else None,
        "conversations": sum(prepared.counts.get(f"{name}conversations", 0) for name in ("", "eval_")),
        "left_out": {
            name: count
            for name, count in prepared.counts.items()
            if count and (name in LEFT_OUT or (name == "bad_replies" and encoding == "demonstrations"))
        },
        "run_together": (
            None if prepared.counts.get("conversations") else _run_together(encoding, table, spec, tokenizer)
        ),
        "labels": {"good": good, "bad": bad} if good or bad else None,
        "batch": trainer.batch,
        "processes": trainer.processes,
        "lengths": {name: _percentiles(values) for name, values in lengths.items()},
        "limits": {
            "max_prompt_length": spec.max_prompt_length,
            "max_completion_length": spec.max_completion_length if replies else None,
            "max_length": trainer.max_length,
            "response_length": trainer.response_length,
            "max_positions": trainer.max_positions,
        },
        "cut": {name: 0 if limit is None else int((lengths[name] > limit).sum()) for name, limit in limits.items()},
        "duplicates": {
            "rows": len(table) - len(np.unique(row_keys)),
            "prompts": len(table) - len(distinct),
        },
        "both_sides": None if held_out is None else _both_sides(distinct, column(held_out, "prompt_key")),
        "pairs": _pairs(lengths["chosen"], lengths["rejected"]) if "chosen" in lengths else None,
        "unlike_template": (
            {"rows": sum(prepared.counts.get(f"{name}unlike_template", 0) for name in ("", "eval_"))}
            | prepared.unlike_template
            if prepared.unlike_template
            else None
        ),
        "eos_within": sum(prepared.counts.get(f"{name}eos_within", 0) for name in ("", "eval_")),
        "foreign_end": sum(prepared.counts.get(f"{name}foreign_end", 0) for name in ("", "eval_")),
        "template_day": pinned_day(tokenizer.chat_template),
        "chat_template": "default" if has_default_template(tokenizer) else "own",
        "end_of_turn": end_of_turn(tokenizer),
        "end_of_reply": tokenizer.eos_token,
        **_count(encoding, table, spec, tokenizer, trainer),
        "held_out_max_length": (
            None if held_out is None else _count(encoding, held_out, spec, tokenizer, trainer)["max_length"]
        ),
    }


LEFT_OUT = ("bad_rows", "too_long", "rows_without_pair", "not_trained")


def _source(source: Source) -> dict[str, Any]:
    keys = source.model_dump(include={"path", "subset", "split", "revision", "columns", "limit", "weight"})
    return {"path": keys.pop("path")} | {"weight": None} | keys


def _run_together(
    encoding: Encoding, table: Dataset, spec: Data, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """How many of the first rows have a letter right after their prompt; None where there are no replies.

    Text is put together as it is, so `What is it?` and `A cow.` become `What is it?A cow.`.
    """
    if encoding == "prompts" or not len(table):
        return None
    found: dict[str, Any] = {"rows": 0, "of": 0, "example": None}
    for row in table.select(range(min(FEW, len(table)))):
        if encoding == "demonstrations":
            ids, start = row["input_ids"], row["labels"].count(-100)
        elif encoding == "whole_pairs":
            ids, start = row["chosen_ids"], min(row["prompt_length"], spec.max_prompt_length or row["prompt_length"])
        else:
            ids, start = row["prompt_ids"] + row[COLUMNS[encoding][1]], len(row["prompt_ids"])
        prompt, reply = ids[:start], ids[start:]
        before = tokenizer.decode(prompt[-8:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        both = tokenizer.decode(prompt[-8:] + reply[:8], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        after = both[len(before) :]
        found["of"] += 1
        if before and not before[-1].isspace() and after[:1].isalnum():
            found["rows"] += 1
            found["example"] = found["example"] or both
    return found


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that so many per cent of the rows do not exceed, and the largest."""
    if not len(lengths):
        return {"p50": 0, "p90": 0, "p99": 0, "max": 0}
    found = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf")
    return {name: int(value) for name, value in zip(("p50", "p90", "p99", "max"), found, strict=True)}


def _both_sides(train: np.ndarray, held_out: np.ndarray) -> dict[str, int]:
    shared = np.isin(held_out, train)
    return {"prompts": len(np.unique(held_out[shared])), "held_out_rows": int(shared.sum())}


def _pairs(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float | None]:
    """How much length tells of which reply is the chosen one.

    `length_correlation` is Pearson's (here the point-biserial) between length in tokens and being chosen, over all 2N
    replies. `length_accuracy` is the share of pairs in which the longer one is chosen, pairs of equal length by half:
    how often a reward model would be right that saw nothing but length.
    """
    if not len(chosen):
        return {"chosen_longer": None, "rejected_longer": None, "length_correlation": None, "length_accuracy": None}
    spread = np.concatenate([chosen, rejected]).std()
    longer, shorter = float((chosen > rejected).mean()), float((chosen < rejected).mean())
    return {
        "chosen_longer": longer,
        "rejected_longer": shorter,
        "length_correlation": float((chosen.mean() - rejected.mean()) / 2 / spread) if spread else None,
        "length_accuracy": (1 + longer - shorter) / 2,
    }


# What the trainer does with the rows


class _Lists(NamedTuple):
    """A column of token ids: all of them, and where each row begins; row i is `values[starts[i]:starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def running(self, marked: np.ndarray) -> np.ndarray:
        """How many of the values before each place are marked, one place more than there are values."""
        return np.concatenate([[0], np.cumsum(marked)])

    def last(self) -> np.ndarray:
        """The last value of each row; -1 where it is empty."""
        if not len(self.values):
            return np.full(len(self.lengths), -1)
        return np.where(self.lengths > 0, self.values[np.maximum(self.starts[1:] - 1, 0)], -1)


def _batches(table: Dataset, names: list[str]) -> Iterator[tuple[np.ndarray, list[_Lists]]]:
    """Columns of token ids, some rows at a time, in the order of the Arrow table; with the rows' numbers in that."""
    data, order = table.data.table.select(names), row_order(table)
    used = np.ones(len(data), bool)
    if order is not None:
        used[:] = False
        used[order] = True
    for start in range(0, len(data), AT_ONCE):
        some = used[start : start + AT_ONCE]
        if some.any():
            batch = data.slice(start, AT_ONCE).filter(pa.array(some))
            yield start + np.flatnonzero(some), [_lists(batch[name]) for name in names]


def _lists(column: pa.ChunkedArray) -> _Lists:
    chunks = [(chunk.flatten().to_numpy(), np.diff(chunk.offsets.to_numpy())) for chunk in column.chunks]
    lengths = np.concatenate([length for _, length in chunks])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return _Lists(np.concatenate([values for values, _ in chunks]), starts)


def _count(
    encoding: Encoding, table: Dataset, spec: Data, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
) -> dict[str, Any]:
    """Rows and tokens as the trainer reads them.

    Returns:
        example: the first row that is not left out.
        tokens: in all rows that are left, prompts of pairs twice.
        loss_tokens: those that carry loss; None where single tokens do not.
        max_length: rows that it cuts, and rows that it leaves out.
        replies: how many there are, how many do not end in EOS, how many hold nothing else, and of
            demonstrations how many rows bear no loss at all.
        equal_pairs: pairs whose two replies are the same.
        bos_doubled: rows that begin with two BOS.
        beyond_model: rows that are longer, with a sampled reply of `response_length`, than the model has positions.
    """
    counted = ("tokens", "loss", "cut", "dropped", "replies", "without_eos", "empty", "without_loss", "equal", "bos")
    sums = dict.fromkeys((*counted, "beyond"), 0)
    positions = trainer.max_positions or np.inf
    prompt_lengths = table.data.table["prompt_length"].to_numpy() if encoding == "whole_pairs" else None
    limit, eos, bos = trainer.max_length, tokenizer.eos_token_id, tokenizer.bos_token_id
    fits = np.zeros(len(table.data), bool)
    for places, columns in _batches(table, COLUMNS[encoding]):
        first = columns[0]
        rows = len(first.lengths)
        left = np.ones(rows, bool)
        sums["bos"] += _doubled(first, bos)
        if encoding == "prompts":
            sums["tokens"] += int(first.lengths.sum())
            sums["beyond"] += int((first.lengths + (trainer.response_length or 0) > positions).sum())
        elif encoding == "demonstrations":
            ids, labels = columns
            begin, end = _window(ids.lengths, trainer)
            learned = ids.running(labels.values != -100)
            loss = learned[ids.starts[:-1] + end] - learned[ids.starts[:-1] + begin]
            left = loss > 0  # TRL drops the others
            sums["tokens"] += int((end - begin)[left].sum())
            sums["beyond"] += int((left & (end - begin > positions)).sum())
            # Nothing predicts the first token of a row.
            head = labels.values[np.minimum(ids.starts[:-1] + begin, max(len(labels.values) - 1, 0))] if rows else loss
            sums["loss"] += int((loss - ((head != -100) & left)).sum())
            sums["cut"] += int((left & (end - begin < ids.lengths)).sum())
            sums["dropped"] += int((~left).sum())
            whole = learned[ids.starts[1:]] - learned[ids.starts[:-1]]
            sums["without_loss"] += int((whole == 0).sum())
            count, with_eos = _replies(ids, labels, begin, end, eos)
            sums["replies"] += count
            sums["without_eos"] += count - with_eos
            sums["empty"] += int(((whole == 1) & (ids.last() == eos)).sum())
        else:
            replies = columns[-len(REPLIES[encoding]) :]
            if len(replies) == 2:
                sums["equal"] += _equal(*replies)
            if encoding == "whole_pairs":
                assert prompt_lengths is not None
                before = prompt_lengths[places]
                if spec.max_prompt_length is not None:
                    before = np.minimum(before, spec.max_prompt_length)
                left = np.maximum(*(reply.lengths for reply in replies)) <= (limit or np.inf)
            else:
                before = first.lengths
                left = before < (limit or np.inf) if not trainer.keep_end else left
            sums["dropped"] += int((~left).sum())
            cut, beyond = np.zeros(rows, bool), np.zeros(rows, bool)
            for number, reply in enumerate(replies):
                whole = reply.lengths if encoding == "whole_pairs" else before + reply.lengths
                begin, end = (np.zeros(rows, np.int64), whole) if encoding == "whole_pairs" else _window(whole, trainer)
                cut |= end - begin < whole
                beyond |= end - begin > positions
                sums["tokens"] += int((end - begin)[left].sum())
                sums["loss"] += int((end - np.maximum(begin, before))[left].sum())
                ended = (reply.last() == eos) & (end == whole)
                sums["replies"] += rows
                sums["without_eos"] += int((~ended).sum())
                if number == 0:
                    sums["empty"] += int(((whole - before <= 1) & ((reply.last() == eos) | (whole == before))).sum())
            sums["cut"] += int((cut & left).sum())
            sums["beyond"] += int((beyond & left).sum())
        fits[places] = left
    order = row_order(table)
    first_left = int((fits if order is None else fits[order]).argmax()) if len(table) else 0
    return {
        "example": _example(encoding, table[first_left], tokenizer, trainer) if len(table) else None,
        "tokens": sums["tokens"],
        "loss_tokens": sums["loss"] if encoding in ("demonstrations", "pairs", "replies") else None,
        "max_length": {"cut": sums["cut"], "left_out": sums["dropped"]},
        "replies": {
            "count": sums["replies"],
            "without_eos": sums["without_eos"],
            "empty": sums["empty"],
            "without_loss": sums["without_loss"],
        },
        "equal_pairs": sums["equal"] if encoding in ("pairs", "whole_pairs") else None,
        "bos_doubled": sums["bos"],
        "beyond_model": sums["beyond"],
    }


def _window(lengths: np.ndarray, trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
    """The part of each row that `max_length` leaves: from where, and up to where."""
    kept = lengths if trainer.max_length is None else np.minimum(lengths, trainer.max_length)
    return (lengths - kept, lengths) if trainer.keep_end else (np.zeros_like(lengths), kept)


def _replies(ids: _Lists, labels: _Lists, begin: np.ndarray, end: np.ndarray, eos: int) -> tuple[int, int]:
    """How many replies are learned in what is left of each row, at least one, and how many of them end in EOS."""
    learned, first = labels.values != -100, ids.starts[:-1]
    goes_on = np.append(learned[1:], False)
    goes_on[ids.starts[1:][ids.lengths > 0] - 1] = False  # a row's last token
    stops = np.flatnonzero(learned & ~goes_on)
    row = np.searchsorted(ids.starts, stops, side="right") - 1
    within = (stops >= (first + begin)[row]) & (stops < (first + end)[row])
    at_end = (first + end - 1)[end > begin]
    cut = learned[at_end] & goes_on[at_end]
    counts = np.bincount(row[within], minlength=len(first))
    counts[end > begin] += cut
    return int(np.maximum(counts, 1).sum()), int((ids.values[stops[within]] == eos).sum())


def _doubled(ids: _Lists, bos: int | None) -> int:
    """Rows that begin with BOS twice."""
    if bos is None:
        return 0
    starts = ids.starts[:-1][ids.lengths >= 2]
    return int(((ids.values[starts] == bos) & (ids.values[starts + 1] == bos)).sum())


def _equal(one: _Lists, other: _Lists) -> int:
    """Rows that are the same in both columns."""
    rows = np.flatnonzero(one.lengths == other.lengths)
    lengths = one.lengths[rows]
    ends = np.cumsum(lengths)
    within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    places = [np.repeat(column.starts[:-1][rows], lengths) + within for column in (one, other)]
    differ = np.concatenate([[0], np.cumsum(one.values[places[0]] != other.values[places[1]])])
    return int((differ[ends] == differ[ends - lengths]).sum())


# One example


def _example(
    encoding: Encoding, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, trainer: Trainer
) -> dict[str, Any]:
    """A row as the trainer sees it: texts, each with its tokens and which of them carry loss."""
    if encoding == "prompts":
        ids = row["input_ids"]
        stop = " or ".join(tokenizer.decode([token]) for token in trainer.stop_tokens) or None
        return {"prompt": _shown(tokenizer, ids, [False] * len(ids)), "stop_token": stop}
    if encoding == "demonstrations":
        begin, end = (int(edge[0]) for edge in _window(np.array([len(row["input_ids"])]), trainer))
        learned = [label != -100 for label in row["labels"]][begin:end]
        learned[:1] = [False] * len(learned[:1])  # nothing predicts the first token
        return {"text": _shown(tokenizer, row["input_ids"][begin:end], learned)}
    example = {}
    names = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
    if encoding == "replies":
        names = {"good" if row["label"] else "bad": "completion_ids"}
    for name, of_reply in names.items():
        ids = row[of_reply]
        if encoding != "whole_pairs":
            before = len(row["prompt_ids"])
            ids = row["prompt_ids"] + ids
            begin, end = (int(edge[0]) for edge in _window(np.array([len(ids)]), trainer))
            example[name] = _shown(tokenizer, ids[begin:end], [i >= before for i in range(begin, end)])
        else:
            example[name] = _shown(tokenizer, ids, [False] * len(ids)) | {"score_at": len(ids) - 1}
    return example


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int], loss: list[bool]) -> dict[str, Any]:
    return {"ids": ids, "tokens": pieces(tokenizer, ids), "loss": loss}


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token, special ones included; together they are the text.

    Of a character that several tokens share, the last one has it and the others are empty.
    """
    found: list[str] = []
    start = end = 0  # the tokens that are decoded together, of which those before `end` are known
    for i in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[start:i], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i < len(ids) and i - end < 4:
            found.append("")
            continue
        found.append(text[len(before) :])
        start, end = end, i
    return found
