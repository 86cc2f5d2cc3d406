"""Two ranks that divide the model between them, by FSDP2 or DeepSpeed, train as one process that holds all of it.

The CPU passes for GPUs here; all else is as `accelerate launch` has it.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_several_ranks import adapter, assert_same, copies, keep_checkpoint, logged, new_job, prepared, train
from test_soundness import model_of
from together import connect, divide, divide_by_deepspeed, together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_pipeline import ranks
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.stages import evaluate, soundness
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
DIVIDED = {
    "FSDP2": "start.launch={num_processes: 2, fsdp_config: {fsdp_version: 2}}",
    "ZeRO-3": "start.launch={num_processes: 2, deepspeed_config: {zero_stage: 3}}",
}


def with_judge(folder: Path) -> Path:
    (folder / "judged.py").write_text(JUDGE)
    return folder


def samples(folder: Path, stage: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "runs/short" / stage / "samples.jsonl").read_text().splitlines())
    return [row for row in rows if "judge" in row]


EACH_READS = "FSDP2, and each rank reads"


def divide_by(how: str, folder: Path) -> None:
    """Have this process divide what it trains."""
    if how in ("FSDP2", EACH_READS):
        divide()
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(how == "FSDP2").lower()
    else:
        divide_by_deepspeed(int(how[-1]), folder)


def skip_without(how: str) -> None:
    if "FSDP2" not in how:
        pytest.importorskip("deepspeed")


def sharded(how: str, folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank, and see that the model is divided."""
    finish = Resumable._finalize_training

    def finish_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = [one for name, one in self.model.named_parameters() if ".layers." in name]
        if "FSDP2" in how:
            assert isinstance(self.model, FSDPModule) and all(isinstance(one, DTensor) for one in layers)
        else:
            assert {one.numel() == 0 for one in layers} == {how == "ZeRO-3"}
        return finish(self, *args, **kwargs)

    divide_by(how, folder)
    Resumable._finalize_training = finish_and_look
    return train(folder, stage, *overrides)


LN_2 = ("dpo.trainer.loss_type=[sigmoid]", "dpo.trainer.loss_weights=null")
PRECOMPUTED = ("dpo.trainer.precompute_ref_log_probs=true",)
PACKED = ("sft.trainer.packing=true", "sft.trainer.max_length=128")
CASES = [
    ("sft", 1, ("model.quantization=nf4",)),
    ("reward", 1, ()),
    ("dpo", 1, LN_2),
    ("dpo", 1, PRECOMPUTED),
    ("kto", 2, ("kto.reference=base",)),
]


@pytest.mark.parametrize(
    ("how", "stage", "of_each", "more"),
    [
        ("FSDP2", "sft", 1, ()),
        *[("FSDP2", *case) for case in CASES],
        (EACH_READS, "sft", 1, ()),
        (EACH_READS, "dpo", 1, LN_2),
        ("ZeRO-3", "sft", 1, PACKED),
        *[("ZeRO-3", *case) for case in CASES],
        ("ZeRO-2", "dpo", 1, LN_2),
    ],
)
def test_two_ranks_that_divide_the_model_end_as_one_process(copies, how, stage, of_each, more):
    """The artifact is the same files; of DPO, the first loss says that policy and reference are one.

    A policy says the same to the same prompts, and is judged alike.
    """
    skip_without(how)
    one, two = map(with_judge, copies)
    judged = stage != "reward" and ("FSDP2" in how or more == PACKED)
    more += (f"{stage}.trainer.num_train_epochs=1", *[EVALUATE.format("judge", 0)] * judged)
    size = f"{stage}.trainer.per_device_train_batch_size="
    alone = train(one, stage, f"{size}{2 * of_each}", f"{stage}.trainer.per_device_eval_batch_size=2", *more)
    first, second = together(sharded, how, two, stage, f"{size}{of_each}", *more)
    assert_same(one, two, stage)
    assert second == {} and first == pytest.approx(alone, rel=1e-4, abs=1e-5)
    files = [
        sorted(path.name for path in (folder / "runs/short" / stage / "work/adapter").iterdir()) for folder in copies
    ]
    assert files[0] == files[1]
    if judged:
        assert samples(two, stage) == samples(one, stage)
        assert first["judge_mean"] == alone["judge_mean"] and 0 < first["generation_gap"] < 1e-5
    assert LN_2[0] not in more or logged(two, stage)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("how", ["ZeRO-2", "ZeRO-3"])
def test_weights_are_saved_as_deepspeed_updates_them_not_in_the_16_bits_that_it_computes_with(copies, how):
    skip_without(how)
    options = ("model.dtype=bfloat16", "sft.trainer.max_steps=1", "sft.trainer.per_device_train_batch_size=2")
    together(sharded, how, copies[0], "sft", *options)
    found = adapter(copies[0], "sft").values()
    assert {one.dtype for one in found} == {torch.float32}
    assert all((one != one.bfloat16()).any() for one in found)


def test_packing_is_measured_on_the_divided_model(copies, monkeypatch):
    skip_without("ZeRO-3")
    monkeypatch.setattr(soundness, "MOST_LEAK", -1.0)
    with pytest.raises(AssertionError, match="packed rows see each other"):
        together(sharded, "ZeRO-3", copies[0], "sft", *PACKED)


@pytest.mark.parametrize(
    ("how", "stage", "step"),
    [("FSDP2", "sft", 1), ("FSDP2", "dpo", 1), ("ZeRO-2", "sft", 1), ("ZeRO-2", "dpo", 2), ("ZeRO-3", "dpo", 3)],
)
def test_a_divided_model_resumes_from_any_of_its_checkpoints(copies, how, stage, step):
    skip_without(how)
    one, two = copies
    settings = (f"{stage}.trainer.per_device_train_batch_size=1", f"{stage}.trainer.eval_strategy=no")
    together(sharded, how, one, stage, *settings)
    keep_checkpoint(one, two, stage, step)
    together(sharded, how, two, stage, *settings)
    assert_same(one, two, stage, within=0)
    assert adapter(one, stage).keys() == adapter(two, stage).keys()


class HeldError(Exception):
    """How many bytes the weights of the base's layers take in this rank's memory."""


def held(how: str, folder: Path, stage: str, *overrides: str) -> int:
    """The same, just before a stage divides the base, or one that is to be judged is divided."""

    def look(model: torch.nn.Module) -> None:
        layers = [one for name, one in model.named_parameters() if ".layers." in name and "lora_" not in name]
        raise HeldError(sum(one.untyped_storage().nbytes() for one in layers))

    connect()
    divide_by(how, folder)
    Resumable.train = lambda self, *_, **__: look(self.model)
    stage_sharded.divide = look
    stage_sharded.divide_by_zero_3 = lambda model, _: look(model)  # before `train`, where a reference is computed
    with pytest.raises(HeldError) as found:
        (judge if stage == "start" else train)(folder, *[stage] * (stage != "start"), *overrides)
    return found.value.args[0]


@pytest.mark.parametrize(
    ("how", "stage", "more", "alone"),
    [
        ("FSDP2", "reward", (), True),
        ("FSDP2", "dpo", PRECOMPUTED, False),  # each rank makes passes through all of it
        ("FSDP2", "start", (EVALUATE.format("judge", 0),), True),
        (EACH_READS, "sft", (), False),
        ("ZeRO-3", "dpo", PRECOMPUTED, True),
    ],
)
def test_the_first_rank_alone_holds_the_base_until_it_is_divided(copies, how, stage, more, alone):
    skip_without(how)
    first, second = together(held, how, with_judge(copies[0]), stage, *more)
    assert first > 1_000_000
    assert second < first / 1000 if alone else second == first


def logits(folder: Path, head: str) -> torch.Tensor:
    """What a model says, with an adapter and, of `score`, a head, that are drawn on each rank alike or otherwise."""
    tokenizer = load_tokenizer(Model(path=str(TINY / "checkpoint")))
    base = load_base(Model(path=str(folder), quantization="none", dtype="float32"), tokenizer, head, to_divide=True)
    torch.manual_seed(ranks.index())
    make = adapters.with_reward_adapter if head == "score" else adapters.with_policy_adapter
    model = make(base, {"r": 4, "target_modules": "all-linear"}, None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        model = stage_sharded.divide(model).eval()
        return model(input_ids=torch.arange(5, 45).view(2, 20), use_cache=False).logits


def divided_logits(how: str, folder: Path, head: str) -> torch.Tensor:
    connect()
    divide_by(how, folder)
    return logits(folder, head)


@pytest.mark.parametrize(
    ("how", "name", "head"),
    [
        ("FSDP2", "gpt2", "causal"),
        ("FSDP2", "deepseek_v3", "score"),
        ("FSDP2", "gemma4_text", "causal"),
        ("ZeRO-3", "deepseek_v3", "causal"),
    ],
)
def test_all_ranks_get_weights_adapters_and_buffers_of_the_first(tmp_path, how, name, head):
    """GPT-2's embeddings are tied; of DeepSeek-V3 a buffer is in the checkpoint, and others are computed.

    Gemma 4's class names layers that read pictures, which its text model has not.
    """
    skip_without(how)
    model = model_of(name)
    for buffer_name, buffer in model.named_buffers():
        if "correction" in buffer_name or "scalar" in buffer_name:
            torch.nn.init.normal_(buffer)
    model.save_pretrained(tmp_path)
    alone = logits(tmp_path, head)
    assert alone.std() > 0.1
    for one in together(divided_logits, how, tmp_path, head):
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)


def judge(folder: Path, *overrides: str) -> dict[str, Any]:
    """Judge the stage `start` on this rank."""
    job = new_job(folder, "start", *overrides)
    return evaluate.judge_artifact(job, job.published)


def judge_divided(how: str, folder: Path, *overrides: str) -> dict[str, Any] | str:
    """The same of a divided model; or what the judge raises."""
    connect()
    divide_by(how, folder)
    try:
        return judge(folder, *overrides)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("how", "temperature"), [("FSDP2", 0), ("FSDP2", 1), ("ZeRO-3", 1)])
def test_replies_and_numbers_of_two_ranks_are_those_of_one_process(copies, how, temperature):
    """Of five prompts in batches of two, a rank has two batches, and the other one; replies are of unlike length.

    With one batch in all, the other rank has none.
    """
    skip_without(how)
    one, two = map(with_judge, copies)
    for more in ("evaluate.batch_size=2", "evaluate.batch_size=8"):
        settings = (EVALUATE.format("judge", temperature), DIVIDED[how], more)
        alone = judge(one, *settings)
        first, second = together(judge_divided, how, two, *settings)
        assert samples(two, "start") == samples(one, "start")
        assert len(samples(two, "start")) == 5
        assert len({len(row["completion"]) for row in samples(two, "start")}) > 2
        assert second == {} and first == alone


def test_a_judge_that_raises_leaves_no_rank_waiting(copies):
    two = with_judge(copies[1])
    assert together(judge_divided, "FSDP2", two, EVALUATE.format("fails", 0)) == ["no opinion on 5 replies", {}]


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


def reply_divided(how: str, folder: Path, name: str, asked: list[tuple[list[list[int]], int]]) -> list[list[int]]:
    connect()
    divide_by(how, folder)
    return reply(name, *asked[ranks.index()])


@pytest.mark.parametrize("how", ["FSDP2", "ZeRO-3"])
@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_ranks_sample_as_much_as_each_of_them_wants(tmp_path, how, name):
    """Also what is of no layer, as GPT-2's positions, is whole; Mamba replies by Transformers' own `generate`."""
    skip_without(how)
    asked = [([[7, 8, 9], [5], [6, 6]], 9), ([[11, 12]], 4)]
    assert together(reply_divided, how, tmp_path, name, asked) == [reply(name, *one) for one in asked]
    assert together(reply_divided, how, tmp_path, name, [([], 1), asked[0]]) == [[], reply(name, *asked[0])]
