"""TensorBoard, Weights & Biases and Trackio, which Transformers' own callbacks feed. No torch.

Settings of a tracker in the user's environment go before those made here.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.fingerprint import short_hash
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import TRAINED, WORK

# What Transformers needs for each: one of these.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
PROJECT = "rlhf-pipeline"  # of Weights & Biases, where the runs of a recipe are a group


def require(names: Sequence[str]) -> None:
    """See that the packages of trackers are installed.

    Raises:
        InputError: one is not.
    """
    missing = [name for name in names if not any(importlib.util.find_spec(package) for package in PACKAGES[name])]
    if missing:
        raise InputErrors(
            [
                InputError(f"`{name}` is not installed", place="report_to", hint=f"pip install {name}")
                for name in missing
            ]
        )


@contextlib.contextmanager
def reporting(names: Sequence[str], recipe: str, stage: Path, started_at: str) -> Iterator[None]:
    """Have a stage's numbers reach trackers inside the block, and nothing of them be left running after it.

    Args:
        names: the recipe's `report_to`.
        recipe: the recipe's name.
        stage: the stage's folder.
        started_at: when the stage was first started; one that is resumed has the same, and so the same W&B run.
    """
    if not names:
        yield
        return
    work, events = stage / WORK, stage / "tensorboard"
    if not durable.holds_some(work) and not (work / TRAINED).exists():
        shutil.rmtree(events, ignore_errors=True)  # of an attempt that nothing was kept of
    theirs = os.environ.get("TENSORBOARD_LOGGING_DIR")
    settings = {
        "WANDB_PROJECT": PROJECT,
        "WANDB_RUN_GROUP": recipe,
        "WANDB_RUN_ID": short_hash(f"{stage}{started_at}".encode())[:16],
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(stage),
        "WANDB_CONSOLE": "off",  # the log stays here, where secrets are taken out of it
        **os.environ,
        "TENSORBOARD_LOGGING_DIR": str(Path(theirs, recipe, stage.name) if theirs else events),
    }
    before = dict(os.environ)
    os.environ.update(settings)
    failed = True
    try:
        yield
        failed = False
    finally:
        _finish(names, failed)
        for name in settings.keys() - before.keys():
            os.environ.pop(name, None)
        if theirs:
            os.environ["TENSORBOARD_LOGGING_DIR"] = theirs


def _finish(names: Sequence[str], failed: bool) -> None:
    """End what Transformers leaves open: evaluation logs after the end of training, and a worker does not say goodbye.

    A fault of a tracker at its end is none of the stage's; it goes to the log.
    """
    try:
        wandb = sys.modules.get("wandb") if "wandb" in names else None
        if wandb:
            if wandb.run is not None:
                wandb.finish(exit_code=int(failed))
            wandb.teardown()
        trackio = sys.modules.get("trackio") if "trackio" in names else None
        if trackio and trackio.context_vars.current_run.get() is not None:
            trackio.finish()
    except Exception as error:
        print(f"a tracker could not be closed: {type(error).__name__}: {error}", file=sys.stderr)
