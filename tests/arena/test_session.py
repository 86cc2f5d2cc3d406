"""A session without HTTP: what is kept of a click, what the page is told, what a restart finds."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.arena import session as sessions
from rlhf_pipeline.arena.session import Session
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.rundir.choices import Target
from rlhf_pipeline.rundir.items import Item, item
from rlhf_pipeline.rundir.labels import Label, Labels, Pair
from rlhf_pipeline.use.web import Refused

ITEMS = [item(f"prompt {number}", [f"{number} good", f"{number} poor", f"{number} bad"]) for number in range(12)]
CHECKS = [item(f"check {number}", ["right", "wrong"], better=0) for number in range(3)]
Start = Callable[..., Session]


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """A busy machine may take longer to learn than a person waits."""
    monkeypatch.setattr(sessions, "WAIT_S", 30)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Labels]:
    with Labels(tmp_path / "labels.db") as labels:
        yield labels


@pytest.fixture
def start(file: Labels) -> Iterator[Start]:
    started = []

    def start(items: list[Item] = ITEMS, people: tuple[str, ...] = ("anna",), **more: Any) -> Session:
        started.append(Session(Setup("A run", "label", items, **more), file, people))
        return started[-1]

    yield start
    for one in started:
        one.close()


def click(session: Session, person: str = "anna", choice: str = "left", **more: Any) -> dict[str, Any]:
    ask = session.next(person)
    assert ask is not None
    return session.label(person, {"id": str(uuid.uuid4()), "ask": ask["id"], "choice": choice, **more})


def shown(ask: dict[str, Any], side: str) -> str:
    return ask[side].removeprefix("<p>").removesuffix("</p>\n")


def test_the_page_gets_all_that_it_shows_in_one_call(start: Start) -> None:
    state = start(target=Target(labels=3), people=("me", "anna"), command="go on").state("me", True)
    ask = state.pop("ask")
    assert state == {
        "title": "A run", "stage": "label", "mode": "label", "command": "go on", "person": "me", "is_owner": True,
        "people": ["me", "anna"], "dimensions": ["helpfulness", "honesty", "harmlessness", "conciseness"],
        "target": {"labels": 3, "per_item": None, "reward_accuracy": None}, "has_features": False, "learner": None,
        "progress": {
            "labels": 0, "wanted": 3, "per_item": {"done": 0, "of": 12}, "mine": 0, "skipped": 0, "reached": False,
            "text": "0 of 3 labels",
        },
    }  # fmt: skip
    assert set(ask) == {"id", "number", "prompt", "turns", "left", "right", "dir", "lengths"}
    assert ask["number"] == 1 and ask["dir"] == {"prompt": "ltr", "left": "ltr", "right": "ltr"}
    assert ask["lengths"] == {side: len(shown(ask, side)) for side in ("left", "right")}


def test_a_click_is_kept_as_it_was_meant(start: Start, file: Labels) -> None:
    session = start()
    for number in range(8):
        ask = session.next("anna")
        assert ask is not None
        left, right = shown(ask, "left"), shown(ask, "right")
        body = {
            "id": f"{number:08}", "ask": ask["id"], "choice": ["left", "right"][number % 2], "seconds": 1.5,
            "dimensions": {"honesty": "right", "conciseness": "tie"}, "reason": "why",
        }  # fmt: skip
        answer = session.label("anna", body)
        assert answer["saved"] is True and answer["progress"]["labels"] == number + 1
        label = file.label(f"{number:08}")
        assert label is not None
        pair = file.pairs("label")[label.pair]
        replies = {"first": pair.first, "second": pair.second}
        assert replies[label.choice] == [left, right][number % 2]
        assert [pair.first, pair.second][label.left] == left
        assert replies[label.dimensions["honesty"]] == right and label.dimensions["conciseness"] == "tie"
        assert (label.person, label.stage, label.reason, label.seconds) == ("anna", "label", "why", 1.5)


def test_a_request_that_is_repeated_is_one_click(start: Start, file: Labels) -> None:
    session = start()
    ask = session.next("anna")
    assert ask is not None
    body = {"id": "a-uuid-of-it", "ask": ask["id"], "choice": "left"}
    first = session.label("anna", body)
    assert session.label("anna", body)["ask"] == first["ask"]
    assert session.label("anna", body | {"choice": "right"})["saved"] is True  # the first one counts
    assert file.count("label") == 1
    with pytest.raises(Refused) as refused:
        session.label("bob", body)
    assert refused.value.status == 409


def test_an_old_pair_is_not_taken(start: Start, file: Labels) -> None:
    session = start(people=("anna", "bob"))
    ask, others = session.next("anna"), session.next("bob")
    click(session)
    for asked in (ask, others, {"id": "no such"}):
        with pytest.raises(Refused) as refused:
            session.label("anna", {"id": str(uuid.uuid4()), "ask": asked["id"], "choice": "left"})  # type: ignore[index]
        assert refused.value.status == 409
    assert file.count("label") == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"choice": "first"}, "`choice` should be one of left, right, tie, bad, skip"),
        ({"choice": ["left"]}, "`choice` should be one of"),
        ({"id": "short"}, "`id` should be a UUID"),
        ({"id": "x" * 65}, "`id` should be a UUID"),
        ({"id": 7}, "`id` should be text"),
        ({"ask": None}, "`ask` should be text"),
        ({"dimensions": {"beauty": "left"}}, "`dimensions` should name some of helpfulness, "),
        ({"dimensions": {"honesty": "both"}}, "of each of `dimensions`"),
        ({"dimensions": ["honesty"]}, "`dimensions` should name"),
        ({"reason": "x" * 2001}, "`reason` should be text of at most 2000 characters"),
        ({"reason": 5}, "`reason` should be text"),
        ({"seconds": "5"}, "`seconds` should be a number"),
        ({"seconds": True}, "`seconds` should be a number"),
    ],
)
def test_what_is_no_click_is_refused_and_nothing_is_kept(
    start: Start, file: Labels, wrong: dict[str, Any], says: str
) -> None:
    session = start()
    ask = session.next("anna")
    assert ask is not None
    body = {"id": str(uuid.uuid4()), "ask": ask["id"], "choice": "left"}
    with pytest.raises(Refused) as refused:
        session.label("anna", body | wrong)
    assert refused.value.status == 400 and refused.value.sentence.startswith(says)
    assert file.of("label", undone=True) == []
    assert session.label("anna", body)["saved"] is True


def test_times_are_kept_within_reason(start: Start, file: Labels) -> None:
    session = start()
    for seconds in (-1, 1e300, None):
        click(session, seconds=seconds)
    assert [label.seconds for label in file.of("label")] == [0.0, sessions.LONGEST_LOOK, None]


def test_undo_brings_the_same_pair_back_in_the_same_places(start: Start, file: Labels) -> None:
    session = start(people=("anna", "bob"))
    click(session)
    ask = session.next("anna")
    answer = click(session, choice="skip")
    assert answer["progress"] | {"text": ""} == {
        "labels": 1, "wanted": None, "per_item": {"done": 1, "of": 12}, "mine": 1, "skipped": 1, "reached": False,
        "text": "",
    }  # fmt: skip
    click(session, "bob")
    back = session.undo("anna", {})
    assert back["saved"] is True and back["progress"]["skipped"] == 0
    assert {**back["ask"], "id": ask["id"]} == ask  # type: ignore[index]
    assert back["ask"]["id"] != ask["id"]  # type: ignore[index]
    click(session)
    assert [label.choice for label in file.of("label") if label.person == "anna"][1] != "skip"
    session.undo("anna", {})
    session.undo("anna", {})
    assert session.undo("anna", {}) == {"saved": False}
    assert [label.person for label in file.of("label")] == ["bob"]


def test_undo_that_names_its_label_can_be_repeated(start: Start, file: Labels) -> None:
    session = start()
    click(session)
    click(session)
    last = file.of("label")[-1].id
    first = session.undo("anna", {"label": last})
    assert session.undo("anna", {"label": last})["ask"] == first["ask"]
    assert file.count("label") == 1
    assert session.undo("anna", {"label": "other"}) == {"saved": False}
    with pytest.raises(Refused):
        session.undo("anna", {"label": 5})


def test_a_restart_shows_the_same_pair_and_takes_its_answer(start: Start, file: Labels) -> None:
    before = start()
    click(before)
    ask = before.next("anna")
    after = start()
    assert after.next("anna") == ask
    assert after.label("anna", {"id": str(uuid.uuid4()), "ask": ask["id"], "choice": "tie"})["saved"]  # type: ignore[index]
    assert file.count("label") == 2


def test_labels_that_another_process_writes_are_seen(start: Start, file: Labels, tmp_path: Path) -> None:
    session = start()
    # In the other order than these items have it.
    pair = Pair.of(ITEMS[0].key, ITEMS[0].prompt, ITEMS[0].replies[1], ITEMS[0].replies[0])
    with Labels(tmp_path / "labels.db") as other:
        for person in ("anna", "bob"):
            other.add(Label(f"from {person}", pair.key, "label", person, "first"), pair)
    assert session.progress("anna")["labels"] == 2
    seen = []
    while session.next("anna"):
        click(session)
        seen.append(file.of("label")[-1])
    assert pair.key not in {label.pair for label in seen if label.how != "again"}
    assert session.about_people()["people"][0]["name"] == "anna"


def test_nothing_is_left_in_the_end(start: Start) -> None:
    session = start(ITEMS[:1])
    for _ in range(3):
        answer = click(session)
    assert answer["ask"] is None and session.state("anna", True)["ask"] is None
    assert session.next("bob") is not None


def test_the_owner_sees_what_people_do(start: Start) -> None:
    session = start([*ITEMS, *CHECKS], people=("anna", "bob"))
    session.setup = session.setup._replace(people={"leave_out": ["bob", "eve"]})
    for person in ("anna", "bob"):
        while (ask := session.next(person)) is not None:
            right = [side for side in ("left", "right") if "good" in ask[side] or "right" in ask[side]]
            click(session, person, right[0] if right else "tie", seconds=2.0)
    found = session.about_people()
    anna, bob = found["people"]
    assert found["left_out"] == ["bob"]
    assert (anna["checks"], bob["checks"]) == ({"right": 3, "of": 3},) * 2
    assert anna["consistency"]["same"] == anna["consistency"]["of"] > 0
    assert anna["agreement"] == found["alpha"] == found["pairs"][0]["kappa"] == 1.0
    assert found["pairs"][0]["n"] == 39 and anna["seconds_median"] == 2.0


FEATURES = np.array([[value, number % 3] for number in range(12) for value in (2.0, 0.0, -2.0)], np.float32)


def test_it_learns_as_people_click(start: Start, file: Labels) -> None:
    session = start(features=FEATURES, target=Target(reward_accuracy=">= 0.9"))
    assert session.state("anna", True)["learner"]["labels"] == 0
    believed = []
    for _ in range(25):
        ask = session.next("anna")
        assert ask is not None
        order = ["good", "poor", "bad"]
        worth = {side: order.index(ask[side].split()[1].removesuffix("</p>")) for side in ("left", "right")}
        choice = min(worth, key=lambda side: worth[side])
        answer = click(session, choice=choice)
        belief, drift = answer["belief"], answer["drift"]
        believed.append((belief["left"] > 0.5) is (choice == "left"))
        assert 0 <= belief["low"] <= belief["left"] <= belief["high"] <= 1
        assert {one["was"] for one in drift["candidates"]} == {"left", "right", None}
        for side in ("left", "right"):
            (found,) = [one for one in drift["candidates"] if one["was"] == side]
            assert found["html"] == ask[side]
    assert all(believed[-10:]) and abs(belief["left"] - 0.5) > 0.3
    rewards = {one["html"].split()[1]: one["reward"] for one in drift["candidates"]}
    assert rewards["good</p>"] > rewards["poor</p>"] > rewards["bad</p>"]
    assert sum(one["probability"] for one in drift["candidates"]) == pytest.approx(1)
    assert session.drift("anna", 100.0)["kl"] < 0.01 < drift["kl"]  # type: ignore[index]
    learner = answer["learner"]
    assert learner["accuracy"] == 1.0 and learner["tested"] >= 2 and learner["low"] < 1.0 == learner["high"]
    assert answer["progress"]["reached"] is True
    learnt = file.learnt("label")
    assert learnt is not None and (learnt.accuracy, learnt.low) == (1.0, learner["low"])
    assert session.drift("bob") is None


def test_undo_is_unlearned(start: Start) -> None:
    session = start(features=FEATURES)
    answers = [click(session, choice="tie") for _ in range(3)]
    assert answers[-1]["learner"]["labels"] == 3
    assert session.undo("anna", {})["learner"]["labels"] == 2


def test_a_click_is_saved_and_answered_however_slow_the_learning_is(start: Start, file: Labels, monkeypatch) -> None:
    session = start(features=FEATURES)
    click(session)
    blocked, reached = threading.Event(), threading.Event()
    fit = sessions.learning.Learner.fit

    def slow(self, *arguments) -> None:
        reached.set()
        blocked.wait(20)
        fit(self, *arguments)

    monkeypatch.setattr(sessions, "WAIT_S", 0.05)
    monkeypatch.setattr(sessions.learning.Learner, "fit", slow)
    began = time.monotonic()
    answers = [click(session, choice="tie") for _ in range(3)]
    assert time.monotonic() - began < 5 and reached.is_set()
    assert file.count("label") == 4
    assert [answer["belief"] for answer in answers] == [None] * 3 and answers[-1]["ask"] is not None
    blocked.set()
    monkeypatch.setattr(sessions, "WAIT_S", 30)
    assert click(session)["learner"]["labels"] == 5


def test_the_next_pair_is_sought_beside_a_slow_lesson(start: Start, monkeypatch) -> None:
    session = start(features=FEATURES)
    click(session)
    monkeypatch.setattr(sessions, "SLOW_S", 0.0)
    asked: list[int] = []
    find = sessions.choosing.choose

    def choose(*arguments, **more):
        asked.append(session._learning.lesson.labels)  # type: ignore[union-attr]
        return find(*arguments, **more)

    blocked = threading.Event()
    fit = sessions.learning.Learner.fit

    def slow(self, *arguments) -> None:
        blocked.wait(20)
        fit(self, *arguments)

    monkeypatch.setattr(sessions.choosing, "choose", choose)
    monkeypatch.setattr(sessions.learning.Learner, "fit", slow)
    threading.Timer(0.2, blocked.set).start()
    answer = click(session, choice="tie")
    assert asked == [1] and answer["learner"]["labels"] == 2 and answer["belief"] is not None
    assert answer["ask"] == session.next("anna")


def test_labels_go_on_where_learning_fails(start: Start, file: Labels, monkeypatch, capsys) -> None:
    session = start(features=FEATURES)
    click(session)

    def broken(*_) -> None:
        raise FloatingPointError("no")

    monkeypatch.setattr(sessions.learning.Learner, "fit", broken)
    assert click(session)["saved"] is True
    assert file.count("label") == 2
    assert "warning: the model cannot learn" in capsys.readouterr().err


def test_features_of_other_items_are_refused(start: Start) -> None:
    with pytest.raises(ValueError, match="features of 35 replies, and 36 replies"):
        start(features=FEATURES[1:])


def test_many_people_at_once(start: Start, file: Labels) -> None:
    people = tuple(f"p{number}" for number in range(8))
    session = start([item(f"p {number}", ["a", "b"]) for number in range(200)], people=people, target=Target(labels=80))
    failed: list[BaseException] = []

    def work(person: str) -> None:
        try:
            for _ in range(10):
                click(session, person)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert file.count("label") == 80 and session.progress("p0")["reached"] is True
    labels = [label for label in file.of("label") if label.how in ("random", "informative")]
    assert len({label.pair for label in labels}) == len(labels)  # nobody did what another one was at
