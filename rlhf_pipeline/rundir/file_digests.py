"""What files hold, as digests that are remembered. No torch."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from rlhf_pipeline import local
from rlhf_pipeline.errors import InputError

# A file changed within its time stamps' resolution could change again and keep them; 2 s is the coarsest in use.
SETTLED_S = 2.0

Known = tuple[int, int, int, str]  # size in bytes, mtime and ctime in ns, digest


class FileDigests:
    """Content digests of files, remembered for the user by path, size and times of change.

    The memory is one JSON file, replaced in one step, so that runs beside each other can at worst forget a digest. One
    that cannot be read is ignored, and so is a place that cannot be written to.
    """

    def __init__(self) -> None:
        self.memory = local.caches() / "rlhf-pipeline" / "digests.json"
        self.known = self._remembered()

    def of_file(self, path: Path) -> str:
        """The digest of a file's content.

        Raises:
            InputError: it cannot be read.
        """
        now = time.time()
        try:
            state = path.stat()
            stamps = (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            known = self.known.get(str(path))
            if known and known[:3] == stamps:
                return known[3]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from None
        if now - state.st_ctime > SETTLED_S:
            self.known[str(path)] = (*stamps, digest)
            self._remember()
        return digest

    def _remembered(self) -> dict[str, Known]:
        try:
            content = json.loads(self.memory.read_text(encoding="utf-8"))
            return {
                str(path): (int(size), int(changed), int(touched), str(digest))
                for path, (size, changed, touched, digest) in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _remember(self) -> None:
        """Write the memory, with what other runs have added to it meanwhile and without files that are gone."""
        known = self._remembered() | self.known
        self.known = {path: entry for path, entry in known.items() if os.path.exists(path)}  # noqa: PTH110 (no errors)
        with contextlib.suppress(OSError):
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            descriptor, new = tempfile.mkstemp(prefix=self.memory.name, dir=self.memory.parent)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(self.known))  # `dump` is ten times slower
                Path(new).replace(self.memory)
            except OSError:
                Path(new).unlink(missing_ok=True)
                raise
