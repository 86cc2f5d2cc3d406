"""Routers, and layers whose weight a kernel takes past an adapter, get no adapter from `all-linear`, and stay whole."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rlhf_pipeline.models import adapters, base, layers
from rlhf_pipeline.recipe.schema import Model

SMALL = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_expand": 2,
}  # fmt: skip
MAMBA_1 = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 1024, "state_size": 8, "time_step_rank": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64, "global_head_dim": 16,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024, "layer_types": ["full_attention"],
}  # fmt: skip
# By architecture: its sizes, and the last parts of the names of layers that `all-linear` does not mean.
FOUND = {
    "llama": ({}, set()),
    "mixtral": (EXPERTS, set()),  # its router's weight is a parameter, no linear layer
    "bloom": ({}, set()),  # it reads a weight itself with an option that nobody sets
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 64}, {"feed_forward.router"}),
    "phimoe": (EXPERTS, {"mlp.router"}),
    "gemma4_text": ({**GEMMA, "num_hidden_layers": 1}, {"router.proj"}),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2, "rope_theta": 1e4}, {"gate.wg"}),
    "jetmoe": ({**EXPERTS, "kv_channels": 16}, {"mlp.router.layer", "experts.router.layer"}),
    "falcon_h1": (MAMBA, {"mamba.out_proj"}),
    "bamba": (MAMBA, {"mamba.out_proj"}),
    "mamba": (MAMBA_1, {"mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
}


def config_of(architecture: str) -> PretrainedConfig:
    sizes = FOUND[architecture][0]
    if architecture == "mamba":
        return AutoConfig.for_model(architecture, **sizes)
    config = SMALL | sizes
    if "rope_theta" in config:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    return AutoConfig.for_model(architecture, **config)


@pytest.mark.parametrize("architecture", FOUND)
def test_what_all_linear_does_not_mean(architecture):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(architecture))
        names = layers.untouched(model)
        adapted = adapters.with_policy_adapter(model, {"r": 2, "target_modules": "all-linear"}, None)
        again = layers.untouched(adapted.base_model.model)
    found = {end for name in names for end in FOUND[architecture][1] if name.endswith(f".{end}")}
    assert found == FOUND[architecture][1]
    assert all(any(name.endswith(f".{end}") for end in found) for name in names)
    assert set(again) == set(names)
    with_adapters = {name.partition(".lora_")[0] for name in adapters.adapter_shapes(adapted, "default")}
    assert with_adapters and not with_adapters & {f"base_model.model.{name}" for name in names}
    # PEFT would add the experts' parameters and the router's by itself.
    assert not any(part in name for name in with_adapters for part in (".experts", "router", ".gate."))
    assert not adapted.peft_config["default"].target_parameters


@pytest.mark.parametrize("excluded", [["v_proj"], r".*\.v_proj", None])
def test_what_a_recipe_excludes_stays_excluded(excluded):
    lora = {"r": 2, "target_modules": "all-linear", "exclude_modules": excluded}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama4_text"))
        adapted = adapters.with_policy_adapter(model, lora, None)
    names = {name.split(".lora_A")[0].split(".")[-1] for name in adapters.adapter_shapes(adapted, "default")}
    assert {"q_proj", "k_proj", "o_proj"} <= names and "router" not in names
    assert ("v_proj" in names) == (excluded is None)


@pytest.mark.parametrize("architecture", ["llama4_text", "phimoe"])
@torch.no_grad()
def test_a_router_that_returns_a_tuple_goes_on_doing_so(architecture):
    model = AutoModelForCausalLM.from_config(config_of(architecture)).eval()
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    adapted = adapters.with_policy_adapter(model, {"r": 2, "target_modules": "all-linear"}, None)
    assert torch.equal(adapted(input_ids=ids).logits, before)


@pytest.mark.parametrize("architecture", ["hunyuan_v1_moe", "mamba"])
def test_they_stay_whole_in_four_bits(architecture, tmp_path, tokenizer):
    AutoModelForCausalLM.from_config(config_of(architecture)).save_pretrained(tmp_path)
    model = base.load_base(Model(path=str(tmp_path), quantization="nf4"), tokenizer)
    names = layers.untouched(model)
    assert names
    assert {type(model.get_submodule(name)) for name in names} == {torch.nn.Linear}
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "given"), [("mixtral", True), ("llama4_text", False), ("phimoe", True), ("llama", False)]
)
def test_which_mixtures_have_a_router_loss(architecture, given):
    with torch.device("meta"):
        assert layers.gives_router_loss(AutoModelForCausalLM.from_config(config_of(architecture))) is given
