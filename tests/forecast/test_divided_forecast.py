"""What one of several processes holds that divide a model, held against arithmetic and against a real rank."""

import json
from pathlib import Path

import pytest
from test_memory_forecast import GIB, SMALL, small

from rlhf_pipeline.forecast import advice, cards, work
from rlhf_pipeline.forecast.result import Forecast, Phase, StageForecast
from rlhf_pipeline.terminal import forecasts

__all__ = ["small"]  # a fixture
ROOT = Path(__file__).parents[2]
BY_LAYER = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
LAYER = 2 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 1024 + 2 * 512)  # bytes, in bfloat16
EMBEDDING = 2 * 8192 * 512  # and as many for the output embedding
LORA = 4 * 8 * ((512 + 512) * 2 + (512 + 128) * 2 + 3 * (512 + 1024))  # of a layer, in float32


@pytest.fixture
def stage(small):
    """The forecast of a stage that so many processes train."""

    def forecast(processes: int = 1, quantization: str = "none", layers: int = 7, batch: int = 2, **launch):
        recipe = small(quantization, batch, layers)
        recipe.stages["sft"].launch = {"num_processes": processes, **launch}
        return work.forecast(recipe, cards.ANY, advise=False).stages[0]

    return forecast


def zero(stage: int, folder: Path, **settings) -> dict:
    """`deepspeed_config` with a file of DeepSpeed's own."""
    file = folder / f"zero-{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage} | settings}))
    return {"deepspeed_config_file": str(file)}


@pytest.mark.parametrize("processes", [2, 4])
def test_fsdp_divides_base_adapter_and_optimizer_and_gathers_few_layers(stage, processes):
    alone, one = stage(), stage(processes, fsdp_config=BY_LAYER)
    whole, mine = alone.phase("backward").parts, one.phase("backward").parts
    assert mine["weights"] == pytest.approx(whole["weights"] / processes, rel=0.01)
    assert mine["adapters"] == pytest.approx(7 * LORA / processes, rel=0.01)
    assert one.phase("optimizer").parts["optimizer"] == pytest.approx(3 * 7 * LORA / processes, rel=0.05)
    assert mine["logits"] == whole["logits"]
    # The output embedding, which the loss has gathered itself, and two layers of bfloat16 with their adapters.
    assert EMBEDDING < mine["gathered"] < EMBEDDING + 3 * (LAYER + LORA // 2)
    assert one.phase("load").total < alone.phase("load").total / processes + 1.2 * EMBEDDING + cards.CONTEXT


def test_without_a_policy_all_layers_are_gathered_at_once_and_the_policy_is_advised(stage, small):
    by_layer, all_at_once = stage(2, fsdp_config=BY_LAYER), stage(2, fsdp_config={"fsdp_version": 2})
    assert all_at_once.phase("backward").parts["gathered"] >= 7 * LAYER > by_layer.phase("backward").parts["gathered"]
    recipe = small("none", batch=1)
    recipe.stages["sft"].launch = {"num_processes": 2, "fsdp_config": {"fsdp_version": 2}}
    found = work.forecast(recipe, cards.Card("small", by_layer.peak)).stages[0]
    key = "sft.launch.fsdp_config.fsdp_auto_wrap_policy"
    assert [change.overrides for change in found.changes] == [{key: "TRANSFORMER_BASED_WRAP"}]
    assert found.changes[0].peak < by_layer.peak < all_at_once.peak


def test_what_does_not_fit_says_on_how_many_gpus_it_does(small):
    """A stage that takes 1 GiB, and 16 that are divided, in the place of a real one."""
    recipe = small("none", batch=1)
    recipe.stages["sft"].launch = {"num_processes": 2, "fsdp_config": BY_LAYER}

    def look(changed, name):
        processes = changed.processes(name)
        parts = {"activations": GIB, "weights": 16 * GIB // processes}
        return StageForecast(name, "sft", (Phase("backward", parts),), 2, 4, 1, divided_by="fsdp_config",
                             processes=processes)  # fmt: skip

    def notes(gibibytes: float) -> tuple[str, ...]:
        return advice.advised(recipe, look(recipe, "sft"), int(gibibytes * GIB), look).notes

    assert notes(9) == ()
    assert notes(8) == ("it fits as it is on 4 such GPUs, and not on 2: sft.launch.num_processes=4",)
    assert notes(3) == ("it fits as it is on 8 such GPUs, and not on 4: sft.launch.num_processes=8",)
    assert notes(1) == ("more GPUs alone are not enough: of 64, each still takes 1.2 GiB in backward",)


@pytest.mark.parametrize(("quantization", "keys"), [("nf4", BY_LAYER), ("none", {"fsdp_version": 2})])
def test_few_layers_tell_of_all_where_they_are_divided(stage, monkeypatch, quantization, keys):
    """Also where all are gathered at once: then the most is held at another moment the more there are."""
    by_few = stage(2, quantization, layers=24, batch=8, fsdp_config=keys)
    monkeypatch.setattr(work.layer_count, "of_every_kind", lambda _: 99)
    all_layers = stage(2, quantization, layers=24, batch=8, fsdp_config=keys)
    for phase in ("load", "backward", "optimizer"):
        assert by_few.phase(phase).total == pytest.approx(all_layers.phase(phase).total, rel=5e-3)


def test_a_large_embedding_hides_no_layers(small, monkeypatch):
    """As in a base of 32B: of few layers most is held while the embedding is gathered, of all where activations are."""
    shape = {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8}
    for key, value in (shape | {"vocab_size": 152064}).items():
        monkeypatch.setitem(SMALL, key, value)
    recipe = small("nf4", 1, 64)
    recipe.stages["sft"].trainer["max_length"] = 2048
    alone = work.forecast(recipe, cards.ANY, advise=False).stages[0].phase("backward").parts
    recipe.stages["sft"].launch = {"num_processes": 2, "fsdp_config": BY_LAYER}
    one = work.forecast(recipe, cards.ANY, advise=False).stages[0].phase("backward").parts
    assert one["activations"] == pytest.approx(alone["activations"], rel=0.05)


def test_a_quantized_base_is_whole_on_each_gpu_until_it_is_divided(stage):
    alone, one = stage(1, "nf4", layers=24), stage(2, "nf4", layers=24, fsdp_config=BY_LAYER)
    assert one.phase("load").total > alone.phase("load").total
    assert one.phase("backward").parts["weights"] == pytest.approx(alone.phase("load").parts["weights"] / 2, rel=0.03)


def test_zero_2_divides_the_optimizer_alone(stage, tmp_path):
    """Weights of 16 bits are updated as numbers of 32; a bucket is as large as its key says."""
    alone = stage()
    one = stage(4, deepspeed_config=zero(2, tmp_path, reduce_bucket_size=2 * 10**6))
    backward = one.phase("backward").parts
    assert backward["weights"] == alone.phase("backward").parts["weights"]
    assert backward["adapters"] == pytest.approx(7 * LORA / 2, rel=0.01)
    assert backward["optimizer"] == pytest.approx(7 * LORA / 4 * 3.5 + 4 * 10**6, rel=0.02)
    assert stage(4, deepspeed_config={"zero_stage": 2}).peak > 10**9, "by default, a bucket of 500 million numbers"


def test_zero_3_gathers_as_much_as_its_keys_allow(stage, tmp_path):
    few = {"stage3_max_reuse_distance": 10**6, "stage3_prefetch_bucket_size": 10**6, "reduce_bucket_size": 10**6}
    alone, one = stage(), stage(2, deepspeed_config=zero(3, tmp_path, **few))
    assert one.phase("backward").parts["weights"] == pytest.approx(alone.phase("load").parts["weights"] / 2, rel=0.01)
    assert one.phase("backward").parts["gathered"] == 2 * (2 * 10**6 + 8192 * 512)
    assert "gathered" not in one.phase("optimizer").parts
    kept = stage(2, deepspeed_config=zero(3, tmp_path, **few | {"stage3_max_reuse_distance": 10**9}))
    all_and_head = alone.phase("load").parts["weights"] + EMBEDDING
    assert kept.phase("backward").parts["gathered"] == pytest.approx(all_and_head, rel=0.05)


def test_what_is_divided_and_what_is_not_counted_is_said(small):
    recipe = small("none")
    recipe.stages["sft"].launch = {"num_processes": 4, "fsdp_config": BY_LAYER}
    found = work.forecast(recipe, cards.Card("1 MiB", 2**20), advise=False)
    assert found.stages[0].notes[-1] == "it is trained by 4 processes, and FSDP2 divides it among them: each takes this"
    assert (found.stages[0].divided_by, found.stages[0].processes) == ("fsdp_config", 4)
    assert found.doubts[0].endswith("`rlhf-pipeline forecast` says what to change")
    assert "not counted" not in forecasts.in_short(found)
    recipe.stages["sft"].launch["fsdp_config"] = BY_LAYER | {"fsdp_offload_params": "true"}
    moved = work.forecast(recipe, cards.Card("1 MiB", 2**20), advise=False)
    assert moved.stages[0].phases == found.stages[0].phases
    assert moved.stages[0].notes[-1] == "what `fsdp_offload_params` saves is not counted"
    assert moved.doubts[0].endswith("what `fsdp_offload_params` saves is not counted")
    assert "(what is moved off the GPU in sft is not counted)" in forecasts.in_short(moved)
    assert Forecast.from_json(json.loads(json.dumps(moved.as_json()))) == moved


@pytest.mark.slow
def test_a_rank_holds_what_was_forecast(monkeypatch):
    """Of FSDP2, by the allocator's own count; benchmarks/README.md has more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import divided_forecast

    case = divided_forecast.Case(
        "dpo", "llama", hidden=128, layers=5, vocabulary=1024, prompt=16, reply=8, r=4, launch=divided_forecast.FSDP
    )
    forecast, held, _ = divided_forecast.compare(case)
    assert forecast == pytest.approx(held, rel=0.05)
