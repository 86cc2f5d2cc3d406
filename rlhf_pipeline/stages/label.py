"""People's choices: they are shown pairs, the stage waits until there are labels enough, and makes preferences."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.data.encode import ROW
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.data.turns import columns_of
from rlhf_pipeline.errors import InputError, Waiting
from rlhf_pipeline.rundir import agreement, choices, durable, items, strict_json, waiting
from rlhf_pipeline.rundir.choices import Choice
from rlhf_pipeline.rundir.items import FEATURES, ITEMS, Item, item
from rlhf_pipeline.rundir.layout import CHOICES, PEOPLE, RunDirectory
from rlhf_pipeline.rundir.waiting import Labelled
from rlhf_pipeline.stages.features import features, write
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import publish

CONFIG = None
read = rows.candidates  # the rows of such a stage


def prepare(job: Job) -> list[Item]:
    """Read what people are shown: the replies to each prompt, and pairs whose better reply is known.

    Raises:
        InputError: the data cannot be read, or no row has two different replies.
    """
    found = []
    for line in job.reader.read(read, job.stage.data).train:
        with contextlib.suppress(ValueError):  # no two replies differ
            found.append(item(json.loads(line[ROW])["prompt"], json.loads(line["replies"])))
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
        Waiting: there are not labels enough yet, or none says that a reply is better.
    """
    if not (job.work / ITEMS).is_file():
        job.progress.tell("loading")
        asked = prepare(job)
        write(job.work, features(job.recipe, job.run, job.stage.start, asked))
        items.write(job.work / ITEMS, asked)  # the last one: where it is, both are whole
    assert job.stage.until is not None
    people = job.stage.people.says if job.stage.people else {}
    labelled = waiting.of_stage(RunDirectory(job.run), job.name, job.stage.until.says, people)
    if not labelled.progress.reached:
        raise Waiting(labelled.progress.text)
    known = agreement.figures(labelled.pairs, labelled.labels)
    chosen = choices.choices(labelled.pairs, labelled.counted)
    found = [row | columns_of(one.pair.prompt) for one in chosen if (row := choices.preference(one))]
    job.artifact.mkdir(parents=True, exist_ok=True)
    for name in (ITEMS, FEATURES):
        shutil.copyfile(job.work / name, job.artifact / name)
    about = known | {"left_out": sorted(labelled.left_out)}
    durable.write_text(job.artifact / PEOPLE, strict_json.dumps(about, ensure_ascii=False))
    made = [label._asdict() for label in labelled.labels]
    return publish(job, found, figures(labelled, known, chosen), {CHOICES: made})


def figures(labelled: Labelled, known: Mapping[str, Any], chosen: Sequence[Choice]) -> dict[str, float]:
    """The numbers of what people labelled; each only where it is known."""
    people = known["people"]
    right, of = (sum(one["checks"][key] for one in people) for key in ("right", "of"))
    same, again = (sum(one["consistency"][key] for one in people) for key in ("same", "of"))
    found = {
        "label/labels": labelled.progress.labels,
        "label/people": len(people),
        "label/left_out": len(labelled.left_out) or None,
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
        with contextlib.suppress(ValueError):  # both replies are the same
            found.append(item(json.loads(line[ROW])["prompt"], replies, better=0))
    return found
