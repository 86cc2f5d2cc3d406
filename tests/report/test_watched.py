"""What the report shows of a policy that was watched, and of the best of n replies."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.hacking.replies import Measured
from rlhf_pipeline.hacking.watch import Measurement, raise_alarms
from rlhf_pipeline.report import alarms, watched
from rlhf_pipeline.report.gather import Run, Series, Stage, _measurements
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.words import short

PROMPTS, PEAK = 60, 1.5  # the distance at which the judge's mean is highest


def measurement(step: int, d: float, length: float, rng: np.random.Generator) -> Measurement:
    """At a distance d the judge's mean follows Gao's curve, and the reward rises."""
    beta = 0.4
    curve = 0.4 + (d * (beta * (1 + np.log(PEAK)) - beta * np.log(d)) if d else 0.0)
    gold = curve + rng.normal(0, 0.05, PROMPTS)
    measures = {"length": Measured(length, 0.1, 3.0, 7.0), "ended": Measured(1.0, 0.01, 0.8, None)}
    by_prompt = {"gold": gold.tolist(), "reward": (d + rng.normal(0, 0.1, PROMPTS)).tolist()}
    return Measurement(step, d * d, by_prompt, measures, [("so lovely", 0.4, 5.0)])


def stage(metrics: dict[str, Any] | None = None, **inputs: Any) -> Stage:
    rng, found = np.random.default_rng(0), []
    for step in range(9):
        found.append(measurement(step, 0.5 * step, 5.0 if step < 6 else 9.0, rng))
        raise_alarms(found, 9)
    record = Record(name="ppo", kind="ppo", state="done", artifact="ppo/adapter", metrics=metrics or {}, inputs=inputs)
    return Stage("ppo", "ppo", "done", "", {"init": "sft"}, record, measurements=found)


def run(*stages: Stage) -> Run:
    return Run(Path("run"), "run", "done", {}, list(stages), {}, [])


def desc(svg: str) -> str:
    return "".join(re.findall(r"<desc[^>]*>(.*?)</desc>", svg))


def test_the_judge_is_drawn_over_the_distance_with_its_peak() -> None:
    ppo = stage()
    found = watched.foreseen(ppo)
    assert found is not None and found.peak == pytest.approx(PEAK, abs=0.1)
    first, _ = watched.pictures([run(ppo)], "ppo")
    assert first.title == "Judge over √KL" and "It is past its peak" in first.caption
    means = [short(ppo.measurements[at].mean("gold")) for at in (0, -1)]
    count = sum("gold" in one.alarms for one in ppo.measurements)
    assert f"judge: {means[0]} at first, {means[1]} at last, " in desc(first.svg)
    assert re.search(r'class="level" d="M[\d.]+ [\d.]+V', first.svg)  # upright, at the peak
    assert count > 0 and f", {count} with an alarm. reward: " in desc(first.svg)
    assert "reward: " in desc(first.svg) and "0 with an alarm" in desc(first.svg)


def test_only_measures_that_left_their_band_are_drawn_with_the_new_phrases() -> None:
    picture = watched.pictures([run(stage())], "ppo")[1]
    assert "length: 5 at first, 9 at last, between 5 and 9, 3 with an alarm" in desc(picture.svg)
    assert "ended" not in desc(picture.svg)
    assert "healthy above" in picture.svg and "healthy below" in picture.svg
    assert "“so lovely” in 40%" in picture.caption


def test_without_measurements_and_of_several_runs_nothing_of_it_is_drawn() -> None:
    bare = stage()
    bare.measurements = []
    assert watched.pictures([run(bare)], "ppo") == [] == watched.pictures([run(stage()), run(stage())], "ppo")


def test_without_a_judge_the_pessimistic_reward_is_what_counts() -> None:
    ppo = stage()
    for one in ppo.measurements:
        one.by_prompt["pessimistic"] = one.by_prompt.pop("gold")
    assert watched.pictures([run(ppo)], "ppo")[0].title == "Pessimistic reward over √KL"


def test_lines_that_are_no_measurements_are_passed_over() -> None:
    rows = [json.loads(json.dumps(one.as_json())) for one in stage().measurements]
    shorter = rows[3] | {"by_prompt": {"gold": [1.0], "reward": [1.0]}}
    strange = [
        {},
        {"step": 1},
        rows[2] | {"measures": {"length": [1]}},
        shorter,
        rows[4] | {"kl": float("nan")},
        {"by_prompt": 3},
    ]
    found = _measurements([*rows[:2], *strange, *rows[2:]])
    assert [one.step for one in found] == [row["step"] for row in rows]


def candidates(order: float) -> Stage:
    """Eight replies to each of forty prompts; the score follows gold in that share of the replies."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(40):
        gold = rng.integers(0, 2, 8).astype(float)
        scores = np.where(rng.random(8) < order, gold, rng.integers(0, 2, 8)) + rng.normal(0, 0.1, 8)
        rows.append(
            {
                "prompt": "p",
                "replies": ["r"] * 8,
                "scores": scores.tolist(),
                "sampled": {"rewards": {"gold": gold.tolist()}},
            }
        )
    return Stage(
        "candidates", "sample", "done", "", {}, Record(name="candidates", kind="sample", state="done"), rows=rows
    )


def test_the_best_of_n_is_drawn_by_gold_and_by_score() -> None:
    found = watched.best_of_n(candidates(0.9))
    assert found is not None
    picture, said = found
    assert picture.title == "The best of n" and said in picture.caption and "hardly be better" not in said
    assert re.search(r"gold: 0\.\d+ at first, (0\.9\d*|1) at last", desc(picture.svg))
    assert not [one for one in alarms.alarms(run(candidates(0.9))) if "order" in one.what]


def test_scores_that_guess_are_told() -> None:
    picture, said = watched.best_of_n(candidates(0.0)) or (None, "")
    assert picture is not None and "PPO will hardly be better than this" in said
    assert [one.what for one in alarms.alarms(run(candidates(0.0)))] == ["scores that do not order the replies"]


def test_without_gold_nothing_is_said_of_the_best_of_n() -> None:
    without = candidates(0.9)
    for row in without.rows:
        del row["sampled"]
    assert watched.best_of_n(without) is None and not watched.is_a_guess(without)


def test_a_stop_is_told_once_with_what_stopped_it() -> None:
    metrics = {
        "watch/stopped_at_step": 8, "watch/kept_step": 3, "watch/alarm/gold": 8, "watch/alarm/self_bleu": 8,
        "watch/alarm/length": 6, "watch/alarm/reward": 7,
    }  # fmt: skip
    found = alarms.alarms(run(stage(metrics, **{"watch.stop": ["gold", "reward"]})))
    assert [(one.level, one.what) for one in found] == [
        ("look", "a stop by the watch"), ("look", "replies unlike those at first")
    ]  # fmt: skip
    assert "at step 8, by gold; the policy of step 3 is kept" in found[0].text
    assert "length, self_bleu" in found[1].text


def test_a_policy_that_never_got_better_is_told() -> None:
    found = alarms.alarms(run(stage({"watch/kept_step": 0})))
    assert [one.what for one in found] == ["no gain"]


def test_where_the_best_policy_was_put_back_no_alarm_says_that_it_is_hacked() -> None:
    steps = np.arange(9.0)
    ppo = stage({"watch/kept_step": 3})
    ppo.series = {
        "gold/judge_mean": Series(steps, np.array([0.4, 0.6, 0.8, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1])),
        "gold/judge_mean_se": Series(steps, np.full(9, 0.03)),
        "gold/score_mean": Series(steps, steps),
    }
    assert "reward hacking" not in [one.what for one in alarms.alarms(run(ppo))]
    del ppo.record.metrics["watch/kept_step"]
    assert "reward hacking" in [one.what for one in alarms.alarms(run(ppo))]
