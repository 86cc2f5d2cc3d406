"""The run directory: the old truth or the new one, nothing lost, one run at a time."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.run.directory import RunDirectory, write_atomically

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from rlhf_pipeline.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def holder(directory):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(directory.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_reader_finds_the_old_text_or_the_new_and_nothing_between(tmp_path):
    file = tmp_path / "stage.json"
    versions = {letter: letter * 400_000 for letter in "ab"}
    write_atomically(file, versions["a"])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in versions.values():
                write_atomically(file, text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {file.read_text() for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen == set(versions.values())
    assert list(tmp_path.iterdir()) == [file]


def test_text_that_cannot_be_written_leaves_the_old_text(tmp_path):
    file = tmp_path / "stage.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text() == "old"


def test_a_record_is_read_back_as_written(directory):
    directory.stage("sft").mkdir(parents=True)
    record = {"state": "done", "metrics": {"loss": 0.5, "nan": None}, "error": "é → ü"}
    directory.write_record("sft", record)
    assert directory.record("sft") == record
    assert (directory.stage("sft") / "stage.json").read_text(encoding="utf-8").endswith("}\n")
    assert directory.record("dpo") is None


@pytest.mark.parametrize("content", [b"", b'{"state"', b"[1]", b"\xff\xfe"])
def test_a_record_that_cannot_be_read_is_none(directory, content):
    directory.stage("sft").mkdir(parents=True)
    (directory.stage("sft") / "stage.json").write_bytes(content)
    assert directory.record("sft") is None


def test_set_aside_keeps_every_former_result(directory):
    assert directory.set_aside("sft") is None
    asides = []
    for attempt in range(4):  # faster than the clock's second, by which they are named
        directory.stage("sft").mkdir(parents=True)
        (directory.stage("sft") / "log.txt").write_text(str(attempt))
        asides.append(directory.set_aside("sft"))
    assert not directory.stage("sft").exists()
    assert [(aside / "log.txt").read_text() for aside in asides] == ["0", "1", "2", "3"]
    assert all(aside.parent == directory.path and aside.name.startswith("sft.") for aside in asides)


def test_publish_moves_the_adapter_into_place_and_clears_the_work_away(directory):
    work = directory.stage("sft") / "work"
    (work / "adapter").mkdir(parents=True)
    (work / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (work / "job.json").touch()
    directory.publish("sft")
    assert (directory.stage("sft") / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert not work.exists()


def test_a_stage_without_an_adapter_is_not_published(directory):
    (directory.stage("sft") / "work").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        directory.publish("sft")
    assert not (directory.stage("sft") / "adapter").exists()


def test_a_directory_that_is_not_there_is_not_locked_and_not_made(directory):
    assert not directory.is_locked()
    directory.refuse_if_locked()
    assert not directory.path.exists()


def test_the_lock_is_refused_naming_the_process_that_holds_it(directory, holder):
    assert directory.is_locked()
    for attempt in (directory.refuse_if_locked, directory.locked().__enter__):
        with pytest.raises(RunError) as caught:
            attempt()
        assert f"in use by process {holder.pid}" in caught.value.message
        assert caught.value.hint


def test_the_lock_goes_with_a_killed_process(directory, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not directory.is_locked()
    with directory.locked():
        assert directory.is_locked()
        assert (directory.path / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_free_again_after_an_error_in_the_run(directory):
    with pytest.raises(ZeroDivisionError), directory.locked():
        raise ZeroDivisionError
    assert not directory.is_locked()


def test_asking_whether_a_run_is_going_on_does_not_keep_one_from_starting(directory):
    """Somebody who watches `status` in a loop must not make `run` crash."""
    with directory.locked():
        pass
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            directory.is_locked()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(300):
            with directory.locked():
                assert Path(directory.path / ".lock").read_text() == str(os.getpid())
    finally:
        stop.set()
        watcher.join()
