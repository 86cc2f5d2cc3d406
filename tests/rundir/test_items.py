"""Items and their keys: the same wherever they come from, and read only where they are sound."""

from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import items

TURNS = [{"role": "user", "content": "Hi"}]


def test_items_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [
        items.item("Q: ü", [" A", " B", " A"]),
        items.item(TURNS, ["yes", {"role": "assistant", "content": "no", "reasoning_content": "…"}], better=1),
    ]
    items.write(tmp_path / "items.jsonl", written)
    assert items.read(tmp_path / "items.jsonl") == written
    assert written[0].replies == [" A", " B"] and written[0].better is None
    assert list(items.item("p", "abc").pairs) == [(0, 1), (0, 2), (1, 2)]


def test_the_key_is_of_prompt_and_replies_alone() -> None:
    one = items.item([{"role": "user", "content": "Hi"}], ["a", "b"])
    assert one.key == items.item([{"content": "Hi", "role": "user"}], ["a", "b"], better=0).key
    assert len({one.key, items.item(TURNS, ["b", "a"]).key, items.item("Hi", ["a", "b"]).key}) == 3
    assert len(one.key) == 16 and int(one.key, 16) >= 0


def test_the_key_of_a_pair_is_the_same_in_either_order() -> None:
    turn = {"role": "assistant", "content": "a"}
    assert items.pair_key("p", "a", turn) == items.pair_key("p", turn, "a")
    assert items.pair_key("p", "a", "b") != items.pair_key("q", "a", "b")
    assert items.pair_key("p", "a", "b") != items.pair_key("p", "a", "c")
    assert len(items.pair_key("half a pair \ud800", "a", "b")) == 16


@pytest.mark.parametrize(
    ("replies", "better"), [(["a", "a"], None), (["a"], None), (["a", "b", "c"], 0), (["a", "b"], 2), (["a", "b"], -1)]
)
def test_what_is_no_item_is_refused(replies: list[str], better: int | None) -> None:
    with pytest.raises(ValueError, match=r"two replies that differ|the better one"):
        items.item("p", replies, better)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "p", "replies": ["a", "a"]}\n', "items.jsonl:1: this is no item: an item needs two replies"),
        ('{"prompt": "p"}\n', "items.jsonl:1: this is no item: 'replies'"),
        ("[1]\n", "items.jsonl: a line is no JSON object: b'[1]"),
    ],
)
def test_a_spoilt_file_is_said(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        items.read(file)
    assert says in str(error.value)
