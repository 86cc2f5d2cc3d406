"""The comparison at the end of a run: when it is made, of what, and that nothing depends on it."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import short_run

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir import durable, layout

POLICIES = ["base", "sft", "ppo", "dpo"]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_run_ends_with_a_comparison_of_what_it_made(tiny_run: Path) -> None:
    recipe = recipes.of_run(tiny_run)
    assert wanted.due(tiny_run, recipe) is None
    found = json.loads((tiny_run / layout.COMPARISON).read_text())
    assert found["policies"] == POLICIES and len(found["rows"]) == recipe.evaluate.n == 8
    assert found["made_of"] == {
        stage: hashlib.sha256((tiny_run / stage / "adapter" / short_run.WEIGHTS).read_bytes()).hexdigest()
        for stage in short_run.STAGES
    }
    assert {key: found["settings"][key] for key in ("prompts", "n", "temperature", "max_new_tokens", "seed")} == {
        "prompts": "evaluate.data", "n": 8, "temperature": 0.7, "max_new_tokens": 8, "seed": 42
    }  # fmt: skip


def test_other_weights_settings_data_or_judge_make_it_due(run: Path, tmp_path: Path) -> None:
    recipe = recipes.of_run(run)
    assert wanted.due(run, recipe) is None
    for changes in ({"n": 7}, {"temperature": 0.0}, {"max_new_tokens": 9}):
        other = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})
        assert wanted.due(run, other) is not None, changes
    assert wanted.due(run, recipe.model_copy(update={"seed": 1})) is not None

    (tmp_path / "other.py").write_text("def judge(prompts, completions, **columns): return [0.0 for _ in prompts]")
    named = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": "other:judge"})})
    assert wanted.due(run, named) is None  # it is nowhere, and the one that judged may be
    named._folders = [tmp_path]
    assert wanted.due(run, named) is not None

    data = tmp_path / "heldout.jsonl"
    shutil.copy(recipe.evaluate.data.path, data)
    recipe.evaluate.data.path = str(data)
    assert wanted.due(run, recipe) is None  # the same rows elsewhere
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    assert wanted.due(run, recipe) is not None
    data.unlink()  # nobody can tell: what was made of them holds
    assert wanted.due(run, recipe) is None

    (run / layout.COMPARISON).write_text('{"settings": []}')
    assert wanted.due(run, recipe) is not None
    (run / layout.COMPARISON).unlink()
    settings, policies = wanted.due(run, recipe)
    assert policies == POLICIES and settings["digest"] is None


def test_stages_that_make_rows_are_not_compared() -> None:
    """They have no policy; nor has a reward stage."""
    recipe = recipes.load("constitutional")
    assert wanted.roles(recipe, list(recipe.stages)) == (["base", "sft", "ppo"], "sft", "reward")


def test_what_is_built_on_weights_that_are_gone_is_not_compared(run: Path) -> None:
    recipe = recipes.of_run(run)
    (run / "reward" / "adapter" / short_run.WEIGHTS).write_bytes(b"others")
    edit(run / "reward" / "stage.json", artifact_files=durable.contents(run / "reward" / "adapter"))
    assert [(stage.name, stage.state, stage.reason) for stage in wanted.left_out(run, recipe)] == [
        ("ppo", "stale", "reward ran again")
    ]
    assert list(wanted.weights(run, recipe)) == ["sft", "reward", "dpo"]
    assert wanted.due(run, recipe)[1] == ["base", "sft", "dpo"]
    shutil.rmtree(run / "sft" / "adapter")
    assert list(wanted.weights(run, recipe)) == []
    assert wanted.due(run, recipe) is None
    with pytest.raises(InputError, match="no policy stage of this run is done"):
        wanted.choose(run, recipe, [], None)


def test_reference_and_reward_are_those_of_ppo_where_they_are_there(tiny_run: Path) -> None:
    recipe = recipes.of_run(tiny_run)
    recipe.stages = {"first": recipe.stages["sft"], "other": recipe.stages["reward"], **recipe.stages}
    made = list(recipe.stages)
    assert wanted.roles(recipe, made) == (["base", "first", "sft", "ppo", "dpo"], "sft", "reward")
    assert wanted.roles(recipe, ["first", "other"]) == (["base", "first"], "base", "other")
    recipe.stages["ppo"].init = "first"
    recipe.stages["ppo"].reward = "other"
    assert wanted.roles(recipe, made)[1:] == ("first", "other")
    del recipe.stages["ppo"]
    assert wanted.roles(recipe, [name for name in made if name != "ppo"])[1:] == ("sft", "reward")
    assert wanted.roles(recipe, ["sft"]) == (["base", "sft"], "sft", None)


def test_without_evaluate_it_samples_as_ppo_does(tiny_run: Path) -> None:
    recipe: Recipe = recipes.of_run(tiny_run)
    recipe.evaluate = None

    def settings() -> tuple[Any, ...]:
        found = wanted.default_settings(recipe)
        return tuple(found[key] for key in ("prompts", "n", "temperature", "max_new_tokens"))

    assert settings() == ("ppo.data", 64, 1.0, 6)
    del recipe.stages["ppo"].trainer["response_length"]
    assert settings() == ("ppo.data", 64, 1.0, 53)
    del recipe.stages["ppo"]
    assert settings() == ("dpo.data", 64, 0.7, 128)
    del recipe.stages["dpo"]
    assert settings() == ("sft.data", 64, 0.7, 128)


SHOWS = """
import sys
sys.argv = ["rlhf-pipeline", "compare", sys.argv[1]]
from rlhf_pipeline import cli
cli.main()
"""


def test_what_is_up_to_date_is_shown_at_once_without_torch(tiny_run: Path) -> None:
    code = SHOWS.replace("cli.main()", "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_run)], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("8 prompts of evaluate.data; ") and "dpo beats sft" in done.stdout


RECIPE = """
name: short
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4}
stages:
  sft:
    data: tiny:demonstrations
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
"""
# Called by the check and for `sft` first, then for base and `sft` in each comparison that gets that far.
JUDGE = """
import os, pathlib, signal
calls = pathlib.Path(__file__).with_name("calls")

def judge(prompts, completions, **columns):
    if len(prompts) < 3:  # the check's
        return [0.5, 1.0]
    calls.write_text(calls.read_text() + "x")
    number = len(calls.read_text())
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
    return [1.0 for _ in prompts]
"""


def test_neither_a_failure_nor_a_stop_of_the_comparison_fails_the_run(
    tmp_path: Path, warm_server: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "calls").touch()
    recipe = recipes.load(str(tmp_path / "recipe.yaml"))
    monkeypatch.setattr(runner, "Launcher", lambda log: contextlib.nullcontext(warm_server))
    said: list[str] = []

    def again() -> list[str]:
        said.clear()
        assert [stage.state for stage in runner.run(recipe, say=said.append)] == ["done"]
        return said

    line = "compare 4 prompts through base and sft"
    file = recipe.run / layout.COMPARISON
    assert again()[-2:] == [
        line, "warning: there is no new comparison: making it failed: its worker was ended by signal 9, from outside"
    ]  # fmt: skip
    assert again()[-2:] == [
        line, "warning: there is no new comparison: it was stopped; the next `run` or `compare` makes it"
    ]  # fmt: skip
    assert not file.exists()
    assert again() == [line]
    assert json.loads(file.read_text())["policies"] == ["base", "sft"]
    monkeypatch.setattr(runner, "Launcher", None)  # nothing is started any more
    assert again() == []
