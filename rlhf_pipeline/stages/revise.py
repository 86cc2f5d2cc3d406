"""To be written."""

from typing import Any

from rlhf_pipeline.data.prepare import prompts_with_rows as read
from rlhf_pipeline.stages.job import Job

CONFIG = None

__all__ = ["CONFIG", "prepare", "read", "run"]


def prepare(job: Job) -> Any:
    """See that the stage can run."""
    return job.reader.read(read, job.stage.data)


def run(job: Job) -> dict[str, Any]:
    """Make the rows."""
    raise NotImplementedError(job.stage.kind)
