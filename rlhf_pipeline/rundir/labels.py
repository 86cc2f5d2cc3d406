"""What people chose, in one SQLite file that lies beside the stages of a run and outlasts them. No libraries.

Each click is one transaction in write-ahead mode, and on the disk when `Labels.add` returns. The prompts and replies
are in the file too: what somebody said of them can be used when the stage that sampled them is gone. Nothing is ever
deleted: a label that was taken back keeps its row, with the time.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.items import Prompt, Reply, pair_key

LABELS = "labels.db"  # in a run directory
VERSION = 1  # of the tables below, as `PRAGMA user_version`
APPLICATION = 0x524C4846  # "RLHF", as `PRAGMA application_id`: the file is one of ours
WAIT_S = 10.0  # for another process that writes

Choice = Literal["first", "second", "tie", "bad", "skip"]  # `bad`: neither is any good
How = Literal["random", "informative", "shared", "again", "check"]
OTHER = {"first": "second", "second": "first"}  # what a choice is in the other order; the rest stay

TABLES = """
CREATE TABLE pairs (
    stage TEXT NOT NULL, key TEXT NOT NULL, item TEXT NOT NULL, prompt TEXT NOT NULL, first TEXT NOT NULL,
    second TEXT NOT NULL, better TEXT CHECK (better IN ('first', 'second')), PRIMARY KEY (stage, key)
);
CREATE TABLE labels (
    id TEXT PRIMARY KEY, pair TEXT NOT NULL, stage TEXT NOT NULL, person TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'bad', 'skip')),
    "left" INTEGER NOT NULL CHECK ("left" IN (0, 1)), dimensions TEXT NOT NULL, reason TEXT NOT NULL,
    seconds REAL, how TEXT NOT NULL, made_at TEXT NOT NULL, undone_at TEXT,
    FOREIGN KEY (stage, pair) REFERENCES pairs (stage, key)
);
CREATE INDEX labels_of_person ON labels (stage, person);
CREATE TABLE people (
    token_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, is_owner INTEGER NOT NULL, made_at TEXT NOT NULL
);
CREATE TABLE asked (
    stage TEXT NOT NULL, person TEXT NOT NULL, id TEXT NOT NULL, pair TEXT NOT NULL, "left" INTEGER NOT NULL,
    how TEXT NOT NULL, PRIMARY KEY (stage, person)
);
CREATE TABLE learnt (
    stage TEXT PRIMARY KEY, made_at TEXT NOT NULL, labels INTEGER NOT NULL, accuracy REAL NOT NULL, low REAL NOT NULL,
    high REAL NOT NULL
);
"""


class Pair(NamedTuple):
    """Two replies to a prompt, in the order in which the file has them.

    Attributes:
        key: `items.pair_key` of the three.
        item: the key of the item that it is of.
        prompt: text, or turns.
        first: a reply.
        second: the other one.
        better: which one is better, where that was known before anybody was asked.
    """

    key: str
    item: str
    prompt: Prompt
    first: Reply
    second: Reply
    better: Literal["first", "second"] | None = None

    @classmethod
    def of(
        cls, item: str, prompt: Prompt, first: Reply, second: Reply, better: Literal["first", "second"] | None = None
    ) -> "Pair":
        """A pair of an item, with its key."""
        return cls(pair_key(prompt, first, second), item, prompt, first, second, better)


class Label(NamedTuple):
    """What a person said of a pair, once.

    Attributes:
        id: made by who sends it: the same label sent twice is one.
        pair: the key of the pair.
        stage: the stage it was made for.
        person: who made it.
        choice: in the order of the pair.
        left: the reply that was shown left, 0 for `first` and 1 for `second`.
        dimensions: of each dimension that the person judged, `first`, `second` or `tie`.
        reason: as typed; may be empty.
        seconds: from the time the pair was shown to the choice; None where nobody knows.
        how: why this pair was asked: at `random`; as the most `informative` one; `shared`, since another person has
            labelled it; `again`, in the other order; or as a `check` whose answer is known.
        made_at: when, in ISO 8601, in UTC.
        undone_at: when it was taken back; None where it was not.
    """

    id: str
    pair: str
    stage: str
    person: str
    choice: Choice
    left: int = 0
    dimensions: dict[str, str] = {}  # noqa: RUF012  never changed
    reason: str = ""
    seconds: float | None = None
    how: How = "random"
    made_at: str = ""
    undone_at: str | None = None

    def turned(self) -> "Label":
        """The same label of the same two replies in the other order."""
        dimensions = {name: OTHER.get(value, value) for name, value in self.dimensions.items()}
        choice: Any = OTHER.get(self.choice, self.choice)
        return self._replace(choice=choice, left=1 - self.left, dimensions=dimensions)


class Asked(NamedTuple):
    """The pair that a person has on the page.

    Attributes:
        id: of this showing of it.
        pair: its key.
        left: the reply that is shown left, as in a `Label`.
        how: as in a `Label`.
    """

    id: str
    pair: str
    left: int
    how: How


class Learnt(NamedTuple):
    """How well the model that learns from a stage's labels foretells labels that it has not seen.

    Attributes:
        labels: how many it had learnt from.
        accuracy: of held-out pairs that were asked at random.
        low: of its 95 % interval.
        high: of its 95 % interval.
        made_at: when, in ISO 8601, in UTC.
    """

    labels: int
    accuracy: float
    low: float
    high: float
    made_at: str = ""


class Person(NamedTuple):
    """Who may open the page.

    Attributes:
        name: under which the labels are kept.
        is_owner: whether all people's figures are shown.
    """

    name: str
    is_owner: bool


class Labels:
    """The labels of a run, as `with Labels(file) as labels`. Threads and processes may share a file.

    Args:
        file: the file, which is made where there is none.
        read_only: the file is there, and nobody writes to it, nor can: as on a disk that is mounted so.

    Raises:
        InputError: there is a file that is damaged, is none of labels, or is of a later version; it stays as it is.
    """

    def __init__(self, file: Path, *, read_only: bool = False) -> None:
        self.file = file
        self._lock = threading.RLock()
        self._identity: tuple[int, int] | None = None  # known once it is open
        with _told(file):
            self._database = _connect(file, "mode=ro&immutable=1" if read_only else "mode=rwc")
            try:
                if read_only:
                    self._is_new()
                else:
                    self._prepare()
                    self._identity = _identity(file)
            except BaseException:
                self._database.close()
                raise

    @classmethod
    def open_existing(cls, file: Path) -> "Labels | None":
        """The labels of a file that is there; None where there is none.

        Raises:
            InputError: as for a new one; or it is empty, which none of ours is.
        """
        if not file.is_file():
            return None
        if not file.stat().st_size:
            said = "this file is empty, so the labels that were in it are gone"
            raise InputError(said, place=str(file), hint="put a copy back, or remove it to begin anew")
        being_written = file.with_name(f"{file.name}-wal").exists()
        return cls(file, read_only=not being_written and not os.access(file.parent, os.W_OK))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was written is in it alone then, and not in those that SQLite keeps beside it."""
        with self._lock:
            self._database.close()

    # What people say

    def add(self, label: Label, pair: Pair) -> bool:
        """Keep a label; it is on the disk when this returns.

        Args:
            label: in the order of `pair`; without `made_at` it is made now.
            pair: what it is of. Where the file has the pair in the other order, the label is kept in that.

        Returns:
            Whether it is new; else there is one of this id, and nothing has changed.

        Raises:
            ValueError: the label is of another pair, or says what no label does.
            InputError: the file cannot be written to.
        """
        if label.pair != pair.key:
            raise ValueError(f"the label is of the pair {label.pair}, and not of {pair.key}")
        with self._writing():
            kept = self._keep(label.stage, pair)
            if kept.first != pair.first:
                label = label.turned()
            label = label._replace(made_at=label.made_at or now())
            values = label._replace(dimensions=_json(label.dimensions))  # type: ignore[arg-type]
            try:
                self._database.execute(f"INSERT INTO labels VALUES ({', '.join('?' * len(values))})", values)
            except sqlite3.IntegrityError:
                if self._database.execute("SELECT 1 FROM labels WHERE id = ?", (label.id,)).fetchone():
                    return False
                raise ValueError(f"this is no label: {label}") from None
            self._database.execute("DELETE FROM asked WHERE stage = ? AND person = ?", (label.stage, label.person))
            return True

    def undo(self, person: str, stage: str, label: str | None = None) -> Label | None:
        """Take back a person's last label of a stage that is not taken back yet.

        Args:
            person: whose.
            stage: of what.
            label: the id of that label, so that a request that is repeated takes back no second one.

        Returns:
            The label; None where there is none, or where `label` is not the last.
        """
        with self._writing():
            last = self._labels("stage = ? AND person = ? AND undone_at IS NULL ORDER BY rowid DESC", stage, person)
            found = next(last, None)
            if label is not None and (found is None or found.id != label):
                again = self._labels("id = ? AND person = ? AND undone_at IS NOT NULL", label, person)
                return next(again, None)
            if found is None:
                return None
            found = found._replace(undone_at=now())
            self._database.execute("UPDATE labels SET undone_at = ? WHERE id = ?", (found.undone_at, found.id))
            self._database.execute("DELETE FROM asked WHERE stage = ? AND person = ?", (stage, person))
            return found

    def of(self, stage: str, *, undone: bool = False) -> list[Label]:
        """The labels of a stage in the order in which they were made, with `undone` also those that were taken back."""
        with self._reading():
            return list(self._labels(f"stage = ? {'' if undone else 'AND undone_at IS NULL'} ORDER BY rowid", stage))

    def label(self, id_: str) -> Label | None:
        """The label of an id, whether or not it was taken back; None where there is none."""
        with self._reading():
            return next(self._labels("id = ?", id_), None)

    def count(self, stage: str) -> int:
        """How many labels of a stage there are; a pair that was skipped has none, nor has one that was taken back."""
        with self._reading():
            query = "SELECT count(*) FROM labels WHERE stage = ? AND undone_at IS NULL AND choice != 'skip'"
            return int(self._database.execute(query, (stage,)).fetchone()[0])

    def pairs(self, stage: str) -> dict[str, Pair]:
        """The pairs of a stage that somebody was asked about, by their keys, in their order."""
        with self._reading():
            rows = self._database.execute("SELECT * FROM pairs WHERE stage = ? ORDER BY rowid", (stage,))
            return {pair.key: pair for pair in map(_pair, rows)}

    def stages(self) -> list[str]:
        """The stages that have labels, in no order."""
        with self._reading():
            return [stage for (stage,) in self._database.execute("SELECT DISTINCT stage FROM labels")]

    def version(self) -> int:
        """A number that changes when another connection has written to the file."""
        with self._reading():
            return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    # What they are asked

    def asked(self, stage: str) -> dict[str, Asked]:
        """By the names of people, what each has on the page."""
        with self._reading():
            query = 'SELECT person, id, pair, "left", how FROM asked WHERE stage = ?'
            return {person: Asked(*rest) for person, *rest in self._database.execute(query, (stage,))}

    def ask(self, stage: str, person: str, asked: Asked) -> None:
        """Note what a person has on the page from now on."""
        with self._writing():
            self._database.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?, ?, ?, ?)", (stage, person, *asked))

    # Who they are

    def admit(self, name: str, token: str, is_owner: bool = False) -> None:
        """Let who holds a token open the page under a name. Of the token only its SHA-256 is kept."""
        with self._writing():
            row = (_sha256(token), name, int(is_owner), now())
            self._database.execute("INSERT OR REPLACE INTO people VALUES (?, ?, ?, ?)", row)

    def person(self, token: str) -> Person | None:
        """Who holds a token; None where nobody does."""
        with self._reading():
            query = "SELECT name, is_owner FROM people WHERE token_sha256 = ?"
            found = self._database.execute(query, (_sha256(token),)).fetchone()
            return Person(found[0], bool(found[1])) if found else None

    def people(self, stage: str | None = None) -> list[str]:
        """The names of all who have labelled, those of a stage or of all; sorted."""
        with self._reading():
            query = "SELECT DISTINCT person FROM labels WHERE ? IS NULL OR stage = ? ORDER BY person"
            return [name for (name,) in self._database.execute(query, (stage, stage))]

    # What the model has learnt

    def learnt(self, stage: str) -> Learnt | None:
        """How well the model does that learns from a stage's labels; None where nothing is known of it."""
        with self._reading():
            query = "SELECT labels, accuracy, low, high, made_at FROM learnt WHERE stage = ?"
            found = self._database.execute(query, (stage,)).fetchone()
            return Learnt(*found) if found else None

    def note_learnt(self, stage: str, learnt: Learnt | None) -> None:
        """Keep how well the model does now; with None nothing is known of it any more."""
        with self._writing():
            self._database.execute("DELETE FROM learnt WHERE stage = ?", (stage,))
            if learnt is not None:
                row = (stage, learnt.made_at or now(), learnt.labels, learnt.accuracy, learnt.low, learnt.high)
                self._database.execute("INSERT INTO learnt VALUES (?, ?, ?, ?, ?, ?)", row)

    # Inside

    def _prepare(self) -> None:
        """Make the tables, or see that they are there."""
        new = self._is_new()
        self._database.execute("PRAGMA journal_mode = WAL")  # stays another one where the disk has no shared memory
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("PRAGMA wal_autocheckpoint = 64")  # pages: a copy of the file alone has nearly all
        self._database.execute("PRAGMA foreign_keys = ON")
        if new:
            with self._writing():
                if self._is_new():  # and no other process has made them meanwhile
                    for statement in TABLES.split(";\n"):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._database.execute(f"PRAGMA user_version = {VERSION}")

    def _is_new(self) -> bool:
        """Whether there are no tables yet.

        Raises:
            InputError: there are those of something else, or of a later version.
            sqlite3.DatabaseError: the file is damaged.
        """
        version, application = self._pragma("user_version"), self._pragma("application_id")
        if application == APPLICATION and version > VERSION:
            raise InputError(
                f"these labels were written by a later version of rlhf-pipeline: their version is {version}, and this "
                f"one reads {VERSION}",
                place=str(self.file),
                hint="update rlhf-pipeline",
            )
        if application != APPLICATION and self._pragma("schema_version"):
            raise InputError("this is a database, but none of labels", place=str(self.file))
        problem = self._pragma("quick_check(1)")
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        return application != APPLICATION

    def _pragma(self, name: str) -> Any:
        return self._database.execute(f"PRAGMA {name}").fetchone()[0]

    def _keep(self, stage: str, pair: Pair) -> Pair:
        """Insert a pair where it is new; the pair as the file has it."""
        row = (stage, pair.key, pair.item, _json(pair.prompt), _json(pair.first), _json(pair.second), pair.better)
        self._database.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        query = "SELECT * FROM pairs WHERE stage = ? AND key = ?"
        return _pair(self._database.execute(query, (stage, pair.key)).fetchone())

    def _labels(self, where: str, *values: str) -> Iterator[Label]:
        for row in self._database.execute(f"SELECT * FROM labels WHERE {where}", values):
            label = Label(*row)
            yield label._replace(dimensions=json.loads(str(label.dimensions)))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, _told(self.file):
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all in the block is on the disk after it, or none.

        Raises:
            InputError: it cannot be written, or is not the file any more that was opened: nobody would find it again.
        """
        with self._lock, _told(self.file):
            if self._identity not in (None, _identity(self.file)):
                said = "these labels were moved or deleted while they were open, so nothing more is saved"
                raise InputError(
                    said, place=str(self.file), hint="put the file back; or end the page, and open it anew"
                )
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # where the disk is full, SQLite has done so already
                    self._database.execute("ROLLBACK")
                raise


def now() -> str:
    """The time in ISO 8601, in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect(file: Path, options: str) -> sqlite3.Connection:
    address = f"{file.absolute().as_uri()}?{options}"
    return sqlite3.connect(address, timeout=WAIT_S, isolation_level=None, check_same_thread=False, uri=True)


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Around all that SQLite does: what goes wrong is said in one sentence.

    Raises:
        InputError: it cannot be read or written, or is damaged.
    """
    try:
        yield
    except sqlite3.OperationalError as error:  # of the system: no such folder, no right to write, a full disk
        if str(error).startswith(("no such", "Could not decode")):
            raise _damaged(file, str(error)) from error
        raise _unusable(file, str(error)) from error
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        raise _damaged(file, str(error)) from error
    except json.JSONDecodeError as error:
        raise _damaged(file, "what should be JSON is none") from error


def _damaged(file: Path, why: str) -> InputError:
    return InputError(
        f"these labels are damaged: {why}",
        place=str(file),
        hint=f"`sqlite3 {file.name} .recover` gets out of such a file what can be; nothing was changed",
    )


def _unusable(file: Path, why: str) -> InputError:
    """What keeps a file of labels from being read or written, as far as the system tells."""
    folder, hint = file.absolute().parent, None
    if file.is_dir():
        said = "this is a folder, and no file of labels"
    elif not folder.is_dir():
        said = f"there is no folder {folder}"
    elif file.exists() and not os.access(file, os.R_OK):
        said, hint = "you may not read these labels", "ask their owner for the right to"
    elif not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        said = "labels cannot be kept here: the folder or the file is read-only"
        hint = f"make {folder} writable, or work with a copy of it"
    else:
        said = f"the labels cannot be read or written: {why}"
    return InputError(said, place=str(file), hint=hint)


def _pair(row: tuple[str, ...]) -> Pair:
    _, key, item, prompt, first, second, better = row
    return Pair(key, item, json.loads(prompt), json.loads(first), json.loads(second), better)  # type: ignore[arg-type]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
