"""Labels that leave are read by recipes as they were meant; labels that come from elsewhere are, too."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.arena import exchange
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.data.files import rows_of_file
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.items import item
from rlhf_pipeline.rundir.labels import Label, Labels, Pair

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
TEXT = Pair.of("i", "Q: which?", " this", " that")
CHAT = Pair.of("i", TURNS, "this", {"role": "assistant", "content": "that", "reasoning_content": "Hm."})
CALL = Pair.of("i", [TURNS[0] | {"tools": TOOLS}, TURNS[1]], "this", "that")
OTHER = Pair.of("i", "Q: which?", " that", " neither")
CHECK = Pair.of("i", "Q: known?", " yes", " no", "first")
count = iter(range(10**6))


def label(pair: Pair, person: str, choice: str, **more: Any) -> tuple[Label, Pair]:
    return Label(f"label-{next(count)}", pair.key, "label", person, choice, **more), pair  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels.db"


def keep(file: Path, *made: tuple[Label, Pair]) -> None:
    with Labels(file) as labels:
        for one in made:
            labels.add(*one)


def read(file: Path, wanted: str) -> list[tuple[Any, ...]]:
    """What a recipe's data code makes of a file."""
    rows = [located.row for located in rows_of_file(file)]
    shape = recognise(rows, wanted)  # type: ignore[arg-type]
    return [record for row in rows for record in shape.read(row)]


SOME = [
    label(TEXT, "anna", "second", dimensions={"honesty": "second", "harmlessness": "tie"}),
    label(TEXT, "bob", "second"),
    label(TEXT, "cy", "first"),
    label(CHECK, "anna", "first"),
    label(OTHER, "anna", "tie"),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_preferences_are_read_by_recipes(file: Path, tmp_path: Path, ending: str) -> None:
    keep(file, *SOME)
    out = tmp_path / f"out{ending}"
    assert exchange.give(out, file, "label", "preferences") == f"1 row of preferences in {out}"
    assert read(out, "preferences") == [("Q: which?", " that", " this")]
    (row,) = [located.row for located in rows_of_file(out)]
    assert row["people"] == ["anna", "bob", "cy"]
    assert row["agreement"] == pytest.approx(2 / 3, abs=1e-6) and row["confidence"] == pytest.approx(2 / 3, abs=1e-6)
    assert row["dimensions"] == {"honesty": 1.0, "harmlessness": 0.5}


def test_preferences_of_conversations_are_read_by_recipes(file: Path, tmp_path: Path) -> None:
    keep(file, label(CHAT, "anna", "second"))
    exchange.give(tmp_path / "out.jsonl", file, "label", "preferences")
    assert read(tmp_path / "out.jsonl", "preferences") == [(TURNS, CHAT.second, "this")]


def test_tools_are_read_by_recipes(file: Path, tmp_path: Path) -> None:
    keep(file, label(CALL, "anna", "first"))
    exchange.give(tmp_path / "out.jsonl", file, "label", "preferences")
    assert read(tmp_path / "out.jsonl", "preferences") == [(CALL.prompt, "this", "that")]


def test_feedback_is_read_by_recipes(file: Path, tmp_path: Path) -> None:
    keep(file, label(TEXT, "anna", "second"), label(OTHER, "anna", "first"), label(CHAT, "anna", "bad"))
    exchange.give(tmp_path / "out.jsonl", file, "label", "feedback")
    found = read(tmp_path / "out.jsonl", "feedback")
    assert found == [
        ("Q: which?", " this", False), ("Q: which?", " that", True), ("Q: which?", " neither", False),
        (TURNS, "this", False), (TURNS, CHAT.second, False),
    ]  # fmt: skip


def test_what_won_as_often_as_it_lost_is_no_feedback() -> None:
    keep_two = [
        exchange.Choice(TEXT, "first", {"first": 1}, ["anna"], 1.0, {}),
        exchange.Choice(Pair.of("i", "Q: which?", " other", " this"), "first", {"first": 1}, ["anna"], 1.0, {}),
    ]
    rows = exchange.feedback(keep_two)
    assert [(row["completion"], row["label"]) for row in rows] == [(" that", False), (" other", True)]


def test_every_click_comes_back_as_it_was(file: Path, tmp_path: Path) -> None:
    keep(file, *SOME)
    with Labels(file) as labels:
        labels.undo("bob", "label")
        before = labels.of("label", undone=True), labels.pairs("label")
    assert exchange.give(tmp_path / "out.jsonl", file, "label", "labels").startswith("5 rows of labels")
    setup = Setup("t", "label", [item("Q: which?", [" this", " that"])])
    other = tmp_path / "other.db"
    said = exchange.take(tmp_path / "out.jsonl", other, setup)
    assert said == (
        "warning: 5 of 5 labels are new, and 2 are of pairs that `label` does not ask about, and do not count; prompt "
        "and replies must be the same to the letter"
    )
    elsewhere = setup._replace(items=[item("Q: which? ", [" this", " that"])])
    said = exchange.take(tmp_path / "out.jsonl", other, elsewhere)
    assert "and none is of a pair that `label` asks about, so none counts" in said
    assert "0 of 5 labels are new" in exchange.take(tmp_path / "out.jsonl", other, setup)
    with Labels(other) as labels:
        after = labels.of("label", undone=True), labels.pairs("label")
    assert [one._replace(made_at="") for one in after[0]] == [one._replace(made_at="") for one in before[0]]
    assert {key: pair._replace(item="") for key, pair in after[1].items()} == {
        key: pair._replace(item="") for key, pair in before[1].items()
    }


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("out.txt", "--export {}/out.txt: the file should end in .jsonl or .json"),
        ("out.jsonl.gz", "--export {}/out.jsonl.gz: the file should end in .jsonl or .json"),
        ("no/such/out.jsonl", "--export {0}/no/such/out.jsonl: there is no folder {0}/no/such"),
        ("out.jsonl", "{}/labels.db: there are no labels yet"),
    ],
)
def test_what_cannot_be_written_is_said(file: Path, tmp_path: Path, out: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        exchange.give(tmp_path / out, file, "label", "preferences")
    assert str(error.value) == says.format(tmp_path)
    assert not file.exists()


def test_ties_alone_are_no_preferences(file: Path, tmp_path: Path) -> None:
    keep(file, label(TEXT, "anna", "tie"))
    with pytest.raises(InputError, match="nothing of the 1 labels of `label` makes preferences"):
        exchange.give(tmp_path / "out.jsonl", file, "label", "preferences")
    with pytest.raises(InputError, match="`other` has no labels yet"):
        exchange.give(tmp_path / "out.jsonl", file, "other", "preferences")


# As Label Studio writes them (https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks).
def task(selected: str | None, number: int, **annotation: Any) -> dict[str, Any]:
    result = [
        {
            "id": "a1", "from_name": "pw", "to_name": "text2,text1", "type": "pairwise", "origin": "manual",
            "value": {"selected": selected},
        }
    ]  # fmt: skip
    made = {
        "id": 100 + number, "completed_by": 7, "was_cancelled": False, "lead_time": 4.5,
        "result": result if selected else [],
    }  # fmt: skip
    data = {"prompt": "Which?", "text1": "that", "text2": "this"}
    return {"id": number, "data": data, "annotations": [made | annotation], "predictions": []}


LABEL_STUDIO = [
    task("left", 1),
    task("right", 2, completed_by={"id": 8, "email": "anna@a.example"}),
    task(None, 3),
    task(None, 4, was_cancelled=True),
]
LABEL_STUDIO_MIN = [
    {"id": 1, "instruction": "Which?", "response_a": "this", "response_b": "that", "pw": "left", "annotator": 7,
     "annotation_id": 101, "lead_time": 4.5},
    {"id": 2, "instruction": "Which?", "response_a": "this", "response_b": "that", "pw": {"selected": "right"},
     "annotator": "anna@a.example", "annotation_id": 102, "lead_time": 4.5},
]  # fmt: skip
FIELDS = {"instruction": "Which?", "response_1": "this", "response_2": "that"}
# As Argilla's `to_json` and `to_list(flatten=True)` write them.
ARGILLA = [
    {
        "id": "r1", "fields": FIELDS, "metadata": {}, "suggestions": {}, "vectors": {}, "_server_id": "x",
        "responses": {
            "preference": [
                {"value": ["response-1", "response-2"], "user_id": "u1"},
                {"value": [{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}], "user_id": "u2"},
                {"value": [{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 1}], "user_id": "u3"},
            ],
            "why": [{"value": "it is shorter", "user_id": "u1"}],
            "quality": [{"value": 3, "user_id": "u1"}],
        },
    }
]  # fmt: skip
ARGILLA_FLAT = [
    {
        "id": "r1", **FIELDS, "status": "completed", "better.suggestion": None,
        "better.responses": ["response_1", "response_2", "tie", "both bad", "response_1"],
        "better.responses.users": ["u1", "u2", "u3", "u4", "u5"],
        "better.responses.status": ["submitted"] * 4 + ["draft"],
    }
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (LABEL_STUDIO, {"Label Studio 7": "first", "Label Studio anna@a.example": "second"}),
        (LABEL_STUDIO_MIN, {"Label Studio 7": "first", "Label Studio anna@a.example": "second"}),
        (ARGILLA, {"Argilla u1": "first", "Argilla u2": "second", "Argilla u3": "tie"}),
        (ARGILLA_FLAT, {"Argilla u1": "first", "Argilla u2": "second", "Argilla u3": "tie", "Argilla u4": "bad"}),
    ],
    ids=["Label Studio", "Label Studio, JSON-MIN", "Argilla", "Argilla, flat"],
)
@pytest.mark.parametrize("prompt", ["Which?", [{"role": "user", "content": "Which?"}]])
def test_labels_of_other_tools_are_taken(
    file: Path, tmp_path: Path, rows: list[dict[str, Any]], expected: dict[str, str], prompt: Any
) -> None:
    source = tmp_path / "export.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    setup = Setup("t", "label", [item(prompt, ["this", "that"])])
    said = exchange.take(source, file, setup)
    with Labels(file) as labels:
        (pair,) = labels.pairs("label").values()
        found = {label.person: label.choice for label in labels.of("label") if label.choice != "skip"}
        times = {label.seconds for label in labels.of("label")}
    assert {pair.first, pair.second} == {"this", "that"} and pair.prompt == prompt
    turned = {"first": "second", "second": "first"} if pair.first == "that" else {}
    assert {person: turned.get(choice, choice) for person, choice in found.items()} == expected
    assert "does not ask" not in said
    assert times == ({4.5} if "Label Studio" in next(iter(expected)) else {None})
    assert exchange.take(source, file, setup).startswith("0 of ")


def test_an_export_in_which_nobody_has_labelled_is_said(file: Path, tmp_path: Path) -> None:
    source = tmp_path / "export.json"
    source.write_text(json.dumps([{"id": 1, "data": {"prompt": "p"}, "annotations": []}]), encoding="utf-8")
    setup = Setup("t", "label", [item("p", ["a", "b"])])
    assert exchange.take(source, file, setup) == f"warning: nobody has labelled anything in {source}"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"a": 1}], "its columns (a) are of no export that is read"),
        ([{"id": 1, "data": {"x": "y", "text1": "a", "text2": "b"}, "annotations": task("left", 1)["annotations"]}],
         "row 1: this is no label: none of x, text1, text2 is called as a prompt is"),
        ([task("left", 1), task("up", 2)], "row 2: this is no label: `up` is missing"),
        ([task("left", 1) | {"data": {"prompt": "p", "text1": "a", "text2": "a"}}], "needs two replies that differ"),
        ([task("left", 1) | {"data": {"prompt": 5, "text1": "a", "text2": "b"}}], "neither text nor turns"),
        ([{"id": "x", "pair": "k", "choice": "left", "prompt": "p", "first": "a", "second": "b"}], "is missing"),
        ([], "there are no rows"),
    ],
)  # fmt: skip
def test_what_is_no_export_is_said_and_nothing_is_kept(
    file: Path, tmp_path: Path, rows: list[dict[str, Any]], says: str
) -> None:
    source = tmp_path / "export.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(InputError) as error:
        exchange.take(source, file, Setup("t", "label", [item("p", ["a", "b"])]))
    assert says in str(error.value)
    assert not file.exists()
