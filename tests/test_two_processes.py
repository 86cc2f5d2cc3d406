"""`rlhf-pipeline run` with two processes that `accelerate launch` starts: as with one, also when it is stopped.

What can happen to one of them, as that it is killed, is in tests/run/test_ranks_at_work.py, where they cost less.
"""

import json
import re
import signal
from pathlib import Path

import pytest
import short_run
from short_run import Command

pytestmark = pytest.mark.slow
TWO = ("launch.num_processes=2", "launch.use_cpu=true", "--only", "sft", "sft.trainer.max_steps=24", "evaluate.along=0")
STEPS = 24


@pytest.fixture
def run(tmp_path, request):
    """A function that starts the command in a folder; nothing of it outlives the test."""

    def start(folder: Path, *overrides: str) -> Command:
        command = Command(folder, *TWO, *overrides, report=False)
        request.addfinalizer(command.clean_up)
        return command

    return start


def work(command: Command) -> Path:
    return command.run / "sft" / "work"


def test_two_processes_are_stopped_and_end_as_one_process_does(tmp_path, run, warm_server):
    """That one has a batch as large as both of theirs, and nothing interrupts it."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
        short_run.write_data(folder)
    code, said = short_run.run_warm(
        warm_server, alone, "tiny", *short_run.OVERRIDES, *TWO[2:], "sft.trainer.per_device_train_batch_size=8"
    )
    assert code == 0, said

    command = run(both)
    assert command.wait_for(lambda: (work(command) / "checkpoint-4").exists()), command.said
    assert short_run.read(work(command) / "progress.json")["phase"] == "training"
    command.signal_all(signal.SIGINT)
    assert command.end(60) == 130, command.said
    assert re.search(r"^sft     training, from base, with 2 processes$", command.said, re.MULTILINE)
    stopped = re.search(r"^stage `sft` stopped, with a checkpoint at step (\d+)$", command.said, re.MULTILINE)
    assert stopped and short_run.sound_step(work(command)) == int(stopped[1]) < STEPS, command.said

    command = run(both)
    assert command.end(120) == 0, command.said
    assert re.search(rf"^sft     resumes from step {stopped[1]} of {STEPS}$", command.said, re.MULTILINE)
    stage = command.run / "sft"
    steps = [json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, STEPS + 1), STEPS], "once each, and what is said at the end"
    assert (stage / "log.rank-1.txt").exists() and not (stage / "work").exists()
    said = short_run.ask(both, "plan", "tiny", *short_run.OVERRIDES, *TWO[:2], *TWO[4:])
    assert "sft, reward, ppo, dpo: trained by 2 processes" in said.out
    assert re.search(r"^sft +sft +base +done", said.out, re.MULTILINE)
    ours, theirs = (short_run.weights(folder / "runs" / "tiny" / "sft") for folder in (both, alone))
    apart = {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}
    assert max(apart.values()) < 1e-4, apart
