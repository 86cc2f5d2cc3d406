"""Alarms: numbers of a run that a person should check. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline import kinds
from rlhf_pipeline.report import measures
from rlhf_pipeline.report.gather import EMPTY, Numbers, Run, Series, Stage, mapping, number
from rlhf_pipeline.rundir.state import DONE
from rlhf_pipeline.rundir.words import short

# Thresholds. None is a law; each is where experience, or arithmetic, says that a look is worth the time.
ENDED = 0.5  # share of replies that end: below, most scores are of replies that were cut
COLLAPSED = 0.5  # of the diversity it began with: tasks narrow it somewhat, halving it is a policy with one answer
GUESSING = 0.55  # accuracy of a reward model: a coin has 0.5, and annotators agree on 0.6 to 0.8 of pairs
OVERCONFIDENT = 0.1  # predicted less actual share of right pairs: beyond what 200 pairs would show by chance
CLIPPED = 0.3  # share of clipped policy updates: usual is below 0.2
BY_LENGTH = 0.25  # accuracy where the chosen reply is longer, less where it is shorter
GOLD_FELL = 0.02  # of the judge's own range over training; less is no matter
LATEST = 5  # values at the end of a series whose mean is meant by "now"


@dataclass(frozen=True)
class Alarm:
    """One finding: `bad` needs doing something, `look` needs a look; `where` is a stage, or the run."""

    level: str
    where: str
    text: str


def alarms(run: Run) -> list[Alarm]:
    """The alarms of a run, the bad ones first."""
    found = [Alarm("look", "the run", note) for note in run.notes]
    for stage in run.stages:
        found += _of_record(stage)
        found += [Alarm("look", stage.name, note) for note in stage.notes]
        if stage.not_finite:
            names = ", ".join(sorted(stage.not_finite)[:5]) + ("…" if len(stage.not_finite) > 5 else "")
            times = max(stage.not_finite.values())
            level = "bad" if any("loss" in name for name in stage.not_finite) else "look"
            found.append(
                Alarm(level, stage.name, f"Not a finite number, {times:,} time{'s' * (times != 1)} at most: {names}.")
            )
        kind = kinds.find(stage.kind)
        if kind and kind.own_loop:
            found += [*_of_ppo(stage), *_hacking(stage, number(mapping(run.recipe.get("evaluate")).get("n")))]
        elif kind and kind.reads == "preferences":
            found += _of_reward(stage) if kind.makes == "reward" else _of_dpo(stage)
    versions = {tuple(sorted(stage.record.versions.items())) for stage in run.stages}
    if len(versions - {()}) > 1:
        found.append(Alarm("look", "the run", "Stages were made with different versions of the libraries."))
    return sorted(found, key=lambda alarm: alarm.level != "bad")


def _of_record(stage: Stage) -> Iterator[Alarm]:
    record, name = stage.record, stage.name
    closed = {
        metric: gate for metric, gate in record.gates.items()
        if gate.get("passed") is False and metric not in record.gates_ignored
    }  # fmt: skip
    if stage.state == "failed" and not closed:
        yield Alarm("bad", name, f"Failed: {stage.reason}.")
    if stage.state == "partial":
        yield Alarm("look", name, f"Partial: {stage.reason}. The same command resumes it.")
    if stage.state == "stale":
        yield Alarm("look", name, f"Stale: {stage.reason}. The same command trains it again.")
    for metric, gate in closed.items():
        yield Alarm("bad", name, f"A gate is closed: {metric} should be {gate.get('bound')}.")
    for metric, bound in record.gates_ignored.items():
        yield Alarm("look", name, f"A closed gate was ignored: {metric} should be {bound}.")


def _of_reward(stage: Stage) -> Iterator[Alarm]:
    held_out = stage.final("eval_accuracy")
    accuracy = held_out if held_out is not None else _now(stage, "accuracy")
    if accuracy is not None and accuracy < GUESSING:
        yield Alarm("bad", stage.name, f"Accuracy is {short(accuracy)}: the model is hardly better than guessing.")
    pairs = stage.pairs
    if pairs is None or len(pairs.chosen) < 2 * measures.LEAST_IN_BIN:
        return
    predicted = float(measures.probability(np.abs(pairs.margins)).mean())
    actual = float(measures.right(pairs).mean())
    if predicted - actual > OVERCONFIDENT:
        yield Alarm(
            "look", stage.name,
            f"Overconfident: by its margins {predicted:.0%} of held-out pairs should be right, and {actual:.0%} are.",
        )  # fmt: skip
    if len(pairs.chosen_length):
        groups = measures.by_length(pairs)
        if {"longer", "shorter"} <= groups.keys():
            longer, shorter = groups["longer"], groups["shorter"]
            enough = min(longer.count, shorter.count) >= measures.LEAST_IN_BIN
            if enough and longer.share - shorter.share > BY_LENGTH:
                yield Alarm(
                    "look", stage.name,
                    f"Prefers longer replies: right in {longer.share:.0%} of pairs whose chosen reply is the longer "
                    f"one, in {shorter.share:.0%} of those where it is the shorter one.",
                )  # fmt: skip


def _of_ppo(stage: Stage) -> Iterator[Alarm]:
    kl, budget = stage.series.get("objective/kl", EMPTY), stage.setting("trainer.kl_budget")
    exceeded = stage.final("kl_budget/exceeded_with")
    if exceeded is not None:
        yield Alarm(
            "look", stage.name,
            f"KL went over its budget with {short(exceeded)}; the best policy before that, of step "
            f"{short(stage.final('kl_budget/best_step') or 0)}, was kept.",
        )  # fmt: skip
    elif budget is not None and len(kl) and kl.values.max() > budget:
        yield Alarm(
            "bad", stage.name, f"KL is over its budget of {short(budget)}: it reached {short(kl.values.max())}."
        )
    ended = _now(stage, "reply/ended")
    if ended is not None and ended < ENDED:
        yield Alarm(
            "bad", stage.name,
            f"Only {ended:.0%} of the replies end by themselves: raise response_length or missing_eos_penalty.",
        )  # fmt: skip
    for metric, words in (("reply/distinct_2", "distinct bigrams"), ("reply/unique", "distinct replies")):
        began, now = _began(stage.series.get(metric, EMPTY)), _now(stage, metric)
        if began is not None and now is not None and len(stage.series[metric]) > 2 and now < COLLAPSED * began:
            yield Alarm("bad", stage.name, f"Diversity collapsed: {words} fell from {began:.0%} to {now:.0%}.")
    clipped = _now(stage, "policy/clipfrac_avg")
    if clipped is not None and clipped > CLIPPED:
        yield Alarm("look", stage.name, f"{clipped:.0%} of the policy's updates are clipped: lower the learning rate.")


def _hacking(stage: Stage, replies: float | None) -> Iterator[Alarm]:
    """The judge's mean, over so many replies, fell while the score rose."""
    score, judge = stage.series.get("gold/score_mean", EMPTY), stage.series.get("gold/judge_mean", EMPTY)
    if len(score) < 2 or len(judge) < 2:
        return
    best = int(judge.values.argmax())
    # One standard error of a mean of as many noughts and ones: a single reply must not raise an alarm.
    noise = 0.5 / math.sqrt(replies) if replies else 0.0
    room = max(GOLD_FELL, noise) * max(1.0, float(np.ptp(judge.values)))
    fell = judge.values[best] - judge.values[-1] > room
    at_best = score.values[score.steps <= judge.steps[best]]
    if fell and len(at_best) and score.values[-1] > at_best[-1]:
        yield Alarm(
            "bad", stage.name,
            f"Reward hacking: since step {short(judge.steps[best])} the reward model's score rose from "
            f"{short(at_best[-1])} to {short(score.values[-1])} while the judge's mean fell from "
            f"{short(judge.values[best])} to {short(judge.values[-1])}. Raise kl_coef, or set kl_budget.",
        )  # fmt: skip


def _of_dpo(stage: Stage) -> Iterator[Alarm]:
    held_out = stage.final("eval_rewards/accuracies")
    # At the first step nothing has moved, and the accuracy is 0 whatever the data are.
    latest = stage.series.get("rewards/accuracies", EMPTY).values[1:][-LATEST:]
    accuracy = held_out if held_out is not None else float(latest.mean()) if len(latest) else None
    if accuracy is not None and stage.state in DONE and accuracy < GUESSING:
        yield Alarm("look", stage.name, f"Accuracy is {short(accuracy)}: the policy hardly tells the replies apart.")


def _now(stage: Stage, metric: str) -> float | None:
    values: Numbers = stage.series.get(metric, EMPTY).values
    return float(values[-LATEST:].mean()) if len(values) else None


def _began(series: Series) -> float | None:
    return float(series.values[0]) if len(series) else None
