"""Rows of several sources: mixed, limited, counted, held out, remembered, and never all in memory."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from processes import call

from rlhf_pipeline.data import cache, encode, prepare, sources
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Data

USER = {"role": "user", "content": "What sound does a cow make?"}
REPLIES = [" It is moo.", " A moo, I think.", " Ugh."]  # from best to worst
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def write(tmp_path):
    """Write rows to a file of its own."""
    count = iter(range(100))

    def to_file(*table: dict, name: str = "rows{}.jsonl") -> str:
        file: Path = tmp_path / name.format(next(count))
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        return str(file)

    return to_file


def pairs(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "chosen": " yes", "rejected": " no"} for i in range(count)]


def asked(table: datasets.Dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in table["prompt_ids"]]


def turn(text: str) -> dict:
    return {"role": "assistant", "content": text}


RANKED = {
    "explicit": [{"prompt": [USER], "chosen": a, "rejected": b} for a, b in ((0, 1), (0, 2), (1, 2))],
    "implicit": [{"chosen": [USER, a], "rejected": [USER, b]} for a, b in ((0, 1), (0, 2), (1, 2))],
    "preferred": [{"question": USER["content"], "preferred": a, "rejected": b} for a, b in ((0, 1), (0, 2), (1, 2))],
    "ranking": [{"question": USER["content"], "replies": [0, 1, 2]}],
    "ranks": [{"instruction": USER["content"], "completions": [2, 0, 1], "ranks": [3, 1, 2]}],
    "scores": [{"prompt": [USER], "replies": [1, 2, 0], "scores": [0.5, -1, 2]}],
    "reply and rank": [{"prompt": [USER], "answers": [{"text": i, "rank": i} for i in (1, 0, 2)]}],
    "scored rows": [{"question": USER["content"], "response": i, "score": -i} for i in (2, 1, 0)],
}


def with_replies(value):
    """`RANKED` with texts for the numbers of replies."""
    if isinstance(value, list):
        return [with_replies(one) for one in value]
    if isinstance(value, dict):
        numbers = ("rank", "ranks", "score", "scores")
        return {key: one if key in numbers else with_replies(one) for key, one in value.items()}
    return REPLIES[value] if isinstance(value, int) else value


def test_the_same_ranking_is_the_same_pairs_of_tokens_in_every_shape(write, tokenizer):
    tables = {}
    for name, rows in RANKED.items():
        rows = with_replies(rows)
        if name == "implicit":
            rows = [{key: [turns[0], turn(turns[1])] for key, turns in row.items()} for row in rows]
        tables[name] = [
            read(Data(path=write(*rows)), tokenizer, seed=0).train.to_list()
            for read in (prepare.preferences, prepare.whole_preferences)
        ]
    assert [len(rows) for rows in tables["explicit"]] == [3, 3]
    assert all(rows == tables["explicit"] for rows in tables.values())


def test_the_rows_of_a_prompt_belong_together_wherever_they_stand(write, tokenizer, monkeypatch):
    """Also across files, and with more rows between them than are held at once."""
    monkeypatch.setattr(sources, "BATCH", 3)
    rows = [{"prompt": f"p{i % 5}", "completion": f" r{i}", "label": i < 5} for i in range(15)]
    glob = str(Path(write(*rows[:7], name="part{}.jsonl")).parent / "part*.jsonl")
    write(*rows[7:], name="part{}.jsonl")
    prepared = prepare.preferences(Data(path=glob), tokenizer, seed=0)
    found = [tuple(map(tokenizer.decode, row.values())) for row in prepared.train]
    assert found == [
        (f"p{i}", f" r{i}{tokenizer.eos_token}", f" r{bad}{tokenizer.eos_token}")
        for i in range(5)
        for bad in (i + 5, i + 10)
    ]
    assert prepared.counts["rows"] == 15


def test_rows_without_a_pair_are_counted(write, tokenizer):
    thumbs = [
        {"prompt": p, "completion": " a", "label": label} for p, label in (("x", True), ("y", False), ("x", False))
    ]
    prepared = prepare.preferences(Data(path=write(*thumbs)), tokenizer, seed=0)
    assert (len(prepared.train), prepared.counts["rows_without_pair"]) == (1, 1)
    ranked = [{"prompt": "x", "replies": [" a", " b"], "scores": scores} for scores in ([1, 1], [1, 2])]
    prepared = prepare.preferences(Data(path=write(*ranked)), tokenizer, seed=0)
    assert (len(prepared.train), prepared.counts["rows_without_pair"]) == (1, 1)
    demonstrations = prepare.demonstrations(Data(path=write(*thumbs)), tokenizer, seed=0)
    assert (len(demonstrations.train), demonstrations.counts["bad_replies"]) == (1, 2)
    with pytest.raises(InputError, match="none of the 1 rows can be used") as caught:
        prepare.preferences(Data(path=write(thumbs[0])), tokenizer, seed=0)
    assert "rows without pair: 1" in caught.value.hint


def test_text_alone_is_learned_whole_and_split_by_itself(write, tokenizer):
    path = write(*({"text": f"Once upon a time {i}."} for i in range(10)))
    prepared = prepare.demonstrations(Data(path=path, eval_fraction=0.2), tokenizer, seed=0)
    assert (len(prepared.train), len(prepared.held_out)) == (8, 2)
    row = prepared.train[0]
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["input_ids"]).startswith("Once upon a time")
    assert row["input_ids"][-1] == tokenizer.eos_token_id


class TestMix:
    def test_without_weights_all_rows_are_used_in_an_order_drawn_by_the_seed(self, write, tokenizer):
        mix = [{"path": write(*pairs("a", 30))}, {"path": write(*pairs("b", 10))}]
        first, again, other = (
            asked(prepare.preferences(Data(mix=mix), tokenizer, seed).train, tokenizer) for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other and sorted(first) == sorted(other)
        assert sorted(first) == sorted([f"a {i}" for i in range(30)] + [f"b {i}" for i in range(10)])
        assert {one[0] for one in first[:10]} == {"a", "b"}

    @pytest.mark.parametrize(
        ("weights", "counts"), [((1, 1), (10, 10)), ((3, 1), (30, 10)), ((9, 1), (30, 3)), ((0.1, 0.4), (2, 10))]
    )
    def test_weights_are_shares_of_as_many_rows_as_there_are(self, write, tokenizer, weights, counts):
        paths = [write(*pairs("a", 30)), write(*pairs("b", 10))]
        mix = [{"path": path, "weight": float(weight)} for path, weight in zip(paths, weights, strict=True)]
        found = asked(prepare.preferences(Data(mix=mix), tokenizer, seed=1).train, tokenizer)
        assert len(set(found)) == len(found), "a row was used twice"
        assert tuple(sum(one.startswith(name) for one in found) for name in "ab") == counts

    def test_the_seed_draws_which_rows_are_used(self, write, tokenizer):
        mix = [{"path": write(*pairs("a", 30)), "weight": 1.0}, {"path": write(*pairs("b", 5)), "weight": 1.0}]
        found = [set(asked(prepare.preferences(Data(mix=mix), tokenizer, seed).train, tokenizer)) for seed in (1, 1, 2)]
        assert found[0] == found[1] != found[2]

    def test_sources_of_different_shapes_columns_and_limits(self, write, tokenizer):
        mix = [
            {"path": write(*pairs("a", 5)), "limit": 2},
            {"path": write({"q": "b 0", "replies": [" yes", " no"]}), "columns": {"prompt": "q"}},
        ]
        prepared = prepare.preferences(Data(mix=mix), tokenizer, seed=0)
        assert sorted(asked(prepared.train, tokenizer)) == ["a 0", "a 1", "b 0"]
        assert [shape["name"] for shape in prepared.shapes] == ["prompt/chosen/rejected", "ranking"]
        assert prepared.counts["rows"] == 3
        alike = [list(row.values())[1:] for row in prepared.train]
        assert alike[0] == alike[1] == alike[2]

    def test_a_prompt_of_two_sources_is_held_out_of_both(self, write, tokenizer):
        data = Data(mix=[{"path": write(*pairs("a", 10))}, {"path": write(*pairs("a", 10))}], eval_fraction=0.5)
        prepared = prepare.preferences(data, tokenizer, seed=0)
        sides = [asked(side, tokenizer) for side in (prepared.train, prepared.held_out)]
        assert not set(sides[0]) & set(sides[1])
        assert [len(side) for side in sides] == [10, 10]


def test_eval_data_are_read_whole_and_under_the_same_settings(write, tokenizer):
    data = Data(
        path=write(*pairs("a", 4)),
        eval_data={
            "path": write({"q": "a long question", "chosen": " yes", "rejected": " no"}),
            "columns": {"prompt": "q"},
        },
        chat=True,
        max_prompt_length=3,
    )
    prepared = prepare.preferences(data, tokenizer, seed=0)
    assert (len(prepared.train), len(prepared.held_out)) == (4, 1)
    whole = encode.encode_prompts(tokenizer, Data(), [[{"role": "user", "content": "a long question"}]])[0]
    assert prepared.held_out[0]["prompt_ids"] == whole[-3:]
    assert prepared.held_out_table[0]["prompt_length"] == len(whole)
    assert (prepared.counts["rows"], prepared.counts["eval_rows"]) == (4, 1)


def test_lengths_are_those_before_the_cut(write, tokenizer):
    row = {"prompt": "What sound does a cow make?", "chosen": " It is moo.", "rejected": " Ugh."}
    path = write(row)
    whole = prepare.preferences(Data(path=path), tokenizer, seed=0).train[0]
    data = Data(path=path, max_prompt_length=2, max_completion_length=3)
    for read in (prepare.preferences, prepare.whole_preferences):
        table = read(data, tokenizer, seed=0).table
        assert set(table.column_names) - set(read(data, tokenizer, seed=0).train.column_names) == {
            "prompt_key", "row_key", "prompt_length", "chosen_length", "rejected_length"
        }  # fmt: skip
        assert (table[0]["prompt_length"], table[0]["chosen_length"], table[0]["rejected_length"]) == (
            len(whole["prompt_ids"]), len(whole["chosen_ids"]), len(whole["rejected_ids"])
        )  # fmt: skip


@pytest.mark.parametrize("limit", ["max_prompt_length", "max_completion_length"])
def test_rows_that_are_too_long_are_left_out_and_counted_where_that_is_wanted(write, tokenizer, limit):
    rows = [
        {"prompt": "a cow", "completion": " moo"},
        {"prompt": "a cow in the meadow", "completion": " moo and moo and moo"},
    ]
    path = write(*rows)
    table = prepare.demonstrations(Data(path=path), tokenizer, 0).table
    of_limit = prepare.column(table, "prompt_length" if limit == "max_prompt_length" else "reply_length")
    kept = prepare.demonstrations(Data(path=path, too_long="drop", **{limit: int(of_limit[0])}), tokenizer, 0)
    assert (len(kept.train), kept.counts["too_long"]) == (1, 1)
    assert kept.train[0] == prepare.demonstrations(Data(path=path), tokenizer, 0).train[0]
    none = Data(path=path, too_long="drop", **{limit: int(of_limit[0]) - 1})
    with pytest.raises(InputError, match="none of the 2 rows can be used") as caught:
        prepare.demonstrations(none, tokenizer, 0)
    assert "too long: 2" in caught.value.hint
    at_limit = Data(path=path, too_long="drop", **{limit: int(of_limit[1])})
    assert len(prepare.demonstrations(at_limit, tokenizer, 0).train) == 2


GOOD, BAD = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}


def test_a_bad_row_is_named_by_its_number_with_the_columns_it_has(write, tokenizer):
    path = write(GOOD, GOOD, BAD)
    with pytest.raises(InputError) as caught:
        prepare.demonstrations(Data(path=path), tokenizer, 0)
    assert caught.value.message == "`completion` is missing"
    assert caught.value.place == f"{path}: row 3"
    assert "prompt, completion" in caught.value.hint and "bad_rows: drop" in caught.value.hint


def test_further_bad_rows_are_counted_and_rows_are_numbered_in_each_file(write, tokenizer):
    folder = Path(write(GOOD, GOOD, name="a{}.jsonl")).parent
    second = write(GOOD, BAD, {"prompt": "q", "completion": 3}, GOOD, BAD, name="b{}.jsonl")
    with pytest.raises(InputError) as caught:
        prepare.demonstrations(Data(path=str(folder / "*.jsonl")), tokenizer, 0)
    assert caught.value.message == "`completion` is missing (and 2 more rows)"
    assert caught.value.place == f"{second}: row 2"


def test_bad_rows_are_left_out_and_counted_where_that_is_wanted(write, tokenizer):
    prepared = prepare.demonstrations(Data(path=write(GOOD, BAD, GOOD, BAD), bad_rows="drop"), tokenizer, 0)
    assert (len(prepared.train), prepared.counts["bad_rows"], prepared.counts["rows"]) == (2, 2, 4)


def test_a_number_among_a_thousand_texts_is_a_bad_row_and_not_its_digits(write, tokenizer):
    rows = [GOOD] * 1500 + [{"prompt": "q", "completion": 3}]
    with pytest.raises(InputError, match="`completion` should be text, and is 3") as caught:
        prepare.demonstrations(Data(path=write(*rows)), tokenizer, 0)
    assert caught.value.place.endswith("row 1501")


def test_files_of_a_glob_that_are_read_otherwise_are_named(write, tokenizer):
    first = write(GOOD, name="a{}.jsonl")
    second = write({"messages": [USER, turn("moo")]}, name="b{}.jsonl")
    with pytest.raises(InputError) as caught:
        prepare.demonstrations(Data(path=str(Path(first).parent / "*.jsonl")), tokenizer, 0)
    assert caught.value.place == second
    assert "(messages) are read as messages" in caught.value.message
    assert f"{Path(first).name} (prompt, completion) as prompt/completion" in caught.value.message
    assert "`mix`" in caught.value.hint


def test_the_first_prompts_come_with_their_rows(write):
    """What the judge gets: prompts of any shape, and every column."""
    path = write(*({"question": f"q{i}", "answer": i} for i in range(5)))
    found = prepare.first_prompts(Data(path=path), 2)
    assert found == [([{"role": "user", "content": f"q{i}"}], {"question": f"q{i}", "answer": i}) for i in range(2)]
    mix = [{"path": path, "weight": 3.0}, {"path": write(*({"prompt": f"p{i}"} for i in range(5)))}]
    mix[1]["weight"] = 1.0
    assert [row.get("question") or row["prompt"] for _, row in prepare.first_prompts(Data(mix=mix), 4)] == [
        "q0", "q1", "q2", "p0"
    ]  # fmt: skip


class TestMemory:
    """What is encoded is remembered, and anything that decides it makes it anew."""

    @pytest.fixture
    def made(self, tmp_path):
        return lambda: {
            file.name: file.stat().st_ino for file in (tmp_path / "cache" / "rlhf-pipeline").glob("*.arrow")
        }

    def test_the_same_is_encoded_once(self, write, tokenizer, made):
        path = write(*pairs("a", 3))
        first = prepare.preferences(Data(path=path), tokenizer, seed=0)
        files = made()
        again = prepare.preferences(Data(path=path, eval_fraction=0.5), tokenizer, seed=1)
        assert made() == files and len(files) == 1
        assert first.counts == again.counts

    @pytest.mark.parametrize(
        "change",
        [
            {"max_prompt_length": 1},
            {"max_completion_length": 1},
            {"max_completion_length": 100, "too_long": "drop"},
            {"bad_rows": "drop"},
            {"chat": True},
            {"limit": 2},
            {"columns": {"chosen": "rejected", "rejected": "chosen"}},
        ],
    )
    def test_another_setting_encodes_anew(self, write, tokenizer, made, change):
        path = write(*pairs("a", 3))
        prepare.preferences(Data(path=path), tokenizer, seed=0)
        prepare.preferences(Data(path=path, **change), tokenizer, seed=0)
        assert len(made()) == 2

    def test_other_content_of_the_same_size_and_date_encodes_anew(self, write, tokenizer):
        path = write(*pairs("a", 3))
        before, state = prepare.preferences(Data(path=path), tokenizer, seed=0), Path(path).stat()
        Path(path).write_text(Path(path).read_text().replace("a 0", "b 0"))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        after = prepare.preferences(Data(path=path), tokenizer, seed=0)
        assert (asked(before.train, tokenizer)[0], asked(after.train, tokenizer)[0]) == ("a 0", "b 0")

    def test_another_template_or_token_encodes_anew(self, write, made):
        path = write({"question": "q", "answer": "a"})
        other = load_tokenizer(str(TINY / "checkpoint"))
        first = prepare.demonstrations(Data(path=path), other, seed=0).train[0]
        other.chat_template = "{{ messages[0]['content'] }}:"
        second = prepare.demonstrations(Data(path=path), other, seed=0).train[0]
        other.add_tokens(["q:"])
        third = prepare.demonstrations(Data(path=path), other, seed=0).train[0]
        assert len(made()) == 3
        assert len({tuple(row["input_ids"]) for row in (first, second, third)}) == 3

    def test_other_code_encodes_anew(self, write, tokenizer, made, monkeypatch):
        path = write(*pairs("a", 3))
        prepare.preferences(Data(path=path), tokenizer, seed=0)
        monkeypatch.setattr(cache, "_code_hash", lambda: "another")
        prepare.preferences(Data(path=path), tokenizer, seed=0)
        assert len(made()) == 2

    def test_the_code_is_that_of_every_module_that_reads_rows(self, tmp_path, monkeypatch):
        """What one of them would now leave out or refuse must not be taken from what it once let pass."""
        folder = Path(cache.__file__).parent
        copied = Path(shutil.copytree(folder, tmp_path / "data"))
        (tmp_path / "models").mkdir()
        shutil.copy(folder.parent / "models" / "tokenizer.py", tmp_path / "models")
        monkeypatch.setattr(cache, "__file__", str(copied / "cache.py"))
        modules = [*sorted(copied.glob("*.py")), tmp_path / "models" / "tokenizer.py"]
        hashes = []
        for module in modules:
            module.write_text(module.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
            hashes.append(cache._code_hash.__wrapped__())
        assert {"beside", "doubts", "shapes", "tokenizer"} < {module.stem for module in modules}
        assert len(set(hashes)) == len(modules)

    def test_what_failed_leaves_nothing_behind(self, write, tokenizer, tmp_path):
        with pytest.raises(InputError):
            prepare.demonstrations(Data(path=write(GOOD, BAD)), tokenizer, 0)
        assert list((tmp_path / "cache" / "rlhf-pipeline").iterdir()) == []

    @pytest.mark.slow
    def test_another_process_takes_it_up(self, write, tokenizer, made, tmp_path):
        """The worker that trains, after the one that checks."""
        path = write(*pairs("a", 3), {"instruction": "only so that there is another column"})
        data = {"path": path, "bad_rows": "drop"}
        mine = prepare.preferences(Data(**data), tokenizer, seed=0)
        files = made()
        rows, counts = call(take_up, tmp_path / "cache", data)
        assert (rows, counts) == (mine.train.to_list(), mine.counts)
        assert made() == files


def take_up(folder: Path, data: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """In a process of its own: what another one has encoded."""
    datasets.config.HF_DATASETS_CACHE = str(folder)
    cache.open_source = None  # it may not be needed
    found = prepare.preferences(Data(**data), load_tokenizer(str(TINY / "checkpoint")), seed=0)
    return found.train.to_list(), found.counts


def peaks(cache: Path, files: list[Path]) -> list[tuple[int, int]]:
    """In a process of its own: how many pairs there are in each file, and the most memory held by then, in bytes."""
    datasets.config.HF_DATASETS_CACHE = str(cache)
    tokenizer = load_tokenizer(str(TINY / "checkpoint"))
    found = []
    for file in files:
        prepared = prepare.preferences(Data(path=str(file), eval_fraction=0.1), tokenizer, 0)
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        found.append((len(prepared.train) + len(prepared.held_out), int(peak.split()[1]) * 1024))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_rows_are_not_held_in_memory(tmp_path):
    """A larger file of scored replies, whose rows are read, kept until all are there, paired, encoded and split."""
    files = []
    for count in (1_000, 10_000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as lines:
            for i in range(count):
                row = {"prompt": f"Q: {i % (count // 2)}?", "completion": " yes.", "score": i, "extra": "x" * 4000}
                lines.write(json.dumps(row) + "\n")
        files.append(file)
    (few, before), (many, after) = call(peaks, tmp_path / "cache", files)
    assert (few, many) == (500, 5_000)
    assert after - before < files[1].stat().st_size / 2


def test_the_split_of_very_many_prompts_is_fair():
    """The share of the lowest numbers among those that begin alike is what it should be, whatever the seed."""
    keys = np.arange(100_000, dtype=np.int64)
    for seed in (0, 1, 2**40):
        mixed = prepare._scrambled(keys, seed)
        assert len(np.unique(mixed)) == len(keys)
        lowest = np.argsort(mixed)[:10_000]
        assert abs(lowest.mean() - 50_000) < 1500 and abs((lowest % 2).mean() - 0.5) < 0.03


def test_rows_of_a_stage_are_read_again_where_they_are_others(tmp_path, tokenizer):
    """Another run's stage of the same name, or the same stage with another seed, is not what was encoded before."""
    found = []
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "rows.jsonl").write_text(json.dumps({"prompt": "hi", "completion": f" {run}"}))
        spec = Data(path="stage:candidates")
        spec._rows = tmp_path / run / "rows.jsonl"
        found.append(
            tokenizer.decode(prepare.demonstrations(spec, tokenizer, 0).train[0]["input_ids"], skip_special_tokens=True)
        )
    assert found == ["hi one", "hi other"]


def test_pairs_of_the_best_and_the_worst_are_read_apart_from_all_pairs(write, tokenizer):
    """Of the same file, whatever was encoded before; where each row is a pair already, the key would do nothing."""
    path = write({"prompt": "hi", "replies": REPLIES})
    counts = [
        len(prepare.preferences(Data(path=path, pairs=which), tokenizer, 0).train)
        for which in (None, "best_and_worst", "all", None)
    ]
    assert counts == [3, 1, 3, 3]
    of_pairs = write(*pairs("q", 2))
    assert len(prepare.preferences(Data(path=of_pairs), tokenizer, 0).train) == 2
    for which in ("best_and_worst", "all"):
        with pytest.raises(InputError, match="`pairs` has no effect on these rows: each is a pair already"):
            prepare.preferences(Data(path=of_pairs, pairs=which), tokenizer, 0)
    mixed = Data(mix=[{"path": path}, {"path": of_pairs}], pairs="best_and_worst")
    assert len(prepare.preferences(mixed, tokenizer, 0).train) == 3
