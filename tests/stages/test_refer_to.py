"""A reference of another stage: KL and DPO measure from it, and nothing else changes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.stages import dpo, grpo, kto, rloo

BETA = 0.4
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 1]},
    {"prompt_ids": [11], "chosen_ids": [12, 1], "rejected_ids": [13, 14, 15, 1]},
]
THUMBS = [
    {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
PROMPTS = [{"input_ids": [5 + i, 6, 7]} for i in range(8)]
KINDS = {
    "dpo": (DPOConfig, dpo.TRAINER, PAIRS, {}),
    "kto": (KTOConfig, kto.TRAINER, THUMBS, {}),
    "grpo": (GRPOConfig, grpo.TRAINER, PROMPTS, {"num_generations": 4, "per_device_train_batch_size": 8}),
    "rloo": (RLOOConfig, rloo.TRAINER, PROMPTS, {"num_generations": 4, "per_device_train_batch_size": 8}),
}


@pytest.fixture(scope="module")
def base(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def stages(tmp_path_factory, base, tokenizer, randomise) -> dict[str, Path]:
    """The adapters of two stages, the second one smaller than the first."""
    folder = tmp_path_factory.mktemp("stages")
    for name, lora in (("init", LORA), ("other", LORA | {"r": 2, "target_modules": ["q_proj", "up_proj"]})):
        model = adapters.with_policy_adapter(copy.deepcopy(base), lora, None)
        randomise(model)
        adapters.save_adapter(model, "default", folder / name, tokenizer)
    return {"init": folder / "init", "other": folder / "other"}


@pytest.fixture
def make(tmp_path, base, stages, tokenizer):
    """A function that makes the trainer of a kind, which starts from `init`."""

    def of(kind: str, **settings: Any) -> Any:
        config, trainer_class, rows, own = KINDS[kind]
        args = config(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
            beta=BETA, **own | settings,
        )  # fmt: skip
        model = adapters.with_policy_adapter(copy.deepcopy(base), LORA, stages["init"])
        return trainer_class.over(model, args, tokenizer, Dataset.from_list(rows), None)

    return of


@torch.no_grad()
def log_prob(base: LlamaForCausalLM, artifact: Path | None, prompt: list[int], reply: list[int]) -> float:
    """Of a whole reply under an artifact as PEFT loads it, or under the bare base; float32, token by token."""
    model: Any = copy.deepcopy(base)
    if artifact:
        model = PeftModel.from_pretrained(model, str(artifact))
    said = model(input_ids=torch.tensor([prompt + reply])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(said[i, token].item() for i, token in enumerate(reply))


def dpo_loss(trainer: Any) -> float:
    trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss.item()


def test_the_first_dpo_loss_is_ln_2_where_the_reference_is_what_the_stage_starts_from(make, stages):
    assert dpo_loss(make("dpo")) == pytest.approx(math.log(2), abs=1e-6)
    named = make("dpo")
    named.refer_to(stages["init"])
    assert dpo_loss(named) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("reference", ["other", None])
def test_the_first_dpo_loss_is_that_of_the_paper_for_another_reference(make, stages, base, reference):
    """Rafailov et al. 2023, eq. 7."""
    trainer = make("dpo")
    trainer.refer_to(stages.get(reference))
    expected = 0.0
    for pair in PAIRS:
        chosen, rejected = (
            log_prob(base, stages["init"], pair["prompt_ids"], pair[f"{side}_ids"])
            - log_prob(base, stages.get(reference), pair["prompt_ids"], pair[f"{side}_ids"])
            for side in ("chosen", "rejected")
        )
        expected += math.log1p(math.exp(-BETA * (chosen - rejected))) / len(PAIRS)
    assert abs(expected - math.log(2)) > 0.05
    assert dpo_loss(trainer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reference", ["other", None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_computes_as_the_adapter_that_is_named_and_the_policy_as_before(
    make, stages, base, kind, reference
):
    trainer = make(kind)
    model, prompt, reply = trainer.model, [5, 6, 7], [8, 9, 10]
    before = {name: one.clone() for name, one in adapters.adapter_parameters(model, "default").items()}
    trainable, generator = [one.requires_grad for one in model.parameters()], torch.get_rng_state()
    trainer.refer_to(stages.get(reference))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [one.requires_grad for one in model.parameters()] == trainable and any(trainable)
    assert model.active_adapters == ["default"]
    policy = adapters.adapter_parameters(model, "default")
    assert before.keys() == policy.keys() and all(torch.equal(before[name], policy[name]) for name in before)
    model.set_adapter("ref")
    with torch.no_grad():
        said = model(input_ids=torch.tensor([prompt + reply])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    found = sum(said[i, token].item() for i, token in enumerate(reply))
    expected = log_prob(base, stages.get(reference), prompt, reply)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - log_prob(base, stages["init"], prompt, reply)) > 0.01


def test_a_reference_that_has_no_room_is_refused(make, stages, tmp_path, base, tokenizer):
    larger = adapters.with_policy_adapter(copy.deepcopy(base), LORA | {"r": 6}, None)
    adapters.save_adapter(larger, "default", tmp_path / "larger", tokenizer)
    with pytest.raises(ValueError, match="rank 4 at"):
        make("dpo").refer_to(tmp_path / "larger")


@pytest.mark.parametrize("reference", ["other", None])
def test_the_first_kl_of_ppo_is_that_between_the_two_adapters(tmp_path, base, stages, tokenizer, reference):
    shared = SharedBase(copy.deepcopy(base), LORA, stages["init"], [])
    rewards = Rewards([Part("reward", 1.0, [shared.value])], tokenizer)  # any will do
    trainable = {name: one.requires_grad for name, one in shared.peft.named_parameters()}
    shared.refer_to(stages.get(reference))
    assert {name: one.requires_grad for name, one in shared.peft.named_parameters()} == trainable
    assert any(on and ".value." in name for name, on in trainable.items())
    assert shared.checksums("reference") != shared.checksums("policy")
    args = PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
        max_steps=1, per_device_train_batch_size=8, num_ppo_epochs=1, response_length=4, temperature=1.0,
        num_sample_generations=0, save_strategy="no",
    )  # fmt: skip
    read: list[Any] = []
    trainer = PPOTrainer(args, tokenizer, shared, rewards, Dataset.from_list(PROMPTS))
    score = trainer.score
    trainer.score = lambda *some, **named: read.append(score(*some, **named)) or read[-1]
    trainer.train()
    episodes = read[0].episodes
    expected = 0.0
    for row in range(len(episodes)):
        prompt = episodes.ids[row, : episodes.prompt_lengths[row]].tolist()
        reply = episodes.replies[row, : episodes.reply_lengths[row]].tolist()
        ours, theirs = (log_prob(base, one, prompt, reply) for one in (stages["init"], stages.get(reference)))
        expected += (ours - theirs) / len(episodes)
    assert abs(expected) > 0.05
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(expected, rel=1e-4)
    assert (stages["init"] / WEIGHTS).is_file()
