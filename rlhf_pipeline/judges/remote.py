"""A judge behind an address. What it has answered is kept, so that nothing is asked, or paid for, twice. No torch."""

import fcntl
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.judges.address import Address, Fault, Said
from rlhf_pipeline.judges.question import LETTERS, Answer, Question, read_template, render
from rlhf_pipeline.recipe.schema import AIJudge
from rlhf_pipeline.rundir import jsonl, strict_json
from rlhf_pipeline.rundir.words import one_line

THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL)  # what a model says before it answers
# An answer that begins with the letter, as "A", "**B**", "(A)" and "B: since it …", but not "A better reply is …".
BEGINNING = re.compile(rf"\W*\b({'|'.join(LETTERS)})\b(?![ \t]*\w)")
LETTER = re.compile(rf"\b({'|'.join(LETTERS)})\b")
FIRST = Question("What is 2 + 2?", "4", "5", "Which reply is right?", {})  # of an address that nobody has asked yet


class RemoteJudge:
    """Asks a model behind an address which of two replies is better.

    The probability comes from the log-probabilities of the two letters where the server gives them, at the token that
    is the answer; else the letter alone counts.

    Args:
        spec: of the recipe; its `model` is an http(s) address.
        kept: the file that keeps the answers, also for later stages and runs in the same folder. It need not be there.
        place: the judge's key in the recipe, as `stages.feedback.judge`.

    Raises:
        InputError: the key or the template cannot be used.
    """

    def __init__(self, spec: AIJudge, kept: Path, place: str) -> None:
        self.address = Address(spec, place)
        self.template = read_template(spec.template, f"{place}.template")
        self.kept = Kept(kept)

    def check(self) -> None:
        """Ask one small question, in some hundred tokens, so that an address that cannot be used is found early.

        Raises:
            InputError: it is not answered, or the answer cannot be read.
        """
        try:
            answer, _ = self._ask(render(FIRST, self.template), patient=False)
        except Fault as fault:
            said = f"{self.address.spec.model} {fault.message}"
            raise InputError(said, place=f"{self.address.place}.model", hint=fault.hint) from None
        if answer.first is None:
            said = f"was asked for {LETTERS[0]} or {LETTERS[1]}, and answers `{one_line(answer.text)[:200]}`"
            raise InputError(
                f"{self.address.spec.model} {said}",
                place=f"{self.address.place}.model",
                hint="name another model under `served_model`, or write a `template` that it follows",
            )

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in the order of the questions; at most `concurrency` are asked at once.

        Of a question that the server refuses, as one that is too long, the answer cannot be read.

        Raises:
            RunError: the address does not answer; what it has answered until then is kept.
        """
        self.address.giving_up.clear()
        texts = [render(question, self.template) for question in questions]
        keys = [self._key(text) for text in texts]
        found = {key: self.kept.answers[key] for key in keys if key in self.kept.answers}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        with ThreadPoolExecutor(self.address.spec.concurrency) as pool:
            asked = {pool.submit(self._answer, key, text): key for key, text in missing.items()}
            try:
                for one in as_completed(asked):
                    answer = one.result()
                    if answer is not None:
                        found[asked[one]] = answer
            except BaseException:  # also where the process is asked to stop
                self.address.giving_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[key] for key in keys]

    def _answer(self, key: str, text: str) -> Answer | None:
        """The answer, which is kept; None where another question has failed meanwhile, and nothing more is asked."""
        if self.address.giving_up.is_set():
            return None
        try:
            answer, refused = self._ask(text)
        except Fault as fault:
            self.address.giving_up.set()
            hint = f"{fault.hint}; what it has answered is kept"
            raise RunError(
                f"{self.address.place}.model: {self.address.spec.model} {fault.message}", hint=hint
            ) from None
        if not refused:
            self.kept.add(key, answer)
        return answer

    def _ask(self, text: str, patient: bool = True) -> tuple[Answer, bool]:
        """The answer to a question, and whether the server refused that question, though it has answered others."""
        try:
            said = self.address.ask(text, patient)
            if said.is_cut and read(said) is None:  # it thinks before it answers, or says more than it is asked for
                self.address.give_room()
                said = self.address.ask(text, patient)
        except Fault as fault:
            if fault.kind == "refused" and self.address.has_answered:
                return Answer(None, f"{self.address.spec.model} {fault.message}"), True
            raise
        return Answer(read(said), said.text), False

    def _key(self, text: str) -> str:
        """What an answer is kept under: who was asked what. The settings are the same, but for those refused."""
        asked = [self.address.url, self.address.spec.served_model, text]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def read(said: Said) -> float | None:
    """The probability that the first reply is better, by an answer; None where it says neither letter, or both."""
    thought = THOUGHT.match(said.text)
    start = thought.end() if thought else 0
    letter = BEGINNING.match(said.text, start)
    if letter is None:
        letters = [*LETTER.finditer(said.text, start)]
        if len({one[1] for one in letters}) != 1:
            return None
        letter = letters[0]
    return _probability(said, letter.start(1)) if said.tokens else float(letter[1] == LETTERS[0])


def _probability(said: Said, place: int) -> float:
    """Of the first letter, by the log-probabilities at the token in which a character of the answer is.

    A letter that is not among the likeliest tokens there has none of the probability.
    """
    is_first = said.text[place] == LETTERS[0]
    end = 0
    for token, likeliest in said.tokens:
        end += len(token)
        if end > place:
            share = dict.fromkeys(LETTERS, 0.0)
            for other, logprob in likeliest.items():
                bare = re.sub(r"\W", "", other)
                if bare in share:
                    share[bare] += math.exp(logprob)
            both = sum(share.values())
            return share[LETTERS[0]] / both if both else float(is_first)
    return float(is_first)


class Kept:
    """Answers in a file, one a line, that may be read and added to by several threads and processes.

    Args:
        file: it need not be there.

    Attributes:
        answers: what is in it, by its key.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.answers = {
            str(row["key"]): Answer(row["first"], str(row["text"])) for row in jsonl.rows(file) if _whole(row)
        }

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; when this returns, it is on disk.

        Raises:
            OSError: it cannot be written.
        """
        line = strict_json.dumps({"key": key, "first": answer.first, "text": answer.text}, ensure_ascii=False) + "\n"
        with self.lock:
            self.answers[key] = answer
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as lines:
                fcntl.flock(lines, fcntl.LOCK_EX)
                torn = (
                    lines.tell() and os.pread(lines.fileno(), 1, lines.tell() - 1) != b"\n"
                )  # a kill came before its end
                lines.write(b"\n" * bool(torn) + line.encode("utf-8", "replace"))
                lines.flush()
                os.fsync(lines.fileno())


def _whole(row: dict[str, Any]) -> bool:
    of_texts = isinstance(row.get("key"), str) and isinstance(row.get("text"), str)
    return of_texts and "first" in row and isinstance(row["first"], int | float | None)
