"""Several processes, the ranks, that train one stage together: started by Accelerate, watched, and ended as one.

In place of a worker, and with a worker's exit codes and its `result.json`. No torch here.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_pipeline.run import machines
from rlhf_pipeline.run.launch import (
    DEVICE_LISTS,
    END_SIGNAL,
    STOP_SIGNAL,
    STOPPED,
    adopt_orphans,
    command,
    die_with,
    end_children,
)
from rlhf_pipeline.rundir import durable, strict_json, words
from rlhf_pipeline.rundir.layout import MACHINES, PROGRESS, RANKS, RESULT, end_of, log_of_rank, logged_since, read_json

POLL_S = 0.1
GRACE_S = 3.0  # for the others to end by themselves when one has failed
STOP_GRACE_S = 30.0  # and when one has stopped as it was asked to
OVER, STOP = "over", "stop"  # files in the folder: the first machine has decided; all shall stop
PORT = 29500  # torchrun's own
REACH_S = 10.0  # for a machine to reach itself
# What Gloo, NCCL and their store say where another rank did not answer in time, and what tells that one has ended.
_TIMED_OUT = re.compile(
    "Timed out waiting|Application timeout|collective operation timeout|wait timeout after|Socket Timeout"
)
_OF_OTHERS = re.compile(
    f"{_TIMED_OUT.pattern}|onnection (was likely )?(closed|reset|refused)|roken pipe|NCCL|TCPStore|gloo|ProcessGroup"
)


class Ranks:
    """The ranks of a job.

    Args:
        job_file: the job; it has Accelerate's keys as `launch`.
        machine: the number of this machine; by default what these say.

    Attributes:
        log: that of the first rank.
        run: the run directory.
        folder: where each rank notes its process id, its result, and how it ended.
        count: how many there are, on all machines together.
        mine: those of this machine.
        stopping: they were asked to stop.
        silent: a machine that has given no sign for too long, or was started anew.
    """

    def __init__(self, job_file: Path, machine: int | None = None) -> None:
        self.job_file, self.folder = job_file, job_file.with_name(RANKS)
        job = json.loads(job_file.read_text())
        self.keys: dict[str, Any] = job["launch"]
        self.log = Path(job["log"])
        self.run = Path(job["recipe"]["output_dir"]) / job["recipe"]["name"]
        self.count, self.machines = self.keys["num_processes"], self.keys.get("num_machines", 1)
        self.machine = self.keys.get("machine_rank", 0) if machine is None else machine
        self.mine = self.of(self.machine)
        self.stopping = False
        self.silent: int | None = None
        self._told: set[int] = set()
        self._logs = [log_of_rank(self.log, rank) for rank in range(self.count)]
        self._ends = [end_of(log) for log in self._logs]
        self._ears: dict[int, machines.Ear] = {}

    def of(self, machine: int) -> range:
        """Those of a machine."""
        each = self.count // self.machines
        return range(machine * each, (machine + 1) * each)

    def ended(self) -> dict[int, dict[str, Any]]:
        """The exit code of each rank that has ended, and when, by this machine's clock."""
        found = {rank: read_json(self.folder / f"{rank}.json") for rank in range(self.count)}
        return {rank: end for rank, end in found.items() if end is not None}

    def result(self, rank: int) -> dict[str, Any]:
        """What a rank has handed back; empty where it has not."""
        return read_json(self.folder / f"{rank}.result.json") or {}

    def said(self, rank: int, code: int) -> str:
        """What a rank that failed says of it: its result, or what NCCL writes to the log as it aborts the process."""
        message = str(self.result(rank).get("message") or "")
        if not message and code == -signal.SIGABRT:
            message = next((line for line in self.logged(rank).splitlines() if _TIMED_OUT.search(line)), "")
        return message

    def logged(self, rank: int) -> str:
        """What a rank has written to its log."""
        return logged_since(self._logs[rank], self._ends[rank])

    def refusal(self) -> dict[str, Any] | None:
        """Why another machine has not started its ranks; None where it says nothing."""
        found = (machines.refusal(self.folder, machine) for machine in range(1, self.machines))
        return next(filter(None, found), None)

    def listen(self) -> None:
        """Wait, on the first machine, until the others are there.

        Raises:
            LookupError: one did not come; with its number, and how it ended before it could, or None.
        """
        folder = self.run / MACHINES
        self._ears = {machine: machines.Ear(folder, machine) for machine in range(1, self.machines)}
        began, noted = time.monotonic(), list[int]()
        while absent := [machine for machine, ear in self._ears.items() if not ear.has_come]:
            if self.refusal():
                return
            waited = time.monotonic() - began
            heard = waited > 2.5 * machines.BEAT_S  # by then, who is there was, whatever a second process says
            for machine in absent if heard else ():
                if end := machines.has_failed(folder, machine):
                    raise LookupError(machine, end)
            if waited > machines.COME_S or self.stopping:
                raise LookupError(absent[0], None)
            if heard and absent != noted:
                noted = absent
                machines.note_absent(self.run, absent)
                self._show(f"waiting for {words.machines(absent)}")
            time.sleep(POLL_S)

    def _show(self, phase: str) -> None:
        """Tell those who watch the stage what it does before its ranks do."""
        said = {"phase": phase, "step": 0, "of": None, "time": round(time.time(), 3)}
        with contextlib.suppress(OSError):
            self.job_file.with_name(PROGRESS).write_text(json.dumps(said))

    def is_over(self, ended: Collection[int]) -> bool:
        """Whether there is nothing to wait for: another machine is gone or refuses, or the first one has decided.

        Args:
            ended: the ranks that have; a machine whose ranks all have is not missed any more.
        """
        if self.machine == 0 and self.refusal():
            return True
        missed = {m: ear for m, ear in self._ears.items() if any(rank not in ended for rank in self.of(m))}
        gone = (m for m, ear in missed.items() if ear.silence() > machines.SILENT_S or ear.is_another)
        self.silent = next(gone, None)
        return self.silent is not None or (self.machine > 0 and (self.folder / OVER).exists())

    def is_anew(self) -> bool:
        """Whether `silent` was started anew, and so has not the ranks any more that this one works with."""
        return self.silent in self._ears and self._ears[self.silent].is_another

    def tell(self) -> None:
        """Ask the ranks of this machine to stop that were not yet asked, once they are there; and other machines."""
        if self.machines > 1:
            (self.folder / STOP).touch()
        for rank in self.mine:
            with contextlib.suppress(OSError, ValueError):
                if rank not in self._told:
                    os.kill(int((self.folder / f"{rank}.pid").read_text()), STOP_SIGNAL)
                    self._told.add(rank)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End those of this machine."""
        for rank in self.mine:
            if not (self.folder / f"{rank}.json").exists():
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int((self.folder / f"{rank}.pid").read_text()), number)


def main(job_file: Path, machine: int | None = None) -> int:
    """Start the ranks, and wait for them.

    Args:
        job_file: see `Ranks`.
        machine: see `Ranks`.

    Returns:
        A worker's exit code; see `run.worker`.
    """
    ranks = Ranks(job_file, machine)
    if ranks.machine == 0:
        shutil.rmtree(ranks.folder, ignore_errors=True)
        ranks.folder.mkdir()
    deadline = time.monotonic() + machines.SILENT_S
    while not ranks.folder.is_dir() and time.monotonic() < deadline:
        time.sleep(POLL_S)  # a network's file system shows a new folder late

    def stop(_number: int, _frame: FrameType | None) -> None:
        ranks.stopping = True

    signal.signal(STOP_SIGNAL, stop)
    port = ranks.keys.get("main_process_port") or (PORT if ranks.machines > 1 else 0)
    if ranks.machine == 0 and port and not _is_free(port):
        if ranks.machines > 1:
            return _fail(ranks, f"port {port}, on which the machines find each other, is in use here",
                         "set `launch.main_process_port` to another one on all of them")  # fmt: skip
        port = 0
    if ranks.machine == 0 and ranks.machines > 1:
        address = ranks.keys["main_process_ip"]
        if why := _unreached(address, port):
            message = f"this machine, the first one, does not reach itself by `main_process_ip: {address}`: {why}"
            return _fail(ranks, message, "set it to an address of this machine, on all of them")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
        try:
            machines.announce(ranks.run, job_file)
            try:
                ranks.listen()
            finally:
                machines.note_absent(ranks.run, [])
        except LookupError as error:
            absent, end = error.args
            if ranks.stopping:
                return STOPPED
            if end is not None:
                place = next((f"{error['place']}: " for error in end.get("errors", ()) if error["place"]), "")
                return _fail(ranks, f"machine {absent}: {place}{end['message']}", end["hint"])
            return _fail(ranks, f"machine {absent} has not come within {machines.COME_S / 60:.0f} minutes",
                         f"run the same command there, with `launch.machine_rank={absent}`; both have to see the same "
                         "`output_dir`")  # fmt: skip
        signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})
    launcher = _start(ranks, port or _free_port())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})  # the ranks have it blocked until they listen
    try:
        return _outcome(ranks, _wait(ranks, launcher), launcher)
    finally:
        if ranks.machine == 0:
            (ranks.folder / OVER).touch()
        ranks.end()
        end_children()


def accelerate_config(ranks: Ranks, port: int) -> dict[str, Any]:
    """What `accelerate launch` is told on this machine, as a file of `accelerate config` says it.

    Args:
        ranks: those to start.
        port: on which all find each other.
    """
    keys = {key: value for key, value in ranks.keys.items() if key != "config_file"}
    by_deepspeed = keys.get("deepspeed_config")
    sharded = "FSDP" if keys.get("fsdp_config") else "DEEPSPEED" if by_deepspeed else "MULTI_GPU"
    if ranks.machines > 1:
        keys = {"same_network": True, "rdzv_backend": "static"} | keys
        if by_deepspeed:  # each machine starts its own; DeepSpeed would start all from one
            keys["deepspeed_config"] = by_deepspeed | {"deepspeed_multinode_launcher": "standard"}
    if "deepspeed_config_file" not in (by_deepspeed or {}):  # beside which Accelerate does not take it
        keys["mixed_precision"] = "no"
    return {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": sharded, **keys,
        "machine_rank": ranks.machine, "num_machines": ranks.machines, "main_process_port": port,
    }  # fmt: skip


def _start(ranks: Ranks, port: int) -> subprocess.Popen[bytes]:
    """Have Accelerate start the ranks of this machine."""
    config = accelerate_config(ranks, port)
    keys = ranks.keys
    file = ranks.folder / f"accelerate-{ranks.machine}.json"
    file.write_text(json.dumps(config))
    variables = {
        "PYTHONSAFEPATH": "1",  # as `-P`, which torchrun does not pass on
        # The runner decides what a signal to the whole process group means.
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
    }  # fmt: skip
    if ranks.machines > 1 and (interface := _interface_to(keys["main_process_ip"])):
        variables |= {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    if keys.get("use_cpu"):
        variables |= {"ACCELERATE_USE_CPU": "true"} | dict.fromkeys(DEVICE_LISTS, "")
    me = os.getpid()
    return subprocess.Popen(
        [*command("accelerate.commands.launch", "--config_file", str(file)), "-m", "rlhf_pipeline.run.rank",
         str(ranks.job_file)],
        env=os.environ | variables, stdin=subprocess.DEVNULL, preexec_fn=lambda: die_with(me),
    )  # fmt: skip


def _wait(ranks: Ranks, launcher: subprocess.Popen[bytes]) -> dict[int, dict[str, Any]]:
    """Wait until all ranks have ended, or one has failed and the others had time to end, too; how they ended."""
    deadline: float | None = None
    while True:
        gone = launcher.poll() is not None  # before looking at the ranks, which end earlier
        ended = ranks.ended()
        gone = gone and any(rank not in ended for rank in ranks.mine)  # it also ends when those of this machine have
        codes = [end["code"] for end in ended.values()]
        if len(ended) == ranks.count:
            return ended
        if ranks.stopping or (ranks.folder / STOP).exists():
            ranks.tell()
        if deadline is None and (gone or any(codes)):
            orderly = not gone and set(codes) <= {0, STOPPED}
            deadline = time.monotonic() + (STOP_GRACE_S if orderly else _grace(ranks, ended))
        if ranks.is_over(ended) or (deadline is not None and time.monotonic() > deadline):
            return ended
        time.sleep(POLL_S)


def _grace(ranks: Ranks, ended: Mapping[int, Mapping[str, Any]]) -> float:
    """How long to wait for what else has happened, in seconds, when something has failed.

    Where that only misses a rank of another machine, that one's own word comes later, or never.
    """
    if ranks.machine > 0:
        return 5 * GRACE_S  # the first machine decides
    failed = [rank for rank, end in ended.items() if end["code"] not in (0, STOPPED)]
    misses = failed and all(_OF_OTHERS.search(ranks.said(rank, ended[rank]["code"])) for rank in failed)
    return machines.SILENT_S + GRACE_S if ranks.machines > 1 and misses else GRACE_S


def _outcome(ranks: Ranks, ended: Mapping[int, Mapping[str, Any]], launcher: subprocess.Popen[bytes]) -> int:
    """Make one result of those of all ranks; a worker's exit code."""
    failed = {rank: end for rank, end in ended.items() if end["code"] not in (0, STOPPED)}
    stopped = [rank for rank, end in ended.items() if end["code"] == STOPPED]
    said = {rank: ranks.said(rank, end["code"]) for rank, end in failed.items()}
    if stopped and all(map(_OF_OTHERS.search, said.values())):  # what failed then misses those that stopped
        found = (ranks.result(rank) for rank in stopped)
        return _finish(ranks, next((one for one in found if one.get("step")), {"step": None}), STOPPED)
    if ranks.silent is not None:
        hint = "the same command on all machines resumes from the last checkpoint"
        how = "was started anew" if ranks.is_anew() else f"has given no sign for {machines.SILENT_S:.0f} s"
        return _fail(ranks, f"machine {ranks.silent} {how}", hint)
    running = [rank for rank in range(ranks.count) if rank not in ended]
    if not failed and (refusal := ranks.refusal()):
        return _finish(ranks, refusal, 1)
    if not failed and ranks.machine > 0 and (ranks.folder / OVER).exists():
        return 0
    if not failed and running:
        code = launcher.poll()
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return _fail(ranks, f"`accelerate launch` {how}, and not all of its processes had ended", None)
    if not failed:
        return _finish(ranks, ranks.result(0), 0)
    if running and all(map(_TIMED_OUT.search, said.values())):
        ranks.end(signal.SIGABRT)  # its log then says where it is
        time.sleep(0.5)
        at = _was_at(ranks.logged(running[0]))
        return _fail(ranks, f"it did not answer, and the others waited for it in vain{at}", None, rank=running[0])
    culprit = min(failed, key=lambda rank: (bool(_OF_OTHERS.search(said[rank])), failed[rank]["at"]))
    result = ranks.result(culprit)
    if len(failed) < ranks.count or len(set(said.values())) > 1 or not said[culprit]:
        result |= {"rank": culprit, "ranks": ranks.count, "code": failed[culprit]["code"]}
    code = failed[culprit]["code"]
    return _finish(ranks, result, code if code > 0 else 1)


def _was_at(log: str) -> str:
    """Where a rank was when it was ended, in Python, by its log."""
    stacks = log.split("Current thread")
    found = re.search(r'^  File "(.+)", line (\d+) in (\w+)', stacks[-1], re.MULTILINE) if len(stacks) > 1 else None
    return f"; it was in `{found[3]}`, {found[1]}:{found[2]}" if found else ""


def _fail(ranks: Ranks, message: str, hint: str | None, rank: int | None = None) -> int:
    """A result that says what went wrong with all ranks, or with one."""
    result: dict[str, Any] = {"message": message, "hint": hint, "known": hint is not None}
    if rank is not None:
        result |= {"rank": rank, "ranks": ranks.count, "code": 1}
    return _finish(ranks, result, 1)


def _finish(ranks: Ranks, result: dict[str, Any], code: int) -> int:
    """Write the result, which the first machine does for all; another one tells it why it could not start."""
    if ranks.machine == 0:
        durable.write_text(ranks.job_file.with_name(RESULT), strict_json.dumps(result))
    elif code == 1 and "rank" not in result:
        machines.refuse(ranks.folder, ranks.machine, result["message"], result.get("hint"))
    return code


def _interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches an address, its own included; None where nobody knows.

    Gloo and NCCL would take that of the host's name, which may be another one.
    """
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            mine = probe.getsockname()[0]
        except OSError:
            return None
        get_address = 0x8915  # SIOCGIFADDR in <linux/sockios.h>
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), get_address, name.encode()[:15].ljust(256, b"\0"))
                if socket.inet_ntoa(found[20:24]) == mine:
                    return name
    return None


def _unreached(address: str, port: int) -> str | None:
    """Why this machine does not reach itself by an address, as its own ranks have to; None where it does."""
    both = socket.has_dualstack_ipv6()
    try:
        with (
            socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
            ) as server,
            socket.create_connection((address, port), timeout=REACH_S),
        ):
            server.settimeout(REACH_S)
            server.accept()[0].close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def _end(_number: int, _frame: FrameType | None) -> None:
    end_children()
    os._exit(1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # here and in all that it starts: who asked for this job decides
    adopt_orphans()
    signal.signal(END_SIGNAL, _end)
    die_with(int(sys.argv[2]), END_SIGNAL)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
