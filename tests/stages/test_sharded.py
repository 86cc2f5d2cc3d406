"""Two ranks that divide the model between them, by FSDP2 or ZeRO-2, train as one process that holds all of it.

Accelerate takes FSDP for GPUs alone. The CPU passes for some here; all else is as `accelerate launch` has it.
"""

import importlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from test_several_ranks import adapter, assert_same, copies, keep_checkpoint, logged, new_job, prepared, train
from together import connect, together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.stages import dpo
from rlhf_pipeline.stages.resumable import Resumable

__all__ = ["copies", "prepared"]  # fixtures
# As `accelerate launch` says it of `fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}`.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "ACCELERATE_TORCH_DEVICE": "cpu"}  # fmt: skip
pytestmark = pytest.mark.slow


def sharded(folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank, and see that the model is divided."""
    build, finish = AcceleratorState.__init__, Resumable._finalize_training

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        build(self, *args, **kwargs)

    def finish_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.model, FSDPModule)
        layers = [one for name, one in self.model.named_parameters() if ".layers." in name]
        assert layers and all(isinstance(one, DTensor) for one in layers)
        return finish(self, *args, **kwargs)

    os.environ.update(FSDP)
    AcceleratorState.__init__, Resumable._finalize_training = init, finish_and_look  # this process is a fork
    return train(folder, stage, *overrides)


@pytest.mark.parametrize(
    ("stage", "of_each", "more"),
    [
        ("sft", 1, ()),
        ("sft", 1, ("model.quantization=nf4",)),
        ("reward", 1, ()),
        ("dpo", 1, ("dpo.trainer.loss_type=[sigmoid]", "dpo.trainer.loss_weights=null")),
        ("kto", 2, ("kto.reference=base",)),
    ],
)
def test_two_ranks_that_divide_the_model_end_as_one_process(copies, stage, of_each, more):
    """The artifact is the same files; of DPO, the first loss says that policy and reference are one."""
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size="
    alone = train(one, stage, f"{size}{2 * of_each}", f"{stage}.trainer.per_device_eval_batch_size=2", *more)
    first, second = together(sharded, two, stage, f"{size}{of_each}", *more)
    assert_same(one, two, stage)
    assert second == {} and first == pytest.approx(alone, rel=1e-4, abs=1e-5)
    files = [
        sorted(path.name for path in (folder / "runs/short" / stage / "work/adapter").iterdir()) for folder in copies
    ]
    assert files[0] == files[1]
    assert stage != "dpo" or logged(two, stage)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_divided_model_resumes_from_any_of_its_checkpoints(copies, stage):
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size=1"
    together(sharded, one, stage, size)
    keep_checkpoint(one, two, stage, 1)
    together(sharded, two, stage, size)
    assert_same(one, two, stage, within=0)
    assert adapter(one, stage).keys() == adapter(two, stage).keys()


def test_zero_3_is_refused(copies, tmp_path):
    """Also where a file of DeepSpeed's own says it."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for config in ("{zero_stage: 3}", f"{{deepspeed_config_file: {tmp_path / 'zero.json'}}}"):
        launch = f"dpo.launch={{num_processes: 2, deepspeed_config: {config}}}"
        with pytest.raises(InputError, match="ZeRO-3"):
            dpo.prepare(new_job(copies[0], "dpo", launch))
    dpo.prepare(new_job(copies[0], "dpo", launch.replace(config, "{zero_stage: 2}")))


def with_deepspeed(folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank with ZeRO-2 and without the kernels that DeepSpeed would compile for a CPU."""
    connect()
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    importlib.import_module("deepspeed.comm").init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    build = AcceleratorState.__init__
    AcceleratorState.__init__ = lambda *of, **given: build(*of, **given | {"cpu": False})
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    return train(folder, stage, *overrides)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_zero_2_trains_and_resumes_as_one_process(copies, stage):
    pytest.importorskip("deepspeed")
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size="
    train(one, stage, f"{size}2")
    together(with_deepspeed, two, stage, f"{size}1")
    assert_same(one, two, stage)
    keep_checkpoint(two, two, stage, 1)
    together(with_deepspeed, two, stage, f"{size}1")
    assert_same(one, two, stage)
