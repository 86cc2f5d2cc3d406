"""Alarms: numbers of a run that a person should check, each with what to do about it. No torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_pipeline import kinds
from rlhf_pipeline.kinds import Kind
from rlhf_pipeline.recipe.gates import how_sure
from rlhf_pipeline.report import measures, watched
from rlhf_pipeline.report.fall import drop, fell_since
from rlhf_pipeline.report.gather import EMPTY, Numbers, Run, Series, Stage, mapping, number, read_run
from rlhf_pipeline.rundir.record import GATE_CLOSED
from rlhf_pipeline.rundir.state import DONE, STOPPED_EARLY
from rlhf_pipeline.rundir.words import short
from rlhf_pipeline.shares import interval

# Thresholds. None is a law; each is where experience, or arithmetic, says that a look is worth the time.
ENDED = 0.5  # share of replies that end: below, most scores are of replies that were cut
COLLAPSED = 0.5  # of the diversity it began with: tasks narrow it somewhat, halving it is a policy with one answer
GUESSING = 0.55  # accuracy of a reward model: a coin has 0.5, and annotators agree on 0.6 to 0.8 of pairs
USEFUL = 0.65  # accuracy that reward models reach on human preferences
BY_HEART = 0.8  # accuracy in training of a model that only guesses on held-out pairs
OVERCONFIDENT = 0.1  # predicted less actual share of right pairs
CLIPPED = 0.3  # share of clipped policy updates: usual is below 0.2
ALIKE = 0.5  # share of groups whose replies all have the same reward, and teach nothing
BY_LENGTH = 0.25  # accuracy where the chosen reply is longer, less where it is shorter
FELL = 0.02  # of the judge's own range over training; less is no matter, however sure
SCORE_FELL = 0.1  # of the score's own range over training
WORSE = 2.33  # standard errors by which a policy is worse than what it started from: chance alone does that in 1 %
SAME_TO_ALL = 10  # replies with one and the same number, from which a judge is doubted
LATEST = 5  # values at the end of a series whose mean is meant by "now"
MOST_NAMED = 6  # alarms in a verdict


@dataclass(frozen=True)
class Alarm:
    """One finding.

    Attributes:
        level: `bad` needs doing something, `look` needs a look.
        where: a stage, or `the run`.
        what: the finding in two or three words, which go with `in` and the stage.
        text: all of it, and what to do.
        is_state: it is the state of a stage, which tables of stages show with its reason.
    """

    level: str
    where: str
    what: str
    text: str
    is_state: bool = False


def read(run: Path) -> list[Alarm]:
    """The alarms of a run directory, whatever state it is in; none where no stage has begun."""
    found = read_run(run)
    return alarms(found) if any(stage.record.model_fields_set for stage in found.stages) else []


def alarms(run: Run) -> list[Alarm]:
    """The alarms of a run, the bad ones first."""
    found = [Alarm("look", "the run", "what cannot be read", note) for note in run.notes]
    for stage in run.stages:
        found += _of_record(stage)
        found += [Alarm("look", stage.name, "what cannot be read", note) for note in stage.notes]
        found += _not_finite(stage)
        kind = kinds.find(stage.kind)
        if kind and not kind.trains:
            found += _of_rows(stage)
        elif kind and kind.samples:
            found += _of_sampling(run, stage, kind)
        elif kind and kind.reads == "preferences":
            found += _of_reward(stage) if kind.makes == "reward" else _of_dpo(stage)
        elif kind and kind.reads == "feedback":
            found += _of_kto(stage)
        found += _same_to_all(stage)
        found += _sampled_otherwise(stage)
        if not any(alarm.where == stage.name and alarm.what == HACKING for alarm in found):
            found += _worse_than_before(run, stage)
    versions = {tuple(sorted(stage.record.versions.items())) for stage in run.stages}
    if len(versions - {()}) > 1:
        found.append(
            Alarm(
                "look", "the run", "different versions",
                "Stages were made with different versions of the libraries. To have them all made with those of now, "
                "force the earlier ones: `run --force STAGE`.",
            )
        )  # fmt: skip
    return sorted(found, key=lambda alarm: alarm.level != "bad")


def verdict(found: Sequence[Alarm]) -> str:
    """All of it in a sentence or two: `2 alarms: reward hacking in ppo, clipped updates in ppo.`"""
    said = []
    for level, one, several in (("bad", "alarm", "alarms"), ("look", "thing to look at", "things to look at")):
        names = [
            alarm.what if alarm.where == "the run" else f"{alarm.what} in {alarm.where}"
            for alarm in found
            if alarm.level == level
        ]
        if names:
            listed = list(dict.fromkeys(names))
            more = f", and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
            said.append(f"{len(names)} {one if len(names) == 1 else several}: {', '.join(listed[:MOST_NAMED])}{more}.")
        elif level == "bad":
            said.append("No alarms.")
    return " ".join(said)


def _of_record(stage: Stage) -> Iterator[Alarm]:
    record, name = stage.record, stage.name
    closed = {
        metric: gate for metric, gate in record.gates.items()
        if gate.get("passed") is False and metric not in record.gates_ignored
    }  # fmt: skip
    if stage.state == "failed" and stage.reason == STOPPED_EARLY:  # by somebody who knows it
        said = f"{STOPPED_EARLY.capitalize()}. The same command begins it again."
        yield Alarm("look", name, "a stopped stage", said, is_state=True)
    elif stage.state == "failed" and not closed:
        yield Alarm("bad", name, "a failure", f"Failed: {stage.reason}.", is_state=True)
    if stage.state == "partial":
        yield Alarm(
            "look", name, "a partial result", f"Partial: {stage.reason}. The same command resumes it.", is_state=True
        )
    if stage.state == "waiting":
        yield Alarm("look", name, "a stage that waits", f"Waits for people: {stage.reason}.", is_state=True)
    if stage.state == "stale":
        yield Alarm(
            "look", name, "a stale result", f"Stale: {stage.reason}. The same command trains it again.", is_state=True
        )
    if stage.state == GATE_CLOSED and not closed:
        yield Alarm("bad", name, "a closed gate", f"A gate is closed: {stage.reason}.", is_state=True)
    for metric, gate in closed.items():
        value = number(gate.get("value"))
        said = "" if value is None else f" is {short(value)}{how_sure(metric, value, record.metrics)}, and"
        yield Alarm(
            "bad", name, "a closed gate", f"A gate is closed: {metric}{said} should be {gate.get('bound')}.",
            is_state=True,
        )  # fmt: skip
    for metric, bound in record.gates_ignored.items():
        yield Alarm("look", name, "an ignored gate", f"A closed gate was ignored: {metric} should be {bound}.")


def _not_finite(stage: Stage) -> Iterator[Alarm]:
    if not stage.not_finite:
        return
    names = ", ".join(sorted(stage.not_finite)[:5]) + ("…" if len(stage.not_finite) > 5 else "")
    times = max(stage.not_finite.values())
    losses = [name for name in stage.not_finite if "loss" in name]
    text = f"Not a finite number, {times:,} time{'s' * (times != 1)} at most: {names}."
    if any(name in stage.series for name in losses):
        text += f" It has been finite, too: lower the learning rate{_at_present(stage, 'learning_rate')}."
    elif losses:
        text += " It never was finite: look at the data (`rlhf-pipeline data`), and set `model.dtype: float32`."
    yield Alarm("bad" if losses else "look", stage.name, "numbers that are not finite", text)


# Accuracy


def _of_reward(stage: Stage) -> Iterator[Alarm]:
    yield from _guessing(stage, stage.series.get("accuracy", EMPTY).values, "bad")
    pairs = stage.pairs
    if pairs is None or len(pairs.chosen) < 2 * measures.LEAST_IN_BIN:
        return
    predicted = float(measures.probability(np.abs(pairs.margins)).mean())
    right = measures.right(pairs)
    actual, (_, high) = float(right.mean()), interval(float(right.sum()), len(right))
    if predicted - actual > OVERCONFIDENT and predicted > high:
        yield Alarm(
            "look", stage.name, "overconfidence",
            f"Overconfident: by its margins {predicted:.0%} of {len(right):,} held-out pairs should be right, and "
            f"{actual:.0%} are. Train for fewer epochs or on more pairs, or PPO will chase what it is too sure of.",
        )  # fmt: skip
    if len(pairs.chosen_length):
        groups = measures.by_length(pairs)
        if {"longer", "shorter"} <= groups.keys():
            longer, shorter = groups["longer"], groups["shorter"]
            enough = min(longer.count, shorter.count) >= measures.LEAST_IN_BIN
            if enough and longer.share - shorter.share > BY_LENGTH:
                yield Alarm(
                    "look", stage.name, "a preference for longer replies",
                    f"Prefers longer replies: right in {longer.share:.0%} of {longer.count:,} pairs whose chosen reply "
                    f"is the longer one, in {shorter.share:.0%} of {shorter.count:,} where it is the shorter one. "
                    "`rlhf-pipeline data` tells how far the pairs themselves go by length: add some that do not.",
                )  # fmt: skip


def _of_dpo(stage: Stage) -> Iterator[Alarm]:
    # At the first step nothing has moved, and the accuracy is 0 whatever the data are.
    values = stage.series.get("rewards/accuracies", EMPTY).values[1:]
    if stage.state in DONE:
        yield from _guessing(stage, values, "look")


def _of_kto(stage: Stage) -> Iterator[Alarm]:
    margin = stage.final("eval_rewards/margins")
    if stage.state in DONE and margin is not None and margin <= 0:
        yield Alarm(
            "look", stage.name, "guessing",
            f"Held out, good replies have gained no more than bad ones (margin {short(margin)}): see with "
            "`rlhf-pipeline data` that labels are read as they should be, then raise the learning rate or train for "
            "longer.",
        )  # fmt: skip


def _guessing(stage: Stage, in_training: Numbers, level: str) -> Iterator[Alarm]:
    """The accuracy of a model that guesses; where held-out pairs are few, their interval decides.

    Args:
        stage: a reward or DPO stage.
        in_training: its accuracy on the batches.
        level: of the alarm.
    """
    trained = float(in_training[-LATEST:].mean()) if len(in_training) else None
    accuracy = stage.final(f"eval_{kinds.get(stage.kind).accuracy}")
    pairs = stage.final(kinds.PAIRS) or (len(stage.pairs.chosen) if stage.pairs else None)
    if accuracy is None or not pairs:
        accuracy = accuracy if accuracy is not None else trained
        if accuracy is not None and accuracy < GUESSING:
            text = f"Accuracy is {short(accuracy)}: hardly better than guessing. {_after_guessing(accuracy, trained)}"
            yield Alarm(level, stage.name, "guessing", text)
        return
    low, high = interval(accuracy * pairs, int(pairs))
    said = f"Held-out accuracy is {short(accuracy)}, {short(round(accuracy * pairs, 1))} of {short(pairs)} pairs"
    if accuracy < GUESSING and high < USEFUL:
        text = f"{said}: hardly better than guessing. {_after_guessing(high, trained)}"
        yield Alarm(level, stage.name, "guessing", text)
    elif low <= 0.5:
        yield Alarm(
            "look", stage.name, "too few held-out pairs",
            f"{said}. By so few it is anything from {short(low)} to {short(high)}, so it may be a guess: hold out more "
            "pairs (`eval_fraction`).",
        )  # fmt: skip


def _after_guessing(at_most: float, trained: float | None) -> str:
    """What to do about a model that guesses, by how it does on the pairs that it is trained on."""
    if at_most < 0.5:
        return "It is worse than a coin: chosen and rejected may be the wrong way round."
    if trained is not None and trained > BY_HEART:
        return f"In training it is {short(trained)}, so it learns pairs by heart: train for fewer epochs, or on more."
    return (
        "In training it is no better: see with `rlhf-pipeline data` that the pairs are read as they should be, then "
        "raise the learning rate or train for longer."
    )


# Policies that sample while they train

HACKING = "reward hacking"


def _of_sampling(run: Run, stage: Stage, kind: Kind) -> Iterator[Alarm]:
    kl, budget = stage.series.get("objective/kl", EMPTY), stage.setting("trainer.kl_budget")
    exceeded = stage.final("kl_budget/exceeded_with")
    if exceeded is not None:
        yield Alarm(
            "look", stage.name, "KL over its budget",
            f"KL went over its budget with {short(exceeded)}; the best policy before that, of step "
            f"{short(stage.final('kl_budget/best_step') or 0)}, was kept. To train for longer within it, raise "
            f"kl_coef{_at_present(stage, 'kl_coef')}.",
        )  # fmt: skip
    elif budget is not None and len(kl) and kl.values.max() > budget:
        yield Alarm(
            "bad", stage.name, "KL over its budget",
            f"KL is over its budget of {short(budget)}: it reached {short(kl.values.max())}. Raise "
            f"kl_coef{_at_present(stage, 'kl_coef')}, or the budget.",
        )  # fmt: skip
    ended = _now(stage, "reply/ended")
    if ended is not None and ended < ENDED:
        text = f"Only {ended:.0%} of the replies end by themselves. {_after_no_end(run, stage, kind)}"
        yield Alarm("bad", stage.name, "replies that do not end", text)
    for metric, words in (("reply/distinct_2", "distinct bigrams"), ("reply/unique", "distinct replies")):
        began, now = _began(stage.series.get(metric, EMPTY)), _now(stage, metric)
        if began is not None and now is not None and len(stage.series[metric]) > 2 and now < COLLAPSED * began:
            yield Alarm(
                "bad", stage.name, "collapsed diversity",
                f"Diversity collapsed: {words} fell from {began:.0%} to {now:.0%}. Raise "
                f"{_leash(stage, kind)}, or lower the learning "
                f"rate{_at_present(stage, 'learning_rate')}.",
            )  # fmt: skip
    for metric, key in (("policy/clipfrac_avg", "num_ppo_epochs"), ("clip_ratio/region_mean", "num_iterations")):
        clipped, times = _now(stage, metric), stage.setting(f"trainer.{key}")
        if clipped is not None and clipped > CLIPPED:
            fewer = f", or {key} (now {short(times)})" if times is not None and times > 1 else ""
            yield Alarm(
                "look", stage.name, "clipped updates",
                f"{clipped:.0%} of the policy's updates are clipped: lower the learning "
                f"rate{_at_present(stage, 'learning_rate')}{fewer}.",
            )  # fmt: skip
    alike = _now(stage, "frac_reward_zero_std")
    if alike is not None and alike > ALIKE:
        yield Alarm(
            "look", stage.name, "groups without a difference",
            f"In {alike:.0%} of the groups all replies have the same reward, so they teach nothing: the prompts are "
            "too easy or too hard for this policy, or the reward is too coarse. Raise "
            f"num_generations{_at_present(stage, 'num_generations')} or the temperature, take other prompts, or see "
            "what the rewards return.",
        )  # fmt: skip
    yield from _watched(stage)
    if "watch/kept_step" not in stage.record.metrics:  # else the best policy is the one that is left
        yield from _fallen_judge(run, stage, kind)


def _watched(stage: Stage) -> Iterator[Alarm]:
    """What came of watching a policy while it trained."""
    stopped, kept = stage.final("watch/stopped_at_step"), stage.final("watch/kept_step")
    confirmed = {name: step for name in kinds.WATCHED if (step := stage.final(f"watch/alarm/{name}")) is not None}
    stops = stage.record.inputs.get("watch.stop") or []
    if stopped is not None:
        by = ", ".join(name for name in stops if confirmed.get(name) == stopped)
        yield Alarm(
            "look", stage.name, "a stop by the watch",
            f"The watch stopped it at step {short(stopped)}, by {by}; the policy of step {short(kept or 0)} is kept. "
            "To go further, mend the rewards: read its last replies in samples.jsonl, and watch.jsonl.",
        )  # fmt: skip
    if kept == 0:
        yield Alarm(
            "look", stage.name, "no gain",
            "No measurement was better than that of the policy that it started from, which is kept: nothing was "
            "learned that counts. Lower the learning rate, or see whether the rewards order replies as the judge does "
            "(`rlhf-pipeline docs sample`).",
        )  # fmt: skip
    others = [name for name in confirmed if name in kinds.MEASURES and name not in stops]
    if others:
        yield Alarm(
            "look", stage.name, "replies unlike those at first",
            f"Outside the healthy band that the first policy's replies have: {', '.join(others)}. Read its latest "
            "samples: that may be what was wanted, or a trick (`rlhf-pipeline docs reward-hacking`).",
        )  # fmt: skip


def _leash(stage: Stage, kind: Kind) -> str:
    """The key that keeps the policy near its reference, with its value."""
    key = str(kind.held_back_by)
    return f"{key}{_at_present(stage, key)}"


def _after_no_end(run: Run, stage: Stage, kind: Kind) -> str:
    """What to do about replies that do not end, by whether those of the policy that it started from did."""
    began, parent = _began(stage.series.get("reply/ended", EMPTY)), stage.parents.get("init", "base")
    penalty, limit_key = "missing_eos_penalty", str(kind.reply_limit)
    penalised = f"raise {penalty}{_at_present(stage, penalty)} or {_leash(stage, kind)}."
    if not kind.own_loop:
        penalised = f"raise {_leash(stage, kind)}, or add a function to `rewards` that takes something off for it."
    if began is not None and began >= ENDED:
        return f"At first {began:.0%} did, so it was unlearned: {penalised}"
    if parent not in {one.name for one in run.stages}:
        return "The base was never trained to end one: run an `sft` stage first, on demonstrations."
    before = number(mapping(mapping(run.comparison.get("means")).get(parent)).get("ended"))
    limit = number(mapping(run.comparison.get("settings")).get("max_new_tokens"))
    response = stage.setting(f"trainer.{limit_key}")
    if before is None:
        return (
            f"At the start of the stage they did not either, so begin with what {parent} replies (`rlhf-pipeline "
            f"compare`): if that ends, raise {limit_key}{_at_present(stage, limit_key)}; if not, its "
            "demonstrations are cut by max_length or max_completion_length, or have replies that do not end "
            "(`rlhf-pipeline data`)."
        )
    within = "" if limit is None else f" within {short(limit)} tokens"
    if before >= ENDED and (response is None or limit is None or limit > response):
        return f"{before:.0%} of those of {parent} do{within}: raise {limit_key} (now {_known(response)})."
    if before >= ENDED:
        return f"{before:.0%} of those of {parent} do{within}: {penalised}"
    return (
        f"Of those of {parent}, which it started from, {before:.0%} do{within}, so the cause is there and not in "
        f"{limit_key}: the demonstrations of {parent} are cut by max_length or max_completion_length, have replies "
        "that do not end, or were trained on for too short a time (`rlhf-pipeline data`)."
    )


def _fallen_judge(run: Run, stage: Stage, kind: Kind) -> Iterator[Alarm]:
    """The judge's mean fell, by more than chance explains: while the score rose or stayed, or together with it."""
    score, judge = stage.series.get("gold/score_mean", EMPTY), stage.series.get("gold/judge_mean", EMPTY)
    steps, of_score, of_judge = np.intersect1d(score.steps, judge.steps, return_indices=True)
    scores, means = score.values[of_score], judge.values[of_judge]
    start = fell_since(means, _error(run, stage, means))
    if start is None:
        return
    best = start + int(means[start:].argmax())
    if means[best] - means[-1] <= FELL * max(1.0, float(np.ptp(means))):
        return
    told = f"since step {short(steps[best])} the judge's mean fell from {short(means[best])} to {short(means[-1])}"
    if drop(scores[start:]) > SCORE_FELL * float(np.ptp(scores)):
        yield Alarm(
            "bad", stage.name, "a fall of the judge's mean",
            f"Training went wrong: {told}, and the score that it learns from fell, too. Lower the learning "
            f"rate{_at_present(stage, 'learning_rate')}.",
        )  # fmt: skip
        return
    moved = "rose" if scores[-1] > scores[best] else "stayed"
    reward = run.stage(stage.parents.get("reward", ""))
    first = (
        f" But first see to the alarms of {reward.name}, whose scores it follows."
        if reward and any(_of_reward(reward))
        else ""
    )
    yield Alarm(
        "bad", stage.name, HACKING,
        f"Reward hacking: {told}, while the score that it learns from {moved}, from {short(scores[best])} to "
        f"{short(scores[-1])}. {_hold_back(stage, kind, float(steps[best]))}{first}",
    )  # fmt: skip


def _hold_back(stage: Stage, kind: Kind, step: float) -> str:
    """Which setting keeps the policy nearer to its reference, by what the stage has set; and how far it was at best."""
    kl = stage.series.get("gold/kl", EMPTY)
    then = kl.values[kl.steps == step]
    at_best = f"; at that step KL was {short(then[0])}" if len(then) else ""
    for key in ("kl_budget", "target_kl"):
        if stage.setting(f"trainer.{key}") is not None:
            return f"Lower {key}{_at_present(stage, key)}{at_best}."
    return f"Raise {_leash(stage, kind)}{', or set kl_budget' * kind.own_loop}{at_best}."


def _error(run: Run, stage: Stage, means: Numbers) -> float | None:
    """The standard error of one of the judge's means along a policy's way; None where nothing but the means tells.

    All means have the same one: a mean of ones alone has 0 by its own replies, and is not exact for that.
    """
    logged = stage.series.get("gold/judge_mean_se", EMPTY).values
    if len(logged):
        return float(np.sqrt((logged**2).mean()))
    replies = _replies(run, stage)
    if replies is None or not len(means) or means.min() < 0 or means.max() > 1:
        return None
    return math.sqrt(float((means * (1 - means)).mean()) / (replies - 1))


def _replies(run: Run, stage: Stage) -> float | None:
    """How many replies the judge's mean is over, if more than one."""
    counts = (
        stage.final(kinds.REPLIES),
        sum("judge" in sample for sample in stage.samples),
        number(mapping(run.recipe.get("evaluate")).get("n")),
    )
    return next((count for count in counts if count is not None and count > 1), None)


# The judge


def _worse_than_before(run: Run, stage: Stage) -> Iterator[Alarm]:
    """A policy that the judge likes less than the one it started from, by more than chance explains."""
    parent = run.stage(stage.parents.get("init", ""))
    ours, theirs = _judged(stage), _judged(parent) if parent else None
    if parent is None or ours is None or theirs is None:
        return
    chance = WORSE * math.hypot(ours[1], theirs[1])
    if theirs[0] - ours[0] > max(chance, 1e-9):
        kind = kinds.find(stage.kind)
        setting = kind.held_back_by if kind else None
        kept = f"raise {setting}{_at_present(stage, setting)}, or " if setting else ""
        yield Alarm(
            "bad", stage.name, "a worse policy by the judge",
            f"Worse by the judge than {parent.name}, which it started from: {short(theirs[0])} → {short(ours[0])}. "
            f"Read the replies of both (`rlhf-pipeline compare`); then {kept}train for less, or with a lower learning "
            f"rate{_at_present(stage, 'learning_rate')}.",
        )  # fmt: skip


def _of_rows(stage: Stage) -> Iterator[Alarm]:
    """What is doubtful about rows that a stage made: an AI judge's bias, and replies that are cut, or all alike."""
    if watched.is_a_guess(stage):
        yield Alarm(
            "look", stage.name, "scores that do not order the replies",
            "The scores may order the replies to a prompt no better than a guess, by gold. PPO will hardly be better "
            "than the best of n: mend the reward model first.",
        )  # fmt: skip
    first, low, high = (stage.final(f"judge/first_position{end}") for end in ("", "_low", "_high"))
    if first is not None and low is not None and high is not None and not (low <= 0.6 and high >= 0.4):
        side = "first" if first > 0.5 else "second"
        share = first if first > 0.5 else 1 - first
        yield Alarm(
            "bad" if share > 0.75 else "look", stage.name, "position bias",
            f"The reply shown {side} wins {share:.0%} of the answers. Pairs on which the two orders disagree are ties, "
            "so few pairs are left, and these may be noise: take a stronger judge, or ask it another question.",
        )  # fmt: skip
    unread = stage.final("judge/unread")
    if unread is not None and unread > 0.05:
        yield Alarm(
            "bad" if unread > 0.25 else "look", stage.name, "answers that cannot be read",
            f"{unread:.0%} of the judge's answers name neither reply: see judgements.jsonl, and change the template.",
        )  # fmt: skip
    own = stage.final("judge/own_replies_low")
    if own is not None and own > 0.6:
        yield Alarm(
            "look", stage.name, "self-preference",
            "The judge prefers the replies of its own stage: let another model judge, or see what people say.",
        )  # fmt: skip
    ended, unique = stage.final("reply/ended"), stage.final("reply/unique")
    if ended is not None and ended < 0.8:
        yield Alarm(
            "look", stage.name, "cut replies",
            f"Only {ended:.0%} of the replies end by themselves: raise `sampling.max_new_tokens`, or begin with a "
            "stage that ends its replies.",
        )  # fmt: skip
    if unique is not None and unique < 0.1:
        yield Alarm(
            "look", stage.name, "replies that are all alike",
            f"Only {unique:.0%} of the replies are distinct, so there is little to choose: raise "
            "`sampling.temperature`.",
        )  # fmt: skip


def _same_to_all(stage: Stage) -> Iterator[Alarm]:
    """A judge that gave all replies of a stage the same number: it may read something else than they are."""
    given = [value for one in stage.samples if (value := number(one.get("judge"))) is not None]
    if len(given) >= SAME_TO_ALL and len(set(given)) == 1:
        yield Alarm(
            "look", stage.name, "the same number from the judge for all replies",
            f"The judge gave all {len(given):,} replies the same number, {short(given[0])}: read some of them in "
            f"{stage.name}/samples.jsonl, and see that it looks at what it should.",
        )  # fmt: skip


def _sampled_otherwise(stage: Stage) -> Iterator[Alarm]:
    """Replies that were sampled with other log-probabilities than the model has, so that they are not quite its own."""
    gap = stage.final(kinds.GAP)
    if gap is not None and gap > kinds.MOST_GAP:
        yield Alarm(
            "look", stage.name, "replies that are not quite the model's",
            f"Generation computes other log-probabilities than a whole pass over the same tokens, by {short(gap)} nats "
            "a token: with this model and these versions, the cache or padding on the left changes what it computes. "
            "Replies of other programs may be better or worse than those that were judged.",
        )  # fmt: skip
    gap = stage.final("rollout/log_prob_gap_mean")
    if gap is not None and gap > kinds.MOST_GAP:
        yield Alarm(
            "look", stage.name, "trained on replies that are not quite the policy's",
            f"Replies were sampled with other log-probabilities than the policy has that is trained on them, by "
            f"{short(gap)} nats a token: see whether it is so with another `rollout.engine`, or at a higher precision, "
            "and with which the judge's mean rises further.",
        )  # fmt: skip


def _judged(stage: Stage) -> tuple[float, float] | None:
    """The judge's final mean of a stage and its standard error; None where either is not known."""
    mean, error = stage.final(kinds.JUDGED), stage.final(f"{kinds.JUDGED}_se")
    given = np.array([value for one in stage.samples if (value := number(one.get("judge"))) is not None])
    if error is None and len(given) > 1:  # of an earlier version
        error = float(given.std(ddof=1)) / math.sqrt(len(given))
    return None if mean is None or error is None else (mean, error)


def _at_present(stage: Stage, key: str) -> str:
    """The value of a key of `trainer:`, in brackets, where the recipe sets it."""
    value = stage.setting(f"trainer.{key}")
    return "" if value is None else f" (now {short(value)})"


def _known(value: float | None) -> str:
    return "the default" if value is None else short(value)


def _now(stage: Stage, metric: str) -> float | None:
    values: Numbers = stage.series.get(metric, EMPTY).values
    return float(values[-LATEST:].mean()) if len(values) else None


def _began(series: Series) -> float | None:
    return float(series.values[0]) if len(series) else None
