"""YAML as people mean it, and the places that messages point at."""

import re

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.yaml import dump, dump_inline, parse_document, parse_value


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


def test_lines_and_columns_are_kept_through_comments_blocks_and_flow():
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
    value, marks = parse_document(text, "r.yaml")
    assert value["model"]["about"] == "several\nlines\n"
    assert value["stages"]["sft"]["trainer"] == {"learning_rate": 0.001}
    expected = {
        ("name",): ((2, 1), (2, 7)),
        ("model",): ((4, 1), (5, 3)),
        ("model", "path"): ((5, 3), (5, 9)),
        ("model", "about"): ((6, 3), (6, 10)),
        ("stages",): ((9, 1), (10, 3)),
        ("stages", "sft"): ((10, 3), (10, 8)),
        ("stages", "sft", "data"): ((10, 9), (10, 15)),
        ("stages", "sft", "trainer"): ((11, 9), (11, 18)),
        ("stages", "sft", "trainer", "learning_rate"): ((11, 19), (11, 34)),
        ("stages", "list", 0): ((13, 7), (13, 7)),
        ("stages", "list", 1, "b"): ((14, 7), (14, 10)),
    }
    assert {path: (marks[path].key, marks[path].value) for path in expected} == expected


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
    assert re.fullmatch(rf"r\.yaml:{second}:\d+: \S+", str(caught.value.place))
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
    assert re.fullmatch(rf"r\.yaml:{line}:\d+", str(caught.value.place))
    assert "not YAML" in caught.value.message
    assert hint in caught.value.hint


def test_a_second_document_is_an_error_where_it_begins():
    with pytest.raises(InputError, match=r": a second document begins here$") as caught:
        parse_document("a: 1\n---\nb: 2\n", "r.yaml")
    assert caught.value.place == "r.yaml:2:1"


def test_a_merge_key_is_refused_where_it_stands_and_a_quoted_one_is_a_key():
    with pytest.raises(InputError, match="merge key `<<` is not read") as caught:
        parse_document("a: &a {b: 1}\nc:\n  <<: *a\n", "r.yaml")
    assert caught.value.place == "r.yaml:3:3: c.<<"
    assert "extends" in caught.value.hint
    assert parse_document('"<<": 1\n', "r.yaml")[0] == {"<<": 1}


def test_a_control_character_is_an_error_that_names_the_file():
    with pytest.raises(InputError, match="not YAML") as caught:
        parse_document("a: \x01\n", "r.yaml")
    assert caught.value.place == "r.yaml"


@pytest.mark.parametrize("text", ["a: 1\n? [b]\n: 2\n", "a: &loop [*loop]\n"])
def test_yaml_that_no_recipe_can_mean_is_an_error_and_no_crash(text):
    """A key that is a list, and a value that contains itself."""
    with pytest.raises(InputError):
        parse_document(text, "r.yaml")


def test_keys_are_text():
    assert parse_document("7: a\nno: b\n~: c\n1e3: d\n", "r.yaml")[0] == {"7": "a", "no": "b", "~": "c", "1e3": "d"}


def test_an_empty_document_is_nothing():
    assert parse_document("# only a comment\n", "r.yaml")[0] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: ${LR}", 2e-5),
        ('a: "${LR}"', "2e-5"),
        ("a: '${LR}'", "2e-5"),
        ("a: ${WORD}", "plain words"),
        ("a: runs/${WORD}/${LR}", "runs/plain words/2e-5"),
        ("a: ${NOT_SET:-7}", 7),
        ("a: ${NOT_SET:-true}", True),
        ("a: ${NOT_SET:-}", None),
        ("a: '${NOT_SET:-}'", ""),
        ("a: ${EMPTY:-7}", 7),
        ("a: ${EMPTY}", None),
        ("a: ${LR:-7}", 2e-5),
        ("a: 1_0${COUNT}", 1_024),
        ("a: [x, '${WORD}']", ["x", "plain words"]),
        ("a: {b: '${LR}'}", {"b": "2e-5"}),
        ("a:\n- ${COUNT}", [24]),
        ("a: |\n  ${COUNT}", "24"),
        ("a: $${LR}", "${LR}"),
        ("a: x $${LR} ${COUNT}", "x ${LR} 24"),
        ("a: $LR costs $5", "$LR costs $5"),
        ("a: ${LIST}", "[1, 2]"),  # a variable makes scalars, nothing else
        ("a: ${NESTED}", "${LR}"),  # and is not looked into
        ("a: 1  # ${NOT_SET}", 1),
    ],
)
def test_variables_come_from_the_environment(monkeypatch, text, value):
    values = {"LR": "2e-5", "WORD": "plain words", "EMPTY": "", "COUNT": "24", "LIST": "[1, 2]", "NESTED": "${LR}"}
    for name, given in values.items():
        monkeypatch.setenv(name, given)
    monkeypatch.delenv("NOT_SET", raising=False)
    read = parse_document(text, "r.yaml")[0]["a"]
    assert read == value
    assert type(read) is type(value)


def test_the_variables_of_a_value_are_kept(monkeypatch):
    monkeypatch.setenv("X", "1")
    marks = parse_document("a: ${X}/${Y:-2}/${X}\nb: x\n", "r.yaml")[1]
    assert marks[("a",)].variables == ("X", "Y")
    assert marks[("b",)].variables == ()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a: 1\nb: x ${NOT_SET} y", "the environment variable `NOT_SET` is not set", "${NOT_SET:-default}"),
        ("a: 1\nb: ${}", "`${}` is not a variable", "${NAME}"),
        ("a: 1\nb: ${1X}", "`${1X}` is not a variable", "$${"),
        ("a: 1\nb: ${A-1}", "`${A-1}` is not a variable", "${NAME:-default}"),
        ("a: 1\nb: ${A", "`${A` is not a variable", "${NAME}"),
    ],
)
def test_a_variable_without_value_is_an_error_at_its_place(monkeypatch, text, message, hint):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(InputError) as caught:
        parse_document(text, "r.yaml")
    assert (caught.value.message, caught.value.place) == (message, "r.yaml:2:4: b")
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["a: {b: ${X}}", "a: [x, ${X}]", "a: {b: ${X:-1}, c: 2}"])
def test_a_variable_that_yaml_cannot_hold_is_answered_with_quotes(text):
    with pytest.raises(InputError, match="not YAML") as caught:
        parse_document(text, "r.yaml")
    assert 'needs quotes, as "${NAME}"' in caught.value.hint


@pytest.mark.parametrize("text", ["${X}", "$${X}", "$$${X}", "a ${X} b ${", "$", "${"])
def test_text_that_looks_like_a_variable_survives_being_written(text):
    assert parse_document(dump({"a": text}), "r.yaml")[0] == {"a": text}
    assert parse_document(f"a: {dump_inline(text)}", "r.yaml")[0] == {"a": text}


def test_the_command_line_is_not_looked_up():
    assert parse_value("x${HOME}") == "x${HOME}"


@pytest.mark.parametrize("value", ["a\nb", "", "x: y", "# x", "[", "1e3", 'say "a"', ["a", 1, None], {"a": {"b": []}}])
def test_a_value_on_one_line_reads_back(value):
    text = dump_inline(value)
    assert "\n" not in text
    assert parse_document(f"a: {text}  # a comment\n", "r.yaml")[0] == {"a": value}


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 500])
def test_a_number_beyond_all_bounds_is_refused(number):
    with pytest.raises(InputError, match="too large a number") as caught:
        parse_document(f"a:\n  b: {number}\n", "r.yaml")
    assert caught.value.place == "r.yaml:2:6: a.b"
    with pytest.raises(InputError, match="too large a number"):
        parse_value(number)


def test_every_key_that_stands_twice_is_reported():
    with pytest.raises(InputError) as caught:
        parse_document("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n  c: 3\n", "r.yaml")
    assert [one.place for one in caught.value.all] == ["r.yaml:2:1: a", "r.yaml:5:3: b.c", "r.yaml:6:3: b.c"]


def test_aliases_of_aliases_end():
    """Ten levels of ten are ten thousand million values."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(InputError, match="expands to too many values"):
        parse_document("\n".join(levels), "r.yaml")
