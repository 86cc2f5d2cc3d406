"""A file of JSON lines that takes long to make: it is there when it is whole, and what is made of it so far goes on."""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import durable, strict_json
from rlhf_pipeline.rundir.layout import read_json

Line = dict[str, Any]


class Part:
    """The lines of a file so far, in `FILE.part`, with a note of what they are made of in `FILE.part.json`.

    Args:
        out: the file that comes to be when `finish` is called.
        made_of: whatever decides the lines. Lines that are there of something else are dropped.
        at_once: how many lines are added together; of those that are there, a multiple of it is kept, so that a command
            that goes on makes the same lines as one that was never stopped.
        say: takes a line about what is there already.

    Attributes:
        kept: the number of lines that were there.

    Raises:
        InputError: another process writes the file.
    """

    def __init__(self, out: Path, made_of: dict[str, Any], at_once: int, say: Callable[[str], None]) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.part")
        self.note = out.with_name(f"{out.name}.part.json")
        self.file = self.path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise InputError("another `score` is writing this file", place=f"--out {out}") from None
        except OSError:  # a disk without locks
            pass
        found, others = self._whole_lines(), read_json(self.note) != made_of
        if found and others:
            say(f"{self.path} is of other rows or another model: it is begun anew")
        self.kept = 0 if others else found // at_once * at_once
        self.file.seek(0)
        size = sum(len(line) for line in itertools.islice(self.file, self.kept))
        self.file.truncate(size)
        durable.write_text(self.note, strict_json.dumps(made_of))

    def _whole_lines(self) -> int:
        """How many lines there are; one without its end, which a kill has left, is none."""
        self.file.seek(0)
        return sum(line.endswith(b"\n") for line in self.file)

    def lines(self) -> Iterator[Line]:
        """The lines that were kept."""
        with self.path.open("rb") as file:
            yield from (json.loads(line) for line in itertools.islice(file, self.kept))

    def add(self, lines: Sequence[Line]) -> None:
        """Write some more, so that they are on disk."""
        self.file.write(b"".join(strict_json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Put the file in its place."""
        self.path.replace(self.out)
        self.close(keep=False)

    def close(self, keep: bool) -> None:
        """Leave what there is for the next time, or remove it."""
        for file in [] if keep else [self.path, self.note]:
            with contextlib.suppress(OSError):
                file.unlink()
        self.file.close()
