"""A reward model used on its own: the scores that PPO would read, of the replies in a file."""

import contextlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from rlhf_pipeline.data.encode import Ids, encode_records
from rlhf_pipeline.data.files import Located, local_files, rows_of_file
from rlhf_pipeline.data.marks import SCORE, THUMB
from rlhf_pipeline.data.peek import SAMPLE, column_names, renamed
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.shapes import Shape, recognise
from rlhf_pipeline.data.turns import Prompt, Record, RowError
from rlhf_pipeline.errors import ColumnsError, InputError, Interrupted
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.local import expanded
from rlhf_pipeline.models import attention
from rlhf_pipeline.models.roles import ScoreView
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.forward import disagreement, member_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe.schema import Data, Recipe, Source
from rlhf_pipeline.recipe.shipped import TINY
from rlhf_pipeline.rundir import jsonl, strict_json
from rlhf_pipeline.rundir.finished import model_of, warning
from rlhf_pipeline.rundir.layout import SAMPLES, RunDirectory
from rlhf_pipeline.rundir.record import Record as StageRecord
from rlhf_pipeline.rundir.words import duration
from rlhf_pipeline.use.part import Part
from rlhf_pipeline.use.totals import Totals
from rlhf_pipeline.use.trained_on import Knows, trained_on

BATCHES_AT_ONCE = 64  # batches whose rows are read, sorted by length, and written together
PLAIN_EVERY_S = 30.0  # between lines about progress where there is no terminal


def score_file(
    run: Path, recipe: Recipe, stage: str, source: Source, out: Path | None, batch_size: int, say: Callable[[str], None]
) -> None:
    """Score all replies of a file, and say what came out.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the name of a reward stage that is done.
        source: from `source`.
        out: the file to write JSON lines to, which is there when all of them are; until then they are in `OUT.part`,
            and the same call goes on from there. None for standard output.
        batch_size: how many replies are scored at once.
        say: takes lines about it.

    Raises:
        InputError: the base cannot be loaded, or the file cannot be read or lacks something.
        Interrupted: by Ctrl-C; the same call goes on.
    """
    chat = chat_of(run, recipe, stage)
    rows, shape = read(source, chat)
    lengths = Counter(len(record) for _, _, record in rows)  # all are looked at before anything is loaded
    total = lengths.total()
    about = warning(run, stage)
    if about:
        say(about)
    scorer, at_once = Scorer(run, recipe, stage, chat), BATCHES_AT_ONCE * batch_size
    if scorer.instead:
        say(f"note: {scorer.instead}")
    say(f"scores of `{stage}` of {run}; {shape.says}")
    knows: Knows | None = None
    if 3 in lengths:
        told = trained_on(run, recipe, stage, scorer.tokenizer)
        knows = None if isinstance(told, str) else told
        if isinstance(told, str):
            say(f"note: nobody knows which of these pairs `{stage}` was trained on: {told}")
    part = Part(out, _made_of(run, stage, source, chat), at_once, say) if out else None
    totals, kept = Totals(), part.kept if part else 0
    try:
        for line in part.lines() if part else ():
            totals.count(line)
        if kept:
            say(f"{kept} of {total} lines are in {part.path if part else out} already")
        left = itertools.islice(read(source, chat)[0], kept, None)
        with progress(kept, total, say) as tell:
            for lines in scorer.lines(left, batch_size, knows, tell):
                for line in lines:
                    totals.count(line)
                if part:
                    part.add(lines)
                else:
                    sys.stdout.write("".join(strict_json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                    sys.stdout.flush()
    except KeyboardInterrupt:
        if part is None:
            raise
        part.close(keep=True)
        raise Interrupted(f"stopped; the scores so far are in {part.path}") from None
    except InputError:  # of a row: with another file, other scores are needed
        if part:
            part.close(keep=False)
        raise
    if part:
        part.finish()
    say(str(totals))
    if totals.unscored:
        limit = f" (the model takes {scorer.context} tokens)" if scorer.context else ""
        say(f"warning: {totals.unscored} replies have no score: too long{limit}, or it was no finite number")


def _made_of(run: Path, stage: str, source: Source, chat: bool | None) -> dict[str, Any]:
    """What decides the scores of a file."""
    record = RunDirectory(run).record(stage) or StageRecord()
    return {
        "stage": stage,
        "weights": record.weights,
        "model": record.inputs.get("model"),
        "rows": Digests().of_source(source),
        "columns": source.columns,
        "chat": chat,
    }


@contextlib.contextmanager
def progress(done: int, total: int, say: Callable[[str], None]) -> Iterator[Callable[[float], None]]:
    """Show how far it is: as a bar on a terminal, else as a line now and then.

    Args:
        done: how many lines there are already.
        total: how many there will be.
        say: takes a line.

    Yields:
        What takes how many lines have come since.
    """
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("scoring", total=total, completed=done)
            yield lambda come: bar.update(task, completed=done + int(come))
        return
    began, due = time.monotonic(), time.monotonic() + PLAIN_EVERY_S

    def tell(come: float) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due and come:
            due = now + PLAIN_EVERY_S
            left = duration((total - done - come) * (now - began) / come)
            say(f"scored {done + int(come):,} of {total:,} lines, {left} left")

    yield tell


def source(file: str, columns: str | None, out: Path | None) -> Source:
    """What is to be read.

    Args:
        file: a file, folder or glob, or `tiny:NAME`.
        columns: `expected=theirs`, several with commas between them.
        out: the file that will be written.

    Raises:
        InputError: there is no such file, or `columns` is not of that form, or `out` cannot be written.
    """
    names = dict(pair.split("=", 1) for pair in columns.split(",") if "=" in pair) if columns else {}
    if columns and (len(names) != columns.count(",") + 1 or not all([*names, *names.values()])):
        raise InputError(
            f"`{columns}` names no columns", place="--columns", hint="it is expected=yours, as prompt=question"
        )
    path = TINY / "data" / f"{file[5:]}.jsonl" if file.startswith("tiny:") else expanded(file).absolute()
    found = Source(path=str(path), columns=names)
    files = local_files(found)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}", place="--out")
    if out is not None and out.is_dir():
        raise InputError("this is a folder", place=f"--out {out}", hint="name a file")
    if out is not None and out.absolute() in [one.absolute() for one in files]:
        raise InputError("this is the file that is read", place=f"--out {out}", hint="name another one")
    return found


class Scorer:
    """The reward model of a finished stage.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the name of a reward stage that is done.
        chat: from `chat_of`.

    Attributes:
        context: the most tokens that the model takes, or None where it does not say.
        instead: what to say of another attention than the recipe's; None where it is that.

    Raises:
        InputError: the base cannot be loaded.
    """

    def __init__(self, run: Path, recipe: Recipe, stage: str, chat: bool | None) -> None:
        spec, self.instead = attention.available(model_of(run, recipe, stage))
        base = StagedBase(spec, {stage: RunDirectory(run).adapter(stage)})
        self.tokenizer = base.tokenizer
        self.members = base.reward(stage)
        self.context = context_of(base)
        # Lengths that training cut to are left out: a reply is scored as a whole.
        self.spec = Data(path=stage, chat=chat)

    def lines(
        self,
        rows: Iterable[tuple[int, Located, Record]],
        batch_size: int,
        knows: Knows | None,
        tell: Callable[[float], None],
    ) -> Iterator[list[dict[str, Any]]]:
        """What to write of each record, in order, `BATCHES_AT_ONCE * batch_size` of them together.

        Args:
            rows: see `read`.
            batch_size: how many replies are scored at once.
            knows: tells which pairs the model was trained on; None where that cannot be known.
            tell: takes how many records are done.

        Raises:
            InputError: the chat template refuses a prompt.
        """
        rows, done = iter(rows), 0
        while window := list(itertools.islice(rows, BATCHES_AT_ONCE * batch_size)):
            pairs = [(prompt, reply) for prompt, *replies in self._tokens(window) for reply in replies]
            so_far, size = done, len(window)
            scores = iter(self.scores(pairs, batch_size, lambda share: tell(so_far + share * size)))  # noqa: B023
            lines = []
            for number, _, (prompt, *texts) in window:
                line: dict[str, Any] = {"row": number, "prompt": prompt}
                if len(texts) == 1:
                    line |= {"completion": texts[0]} | self._named("score", next(scores))
                else:
                    chosen, rejected = (next(scores) for _ in texts)
                    line |= {"chosen": texts[0], "rejected": texts[1]}
                    line |= self._named("chosen_score", chosen) | self._named("rejected_score", rejected)
                    line["margin"] = chosen.mean - rejected.mean if chosen and rejected else None
                    if knows:
                        line["trained_on"] = knows(prompt, texts[0], texts[1])
                lines.append(line)
            done += size
            yield lines

    def _named(self, name: str, score: "Score | None") -> dict[str, float | None]:
        """What a line has of a reply's score; of an ensemble also how far the members disagree."""
        found = {name: score.mean if score else None}
        return found | ({f"{name}_std": score.std if score else None} if len(self.members) > 1 else {})

    def _tokens(self, window: Sequence[tuple[int, Located, Record]]) -> list[list[Ids]]:
        try:
            return encode_records(self.tokenizer, self.spec, [record for _, _, record in window])
        except InputError:  # one of them, and which one it is, is not said
            for _, located, record in window:
                try:
                    encode_records(self.tokenizer, self.spec, [record])
                except InputError as error:
                    raise _bad_row(error.message, located) from None
            raise

    def scores(
        self, pairs: Sequence[tuple[Ids, Ids]], batch_size: int, tell: Callable[[float], None]
    ) -> "list[Score | None]":
        """The score of each prompt and reply; None of those that the model cannot take, or gives no finite number.

        Args:
            pairs: the tokens of each.
            batch_size: how many go through the model at once; those of like length together, equal ones once.
            tell: takes the share that is done.
        """
        fits = {(tuple(prompt), tuple(reply)) for prompt, reply in pairs}
        if self.context:
            fits = {(prompt, reply) for prompt, reply in fits if len(prompt) + len(reply) <= self.context}
        ordered = sorted(fits, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        found: dict[Any, Score] = {}
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            scores = score_tokens(self.members, batch, self.tokenizer.pad_token_id)
            found.update(zip(batch, scores_of(scores), strict=True))
            tell(len(found) / len(ordered))
        listed = [found.get((tuple(prompt), tuple(reply))) for prompt, reply in pairs]
        return [score if score and math.isfinite(score.mean) else None for score in listed]


@torch.no_grad()
def score_tokens(
    members: Sequence[ScoreView], pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int
) -> torch.Tensor:
    """A reward model's scores of prompts with replies, given as tokens, as PPO reads them: at the last token.

    Args:
        members: from `StagedBase.reward`.
        pairs: the tokens of n prompts and replies.
        pad_token_id: the tokenizer's.

    Returns:
        Float32 `[members, n]`.
    """
    rows, device = [[*prompt, *reply] for prompt, reply in pairs], members[0].device
    width = max(len(row) for row in rows)
    replies = torch.tensor([len(reply) for _, reply in pairs])
    episodes = Episodes(
        torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]).to(device),
        torch.tensor([len(prompt) for prompt, _ in pairs]).to(device),
        replies.to(device),
        ended=torch.ones(len(rows), dtype=torch.bool),  # neither of these two is looked at
        sampled_log_probs=torch.zeros(len(rows), int(replies.max())),
    )
    return member_scores(members, episodes)


class Score(NamedTuple):
    """What a reward model says of a reply.

    Attributes:
        mean: of its members' scores; where there is one, that.
        std: their standard deviation, with their number below; 0 where there is one.
    """

    mean: float
    std: float


def scores_of(members: torch.Tensor) -> list[Score]:
    """The scores of n replies by those of all members, `[members, n]`."""
    return [Score(*both) for both in zip(members.mean(0).tolist(), disagreement(members).tolist(), strict=True)]


def context_of(base: StagedBase) -> int | None:
    """The most tokens that a model takes, or None where its configuration does not say."""
    return getattr(base.causal_lm.config.get_text_config(), "max_position_embeddings", None)


def chat_of(run: Path, recipe: Recipe, stage: str) -> bool | None:
    """Whether text under `prompt` is a user's turn, as it was for a stage; None where the rows tell."""
    chat = recipe.stages[stage].data.chat
    return True if chat is None and isinstance(first_prompt(run, recipe, stage), list) else chat


def first_prompt(run: Path, recipe: Recipe, stage: str) -> Prompt | None:
    """The first prompt that a stage was trained on, which shows how they are made; None where nothing tells.

    Where the data are gone, as a run may have come here without them, it is the last one that the stage was judged on.
    """
    try:
        return first_prompts(recipe.stages[stage].data, 1)[0][0]
    except InputError:
        judged = [row for row in jsonl.rows(run / stage / SAMPLES) if "judge" in row]
        return judged[-1]["prompt"] if judged else None


# Reading


def read(source: Source, chat: bool | None) -> tuple[Iterator[tuple[int, Located, Record]], Shape]:
    """The prompts and replies of a file, folder or glob, one after the other, and how they are read.

    Rows with a score or a label beside one reply are read as that reply; a ranking as every pair of it.

    Args:
        source: an absolute path, and the names of its columns.
        chat: the recipe's `data.chat`.

    Returns:
        The row's number over all files, from 1; the row; and (prompt, reply) or (prompt, chosen, rejected).

    Raises:
        InputError: nothing can be read, or these are no replies to prompts; from the iterator, of a row.
    """
    found = itertools.chain.from_iterable(rows_of_file(file) for file in local_files(source))
    rows = (
        Located(place, number, {name: value for name, value in row.items() if not _is_mark(name, value)})
        for place, number, row in renamed(found, source)
    )
    first = list(itertools.islice(rows, SAMPLE))
    shape = _shape([one.row for one in first], chat, source.path)
    return _records(itertools.chain(first, rows), shape), shape


def _is_mark(name: str, value: Any) -> bool:
    """Whether a column says how good one reply is; a list gives the order of several."""
    return name in (*SCORE, *THUMB) and not isinstance(value, list)


def _shape(rows: list[dict[str, Any]], chat: bool | None, place: str) -> Shape:
    for wanted in ("preferences", "demonstrations"):
        try:
            return recognise(rows, wanted, chat, place)
        except ColumnsError as error:
            if error.ways:
                ways = [
                    f"`--columns {','.join(f'{expected}={theirs}' for expected, theirs in found.items())}` {does}"
                    for found, does in error.ways
                ]
                raise InputError(error.message, place=place, hint="; ".join(ways)) from None
    raise InputError(
        f"the columns ({', '.join(column_names(rows)) or 'none'}) hold no replies; they need a prompt with a "
        "`completion`, or with `chosen` and `rejected`, or `messages`",
        place=place,
        hint="`--columns prompt=question,completion=answer` gives your columns the names that are expected",
    )


def _records(rows: Iterator[Located], shape: Shape) -> Iterator[tuple[int, Located, Record]]:
    for number, located in enumerate(rows, 1):
        try:
            records = shape.read(located.row)
        except RowError as problem:
            raise _bad_row(str(problem), located) from None
        for record in records:
            yield number, located, record


def _bad_row(problem: str, located: Located) -> InputError:
    return InputError(
        problem,
        place=f"{located.place}: row {located.number}",
        hint=f"the row has {', '.join(located.row)}; `--columns expected=yours` renames",
    )
