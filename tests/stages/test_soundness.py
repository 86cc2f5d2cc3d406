"""What is measured of a model before it is trusted, on small random models that are sound and some that are not."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.stages import soundness

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "gemma4_text": {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, with weights large enough that its tokens have something to say to each other."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | OWN.get(name, {}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(dtype)


@pytest.fixture
def rows() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(5, 500, (length,), generator=draw).tolist() for length in (60, 9, 35)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_do_not_see_each_other(name, rows):
    leak = soundness.packing_leak(model_of(name), collate, rows)
    assert leak.packed < 1e-5
    assert leak.as_one_text > 0.5
    soundness.check_packing(model_of(name), collate, rows, "here")


def test_rounding_is_no_leak(rows):
    leak = soundness.packing_leak(model_of("llama", torch.bfloat16), collate, rows)
    assert leak.as_one_text > 0.5
    assert leak.packed < 0.1 * soundness.MOST_LEAK * leak.as_one_text


@pytest.mark.parametrize(
    ("name", "said"),
    [("opt", "packed rows see each other"), ("bloom", "packed rows see each other"), ("lfm2", "packed rows")],
)
def test_packing_is_refused_where_rows_see_each_other(name, said, rows):
    """OPT and Bloom number positions by themselves; LFM2 has convolutions, which need a kernel of their own for it."""
    with pytest.raises(InputError, match=said) as error:
        soundness.check_packing(model_of(name), collate, rows, "stages.sft.trainer.packing")
    assert error.value.place == "stages.sft.trainer.packing"


def test_rows_that_are_packed_as_one_text_see_each_other(rows):
    """As TRL packs held-out rows where those for training are padded: without a word on where they begin."""
    padded = DataCollatorForLanguageModeling(pad_token_id=0)
    with pytest.raises(InputError, match="packed rows see each other"):
        soundness.check_packing(model_of("llama"), padded, rows, "stages.sft.trainer.eval_packing")


@pytest.mark.parametrize("rows", [[], [[5, 6, 7]], [[5], [6], [7, 8]]])
def test_a_row_alone_has_no_neighbour(rows):
    soundness.check_packing(model_of("opt"), collate, rows, "here")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba"])
def test_generation_and_whole_passes_agree(name, rows):
    before = torch.get_rng_state()
    assert soundness.generation_gap(model_of(name), rows, 0) < 1e-5
    torch.set_rng_state(before)
    soundness.check_generation(model_of(name), [[7], [8]], 0, "here")  # prompts of a single token, too


def test_measuring_takes_no_random_number(rows):
    model = model_of("llama")
    before = torch.get_rng_state()
    soundness.generation_gap(model, rows, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_ppo_is_refused_where_generation_computes_something_else(rows):
    """RWKV's recurrence takes padding on the left for text."""
    assert soundness.generation_gap(model_of("rwkv"), rows, 0) > 0.5
    with pytest.raises(InputError, match="samples with other log-probabilities than it is trained on") as error:
        soundness.check_generation(model_of("rwkv"), rows, 0, "stages.ppo")
    assert error.value.place == "stages.ppo"
