"""What differs between two runs, from their records alone. No torch."""

import re
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.yaml import parse_document
from rlhf_pipeline.rundir.layout import RunDirectory

SIDES = ("a", "b")
SECTIONS = ("settings", "data", "versions", "metrics")
DATA = ("data", "ptx_data", "evaluate.data")
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


def _stages(run: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """The stages that a run has, in the order of its recipe: each one's record, and why that cannot be read."""
    directory = RunDirectory(run)
    try:
        content, _ = parse_document((run / "recipe.yaml").read_text(encoding="utf-8"), str(run / "recipe.yaml"))
        ordered = [str(name) for name in content["stages"]]
    except (InputError, OSError, ValueError, TypeError, KeyError):
        ordered = []
    # A stage that was moved aside has a dot in its name.
    others = sorted(file.parent.name for file in run.glob("*/stage.json") if "." not in file.parent.name)
    stages: dict[str, tuple[dict[str, Any], str | None]] = {}
    at_work = directory.is_locked()
    for name in dict.fromkeys((*ordered, *others)):
        if directory.stage(name).is_dir():
            record = directory.record(name)
            missing = not (directory.stage(name) / "stage.json").exists()
            why = None if record is not None else "stage.json is missing" if missing else "stage.json cannot be read"
            if record is not None and record.get("state") == "running" and not at_work:
                record["state"] = "failed"  # the run ended before the stage did
            stages[name] = (record or {}, why)
    return stages


def _compare(
    name: str, a: tuple[dict[str, Any], str | None] | None, b: tuple[dict[str, Any], str | None] | None
) -> dict[str, Any]:
    """The differences of one stage."""
    records = {side: one[0] for side, one in zip(SIDES, (a, b), strict=True) if one is not None}
    unreadable = {side: one[1] for side, one in zip(SIDES, (a, b), strict=True) if one is not None and one[1]}
    only_in = None if len(records) == 2 else next(iter(records))
    states = {side: record["state"] for side, record in records.items() if "state" in record}
    stage: dict[str, Any] = {
        "name": name,
        "kind": next((record["kind"] for record in records.values() if record.get("kind")), None),
        "only_in": only_in,
        "unreadable": unreadable,
        "state": states if only_in or len(set(states.values())) > 1 else {},
    }
    stage |= {section: {} for section in SECTIONS}
    if only_in or unreadable:  # there is nothing to compare with
        return stage
    inputs = [_inputs(records[side]) for side in SIDES]
    settings = _pairs(*inputs)
    for key in kinds.ROLES:
        if key in settings:
            settings[key] = _parents(key, records, settings[key])
    stage["settings"] = {key: values for key, values in settings.items() if key not in DATA}
    stage["data"] = {key: values for key, values in settings.items() if key in DATA}
    stage["versions"] = _pairs(*(_mapping(records[side], "versions") for side in SIDES))
    a_metrics, b_metrics = (_mapping(records[side], "metrics") for side in SIDES)
    for key, values in (_pairs(a_metrics, b_metrics) if a_metrics and b_metrics else {}).items():
        if not OF_THE_MACHINE.fullmatch(key):
            numbers = [values[side] for side in SIDES if isinstance(values.get(side), (int, float))]
            stage["metrics"][key] = {**values, "difference": numbers[1] - numbers[0] if len(numbers) == 2 else None}
    return stage


def _inputs(record: dict[str, Any]) -> dict[str, Any]:
    judging = {f"evaluate.{key}": value for key, value in _mapping(record, "judging").items()}
    return _mapping(record, "inputs") | judging


def _mapping(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys whose values differ, in the order of their names; a side without the key is left out."""
    return {
        key: {side: one[key] for side, one in zip(SIDES, (a, b), strict=True) if key in one}
        for key in sorted(a.keys() | b.keys())
        if not (key in a and key in b and a[key] == b[key])
    }


def _parents(key: str, records: dict[str, dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """Names in place of the fingerprints of the stages that one starts from, or takes its reward from."""
    names = {side: str(records[side].get(key)) for side in values}
    if len(names) == 2 and names["a"] == names["b"]:
        names["b"] = f"another {names['b']}"
    return names


def _differs(stage: dict[str, Any]) -> bool:
    return any(stage[key] for key in ("only_in", "unreadable", "state", *SECTIONS))
