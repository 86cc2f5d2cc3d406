"""PPO on several ranks: the update of one process, its numbers and its decisions, on every rank."""

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from given_replies import Given, of_unlike_length
from together import together
from torch import Tensor
from transformers import TrainerCallback

from rlhf_pipeline import ranks
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.rundir import durable

pytestmark = pytest.mark.slow

TIMES = ("eps", "seconds", "tokens_per_second")
LONGEST = 12
# What is worked out over a batch. Eight of twenty prompts an update, so that a pass over them ends within one.
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "num_ppo_epochs": 2, "response_length": LONGEST, "num_mini_batches": 2, "stop_token": "eos",
    "learning_rate": 1e-3, "value_learning_rate": 3e-3, "max_grad_norm": 0.5, "weight_decay": 0.1,
    "missing_eos_penalty": 0.7, "normalize_scores": True, "target_kl": 0.1, "kl_horizon": 40, "kl_budget": 1e6,
    "local_rollout_forward_batch_size": 3, "per_device_eval_batch_size": 2,
}  # fmt: skip


def batch(size: int, steps: int) -> dict[str, int]:
    """The episodes of a process in an update: so many at once, so many times."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}


WHOLE, HALF = batch(4, 2), batch(4, 1)


@pytest.fixture
def train(make_trainer, make_artifacts, share, tokenizer) -> Callable[..., dict[str, Any]]:
    """A function that trains with given replies and says what that came to; keywords are settings."""
    artifacts = make_artifacts()

    def trained(
        *, resume: bool = False, given: bool = True, one_trunk: bool = False, **settings: Any
    ) -> dict[str, Any]:
        trainer = make_trainer(shared=share(artifacts, one_trunk), **SETTINGS | settings)
        if given:
            trainer.engine = Given(of_unlike_length(LONGEST, tokenizer.eos_token_id))
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)

    return trained


def outcome(trainer: PPOTrainer) -> dict[str, Any]:
    """What training has come to."""
    log = [{name: one for name, one in row.items() if not name.endswith(TIMES)} for row in trainer.state.log_history]
    memory = trainer.memory
    return {
        "weights": {
            f"{role}.{name}": weight.detach().clone()
            for role in ("policy", "value")
            for name, weight in getattr(trainer.shared, role).named_parameters()
        },
        "log": log,
        "kl_coef": memory.kl_control.coefficient,
        "scores": vars(memory.score_statistics),
        "skipped": memory.skipped_steps,
        "best": memory.best and (memory.best.step, memory.best.score, memory.best.kl),
    }


def alike(one: dict[str, Any], other: dict[str, Any], within: float = 1e-4) -> None:
    """See that two trainings came to the same."""
    assert one["weights"].keys() == other["weights"].keys()
    assert max((weight - other["weights"][name]).abs().max().item() for name, weight in one["weights"].items()) < within
    assert [row.keys() for row in one["log"]] == [row.keys() for row in other["log"]]
    for ours, theirs in zip(one["log"], other["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=within)
    for what in ("kl_coef", "scores", "best", "skipped"):
        assert one[what] == pytest.approx(other[what], rel=1e-3, abs=within)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two have the same weights, bit for bit."""
    return all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.fixture
def demonstrations() -> Dataset:
    """Five texts of unlike length, of which the last few tokens are replies to learn."""
    draw = torch.Generator().manual_seed(8)
    ids = [torch.randint(5, 1024, (n,), generator=draw).tolist() for n in (6, 9, 4, 12, 7)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]}
    )


# The same as one process


@pytest.mark.parametrize(
    ("whole", "half", "settings"),
    [
        (WHOLE, HALF, {"num_mini_batches": 1}),
        (WHOLE, HALF, {"num_mini_batches": 4, "value_warmup_updates": 1, "max_grad_norm": 0}),
        (WHOLE, batch(1, 4), {"normalize_scores": False, "kl_estimator": "k3", "logging_steps": 2}),
        (batch(8, 1), batch(4, 1), {"num_mini_batches": 2, "whiten_rewards": True}),
    ],
    ids=["one mini-batch", "four mini-batches, warm-up", "parts of one", "whitened rewards"],
)
def test_two_with_half_the_batch_each_are_one_with_the_whole(train, whole: dict, half: dict, settings: dict) -> None:
    one = train(**whole, **settings)
    two = together(lambda: train(**half, **settings))
    assert same(*two)
    for rank in two:
        alike(one, rank)


def test_a_head_on_the_policys_trunk_and_demonstrations(train, demonstrations) -> None:
    settings: dict[str, Any] = {
        "one_trunk": True,
        "ptx_coef": 0.5,
        "ptx_dataset": demonstrations,
        "gradient_checkpointing": True,
    }
    one, two = train(**WHOLE, **settings), together(lambda: train(**HALF, **settings))
    assert same(*two)
    alike(one, two[1])


class Lengths:
    """A reward that likes long replies, says nothing of some, and logs what it has seen."""

    def __call__(self, episodes: Episodes, *_: Any, **__: Any) -> Scores:
        total = episodes.reply_lengths.float()
        some = torch.where(total > 1, total, torch.nan)
        return Scores(total, {"all": total, "some": some}, {"all": total / 7}, {"all/mean": total.mean().item()})


def test_held_out_prompts_that_do_not_divide(train, prompts) -> None:
    """Seven, of which three ranks read two at once each: six, and then one."""
    settings: dict[str, Any] = {
        "eval_dataset": prompts.select(range(7)),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
        "rewards": Lengths(),
    }
    one = train(**batch(3, 2), **settings)
    for rank in together(lambda: train(**batch(2, 1), **settings), processes=3):
        alike(one, rank)
    assert "eval_objective/scores" in one["log"][-1]


def test_rewards_are_those_of_all_replies(train, tmp_path) -> None:
    written = []

    def run(name: str, **settings: Any) -> dict[str, Any]:
        written.append(tmp_path / name)
        return train(rewards=Lengths(), num_sample_generations=3, samples_file=tmp_path / name, **settings)

    one = run("one.jsonl", **WHOLE)
    alike(one, together(lambda: run("two.jsonl", **HALF))[1])
    first, second = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("one", "two"))
    assert len(first) == len(second) == 12
    for ours, theirs in zip(first, second, strict=True):
        assert [(key, ours[key]) for key in ours if key != "kl"] == [(key, theirs[key]) for key in ours if key != "kl"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)


def test_over_the_budget_all_put_the_same_policy_back(train) -> None:
    settings = {"kl_budget": 0.4, "max_steps": 8, "learning_rate": 3e-3, "target_kl": None}
    one = train(**WHOLE, **settings)
    assert "kl_budget/best_step" in one["log"][-1]
    two = together(lambda: train(**HALF, **settings))
    assert same(*two)
    alike(one, two[0])


def test_replies_do_not_depend_on_the_number_of_ranks(train) -> None:
    two, _ = together(lambda: train(given=False, **batch(3, 1), num_mini_batches=1))
    three, _, other = together(lambda: train(given=False, **batch(2, 1), num_mini_batches=1), processes=3)
    assert two["log"][0]["reply/unique"] == 1.0
    alike(two, three)
    assert same(three, other)


def test_every_reply_has_random_numbers_of_its_own(make_trainer, make_artifacts, share) -> None:
    """Also where the same prompts come again, in a later update or in an evaluation."""
    artifacts = make_artifacts()

    def run() -> list[list[int]]:
        one = Dataset.from_dict({"input_ids": [[7, 8, 9]] * 8})
        trainer = make_trainer(
            shared=share(artifacts), train_dataset=one, eval_dataset=one, eval_strategy="steps", eval_steps=3,
            **SETTINGS | HALF,
        )  # fmt: skip
        given, drawn = Given(lambda _: ([7], False)), []
        trainer.engine = given
        usual = given.sample

        def sample(policy: Any, prompts: Any, length: int, temperature: float, stops: Any, pad: int, seeds: list[int]):
            drawn.extend(seeds)
            return usual(policy, prompts)

        given.sample = sample
        trainer.train()
        return drawn

    drawn = [seed for of_rank in together(run) for seed in of_rank]
    assert len(drawn) == len(set(drawn)) == 5 * 8  # three updates, one more to measure the last, and an evaluation


# Decisions


class On(TrainerCallback):
    """Does something on one rank at a step's event."""

    def __init__(self, rank: int, step: int, do: Callable[[Any], None], event: str = "on_step_end") -> None:
        def call(args: Any, state: Any, control: Any, **_: Any) -> None:
            if (ranks.index(), state.global_step) == (rank, step):
                do(control)

        setattr(self, event, call)


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_what_one_rank_asks_for_all_do(train, tmp_path, event: str) -> None:
    def stop(control: Any) -> None:
        control.should_save = control.should_training_stop = True

    for rank in together(lambda: train(**HALF, callbacks=[On(1, 2, stop, event)]), seconds=30):
        assert [row["step"] for row in rank["log"]] == [1, 2]
    if event == "on_step_end":
        (checkpoint,) = durable.newest_first(tmp_path / "out")
        assert durable.step(checkpoint) == 2 and durable.damage(checkpoint) is None


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(make_trainer, make_artifacts, share) -> None:
    artifacts = make_artifacts()

    def run(spoilt: Callable[[int], bool]) -> dict[str, Any]:
        trainer = make_trainer(shared=share(artifacts), **SETTINGS | HALF)
        usual, calls = trainer._losses, iter(range(1000))

        def losses(*args: Any) -> Iterator[Tensor]:
            bad = spoilt(next(calls))
            return (loss * math.nan if bad else loss for loss in usual(*args))

        trainer._losses = losses
        trainer.train()
        return outcome(trainer)

    two = together(lambda: run(lambda call: ranks.index() == 1 and call == 3))
    assert [one["skipped"] for one in two] == [1, 1] and same(*two)
    assert all(weight.isfinite().all() for weight in two[0]["weights"].values())


@pytest.mark.parametrize("role", ["policy", "value", "reference"])
def test_a_rank_with_other_weights_is_named(make_trainer, make_artifacts, share, role: str) -> None:
    artifacts = make_artifacts()

    def run(step: int) -> None:
        shared = share(artifacts)

        def spoil(_: Any) -> None:
            next(getattr(shared, role).parameters()).data.view(-1)[0] += 1e-6

        if not step and os.environ["RANK"] == "1":  # before they are connected
            spoil(None)
        trainer = make_trainer(
            shared=shared, save_strategy="steps", save_steps=2, callbacks=[On(1, step, spoil)], **SETTINGS | HALF
        )
        trainer.train()

    said = "rank 1 of 2 has other weights of `{}` than rank 0 after {} updates"
    with pytest.raises(AssertionError, match=said.format(role, 0)):
        together(run, 0)
    if role != "reference":
        with pytest.raises(AssertionError, match=said.format(role, 2)):
            together(run, 1)


# Checkpoints


def rest(one: dict[str, Any], step: int) -> list[dict[str, Any]]:
    return [row for row in one["log"] if row["step"] > step]


class Lucky:
    """A reward that draws."""

    def __call__(self, episodes: Episodes, *_: Any, **__: Any) -> Scores:
        total = torch.rand(len(episodes)) + random.random()
        return Scores(total, {"luck": total}, {})


def test_two_that_resume_end_as_two_that_never_stopped(train, tmp_path, demonstrations) -> None:
    """With replies of their own, bit for bit, from the checkpoint of all, which one rank has written."""
    settings: dict[str, Any] = {
        "given": False, "rewards": Lucky(), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9,
        "ptx_coef": 0.5, "ptx_dataset": demonstrations, "lr_scheduler_type": "cosine", **HALF,
    }  # fmt: skip
    whole = together(lambda: train(**settings, output_dir=str(tmp_path / "whole")))
    together(
        lambda: train(**settings, callbacks=[On(0, 2, lambda control: setattr(control, "should_training_stop", True))])
    )
    (file,) = (tmp_path / "out" / "checkpoint-2").glob("rng_state_1.pth")
    assert file.stat().st_size
    resumed = together(lambda: train(**settings, resume=True))
    for one, other in zip(whole, resumed, strict=True):
        assert same(one, other) and one["log"] == other["log"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_prompts(train, before: int, after: int) -> None:
    """With replies given, and twelve episodes an update, the end is that of one process without a break."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_mini_batches": 1}

    def run(number: int, **more: Any) -> list[dict[str, Any]]:
        return together(lambda: train(**batch(12 // number, 1), **settings, **more), processes=number)

    one = train(**batch(6, 2), **settings | {"save_strategy": "no"})
    run(before, callbacks=[On(0, 1, lambda control: setattr(control, "should_training_stop", True))])
    for rank in run(after, resume=True):
        alike(one, rank)
