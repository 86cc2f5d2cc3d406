"""New processes that need not import TRL: forks of one process that has done so, and nothing else. Linux only.

A command that trains imports for seconds before it does anything, and there are dozens of them in the tests. What is
started here differs in one thing from what a shell starts: `cmdline` and `environ` in `/proc` are those of the process
that was forked. Where importing itself matters, tests start real commands.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from rlhf_pipeline.run import launch
from rlhf_pipeline.run.launch import ENVIRONMENT, PREFERENCES, Launcher


@functools.cache
def context() -> ForkServerContext:
    """What makes processes; the first call starts the one that they are forked from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    before = dict(os.environ)
    here = os.pathsep.join(filter(None, (str(Path(__file__).parent), before.get("PYTHONPATH"))))
    os.environ.update(PREFERENCES | {"OMP_NUM_THREADS": "1"} | before | ENVIRONMENT | {"PYTHONPATH": here})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or raises, in a new process; it and all it takes and gives must be fit for pickle."""
    answer, end = context().Pipe(duplex=False)
    process = context().Process(target=_answer, args=(end, function, arguments), daemon=True)
    process.start()
    end.close()
    try:
        value, error = answer.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with {process.exitcode}") from None
    process.join()
    if error is not None:
        raise error
    return value


def _answer(end: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        assert "preloaded" in sys.modules  # the server passes over what it cannot import
        end.send((function(*arguments), None))
    except Exception as error:
        traceback.print_exc()
        end.send((None, error))


class _Server:
    """The process that workers are forked from, in place of the `Popen` that a `Launcher` would have.

    Args:
        pid: its id.
        requests: the descriptor of the pipe that it reads from.
        answers: the descriptor of the one that it writes to.
        reap: waits for its end.
    """

    def __init__(self, pid: int, requests: int, answers: int, reap: Callable[[], object]) -> None:
        self.pid, self._reap = pid, reap
        self.stdin, self.stdout = os.fdopen(requests, "w"), os.fdopen(answers)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> None:
        self._reap()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


class WarmLauncher(Launcher):
    """A launcher whose server has imported already.

    Args:
        log: where the server's own output goes.
        environment: more variables for the server and its workers.
        prepare: what the server does before it forks workers.
    """

    def __init__(
        self, log: Path, environment: Mapping[str, str] | None = None, prepare: Callable[[], None] | None = None
    ) -> None:
        super().__init__(log, fork=True)
        self.environment, self._prepare = dict(environment or {}), prepare

    def __enter__(self) -> Launcher:
        """Start the server; one that spawns workers, as a launcher has it once a fork was refused, is the real one."""
        if self._how == "spawn":
            return super().__enter__()
        requests, to_server = context().Pipe(duplex=False)
        from_server, answers = context().Pipe(duplex=False)
        environment = dict(os.environ) | self.environment
        process = context().Process(
            target=_serve_for_tests, args=(requests, answers, self._log, environment, self._prepare), daemon=True
        )
        process.start()
        for end in (requests, answers):
            end.close()
        assert process.pid
        self._server: Any = _Server(process.pid, _own(to_server), _own(from_server), process.join)
        return self


def _own(end: Connection) -> int:
    """The descriptor of one end of a pipe, which is then no longer the connection's."""
    descriptor = os.dup(end.fileno())
    end.close()
    return descriptor


def _serve_for_tests(
    requests: Connection, answers: Connection, log: Path, environment: dict[str, str], prepare: Callable | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    assert "preloaded" in sys.modules
    if prepare:
        prepare()
    _become_server(requests.fileno(), answers.fileno(), log)


def _become_server(requests: int, answers: int, log: Path) -> None:
    """Serve, as `python -m rlhf_pipeline.run.server` does."""
    from rlhf_pipeline.run import server

    os.environ.update(PREFERENCES | os.environ | ENVIRONMENT)
    for end, place in ((requests, 0), (answers, 1), (os.open(log, os.O_WRONLY | os.O_CREAT), 2)):
        os.dup2(end, place)
    sys.stdin, sys.stderr = os.fdopen(0, closefd=False), os.fdopen(2, "w", closefd=False)
    server.serve(os.getppid(), fork=True)


def start_a_thread() -> None:
    """Make this process one that must not be forked."""
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


class Started:
    """`rlhf-pipeline` as a process in a session of its own, as a terminal starts it; to be handled as a `Popen`.

    Args:
        arguments: the command's.
        folder: where to run.
        environment: more variables.
        stderr: the descriptor for its standard error; None closes that.
        stdout: the one for its standard output, which else goes nowhere.
        ignoring: signals that it ignores, as `nohup` has it.
        prepare: what its process does first.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str],
        stderr: int | None,
        stdout: int | None = None,
        ignoring: tuple[int, ...] = (),
        prepare: Callable[[], None] | None = None,
    ) -> None:
        is_on, told = context().Pipe(duplex=False)
        outputs = [None if end is None else Connection(os.dup(end), readable=False) for end in (stdout, stderr)]
        environment = dict(os.environ) | environment
        self._process = context().Process(
            target=_command, args=(arguments, folder, environment, outputs, ignoring, prepare, told), daemon=True
        )
        self._process.start()
        for end in filter(None, (told, *outputs)):
            end.close()
        is_on.recv()  # its session is its own
        is_on.close()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal's number where one ended it; None as long as it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("rlhf-pipeline", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it alone."""
        self.send_signal(signal.SIGKILL)


def _command(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    outputs: list[Connection | None],
    ignoring: tuple[int, ...],
    prepare: Callable[[], None] | None,
    told: Connection,
) -> None:
    """In the new process: what `python -m rlhf_pipeline` does, with a server that is forked, not executed."""
    os.setsid()
    os.close(forkserver._forkserver._forkserver_alive_fd)  # it may outlive the tests
    nothing = os.open(os.devnull, os.O_RDWR)
    stdout, stderr = outputs
    os.dup2(nothing, 0)
    os.dup2(stdout.fileno() if stdout else nothing, 1)
    if stderr is None:
        os.close(2)
        sys.stderr = None
    else:
        os.dup2(stderr.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for end in filter(None, outputs):
        end.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignoring:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["rlhf-pipeline", *arguments]
    code = 1
    try:
        told.send(True)
        told.close()
        if prepare:
            prepare()
        fork_the_server()
        from rlhf_pipeline import cli

        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def fork_the_server() -> None:
    """Have the launcher of this process, which has no threads yet, find its server there already.

    That gets the environment which the launcher would start one with.
    """
    requests, to_server = os.pipe()
    from_server, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        for end in (to_server, from_server):
            os.close(end)
        given = b""
        while not given.endswith(b"\n"):  # one by one: what comes after it is for the server
            given += os.read(requests, 1) or os._exit(0)
        os.environ.clear()
        os.environ.update(json.loads(given))
        _become_server(requests, answers, Path(os.devnull))
        os._exit(0)
    for end in (requests, answers):
        os.close(end)
    server: Any = _Server(pid, to_server, from_server, lambda: os.waitpid(pid, 0))

    def enter(launcher: Launcher) -> Launcher:
        server.stdin.write(json.dumps(launch.environment()) + "\n")
        server.stdin.flush()
        launcher._server = server
        launcher._log.touch()
        return launcher

    launch.Launcher.__enter__ = enter
