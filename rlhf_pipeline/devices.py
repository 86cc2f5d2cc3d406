"""The GPUs that are visible here. No torch."""

import subprocess
from collections.abc import Mapping
from pathlib import Path


def gpus(environment: Mapping[str, str]) -> list[str]:
    """The NVIDIA GPUs that are visible, as `CUDA_VISIBLE_DEVICES` names them; none where there are none.

    Nothing asks CUDA, which takes memory of each GPU that it looks at.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        return names[: next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))]
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in said.splitlines() if line.startswith("GPU "))]


def can_be_counted() -> bool:
    """Whether none that `gpus` finds are none: it knows nothing of those of other makers."""
    return not Path("/dev/kfd").exists() and not Path("/dev/dri/renderD128").exists()
