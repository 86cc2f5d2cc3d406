"""Starting workers: forked from a warm server where that is safe, spawned where it is not. No torch here.

Importing TRL takes seconds; a server does it once, and a fork of it starts a stage in hundredths of a second. Each job
still has a process of its own: its GPU memory is really gone afterwards, and its crash is only its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import RunError

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


def _command(module: str, *arguments: str) -> list[str]:
    # -P: a folder or file of the user's in the current folder must not stand in for a library.
    return [sys.executable, "-P", "-m", module, *arguments]


class Launcher:
    """Runs jobs one after the other, each in a worker process.

    Args:
        log: where the server's own output goes.
        fork: fork workers from a warm server; by default wherever the platform allows it.
    """

    def __init__(self, log: Path, fork: bool | None = None) -> None:
        self._fork = sys.platform == "linux" if fork is None else fork
        self._log = log
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Launcher":
        """Start importing at once; the first job waits for it."""
        if self._fork:
            self._server = subprocess.Popen(
                _command("rlhf_pipeline.run.server"),
                env=PREFERENCES | os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log.open("w"),
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Let the server go, and with it any worker that is still at work."""
        if self._server:
            self._server.terminate()
            self._server.wait()

    def run(self, job: dict[str, Any], job_file: Path, log: Path) -> int:
        """Run one job to its end.

        Args:
            job: what the worker shall do; see `rlhf_pipeline.run.worker`.
            job_file: where to write it down; the worker puts its answer beside it, as `result.json`.
            log: the file that takes everything the worker prints.

        Returns:
            The worker's exit code; minus the signal's number where one ended it.

        Raises:
            RunError: the server is gone.
        """
        job_file.write_text(json.dumps(job))
        if self._server:
            answer = self._ask({"job": str(job_file), "log": str(log)})
            if "exit" in answer:
                return answer["exit"]
            self._fork = False  # forking turned out to be unsafe: spawn from now on
            self.__exit__()
            self._server = None
        with log.open("a") as output:
            worker = subprocess.Popen(
                _command("rlhf_pipeline.run.worker", str(job_file)),
                env=PREFERENCES | os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                return worker.wait()
            finally:
                worker.kill()

    def _ask(self, request: dict[str, str]) -> dict[str, Any]:
        assert self._server and self._server.stdin and self._server.stdout
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
            raise RunError(f"the worker server ended unexpectedly:\n{tail}", hint="`rlhf-pipeline env` shows versions")
        return json.loads(answer)
