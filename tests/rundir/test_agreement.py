"""Agreement, against worked examples and what must hold of any."""

import random

import pytest

from rlhf_pipeline.rundir import agreement
from rlhf_pipeline.rundir.labels import Label, Pair

# Krippendorff 2011, section C: four observers, twelve units, values 1 to 5; "." where one did not look: 0.743.
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def test_alpha_is_that_of_a_published_example() -> None:
    rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    units = [[value for value in column if value != "."] for column in zip(*rows, strict=True)]
    assert agreement.alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_does_not_depend_on_which_reply_is_the_first() -> None:
    draw = random.Random(0)
    units = [[draw.choice(["first", "second", "tie"]) for _ in range(3)] for _ in range(40)]
    swap = {"first": "second", "second": "first", "tie": "tie"}
    turned = [[swap[value] for value in unit] if draw.random() < 0.5 else unit for unit in units]
    assert agreement.alpha(turned) == pytest.approx(agreement.alpha(units))
    assert abs(agreement.alpha(units)) < 0.15


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([["first", "first"], ["first", "first"]], 1.0),  # though nobody ever chose the second one
        ([["first", "second"]] * 50, 1 - 99 * 100 / 5_000),
        ([["first"], ["second"]], None),
        ([["tie", "tie"]], None),
        ([], None),
    ],
)
def test_alpha_at_the_ends(units: list[list[str]], expected: float | None) -> None:
    assert agreement.alpha(units) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([("first", "first")] * 3 + [("first", "second")], 0.5),  # without ties, 2p - 1
        ([("first", "first")], 1.0),
        # p = 2/4; of both: first and second 3/8 each, tie 2/8 by the one, 3/8 and 2/8 by the other.
        ([("first", "first"), ("tie", "tie"), ("second", "first"), ("first", "second")], (0.5 - 11 / 32) / (21 / 32)),
        ([("tie", "tie")], None),
        ([], None),
    ],
)
def test_kappa_against_hand_made_values(choices: list[tuple[str, str]], expected: float | None) -> None:
    assert agreement.kappa(choices) == (expected if expected is None else pytest.approx(expected))


PAIRS = [Pair.of("i", f"p{number}", "a", "b", "first" if number == 3 else None) for number in range(4)]


def label(person: str, number: int, choice: str, how: str = "random", **more: object) -> Label:
    label.count += 1
    return Label(str(label.count), PAIRS[number].key, "label", person, choice, how=how, **more)  # type: ignore[arg-type]


label.count = 0


def test_the_figures_of_people() -> None:
    labels = [
        label("anna", 0, "first", seconds=2.0, dimensions={"honesty": "first"}),
        label("bob", 0, "first", seconds=9.0, dimensions={"honesty": "second"}),
        label("cy", 0, "second", dimensions={"honesty": "first"}),
        label("anna", 1, "tie", seconds=4.0),
        label("bob", 1, "bad"),
        label("anna", 2, "skip", seconds=1.0),
        label("anna", 3, "first", how="check"),
        label("bob", 3, "tie", how="check"),
        label("anna", 0, "first", how="again"),
        label("anna", 1, "first", how="again"),
        label("anna", 1, "tie", undone_at="then"),
    ]
    found = agreement.figures({pair.key: pair for pair in PAIRS}, labels)
    assert found["people"] == [
        {
            "name": "anna", "labels": 5, "seconds_median": 3.0, "checks": {"right": 1, "of": 1},
            "agreement": pytest.approx((1 / 2 + 0 + 0) / 3), "consistency": {"same": 1, "of": 2},
        },
        {
            "name": "bob", "labels": 3, "seconds_median": 9.0, "checks": {"right": 0, "of": 1},
            "agreement": pytest.approx((1 / 2 + 0 + 0) / 3), "consistency": {"same": 0, "of": 0},
        },
        {
            "name": "cy", "labels": 1, "seconds_median": None, "checks": {"right": 0, "of": 0},
            "agreement": 0.0, "consistency": {"same": 0, "of": 0},
        },
    ]  # fmt: skip
    assert found["alpha"] == agreement.alpha([["first", "first", "second"], ["tie", "bad"], ["first", "tie"]])
    assert found["dimensions"] == {"honesty": agreement.alpha([["first", "second", "first"]])}
    assert [(pair["a"], pair["b"], pair["n"]) for pair in found["pairs"]] == [
        ("anna", "bob", 3), ("anna", "cy", 1), ("bob", "cy", 1)
    ]  # fmt: skip
    assert found["pairs"][0]["kappa"] == agreement.kappa([("first", "first"), ("tie", "bad"), ("first", "tie")])


def test_nobody_has_no_figures() -> None:
    assert agreement.figures({}, []) == {"alpha": None, "people": [], "pairs": [], "dimensions": {}}
