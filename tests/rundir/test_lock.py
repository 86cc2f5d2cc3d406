"""One run at a time in a run directory: on one machine, on several that share a disk, and where nothing can lock."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir.lock import SILENT_S, Holder, Lock
from rlhf_pipeline.rundir.words import duration

# A process that holds the lock until a line comes in. What it may see otherwise: another host's name, how often it
# shows that it is alive, and a file system without locks.
HOLD = """
import errno, fcntl, json, socket, sys
from pathlib import Path
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir import lock

settings = json.loads(sys.argv[2])
if "host" in settings:
    socket.gethostname = lambda: settings["host"]
lock.BEAT_S = settings.get("beat_s", lock.BEAT_S)
if settings.get("no_locks"):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
try:
    with lock.Lock(Path(sys.argv[1])).held():
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
except RunError as error:
    print(error.message, "|", error.hint, flush=True)
"""


class Process:
    """One of those, and the first thing it said."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def says(self) -> str:
        return self._stdout.readline().strip()

    def release(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.says() == "released"
        self.process.wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout
        return self.process.stdout


@pytest.fixture
def lock(tmp_path: Path) -> Lock:
    return Lock(tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """A function that starts such a process; keywords are settings."""
    started: list[Process] = []

    def start(**settings: object) -> Process:
        started.append(Process(tmp_path, settings))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.communicate()


def leave(lock: Lock, host: str, age_s: float, pid: int = 4711) -> None:
    """What a process of some host has written, and showed its last sign of life so long ago."""
    lock.file.write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-02 03:04:05"}))
    os.utime(lock.file, (time.time() - age_s,) * 2)


def refusal(lock: Lock) -> RunError:
    """What is said to somebody who wants the lock; the same as to somebody who only asks."""
    with pytest.raises(RunError) as asked:
        lock.refuse_if_held()
    with pytest.raises(RunError) as wanted, lock.held():
        pass
    assert lock.is_held()
    assert (asked.value.message, asked.value.hint) == (wanted.value.message, wanted.value.hint)
    return wanted.value


# On one machine


def test_a_directory_that_is_not_there_is_not_locked_and_not_made(tmp_path):
    lock = Lock(tmp_path / "none")
    assert not lock.is_held()
    lock.refuse_if_held()
    assert lock.holder() is None
    assert not lock.folder.exists()


def test_it_is_refused_naming_the_process_that_holds_it(lock, start):
    process = start()
    assert process.says() == "held"
    error = refusal(lock)
    assert re.search(rf"{lock.folder} is in use by process {process.pid}, since 20\d\d-\d\d-\d\d ", error.message)
    assert error.hint.startswith(f"`rlhf-pipeline watch {lock.folder}` shows it; wait for it, or ")
    assert "sign of life" not in error.hint
    process.release()
    assert not lock.is_held()
    lock.refuse_if_held()
    with lock.held():
        assert lock.holder().pid == os.getpid()


def test_it_goes_with_a_killed_process(lock, start):
    process = start()
    assert process.says() == "held"
    process.kill()
    assert lock.holder().pid == process.pid  # its name is left behind, and does not count
    assert not lock.is_held()
    with lock.held():
        assert lock.is_held()
        assert lock.holder() == Holder(os.getpid(), socket.gethostname(), lock.holder().since)
    assert lock.holder() is None


def test_it_goes_with_a_killed_process_that_its_parent_has_not_collected(lock, start):
    """As in a container whose first process collects nobody: the process number is still taken."""
    process = start()
    assert process.says() == "held"
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    os.kill(process.pid, 0)  # it still has its number
    assert not lock.is_held()
    with lock.held():
        pass


def test_a_dead_process_whose_number_another_one_has_keeps_nobody_out(lock):
    """As in a container that was started again: its run has the same number each time."""
    leave(lock, socket.gethostname(), 0, os.getppid())
    assert not lock.is_held()
    with lock.held():
        assert lock.holder().pid == os.getpid()


def test_it_goes_with_a_killed_process_that_had_children(lock, start, tmp_path):
    """As the runner has its worker; a child that outlives it must not hold what it never asked for."""
    code = HOLD.replace('print("held"', 'import subprocess; child = subprocess.Popen(["sleep", "60"]); print(child.pid')
    command = [sys.executable, "-c", code, str(tmp_path), "{}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            assert lock.is_held()
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            assert not lock.is_held()
        finally:
            os.kill(child, signal.SIGKILL)


def test_it_is_free_again_after_an_error_in_the_run(lock):
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), lock.held():
        raise ZeroDivisionError
    assert not lock.is_held()
    assert threading.active_count() == threads  # the heart has stopped
    with lock.held():
        pass


def test_it_cannot_be_taken_twice_in_one_process(lock):
    with lock.held():
        assert f"process {os.getpid()}" in refusal(lock).message
    assert not lock.is_held()


def test_asking_whether_a_run_is_going_on_does_not_keep_one_from_starting(lock):
    """Somebody who watches `status` in a loop must not make `run` crash."""
    with lock.held():
        pass
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            lock.is_held()

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(200):
            with lock.held():
                assert lock.holder().pid == os.getpid()
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()


def test_only_the_lock_is_left_in_the_folder(lock):
    with lock.held():
        assert [path.name for path in lock.folder.iterdir()] == [".lock"]
    assert [path.name for path in lock.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ["", "12345", "{", '{"pid": 1}', "[1, 2]", "\x00"])
def test_a_file_that_names_nobody_keeps_nobody_out(lock, text):
    """One of an older version, or one that a crash has spoilt."""
    lock.file.write_text(text)
    assert lock.holder() is None
    assert not lock.is_held()
    with lock.held():
        assert lock.holder().pid == os.getpid()


# Between machines


def test_a_holder_on_another_machine_that_lives_is_respected_though_its_lock_is_not_passed_on(lock):
    leave(lock, "elsewhere", SILENT_S / 2)
    error = refusal(lock)
    assert "in use by process 4711 on elsewhere, since 2026-01-02 03:04:05" in error.message
    assert f"its hold ends {duration(SILENT_S)} after its last sign of life" in error.hint
    assert json.loads(lock.file.read_text())["pid"] == 4711


def test_a_holder_on_another_machine_that_is_silent_is_taken_over_from(lock):
    leave(lock, "elsewhere", SILENT_S + 30)
    assert not lock.is_held()
    lock.refuse_if_held()
    with lock.held():
        assert lock.holder().pid == os.getpid()
        assert lock.is_held()


def test_a_heartbeat_keeps_the_hold_up(lock, start):
    process = start(host="elsewhere", beat_s=0.05)
    assert process.says() == "held"
    os.utime(lock.file, (1, 1))
    deadline = time.monotonic() + 10
    while lock.file.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - lock.file.stat().st_mtime < 5
    assert f"process {process.pid} on elsewhere" in refusal(lock).message
    process.release()
    assert not lock.is_held()


def test_a_lock_that_outlived_its_machine_is_broken_and_its_holder_ends_if_it_lives_after_all(lock, start):
    process = start(host="elsewhere", beat_s=2.0)
    assert process.says() == "held"
    assert lock.is_held()
    os.utime(lock.file, (time.time() - SILENT_S - 30,) * 2)
    assert not lock.is_held()
    with lock.held():
        assert lock.holder().pid == os.getpid()
        assert process.process.wait(timeout=20) == 1
        assert process.process.stderr.read() == f"error: another run has taken over {lock.folder}; this one ends\n"
        assert lock.is_held() and lock.holder().pid == os.getpid()  # it took nothing with it
    assert not lock.is_held()


def test_a_holder_whose_directory_is_gone_ends(lock, start):
    """So that a run does not go on writing into what somebody has deleted."""
    process = start(beat_s=0.05)
    assert process.says() == "held"
    lock.file.unlink()
    assert process.process.wait(timeout=20) == 1


@pytest.mark.parametrize("call", ["utime", "fstat"])
def test_the_heart_goes_on_where_it_cannot_be_shown(lock, monkeypatch, call):
    """A disk that fails for once is no reason to end a run, or to stop showing that it is alive."""
    third = threading.Event()
    beats: list[object] = []

    def fail(file: object, *_: object, **__: object) -> None:
        beats.append(file)
        if len(beats) == 3:
            third.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rlhf_pipeline.rundir.lock.BEAT_S", 0.01)
    with lock.held(), monkeypatch.context() as disk:
        disk.setattr(os, call, fail)
        assert third.wait(5)


# Where the file system has no locks


def test_without_locks_a_run_takes_the_directory_and_gives_it_back(lock, start):
    process = start(no_locks=True)
    assert process.says() == "held"
    assert lock.holder().pid == process.pid
    process.release()
    assert lock.holder() is None
    again = start(no_locks=True)
    assert again.says() == "held"
    again.release()


def test_without_locks_a_holder_on_another_machine_is_respected_while_it_lives(lock, start):
    process = start(no_locks=True, host="elsewhere")
    assert process.says() == "held"
    other = start(no_locks=True)
    assert f"in use by process {process.pid} on elsewhere" in other.says()
    process.kill()
    os.utime(lock.file, (time.time() - SILENT_S - 30,) * 2)
    late = start(no_locks=True)
    assert late.says() == "held"
    late.release()


def test_without_locks_a_holder_on_this_machine_is_respected_while_it_lives(lock, start):
    process = start(no_locks=True)
    assert process.says() == "held"
    other = start(no_locks=True)
    assert f"in use by process {process.pid}" in other.says()
    process.kill()
    late = start(no_locks=True)
    assert late.says() == "held"
    late.release()


# At the same instant

# Processes that take the lock again and again. While it has it, each makes a file that may be there once only.
RACE = """
import os, socket, sys, time
from pathlib import Path
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir.lock import Lock

folder, until, host = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if host:
    socket.gethostname = lambda: host
lock, inside, had = Lock(folder), folder / "inside", 0
while time.time() < until - 1:
    time.sleep(0.001)
while time.time() < until:
    try:
        with lock.held():
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            time.sleep(0.0005)
            inside.unlink()
            had += 1
    except RunError:
        pass
print(had)
"""


@pytest.mark.parametrize("hosts", [("", "", ""), ("one", "two", "three")], ids=["one machine", "several"])
def test_of_processes_that_start_at_the_same_instant_one_has_it(tmp_path, hosts):
    until = time.time() + 2.0
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACE, str(tmp_path), str(until), host],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for host in hosts
        ]
        said = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in said if error] == []
    had = [int(count) for count, _ in said]
    assert sum(had) > 20
    assert sum(count > 0 for count in had) > 1  # else nothing was shown
