"""A recipe proved without a GPU: its stages on a tiny checkpoint and a few rows, in a temporary directory. No torch.

`cut` changes the recipe; all else is as in a run.
"""

import contextlib
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_pipeline import local, plan
from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.errors import InputError, InputErrors, RunError, Waiting
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import runner
from rlhf_pipeline.rundir import items, jsonl
from rlhf_pipeline.rundir.headline import headline, series
from rlhf_pipeline.rundir.items import ITEMS
from rlhf_pipeline.rundir.labels import LABELS, Choice, Label, Labels, Pair
from rlhf_pipeline.rundir.layout import METRICS, RunDirectory
from rlhf_pipeline.rundir.words import duration
from rlhf_pipeline.smoke.cut import ROWS, cut_recipe

Say = Callable[[str], None]
WARNING = "warning: "


@dataclass
class Smoked:
    """What became of one stage.

    Attributes:
        state: `ok`, `failed` or `not run`.
        seconds: how long it took, if it ran.
        metric: the name of the number that is shown.
        first: that number at the first step; None where there is none.
        last: the same at the last step.
        error: what happened, if it failed.
    """

    name: str
    kind: str
    state: str = "not run"
    seconds: float | None = None
    metric: str = "loss"
    first: float | None = None
    last: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.name:<7}", self.state]
        if self.seconds is not None:
            parts.append(duration(self.seconds))
        if self.state == "ok" and self.first is not None and self.last is not None:
            parts.append(f"{self.metric} {self.first:.4g} → {self.last:.4g}")
        return "  ".join([*parts, *([self.error] if self.error else [])])


@dataclass
class Report:
    """What a smoke found.

    Attributes:
        stages: those of the recipe, in its order.
        notes: what was not tested, or stood in for something else.
        warnings: what may be wrong with the first rows of the data, as `validate` says it of all.
        seconds: how long all of it took.
        failure: the whole message of what failed.
        hint: what to do about it.
    """

    stages: list[Smoked]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str | None = None
    hint: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every stage went through."""
        return self.failure is None

    def as_json(self) -> dict[str, Any]:
        """The report as `smoke --json` prints it."""
        return {"ok": self.ok, **asdict(self)}


def smoke(recipe: Recipe, *, tokenizer: str | None = None, keep: Path | None = None, say: Say = print) -> Report:
    """Run every stage of a recipe for two steps on a tiny checkpoint of its model's architecture.

    Args:
        recipe: from `recipe.load`; it is not changed.
        tokenizer: a folder or hub id with the tokenizer to use instead of the model's own.
        keep: a new or empty folder to work in, which stays; by default a temporary one, which does not.
        say: takes one line at a time, about what is going on.

    Raises:
        InputError: something is wrong with the recipe, its model or the first rows of its data.
        Interrupted: it was asked to stop, and has.
    """
    began = time.perf_counter()
    plan.shapes(recipe)  # what the first rows show needs no model
    with _folder(keep) as folder, _environment(folder):
        cut, uncut, origins, notes = cut_recipe(recipe, folder, tokenizer)
        for note in notes:
            say(f"note: {note}")
        report = Report([Smoked(name, stage.kind) for name, stage in recipe.stages.items()], notes)

        def pass_on(line: str) -> None:
            if "gates ignored" in line or _of_few_rows(line, uncut):
                return
            if line.startswith(WARNING):
                line = _replaced(line, origins)
                report.warnings.append(line.removeprefix(WARNING))
            say(line)

        try:
            _run(cut, uncut, pass_on)
        except InputError as error:
            raise _in_their_words(error, origins) from None
        except RunError as error:
            lines = error.message.splitlines()
            kept = [line for line in lines if keep or not line.startswith("  the whole log: ")]
            report.failure = _replaced("\n".join(kept), origins)
            report.hint = None if keep else "`--keep FOLDER` keeps the whole log, and all else that it made"
        for stage in report.stages:
            _see(stage, RunDirectory(cut.run), origins)
    report.seconds = round(time.perf_counter() - began, 1)
    return report


def _run(cut: Recipe, uncut: Recipe, say: Say) -> None:
    """Run all stages, with choices that are drawn wherever people would be asked."""
    asks = [name for name, stage in cut.stages.items() if stage.facts.by_people]
    while True:
        try:
            runner.run(cut, ignore_gates=True, reuse=False, compare=False, also_check=uncut, say=say)
            return
        except Waiting:
            _choose(RunDirectory(cut.run), asks.pop(0))


def _choose(directory: RunDirectory, stage: str) -> None:
    """Label every pair of a stage that waits for people."""
    draw = random.Random(0)
    with Labels(directory.path / LABELS) as labels:
        for item in items.read(directory.work(stage) / ITEMS):
            for first, second in item.pairs:
                pair = Pair.of(item.key, item.prompt, item.replies[first], item.replies[second])
                choice: Choice = draw.choice(("first", "second"))
                labels.add(Label(f"{stage}-{pair.key}", pair.key, stage, "nobody", choice), pair)


def _of_few_rows(line: str, uncut: Recipe) -> bool:
    """Whether a line warns of too few rows, where there are more of which only the first ones were taken."""
    found = re.match(rf"{WARNING}stages\.([\w-]+)\.(data|ptx_data): \d+ rows are fewer than one batch", line)
    if found is None:
        return False
    data = getattr(uncut.stages[found[1]], found[2])
    return any(len(first_rows(source, ROWS) or ()) == ROWS for source in data.sources)


def _see(stage: Smoked, directory: RunDirectory, origins: dict[str, str]) -> None:
    """Fill in what a run directory says of a stage."""
    record = directory.record(stage.name)
    if record is None or record.state == "running":
        return
    stage.state = "ok" if record.state == "done" else "failed"
    stage.seconds = round(record.wall_s or 0.0, 1)
    if record.error:
        said = record.error.removeprefix(f"stage `{stage.name}` failed: ")
        stage.error = _replaced(said, origins)
    logged = series(stage.kind, jsonl.rows(directory.stage(stage.name) / METRICS))
    numbers = headline(stage.kind, record.metrics, logged)
    for number in [number for number in numbers if number.before is not None][:1]:
        stage.metric, stage.first, stage.last = number.name, number.before, number.after


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where a smoke may write; what it finds there on an end by SIGTERM is removed too.

    Raises:
        InputError: the folder to keep holds something already.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise InputError(f"{keep} exists already", place="--keep", hint="name a new or an empty folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="rlhf-smoke-") as folder:
            yield Path(folder).resolve()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Have our processes use no GPU, which others may need, and keep what they remember in the smoke's folder."""
    own = {
        "HF_HOME": os.environ.get("HF_HOME") or str(local.caches() / "huggingface"),  # else, in the next one
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # so little work is only slower on several
    }
    before = {name: os.environ.get(name) for name in (*own, "HF_DATASETS_CACHE")}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _in_their_words(error: InputError, origins: dict[str, str]) -> InputError:
    """An error in which the paths of replacements are again those of the recipe."""
    ours = [
        InputError(
            _replaced(one.message, origins),
            place=one.place and _replaced(one.place, origins),
            hint=one.hint and _replaced(one.hint, origins),
        )
        for one in error.all
    ]
    return ours[0] if len(ours) == 1 else InputErrors(ours)


def _replaced(text: str, origins: dict[str, str]) -> str:
    for ours, theirs in origins.items():
        text = text.replace(ours, theirs)
    return text
