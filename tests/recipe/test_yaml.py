"""YAML as people mean it, and the places that messages point at."""

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.yaml import parse_document, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-3", -3),
        ("1_000", 1000),
        ("010", 10),
        ("2e-5", 2e-5),
        ("1e3", 1000.0),
        ("1E+3", 1000.0),
        ("-2.5e-3", -0.0025),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000.5", 1000.5),
    ],
)
def test_numbers_are_read_as_numbers_of_their_kind(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "word", ["no", "on", "off", "yes", "none", "None", "y", "2024-01-01", "1:30", "1.2.3", "e5", "_1", "5e", "0x10"]
)
def test_words_stay_words(word):
    assert parse_value(word) == word


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ('"1"', "1"), ("'true'", "true")],
)
def test_booleans_nulls_and_quoted_text(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_a_value_may_be_a_list_or_a_mapping():
    assert parse_value("[sigmoid, 1e-3, no]") == ["sigmoid", 0.001, "no"]
    assert parse_value("{r: 8, bias: none}") == {"r": 8, "bias": "none"}


def test_lines_of_keys_are_kept_through_comments_blocks_and_flow():
    text = """# a comment
name: x

model:
  path: tiny   # another
  about: |
    several
    lines
stages:
  sft: {data: a.jsonl,
        trainer: {learning_rate: 1e-3}}
  list:
    - a
    - b: 1
"""
    value, lines = parse_document(text, "r.yaml")
    assert value["model"]["about"] == "several\nlines\n"
    assert value["stages"]["sft"]["trainer"] == {"learning_rate": 0.001}
    expected = {
        ("name",): 2,
        ("model",): 4,
        ("model", "path"): 5,
        ("model", "about"): 6,
        ("stages",): 9,
        ("stages", "sft"): 10,
        ("stages", "sft", "data"): 10,
        ("stages", "sft", "trainer"): 11,
        ("stages", "sft", "trainer", "learning_rate"): 11,
        ("stages", "list", 1, "b"): 14,
    }
    assert {path: lines.get(path) for path in expected} == expected


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("a: 1\nb: 2\na: 3\n", 1, 3),
        ("m:\n  # one\n  lr: 1\n\n  lr: 2\n", 3, 5),
        ("m: {lr: 1,\n    lr: 1}\n", 1, 2),
        ("list:\n- {a: 1}\n- b: 1\n  b: 2\n", 3, 4),
    ],
)
def test_a_key_written_twice_is_an_error_that_names_both_lines(text, first, second):
    with pytest.raises(InputError, match=f"first on line {first}$") as caught:
        parse_document(text, "r.yaml")
    assert caught.value.place == f"r.yaml:{second}"
    assert caught.value.hint


def test_the_same_key_in_two_mappings_is_fine():
    assert parse_document("a: {x: 1}\nb: {x: 2}\n", "r.yaml")[0] == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("a:\n  b: 1\n\tc: 2\n", 3, "tabs"),
        ("a: 1\n b: 2\n", 2, "indentation"),
        ("a: [1, 2\nb: 3\n", 2, "indentation"),
        ("a: *nothing\n", 1, "check"),
        ("a: 1\nb: !unknown 2\n", 2, "check"),
    ],
)
def test_what_is_not_yaml_is_an_error_with_line_and_hint(text, line, hint):
    with pytest.raises(InputError) as caught:
        parse_document(text, "r.yaml")
    assert caught.value.place == f"r.yaml:{line}"
    assert "not YAML" in caught.value.message
    assert hint in caught.value.hint


def test_a_control_character_is_an_error_that_names_the_file():
    with pytest.raises(InputError, match="not YAML") as caught:
        parse_document("a: \x01\n", "r.yaml")
    assert caught.value.place == "r.yaml"


@pytest.mark.parametrize("text", ["a: 1\n? [b]\n: 2\n", "a: &loop [*loop]\n"])
def test_yaml_that_no_recipe_can_mean_is_an_error_and_no_crash(text):
    """A key that is a list, and a value that contains itself."""
    with pytest.raises(InputError):
        parse_document(text, "r.yaml")


def test_an_empty_document_is_nothing():
    assert parse_document("# only a comment\n", "r.yaml")[0] is None
