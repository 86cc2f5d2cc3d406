"""Which pictures a report has, and what to see in each. No torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.schema import BASE
from rlhf_pipeline.report import charts, measures
from rlhf_pipeline.report.charts import Line, Panel
from rlhf_pipeline.report.gather import EMPTY, Numbers, Run, Stage, number, policies, reply_numbers
from rlhf_pipeline.rundir.state import DONE
from rlhf_pipeline.rundir.words import duration, short

LN_2 = float(np.log(2))
POLICY_COLORS = {"base": 5} | {kind.name: kind.color for kind in kinds.KINDS if kind.is_policy}


@dataclass
class Picture:
    """A figure of the page: legend entries are label, colour, dash, and whether it is one point and no line."""

    title: str
    caption: str
    svg: Markup
    legend: list[tuple[str, int, int, bool]] = field(default_factory=list)
    scale: tuple[str, str] | None = None


@dataclass(frozen=True)
class Curve:
    """Metrics that are drawn together.

    Attributes:
        title: of the picture.
        metrics: name and label of each; those that a stage does not have are left out.
        caption: what to see.
        levels: horizontal lines, each with a word.
        floor: what lies lower is drawn there.
    """

    title: str
    metrics: tuple[tuple[str, str], ...]
    caption: str
    levels: tuple[tuple[float, str], ...] = ()
    floor: float = -math.inf


DEFAULT_CURVES = (Curve("Loss", (("loss", "training"), ("eval_loss", "held out")), "Should fall and level off."),)
OF_SAMPLING = (  # policies that sample while they train
    Curve("Score", (("objective/scores", "training"), ("eval_objective/scores", "held out")),
          "The score of the replies: the reward model's, or the sum of all rewards. Should rise, then level off."),
    Curve("KL from the reference", (("objective/kl", "training"), ("eval_objective/kl", "held out")),
          "How far the policy has gone, in nats a reply. Begins at 0 where it starts from its reference; "
          "rising without end, it games the reward."),
    Curve("Reply length", (("reply/length", "training"), ("eval_reply/length", "held out")),
          "In tokens. A steady drift to the limit, or to zero, means that length is rewarded, and not content."),
    Curve("Replies that end", (("reply/ended", "training"), ("eval_reply/ended", "held out")),
          "The share that stop by themselves. Low: replies are cut, and scored without their end.",
          ((1.0, ""),)),
    Curve("Diversity", (("reply/distinct_2", "distinct bigrams"), ("reply/unique", "distinct replies")),
          "Shares within a batch of replies. A fall towards 0 is collapse: the same reply to every prompt."),
)  # fmt: skip
OF_GROUPS = (
    *OF_SAMPLING,
    Curve("Entropy", (("entropy", "training"), ("eval_entropy", "held out")),
          "How uncertain the policy is at each token, in nats. Falls slowly; near 0 there is nothing left to explore."),
    Curve("Groups without a difference",
          (("frac_reward_zero_std", "training"), ("eval_frac_reward_zero_std", "held out")),
          "The share of groups whose replies all have the same reward, and teach nothing. Near 1, prompts are too easy "
          "or too hard."),
    Curve("Clipped updates", (("clip_ratio/region_mean", "policy"),),
          "The share of updates that were clipped: of tokens, or in RLOO of replies. 0 where each batch of replies "
          "makes one step."),
    Curve("Loss", (("loss", "training"), ("eval_loss", "held out")),
          "Moves around 0 and says little by itself; jumps mean that updates are too large."),
)  # fmt: skip
# Of the kinds of which there is more to see; all others have the default.
CURVES = {
    "sft": (
        Curve("Loss", (("loss", "training"), ("eval_loss", "held out")),
              "Should fall and level off. Held-out loss that rises again means too many epochs."),
        Curve("Token accuracy", (("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "held out")),
              "The share of tokens that were the model's first choice. Should rise."),
    ),
    "reward": (
        Curve("Loss", (("loss", "training"), ("eval_loss", "held out")),
              "Begins near ln 2 = 0.693, where the model cannot tell the replies apart, and should fall.",
              ((LN_2, "ln 2: a guess"),)),
        Curve("Accuracy", (("accuracy", "training"), ("eval_accuracy", "held out")),
              "How often the chosen reply has the higher score. Near 1 in training, lower held out: overfitted.",
              ((0.5, "a guess"),)),
        Curve("Margin", (("margin", "training"), ("eval_margin", "held out")),
              "How far the chosen reply's score is ahead. Growing without end, it is overconfident.", ((0.0, ""),)),
        Curve("Scores", (("max_reward", "highest"), ("mean_reward", "mean"), ("min_reward", "lowest")),
              "The scores of all replies. A mean that drifts far from 0 is harmless, but PPO's numbers shift with it."),
    ),
    "ppo": (
        *OF_SAMPLING,
        Curve("Entropy", (("policy/entropy_avg", "of the policy"),),
              "How uncertain the policy is at each token. Falls slowly; near 0 there is nothing left to explore."),
        Curve("Clipped updates", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")),
              "The share of tokens whose update was clipped. Much over 0.2 in the policy: lower the learning rate."),
        Curve("Explained variance", (("value/explained_variance", "of the returns"),),
              "How well the value model predicts the score: 1 is perfectly, 0 not at all. Less is drawn at -1.",
              ((0.0, ""),), -1.0),
        Curve("Policy loss", (("loss/policy_avg", "policy"),),
              "Moves around 0 and says little by itself; jumps mean that updates are too large."),
        Curve("Value loss", (("loss/value_avg", "value"),), "Should fall as the value model learns."),
    ),
    "dpo": (
        Curve("Loss", (("loss", "training"), ("eval_loss", "held out")),
              "The plain loss begins at ln 2 = 0.693, where policy and reference are the same; sums of losses higher.",
              ((LN_2, "ln 2"),)),
        Curve("Accuracy", (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
              "How often the chosen reply has gained more than the rejected one. The first is 0: nothing has moved.",
              ((0.5, "a guess"),)),
        Curve("Margin", (("rewards/margins", "training"), ("eval_rewards/margins", "held out")),
              "By how much, in units of beta times log-probability. Should rise; very large is overfitting.",
              ((0.0, ""),)),
        Curve("Rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
              "Rejected should fall. Where chosen falls far too, good replies become unlikely as well.", ((0.0, ""),)),
    ),
    "grpo": OF_GROUPS,
    "rloo": OF_GROUPS,
    "kto": (
        Curve("Loss", (("loss", "training"), ("eval_loss", "held out")),
              "Begins at half a reply's mean weight, where policy and reference are the same, and should fall."),
        Curve("Margin", (("rewards/margins", "training"), ("eval_rewards/margins", "held out")),
              "By how much more good replies have gained than bad ones, in units of beta times log-probability.",
              ((0.0, ""),)),
        Curve("Rewards", (("rewards/chosen", "good"), ("rewards/rejected", "bad")),
              "Good should rise or stay, bad should fall. Where good falls far too, replies fall apart.", ((0.0, ""),)),
        Curve("KL from the reference", (("kl", "training"), ("eval_kl", "held out")),
              "In nats a reply, by prompts with replies to others, from 0 up. It is 0 where those become unlikely.",
              ((0.0, ""),)),
    ),
}  # fmt: skip
NOT_CURVES = {
    "epoch",
    "train_runtime",
    "total_flos",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
}


def of_stage(runs: Sequence[Run], name: str) -> list[Picture]:
    """The pictures of one stage, of all runs that have it."""
    chosen = [(i, run, stage) for i, run in enumerate(runs) if (stage := run.stage(name)) is not None]
    kind = next((stage.kind for _, _, stage in chosen if stage.kind), "")
    pictures = []
    for curve in curves_of(kind, [stage for _, _, stage in chosen]):
        levels = list(curve.levels)
        if curve.title.startswith("KL"):
            levels += budgets([stage for _, _, stage in chosen])
        lines = _lines(chosen, curve.metrics, len(runs) > 1)
        if lines:
            svg = charts.curves(f"{name}: {curve.title}", Panel(lines, levels, floor=curve.floor))
            legend = [entry(line) for line in lines] if len(lines) > 1 else []
            pictures.append(Picture(curve.title, curve.caption, svg, legend))
    known = kinds.find(kind)
    if known and known.samples:
        pictures[2:2] = [*_frontier(chosen, name, len(runs) > 1), *_score_and_judge(chosen, name, len(runs) > 1)]
    if known and known.makes == "reward":
        pictures += _pairs(chosen, name, len(runs) > 1)
    return pictures


def curves_of(kind: str, stages: Sequence[Stage]) -> tuple[Curve, ...]:
    """The curves of stages of one kind."""
    return (*CURVES.get(kind, DEFAULT_CURVES), *_curves_of_rewards(stages))


def _curves_of_rewards(stages: Sequence[Stage]) -> list[Curve]:
    """Curves of the rewards by their names, where a stage has several, and of how far an ensemble's members differ."""
    names = dict.fromkeys(metric for stage in stages for metric in stage.series)
    found = []
    for which, title, caption, least in (
        ("mean", "Rewards by name",
         "The mean of each reward over the replies that it applies to, without its weight. Where one rises and another "
         "falls, the weights decide which.", 2),
        ("disagreement", "Disagreement of the members",
         "The standard deviation over an ensemble's members, the mean of the replies. A rise says that the policy goes "
         "where the reward model does not know.", 1),
    ):  # fmt: skip
        matches = [re.fullmatch(rf"rewards/(.+)/{which}", name) for name in names]
        curves = [(match[0], match[1]) for match in matches if match]
        if len(curves) >= least:
            found.append(Curve(title, tuple(curves), caption))
    return found


def others(runs: Sequence[Run], name: str) -> list[tuple[str, Markup, str]]:
    """Every other metric of a stage: its name, a small line, and its numbers in words."""
    stages = [(i, stage) for i, run in enumerate(runs) if (stage := run.stage(name)) is not None]
    curves = [curve for own in CURVES.values() for curve in own]
    curves += _curves_of_rewards([stage for _, stage in stages])
    drawn = {metric for curve in curves for metric, _ in curve.metrics}
    names = dict.fromkeys(metric for _, stage in stages for metric in stage.series)
    found = []
    for metric in names:
        if metric in drawn | NOT_CURVES or (metric.endswith(("_runtime", "_per_second")) and "/" not in metric):
            continue
        lines = [(stage.series[metric], i) for i, stage in stages if metric in stage.series]
        values = [series.values for series, _ in lines]
        first, last = (", ".join(short(one[at]) for one in values) for at in (0, -1))
        low, high = min(one.min() for one in values), max(one.max() for one in values)
        words = first if len(values[0]) == 1 else f"{first} → {last}; from {short(low)} to {short(high)}"
        found.append((metric, charts.spark(f"{name}: {metric}", lines), words))
    return found


def of_comparison(runs: Sequence[Run]) -> list[Picture]:
    """The pictures of the policies side by side."""
    return [*_rewards(runs), *_win_rates(runs), *_judge_over_reward(runs)]


def budgets(stages: Sequence[Stage]) -> list[tuple[float, str]]:
    """The KL that stages may not pass, as horizontal lines."""
    found = dict.fromkeys(stage.setting("trainer.kl_budget") for stage in stages)
    return [(value, f"budget {short(value)}") for value in found if value is not None]


Chosen = Sequence[tuple[int, Run, Stage]]


def _lines(chosen: Chosen, metrics: Sequence[tuple[str, str]], several: bool) -> list[Line]:
    logged = [one for one in metrics if any(len(stage.series.get(one[0], EMPTY)) for _, _, stage in chosen)]
    lines = []
    for i, run, stage in chosen:
        for j, (metric, label) in enumerate(logged):
            series = stage.series.get(metric, EMPTY)
            if len(series) and several:  # where two runs are the same, both are seen
                name = f"{run.label}, {label}" if len(logged) > 1 else run.label
                lines.append(Line(name, series, i, j, width=max(1.4, 3.4 - i)))
            elif len(series):
                lines.append(Line(label, series, j, j))
    return lines


def entry(line: Line) -> tuple[str, int, int, bool]:
    """A line's entry in a legend."""
    return line.label, line.color, line.dash, len(line.series) == 1


def _frontier(chosen: Chosen, name: str, several: bool) -> list[Picture]:
    lines = []
    for i, run, stage in chosen:
        kl, score = stage.series.get("objective/kl", EMPTY), stage.series.get("objective/scores", EMPTY)
        steps, of_kl, of_score = np.intersect1d(kl.steps, score.steps, return_indices=True)
        if len(steps) > 1:
            color = i if several else 0
            lines.append((run.label, steps, kl.values[of_kl], score.values[of_score], color))
    if not lines:
        return []
    budget = next(iter(budgets([stage for _, _, stage in chosen])), (None, ""))[0]
    svg = charts.frontier(f"{name}: reward over KL", lines, budget)
    caption = (
        "Each point is a step: the score that the policy reached, and its KL. Up and to the left is better; "
        "a path to the right that does not rise pays KL for nothing."
    )
    steps = lines[0][1]
    return [
        Picture(
            "Reward and KL", caption, svg, [(line[0], line[4], 0, True) for line in lines] if several else [],
            None if several else (f"step {short(steps[0])}", short(steps[-1])),
        )
    ]  # fmt: skip


def _score_and_judge(chosen: Chosen, name: str, several: bool) -> list[Picture]:
    score = _lines(chosen, (("gold/score_mean", "score"),), several)
    judge = _lines(chosen, (("gold/judge_mean", "judge"),), several)
    if not score or not judge:
        return []
    panels = (Panel(score, title="score"), Panel(judge, title="judge"))
    svg = charts.curves(f"{name}: score and judge", *panels)
    caption = (
        "The same replies to held-out prompts: what training optimises (above), and the judge, who knows better "
        "(below). Both should rise. Score up while the judge falls is reward hacking: stop where the judge was best."
    )
    return [Picture("Score and judge", caption, svg, [entry(line) for line in score] if several else [])]


def _pairs(chosen: Chosen, name: str, several: bool) -> list[Picture]:
    known = [(i if several else 0, run.label, stage.pairs) for i, run, stage in chosen if stage.pairs]
    if not known:
        return []
    legend = [(label, color, 0, True) for color, label, _ in known] if several else []
    pictures = []
    groups = [
        (f"{label}: {side}" if several else side, scores, color if several else which)
        for color, label, pairs in known
        for which, (side, scores) in enumerate((("chosen", pairs.chosen), ("rejected", pairs.rejected)))
    ]
    pictures.append(
        Picture(
            "Scores of held-out pairs",
            "Chosen replies should lie to the right of rejected ones; the more they overlap, the less the model knows.",
            charts.distributions(f"{name}: scores of held-out pairs", groups, "score"),
        )
    )
    x = np.linspace(0.5, 1, 20)
    pictures.append(
        Picture(
            "Calibration",
            "How sure the model is of the reply it prefers, against how often that one was chosen; numbers "
            "count pairs. On the dashed line it is as sure as it should be, below it overconfident.",
            charts.shares(
                f"{name}: calibration",
                [(label, measures.calibration(pairs), color) for color, label, pairs in known],
                "predicted", (x, x), None,
            ),
            legend,
        )
    )  # fmt: skip
    pictures.append(
        Picture(
            "Accuracy by margin",
            "Pairs in groups by the distance of their two scores. Should rise: where it is sure, it should be right. "
            "The dashed line is what the margin promises.",
            charts.shares(
                f"{name}: accuracy by margin",
                [
                    (label, measures.accuracy_by(np.abs(pairs.margins), measures.right(pairs)), color)
                    for color, label, pairs in known
                ],
                "|margin|", _promise(max(float(np.abs(pairs.margins).max()) for _, _, pairs in known)),
            ),
            legend,
        )
    )  # fmt: skip
    ensembles = [one for one in known if len(one[2].margin_std)]
    if ensembles:
        pictures.append(
            Picture(
                "Accuracy by disagreement",
                "Pairs in groups by how far the members of the ensemble differ in their margins. Should fall: they are "
                "then wrong more often where they disagree. If it does not, their disagreement warns of nothing.",
                charts.shares(
                    f"{name}: accuracy by disagreement",
                    [
                        (label, measures.accuracy_by(pairs.margin_std, measures.right(pairs)), color)
                        for color, label, pairs in ensembles
                    ],
                    "standard deviation of the members' margins",
                ),
                legend,
            )
        )  # fmt: skip
    with_lengths = [one for one in known if len(one[2].chosen_length)]
    if with_lengths:
        groups_by_length = [
            (
                label,
                measures.accuracy_by(pairs.chosen_length - pairs.rejected_length, measures.right(pairs)),
                color,
            )
            for color, label, pairs in with_lengths
        ]
        said = "; ".join(
            (f"{label}: " if several else "")
            + ", ".join(f"{word} {one.share:.0%} of {one.count:,}" for word, one in measures.by_length(pairs).items())
            for _, label, pairs in with_lengths
        )
        pictures.append(
            Picture(
                "Accuracy by length",
                "To the right the chosen reply is the longer one. High there and low on the left: the model judges by "
                f"length. Right where the chosen reply is {said}.",
                charts.shares(
                    f"{name}: accuracy by length", groups_by_length, "tokens by which the chosen reply is longer",
                    zero=True,
                ),
                legend,
            )
        )  # fmt: skip
    return pictures


def _promise(largest: float) -> tuple[Numbers, Numbers]:
    x = np.linspace(0, largest, 40)
    return x, measures.probability(x)


def policy_color(name: str, names: Sequence[str]) -> int:
    """The colour of a policy: the same one in every report where it has its usual name."""
    if name in POLICY_COLORS:
        return POLICY_COLORS[name]
    rest = [one for one in names if one not in POLICY_COLORS]
    return 3 + rest.index(name) % 2 if name in rest else 3


def _rewards(runs: Sequence[Run]) -> list[Picture]:
    groups = []
    for i, run in enumerate(runs):
        names = policies(run)
        for policy in names:
            values = reply_numbers(run, policy, "reward")
            if len(values):
                several = len(runs) > 1
                label = f"{run.label}: {policy}" if several else policy
                groups.append((label, values, i if several else policy_color(policy, names)))
    if not groups:
        return []
    svg = charts.distributions("Rewards of replies by policy", groups, "reward model's score")
    caption = (
        "The reward model's scores of all replies to the same prompts. Training should move the whole hill to the "
        "right; one sharp peak where there was a hill is a policy that found a single trick."
    ) + of_their_own(runs)
    return [Picture("Rewards before and after", caption, svg)]


def of_their_own(runs: Sequence[Run]) -> str:
    """A warning where scores of several reward models are in one picture: they have no common unit."""
    models = {stage.record.weights for run in runs for stage in run.reward_models()} - {None}
    return " The runs have different reward models: compare scores only within a run." if len(models) > 1 else ""


def _win_rates(runs: Sequence[Run]) -> list[Picture]:
    pictures = []
    for by, who in (("judge", "the judge"), ("ai_judge", "the AI judge"), ("reward", "the reward model")):
        rows = []
        for i, run in enumerate(runs):
            listed = run.comparison.get("win_rates")
            for one in listed if isinstance(listed, list) else []:
                if not isinstance(one, dict) or one.get("by") != by:
                    continue
                rate, low, high = (number(one.get(key)) for key in ("win_rate", "low", "high"))
                if rate is not None and low is not None and high is not None:
                    label = f"{one.get('a')} against {one.get('b')}"
                    several = len(runs) > 1
                    color = i if several else policy_color(str(one.get("a")), policies(run))
                    rows.append((f"{run.label}: {label}" if several else label, rate, low, high, color))
        if rows:
            caption = f"How often {who} prefers the first one's reply to the same prompt; ties count half. " + (
                "PPO was trained to please the reward model, so it cannot judge PPO."
                if by == "reward"
                else "An interval (95 %) that touches the middle decides nothing."
            )
            if by == "ai_judge":
                caption += " Each two replies were shown in both orders; where it then names two winners, it is a tie."
            svg = charts.intervals(f"Win rates by {who}", rows[:24], "share of prompts won")
            pictures.append(Picture(f"Win rates, by {who}", caption, svg))
    return pictures


def _judge_over_reward(runs: Sequence[Run]) -> list[Picture]:
    points = []
    for i, run in enumerate(runs):
        names = policies(run)
        for policy in names:
            reward, judge = (reply_numbers(run, policy, key) for key in ("reward", "judge"))
            if len(reward) and len(judge):
                several = len(runs) > 1
                label = f"{run.label}: {policy}" if several else policy
                color = i if several else policy_color(policy, names)
                points.append((label, float(reward.mean()), float(judge.mean()), color))
    if len(points) < 2:
        return []
    svg = charts.scatter("Judge over reward by policy", points, "mean score of the reward model")
    caption = (
        "Each policy's mean by the judge (upwards) over its mean by the reward model (to the right). A policy "
        "further right but lower has learned what the reward model likes, not what is good."
    ) + of_their_own(runs)
    return [Picture("Judge over reward", caption, svg)]


def _from_outside(value: str, nodes: list[tuple[str, str, str]], otherwise: str) -> str:
    """The node of an adapter from outside, which is added where it is new; `otherwise` for what is none."""
    if not outside.is_one(value):
        return otherwise
    name = outside.label(value)
    name = name if len(name) <= 13 else f"{name[:12]}…"
    if (name, "from outside", "done") not in nodes:
        nodes.append((name, "from outside", "done"))
    return name


def of_lineage(run: Run) -> Markup | None:
    """What was made from what, as far as the recipe and the records say."""
    if not run.stages:
        return None
    names = {stage.name for stage in run.stages}
    nodes, edges = [(BASE, "pretrained", "done")], []
    for stage in run.stages:
        took = duration(stage.wall_s)
        word = stage.kind if stage.kind != stage.name else took if stage.state in DONE else stage.state
        nodes.append((stage.name, word or "unknown kind", stage.state))
        found = dict(stage.parents)
        kind = kinds.find(stage.kind)
        if (kind is None or kind.trains) and "init" not in found:
            found["init"] = BASE
        if stage.record.inputs.get("judge.model") == BASE:
            found["judge"] = BASE
        for role, parent in found.items():
            of = role.partition(".")[0]
            otherwise = BASE if of in ("init", "judge", "reference") else ""
            start = parent if parent in names else _from_outside(parent, nodes, otherwise)
            if start:
                edges.append((start, stage.name, {"init": "weights"}.get(of, of)))
    nodes.sort(key=lambda node: node[1] != "from outside")  # parents come first
    return charts.lineage("What was made from what", nodes, edges)
