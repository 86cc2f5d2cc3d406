"""Gates: conditions on a stage's final metrics, and which metrics a stage will have. No torch.

A stage that passes has numbers worth building on; one that does not should not be the start of the next.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe.library_keys import keys
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import Recipe, Stage
from rlhf_pipeline.recipe.watch import is_watched
from rlhf_pipeline.shares import Z, interval

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
CONDITION = re.compile(rf"(>=|<=|>|<)\s*([-+]?{NUMBER})(?:\s*([-+])\s*({NUMBER})\s*se)?", re.ASCII)

OF_STEPS = {"loss", "grad_norm", "learning_rate"}
OF_MEMORY = {
    "before_init_mem_*", "init_mem_*_alloc_delta", "init_mem_*_peaked_delta", "train_mem_*_alloc_delta",
    "train_mem_*_peaked_delta",
}  # fmt: skip
OF_PPO = {
    "objective/kl", "objective/kl_coef", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "reward/score_mean", "reward/score_std", "reply/length", "reply/ended",
    "reply/distinct_2", "reply/unique", "loss/value_avg", "val/clipfrac_avg", "val/num_eos_tokens",
    "value/explained_variance", "value/grad_norm", "rollout/log_prob_gap_mean", "rollout/log_prob_gap_max",
    "rollout/seconds", "rollout/sampling_seconds", "optimise/seconds", "eps", "skipped_steps", "lr", "lr_value",
    "episode",
}  # fmt: skip
OF_PPO_POLICY = {
    "loss/policy_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "policy/entropy_avg", "policy/grad_norm",
    "val/ratio", "val/ratio_var",
}  # fmt: skip
OF_PPO_EVALUATION = {
    "eval_objective/scores", "eval_objective/kl", "eval_objective/rlhf_reward", "eval_reply/length", "eval_reply/ended",
}  # fmt: skip
OF_SAMPLING = {
    "rows", "replies", "reply/length", "reply/ended", "reply/empty", "reply/distinct_2", "reply/unique",
    "tokens_per_second", "prompts/left_out",
}  # fmt: skip
OF_SCORED_SAMPLING = {"scores/mean", "scores/std", "scores/best", "scores/gain"}
OF_BEST = {  # with gold among the rewards
    "best_of_n/order", "best_of_n/order_se", "best_of_n/gain", "best_of_n/gain_se", "best_of_n/peak_kl",
}  # fmt: skip
OF_JUDGE = {"judge/ties", "judge/unread"} | {
    f"judge/{name}{end}"
    for name in (
        "first_position", "agreement", "length_coefficient", "own_replies", "human_agreement", "human_kappa",
    )
    for end in ("", "_low", "_high")
}  # fmt: skip
OF_REVISIONS = {
    "revised", "reply/length", "reply/ended", "first/length", "first/ended", "critique/length", "critique/ended",
    "critique/empty", "revision/empty", "revision/announced", "prompts/empty_reply", "prompts/too_long",
}  # fmt: skip
OF_LABELS = {"label/labels", "label/people", "label/ties", "label/bad"}
OF_SEVERAL_PEOPLE = {  # or of checks, of pairs that came again, and of the reward that learns along
    "label/alpha", "label/consistency", "label/checks", "label/reward_accuracy", "label/left_out",
}  # fmt: skip
OF_ENSEMBLE = {"eval_disagreement", "eval_margin_disagreement"}
# What GRPO logs of each loss: how much of it was clipped.
CLIPPED = {f"clip_ratio/{of}" for of in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
OF_LOSSES = dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), CLIPPED) | {
    "cispo": {"cispo_clip_ratio"}, "vespo": {"vespo/phi_seq_mean"},
}  # fmt: skip
OF_WATCH = {"watch/best_step", "watch/last_step"}
AT_TIMES_OF_WATCH = {"watch/stopped_at_step", "watch/peak_kl"} | {f"watch/alarm/{name}" for name in kinds.WATCHED}
OF_KL_BUDGET = {"kl_budget/best_step", "kl_budget/exceeded_at_step", "kl_budget/exceeded_with"}


@dataclass(frozen=True)
class Gate:
    """A condition on one metric.

    Attributes:
        metric: its name among a stage's final metrics.
        operator: `>=`, `<=`, `>` or `<`.
        bound: what the metric is compared with.
        margin: how many standard errors are added to that.
    """

    metric: str
    operator: str
    bound: float
    margin: float = 0.0

    @property
    def needs_error(self) -> bool:
        """Whether it is to hold beyond the noise, and the metric's standard error is needed."""
        return self.margin != 0

    def holds(self, value: float | None, error: float | None = None) -> bool:
        """Whether a value passes, with its standard error; what is missing or not finite never does."""
        error = error if self.needs_error else 0.0
        if value is None or error is None or not math.isfinite(value) or not math.isfinite(error):
            return False
        return OPERATORS[self.operator](value, self.bound + self.margin * error)


def parse(metric: str, text: str) -> Gate:
    """Read a condition such as `>= 0.65`, or `>= 0.65 + 2 se`: by two standard errors.

    Raises:
        ValueError: it is not one.
    """
    condition = CONDITION.fullmatch(text.strip())
    if condition is None or not math.isfinite(float(condition[2])):
        raise ValueError(
            f"{text!r} is not a condition on `{metric}`: an operator and a number, such as `>= 0.65`, "
            "or `>= 0.65 + 2 se` to hold beyond the noise"
        )
    margin = float(f"{condition[3]}{condition[4]}") if condition[3] else 0.0
    return Gate(metric, condition[1], float(condition[2]), margin)


def outcomes(gates: dict[str, str], metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare a stage's final metrics with its gates.

    Returns:
        For each metric that has a gate: `bound`, the condition as written; `value`, None where the stage has no such
        number; where the condition asks for it, the standard error `se`; and `passed`.

    Raises:
        ValueError: a gate is not a condition.
    """
    result = {}
    for metric, text in gates.items():
        gate, value, error = parse(metric, text), _number(metrics, metric), _number(metrics, f"{metric}_se")
        result[metric] = {"bound": text.strip(), "value": value, "passed": gate.holds(value, error)}
        if gate.needs_error:
            result[metric]["se"] = error
    return result


def _number(metrics: dict[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def describe(outcomes: dict[str, dict[str, Any]], metrics: dict[str, Any]) -> str:
    """What did not pass, in one line; empty where all did.

    Args:
        outcomes: from `outcomes`.
        metrics: the stage's, which tell how sure a value is.
    """
    said = []
    for metric, outcome in outcomes.items():
        if not outcome["passed"]:
            sure = "" if "se" in outcome else how_sure(metric, outcome["value"], metrics)
            said.append(f"{metric} {_said(metric, outcome)}{sure}, not {outcome['bound']}")
    return "; ".join(said)


def how_sure(metric: str, value: float | None, metrics: dict[str, Any]) -> str:
    """The 95 % interval of a value, to stand after it: ` (3 of 5 pairs, 95 %: 0.17 to 0.93)`; empty if nobody knows."""
    pairs, error = _number(metrics, kinds.PAIRS), _number(metrics, f"{metric}_se")
    if value is not None and metric in kinds.SHARES and pairs and 0 <= value <= 1:
        low, high = interval(value * pairs, int(pairs))
        return f" ({value * pairs:.4g} of {pairs:,} pairs, 95 %: {low:.2f} to {high:.2f})"
    if value is not None and error:
        low, high = value - Z * error, value + Z * error
        if metric == kinds.JUDGED and value in (0, 1):  # replies that were all judged so: a share ends there
            low, high = max(low, 0.0), min(high, 1.0)
        return f" (95 %: {low:.3g} to {high:.3g})"
    return ""


def _said(metric: str, outcome: dict[str, Any]) -> str:
    value, gate = outcome["value"], parse(metric, outcome["bound"])
    if value is None:
        return "has no value"
    if gate.needs_error and outcome.get("se") is None:
        return "has no standard error"
    error = f" (se {outcome['se']:.2g})" if gate.needs_error else ""
    rounded = f"{value:.4g}"
    # Rounded, a value just beyond the bound could look as if it held.
    return f"is {value!r}{error}" if gate.holds(float(rounded), outcome.get("se")) else f"is {rounded}{error}"


def check(recipe: Recipe, problems: Problems) -> None:
    """See that every gate is a condition on a metric that its stage will have.

    Args:
        recipe: with `init` and `reward` filled in or not.
        problems: where to note the gates that are not; of a stage in which other things are wrong, nobody knows the
            metrics.
    """
    for name, stage in recipe.stages.items():
        known = not any(problems.within(("stages", name, key)) for key in ("kind", "trainer", *kinds.DATA_KEYS))
        known = known and not problems.within(("evaluate",))
        for metric, text in stage.gates.items():
            path = ("stages", name, "gates", metric)
            try:
                gate = parse(metric, text)
            except ValueError as error:
                hint = f"the operators are {', '.join(OPERATORS)}; for example {metric}: '>= 0.65'"
                problems.add(path, str(error), hint)
                continue
            metrics = known_metrics(recipe, name) | possible_metrics(recipe, name) if known else set()
            if known and metric not in metrics:
                problems.add(
                    path, f"stage `{name}` will have no metric `{metric}`", remedy(recipe, name, metric), of_key=True
                )
            elif known and gate.needs_error and f"{metric}_se" not in metrics:
                with_error = sorted(one.removesuffix("_se") for one in metrics if one.endswith("_se"))
                hint = (
                    f"those that have one are {', '.join(with_error)}"
                    if with_error
                    else f'write it as `{metric}: "{gate.operator} {gate.bound:g}"`'
                )
                problems.add(path, f"`{metric}` has no standard error that a gate could add", hint)


def known_metrics(recipe: Recipe, name: str) -> set[str]:
    """The final metrics that a stage will have, as the recipe alone tells."""
    return _metrics(recipe, name)[0]


def possible_metrics(recipe: Recipe, name: str) -> set[str]:
    """Further metrics that a stage may have: model, data, device or the course of training decide."""
    certain, possible = _metrics(recipe, name)
    return possible - certain


def _metrics(recipe: Recipe, name: str) -> tuple[set[str], set[str]]:
    stage = recipe.stages[name]
    held_out = stage.data.holds_out
    if not stage.facts.trains:
        return _of_rows(stage)
    certain, possible = _of_ppo(stage, held_out) if stage.facts.own_loop else _of_trl(stage, held_out)
    if is_watched(recipe, stage):
        certain |= OF_WATCH | ({"watch/kept_step"} if stage.watch and stage.watch.keep == "best" else set())
        possible |= AT_TIMES_OF_WATCH
    if recipe.evaluate and stage.facts.is_policy:
        certain.add(kinds.GAP)
        if recipe.evaluate.judge is not None:
            certain |= {kinds.JUDGED, kinds.REPLIES}
            (certain if recipe.evaluate.n > 1 else possible).add(f"{kinds.JUDGED}_se")
        if recipe.ai_judge_of(name):
            certain |= {
                kinds.WIN_RATE,
                *(f"{kinds.WIN_RATE}_{what}" for what in ("low", "high", "ties")),
                "judge/pairs",
            }
            possible |= {name for name in OF_JUDGE if "human" not in name}
    return certain, possible


def _of_rows(stage: Stage) -> tuple[set[str], set[str]]:
    """The metrics of a stage that makes rows: those that are certain, and those that are possible."""
    if "n" in stage.facts.takes:
        always, at_times = _of_rewards(stage)
        by_function = all(reward.function is not None for reward in stage.weighed)  # which may apply to no reply
        scored = OF_SCORED_SAMPLING if stage.weighed else set()
        best = OF_BEST if stage.gold and len(stage.inits) == 1 and (stage.n or 1) > 1 else set()
        return OF_SAMPLING | always | (set() if by_function else scored), at_times | scored | best
    if stage.facts.by_people:
        return {"rows"} | OF_LABELS, OF_SEVERAL_PEOPLE
    certain = {"rows", *(number.metric for number in stage.facts.numbers)}
    if "passes" in stage.facts.takes:
        certain |= OF_REVISIONS
    if stage.judge is None:
        return certain, set()
    return certain, {name for name in OF_JUDGE - certain if stage.human or "human" not in name}


def _of_trl(stage: Stage, held_out: bool) -> tuple[set[str], set[str]]:
    """The metrics of TRL's trainers: those that are certain, and those that are possible."""
    kind = stage.facts
    given, certain, possible = stage.trainer, {"train_loss"}, set()
    batches = set(kind.batch_metrics) - {"loss"}
    if kind.samples:
        of_settings, unsure = _of_groups(stage)
        batches |= of_settings
        possible |= unsure | ({f"eval_{metric}" for metric in unsure} if held_out else set())
    if given.get("use_liger_kernel") and kind.is_policy:  # some versions of TRL do not have them then
        unsure = batches & {"entropy", "mean_token_accuracy"}
        batches -= unsure
        possible |= unsure | ({f"eval_{metric}" for metric in unsure} if held_out else set())
    logs = _logs_steps(given)
    if logs is not False:
        (certain if logs else possible).update(OF_STEPS)
    # They are logged with the steps and at the end, unless an evaluation has come between.
    evaluates = "eval_steps" in given or given.get("eval_strategy", "no") != "no"
    lost = evaluates and (not logs or given.get("logging_strategy") == "epoch")
    (possible if lost else certain).update(batches)
    if held_out:
        certain |= {"eval_loss"} | {f"eval_{metric}" for metric in batches}
    if kind.is_policy and given.get("router_aux_loss_coef"):  # mixtures of experts have it
        possible |= {"aux_loss"} | ({"eval_aux_loss"} if held_out else set())
    if kind.reads == "preferences":
        certain.add("dropped_pairs")
        if held_out:
            certain |= {"eval_pairs", f"eval_{kind.accuracy}_se"}
    if stage.members:
        own, members = {number.metric for number in kind.numbers}, range(1, stage.members + 1)
        possible |= {f"member/{member}/{metric}" for member in members for metric in own & possible}
        certain |= {f"member/{member}/{metric}" for member in members for metric in own & certain}
        certain |= OF_ENSEMBLE if held_out else set()
    if kind.reads == "feedback":
        certain |= {"dropped_rows", "desirable_weight", "undesirable_weight"}
    if given.get("include_num_input_tokens_seen", "no") not in ("no", False):
        certain.add("num_input_tokens_seen")
    if given.get("skip_memory_metrics") is False:
        certain |= {metric.replace("*", "cpu") for metric in OF_MEMORY}
        possible |= {metric.replace("*", "gpu") for metric in OF_MEMORY}
    return certain, possible


def _of_groups(stage: Stage) -> tuple[set[str], set[str]]:
    """What GRPO and RLOO log of each batch by their settings and rewards: what is certain, and what is possible."""
    settings = {name: key.default for name, key in keys(stage.kind).items()} | stage.trainer
    certain = OF_LOSSES.get(str(settings.get("loss_type")), set()) | ({"kl"} if settings["beta"] else set())
    always, possible = _of_rewards(stage)
    certain |= always
    if settings.get("entropy_coef") or settings.get("use_adaptive_entropy"):
        possible |= {"policy_loss", "entropy_coef"}
    return certain, possible


def _logs_steps(given: dict[str, Any]) -> bool | None:
    """Whether the steps of a stage that TRL trains are logged at least once; None where its length decides."""
    strategy, interval, steps = (
        given.get(key, default)
        for key, default in (("logging_strategy", "steps"), ("logging_steps", 10), ("max_steps", -1))
    )
    if given.get("logging_first_step") or strategy == "epoch" or (strategy == "steps" and interval <= 1):
        return True
    if strategy == "no":
        return False
    return interval <= steps if steps > 0 else None


def _of_ppo(stage: Stage, held_out: bool) -> tuple[set[str], set[str]]:
    """The metrics of PPO: those that are certain, and those that are possible."""
    given, certain, possible = stage.trainer, set(OF_PPO), set()
    updates, warmup = _updates(given), given.get("value_warmup_updates", 0)
    policy = OF_PPO_POLICY | ({"loss/ptx"} if stage.ptx_data else set())
    if not warmup or (updates is not None and warmup < updates):
        certain |= policy
    elif updates is None:
        possible |= policy
    if given.get("kl_budget") is not None:
        possible |= OF_KL_BUDGET
    always, at_times = _of_rewards(stage)
    certain |= always
    possible |= at_times
    if held_out:
        strategy = "steps" if "eval_steps" in given else given.get("eval_strategy", "no")
        # Training evaluates after its last update, if nothing stops it earlier.
        to_the_end = strategy == "steps" and not given.get("eval_delay") and given.get("kl_budget") is None
        if given.get("eval_on_start") or to_the_end:
            certain |= OF_PPO_EVALUATION | {f"eval_{metric}" for metric in always}
        if strategy != "no":
            possible |= OF_PPO_EVALUATION | {f"eval_{metric}" for metric in always | at_times}
    return certain, possible


def _of_rewards(stage: Stage) -> tuple[set[str], set[str]]:
    """What is logged of the rewards of a stage by their names: what is certain, and what is possible.

    A function may apply to no reply; and of a reward model from outside, the recipe does not say whether it is several.
    """
    certain, possible = set[str](), set[str]()
    for reward in stage.scored_by:
        own = {f"rewards/{reward.label}/{number}" for number in ("mean", "std")}
        (certain if reward.function is None else possible).update(own)
        if reward.stage is not None:
            possible.add(f"rewards/{reward.label}/disagreement")
    return certain, possible


def _updates(given: dict[str, Any]) -> int | None:
    """The number of updates of a PPO stage; None where the number of prompts decides."""
    if given.get("max_steps", -1) > 0:
        return given["max_steps"]
    if given.get("total_episodes") is None:
        return None
    batch = given.get("per_device_train_batch_size", 8) * given.get("gradient_accumulation_steps", 1)
    return math.ceil(given["total_episodes"] / max(batch, 1))


def remedy(recipe: Recipe, name: str, metric: str) -> str:
    """The nearest metric that the stage will have, or could have and what for."""
    stage = recipe.stages[name]
    here = f"stages.{name}"
    needs: dict[str, str | None] = {}
    if stage.facts.own_loop:
        needs.update(dict.fromkeys(OF_KL_BUDGET, f"a budget: set `kl_budget` in {here}.trainer"))
        needs["loss/ptx"] = f"demonstrations: set `ptx_data` in {here} and `ptx_coef` in {here}.trainer"
        need = f"held-out prompts: set `eval_fraction` in {here}.data and `eval_steps` in {here}.trainer"
        needs.update(dict.fromkeys(OF_PPO_EVALUATION, need))
    else:
        certain, possible = _of_trl(stage, held_out=True)
        needs.update(dict.fromkeys(certain | possible, f"held-out rows: set `eval_fraction` in {here}.data"))
        if stage.facts.makes == "reward":
            needs.update(dict.fromkeys(OF_ENSEMBLE, f"an ensemble and held-out rows: set `members` in {here}, and "
                                                    f"`eval_fraction` in {here}.data"))  # fmt: skip
    if "n" in stage.facts.takes:
        needs.update(dict.fromkeys(OF_BEST, f"gold and one policy: add a reward to {here}.rewards that has `weight: 0` "
                                            "and `name: gold`, and more replies than one"))  # fmt: skip
    if stage.facts.is_policy:
        needs[kinds.JUDGED] = "a judge: set `evaluate` at the top of the recipe, with `judge`"
        needs[kinds.WIN_RATE] = "an AI judge: set `evaluate` at the top of the recipe, with `ai_judge`"
    needs.update(dict.fromkeys(known_metrics(recipe, name) | possible_metrics(recipe, name)))
    near = difflib.get_close_matches(metric, sorted(needs), n=1)
    if not near:
        return f"its metrics are {', '.join(sorted(known_metrics(recipe, name)))}"
    need_of_near = needs[near[0]]
    if near[0] == metric:
        return f"it needs {need_of_near}"
    return f"did you mean `{near[0]}`?" + (f" It needs {need_of_near}" if need_of_near else "")
