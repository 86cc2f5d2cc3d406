"""What a row must hold, and messages that name the file and the row."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest

from rlhf_pipeline.data import rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` remembers within the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(file: Path, *table: dict) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(file)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"messages": [USER, REPLY]}, ([USER], "hello")),
        ({"messages": [USER, REPLY], "completion": None, "prompt": None}, ([USER], "hello")),
        ({"prompt": [USER], "completion": [REPLY]}, ([USER], "hello")),
        ({"prompt": [USER], "completion": "hello"}, ([USER], "hello")),
        ({"prompt": [{**USER, "name": None}], "completion": "hello"}, ([USER], "hello")),
    ],
)
def test_demonstrations_in_every_shape(row, expected):
    assert rows.demonstration(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}, ([USER], "hello", "go away")),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], "hello", "go away")),
    ],
)
def test_preferences_in_every_shape(row, expected):
    assert rows.preference(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, "q"),
        ({"prompt": [USER]}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, REPLY]}, [USER]),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER]),
    ],
)
def test_prompts_in_every_shape(row, expected):
    assert rows.prompt(row) == expected


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (rows.prompt, {}, "`prompt` is missing"),
        (rows.prompt, {"prompt": ""}, "`prompt` is empty"),
        (rows.prompt, {"prompt": []}, "`prompt` is empty"),
        (rows.prompt, {"prompt": 3}, "`prompt` should be text, and is 3"),
        (rows.prompt, {"prompt": [{"role": "user"}]}, "a turn of `prompt` is not"),
        (rows.prompt, {"prompt": ["hi"]}, "a turn of `prompt` is not"),
        (rows.demonstration, {"prompt": "q"}, "`completion` is missing"),
        (rows.demonstration, {"prompt": "q", "completion": ""}, "`completion` is empty"),
        (rows.demonstration, {"prompt": "q", "completion": [USER, REPLY]}, "one turn beside a `prompt`, and has 2"),
        (rows.demonstration, {"messages": [USER]}, "does not end with an assistant's reply"),
        (rows.demonstration, {"messages": [REPLY]}, "does not end with an assistant's reply"),
        (rows.demonstration, {"messages": [USER, {**REPLY, "content": ""}]}, "the reply in `messages` is empty"),
        (rows.preference, {"prompt": "q", "chosen": "a"}, "`rejected` is missing"),
        (rows.preference, {"chosen": "a", "rejected": "b"}, "`prompt` is missing"),
        (rows.preference, {"chosen": [USER, REPLY], "rejected": [OTHER, OTHER]}, "differ before their last turn"),
        (rows.preference, {"chosen": [USER, REPLY], "rejected": None}, "`rejected` is missing"),
    ],
)
def test_a_row_that_lacks_something_says_what(read, row, message):
    with pytest.raises(rows.RowError) as caught:
        read(row)
    assert message in str(caught.value)


def test_a_bad_row_is_named_by_its_number_with_the_columns_it_has(tmp_path):
    good, bad = {"prompt": "q", "reply": "a", "completion": "a"}, {"prompt": "q", "reply": "a", "completion": None}
    spec = Data(path=write(tmp_path / "rows.jsonl", good, good, bad))
    with pytest.raises(InputError, match="`completion` is missing") as caught:
        rows.check(rows.load(spec), spec, rows.demonstration)
    assert caught.value.place == f"{spec.path}: row 3"
    assert "prompt, reply, completion" in caught.value.hint


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    table = [{"prompt": "q", "completion": "a, b"}, {"prompt": "r", "completion": 'c "d"'}]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write(file, *table)
    elif suffix == ".json":
        file.write_text(json.dumps(table))
    elif suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(table)
    else:
        datasets.Dataset.from_list(table).to_parquet(file)
    assert rows.load(Data(path=str(file))).to_list() == table


def test_columns_are_renamed_and_take_the_place_of_others(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "prompt": "old", "answer": "a"})
    spec = Data(path=path, columns={"prompt": "question", "completion": "answer"})
    assert rows.load(spec).to_list() == [{"prompt": "q", "completion": "a"}]


def test_two_columns_may_change_places(tmp_path):
    """Data whose preferred reply stands under `rejected`."""
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "worse", "rejected": "better"})
    spec = Data(path=path, columns={"chosen": "rejected", "rejected": "chosen"})
    assert rows.load(spec).to_list() == [{"prompt": "q", "chosen": "better", "rejected": "worse"}]


def test_a_mapped_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    spec = Data(path=write(tmp_path / "rows.jsonl", {"prompt": "q", "answer": "a"}), columns={"completion": "reply"})
    with pytest.raises(InputError, match="no column `reply` to use as `completion`") as caught:
        rows.load(spec)
    assert caught.value.hint == "its columns are prompt, answer"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', ":3", "not JSON"),
        ('{"prompt": "a"}\n["b"]\n', ":2", "not a JSON object"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, text, place, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        rows.load(Data(path=str(file)))
    assert message in caught.value.message
    assert caught.value.place == f"{file}{place}"


def test_a_file_of_blank_lines_has_no_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n")
    with pytest.raises(InputError) as caught:
        rows.load(Data(path=str(file)))
    assert str(file) in caught.value.place


def test_a_header_alone_has_no_rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n")
    with pytest.raises(InputError, match="no rows") as caught:
        rows.load(Data(path=str(file)))
    assert caught.value.place == str(file)


def test_a_file_that_is_not_what_its_name_says_cannot_be_read(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="cannot be read") as caught:
        rows.load(Data(path=str(file)))
    assert caught.value.place == str(file)


def test_rows_with_the_same_prompt_have_the_same_key_and_others_another():
    same = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    assert rows.prompt_key(same[0]) == rows.prompt_key(same[1])
    turns = [{"messages": [USER, REPLY]}, {"messages": [USER, OTHER]}, {"chosen": [USER, REPLY]}]
    assert len({rows.prompt_key(row) for row in turns}) == 1
    assert rows.prompt_key({"prompt": "q"}) != rows.prompt_key({"prompt": "r"})


@pytest.mark.parametrize("turns", [[USER], [{"role": "system", "content": "Be brief."}, USER]])
def test_conversations_that_end_with_the_user_are_told_apart_by_what_the_user_says(turns):
    """Rows for PPO may be `messages` without a reply."""
    other = [*turns[:-1], {"role": "user", "content": "bye"}]
    assert rows.prompt_key({"messages": turns}) != rows.prompt_key({"messages": other})


OLD, NEW = "a" * 40, "b" * 40
COMMITS = {OLD: b'{"prompt": "old"}\n', NEW: b'{"prompt": "new"}\n'}


class HubWithOneDataset(BaseHTTPRequestHandler):
    """As much of a hub as `datasets` asks for: `org/rows`, one file, another content at each commit; `main` is NEW."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        commit = OLD if OLD in path else NEW
        content = COMMITS[commit]
        file = {"type": "file", "path": "data.jsonl", "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if "/tree/" in path:
            self.answer(json.dumps([file]).encode(), commit, file)
        elif path.startswith("/api/datasets/org/rows"):
            about = {"id": "org/rows", "sha": commit, "siblings": [{"rfilename": "data.jsonl"}]}
            self.answer(json.dumps(about).encode(), commit, file)
        elif path.endswith("data.jsonl"):
            self.answer(content, commit, file)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body, commit, file):
        self.send_response(200)
        for name, value in (("ETag", f'"{file["oid"]}"'), ("X-Repo-Commit", commit), ("Content-Length", len(body))):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_hub_dataset_is_read_at_its_commit(tmp_path):
    """In a process of its own: the library settles when it is imported where the hub is."""
    program = (
        "import json, sys\nfrom rlhf_pipeline.data import rows\nfrom rlhf_pipeline.recipe.schema import Data\n"
        f"for revision in ({OLD!r}, {NEW!r}, None):\n"
        "    print(json.dumps(rows.load(Data(path='org/rows', revision=revision)).to_list()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with ThreadingHTTPServer(("127.0.0.1", 0), HubWithOneDataset) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        hub.shutdown()
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert read == [[{"prompt": "old"}], [{"prompt": "new"}], [{"prompt": "new"}]], done.stderr
