"""`KEY=V1,V2,…` and `KEY=low..high` as people write them, and the names of the runs that they make."""

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.sweep import keys
from rlhf_pipeline.sweep.keys import Listed, Range


def read(*words: str) -> list[keys.Swept]:
    return keys.parse(words)[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.01,0.1,1.0", (0.01, 0.1, 1.0)),
        ("1e-5, 2e-5", (1e-5, 2e-5)),
        ("true,false,null", (True, False, None)),
        ("1,true", (1, True)),  # in Python they are equal
        ("bfloat16,float32", ("bfloat16", "float32")),
        ("[q_proj,v_proj],all-linear", (["q_proj", "v_proj"], "all-linear")),
        ("{path: a},{path: b, limit: 3}", ({"path": "a"}, {"path": "b", "limit": 3})),
        ('"a,b",c', ("a,b", "c")),
        ("../a.jsonl,../b.jsonl", ("../a.jsonl", "../b.jsonl")),
    ],
)
def test_values_are_read_as_yaml(text, values):
    (found,) = read(f"a.b={text}")
    assert isinstance(found, Listed)
    assert found.values == values and [type(one) for one in found.values] == [type(one) for one in values]


@pytest.mark.parametrize(
    ("text", "low", "high", "log", "whole"),
    [
        ("0.01..1", 0.01, 1.0, False, False),
        ("1e-6..1e-4:log", 1e-6, 1e-4, True, False),
        ("4..64", 4, 64, False, True),
        ("4..64:log", 4, 64, True, True),
        ("-1.5..-.5", -1.5, -0.5, False, False),
        ("0...5", 0.0, 0.5, False, False),
    ],
)
def test_ranges(text, low, high, log, whole):
    assert read(f"a={text}") == [Range("a", f"a={text}", low, high, log, whole)]
    assert type(read(f"a={text}")[0].low) is type(low)


def test_one_value_holds_for_all_runs():
    one = ["b=3", "c=[1,2]", "name=other", "data=../x.jsonl", "e=a..b.txt"]
    swept, fixed = keys.parse(["a=1,2", *one])
    assert [two.key for two in swept] == ["a"] and fixed == one


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["a=1,2", "kl_coef"], "an argument has the form KEY=V1,V2,… or KEY=low..high", "kl_coef=0.01,0.1,1.0"),
        (["a=1,2", "a=3"], "`a` is given twice", "in one argument"),
        (["a=1,2,1.0"], "the value 1.0 is given twice", "give it once"),
        (["a=x,x"], "the value x is given twice", "give it once"),
        (["a="], "no value is given", "for example 0.01,0.1,1.0"),
        (["a=1,"], "'1,' is no list of values", "between commas"),
        (["a=1,,2"], "'1,,2' is no list of values", "between commas"),
        (["a=[1,2"], "'[1,2' is no list of values", "between commas"),
        (["a=2..1"], "the range begins at 2 and ends at 1", "the smaller number first"),
        (["a=0.5..0.5"], "the range begins at 0.5 and ends at 0.5", "the smaller number first"),
        (["a=0..1:log"], "a logarithmic range cannot begin at 0", "leave out `:log`"),
        (["a=-0.1..1:log"], "a logarithmic range cannot begin at -0.1", "leave out `:log`"),
        (["a=0.1..much"], "'0.1..much' is no range", "low..high or low..high:log"),
        (["a=0.1..1:lin"], "'0.1..1:lin' is no range", "low..high or low..high:log"),
        (["name=a,b"], "`name` cannot be swept", "named after its values"),
        (["output_dir=a,b"], "`output_dir` cannot be swept", "named after its values"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_argument(words, message, hint):
    with pytest.raises(InputError) as raised:
        keys.parse(words)
    (error,) = raised.value.all
    assert error.message == message and hint in error.hint
    assert error.place == f"override `{words[-1]}`"


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(InputError) as raised:
        keys.parse(["a=1,1", "b=2..1", "c"])
    assert [error.place for error in raised.value.all] == [f"override `{word}`" for word in ("a=1,1", "b=2..1", "c")]


def test_nothing_to_sweep():
    with pytest.raises(InputError, match="there is nothing to sweep: no key has several values"):
        keys.parse(["seed=1", "a=[1,2]"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1, "0.1"), (1.0, "1.0"), (1, "1"), (1e-5, "1e-5"), (2e15, "2e15"), (0.123456789, "0.123456789"), (None, "null"),
     (True, "true"), ("0.1", "'0.1'"), ([1, "a"], "[1, a]")],
)  # fmt: skip
def test_an_override_is_read_as_the_same_value(value, text):
    from rlhf_pipeline.recipe.yaml import parse_value

    assert keys.as_text(value) == text
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_names_say_the_values_by_the_shortest_word_that_no_other_key_of_the_recipe_ends_with():
    loaded = recipe.load("tiny")
    words = ["ppo.trainer.kl_coef=0.1,1.0", "ppo.trainer.learning_rate=1e-3,2e-3", "seed=1,2", "lora.r=4,8",
             "sft.data.limit=8,9", "model.dtype=float32,bfloat16"]  # fmt: skip
    swept = read(*words)
    found = keys.words_for(swept, loaded)
    assert found == {
        "ppo.trainer.kl_coef": "kl_coef",  # GRPO's and DPO's is `beta`
        "ppo.trainer.learning_rate": "ppo.learning_rate",
        "seed": "seed",
        "lora.r": "lora.r",
        "sft.data.limit": "limit",
        "model.dtype": "dtype",
    }
    values = keys.grid(swept)
    assert len(values) == 2**6
    first = keys.combination(values[0], found)
    assert first.name == "kl_coef-0.1_ppo.learning_rate-0.001_seed-1_lora.r-4_limit-8_dtype-float32"
    assert recipe.load("tiny", [f"name={first.name}"]).name == first.name
    # Whatever else is swept, a value has the same name.
    assert keys.words_for(read("ppo.trainer.learning_rate=1e-3,2e-3"), loaded) == {
        "ppo.trainer.learning_rate": "ppo.learning_rate"
    }


def test_values_that_cannot_stand_in_a_name_stay_apart_in_it():
    odd = ["a/b", "a b", "a,b", ["a", "b"], {"a": 1}, "", "x" * 300, "x" * 299, "0.1", 0.1]
    names = [keys.combination({"k": value}, {"k": "k"}).name for value in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        assert len(name) < 100
        assert recipe.load("tiny", [f"name={name}"]).name == name
    many = keys.combination({f"k{i}": "x" * 40 for i in range(20)}, {f"k{i}": f"k{i}" for i in range(20)})
    assert len(many.name) < 255
