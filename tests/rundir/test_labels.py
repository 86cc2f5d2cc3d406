"""The file of labels: nothing that was acknowledged is lost, nothing is there twice, nothing is overwritten."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.labels import Asked, Label, Labels, Learnt, Pair, Person

PAIR = Pair.of("item", "Q: lemon?", " yellow", " blue")
TURNED = Pair.of("item", "Q: lemon?", " blue", " yellow")


def label(id_: str, choice: str = "first", person: str = "anna", pair: Pair = PAIR, **more: object) -> Label:
    return Label(id_, pair.key, "label", person, choice, **more)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels.db"


def test_a_label_is_kept_as_it_was_given(file: Path) -> None:
    given = label(
        "1", "second", left=1, dimensions={"honesty": "tie"}, reason="shorter\n", seconds=2.5, how="informative",
        made_at="2026-01-02T03:04:05.678+00:00",
    )  # fmt: skip
    with Labels(file) as labels:
        assert labels.add(given, PAIR) is True
    with Labels(file) as labels:
        assert labels.of("label") == [given]
        assert labels.of("other") == []
        assert labels.pairs("label") == {PAIR.key: PAIR}
        assert labels.label("1") == given and labels.label("2") is None
        assert (labels.people(), labels.people("label"), labels.people("other")) == (["anna"], ["anna"], [])
        assert labels.stages() == ["label"]


def test_a_label_that_is_sent_twice_is_one(file: Path) -> None:
    with Labels(file) as labels:
        assert labels.add(label("1", "first"), PAIR) is True
        assert labels.add(label("1", "second"), PAIR) is False
        assert [one.choice for one in labels.of("label")] == ["first"]


def test_the_first_label_fixes_the_order_of_a_pair(file: Path) -> None:
    assert PAIR.key == TURNED.key
    with Labels(file) as labels:
        labels.add(label("1", "first", left=0), PAIR)
        labels.add(label("2", "first", left=1, dimensions={"honesty": "second", "harmlessness": "tie"}), TURNED)
        labels.add(label("3", "bad", pair=TURNED), TURNED)
        assert list(labels.pairs("label").values()) == [PAIR]
        second, third = labels.of("label")[1:]
        assert (second.choice, second.left) == ("second", 0)
        assert second.dimensions == {"honesty": "first", "harmlessness": "tie"}
        assert (third.choice, third.left) == ("bad", 1)


def test_undo_takes_back_the_last_label_and_keeps_it(file: Path) -> None:
    with Labels(file) as labels:
        for id_ in "123":
            labels.add(label(id_, person="bob" if id_ == "3" else "anna"), PAIR)
        taken = labels.undo("anna", "label")
        assert taken is not None and taken.id == "2" and taken.undone_at
        assert labels.undo("anna", "label", "2") == taken  # the request was repeated
        assert [one.id for one in labels.of("label")] == ["1", "3"]
        assert [one.id for one in labels.of("label", undone=True)] == ["1", "2", "3"]
        assert labels.undo("anna", "label", "no such") is None
        assert labels.undo("anna", "label") is not None
        assert labels.undo("anna", "label") is None
        assert labels.undo("anna", "other") is None
        assert labels.count("label") == 1


def test_skipped_pairs_are_no_labels(file: Path) -> None:
    with Labels(file) as labels:
        for id_, choice in enumerate(["first", "second", "tie", "bad", "skip"]):
            labels.add(label(str(id_), choice), PAIR)
        assert labels.count("label") == 4


@pytest.mark.parametrize("wrong", [{"choice": "left"}, {"left": 2}])
def test_what_is_no_label_is_refused_and_nothing_is_kept(file: Path, wrong: dict[str, object]) -> None:
    with Labels(file) as labels:
        with pytest.raises(ValueError, match="this is no label"):
            labels.add(label("1")._replace(**wrong), PAIR)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is of the pair"):
            labels.add(label("1")._replace(pair="other"), PAIR)
        assert labels.of("label") == [] and labels.pairs("label") == {}
        assert labels.add(label("1"), PAIR)


def test_who_holds_a_token_is_known_and_the_token_is_not(file: Path) -> None:
    with Labels(file) as labels:
        labels.admit("anna", "first token")
        labels.admit("anna", "second token")
        labels.admit("me", "owner's token", is_owner=True)
    with Labels(file) as labels:
        assert labels.person("first token") == labels.person("second token") == Person("anna", False)
        assert labels.person("owner's token") == Person("me", True)
        assert labels.person("") is None
    assert b"token" not in file.read_bytes().replace(b"token_sha256", b"")


def test_what_a_person_has_on_the_page_is_kept_until_it_is_labelled(file: Path) -> None:
    with Labels(file) as labels:
        labels.ask("label", "anna", Asked("a", PAIR.key, 0, "random"))
        labels.ask("label", "bob", Asked("b", PAIR.key, 1, "check"))
        labels.ask("label", "anna", Asked("c", PAIR.key, 1, "again"))
    with Labels(file) as labels:
        assert labels.asked("label") == {
            "anna": Asked("c", PAIR.key, 1, "again"),
            "bob": Asked("b", PAIR.key, 1, "check"),
        }
        labels.add(label("1"), PAIR)
        assert list(labels.asked("label")) == ["bob"]
        labels.ask("label", "anna", Asked("d", PAIR.key, 1, "random"))
        labels.undo("anna", "label")
        assert list(labels.asked("label")) == ["bob"]


def test_the_last_accuracy_is_kept(file: Path) -> None:
    with Labels(file) as labels:
        assert labels.learnt("label") is None
        labels.note_learnt("label", Learnt(10, 0.5, 0.3, 0.7, "then"))
        labels.note_learnt("label", Learnt(20, 0.75, 0.6, 0.9, "now"))
        assert labels.learnt("label") == Learnt(20, 0.75, 0.6, 0.9, "now")
        labels.note_learnt("label", None)
        assert labels.learnt("label") is None


def test_another_writer_is_noticed(file: Path) -> None:
    with Labels(file) as labels, Labels(file) as other:
        before = labels.version()
        labels.add(label("1"), PAIR)
        assert labels.version() == before
        other.add(label("2"), PAIR)
        assert labels.version() != before
        assert [one.id for one in labels.of("label")] == ["1", "2"]


def test_many_threads_and_two_connections_write_at_once(file: Path) -> None:
    with Labels(file) as labels, Labels(file) as other:

        def write(start: int) -> None:
            for number in range(20):
                assert (labels, other)[start % 2].add(label(f"{start}-{number}"), PAIR)

        threads = [threading.Thread(target=write, args=(start,)) for start in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({one.id for one in labels.of("label")}) == labels.count("label") == 120


WRITER = """
import sys
from pathlib import Path
from rlhf_pipeline.rundir.labels import Label, Labels, Pair

pair = Pair.of("item", "p", "a", "b")
labels = Labels(Path(sys.argv[1]))
for number in range(100_000):
    labels.add(Label(str(number), pair.key, "label", "anna", "first"), pair)
    print(number, flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill(file: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.readlines()
    acknowledged = [line.strip() for line in said if line.endswith("\n")]
    with Labels(file) as labels:
        kept = [one.id for one in labels.of("label")]
    assert len(acknowledged) >= 50
    assert kept[: len(acknowledged)] == acknowledged and len(kept) <= len(acknowledged) + 1


def test_no_file_is_none_and_makes_none(file: Path) -> None:
    assert Labels.open_existing(file) is None
    assert not file.exists()
    with Labels(file) as labels:
        labels.add(label("1"), PAIR)
    found = Labels.open_existing(file)
    assert found is not None and found.count("label") == 1
    found.close()


def later(file: Path) -> None:
    with Labels(file):
        pass
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()


def other(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()


def torn(file: Path) -> None:
    with Labels(file) as labels:
        for number in range(200):
            labels.add(label(str(number), reason="x" * 200), PAIR)
    content = bytearray(file.read_bytes())
    content[8192:16384] = b"\xff" * 8192
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (later, "these labels were written by a later version of rlhf-pipeline: their version is 2, "),
        (other, "this is a database, but none of labels"),
        (lambda file: file.write_bytes(b"no database, " * 100), "these labels are damaged: file is not a database"),
        (torn, "these labels are damaged: "),
        (lambda file: file.mkdir(), "this is a folder, and no file of labels"),
        (lambda file: file.parent.rmdir(), "there is no folder "),
    ],
    ids=["later version", "another database", "no database", "torn", "folder", "no folder"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_stays_as_it_is(file: Path, spoil, says: str) -> None:
    spoil(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(InputError) as error:
        Labels(file)
    assert str(error.value).startswith(f"{file}: {says}")
    assert (file.read_bytes() if file.is_file() else None) == before


def test_labels_of_a_folder_that_cannot_be_written_to_are_read(file: Path, monkeypatch) -> None:
    with Labels(file) as labels:
        labels.add(label("1"), PAIR)
    # Who runs the tests as root may write everywhere.
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.R_OK)
    before = sorted(file.parent.iterdir())
    found = Labels.open_existing(file)
    assert found is not None and found.count("label") == 1
    assert sorted(file.parent.iterdir()) == before  # nothing is made beside it
    with pytest.raises(InputError, match="labels cannot be kept here: the folder or the file is read-only") as error:
        found.add(label("2"), PAIR)
    assert str(file.parent) in str(error.value.hint)
    found.close()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE labels SET dimensions = '{'", "UPDATE pairs SET first = 'x'", "DROP TABLE asked", "DROP TABLE labels"],
)
def test_what_is_damaged_within_is_said(file: Path, statement: str) -> None:
    with Labels(file) as labels:
        labels.add(label("1"), PAIR)
    with sqlite3.connect(file) as database:
        database.execute(statement)
    database.close()
    with Labels(file) as labels, pytest.raises(InputError, match="these labels are damaged: ") as error:
        for read in (labels.of, labels.pairs, labels.asked):
            read("label")
    assert ".recover" in str(error.value.hint)


def test_a_file_that_was_emptied_is_said(file: Path) -> None:
    with Labels(file) as labels:
        labels.add(label("1"), PAIR)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="this file is empty, so the labels that were in it are gone"):
        Labels.open_existing(file)


@pytest.mark.parametrize("comes_back", [False, True])
def test_nothing_is_saved_in_a_file_that_nobody_finds_again(file: Path, comes_back: bool) -> None:
    with Labels(file) as labels:
        labels.add(label("1"), PAIR)
        file.rename(file.with_name("away"))
        if comes_back:
            Labels(file).close()
        with pytest.raises(InputError, match="moved or deleted while they were open"):
            labels.add(label("2"), PAIR)
        if not comes_back:
            file.with_name("away").rename(file)
            assert labels.add(label("2"), PAIR)
