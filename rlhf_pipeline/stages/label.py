"""People's choices: they are shown pairs, the stage waits until there are labels enough, and makes preferences."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.data.encode import ROW
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.errors import InputError, RunError, Waiting
from rlhf_pipeline.recipe.schema import People
from rlhf_pipeline.rundir import agreement, choices, durable, items, strict_json, waiting
from rlhf_pipeline.rundir.choices import Choice
from rlhf_pipeline.rundir.items import FEATURES, ITEMS, Item, item
from rlhf_pipeline.rundir.labels import LABELS, OTHER, Labels
from rlhf_pipeline.rundir.layout import CHOICES, PEOPLE, RunDirectory
from rlhf_pipeline.rundir.waiting import Labelled
from rlhf_pipeline.stages.features import features, write
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import publish

CONFIG = None
read = rows.candidates  # the rows of such a stage
SHARE = {"tie": 0.5}  # of a dimension in which both are equal


def prepare(job: Job) -> list[Item]:
    """Read what people are shown: the replies to each prompt, and pairs whose better reply is known.

    Raises:
        InputError: the data cannot be read, or no row has two different replies.
    """
    found = []
    for line in job.reader.read(read, job.stage.data).train:
        replies = json.loads(line["replies"])
        if any(reply != replies[0] for reply in replies):
            found.append(item(json.loads(line[ROW])["prompt"], replies))
    if not found:
        raise InputError(
            "no row has two replies that differ, so there is nothing to choose", place=f"stages.{job.name}.data"
        )
    if job.stage.check is not None:
        found += _checks(job.reader.read(rows.preferences_as_text, job.stage.check))
    return list({one.key: one for one in found}.values())


def run(job: Job) -> dict[str, Any]:
    """Put down what people are shown, and once they have labelled enough, publish what they prefer.

    Returns:
        The final metrics: `rows`, and what `figures` says.

    Raises:
        Waiting: there are not labels enough yet.
        RunError: nobody is left whose labels count, or no pair has a winner.
    """
    if not (job.work / ITEMS).is_file():
        job.progress.tell("loading")
        asked = prepare(job)
        write(job.work, features(job.recipe, job.run, job.stage.start, asked))
        items.write(job.work / ITEMS, asked)  # the last one: where it is, both are whole
    assert job.stage.until is not None
    labelled = waiting.of_stage(RunDirectory(job.run), job.name, job.stage.until.says)
    if not labelled.progress.reached:
        raise Waiting(labelled.progress.text)
    with Labels(job.run / LABELS) as labels:
        pairs = labels.pairs(job.name)
    known = agreement.figures(pairs, labelled.labels)
    left_out = left_out_by(job.stage.people or People(), known["people"])
    chosen = choices.choices(pairs, [label for label in labelled.labels if label.person not in left_out])
    found = [row for one in chosen if (row := preference(one))]
    if not found:
        why = f"; {', '.join(sorted(left_out))} are left out by `people`" if left_out else ""
        raise RunError(
            f"no pair has a winner: of {len(chosen)} that people labelled, none has a better reply{why}",
            hint=f"more labels may do it: `rlhf-pipeline label {job.run} {job.name}`",
        )
    job.artifact.mkdir(parents=True, exist_ok=True)
    for name in (ITEMS, FEATURES):
        shutil.copyfile(job.work / name, job.artifact / name)
    durable.write_text(job.artifact / PEOPLE, strict_json.dumps(known, ensure_ascii=False))
    made = [label._asdict() for label in labelled.labels]
    return publish(job, found, figures(labelled, known, chosen, left_out), {CHOICES: made})


def left_out_by(people: People, known: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of those whose labels do not count.

    Args:
        people: whose do, as the recipe says it. A bound leaves out nobody of whom the number is not known.
        known: of each person what `agreement.figures` says.
    """
    out = set(people.leave_out)
    for one in known:
        agrees, (right, of) = one["agreement"], one["checks"].values()
        if people.min_agreement is not None and agrees is not None and agrees < people.min_agreement:
            out.add(one["name"])
        if people.min_checks is not None and of and right / of < people.min_checks:
            out.add(one["name"])
    return out & {one["name"] for one in known}


def preference(one: Choice) -> dict[str, Any] | None:
    """The row that a choice makes; None where neither reply is the better one.

    `confidence` is the share of those who chose one of both, a tie counted half, that chose this one; `dimensions` has
    1 where the chosen reply is better in one, 0 where the other is, and 0.5 where they are equal.
    """
    if one.winner not in OTHER:
        return None
    replies = {"first": one.pair.first, "second": one.pair.second}
    votes, ties = one.counts.get(one.winner, 0), one.counts.get("tie", 0)
    told = votes + one.counts.get(OTHER[one.winner], 0) + ties
    return {
        "prompt": one.pair.prompt,
        "chosen": replies[one.winner],
        "rejected": replies[OTHER[one.winner]],
        "confidence": (votes + ties / 2) / told,
        "dimensions": {name: SHARE.get(value, float(value == one.winner)) for name, value in one.dimensions.items()},
    }


def figures(
    labelled: Labelled, known: Mapping[str, Any], chosen: Sequence[Choice], left_out: Collection[str]
) -> dict[str, float]:
    """The numbers of what people labelled; each only where it is known."""
    people = known["people"]
    right, of = (sum(one["checks"][key] for one in people) for key in ("right", "of"))
    same, again = (sum(one["consistency"][key] for one in people) for key in ("same", "of"))
    found = {
        "label/labels": labelled.progress.labels,
        "label/people": len(people),
        "label/left_out": len(left_out) or None,
        "label/ties": sum(one.winner == "tie" for one in chosen),
        "label/bad": sum(one.winner == "bad" for one in chosen),
        "label/alpha": known["alpha"],
        "label/checks": right / of if of else None,
        "label/consistency": same / again if again else None,
        "label/reward_accuracy": labelled.accuracy,
    }
    return {name: value for name, value in found.items() if value is not None}


def _checks(data: Prepared) -> list[Item]:
    """Pairs whose better reply is known: the first one."""
    found = []
    for line in data.train:
        replies = json.loads(line["chosen"]), json.loads(line["rejected"])
        if replies[0] != replies[1]:
            found.append(item(json.loads(line[ROW])["prompt"], replies, better=0))
    return found
