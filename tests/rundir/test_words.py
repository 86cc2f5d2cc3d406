"""Texts and numbers as people read them."""

import pytest

from rlhf_pipeline.rundir.words import duration, memory, printable, short


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"), (1.0, "1"), (1234.6, "1,235"), (0.97115, "0.971"), (-2.5, "-2.5"), (12345, "12,345"),
        (1_234_567, "1.23M"), (2e-5, "2e-5"), (4.2e20, "4.2e20"), (1e9, "1G"),
    ],
)  # fmt: skip
def test_numbers_are_short(number, shown):
    assert short(number) == shown.replace("-2", "\N{MINUS SIGN}2")


def test_what_steers_is_shown_and_nothing_else_changes():
    assert (
        printable("\x1b[2J\x07\x00\x7f \x9b\u202e\u2066\ud800 a\u200b\u200fb") == "␛[2J␇␀␡ \ufffd\ufffd\ufffd\ufffd ab"
    )
    plain = "tab\tand line\nสวัสดี 漢字 👍\u200d"
    assert printable(plain) == plain


def test_what_is_not_known_is_not_shown():
    assert (duration(None), memory(None)) == ("", "")
    assert (duration(0), memory(0)) == ("0 s", "0 MiB")
