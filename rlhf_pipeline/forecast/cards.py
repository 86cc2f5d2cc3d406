"""GPUs by their names, and how much of their memory a run gets. No torch."""

import re
import subprocess
from dataclasses import dataclass

from rlhf_pipeline.errors import InputError

GB = 10**9
GIB = 2**30
PLACE = "--gpu"
# In GiB, as the makers print it on the box; nvidia-smi says a little less.
_NOMINAL = {
    "rtx 3060": 12, "rtx 3080": 10, "rtx 3090": 24, "rtx 3090 ti": 24, "rtx 4060 ti 16gb": 16, "rtx 4070 ti super": 16,
    "rtx 4080": 16, "rtx 4090": 24, "rtx 5080": 16, "rtx 5090": 32, "rtx a4000": 16, "rtx a5000": 24, "rtx a6000": 48,
    "rtx 6000 ada": 48, "rtx pro 6000": 96, "t4": 16, "v100": 16, "v100 32gb": 32, "a10": 24, "a10g": 24, "l4": 24,
    "a40": 48, "l40": 48, "l40s": 48, "a100": 80, "a100 40gb": 40, "a100 80gb": 80, "h100": 80, "h100 80gb": 80,
    "h100 nvl": 94, "gh200": 96, "h200": 141, "b200": 180,
}  # fmt: skip
# What is left of the nominal memory: the driver keeps some, and ECC of GDDR cards some more. nvidia-smi says 24,564 MiB
# of an RTX 4090, 23,034 MiB of an L4 and of an A10G, 15,360 MiB of a T4, 81,559 MiB of an H100, 143,771 MiB of an H200.
_DRIVER = {"l4": 1.51, "a10": 1.51, "a10g": 1.51, "t4": 1.0, "l40": 3.0, "l40s": 3.0, "a40": 3.0, "rtx a6000": 0.6}
# The context of CUDA with the kernels of PyTorch, cuBLAS and bitsandbytes loaded: 0.4 to 0.6 GiB by card and versions.
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people read it.
        usable: bytes that a process can have, its CUDA context among them; None where no card is asked about.
    """

    name: str
    usable: int | None


ANY = Card("a GPU", None)


def find(said: str | None) -> Card:
    """The card that `--gpu` names: by its size, `24GB` or `24GiB`, or by its name. Without it, the visible one, or any.

    Raises:
        InputError: it is neither.
    """
    if said is None:
        return _visible() or ANY
    words = re.sub(r"\s+", " ", re.sub(r"(?<=\w)[-_](?=\w)", " ", said.lower())).strip()
    words = re.sub(r"^(nvidia )?(geforce |tesla )?", "", words)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(gb|gib|g)", words):
        # "24 GB" on a box are 24 GiB, of which the driver leaves about half a GiB less.
        number = float(size[1])
        if not 1 <= number <= 10_000:
            raise InputError(f"no GPU has {said}", place=PLACE, hint="name a size such as `24GB`")
        return Card(f"{size[1]} GB", int(number * GIB) - GIB // 2)
    name = re.sub(r"(?<=\d)(ti|super)\b", r" \1", words)
    name = re.sub(r" (sxm\d?|pcie|generation|laptop gpu)\b", "", name)
    known = _NOMINAL.get(name) or _NOMINAL.get(f"rtx {name}")
    key = name if name in _NOMINAL else f"rtx {name}"
    if known is None:
        raise InputError(
            f"`{said}` is no size and no card that is known here",
            place=PLACE,
            hint="write its size, as `24GB`, or one of " + ", ".join(sorted(_title(one) for one in _NOMINAL)),
        )
    return Card(_title(key), int((known - _DRIVER.get(key, 0.5)) * GIB))


def _title(name: str) -> str:
    return " ".join(
        word.upper() if word not in ("ti", "super", "ada", "pro") else word.title() for word in name.split()
    )


def _visible() -> Card | None:
    """The first GPU that NVIDIA's tool sees; None where there is none."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=5, check=True,
        ).stdout  # fmt: skip
        name, size = found.splitlines()[0].rsplit(",", 1)
        return Card(name.strip(), int(float(size)) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
