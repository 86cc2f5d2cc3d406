"""Paths of this machine as people write them. What is odd about one is left for those to say who open it."""

import os
import tempfile
from pathlib import Path


def expanded(path: str) -> Path:
    """A path with `~` and `~NAME` as home folders; where nobody has that name or a home, it stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (that of `pathlib` raises)


def resolved(path: Path) -> Path:
    """A path without links; of a loop of links, as far as it leads."""
    return Path(os.path.realpath(path))


def caches() -> Path:
    """Where programs keep for this user what can be made again; for one without a home, among temporary files."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    home = expanded("~")
    return home / ".cache" if home.is_absolute() else Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
