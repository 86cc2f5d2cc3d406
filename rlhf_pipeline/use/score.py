"""A reward model used on its own: the scores that PPO would read, of the replies in a file."""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from rlhf_pipeline.data.encode import Ids, encode_prompts, encode_replies
from rlhf_pipeline.data.files import Located, local_files, rows_of_file
from rlhf_pipeline.data.peek import SAMPLE, column_names, renamed
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.data.shapes import SCORE, THUMB, Shape, recognise
from rlhf_pipeline.data.turns import Prompt, Record, RowError
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.roles import ScoreView
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe.schema import Data, Recipe, Source
from rlhf_pipeline.recipe.shipped import TINY
from rlhf_pipeline.rundir import jsonl, strict_json
from rlhf_pipeline.rundir.finished import model_of, warning
from rlhf_pipeline.rundir.layout import SAMPLES, RunDirectory

BATCHES_AT_ONCE = 64  # batches whose rows are read, and sorted by length, together


@dataclass
class Totals:
    """What was scored.

    Attributes:
        rows: that had something to score.
        last_row: the number of the last of them.
        unscored: replies without a score: too long for the model, or it gave no finite number.
        scores: the number of scores, and their sum.
        margins: the number of pairs with both scores, the sum of chosen less rejected, and how often that is above 0.
    """

    rows: int = 0
    last_row: int = 0
    unscored: int = 0
    scores: tuple[int, float] = (0, 0.0)
    margins: tuple[int, float, int] = (0, 0.0, 0)

    def __str__(self) -> str:
        said = f"{self.rows} rows"
        if self.scores[0]:
            said += f", mean score {self.scores[1] / self.scores[0]:.4g}"
        pairs, margin, right = self.margins
        if pairs:
            said += f"; of {pairs} pairs the mean margin is {margin / pairs:.4g} and the accuracy {right / pairs:.4g}"
        return said

    def count(self, line: dict[str, Any]) -> None:
        """Take one line of the output into account."""
        self.rows += line["row"] != self.last_row  # a ranking makes several lines
        self.last_row = line["row"]
        found = [line[name] for name in ("score", "chosen_score", "rejected_score") if name in line]
        known = [score for score in found if score is not None]
        self.unscored += len(found) - len(known)
        self.scores = self.scores[0] + len(known), self.scores[1] + sum(known)
        margin = line.get("margin")
        if margin is not None:
            pairs, total, right = self.margins
            self.margins = pairs + 1, total + margin, right + (margin > 0)


def score_file(
    run: Path, recipe: Recipe, stage: str, source: Source, out: Path | None, batch_size: int, say: Callable[[str], None]
) -> None:
    """Score all replies of a file, and say what came out.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the name of a reward stage that is done.
        source: from `source`.
        out: the file to write JSON lines to, which is there when all of them are; None for standard output.
        batch_size: how many replies are scored at once.
        say: takes lines about it.

    Raises:
        InputError: the base cannot be loaded, or the file cannot be read or lacks something.
    """
    read(source, None)  # what is wrong with the file's beginning shows before anything is loaded
    about = warning(run, stage)
    if about:
        say(about)
    scorer = Scorer(run, recipe, stage)
    rows, shape = read(source, scorer.spec.chat)
    say(f"scores of `{stage}` of {run}; {shape.says}")
    totals, shown = Totals(), 0.0
    with _written(out) as file:
        for line in scorer.lines(rows, batch_size, totals):
            file.write(strict_json.dumps(line, ensure_ascii=False) + "\n")
            if sys.stderr.isatty() and time.monotonic() > shown + 0.5:
                shown = time.monotonic()
                print(f"\r{totals.rows} rows", end="", file=sys.stderr, flush=True)
    say(("\r" if shown else "") + str(totals))
    if totals.unscored:
        limit = f" (the model takes {scorer.context} tokens)" if scorer.context else ""
        say(f"warning: {totals.unscored} replies have no score: too long{limit}, or it was no finite number")


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
    path = TINY / "data" / f"{file[5:]}.jsonl" if file.startswith("tiny:") else Path(file).expanduser().absolute()
    found = Source(path=str(path), columns=names)
    files = local_files(found)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}", place="--out")
    if out is not None and out.is_dir():
        raise InputError("this is a folder", place=f"--out {out}", hint="name a file")
    if out is not None and out.absolute() in [one.absolute() for one in files]:
        raise InputError("this is the file that is read", place=f"--out {out}", hint="name another one")
    return found


@contextlib.contextmanager
def _written(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that comes to be when all of it is written."""
    if out is None:
        yield sys.stdout
        return
    temporary = out.with_name(f"{out.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


class Scorer:
    """The reward model of a finished stage.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: the name of a reward stage that is done.

    Attributes:
        context: the most tokens that the model takes, or None where it does not say.

    Raises:
        InputError: the base cannot be loaded.
    """

    def __init__(self, run: Path, recipe: Recipe, stage: str) -> None:
        base = StagedBase(model_of(run, recipe, stage), {stage: RunDirectory(run).adapter(stage)})
        self.tokenizer = base.tokenizer
        self.view = base.reward(stage)
        self.context = context_of(base)
        # Lengths that training cut to are left out: a reply is scored as a whole.
        chat = recipe.stages[stage].data.chat
        if chat is None and isinstance(first_prompt(run, recipe, stage), list):
            chat = True
        self.spec = Data(path=stage, chat=chat)

    def lines(
        self,
        rows: Iterable[tuple[int, Located, Record]],
        batch_size: int,
        totals: Totals,
    ) -> Iterator[dict[str, Any]]:
        """What to write of each record, in order; see `read` for what `rows` is.

        Raises:
            InputError: the chat template refuses a prompt.
        """
        rows = iter(rows)
        while window := list(itertools.islice(rows, BATCHES_AT_ONCE * batch_size)):
            prompts = self._prompts(window)
            replies = [encode_replies(self.tokenizer, self.spec, list(record[1:])) for _, _, record in window]
            pairs = [(ids, reply) for ids, of_row in zip(prompts, replies, strict=True) for reply in of_row]
            scores = iter(self.scores(pairs, batch_size))
            for number, _, (prompt, *texts) in window:
                found = [next(scores) for _ in texts]
                line: dict[str, Any] = {"row": number, "prompt": prompt}
                if len(texts) == 1:
                    line |= {"completion": texts[0], "score": found[0]}
                else:
                    known = None not in found
                    line |= {"chosen": texts[0], "rejected": texts[1]}
                    line |= {"chosen_score": found[0], "rejected_score": found[1]}
                    line["margin"] = found[0] - found[1] if known else None  # type: ignore[operator]
                totals.count(line)
                yield line

    def _prompts(self, window: Sequence[tuple[int, Located, Record]]) -> list[Ids]:
        try:
            return encode_prompts(self.tokenizer, self.spec, [record[0] for _, _, record in window])
        except InputError:  # one of them, and which one it is, is not said
            for _, located, record in window:
                try:
                    encode_prompts(self.tokenizer, self.spec, [record[0]])
                except InputError as error:
                    raise _bad_row(error.message, located) from None
            raise

    def scores(self, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> list[float | None]:
        """The score of each prompt and reply; None of those that the model cannot take.

        Args:
            pairs: the tokens of each.
            batch_size: how many go through the model at once; those of like length together, equal ones once.
        """
        fits = {(tuple(prompt), tuple(reply)) for prompt, reply in pairs}
        if self.context:
            fits = {(prompt, reply) for prompt, reply in fits if len(prompt) + len(reply) <= self.context}
        ordered = sorted(fits, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        found: dict[Any, float] = {}
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            found.update(zip(batch, score_tokens(self.view, batch, self.tokenizer.pad_token_id), strict=True))
        scores = [found.get((tuple(prompt), tuple(reply)), math.nan) for prompt, reply in pairs]
        return [score if math.isfinite(score) else None for score in scores]


@torch.no_grad()
def score_tokens(
    view: ScoreView, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int
) -> list[float]:
    """The reward model's scores of prompts with replies, given as tokens, as PPO reads them: at the last token."""
    rows = [[*prompt, *reply] for prompt, reply in pairs]
    width = max(len(row) for row in rows)
    replies = torch.tensor([len(reply) for _, reply in pairs])
    episodes = Episodes(
        torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]).to(view.device),
        torch.tensor([len(prompt) for prompt, _ in pairs]).to(view.device),
        replies.to(view.device),
        ended=torch.ones(len(rows), dtype=torch.bool),  # neither of these two is looked at
        sampled_log_probs=torch.zeros(len(rows), int(replies.max())),
    )
    return reply_scores(view, episodes).tolist()


def context_of(base: StagedBase) -> int | None:
    """The most tokens that a model takes, or None where its configuration does not say."""
    return getattr(base.causal_lm.config.get_text_config(), "max_position_embeddings", None)


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
        Located(place, number, {name: value for name, value in row.items() if name not in (*SCORE, *THUMB)})
        for place, number, row in renamed(found, source)
    )
    first = list(itertools.islice(rows, SAMPLE))
    shape = _shape([one.row for one in first], chat, source.path)
    return _records(itertools.chain(first, rows), shape), shape


def _shape(rows: list[dict[str, Any]], chat: bool | None, place: str) -> Shape:
    for wanted in ("preferences", "demonstrations"):
        try:
            return recognise(rows, wanted, chat, place)
        except InputError:
            continue
    raise InputError(
        f"the columns ({', '.join(column_names(rows)) or 'none'}) hold no replies; they need a prompt with a "
        "`completion`, or with `chosen` and `rejected`, or `messages`",
        place=place,
        hint="`--columns prompt=question,completion=answer` gives your columns the names that are expected",
    )


def _records(rows: Iterator[Located], shape: Shape) -> Iterator[tuple[int, Located, Record]]:
    for number, located in enumerate(rows, 1):
        try:
            jsonl = shape.read(located.row)
        except RowError as problem:
            raise _bad_row(str(problem), located) from None
        for record in jsonl:
            yield number, located, record


def _bad_row(problem: str, located: Located) -> InputError:
    return InputError(
        problem,
        place=f"{located.place}: row {located.number}",
        hint=f"the row has {', '.join(located.row)}; `--columns expected=yours` renames",
    )
