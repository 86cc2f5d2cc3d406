"""A run that is killed anywhere, again and again, goes on each time and ends as one that nothing interrupted.

The kills fall on random instants, most of them while something of interest lies on the disk: half a checkpoint, an
adapter that is not published, a result that is not recorded. `make soak` does so for longer.
"""

import collections
import os
import random
import signal
import time
from pathlib import Path

import pytest
import short_run
from short_run import STAGES, Command

pytestmark = pytest.mark.slow

LONG = int(os.environ.get("SOAK_KILLS", "0"))
SEED = int(os.environ.get("SOAK_SEED", str(time.time_ns() % 10**6)))
# Where to kill in the short form: the stage, what to wait for, and at most how many seconds after it. The first kill
# hits the command alone, whose server and worker must not outlive it; they would go on for longer than that is waited.
SHORT = [
    ("sft", "checkpoint", 0.02),
    ("sft", "result", 0.0),
    ("reward", "published", 0.0),
    ("ppo", "trained", 0.1),
    ("dpo", "checkpoint", 0.02),
]

# The same for the long form, where chance decides on the stage; "start" is any instant from the very first on.
MOMENTS = [
    ("start", 8.0),
    *[("training", 1.5)] * 2,
    *[("checkpoint", 0.03)] * 2,
    ("saving", 0.02),
    ("trained", 0.1),
    ("result", 0.01),
    ("published", 0.01),
]


def is_there(command: Command, stage: str, what: str) -> bool:
    """Whether a moment has come in a stage, of this time's attempt at it."""
    if f"\n{stage:<7} " not in command.said:
        return False
    folder, work = command.run / stage, command.run / stage / "work"
    if what == "training":
        return work.exists()
    if what == "checkpoint":
        return is_writing_checkpoint(work)
    if what == "published":
        return (folder / "adapter").exists()
    return (work / {"saving": "adapter", "trained": "trained.json", "result": "result.json"}[what]).exists()


def step_of(progress: str) -> int:
    """The step in `resumes from step 4 of 7`."""
    return int(progress.partition(" step ")[2].split()[0])


def is_writing_checkpoint(work: Path) -> bool:
    return any(name.startswith(".new-checkpoint-") for name in _names(work))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  often enough to matter
    except FileNotFoundError:
        return []


def struck(command: Command) -> tuple[str, str]:
    """Where a kill fell: in which stage, and while what was going on there."""
    begun = [stage for stage in STAGES if f"\n{stage:<7} " in command.said]
    if not begun:
        return "-", "checking"
    stage = begun[-1]
    folder, work = command.run / stage, command.run / stage / "work"
    done = short_run.read(folder / "stage.json").get("state") == "done"
    if done and not work.exists():
        return "-", "between"
    if done or (work / "result.json").exists() or (folder / "adapter").exists():
        return stage, "publishing"
    if (work / "trained.json").exists():
        return stage, "judging"
    if (work / "adapter").exists():
        return stage, "saving"
    return stage, "checkpointing" if is_writing_checkpoint(work) else "training"


class Attempts:
    """One run directory through all its kills.

    Args:
        folder: an empty folder.
        chance: decides how long after a moment a kill comes, and whom it hits.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        short_run.write_data(folder)
        self.folder, self.chance = folder, chance
        self.run = folder / "runs" / "tiny"
        self.fell: list[tuple[str, str]] = []
        self.reached: dict[str, int] = {}

    def start_and_kill(self, stage: str, what: str, within_s: float, alone: bool = False) -> bool:
        """Start the command and kill it at a moment; False if it came to its end before."""
        before = {name: short_run.expected_progress(self.run / name) for name in STAGES if self._broke_off(name)}
        command = Command(self.folder, imports=what == "start")
        try:
            if command.wait_for(lambda: what == "start" or is_there(command, stage, what)):
                time.sleep(self.chance.uniform(0, within_s))
            came_to_its_end = command.process.poll() is not None
            if not came_to_its_end:
                if alone or self.chance.random() < 0.25:
                    command.process.kill()  # its server and its worker must not outlive it
                else:
                    command.signal_all(signal.SIGKILL)
            # A server whose runner is killed before it has asked to die with it ends by itself, once it has imported.
            code = command.end(linger_s=2.0 if what == "start" else 0.2)
        finally:
            command.clean_up()
        assert code == 0 if came_to_its_end else code in (0, -signal.SIGKILL), command.said
        if not came_to_its_end:
            self.fell.append(struck(command))
        print(f"{stage} {what}: {self.fell[-1] if not came_to_its_end else 'the end'}", flush=True)
        self._went_on_as_it_had_to(before, command.said)
        self._tells_the_truth()
        return not came_to_its_end

    def finish(self) -> None:
        """Let the command come to its end, without any standard error."""
        before = {name: short_run.expected_progress(self.run / name) for name in STAGES if self._broke_off(name)}
        command = Command(self.folder, stderr=None)
        try:
            code = command.end()
        finally:
            command.clean_up()
        assert code == 0
        for stage, progress in before.items():
            if progress is None or "step" in progress:
                step = step_of(progress) if progress else None
                assert short_run.read(self.run / stage / "stage.json")["resumed_from_step"] == step
        assert set(short_run.states(self.folder).values()) == {"done"}
        assert short_run.ask(self.folder, "status", "tiny", *short_run.OVERRIDES, "-q").code == 0

    def _broke_off(self, stage: str) -> bool:
        return (self.run / stage).exists() and short_run.read(self.run / stage / "stage.json").get("state") != "done"

    def _went_on_as_it_had_to(self, before: dict[str, str | None], said: str) -> None:
        """See that a stage that was interrupted resumed from the best there was, and that nothing was put aside."""
        assert "former results" not in said
        for stage, progress in before.items():
            lines = [line[8:] for line in said.splitlines() if line.startswith(f"{stage:<7} ")]
            if not lines:
                continue  # it was killed before it came to that
            if progress is None:
                assert lines[0].startswith("training, from "), said
            else:
                assert lines[0] == progress, said
            if any(line.startswith("training, from ") for line in lines):
                step = step_of(progress) if progress and "step" in progress else None
                assert short_run.read(self.run / stage / "stage.json")["resumed_from_step"] == step

    def _tells_the_truth(self) -> None:
        """See that what is said to be done is there whole, that nothing else is, and that no progress was lost."""
        done = {name for name in STAGES if short_run.read(self.run / name / "stage.json").get("state") == "done"}
        for stage in done:
            files = short_run.read(self.run / stage / "stage.json")["artifact_files"]
            assert short_run.WEIGHTS in files and short_run.holds(self.run / stage / "adapter", files)
            assert all(tensor.isfinite().all() for tensor in short_run.weights(self.run / stage).values())
        assert {name for name, state in short_run.states(self.folder).items() if state == "done"} == done
        for stage in STAGES:
            progress = short_run.expected_progress(self.run / stage) if stage not in done else None
            step = short_run.STEPS + 1 if progress and progress.startswith("trained") else None
            if progress and step is None:
                step = step_of(progress)
            reached = short_run.STEPS + 2 if stage in done else step or 0
            assert reached >= self.reached.get(stage, 0), f"{stage} lost progress"
            self.reached[stage] = reached


def test_a_run_killed_anywhere_ends_as_one_that_nothing_interrupted(tiny_run: Path, tmp_path: Path) -> None:
    print(f"SOAK_SEED={SEED}")
    attempts = Attempts(tmp_path, random.Random(SEED))
    for number, moment in enumerate(SHORT):
        attempts.start_and_kill(*moment, alone=number == 0)
    attempts.finish()
    print(attempts.fell)
    short_run.assert_same_end(attempts.run, tiny_run)
    assert len(attempts.fell) >= 3  # a moment may pass unseen on a busy machine, not every one
    assert {"checkpointing", "publishing"} <= {what for _, what in attempts.fell}


@pytest.mark.skipif(not LONG, reason="`make soak` sets SOAK_KILLS")
def test_soak(tiny_run: Path, tmp_path: Path) -> None:
    """As above, run directory after run directory, until there were `SOAK_KILLS` kills."""
    print(f"SOAK_SEED={SEED}")
    chance = random.Random(SEED)
    fell: collections.Counter[tuple[str, str]] = collections.Counter()
    rounds = 0
    began = time.monotonic()
    while fell.total() < LONG:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        attempts = Attempts(folder, chance)
        going_on = True
        while going_on and fell.total() + len(attempts.fell) < LONG:
            open_stages = [stage for stage in STAGES if attempts.reached.get(stage, 0) <= short_run.STEPS + 1]
            if not open_stages:
                break
            what, within_s = chance.choice(MOMENTS)
            # The next stage three times out of four: a kill there leaves more to be killed.
            stage = chance.choice(open_stages) if chance.random() < 0.25 else open_stages[0]
            going_on = attempts.start_and_kill(stage, what, within_s)
        attempts.finish()
        short_run.assert_same_end(attempts.run, tiny_run)
        fell.update(attempts.fell)
    columns = ("checking", "between", "training", "checkpointing", "saving", "judging", "publishing")
    print(f"\n{fell.total()} kills in {rounds} runs, {time.monotonic() - began:.0f} s")
    print(f"{'stage':<8}" + "".join(f"{column:>15}" for column in columns))
    for stage in ("-", *STAGES):
        print(f"{stage:<8}" + "".join(f"{fell[stage, column]:>15}" for column in columns))
