"""The numbers of held-out rows are over all of them, however they are divided into batches."""

import json
import math
from pathlib import Path

import pytest

from rlhf_pipeline import kinds, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.stages.job import Job

pytestmark = pytest.mark.slow

TRAINER = "{max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, learning_rate: 1e-2}"
RECIPE = f"""
name: short
seed: 3
model: {{path: tiny, quantization: none, dtype: float32}}
lora: {{r: 4, target_modules: all-linear}}
stages:
  sft:
    data: {{path: rows.jsonl, eval_data: held_out.jsonl}}
    trainer: {TRAINER}
  reward: {{init: base, data: {{path: rows.jsonl, eval_data: held_out.jsonl}}, trainer: {TRAINER}}}
  dpo: {{init: base, data: {{path: rows.jsonl, eval_data: held_out.jsonl}}, trainer: {TRAINER}}}
"""
LENGTHS = [(1, 9), (4, 2), (30, 1), (2, 5), (12, 40)]  # of the two replies, in repetitions


def final_numbers(folder: Path, stage: str, batch: int) -> dict[str, float]:
    """What a stage ends with that evaluates on five rows, so many at a time."""
    recipe = recipes.load(
        str(folder / "recipe.yaml"), [f"{stage}.trainer.per_device_eval_batch_size={batch}", f"output_dir=of-{batch}"]
    )
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True)
    metrics = stages.BY_KIND[stage].run(job)
    return {name: value for name, value in metrics.items() if name.startswith("eval_")}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_two_at_a_time_is_as_all_at_once(stage: str, tmp_path: Path) -> None:
    """Batches of two, two and one. As TRL has it, the last row alone would weigh as much as two others."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [
        {"prompt": f"Q: {i}?\\nA:", "chosen": " yes" * good, "rejected": " no, not so" * bad}
        for i, (good, bad) in enumerate(LENGTHS)
    ]
    for name in ("rows", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    at_once, divided = (final_numbers(tmp_path, stage, batch) for batch in (5, 2))
    assert divided == pytest.approx(at_once, rel=1e-4, abs=1e-5)
    assert {f"eval_{name}" for name in kinds.get(stage).batch_metrics} <= divided.keys()
    if stage == "reward":
        lines = (tmp_path / "of-2" / "short" / "reward" / "pairs.jsonl").read_text().splitlines()
        margins = [row["chosen"] - row["rejected"] for row in map(json.loads, lines)]
        share = sum(margin > 0 for margin in margins) / 5
        assert divided["eval_accuracy"] == pytest.approx(share) and 0 < share < 1
        assert divided["eval_margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
        assert divided["eval_accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert divided["eval_pairs"] == 5
