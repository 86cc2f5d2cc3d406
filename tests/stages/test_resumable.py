"""Stages that TRL trains and that resume from any of their checkpoints end exactly as those that never stopped."""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import kinds, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.callbacks.checkpoints import REQUEST, Checkpoints, Stopped
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.adapters import DivergedError
from rlhf_pipeline.models.score_head import with_score_head
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.stages import trial
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.resumable import Resumable

# Two passes of two steps over six rows: a pass ends amid a gradient accumulation, a step is logged long after its
# checkpoint, and evaluation comes between. Dropout draws from the global generators at every step.
TRAINER = (
    "num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 5e-3, "
    "gradient_checkpointing: false, lr_scheduler_type: cosine, logging_steps: 3, eval_steps: 2, eval_on_start: true, "
    "save_steps: 1, save_total_limit: 9"
)
STEPS = 4
# Two optimizer steps for each batch of replies, so that every other checkpoint is amid one; three batches in a pass,
# after which the prompts come in another order.
GROUPS = (
    "max_steps: 8, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, num_generations: 2, "
    "num_iterations: 2, max_completion_length: 6, learning_rate: 5e-3, gradient_checkpointing: false, "
    "lr_scheduler_type: cosine, logging_steps: 3, eval_steps: 2, eval_on_start: true, save_steps: 1, "
    "save_total_limit: 9"
)
BY_LENGTH = "train_sampling_strategy: group_by_length"
RECIPE = f"""
name: short
seed: 7
model: {{path: tiny, quantization: none, dtype: float32}}
lora: {{r: 4, lora_alpha: 8, lora_dropout: 0.2, target_modules: [q_proj, v_proj, down_proj]}}
stages:
  start:
    kind: sft
    data: demonstrations.jsonl
    trainer: {{max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 4, gradient_checkpointing: false}}
  sft:
    init: start
    data: {{path: demonstrations.jsonl, eval_fraction: 0.25}}
    trainer: {{{TRAINER}, {BY_LENGTH}}}
  reward:
    init: start
    data: {{path: preferences.jsonl, eval_fraction: 0.25}}
    trainer: {{{TRAINER}}}
  dpo:
    init: start
    data: {{path: preferences.jsonl, eval_fraction: 0.25}}
    trainer: {{{TRAINER}, disable_dropout: false}}
  kto:
    init: start
    data: {{path: preferences.jsonl, limit: 4, eval_fraction: 0.25}}
    trainer: {{{TRAINER}, disable_dropout: false}}
  grpo:
    init: start
    data: {{path: preferences.jsonl, eval_fraction: 0.25}}
    trainer: {{{GROUPS}, use_adaptive_entropy: true, entropy_target: 9.0}}
  rloo:
    init: start
    data: {{path: preferences.jsonl, eval_fraction: 0.25}}
    trainer: {{{GROUPS}}}
"""
NF4 = ("model.quantization=nf4", "sft.trainer.num_train_epochs=1", "sft.trainer.gradient_checkpointing=true")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "sft, nf4": ("sft", NF4),
    "sft, amid a pass": ("sft", ("sft.trainer.max_steps=3",)),
    "sft, by the pass": (
        "sft",
        (
            "sft.trainer={num_train_epochs: 2, per_device_train_batch_size: 2, learning_rate: 5e-3, "
            "gradient_accumulation_steps: 2, gradient_checkpointing: false, eval_strategy: epoch, "
            "logging_strategy: epoch, save_steps: 1, save_total_limit: 9}",
        ),
    ),
    "reward": ("reward", ()),
    "dpo": ("dpo", ()),
    "grpo": ("grpo", ()),
    "rloo": ("rloo", ()),
    "kto": ("kto", ()),
}
# To resume from: amid the first pass, at its end, after a step that was logged, and the last. What differs between
# the trainers is what they remember of steps not logged yet; what does not is tried on the first alone.
CHECKPOINTS = {"sft": (1, 2, 3, 4), "sft, nf4": (1,), "sft, amid a pass": (3,), "sft, by the pass": (2, 4),
               "reward": (1,), "dpo": (1,),
               "grpo": (1, 6), "rloo": (7,), "kto": (1,)}  # fmt: skip
pytestmark = pytest.mark.slow

NUMPY = [numpy._core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32"))]


class Whole(NamedTuple):
    """A stage that nothing stopped, with all its checkpoints."""

    job: Job
    overrides: tuple[str, ...]
    metrics: dict[str, Any]
    steps: int


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, eight rows of data, and the artifact that all stages start from."""
    folder = tmp_path_factory.mktemp("resumable")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("demonstrations", "preferences"):
        lines = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:8]))
    for name in ("start", "reward"):
        job = new_job(folder, name, "reward.trainer.max_steps=1")
        run(job)
        job.artifact.rename(job.published)
        shutil.rmtree(job.work)
    return folder


def new_job(folder: Path, stage: str, *overrides: str) -> Job:
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True)
    return job


def run(job: Job) -> dict[str, Any]:
    """Train with the global generators where no run would leave them."""
    torch.manual_seed(999)
    random.seed(999)
    numpy.random.seed(999)
    return stages.BY_KIND[job.stage.kind].run(job)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """A function that gives the uninterrupted stage of some kind; made once each."""
    made: dict[str, Whole] = {}

    def make(kind: str) -> Whole:
        if kind not in made:
            stage, overrides = KINDS[kind]
            folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "copy"))
            job = new_job(folder, stage, *overrides)
            metrics = run(job)
            made[kind] = Whole(job, overrides, metrics, durable.step(durable.newest_first(job.work)[0]))
        return made[kind]

    return make


@pytest.fixture
def broken_off(prepared: Path, tmp_path: Path) -> Callable[[Whole, int], Job]:
    """A function that leaves a stage as one killed some time after a checkpoint: what it logged later is there too."""

    def leave(whole: Whole, step: int) -> Job:
        folder = Path(shutil.copytree(prepared, tmp_path / str(step)))
        job = new_job(folder, whole.job.name, *whole.overrides)
        shutil.copytree(whole.job.work / f"checkpoint-{step}", job.work / f"checkpoint-{step}")
        for file in whole.job.folder.glob("*.jsonl"):
            shutil.copy(file, job.folder)
        return job

    return leave


def logged(job: Job) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "_runtime", "_per_second")
    return [{name: value for name, value in row.items() if not name.endswith(times)} for row in rows]


def written(job: Job) -> str:
    file = job.folder / "samples.jsonl"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_any_checkpoint_ends_the_same(whole, broken_off, kind):
    expected = whole(kind)
    assert expected.steps == {"sft, nf4": 2, "sft, amid a pass": 3, "grpo": 8, "rloo": 8}.get(kind, STEPS)
    for step in CHECKPOINTS[kind]:
        job = broken_off(expected, step)
        metrics = run(job)
        assert (job.artifact / WEIGHTS).read_bytes() == (expected.job.artifact / WEIGHTS).read_bytes(), step
        assert logged(job) == logged(expected.job), step
        assert written(job) == written(expected.job), step
        assert metrics == expected.metrics, step
        for later in range(step + 1, expected.steps + 1):  # the next break may come after any of them
            one, other = (of.work / f"checkpoint-{later}" for of in (job, expected.job))
            assert load_file(one / WEIGHTS).keys() == load_file(other / WEIGHTS).keys()
            assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_what_was_resumed_at_the_end_of_a_pass_may_be_stopped_in_the_next_one(whole, prepared, tmp_path, monkeypatch):
    """The first checkpoint is one that `save_strategy: epoch` asks for; rows are in an order of their lengths."""
    by_pass = f"sft.trainer={{{TRAINER.replace('save_steps: 1', 'save_strategy: epoch')}, {BY_LENGTH}}}"
    job = new_job(Path(shutil.copytree(prepared, tmp_path / "copy")), "sft", by_pass)
    run(job)
    for later in (job.artifact, job.work / "checkpoint-4"):
        shutil.rmtree(later)
    step = Resumable.training_step

    def stop(self: Resumable, *args: Any, **kwargs: Any) -> torch.Tensor:
        REQUEST._take(0, None)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(REQUEST, "noted", False)
        patch.setattr(Resumable, "training_step", stop)
        run(job)
    REQUEST.training = False
    assert durable.step(durable.newest_first(job.work)[0]) == 3
    run(job)
    assert (job.artifact / WEIGHTS).read_bytes() == (whole("sft").job.artifact / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto"])
def test_the_stage_to_compare_with_uses_all_that_a_checkpoint_must_hold(whole, kind):
    """Else the test above would show less than it says."""
    job = whole(kind).job
    rows = logged(job)
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 4]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(set(losses[:3])) == 3 and losses[2] == losses[3]
    memories = [json.loads((job.work / f"checkpoint-{step}" / "memory.json").read_text()) for step in (1, 3)]
    assert memories[0]["running_loss"] > 0 and memories[0]["means"]["train"]
    assert memories[1]["running_loss"] == 0 and memories[1]["total_loss"] > 0
    weights = [load_file(job.work / f"checkpoint-{step}" / WEIGHTS) for step in range(1, STEPS + 1)]
    assert all(
        any(not torch.equal(one[name], other[name]) for name in one) for one, other in itertools.pairwise(weights)
    )
    assert ("score.weight" in " ".join(weights[0])) == (kind == "reward")


def test_a_checkpoint_is_what_peft_itself_would_load(whole):
    """And so what a user can look at."""
    expected = whole("sft").job
    names = load_file(expected.artifact / WEIGHTS).keys()
    assert load_file(expected.work / "checkpoint-2" / WEIGHTS).keys() == names
    config = "adapter_config.json"
    assert (expected.work / "checkpoint-2" / config).read_text() == (expected.artifact / config).read_text()
    last = expected.work / f"checkpoint-{STEPS}" / WEIGHTS
    assert last.read_bytes() == (expected.artifact / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_a_checkpoint_needs_more_than_tensors_and_numbers(whole, kind):
    """A pickle could run anything when it is opened, and the class it names may be another one by then."""
    for checkpoint in durable.newest_first(whole(kind).job.work):
        assert durable.damage(checkpoint) is None
        for file in checkpoint.iterdir():
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                load_file(file)
            else:
                assert file.suffix in (".pt", ".pth"), file
                with torch.serialization.safe_globals(NUMPY):  # the state of NumPy's generator is an array
                    torch.load(file, weights_only=True)
        assert not list(checkpoint.glob("*.bin"))


def test_dpo_keeps_its_reference_where_it_started(whole, broken_off, monkeypatch):
    """After going on it is still the adapter of `init`, not the checkpoint."""
    seen: list[dict[str, torch.Tensor]] = []

    class Look(Checkpoints):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
        ) -> None:
            names = adapters.adapter_parameters(model, "ref")
            seen.append({name.replace(".ref", ""): weight.detach().clone() for name, weight in names.items()})
            moved = adapters.adapter_parameters(model, "default")
            assert any(not torch.equal(moved[name.replace(".ref", ".default")], names[name]) for name in names)

    job = broken_off(whole("dpo"), 2)
    init = load_file(job.init / WEIGHTS)
    monkeypatch.setattr(Job, "checkpoints", lambda self: Look(None))
    run(job)
    assert len(seen) == STEPS - 2
    for reference in seen:
        assert reference.keys() == init.keys() and any("lora_B" in name for name in init)
        assert all(torch.equal(reference[name], init[name]) for name in init)


# Training that leaves the finite numbers


@pytest.mark.parametrize("kind", ["sft"])
def test_a_loss_that_is_no_number_ends_the_stage_and_spoils_no_checkpoint(prepared, tmp_path, kind):
    """The first step throws the weights so far that the second has no loss."""
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    overrides = {
        "learning_rate": "1e30",
        "lr_scheduler_type": "constant",
        "logging_steps": "1",
        "eval_on_start": "false",
    }
    job = new_job(folder, kind, *(f"{kind}.trainer.{key}={value}" for key, value in overrides.items()))
    with pytest.raises(DivergedError, match="the loss became nan at step 2"):
        run(job)
    found = durable.newest_first(job.work)
    assert [path.name for path in found] == ["checkpoint-1"]
    assert durable.damage(found[0]) is None
    assert all(torch.isfinite(weight).all() for weight in load_file(found[0] / WEIGHTS).values())
    assert not job.artifact.exists() and not (job.work / "trained.json").exists()
    assert [row["step"] for row in logged(job) if "loss" in row] == [1]


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_weights_that_are_not_finite_are_never_in_a_checkpoint(prepared, tmp_path, kind):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    overrides = {"learning_rate": "1e39", "lr_scheduler_type": "constant", "eval_on_start": "false"}
    job = new_job(folder, kind, *(f"{kind}.trainer.{key}={value}" for key, value in overrides.items()))
    with pytest.raises(DivergedError, match="no longer finite numbers"):
        run(job)
    assert [file.name for file in job.work.iterdir()] == ["progress.json"]


# What is written, when training is over


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_stage_notes_that_it_is_trained_and_what_its_adapter_holds(whole, kind):
    expected = whole(kind)
    note = json.loads((expected.job.work / "trained.json").read_text())
    assert note["metrics"] == expected.metrics
    assert durable.difference(expected.job.artifact, note["files"]) is None
    assert WEIGHTS in note["files"] and "tokenizer.json" in note["files"]


def test_only_so_many_checkpoints_are_kept(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    job = new_job(folder, "sft", "sft.trainer={max_steps: 4, save_steps: 1, per_device_train_batch_size: 2}")
    run(job)
    assert {path.name for path in job.work.glob("*checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_what_resumes_is_saved_and_logged_as_often_as_the_recipe_says_now(prepared, tmp_path):
    """Transformers would have it as the checkpoint has it."""

    def begun(every: int) -> Job:
        folder = Path(shutil.copytree(prepared, tmp_path / str(every)))
        trainer = f"{{max_steps: 6, save_steps: {every}, logging_steps: {every}, per_device_train_batch_size: 2}}"
        return new_job(folder, "sft", f"sft.trainer={trainer}")

    former, job = begun(2), begun(1)
    run(former)
    shutil.copytree(former.work / "checkpoint-4", job.work / "checkpoint-4")
    run(job)
    assert [row["step"] for row in logged(job) if "loss" in row] == [5, 6]
    assert {path.name for path in job.work.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize(("kind", "left"), [("sft", 0.1), ("reward", 0.0), ("dpo", 0.0)])
def test_dropout_that_a_model_passes_to_functions_is_off_where_trl_switches_dropout_off(
    tmp_path, tokenizer, kind, left
):
    """TRL sets that of modules to zero, and OPT's is a number of its layers."""
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    base = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=16, dropout=0.1, **sizes))
    made = adapters.with_reward_adapter if kind == "reward" else adapters.with_policy_adapter
    model = made(with_score_head(base) if kind == "reward" else base, {"r": 1, "target_modules": ["q_proj"]}, None)
    stage = stages.BY_KIND[kind]
    row = trial.ROWS[kinds.get(kind).encoding]
    rows = Dataset.from_dict({name: [value] * 4 for name, value in row.items()})
    args = stage.CONFIG(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    trainer = stage.TRAINER.over(model, args, tokenizer, rows, None)
    assert trainer.model.get_base_model().model.decoder.layers[0].dropout == left
