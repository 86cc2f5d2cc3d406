"""One run of a sweep at work: `rlhf-pipeline run` in a process of its own, followed by its run directory. No torch."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_pipeline import kinds
from rlhf_pipeline.run.launch import command, die_with
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.headline import headline
from rlhf_pipeline.rundir.layout import METRICS, PROGRESS, RunDirectory, read_json
from rlhf_pipeline.rundir.record import GATE_CLOSED, Record
from rlhf_pipeline.rundir.strict_json import is_number
from rlhf_pipeline.rundir.words import duration, one_line
from rlhf_pipeline.sweep.goal import Goal

OUTPUT = "output.txt"  # in a run directory: all that its command says
STOPPED = 130  # its exit code once it was asked to stop
Say = Callable[[str], None]


class Child:
    """A run at work. It ends with this process, however that ends.

    Args:
        recipe: as on the command line.
        overrides: its own, its name and place among them.
        directory: where it will be.
        environment: further variables.
        stages: the recipe's, in its order.
        options: of `run`, as `--until`.

    Attributes:
        directory: where it is.
        asked: it was asked to stop.
    """

    def __init__(
        self,
        recipe: str,
        overrides: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        stages: Sequence[str],
        options: Sequence[str] = (),
    ) -> None:
        self.directory, self.asked = directory, False
        self._stages = list(stages)
        self._states = {name: state for name, state, _ in self._recorded()}
        directory.mkdir(parents=True, exist_ok=True)
        self._said_before = (directory / OUTPUT).stat().st_size if (directory / OUTPUT).exists() else 0
        with (directory / OUTPUT).open("a") as output:
            self._process = subprocess.Popen(
                command("rlhf_pipeline", "run", recipe, *overrides, *options),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours: it would hear of it twice, and stop without a checkpoint
                preexec_fn=functools.partial(die_with, os.getpid()),
            )

    @property
    def exit_code(self) -> int | None:
        """As the process has ended; None while it is at work."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to stop with a checkpoint; where it was asked before, at once."""
        self.asked = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for its end.

        Raises:
            TimeoutExpired: it takes longer.
        """
        self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def news(self) -> Iterator[str]:
        """What its stages have done since the last time, a line each."""
        for name, state, record in self._recorded():
            if self._states.get(name) != state:
                self._states[name] = state
                yield f"{name:<7} {_told(record)}"

    def _recorded(self) -> list[tuple[str, str, Record]]:
        """The stages that have a record, with what it says, in the recipe's order."""
        run, found = RunDirectory(self.directory), []
        for name in self._stages:
            record = run.record(name)
            if record is not None:
                said = f"{record.state} {record.taken_at} {record.started_at} {record.resumed_from_step}"
                found.append((name, said, record))
        return found

    def problem(self) -> str:
        """Why it failed, in one line, as its command has said it."""
        with (self.directory / OUTPUT).open(encoding="utf-8", errors="replace") as output:
            output.seek(self._said_before)
            said = [line.removeprefix("error: ") for line in output.read().splitlines() if line.startswith("error: ")]
        code = self.exit_code or 0
        if said:
            return one_line(said[0])
        return f"signal {signal.Signals(-code).name} ended it" if code < 0 else "somebody stopped it"


def logged(directory: Path, goal: Goal) -> dict[int, float]:
    """What training has logged of a goal's metric so far, by how much of its steps was done, in percent.

    Args:
        directory: the run's.
        goal: the goal.
    """
    stage = RunDirectory(directory).stage(goal.stage)
    of = (read_json(RunDirectory(directory).work(goal.stage) / PROGRESS) or {}).get("of")
    found: dict[int, float] = {}
    if not isinstance(of, int) or of <= 0 or (read_json(stage / "work" / PROGRESS) or {}).get("phase") != "training":
        return found
    for row in jsonl.rows(stage / METRICS):
        value = next((row[name] for name in goal.logged if is_number(row.get(name))), None)
        if value is not None and isinstance(row.get("step"), int):
            found[round(100 * row["step"] / of)] = value
    return found


def _told(record: Record) -> str:
    """What a record says, for the end of a line."""
    if record.state == "running":
        kind = kinds.find(record.kind)
        resumed = f", resumed from step {record.resumed_from_step}" if record.resumed_from_step else ""
        return (kind.doing if kind else "at work") + resumed
    if record.state == "failed":
        return "stopped" if record.stopped else f"failed: {one_line(record.error or '')}"
    if record.state == GATE_CLOSED:
        return f"done, a gate is closed: {record.closed_gate}"
    if record.taken_from:
        return f"taken from {record.taken_from}"
    numbers = headline(record.kind, record.metrics)
    judged = "".join(f", {number.name} {number.text}" for number in numbers if number.metric == kinds.JUDGED)
    return f"done in {duration(record.wall_s)}{judged}"
