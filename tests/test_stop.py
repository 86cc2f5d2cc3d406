"""A run that is asked to stop does so after its step, says how to go on, and resumes from there to the same end."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import short_run
from short_run import Command

pytestmark = pytest.mark.slow

# More steps and longer replies than the shortest, so that a signal finds PPO and DPO at work.
LONGER = (
    "sft.trainer.max_steps=3",
    "reward.trainer.max_steps=3",
    "evaluate.along=0",
    "ppo.trainer.total_episodes=48",
    "dpo.trainer.max_steps=16",
    "evaluate.max_new_tokens=48",
)
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C once more stops at once"


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """What starts the tests may ignore some, as `nohup` does, and the commands would inherit that."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """A function that starts the command; nothing of it outlives the test."""
    commands: list[Command] = []

    def begin(folder: Path, *overrides: str, **options: Any) -> Command:
        commands.append(Command(folder, *LONGER, *overrides, report=False, **options))
        return commands[-1]

    yield begin
    for command in commands:
        command.clean_up()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped; what it said went into a pipe whose other end was closed."""
    folder = tmp_path_factory.mktemp("untouched")
    short_run.write_data(folder)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = Command(folder, *LONGER, stderr=write_end, report=False)
    os.close(write_end)
    try:
        assert command.end() == 0
    finally:
        command.clean_up()
    return folder


@pytest.fixture
def copied(untouched: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(untouched, tmp_path / "copy"))


def state(run: Path, stage: str) -> str | None:
    return short_run.read(run / stage / "stage.json").get("state")


def steps(run: Path, stage: str) -> set[str]:
    return {path.name for path in (run / stage / "work").glob("checkpoint-*")}


def stop(command: Command, number: int, alone: bool = False, then: str = "\nthe same command resumes from here") -> str:
    """Send a signal, to the runner alone or to its whole process group as a terminal does; what the command said."""
    if alone:
        command.process.send_signal(number)
    else:
        command.signal_all(number)
    assert command.end(60) == 130, command.said
    assert command.said.endswith(f"{then}\n") and "Traceback" not in command.said
    return command.said


def stop_at_a_step(command: Command, stage: str, number: int, alone: bool = False) -> int:
    """Stop a stage once it has written a checkpoint; the step it stopped at."""
    run, before = command.run, steps(command.run, stage)
    assert command.wait_for(lambda: steps(run, stage) - before), command.said
    said = stop(command, number, alone)
    match = re.search(rf"^stage `{stage}` stopped, with a checkpoint at step (\d+)$", said, re.MULTILINE)
    assert match and STOPPING in said, said
    assert short_run.sound_step(run / stage / "work") == int(match[1])
    assert state(run, stage) == "failed" and not (run / stage / "adapter").exists()
    return int(match[1])


def went_on(command: Command, stage: str, step: int) -> None:
    """See that a stage went on from exactly the step it had stopped at."""
    assert re.search(rf"^{stage:<7} resumes from step {step} of \d+$", command.said, re.MULTILINE), command.said
    assert short_run.read(command.run / stage / "stage.json")["resumed_from_step"] == step


def workers(command: Command) -> list[int]:
    """The processes of a command that were forked from its server: the others are itself and its children."""
    parents = {}
    for process in command.processes():
        with contextlib.suppress(OSError):
            parents[process] = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    server = [process for process, parent in parents.items() if parent == command.process.pid]
    return [process for process, parent in parents.items() if parent in server]


def seconds_used(process: int) -> float:
    """The processor time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_run_stopped_again_and_again_ends_as_one_that_nothing_stopped(
    untouched: Path, copied: Path, start: Callable[..., Command]
) -> None:
    """By each signal that means it: in the trainer of PPO and in TRL's, between stages, while judging; past a SIGHUP.

    SFT and the reward model have the trainer of DPO, and are done when this begins.
    """
    run = copied / "runs" / "tiny"
    for stage in ("ppo", "dpo"):
        shutil.rmtree(run / stage)

    command = start(copied)
    in_ppo = stop_at_a_step(command, "ppo", signal.SIGTERM, alone=True)
    assert "\nsft " not in command.said and "resumes from step" not in command.said

    command = start(copied)
    assert command.wait_for(lambda: state(run, "ppo") == "done"), command.said
    stop(command, signal.SIGINT)  # the next stage has not begun, or not got as far as a step
    went_on(command, "ppo", in_ppo)
    assert state(run, "ppo") == "done" and not steps(run, "dpo")

    command = start(copied)
    step = stop_at_a_step(command, "dpo", signal.SIGINT)

    command = start(copied)
    assert command.wait_for((run / "dpo" / "work" / "trained.json").exists), command.said
    said = stop(command, signal.SIGHUP)
    went_on(command, "dpo", step)
    assert "stage `dpo` stopped" in said and "trained, to be judged" in said

    command = start(copied, ignoring=(signal.SIGHUP,))
    assert command.wait_for(lambda: "dpo     trained, to be judged\n" in command.said)
    command.signal_all(signal.SIGHUP)
    assert command.end() == 0, command.said
    assert "stopping" not in command.said

    short_run.assert_same_end(run, untouched / "runs" / "tiny")


def test_before_anything_is_trained_a_run_stops_at_once(tmp_path: Path, start: Callable[..., Command]) -> None:
    """While the server imports, and while the check is at work; each takes seconds."""
    folders = [tmp_path / name for name in ("importing", "checking")]
    for folder in folders:
        folder.mkdir()
        short_run.write_data(folder)
    importing = start(folders[0], imports=True)
    assert importing.wait_for(lambda: "check " in importing.said)
    assert importing.wait_for(lambda: len(importing.processes()) == 2, pause_s=0.01)
    asked = time.monotonic()
    assert "\ninterrupted\n" in stop(importing, signal.SIGINT)
    assert time.monotonic() - asked < 1.5

    # All of the shipped pairs: that takes a while to check.
    checking = start(folders[1], "reward.data.path=tiny:preferences", "dpo.data.path=tiny:preferences")
    # It is at work, and known to be: the runner reads of it a moment after it was forked.
    assert checking.wait_for(lambda: any(seconds_used(worker) > 0.2 for worker in workers(checking)), pause_s=0.01)
    assert "\nstopped before anything was trained\n" in stop(checking, signal.SIGTERM)
    assert not any((folder / "runs").exists() for folder in folders)


def test_a_second_signal_stops_within_a_step(copied: Path, start: Callable[..., Command]) -> None:
    run = copied / "runs" / "tiny"
    long_step = (
        "ppo.data=tiny:prompts",
        "ppo.trainer.gradient_accumulation_steps=100",
        "ppo.trainer.num_ppo_epochs=100",
    )
    command = start(copied, *long_step, "ppo.trainer.total_episodes=800")
    assert command.wait_for((run / "ppo" / "work" / "job.json").exists), command.said
    assert command.wait_for(lambda: workers(command), pause_s=0.01)
    (worker,) = workers(command)
    assert command.wait_for(lambda: seconds_used(worker) > 3.0, pause_s=0.05)  # it is long past loading
    command.signal_all(signal.SIGINT)
    assert command.wait_for(lambda: STOPPING in command.said)
    time.sleep(1.0)
    assert command.process.poll() is None, command.said
    asked = time.monotonic()
    said = stop(command, signal.SIGINT, then="the same command begins this one again")
    assert time.monotonic() - asked < 1.5
    assert "\nstage `ppo` stopped before its first checkpoint\n" in said
    assert state(run, "ppo") == "failed" and state(run, "sft") == state(run, "dpo") == "done"
