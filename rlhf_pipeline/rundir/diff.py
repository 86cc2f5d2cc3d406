"""What differs between two runs, from their records alone. No torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import RECORD, RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.state import StageState

SIDES = ("a", "b")
SECTIONS = ("settings", "data", "versions", "metrics")
DATA = (*kinds.DATA_KEYS, "evaluate.data")
# How fast it went, and in how much memory: never twice the same, and no result.
OF_THE_MACHINE = re.compile(r"eps|(rollout|optimise)/(\w+_)?seconds|(before_init|init|train)_mem_\w+")


def compare(run_a: Path, run_b: Path) -> dict[str, Any]:
    """Compare two run directories.

    Returns:
        What `diff --json` prints. A side that has no such value is left out of an `{"a": …, "b": …}`; null is a value,
        of a metric one that is not finite::

            {"runs": {"a": PATH, "b": PATH},
             "same": true if nothing differs and every record could be read,
             "stages": [only those with a difference: {
                "name": NAME,
                "kind": its kind, of run a where the two differ, or null,
                "only_in": "a", "b" or null,
                "unreadable": {"a": why there is no record, …},
                "state": {} or {"a": STATE, "b": STATE},
                "settings": {KEY: {"a": VALUE, "b": VALUE}},    `trainer.*`, `lora.*`, `model.*`, `evaluate.*`, …
                "data": {KEY: {"a": "NAME@DIGEST", …}},         `data`, `ptx_data`, `evaluate.data`
                "versions": {LIBRARY: {"a": VERSION, …}},
                "metrics": {NAME: {"a": NUMBER, "b": NUMBER, "difference": b less a; null unless both are numbers}}
             }]}

        Of the stage that another one starts from, or takes its reward from, a setting gives the name, as `another NAME`
        in b where the name is the same and the stage is not. Metrics are compared where both have some. What only tells
        speed and memory is no difference.
    """
    a, b = _stages(run_a), _stages(run_b)
    stages = [_compare(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b))]
    stages = [stage for stage in stages if _differs(stage)]
    return {"runs": {"a": str(run_a), "b": str(run_b)}, "same": not stages, "stages": stages}


@dataclass
class _Side:
    """A stage in one of the runs; `unreadable` says why it has no record."""

    stage: StageState
    unreadable: str | None


def _stages(run: Path) -> dict[str, _Side]:
    """The stages that have a folder, in the order of the run's recipe."""
    directory = RunDirectory(run)
    sides = {}
    for stage in state.read(run).stages:
        folder = directory.stage(stage.name)
        if folder.is_dir():
            why = "cannot be read" if (folder / RECORD).exists() else "is missing"
            sides[stage.name] = _Side(stage, None if directory.record(stage.name) else f"{RECORD} {why}")
    return sides


def _compare(name: str, a: _Side | None, b: _Side | None) -> dict[str, Any]:
    """The differences of one stage."""
    sides = {letter: side for letter, side in zip(SIDES, (a, b), strict=True) if side is not None}
    records = {letter: side.stage.record for letter, side in sides.items()}
    unreadable = {letter: side.unreadable for letter, side in sides.items() if side.unreadable}
    only_in = None if len(sides) == 2 else next(iter(sides))
    states = {letter: side.stage.state for letter, side in sides.items()}
    stage: dict[str, Any] = {
        "name": name,
        "kind": next((record.kind for record in records.values() if record.kind), None),
        "only_in": only_in,
        "unreadable": unreadable,
        "state": states if only_in or len(set(states.values())) > 1 else {},
    }
    stage |= {section: {} for section in SECTIONS}
    if only_in or unreadable:  # there is nothing to compare with
        return stage
    settings = _pairs(*(_inputs(records[letter]) for letter in SIDES))
    for key in {role for record in records.values() for role in record.parents}:
        if key in settings:
            settings[key] = _parents(key, records, settings[key])
    stage["settings"] = {key: values for key, values in settings.items() if key not in DATA}
    stage["data"] = {key: values for key, values in settings.items() if key in DATA}
    stage["versions"] = _pairs(*(records[letter].versions for letter in SIDES))
    a_metrics, b_metrics = (records[letter].metrics for letter in SIDES)
    for key, values in (_pairs(a_metrics, b_metrics) if a_metrics and b_metrics else {}).items():
        if not OF_THE_MACHINE.fullmatch(key):
            numbers = [values[side] for side in SIDES if isinstance(values.get(side), (int, float))]
            stage["metrics"][key] = {**values, "difference": numbers[1] - numbers[0] if len(numbers) == 2 else None}
    return stage


def _inputs(record: Record) -> dict[str, Any]:
    return record.inputs | {f"evaluate.{key}": value for key, value in (record.judging or {}).items()}


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys whose values differ, in the order of their names; a side without the key is left out."""
    return {
        key: {side: one[key] for side, one in zip(SIDES, (a, b), strict=True) if key in one}
        for key in sorted(a.keys() | b.keys())
        if not (key in a and key in b and a[key] == b[key])
    }


def _parents(key: str, records: dict[str, Record], values: dict[str, Any]) -> dict[str, Any]:
    """Names in place of the fingerprints of the stages that one starts from, or takes its reward from."""
    names = {side: str(records[side].parents.get(key)) for side in values}
    if len(names) == 2 and names["a"] == names["b"]:
        names["b"] = f"another {names['b']}"
    return names


def _differs(stage: dict[str, Any]) -> bool:
    return any(stage[key] for key in ("only_in", "unreadable", "state", *SECTIONS))
