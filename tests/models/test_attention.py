"""What computes attention is the recipe's choice; refused where machine, precision or model lacks it."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import attention, base
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.recipe.schema import Model


def spec_of(folder, name: str, dtype: str = "bfloat16") -> Model:
    return Model(path=str(folder), quantization="none", dtype=dtype, attention=name)


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine that says of itself that it has an Ampere, with neither `kernels` nor Flash Attention installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_it_reaches_the_base_and_samples_what_the_other_does(name, checkpoints, tokenizer):
    ids = torch.arange(3, 11)[None]
    usual = base.load_base(spec_of(checkpoints["llama"], "auto", "float32"), tokenizer)
    staged = StagedBase(spec_of(checkpoints["llama"], name, "float32"), {})
    assert staged.causal_lm.config._attn_implementation == name
    assert_close(staged.causal_lm(input_ids=ids).logits, usual(input_ids=ids).logits, rtol=0, atol=1e-4)
    settings = {"response_length": 6, "temperature": 0.0, "stop_token_id": None, "pad_token_id": 0, "at_once": 4}
    prompts = [[5, 6, 7, 8, 9], [10]]  # the second one is padded on the left
    assert sample(staged.policy("base"), prompts, **settings).tokens == sample(usual, prompts, **settings).tokens


def test_auto_is_what_the_model_has(checkpoints, tokenizer):
    loaded = {name: base.load_base(spec_of(checkpoints[name], "auto"), tokenizer) for name in ("llama", "gemma2")}
    assert {name: model.config._attn_implementation for name, model in loaded.items()} == {
        "llama": "sdpa",
        "gemma2": "eager",
    }


def test_what_the_model_does_not_have(checkpoints):
    spec = spec_of(checkpoints["gemma2"], "sdpa")
    with pytest.raises(InputError, match=r"this model does not take `sdpa`: Gemma2\w+ does not support") as error:
        attention.require(spec, base.load_config(spec))
    assert error.value.place == "model.attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_a_machine_without_a_gpu(name, checkpoints):
    spec = spec_of(checkpoints["llama"], name)
    with pytest.raises(InputError, match=f"`{name}` needs an NVIDIA GPU, and PyTorch finds none here") as error:
        attention.require(spec, base.load_config(spec))
    assert error.value.place == "model.attention" and "`model.attention: auto`" in str(error.value.hint)


def test_a_run_from_a_machine_with_a_gpu_is_used_with_what_there_is(checkpoints, gpu):
    spec, said = attention.available(spec_of(checkpoints["llama"], "flash_attention_2"))
    assert spec == spec_of(checkpoints["llama"], "auto")
    assert said == (
        "`flash_attention_2` needs the package `flash_attn` or `kernels`, which is not installed: PyTorch's attention "
        "is used instead, which computes the same up to rounding"
    )
    usual = spec_of(checkpoints["llama"], "eager")
    assert attention.available(usual) == (usual, None)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("flash_attention_2", "`flash_attn` or `kernels`"),
        ("flash_attention_3", "`flash_attn_interface` or `kernels`"),
        ("kernels-community/flash-attn2", "`kernels`"),
    ],
)
def test_a_package_that_is_not_installed(name, packages, checkpoints, gpu):
    assert f"`{name}` needs the package {packages}," in str(attention.missing(spec_of(checkpoints["llama"], name)))


def test_a_gpu_that_is_too_old(checkpoints, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert attention.missing(spec_of(checkpoints["llama"], "flash_attention_2")) == (
        "`flash_attention_2` needs a GPU of compute capability 8.0, and NVIDIA GeForce RTX 3090 has 7.5"
    )


def test_a_precision_that_flash_attention_does_not_have(checkpoints, gpu):
    said = attention.missing(spec_of(checkpoints["llama"], "flash_attention_2", "float32"))
    assert said is not None and "computes in 16 bits, and `model.dtype` is float32" in said


@pytest.mark.parametrize("name", ["flash_attention_9", "someone/kernel", "kernels-community/a/b", "sdpa "])
def test_what_is_no_attention(name):
    with pytest.raises(ValidationError):
        Model(path="x", attention=name)
