"""The run directory: what a run has made so far, and the truth about it. No torch."""

import contextlib
import dataclasses
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline import kinds
from rlhf_pipeline.rundir import durable, jsonl, strict_json
from rlhf_pipeline.rundir.durable import MEMBER as MEMBER
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.items import FEATURES, ITEMS
from rlhf_pipeline.rundir.lock import Lock
from rlhf_pipeline.rundir.record import ROWS, WEIGHTS, Record

# What lies in a run directory.
RECIPE = "recipe.yaml"  # the resolved recipe
COMPARISON = "comparison.json"  # docs/json.md says what it holds
REPORT = "report.html"
SWEEP = ".sweep"  # ends the name of a folder with the runs of a sweep, which lies beside other runs
ANSWERS = "judge-answers.jsonl"  # of judges behind addresses, of all stages; it outlasts them: they are paid for
# In a stage's folder:
RECORD = "stage.json"
ADAPTER = "adapter"  # what a stage that trains publishes; one that makes rows has ROWS, and what is beside them
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WATCH = "watch.jsonl"  # what was measured of a policy while it trained, one line a measurement
JUDGEMENTS = "judgements.jsonl"  # all that an AI judge was asked, and its answers
CHOICES = "choices.jsonl"  # the labels of people that a stage's rows were made of; what they chose from is in ITEMS
PEOPLE = "people.json"  # how far they agree, as `rundir/agreement.figures` has it
PAIRS = "pairs.jsonl"  # held-out pairs with their scores
LOG = "log.txt"
WORK = "work"  # where a stage is made until it is done
# In a stage's `work/`:
JOB = "job.json"  # what its worker is to do
TRAINED = "trained.json"  # its numbers and its artifact's digests, once training is over
RESULT = "result.json"  # what the worker hands back, once there is nothing left to do
MADE = durable.MADE  # what a stage that makes rows has made so far
STAGED_ROWS = "rows"  # the folder in which its artifact is put together
PROGRESS = "progress.json"  # what it is doing just now, for those who watch
RANKS = "ranks"  # a folder with what each of several processes has to say to the one that started them
# In a run directory while a run goes on:
DOING = ".doing"  # what the run does where no stage is at work, one line
MACHINES = ".machines"  # a folder with what several machines that run it together tell each other
ABSENT = "absent.json"  # in that: which of them the first one waits for


def log_of_rank(log: Path, rank: int) -> Path:
    """The log of one of the processes that train a stage; that of the first is the stage's own."""
    return log if rank == 0 else log.with_name(f"{log.stem}.rank-{rank}{log.suffix}")


def log_of_machine(stage: Path, machine: int) -> Path:
    """The log of what starts the processes of another machine than the first one."""
    return stage / f"log.machine-{machine}.txt"


def end_of(log: Path) -> int:
    """How long a log is, in bytes; 0 where there is none."""
    return log.stat().st_size if log.exists() else 0


def logged_since(log: Path, end: int) -> str:
    """What was written to a log since it ended there, by `end_of`: it has what earlier attempts wrote, too."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(end)
        return io.TextIOWrapper(file, encoding="utf-8", errors="replace").read()


@dataclass(frozen=True)
class Progress:
    """How far a stage that was interrupted has come.

    Attributes:
        point: it resumes from a `checkpoint`; or people have `labelled` what it makes rows of; or it was `trained` and
            is to be judged; or it was `finished` and is to be published.
        step: of the checkpoint; None where a member of an ensemble has none yet, or all members are trained.
        of: how many steps there are.
        damaged: later checkpoints that cannot be trusted, by their paths inside `work/`, with what is wrong.
        member: the number of the member of an ensemble that it resumes at, from 1; None where it is no ensemble, and
            where all members are trained.
        members: how many members there are; None where it is no ensemble.
        makes_rows: whether it makes rows; then `step` and `of` count what they are made from.
    """

    point: Literal["checkpoint", "labelled", "trained", "finished"]
    step: int | None = None
    of: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    member: int | None = None
    members: int | None = None
    makes_rows: bool = False

    def __str__(self) -> str:
        if self.point == "labelled":
            return "makes rows of its labels"
        if self.makes_rows:
            of = f" of {self.of}" if self.of else ""
            return f"resumes after {self.step}{of}" if self.point == "checkpoint" else "its rows are to be published"
        if self.point != "checkpoint":
            return "trained, to be judged" if self.point == "trained" else "trained, to be published"
        return "; ".join([self._from(), *(f"{name} is damaged: {why}" for name, why in self.damaged.items())])

    def _from(self) -> str:
        if self.members and self.member is None:
            return f"its {self.members} members are trained, to be put together"
        member = f"member {self.member} of {self.members}"
        if self.step is None:
            return f"resumes with {member}"
        steps = f"step {self.step}" + (f" of {self.of}" if self.of else "")
        return f"resumes from {steps}" + (f" of {member}" if self.members else "")

    @property
    def left(self) -> str:
        """The path inside `work/` of what it goes on from."""
        if self.point == "labelled":
            return ITEMS
        if self.point != "checkpoint":
            return TRAINED if self.point == "trained" else RESULT
        if self.makes_rows:
            return MADE
        if self.step is not None:
            return (f"{MEMBER}{self.member}/" if self.members else "") + f"checkpoint-{self.step}"
        trained = self.members if self.member is None else self.member - 1
        return f"{MEMBER}{trained}/{ADAPTER}"


class RunDirectory:
    """The folder of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.path / name

    def work(self, name: str) -> Path:
        """Where a stage is made until it is done."""
        return self.path / name / WORK

    def adapter(self, name: str) -> Path:
        """The adapter that a stage has published."""
        return self.path / name / ADAPTER

    def makes_rows(self, name: str) -> bool:
        """Whether a stage is one that makes rows, as its record has it."""
        kind = kinds.find((self.record(name) or Record()).kind)
        return kind is not None and not kind.trains

    def artifact(self, name: str) -> Path:
        """The folder with the files that a stage has published: of one that makes rows its own."""
        return self.stage(name) if self.makes_rows(name) else self.adapter(name)

    def staged(self, name: str) -> Path:
        """The folder in which a stage puts these files together."""
        return self.work(name) / (STAGED_ROWS if self.makes_rows(name) else ADAPTER)

    def begun(self) -> list[str]:
        """The stages that have a record, in no order; one that was moved aside has a dot in its name, and is none."""
        return [file.parent.name for file in self.path.glob(f"*/{RECORD}") if "." not in file.parent.name]

    def record(self, name: str) -> Record | None:
        """A stage's `stage.json`; where it cannot be read, what the stage was started with; None where it never was.

        So nothing is lost where the record of an interrupted stage is damaged.
        """
        content = read_json(self.stage(name) / RECORD)
        if content is None:
            content = (read_json(self.work(name) / JOB) or {}).get("record")
        return Record.model_validate(content) if isinstance(content, dict) else None

    def unreadable(self, name: str) -> str | None:
        """Why a stage's record cannot be read; None where it can, or where nothing needs it."""
        file = self.stage(name) / RECORD
        if self.record(name) is not None or not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{RECORD} cannot be read: {error}"
        return f"{RECORD} holds no record but {type(content).__name__}"

    def write_record(self, name: str, record: Record) -> None:
        """Replace a stage's `stage.json` in one step."""
        text = strict_json.dumps(record.as_json(), indent=2, ensure_ascii=False)
        durable.write_text(self.stage(name) / RECORD, text + "\n")

    def progress(self, name: str) -> Progress | None:
        """Where a stage that was interrupted can resume; None where it has to be retrained from the start."""
        work = self.work(name)
        note = read_json(work / TRAINED) or {}
        files = note.get("files")
        makes_rows = self.makes_rows(name)
        if isinstance(files, dict) and {WEIGHTS, ROWS} & files.keys():
            done = "metrics" in (read_json(work / RESULT) or {})
            folders = [self.staged(name), *([self.artifact(name)] if done else [])]  # each file is in one of them
            if all(any(durable.difference(at, {file: it}) is None for at in folders) for file, it in files.items()):
                return Progress("finished" if done else "trained", makes_rows=makes_rows)
        if (work / ITEMS).is_file() and (work / FEATURES).is_file():
            return Progress("labelled", makes_rows=True)
        if makes_rows:
            made = sum(1 for _ in jsonl.sound_lines(work / MADE))
            of = (read_json(work / PROGRESS) or {}).get("of")
            return Progress("checkpoint", made, of if isinstance(of, int) else None, makes_rows=True) if made else None
        members = self._members(name)
        if members:
            return _progress_of_ensemble(work, members)
        checkpoint, damaged = durable.newest_sound(work)
        return _at_checkpoint(checkpoint, damaged) if checkpoint else None

    def _members(self, name: str) -> int | None:
        """How many members the ensemble has that a stage makes; None where it makes none."""
        members = (self.record(name) or Record()).inputs.get("members")
        return members if isinstance(members, int) else None

    def damaged(self, name: str) -> dict[str, str]:
        """What is wrong with what a stage that cannot resume has left in its `work/`, by the paths there."""
        work, first = self.work(name), f"{MEMBER}1"
        if self._members(name):
            return {f"{first}/{file}": why for file, why in durable.newest_sound(work / first)[1].items()}
        return durable.newest_sound(work)[1]

    def prepare(self, name: str, progress: Progress | None) -> None:
        """Leave in a stage's `work/` what it resumes from, and remove everything that could be mistaken for it."""
        work = self.work(name)
        if progress is None:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        if progress is None or progress.point == "finished":
            return
        (work / RESULT).unlink(missing_ok=True)
        if progress.point in ("checkpoint", "labelled"):
            self._remove_unpublished(name)
            (work / TRAINED).unlink(missing_ok=True)
            for damaged in progress.damaged:
                self.put_away(name, damaged)

    def _remove_unpublished(self, name: str) -> None:
        """Remove an artifact that is put together, or moved even, but was never recorded."""
        files = (read_json(self.work(name) / TRAINED) or {}).get("files") or {}
        if self.makes_rows(name):
            for file in files:
                (self.artifact(name) / file).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.artifact(name), ignore_errors=True)
        shutil.rmtree(self.staged(name), ignore_errors=True)

    def put_away(self, name: str, checkpoint: str) -> None:
        """Rename a checkpoint of a stage that cannot be used, so that nothing resumes from it.

        Args:
            name: the stage's.
            checkpoint: its path inside `work/`.
        """
        folder = self.work(name) / checkpoint
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    def set_aside(self, name: str) -> Path | None:
        """Move a stage's folder to `<stage>.<time>`, so that nothing is lost; None where there is none."""
        folder = self.stage(name)
        if not folder.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path / f"{name}.{stamp}"
        count = 1
        while aside.exists():
            count += 1
            aside = self.path / f"{name}.{stamp}-{count}"
        folder.rename(aside)
        return aside

    def copy_of(self, name: str, source: Path, files: Mapping[str, Sequence[Any]]) -> Path | None:
        """Copy a stage of another run, but for its record and `work/`, to a place beside this run's stages; see `put`.

        The weights are a hard link where the disk allows it: nothing ever writes to published weights.

        Args:
            name: the stage's name here.
            source: its folder there.
            files: what its artifact holds.

        Returns:
            The copy; None where the artifact is gone from there meanwhile, or is another one.
        """
        copy = self.path / f".new-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            for path in [source, *sorted(source.rglob("*"))]:
                inside = path.relative_to(source)
                if inside.parts[:1] in ((RECORD,), (WORK,)):
                    continue
                if path.is_dir():
                    (copy / inside).mkdir(parents=True)
                elif inside.parts[:1] == (ADAPTER,) and inside.name == WEIGHTS:
                    _link(path, copy / inside)
                else:
                    shutil.copy2(path, copy / inside)
            problem = durable.difference(copy if ROWS in files else copy / ADAPTER, files)
            durable.sync_folder(copy)
        except FileNotFoundError:
            problem = "it was moved while it was copied"
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)  # a full disk should get its room back
            raise
        if problem:
            shutil.rmtree(copy, ignore_errors=True)
        return None if problem else copy

    def put(self, name: str, folder: Path, record: Record) -> None:
        """Give a folder of this run directory a record, and make it that of a stage, in one step; another one goes."""
        self.write_record(folder.name, record)
        shutil.rmtree(self.stage(name), ignore_errors=True)
        folder.rename(self.stage(name))
        durable.sync([self.path])

    def publish(self, name: str) -> durable.Contents:
        """Move what a stage has made from its working folder into place, as far as that is still to do.

        Returns:
            What its files hold.
        """
        staged = self.staged(name)
        if staged.exists() and self.makes_rows(name):
            for file in sorted(staged.iterdir()):
                file.replace(self.artifact(name) / file.name)
            durable.sync([self.stage(name), staged])
        elif staged.exists():
            staged.rename(self.adapter(name))
            durable.sync([self.stage(name), self.work(name)])
        return json.loads((self.work(name) / TRAINED).read_text(encoding="utf-8"))["files"]

    def clear(self, name: str) -> None:
        """Remove a stage's working folder."""
        shutil.rmtree(self.work(name), ignore_errors=True)

    def artifact_problem(self, name: str, record: Record, digests: FileDigests | None) -> str | None:
        """What is wrong with a stage's artifact, as one phrase; None where its files are those of the record.

        Args:
            name: the stage's.
            record: its record.
            digests: tells what files hold; None to look at their sizes alone.

        Raises:
            InputError: a file of it cannot be read.
        """
        kind, folder = kinds.find(record.kind), f"{ADAPTER}/"
        main, gone = WEIGHTS, "its adapter is gone"
        if kind and not kind.trains:
            main, gone, folder = ROWS, f"its {ROWS} is gone", ""
        root = self.stage(name) / folder
        if not record.artifact_files and not (root / main).is_file():
            return gone
        for file, (size, sha256) in record.artifact_files.items():
            path = root / file
            if not path.is_file():
                return gone if file == main else f"its {folder}{file} is gone"
            if path.stat().st_size != size or (digests and not sha256.startswith(digests.of_file(path))):
                return f"its {folder}{file} is not what the stage wrote"
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory; see `Lock`. One that is made for it, and stays empty, is removed in the end.

        Raises:
            RunError: another process holds it.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self.lock.held(keep=not made):
                try:
                    yield
                finally:
                    (self.path / DOING).unlink(missing_ok=True)
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def note(self, doing: str) -> None:
        """Tell those who watch what the run does, for as long as no stage is at work."""
        with contextlib.suppress(OSError):  # a disk that is full is no matter here
            durable.write_text(self.path / DOING, doing)

    def doing(self) -> str | None:
        """What the run does that goes on here, if no stage is at work; None where nobody knows."""
        try:
            return (self.path / DOING).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def absent_machines(self) -> list[int]:
        """Of several machines that run it together, the numbers of those that the first one waits for."""
        found = (read_json(self.path / MACHINES / ABSENT) or {}).get("machines")
        return [one for one in found if type(one) is int] if isinstance(found, list) else []

    def refuse_if_locked(self) -> None:
        """Raise `RunError`, naming the process, if a run is going on here."""
        self.lock.refuse_if_held()

    def is_locked(self) -> bool:
        """Whether a run is going on here."""
        return self.lock.is_held()


def _at_checkpoint(checkpoint: Path, damaged: dict[str, str]) -> Progress:
    of = (read_json(checkpoint / durable.STATE) or {}).get("max_steps")
    return Progress("checkpoint", durable.step(checkpoint), of if isinstance(of, int) else None, damaged)


def _progress_of_ensemble(work: Path, members: int) -> Progress | None:
    """Where an ensemble can resume: at the first member that is not trained, from its last checkpoint if it has one."""
    for number in range(1, members + 1):
        name = f"{MEMBER}{number}"
        problem = durable.damage(work / name / ADAPTER)
        if problem is None:
            continue
        checkpoint, found = durable.newest_sound(work / name)
        damaged = {f"{name}/{file}": why for file, why in found.items()}
        if (work / name / ADAPTER).exists():
            damaged[f"{name}/{ADAPTER}"] = problem
        if checkpoint:
            return dataclasses.replace(_at_checkpoint(checkpoint, damaged), member=number, members=members)
        return Progress("checkpoint", damaged=damaged, member=number, members=members) if number > 1 else None
    return Progress("checkpoint", members=members)


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where there can be none: on another disk, or of another user's file."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def members(artifact: Path) -> list[Path]:
    """The adapter folders of a reward model: its own, and those of the further members of an ensemble within it."""
    within = [folder for folder in artifact.glob(f"{MEMBER}*") if folder.name.removeprefix(MEMBER).isdecimal()]
    return [artifact, *sorted(within, key=lambda folder: int(folder.name.removeprefix(MEMBER)))]
