"""The experts of a mixture are in 4 or 8 bits like the linear layers, and compute as their rounded weights do."""

import contextlib

import pytest
import torch
from bitsandbytes import functional as bnb
from torch.nn.utils import parametrize
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel
from transformers.quantizers import auto

from rlhf_pipeline.models import adapters, base, experts
from rlhf_pipeline.recipe.schema import Model

SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
# Experts' weights are [experts, out, in] in one, which is stored expert by expert, and [experts, in, out] in the other.
CONFIGS = {"mixtral": MixtralConfig(**SIZES), "gpt_oss": GptOssConfig(**SIZES)}
IDS = torch.arange(5, 29).reshape(2, 12)
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module", params=CONFIGS)
def load(request, tmp_path_factory, tokenizer):
    """A function that loads a mixture with a quantization."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(folder)
    return lambda quantization, head="causal": base.load_base(
        Model(path=str(folder), quantization=quantization), tokenizer, head
    )


def whole(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the experts of a model compute with, by name."""
    return {f"{path}.{name}": getattr(module, name) for path, module, name in experts.parameters(model)}


def test_nf4_packs_every_weight_of_an_expert_into_half_a_byte(load):
    before, model = whole(load("none")), load("nf4")
    assert len(before) == 2 * 2  # two layers with two parameters each
    left = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.ndim == 3}
    assert left == {} == whole(model)
    for name, weight in before.items():
        path, _, own = name.rpartition(".")
        packed = model.get_parameter(f"{path}.parametrizations.{own}.original")
        assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() / 2
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4"))
        assert torch.equal(getattr(model.get_submodule(path), own), expected)
        assert not torch.equal(expected, weight)


def test_int8_is_off_by_half_a_step_at_most(load):
    before, model = whole(load("none")), load("int8")
    for name, weight in before.items():
        path, _, own = name.rpartition(".")
        assert model.get_parameter(f"{path}.parametrizations.{own}.original").dtype == torch.int8
        off = (getattr(model.get_submodule(path), own) - weight).abs()
        assert (off <= weight.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()
        assert off.max() > 0


@torch.no_grad()
def test_score_models_have_them_too(load):
    model = load("nf4", "score")
    assert whole(model) == {}
    assert any(name.endswith("parametrizations.down_proj.original") for name, _ in model.named_parameters())


@torch.no_grad()
def test_dequantized_experts_compute_the_same(load):
    model = load("nf4")
    before = model(input_ids=IDS).logits
    experts.dequantize(model)
    assert len(whole(model)) == 4
    assert all(weight.is_floating_point() and weight.ndim == 3 for weight in whole(model).values())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_adapters_learn_over_them_the_same_with_and_without_checkpointing(load, randomise):
    """And a layer's whole weights are gone when it has computed, though checkpointing ends passes early."""
    model = adapters.with_policy_adapter(load("nf4"), LORA, None)
    randomise(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        assert parametrize._cache == {} and parametrize._cache_enabled == 0
    kept, recomputed = gradients
    assert kept and all(gradient.abs().max() > 0 for gradient in kept.values())
    for name, gradient in kept.items():
        assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_an_error_within_leaves_nothing_behind(load):
    model = load("nf4")
    module = next(module for module in model.modules() if parametrize.is_parametrized(module))
    with contextlib.suppress(Exception):
        module(torch.zeros(3, 7), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert parametrize._cache == {} and parametrize._cache_enabled == 0


def test_loading_by_others_is_as_before(load):
    usual = dict(auto.AUTO_QUANTIZER_MAPPING)
    load("nf4")
    assert usual == auto.AUTO_QUANTIZER_MAPPING
    assert usual["bitsandbytes_4bit"].__module__.startswith("transformers.")
