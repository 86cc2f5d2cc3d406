"""What people are shown: the items of a label stage, the replies of a finished run, or the rows of a file. No torch."""

import itertools
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline import kinds
from rlhf_pipeline.data.files import local_files, rows_of_file
from rlhf_pipeline.data.peek import SAMPLE, renamed
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.data.turns import RowError
from rlhf_pipeline.errors import ColumnsError, InputError, RunError
from rlhf_pipeline.recipe.rows import DIMENSIONS
from rlhf_pipeline.recipe.schema import BASE, Recipe, Source
from rlhf_pipeline.run import runner
from rlhf_pipeline.rundir import items as files
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.choices import Target
from rlhf_pipeline.rundir.items import FEATURES, ITEMS, Item, Prompt, Reply, item
from rlhf_pipeline.rundir.layout import COMPARISON, RunDirectory, read_json
from rlhf_pipeline.rundir.record import ROWS

ARENA = "arena"  # the name under which labels of a finished run, or of a file, are kept
NEEDED = (
    "a row needs a prompt and two `replies` or more, or `chosen` and `rejected`; `--columns "
    "prompt=YOURS,replies=YOURS` says what yours are called, and a stage of kind `sample` makes several replies to a "
    "prompt"
)
READ = ".arena"  # the folder in a run directory with what was read of its replies


class Setup(NamedTuple):
    """What people are asked about, and for what.

    Attributes:
        title: what the page is headed with.
        stage: the name under which the labels are kept.
        items: two or more replies each.
        mode: whether a stage waits for the labels, or somebody only looks.
        dimensions: in which replies may be compared, beside overall.
        target: when there are labels enough; None where nobody waits for them.
        features: float32 `[replies in the order of items, d]`; None where nothing can learn.
        command: what to type when the target is reached; None where there is nothing.
        people: whose labels count, as the recipe's `people` has it.
    """

    title: str
    stage: str
    items: Sequence[Item]
    mode: Literal["label", "arena"] = "label"
    dimensions: Sequence[str] = DIMENSIONS
    target: Target | None = None
    features: NDArray[np.float32] | None = None
    command: str | None = None
    people: dict[str, Any] | None = None


def of_stage(run: Path, recipe: Recipe, stage: str | None) -> Setup:
    """What a label stage asks.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: which; None for the one that waits, else the last one that was done.

    Raises:
        InputError: there is none, or there is nothing to label yet.
    """
    names = [name for name, one in recipe.stages.items() if one.facts.by_people]
    if stage is not None and stage not in names:
        what = (
            f"`{stage}` is a {recipe.stages[stage].kind} stage" if stage in recipe.stages else f"there is no `{stage}`"
        )
        raise InputError(what, place=str(run), hint=f"stages that people label: {', '.join(names) or 'none'}")
    if not names:
        hint = f"`rlhf-pipeline arena {shlex.quote(str(run))}` shows replies of any finished run"
        raise InputError("no stage of this run is labelled by people", place=str(run), hint=hint)
    found = {name: folder for name in names if (folder := _folder(run, name))}
    waiting = [one.name for one in state.read(run, by_size=True).stages if one.name in found and one.state == "waiting"]
    waiting += [name for name, folder in found.items() if folder == RunDirectory(run).work(name)]
    chosen = stage or next(iter(waiting), None) or next(reversed(found), names[0])
    if chosen not in found:
        raise InputError(
            f"stage `{chosen}` has nothing to label yet",
            place=str(run),
            hint=f"`rlhf-pipeline run {shlex.quote(str(run))}` goes as far as that",
        )
    asked, wanted = files.read(found[chosen] / ITEMS), recipe.stages[chosen]
    return Setup(
        recipe.name,
        chosen,
        asked,
        dimensions=DIMENSIONS if wanted.dimensions is None else wanted.dimensions,
        target=Target(**wanted.until.says) if wanted.until else Target(per_item=1),
        features=_features(found[chosen], asked),
        command=f"rlhf-pipeline run {shlex.quote(str(run))}",
        people=wanted.people.says if wanted.people else None,
    )


def of_run(run: Path, recipe: Recipe) -> Setup:
    """What a finished run has to look at: the items of a label stage, else the replies of a sample stage, else the
    replies of all policies to the same prompts, as `comparison.json` has them.

    Raises:
        InputError: it has none of these, or one cannot be read.
    """
    for name in reversed([name for name, one in recipe.stages.items() if one.facts.by_people]):
        folder = _folder(run, name)
        if folder:
            asked = files.read(folder / ITEMS)
            return Setup(recipe.name, ARENA, asked, "arena", features=_features(folder, asked))
    for name in reversed([name for name, one in recipe.stages.items() if "n" in one.facts.takes]):
        rows = RunDirectory(run).stage(name) / ROWS
        if rows.is_file():
            return Setup(recipe.name, ARENA, of_rows(str(rows)), "arena")
    comparison = read_json(run / COMPARISON) or {}
    asked = list(_of_comparison(comparison.get("rows") or ()))
    if not asked:
        raise InputError(
            "this run has no prompt with two replies that differ",
            place=str(run),
            hint="a sample stage makes some, and so does `evaluate` with two policies",
        )
    return Setup(recipe.name, ARENA, asked, "arena")


def with_features(setup: Setup, run: Path, recipe: Recipe, say: Callable[[str], None]) -> Setup:
    """The same with features, which a worker reads once and leaves in the run directory; without where it cannot.

    They are of the run's last reward stage, else of its last policy: what such a model has learned to tell apart, a
    head over its states learns from few labels.

    Raises:
        Interrupted: it was stopped.
    """
    folder, model = run / READ, _reader(run)
    try:
        known = (folder / FEATURES).is_file() and files.read(folder / ITEMS) == list(setup.items)
        if not known:
            say(f"reading the replies with `{model}`, so that a reward can learn along; the next time they are known")
            folder.mkdir(exist_ok=True)
            (folder / FEATURES).unlink(missing_ok=True)
            files.write(folder / ITEMS, setup.items)
            runner.read_features(recipe, model, folder / ITEMS, folder)
        return setup._replace(features=_features(folder, setup.items))
    except (InputError, RunError) as error:
        why = error.message.splitlines()[0]
    except OSError as error:  # of the run directory, which may be read-only
        why = f"{folder} cannot be written: {error.strerror}"
    say(f"note: nothing learns along, since the replies cannot be read: {why}")
    return setup


def _reader(run: Path) -> str:
    """The stage whose model reads the replies of a finished run, or `base`."""
    done = [stage for stage in state.read(run, by_size=True).stages if stage.is_current]
    for makes in ("reward", "policy"):
        for stage in reversed(done):
            kind = kinds.find(stage.kind)
            if kind and kind.makes == makes:
                return stage.name
    return BASE


def of_file(file: str, columns: dict[str, str]) -> Setup:
    """What rows from anywhere ask: prompts with several replies, or preferences, in any shape that recipes read.

    Raises:
        InputError: they cannot be read, or no row has two replies that differ.
    """
    if not Path(file).is_file():
        said = "this is a folder" if Path(file).is_dir() else "there is no such file"
        raise InputError(said, place=f"--data {file}", hint="name one file with rows: .jsonl, .json, .csv or .parquet")
    try:
        asked = of_rows(file, columns)
    except ColumnsError as error:  # its hint is for recipes
        raise InputError(error.message, place=error.place, hint=NEEDED) from None
    return Setup(Path(file).name, ARENA, asked, "arena")


def of_rows(file: str, columns: dict[str, str] | None = None) -> list[Item]:
    """The items of a file with rows of prompts and replies; what has no two replies that differ is left out.

    Raises:
        InputError: they cannot be read, or nothing is left.
    """
    source = Source(path=file, columns=columns or {})
    found: dict[str, Item] = {}
    paths = local_files(source)
    rows = itertools.chain.from_iterable(renamed(rows_of_file(path), source) for path in paths)
    first = list(itertools.islice(rows, SAMPLE))
    shape = recognise((one.row for one in first), "candidates", None, file, source.columns)
    for located in itertools.chain(first, rows):
        try:
            records = shape.read(located.row)
        except RowError as problem:
            raise InputError(str(problem), place=f"{located.place}: row {located.number}", hint=NEEDED) from None
        for one in _made(records):
            found.setdefault(one.key, one)
    if not found:
        raise InputError("no row has two replies that differ", place=file, hint=NEEDED)
    return list(found.values())


def _made(records: Iterable[tuple[Any, ...]]) -> Iterable[Item]:
    for prompt, replies in records:
        made = _item(prompt, replies)
        if made:
            yield made


def _of_comparison(rows: Iterable[Any]) -> Iterable[Item]:
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("replies"), dict):
            continue
        texts = [one["text"] for one in row["replies"].values() if isinstance(one, dict) and one.get("text")]
        made = _item(row.get("prompt", ""), texts)
        if made:
            yield made


def _item(prompt: Prompt, replies: Sequence[Reply]) -> Item | None:
    try:
        return item(prompt, replies)
    except ValueError:
        return None


def _folder(run: Path, stage: str) -> Path | None:
    """The folder with the items of a label stage: of one that waits its `work/`."""
    directory = RunDirectory(run)
    folders = (directory.work(stage), directory.stage(stage))
    return next((folder for folder in folders if (folder / ITEMS).is_file()), None)


def _features(folder: Path, asked: Sequence[Item]) -> NDArray[np.float32] | None:
    """The features beside a stage's items; None where there are none.

    Raises:
        InputError: they are of something else, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = folder / FEATURES
    if not file.is_file():
        return None
    try:
        found = load_file(file)["features"].astype(np.float32, copy=False)
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise InputError(f"the features cannot be read: {error}", place=str(file)) from None
    replies = sum(len(one.replies) for one in asked)
    if found.ndim != 2 or len(found) != replies or not np.isfinite(found).all():
        raise InputError(f"these are not finite features of the {replies} replies in {ITEMS}", place=str(file))
    return found
