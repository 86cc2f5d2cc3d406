"""What a report shows of the stages that make rows: their numbers, how replies are scored, and some of the rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.report import charts, watched
from rlhf_pipeline.report.figures import Picture
from rlhf_pipeline.report.gather import Run, Stage, content, mapping, number, turns
from rlhf_pipeline.rundir.words import short

MOST_ROWS = 12  # that are shown of a stage
# Shares of an AI judge that have an interval, in words.
OF_JUDGES = (
    ("judge/first_position", "the first reply wins"),
    ("judge/agreement", "both orders agree"),
    ("judge/own_replies", "its own replies win"),
    ("judge/human_agreement", "it agrees with people"),
)


def numbers(stage: Stage) -> list[tuple[str, str]]:
    """All final numbers of a stage, in words."""
    found = ((name, number(value)) for name, value in stage.record.metrics.items())
    return [(name, short(value)) for name, value in found if value is not None]


def pictures(runs: Sequence[Run], name: str) -> list[Picture]:
    """How the replies of a stage's rows are scored, and the shares that show a judge's bias."""
    chosen = [(i, run, stage) for i, run in enumerate(runs) if (stage := run.stage(name)) is not None and stage.rows]
    best = watched.best_of_n(chosen[0][2]) if len(runs) == 1 and chosen else None
    of_best = [best[0]] if best else []
    return [*_scores(chosen, name, len(runs) > 1), *of_best, *_bias(chosen, name, len(runs) > 1)]


def _scores(chosen: Sequence[tuple[int, Run, Stage]], name: str, several: bool) -> list[Picture]:
    groups = []
    for i, run, stage in chosen:
        scores = [one for row in stage.rows if len(one := _finite(row.get("scores"))) > 1]
        if not scores or "replies" not in stage.rows[0] or not stage.record.inputs.get("n"):
            continue
        whose = f"{run.label}: " if several else ""
        groups.append((f"{whose}all replies", np.concatenate(scores), i if several else 0))
        groups.append((f"{whose}the best replies", np.array([one.max() for one in scores]), i if several else 1))
    if not groups:
        return []
    caption = (
        "The scores of the replies of its first rows, and of the best reply to each prompt. Where the two hills are "
        "the same, the rewards cannot tell the replies apart, and choosing among them teaches nothing."
    )
    return [Picture("Scores of the replies", caption, charts.distributions(f"{name}: scores", groups, "score"))]


def _bias(chosen: Sequence[tuple[int, Run, Stage]], name: str, several: bool) -> list[Picture]:
    shares = []
    for i, run, stage in chosen:
        for metric, words in OF_JUDGES:
            share, low, high = (stage.final(f"{metric}{end}") for end in ("", "_low", "_high"))
            if share is not None and low is not None and high is not None:
                shares.append((f"{run.label}: {words}" if several else words, share, low, high, i if several else 1))
    if not shares:
        return []
    caption = (
        "Shares of the judge's answers, with their intervals (95 %). Without a bias the first reply wins as often as "
        "the second, and its own replies as often as others'; both orders, and people, should agree far more often "
        "than half of the time."
    )
    return [Picture("The judge's bias", caption, charts.intervals(f"{name}: bias of the judge", shares, "share"))]


def people(stage: Stage) -> tuple[list[str], list[list[str]]]:
    """What is known of those who labelled, as the heads of a table and its rows; no rows of other stages."""
    head = ["labels", "seconds a label", "checks right", "agrees with others", "the same in the other order"]
    found, out = stage.people.get("people"), stage.people.get("left_out")
    left_out = out if isinstance(out, list) else []
    return head, [_person(one, left_out) for one in map(mapping, found if isinstance(found, list) else [])]


def _person(one: dict[str, Any], left_out: list[Any]) -> list[str]:
    right, same = mapping(one.get("checks")), mapping(one.get("consistency"))
    share, seconds, labels = (number(one.get(name)) for name in ("agreement", "seconds_median", "labels"))
    return [
        content(one.get("name")) + (" (labels do not count)" if one.get("name") in left_out else ""),
        "" if labels is None else f"{labels:.0f}",
        "" if seconds is None else short(seconds),
        _part(right.get("right"), right.get("of")),
        "" if share is None else f"{share:.0%}",
        _part(same.get("same"), same.get("of")),
    ]


def _part(some: Any, of: Any) -> str:
    known, all_ = number(some), number(of)
    return f"{known:.0f} of {all_:.0f}" if known is not None and all_ else ""


def samples(stage: Stage) -> list[dict[str, Any]]:
    """Some rows: of each the prompt as turns, and the replies with their names, texts and numbers."""
    return [
        {"prompt": turns(row.get("prompt")), "replies": list(_replies(row))}
        for row in stage.rows[:MOST_ROWS]
        if "prompt" in row
    ]


def _replies(row: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Name, text and numbers of each reply of a row."""
    if "chosen" in row:
        of_pair = {"confidence": row.get("confidence"), **mapping(row.get("dimensions"))}
        known = [(name, short(value)) for name, given in of_pair.items() if (value := number(given)) is not None]
        principle = [("principle", content(row["principle"]))] if row.get("principle") else []
        yield "chosen", content(row["chosen"]), [*known, *principle]
        yield "rejected", content(row.get("rejected")), []
        return
    replies, scores = row.get("replies"), row.get("scores")
    policies = mapping(row.get("sampled")).get("policies")
    for i, reply in enumerate(replies if isinstance(replies, list) else []):
        policy = policies[i] if isinstance(policies, list) and i < len(policies) else None
        score = number(scores[i]) if isinstance(scores, list) and i < len(scores) else None
        name = f"reply {i + 1}" + (f", of {policy}" if policy else "")
        yield name, content(reply), [] if score is None else [("score", short(score))]


def _finite(values: Any) -> np.ndarray:
    known = [number(value) for value in values] if isinstance(values, list) else []
    return np.array([value for value in known if value is not None])
