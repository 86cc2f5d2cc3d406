"""Numbers as training logs them, in a file that any JSON reader can read."""

import json
import time
from types import SimpleNamespace

import pytest

from rlhf_pipeline.monitoring.metrics import MetricsLog, final, numbers


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_null_in_the_file(tmp_path, value):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": value, "objective/kl": 0.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["step"], row["loss"], row["objective/kl"]) == (3, None, 0.5)


def test_each_logged_step_is_one_line_with_step_and_time(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": 1 / step, "note": "text", "lr": 1})
    log.on_log(None, SimpleNamespace(global_step=3), None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row.get("loss") for row in rows] == [1.0, 0.5, None]
    assert set(rows[0]) == {"step", "time", "loss", "lr"}
    assert all(abs(row["time"] - time.time()) < 60 for row in rows)


def test_numbers_drops_what_is_no_number():
    assert numbers({"a": 1, "b": "1", "c": None, "d": [1], "e": True}) == {"a": 1, "e": True}


def test_final_takes_the_last_value_of_each_metric():
    history = [
        {"loss": 3.0, "accuracy": 0.5, "step": 1, "epoch": 0.5},
        {"loss": 2.0, "step": 2, "epoch": 1.0},
        {"eval_loss": 2.5, "eval_runtime": 1.0, "eval_samples_per_second": 9.0, "step": 2},
        {"train_loss": float("nan"), "train_runtime": 5.0, "total_flos": 1e9, "train_steps_per_second": 1.0, "step": 2},
    ]
    assert final(history) == {"loss": 2.0, "accuracy": 0.5, "eval_loss": 2.5, "train_loss": None}
    assert final([]) == {}
