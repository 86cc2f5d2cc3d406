"""A run that resumes from a checkpoint ends exactly as one that never stopped, however it was stopped."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlhf_pipeline.callbacks.metrics import MetricsLog
from rlhf_pipeline.models import base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.rundir import durable

UPDATES = 5
# Everything that has a state to lose. Eight of twenty prompts an update, so that passes end within updates.
EVERYTHING: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_steps": UPDATES,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 5,
    "temperature": 1.0,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "value_warmup_updates": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "target_kl": 0.1,
    "kl_horizon": 40,
    "kl_budget": 1e6,
    "normalize_scores": True,
    "missing_eos_penalty": 0.3,
    "ptx_coef": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 4,
    "num_sample_generations": UPDATES,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 10,
}
TIMING = ("eps", "seconds", "tokens_per_second", "time")


def build(artifacts: tuple[dict, Path, Path], folder: Path, *callbacks: TrainerCallback, **settings: Any) -> PPOTrainer:
    """A trainer as a new process would build it, from what lies on disk alone.

    Args:
        artifacts: the model's settings, and the folders of policy and reward.
        folder: for checkpoints, metrics and samples.
        callbacks: besides the one that writes metrics.
        settings: over `EVERYTHING`; `rank` is the policy's, 4 by default, as is the artifact's.
    """
    spec = Model(**artifacts[0])
    tokenizer = load_tokenizer(spec.path)
    ranks = (settings.pop("rank", 4), settings.pop("reward_rank", 8))
    lora = [{"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"} for rank in ranks]
    shared = SharedBase(base.load_base(spec, tokenizer), lora[0], artifacts[1], [(artifacts[2], lora[1])])
    draw = random.Random(3)
    texts = [[draw.randrange(5, 1024) for _ in range(2 + i % 7)] for i in range(32)]
    labels = [[-100, *row[1:]] for row in texts[27:]]
    return PPOTrainer(
        PPOConfig(output_dir=str(folder), **EVERYTHING | settings),
        tokenizer,
        shared,
        Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer),
        Dataset.from_dict({"input_ids": texts[:20]}),
        eval_dataset=Dataset.from_dict({"input_ids": texts[20:27]}),
        ptx_dataset=Dataset.from_dict({"input_ids": texts[27:], "labels": labels}),
        callbacks=[MetricsLog(folder / "metrics.jsonl"), *callbacks],
        samples_file=folder / "samples.jsonl",
    )


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """The weights of policy and value, head included."""
    return {
        f"{role}.{name}": parameter.detach().clone()
        for role in ("policy", "value")
        for name, parameter in getattr(trainer.shared, role).named_parameters()
    }


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and any("score" in name for name in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith(TIMING)} for row in rows]


def lines(file: Path) -> list[dict[str, Any]]:
    return without_times([json.loads(line) for line in file.open(encoding="utf-8")])


def elsewhere() -> None:
    """Put the global random number generators where no run would leave them."""
    torch.manual_seed(999)
    random.seed(999)
    numpy.random.seed(999)


@pytest.fixture(scope="module")
def artifacts(make_artifacts) -> tuple[dict, Path, Path]:
    spec, init, reward = make_artifacts()
    return spec.model_dump(), init, reward


class Finished:
    """A run that nothing stopped: its folder, with all checkpoints, its final weights, and what it logged."""

    def __init__(self, artifacts: tuple[dict, Path, Path], folder: Path, **settings: Any) -> None:
        self.folder = folder
        trainer = build(artifacts, folder, **settings)
        self.start = weights(trainer)
        trainer.train()
        self.end = weights(trainer)
        self.history = without_times(trainer.state.log_history)


@pytest.fixture(scope="module")
def uninterrupted(artifacts, tmp_path_factory) -> Finished:
    return Finished(artifacts, tmp_path_factory.mktemp("uninterrupted"))


def test_the_run_to_compare_with_uses_all_that_a_checkpoint_must_hold(uninterrupted: Finished) -> None:
    """Else the tests below would show less than they say."""
    assert any(not torch.equal(uninterrupted.start[name], uninterrupted.end[name]) for name in uninterrupted.end)
    rows = [row for row in uninterrupted.history if "objective/kl" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert len({row["objective/kl_coef"] for row in rows}) == 3 and len({row["lr"] for row in rows}) == 3
    assert rows[0]["lr"] != rows[0]["lr_value"] and rows[-1]["loss/ptx"] > 0
    memories = [
        json.loads((uninterrupted.folder / f"checkpoint-{k}" / "ppo_state.json").read_text())
        for k in range(1, UPDATES + 1)
    ]
    assert [len(memory["unreported"]) for memory in memories] == [1, 0, 1, 0, 1]
    assert all(memory["best"] for memory in memories)
    assert [memory["score_statistics"]["count"] for memory in memories] == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("update", range(1, UPDATES))
def test_going_on_from_any_checkpoint_ends_the_same(
    artifacts, uninterrupted: Finished, tmp_path: Path, update: int
) -> None:
    trainer = build(artifacts, tmp_path)
    elsewhere()
    trainer.train(resume_from_checkpoint=str(uninterrupted.folder / f"checkpoint-{update}"))
    assert_same_weights(weights(trainer), uninterrupted.end)
    assert without_times(trainer.state.log_history) == uninterrupted.history
    own = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert sorted(own) == [f"checkpoint-{k}" for k in range(update + 1, UPDATES + 1)]


def test_going_on_from_a_finished_run_repeats_nothing(artifacts, uninterrupted: Finished, tmp_path: Path) -> None:
    """As after a power cut between the last checkpoint and the end of the stage, which has spoilt lines of its logs."""
    folder = Path(shutil.copytree(uninterrupted.folder, tmp_path / "copy"))
    for file in ("metrics.jsonl", "samples.jsonl"):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(b"\0\0\n" + before + b'{"step": "three", \xff\n\n[]\n{"st')
    trainer = build(artifacts, folder)
    elsewhere()
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights(trainer), uninterrupted.end)
    assert without_times(trainer.state.log_history) == uninterrupted.history
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(folder / file) == lines(uninterrupted.folder / file)
        assert (folder / f"{file}.damaged").read_bytes() == b'\0\0\n{"step": "three", \xff\n[]\n'


@pytest.mark.slow
def test_the_best_policy_within_the_budget_outlives_a_restart(artifacts, tmp_path: Path) -> None:
    """The first batch after the restart is over the budget, so that only the checkpoint can know the best policy."""
    far = {
        "learning_rate": 6e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "target_kl": None, "kl_coef": 0.0,
        "kl_estimator": "k3", "logging_steps": 1, "eval_strategy": "no", "value_warmup_updates": 0, "ptx_coef": 0.05,
    }  # fmt: skip
    kls = [row["objective/kl"] for row in Finished(artifacts, tmp_path, **far).history]
    best = [json.loads((tmp_path / f"checkpoint-{k}" / "ppo_state.json").read_text())["best"] for k in (1, 2, 3, 4)]
    exceeded = next(k for k in (4, 3, 2) if kls[k] > 1.1 * max(kls[:k]) and best[k - 1]["step"] > 0)
    trainer = build(artifacts, tmp_path, **far, kl_budget=(kls[exceeded] + max(kls[:exceeded])) / 2)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{exceeded}"))
    last = trainer.state.log_history[-1]
    assert (last["kl_budget/exceeded_at_step"], last["kl_budget/best_step"]) == (exceeded, best[exceeded - 1]["step"])
    then = load_file(tmp_path / f"checkpoint-{last['kl_budget/best_step']}" / "policy.safetensors")
    now = dict(trainer.shared.policy.named_parameters())
    assert then and all(torch.equal(tensor, now[name]) for name, tensor in then.items())


# Killed for real


class Stop(TrainerCallback):
    """Kills its own process as soon as a line of some update is in the metrics file."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if any(row["step"] == self.step for row in lines(self.file)):
            os.kill(os.getpid(), signal.SIGKILL)


def train_in_process(artifacts: tuple[dict, Path, Path], folder: Path, kill_at: int | None, resume: bool) -> None:
    """What a process of its own does: train, and leave its final weights behind."""
    callbacks = [Stop(folder / "metrics.jsonl", kill_at)] if kill_at else []
    elsewhere()
    trainer = build(artifacts, folder, *callbacks)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(weights(trainer), folder / "end.pt")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Makes new processes from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf_pipeline.stages.ppo"])
    return context


def assert_goes_on_as_if_nothing_happened(processes, artifacts, folder: Path, uninterrupted: Finished) -> None:
    process = processes.Process(target=train_in_process, args=(artifacts, folder, None, True))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert_same_weights(torch.load(folder / "end.pt"), uninterrupted.end)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(folder / file) == lines(uninterrupted.folder / file)
    assert not list(folder.glob(".*-checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("update", [2, 4])
def test_a_process_killed_as_it_logs_is_made_good_by_another(
    processes, artifacts, uninterrupted: Finished, tmp_path: Path, update: int
) -> None:
    """The line is written before the checkpoint of the same update; it must neither be lost nor stand there twice."""
    process = processes.Process(target=train_in_process, args=(artifacts, tmp_path, update, False))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert lines(tmp_path / "metrics.jsonl")[-1]["step"] == update
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))][-1] == f"checkpoint-{update - 1}"
    assert_goes_on_as_if_nothing_happened(processes, artifacts, tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_process_killed_while_it_writes_a_checkpoint_is_made_good_by_another(
    processes, artifacts, uninterrupted: Finished, tmp_path: Path
) -> None:
    """Killed from outside as soon as the unfinished third checkpoint shows; again if it was finished by then."""
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        process = processes.Process(target=train_in_process, args=(artifacts, folder, None, False))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if (folder / ".new-checkpoint-3").is_dir():
                process.kill()
                break
            time.sleep(0.0002)
        process.join(timeout=120)
        if process.exitcode == -signal.SIGKILL and (folder / ".new-checkpoint-3").is_dir():
            break
    assert (folder / ".new-checkpoint-3").is_dir() and not (folder / "checkpoint-3").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 1')  # what a kill while a line is written would leave
    assert_goes_on_as_if_nothing_happened(processes, artifacts, folder, uninterrupted)


# What cannot be resumed from


@pytest.mark.parametrize("role", ["reference", "reward", "reward head"])
def test_a_checkpoint_of_other_frozen_weights_is_refused(
    artifacts, uninterrupted: Finished, tmp_path: Path, role: str
) -> None:
    trainer = build(artifacts, tmp_path)
    shared = trainer.shared
    one = {
        "reference": lambda: next(iter(shared.reference.parameters())),
        "reward": lambda: next(parameter for name, parameter in shared.reward.named_parameters() if "lora" in name),
        "reward head": lambda: shared.reward.score.weight,
    }[role]()
    with torch.no_grad():
        one.view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=f"its {role.split()[0]} is not the one of this run"):
        trainer.train(resume_from_checkpoint=str(uninterrupted.folder / "checkpoint-2"))


@pytest.mark.parametrize("ranks", [{"rank": 5}, {"reward_rank": 9}])
def test_a_checkpoint_of_another_rank_is_refused(
    artifacts, uninterrupted: Finished, tmp_path: Path, ranks: dict[str, int]
) -> None:
    trainer = build(artifacts, tmp_path, **ranks)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"cannot be resumed from|are not the weights of this"):
        trainer.train(resume_from_checkpoint=str(uninterrupted.folder / "checkpoint-2"))
    assert_same_weights(weights(trainer), before)


def test_a_trained_role_of_another_shape_is_refused_by_name(artifacts, uninterrupted: Finished, tmp_path: Path) -> None:
    """Where the frozen roles are right and only the trained weights of the checkpoint are not."""
    folder = Path(shutil.copytree(uninterrupted.folder / "checkpoint-2", tmp_path / "checkpoint-2"))
    (folder / "value.safetensors").write_bytes((folder / "policy.safetensors").read_bytes())
    trainer = build(artifacts, tmp_path)
    with pytest.raises(ValueError, match="these are not the weights of this value"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_that_cannot_be_read_is_named_whatever_is_wrong_with_it(
    artifacts, uninterrupted: Finished, tmp_path: Path
) -> None:
    """JSON of the right syntax and the wrong type, files of something else, and none at all."""
    trainer, whole = build(artifacts, tmp_path), uninterrupted.folder / "checkpoint-2"
    wrong: dict[str, list[bytes | None]] = {
        "trainer_state.json": [b"[]", b'{"global_step": 3}', b'{"global_step": 2, "foreign": 1}', b'"2"', None],
        "ppo_state.json": [b"[]", b'{"frozen": 3}', b"\xff", None],
        "policy.safetensors": [b"", (whole / "value.safetensors").read_bytes(), None],
        "optimizer.pt": [b"text", (whole / "scheduler.pt").read_bytes(), None],
        "scheduler.pt": [(whole / "rng_state.pth").read_bytes()],
        "rng_state.pth": [(whole / "scheduler.pt").read_bytes()],
    }
    for name, contents in wrong.items():
        folder = Path(shutil.copytree(whole, tmp_path / name / "checkpoint-2"))
        for content in contents:
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
            with pytest.raises(durable.CheckpointError, match=r"^checkpoint-2 cannot be resumed from: ") as caught:
                trainer.train(resume_from_checkpoint=str(folder))
            assert caught.value.checkpoint == "checkpoint-2", (name, content)


def test_where_there_is_no_checkpoint_to_go_on_from_that_is_said(artifacts, tmp_path: Path) -> None:
    trainer = build(artifacts, tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


# An optimizer with states of its own kind


@pytest.mark.slow
def test_going_on_with_an_8_bit_optimizer_ends_the_same(make_artifacts, tmp_path: Path) -> None:
    """bitsandbytes keeps states of 4096 elements and more in 8 bits; ranks are chosen so that there are some."""
    spec, init, reward = make_artifacts(ranks=(64, 64))
    artifacts = (spec.model_dump(), init, reward)
    settings = {"optim": "adamw_bnb_8bit", "rank": 64, "reward_rank": 64, "max_steps": 3, "learning_rate": 1e-3}
    expected = Finished(artifacts, tmp_path / "whole", **settings)
    trainer = build(artifacts, tmp_path / "resumed", **settings)
    elsewhere()
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    states = [state["state1"].dtype for state in trainer.optimizer.state.values()]
    assert torch.uint8 in states
    assert_same_weights(weights(trainer), expected.end)
    assert without_times(trainer.state.log_history) == expected.history
    assert all(math.isfinite(row["objective/kl"]) for row in expected.history if "objective/kl" in row)
