"""Texts and numbers as people read them, on a terminal and in the report. No torch."""

import math
import sys
from collections.abc import Sequence

# What becomes of letters that steer a terminal or a page: of control characters but line breaks and tabs, of spaces and
# marks without width, and of what turns the direction of writing or is half of a surrogate pair.
SHOWN: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
SHOWN |= {0x7F: "\N{SYMBOL FOR DELETE}"} | dict.fromkeys((0x061C, 0x200B, 0x200E, 0x200F))
SHOWN |= dict.fromkeys(
    (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)),
    "\N{REPLACEMENT CHARACTER}",
)


def printable(text: str) -> str:
    """Text that cannot steer a terminal or a page: what would is shown as a symbol, as ␛ for an escape."""
    return text.translate(SHOWN)


def one_line(text: str) -> str:
    """Text that cannot steer a terminal, on one line."""
    return printable(" ".join(text.split()))


def show(text: str) -> None:
    """Print a part of a model's reply on standard output: as it is, unless that is a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def short(value: float) -> str:
    """A number in few characters: 0.971, 12,345, 1.23M, 2e-5."""
    number = float(value)
    size = abs(number)
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else str(number)
    if size >= 1e15 or size < 1e-4:
        return f"{number:.2g}".replace("e-0", "e-").replace("e+", "e")
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{number / limit:.3g}{letter}"
    if number == int(number) or size >= 1000:
        return f"{number:,.0f}".replace("-", "\N{MINUS SIGN}")
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """A time as people say it: the two largest units that matter, below ten seconds with a decimal; nothing where it is
    not known.
    """
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"


def memory(size: float | None) -> str:
    """Bytes in the unit that fits; nothing where they are not known."""
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def memory_beside(measured: int | None, forecast: int | None) -> str:
    """A measured peak, and behind it the forecast of the same with its error, where there is one."""
    if not measured or forecast is None:
        return memory(measured or None)
    error = f"{forecast / measured - 1:+.0%}".replace("%", " %").replace("-", "\N{MINUS SIGN}")
    return f"{memory(measured)} (forecast {memory(forecast)}, {error})"


def machines(numbers: Sequence[int]) -> str:
    """Machines by their numbers: machine 1, or machines 1, 2."""
    return f"machine{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Where a row of logged values began and where it ended: means over a twentieth of it, for one batch is noise.

    Args:
        values: at least one.
    """
    few = max(1, len(values) // 20)
    return float(sum(values[:few])) / few, float(sum(values[-few:])) / few
