"""A function that fails while a policy trains: one sentence, its traceback in the log, and nothing lost."""

import json
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.run import worker
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RESULT
from rlhf_pipeline.stages.job import Job

pytestmark = pytest.mark.slow

RECIPE = """
name: t
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: [q_proj]}
stages:
  ppo:
    init: base
    data: {path: tiny:prompts, limit: 8}
    rewards: [{function: "my_service:graded"}]
    trainer:
      {max_steps: 3, per_device_train_batch_size: 2, num_mini_batches: 1, num_ppo_epochs: 1, response_length: 3,
       save_steps: 1, learning_rate: 1e-3, kl_coef: 0.05}
"""
SERVICE = """
from pathlib import Path

def graded(completions, trainer_state):
    if trainer_state.global_step == 2 and not Path(__file__).with_name("up").exists():
        raise ConnectionError("no answer")
    return [float(len(text)) for text in completions]
"""


def test_a_function_that_raises_ends_the_stage_and_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my_service.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = recipes.load(str(tmp_path / "recipe.yaml"))
    stage = Job(recipe, "ppo", recipe.run)
    stage.work.mkdir(parents=True)
    task = {"task": "train", "recipe": recipe.model_dump(), "folders": [str(tmp_path)], "stage": "ppo"}
    (tmp_path / "job.json").write_text(json.dumps(task | {"record": {"started_at": "2026-01-01T00:00:00+00:00"}}))

    assert worker.main(str(tmp_path / "job.json")) == 1
    result = json.loads((tmp_path / RESULT).read_text())
    assert (
        result["message"]
        == "the reward function `my_service:graded` raised ConnectionError: no answer (my_service.py:6)"
    )
    assert result["known"] and "`stages.ppo.rewards.0.function`" in result["hint"]
    log = capfd.readouterr().err
    assert f'File "{tmp_path / "my_service.py"}", line 6, in graded' in log and "ConnectionError: no answer" in log
    (last, *_) = durable.newest_first(stage.work)
    assert last.name == "checkpoint-2"

    (tmp_path / "up").touch()
    assert worker.main(str(tmp_path / "job.json")) == 0
    steps = [json.loads(line)["step"] for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert (stage.artifact / "adapter_model.safetensors").is_file()
