"""The server, parent of all workers: imports TRL once, then forks one for each job that it reads from standard input.

One JSON object a line: `{"job": FILE, "log": FILE}` in; `{"worker": PID}` and, when it has ended, `{"exit": CODE}` out.
With `devices`, the variables that list devices, the job is one for several processes; see `run.ranks`.
Where a fork would not be safe, `{"unsafe": REASON}` comes back instead, and the asker starts a server that spawns them.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rlhf_pipeline.run.launch import (
    END_SIGNAL,
    STOP_SIGNAL,
    STOPPED,
    adopt_orphans,
    command,
    die_with,
    end_children,
    with_devices,
)

SPOILED = 113  # the exit code of a fork in which CUDA cannot be used; no worker uses it


def fork_hazard() -> str | None:
    """Why a fork of this process would not be safe; None where it would be.

    CUDA cannot be used in a child of a process that has used it, and a lock held by a thread that the child does not
    inherit is held for ever.
    """
    import torch

    if torch.cuda.is_initialized():
        return "CUDA is already in use"
    if threading.active_count() > 1:
        return f"{threading.active_count()} Python threads are running"
    return None


def cuda_is_spoiled() -> bool:
    """In a child: whether its parent touched CUDA in a way that keeps the child from using it."""
    import torch

    return torch.cuda._is_in_bad_fork()


def serve(runner: int, fork: bool) -> None:
    """Answer jobs until standard input ends, or the process `runner` does.

    When a worker ends, and when the runner does, however they end, all that the worker has started ends, too: a judge
    may have started a server, say.

    Args:
        runner: the id of the process that asks.
        fork: import what workers need, and fork them; else spawn them.
    """
    die_with(runner, END_SIGNAL)
    adopt_orphans()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they may reach the whole process group; the runner decides
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})  # until a worker listens, its request waits
    if fork:
        import_all()
    signal.signal(END_SIGNAL, _end)  # not before: it ends what still imports, at once
    for line in sys.stdin:
        request = json.loads(line)
        together = "devices" in request
        hazard = fork_hazard() if fork and not together else None
        answer: dict[str, str | int]
        if hazard:
            answer = {"unsafe": hazard}
        else:
            worker = _fork(request) if fork and not together else _spawn(request)
            _answer(answers, {"worker": worker})
            code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
            end_children()
            answer = {"unsafe": "CUDA was touched before the fork"} if code == SPOILED else {"exit": code}
        _answer(answers, answer)


def _end(_number: int, _frame: FrameType | None) -> None:
    end_children()
    os._exit(1)


def import_all() -> None:
    """Import what workers need: seconds, which every fork of this process then is spared."""
    gc.disable()  # a collector that walks what is being imported takes a fifth of the time
    from rlhf_pipeline.run import worker  # noqa: F401

    gc.enable()
    gc.freeze()  # a worker's collector need not walk, and so copy, all that was imported; TRL's PPO calls it often


def _fork(request: dict[str, Any]) -> int:
    """Fork a worker; its process id."""
    from rlhf_pipeline.callbacks.checkpoints import Stopped
    from rlhf_pipeline.run import worker

    server = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _become_worker(request["log"], server)
        code = SPOILED if cuda_is_spoiled() else worker.main(request["job"])
    except Stopped:  # it was asked just before its job began, or when that was over
        code = STOPPED
    finally:
        os._exit(code)


def _spawn(request: dict[str, Any]) -> int:
    """Start a worker that imports for itself, or what starts several; its process id."""
    devices = request.get("devices")
    with Path(request["log"]).open("a") as output:
        return subprocess.Popen(
            command(f"rlhf_pipeline.run.{'worker' if devices is None else 'ranks'}", request["job"], str(os.getpid())),
            env=None if devices is None else with_devices(os.environ, devices),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        ).pid


def _answer(answers: TextIO, answer: Mapping[str, str | int]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _become_worker(log: str, server: int) -> None:
    """In the child: die with the server, listen to requests to stop, and write to the log alone."""
    from rlhf_pipeline.callbacks.checkpoints import REQUEST

    die_with(server)
    signal.signal(END_SIGNAL, signal.SIG_DFL)
    REQUEST.listen(STOP_SIGNAL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] == "fork")
