"""Which pair is next: what must never happen, and how often what happens."""

import itertools
import random
from collections import Counter

import pytest

from rlhf_pipeline.arena import choosing
from rlhf_pipeline.rundir.labels import Asked, Label


class Room:
    """People who label pairs in turn, one after the other."""

    def __init__(self, items: dict[str, str], checks=(), people=("anna",), per_item=None, learns: bool = False) -> None:
        self.items, self.checks, self.people, self.per_item = items, checks, people, per_item
        self.labels: list[Label] = []
        self.asked: dict[str, Asked] = {}
        self.draw = random.Random(0)
        self.scored: list[list[str]] = []
        self.learns = learns

    def most(self, pairs) -> str:
        self.scored.append(list(pairs))
        return max(pairs)

    def ask(self, person: str) -> choosing.Next | None:
        found = choosing.choose(
            person, self.items, self.checks, self.labels, self.asked, per_item=self.per_item,
            several=len(self.people) > 1, draw=self.draw, informative=self.most if self.learns else None,
        )  # fmt: skip
        if found:
            self.asked[person] = Asked("id", *found)
        return found

    def answer(self, person: str, choice: str = "first") -> None:
        asked = self.asked.pop(person)
        number = len(self.labels)
        self.labels.append(Label(str(number), asked.pair, "s", person, choice, asked.left, how=asked.how))  # type: ignore[arg-type]

    def go(self, person: str, choice: str = "first") -> choosing.Next | None:
        found = self.ask(person)
        if found:
            self.answer(person, choice)
        return found

    def seen(self, person: str) -> list[Label]:
        return [label for label in self.labels if label.person == person]


PAIRS = {f"pair {number:03}": f"item {number // 3}" for number in range(240)}


def test_nobody_sees_a_pair_twice_but_once_again_in_the_other_order() -> None:
    room = Room(PAIRS)
    while room.go("anna"):
        pass
    first = [label for label in room.labels if label.how != "again"]
    again = [label for label in room.labels if label.how == "again"]
    assert sorted(label.pair for label in first) == sorted(PAIRS)
    assert len({label.pair for label in again}) == len(again) > 10
    where = {label.pair: (number, label.left) for number, label in enumerate(room.labels) if label.how != "again"}
    for number, label in enumerate(room.labels):
        if label.how == "again":
            before, left = where[label.pair]
            assert label.left == 1 - left and number - before >= choosing.AGAIN_AFTER


def test_what_was_skipped_is_not_shown_again() -> None:
    room = Room(PAIRS)
    while room.go("anna", "skip"):
        pass
    assert sorted(label.pair for label in room.labels) == sorted(PAIRS)


def test_the_shares_are_about_those_that_are_said() -> None:
    pairs = {f"pair {number}": f"item {number}" for number in range(2_000)}
    checks = dict.fromkeys(f"check {number}" for number in range(400))
    room = Room({**pairs, **dict.fromkeys(checks, "c")}, checks, learns=True)
    for _ in range(900):
        room.go("anna")
    how = Counter(label.how for label in room.labels)
    assert how["again"] / 900 == pytest.approx(choosing.AGAIN, abs=0.03)
    assert how["check"] / 900 == pytest.approx(choosing.CHECK, abs=0.03)
    assert how["random"] / (how["random"] + how["informative"]) == pytest.approx(choosing.RANDOM, abs=0.04)
    assert how["shared"] == 0
    assert sum(label.left for label in room.labels) / 900 == pytest.approx(0.5, abs=0.05)


def test_a_check_comes_soon_and_never_long_after_the_one_before() -> None:
    pairs = {f"pair {number}": f"item {number}" for number in range(600)}
    checks = dict.fromkeys(f"check {number}" for number in range(100))
    room = Room({**pairs, **dict.fromkeys(checks, "c")}, checks, learns=True)
    for _ in range(300):
        room.go("anna")
    places = [place for place, label in enumerate(room.labels) if label.how == "check"]
    assert places[0] <= choosing.FIRST_CHECK + 1
    # A pair that is shown again may come before it.
    assert max(b - a for a, b in itertools.pairwise(places)) <= choosing.CHECK_AT_LATEST + 3


def test_the_most_informative_pair_is_asked_of_at_most_so_many() -> None:
    pairs = {f"pair {number:05}": f"item {number}" for number in range(choosing.AT_MOST + 500)}
    room = Room(pairs, learns=True)
    found = [room.go("anna") for _ in range(40)]
    asked = [one.pair for one in found if one and one.how == "informative"]
    assert asked == [max(some) for some in room.scored]
    assert {len(some) for some in room.scored} == {choosing.AT_MOST}
    assert any(one and one.how == "random" for one in found)


def test_all_checks_are_asked_in_the_end() -> None:
    checks = dict.fromkeys(f"check {number}" for number in range(30))
    room = Room({"pair": "item", **dict.fromkeys(checks, "c")}, checks)
    while room.go("anna"):
        pass
    assert {label.pair for label in room.labels if label.how == "check"} == set(checks)
    assert {label.pair for label in room.labels} == {"pair", *checks}


def test_two_at_once_have_different_pairs_until_there_are_no_others() -> None:
    room = Room({"a": "1", "b": "2"}, people=("anna", "bob", "cy"))
    for _ in range(20):
        room.asked.clear()
        assert {room.ask("anna").pair, room.ask("bob").pair} == {"a", "b"}  # type: ignore[union-attr]
    assert room.ask("cy") is not None  # better than nothing


def test_pairs_without_labels_come_first_and_some_are_shared_among_several() -> None:
    room = Room(PAIRS, people=("anna", "bob"))
    for _ in range(60):
        room.go("anna")
    before = {label.pair for label in room.labels}
    items = {PAIRS[pair] for pair in before}
    shared = new = 0
    for _ in range(20):
        found = room.ask("bob")
        assert found is not None
        if found.how == "shared":
            shared += 1
            assert found.pair in before
        elif found.how != "again":
            new += 1
            assert found.pair not in before and PAIRS[found.pair] not in items
            items.add(PAIRS[found.pair])
        room.answer("bob")
    assert shared >= 1 and new > shared


def test_several_labels_of_each_item_are_of_the_pairs_that_others_have_begun() -> None:
    room = Room(PAIRS, people=("anna", "bob", "cy"), per_item=2)
    for _ in range(40):
        room.go("anna")
    begun = {label.pair for label in room.labels}
    for _ in range(len(begun)):
        found = room.go("bob")
        assert found is not None and (found.pair in begun or found.how == "again")
    # All that anna has begun is done; bob begins others, and cy is given those.
    for _ in range(10):
        room.go("bob")
    found = [room.go("cy") for _ in range(5)]
    done = begun & {label.pair for label in room.seen("bob")}
    assert done and all(one and one.pair not in done for one in found)


def test_what_somebody_is_about_to_label_counts() -> None:
    room = Room({"a": "1", "b": "2"}, people=("anna", "bob", "cy"), per_item=2)
    room.go("anna")
    (begun,) = {label.pair for label in room.labels}
    assert room.ask("bob").pair == begun  # type: ignore[union-attr]
    assert room.ask("cy").pair != begun  # type: ignore[union-attr]


def test_after_the_target_the_other_pairs_of_the_items_follow() -> None:
    room = Room(PAIRS, per_item=1)
    for _ in range(60):
        room.go("anna")
    first = [label.pair for label in room.labels if label.how != "again"]
    assert len({PAIRS[pair] for pair in first}) == len(first)
    while room.go("anna"):
        pass
    assert {label.pair for label in room.labels} == set(PAIRS)
