"""What the runs of a sweep may use side by side: a GPU each, or a share of the processor's cores. No torch."""

import os
from collections.abc import Mapping

from rlhf_pipeline.devices import gpus
from rlhf_pipeline.errors import InputError


def environments(jobs: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables of each of several runs at a time: its GPU, or its number of threads.

    Args:
        jobs: how many at a time.
        environment: that of this process.

    Raises:
        InputError: there are fewer GPUs, or without a GPU fewer cores.
    """
    found = gpus(environment) if jobs > 1 else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, what = (len(found), "GPU") if found else (cores, "core")
    if jobs > 1 and jobs > most:
        there = f"there {'is' if most == 1 else 'are'} {most} {what}{'s' * (most != 1)}{'' if found else ' and no GPU'}"
        if found and "CUDA_VISIBLE_DEVICES" in environment:
            there = f"CUDA_VISIBLE_DEVICES names {most}"
        raise InputError(
            f"{jobs} runs at a time need a {what} each, and {there}",
            place=f"--jobs {jobs}",
            hint=f"`--jobs {most}` is the most here" if most > 1 else "leave out `--jobs`",
        )
    if found:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found[:jobs]]
    if jobs == 1 or "OMP_NUM_THREADS" in environment:
        return [{} for _ in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))} for _ in range(jobs)]
