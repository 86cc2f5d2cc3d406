"""What one PPO update needs in memory, beside TRL's own loop for the same work; exits with 1 where the bound is missed.

The model is a random Llama with the vocabulary of Llama-3 and hardly anything else, since it is logits that tell the
two apart. Both trainers get the same model, the same four roles on one base, the same prompts, and replies of the same
length, each in a process of its own. Growth is the peak during `train()` over what there was right before it: resident
memory, or on a GPU the allocator's. A tiny update comes first, so that what libraries set up once is not counted.

TRL's side needs TRL 1.12, the last with a PPOTrainer: an environment that `make floor` made.

What a whole update of an 8 B model needs is measured on a GPU by `gpu.py`, with the classes of this file.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from memory import (
    ENVIRONMENT,
    LORA,
    VOCABULARY_SIZE,
    AllocatedMemory,
    ResidentMemory,
    save_random_base,
    save_random_reward,
)
from transformers import set_seed
from transformers.utils import logging

from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.ppo.trainer import PPOTrainer, Scored
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.mixture import Part, Rewards

AT_MOST = 0.25  # of TRL's growth
PHASES = ["sampling", "scoring", "optimisation", "rest"]


@dataclass
class Shape:
    """A Llama with random weights, and the work of one update: `batch` replies, every one of full length."""

    model: dict[str, Any]
    quantization: str
    dtype: str
    batch: int
    prompt_length: int
    response_length: int
    epochs: int
    gradient_checkpointing: bool


BESIDE_TRL = Shape(
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2},
    "none", "float32", batch=16, prompt_length=32, response_length=64, epochs=2, gradient_checkpointing=False,
)  # fmt: skip


class Recorder:
    """The peak memory and the seconds of each phase; what is between phases counts as `rest`."""

    def __init__(self) -> None:
        self.memory = AllocatedMemory() if torch.cuda.is_available() else ResidentMemory()
        self.peaks: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.before = self.memory.now()
        self._restart()

    def end(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks[phase], self.memory.peak())
        self.seconds[phase] += time.perf_counter() - self.since
        self._restart()

    def _restart(self) -> None:
        self.memory.restart()
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.end("rest")
        yield
        self.end(name)


class MeasuredTrainer(PPOTrainer):
    """Ours, with a recorder around each phase."""

    recorder: Recorder

    def roll_out(self, *arguments: Any) -> Episodes:
        with self.recorder.phase("sampling"):
            return super().roll_out(*arguments)

    def score(self, *arguments: Any) -> Scored:
        with self.recorder.phase("scoring"):
            return super().score(*arguments)

    def optimise(self, *arguments: Any) -> dict[str, float]:
        with self.recorder.phase("optimisation"):
            return super().optimise(*arguments)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=BESIDE_TRL.batch)
    parser.add_argument("--prompt-length", type=int, default=BESIDE_TRL.prompt_length)
    parser.add_argument("--response-length", type=int, default=BESIDE_TRL.response_length)
    parser.add_argument("--epochs", type=int, default=BESIDE_TRL.epochs)
    parser.add_argument("--measure", choices=["ours", "TRL"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    work = {name: getattr(options, name) for name in ("batch", "prompt_length", "response_length", "epochs")}
    sys.exit(beside_trl(replace(BESIDE_TRL, **work)))


def beside_trl(shape: Shape) -> int:
    """Both, one after the other, and what ours needs of what TRL needs; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="ppo-memory-") as folder:
        make_artifacts(Path(folder), shape)
        measured = {way: in_a_process(way, folder) for way in ("TRL", "ours")}
    logits = shape.batch * shape.response_length * VOCABULARY_SIZE * 4
    print(f"{work_of(shape)}; the logits of all replies are {logits / 1e9:.2f} GB in float32")
    growth = {way: numbers["peak"] - numbers["before"] for way, numbers in measured.items()}
    for way, numbers in measured.items():
        before = f"{numbers['before'] / 1e9:5.2f} GB before"
        print(f"{way:<5} {before}, peak {growth[way] / 1e9:6.3f} GB more, {numbers['wall_s']:6.1f} s")
    ours = measured["ours"]
    phases = (f"{phase} {(ours['peaks'][phase] - ours['before']) / 1e9:.3f} GB" for phase in PHASES)
    print("ours, the peak of each phase: " + ", ".join(phases))
    ratio = growth["ours"] / growth["TRL"]
    print(f"ours / TRL: {ratio:.3f}, and it must be at most {AT_MOST}")
    print(json.dumps({"shape": asdict(shape), "measured": measured, "ratio": ratio}))
    return int(ratio > AT_MOST)


def work_of(shape: Shape) -> str:
    return (
        f"one update of {shape.batch} prompts of {shape.prompt_length} tokens, replies of {shape.response_length}, "
        f"{shape.epochs} epochs, vocabulary {VOCABULARY_SIZE:,}"
    )


def in_a_process(way: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", way, "--folder", folder]
    process = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        sys.exit(f"{way} ended with {process.returncode}:\n{process.stdout[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def make_artifacts(folder: Path, shape: Shape) -> None:
    """Save a random base, a random reward adapter with its head, and the shape."""
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    torch.manual_seed(0)
    config = save_random_base(folder / "base", shape.model, shape.dtype)
    save_random_reward(folder / "reward", config)


def measure(way: str, folder: Path) -> dict[str, Any]:
    """One update: bytes in use before it and at its peak, and for ours at the peak of each phase."""
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    spec = Model(path=str(folder / "base"), quantization=shape.quantization, dtype=shape.dtype)
    tokenizer = load_tokenizer(spec.path)
    set_seed(0)
    shared = SharedBase(load_base(spec, tokenizer), LORA, None, [(folder / "reward", LORA)])
    tiny = replace(shape, batch=2, prompt_length=4, response_length=3, epochs=1)
    make_trainer(way, tiny, shared, tokenizer, folder).train()
    trainer = make_trainer(way, shape, shared, tokenizer, folder)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    recorder = trainer.recorder = Recorder()
    trainer.train()
    recorder.end("rest")
    return {
        "before": recorder.before,
        "peak": max(recorder.peaks.values()),
        "peaks": recorder.peaks,
        "reserved": recorder.memory.reserved,
        "wall_s": sum(recorder.seconds.values()),
        "seconds": recorder.seconds,
    }


def make_trainer(way: str, shape: Shape, shared: SharedBase, tokenizer: Any, folder: Path) -> Any:
    """A trainer for one update of that shape: ours, or TRL's over the same views."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, VOCABULARY_SIZE, (shape.batch, shape.prompt_length), generator=draw)
    dataset = Dataset.from_dict({"input_ids": prompts.tolist()})
    settings = {
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": shape.dtype == "bfloat16",
        "gradient_checkpointing": shape.gradient_checkpointing,
        "num_sample_generations": 0,
        "total_episodes": shape.batch,
        "per_device_train_batch_size": shape.batch,
        "num_ppo_epochs": shape.epochs,
        "response_length": shape.response_length,
        "temperature": 1.0,
        "stop_token": None,  # every reply has full length
    }
    if way == "ours":
        rewards = Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)
        trainer = MeasuredTrainer(PPOConfig(**settings), tokenizer, shared, rewards, dataset)
        trainer.recorder = Recorder()
        return trainer
    from trl.experimental import ppo as trl_ppo  # up to TRL 1.12

    return trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(**settings),
        processing_class=tokenizer,
        model=shared.policy,
        ref_model=shared.reference,
        reward_model=shared.reward,
        value_model=shared.value,
        train_dataset=dataset,
    )


if __name__ == "__main__":
    main()
