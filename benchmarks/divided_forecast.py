"""The forecast of a stage that two processes divide, held against what one of them holds while it trains.

The CPU passes for GPUs, as in tests/stages/test_sharded.py: two processes, connected by Gloo, divide a small random
model by FSDP2 or DeepSpeed and take two optimizer steps of two passes each. What is compared is the most that rank 0
held at once from the first step on, by torch's profiler, as in memory_forecast.py; what it has when training begins is
the storages of all its tensors. What is gathered is broadcast part by part, since Gloo's own way makes a copy of all of
it, and NCCL's does not. Exits with 1 where a forecast is more than 10 % off; of ZeRO-3, where it is too low by more
than that, as it often is: what a rank holds there differs from run to run.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

import memory_forecast as alone  # noqa: E402
import torch  # noqa: E402
from together import OF_A_STEP, connect, divide, divide_by_deepspeed, together  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402

from rlhf_pipeline import ranks, stages  # noqa: E402
from rlhf_pipeline.forecast import lengths, measured, work  # noqa: E402
from rlhf_pipeline.forecast import stage as on_shapes  # noqa: E402
from rlhf_pipeline.forecast.cards import ANY  # noqa: E402
from rlhf_pipeline.recipe import Recipe  # noqa: E402
from rlhf_pipeline.stages.job import Job  # noqa: E402

FSDP: dict[str, Any] = {"fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


@dataclass
class Case(alone.Case):
    """One combination; `launch` says how two processes divide it."""

    hidden: int = 768
    layers: int = 8
    vocabulary: int = 16000
    batch: int = 2
    launch: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{super().__str__()} {self.launch or 'one process'}"


# Buckets, which are of a fixed size, as small as this model is; and of ZeRO-3 that it keeps little.
SMALL = {"reduce_bucket_size": 10**6}
LITTLE = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 10**6, "stage3_prefetch_bucket_size": 10**6}


def zero(stage: int, **more: int) -> dict[str, Any]:
    """`launch` of a stage of ZeRO; its file is written later."""
    return {"deepspeed_config": {"zero_stage": stage, "zero_optimization": {"stage": stage} | SMALL | more}}


ON, OFF = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
CASES = [
    *[Case(kind, "llama", trainer=ON, launch=FSDP) for kind in ("sft", "reward", "dpo", "kto")],
    Case("sft", "llama", trainer=OFF, launch=FSDP),
    Case("sft", "llama", trainer=ON, dtype="bfloat16", launch=FSDP),
    Case("sft", "llama", trainer=ON, dtype="bfloat16", quantization="nf4", launch=FSDP),
    Case("sft", "qwen2", trainer=ON, tied=True, launch=FSDP),
    Case("sft", "llama", trainer=ON, launch={"fsdp_config": {"fsdp_version": 2}}),
    # So short that the most is held while the base, which is whole on each GPU, is divided.
    Case("sft", "llama", layers=16, vocabulary=1024, quantization="nf4", batch=1, prompt=8, reply=8, trainer=ON,
         launch=FSDP),
    *[Case(kind, "llama", trainer=ON, launch=zero(3)) for kind in ("sft", "dpo")],
    *[Case(kind, "llama", trainer=ON, launch=zero(3, **LITTLE)) for kind in ("sft", "dpo")],
    Case("sft", "llama", trainer=ON, dtype="bfloat16", launch=zero(3, **LITTLE)),
    Case("dpo", "llama", trainer=ON, launch=zero(2)),
]  # fmt: skip


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", type=int, help="numbers of combinations, from 0")
    parser.add_argument("--alone", action="store_true", help="also measure one process")
    options = parser.parse_args()
    worst = 0.0
    for number in options.only if options.only is not None else range(len(CASES)):
        for case in [CASES[number], *[replace(CASES[number], launch={})] * options.alone]:
            forecast, held, phase = compare(case)
            off = forecast / held - 1
            by_zero_3 = (case.launch.get("deepspeed_config") or {}).get("zero_stage") == 3
            worst = max(worst, -off if by_zero_3 else abs(off))
            print(alone.line(number, case, forecast, held, phase), flush=True)
    return int(worst > 0.1)


def compare(case: Case) -> tuple[int, int, str]:
    """Bytes that were forecast and measured of rank 0, and the phase that was forecast to be the highest."""
    with tempfile.TemporaryDirectory(prefix="divided-forecast-") as name:
        folder = Path(name)
        alone.make_base(case, folder / "base")
        recipe = alone.recipe_of(case, folder)
        if case.launch:
            recipe.stages[case.kind].launch = {"num_processes": 2, **written(case.launch, folder)}
        found = work.forecast(recipe, ANY, advise=False, on_gpu=False).stages[-1]
        held = together(measure, recipe, case.kind, folder, processes=2 if case.launch else 1, seconds=500)[0]
        return found.peak, held, found.highest.name


def written(launch: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`launch`, with a file of DeepSpeed's own where it says more than Accelerate's keys can."""
    if "deepspeed_config" not in launch:
        return launch
    settings = {"zero_optimization": launch["deepspeed_config"]["zero_optimization"]}
    (folder / "deepspeed.json").write_text(json.dumps(settings | dict.fromkeys(OF_A_STEP, "auto")))
    return {"deepspeed_config": {"deepspeed_config_file": str(folder / "deepspeed.json")}}


def measure(recipe: Recipe, name: str, folder: Path) -> int:
    """The most bytes that this rank held at once in its steps."""
    launch = recipe.stages[name].launch or {}
    if "fsdp_config" in launch:
        divide()
        if not launch["fsdp_config"].get("fsdp_auto_wrap_policy"):
            os.environ.pop("FSDP_AUTO_WRAP_POLICY")
    elif launch:
        file = Path(launch["deepspeed_config"]["deepspeed_config_file"])
        settings = file.read_text()
        divide_by_deepspeed(3, folder)
        file.write_text(settings)
    else:
        connect()
    for its_name in ("all_gather_into_tensor", "all_gather_single"):  # of earlier versions of torch, and of later ones
        setattr(torch.distributed, its_name, gather_in_place)
    job = Job(recipe, name, recipe.run)
    before = alone.alive()
    args: Any = job.trainer_config(stages.BY_KIND[name].CONFIG)
    on_shapes.only_train(args, 2, folder / "out")
    begins = AtBegin()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer = measured.trainer_of(job, args, lengths.of_stage(job.stage), folder)
        if recipe.model.quantization == "none":  # until it is divided, it is in the memory of the machine
            trainer.add_callback(begins)
        else:
            begins.on_train_begin()
        trainer.train()
    return alone.most_held(recorded, begins.held - before)


def gather_in_place(output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False) -> Any:
    """What `torch.distributed.all_gather_into_tensor` does, without the copy of all of it that Gloo makes."""
    for rank, part in enumerate(output_tensor.view(2, -1)):
        if rank == ranks.index():
            part.copy_(input_tensor.view(-1))
        torch.distributed.broadcast(part.view(torch.uint8), rank, group=group)
    return SimpleNamespace(wait=lambda: None) if async_op else None


class AtBegin(TrainerCallback):
    """Marks in the profile where a model that is divided begins to be trained, and counts what is held then."""

    held = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.held = alone.alive()
        with record_function(alone.LOADED):
            pass


if __name__ == "__main__":
    sys.exit(main())
