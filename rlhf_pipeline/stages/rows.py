"""What stages that make rows share: prompts, a log of what they have made so far, and the rows as their artifact."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.callbacks.progress import Phase
from rlhf_pipeline.data.carried import carried
from rlhf_pipeline.data.encode import ROW, Ids, hash_of
from rlhf_pipeline.data.prepare import prompts_with_rows
from rlhf_pipeline.data.turns import Prompt, Row
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import durable, jsonl, strict_json
from rlhf_pipeline.rundir.layout import MADE
from rlhf_pipeline.rundir.record import ROWS
from rlhf_pipeline.stages.job import Job


class Asked(NamedTuple):
    """A prompt that a stage gives replies to.

    Attributes:
        prompt: text or turns.
        ids: its tokens.
        row: the row that it is from, as `encode.row_of` has it.
        number: how many times the same prompt came before it: then it gets other replies.
    """

    prompt: Prompt
    ids: Ids
    row: str
    number: int


def prompts_of(job: Job) -> list[Asked]:
    """The prompts of a stage's data, in their order.

    Raises:
        InputError: they cannot be read.
    """
    found, counts = [], Counter[int]()
    for row in job.reader.read(prompts_with_rows, job.stage.data).train:
        prompt = json.loads(row[ROW])["prompt"]
        key = hash_of(prompt)
        found.append(Asked(prompt, row["input_ids"], row[ROW], counts[key]))
        counts[key] += 1
    return found


class Made:
    """What a stage has made so far, one JSON object a line of `work/made.jsonl`, as `with Made(...) as made`.

    An interrupted stage resumes after the last whole line. Inside the block a request to stop waits for the end of a
    batch, so that nothing is lost; a kill loses the batch that was under way.

    Args:
        job: the stage.
        total: how many items there will be.
        doing: what is told to those who watch.

    Attributes:
        items: what is made, in order; an interrupted run's at first.
    """

    def __init__(self, job: Job, total: int, doing: Phase) -> None:
        self.job, self.total, self.doing = job, total, doing
        self.file = job.work / MADE
        lines = list(jsonl.sound_lines(self.file))
        self.items: list[dict[str, Any]] = [line.row for line in lines]
        if self.file.exists():  # what was being written when the worker died goes
            with self.file.open("rb+") as file:
                file.truncate(sum(len(line.text.encode("utf-8")) for line in lines))

    def __enter__(self) -> Self:
        REQUEST.training = True
        self.job.progress.tell(self.doing, len(self.items), self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        REQUEST.training = False
        if error is None:
            REQUEST.stop_unless_training()

    def add(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch; it is on the disk when this returns.

        Raises:
            Stopped: the stage was asked to stop, with how many items there are.
            OSError: the disk does not take it.
        """
        with self.file.open("ab") as file:
            file.write("".join(strict_json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.items += map(dict, items)
        self.job.progress.tell(self.doing, len(self.items), self.total)
        if REQUEST.noted:
            raise Stopped(len(self.items))


def with_columns(rows: Sequence[dict[str, Any]], columns: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with those other columns of their prompts' rows that change nothing of how they are read."""
    names = carried(columns, rows)
    return [row | {name: own[name] for name in names if name in own} for row, own in zip(rows, columns, strict=True)]


def publish(
    job: Job,
    rows: Sequence[Mapping[str, Any]],
    metrics: dict[str, Any],
    beside: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Write a stage's rows, and what is kept beside them, for the runner to publish.

    Args:
        job: the stage.
        rows: in the shape that later stages read.
        metrics: the final numbers; `rows` is added, how many there are.
        beside: of each further file, by its name, the objects that are its lines.

    Returns:
        The metrics.

    Raises:
        InputError: there are no rows.
    """
    if not rows:
        raise InputError(
            f"stage `{job.name}` has made no rows", place=f"stages.{job.name}", hint="its log says what became of them"
        )
    job.artifact.mkdir(parents=True, exist_ok=True)
    for name, lines in {ROWS: rows, **(beside or {})}.items():
        text = "".join(strict_json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines)
        durable.write_text(job.artifact / name, text)
    return job.trained(metrics | {"rows": len(rows)})
