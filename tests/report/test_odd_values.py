"""Files of a run directory with values of another kind than this version writes: every command still reads the rest."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_run
import short_run
from test_watched import stage

from rlhf_pipeline import report
from rlhf_pipeline.hacking.watch import Measurement
from rlhf_pipeline.report import alarms, gather
from rlhf_pipeline.rundir import diff
from rlhf_pipeline.rundir.headline import headline
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.terminal.watching import RunView

MISSING = object()
ODD = (
    "text", "", [], [1], [[]], {}, {"a": 1}, None, True, math.nan, math.inf, -math.inf, 1e308, -1e308, 1e99, -1e99, -7,
    10**400, MISSING,
)  # fmt: skip
NO_ROWS = ("3", '"text"', "[1]", "null", "{", "\x00", '{"step": 1' + "[" * 5000)
MEASUREMENT = stage().measurements[-1].as_json()
ROW = {
    "prompt": "Q?",
    "replies": ["a", "b"],
    "scores": [0.1, 0.9],
    "sampled": {"policies": ["sft", "sft"], "rewards": {"gold": [0.0, 1.0]}},
}
PAIR = {"prompt": "Q?", "chosen": "a", "rejected": "b", "confidence": 0.9, "dimensions": {"kind": 1.0}}


def variants(value: Any) -> Iterator[Any]:
    """The value with each odd one in the place of each of its parts; of lists, of the first part."""
    for key in value if isinstance(value, dict) else range(min(len(value), 1)):
        for odd in ODD:
            other = copy.copy(value)
            if odd is MISSING:
                del other[key]
            else:
                other[key] = odd
            yield other
        if isinstance(value[key], (dict, list)):
            for inner in variants(value[key]):
                other = copy.copy(value)
                other[key] = inner
                yield other


def write(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(line + "\n" for line in (*NO_ROWS, *map(json.dumps, rows))), encoding="utf-8")


def look(run: Path) -> None:
    """All that reads a whole run directory."""
    view = RunView(run)
    view.refresh()
    for each in view.stages:
        each.read_work(0.0)
    assert diff.compare(run, run)["same"]
    assert alarms.alarms(gather.read_run(run))
    code, _, err = short_run.ask(run.parent, "status", str(run))
    assert (code, "Traceback" in err) == (0, False), err
    report.write([run], run / "report.html")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, with a policy that was watched, and a stage that made rows."""
    made = report_run.write(tmp_path / "run", steps=3)
    recipe = json.loads((made / "recipe.yaml").read_text(encoding="utf-8"))
    for name, kind in (("candidates", "sample"), ("feedback", "judge")):
        recipe["stages"][name] = {"kind": kind}
        (made / name).mkdir()
        record = {"name": name, "kind": kind, "state": "done", "inputs": {"n": 2}, "metrics": {"rows": 2}}
        (made / name / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    (made / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return made


@pytest.mark.parametrize("first", (MEASUREMENT, {**MEASUREMENT, "by_prompt": {"new": [1.0]}}), ids=("sound", "odd"))
def test_rows_with_odd_values(run: Path, first: dict[str, Any]) -> None:
    few = {**MEASUREMENT, "by_prompt": {name: values[:3] for name, values in MEASUREMENT["by_prompt"].items()}}
    write(run / "ppo" / "watch.jsonl", [first, few, *variants(few), few])
    for name in ("sft", "reward", "ppo", "dpo"):
        for file in ("metrics", "samples", "pairs"):
            at = run / name / f"{file}.jsonl"
            if at.exists():
                rows = [json.loads(line) for line in at.read_text(encoding="utf-8").splitlines()]
                write(at, [*rows, *variants(rows[-1])])
    rows = {"candidates": ROW, "feedback": PAIR}
    for name, row in rows.items():
        lines = [row, row, *variants(row)]
        (run / name / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    look(run)


def test_of_a_measurement_all_that_is_read_is_a_number() -> None:
    read = 0
    for row in variants(MEASUREMENT):
        for one in gather._measurements([json.loads(json.dumps(row)) if "NaN" in json.dumps(row) else row]):
            read += 1
            assert type(one.step) is int and type(one.kl) is float and math.isfinite(one.kl)
            assert all(type(value) is float for values in one.by_prompt.values() for value in values)
            for measured in one.measures.values():
                assert all(type(value) is float and math.isfinite(value) for value in measured[:2])
                assert all(end is None or type(end) is float for end in measured[2:])
            assert all(map(math.isfinite, phrase[1:]) for phrase in one.phrases)
            assert Measurement.from_json(json.loads(json.dumps(one.as_json()))).by_prompt.keys() == one.by_prompt.keys()
    assert read > 20  # as those with a text in the place of another


@pytest.mark.parametrize("odd", ODD[:-1], ids=lambda odd: repr(odd)[:10])
def test_of_a_record_all_metrics_are_numbers(odd: Any) -> None:
    metrics = Record.model_validate({"kind": "ppo", "metrics": {"judge_mean": odd, "eval_pairs": odd, "x": 1}}).metrics
    assert metrics["x"] == 1
    assert all(type(value) in (int, float) and abs(value) < 1e100 for value in metrics.values() if value is not None)
    assert headline("ppo", metrics) == [] or metrics["judge_mean"] is not None


def test_a_record_with_odd_metrics(run: Path) -> None:
    for name in ("sft", "reward", "ppo", "dpo", "candidates", "feedback"):
        record = RunDirectory(run).record(name)
        assert record is not None
        known = [*record.metrics, "judge_mean", "judge_mean_se", "eval_loss", "eval_accuracy", "eval_pairs"]
        known += ["watch/kept_step", "watch/stopped_at_step", "watch/alarm/gold", "kl_budget/exceeded_with"]
        metrics = {metric: ODD[i % (len(ODD) - 1)] for i, metric in enumerate(known, len(name))}
        report_run.change(run, name, metrics=metrics | {f"odd {i}": odd for i, odd in enumerate(ODD[:-1])})
    look(run)
