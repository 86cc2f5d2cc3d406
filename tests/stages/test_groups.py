"""GRPO and RLOO: TRL's advantages and losses, over what is sampled, read and scored as PPO does it here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from shared import Artifacts, lora_of
from torch import Tensor
from trl import GRPOConfig, RLOOConfig

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe.schema import Reward
from rlhf_pipeline.stages import grpo, rloo
from rlhf_pipeline.stages.groups import GroupTrainer

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
    "gradient_checkpointing": False, "max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4,
    "max_completion_length": 6, "learning_rate": 1e-2, "logging_steps": 1, "beta": 0.0,
}  # fmt: skip
CLASSES = {"grpo": (GRPOConfig, grpo.TRAINER), "rloo": (RLOOConfig, rloo.TRAINER)}
Make = Callable[..., GroupTrainer]


def few_letters(episodes: Episodes, rows: Any, **_: Any) -> Scores:
    """A reward by tokens alone, another one for every reply, and a second one that applies to some."""
    spread = (episodes.replies * episodes.mask).sum(1).float() / 1000
    other = torch.where(spread > spread.median(), episodes.reply_lengths.float(), torch.nan)
    return Scores(spread + 0.5 * other.nan_to_num(), {"sum": spread, "long": other}, {})


REWARDS = [Reward(stage="sum"), Reward(stage="long", weight=0.5)]


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    """Ten prompts of two to eight random tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (10,), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": [torch.randint(5, 1024, (n,), generator=draw).tolist() for n in lengths]})


@pytest.fixture
def make(tmp_path, make_artifacts, tokenizer, prompts) -> Make:
    """A function that makes a trainer of a kind; keywords are settings."""

    def trainer(
        kind: str, shape: str = "llama", held_out: Dataset | None = None, quantization: str = "none", **settings: Any
    ) -> GroupTrainer:
        artifacts: Artifacts = make_artifacts(shape, quantization)
        config, trainer_class = CLASSES[kind]
        args = config(**{"output_dir": str(tmp_path / "out"), **SETTINGS, **settings})
        model = base.load_base(artifacts.spec, tokenizer)
        peft = adapters.with_policy_adapter(model, lora_of(artifacts.init), artifacts.init)
        made = trainer_class.over(peft, args, tokenizer, prompts, held_out)
        made.score_with(few_letters, REWARDS)
        return made

    return trainer


def weights(trainer: GroupTrainer, adapter: str) -> dict[str, Tensor]:
    named = adapters.adapter_parameters(trainer.model, adapter)
    return {name.replace(f".{adapter}", ""): weight.detach().clone() for name, weight in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[name], other[name]) for name in one)


def rollout(trainer: GroupTrainer) -> dict[str, Tensor]:
    """A batch of replies as TRL's loss reads it, in the order in which they were sampled."""
    torch.manual_seed(3)
    trainer.model.train()
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    return trainer._generate_and_score_completions(batch)


def rewards_of(trainer: GroupTrainer) -> Tensor:
    return few_letters(trainer._episodes, None).total


# Advantages, by hand


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_grpo_are_distances_from_the_mean_of_a_group(make, scale):
    trainer = make("grpo", scale_rewards=scale)
    found = rollout(trainer)["advantages"]
    groups = rewards_of(trainer).view(2, 4)
    expected = []
    for group in groups:
        mean = sum(group.tolist()) / 4
        spread = groups if scale == "batch" else group
        middle = spread.mean()
        deviation = (((spread - middle) ** 2).sum() / (spread.numel() - 1)).sqrt()  # the sample's
        divisor = 1.0 if scale == "none" else deviation + 1e-4
        expected += [(reward - mean) / divisor for reward in group]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert found.abs().min() > 1e-3


@pytest.mark.parametrize("normalized", [True, False])
def test_advantages_of_rloo_are_distances_from_the_mean_of_the_others_less_kl(make, normalized):
    trainer = make("rloo", beta=0.3, normalize_advantages=normalized)
    with torch.no_grad():
        for name, weight in adapters.adapter_parameters(trainer.model, "default").items():
            weight += 0.05 * ("lora_A" in name)  # away from the reference
    batch = rollout(trainer)
    kl = ((trainer._read["default"] - batch["ref_per_token_logps"]) * batch["completion_mask"]).sum(1)
    assert kl.abs().min() > 1e-4
    rewards = (rewards_of(trainer) - 0.3 * kl).tolist()
    expected = []
    for start in (0, 4):
        group = rewards[start : start + 4]
        expected += [one - (sum(group) - one) / 3 for one in group]
    if normalized:
        mean = sum(expected) / 8
        deviation = (sum((one - mean) ** 2 for one in expected) / 7) ** 0.5
        expected = [(one - mean) / (deviation + 1e-4) for one in expected]
    torch.testing.assert_close(batch["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-4)


# The base that all share


@pytest.mark.parametrize(
    ("kind", "beta", "quantization"), [("grpo", 0.0, "none"), ("grpo", 0.1, "nf4"), ("rloo", 0.1, "none")]
)
def test_training_begins_without_kl_and_moves_the_policy_alone(make, make_artifacts, kind, beta, quantization):
    trainer = make(kind, beta=beta, max_steps=2, quantization=quantization)
    reward = make_artifacts("llama", quantization).reward
    trainer.roles.add_reward(reward, lora_of(reward))
    before = {adapter: weights(trainer, adapter) for adapter in trainer.model.peft_config}
    assert set(before) == {"default", "ref", "reward"} and same(before["default"], before["ref"])
    trainer.train()
    after = {adapter: weights(trainer, adapter) for adapter in before}
    assert same(after["ref"], before["ref"]) and same(after["reward"], before["reward"])
    assert not same(after["default"], before["default"])
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and abs(second["objective/kl"]) > 1e-3
    assert ("kl" in first) == (beta > 0)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_what_is_trained_on_are_the_log_probabilities_of_the_sampled_tokens(make, shape):
    """Though TRL fills prompts up on the left: GPT-2 has learned positions, which would be other ones."""
    trainer = make("rloo", shape)  # which reads the policy before it trains
    batch = rollout(trainer)
    episodes, mask = trainer._episodes, batch["completion_mask"].bool()
    assert len(set(episodes.prompt_lengths.tolist())) > 1
    assert torch.equal(batch["completion_ids"][mask], episodes.replies[episodes.mask])
    sampled, read = (values[mask] for values in (episodes.sampled_log_probs, trainer._read["default"]))
    torch.testing.assert_close(read, sampled, rtol=1e-4, atol=1e-4)


def test_rewards_read_the_tokens_that_were_sampled(make, make_artifacts):
    """Those of the encoded prompt, and the reply's with its stop token."""
    trainer = make("grpo")
    artifact = make_artifacts("llama").reward
    (view,) = trainer.roles.add_reward(artifact, lora_of(artifact))
    seen: list[Episodes] = []

    def reward(episodes: Episodes, rows: Any, **_: Any) -> Scores:
        seen.append(episodes)
        return few_letters(episodes, rows)

    trainer.score_with(reward, REWARDS)
    batch = rollout(trainer)
    (episodes,) = seen
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        reply = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        length = int(episodes.prompt_lengths[row] + episodes.reply_lengths[row])
        assert episodes.ids[row, :length].tolist() == [*prompt.tolist(), *reply.tolist()]
        assert prompt.tolist() in trainer.train_dataset["prompt"]
        assert bool(reply[-1] == trainer.processing_class.eos_token_id) == bool(episodes.ended[row])
    assert view.role == "reward"


def test_a_reward_of_weight_0_is_logged_and_decides_nothing(make):
    """A reply that it alone applies to is left out, as one that no reward applies to."""
    trainer = make("grpo")

    def reward(episodes: Episodes, rows: Any, **_: Any) -> Scores:
        scores = few_letters(episodes, rows)
        scores.by_name["gold"] = torch.arange(8.0)
        return Scores(scores.by_name["long"].nan_to_num(), scores.by_name, {})

    trainer.score_with(reward, [Reward(stage="long"), Reward(stage="gold", weight=0.0)])
    rollout(trainer)
    long = trainer._scores.by_name["long"]
    applies = ~long.isnan()
    assert 0 < applies.sum() < 8
    logged = trainer._metrics["train"]
    assert logged["objective/scores"] == [pytest.approx(long[applies].mean().item())]
    assert logged["reward"] == [pytest.approx(long[applies].mean().item())]
    assert logged["rewards/gold/mean"] == [pytest.approx(torch.arange(8.0)[applies].mean().item())]


# Numbers


@pytest.mark.parametrize("kind", CLASSES)
def test_every_reward_is_logged_by_its_name_and_a_policy_that_samples_by_those_of_ppo(make, kind):
    trainer = make(kind)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    scores = few_letters(trainer._episodes, None)
    assert row["rewards/sum/mean"] == pytest.approx(scores.by_name["sum"].mean().item(), rel=1e-5)
    assert row["rewards/sum/std"] == pytest.approx(scores.by_name["sum"].std().item(), rel=1e-4)
    assert row["rewards/long/mean"] == pytest.approx(scores.by_name["long"].nanmean().item(), rel=1e-5)
    assert row["objective/scores"] == row["reward"] == pytest.approx(scores.total.mean().item(), rel=1e-5)
    assert row["reply/length"] == trainer._episodes.reply_lengths.float().mean().item()
    assert row["reply/ended"] == trainer._episodes.ended.float().mean().item()
    assert set(trainer.kind.batch_metrics) <= set(row)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_gap_of_sampling_is_that_of_the_policy_that_sampled(make, kind):
    """A step later, the policy is another one, and so are its log-probabilities."""
    trainer = make(kind, num_iterations=2, max_steps=4, logging_steps=1)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    gaps = [row.get("rollout/log_prob_gap_max") for row in steps]
    assert gaps[1] is gaps[3] is None and 0 < gaps[0] < 1e-4 and 0 < gaps[2] < 1e-4
    assert all(row["rollout/log_prob_gap_mean"] <= row["rollout/log_prob_gap_max"] for row in steps[::2])


def test_the_gap_is_the_mean_over_tokens_of_the_difference_of_log_probabilities(make):
    trainer = make("grpo")
    roll_out = trainer.roll_out

    def otherwise(prompts: Any) -> Episodes:
        episodes = roll_out(prompts)
        episodes.sampled_log_probs[0, :2] -= 0.5
        return episodes

    trainer.roll_out = otherwise
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    tokens = trainer._episodes.reply_lengths.sum().item()
    assert row["rollout/log_prob_gap_mean"] == pytest.approx(1.0 / tokens, rel=1e-3)
    assert row["rollout/log_prob_gap_max"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_evaluation_says_the_same_each_time_and_takes_no_random_number_of_training(make, prompts, kind):
    trainer = make(kind, held_out=prompts.select(range(5)), per_device_eval_batch_size=8)
    lengths = []

    def watched(episodes: Episodes, rows: Any, **_: Any) -> Scores:
        lengths.extend(episodes.reply_lengths.tolist())
        return few_letters(episodes, rows)

    trainer.score_with(watched, REWARDS)
    one = trainer.evaluate()
    assert len(lengths) == 20  # in batches of 8, 8 and 4
    assert trainer.state.log_history[0]["eval_reply/length"] == pytest.approx(sum(lengths) / 20)
    torch.manual_seed(99)
    other = trainer.evaluate()
    for metric in ("eval_loss", *(f"eval_{name}" for name in trainer.kind.batch_metrics if name != "num_tokens")):
        assert trainer.state.log_history[0][metric] == trainer.state.log_history[1][metric], metric
    assert one["eval_loss"] == other["eval_loss"]
    torch.manual_seed(99)
    trainer.evaluate()
    after = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "loss"), [("grpo", "dapo"), ("grpo", "grpo"), ("rloo", None)]
)  # fmt: skip
def test_the_loss_does_not_depend_on_how_a_batch_is_divided(make, kind, loss):
    """Of the same replies; TRL's `bnpo` is defined by the part."""
    settings = {"loss_type": loss} if loss else {}
    ends, losses, start = [], [], None
    for size, parts in ((8, 1), (2, 4)):
        trainer = make(kind, per_device_train_batch_size=size, gradient_accumulation_steps=parts, beta=0.1, **settings)
        start = weights(trainer, "default")
        trainer.create_optimizer()
        for group in trainer.optimizer.param_groups:
            group.update(lr=1.0, eps=1.0)  # so that a step is almost in proportion to the gradient
        trainer.train()
        ends.append(weights(trainer, "default"))
        losses.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6) and not same(start, ends[0])
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-4, atol=1e-6, msg=name)
