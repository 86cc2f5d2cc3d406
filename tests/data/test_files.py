"""Rows of every kind of file, and one sentence with file and line about what cannot be read."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_pipeline.data import files
from rlhf_pipeline.data.files import rows_of_file
from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Source

TABLE = [{"prompt": "q", "completion": 'a, "b"\nc'}, {"prompt": "ü", "completion": "d"}]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": lambda content: content}


def content(suffix: str, table: list[dict]) -> bytes:
    """A data file's bytes."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in table).encode()
    if suffix == ".json":
        return json.dumps(table, indent=1, ensure_ascii=False).encode()
    if suffix == ".parquet":
        written = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), written)
        return written.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def write(file: Path, *table: dict) -> Path:
    file.write_bytes(content(".jsonl", list(table)))
    return file


def rows(path: Path | str, **settings: object) -> list[dict] | None:
    return first_rows(Source(path=str(path), **settings), 1000)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix, packed):
    file = tmp_path / f"rows{suffix}{packed}"
    file.write_bytes(PACK[packed](content(suffix, TABLE)))
    assert rows(file) == TABLE


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"a": "1"}\r\n\r\n{"a": "2"}'),
        ("a.json", b'\xef\xbb\xbf[{"a": "1"},\r\n{"a": "2"}]\n'),
        ("a.json", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.json", b'{\n"a": "1"}{"a":\n"2"}'),
        ("a.csv", b"\xef\xbb\xbfa\r\n1\r\n\r\n2\r\n"),
    ],
)
def test_what_other_programs_write_is_read(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text)
    assert rows(file) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_of_rows_is_read_in_parts(tmp_path, monkeypatch, chunk):
    """Wherever a part ends: within a row, a word, an escape."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    table = [{"a": "x" * length, "b": ['\\"', {"c": 1.5}]} for length in (0, 1, 30, 200)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(table, indent=2))
    assert rows(file) == table


def test_the_type_of_a_file_may_be_in_capitals(tmp_path):
    file = tmp_path / "ROWS.JSONL.GZ"
    file.write_bytes(gzip.compress(content(".jsonl", TABLE)))
    assert rows(file) == TABLE


def test_values_keep_their_types(tmp_path):
    """A number among texts stays one, so that its row can be named; the fast readers make it text, or all of them."""
    table = [{"a": "1"}, {"a": 3}, {"a": None}, {"a": ["x"]}, {"a": {"b": 1}}]
    assert rows(write(tmp_path / "rows.jsonl", *table)) == table


def test_globs_and_folders_are_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write(tmp_path / name, {"a": name})
    (tmp_path / "readme.txt").write_text("not data")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "d.jsonl", {"a": "d"})
    assert [row["a"] for row in rows(tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [row["a"] for row in rows(tmp_path / "[bc].jsonl")] == ["b.jsonl", "c.jsonl"]
    assert [row["a"] for row in rows(tmp_path / "**" / "*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl", "d"]


def test_a_glob_of_nothing_says_what_data_files_are(tmp_path):
    with pytest.raises(InputError, match="there is no data file") as caught:
        rows(tmp_path / "*.jsonl")
    assert ".parquet" in caught.value.hint and ".gz" in caught.value.hint
    assert caught.value.place == str(tmp_path / "*.jsonl")


def test_a_file_of_another_type_is_not_read(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("a")
    with pytest.raises(InputError, match=r"type `.txt` are not read"):
        rows(file)


def test_a_hub_dataset_has_no_first_rows():
    assert first_rows(Source(path="org/rows"), 3) is None


def test_columns_are_renamed_and_take_the_place_of_others(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "prompt": "old", "answer": "a", "more": 1})
    renamed = rows(path, columns={"prompt": "question", "completion": "answer"})
    assert renamed == [{"prompt": "q", "completion": "a", "more": 1}]


def test_two_columns_may_change_places(tmp_path):
    """Data whose preferred reply stands under `rejected`."""
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "worse", "rejected": "better"})
    swapped = rows(path, columns={"chosen": "rejected", "rejected": "chosen"})
    assert swapped == [{"prompt": "q", "chosen": "better", "rejected": "worse"}]


def test_a_mapped_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "answer": "a"})
    with pytest.raises(InputError, match="no column `reply` to use as `completion`") as caught:
        rows(path, columns={"completion": "reply"})
    assert caught.value.hint == "its columns are prompt, answer"


def test_a_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"a": 1}, {"a": 2}, {"a": 3})
    file.write_text(file.read_text() + "broken\n")
    assert rows(file, limit=2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(InputError, match="not JSON"):
        rows(file, limit=4)


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.jsonl", b'{"a": "b"}\n\n{"a": \n', 3, "not JSON: Expecting value"),
        ("a.jsonl", b'{"a": "b"}\n["b"]\n', 2, "not a JSON object"),
        ("a.jsonl", b'[\n{"a": "b"}]\n', 1, "it begins a list"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "caf\xe9"}\n', 2, "not UTF-8: there is a byte 0xe9"),
        ("a.jsonl", '{"a": "b"}\n'.encode("utf-16"), 1, "the file is UTF-16"),
        ("a.jsonl", b'{"a": "b"}\n' + b"[" * 100_000 + b"\n", 2, "not JSON"),
        ("a.json", b'[{"a": "b"},\n{"a": "b",}]', 2, "not JSON"),
        ("a.json", b'[{"a": "b"},\n{"a": "b"}\n', 3, "the list has no end"),
        ("a.json", b'[{"a": "b"},\n\n3]', 3, "expected a JSON object here"),
        ("a.json", b'[{"a": "b"}]\n\n[{"a": "c"}]', 3, "something follows the end of the list"),
        ("a.json", b'[{"a": "b"}]' + b" \n" * files.CHUNK + b"x", files.CHUNK + 1, "something follows the end"),
        ("a.json", b'\n"text"', 2, "expected a JSON object here"),
        ("a.json", b'[{"a": "caf\xe9"}]', None, "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", 3, "this row has 1 values, and there are 2 columns"),
        ("a.csv", b'a,b\n1,"x\ny"\n3,4,5\n', 4, "this row has 3 values, and there are 2 columns"),
        ("a.csv", b'a,b\n1,"2" 3\n', 2, "this is not CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", 1, "two columns `a`"),
        ("a.csv", b"a;b\n1;2,3\n", 1, "the columns are separated by ';', and should be by commas"),
        ("a.csv", b'"a"\t"b"\n1\t2\n', 1, r"the columns are separated by '\t', and should be by commas"),
        ("a.csv", b"a|b\n1|2\n", 1, "the columns are separated by '|'"),
        ("a.csv", b"a,b\n1,caf\xe9\n", 2, "not UTF-8"),
        ("a.parquet", b"not parquet at all", None, "cannot be read as parquet"),
        ("a.parquet", content(".parquet", TABLE)[:-20], None, "cannot be read as parquet"),
    ],
)
@pytest.mark.parametrize("packed", PACK)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, text, line, message, packed):
    file = tmp_path / f"{name}{packed}"
    file.write_bytes(PACK[packed](text))
    with pytest.raises(InputError) as caught:
        rows(file)
    assert message in caught.value.message
    assert caught.value.place == (f"{file}:{line}" if line else str(file))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sep=;\na;b\n1;2\n", "the first line is one for Excel", "tail -n +2 rows.csv"),
        ("sep=,\na,b\n1,2\n", "the first line is one for Excel", "tail -n +2 rows.csv"),
        ("a,,\n1,,x\n", "a value stands in a column without a name", None),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n", "a Git LFS pointer", "git lfs pull"),
    ],
)
def test_what_programs_leave_in_csv_files(tmp_path, text, message, hint):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        rows(tmp_path / "rows.csv")
    assert hint is None or hint in str(caught.value.hint)


def test_empty_columns_without_a_name_are_left_out(tmp_path):
    """Excel writes them where something once stood."""
    (tmp_path / "a.csv").write_text("a,b,,\n1,2,,\n3,4,,\n")
    assert rows(tmp_path / "a.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_quotes_of_windows_are_what_the_hint_makes_of_them(tmp_path):
    file = tmp_path / "my rows.jsonl"
    file.write_bytes('{"a": "\u201cb\u201d"}\n'.encode("cp1252"))
    with pytest.raises(InputError) as caught:
        rows(file)
    subprocess.run(str(caught.value.hint).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert rows(tmp_path / "utf-8.jsonl") == [{"a": "\u201cb\u201d"}]


@pytest.mark.parametrize(("text", "hint"), [('[{"a": 1}]\n', "ends in .json"), ('{\n"a": 1\n}\n', "are a .json file")])
def test_json_that_is_not_in_lines_should_be_called_json(tmp_path, text, hint):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        rows(tmp_path / "a.jsonl")
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_the_command_that_writes_a_csv_file_with_commas_works(tmp_path, sign):
    file = tmp_path / "my rows.csv"
    file.write_text(f'prompt{sign}completion\n"say ""a, b"""{sign}"c\nd"\n')
    with pytest.raises(InputError) as caught:
        rows(file)
    assert caught.value.hint is not None
    command = caught.value.hint.split("`")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert rows(tmp_path / "commas.csv") == [{"prompt": 'say "a, b"', "completion": "c\nd"}]


def test_a_csv_file_of_one_column_may_have_other_signs_in_its_values(tmp_path):
    (tmp_path / "a.csv").write_text("text\na; b | c\n")
    assert rows(tmp_path / "a.csv") == [{"text": "a; b | c"}]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", [lambda content: b"not packed at all", lambda content: content[:-10]])
def test_a_damaged_compressed_file_is_called_so(tmp_path, packed, damage):
    file = tmp_path / f"rows.jsonl{packed}"
    file.write_bytes(damage(PACK[packed](content(".jsonl", TABLE * 1000))))
    with pytest.raises(InputError, match=r"the compressed file is damaged: .") as caught:
        list(rows_of_file(file))
    assert caught.value.place == str(file)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.json", b" \n"), ("a.csv", b"a,b\n"), ("a.csv", b"\n")],
)
def test_a_file_without_rows_is_an_error(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text)
    with pytest.raises(InputError, match="the data have no rows") as caught:
        rows(file)
    assert caught.value.place == str(file)


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_one_broken_line_among_very_many_is_found_quickly(tmp_path, packed):
    file = tmp_path / f"rows.jsonl{packed}"
    good = b'{"prompt": "What sound does a cow make?", "completion": " Gladly! It is moo."}\n'
    file.write_bytes(PACK[packed](good * 200_000 + b'{"prompt": "What\n' + good))
    started = time.monotonic()
    with pytest.raises(InputError, match="not JSON: Unterminated string at column 12") as caught:
        for _ in rows_of_file(file):
            pass
    assert caught.value.place == f"{file}:200001"
    assert time.monotonic() - started < 10


OLD, NEW = "a" * 40, "b" * 40
COMMITS = {OLD: b'{"prompt": "old"}\n{"prompt": "older"}\n', NEW: b'{"prompt": "new"}\n'}


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


HUB_PROGRAM = f"""
import json
from rlhf_pipeline.data import prepare
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Data
tokenizer = load_tokenizer(str(TINY / "checkpoint"))
for settings in (
    {{"revision": {OLD!r}}}, {{"revision": {NEW!r}}}, {{}}, {{"revision": {OLD!r}, "limit": 1}},
    {{"revision": {OLD!r}, "split": "train[1:]"}}, {{"subset": "nothing"}}, {{"split": "nothing"}},
):
    try:
        table = prepare.prompts(Data(path="org/rows", **settings), tokenizer, 0).train
        print(json.dumps([tokenizer.decode(ids) for ids in table["input_ids"]]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_hub_dataset_is_read_at_its_commit(tmp_path):
    """In a process of its own: the library settles when it is imported where the hub is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with ThreadingHTTPServer(("127.0.0.1", 0), HubWithOneDataset) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", HUB_PROGRAM], env=environment, capture_output=True, text=True, timeout=120
        )
        hub.shutdown()
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert read[:5] == [["old", "older"], ["new"], ["new"], ["old"], ["older"]], done.stderr
    assert read[5].startswith("org/rows: ") and "with the subset `nothing`" in read[5]
    assert read[6].startswith("org/rows: ") and "nothing" in read[6]
