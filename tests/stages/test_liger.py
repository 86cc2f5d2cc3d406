"""Liger's kernels are refused, before anything trains, where a stage cannot have them."""

import pytest
import torch
from transformers import LlamaConfig

from rlhf_pipeline import kinds
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.stages import liger
from rlhf_pipeline.stages.check import check

ASKED = {"use_liger_kernel": True}
PLACE = "stages.one.trainer"


def refused(kind: str, **given: object) -> InputError:
    with pytest.raises(InputError) as error:
        liger.require(kinds.get(kind), ASKED | given, LlamaConfig(), PLACE)
    return error.value


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "grpo", "rloo"])
def test_without_a_gpu(kind):
    error = refused(kind)
    assert error.place == f"{PLACE}.use_liger_kernel"
    if liger.LAYERS_ALONE or kind in ("sft", "reward"):
        assert error.message == "`use_liger_kernel` needs an NVIDIA GPU, and PyTorch finds none here"
    else:
        assert "Liger replaces the loss" in error.message


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert "needs the package `liger-kernel`" in refused("sft").message


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_an_older_trl_whose_loss_is_another(kind, monkeypatch):
    monkeypatch.setattr(liger, "LAYERS_ALONE", False)
    assert f"Liger replaces the loss of {kinds.get(kind).title}" in refused(kind).message


def test_a_reward_model_keeps_its_own_forward():
    """Liger would put that of a model that writes in its place, which has an output embedding."""
    reward = kinds.get("reward")
    assert liger.options(reward, ASKED) == {"fused_linear_cross_entropy": False}
    own = {"liger_kernel_config": {"rope": False}}
    assert liger.options(reward, ASKED | own) == {"fused_linear_cross_entropy": False, "rope": False}
    assert liger.options(kinds.get("sft"), ASKED | own) == {"rope": False}
    error = refused("reward", liger_kernel_config={"fused_linear_cross_entropy": True})
    assert error.place == f"{PLACE}.liger_kernel_config.fused_linear_cross_entropy"


def test_a_stage_that_does_not_ask_needs_nothing():
    liger.require(kinds.get("sft"), {"use_liger_kernel": False}, LlamaConfig(), PLACE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_said_with_all_other_faults_and_once():
    asked = [f"stages.{stage}.trainer.use_liger_kernel=true" for stage in ("sft", "dpo")]
    loaded = recipes.load("tiny", ["model.attention=flash_attention_2", *asked, "sft.data.limit=40"])
    with pytest.raises(InputErrors) as errors:
        check(loaded, ["sft", "dpo"])
    assert [error.place for error in errors.value.all] == [
        "model.attention",
        "stages.sft.trainer.use_liger_kernel",
        "stages.dpo.trainer.use_liger_kernel",
    ]
