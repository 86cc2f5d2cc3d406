"""Four policies on the same prompts: adapters switched on one base, as `compare` does, beside models loaded in turn.

The model is that of four_roles.py, a 32nd of Llama-3.1-8B in NF4. Base, SFT, PPO and DPO each answer the same prompts,
greedily and to the same length, and the reward model scores every reply. Each way is a process of its own; they take
turns. By hand that is: load the base and an adapter, sample, let go of both, four times; then load the reward model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from four_roles import make_artifacts, spec_of
from peft import PeftModel
from transformers.utils import logging

from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.run.worker import peak_memory

PROMPTS = [[5 + 7 * i + j for j in range(12)] for i in range(8)]
LENGTH = 4
ADAPTERS = {"base": None, "sft": "sft", "ppo": "sft", "dpo": "sft"}  # the weights do not matter to how long it takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=["one base", "by hand"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    measured: dict[str, list[dict[str, float]]] = {"one base": [], "by hand": []}
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as name:
        folder = Path(name)
        make_artifacts(folder)
        for repeat in range(1, options.repeats + 1):
            for way in measured:
                command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
                said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                measured[way].append(json.loads(said.splitlines()[-1]))
                numbers = measured[way][-1]
                print(
                    f"{repeat}  {way:<9} wall {numbers['wall_s']:6.1f} s  cpu {numbers['cpu_s']:6.1f} s  "
                    f"peak {numbers['peak_bytes'] / 1e6:5.0f} MB",
                    flush=True,
                )
    rounds = list(zip(measured["one base"], measured["by hand"], strict=True))
    ratios = {key: statistics.median(one[key] / other[key] for one, other in rounds) for key in rounds[0][0]}
    print("one base / by hand:", "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print(json.dumps({"threads": os.environ.get("OMP_NUM_THREADS", "default"), "ratios": ratios, "measured": measured}))


def measure(way: str, folder: Path) -> dict[str, float]:
    """Do it one way; without imports, which both ways need."""
    wall, cpu = time.perf_counter(), time.process_time()
    (on_one_base if way == "one base" else by_hand)(folder)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": peak_memory(),
    }


@torch.no_grad()
def on_one_base(folder: Path) -> None:
    artifacts = {name: folder / adapter for name, adapter in ADAPTERS.items() if adapter}
    models = StagedBase(spec_of(folder), artifacts | {"reward": folder / "reward"})
    reward = models.reward("reward")[0]
    for name in ADAPTERS:
        episodes = sample(
            models.policy(name), PROMPTS, response_length=LENGTH, temperature=0.0, stop_token_id=None, pad_token_id=0,
            at_once=8,
        )  # fmt: skip
        reply_scores(reward, episodes)


@torch.no_grad()
def by_hand(folder: Path) -> None:
    spec = spec_of(folder)
    tokenizer = load_tokenizer(spec)
    prompts = torch.tensor(PROMPTS)
    replies = []
    for adapter in ADAPTERS.values():
        model = load_base(spec, tokenizer)
        model = PeftModel.from_pretrained(model, folder / adapter) if adapter else model
        model.generation_config.eos_token_id = None
        replies.append(
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH, do_sample=False
            )
        )
        del model
    reward = PeftModel.from_pretrained(load_base(spec, tokenizer, head="score"), folder / "reward")
    for rows in replies:
        reward(input_ids=rows, attention_mask=torch.ones_like(rows))


if __name__ == "__main__":
    main()
