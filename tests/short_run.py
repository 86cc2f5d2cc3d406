"""The tiny recipe through the real command, short enough to be interrupted again and again. Linux only."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import processes
import pytest
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pipeline import cli
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher

STAGES = ("sft", "reward", "ppo", "dpo")
WEIGHTS = "adapter_model.safetensors"
ROWS = {"demonstrations": 64, "preferences": 64, "prompts": 32, "heldout": 8}
STEPS = 7
OVERRIDES = [
    "model.dtype=float32",
    "evaluate.data=heldout.jsonl",
    "evaluate.n=8",
    "evaluate.batch_size=4",
    "evaluate.max_new_tokens=8",
    "evaluate.along=2",
    "sft.data=demonstrations.jsonl",
    "reward.data.path=preferences.jsonl",
    "ppo.data=prompts.jsonl",
    "dpo.data.path=preferences.jsonl",
    "ppo.trainer.total_episodes=28",
    "ppo.trainer.response_length=6",
    "ppo.trainer.num_sample_generations=7",
    *(f"{stage}.trainer.max_steps={STEPS}" for stage in STAGES if stage != "ppo"),
    *(f"{stage}.trainer.save_steps=2" for stage in STAGES),
    *(f"{stage}.trainer.per_device_train_batch_size=4" for stage in STAGES),
]  # fmt: skip


def write_data(folder: Path) -> None:
    """The first rows of each of the shipped data files, in a folder."""
    for name, count in ROWS.items():
        with (TINY / "data" / f"{name}.jsonl").open(encoding="utf-8") as rows:
            (folder / f"{name}.jsonl").write_text("".join(next(rows) for _ in range(count)), encoding="utf-8")


class Said(NamedTuple):
    """How a command ended: its exit code, and what it wrote to standard output and standard error."""

    code: int
    out: str
    err: str


def ask(folder: Path, *words: str, server: Launcher | None = None) -> Said:
    """`rlhf-pipeline` in this process, which leaves the environment as it was.

    Args:
        folder: where to run.
        words: the command's arguments.
        server: whose workers it takes, if it needs some.
    """
    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["rlhf-pipeline", *words])
        if server:
            patch.setattr(runner, "Launcher", lambda *_, **__: contextlib.nullcontext(server))
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        finally:
            os.environ.clear()
            os.environ.update(environment)
    return Said(code or 0, out.getvalue(), err.getvalue())


def run_warm(server: Launcher, folder: Path, *arguments: str, report: bool = False) -> tuple[int, str]:
    """`rlhf-pipeline run` in this process, with workers that are forked from a server which has imported already.

    Args:
        server: the server.
        folder: where to run.
        arguments: the command's.
        report: let it end with a comparison and a report, which takes seconds.

    Returns:
        Its exit code and what it said, on either stream.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr(cli.runs, "_report", lambda run: None)
            patch.setattr(wanted, "due", lambda run, recipe: None)
        code, out, err = ask(folder, "run", *arguments, server=server)
    return code, err + out


def without_report() -> None:
    """Have this process compare nothing and write no report, which takes seconds whenever a run stops."""
    cli.runs._report = lambda run: None
    wanted.due = lambda run, recipe: None


class Command:
    """`rlhf-pipeline run tiny` in a folder, as a process group of its own, as a terminal starts it.

    Args:
        folder: where the data are, and the run directory comes to be.
        overrides: further settings.
        ignoring: signals that it ignores, as under `nohup`.
        stderr: where standard error goes, if not to a file: a descriptor, or None where it is closed.
        report: let it end with a comparison and a report.
        imports: have all its processes import what they need; else it starts with that done.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        ignoring: tuple[int, ...] = (),
        stderr: int | None = -1,
        report: bool = True,
        imports: bool = False,
    ) -> None:
        self.log = folder / f"said-{uuid.uuid4().hex[:12]}.txt"
        self.run = folder / "runs" / "tiny"
        arguments = ["run", "tiny", *OVERRIDES, *overrides]
        environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self.process: subprocess.Popen[bytes] | processes.Started
        with self.log.open("w") as log:
            if imports:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "rlhf_pipeline", *arguments],
                    cwd=folder,
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
            else:
                output = log.fileno() if stderr == -1 else stderr
                prepare = None if report else without_report
                self.process = processes.Started(
                    arguments, folder, environment, output, ignoring=ignoring, prepare=prepare
                )

    @property
    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Every process of its session that is alive."""
        alive = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    state, *numbers = (process / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(numbers[2]) == self.process.pid and state not in "ZX":
                        alive.append(int(process.name))
        return alive

    def wait_for(self, happened: Callable[[], Any], timeout_s: float = 120.0, pause_s: float = 0.0005) -> bool:
        """Look until something has happened; False where the command ended before."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            if self.process.poll() is not None:
                return bool(happened())
            assert time.monotonic() < deadline, f"waited {timeout_s} s; it said:\n{self.said}"
            time.sleep(pause_s)
        return True

    def signal_all(self, number: int) -> None:
        """Send a signal to the whole process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def end(self, timeout_s: float = 120.0, linger_s: float = 0.5) -> int:
        """Wait for its end; its exit code.

        Args:
            timeout_s: how long it may take.
            linger_s: how long other processes of its tree may stay after it.
        """
        code = self.process.wait(timeout_s)
        deadline = time.monotonic() + linger_s
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes are left behind: {left}"
            time.sleep(0.01)
        return code

    def clean_up(self) -> None:
        """See that nothing of it outlives a test."""
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait(10)


def states(folder: Path) -> dict[str, str]:
    """The state of each stage, as `plan --json` says it."""
    code, out, err = ask(folder, "plan", "tiny", *OVERRIDES, "--json")
    assert code == 0, err
    return {stage["name"]: stage["state"] for stage in json.loads(out)["stages"]}


def read(file: Path) -> dict[str, Any]:
    """A JSON file that is there whole or not at all."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def holds(folder: Path, files: dict[str, list]) -> bool:
    """Whether files have the recorded sizes and SHA-256, looked at independently of the package."""
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == size
        and hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, (size, digest) in files.items()
    )


def sound_step(work: Path) -> int | None:
    """The step of the latest checkpoint whose files are all what its manifest says."""
    manifests = {int(file.parent.name.split("-")[1]): file for file in work.glob("checkpoint-*/manifest.json")}
    return max((step for step, file in manifests.items() if holds(file.parent, read(file))), default=None)


def expected_progress(stage: Path) -> str | None:
    """What the command must say when it resumes a stage; None where the stage must be retrained from the start."""
    work = stage / "work"
    files = read(work / "trained.json").get("files")
    if files:
        finished = "metrics" in read(work / "result.json")
        if finished and (holds(work / "adapter", files) or holds(stage / "adapter", files)):
            return "trained, to be published"
        if holds(work / "adapter", files):
            return "trained, to be judged"
    step = sound_step(work)
    return None if step is None else f"resumes from step {step} of {STEPS}"


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file; none where there is no such file."""
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def weights(stage: Path) -> dict[str, Tensor]:
    """The tensors of a stage's artifact."""
    return load_file(stage / "adapter" / WEIGHTS)


def assert_same_end(run: Path, other: Path) -> None:
    """See that two runs have left the same: adapters, numbers, replies, and not a file more or less.

    Adapters within 1e-5, numbers to four digits: how sums are rounded may depend on where in memory a tensor lies.
    """
    for stage in STAGES:
        ours, theirs = weights(run / stage), weights(other / stage)
        assert ours.keys() == theirs.keys()
        apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
        assert apart <= 1e-5, f"the adapters of {stage} are {apart} apart"
        for file in ("metrics.jsonl", "samples.jsonl"):
            ours_rows, theirs_rows = ([_lasting(row) for row in rows(folder / stage / file)] for folder in (run, other))
            assert ours_rows == theirs_rows, f"{stage}/{file}"
        metrics, their_metrics = (_lasting(read(folder / stage / "stage.json")["metrics"]) for folder in (run, other))
        assert metrics == their_metrics, stage
    assert files_of(run) ^ files_of(other) == set()


def _lasting(row: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    timing = ("seconds", "per_second", "runtime")
    kept = {name: value for name, value in row.items() if name not in ("eps", "time") and not name.endswith(timing)}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in kept.items()}


def files_of(run: Path) -> set[str]:
    """Every path in a run directory."""
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}
