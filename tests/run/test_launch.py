"""What a worker sees of the machine: one accelerator, whichever way it was started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipeline.cli.shared import quiet_libraries
from rlhf_pipeline.run.launch import Launcher, one_device

GPU, MIG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# Writes what it sees where a worker writes its log, in place of the jobs of a worker.
PROBE = """
import os, sys
if "rlhf_pipeline.run" in " ".join(sys.orig_argv):
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


@pytest.mark.parametrize("fork", [False, True])
def test_a_worker_sees_one_device_and_the_runner_all(
    fork: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that cannot be read is enough: the environment is that of the process from its beginning."""
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(PROBE.format(file=str(seen)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{MIG},{GPU}")
    with Launcher(tmp_path / "server.log", fork=fork) as launcher:
        assert launcher.run({}, tmp_path / "job.json", tmp_path / "log.txt") != 0
    module = "rlhf_pipeline.run.server" if fork else "rlhf_pipeline.run.worker"
    assert seen.read_text() == f"{module} {MIG}\n"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == f"{MIG},{GPU}"


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
