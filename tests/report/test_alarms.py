"""Alarms: that they ring where something happened, and not by chance; and that their advice fits what came before."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_run

from rlhf_pipeline.recipe.yaml import dump, parse_document
from rlhf_pipeline.report import alarms, fall, gather

SERIES = 4000  # simulated runs: a share of 0.05 of them is known to 0.0034, one of 0.8 to 0.0063


@pytest.fixture
def run(tmp_path) -> Path:
    """A sound run."""
    run = report_run.write(tmp_path / "run")
    sound = {"chosen": 1.0, "rejected": 0.0, "chosen_length": 5, "rejected_length": 5}
    report_run.write_lines(run / "reward" / "pairs.jsonl", [sound] * 60)
    return run


def found(run: Path) -> list[alarms.Alarm]:
    return alarms.alarms(gather.read_run(run))


def texts(run: Path) -> str:
    return "\n".join(f"{one.level} {one.where} {one.text}" for one in found(run))


def log(run: Path, stage: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to what a stage logged."""
    with (run / stage / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 61 + i, **row}) + "\n" for i, row in enumerate(rows))


def along(run: Path, judge: Any, score: Any = None, error: float | None = None) -> None:
    """Replace what PPO logged by the judge's means and the scores on its way."""
    score = np.arange(len(judge)) if score is None else score
    rows = [
        {"step": 5 * i, "gold/judge_mean": float(mean), "gold/score_mean": float(score[i]), "gold/kl": float(i)}
        | ({} if error is None else {"gold/judge_mean_se": error})
        for i, mean in enumerate(judge)
    ]
    report_run.write_lines(run / "ppo" / "metrics.jsonl", rows)


def of_recipe(run: Path, **values: Any) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(dump(parse_document(recipe.read_text(), "")[0] | values))


# A fall of the judge's mean, and chance


@functools.lru_cache
def room(looks: int, known: bool) -> float:
    """By how many standard errors a line may fall: what `fell_since` finds for each series anew, found once."""
    noise = np.random.default_rng(0).standard_normal((fall.DRAWS, looks))
    unit = np.ones(fall.DRAWS) if known else fall._from_neighbours(noise)
    return float(np.quantile((noise @ fall._lines(looks).T).max(1) / unit, 1 - fall.CHANCE))


def rings(means: np.ndarray, errors: np.ndarray | None) -> float:
    """The share of series `[SERIES, looks]` in which a fall is seen; `errors` are of each look, or not logged."""
    looks = means.shape[1]
    unit = fall._from_neighbours(means) if errors is None else np.sqrt((errors**2).mean(1))
    seen = (means @ fall._lines(looks).T).max(1) > unit * room(looks, errors is not None)
    for i in range(3):  # the short cut here does as the function does
        error = None if errors is None else float(unit[i])
        assert (fall.fell_since(means[i], error) is not None) == seen[i]
    return float(seen.mean())


def noughts_and_ones(truth: np.ndarray, replies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of a judge who says 0 or 1, and their standard errors as they are logged."""
    means = np.random.default_rng(seed).binomial(replies, truth, (SERIES, len(truth))) / replies
    return means, np.sqrt(means * (1 - means) / (replies - 1))


def ratings(truth: np.ndarray, replies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a judge who rates from 1 to 10."""
    drawn = np.random.default_rng(seed).normal(truth[:, None], 2.5, (SERIES, len(truth), replies))
    given = drawn.round().clip(1, 10)
    return given.mean(2), given.std(2, ddof=1) / np.sqrt(replies)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("looks", [6, 11])
@pytest.mark.parametrize(
    ("judge", "truth", "replies"),
    [(noughts_and_ones, 0.5, 104), (noughts_and_ones, 0.9, 24), (ratings, 6.0, 104), (ratings, 9.0, 24)],
)
def test_noise_of_a_constant_judge_raises_few_alarms(judge, truth, replies, looks, logged):
    """An alarm is false in at most one of twenty such runs, whatever the reward model's score does."""
    means, errors = judge(np.full(looks, truth), replies, seed=looks)
    assert rings(means, errors if logged else None) < 0.055


FALLS = {
    "at once, half way": np.r_[np.full(5, 0.6), np.full(5, 0.45)],
    "slowly, from half way on": np.r_[np.full(5, 0.6), np.linspace(0.6, 0.45, 6)[1:]],
    "slowly, all the way": np.linspace(0.6, 0.45, 10),
    "after a rise": np.r_[np.linspace(0.4, 0.6, 4), np.full(3, 0.6), np.linspace(0.6, 0.45, 4)[1:]],
    "late": np.r_[np.full(8, 0.6), np.full(2, 0.45)],
}


@pytest.mark.parametrize("how", FALLS)
def test_a_real_fall_rings_in_four_of_five_runs(how):
    """By 0.15, as a judge of 104 replies sees it at 10 looks, who says 0 or 1."""
    means, errors = noughts_and_ones(FALLS[how], 104, seed=3)
    assert rings(means, errors) > 0.8


def test_what_is_logged_of_a_judge_of_noughts_and_ones_may_be_missing(run):
    """Its noise follows from its means, and the number of replies that the recipe has."""
    of_recipe(run, evaluate={"data": {"path": "x.jsonl"}, "judge": "a:b", "n": 104})
    along(run, FALLS["late"])
    assert "Reward hacking: since step" in texts(run)
    along(run, [0.6, 0.6, 0.6, 0.56, 0.58, 0.55])
    assert "hacking" not in texts(run)


def test_other_ratings_without_their_error_are_held_against_their_neighbours(run):
    wave = np.array([0, 0.3, -0.2, 0.1, -0.3, 0.2, 0, -0.1, 0.25, -0.25])
    along(run, 6 + wave)
    assert "hacking" not in texts(run)
    along(run, 6 + wave - np.r_[np.zeros(5), np.arange(5)])
    assert "since step" in texts(run)


def test_the_alarm_names_steps_numbers_and_what_the_stage_can_change(run):
    along(run, [0.5, 0.7, 0.9, 0.6, 0.3], error=0.04)
    said = (
        "bad ppo Reward hacking: since step 10 the judge's mean fell from 0.9 to 0.3, while the score that it "
        "learns from rose, from 2 to 4. "
    )
    assert said + "Raise kl_coef, or set kl_budget; at that step KL was 2." in texts(run)
    report_run.change(run, "ppo", inputs={"trainer.kl_coef": 0.05})
    assert "Raise kl_coef (now 0.05), or set kl_budget" in texts(run)
    report_run.change(run, "ppo", inputs={"trainer.kl_coef": 0.05, "trainer.kl_budget": 8})
    assert "Lower kl_budget (now 8); at that step KL was 2." in texts(run)


def test_a_score_that_ends_a_hair_lower_than_at_the_best_step_is_hacked_all_the_same(run):
    along(run, [0.5, 0.7, 0.9, 0.8, 0.7, 0.6], [1, 4, 5.02, 4.98, 5.0, 5.01], error=0.04)
    assert "Reward hacking" in texts(run)
    assert "the score that it learns from stayed, from 5.02 to 5.01" in texts(run)


def test_a_judge_who_falls_with_the_score_is_said_too(run):
    along(run, [0.5, 0.7, 0.9, 0.6, 0.3], [1, 4, 5, 3, 1], error=0.04)
    assert "bad ppo Training went wrong: since step 10 the judge's mean fell from 0.9 to 0.3" in texts(run)
    assert "hacking" not in texts(run)


def test_hacking_of_a_reward_model_with_alarms_leads_to_it(run):
    along(run, [0.5, 0.7, 0.9, 0.6, 0.3], error=0.04)
    assert "first see to" not in texts(run)
    report_run.change(run, "reward", metrics={"eval_accuracy": 0.5, "eval_pairs": 200})
    assert "But first see to the alarms of reward" in texts(run)


def test_a_policy_that_the_judge_likes_less_than_what_it_started_from(run):
    """The judge's final means are 0.75 of all stages; that of DPO is worse by 3.5 of their common standard error."""
    for stage in ("sft", "dpo"):
        report_run.change(run, stage, metrics={"judge_mean": 0.75, "judge_mean_se": 0.042})
    assert texts(run) == ""
    report_run.change(run, "dpo", metrics={"judge_mean": 0.54, "judge_mean_se": 0.042})
    assert "bad dpo Worse by the judge than sft, which it started from: 0.75 → 0.54" in texts(run)
    assert "raise beta, or train for less" in texts(run)
    report_run.change(run, "dpo", metrics={"judge_mean": 0.64, "judge_mean_se": 0.042})
    assert texts(run) == ""


def test_what_the_judge_said_of_replies_tells_the_noise_of_an_earlier_version(run):
    for stage, right in (("sft", 30), ("dpo", 12)):
        samples = [{"prompt": str(i), "completion": "x", "judge": float(i < right)} for i in range(40)]
        report_run.write_lines(run / stage / "samples.jsonl", samples)
        report_run.change(run, stage, metrics={"judge_mean": right / 40})
    assert "Worse by the judge than sft" in texts(run)


def test_replies_that_generation_computes_otherwise_are_not_quite_the_models(run):
    report_run.change(run, "sft", metrics={"generation_gap": 0.03})
    assert texts(run) == ""
    report_run.change(run, "sft", metrics={"generation_gap": 0.4})
    assert "look sft Generation computes other log-probabilities" in texts(run)
    assert "by 0.4 nats" in texts(run)


def test_replies_that_were_sampled_otherwise_are_not_quite_the_policys(run):
    report_run.change(run, "ppo", metrics={"rollout/log_prob_gap_mean": 0.03})
    assert texts(run) == ""
    report_run.change(run, "ppo", metrics={"rollout/log_prob_gap_mean": 0.3})
    assert "look ppo Replies were sampled with other log-probabilities than the policy has" in texts(run)
    assert "by 0.3 nats a token" in texts(run)


# Accuracy of few pairs


@pytest.mark.parametrize(
    ("accuracy", "pairs", "said"),
    [
        (0.9, 20, ""),
        (0.875, 8, "look reward Held-out accuracy is 0.875, 7 of 8 pairs. By so few it is anything from 0.467 to "),
        (0.5, 8, "look reward Held-out accuracy is 0.5, 4 of 8 pairs. By so few"),
        (0.625, 8, "look reward Held-out accuracy is 0.625, 5 of 8 pairs."),
        (0.52, 200, "bad reward Held-out accuracy is 0.52, 104 of 200 pairs: hardly better than guessing."),
        (0.58, 60, "look reward Held-out accuracy is 0.58"),
        (0.58, 1000, ""),
        (0.3, 100, "chosen and rejected may be the wrong way round"),
    ],
)
def test_an_accuracy_is_held_against_guessing_by_its_interval(run, accuracy, pairs, said):
    report_run.change(run, "reward", metrics={"eval_accuracy": accuracy, "eval_pairs": pairs})
    assert said in texts(run)
    assert bool(said) == bool(texts(run))


def test_a_closed_gate_is_shown_with_what_its_value_rests_on(run):
    gate = {"eval_accuracy": {"bound": ">= 0.95", "value": 0.9, "passed": False}}
    report_run.change(run, "reward", metrics={"eval_accuracy": 0.9, "eval_pairs": 20}, gates=gate)
    said = "A gate is closed: eval_accuracy is 0.9 (18 of 20 pairs, 95 %: 0.67 to 0.98), and should be >= 0.95."
    assert said in texts(run)


def test_what_to_do_about_guessing_depends_on_training(run):
    report_run.change(run, "reward", metrics={"eval_accuracy": 0.5, "eval_pairs": 200})
    assert "In training it is no better" in texts(run)
    log(run, "reward", [{"accuracy": 0.97}] * 5)
    assert "In training it is 0.97, so it learns pairs by heart" in texts(run)


@pytest.mark.parametrize(("margin", "said"), [(0.4, ""), (-0.02, "good replies have gained no more than bad ones")])
def test_replies_that_come_no_further_apart_held_out_are_guessed(run, margin, said):
    report_run.change(run, "dpo", kind="kto", metrics={"eval_rewards/margins": margin})
    assert said in texts(run)
    assert bool(said) == ("guessing" in [alarm.what for alarm in alarms.read(run)])


# Advice by what came before


@pytest.mark.parametrize(
    ("began", "before", "limit", "said"),
    [
        (0.9, None, None, "At first 90% did, so it was unlearned: raise missing_eos_penalty"),
        (0.1, 0.0, 256, "Of those of sft, which it started from, 0% do within 256 tokens, so the cause is there"),
        (0.1, 0.9, 256, "90% of those of sft do within 256 tokens: raise response_length (now 24)."),
        (0.1, None, None, "begin with what sft replies (`rlhf-pipeline compare`)"),
    ],
)
def test_replies_that_do_not_end(run, began, before, limit, said):
    report_run.write_lines(run / "ppo" / "metrics.jsonl", [{"step": 1, "reply/ended": began}])
    log(run, "ppo", [{"reply/ended": 0.1}] * 5)
    report_run.change(run, "ppo", inputs={"trainer.response_length": 24})
    comparison = report_run.comparison(2)
    if before is not None:
        comparison["means"] = {"sft": {"ended": before}}
        comparison["settings"]["max_new_tokens"] = limit
    (run / "comparison.json").write_text(json.dumps(comparison))
    assert "bad ppo Only 10% of the replies end by themselves. " in texts(run)
    assert said in texts(run)
    assert ("raise response_length" in texts(run)) == (began < 0.5 and before != 0.0)


def test_advice_to_a_policy_that_compares_groups_names_its_own_keys(run):
    inputs = {"kind": "grpo", "trainer.beta": 0.02, "trainer.num_generations": 4, "trainer.num_iterations": 2}
    report_run.change(run, "ppo", kind="grpo", inputs=inputs)
    log(run, "ppo", [{"frac_reward_zero_std": 0.75, "clip_ratio/region_mean": 0.4}] * 5)
    said = texts(run)
    assert "In 75% of the groups all replies have the same reward" in said
    assert "Raise num_generations (now 4) or the temperature" in said
    assert "40% of the policy's updates are clipped" in said and ", or num_iterations (now 2)." in said
    along(run, [0.5, 0.7, 0.9, 0.6, 0.3], error=0.04)
    assert "Raise beta (now 0.02); at that step KL was 2." in texts(run)
    report_run.write_lines(
        run / "ppo" / "metrics.jsonl", [{"step": 1, "reply/ended": 0.9}, *[{"step": 2, "reply/ended": 0.0}] * 5]
    )
    assert "it was unlearned: raise beta (now 0.02), or add a function to `rewards`" in texts(run)


def test_replies_of_a_base_that_never_learned_to_end(run):
    report_run.change(run, "ppo", init="base", parent_weights={})
    report_run.write_lines(run / "ppo" / "metrics.jsonl", [{"step": 1, "reply/ended": 0.0}])
    assert "The base was never trained to end one: run an `sft` stage first" in texts(run)


def test_advice_on_numbers_that_are_not_finite(run):
    log(run, "sft", [{"loss": None}])
    assert "It has been finite, too: lower the learning rate (now 0.001)." in texts(run)
    report_run.write_lines(run / "sft" / "metrics.jsonl", [{"step": 1, "loss": None}])
    assert "It never was finite: look at the data" in texts(run)


# The verdict


def test_the_verdict(run):
    assert alarms.verdict(found(run)) == "No alarms."
    log(run, "ppo", [{"policy/clipfrac_avg": 0.6}] * 5)
    assert alarms.verdict(found(run)) == "No alarms. 1 thing to look at: clipped updates in ppo."
    along(run, [0.5, 0.7, 0.9, 0.6, 0.3], error=0.04)
    report_run.change(run, "dpo", state="failed", artifact=None, error="no memory")
    assert alarms.verdict(found(run)) == "2 alarms: reward hacking in ppo, a failure in dpo."
