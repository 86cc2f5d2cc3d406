"""The training loop around PPO's arithmetic: stopping, evaluating, guarding, budgeting, mixing in, and reporting."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo import trainer as trainer_module
from rlhf_pipeline.ppo.trainer import PPOTrainer, Scored

pytestmark = pytest.mark.slow

EVENTS = ("on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end", "on_train_end")
TIMING = ("eps", "rollout/seconds", "rollout/sampling_seconds", "rollout/tokens_per_second",
          "optimise/seconds", "optimise/tokens_per_second")  # fmt: skip


# One optimizer step an update, for what does not depend on how many there are.
QUICK = {"num_ppo_epochs": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


class On(TrainerCallback):
    """Calls a function with the trainer's state and control at some events."""

    def __init__(self, events: str | tuple[str, ...], do: Callable[[str, Any, Any], None]) -> None:
        for event in [events] if isinstance(events, str) else events:
            setattr(self, event, lambda args, state, control, event=event, **_: do(event, state, control))


def weights(shared: SharedBase, *roles: str) -> dict[str, torch.Tensor]:
    """A copy of roles' weights, heads included."""
    return {
        f"{role}.{name}": parameter.detach().clone()
        for role in roles or ("policy", "value")
        for name, parameter in getattr(shared, role).named_parameters()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[name], other[name]) for name in one)


def watch_scores(trainer: PPOTrainer) -> list[Scored]:
    """A list that takes everything the trainer scores from now on."""
    seen: list[Scored] = []
    score = trainer.score

    def watched(episodes: Any, rows: Any = None) -> Scored:
        seen.append(score(episodes, rows))
        return seen[-1]

    trainer.score = watched  # type: ignore[method-assign]
    return seen


def watch_prompts(trainer: PPOTrainer) -> list[list[list[int]]]:
    """A list that takes the prompts of every rollout from now on."""
    seen: list[list[list[int]]] = []
    roll_out = trainer.roll_out

    def watched(prompts: list[list[int]]) -> Any:
        seen.append(prompts)
        return roll_out(prompts)

    trainer.roll_out = watched  # type: ignore[method-assign]
    return seen


def logged(trainer: PPOTrainer, *names: str) -> list[Any]:
    """What was logged under these names, row by row, of the rows that have the first."""
    rows = [row for row in trainer.state.log_history if names[0] in row]
    return [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]


@pytest.fixture
def held_out() -> Dataset:
    """Seven prompts that are not among those of training."""
    draw = torch.Generator().manual_seed(7)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(5, 1024, (n,), generator=draw).tolist() for n in range(2, 9)]}
    )


@pytest.fixture
def demonstrations() -> Dataset:
    """Five texts of unequal length, of which the last few tokens are replies to learn."""
    draw = torch.Generator().manual_seed(8)
    ids = [torch.randint(5, 1024, (n,), generator=draw).tolist() for n in (6, 9, 4, 12, 7)]
    labels = [[-100] * (2 + i) + row[2 + i :] for i, row in enumerate(ids[:2] + ids[3:])]
    labels.insert(2, [-100, -100, -100, ids[2][3]])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


# Stopping


@pytest.mark.parametrize("event", EVENTS[:-2])
def test_a_callback_stops_training_after_the_update(make_trainer, held_out: Dataset, event: str) -> None:
    happened: list[str] = []

    def stop(event_now: str, state: Any, control: Any) -> None:
        happened.append(event_now)
        if event_now == event and state.global_step == (1 if event == "on_step_begin" else 2):
            control.should_training_stop = True

    trainer = make_trainer(
        max_steps=5, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        **QUICK,
    )  # fmt: skip
    trainer.add_callback(On(EVENTS, stop))
    before = weights(trainer.shared)
    trainer.train()
    assert trainer.state.global_step == 2 and logged(trainer, "episode") == [8, 16]
    assert happened.count("on_save") == 2
    assert happened[-1] == "on_train_end"
    assert not same(before, weights(trainer.shared))


def test_without_such_a_callback_all_updates_are_made_and_passes_are_counted(make_trainer) -> None:
    """Eight of twenty prompts an update: the third and the fifth end a pass, each over every prompt once."""
    happened: list[tuple[str, int]] = []
    trainer = make_trainer(max_steps=5, **QUICK)
    trainer.add_callback(
        On(("on_epoch_end", "on_train_end"), lambda event, state, _: happened.append((event, state.global_step)))
    )
    seen = watch_prompts(trainer)
    trainer.train()
    prompts = [tuple(prompt) for batch in seen for prompt in batch]
    assert sorted(prompts[:20]) == sorted(prompts[20:]) == sorted(map(tuple, trainer.train_dataset["input_ids"]))
    assert prompts[:20] != prompts[20:]
    assert happened == [("on_epoch_end", 3), ("on_epoch_end", 5), ("on_train_end", 5)]
    assert logged(trainer, "epoch") == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


# Evaluating


def test_evaluation_gives_the_same_numbers_twice_and_other_ones_of_another_policy(
    make_trainer, held_out: Dataset
) -> None:
    trainer = make_trainer(eval_dataset=held_out, max_steps=1, learning_rate=1e-2)
    state = torch.get_rng_state()
    first = trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(12345)
    assert trainer.evaluate() == first
    assert first["eval_objective/kl"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_objective/scores"] != first["eval_objective/scores"]


def test_evaluation_is_of_every_held_out_prompt_once_and_of_no_other(make_trainer, held_out: Dataset) -> None:
    """Seven prompts, three at a time; the means are over replies, not over batches."""
    trainer = make_trainer(
        eval_dataset=held_out, per_device_eval_batch_size=3, max_steps=1, learning_rate=1e-2, missing_eos_penalty=0.5
    )
    trainer.train()
    prompts, scored = watch_prompts(trainer), watch_scores(trainer)
    metrics = trainer.evaluate()
    assert [prompt for batch in prompts for prompt in batch] == held_out["input_ids"]
    assert [len(batch) for batch in prompts] == [3, 3, 1]
    scores, kls, lengths, ended = [], [], [], []
    for batch in scored:
        for i, length in enumerate(batch.episodes.reply_lengths.tolist()):
            has_eos = trainer.processing_class.eos_token_id in batch.episodes.replies[i, :length].tolist()
            scores.append(batch.scores[i].item() - (0.0 if has_eos else 0.5))
            kls.append((batch.log_probs - batch.ref_log_probs)[i, :length].sum().item())
            lengths.append(length)
            ended.append(float(has_eos))
    assert metrics["eval_objective/scores"] == pytest.approx(sum(scores) / 7, abs=1e-5)
    assert metrics["eval_objective/kl"] == pytest.approx(sum(kls) / 7, abs=1e-5) and sum(kls) != 0
    assert metrics["eval_objective/rlhf_reward"] == pytest.approx((sum(scores) - 0.05 * sum(kls)) / 7, abs=1e-5)
    assert metrics["eval_reply/length"] == pytest.approx(sum(lengths) / 7)
    assert metrics["eval_reply/ended"] == pytest.approx(sum(ended) / 7)


def test_evaluating_changes_nothing_of_training(make_trainer, held_out: Dataset, tmp_path: Path) -> None:
    plain = make_trainer(max_steps=3, num_sample_generations=3, samples_file=tmp_path / "plain.jsonl", **QUICK)
    plain.train()
    evaluated = make_trainer(
        max_steps=3, num_sample_generations=3, samples_file=tmp_path / "evaluated.jsonl",
        eval_dataset=held_out, eval_strategy="steps", eval_steps=1, eval_on_start=True, **QUICK,
    )  # fmt: skip
    evaluated.train()
    assert logged(evaluated, "eval_objective/kl", "step")[0] == (0.0, 0)
    assert [step for _, step in logged(evaluated, "eval_objective/kl", "step")] == [0, 1, 2, 3]
    assert same(weights(plain.shared), weights(evaluated.shared))
    assert logged(plain, "objective/scores", "objective/kl") == logged(evaluated, "objective/scores", "objective/kl")
    samples = {
        name: [row for line in (tmp_path / f"{name}.jsonl").open() if (row := json.loads(line))["split"] == "train"]
        for name in ("plain", "evaluated")
    }
    assert samples["plain"] == samples["evaluated"] and samples["plain"]


def test_evaluation_needs_held_out_prompts(make_trainer, held_out: Dataset) -> None:
    with pytest.raises(ValueError, match="held out"):
        make_trainer(eval_strategy="steps", eval_steps=1)
    trainer = make_trainer()
    with pytest.raises(ValueError, match="no held-out prompts"):
        trainer.evaluate()
    assert trainer.evaluate(held_out)["eval_objective/kl"] == 0
    assert "other_objective/kl" in trainer.evaluate(held_out, metric_key_prefix="other")


# Samples


def ending_token(make_trainer, rows: int, **settings: Any) -> int:
    """The token that, were it the stop token, would give a run's first replies the most unequal lengths."""
    trainer = make_trainer(**settings)
    scored = watch_scores(trainer)
    trainer.train()
    replies = scored[0].episodes.replies[:rows].tolist()
    tokens = sorted({token for reply in replies for token in reply[1:-1]})
    return max(tokens, key=lambda token: len({[*reply, token].index(token) for reply in replies}))


def test_samples_are_the_replies_that_were_sampled(make_trainer, held_out: Dataset, tokenizer, tmp_path: Path) -> None:
    """Four updates, two of which are to be shown: the first and the third."""
    settings = {"response_length": 12, "temperature": 0.4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    stop = ending_token(make_trainer, 4, max_steps=1, **settings)
    trainer = make_trainer(
        max_steps=4, num_sample_generations=2, samples_file=tmp_path / "samples.jsonl", stop_token_id=stop,
        eval_dataset=held_out, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=7, **settings,
    )  # fmt: skip
    prompts, scored = watch_prompts(trainer), watch_scores(trainer)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").open(encoding="utf-8")]
    assert all(set(row) == {"step", "split", "prompt", "completion", "score", "kl", "ended"} for row in rows)
    # Rollouts in order: updates 1 and 2, evaluation, updates 3 and 4, evaluation.
    shown = [(0, 1, "train"), (2, 2, "eval"), (3, 3, "train"), (5, 4, "eval")]
    assert [(row["step"], row["split"]) for row in rows] == [
        (step, split) for _, step, split in shown for _ in range(4)
    ]
    for (rollout, _, _), four in zip(shown, [rows[i : i + 4] for i in range(0, 16, 4)], strict=True):
        batch = scored[rollout]
        for i, row in enumerate(four):
            reply = batch.episodes.replies[i][batch.episodes.mask[i]].tolist()
            assert row["prompt"] == tokenizer.decode(prompts[rollout][i])
            assert row["completion"] == tokenizer.decode(reply, skip_special_tokens=True) and row["completion"]
            assert row["ended"] == (stop in reply) == (reply[-1] == stop)
            assert row["score"] == pytest.approx(batch.scores[i].item())
            kl = (batch.log_probs[i] - batch.ref_log_probs[i])[: len(reply)].sum().item()
            assert row["kl"] == pytest.approx(kl, abs=1e-5)
    assert {row["ended"] for row in rows} == {True, False}


# Guard against gradients that are not finite


@contextmanager
def steps_counted() -> Iterator[list[int]]:
    """A list with an entry for every optimizer step that is taken meanwhile."""
    steps: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        yield steps
    finally:
        handle.remove()


def spoil(trainer: PPOTrainer, what: str, value: float, updates: set[int]) -> list[dict[str, torch.Tensor]]:
    """Make numbers not finite during some updates; a list that takes the weights before and after each update.

    Args:
        trainer: before it trains.
        what: `reward` or `value` for that head, `value gradient` for nothing but the gradient of the value head.
        value: what to put there.
        updates: which, counted from 1.
    """
    shared = trainer.shared
    head = (shared.reward if what == "reward" else shared.value).score.weight
    after = [weights(shared)]
    kept: list[torch.Tensor] = []
    now: list[bool] = []
    if what == "value gradient":
        head.register_hook(lambda gradient: gradient * value if now else gradient)

    def do(event: str, state: Any, _: Any) -> None:
        if event == "on_step_begin" and state.global_step + 1 in updates:
            now.append(True)
            if what != "value gradient":
                kept.append(head.detach().clone())
                head.data.fill_(value)
        if event == "on_step_end":
            if kept:
                head.data.copy_(kept.pop())
            now.clear()
            after.append(weights(shared))

    trainer.add_callback(On(("on_step_begin", "on_step_end"), do))
    return after


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["reward", "value", "value gradient"])
def test_a_step_whose_gradient_is_not_finite_is_skipped(make_trainer, what: str, value: float) -> None:
    """The second update of three, with two steps in it."""
    trainer = make_trainer(max_steps=3, normalize_scores=True, target_kl=1.0)
    after = spoil(trainer, what, value, {2})
    with steps_counted() as steps:
        trainer.train()
    assert len(steps) == 4
    assert logged(trainer, "skipped_steps") == [0, 2, 2]
    assert not same(after[0], after[1]) and same(after[1], after[2]) and not same(after[2], after[3])
    assert all(tensor.isfinite().all() for tensor in after[3].values())
    if what == "value":  # what would have moved without the guard is the other role too
        assert same(
            {name: tensor for name, tensor in after[1].items() if name.startswith("policy")},
            {name: tensor for name, tensor in after[2].items() if name.startswith("policy")},
        )
    third = next(row for row in trainer.state.log_history if row["step"] == 3)
    assert all(math.isfinite(number) for number in third.values())


def test_too_many_skipped_steps_in_a_row_end_training_and_say_what_to_change(make_trainer) -> None:
    trainer = make_trainer(max_steps=5, max_skipped_steps=3)
    after = spoil(trainer, "reward", math.nan, {2, 3, 4, 5})
    with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .* update 3\b") as error:
        trainer.train()
    for key in ("learning_rate", "log_ratio_clamp", "score_clip"):
        assert f"`{key}`" in str(error.value)
    assert same(after[1], weights(trainer.shared))
    assert trainer.state.global_step == 2


def test_a_step_that_is_taken_begins_the_count_anew(make_trainer) -> None:
    trainer = make_trainer(max_steps=4, max_skipped_steps=3)
    spoil(trainer, "reward", math.nan, {1, 3})
    trainer.train()
    assert logged(trainer, "skipped_steps") == [2, 2, 4, 4]


# The KL budget

FAR = {"learning_rate": 6e-3, "lr_scheduler_type": "constant", "kl_estimator": "k3", "missing_eos_penalty": 0.3}


def journey(trainer: PPOTrainer) -> tuple[list[dict[str, torch.Tensor]], list[float], list[float]]:
    """Train; the policy's weights after each number of updates, and the KL and score that it then had."""
    after = [weights(trainer.shared, "policy")]
    trainer.add_callback(On("on_step_end", lambda *_: after.append(weights(trainer.shared, "policy"))))
    scored = watch_scores(trainer)
    trainer.train()
    eos = trainer.processing_class.eos_token_id
    kls, scores = [], []
    for batch in scored:
        inside = torch.arange(batch.kl.shape[1]) < batch.episodes.reply_lengths[:, None]
        log_ratio = (batch.log_probs - batch.ref_log_probs).double()
        kls.append(((torch.exp(-log_ratio) - 1 + log_ratio) * inside).sum(1).mean().item())
        missing = ~((batch.episodes.replies == eos) & inside).any(1)
        scores.append((batch.scores - 0.3 * missing).mean().item())
    return after, kls, scores


@pytest.fixture
def crossing(make_trainer) -> tuple[float, int, int]:
    """A budget that a policy passes, after how many updates, and after how many it had the best score before."""
    _, kls, scores = journey(make_trainer(max_steps=7, **FAR))
    for exceeded in range(4, len(kls)):
        best = max(range(exceeded), key=lambda step: scores[step])
        if kls[exceeded] > 1.1 * max(kls[:exceeded]) and 0 < best < exceeded - 1:
            return (kls[exceeded] + max(kls[:exceeded])) / 2, exceeded, best
    raise AssertionError(f"no policy of this run is of use: {kls=} {scores=}")


@pytest.mark.parametrize(("at", "every"), [("on the way", 3), ("at the end", 1)])
def test_over_its_kl_budget_training_stops_and_goes_back_to_the_best_policy(
    make_trainer, crossing: tuple[float, int, int], at: str, every: int
) -> None:
    """The budget is passed by the last update, too, whose KL no later update would measure."""
    budget, exceeded, best = crossing
    steps = 7 if at == "on the way" else exceeded
    trainer = make_trainer(max_steps=steps, kl_budget=budget, logging_steps=every, **FAR)
    ended: list[str] = []
    trainer.add_callback(On("on_train_end", lambda event, *_: ended.append(event)))
    after, kls, scores = journey(trainer)
    assert len(after) == len(kls) == exceeded + 1  # nothing was trained after that
    assert same(weights(trainer.shared, "policy"), after[best])
    assert trainer.state.global_step == exceeded and ended == ["on_train_end"]
    last = trainer.state.log_history[-1]
    assert (last.get("kl_budget/best_step"), last.get("kl_budget/exceeded_at_step")) == (best, exceeded)
    assert last["objective/kl"] == pytest.approx(kls[best], rel=1e-4)
    assert last["objective/scores"] == pytest.approx(scores[best], rel=1e-4)
    assert last["kl_budget/exceeded_with"] == pytest.approx(kls[exceeded], rel=1e-4)


def test_within_its_kl_budget_training_is_as_without(make_trainer) -> None:
    plain = make_trainer(max_steps=3, **QUICK)
    plain.train()
    bounded = make_trainer(max_steps=3, kl_budget=1e6, **QUICK)
    bounded.train()
    assert same(weights(plain.shared), weights(bounded.shared))
    assert not logged(bounded, "kl_budget/best_step")


def test_a_kl_budget_that_is_passed_at_once_is_an_error(make_trainer) -> None:
    trainer = make_trainer(max_steps=4, kl_budget=1e-6, **FAR)
    with pytest.raises(RuntimeError, match=r"`kl_budget`.*`learning_rate`"):
        trainer.train()
    assert trainer.state.global_step == 1


# Demonstrations mixed in


def log_likelihood(shared: SharedBase, demonstrations: Dataset) -> float:
    """The log-probability of all labelled tokens, one text at a time through the whole causal LM."""
    total = 0.0
    with torch.no_grad():
        for row in demonstrations:
            logits = shared.policy(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total -= cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").item()
    return total


def test_mixing_demonstrations_in_makes_them_likelier(make_trainer, demonstrations: Dataset) -> None:
    likelihoods = {}
    for coefficient in (0.0, 1.0):
        mixed = {"ptx_dataset": demonstrations} if coefficient else {}
        trainer = make_trainer(max_steps=3, kl_coef=0.0, vf_coef=0.0, ptx_coef=coefficient, **mixed)
        before = log_likelihood(trainer.shared, demonstrations)
        trainer.train()
        likelihoods[coefficient] = log_likelihood(trainer.shared, demonstrations)
    assert likelihoods[1.0] > before + 1
    assert likelihoods[1.0] > likelihoods[0.0] + 1
    losses = logged(trainer, "loss/ptx")
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradient_of_demonstrations_is_that_of_their_cross_entropy(
    make_trainer, demonstrations: Dataset, parts: int
) -> None:
    """With advantages of 0 nothing else is in the policy's gradient; four texts a step, in one, two or four parts."""
    four = demonstrations.select(range(4))
    trainer = make_trainer(
        per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts, num_ppo_epochs=1, max_grad_norm=0.0,
        ptx_coef=0.7, ptx_dataset=four,
    )  # fmt: skip
    policy = trainer.shared.policy
    taken: dict[str, torch.Tensor] = {}
    handle = register_optimizer_step_pre_hook(
        lambda *_: taken.update({name: one.grad.clone() for name, one in policy.named_parameters()})
    )
    try:
        scored = trainer.score(trainer.roll_out(list(trainer.train_dataset["input_ids"])[:4]))
        before = weights(trainer.shared, "policy")
        means = trainer.optimise(scored, torch.zeros_like(scored.values), scored.values)
    finally:
        handle.remove()
    with torch.no_grad():
        for name, one in policy.named_parameters():
            one.copy_(before[f"policy.{name}"])
    longest = max(len(row) for row in four["input_ids"])
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in four["input_ids"]])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in four["input_ids"]])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in four["labels"]])
    logits = policy(input_ids=ids, attention_mask=mask).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (0.7 * loss).backward()
    for name, one in policy.named_parameters():
        torch.testing.assert_close(taken[name], one.grad, rtol=1e-4, atol=1e-6)
    assert means["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)


def test_demonstrations_take_turns_in_an_order_drawn_anew_each_pass(
    make_trainer, demonstrations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five texts, four a step, two steps a pass, two passes an update, five updates: sixteen passes over the texts."""
    seen: list[int] = []
    known = {tuple(row): i for i, row in enumerate(demonstrations["input_ids"])}
    loss = trainer_module.demonstration_loss

    def watched(policy: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for row in ids.tolist():
            seen.extend(number for text, number in known.items() if text == tuple(row[: len(text)]))
        return loss(policy, ids, labels)

    monkeypatch.setattr(trainer_module, "demonstration_loss", watched)
    make_trainer(max_steps=5, num_mini_batches=2, ptx_coef=0.1, ptx_dataset=demonstrations).train()
    assert len(seen) == 5 * 2 * 2 * 4
    passes = [tuple(seen[i : i + 5]) for i in range(0, len(seen), 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len(set(passes)) > 8


# Value warm-up and the KL coefficient


def test_during_value_warm_up_the_value_model_alone_moves(make_trainer, demonstrations: Dataset) -> None:
    """Neither the optimizer's weight decay nor demonstrations may move the policy meanwhile."""
    trainer = make_trainer(
        max_steps=3, value_warmup_updates=2, weight_decay=0.1, ptx_coef=1.0, ptx_dataset=demonstrations
    )
    policies, values = [weights(trainer.shared, "policy")], [weights(trainer.shared, "value")]

    def note(*_: Any) -> None:
        policies.append(weights(trainer.shared, "policy"))
        values.append(weights(trainer.shared, "value"))

    trainer.add_callback(On("on_step_end", note))
    trainer.train()
    assert [same(one, other) for one, other in pairwise(policies)] == [True, True, False]
    assert [same(one, other) for one, other in pairwise(values)] == [False, False, False]
    assert logged(trainer, "objective/kl") == [0, 0, 0]
    assert [row["step"] for row in trainer.state.log_history if "loss/policy_avg" in row] == [3]
    assert [row["step"] for row in trainer.state.log_history if "loss/value_avg" in row] == [1, 2, 3]


def test_the_kl_coefficient_follows_kl_and_the_log_shows_it(make_trainer) -> None:
    """It sinks while policy and reference are equal, and rises as soon as KL is above the target."""
    trainer = make_trainer(max_steps=5, kl_coef=0.1, target_kl=0.05, kl_horizon=40, **FAR)
    trainer.train()
    coefficients, kls, rewards, scores, losses = zip(
        *logged(
            trainer,
            "objective/kl_coef", "objective/kl", "objective/rlhf_reward", "objective/scores",
            "objective/non_score_reward",
        ),
        strict=True,
    )  # fmt: skip
    expected = 0.1
    for coefficient, kl in zip(coefficients, kls, strict=True):
        assert coefficient == pytest.approx(expected)
        expected *= 1 + max(-0.2, min(0.2, kl / 0.05 - 1)) * 8 / 40
    assert coefficients[1] < coefficients[0] and kls[0] == 0
    assert all(kl > 0.05 for kl in kls[1:])
    assert coefficients[1] < coefficients[2] < coefficients[3] < coefficients[4]
    for coefficient, kl, reward, score, loss in zip(coefficients, kls, rewards, scores, losses, strict=True):
        assert loss == pytest.approx(-coefficient * kl, abs=1e-7)
        assert reward == pytest.approx(score - coefficient * kl, abs=1e-6)


# What is logged


def test_numbers_logged_every_third_update_are_means_and_the_rest_comes_at_the_end(make_trainer) -> None:
    each = make_trainer(max_steps=5, target_kl=0.1, **QUICK)
    each.train()
    third = make_trainer(max_steps=5, target_kl=0.1, logging_steps=3, **QUICK)
    third.train()
    assert [row["step"] for row in third.state.log_history] == [3, 5]
    assert same(weights(each.shared), weights(third.shared))
    rows = each.state.log_history
    for row, parts in zip(third.state.log_history, (rows[:3], rows[3:]), strict=True):
        assert row.keys() == parts[0].keys()
        for name, value in row.items():
            if name in ("step", "epoch", "episode", "lr", "lr_value", "skipped_steps", "objective/kl_coef"):
                assert value == parts[-1][name]
            elif name not in TIMING:
                assert value == pytest.approx(sum(part[name] for part in parts) / len(parts), rel=1e-6, abs=1e-9)
            assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    ("quantization", "dtype", "bf16"),
    [("none", "float32", False), ("none", "bfloat16", True), ("nf4", "float32", False), ("nf4", "bfloat16", True)],
)
def test_at_the_first_update_kl_is_0_and_the_ratio_1(
    make_trainer, make_artifacts, share, quantization: str, dtype: str, bf16: bool
) -> None:
    """Whatever the arithmetic, since rollout and optimisation do the same; generation agrees where that is exact."""
    artifacts = make_artifacts("llama", quantization)
    shared = share(artifacts._replace(spec=artifacts.spec.model_copy(update={"dtype": dtype})))
    trainer = make_trainer(
        shared=shared, bf16=bf16, num_ppo_epochs=1, max_steps=1, response_length=12, local_rollout_forward_batch_size=3
    )
    trainer.train()
    (row,) = trainer.state.log_history
    assert row["objective/kl"] == 0
    assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert row["val/ratio_var"] == pytest.approx(0, abs=1e-9)
    assert row["policy/clipfrac_avg"] == row["skipped_steps"] == 0
    assert row["rollout/log_prob_gap_mean"] <= row["rollout/log_prob_gap_max"]
    if dtype == "float32":
        assert row["rollout/log_prob_gap_max"] < 1e-4
