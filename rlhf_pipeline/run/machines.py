"""Several machines that run one recipe together, in a run directory that all of them see. No torch.

The first one, machine 0, holds the lock and decides everything, as a machine alone does. The others wait for the jobs
that it tells them of, start their ranks for each, and end when it ends, as it ended, also where that was before it
began. Each counts in a file of its own, and all listen: whoever has been silent for half a minute is taken for dead. No
clocks of two machines are compared.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import InputError, InputErrors, Interrupted, RunError, Waiting
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import signals
from rlhf_pipeline.run.launch import END_SIGNAL, STOP_SIGNAL, STOPPED, all_devices, command, environment, with_devices
from rlhf_pipeline.run.same_recipe import difference
from rlhf_pipeline.rundir import strict_json, words
from rlhf_pipeline.rundir.layout import ABSENT, MACHINES, RANKS, RunDirectory, log_of_machine, read_json

BEAT_S = 2.0
SILENT_S = 30.0
COME_S = 600.0  # for the others to come at all: a cluster starts them one after the other
REMIND_S = 60.0  # between two sentences on what is waited for
POLL_S = 0.5
RUN, JOB = "run.json", "job.json"  # in the folder: how the run goes, and what is to be done now
# What a cluster gives all processes that it starts together; the first two tell that it did.
TOGETHER = ("SLURM_STEP_ID", "SKYPILOT_TASK_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")


@contextlib.contextmanager
def beating(folder: Path, machine: int) -> Iterator[None]:
    """Give signs of life while the block runs.

    Raises:
        OSError: not even the first one can be written; later a disk may be full for a moment.
    """
    mine = {"of": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}

    def beat(over: threading.Event) -> None:
        count = 0
        while not over.wait(BEAT_S):
            count += 1
            with contextlib.suppress(OSError):
                _write(folder / f"{machine}.beat", mine | {"count": count})

    for made in (folder.parent, folder):  # so that an error names the run directory
        made.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{machine}.beat", mine | {"count": 0})
    try:
        with _beside(beat):
            yield
    finally:
        with contextlib.suppress(OSError):
            (folder / f"{machine}.beat").unlink(missing_ok=True)


class Taken(RunError):  # noqa: N818  it is of the same family
    """Another process is this machine; it alone tells the others how it ends."""


def refuse_if_taken(folder: Path, machine: int) -> None:
    """See that no other process is this machine, which takes a moment where one was ended before it could say so.

    Raises:
        Taken: one is.
    """
    file = folder / f"{machine}.beat"
    ear, deadline = Ear(folder, machine), time.monotonic() + 2.5 * BEAT_S
    while file.exists() and time.monotonic() < deadline:
        if ear.has_come:
            other = read_json(file) or {}
            raise Taken(
                f"machine {machine} is at work on this run already: process {other.get('process')} on "
                f"{other.get('host')}",
                hint="each machine has a `launch.machine_rank` of its own",
            )
        time.sleep(POLL_S)


class Ear:
    """Listens to another machine.

    Args:
        folder: where it counts.
        machine: its number.
    """

    def __init__(self, folder: Path, machine: int) -> None:
        self._file, self._heard, self._at = folder / f"{machine}.beat", 0, time.monotonic()
        self._last = read_json(self._file)
        self._process: Any = None

    @property
    def is_another(self) -> bool:
        """Whether another process has taken the place of the one that was heard first, which then is gone."""
        self.silence()
        return self._heard > 0 and (self._last or {}).get("of") != self._process

    @property
    def has_come(self) -> bool:
        """Whether it has given a sign since this one listens."""
        self.silence()
        return self._heard > 0

    def silence(self) -> float:
        """How long it has given no sign, in seconds."""
        count = read_json(self._file)
        if count is not None and count != self._last:
            self._process = self._process if self._heard else count.get("of")
            self._last, self._at, self._heard = count, time.monotonic(), self._heard + 1
        return time.monotonic() - self._at


@contextlib.contextmanager
def leading(recipe: Recipe) -> Iterator[None]:
    """Tell other machines how the run goes, if there are others."""
    if recipe.machines == 1:
        yield
        return
    folder = recipe.run / MACHINES
    folder.mkdir(parents=True, exist_ok=True)
    for file in (JOB, ABSENT):
        (folder / file).unlink(missing_ok=True)
    before = {str(machine): last_end(folder, machine) for machine in range(1, recipe.machines)}
    run: dict[str, Any] = {"id": uuid.uuid4().hex, "over": None, "before": before}
    _write(folder / RUN, run)
    with beating(folder, 0), _noting_the_end(folder / RUN, lambda over: run | {"over": over}):
        yield


@contextlib.contextmanager
def telling(recipe: Recipe) -> Iterator[None]:
    """Tell other machines, if there are others, how this one has ended, whether or not it came to work with them."""
    if recipe.machines == 1:
        yield
        return
    made = [folder for folder in (recipe.run, *recipe.run.parents) if not folder.exists()]
    file = _file_of_end(recipe.run / MACHINES, recipe.machine_rank)
    try:
        with _noting_the_end(file, lambda over: {"id": uuid.uuid4().hex, "together": _together()} | over):
            yield
    except (Interrupted, KeyboardInterrupt):
        if made and recipe.machine_rank and not (file.parent / RUN).exists():  # nobody has begun
            with contextlib.suppress(OSError):  # something else is there by now
                file.unlink(missing_ok=True)
                for folder in (file.parent, *made):
                    folder.rmdir()
        raise


def tell_of_recipe(recipe: Recipe | None, error: InputError) -> None:
    """Tell other machines, if there are others, that this one cannot read its recipe.

    Nothing is left behind where nobody waits for it, and no cluster has started all together.

    Args:
        recipe: as far as it can be read, by `recipe.as_far_as_read`.
        error: what is wrong with it.
    """
    folder = recipe.run / MACHINES if recipe else Path()
    if recipe is None or recipe.machines == 1 or not (folder.is_dir() or any(_together()[:2])):
        return
    where = "" if recipe.machine_rank else "machine 0: "  # who hears of another one says which it is
    faults = [InputError(one.message, place=f"{where}{one.place or ''}", hint=one.hint) for one in error.all]
    with contextlib.suppress(InputError, RunError, OSError), telling(recipe):
        refuse_if_taken(folder, recipe.machine_rank)
        raise InputErrors(faults)


def last_end(folder: Path, machine: int) -> dict[str, Any] | None:
    """How a machine has ended last, as it told in `telling`; None where it never did."""
    return read_json(_file_of_end(folder, machine))


def has_ended(last: dict[str, Any] | None, before: dict[str, Any] | None) -> bool:
    """Whether a machine has ended since this one has looked, or at once where both were started together.

    Args:
        last: from `last_end`, now.
        before: the same, when this one came.
    """
    if last is None or before is None or last["id"] != before["id"]:
        return last is not None
    return bool(last["kind"]) and any(_together()[:2]) and last["together"] == _together()


def has_failed(folder: Path, machine: int) -> dict[str, Any] | None:
    """How one of the others has ended with an error since the run began; None where it has not."""
    last, before = last_end(folder, machine), (read_json(folder / RUN) or {}).get("before", {}).get(str(machine))
    failed = last is not None and last["kind"] not in ("", "Interrupted", "KeyboardInterrupt", "Waiting")
    return last if failed and has_ended(last, before) else None


def _file_of_end(folder: Path, machine: int) -> Path:
    return folder / f"{machine}.end.json"


@contextlib.contextmanager
def _noting_the_end(file: Path, note: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Write to a file how the block ends, as `_end_as` reads it."""
    over: dict[str, Any] | None = {"kind": "RunError", "message": "machine 0 has ended", "hint": None}
    try:
        yield
        over = {"kind": "", "message": "", "hint": None}
    except Taken:
        over = None
        raise
    except BaseException as error:
        message = str(getattr(error, "message", None) or error)
        hint = error.then if isinstance(error, Interrupted) else getattr(error, "hint", None)
        over = {"kind": type(error).__name__, "message": message, "hint": hint}
        if isinstance(error, InputError):
            over["errors"] = [{"message": one.message, "place": one.place, "hint": one.hint} for one in error.all]
        raise
    finally:
        with contextlib.suppress(OSError):
            if over is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                _write(file, note(over))


def _together() -> list[str | None]:
    return [os.environ.get(name) for name in TOGETHER]


@contextlib.contextmanager
def reminding(recipe: Recipe, say: Callable[[str], None]) -> Iterator[None]:
    """Say on machine 0, at once and every minute, which machines it waits for, as its ranks note it."""
    if recipe.machines == 1:
        yield
        return

    directory = RunDirectory(recipe.run)

    def remind(over: threading.Event) -> None:
        due = 0.0
        while not over.wait(POLL_S):
            missing = directory.absent_machines()
            if not missing:
                due = 0.0
            elif time.monotonic() >= due:
                due = time.monotonic() + REMIND_S
                own = f"={missing[0]}" if len(missing) == 1 else " of its own"
                waits = f"machine 0 waits for {words.machines(missing)}"
                say(f"{waits}; the same command runs there with `launch.machine_rank{own}`, and sees {recipe.run}")

    with _beside(remind):
        yield


@contextlib.contextmanager
def _beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Have work done in a thread while the block runs; it ends when its event is set, which is waited for."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def note_absent(run: Path, numbers: Sequence[int]) -> None:
    """Note which machines the ranks of machine 0 wait for, as `RunDirectory.absent_machines` reads it."""
    with contextlib.suppress(OSError):
        _write(run / MACHINES / ABSENT, {"machines": list(numbers)})


def announce(run: Path, job_file: Path) -> None:
    """Tell the other machines of a job."""
    _write(run / MACHINES / JOB, {"id": uuid.uuid4().hex, "job": str(job_file.relative_to(run))})


def refuse(folder: Path, machine: int, why: str, hint: str | None = None) -> None:
    """Tell machine 0 why another one has not started its ranks.

    Args:
        folder: in which the ranks of the job say how they ended.
        machine: the number of this one.
        why: in one sentence.
        hint: what to do about it.
    """
    said = {"message": f"machine {machine}: {why}", "hint": hint, "known": hint is not None}
    _write(folder / f"machine-{machine}.json", said)


def refusal(folder: Path, machine: int) -> dict[str, Any] | None:
    """What a machine has said in `refuse`, as a worker's result; None where it has not."""
    return read_json(folder / f"machine-{machine}.json")


def follow(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Be one of the other machines: do what machine 0 tells, until its run is over.

    Raises:
        Interrupted: the run was stopped, here or there.
        RunError: it failed, or machine 0 did not come, or is gone; or another process is this machine.
        Waiting: people have to label first.
    """
    folder, machine = recipe.run / MACHINES, recipe.machine_rank
    before = last_end(folder, 0)
    with _before_anything_begins(machine):
        refuse_if_taken(folder, machine)
    job: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        if job is not None:
            job.send_signal(STOP_SIGNAL)

    def at_work() -> bool:
        return job is not None and job.poll() is None and not stopping

    try:
        with beating(folder, machine), signals.stopping(at_work, stop, say):
            first = Ear(folder, 0)
            addresses = (recipe.launch_of(name).get("main_process_ip") for name in recipe.stages)
            waits = f"waits for machine 0 ({next(filter(None, addresses), None)}) in {recipe.run}"
            why = "see whether the same command is at work there, and sees this folder, or has ended with an error"
            if before and before["kind"]:
                why = f"its last run there ended with: {before['message']}"
            with _before_anything_begins(machine):
                say(f"machine {machine} {waits}; Ctrl-C ends it")
                run = _wait_for_run(folder, first, before, lambda: say(f"machine {machine} still {waits}; {why}"))
            if run is None:
                return None
            done: str | None = None
            while True:
                now = read_json(folder / RUN) or run
                if now["id"] != run["id"]:
                    _end(job)
                    run, job, done = now, None, None
                    say("machine 0 has begun anew")
                if now["over"] is not None:
                    return _end_as(now["over"])
                if first.silence() > SILENT_S:
                    raise RunError(
                        f"machine 0 has given no sign for {SILENT_S:.0f} s, so this one has ended its processes, too",
                        hint="the same command on all machines resumes from the last checkpoint",
                    )
                told = read_json(folder / JOB)
                if told is not None and told["id"] != done:
                    _end(job)  # machine 0 is done with the former one
                    done, stopping = told["id"], False
                    _require_same(recipe, told["job"], machine)
                    job = _start(recipe, told["job"], machine)
                    say(f"machine {machine} takes its part in {Path(told['job']).parts[0]}")
                elif job is not None and job.poll() not in (None, 0, STOPPED) and told is not None:
                    _say_that_it_ended(recipe.run / told["job"], machine, job.returncode)
                time.sleep(POLL_S)
    finally:
        _end(job)


@contextlib.contextmanager
def _before_anything_begins(machine: int) -> Iterator[None]:
    """Say of a Ctrl-C in the block that nothing had begun."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"machine {machine} was stopped while it waited for machine 0",
            then="nothing had begun; the same command waits again",
        ) from None


def _end(job: subprocess.Popen[bytes] | None) -> None:
    """End the ranks of this machine, if there are any."""
    if job is not None:
        job.send_signal(END_SIGNAL)
        job.wait()


def _say_that_it_ended(job_file: Path, machine: int, code: int) -> None:
    """Tell machine 0, which may be waiting for these ranks, unless something was said already."""
    folder = job_file.with_name(RANKS)
    if folder.is_dir() and refusal(folder, machine) is None:
        refuse(
            folder, machine, f"what starts its processes ended with exit code {code}: see its log.machine-{machine}.txt"
        )


def _wait_for_run(
    folder: Path, first: Ear, before: dict[str, Any] | None, remind: Callable[[], None]
) -> dict[str, Any] | None:
    """Wait until machine 0 is at work.

    Args:
        folder: what all machines share.
        first: listens to machine 0.
        before: how machine 0 had ended when this one came.
        remind: says what is waited for.

    Returns:
        How the run goes; None where machine 0 is done with it already.
    """
    began, reminded = time.monotonic(), 0
    while (waited := time.monotonic() - began) < COME_S:
        run, last = read_json(folder / RUN), last_end(folder, 0)
        if run is not None and run["over"] is None and first.has_come:
            return run
        if last is not None and has_ended(last, before):
            _end_as(last)
            return None
        if waited > (reminded + 1) * REMIND_S:
            reminded += 1
            remind()
        time.sleep(POLL_S)
    raise RunError(
        f"machine 0 has not begun within {COME_S / 60:.0f} minutes",
        hint="the same command runs there with `launch.machine_rank=0`; both have to see the same `output_dir`",
    )


def _require_same(recipe: Recipe, job: str, machine: int) -> None:
    """See that a job is one of this machine's recipe, and tell machine 0 where it is not.

    Raises:
        RunError: it is not.
    """
    file, hint = recipe.run / job, "start the same command on all machines, but for `launch.machine_rank`"
    told = (read_json(file) or {}).get("recipe")
    why = told and difference(recipe.model_dump(mode="json"), told)
    if why:
        with contextlib.suppress(OSError):  # a network's file system shows a new folder late
            refuse(file.with_name(RANKS), machine, why, hint)
        raise RunError(f"machine {machine}: {why}", hint=hint)


def _start(recipe: Recipe, job: str, machine: int) -> subprocess.Popen[bytes]:
    """Start the ranks of this machine."""
    file = recipe.run / job
    log = log_of_machine(recipe.run / Path(job).parts[0], machine)
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command("rlhf_pipeline.run.ranks", str(file), str(os.getpid()), str(machine))],
            env=with_devices(environment(), all_devices()), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip


def _end_as(over: dict[str, Any]) -> None:
    """End as machine 0 did."""
    message, hint = over["message"], over["hint"]
    if not over["kind"]:
        return
    if over["kind"] in ("Interrupted", "KeyboardInterrupt"):
        raise Interrupted(message or "interrupted", **({"then": hint} if hint else {}))
    if over["kind"] == "Waiting":
        raise Waiting(message, hint=hint)
    errors = [InputError(**error) for error in over.get("errors", ())]
    if errors:
        raise InputErrors(errors) if len(errors) > 1 else errors[0]
    raise RunError(message, hint=hint)


def _write(file: Path, content: dict[str, Any]) -> None:
    """Replace a small file in one step; it tells only of now, so nothing waits for the disk."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(strict_json.dumps(content))
    temporary.replace(file)
