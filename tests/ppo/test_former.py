"""A checkpoint that the version before wrote, whose PPOTrainer was a subclass of TRL's, is resumed to the same end.

`former/` was recorded with commit cb05b3b under TRL 1.12 and torch 2.13 on a CPU: an SFT and a reward adapter over the
shipped checkpoint, the second checkpoint of four updates, and weights and log at the end of an uninterrupted run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf_pipeline.models import base
from rlhf_pipeline.models.roles import TRAINED, SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo import decoding
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.mixture import Part, Rewards

pytestmark = pytest.mark.slow

FORMER = Path(__file__).parent / "former"
LORA = {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj"]}
SETTINGS: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    "num_sample_generations": 0, "max_steps": 4, "per_device_train_batch_size": 4, "num_mini_batches": 2,
    "num_ppo_epochs": 2, "response_length": 5, "temperature": 1.0, "learning_rate": 0.003,
    "value_learning_rate": 0.01, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "target_kl": 0.1,
    "kl_horizon": 40, "kl_budget": 1e6, "normalize_scores": True, "eval_strategy": "steps", "eval_steps": 3,
    "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9,
}  # fmt: skip


def trainer_of_then(folder: Path) -> PPOTrainer:
    spec = Model(path=str(TINY / "checkpoint"), quantization="none", dtype="float32")
    tokenizer = load_tokenizer(spec.path)
    shared = SharedBase(base.load_base(spec, tokenizer), LORA, FORMER / "init", [(FORMER / "reward", LORA)])
    rows = [[5 + i, 6 + 2 * i, 7 + 3 * i][: 1 + i % 3] for i in range(12)]
    prompts, held_out = Dataset.from_dict({"input_ids": rows}), Dataset.from_dict({"input_ids": rows[:3]})
    return PPOTrainer(
        PPOConfig(output_dir=str(folder), **SETTINGS),
        tokenizer,
        shared,
        Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer),
        prompts,
        eval_dataset=held_out,
    )


def multinomial(self: decoding.Choice, logits: torch.Tensor, rows: torch.Tensor, _: torch.Tensor) -> Any:
    """Tokens as they were drawn then: all rows together, in the order of their prompts."""
    log_p = (logits.float() / self.temperature).log_softmax(1)
    drawn, order = torch.empty_like(rows)[:, None], rows.argsort()
    drawn[order] = torch.multinomial(log_p[order].exp(), 1)
    return drawn[:, 0], log_p.gather(1, drawn)[:, 0]


def test_a_checkpoint_of_the_version_before_is_resumed_to_the_same_end(tmp_path: Path, monkeypatch) -> None:
    """Within what another CPU rounds otherwise, where tokens are drawn as then: today the same seed draws others."""
    monkeypatch.setattr(decoding.Choice, "__call__", multinomial)
    monkeypatch.setattr(decoding, "FREE", 2.0)  # rows that have ended stayed in the batch
    shutil.copytree(FORMER / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = trainer_of_then(tmp_path)
    torch.manual_seed(999)
    trainer.train(resume_from_checkpoint=True)
    ours = {f"{role}.{n}": p for role in TRAINED for n, p in getattr(trainer.shared, role).named_parameters()}
    theirs = load_file(FORMER / "end.safetensors")
    start = {
        f"{role}.{name}": tensor
        for role in TRAINED
        for name, tensor in load_file(FORMER / "checkpoint-2" / f"{role}.safetensors").items()
    }
    assert ours.keys() == theirs.keys() == start.keys()
    assert any((theirs[name] - start[name]).abs().max() > 1e-3 for name in start)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].detach(), tensor, rtol=0, atol=1e-5)
    log = json.loads((FORMER / "log.json").read_text())
    for now, then in zip(trainer.state.log_history, log, strict=True):
        assert {name: now[name] for name in then} == pytest.approx(then, rel=1e-4, abs=1e-5)
    assert trainer.state.episode == 16
