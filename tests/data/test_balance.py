"""The weights that balance good and bad replies, and how many there are, as a run counts them too."""

import json

import pytest

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data import balance, prepare
from rlhf_pipeline.recipe.schema import Data


@pytest.mark.parametrize(
    ("replies", "given", "expected"),
    [
        ((300, 100), (None, None), (1.0, 3.0)),
        ((100, 300), (None, None), (3.0, 1.0)),
        ((7, 7), (None, None), (1.0, 1.0)),
        ((100, 300), (1.5, None), (1.5, 0.5)),
        ((100, 300), (None, 2.0), (6.0, 2.0)),
        ((100, 300), (1.0, 1.0), (1.0, 1.0)),
        ((3, 10), (None, None), (3.3333, 1.0)),
    ],
)
def test_weights_make_up_for_the_number_of_replies(replies, given, expected):
    assert balance.weights(*replies, *given) == expected


@pytest.fixture
def write(tmp_path):
    def to_file(name: str, rows: list[dict]) -> str:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return to_file


def thumbs(good: int, bad: int) -> list[dict]:
    labels = [True] * good + [False] * bad
    return [{"prompt": f"q{i} of {good}", "completion": f"a{i}", "thumb": label} for i, label in enumerate(labels)]


PAIRS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
RANKED = [{"prompt": "q", "replies": ["a", "b", "c"], "ranks": [1, 2, 2]}]
WITHOUT_WORDS = [{"prompt": "q", "completion": "a", "thumb": "up"}, {"prompt": "r", "completion": "a", "thumb": "?"}]


def test_the_replies_are_counted_as_a_run_counts_them(write, tokenizer):
    files = {name: write(name, rows) for name, rows in (("thumbs", thumbs(6, 14)), ("pairs", PAIRS))}
    for settings, expected in (
        ({"path": files["thumbs"]}, (6, 14)),
        ({"path": files["thumbs"], "eval_fraction": 0.5}, (6, 14)),
        ({"path": files["thumbs"], "limit": 10}, (6, 4)),
        ({"path": files["pairs"]}, (4, 4)),
        ({"path": write("ranked", RANKED)}, (1, 2)),
        ({"path": write("odd", thumbs(2, 1) + WITHOUT_WORDS), "bad_rows": "drop"}, (3, 1)),
        ({"mix": [{"path": files["thumbs"]}, {"path": files["pairs"]}]}, (10, 18)),
        ({"mix": [{"path": files["thumbs"], "weight": 1.0}, {"path": files["pairs"], "weight": 1.0}]}, (6, 10)),
    ):
        data = Data.model_validate(settings)
        counts = prepare.feedback(data, tokenizer, 0).counts
        assert balance.count(data) == (counts["good_replies"], counts["bad_replies"]) == expected, settings


def test_what_one_row_alone_does_not_tell_is_left_to_the_run(write, tokenizer):
    rows = [{"prompt": "q", "completion": text, "score": score} for text, score in (("a", 2), ("b", 5), ("c", 5))]
    scored = Data(path=write("scored", rows))
    assert balance.count(scored) is None
    counts = prepare.feedback(scored, tokenizer, 0).counts
    assert (counts["good_replies"], counts["bad_replies"]) == (2, 1)
    assert balance.count(Data(path="somebody/on-the-hub")) is None


def test_plan_tells_the_weights_of_stages_that_learn_from_both(write, tmp_path):
    write("rows", thumbs(6, 14))
    (tmp_path / "r.yaml").write_text(
        "model: {path: tiny, quantization: none}\n"
        "stages:\n  sft: {data: tiny:demonstrations}\n  kto: {data: rows.jsonl}\n"
    )
    loaded = recipes.load(str(tmp_path / "r.yaml"))
    expected = {"desirable_weight": 2.3333, "undesirable_weight": 1.0, "good": 6, "bad": 14}
    assert plan.class_weights(loaded) == {"kto": expected}
    loaded = recipes.load(str(tmp_path / "r.yaml"), ["kto.trainer.desirable_weight=1.2"])
    assert plan.class_weights(loaded)["kto"] == expected | {"desirable_weight": 1.2, "undesirable_weight": 0.5143}
