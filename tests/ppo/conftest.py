"""PPO trainers on random checkpoints: four roles with adapters that differ, and prompts of random tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.rewards.mixture import Part, Rewards

SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 2,
    "response_length": 5,
    "temperature": 1.0,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    """Twenty prompts of two to nine random tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 10, (20,), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": [torch.randint(5, 1024, (n,), generator=draw).tolist() for n in lengths]})


@pytest.fixture
def make_trainer(tmp_path, make_artifacts, share, tokenizer, prompts) -> Callable[..., PPOTrainer]:
    """A function that makes a trainer, by default on the Llama-shaped checkpoint; keywords are settings."""

    def make(shape: str = "llama", quantization: str = "none", shared: SharedBase | None = None, **settings: Any):
        others = {
            name: settings.pop(name)
            for name in ("eval_dataset", "ptx_dataset", "callbacks", "samples_file")
            if name in settings
        }
        train = settings.pop("train_dataset", prompts)
        rewards = settings.pop("rewards", None)
        processing_class = settings.pop("processing_class", tokenizer)
        args = PPOConfig(**{"output_dir": str(tmp_path / "out"), **SETTINGS, **settings})
        roles = shared or share(make_artifacts(shape, quantization))
        return PPOTrainer(
            args,
            processing_class,
            roles,
            rewards or Rewards([Part("reward", 1.0, roles.rewards[0])], tokenizer),
            train,
            **others,
        )

    return make
