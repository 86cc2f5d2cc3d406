"""Labels to files that recipes read, and labels that were made elsewhere. No torch.

Label Studio's exports are those of its `Pairwise` tag (https://labelstud.io/tags/pairwise and
https://labelstud.io/guide/export): a list of tasks with `data` and `annotations`, whose `result` has
`{"type": "pairwise", "value": {"selected": "left"}}`, or, as JSON-MIN, the columns of `data` with the choice beside.

Argilla's are those of `dataset.records.to_json()` and `.to_list(flatten=True)`, as its code writes them
(argilla/src/argilla/records/_io/_generic.py and _resource.py of version 2): records with `fields` and `responses`, or
with the fields beside `QUESTION.responses` and `QUESTION.responses.users`. The question ranks two fields, or names one.
"""

import itertools
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.data.columns import ASKED, is_turns
from rlhf_pipeline.data.files import Located, rows_of_file
from rlhf_pipeline.data.turns import columns_of
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.data_files import file_type
from rlhf_pipeline.rundir import agreement, choices, durable, strict_json
from rlhf_pipeline.rundir.choices import Choice, item_of_pairs
from rlhf_pipeline.rundir.items import Prompt, Reply, item
from rlhf_pipeline.rundir.labels import Label, Labels, Pair

Shape = Literal["preferences", "feedback", "labels"]
Choices = Literal["first", "second", "tie", "bad", "skip"]
SPACE = uuid.UUID("7f3f5f0e-5b07-4b0a-9c55-2f6f2c9a1c0d")  # of the ids that imported labels get
# What people call the two replies, where an export does not say.
SIDES = (
    ("response1", "response2"), ("response_1", "response_2"), ("response_a", "response_b"), ("answer1", "answer2"),
    ("answer_a", "answer_b"), ("reply1", "reply2"), ("completion1", "completion2"), ("text1", "text2"),
    ("output1", "output2"), ("option1", "option2"), ("left", "right"), ("a", "b"),
)  # fmt: skip
TIES = ("tie", "equal", "both", "same", "both_good")
BAD = ("bad", "both_bad", "neither", "none")


class Said(NamedTuple):
    """What somebody said of two replies somewhere else.

    Attributes:
        prompt: text, or turns.
        first: a reply.
        second: the other one.
        choice: in this order.
        person: who.
        source: what tells this label from others of the file.
        seconds: how long it took, where that is known.
    """

    prompt: Prompt
    first: Reply
    second: Reply
    choice: Choices
    person: str
    source: str
    seconds: float | None = None


# To files


def give(out: Path, file: Path, stage: str, shape: Shape, people: Mapping[str, Any] | None = None) -> str:
    """Write what people chose of a stage's pairs.

    Args:
        out: the file to write, .jsonl or .json.
        file: the file of labels.
        stage: whose labels.
        shape: what each row shall be.
        people: whose labels count, as the recipe's `people` has it; every click is written all the same.

    Returns:
        What to say of it.

    Raises:
        InputError: there are no labels, or `out` cannot be such a file.
    """
    if file_type(out) not in (".jsonl", ".json") or out.suffix not in (".jsonl", ".json"):
        raise InputError("the file should end in .jsonl or .json", place=f"--export {out}")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}", place=f"--export {out}")
    labels = Labels.open_existing(file)
    if labels is None:
        raise InputError("there are no labels yet", place=str(file))
    with labels:
        pairs, made = labels.pairs(stage), labels.of(stage, undone=shape == "labels")
    if shape == "labels":
        rows = every_click(pairs, made)
    else:
        out_of_it = agreement.left_out(people, agreement.figures(pairs, made)["people"]) if people else ()
        found = choices.choices(pairs, [label for label in made if label.person not in out_of_it])
        rows = preferences(found) if shape == "preferences" else feedback(found)
    if not rows:
        raise InputError(
            f"nothing of the {len(made)} labels of `{stage}` makes {shape}" if made else f"`{stage}` has no labels yet",
            place=str(file),
            hint="pairs that people found equal make no rows" if made else None,
        )
    if out.suffix == ".json":
        text = strict_json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        durable.write_text(out, text)
    except OSError as error:
        raise InputError(f"the file cannot be written: {error.strerror}", place=f"--export {out}") from None
    return f"{len(rows)} row{'s' * (len(rows) != 1)} of {shape} in {out}"


def preferences(found: Iterable[Choice]) -> list[dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected`, one for each pair of which people preferred a reply.

    `confidence` and `dimensions` are those of `choices.preference`, as in the rows of a label stage. Beside them
    `people`, who said so or otherwise, and `agreement`, the share of them who chose the winner.
    """
    rows = []
    for one in found:
        made = choices.preference(one)
        if made is not None:
            replies = {side: _as_row(made[side], one.pair.prompt) for side in ("chosen", "rejected")}
            beside = {"people": one.people, "agreement": round(one.agreement, 6)}
            beside |= {"confidence": round(made["confidence"], 6)}
            beside |= {"dimensions": made["dimensions"]} if made["dimensions"] else {}
            rows.append(columns_of(one.pair.prompt) | replies | beside)
    return rows


def feedback(found: Iterable[Choice]) -> list[dict[str, Any]]:
    """Rows of `prompt`, `completion` and `label`: whether a reply won more of its pairs than it lost.

    Both replies of a pair that people found bad have lost. What won as often as it lost has no row.
    """
    wins: dict[str, tuple[Prompt, Reply, int]] = {}
    for one in found:
        for side, reply in (("first", one.pair.first), ("second", one.pair.second)):
            key = json.dumps([one.pair.prompt, reply], sort_keys=True)
            won = 0 if one.winner == "tie" else 1 if one.winner == side else -1
            wins[key] = (one.pair.prompt, reply, won + wins.get(key, (None, None, 0))[2])
    return [
        columns_of(prompt) | {"completion": _as_row(reply, prompt), "label": won > 0}
        for prompt, reply, won in wins.values()
        if won
    ]


def every_click(pairs: Mapping[str, Pair], labels: Iterable[Label]) -> list[dict[str, Any]]:
    """Rows with all that is known of each label, those that were taken back too; `take` reads them."""
    rows = []
    for label in labels:
        pair = pairs[label.pair]
        texts = {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "better": pair.better}
        rows.append(label._asdict() | texts)
    return rows


def _as_row(reply: Reply, prompt: Prompt) -> Any:
    """A reply as the column of a row: beside turns it is one, as TRL has it too."""
    if isinstance(reply, str):
        return reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}]
    return [reply]


# From files


def take(source: Path, file: Path, setup: Setup) -> str:
    """Add labels that were made elsewhere. What was added before is not added again.

    Args:
        source: the file to read.
        file: the file of labels.
        setup: for what they are.

    Returns:
        What to say of it.

    Raises:
        InputError: it cannot be read, or is none of the formats; nothing was added then.
    """
    if not source.is_file():
        raise InputError("there is no such file", place=f"--import {source}")
    rows = list(rows_of_file(source))
    if not rows:
        raise InputError("there are no rows", place=str(source))
    read, known = _reader(rows[0], source), item_of_pairs(setup.items)
    ready = []
    for located in rows:
        try:
            ready += [_matched(label, pair, known) for label, pair in read(located, setup.stage)]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"this is no label: {what}", place=f"{located.place}: row {located.number}") from None
    with Labels(file) as labels:
        added = sum(labels.add(label, pair) for label, pair in ready)
    if not ready:
        return f"warning: nobody has labelled anything in {source}"
    here = sum(label.pair in known for label, _ in ready)
    text = f"{added} of {len(ready)} labels are new"
    others = len(ready) - here
    if others:
        who = "none is of a pair that" if not here else f"{others} {'is' if others == 1 else 'are'} of pairs that"
        what = "asks about, so none counts" if not here else "does not ask about, and do not count"
        text = f"warning: {text}, and {who} `{setup.stage}` {what}; prompt and replies must be the same to the letter"
    return text


def _matched(label: Label, pair: Pair, known: Mapping[str, str]) -> tuple[Label, Pair]:
    """A label with its pair as the items have it: text may be a user's turn there."""
    if pair.key not in known and isinstance(pair.prompt, str):
        as_turn = _pair([{"role": "user", "content": pair.prompt}], pair.first, pair.second)
        if as_turn.key in known:
            return label._replace(pair=as_turn.key), as_turn._replace(better=pair.better)
    return label, pair


def _reader(first: Located, source: Path) -> Any:
    row = first.row
    if {"id", "pair", "choice", "first", "second"} <= row.keys():
        return _own
    if isinstance(row.get("data"), dict) and "annotations" in row:
        return lambda located, stage: _added(_label_studio(located), stage)
    if "annotator" in row or "annotation_id" in row:
        return lambda located, stage: _added(_label_studio_min(located), stage)
    if isinstance(row.get("fields"), dict) and "responses" in row:
        return lambda located, stage: _added(_argilla(located), stage)
    if any(name.endswith(".responses") for name in row):
        return lambda located, stage: _added(_argilla_flat(located), stage)
    raise InputError(
        f"its columns ({', '.join(row)}) are of no export that is read",
        place=str(source),
        hint="an export of Label Studio's as JSON or JSON-MIN, of Argilla's records, or one of `--export` as labels",
    )


def _own(located: Located, stage: str) -> Iterator[tuple[Label, Pair]]:
    row = located.row
    pair = _pair(row["prompt"], row["first"], row["second"])._replace(better=row.get("better"))
    label = Label(**{name: row[name] for name in Label._fields})._replace(pair=pair.key, stage=stage)
    yield _checked(label), pair


def _added(said: Iterable[Said], stage: str) -> Iterator[tuple[Label, Pair]]:
    for one in said:
        pair = _pair(one.prompt, one.first, one.second)
        id_ = str(uuid.uuid5(SPACE, json.dumps([stage, pair.key, one.person, one.source, one.choice])))
        yield _checked(Label(id_, pair.key, stage, one.person, one.choice, seconds=one.seconds, how="shared")), pair


def _pair(prompt: Any, first: Any, second: Any) -> Pair:
    """A pair from outside, that is one."""
    if not (isinstance(prompt, str) or is_turns(prompt)):
        raise ValueError("its prompt is neither text nor turns")
    for reply in (first, second):
        if not isinstance(reply, (str, dict)):
            raise ValueError("a reply is neither text nor a turn")
    return Pair.of(item(prompt, [first, second]).key, prompt, first, second)


def _checked(label: Label) -> Label:
    if label.choice not in ("first", "second", "tie", "bad", "skip") or label.left not in (0, 1):
        raise ValueError(f"`{label.choice}` is no choice")
    if not all(isinstance(text, str) for text in (label.id, label.person, label.reason, label.how)):
        raise ValueError("its id, person, reason and how should be text")
    if not isinstance(label.dimensions, dict) or not isinstance(label.seconds, (int, float, type(None))):
        raise ValueError("its dimensions or seconds are none")
    return label


def _label_studio(located: Located) -> Iterator[Said]:
    data = located.row["data"]
    for annotation in located.row["annotations"]:
        results = [one for one in annotation.get("result") or () if one.get("type") == "pairwise"]
        choice: Choices | None = "skip" if annotation.get("was_cancelled") else None
        names = None
        for one in results:
            names = [name.strip() for name in str(one.get("to_name", "")).split(",")]
            choice = choice or _side(one["value"]["selected"])
        if choice is None:
            continue  # nothing was selected
        prompt, (first, second) = _columns_of(data, names)
        who = annotation.get("completed_by")
        person = who.get("email") or who.get("id") if isinstance(who, dict) else who
        seconds = annotation.get("lead_time")
        yield Said(
            prompt,
            first,
            second,
            choice,
            _person("Label Studio", person),
            f"annotation {annotation.get('id')}",
            seconds,
        )


def _label_studio_min(located: Located) -> Iterator[Said]:
    row = located.row
    for name, value in row.items():
        selected = value.get("selected") if isinstance(value, dict) else value
        if name not in ("left", "right") and selected in ("left", "right"):
            prompt, (first, second) = _columns_of(row, None)
            source = f"annotation {row.get('annotation_id', row.get('id'))}"
            person = _person("Label Studio", row.get("annotator"))
            yield Said(prompt, first, second, _side(selected), person, source, row.get("lead_time"))


def _side(selected: str) -> Literal["first", "second"]:
    return {"left": "first", "right": "second"}[selected]  # type: ignore[return-value]


def _argilla(located: Located) -> Iterator[Said]:
    fields, source = located.row["fields"], f"record {located.row.get('id')}"
    for question, responses in located.row["responses"].items():
        for response in responses:
            yield from _of_argilla(fields, question, response["value"], response.get("user_id"), source)


def _argilla_flat(located: Located) -> Iterator[Said]:
    row, end = located.row, ".responses"
    for column, values in row.items():
        if column.endswith(end) and values:
            users = row.get(f"{column}.users") or [None] * len(values)
            states = row.get(f"{column}.status") or [None] * len(values)
            for value, user, state in zip(values, users, states, strict=True):
                if state in (None, "submitted"):
                    yield from _of_argilla(row, column.removesuffix(end), value, user, f"record {row.get('id')}")


def _of_argilla(fields: Mapping[str, Any], question: str, value: Any, user: Any, source: str) -> Iterator[Said]:
    """What a response to a question says of two fields; nothing where the question is another one."""
    choice: Choices | None = None
    names: Sequence[str] | None = None
    if isinstance(value, list) and len(value) == 2:
        names, choice = _of_ranking(value, fields)
    elif isinstance(value, str):
        names, field = _sides(fields), _field(value, fields)
        plain = value.strip().lower().replace("-", "_").replace(" ", "_")
        if names and field in names:
            choice = "first" if field == names[0] else "second"
        elif names and (plain in TIES or plain in BAD):
            choice = "tie" if plain in TIES else "bad"
    if choice is not None:
        prompt, (first, second) = _columns_of(fields, names)
        yield Said(prompt, first, second, choice, _person("Argilla", user), f"{source} {question}")


def _of_ranking(value: Sequence[Any], fields: Mapping[str, Any]) -> tuple[list[str], Choices | None]:
    """Two fields in their order in the record, and which one a ranking puts first; None where it is of none.

    It is a list from best to worst of names, or of names with `rank`, where equal ranks are a tie.
    """
    ranked: list[tuple[str, float]] = []
    for place, one in enumerate(value):
        field = _field(one.get("value") if isinstance(one, dict) else one, fields)
        rank = one.get("rank") if isinstance(one, dict) else place
        if field is None or not isinstance(rank, (int, float)):
            return [], None
        ranked.append((field, rank))
    order = list(fields)
    (first, rank), (second, other) = sorted(ranked, key=lambda one: order.index(one[0]))
    return [first, second], "tie" if rank == other else "first" if rank < other else "second"


def _field(name: Any, fields: Mapping[str, Any]) -> str | None:
    """The field that an option of a question is: of the same name, but for signs between its parts."""
    plain = str(name).lower().replace("-", "").replace("_", "")
    return next((field for field in fields if field.lower().replace("-", "").replace("_", "") == plain), None)


def _sides(fields: Mapping[str, Any]) -> list[str] | None:
    return next((list(pair) for pair in SIDES if set(pair) <= fields.keys()), None)


def _columns_of(data: Mapping[str, Any], names: Sequence[str] | None) -> tuple[Prompt, tuple[Reply, Reply]]:
    """The prompt and the two replies of a task.

    Raises:
        ValueError: they are not to be found.
    """
    sides = list(names) if names and len(names) == 2 and set(names) <= data.keys() else _sides(data)
    if sides is None:
        raise ValueError(f"none of {', '.join(data)} are called as two replies are: as {' and '.join(SIDES[0])}")
    asked = next((name for name in itertools.chain(ASKED, ("input", "context", "text")) if data.get(name)), None)
    if asked is None or asked in sides:
        raise ValueError(f"none of {', '.join(data)} is called as a prompt is: `prompt`, or {', '.join(ASKED[1:])}")
    return data[asked], (data[sides[0]], data[sides[1]])


def _person(tool: str, value: Any) -> str:
    return f"{tool} {value}" if value is not None else tool
