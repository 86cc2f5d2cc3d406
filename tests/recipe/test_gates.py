"""Gates: what a condition is, when it holds, and what a recipe may put one on."""

import math
import re
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.gates import Gate, describe, known_metrics, outcomes, parse, possible_metrics

RECIPE = """\
name: t
model: {path: tiny}
stages:
  sft: {data: tiny:demonstrations}
  reward:
    data: tiny:preferences
    gates:
      METRIC: CONDITION
  ppo: {data: tiny:prompts}
  dpo: {data: tiny:preferences}
"""
EVALUATE = "evaluate={data: tiny:heldout, judge: 'a:b'}"


@pytest.fixture
def load(tmp_path: Path):
    """Load the recipe with one gate, on the reward stage."""

    def load(metric: str = "accuracy", condition: str = '">= 0.5"', *overrides: str) -> recipes.Recipe:
        file = tmp_path / "r.yaml"
        file.write_text(RECIPE.replace("METRIC", metric).replace("CONDITION", condition))
        return recipes.load(str(file), overrides)

    return load


@pytest.mark.parametrize(
    ("text", "operator", "bound"),
    [
        (">= 0.65", ">=", 0.65), ("<=10", "<=", 10.0), ("> 1e-3", ">", 0.001), ("< -2", "<", -2.0),
        ("  >=  .5 ", ">=", 0.5), ("<= 2.", "<=", 2.0), ("> +1.5E2", ">", 150.0), ("< 0", "<", 0.0),
    ],
)  # fmt: skip
def test_a_condition_is_an_operator_and_a_number(text: str, operator: str, bound: float):
    assert parse("m", text) == Gate("m", operator, bound)


@pytest.mark.parametrize(
    "text",
    ["", ">=", "0.65", "== 1", "=> 1", "= 1", "!= 1", ">= a", ">= 1 2", ">= 1, < 2", ">= nan", ">= inf", "> 1e999",
     "> = 1", ">> 1", ">= 0x10", ">= 1_000", "> 5%", "> 1e", "> .", ">= \u0661"],
)  # fmt: skip
def test_what_is_no_condition_is_refused_with_the_metric_and_the_text(text: str):
    with pytest.raises(ValueError, match="is not a condition on `eval_loss`") as caught:
        parse("eval_loss", text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "below", "at", "above"),
    [
        (">= 2", False, True, True),
        ("> 2", False, False, True),
        ("<= 2", True, True, False),
        ("< 2", True, False, False),
    ],
)
def test_a_gate_holds_on_its_side_of_the_bound(text: str, below: bool, at: bool, above: bool):
    gate = parse("m", text)
    assert [gate.holds(value) for value in (1.999, 2, 2.001)] == [below, at, above]


def test_more_samples_of_the_same_reply_are_refused(load):
    assert load("accuracy", "'>= 0'", EVALUATE, "evaluate.samples=4").evaluate.samples == 4
    with pytest.raises(InputError, match="`samples` has no effect at temperature 0"):
        load("accuracy", "'>= 0'", EVALUATE, "evaluate.samples=4", "evaluate.temperature=0")


@pytest.mark.parametrize("text", [">= -1e300", "<= 1e300", "> -1e300", "< 1e300"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_missing_or_not_finite_never_holds(text: str, value: float | None):
    assert parse("m", text).holds(value) is False


def test_outcomes_hold_every_gate_against_its_metric():
    gates = {"eval_accuracy": " >= 0.65", "objective/kl": "<= 10", "gone": "< 1", "nan": "> 0", "text": "> 0"}
    metrics = {"eval_accuracy": 0.61, "objective/kl": 3, "nan": None, "text": "1", "other": 5.0}
    assert outcomes(gates, metrics) == {
        "eval_accuracy": {"bound": ">= 0.65", "value": 0.61, "passed": False},
        "objective/kl": {"bound": "<= 10", "value": 3, "passed": True},
        "gone": {"bound": "< 1", "value": None, "passed": False},
        "nan": {"bound": "> 0", "value": None, "passed": False},
        "text": {"bound": "> 0", "value": None, "passed": False},
    }


def test_what_did_not_pass_is_described_in_one_line():
    gates = {"eval_accuracy": ">= 0.65", "eval_loss": "< 1", "gone": "> 0"}
    text = describe(outcomes(gates, {"eval_accuracy": 0.61, "eval_loss": 0.5}), {})
    assert text == "eval_accuracy is 0.61, not >= 0.65; gone has no value, not > 0"
    assert describe(outcomes(gates, {"eval_accuracy": 0.7, "eval_loss": 0.5, "gone": 1}), {}) == ""
    assert describe({}, {}) == ""


def test_a_value_just_beyond_its_bound_is_not_rounded_onto_it():
    assert describe(outcomes({"m": ">= 0.65"}, {"m": 0.6499999}), {}) == "m is 0.6499999, not >= 0.65"
    assert describe(outcomes({"m": "<= 10"}, {"m": 12.3456789}), {}) == "m is 12.35, not <= 10"


def test_a_share_of_pairs_that_did_not_pass_is_described_with_its_interval():
    """By Wilson's with continuity correction; 3 of 5 say little."""
    metrics = {"eval_accuracy": 0.6, "eval_pairs": 5}
    said = "eval_accuracy is 0.6 (3 of 5 pairs, 95 %: 0.17 to 0.93), not >= 0.65"
    assert describe(outcomes({"eval_accuracy": ">= 0.65"}, metrics), metrics) == said


def test_a_mean_of_the_judge_that_did_not_pass_is_described_with_its_interval():
    metrics = {"judge_mean": 0.55, "judge_mean_se": 0.049}
    said = "judge_mean is 0.55 (95 %: 0.454 to 0.646), not >= 0.6"
    assert describe(outcomes({"judge_mean": ">= 0.6"}, metrics), metrics) == said


def test_a_margin_beyond_the_noise_is_added_to_the_bound():
    """By two standard errors of 0.05 more than 0.6, 0.69 is too little and 0.71 is enough."""
    gates = {"judge_mean": ">= 0.6 + 2 se"}
    assert parse("judge_mean", gates["judge_mean"]) == Gate("judge_mean", ">=", 0.6, 2.0)
    assert parse("judge_mean", "<=0.2-1.5se") == Gate("judge_mean", "<=", 0.2, -1.5)
    assert outcomes(gates, {"judge_mean": 0.71, "judge_mean_se": 0.05})["judge_mean"]["passed"]
    metrics = {"judge_mean": 0.69, "judge_mean_se": 0.05}
    closed = outcomes(gates, metrics)
    assert closed["judge_mean"] == {"bound": ">= 0.6 + 2 se", "value": 0.69, "se": 0.05, "passed": False}
    assert describe(closed, metrics) == "judge_mean is 0.69 (se 0.05), not >= 0.6 + 2 se"
    unknown = outcomes(gates, {"judge_mean": 0.99})
    assert not unknown["judge_mean"]["passed"]
    assert describe(unknown, {}) == "judge_mean has no standard error, not >= 0.6 + 2 se"


def test_a_margin_needs_a_metric_with_a_standard_error(load):
    held_out = "reward.data.eval_fraction=0.5"
    assert load("eval_accuracy", '">= 0.6 + 2 se"', held_out).stages["reward"].gates
    with pytest.raises(InputError, match="`eval_loss` has no standard error") as caught:
        load("eval_loss", '"<= 0.6 - 2 se"', held_out)
    assert caught.value.hint == "those that have one are eval_accuracy"
    assert f"{caught.value.place}".endswith("r.yaml:8:18: stages.reward.gates.eval_loss")


def test_a_gate_of_a_recipe_is_kept_in_the_resolved_one(load, tmp_path: Path):
    recipe = load("accuracy", '">= 0.5"')
    assert recipe.stages["reward"].gates == {"accuracy": ">= 0.5"}
    assert recipe.stages["sft"].gates == {}
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipes.to_yaml(recipe))
    assert recipes.load(str(resolved)).stages["reward"].gates == {"accuracy": ">= 0.5"}


def test_a_gate_can_come_from_the_command_line(load):
    recipe = load("accuracy", '">= 0.5"', "sft.gates.train_loss='< 3'", "reward.gates.accuracy='> 0.9'")
    assert recipe.stages["sft"].gates == {"train_loss": "< 3"}
    assert recipe.stages["reward"].gates == {"accuracy": "> 0.9"}
    with pytest.raises(InputError, match="no metric `train_lost`") as caught:
        load("accuracy", '">= 0.5"', "sft.gates.train_lost='< 3'")
    assert caught.value.place == "override `sft.gates.train_lost='< 3'`"
    assert caught.value.hint == "did you mean `train_loss`?"


def test_a_text_that_is_no_condition_is_an_error_at_its_line(load):
    with pytest.raises(InputError, match=r"'about 0\.5' is not a condition on `accuracy`") as caught:
        load("accuracy", '"about 0.5"')
    assert caught.value.place is not None
    assert re.search(r"r\.yaml:8:17: stages\.reward\.gates\.accuracy$", caught.value.place)
    assert ">=, <=, >, <" in str(caught.value.hint)


def test_a_number_without_an_operator_is_an_error_at_its_line(load):
    with pytest.raises(InputError, match=r"0\.5") as caught:
        load("accuracy", "0.5")
    assert ":8:17: " in str(caught.value.place)


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("acuracy", "did you mean `accuracy`?"),
        ("eval_accuracy", "it needs held-out rows: set `eval_fraction` in stages.reward.data"),
        ("eval_acuracy", "did you mean `eval_accuracy`? It needs held-out rows: set `eval_fraction` in "
                         "stages.reward.data"),
        ("zzz", "its metrics are accuracy, dropped_pairs, margin, max_reward, mean_reward, min_reward, num_tokens, "
                "train_loss"),
    ],
)  # fmt: skip
def test_a_metric_that_the_stage_will_not_have_is_an_error_with_the_nearest_one(load, metric: str, hint: str):
    with pytest.raises(InputError, match=f"stage `reward` will have no metric `{metric}`") as caught:
        load(metric)
    assert re.search(rf"r\.yaml:8:7: stages\.reward\.gates\.{metric}$", str(caught.value.place))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("stage", "metric", "needed", "settings"),
    [
        ("sft", "eval_loss", "`eval_fraction` in stages.sft.data", ["sft.data.eval_fraction=0.1"]),
        ("sft", "judge_mean", "`evaluate` at the top", [EVALUATE]),
        ("dpo", "eval_rewards/accuracies", "`eval_fraction` in stages.dpo.data", ["dpo.data.eval_fraction=0.1"]),
        ("dpo", "judge_mean", "`evaluate` at the top", [EVALUATE]),
        ("ppo", "judge_mean", "`evaluate` at the top", [EVALUATE]),
        ("ppo", "eval_objective/scores", "`eval_steps` in stages.ppo.trainer",
         ["ppo.data.eval_fraction=0.1", "ppo.trainer.eval_steps=1"]),
        ("ppo", "kl_budget/exceeded_with", "`kl_budget` in stages.ppo.trainer", ["ppo.trainer.kl_budget=5"]),
        ("reward", "eval_disagreement", "`members` in stages.reward", ["reward.members=2",
                                                                       "reward.data.eval_fraction=0.1"]),
        ("ppo", "loss/ptx", "`ptx_data` in stages.ppo", ["ppo.ptx_data=tiny:demonstrations",
                                                        "ppo.trainer.ptx_coef=0.1"]),
    ],
)  # fmt: skip
def test_a_metric_that_another_setting_would_give_says_which(
    load, stage: str, metric: str, needed: str, settings: list[str]
):
    gate = f"{stage}.gates={{'{metric}': '> 0'}}"
    with pytest.raises(InputError, match=f"stage `{stage}` will have no metric `{metric}`") as caught:
        load("accuracy", '">= 0.5"', gate)
    assert str(caught.value.hint).startswith("it needs ")
    assert needed in str(caught.value.hint)
    assert load("accuracy", '">= 0.5"', gate, *settings).stages[stage].gates == {metric: "> 0"}


def test_the_reward_model_has_no_judgement(load):
    with pytest.raises(InputError, match="no metric `judge_mean`") as caught:
        load("judge_mean", '"> 0"', EVALUATE)
    assert "evaluate" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("stage", "metric", "given", "unless"),
    [
        ("sft", "aux_loss", "sft.trainer.router_aux_loss_coef=0.1", "sft.trainer.router_aux_loss_coef=0.0"),
        ("dpo", "aux_loss", "dpo.trainer.router_aux_loss_coef=0.1", "seed=1"),  # by default there is none
        ("sft", "loss", "seed=1", "sft.trainer.logging_strategy=no"),
        ("ppo", "loss/policy_avg", "ppo.trainer.value_warmup_updates=3",
         "ppo.trainer={value_warmup_updates: 3, max_steps: 3}"),
    ],
)  # fmt: skip
def test_a_metric_that_only_the_stage_itself_can_tell_of_is_accepted(
    load, stage: str, metric: str, given: str, unless: str
):
    gate = f"{stage}.gates={{'{metric}': '< 9'}}"
    recipe = load("accuracy", '">= 0.5"', gate, given)
    assert metric in possible_metrics(recipe, stage) - known_metrics(recipe, stage)
    with pytest.raises(InputError, match=f"no metric `{metric}`"):
        load("accuracy", '">= 0.5"', gate, unless)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_with_liger_kernels_only_the_stage_can_tell_whether_tokens_are_measured(load, stage: str):
    recipe = load("accuracy", '">= 0.5"', f"{stage}.trainer.use_liger_kernel=true", f"{stage}.data.eval_fraction=0.1")
    unsure = {"entropy", "mean_token_accuracy", "eval_entropy", "eval_mean_token_accuracy"}
    assert unsure <= possible_metrics(recipe, stage)
    assert not unsure & known_metrics(recipe, stage)


def test_every_shipped_recipe_may_have_a_gate_on_every_metric_it_is_known_to_have(tmp_path: Path):
    """What `known_metrics` gives is what `load` accepts."""
    shipped = recipes.load("tiny")
    for name in shipped.stages:
        shipped.stages[name].gates = dict.fromkeys(known_metrics(shipped, name), ">= 0")
    assert all(stage.gates for stage in shipped.stages.values())
    file = tmp_path / "gated.yaml"
    file.write_text(recipes.to_yaml(shipped))
    assert recipes.load(str(file)).stages["reward"].gates == shipped.stages["reward"].gates


def test_a_bound_without_quotes_is_answered_with_how_to_quote_it(load):
    """A `>` begins folded text in YAML."""
    with pytest.raises(InputError) as caught:
        load("accuracy", ">= 0.5")
    assert '">= 0.65"' in str(caught.value.hint)
