"""A step and its numbers are of all its rows, and held-out numbers of all of theirs, however batches are divided."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pipeline import kinds, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.stages.job import Job

pytestmark = pytest.mark.slow

TRAINER = "max_steps: 1, logging_steps: 1, gradient_checkpointing: false, optim: sgd, learning_rate: 0.3"
RECIPE = f"""
name: short
seed: 3
model: {{path: tiny, quantization: none, dtype: float32}}
lora: {{r: 4, target_modules: all-linear}}
stages:
  sft:
    data: {{path: rows.jsonl, eval_data: held_out.jsonl}}
    trainer: {{{TRAINER}}}
  reward:
    init: base
    data: {{path: rows.jsonl, eval_data: held_out.jsonl}}
    trainer: {{{TRAINER}}}
  dpo:
    init: base
    data: {{path: rows.jsonl, eval_data: held_out.jsonl}}
    trainer: {{{TRAINER}, loss_type: [sigmoid, sft]}}
  kto:
    init: base
    data: {{path: thumbs.jsonl, eval_data: held_out_thumbs.jsonl}}
    trainer: {{{TRAINER}}}
"""
LENGTHS = [(1, 9), (4, 2), (30, 1), (2, 5), (12, 40)]  # of the two replies, in repetitions


def final_numbers(folder: Path, stage: str, batch: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a stage says of itself that makes a step of five rows and evaluates on five, so many at a time."""
    trainer = f"{stage}.trainer"
    recipe = recipes.load(
        str(folder / "recipe.yaml"),
        [f"output_dir=of-{batch}", *(f"{trainer}.per_device_{what}_batch_size={batch}" for what in ("train", "eval")),
         f"{trainer}.gradient_accumulation_steps={math.ceil(5 / batch)}"],
    )  # fmt: skip
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True)
    metrics = stages.BY_KIND[stage].run(job)
    logged = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    computed = ("runtime", "per_second", "total_flos")  # also of padding
    numbers = {name: value for row in [*logged, metrics] for name, value in row.items() if not name.endswith(computed)}
    return numbers, load_file(job.artifact / "adapter_model.safetensors")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_two_at_a_time_is_as_all_at_once(stage: str, tmp_path: Path) -> None:
    """Batches of two, two and one. As TRL has it, the last row alone would weigh as much as two others.

    And `sft`, in DPO's loss, would be the mean of three means over tokens.
    """
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [
        {"prompt": f"Q: {i}?\\nA:", "chosen": " yes" * good, "rejected": " no, not so" * bad}
        for i, (good, bad) in enumerate(LENGTHS)
    ]
    thumbs = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "thumb": i % 2 == 0}
        for i, row in enumerate(rows)
    ]
    for name, some in (("rows", rows), ("held_out", rows), ("thumbs", thumbs), ("held_out_thumbs", thumbs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (at_once, weights), (divided, others) = (final_numbers(tmp_path, stage, batch) for batch in (5, 2))
    assert divided == pytest.approx(at_once, rel=1e-4, abs=1e-5)
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], rtol=0, atol=1e-6) for name in weights)
    assert max(float(tensor.abs().max()) for name, tensor in weights.items() if "lora_B" in name) > 1e-3  # they moved
    assert kinds.get(stage).batch_metrics.keys() <= divided.keys()
    assert {f"eval_{name}" for name in kinds.get(stage).batch_metrics} <= divided.keys()
    if stage == "reward":
        lines = (tmp_path / "of-2" / "short" / "reward" / "pairs.jsonl").read_text().splitlines()
        margins = [row["chosen"] - row["rejected"] for row in map(json.loads, lines)]
        share = sum(margin > 0 for margin in margins) / 5
        assert divided["eval_accuracy"] == pytest.approx(share) and 0 < share < 1
        assert divided["eval_margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
        assert divided["eval_accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert divided["eval_pairs"] == 5
