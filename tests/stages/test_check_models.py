"""What the check of a recipe says of the architecture of its model: on models without weights."""

import pytest
from transformers import AutoConfig, PretrainedConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.stages.check import check_lora, check_router_loss

SMALL = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
CONFIGS = {
    "mixtral": SMALL | EXPERTS,
    "llama4_text": SMALL | EXPERTS | {"intermediate_size_mlp": 64},
    "falcon_h1": SMALL | MAMBA,
    "nemotron_h": SMALL | {"layer_types": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16},
    "mamba": {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 1024, "state_size": 8},
    "mamba2": {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 1024, "num_heads": 8, "head_dim": 16},
}


def config_of(architecture: str) -> PretrainedConfig:
    return AutoConfig.for_model(architecture, **CONFIGS[architecture])


def load(*overrides: str) -> recipes.Recipe:
    return recipes.load("tiny", ["lora={r: 4, target_modules: all-linear}", *overrides])


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_all_linear_fits_every_architecture_as_its_hint_says(architecture, quantization):
    recipe = load(f"model.quantization={quantization}")
    check_lora(recipe, list(recipe.stages), config_of(architecture))


@pytest.mark.parametrize("lora", ["target_parameters: [experts.gate_up_proj]", "target_modules: [w1, w2, w3, q_proj]"])
def test_adapters_on_experts_need_a_base_that_is_not_quantized(lora):
    """PEFT takes the names that experts' layers once had for their parameters."""
    overrides = [f"lora={{r: 4, target_modules: [q_proj], {lora}}}"]
    if "target_modules" in lora:
        overrides = [f"lora={{r: 4, {lora}}}"]
    recipe = load("model.quantization=nf4", *overrides)
    with pytest.raises(InputError, match=r"experts` cannot have an adapter where it is quantized.*nf4") as error:
        check_lora(recipe, ["sft"], config_of("mixtral"))
    assert error.value.place == "model.quantization" and "quantization: none" in str(error.value.hint)
    check_lora(load("model.quantization=none", *overrides), ["sft"], config_of("mixtral"))


@pytest.mark.skipif(
    "router_aux_loss_coef" not in library_keys.accepted("sft"), reason="this version of TRL has no such key"
)
def test_a_weight_for_a_loss_that_the_model_does_not_compute_is_refused():
    recipe = load("dpo.trainer.router_aux_loss_coef=0.01")
    check_router_loss(recipe, list(recipe.stages), config_of("mixtral"))
    with pytest.raises(InputError, match="`llama4_text` computes no auxiliary loss") as error:
        check_router_loss(recipe, list(recipe.stages), config_of("llama4_text"))
    assert error.value.place == "stages.dpo.trainer.router_aux_loss_coef"
    check_router_loss(load(), list(recipe.stages), config_of("llama4_text"))
