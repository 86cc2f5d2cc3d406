"""When a stage writes a checkpoint, and how it stops when it is asked to."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import ranks, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.callbacks import checkpoints
from rlhf_pipeline.callbacks.checkpoints import REQUEST, SECONDS_BETWEEN, Checkpoints, Stopped
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.stages import job as jobs
from rlhf_pipeline.stages.job import Job

RECIPE = """
name: short
seed: 7
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: [q_proj, v_proj]}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 3, per_device_train_batch_size: 2, gradient_checkpointing: false, save_total_limit: 9}
  reward:
    data: preferences.jsonl
    trainer: {max_steps: 3, per_device_train_batch_size: 2, gradient_checkpointing: false, save_total_limit: 9}
  ppo:
    data: prompts.jsonl
    trainer: {max_steps: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, num_ppo_epochs: 1,
              response_length: 4, gradient_checkpointing: false, save_total_limit: 9, learning_rate: 1e-3}
  dpo:
    data: preferences.jsonl
    trainer: {max_steps: 3, per_device_train_batch_size: 2, gradient_checkpointing: false, save_total_limit: 9}
"""


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    """Leave the process, whose signals there are only once, as it was."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    REQUEST.noted = REQUEST.training = False
    yield
    REQUEST.noted = REQUEST.training = False
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a little data, and the artifacts of `sft` and `reward`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("demonstrations", "preferences", "prompts"):
        lines = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:8]))
    for name in ("sft", "reward"):
        recipe = recipes.load(str(folder / "recipe.yaml"), [f"{name}.trainer.max_steps=1"])
        job = Job(recipe, name, recipe.run)
        job.work.mkdir(parents=True)
        stages.BY_KIND[name].run(job)
        job.artifact.rename(job.published)
        shutil.rmtree(job.work)
    return folder


@pytest.fixture
def train(prepared: Path, tmp_path: Path) -> Callable[..., Job]:
    """A function that trains a stage in this process; keywords are keys of its `trainer`."""
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))

    def train(stage: str, **trainer: object) -> Job:
        overrides = [f"{stage}.trainer.{key}={value}" for key, value in trainer.items()]
        recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
        job = Job(recipe, stage, recipe.run)
        job.work.mkdir(parents=True, exist_ok=True)
        stages.BY_KIND[stage].run(job)
        return job

    train.work = lambda stage: folder / "runs" / "short" / stage / "work"
    return train


def steps(work: Path) -> list[int]:
    """The steps of the checkpoints in a folder, all of which must be sound."""
    found = durable.newest_first(work)
    assert all(durable.damage(path) is None for path in found)
    assert not list(work.glob(".*"))
    return [durable.step(path) for path in reversed(found)]


def events(every_s: float | None) -> tuple[Checkpoints, Callable[[str, int], TrainerControl]]:
    """A callback, and a function that has the event of a name happen to it at some step of 9."""
    callback, args = Checkpoints(every_s), TrainingArguments(use_cpu=True, report_to="none")

    def happen(name: str, step: int = 1) -> TrainerControl:
        control = TrainerControl()
        getattr(callback, f"on_{name}")(args, TrainerState(global_step=step, max_steps=9), control)
        return control

    return callback, happen


# When


def test_a_checkpoint_is_due_so_long_after_the_last_one_and_at_the_end(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    _, happen = events(every_s=10)
    now = 150.0  # loading took a while
    happen("train_begin")
    for now, due in ((151.0, False), (159.9, False), (160.0, True), (165.0, True)):  # noqa: B007  the clock reads it
        assert happen("step_end").should_save == due
    happen("save")
    for now, due in ((174.9, False), (175.0, True)):  # noqa: B007
        assert happen("step_end").should_save == due
    happen("save")
    assert not happen("step_end", 8).should_save
    assert happen("step_end", 9).should_save


def test_where_the_recipe_decides_time_does_not():
    callback, happen = events(every_s=None)
    happen("train_begin")
    callback.last = -1e9
    assert not happen("step_end").should_save
    assert not happen("step_end", 9).should_save


def test_ten_minutes_are_lost_at_most():
    assert SECONDS_BETWEEN == 600


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "ppo"])  # a trainer of TRL's, and ours
def test_without_a_word_a_stage_writes_one_by_time_and_one_at_its_end(train, monkeypatch, kind):
    assert steps(train(kind).work) == [3]
    shutil.rmtree(train.work(kind))
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN", 0.0)
    assert steps(train(kind).work) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward", "ppo"])
def test_save_steps_decide_where_they_are_given(train, monkeypatch, kind):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN", 0.0)
    assert steps(train(kind, save_steps=2).work) == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "expected"), [("'no'", []), ("epoch", [2, 4])])
def test_a_strategy_decides_where_it_is_given(train, monkeypatch, strategy, expected):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN", 0.0)
    limit = {} if strategy == "'no'" else {"save_total_limit": 9}
    recipe_says = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": "false", **limit}
    settings = ", ".join(f"{key}: {value}" for key, value in (recipe_says | {"save_strategy": strategy}).items())
    folder = train.work("sft").parents[3]
    recipe = recipes.load(str(folder / "recipe.yaml"), [f"sft.trainer={{{settings}}}"])
    job = Job(recipe, "sft", recipe.run)
    job.work.mkdir()
    stages.BY_KIND["sft"].run(job)
    assert steps(job.work) == expected


@pytest.mark.slow
def test_no_file_in_a_checkpoint_of_ppo_needs_more_than_tensors_and_numbers(train):
    """As for the other kinds in tests/stages/test_resumable.py."""
    (checkpoint,) = durable.newest_first(train("ppo", max_steps=1).work)
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors", ".pt", ".pth"}
    arrays = [numpy._core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32"))]
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        with torch.serialization.safe_globals(arrays):  # the state of NumPy's generator is an array
            torch.load(file, weights_only=True)


# Stopping


def ask() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_outside_training_it_stops_at_once():
    REQUEST.listen(signal.SIGUSR1)
    with pytest.raises(Stopped) as stopped:
        ask()
        time.sleep(10)
    assert stopped.value.step is None
    assert REQUEST.noted


def test_what_reaches_the_whole_process_group_is_left_to_the_runner():
    REQUEST.listen(signal.SIGUSR1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    assert not REQUEST.noted


def test_nothing_that_handles_errors_catches_it():
    with pytest.raises(Stopped):
        try:
            raise Stopped(3)
        except Exception:  # as a library might
            pytest.fail("it was caught")


def test_while_it_trains_a_request_waits_for_a_checkpoint():
    _, happen = events(every_s=None)
    REQUEST.listen(signal.SIGUSR1)
    happen("train_begin")
    happen("save")  # one that nobody asked for
    ask()
    assert REQUEST.noted
    assert happen("step_end", 3).should_save
    with pytest.raises(Stopped) as stopped:
        happen("save", 3)
    assert stopped.value.step == 3


def test_a_request_while_ranks_agree_that_training_ends_is_not_forgotten(monkeypatch):
    def any_of(noted: bool) -> bool:
        ask()  # it comes after this rank has said that it knows of none
        return noted

    _, happen = events(every_s=None)
    REQUEST.listen(signal.SIGUSR1)
    happen("train_begin")
    monkeypatch.setattr(ranks, "any_of", any_of)
    with pytest.raises(Stopped):
        happen("train_end")


def test_a_request_after_the_last_checkpoint_is_granted_when_training_ends():
    _, happen = events(every_s=600)
    REQUEST.listen(signal.SIGUSR1)
    happen("train_begin")
    happen("save", 9)
    ask()
    with pytest.raises(Stopped) as stopped:
        happen("train_end", 9)
    assert stopped.value.step is None
    REQUEST.noted = False
    with pytest.raises(Stopped):  # and now, while it is judged, at once
        ask()


def test_training_that_nobody_stops_ends_as_it_should():
    _, happen = events(every_s=600)
    happen("train_begin")
    assert REQUEST.training
    happen("train_end", 9)
    assert not REQUEST.training


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "saves"), [("sft", {}), ("ppo", {}), ("sft", {"save_steps": 3})])  # TRL's, and ours
def test_a_stage_stops_after_the_step_with_a_checkpoint_and_resumes_from_there(train, monkeypatch, kind, saves):
    """Asked in the middle of the second step, whatever its settings say of checkpoints."""

    def ask_at_the_second(self: Checkpoints, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            ask()

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_step_begin", ask_at_the_second)
        REQUEST.listen(signal.SIGUSR1)
        with pytest.raises(Stopped) as stopped:
            train(kind, **saves)
    assert stopped.value.step == 2
    work = train.work(kind)
    assert steps(work) == [2]
    assert not (work / "adapter").exists() and not (work / "trained.json").exists()
    REQUEST.noted = REQUEST.training = False
    begun: list[int] = []
    monkeypatch.setattr(
        Checkpoints, "on_step_begin", lambda self, args, state, control, **_: begun.append(state.global_step)
    )
    train(kind, **saves)
    assert begun == [2]
    assert (work / "adapter").exists()
    assert checkpoints.REQUEST is REQUEST and not REQUEST.training


@pytest.mark.slow
def test_without_a_word_the_last_two_are_kept(prepared, tmp_path):
    """The last, and one before it should that be damaged."""
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    text = (folder / "recipe.yaml").read_text().replace(", save_total_limit: 9", ", save_steps: 1")
    (folder / "recipe.yaml").write_text(text)
    recipe = recipes.load(str(folder / "recipe.yaml"))
    for kind in ("dpo", "ppo"):
        job = Job(recipe, kind, recipe.run)
        job.work.mkdir(parents=True)
        stages.BY_KIND[kind].run(job)
        assert steps(job.work) == [2, 3]
