"""Files and folders are there whole or not at all, whatever ends the process that writes them, and damage is found."""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.rundir import durable


def writer(text: str) -> Callable[[Path], None]:
    """A `write` that makes two files and a folder within."""

    def write(folder: Path) -> None:
        (folder / "first").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "second").write_text(text)

    return write


def content(folder: Path) -> dict[str, str]:
    """What a folder's files hold, but for the manifest, which must be true of them."""
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    manifest = files.pop(durable.MANIFEST, None)
    if manifest is not None:
        assert json.loads(manifest) == {
            name: [len(text.encode()), hashlib.sha256(text.encode()).hexdigest()] for name, text in files.items()
        }
    return files


def whole(text: str) -> dict[str, str]:
    return {"first": text, "inner/second": text}


def test_a_folder_is_written_and_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on" / "the" / "way" / "checkpoint-1"
    durable.write_folder(folder, writer("old"))
    assert content(folder) == whole("old")
    durable.write_folder(folder, lambda new: (new / "other").touch())
    assert content(folder) == {"other": ""}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-1"]


def test_a_reader_finds_the_old_text_or_the_new_and_nothing_between(tmp_path: Path) -> None:
    file = tmp_path / "stage.json"
    texts = {letter: letter * 400_000 for letter in "ab"}
    durable.write_text(file, texts["a"])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in texts.values():
                durable.write_text(file, text)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        seen = {file.read_text() for _ in range(300)}
    finally:
        stop.set()
        writing.join()
    assert seen == set(texts.values())
    assert list(tmp_path.iterdir()) == [file]


def test_text_that_cannot_be_written_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "stage.json"
    durable.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        durable.write_text(file, "new \ud800")
    assert file.read_text() == "old"
    durable.write_text(file, "é → ü")  # what the failed attempt left does not hurt
    assert file.read_bytes() == "é → ü".encode()


def test_text_is_on_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stage.json"
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((Path(f"/proc/self/fd/{number}").readlink().name, file.exists()))
    )
    durable.write_text(file, "text")
    assert synced == [("stage.json.new", False), (tmp_path.name, True)]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("end", ["exception", "kill"])
def test_a_write_that_breaks_off_half_way_changes_nothing(tmp_path: Path, before: str | None, end: str) -> None:
    folder = tmp_path / "checkpoint-1"
    if before:
        durable.write_folder(folder, writer(before))

    def write(new: Path) -> None:
        (new / "first").write_text("new")
        assert content(folder) == (whole(before) if before else {})  # what a reader finds meanwhile
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("disk full")

    if end == "kill":
        child = os.fork()
        if child == 0:
            try:
                durable.write_folder(folder, write)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    else:
        with pytest.raises(OSError, match="disk full"):
            durable.write_folder(folder, write)
    assert folder.exists() == bool(before)
    assert not before or content(folder) == whole(before)
    assert durable.locate(str(tmp_path), before is not None) == (folder if before else None)

    durable.write_folder(folder, writer("later"))  # the half that was left does not hurt
    assert content(folder) == whole("later")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_under_both_other_names_do_not_hurt(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    for name in (".new-checkpoint-1", ".old-checkpoint-1", "checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left over").write_text("half")
    durable.write_folder(folder, writer("new"))
    assert content(folder) == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_all_of_it_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-1"
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((Path(f"/proc/self/fd/{number}").readlink(), folder.exists()))
    )
    durable.write_folder(folder, writer("new"))
    before = {path.name for path, named in synced if not named}
    assert before == {"first", "inner", "second", durable.MANIFEST, ".new-checkpoint-1"}
    assert synced[-1] == (tmp_path, True)  # and the name itself after it


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1, {10}),
        (2, {9, 10}),
        (3, {8, 9, 10}),
        (4, {1, 8, 9, 10}),
        (9, {1, 8, 9, 10}),
        (None, {1, 8, 9, 10}),
        (0, {1, 8, 9, 10}),
    ],
)
def test_the_latest_checkpoints_by_number_are_kept(tmp_path: Path, limit: int | None, kept: set[int]) -> None:
    for number in (9, 1, 10, 8):
        durable.write_folder(tmp_path / f"checkpoint-{number}", writer(str(number)))
    (tmp_path / "adapter").mkdir()
    durable.remove_others(tmp_path / "checkpoint-10", limit)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", *(f"checkpoint-{number}" for number in kept)}
    assert all(content(tmp_path / f"checkpoint-{number}") == whole(str(number)) for number in kept)


def test_the_checkpoint_just_written_stays_beside_later_ones(tmp_path: Path) -> None:
    """As after resuming from an early one."""
    for number in (3, 8, 9):
        durable.write_folder(tmp_path / f"checkpoint-{number}", writer(str(number)))
    durable.remove_others(tmp_path / "checkpoint-3", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-9"}


def test_a_removal_that_breaks_off_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        durable.write_folder(tmp_path / f"checkpoint-{number}", writer(str(number)))

    def break_off(folder: Path, **_: object) -> None:
        (Path(folder) / "first").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", break_off)
        with pytest.raises(KeyboardInterrupt):
            durable.remove_others(tmp_path / "checkpoint-2", 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    durable.remove_others(tmp_path / "checkpoint-2", 1)
    assert durable.locate(str(tmp_path), True) == tmp_path / "checkpoint-2"


def test_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", ".new-checkpoint-11", ".old-checkpoint-12", "checkpoint-best"):
        (tmp_path / name).mkdir()
    folder = str(tmp_path)
    assert durable.locate(folder, True) == tmp_path / "checkpoint-10"
    assert durable.locate(folder, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    assert durable.locate(folder, None) is None and durable.locate(folder, False) is None


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".new-checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        durable.locate(str(tmp_path), True)
    with pytest.raises(ValueError, match=r"no checkpoint .*checkpoint-7"):
        durable.locate(str(tmp_path), str(tmp_path / "checkpoint-7"))


# What a manifest finds


def truncate(checkpoint: Path) -> None:
    with (checkpoint / "inner" / "second").open("r+") as file:
        file.truncate(1)


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "first"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


DAMAGES = {
    "truncated": (truncate, "inner/second has 1 bytes, not 3"),
    "one bit": (flip_a_bit, "first has other content than was written"),
    "a file is gone": (lambda folder: (folder / "first").unlink(), "first is missing"),
    "a folder is in its place": (
        lambda folder: ((folder / "first").unlink(), (folder / "first").mkdir()),
        "first is missing",
    ),
    "no manifest": (lambda folder: (folder / durable.MANIFEST).unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda folder: (folder / durable.MANIFEST).write_text(""), "manifest.json cannot be read: "),
    "half a manifest": (
        lambda folder: (folder / durable.MANIFEST).write_text((folder / durable.MANIFEST).read_text()[:40]),
        "manifest.json cannot be read: ",
    ),
    "no text": (lambda folder: (folder / durable.MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json cannot be read: "),
    "a list": (lambda folder: (folder / durable.MANIFEST).write_text("[1]"), "manifest.json cannot be read: "),
    "other values": (
        lambda folder: (folder / durable.MANIFEST).write_text('{"first": 3}'),
        "manifest.json cannot be read: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    for number in (4, 9, 10):
        durable.write_folder(tmp_path / f"checkpoint-{number}", writer("old"))
    assert durable.newest_sound(tmp_path) == (tmp_path / "checkpoint-10", {})
    harm, said = DAMAGES[damage]
    harm(tmp_path / "checkpoint-10")
    found = durable.damage(tmp_path / "checkpoint-10")
    assert found is not None and found.startswith(said)
    assert durable.newest_sound(tmp_path) == (tmp_path / "checkpoint-9", {"checkpoint-10": found})
    for number in (4, 9):
        harm(tmp_path / f"checkpoint-{number}")
    assert durable.newest_sound(tmp_path) == (
        None,
        dict.fromkeys(("checkpoint-10", "checkpoint-9", "checkpoint-4"), found),
    )


def test_a_file_that_came_later_is_no_damage(tmp_path: Path) -> None:
    durable.write_folder(tmp_path / "checkpoint-1", writer("old"))
    (tmp_path / "checkpoint-1" / "note").touch()
    assert durable.damage(tmp_path / "checkpoint-1") is None


@pytest.mark.slow
def test_killed_at_any_call_to_the_system_a_folder_is_whole_the_old_one_or_the_new(tmp_path: Path) -> None:
    """A process that replaces a checkpoint beside an earlier one, killed before its first such call, its second, …"""
    names = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")
    for end in range(200):
        work = tmp_path / str(end)
        durable.write_folder(work / "checkpoint-1", writer("first"))
        durable.write_folder(work / "checkpoint-2", writer("old"))
        child = os.fork()
        if child == 0:
            calls = 0

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **keywords: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls > end:  # noqa: B023  the loop goes on in the parent alone
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **keywords)

                return call

            try:
                for name in names:
                    setattr(os, name, counted(getattr(os, name)))
                durable.write_folder(work / "checkpoint-2", writer("new"))
                durable.remove_others(work / "checkpoint-2", 1)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sound, damaged = durable.newest_sound(work)
        assert sound is not None and damaged == {}
        assert content(sound) in (whole("first"), whole("old"), whole("new"))
        if code == 0:  # it was done before that call
            break
        assert code == -signal.SIGKILL
        durable.write_folder(work / "checkpoint-2", writer("later"))
        assert content(work / "checkpoint-2") == whole("later")
    assert end > 20
    assert [path.name for path in work.iterdir()] == ["checkpoint-2"] and content(sound) == whole("new")
