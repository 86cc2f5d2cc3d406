"""The logs of a run directory are read and written whatever has happened to them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.rundir import jsonl

DAMAGE = {
    "cut": b'{"step": 2, "lo',
    "not UTF-8": b'{"step": 2, "text": "\xff"}',
    "NULs": b"\0" * 40,
    "a list": b"[2]",
    "null": b"null",
    "half a number": b"2.",
    "nested without end": b"[" * 100_000,
    "a number of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
}
SOUND = [b'{"step": 1, "text": "next\xc2\x85line"}\n', b' {"step": 3}\r\n']


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_line_that_cannot_be_read_is_put_aside_and_said(file: Path, damage: str) -> None:
    line = DAMAGE[damage] + b"\n"
    file.write_bytes(SOUND[0] + line + b"\n" + SOUND[1] + line)
    assert [row["step"] for row in jsonl.rows(file)] == [1, 3]
    assert jsonl.put_damage_aside(file) == "2 lines of samples.jsonl cannot be read: now in samples.jsonl.damaged"
    assert file.read_bytes() == b"".join(SOUND)
    assert file.with_name("samples.jsonl.damaged").read_bytes() == 2 * line
    assert jsonl.put_damage_aside(file) is None
    file.write_bytes(line)
    assert jsonl.put_damage_aside(file) == "1 line of samples.jsonl cannot be read: now in samples.jsonl.damaged"
    assert file.with_name("samples.jsonl.damaged").read_bytes() == 3 * line


@pytest.mark.parametrize("end", [b'{"step": 2', b"\0\0\0", b""])
def test_what_has_no_line_break_yet_is_no_damage(file: Path, end: bytes) -> None:
    """It is being written, or was when its writer was killed."""
    file.write_bytes(SOUND[0] + end)
    assert jsonl.put_damage_aside(file) is None and file.read_bytes() == SOUND[0] + end
    jsonl.rewrite(file, lambda row: True)
    assert file.read_bytes() == SOUND[0]


def test_a_file_that_cannot_be_read_at_all_is_put_aside_whole(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.mkdir()
    assert jsonl.rows(file) == []
    jsonl.rewrite(file, lambda row: True, [{"step": 1}])
    said = "warning: samples.jsonl (Is a directory) cannot be read: now in samples.jsonl.damaged\n"
    assert capsys.readouterr().err == said
    assert jsonl.rows(file) == [{"step": 1}] and file.with_name("samples.jsonl.damaged").is_dir()


def test_damage_that_cannot_be_put_aside_is_said_and_ends_nothing(file: Path) -> None:
    file.write_bytes(b"[1]\n" + SOUND[0])
    file.with_name("samples.jsonl.damaged").mkdir()
    said = "1 line of samples.jsonl cannot be read, nor be put aside (Is a directory)"
    assert jsonl.put_damage_aside(file) == said
    assert file.read_bytes() == b"[1]\n" + SOUND[0]


def test_a_row_is_never_added_to_a_line_that_was_cut_short(file: Path) -> None:
    """As after a disk that was full for a while."""
    file.write_bytes(SOUND[0] + b'{"step": 2, "te')
    jsonl.append(file, [{"step": 3}, {"step": 4, "text": "é\ud800"}])
    assert [row["step"] for row in jsonl.rows(file)] == [1, 3, 4]
    assert jsonl.rows(file)[2]["text"] == "é?"
    jsonl.append(file, [{"step": 5}])
    assert file.read_bytes().count(b"\n") == 5


class Refusing:
    """A file that takes nothing, as on a full disk, and whose standard error is on the same disk."""

    def write(self, text: str) -> int:
        raise OSError(28, os.strerror(28))

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stderr", [None, Refusing()])
def test_a_row_that_cannot_be_written_is_lost_and_ends_nothing(
    file: Path, stderr: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if stderr:
        monkeypatch.setattr("sys.stderr", stderr)
    file.mkdir()
    jsonl.append(file, [{"step": 1}])
    if stderr is None:
        said = capsys.readouterr().err
        assert said.startswith("warning: samples.jsonl cannot be written to (Is a directory)") and said.count("\n") == 1


def test_the_last_lines_alone_are_read_where_that_is_asked(file: Path) -> None:
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(9)) + "[9]\n")
    sound, damaged = jsonl.read(file, 3)
    assert [line.row["step"] for line in sound] == [7, 8] and damaged == [b"[9]\n"]
