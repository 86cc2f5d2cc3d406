"""Sweeps whose runs are real commands, in processes that need not import TRL. Linux only."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import processes
import pytest
import short_run

from rlhf_pipeline import cli
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.sweep import check, child

# One-token replies to three prompts, taught by SFT and rewarded by a function: a run takes seconds.
RECIPE = """\
name: words
seed: 1
model: {path: base, quantization: none, dtype: float32}
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
stages:
  sft:
    data: {path: demonstrations.jsonl, chat: false}
    trainer: {learning_rate: 1e-2, max_steps: 100, per_device_train_batch_size: 36, gradient_checkpointing: false}
  ppo:
    data: {path: prompts.jsonl, chat: false}
    rewards: [{function: words:reward}]
    trainer:
      max_steps: 30
      per_device_train_batch_size: 192
      local_rollout_forward_batch_size: 192
      num_mini_batches: 2
      num_ppo_epochs: 2
      response_length: 1
      temperature: 1.0
      learning_rate: 7e-4
      cliprange_value: 10.0
      gradient_checkpointing: false
      num_sample_generations: 0
"""

# As `word_rewards` in the benchmark: each prompt has another best word, and ranks them in another order.
REWARD = """

def reward(prompts, completions, **_):
    found = []
    for prompt, completion in zip(prompts, completions):
        row, word = PROMPTS.index(prompt.strip()), completion.strip()
        place = WORDS.index(word) * (1, 5, 7)[row] + 4 * row if word in WORDS else None
        found.append(ELSE if place is None else REWARDS[place % len(WORDS)])
    return found
"""


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Runs start as forks of a process that has imported all; they compare nothing and write no reports."""

    def popen(command: list[str], *, env: dict[str, str], stderr: Any, **_: Any) -> processes.Started:
        words, said = command[command.index("rlhf_pipeline") + 1 :], stderr.fileno()
        return processes.Started(words, Path.cwd(), env, said, said, prepare=short_run.without_report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
        patch.setattr(check, "Launcher", processes.WarmLauncher)
        patch.setattr(wanted, "due", lambda run, recipe: None)
        yield


def sweep(folder: Path, *words: str) -> short_run.Said:
    """`rlhf-pipeline sweep` in a folder, with warm runs."""
    with warm():
        return short_run.ask(folder, "sweep", *words)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every `stage.json` of a sweep, by run and stage."""
    return {
        f"{file.parent.parent.name}/{file.parent.name}": json.loads(file.read_text())
        for file in folder.glob("*/*/stage.json")
    }


class Started(processes.Started):
    """`rlhf-pipeline sweep` in a process of its own, whose runs are forks of it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.log = folder / "said.txt"
        with self.log.open("w") as log:
            super().__init__(["sweep", *words], folder, {"OMP_NUM_THREADS": "1"}, log.fileno(), prepare=_fork_runs)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, happened: Callable[[], Any], timeout_s: float = 60.0) -> None:
        """Look until something has happened."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for one in found:
        found += children.get(one, [])
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _fork_runs() -> None:
    """Have the runs of a sweep in this process be forks of it."""
    short_run.without_report()
    child.subprocess = SimpleNamespace(Popen=_Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]


class _Forked:
    """A command in a fork of this process, to be handled as a `Popen`."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], stderr: IO[str], preexec_fn: Callable[[], None], **_: Any
    ) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code: Any = 1
        try:
            os.setsid()
            preexec_fn()
            for end in (1, 2):
                os.dup2(stderr.fileno(), end)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(env)
            sys.argv = ["rlhf-pipeline", *command[command.index("rlhf_pipeline") + 1 :]]
            processes.fork_the_server()
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
