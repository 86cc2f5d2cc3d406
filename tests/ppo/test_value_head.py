"""A value that is a head on the policy's own trunk: one pass for both, and what belongs to whom.

That an update's arithmetic is right, `test_reference.py` shows.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch.testing import assert_close

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.forward import reply_log_probs, reply_log_probs_and_values, reply_values
from rlhf_pipeline.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"max_steps": 1, "num_ppo_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0}
DEMONSTRATIONS = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]], "labels": [[-100, -100, 7, 8]] * 2})


@pytest.fixture
def shared(share, make_artifacts) -> SharedBase:
    return share(make_artifacts(), one_trunk=True)


@pytest.fixture
def make(make_trainer, make_artifacts, share) -> Callable[..., PPOTrainer]:
    """A function that makes a trainer whose value is a head; keywords are settings."""
    return lambda **settings: make_trainer(shared=share(make_artifacts(), one_trunk=True), **settings)


def weights(shared: SharedBase, role: str) -> torch.Tensor:
    """A copy of all that is trained of a role, as one vector."""
    return torch.cat([one.detach().flatten() for one in getattr(shared, role).parameters() if one.requires_grad])


@contextmanager
def passes(shared: SharedBase) -> Iterator[list[str]]:
    """Note the role under which the base reads whole texts meanwhile, with a star where there will be a gradient."""
    seen: list[str] = []
    assert shared.head  # it is looked for at its first use, with passes of its own

    def called(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if not inputs["use_cache"]:  # else it samples
            seen.append(shared._active + "*" * torch.is_grad_enabled())

    handle = shared.causal_lm.base_model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_the_head_is_all_that_the_value_has_and_it_says_0(shared: SharedBase, share, make_artifacts) -> None:
    """What `value` had of weights with an adapter is not there: neither loaded, nor trained, nor in a checkpoint."""
    with_adapter = share(make_artifacts())
    assert [name for name, _ in shared.value.named_parameters()] == ["score.weight"]
    assert not shared.value.score.weight.any() and shared.value.score.weight.requires_grad
    assert not adapters.adapter_parameters(shared.peft, "value")
    both = (sum(parameter.numel() for parameter in one.peft.parameters()) for one in (with_adapter, shared))
    less = sum(parameter.numel() for parameter in adapters.adapter_parameters(with_adapter.peft, "value").values())
    assert next(both) - next(both) == less > 0
    sums = shared.checksums()
    assert set(sums) == {"policy", "reference", "reward", "value", "base"}
    with torch.no_grad():
        shared.value.score.weight[0, 0] = 1.0
    assert {role for role, one in shared.checksums().items() if one != sums[role]} == {"value"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pass_gives_what_two_give(make, share, make_artifacts, dtype: str) -> None:
    """Numbers and gradients; and the values are those of the policy's last hidden states."""
    artifacts = make_artifacts()
    shared = share(artifacts._replace(spec=artifacts.spec.model_copy(update={"dtype": dtype})), one_trunk=True)
    torch.nn.init.normal_(shared.value.score.weight, std=0.1)
    trainer = make()
    episodes = trainer.roll_out(trainer.train_dataset["input_ids"][:3])
    learned = [*shared.policy.parameters(), *shared.value.parameters()]
    with passes(shared) as seen:
        log_probs, entropies, values = reply_log_probs_and_values(shared.policy, shared.value, episodes, 0.7)
    assert seen == ["policy*"]
    one = torch.autograd.grad((log_probs + 2 * values).sum(), learned)
    apart, of_choice = reply_log_probs(shared.policy, episodes, 0.7)
    alone = reply_values(shared.value, episodes)
    two = torch.autograd.grad(apart.sum() + 2 * alone.sum(), learned)
    for ours, theirs in ((log_probs, apart), (entropies, of_choice), (values, alone)):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs) and ours.any()
    for ours, theirs in zip(one, two, strict=True):
        # In bfloat16 two gradients are rounded before they are added, or after.
        assert (ours - theirs).norm() <= (1e-5 if dtype == "float32" else 3e-2) * theirs.norm()
    hidden = shared.policy.hidden_states(episodes.ids)[0, episodes.prompt_lengths[0] - 1]
    assert_close(values[0, 0], hidden.float() @ shared.value.score.weight[0], rtol=1e-5, atol=1e-5)


def test_an_update_has_one_pass_less_of_each_part(make) -> None:
    """Scoring reads each of two parts with policy, reference and reward; each of two epochs reads them once."""
    trainer = make(max_steps=2, value_warmup_updates=1, local_rollout_forward_batch_size=4)
    with passes(trainer.shared) as seen:
        trainer.train()
    scoring = ["policy", "reference", "reward"] * 2
    warming, training = ["policy"] * 4, ["policy*"] * 4  # while only the head learns, the trunk has no backward pass
    assert sorted(seen[:10]) == sorted(scoring + warming)
    assert sorted(seen[10:]) == sorted(scoring + training)


def test_while_it_warms_up_the_head_alone_learns(make) -> None:
    """Whatever else would move the policy: weight decay, demonstrations, and the value's own loss."""
    trainer = make(max_steps=3, value_warmup_updates=2, weight_decay=0.1, ptx_coef=1.0, ptx_dataset=DEMONSTRATIONS)
    torch.nn.init.normal_(trainer.shared.value.score.weight, std=0.1)
    at = [{role: weights(trainer.shared, role) for role in ("policy", "value")}]
    report = trainer.report

    def noting(*args: Any) -> None:
        report(*args)
        at.append({role: weights(trainer.shared, role) for role in ("policy", "value")})

    trainer.report = noting  # type: ignore[method-assign]
    trainer.train()
    moved = {role: [not torch.equal(at[i][role], at[i + 1][role]) for i in range(3)] for role in at[0]}
    assert moved == {"policy": [False, False, True], "value": [True, True, True]}
    assert trainer.trained_roles == {"policy", "value"}
    norms = [{name for name in row if name.endswith("/grad_norm")} for row in trainer.state.log_history]
    assert norms == [{"value/grad_norm"}, {"value/grad_norm"}, {"policy/grad_norm", "value/grad_norm"}]


def test_the_heads_learning_rate_is_the_heads_alone(make) -> None:
    """Also where a bias in the policy's adapter has a group of its own in the optimizer, behind the head's."""
    moved, logged = [], []
    for rate in (1e-3, 3e-3):
        trainer = make(**PLAIN, learning_rate=1e-3, value_learning_rate=rate)
        before = {role: weights(trainer.shared, role) for role in ("policy", "value")}
        trainer.train()
        moved.append({role: weights(trainer.shared, role) - old for role, old in before.items()})
        logged.append([trainer.state.log_history[0][name] for name in ("lr", "lr_value")])
    assert logged == [[1e-3, 1e-3], [1e-3, 3e-3]]
    assert torch.equal(moved[0]["policy"], moved[1]["policy"]) and moved[0]["policy"].any()
    assert_close(moved[1]["value"], 3 * moved[0]["value"], rtol=1e-3, atol=1e-8)
    bias = torch.nn.Parameter(torch.zeros(1))
    trainer.shared.policy.register_parameter("bias", bias)
    trainer.optimizer = None
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [1e-3, 3e-3, 1e-3]
    assert trainer.value_group == 1


def test_a_run_that_resumes_ends_the_same_to_the_bit(make, tmp_path: Path, eval_rows: Dataset) -> None:
    """From a checkpoint while the head warms up, and from one after that; the head is all it holds of the value."""
    settings: dict[str, Any] = {
        "max_steps": 3, "value_warmup_updates": 1, "value_learning_rate": 1e-2, "weight_decay": 0.1,
        "kl_budget": 1e6, "normalize_scores": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9,
        "eval_dataset": eval_rows, "eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    whole = make(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    for step in (1, 2):
        trainer = make(**settings, output_dir=str(tmp_path / str(step)))
        torch.manual_seed(999)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for role in ("policy", "value"):
            assert torch.equal(weights(trainer.shared, role), weights(whole.shared, role))
        untimed = [
            [{name: value for name, value in row.items() if "second" not in name and name != "eps"} for row in log]
            for log in (trainer.state.log_history, whole.state.log_history)
        ]
        assert untimed[0] == untimed[1]
        ours, theirs = trainer.memory.best, whole.memory.best
        assert (ours.step, ours.score, ours.kl) == (theirs.step, theirs.score, theirs.kl)
    with safe_open(tmp_path / "whole" / "checkpoint-1" / "value.safetensors", framework="pt") as held:
        assert list(held.keys()) == ["score.weight"]


def test_a_checkpoint_of_a_value_with_an_adapter_is_refused(make, make_trainer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "num_ppo_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings, output_dir=str(tmp_path / "adapter")).train()
    shutil.rmtree(tmp_path / "adapter" / "checkpoint-2")
    with pytest.raises(ValueError, match="these are not the weights of this value"):
        make(**settings).train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-1"))


def test_a_value_that_is_not_finite_skips_the_step_of_both(make) -> None:
    trainer = make(max_steps=1, num_ppo_epochs=2)
    before = weights(trainer.shared, "policy")
    with torch.no_grad():
        trainer.shared.value.score.weight[0, 0] = torch.nan
    trainer.train()
    assert trainer.state.log_history[0]["skipped_steps"] == 2
    assert torch.equal(weights(trainer.shared, "policy"), before)


@pytest.fixture
def eval_rows() -> Dataset:
    return Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]})
