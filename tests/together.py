"""Several processes that train together, as `accelerate launch` starts them, but forked from the test's own process."""

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

# As `accelerate launch` says it of `fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}`.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
}  # fmt: skip
# What ZeRO-3 keeps in one piece for a while, so and so many numbers: by default, all of a tiny model.
KEPT = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
OF_A_STEP = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def together(function: Callable[..., Any], *args: Any, processes: int = 2, seconds: float = 120.0) -> list[Any]:
    """What a function returns on each of several ranks, over gloo on the CPU.

    It has to connect them, as every trainer does, or with `connect`. What it returns is what `torch.save` can write.
    """
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        ranks = [
            context.Process(target=_run, args=(function, args, rank, processes, port, Path(folder)), daemon=True)
            for rank in range(processes)
        ]
        for one in ranks:
            one.start()
        deadline = time.monotonic() + seconds
        for one in ranks:
            one.join(max(0.0, deadline - time.monotonic()))
        for one in ranks:
            if one.is_alive():
                os.kill(one.pid, signal.SIGABRT)  # it says where it is
            one.join(5)
            one.kill()
            one.join()
        codes = [one.exitcode for one in ranks]
        said = [file.read_text() for file in sorted(Path(folder).glob("*.error"))]
        assert codes == [0] * processes, "\n".join([f"ranks ended with {codes}, after at most {seconds} s", *said])
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def connect() -> None:
    """Connect this rank with the others, where no trainer does."""
    PartialState(cpu=True)


def divide() -> None:
    """Have Accelerate divide the models of this process, which is a fork, by FSDP2, which it takes for GPUs alone."""
    build = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        build(self, *args, **kwargs)

    os.environ.update(FSDP)
    AcceleratorState.__init__ = init


def divide_by_deepspeed(stage: int, folder: Path) -> None:
    """Have DeepSpeed divide what this process trains, which is a fork, by a stage of ZeRO; a file of its own says so.

    It does without the kernels that it would compile for a CPU.
    """
    zero = {"stage": stage} | {f"stage3_{key}": 0 for key in KEPT}
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero} | dict.fromkeys(OF_A_STEP, "auto")))
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }  # fmt: skip
    build = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        os.environ.pop("ACCELERATE_USE_CPU", None)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        importlib.import_module("deepspeed.comm").init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        build(self, *args, **kwargs | {"cpu": False})

    AcceleratorState.__init__ = init


def _run(function: Callable[..., Any], args: tuple, rank: int, processes: int, port: int, folder: Path) -> None:
    environment = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in environment.items()})
    for state in (AcceleratorState, PartialState, GradientState):  # those of the process that this one is forked from
        state._reset_state()
    torch.set_num_threads(1)
    gc.freeze()  # trainers look for garbage, which need not be that of the process that this one is forked from
    error = (folder / f"{rank}.error").open("w")
    faulthandler.enable(error)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=error, flush=True)
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
