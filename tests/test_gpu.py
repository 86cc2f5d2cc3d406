"""What must hold on a GPU and cannot be seen on a CPU; `benchmarks/gpu.py` goes through the same."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CHECKS = [
    "nf4_computes_with_its_dequantized_weights",
    "the_first_kl_is_zero",
    "dpo_begins_at_ln_2",
    "checkpointing_recomputes_under_the_right_adapter",
    "four_roles_are_a_base_and_adapters",
    "padding_free_is_padded",
    "flash_attention",
    "liger_layers",
]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU, and skip it where there is none."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return pytest.mark.gpu(pytest.mark.slow(without(test)))


def checks() -> ModuleType:
    """`benchmarks/gpu_checks.py` as a module; its folder is no package."""
    sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_checks", BENCHMARKS / "gpu_checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@on_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_what_must_hold_on_a_gpu(name, tmp_path):
    module = checks()
    try:
        getattr(module, name)(tmp_path)
    except module.NotHere as reason:
        pytest.skip(str(reason))


@on_gpu
def test_resuming_on_a_gpu_ends_as_without_a_break(tmp_path):
    found = {}
    checks().resumed_as_if_never_stopped(tmp_path, lambda name, numbers: found.update({name: numbers}))
    assert found.keys() == {"resume sft", "resume ppo"}


def test_the_benchmark_goes_through_the_same_checks():
    assert [check.__name__ for check in checks().CHECKS] == CHECKS


@pytest.mark.slow
def test_whatever_becomes_of_a_phase_the_others_are_written(tmp_path):
    """One that the time is over for, and one that goes through."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--shape", "small", "--only"]
    late = subprocess.run([*command, "sft,dpo", "--seconds", "0"], capture_output=True, text=True)
    assert (late.returncode, late.stderr) == (1, "")
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(one["phase"], one["numbers"]["state"]) for one in found] == [
        ("sft", "left out: the time is over"),
        ("dpo", "left out: the time is over"),
    ]
    done = subprocess.run([*command, "machine"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), (tmp_path / "machine.log").read_text()
    assert "measured_tflops" in done.stdout and "| phase | state done" in (tmp_path / "results.md").read_text()
