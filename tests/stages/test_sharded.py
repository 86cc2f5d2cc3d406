"""Two ranks that divide the model between them, by FSDP2 or ZeRO-2, train as one process that holds all of it.

The CPU passes for GPUs here; all else is as `accelerate launch` has it.
"""

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from test_several_ranks import adapter, assert_same, copies, keep_checkpoint, logged, new_job, prepared, train
from test_soundness import model_of
from together import connect, divide, together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_pipeline import ranks
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.stages import dpo, evaluate
from rlhf_pipeline.stages import sharded as stage_sharded
from rlhf_pipeline.stages.resumable import Resumable

__all__ = ["copies", "prepared"]  # fixtures
pytestmark = pytest.mark.slow


JUDGE = """
def judge(prompts, completions, **_):
    return [len(prompt) / (1 + len(completion)) for prompt, completion in zip(prompts, completions)]


def fails(completions):
    raise ValueError(f"no opinion on {len(completions)} replies")
"""
EVALUATE = (
    "evaluate={{data: held_out.jsonl, judge: 'judged:{}', n: 5, batch_size: 2, max_new_tokens: 24, temperature: {}}}"
)
DIVIDED = "start.launch={num_processes: 2, fsdp_config: {fsdp_version: 2}}"


def with_judge(folder: Path) -> Path:
    (folder / "judged.py").write_text(JUDGE)
    return folder


def samples(folder: Path, stage: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "runs/short" / stage / "samples.jsonl").read_text().splitlines())
    return [row for row in rows if "judge" in row]


def sharded(folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank, and see that the model is divided."""
    finish = Resumable._finalize_training

    def finish_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.model, FSDPModule)
        layers = [one for name, one in self.model.named_parameters() if ".layers." in name]
        assert layers and all(isinstance(one, DTensor) for one in layers)
        return finish(self, *args, **kwargs)

    divide()
    Resumable._finalize_training = finish_and_look
    return train(folder, stage, *overrides)


@pytest.mark.parametrize(
    ("stage", "of_each", "more"),
    [
        ("sft", 1, ()),
        ("sft", 1, ("model.quantization=nf4",)),
        ("reward", 1, ()),
        ("dpo", 1, ("dpo.trainer.loss_type=[sigmoid]", "dpo.trainer.loss_weights=null")),
        ("kto", 2, ("kto.reference=base",)),
    ],
)
def test_two_ranks_that_divide_the_model_end_as_one_process(copies, stage, of_each, more):
    """The artifact is the same files; of DPO, the first loss says that policy and reference are one.

    A policy says the same to the same prompts, and is judged alike.
    """
    one, two = map(with_judge, copies)
    more += (EVALUATE.format("judge", 0),)
    size = f"{stage}.trainer.per_device_train_batch_size="
    alone = train(one, stage, f"{size}{2 * of_each}", f"{stage}.trainer.per_device_eval_batch_size=2", *more)
    first, second = together(sharded, two, stage, f"{size}{of_each}", *more)
    assert_same(one, two, stage)
    assert second == {} and first == pytest.approx(alone, rel=1e-4, abs=1e-5)
    files = [
        sorted(path.name for path in (folder / "runs/short" / stage / "work/adapter").iterdir()) for folder in copies
    ]
    assert files[0] == files[1]
    if stage != "reward":
        assert samples(two, stage) == samples(one, stage)
        assert first["judge_mean"] == alone["judge_mean"] and 0 < first["generation_gap"] < 1e-5
    assert stage != "dpo" or logged(two, stage)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_divided_model_resumes_from_any_of_its_checkpoints(copies, stage):
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size=1"
    together(sharded, one, stage, size)
    keep_checkpoint(one, two, stage, 1)
    together(sharded, two, stage, size)
    assert_same(one, two, stage, within=0)
    assert adapter(one, stage).keys() == adapter(two, stage).keys()


def judge(folder: Path, *overrides: str) -> dict[str, Any]:
    """Judge the stage `start` on this rank."""
    job = new_job(folder, "start", *overrides)
    return evaluate.judge_artifact(job, job.published)


def judge_divided(folder: Path, *overrides: str) -> dict[str, Any] | str:
    """The same of a divided model; or what the judge raises."""
    connect()
    divide()
    try:
        return judge(folder, *overrides)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("temperature", [0, 1])
def test_replies_and_numbers_of_two_ranks_are_those_of_one_process(copies, temperature):
    """Of five prompts in batches of two, a rank has two batches, and the other one; replies are of unlike length.

    With one batch in all, the other rank has none.
    """
    one, two = map(with_judge, copies)
    for more in ("evaluate.batch_size=2", "evaluate.batch_size=8"):
        settings = (EVALUATE.format("judge", temperature), DIVIDED, more)
        alone = judge(one, *settings)
        first, second = together(judge_divided, two, *settings)
        assert samples(two, "start") == samples(one, "start")
        assert len(samples(two, "start")) == 5
        assert len({len(row["completion"]) for row in samples(two, "start")}) > 2
        assert second == {} and first == alone


def test_a_judge_that_raises_leaves_no_rank_waiting(copies):
    two = with_judge(copies[1])
    assert together(judge_divided, two, EVALUATE.format("fails", 0)) == ["no opinion on 5 replies", {}]


def reply(name: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy replies of a small random model with a fresh adapter."""
    model = adapters.with_policy_adapter(model_of(name), {"r": 4, "target_modules": "all-linear"}, None)
    model = stage_sharded.divide(model).eval()
    if isinstance(model, FSDPModule):
        model.reshard()  # as after a step of training
    with stage_sharded.in_step(model) as policy:
        if not prompts:
            return []
        episodes = sample(
            policy, prompts, response_length=tokens, temperature=0.0, stop_token_id=None, pad_token_id=0, at_once=2
        )
    return episodes.tokens


def reply_divided(name: str, asked: list[tuple[list[list[int]], int]]) -> list[list[int]]:
    connect()
    divide()
    return reply(name, *asked[ranks.index()])


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_ranks_sample_as_much_as_each_of_them_wants(name):
    """Also what is of no layer, as GPT-2's positions, is whole; Mamba replies by Transformers' own `generate`."""
    asked = [([[7, 8, 9], [5], [6, 6]], 9), ([[11, 12]], 4)]
    assert together(reply_divided, name, asked) == [reply(name, *one) for one in asked]
    assert together(reply_divided, name, [([], 1), asked[0]]) == [[], reply(name, *asked[0])]


def test_zero_3_is_refused(copies, tmp_path):
    """Also where a file of DeepSpeed's own says it."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for config in ("{zero_stage: 3}", f"{{deepspeed_config_file: {tmp_path / 'zero.json'}}}"):
        launch = f"dpo.launch={{num_processes: 2, deepspeed_config: {config}}}"
        with pytest.raises(InputError, match="ZeRO-3"):
            dpo.prepare(new_job(copies[0], "dpo", launch))
    dpo.prepare(new_job(copies[0], "dpo", launch.replace(config, "{zero_stage: 2}")))


def with_deepspeed(folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank with ZeRO-2 and without the kernels that DeepSpeed would compile for a CPU."""
    connect()
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    importlib.import_module("deepspeed.comm").init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    build = AcceleratorState.__init__
    AcceleratorState.__init__ = lambda *of, **given: build(*of, **given | {"cpu": False})
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    return train(folder, stage, *overrides)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_zero_2_trains_and_resumes_as_one_process(copies, stage):
    pytest.importorskip("deepspeed")
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size="
    train(one, stage, f"{size}2")
    together(with_deepspeed, two, stage, f"{size}1")
    assert_same(one, two, stage)
    keep_checkpoint(two, two, stage, 1)
    together(with_deepspeed, two, stage, f"{size}1")
    assert_same(one, two, stage)
