"""A run's models on one base compute what each computes by itself, in the precision that it was trained in."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.forward import reply_log_probs, reply_scores
from rlhf_pipeline.ppo.rollout import sample


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_each_stage_and_the_base_compute_as_if_they_were_alone(make_artifacts, tokenizer, batch, quantization) -> None:
    artifacts = make_artifacts(quantization=quantization)
    staged = StagedBase(artifacts.spec, {"sft": artifacts.init, "reward": artifacts.reward})
    alone = load_base(artifacts.spec, tokenizer)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        expected = {"base": alone(input_ids=ids).logits}
        expected["sft"] = PeftModel.from_pretrained(alone, str(artifacts.init))(input_ids=ids).logits
        assert (expected["sft"] - expected["base"]).abs().max() > 0.1
        for stage in ("sft", "base", "sft"):
            assert_close(staged.policy(stage)(input_ids=ids).logits, expected[stage].float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_and_log_probabilities_are_those_of_ppo(make_artifacts, tokenizer, dtype) -> None:
    artifacts = make_artifacts(ranks=(8, 8))
    spec = artifacts.spec.model_copy(update={"dtype": dtype})
    staged = StagedBase(spec, {"sft": artifacts.init, "reward": artifacts.reward})
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    shared = SharedBase(load_base(spec, tokenizer), lora, artifacts.init, [(artifacts.reward, lora)])
    torch.manual_seed(0)
    episodes = sample(
        staged.policy("sft"), [[7, 8, 9], [11, 12]], response_length=6, temperature=1.0, stop_token_id=None,
        pad_token_id=0, at_once=2,
    )  # fmt: skip
    with torch.no_grad():
        ours = (
            reply_scores(staged.reward("reward")[0], episodes),
            reply_log_probs(staged.policy("sft"), episodes, 1.0)[0],
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):  # as `bf16` has it in PPO
            theirs = reply_scores(shared.reward, episodes), reply_log_probs(shared.policy, episodes, 1.0)[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=0, atol=1e-6)


def test_a_token_without_a_row_in_the_embedding_is_named(make_artifacts) -> None:
    """A text that is chatted with or scored is not among those that the check of the recipe has read."""
    artifacts = make_artifacts()
    staged = StagedBase(artifacts.spec, {"sft": artifacts.init, "reward": artifacts.reward})
    beyond = staged.causal_lm.config.vocab_size
    for stage in ("base", "sft"):
        staged.policy(stage)(input_ids=torch.tensor([[5, beyond - 1]]))
        with pytest.raises(InputError, match=f"is token {beyond:,} of the tokenizer, and the model has {beyond:,}"):
            staged.policy(stage)(input_ids=torch.tensor([[5, beyond]]))


def test_adapters_that_are_not_there_are_left_out(tmp_path, make_artifacts) -> None:
    from rlhf_pipeline.models import staged

    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter").symlink_to(make_artifacts().init)
    (tmp_path / "ppo" / "adapter").mkdir(parents=True)
    found = staged.artifacts(tmp_path, ["sft", "ppo", "dpo"])
    assert found == {"sft": tmp_path / "sft" / "adapter"} and (found["sft"] / adapters.WEIGHTS).is_file()
