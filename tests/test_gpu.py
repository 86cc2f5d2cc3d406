"""What must hold on a GPU and cannot be seen on a CPU; `benchmarks/gpu.py` goes through the same."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def checks() -> ModuleType:
    """`benchmarks/gpu_checks.py` as a module; its folder is no package."""
    sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_checks", BENCHMARKS / "gpu_checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "nf4_computes_with_its_dequantized_weights",
        "the_first_kl_is_zero",
        "dpo_begins_at_ln_2",
        "checkpointing_recomputes_under_the_right_adapter",
        "four_roles_are_a_base_and_adapters",
        "padding_free_is_padded",
        "flash_attention",
        "liger_layers",
    ],
)
def test_what_must_hold_on_a_gpu(name, tmp_path):
    module = checks()
    try:
        getattr(module, name)(tmp_path)
    except module.NotHere as reason:
        pytest.skip(str(reason))


def test_resuming_on_a_gpu_ends_as_without_a_break(tmp_path):
    found = {}
    checks().resumed_as_if_never_stopped(tmp_path, lambda name, numbers: found.update({name: numbers}))
    assert found.keys() == {"resume sft", "resume ppo"}
