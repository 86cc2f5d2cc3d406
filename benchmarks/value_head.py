"""What a PPO update costs with a value model that is an adapter, and with one that is a head on the policy's trunk.

A random Llama of about 60 million parameters, so that arithmetic takes the time and not what surrounds it: 8 episodes
of 32 + 32 tokens, 4 epochs, float32. Both ways have their trainer in this one process and take turns, update by update,
on the same prompts; every reply has its full length. What is compared are medians over the updates.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.advantages import estimate_advantages, whiten
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.mixture import Part, Rewards

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SHAPE = {
    "vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10,
    "num_attention_heads": 10, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
EPISODES, PROMPT, REPLY = 8, 32, 32
SETTINGS: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": EPISODES, "gradient_accumulation_steps": 1, "num_ppo_epochs": 4,
    "response_length": REPLY, "stop_token": None, "temperature": 1.0, "learning_rate": 1e-4, "bf16": False,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "num_sample_generations": 0,
}  # fmt: skip
PARTS = ("sampling", "scoring", "optimisation", "update")
WAYS = ("adapter", "head")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3, help="of each way")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="value-head-") as name:
        folder = Path(name)
        parameters = make_artifacts(folder)
        trainers = {way: trainer_of(folder, way, options.gradient_checkpointing) for way in WAYS}
        print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads; CPU seconds, wall seconds")
        measured: dict[str, list[dict[str, tuple[float, float]]]] = {way: [] for way in WAYS}
        for number in range(options.updates):
            for way, trainer in trainers.items():
                measured[way].append(update(trainer, number))
                said = "  ".join(f"{part} {cpu:6.2f} {wall:6.2f}" for part, (cpu, wall) in measured[way][-1].items())
                print(f"{number + 1}  {way:<8} {said}", flush=True)
    ratios = {}
    for part in PARTS:
        for place, clock in enumerate(("cpu", "wall")):
            medians = {way: statistics.median(one[part][place] for one in every) for way, every in measured.items()}
            ratios[f"{part}, {clock}"] = medians["head"] / medians["adapter"]
    for what, ratio in ratios.items():
        print(f"head / adapter, {what}: {ratio:.3f}")
    trained = {way: sum(p.numel() for of in one.trained.values() for p in of) for way, one in trainers.items()}
    print(json.dumps({"parameters": parameters, "trained": trained, "ratios": ratios, "measured": measured}))


def make_artifacts(folder: Path) -> int:
    """Save a base and a reward model of random weights; returns the base's number of parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "checkpoint")
    tokenizer.save_pretrained(folder / "base")
    scorer = adapters.with_reward_adapter(load_base(spec_of(folder), tokenizer, head="score"), LORA, None)
    adapters.save_adapter(scorer, "default", folder / "reward", tokenizer)
    return model.num_parameters()


def spec_of(folder: Path) -> Model:
    return Model(path=str(folder / "base"), quantization="none", dtype="float32")


def trainer_of(folder: Path, way: str, recompute: bool) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = load_base(spec_of(folder), tokenizer)
    shared = SharedBase(base, LORA, None, [(folder / "reward", LORA)], one_trunk=way == "head")
    args = PPOConfig(output_dir=str(folder / way), gradient_checkpointing=recompute, **SETTINGS)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 1024, (64, PROMPT), generator=draw).tolist()
    rewards = Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)
    return PPOTrainer(args, tokenizer, shared, rewards, Dataset.from_dict({"input_ids": prompts}))


def update(trainer: PPOTrainer, number: int) -> dict[str, tuple[float, float]]:
    """Make one update, as `PPOTrainer.train` does; the seconds of each part, by the CPU's clock and by the wall's."""
    torch.manual_seed(number)
    clock = [now()]
    prompts, rows = trainer._prompts(number)
    episodes = trainer.roll_out(prompts)
    clock.append(now())
    scored = trainer.score(episodes, rows)
    clock.append(now())
    _, rewards = trainer.shape(scored)
    advantages, returns = estimate_advantages(rewards, scored.values, trainer.args.gamma, trainer.args.lam)
    trainer.optimise(scored, whiten(advantages, episodes.mask), returns)
    clock.append(now())
    assert int(episodes.mask.sum()) == EPISODES * REPLY
    steps = [*itertools.pairwise(clock), (clock[0], clock[-1])]
    return {part: (end[0] - start[0], end[1] - start[1]) for part, (start, end) in zip(PARTS, steps, strict=True)}


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main()
