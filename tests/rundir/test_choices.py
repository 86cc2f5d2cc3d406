"""What labels come to: whose count, what wins, and how far a stage is."""

from collections.abc import Sequence

import pytest

from rlhf_pipeline.rundir import choices, items
from rlhf_pipeline.rundir.choices import Progress, Target
from rlhf_pipeline.rundir.labels import Label, Pair

PAIR, CHECK = Pair.of("i", "p", "a", "b"), Pair.of("c", "q", "a", "b", "first")
PAIRS = {pair.key: pair for pair in (PAIR, CHECK)}


def labels(*said: str, pair: Pair = PAIR) -> list[Label]:
    """From "anna first" and the like; a third word is `undone_at`."""
    made = []
    for number, text in enumerate(said):
        person, choice, *undone = text.split()
        made.append(
            Label(f"{pair.key}{number}", pair.key, "label", person, choice, undone_at=undone[0] if undone else None)  # type: ignore[arg-type]
        )
    return made


@pytest.mark.parametrize(
    ("said", "winner", "counts", "agreement"),
    [
        (["anna first"], "first", {"first": 1}, 1.0),
        (["anna first", "bob second", "cy second"], "second", {"first": 1, "second": 2}, 2 / 3),
        (["anna first", "bob second"], "tie", {"first": 1, "second": 1}, 0.5),
        (["anna tie", "bob tie", "cy first"], "tie", {"tie": 2, "first": 1}, 2 / 3),
        (["anna bad", "bob bad", "cy first"], "bad", {"bad": 2, "first": 1}, 2 / 3),
        (["anna first", "bob bad"], "tie", {"first": 1, "bad": 1}, 0.5),
        # The first that a person said counts, and nothing that was taken back or skipped.
        (["anna second then", "anna first", "anna second", "bob skip"], "first", {"first": 1}, 1.0),
    ],
)
def test_the_majority_wins(said: list[str], winner: str, counts: dict[str, int], agreement: float) -> None:
    (found,) = choices.choices(PAIRS, labels(*said))
    assert (found.pair, found.winner, found.counts) == (PAIR, winner, counts)
    assert found.agreement == pytest.approx(agreement)
    assert found.people == list(dict.fromkeys(text.split()[0] for text in said if "skip" not in text))


def test_people_can_be_left_out() -> None:
    said = labels("anna first", "bob second", "cy second")
    (found,) = choices.choices(PAIRS, said, people={"anna"})
    assert (found.winner, found.people) == ("first", ["anna"])
    assert choices.choices(PAIRS, said, people=set()) == []


def test_checks_are_left_out_unless_they_are_asked_for() -> None:
    said = labels("anna second", pair=CHECK)
    assert choices.choices(PAIRS, said) == []
    (found,) = choices.choices(PAIRS, said, checks=True)
    assert (found.pair, found.winner) == (CHECK, "second")


def test_each_dimension_has_its_own_majority() -> None:
    said = [
        label._replace(dimensions=dimensions)
        for label, dimensions in zip(
            labels("anna first", "bob first", "cy first"),
            [{"honesty": "second", "harmlessness": "first"}, {"honesty": "second"}, {"harmlessness": "second"}],
            strict=True,
        )
    ]
    assert choices.choices(PAIRS, said)[0].dimensions == {"honesty": "second", "harmlessness": "tie"}


def progress(target: Target, said: Sequence[Label], accuracy: float | None = None) -> Progress:
    return choices.count(target, ITEMS, choices.item_of_pairs(ITEMS), said, accuracy)


ITEMS = [items.item("p", ["a", "b"]), items.item("q", ["a", "b"], better=0), items.item("r", ["a", "b", "c"])]


def said(prompt: str, first: str, second: str, text: str) -> list[Label]:
    return labels(text, pair=Pair.of("i", prompt, first, second))


def test_progress_counts_every_click_but_those_skipped_or_taken_back() -> None:
    some = labels("anna first", "anna first", "bob skip", "cy first then") + labels("anna first", pair=CHECK)
    gone = said("no item any more", "a", "b", "anna first")
    found = progress(Target(labels=3), some + gone)
    assert found == Progress(3, 1, 2, True, "3 of 3 labels")
    assert progress(Target(labels=4), some + gone).reached is False
    assert progress(Target(), some)[3:] == (False, "3 labels")


def test_progress_per_item_counts_what_different_people_said_of_its_pairs() -> None:
    target = Target(per_item=2)
    some = labels("anna first", "anna second") + said("r", "a", "b", "anna tie") + said("r", "c", "b", "anna tie")
    assert progress(target, some) == Progress(4, 1, 2, False, "1 of 2 items have 2 labels")
    assert progress(target, [*some, *labels("bob first")]).reached is True


def test_where_no_reply_is_better_more_labels_are_needed() -> None:
    """Labels of checks make no rows, and what as many say as say otherwise is a tie."""
    some = [*labels("anna bad", "bob bad"), *labels("anna first", pair=CHECK)]
    some += said("r", "a", "b", "anna first") + said("r", "a", "b", "bob second")
    found = progress(Target(labels=5), some)
    assert not found.reached and found.text.startswith("5 of 5 labels; in no pair is one reply chosen more often")
    assert progress(Target(labels=5), [*some, *said("r", "a", "b", "cy second")]).reached


def test_it_is_said_how_much_one_person_can_give() -> None:
    says = "(there are 5 pairs, so each person can give about 5)"
    assert progress(Target(labels=6), []).text == f"0 of 6 labels {says}"
    assert says not in progress(Target(labels=5), []).text


def test_progress_needs_all_that_is_wanted() -> None:
    target = Target(labels=1, reward_accuracy=">= 0.7")
    for accuracy, reached, text in (
        (None, False, "1 of 1 labels, accuracy of the reward not known yet, wanted >= 0.7"),
        (0.69, False, "1 of 1 labels, accuracy of the reward 0.690, wanted >= 0.7"),
        (0.7, True, "1 of 1 labels, accuracy of the reward 0.700, wanted >= 0.7"),
    ):
        found = progress(target, labels("anna first"), accuracy)
        assert (found.reached, found.text) == (reached, text)
    assert progress(target, [], 0.9).reached is False
