"""The warm server: imports TRL once, then forks a worker for each job that it reads from standard input.

One JSON object a line: `{"job": FILE, "log": FILE}` in; `{"worker": PID}` and, when it has ended, `{"exit": CODE}` out.
Where a fork would not be safe, `{"unsafe": REASON}` comes back instead, and the asker spawns.
"""

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import TextIO

from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, die_with

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


def serve(runner: int) -> None:
    """Answer jobs until standard input ends, or the process `runner` does."""
    die_with(runner)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they may reach the whole process group; the runner decides

    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})  # until a worker listens, its request waits

    gc.disable()  # a collector that walks what is being imported takes a fifth of the time
    from rlhf_pipeline.callbacks.checkpoints import Stopped
    from rlhf_pipeline.run import worker  # seconds of imports, which every fork then has

    me = os.getpid()
    gc.enable()
    gc.freeze()  # a worker's collector need not walk, and so copy, all that was imported; TRL's PPO calls it often
    for line in sys.stdin:
        request = json.loads(line)
        hazard = fork_hazard()
        answer: dict[str, str | int]
        if hazard:
            answer = {"unsafe": hazard}
        else:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _become_worker(request["log"], me)
                    code = SPOILED if cuda_is_spoiled() else worker.main(request["job"])
                except Stopped:  # it was asked just before its job began, or when that was over
                    code = STOPPED
                finally:
                    os._exit(code)
            _answer(answers, {"worker": child})
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            answer = {"unsafe": "CUDA was touched before the fork"} if code == SPOILED else {"exit": code}
        _answer(answers, answer)


def _answer(answers: TextIO, answer: Mapping[str, str | int]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _become_worker(log: str, server: int) -> None:
    """In the child: die with the server, listen to requests to stop, and write to the log alone."""
    from rlhf_pipeline.callbacks.checkpoints import REQUEST

    die_with(server)
    REQUEST.listen(STOP_SIGNAL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
