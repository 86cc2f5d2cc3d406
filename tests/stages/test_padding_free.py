"""Without padding, rows lie behind each other in one row: what is learned of them is what padded rows teach."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl import SFTConfig

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.stages.sft import ResumableSFTTrainer

pytestmark = pytest.mark.slow
LENGTHS = [17, 5, 30, 9, 4, 12]  # of the rows; a step is made of two batches


@pytest.fixture
def rows() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 1000, (length,), generator=draw).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def trained(model: Any, rows: Dataset, tokenizer: Any, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The numbers that are logged, and the adapter's weights after two steps."""
    torch.manual_seed(0)
    model = adapters.with_policy_adapter(
        copy.deepcopy(model), {"r": 4, "target_modules": ["q_proj", "down_proj"]}, None
    )
    args = SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3, bf16=False,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, max_length=None, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = ResumableSFTTrainer.over(model, args, tokenizer, rows, rows)
    trainer.train()
    found = [{"eval": trainer.evaluate()["eval_loss"]}, *trainer.state.log_history]
    kept = ("loss", "eval", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens")
    numbers = [{name: row[name] for name in kept if name in row} for row in found]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}
    return [row for row in numbers if row], weights


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_without_padding_is_training_with_it(attention, checkpoints, tokenizer, rows, tmp_path):
    spec = Model(path=str(checkpoints["llama"]), quantization="none", dtype="float32", attention=attention)
    model = base.load_base(spec, tokenizer)
    padded = trained(model, rows, tokenizer, tmp_path / "padded")
    free = trained(model, rows, tokenizer, tmp_path / "free", padding_free=True)
    assert len(padded[0]) == 3 and {"loss", "entropy", "num_tokens"} <= padded[0][1].keys()
    assert_close(free[0], padded[0], rtol=0, atol=1e-5)
    assert_close(free[1], padded[1], rtol=0, atol=1e-5)
