"""Results that need no second training: those of other runs, and former ones that were moved aside. No torch."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.layout import RECORD, SWEEP, RunDirectory, read_json
from rlhf_pipeline.rundir.record import Record


@dataclass(frozen=True)
class Earlier:
    """A stage that was trained to its end, in another run or formerly in this one.

    Attributes:
        folder: its folder there.
        record: its record there.
    """

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        """Where it is from the folder of all runs: `first/sft`, or `first/sft.20250102-030405` once moved aside.

        In a run of a sweep it is `tiny.sweep/kl_coef-0.1/sft`.
        """
        run = self.folder.parent
        return "/".join([*([run.parent.name] if is_of_sweep(run.parent) else []), run.name, self.folder.name])

    def is_former_of(self, run: Path) -> bool:
        """Whether a run has moved it aside itself, so that it can have it back; of all else it gets a copy."""
        return self.folder.parent == run and "." in self.folder.name


class EarlierResults:
    """All stages in the run directories of one folder, by their fingerprints, and in those of the sweeps beside them.

    A run of a sweep finds those outside, too. The records are read when the first one is asked for. What cannot be read
    is passed over, and of a run that is at work only the stages that are finished count.

    Args:
        runs: the folder of the run directories.
        digests: tells what files hold.
    """

    def __init__(self, runs: Path, digests: FileDigests) -> None:
        self._runs, self._digests = runs, digests

    def find(
        self, fingerprint: str, parent_weights: Mapping[str, str | None], run: Path, stage: str
    ) -> Iterator[Earlier]:
        """Find the whole results with a fingerprint that were built on the same weights; those of this run first.

        Of the others the latest comes first.

        Args:
            fingerprint: the stage's.
            parent_weights: for each role in which it needs another stage, the SHA-256 of the weights that will be
                there; None where nobody knows yet. A fingerprint does not tell: on another machine, training with the
                same settings gives other weights.
            run: the run directory that asks.
            stage: the stage's name there; its own folder is no earlier result.
        """
        if None in parent_weights.values():
            return
        found = []
        for folder in self._by_fingerprint.get(fingerprint, []):
            record = RunDirectory(folder.parent).record(folder.name)
            if folder != run / stage and record is not None and record.is_finished and not record.stopped:
                found.append(Earlier(folder, record))
        found.sort(key=lambda one: (one.record.finished_at or "", one.name), reverse=True)
        found.sort(key=lambda one: one.folder.parent != run)
        for one in found:
            theirs = {role: one.record.parent_weights.get(name) for role, name in one.record.parents.items()}
            same = all(theirs.get(role) == weights for role, weights in parent_weights.items())
            if same and one.record.weights and self._is_whole(one):
                yield one

    @cached_property
    def _by_fingerprint(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        above = self._runs.parent if is_of_sweep(self._runs) else self._runs
        there = _folders(above)
        runs = [run for folder in there for run in (_folders(folder) if is_of_sweep(folder) else [folder])]
        for run in runs:
            for stage in _folders(run):
                fingerprint = (read_json(stage / RECORD) or {}).get("fingerprint")
                if isinstance(fingerprint, str):
                    found.setdefault(fingerprint, []).append(stage)
        return found

    def _is_whole(self, earlier: Earlier) -> bool:
        try:
            directory = RunDirectory(earlier.folder.parent)
            return directory.artifact_problem(earlier.folder.name, earlier.record, self._digests) is None
        except (InputError, OSError):
            return False


def is_of_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep, and so holds runs."""
    return folder.name.endswith(SWEEP)


def _folders(folder: Path) -> list[Path]:
    """The folders in one, hidden ones apart; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
