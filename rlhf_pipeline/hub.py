"""The hub, asked one short question at a time; the libraries' own downloads try for half a minute before they give up.

The hub's library is imported only when it is used: it takes a while, and most commands never ask.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

Kind = Literal["model", "dataset"]
TIMEOUT_S = 5.0


def ask(kind: Kind, name: str, revision: str | None, **options: Any) -> "ModelInfo | DatasetInfo":
    """What the hub says of a model or dataset; `options` go to the library's own call, as `expand` does.

    Raises:
        HfHubHTTPError: the hub answers, and refuses.
        HFValidationError: no name that the hub could have.
        Exception: it does not answer, in one of many ways.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    from huggingface_hub import HfApi

    question = HfApi().model_info if kind == "model" else HfApi().dataset_info
    return question(name, revision=revision, timeout=TIMEOUT_S, **options)


def unreachable(place: str, reason: str = "") -> InputError:
    """What is said of a model that is nowhere."""
    said = "this is neither a model folder nor a hub model that can be reached"
    hint = "check the spelling, the network and, for gated models, `hf auth login`"
    return InputError(f"{said}: {reason}" if reason else said, place=place, hint=hint)


def go_offline() -> None:
    """From here on this process uses the local cache alone, instead of waiting for a hub that does not answer."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def commit(kind: Kind, name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag (None: `main`) means; the cached one if the hub does not say; else None."""
    try:
        found = ask(kind, name, revision, expand=["sha"]).sha
    except Exception:  # offline, unreachable, no such repository, no access: the cache may know all the same
        found = None
    return found if is_commit(found) else _cached_commit(kind, name, revision)


def _cached_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    from huggingface_hub import constants

    branch = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        found = branch.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return found if is_commit(found) else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit, which never means anything else."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def download(name: str, revision: str | None, files: Sequence[str]) -> Path | None:
    """The folder in the cache with some files of a model; None where neither the hub nor the cache has it."""
    try:
        ask("model", name, revision)
        answers = True
    except Exception:  # offline, unreachable, no such repository, no access: the cache may have it all the same
        answers = False
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=not answers)
        )
    except Exception:
        return None
