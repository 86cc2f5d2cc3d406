"""Checkpoints are there whole or not at all, whatever ends the process that writes or removes them."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pipeline.ppo import checkpoint


def writer(text: str) -> Callable[[Path], None]:
    """A `write` that makes two files and a folder within."""

    def write(folder: Path) -> None:
        (folder / "first").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "second").write_text(text)

    return write


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"first": text, "inner/second": text}


def test_a_folder_is_written_and_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on" / "the" / "way" / "checkpoint-1"
    checkpoint.write_whole(folder, writer("old"))
    assert content(folder) == whole("old")
    checkpoint.write_whole(folder, lambda new: (new / "other").touch())
    assert content(folder) == {"other": ""}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("end", ["exception", "kill"])
def test_a_write_that_breaks_off_half_way_changes_nothing(tmp_path: Path, before: str | None, end: str) -> None:
    folder = tmp_path / "checkpoint-1"
    if before:
        checkpoint.write_whole(folder, writer(before))

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
                checkpoint.write_whole(folder, write)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    else:
        with pytest.raises(OSError, match="disk full"):
            checkpoint.write_whole(folder, write)
    assert folder.exists() == bool(before)
    assert not before or content(folder) == whole(before)
    assert checkpoint.locate(str(tmp_path), before is not None) == (folder if before else None)

    checkpoint.write_whole(folder, writer("later"))  # the half that was left does not hurt
    assert content(folder) == whole("later")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_under_both_other_names_do_not_hurt(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    for name in (".new-checkpoint-1", ".old-checkpoint-1", "checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left over").write_text("half")
    checkpoint.write_whole(folder, writer("new"))
    assert content(folder) == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_all_of_it_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-1"
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((Path(f"/proc/self/fd/{number}").readlink(), folder.exists()))
    )
    checkpoint.write_whole(folder, writer("new"))
    before = {path.name for path, named in synced if not named}
    assert before == {"first", "inner", "second", ".new-checkpoint-1"}
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
        checkpoint.write_whole(tmp_path / f"checkpoint-{number}", writer(str(number)))
    (tmp_path / "adapter").mkdir()
    checkpoint.remove_others(tmp_path / "checkpoint-10", limit)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", *(f"checkpoint-{number}" for number in kept)}
    assert all(content(tmp_path / f"checkpoint-{number}") == whole(str(number)) for number in kept)


def test_the_checkpoint_just_written_stays_beside_later_ones(tmp_path: Path) -> None:
    """As after going on from an early one."""
    for number in (3, 8, 9):
        checkpoint.write_whole(tmp_path / f"checkpoint-{number}", writer(str(number)))
    checkpoint.remove_others(tmp_path / "checkpoint-3", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-9"}


def test_a_removal_that_breaks_off_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        checkpoint.write_whole(tmp_path / f"checkpoint-{number}", writer(str(number)))

    def break_off(folder: Path, **_: object) -> None:
        (Path(folder) / "first").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", break_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove_others(tmp_path / "checkpoint-2", 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    checkpoint.remove_others(tmp_path / "checkpoint-2", 1)
    assert checkpoint.locate(str(tmp_path), True) == tmp_path / "checkpoint-2"


def test_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", ".new-checkpoint-11", ".old-checkpoint-12", "checkpoint-best"):
        (tmp_path / name).mkdir()
    folder = str(tmp_path)
    assert checkpoint.locate(folder, True) == tmp_path / "checkpoint-10"
    assert checkpoint.locate(folder, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    assert checkpoint.locate(folder, None) is None and checkpoint.locate(folder, False) is None


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".new-checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        checkpoint.locate(str(tmp_path), True)
    with pytest.raises(ValueError, match=r"no checkpoint .*checkpoint-7"):
        checkpoint.locate(str(tmp_path), str(tmp_path / "checkpoint-7"))
