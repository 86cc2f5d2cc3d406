"""Starting workers: forked from a warm server where that is safe, spawned where it is not. No torch here.

Importing TRL takes seconds; a server does it once, and a fork of it starts a stage in hundredths of a second. Each job
still has a process of its own: its GPU memory is really gone afterwards, and its crash is only its own.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.run.explain import SAFE
from rlhf_pipeline.rundir import durable

# What our own processes must see: no telemetry, no chatter, no threads that a fork would lose.
ENVIRONMENT = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Ask the driver's management library whether there is a GPU: asking CUDA itself would spoil it for every fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# What they may see otherwise if the user says so. glibc gives freed memory back at once and asks for it again, page by
# page; keeping it makes training on a CPU a tenth faster. Weights are larger than the second number and go back.
PREFERENCES = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

# Each names the devices that the libraries see, separated by commas: of NVIDIA, of AMD, of Intel.
DEVICE_LISTS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")

STOP_SIGNAL = signal.SIGUSR1  # asks a worker to stop where it can be resumed from
STOPPED = 3  # the exit code of a worker that has
WAITING = 4  # and of one whose stage waits for people
END_SIGNAL = signal.SIGUSR2  # ends the server with its worker and all that this has started


def one_device(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that leave one accelerator visible: the first one of those that are visible in an environment.

    Of more, Transformers would use all: it multiplies the batch size and wraps the model in DataParallel. Only the
    environment is read, because a process that has asked CUDA for its devices cannot be forked.

    An index, a UUID or the name of a MIG instance stays as it is written. An empty list or one that begins with -1
    hides all devices, and still does. Where no list is given, device 0 is the first.
    """
    lists = {name: environment.get(name, "0") for name in DEVICE_LISTS}
    if "HIP_VISIBLE_DEVICES" not in environment:
        if "ROCR_VISIBLE_DEVICES" in environment:
            # It is applied before the other two, which then count among its devices, so it can stay. PyTorch alone
            # would take it for the only list unless HIP's is there, too.
            lists["HIP_VISIBLE_DEVICES"] = lists["CUDA_VISIBLE_DEVICES"]
        else:
            del lists["HIP_VISIBLE_DEVICES"]  # HIP then reads CUDA's
    return {name: devices.split(",")[0].strip() for name, devices in lists.items()}


def environment() -> dict[str, str]:
    """The whole environment of a process of ours that loads torch: this one's, quietened, with one device."""
    return PREFERENCES | os.environ | ENVIRONMENT | one_device(os.environ)


def all_devices() -> dict[str, str]:
    """The variables of `DEVICE_LISTS` as this process has them: those of several processes, each of which takes one."""
    return {name: os.environ[name] for name in DEVICE_LISTS if name in os.environ}


def with_devices(environment: Mapping[str, str], lists: Mapping[str, str]) -> dict[str, str]:
    """An environment with these lists of devices, and none of its own."""
    return {name: value for name, value in environment.items() if name not in DEVICE_LISTS} | dict(lists)


def command(module: str, *arguments: str) -> list[str]:
    """How a module of ours is started as a process."""
    # -P: a folder or file of the user's in the current folder must not replace a library.
    return [sys.executable, "-P", "-m", module, *arguments]


class Launcher:
    """Runs jobs one after the other, each in a worker process.

    Args:
        log: where the server's own output goes.
        fork: have the server import all once and fork workers, by default wherever the platform allows it; else it
            spawns them.

    Attributes:
        stopping: `stop` was called.
        at_work: whether a worker is.
    """

    def __init__(self, log: Path, fork: bool | None = None) -> None:
        self._how = "fork" if (sys.platform == "linux" if fork is None else fork) else "spawn"
        self._log = log
        self._server: subprocess.Popen[str] | None = None
        self._worker: int | None = None
        self.stopping = False

    def __enter__(self) -> "Launcher":
        """Start importing at once; the first job waits for it."""
        self._server = subprocess.Popen(
            command("rlhf_pipeline.run.server", str(os.getpid()), self._how),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the server, and with it any worker that is still at work, and what this has started."""
        if self._server:
            self._server.send_signal(END_SIGNAL)
            self._server.wait()

    @property
    def at_work(self) -> bool:
        """Whether a worker is."""
        return self._worker is not None

    def stop(self) -> None:
        """Ask the worker to stop where it can be resumed from, and every later one at once."""
        self.stopping = True
        if self._worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, STOP_SIGNAL)

    def run(self, job: dict[str, Any], job_file: Path, log: Path) -> int:
        """Run one job to its end.

        Args:
            job: what the worker shall do; see `rlhf_pipeline.run.worker`. With Accelerate's keys as `launch`, several
                processes do it together.
            job_file: where to write it down; the worker puts its answer beside it, as `result.json`.
            log: the file that takes everything the worker prints.

        Returns:
            The worker's exit code; minus the signal's number where one ended it.

        Raises:
            RunError: the server is gone.
        """
        durable.write_text(job_file, json.dumps(job))
        request: dict[str, Any] = {"job": str(job_file), "log": str(log)}
        if job.get("launch"):
            request["devices"] = all_devices()
        answer = self._ask(request)
        if "unsafe" in answer:  # to fork: have workers spawned from now on
            self.__exit__()
            self._how = "spawn"
            self.__enter__()
            answer = self._ask(request)
        return answer["exit"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server and self._server.stdin and self._server.stdout
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            while answer := self._server.stdout.readline():
                said = json.loads(answer)
                if "worker" not in said:
                    return said
                self._started(said["worker"])
        except BrokenPipeError:
            pass
        finally:
            self._worker = None
        tail = "".join(f"\n  | {line[:200]}" for line in self._log.read_text(errors="replace").splitlines()[-5:])
        raise RunError(f"the process that starts workers ended unexpectedly{tail}", hint=SAFE)

    def _started(self, worker: int) -> None:
        self._worker = worker
        if self.stopping:
            self.stop()


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends. Linux only; else nothing."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
    if os.getppid() != parent:
        os._exit(1)  # it ended before that took effect


def adopt_orphans() -> None:
    """Have this process become the parent of what its descendants leave behind as they end. Linux only."""
    if sys.platform == "linux":
        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def end_children() -> None:
    """Kill all that this process has started, and, since it adopts them, what those leave behind. Linux only.

    Those that the kernel cannot end at once are given up after some seconds.
    """
    deadline = time.monotonic() + 5.0
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def _children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            found += [int(stat.parent.name)] if int(parent) == os.getpid() else []
    return found
