"""What one DPO step needs in memory with the installed TRL, beside an older one; exits with 1 where it needs more.

Since 1.15 TRL computes DPO's loss through a fused head, which never keeps the logits. The model is a random Llama with
the vocabulary of Llama-3 and hardly anything else, since it is logits that tell the two apart. Both get the same
adapters of ours, the same encoded pairs and the same settings, each in a process of its own. Growth is the peak of
resident memory during one step over what there was right before it; a step on tiny rows comes first, so that what
libraries set up once is not counted.

`--beside PYTHON` is the interpreter of the environment with the older TRL: `make .venv-floor/ready` makes one.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from memory import ENVIRONMENT, LORA, VOCABULARY_SIZE, ResidentMemory, save_random_base
from peft import get_peft_model_state_dict
from transformers import set_seed
from transformers.utils import logging
from trl import DPOConfig

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.stages.dpo import EncodedDPOTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, default=REPOSITORY / ".venv-floor" / "bin" / "python")
    parser.add_argument("--pairs", type=int, default=8, help="of one step; each is two rows")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--reply-length", type=int, default=96)
    parser.add_argument("--measure", choices=["none", "nf4"], help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        print(json.dumps(measure(options)))
        return
    sys.exit(beside(options))


def beside(options: argparse.Namespace) -> int:
    """Both versions, with and without 4-bit; returns the exit code."""
    length = options.prompt_length + options.reply_length
    logits = 2 * options.pairs * length * VOCABULARY_SIZE * 4
    print(f"one step of {options.pairs} pairs of {length} tokens, vocabulary {VOCABULARY_SIZE:,}; ", end="")
    print(f"the logits of all tokens are {logits / 1e9:.2f} GB in float32")
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dpo-memory-") as folder:
        torch.manual_seed(0)
        save_random_base(Path(folder) / "base", SHAPE, "float32")
        for quantization in ("none", "nf4"):
            sides = {}
            for side, python in (("newest", Path(sys.executable)), ("older", options.beside)):
                numbers = sides[side] = in_a_process(python, quantization, f"{folder}/base", options)
                grew = (numbers["peak"] - numbers["before"]) / 1e9
                print(f"{quantization:<5}TRL {numbers['trl']:<8} {numbers['before'] / 1e9:5.2f} GB before, ", end="")
                print(f"peak {grew:6.3f} GB more, loss {numbers['loss']:.6f}, {numbers['wall_s']:5.1f} s", flush=True)
            growth = {side: one["peak"] - one["before"] for side, one in sides.items()}
            measured[quantization] = sides | {"ratio": growth["newest"] / growth["older"]}
            print(f"{quantization:<5}newest / older: {measured[quantization]['ratio']:.3f}")
    print(json.dumps(measured))
    first = [one[side]["loss"] for one in measured.values() for side in ("newest", "older")]
    if any(abs(loss - math.log(2)) > 1e-4 for loss in first):
        print("a first loss is not ln 2: the reference is not where the policy starts", file=sys.stderr)
        return 1
    return int(any(one["ratio"] > 1 for one in measured.values()))


def in_a_process(python: Path, quantization: str, base: str, options: argparse.Namespace) -> dict[str, Any]:
    lengths = ["--pairs", options.pairs, "--prompt-length", options.prompt_length]
    lengths += ["--reply-length", options.reply_length]
    command = [python, __file__, "--measure", quantization, "--base", base, *lengths]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run([str(word) for word in command], env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        sys.exit(f"{python} ended with {process.returncode}:\n{process.stdout[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One step: bytes in use before it and at its peak, its loss and its seconds."""
    spec = Model(path=options.base, quantization=options.measure, dtype="float32")
    tokenizer = load_tokenizer(spec)
    set_seed(0)
    model = adapters.with_policy_adapter(load_base(spec, tokenizer), LORA, None)
    start = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    memory = ResidentMemory()
    step(model, tokenizer, rows(1, 4, 4), memory)
    model.delete_adapter("ref")  # the next trainer makes its own
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            head, _, tail = name.rpartition(".")
            parameters[f"{head}.default.{tail}"].copy_(value)
    gc.collect()
    return {
        "trl": version("trl"),
        **step(model, tokenizer, rows(options.pairs, options.prompt_length, options.reply_length), memory),
    }


def rows(pairs: int, prompt_length: int, reply_length: int) -> Dataset:
    """Random pairs, each of full length."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[list[int]]:
        return torch.randint(5, VOCABULARY_SIZE, (pairs, length), generator=draw).tolist()

    return Dataset.from_dict(
        {"prompt_ids": ids(prompt_length), "chosen_ids": ids(reply_length), "rejected_ids": ids(reply_length)}
    )


def step(model: Any, tokenizer: Any, dataset: Dataset, memory: ResidentMemory) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=len(dataset), max_length=None, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        with adapters.exact_adapters(model):
            trainer = EncodedDPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        adapters.copy_adapter(model, "default", "ref")
        gc.collect()
        before = memory.now()
        memory.restart()
        result = trainer.train()
        return {
            "before": before,
            "peak": memory.peak(),
            "loss": result.training_loss,
            "wall_s": result.metrics["train_runtime"],
        }


if __name__ == "__main__":
    main()
