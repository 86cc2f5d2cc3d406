"""Texts and numbers as people read them on a terminal. No torch."""

import re
import sys
from collections.abc import Sequence

# Control characters but line breaks and tabs, spaces without width, what turns the direction of writing, and halves of
# surrogate pairs.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """Text that cannot steer a terminal, on one line."""
    return printable(" ".join(text.split()))


def show(text: str) -> None:
    """Print a part of a model's reply on standard output: as it is, unless that is a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: the two largest units that matter."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"


def memory(size: float) -> str:
    """Bytes in the unit that fits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Where a row of logged values began and where it ended: means over a twentieth of it, for one batch is noise.

    Args:
        values: at least one.
    """
    few = max(1, len(values) // 20)
    return float(sum(values[:few])) / few, float(sum(values[-few:])) / few
