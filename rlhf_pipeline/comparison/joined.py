"""The comparisons of several runs as one: joined by prompt, with win rates between the runs. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.comparison.rates import in_pairs, win_rate
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import resolved
from rlhf_pipeline.recipe import BASE

Policy = tuple[str, tuple[str, str] | None]  # a stage's name, and whose weights it has: `Part.identity`

NOTHING: dict[str, Any] = {"judge": None, "ai_judge": None, "notes": [], "rows": [], "means": {}, "win_rates": []}


class Part(NamedTuple):
    """One of several runs that are compared.

    Attributes:
        label: its name, as no other of them has it.
        run: the run directory.
        base: what its base model is; the same text where it is the same model.
        made_of: the SHA-256 of the weights of its stages that are current.
        policies: those of it that are compared.
        reference: the policy from which its KL is taken.
        reward: the reward stage that scores its replies; None where there is none.
        comparison: what `comparison.json` holds, of its policies but those that an earlier run has too.
    """

    label: str
    run: Path
    base: str
    made_of: dict[str, str]
    policies: list[str]
    reference: str
    reward: str | None
    comparison: dict[str, Any]

    def identity(self, name: str | None) -> tuple[str, str] | None:
        """What is the same for the same weights over the same base, and for the same base; None of no stage."""
        return None if name is None else (self.base, self.made_of.get(name, name))


def labels(runs: Sequence[Path]) -> list[str]:
    """Names of run directories: of each the last part of its path, or as many as tell it from the others.

    Raises:
        InputError: one is given twice.
    """
    paths = [resolved(run) for run in runs]
    for path, given in zip(paths, runs, strict=True):
        if paths.count(path) > 1:
            raise InputError("this run is given twice", place=str(given), hint="name each run once")
    most = max(len(path.parts) for path in paths)
    for count in range(1, most + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def join(parts: Sequence[Part], settings: dict[str, Any]) -> dict[str, Any]:
    """One comparison of all policies of several runs.

    A policy that several runs share, as the base or an SFT stage that was trained once, is in it once, with the replies
    of the first of them. Its reward, or its KL, is None where those runs measure it differently. Others are called
    `RUN: STAGE`.

    Args:
        parts: the runs, in the order that is wanted.
        settings: with which all were sampled.

    Returns:
        What `compare --json` prints of several runs; see docs/json.md.

    Raises:
        InputError: two runs were asked other prompts.
    """
    asked = [row["prompt"] for row in parts[0].comparison["rows"]]
    for part in parts:
        if [row["prompt"] for row in part.comparison["rows"]] != asked:
            raise InputError(
                f"it was asked other prompts than {parts[0].label}, so their replies cannot be compared",
                place=str(part.run),
                hint="`--prompts FILE` asks all runs the same",
            )
    owners: dict[Policy, list[Part]] = {}
    for part in parts:
        for policy in part.policies:
            owners.setdefault((policy, part.identity(policy)), []).append(part)
    order = sorted(owners, key=lambda one: len(owners[one]) < len(parts))  # what all share comes first
    names = {
        (policy, identity): policy if len(having) == len(parts) else f"{having[0].label}: {policy}"
        for policy, identity in order
        if (having := owners[policy, identity])
    }
    replies: dict[str, list[dict[str, Any]]] = {}
    means: dict[str, dict[str, float | None]] = {}
    units: dict[str, dict[str, Any]] = {}  # of each policy, what gave it each of its numbers
    for (policy, identity), name in names.items():
        first, *_ = having = owners[policy, identity]
        unknown = {
            key: None
            for key, role in (("reward", "reward"), ("reward_std", "reward"), ("kl", "reference"))
            if len({part.identity(getattr(part, role)) for part in having}) > 1
            and key in first.comparison["means"][policy]
        }
        replies[name] = [row["replies"][policy] | unknown for row in first.comparison["rows"]]
        means[name] = first.comparison["means"][policy] | unknown
        units[name] = {"reward": first.identity(first.reward), "judge": first.comparison["judge"]}
    win_rates = [
        {"a": later, "b": earlier, "by": by, **rate}
        for earlier, later in in_pairs(list(replies))
        for by in ("reward", "judge")
        if units[later][by] == units[earlier][by]
        and (rate := win_rate([one[by] for one in replies[later]], [one[by] for one in replies[earlier]]))
    ]
    judges, ai_judges = ({one[by] for part in parts if (one := part.comparison)[by]} for by in ("judge", "ai_judge"))
    return {
        "runs": [
            {
                "label": part.label,
                "run": str(part.run.absolute()),
                "made_of": part.made_of,
                "policies": {policy: names[policy, part.identity(policy)] for policy in part.policies},
                "reference": part.reference,
                "reward": part.reward,
            }
            for part in parts
        ],
        "settings": settings,
        "policies": list(replies),
        "reference": parts[0].reference if _is_one(parts, "reference") else None,
        "reward": parts[0].reward if _is_one(parts, "reward") else None,
        "judge": judges.pop() if len(judges) == 1 else None,
        "ai_judge": ai_judges.pop() if len(ai_judges) == 1 else None,
        "ai_judge_figures": {},
        "notes": _notes(parts),
        "rows": [
            {"prompt": prompt, "replies": {name: replies[name][row] for name in replies}}
            for row, prompt in enumerate(asked)
        ],
        "means": means,
        "win_rates": win_rates + _by_ai(parts, names),
    }


def _by_ai(parts: Sequence[Part], names: dict[Policy, str]) -> list[dict[str, Any]]:
    """The AI judge's win rates, which are between policies of one run each."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        for rate in part.comparison["win_rates"]:
            if rate["by"] == "ai_judge" and rate["a"] in part.policies and rate["b"] in part.policies:
                a, b = (names[rate[side], part.identity(rate[side])] for side in "ab")
                found.setdefault((a, b), rate | {"a": a, "b": b})
    return list(found.values())


def _is_one(parts: Sequence[Part], role: str) -> bool:
    """Whether the runs measure by one and the same model: their `reference`, or their `reward`."""
    return len({part.identity(getattr(part, role)) for part in parts}) == 1


def _notes(parts: Sequence[Part]) -> list[str]:
    """What is not known of the comparison, and how far its numbers can be compared."""
    notes = []
    if not _is_one(parts, "reward"):
        notes.append(
            "the runs have different reward models, and rewards have no common unit: compare them within a run alone; "
            "between those runs there are no win rates by reward, and what they share has none"
        )
    if not _is_one(parts, "reference"):
        notes.append("KL is measured from each run's own reference, and those differ")
    if len({part.identity(BASE) for part in parts}) > 1:
        notes.append("the runs have different bases: KL and lengths are in the tokens of each one's own tokenizer")
    if len({one["judge"] for part in parts if (one := part.comparison)["judge"]}) > 1:
        notes.append("the runs have different judges: none is shown, and there are win rates by each one's own alone")
    if any(part.comparison["ai_judge"] for part in parts):
        notes.append("the AI judge has compared the policies of each run with each other, and none between runs")
    said = {note: [part.label for part in parts if note in part.comparison["notes"]] for part in parts
            for note in part.comparison["notes"]}  # fmt: skip
    return notes + [
        note if len(having) == len(parts) else f"{', '.join(having)}: {note}" for note, having in said.items()
    ]
