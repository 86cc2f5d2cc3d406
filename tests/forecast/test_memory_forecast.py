"""What is forecast, held against arithmetic and against what the allocator counts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import short_run
import torch
from accelerate.state import PartialState

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.forecast import advice, cards, work
from rlhf_pipeline.forecast.result import Forecast, Phase, StageForecast
from rlhf_pipeline.rundir.words import memory
from rlhf_pipeline.terminal import forecasts

ROOT = Path(__file__).parents[2]
GIB = 2**30
LLAMA = json.loads((Path(__file__).parent / "configs" / "llama-3.1-8b.json").read_text())
SMALL = LLAMA | {"num_hidden_layers": 7, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "vocab_size": 8192}  # fmt: skip
RECIPE = """\
name: foreseen
model: {{path: tiny, quantization: {quantization}}}
lora: {{r: 8, lora_alpha: 16, target_modules: all-linear}}
stages:
  sft: {{data: tiny:demonstrations, trainer: {{max_length: 64, per_device_train_batch_size: {batch}}}}}
"""


@pytest.fixture
def small(tmp_path):
    """A recipe of one stage over a small Llama of which there is a configuration and nothing else."""

    def make(quantization: str = "nf4", batch: int = 2, layers: int = 7):
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.format(quantization=quantization, batch=batch))
        recipe = recipes.load(str(file), [])
        (tmp_path / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": layers}))
        recipe.model.path = str(tmp_path)
        return recipe

    return make


@pytest.mark.parametrize(("quantization", "bytes_"), [("nf4", 0.5 + 1 / 64 + 4 / 64 / 256), ("int8", 1), ("none", 2)])
def test_weights_are_those_of_the_configuration(small, quantization, bytes_):
    stage = work.forecast(small(quantization), cards.ANY).stages[0]
    linear = 7 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 1024)
    rest = 2 * 8192 * 512 + 15 * 512
    expected = bytes_ * linear + 2 * rest
    assert stage.phase("load").parts["weights"] == pytest.approx(expected, rel=0.01)
    lora = 7 * 8 * ((512 + 512) * 2 + (512 + 128) * 2 + 3 * (512 + 1024))
    assert stage.phase("backward").parts["adapters"] == pytest.approx(4 * lora, rel=0.01)
    assert stage.phase("optimizer").parts["optimizer"] == pytest.approx(
        3 * 4 * lora, rel=0.02
    )  # a gradient, two states


def test_few_layers_tell_of_all(small, monkeypatch):
    recipe = small("none")
    by_few = work.forecast(recipe, cards.ANY).stages[0]
    monkeypatch.setattr(work.layer_count, "of_every_kind", lambda _: 99)
    assert work.forecast(recipe, cards.ANY).stages[0].peak == pytest.approx(by_few.peak, rel=1e-3)


def test_a_real_training_holds_what_was_forecast(monkeypatch):
    """PPO, which has most phases, by the allocator's own count; benchmarks/README.md has many more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory_forecast

    case = memory_forecast.Case("ppo", "llama", hidden=64, layers=3, vocabulary=1024, batch=2, prompt=16, reply=8, r=4)
    forecast, measured, _ = memory_forecast.compare(case)
    assert forecast == pytest.approx(measured, rel=0.05)  # so small, blocks of 512 bytes show


def test_what_does_not_fit_gets_the_cheapest_change_first_and_the_largest_batch():
    """A stage that takes 1 GiB and 0.5 for each row, in the place of a real one."""
    recipe = recipes.load("tiny", ["sft.trainer.per_device_train_batch_size=8"])

    def look(changed, name):
        batch = advice.batch_size(changed.stages[name])
        return StageForecast(
            name, "sft", (Phase("backward", {"weights": GIB, "logits": batch * GIB // 2}),), 2, 4, batch
        )

    found = advice.advised(recipe, look(recipe, "sft"), 3 * GIB + 1, look)
    assert found.largest_batch == 4
    assert [(change.overrides, change.peak, change.costs) for change in found.changes] == [
        (
            {"sft.trainer.per_device_train_batch_size": 4, "sft.trainer.gradient_accumulation_steps": 2},
            3 * GIB,
            advice.TIME,
        )
    ]
    assert advice.advised(recipe, look(recipe, "sft"), 9 * GIB, look).changes == ()
    assert advice.advised(recipe, look(recipe, "sft"), GIB, look).largest_batch == 0


def test_a_batch_is_looked_for_beyond_a_bend_with_few_looks():
    """Rows take less each once a buffer of 2 GiB is full; a line from the first forecast alone would miss by far."""
    recipe, looks = recipes.load("tiny", ["sft.trainer.per_device_train_batch_size=2"]), []

    def look(changed, name):
        batch = advice.batch_size(changed.stages[name])
        looks.append(batch)
        held = GIB + min(batch * GIB // 4, 2 * GIB) + batch * GIB // 16
        return StageForecast(name, "sft", (Phase("backward", {"weights": held}),), 2, 4, batch)

    found = advice.advised(recipe, look(recipe, "sft"), 10 * GIB + 1, look)
    assert found.largest_batch == 112
    assert len(looks) <= 4


def test_the_same_key_is_named_once_with_the_value_that_is_enough():
    recipe = recipes.load("tiny", ["sft.trainer.per_device_train_batch_size=16"])

    def look(changed, name):
        batch = advice.batch_size(changed.stages[name])
        return StageForecast(name, "sft", (Phase("backward", {"weights": GIB, "logits": batch * GIB}),), 2, 4, batch)

    changes = advice.advised(recipe, look(recipe, "sft"), 3 * GIB, look).changes
    key = "sft.trainer.per_device_train_batch_size"
    assert [(change.overrides[key], change.peak) for change in changes] == [(2, 3 * GIB)]
    assert changes[0].overrides["sft.trainer.gradient_accumulation_steps"] == 8


def test_a_forecast_is_read_back_as_it_was_written(small):
    found = work.forecast(small(), cards.find("24GB"), advise=False)
    assert Forecast.from_json(json.loads(json.dumps(found.as_json()))) == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--gpu", "24XB"], "no size and no card"),
        (["tiny", "model.path=nobody/has-this"], "nobody/has-this"),
    ],
)
def test_bad_input_is_one_sentence_with_a_hint(arguments, said, tmp_path):
    code, _, err = short_run.ask(tmp_path, "forecast", *arguments)
    assert code == 2
    assert said in err
    assert "hint:" in err
    assert "Traceback" not in err


def test_when_memory_runs_out_the_forecast_names_the_first_change(small, monkeypatch):
    from rlhf_pipeline.run import worker

    monkeypatch.setattr(worker, "longest", lambda _: {})
    recipe = small(batch=32)
    recipe.stages["sft"].trainer["gradient_checkpointing"] = False
    said = worker.first_saving(recipe, "sft")
    pattern = r"`sft\.trainer\.gradient_checkpointing=True` \(by the forecast (.+) in place of (.+); costs time alone\)"
    after, before = re.fullmatch(pattern, said).groups()
    change = work.first_change(recipe, "sft", {})[1]
    assert (after, change.overrides) == (memory(change.peak), {"sft.trainer.gradient_checkpointing": True})
    assert before == memory(work.forecast(recipe, cards.ANY, advise=False).stages[0].peak)
    assert before != after
    recipe.model.path = "/nowhere"
    assert worker.first_saving(recipe, "sft") is None


def test_a_forecast_leaves_the_gpu_alone(small, monkeypatch):
    """On a machine that has one, in a process that has used it: nothing may be put there, nor forgotten of it."""
    recipe, state = small(), PartialState._shared_state
    expected = work.forecast(recipe, cards.ANY, advise=False)
    kept = dict(state)
    monkeypatch.setitem(state, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert work.forecast(recipe, cards.ANY, advise=False) == expected
    assert torch.cuda.is_available()
    assert state == kept | {"device": torch.device("cuda", 0)}


def test_of_several_processes_it_is_said_what_one_takes(small):
    recipe = small()
    alone = work.forecast(recipe, cards.ANY, advise=False)
    recipe.stages["sft"].launch = {"num_processes": 4}
    several = work.forecast(recipe, cards.ANY, advise=False)
    assert several.stages[0].phases == alone.stages[0].phases, "a process has the batch that the recipe says"
    assert several.stages[0].notes == ("it is trained by 4 processes: each takes this",)
    assert forecasts.in_short(several) == forecasts.in_short(alone)


def test_replies_that_all_processes_sample_are_divided_by_them():
    each = ["grpo.trainer.per_device_train_batch_size=16", "grpo.trainer.gradient_accumulation_steps=4"]
    of_all = [each[0], "grpo.trainer.generation_batch_size=64"]
    launch = "grpo.launch={num_processes: 4}"
    alone, one_of_four, said = (
        work.forecast(recipes.load("tiny-grpo", overrides), cards.ANY, advise=False).stages[-1].phase("sampling")
        for overrides in (of_all, [*of_all, launch], [*each, launch])
    )
    assert alone == said
    assert one_of_four.total < alone.total


def test_an_engine_takes_its_share_of_the_card_while_it_samples_and_no_cache_of_ours():
    vllm = ["ppo.rollout.engine=vllm", "ppo.rollout.gpu_memory_utilization=0.25"]
    of_ones = ["ppo.trainer.whiten_rewards=true", "ppo.trainer.per_device_train_batch_size=1"]
    of_ones += ["ppo.trainer.gradient_accumulation_steps=8", "ppo.trainer.local_rollout_forward_batch_size=1"]
    recipe = recipes.load("tiny", vllm + of_ones)
    recipe.evaluate = None
    recipe.stages = {name: recipe.stages[name] for name in ("sft", "reward", "ppo")}
    known = work.forecast(recipe, cards.Card("8 GiB", 8 * GIB), advise=False).stages[-1]
    sampling, load = known.phase("sampling"), known.phase("load")
    assert sampling.parts["engine"] == 2 * GIB
    assert "cache" not in sampling.parts
    assert sampling.total == pytest.approx(load.total + 2 * GIB, rel=0.01)
    assert known.highest is sampling
    assert known.without_advice().on(16 * GIB).phase("sampling").parts["engine"] == 4 * GIB
    without = work.forecast(recipe, cards.ANY, advise=False).stages[-1]
    assert "engine" not in without.phase("sampling").parts
    assert "25% of the card" in " ".join(without.notes)
    alone = [StageForecast("ppo", "ppo", (Phase("sampling", {"weights": 2 * GIB}),), 2, 4, 8, engine_share=0.5)]
    changes = advice.advised(
        recipes.load("tiny", ["ppo.rollout.engine=vllm"]), alone[0].on(3 * GIB), 3 * GIB,
        lambda changed, name: replace(
            alone[0], engine_share=changed.stages[name].rollout.gpu_memory_utilization
        ).on(3 * GIB),
    ).changes  # fmt: skip
    assert changes[0].overrides == {"ppo.rollout.gpu_memory_utilization": 0.3}


def test_rows_without_padding_are_as_many_tokens(small):
    recipe = small("none")
    padded = work.forecast(recipe, cards.ANY, advise=False).stages[0]
    recipe.model.attention, recipe.stages["sft"].trainer["packing"] = "flash_attention_2", True
    assert work.forecast(recipe, cards.ANY, advise=False).stages[0].peak == padded.peak
