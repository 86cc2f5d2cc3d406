"""Settings and data of PPO that cannot work are refused in words that name the key, before anything is trained."""

import dataclasses
from typing import Any

import pytest
from datasets import Dataset

from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.prompts import check_data


def config(**settings: Any) -> PPOConfig:
    return PPOConfig(**{"use_cpu": True, "bf16": False, "report_to": "none", **settings})


@pytest.mark.floor
def test_every_key_of_trls_config_is_here_with_its_type_and_default() -> None:
    """TRL 1.12 is the last with a PPOConfig; two of its defaults are ours, as `docs/ppo.md` says.

    And `stop_token_id` may be several.
    """
    reason = "TRL's own PPOConfig, to compare with, is in TRL 1.12 alone"
    theirs = pytest.importorskip("trl.experimental.ppo", reason=reason).PPOConfig
    ours = {field.name: field for field in dataclasses.fields(PPOConfig)}
    differ = {
        field.name
        for field in dataclasses.fields(theirs)
        if (field.type, field.default) != (ours[field.name].type, ours[field.name].default)
    }
    assert differ == {"logging_steps", "save_total_limit", "stop_token_id"}


def test_episodes_and_updates_are_counted_under_trls_names() -> None:
    """100 prompts; 3 passes over them are 300 episodes, 24 an update in one process, and 48 in two."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6, "num_mini_batches": 3}
    one, two, stepped, counted = (
        config(**settings, **more) for more in ({}, {}, {"max_steps": 5}, {"total_episodes": 25})
    )
    one.count(100, 1)
    assert (one.total_episodes, one.num_total_batches, one.world_size) == (300, 13, 1)
    assert (one.batch_size, one.local_batch_size, one.mini_batch_size, one.local_mini_batch_size) == (24, 24, 8, 8)
    assert one.micro_batch_size == 4
    two.count(100, 2)
    assert (two.total_episodes, two.num_total_batches, two.world_size) == (300, 7, 2)
    assert (two.batch_size, two.local_batch_size, two.mini_batch_size, two.local_mini_batch_size) == (48, 24, 16, 8)
    assert two.micro_batch_size == 8
    stepped.count(100, 2)
    assert (stepped.total_episodes, stepped.num_total_batches) == (240, 5)
    counted.count(100, 1)
    assert (counted.total_episodes, counted.num_total_batches) == (25, 2)


def test_words_that_are_no_choice_are_refused() -> None:
    for key, word in (("stop_token", "pad"), ("kl_estimator", "k2")):
        with pytest.raises(ValueError, match=f"`{key}` must be one of .*, not {word}"):
            config(**{key: word})
    with pytest.raises(ValueError, match="`stop_token_id` is an empty list"):
        config(stop_token_id=[])


# A key, the nearest value that is refused, and one that is not.
BOUNDS = [
    ("per_device_train_batch_size", 0, 1),
    ("per_device_eval_batch_size", 0, 1),
    ("gradient_accumulation_steps", 0, 1),
    ("num_mini_batches", 0, 1),
    ("num_ppo_epochs", 0, 1),
    ("response_length", 0, 1),
    ("local_rollout_forward_batch_size", 0, 1),
    ("kl_horizon", 0, 1),
    ("max_skipped_steps", 0, 1),
    ("num_train_epochs", 0, 0.5),
    ("total_episodes", 0, 1),
    ("value_warmup_updates", -1, 0),
    ("num_sample_generations", -1, 0),
    ("kl_coef", -1e-9, 0.0),
    ("ptx_coef", -1e-9, 0.0),
    ("vf_coef", -1e-9, 0.0),
    ("learning_rate", -1e-9, 0.0),
    ("value_learning_rate", -1e-9, 0.0),
    ("max_grad_norm", -1e-9, 0.0),
    ("temperature", 0.0, 1e-9),
    ("cliprange", 0.0, 1e-9),
    ("cliprange_value", 0.0, 1e-9),
    ("score_clip", 0.0, 1e-9),
    ("log_ratio_clamp", 0.0, 1e-9),
    ("target_kl", 0.0, 1e-9),
    ("kl_budget", 0.0, 1e-9),
    ("missing_eos_penalty", 0.0, 1e-9),
    ("gamma", -1e-9, 0.0),
    ("gamma", 1 + 1e-9, 1.0),
    ("lam", -1e-9, 0.0),
    ("lam", 1 + 1e-9, 1.0),
]


@pytest.mark.parametrize(("key", "bad", "good"), BOUNDS)
def test_a_value_out_of_bounds_is_refused_by_name(key: str, bad: float, good: float) -> None:
    with pytest.raises(ValueError, match=rf"`{key}` must be .* and it is {bad}"):
        config(**{key: bad})
    assert getattr(config(**{key: good}), key) == good


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, ("missing_eos_score", "missing_eos_penalty")),
        ({"stop_token": "eos", "stop_token_id": 0}, ("stop_token", "stop_token_id")),
        ({"total_episodes": 8, "max_steps": 1}, ("total_episodes", "max_steps")),
    ],
)
def test_keys_that_contradict_each_other_are_refused(settings: dict[str, Any], keys: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"`{keys[0]}` and `{keys[1]}` exclude each other"):
        config(**settings)
    for key in keys:
        config(**{key: settings[key]})


BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 16 episodes cannot be divided into 3 mini-batches"):
        config(**BATCH, num_mini_batches=3)
    config(**BATCH, num_mini_batches=16)


def test_whitening_over_few_episodes_of_all_processes_is_refused() -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 8})
    few = config(per_device_train_batch_size=2, gradient_accumulation_steps=2, whiten_rewards=True)
    with pytest.raises(ValueError, match="`whiten_rewards` needs updates of at least 8 episodes, and they have 4"):
        check_data(few, rows, None, None)
    check_data(few, rows, None, None, processes=2)
    few.num_mini_batches = 4
    check_data(few, rows, None, None, processes=2)


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="does not train in float16"):
        config(fp16=True)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_waits_for_a_metric_is_refused(name: str) -> None:
    """Transformers itself refuses it only without evaluation."""
    with pytest.raises(ValueError, match=f"`lr_scheduler_type: {name}` waits for a metric"):
        config(lr_scheduler_type=name, eval_strategy="steps")
    with pytest.raises(ValueError, match=f"lr_scheduler_type.* {name}"):
        config(lr_scheduler_type=name)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"input_ids": [[5, 6]] * 8, "labels": [[-100, 6]] * 8})


EIGHT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def test_fewer_prompts_than_a_batch_are_refused_and_as_many_are_not(make_trainer, prompts: Dataset) -> None:
    """TRL would wait for ever for a whole batch."""
    with pytest.raises(ValueError, match="7 prompts are fewer than one batch of 8") as error:
        make_trainer(train_dataset=prompts.select(range(7)), **EIGHT)
    for key in EIGHT:
        assert f"`{key}`" in str(error.value)
    trainer = make_trainer(train_dataset=prompts.select(range(8)), max_steps=2, num_ppo_epochs=1, **EIGHT)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.epoch) == (2, 2)


def test_a_batch_is_that_of_all_processes(rows: Dataset) -> None:
    check_data(config(**EIGHT), rows, None, None, processes=1)
    with pytest.raises(ValueError, match="8 prompts are fewer than one batch of 16, which 2 processes share: lower"):
        check_data(config(**EIGHT), rows, None, None, processes=2)


def test_an_empty_prompt_is_refused(rows: Dataset) -> None:
    empty = Dataset.from_dict({"input_ids": [*rows["input_ids"], []]})
    with pytest.raises(ValueError, match="a prompt is empty"):
        check_data(config(**EIGHT), empty, None, None)
    check_data(config(**EIGHT), rows, None, None)


def test_evaluation_without_prompts_for_it_is_refused(rows: Dataset) -> None:
    evaluated = config(**EIGHT, eval_strategy="steps")
    with pytest.raises(ValueError, match="`eval_strategy` is set, and no prompts are held out"):
        check_data(evaluated, rows, None, None)
    check_data(evaluated, rows, rows, None)


def test_a_weight_of_demonstrations_and_demonstrations_need_each_other(rows: Dataset) -> None:
    without, weighted = config(**EIGHT), config(**EIGHT, ptx_coef=0.5)
    for args, demonstrations in ((weighted, None), (without, rows)):
        with pytest.raises(ValueError, match=r"`ptx_coef` and .*demonstrations.* go together"):
            check_data(args, rows, None, demonstrations)
    check_data(weighted, rows, None, rows)
    check_data(without, rows, None, None)
