"""vLLM samples what Transformers samples: the same distribution of the same adapter, and the same ends of replies.

`make vllm` runs these, in an environment of their own.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import short_run
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_pipeline.models.adapters import WEIGHTS, adapter_parameters
from rlhf_pipeline.models.roles import PolicyView
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.forward import reply_log_probs
from rlhf_pipeline.ppo.rollout import Episodes, sample
from rlhf_pipeline.ppo.vllm_engine import VLLMEngine
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model, Rollout
from rlhf_pipeline.stages.soundness import generation_gap

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm`"),
]
PAD, EOS = 0, 1  # of the tiny tokenizer
UPDATES, SAVED_AT = 5, 2  # of PPO
RECIPE = {
    "name": "whole",
    "model": {"path": "tiny", "quantization": "none", "dtype": "float32"},
    "lora": {"r": 8, "lora_alpha": 32, "use_rslora": True, "target_modules": "all-linear"},
    "evaluate": {
        "data": "heldout.jsonl",
        "judge": "rlhf_pipeline.models.tiny.world:judge",
        "n": 8,
        "max_new_tokens": 8,
        "along": 2,
        "rollout": {"engine": "vllm"},
    },
    "stages": {
        "sft": {"data": "demonstrations.jsonl", "trainer": {"learning_rate": 4e-3, "max_steps": 30}},
        "reward": {"data": "preferences.jsonl", "trainer": {"learning_rate": 3e-3, "max_steps": 8}},
        "ppo": {
            "data": "prompts.jsonl",
            "rollout": {"engine": "vllm"},
            "trainer": {
                "learning_rate": 2e-3, "per_device_train_batch_size": 4, "total_episodes": 4 * UPDATES,
                "response_length": 6, "save_steps": SAVED_AT,
            },
        },
        "candidates": {
            "kind": "sample", "init": ["base", "ppo"], "data": "prompts.jsonl", "n": 2, "rollout": {"engine": "vllm"},
            "sampling": {"max_new_tokens": 6},
        },
        "grpo": {
            "data": "prompts.jsonl",
            "rollout": {"engine": "vllm"},
            "trainer": {
                "learning_rate": 1e-3, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
                "max_completion_length": 6, "gradient_accumulation_steps": 1,
            },
        },
    },
}  # fmt: skip


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", *words], cwd=folder, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(folder: Path, *words: str) -> str:
    process = command(folder, "run", *words)
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the first stage of a recipe is done that samples by vLLM wherever it samples."""
    folder = tmp_path_factory.mktemp("vllm")
    short_run.write_data(folder)
    (folder / "whole.yaml").write_text(json.dumps(RECIPE))
    run(folder, "whole.yaml", "--until", "sft")
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The recipe's run directory when all of it is done."""
    run(folder, "whole.yaml")
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def staged(folder, tmp_path_factory) -> StagedBase:
    """The policy of that stage, and another one whose every weight is a little off."""
    spec = Model(path=str(TINY / "checkpoint"), quantization="none", dtype="float32")
    trained, other = folder / "runs" / "whole" / "sft" / "adapter", tmp_path_factory.mktemp("other") / "adapter"
    shutil.copytree(trained, other)
    torch.manual_seed(0)
    weights = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in load_file(trained / WEIGHTS).items()}
    save_file(weights, other / WEIGHTS, {"format": "pt"})
    return StagedBase(spec, {"sft": trained, "other": other})


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    spec = Model(path=str(TINY / "checkpoint"), quantization="none", dtype="float32")
    engine = VLLMEngine(spec, Rollout(engine="vllm", max_num_seqs=128), "rollout", rank=8, longest=128)
    yield engine
    engine.close()


@pytest.fixture
def ask(engine) -> Callable[..., Episodes]:
    """Samples by vLLM, or by Transformers with `engine=None`."""

    def ask(policy: Any, prompts: Any, **settings: Any) -> Episodes:
        default = {
            "response_length": 12, "temperature": 1.0, "stop_token_id": EOS, "pad_token_id": PAD, "at_once": 64,
            "engine": engine,
        }  # fmt: skip
        return sample(policy, prompts, **default | settings)

    return ask


PROMPTS = [[5 + i * 7 + j for j in range(length)] for i, length in enumerate((1, 4, 9, 30, 2, 61))]
TEXTS = ["Q: What is the capital of Peru?\nA:", "Q: What is 2 plus 3?\nA:", "Q: Who are you?\nA:"]


# The same distribution


@pytest.mark.parametrize("stop", [EOS, [EOS, 35], None])
def test_greedy_replies_are_the_same_to_prompts_of_unlike_lengths(staged, ask, stop):
    for name in ("sft", "base", "other"):
        policy, prompts = staged.policy(name), [*PROMPTS, *staged.tokenizer(TEXTS)["input_ids"]]
        ours, theirs = (
            ask(policy, prompts, temperature=0.0, stop_token_id=stop, **own) for own in ({}, {"engine": None})
        )
        assert ours.tokens == theirs.tokens
        for field in ("ids", "prompt_lengths", "reply_lengths", "ended"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
        assert_close(ours.sampled_log_probs * ours.mask, theirs.sampled_log_probs * theirs.mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("temperature", "seed"), [(0.6, 2), (1.7, 3)])
def test_tokens_come_as_often_as_they_should(staged, ask, temperature, seed):
    """By the chi-square test, with tokens that should come fewer than 5 times counted as one."""
    policy, prompt, times = staged.policy("sft"), staged.tokenizer(TEXTS[0])["input_ids"], 2000
    torch.manual_seed(seed)
    episodes = ask(policy, [prompt] * times, response_length=1, temperature=temperature)
    logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / temperature).softmax(0) * times
    counts = torch.bincount(episodes.replies[:, 0], minlength=len(expected)).double()
    often = expected >= 5
    expected, counts = (torch.cat([one[often], one[~often].sum()[None]]) for one in (expected, counts))
    assert len(expected) > 2
    square = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), square.float() / 2) > 1e-3
    noted = (logits / temperature).log_softmax(0)[episodes.replies[:, 0]].float()
    assert_close(episodes.sampled_log_probs[:, 0], noted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_noted_log_probabilities_are_those_of_a_whole_pass(staged, ask, temperature):
    policy = staged.policy("sft")
    episodes = ask(policy, PROMPTS, temperature=temperature)
    whole = reply_log_probs(policy, episodes, temperature)[0]
    assert_close(episodes.sampled_log_probs * episodes.mask, whole * episodes.mask, rtol=1e-4, atol=1e-4)


def test_a_reply_ends_with_its_stop_token_or_where_it_is_cut(staged, ask):
    episodes = ask(staged.policy("sft"), PROMPTS * 8, stop_token_id=[EOS, 35])
    cut = ask(staged.policy("sft"), PROMPTS * 8, stop_token_id=None)
    assert set(episodes.ended.tolist()) == {True, False}
    for tokens, ended in zip(episodes.tokens, episodes.ended.tolist(), strict=True):
        assert not {EOS, 35} & set(tokens[:-1])
        assert (tokens[-1] in (EOS, 35)) == ended and (ended or len(tokens) == 12)
    assert set(cut.reply_lengths.tolist()) == {12} and not cut.ended.any()


# The policy's own adapter, as it is now


def test_after_an_update_the_new_weights_sample(staged, ask):
    policy = PolicyView(staged, "other")
    weights = list(adapter_parameters(staged.peft, staged.names["other"]).values())
    kept = [weight.detach().clone() for weight in weights]
    before = ask(policy, PROMPTS, temperature=0.0)
    torch.manual_seed(0)
    for weight in weights:
        weight.data += 0.1 * torch.randn_like(weight)
    try:
        after = ask(policy, PROMPTS, temperature=0.0)
        assert after.tokens != before.tokens
        whole = reply_log_probs(policy, after, 1.0)[0]
        assert_close(after.sampled_log_probs * after.mask, whole * after.mask, rtol=1e-4, atol=1e-4)
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data = value
    assert ask(policy, PROMPTS, temperature=0.0).tokens == before.tokens


def test_vllm_holds_one_adapter_and_takes_none_twice(engine, staged, ask):
    ask(staged.policy("sft"), PROMPTS)
    number = engine._number
    ask(staged.policy("sft"), PROMPTS)
    assert engine._number == number
    ask(staged.policy("other"), PROMPTS)
    assert engine._number == number + 1
    assert engine._llm.llm_engine.engine_core.list_loras() == {number + 1}


def test_an_adapter_that_vllm_has_no_place_for_is_refused(engine, staged):
    with pytest.raises(ValueError, match=r"vLLM puts no adapter on `model\.layers\.7\.mlp\.nothing`"):
        engine._hold({f"model.layers.7.mlp.nothing.lora_{part}.weight": torch.ones(8, 8) for part in "AB"})
    ours, theirs = (
        sample(staged.policy("sft"), PROMPTS, response_length=4, temperature=0.0, stop_token_id=EOS, pad_token_id=PAD,
               at_once=8, engine=one)
        for one in (engine, None)
    )  # fmt: skip
    assert ours.tokens == theirs.tokens


def test_the_gap_to_the_policys_own_arithmetic_is_measured(engine, staged, monkeypatch):
    policy, prompts = staged.policy("sft"), staged.tokenizer(TEXTS)["input_ids"]
    assert generation_gap(policy, prompts, PAD, engine) < 1e-5
    monkeypatch.setattr(engine, "_hold", lambda weights: 0)  # of the bare base
    assert generation_gap(policy, prompts, PAD, engine) > 0.1


# Random numbers


def test_replies_follow_from_torchs_random_numbers_alone(staged, ask):
    policy = staged.policy("sft")
    torch.manual_seed(3)
    first, after = ask(policy, PROMPTS), torch.rand(1)
    ask(policy, PROMPTS * 3)  # which leaves vLLM in another state
    torch.manual_seed(3)
    again = ask(policy, PROMPTS)
    assert first.tokens == again.tokens and torch.equal(torch.rand(1), after)
    assert first.tokens != ask(policy, PROMPTS).tokens


def test_with_seeds_a_reply_is_the_same_beside_any_other(staged, ask):
    policy, seeds = staged.policy("sft"), [-5, 2**64 - 1, 7, 7, 0, 3]
    prompts = [PROMPTS[2]] * 6
    tokens = ask(policy, prompts, seeds=seeds).tokens
    assert tokens[2] == tokens[3] and len({tuple(row) for row in tokens}) > 2
    assert ask(policy, prompts[:2], seeds=seeds[2:4]).tokens == tokens[2:4]
    torch.manual_seed(8)
    expected = torch.rand(2)
    torch.manual_seed(8)
    ask(policy, prompts, seeds=seeds)
    assert torch.equal(torch.rand(2), expected)


def test_more_prompts_than_one_pass_reads_are_sampled_all_the_same(staged, ask):
    prompts = [[5 + (i + j) % 1000 for j in range(100)] for i in range(60)]
    ours, theirs = (ask(staged.policy("sft"), prompts, temperature=0.0, **own) for own in ({}, {"engine": None}))
    assert ours.tokens == theirs.tokens
    sampled = ask(staged.policy("sft"), prompts, seeds=range(60))
    alone = ask(staged.policy("sft"), prompts[40:41], seeds=[40])
    assert sampled.tokens[40] == alone.tokens[0]


def test_a_prompt_and_reply_over_the_room_are_refused(staged, ask):
    with pytest.raises(ValueError, match="may have 130 tokens, and vLLM has room for 128"):
        ask(staged.policy("sft"), [[5] * 30], response_length=100)


# Runs


def test_every_kind_that_samples_does_so_by_vllm(whole):
    for stage in ("ppo", "grpo"):
        metrics = short_run.read(whole / stage / "stage.json")["metrics"]
        rows = [row for row in short_run.rows(whole / stage / "metrics.jsonl") if "rollout/log_prob_gap_mean" in row]
        assert rows and all(0 < row["rollout/log_prob_gap_mean"] < 1e-4 for row in rows)
        assert metrics["generation_gap"] < 1e-5 and "judge_mean" in metrics
    first = next(row for row in short_run.rows(whole / "ppo" / "metrics.jsonl") if "val/ratio" in row)
    assert first["objective/kl"] == 0 and first["rollout/log_prob_gap_max"] < 1e-4
    assert len(short_run.rows(whole / "candidates" / "rows.jsonl")) > 16
    record = short_run.read(whole / "ppo" / "stage.json")
    assert record["inputs"]["rollout.engine"] == "vllm"
    comparison = short_run.read(whole / "comparison.json")
    assert comparison["settings"]["engine"] == "vllm" and comparison["means"]["base"]["kl"] is not None


def test_a_run_that_is_killed_and_goes_on_ends_as_one_that_was_not(folder, whole):
    """And nothing is left of it: no process, and no file in the machine's memory."""
    cut = folder / "runs" / "cut"
    for stage in ("sft", "reward"):
        shutil.copytree(whole / stage, cut / stage)
    (folder / "cut.yaml").write_text(
        json.dumps({"extends": "whole.yaml", "name": "cut", "stages": {"candidates": None, "grpo": None}})
    )
    process = command(folder, "run", "cut.yaml", "--no-reuse")
    deadline = time.monotonic() + 120
    while not (cut / "ppo" / "work" / f"checkpoint-{SAVED_AT}" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    said = process.communicate()[1]
    deadline = time.monotonic() + 10
    while left := _alive_in_session(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not list(Path("/dev/shm").glob("*vllm*"))
    assert short_run.read(cut / "ppo" / "stage.json").get("state") != "done", said
    assert "resumes from step" in run(folder, "cut.yaml", "--no-reuse")
    ours, theirs = (load_file(of / "ppo" / "adapter" / WEIGHTS) for of in (cut, whole))
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=0, atol=1e-5)
    ours, theirs = ([row["completion"] for row in short_run.rows(of / "ppo" / "samples.jsonl")] for of in (cut, whole))
    assert ours == theirs


def _alive_in_session(leader: int) -> list[str]:
    """The command of each process of a session that is alive."""
    alive = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                state, *numbers = (process / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(numbers[2]) == leader and state not in "ZX":
                    alive.append((process / "cmdline").read_text().replace("\0", " "))
    return alive
