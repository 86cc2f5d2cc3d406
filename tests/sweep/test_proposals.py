"""Runs that Optuna proposes: what a killed sweep leaves is taken up, more trials add to it, bad ones are pruned."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from rlhf_pipeline.sweep import keys, proposals
from rlhf_pipeline.sweep.child import logged
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.proposals import Grid, Study

GOAL = Goal("ppo", "judge_mean", "maximize", ("gold/judge_mean", "judge_mean"))
WORDS = ("a.kl=0.01..1.0:log", "a.n=1..8", "a.dtype=float32,bfloat16,null")


def study(folder: Path, trials: int, *words: str, goal: Goal = GOAL, **inputs: Any) -> Study:
    swept, _ = keys.parse(words or WORDS)
    names = {one.key: one.key.removeprefix("a.") for one in swept}
    return Study(folder, swept, names, goal, trials, 1, inputs or {"ppo": {"seed": 1}})


def values(one: Study) -> list[dict[str, Any]]:
    """Have all that is left proposed and done, each with its `kl` as the value."""
    found = []
    while proposal := one.next():
        found.append(proposal.combination.values)
        one.done(proposal, float(proposal.combination.values["a.kl"]))
    return found


def loaded(folder: Path) -> list[optuna.Study]:
    storage = f"sqlite:///{folder / 'study.db'}"
    return [
        optuna.load_study(study_name=one.study_name, storage=storage) for one in optuna.get_all_study_summaries(storage)
    ]


def test_values_are_those_that_were_asked_for_and_runs_are_named_after_them(tmp_path):
    one = study(tmp_path, 12)
    assert one.total == 12
    found = values(one)
    for each in found:
        assert 0.01 <= each["a.kl"] <= 1.0 and each["a.kl"] == float(f"{each['a.kl']:.4g}")
        assert each["a.n"] in range(1, 9) and type(each["a.n"]) is int
        assert each["a.dtype"] in ("float32", "bfloat16", None)
    assert {each["a.dtype"] for each in found} == {"float32", "bfloat16", None}
    (ours,) = loaded(tmp_path)
    assert ours.study_name.startswith("maximize ppo.judge_mean over a.kl, a.n, a.dtype (")
    assert ours.best_value == max(each["a.kl"] for each in found)
    assert ours.trials[0].user_attrs["run"] == keys.combination(found[0], {key: key[2:] for key in found[0]}).name
    assert isinstance(ours.trials[0].distributions["a.n"], optuna.distributions.IntDistribution)
    assert ours.trials[0].distributions["a.kl"].log


def test_a_number_never_leaves_its_range_by_rounding():
    (one,), _ = keys.parse(["a=0.123456..0.123457"])
    assert proposals._value(one, 0.1234565) in (0.123456, 0.123457)


def test_more_trials_add_to_those_that_there_are_and_draw_others(tmp_path):
    first = values(study(tmp_path, 4, "a.kl=0.01..1.0"))
    grown = study(tmp_path, 7, "a.kl=0.01..1.0")
    assert [one.values for one, _ in grown.earlier()] == first and grown.has_more
    more = values(grown)
    assert len(more) == 3
    assert len({each["a.kl"] for each in first + more}) == 7  # a sampler of the same seed would draw the same first
    again = study(tmp_path, 5, "a.kl=0.01..1.0")
    assert not again.has_more and again.next() is None and again.total == 7


def test_what_a_killed_sweep_left_is_taken_up_with_the_same_values(tmp_path):
    killed = study(tmp_path, 3)
    done, left = killed.next(), killed.next()
    killed.done(done, 0.5)
    killed.report(left, {10: 0.4})
    again = study(tmp_path, 3)
    taken = again.next()
    assert taken.combination == left.combination and taken.trial.number == left.trial.number
    again.report(taken, {10: 0.4, 20: 0.6})
    again.done(taken, 0.7)
    values(again)
    (ours,) = loaded(tmp_path)
    assert [trial.state.name for trial in ours.trials] == ["COMPLETE"] * 3
    assert ours.trials[1].value == 0.7 and ours.trials[1].intermediate_values == {10: 0.4, 20: 0.6}


def test_what_failed_is_tried_again_and_does_not_count(tmp_path):
    one = study(tmp_path, 2, "a.kl=0.01..1.0")
    failed, done = one.next(), one.next()
    one.failed(failed)
    one.done(done, 0.5)
    assert one.next() is None  # a setting that always fails must not go on for ever
    again = study(tmp_path, 2, "a.kl=0.01..1.0")
    assert again.has_more and [one.values for one, _ in again.earlier()] == [done.combination.values]
    assert values(again) == [failed.combination.values]
    assert not study(tmp_path, 2, "a.kl=0.01..1.0").has_more


@pytest.mark.parametrize(
    "other",
    [
        {"ppo": {"seed": 2}},  # a setting of the recipe, its data, or a judge
        {"goal": Goal("ppo", "win_rate", "maximize", ())},
        {"goal": Goal("ppo", "judge_mean", "minimize", ())},
    ],
)
def test_values_that_cannot_be_compared_are_a_study_of_their_own(tmp_path, other):
    values(study(tmp_path, 2))
    assert study(tmp_path, 2, **other).earlier() == []
    assert len(loaded(tmp_path)) == 2


def test_a_wider_range_goes_on_with_the_same_study(tmp_path):
    values(study(tmp_path, 2, "a.kl=0.1..1.0"))
    assert len(study(tmp_path, 3, "a.kl=0.01..1.0").earlier()) == 2


def test_a_run_that_is_worse_than_the_median_is_pruned_after_a_third_of_its_way(tmp_path):
    one = study(tmp_path, 8, "a.kl=0.01..1.0")
    for number in range(proposals.UNPRUNED):
        proposal = one.next()
        assert not one.report(proposal, {0: 0.5, 20: 0.5 + number / 100, 40: 0.6 + number / 100})
        one.done(proposal, 0.6)
    better, worse = one.next(), one.next()
    assert not one.report(better, {0: 0.5, 20: 0.6, 40: 0.7})
    assert not one.report(worse, {0: 0.5, 20: 0.1})
    assert not one.report(worse, {0: 0.5, 20: 0.1})  # nothing new
    assert one.report(worse, {0: 0.5, 20: 0.1, 40: 0.1})
    one.pruned(worse)
    (ours,) = loaded(tmp_path)
    assert ours.trials[worse.trial.number].state.name == "PRUNED"
    again = study(tmp_path, 8, "a.kl=0.01..1.0")
    assert (worse.combination, "pruned") in again.earlier()


def test_what_training_logged_is_read_by_how_much_is_done(tmp_path):
    work = tmp_path / "ppo" / "work"
    work.mkdir(parents=True)
    assert logged(tmp_path, GOAL) == {}
    (tmp_path / "ppo" / "metrics.jsonl").write_text(
        '{"step": 0, "gold/judge_mean": 0.5}\n{"step": 8, "objective/kl": 3}\n{"step": 8, "gold/judge_mean": 0.7}\n'
        '{"step": 16, "gold/judge_mean": null}\n{"step": 24, "gold/jud'
    )
    (work / "progress.json").write_text('{"phase": "training", "step": 17, "of": 32}')
    assert logged(tmp_path, GOAL) == {0: 0.5, 25: 0.7}
    (work / "progress.json").write_text('{"phase": "judging", "step": 17, "of": 40}')  # of prompts
    assert logged(tmp_path, GOAL) == {}


def test_a_grid_has_all_combinations_once():
    swept, _ = keys.parse(["a=1,2", "b=x,y,z"])
    found = Grid([keys.combination(one, {"a": "a", "b": "b"}) for one in keys.grid(swept)])
    names = []
    while proposal := found.next():
        names.append(proposal.combination.name)
    assert names == ["a-1_b-x", "a-1_b-y", "a-1_b-z", "a-2_b-x", "a-2_b-y", "a-2_b-z"] and found.total == 6
