"""What the runner does when a stage, or its process, goes wrong; and workers that are spawned, not forked."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher

RECIPE = """
name: short
model: {path: tiny, quantization: none}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4}
stages:
  sft:
    data: tiny:demonstrations
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
  dpo:
    data: tiny:preferences
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
"""


def write(folder: Path, judge: str) -> Recipe:
    """A recipe of two short stages, judged by a module of the user's beside it."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "my_judge.py").write_text("import os, signal\n\n\n" + textwrap.dedent(judge))
    return recipes.load(str(folder / "recipe.yaml"))


FINE = """
    def judge(prompts, completions, **columns):
        return [1.0 for _ in prompts]
"""
FAILS_AFTER_SFT = """
    def judge(prompts, completions, **columns):
        if os.path.exists("stop"):
            print("the judge is about to give up")
            raise ValueError("no opinion")
        open("stop", "w").close()
        return [0.5 for _ in prompts]
"""
KILLS_ITS_PROCESS = """
    def judge(prompts, completions, **columns):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_failing_stage_is_named_and_leaves_the_others_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path, FAILS_AFTER_SFT)
    with pytest.raises(RunError) as error:
        runner.run(recipe, say=lambda line: None)
    message = error.value.message
    assert message.startswith("stage `dpo` failed: ValueError: no opinion")
    assert "| ValueError: no opinion" in message and str(recipe.run / "dpo" / "log.txt") in message
    assert "the judge is about to give up" in (recipe.run / "dpo" / "log.txt").read_text()
    sft, dpo = (json.loads((recipe.run / name / "stage.json").read_text()) for name in ("sft", "dpo"))
    assert (sft["state"], dpo["state"]) == ("done", "failed")
    assert sft["metrics"]["judge_mean"] == 0.5 and "no opinion" in dpo["error"]
    assert not (recipe.run / "dpo" / "adapter").exists()

    (tmp_path / "stop").unlink()
    said: list[str] = []
    plans = runner.run(recipe, say=said.append)
    assert [plan.state for plan in plans] == ["done", "done"]
    assert not any(line.startswith("sft") for line in said)


def test_a_worker_that_is_killed_is_reported_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path, KILLS_ITS_PROCESS)
    with pytest.raises(RunError, match="stage `sft` failed: its worker was ended by signal 9"):
        runner.run(recipe, say=lambda line: None)
    assert json.loads((recipe.run / "sft" / "stage.json").read_text())["state"] == "failed"


def test_a_fault_in_a_later_stage_is_found_before_the_first_one_trains(tmp_path: Path) -> None:
    recipe = write(tmp_path, FINE)
    recipe.stages["dpo"].trainer["lr_scheduler_type"] = "zigzag"
    with pytest.raises(InputError) as error:
        runner.run(recipe, say=lambda line: None)
    assert error.value.place == "stages.dpo.trainer" and "zigzag" in error.value.message
    assert not recipe.run.exists()


def test_where_a_fork_is_refused_the_same_job_runs_in_a_spawned_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, FINE)
    job = {"task": "check", "recipe": recipe.model_dump(), "folder": str(tmp_path), "stages": ["sft", "dpo"]}
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Launcher(tmp_path / "server.log", fork=True) as launcher:
        assert launcher._server is not None
        assert launcher.run(job, tmp_path / "job.json", tmp_path / "log.txt") == 0
        assert launcher._server is None
    assert json.loads((tmp_path / "result.json").read_text()) == {}


@pytest.mark.parametrize(
    ("circumstance", "reason"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "2 Python threads are running",
        ),
        ("import torch; torch.cuda._is_in_bad_fork = lambda: True", "CUDA was touched before the fork"),
    ],
)
def test_the_server_refuses_to_fork_where_that_is_not_safe(tmp_path: Path, circumstance: str, reason: str) -> None:
    program = f"{circumstance}\nfrom rlhf_pipeline.run import server\nserver.serve()\n"
    job = json.dumps({"job": str(tmp_path / "job.json"), "log": str(tmp_path / "log.txt")})
    done = subprocess.run(
        [sys.executable, "-c", program], input=job + "\n", capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout) == {"unsafe": reason}, done.stderr
    assert not (tmp_path / "result.json").exists()
