"""One of the processes that train a stage together, as Accelerate starts it: a worker, and what tells how that ended.

The worker is a fork of this process, which only waits for it and notes its exit code, whatever ended it. So the
launcher, which would end all processes a moment after it saw one fail, sees none fail; `run.ranks` decides instead.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, die_with
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RANKS, log_of_rank
from rlhf_pipeline.rundir.secrets import scrub


def main(job_file: str) -> None:
    """Have the job done by a worker, and note how that ended in `ranks/`, beside the job.

    Args:
        job_file: see `run.worker`; it has the log of the first rank, too.
    """
    index, folder, me = int(os.environ["RANK"]), Path(job_file).with_name(RANKS), os.getpid()
    die_with(os.getppid())
    worker = os.fork()
    if not worker:
        _work(job_file, index, folder, me)
    durable.write_text(folder / f"{index}.pid", str(worker))
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if index:  # the first one's log is the runner's, which may not know the secrets of another machine
        with contextlib.suppress(OSError):
            scrub(log_of_rank(Path(json.loads(Path(job_file).read_text())["log"]), index))
    durable.write_text(folder / f"{index}.json", json.dumps({"code": code, "at": time.monotonic()}))


def _work(job_file: str, index: int, folder: Path, parent: int) -> NoReturn:
    """In the fork: do the job, and write to this rank's own log alone."""
    code = 1
    try:
        die_with(parent)
        log = Path(json.loads(Path(job_file).read_text())["log"])
        output = os.open(log_of_rank(log, index), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()  # so that the log of one that is ended because it hangs says where
        from rlhf_pipeline.run.server import import_all

        import_all()
        from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
        from rlhf_pipeline.run import worker

        try:
            REQUEST.listen(STOP_SIGNAL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})  # as the server has left it
            code = worker.main(job_file, folder / f"{index}.result.json")
        except Stopped:  # it was asked just before its job began, or when that was over
            code = STOPPED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the others may be gone, and with them what a library would say goodbye to


if __name__ == "__main__":
    main(sys.argv[1])
