"""Exact answers: what counts as right, and what does not."""

import pytest

from rlhf_pipeline.rewards.answers import exact, final_answer

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize(
    ("reply", "right", "reward"),
    [
        ("So it is 48 + 24.\n#### 72", SOLUTION, 1.0),
        ("The answer is 72.", SOLUTION, 1.0),
        ("72 clips in April, and then 24.", SOLUTION, 0.0),  # its last number is another one
        (r"Thus \boxed{72}, in 2 months.", SOLUTION, 1.0),
        ("#### $72.00", SOLUTION, 1.0),
        ("#### 72 clips", SOLUTION, 1.0),
        ("I cannot tell.", SOLUTION, 0.0),
        ("", SOLUTION, 0.0),
        ("1,234.5 dollars", "#### 1234.50", 1.0),
        ("It is -3", "-3", 1.0),
        ("It is 3", "-3", 0.0),
        ("#### Paris.", "paris", 1.0),
        ("#### Rome", "paris", 0.0),
        ("first #### 5\nthen #### 6\nand more", "6", 1.0),
    ],
)
def test_a_reply_is_right_where_its_final_answer_is(reply, right, reward):
    assert exact([reply], [right]) == [reward]


def test_turns_count_by_the_last_and_rows_without_an_answer_not_at_all():
    turns = [{"role": "assistant", "content": "It is 9."}, {"role": "assistant", "content": "It is 7."}]
    assert exact(completions=[turns, "7"], answer=["7", None], prompts=["", ""]) == [1.0, None]
    assert exact(["7", "8"]) == [None, None]


def test_a_text_without_any_mark_is_its_own_answer():
    assert final_answer(" yes \n") == "yes"
