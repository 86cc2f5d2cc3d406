"""What a worker sees of the machine: one accelerator, whichever way it was started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Started, WarmLauncher, context, start_a_thread

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.cli.shared import quiet_libraries
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher, one_device

GPU, MIG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# Writes what it sees where a worker writes its log, in place of the jobs of a worker.
PROBE = """
import os, sys
if sys.orig_argv[3].startswith("rlhf_pipeline.run"):
    with open({file!r}, "a") as seen:
        print(sys.orig_argv[3], os.environ.get("CUDA_VISIBLE_DEVICES"), file=seen)
"""


@pytest.fixture(autouse=True)
def no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, "0"), ("0", "0"), ("2,3", "2"), (" 3 , 1", "3"), (GPU, GPU),
        (f"{GPU},GPU-1a", GPU), ("GPU-89,GPU-1a", "GPU-89"),
        (f"{MIG},MIG-GPU-1a/0/0", MIG), ("MIG-0a,MIG-1b", "MIG-0a"),
        ("", ""), ("-1", "-1"), ("-1,0", "-1"), ("1,-1,2", "1"),
    ],
)  # fmt: skip
def test_the_first_visible_device_is_left_as_it_is_written(visible: str | None, used: str) -> None:
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert one_device(given) == {"CUDA_VISIBLE_DEVICES": used, "ZE_AFFINITY_MASK": "0"}


@pytest.mark.parametrize(
    ("given", "cuda", "hip"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,3"}, "0", "2"),
        ({"CUDA_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "2,3"}, "1", "2"),
        # What remains is counted among the devices of ROCr's list: the second of those is its device 5.
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, "0", "0"),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "CUDA_VISIBLE_DEVICES": "1,0"}, "1", "1"),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1,0"}, "0", "1"),
    ],
)
def test_devices_of_amd(given: dict[str, str], cuda: str, hip: str) -> None:
    expected = {"CUDA_VISIBLE_DEVICES": cuda, "HIP_VISIBLE_DEVICES": hip, "ZE_AFFINITY_MASK": "0"}
    assert one_device(given) == expected


@pytest.mark.parametrize(("given", "used"), [("1,2", "1"), ("1.1,0", "1.1")])
def test_devices_of_intel(given: str, used: str) -> None:
    assert one_device({"ZE_AFFINITY_MASK": given}) == {"CUDA_VISIBLE_DEVICES": "0", "ZE_AFFINITY_MASK": used}


# What a worker has started


def is_gone(process: int) -> bool:
    """Whether a process has ended, within a second."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


# Two processes: one plain, and one in a session of its own whose parent ends at once.
STARTS = """
import subprocess, sys, time
sleeper = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
away = subprocess.run(["sh", "-c", "setsid sleep 1001 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
with open({file!r} + ".new", "w") as started:
    started.write(f"{{sleeper.pid}} {{away.stdout}}")
import os; os.rename({file!r} + ".new", {file!r})
"""
RECIPE = """
model: {path: tiny, quantization: none}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 2}
stages:
  sft: {data: tiny:demonstrations, trainer: {max_steps: 1, learning_rate: 1e-4}}
"""
JUDGE = """
time.sleep({seconds})
def judge(completions, **columns):
    return [float(len(text)) for text in completions]
"""


def write_judge(folder: Path, seconds: float) -> Path:
    """A recipe whose judge starts processes as it is imported, and takes its time; returns the file with their ids."""
    started = folder / "started"
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "my_judge.py").write_text(STARTS.format(file=str(started)) + JUDGE.format(seconds=seconds))
    return started


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_what_a_judge_has_started_ends_with_its_worker(tmp_path: Path, warm_server: Launcher) -> None:
    started = write_judge(tmp_path, 0.0)
    loaded = recipes.load(str(tmp_path / "recipe.yaml"))
    runner._check(loaded, plan.make(loaded), warm_server, tmp_path, None)
    processes = [int(word) for word in started.read_text().split()]
    assert len(processes) == 2 and all(map(is_gone, processes))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_judge_has_started_ends_with_the_run(tmp_path: Path, number: int) -> None:
    """By SIGKILL, and by a second Ctrl-C."""
    started = write_judge(tmp_path, 60.0)
    with (tmp_path / "said.txt").open("w") as said:
        command = Started(["run", "recipe.yaml"], tmp_path, {}, said.fileno())
    deadline = time.monotonic() + 60
    while not started.exists():
        assert command.poll() is None and time.monotonic() < deadline, (tmp_path / "said.txt").read_text()
        time.sleep(0.01)
    processes = [int(word) for word in started.read_text().split()]
    assert all(Path(f"/proc/{process}").exists() for process in processes)
    command.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(0.2)
        command.send_signal(number)
    command.wait(30)
    assert all(map(is_gone, processes))


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which each process of ours that starts now says what it sees of two devices."""
    context()  # what the forks of other tests come of must not see these
    (tmp_path / "sitecustomize.py").write_text(PROBE.format(file=str(tmp_path / "seen")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{MIG},{GPU}")
    return tmp_path / "seen"


def test_the_server_that_forks_workers_sees_one_device_and_the_runner_all(seen: Path, tmp_path: Path) -> None:
    """It does from its beginning, and so do its forks; it need not import all for that."""
    with Launcher(tmp_path / "server.log", fork=True):
        deadline = time.monotonic() + 60
        while not (seen.exists() and seen.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert seen.read_text() == f"rlhf_pipeline.run.server {MIG}\n"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == f"{MIG},{GPU}"


@pytest.mark.slow
def test_where_a_fork_is_refused_the_same_job_runs_in_a_spawned_worker_that_sees_one_device(
    seen: Path, tmp_path: Path
) -> None:
    """When it ends, so does what it has started."""
    started = write_judge(tmp_path, 0.0)
    recipe = recipes.load(str(tmp_path / "recipe.yaml"))
    job = {
        "task": "check",
        "recipe": recipe.model_dump(),
        "folders": [str(tmp_path)],
        "stages": ["sft"],
        "current": [],
        "card": None,
    }
    with WarmLauncher(tmp_path / "server.log", prepare=start_a_thread) as launcher:
        assert launcher._how == "fork"
        assert launcher.run(job, tmp_path / "job.json", tmp_path / "log.txt") == 0
        assert launcher._how == "spawn"
        if sys.platform == "linux":
            assert all(is_gone(int(word)) for word in started.read_text().split())
    assert set(json.loads((tmp_path / "result.json").read_text())) == {"warnings", "forecast"}
    assert seen.read_text() == "".join(f"rlhf_pipeline.run.{process} {MIG}\n" for process in ("server", "worker"))


def test_commands_that_load_a_model_themselves_see_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_VISIBLE_DEVICES": "3,1"})
    with quiet_libraries():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_env_says_which_device_a_run_uses() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_pipeline", "env"], capture_output=True, text=True, check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "3,1"},
    )  # fmt: skip
    assert "- a run uses: CUDA_VISIBLE_DEVICES=3, ZE_AFFINITY_MASK=0\n" in done.stdout
