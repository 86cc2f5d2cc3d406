"""Errors as a person should read them: what happened, and what to change that can still be changed."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import explain as explaining
from rlhf_pipeline.run.explain import SAFE, TRAINING_IS_KEPT, explain, explain_signal, memory_hint, oom_kills, recognise
from rlhf_pipeline.user_code import FunctionError

RECIPE = """
name: short
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4}
stages:
  sft: {data: {path: tiny:demonstrations, eval_fraction: 0.1}, trainer: {gradient_checkpointing: false}}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
  dpo: {data: tiny:preferences}
"""
LEAST = [  # nothing that costs only time, or precision, is left to lower
    "model.quantization=nf4",
    "model.dtype=bfloat16",
    "lora.r=1",
    "evaluate.batch_size=1",
    "evaluate.max_new_tokens=1",
    *(f"{name}.trainer.per_device_train_batch_size=1" for name in ("sft", "reward", "ppo")),
    "sft.trainer.gradient_checkpointing=true",
    "sft.trainer.per_device_eval_batch_size=1",
    "ppo.trainer.local_rollout_forward_batch_size=1",
    "ppo.trainer.whiten_rewards=false",
]


def load(folder: Path, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(RECIPE)
    return recipes.load(str(folder / "recipe.yaml"), overrides)


def named(hint: str, *settings: str) -> None:
    """See that a hint names these settings in this order, each once."""
    positions = [hint.find(setting) for setting in settings]
    assert -1 not in positions and positions == sorted(positions), hint
    assert hint.count("`") == 2 * len(settings), hint


def test_the_cheapest_savings_of_memory_are_named_first(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    of_model = ("`model.dtype: bfloat16`", "`model.quantization: nf4`", "`lora.r`")
    batch = ("`per_device_train_batch_size`", "`gradient_accumulation_steps`")
    named(
        memory_hint(recipe, "sft"),
        "`gradient_checkpointing: true`", *batch, "`per_device_eval_batch_size`", *of_model, "`max_length`",
    )  # fmt: skip
    named(memory_hint(recipe, "reward"), *batch, *of_model, "`max_length`")
    named(memory_hint(recipe, "ppo"), "`local_rollout_forward_batch_size`", *batch, *of_model, "`response_length`")


def test_what_the_forecast_would_change_is_named_before_all_else(tmp_path: Path) -> None:
    recipe, saving = load(tmp_path), "`sft.trainer.gradient_checkpointing=True` (1 GiB in place of 2)"
    error = OutOfMemoryError("Tried to allocate 2.00 GiB.")
    hint = explain(error, recipe, "sft", recipe.run / "sft", saving)[1]
    assert hint == f"set {saving}; or {memory_hint(recipe, 'sft')}"


def test_a_divided_batch_costs_only_time_unless_pairs_are_sorted_within_its_parts(tmp_path: Path) -> None:
    half = "half the `per_device_train_batch_size` with twice the `gradient_accumulation_steps` "
    for losses, note in (("[sigmoid, sft]", "(costs time only)"), ("[aot]", "(changes what `aot` sorts)")):
        hint = memory_hint(load(tmp_path, f"dpo.trainer.loss_type={losses}"), "dpo")
        assert half + note in hint


def test_what_cannot_be_lowered_any_more_is_not_named(tmp_path: Path) -> None:
    recipe = load(tmp_path, *LEAST)
    named(memory_hint(recipe, "sft"), "`max_length`")
    named(memory_hint(recipe, "reward"), "`max_length`")
    named(memory_hint(recipe, "ppo"), "`response_length`")


@pytest.mark.parametrize("kept", ["work/trained.json", "adapter/adapter_model.safetensors"])
def test_once_a_stage_is_trained_only_its_judging_takes_memory(tmp_path: Path, kept: str) -> None:
    recipe = load(tmp_path)
    file = recipe.run / "sft" / kept
    file.parent.mkdir(parents=True)
    file.touch()
    hint = memory_hint(recipe, "sft")
    named(hint, "`evaluate.batch_size`", "`evaluate.max_new_tokens`")
    assert hint.endswith(TRAINING_IS_KEPT)
    assert explain(ValueError("no opinion"), recipe, "sft", recipe.run) == ("ValueError: no opinion", TRAINING_IS_KEPT)
    named(memory_hint(load(tmp_path, *LEAST), "sft"))
    assert explain(ValueError("odd"), recipe, "ppo", recipe.run)[1] == SAFE


class OutOfMemoryError(RuntimeError):
    """Its name is all that can be seen of PyTorch's own without importing it."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutOfMemoryError("Tried to allocate 2.00 GiB.\nMore."), "the GPU's memory ran out (Tried to allocate 2.00 G"),
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory ran out (CUDA error: out of memory)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "the GPU's memory ran out (CUDA error: CUB"),
        (MemoryError(), "the machine's memory ran out (MemoryError)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine's memory ran out ([Errno 12] Cannot"),
    ],
)  # fmt: skip
def test_memory_of_the_gpu_and_of_the_machine_are_told_apart(
    tmp_path: Path, error: BaseException, message: str
) -> None:
    recipe = load(tmp_path)
    said, hint = explain(error, recipe, "sft", recipe.run / "sft")
    assert said.startswith(message) and hint == memory_hint(recipe, "sft")
    assert explain(error, recipe, None, recipe.run)[1] == SAFE


def test_what_is_said_in_a_sentence_already_is_said_as_it_is(tmp_path: Path) -> None:
    error = RunError("the address is gone", hint="what it has answered is kept")
    assert recognise(error, load(tmp_path), "sft", tmp_path) == (
        "the address is gone", f"what it has answered is kept; {SAFE}"
    )  # fmt: skip


def test_of_many_lines_the_first_is_said(tmp_path: Path) -> None:
    said, hint = explain(ValueError("first\nsecond"), load(tmp_path), "sft", tmp_path)
    assert (said, hint) == ("ValueError: first", SAFE)
    assert explain(KeyError(), load(tmp_path), "sft", tmp_path)[0] == "KeyError: KeyError"


@pytest.mark.parametrize(
    ("number", "memory_ran_out", "message"),
    [
        (signal.SIGKILL, False, "its worker was ended by signal 9, from outside"),
        (signal.SIGKILL, True, "the kernel killed its worker, because the machine's memory ran out"),
        (signal.SIGSEGV, True, "its worker was ended by signal 11 (Segmentation fault)"),
    ],
)
def test_a_kill_for_memory_is_told_from_one_from_outside(
    tmp_path: Path, number: int, memory_ran_out: bool, message: str
) -> None:
    recipe = load(tmp_path)
    for_memory = number == signal.SIGKILL and memory_ran_out
    hint = memory_hint(recipe, "sft") if for_memory else SAFE
    assert explain_signal(number, memory_ran_out, recipe, "sft") == (message, hint)
    assert explain_signal(number, memory_ran_out, recipe, None) == (message, SAFE)


def test_a_full_disk_names_former_results_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(tmp_path)
    recipe.run.mkdir(parents=True)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message, hint = explain(error, recipe, None, recipe.run)
    assert message == f"the disk of {recipe.run} is full ([Errno 28] No space left on device)"
    assert hint == f"free some space there; {SAFE}"
    (recipe.run / "sft.20260101-120000").mkdir()
    hint = explain(error, recipe, None, recipe.run)[1]
    assert hint == f"`rlhf-pipeline prune {recipe.run}` removes former results; {SAFE}"
    monkeypatch.setattr(explaining, "full_disk", lambda folder: Path("/elsewhere"))
    assert explain(error, recipe, None, recipe.run)[0].startswith("the disk of /elsewhere is full")


def test_a_run_directory_that_cannot_be_made_is_said_without_what_would_resume(tmp_path: Path) -> None:
    recipe = load(tmp_path, f"output_dir={tmp_path / 'file' / 'runs'}")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as raised:
        recipe.run.mkdir(parents=True)
    message, hint = explain(raised.value, recipe, None, recipe.run)
    assert message.startswith(f"the run directory {recipe.run} cannot be made ([Errno 20] Not a directory")
    assert hint == "set `output_dir` to a folder that can be made"
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", str(recipe.run / "sft" / "stage.json"))
    assert explain(gone, recipe, None, recipe.run)[1] == SAFE


def test_what_cannot_be_written_is_named_by_what_is_there(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    (tmp_path / "there").touch()

    def said(file: str) -> str:
        return explain(PermissionError(errno.EACCES, "Permission denied", file), recipe, None, tmp_path)[0]

    assert said(str(tmp_path / "there")).startswith(f"{tmp_path / 'there'} cannot be written to ([Errno 13]")
    assert said(str(tmp_path / "not-there.new")).startswith(f"{tmp_path} cannot be written to ([Errno 13]")


def test_the_kills_of_every_counter_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counter files as the kernel writes them; a real kill for memory needs a control group of one's own."""
    events, control = tmp_path / "memory.events", tmp_path / "memory.oom_control"
    events.write_text("low 0\nhigh 3\nmax 4\noom 2\noom_kill 2\noom_group_kill 1\n")
    control.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    files = {"/sys/fs/cgroup/memory.events": events, "/sys/fs/cgroup/memory/memory.oom_control": control}

    def path(name: Any) -> Path:
        return files.get(name, tmp_path / "none")

    monkeypatch.setattr(explaining, "Path", path)
    assert oom_kills() == 5
    events.unlink()
    assert oom_kills() == 3


def test_a_function_that_fails_is_named_by_its_key(tmp_path: Path) -> None:
    """A judge can be corrected without training again; a reward decides the policy."""
    recipe = load(tmp_path)
    said, hint = explain(FunctionError("the judge returned None", "evaluate.judge"), recipe, "sft", tmp_path)
    assert (said, hint) == (
        "the judge returned None", f"correct the function that `evaluate.judge` names; {SAFE}"
    )  # fmt: skip
    key = "stages.ppo.rewards.0.function"
    said, hint = explain(FunctionError("it raised ValueError: no", key), recipe, "ppo", tmp_path)
    assert said == "it raised ValueError: no"
    assert f"`{key}` names" in hint and "retrained from the start" in hint and hint.endswith(f"; as it is, {SAFE}")


def test_memory_that_runs_out_in_a_function_is_not_its_fault(tmp_path: Path) -> None:
    error = FunctionError("it raised MemoryError: ", "stages.ppo.rewards.0.function")
    error.__cause__ = MemoryError()
    said, hint = explain(error, load(tmp_path), "ppo", tmp_path)
    assert said.startswith("the machine's memory ran out") and "response_length" in hint
