"""Numbers as training logs them, in a file that any JSON reader can read."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from rlhf_pipeline.callbacks.metrics import MetricsLog, final, keep_until, numbers


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


def test_a_member_that_goes_on_leaves_the_lines_of_others(tmp_path: Path) -> None:
    file, state = tmp_path / "metrics.jsonl", TrainerState()
    for member in (1, 2):
        for step in (1, 2):
            MetricsLog(file, member).on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": member / step})
    state.log_history = [{"loss": 2.0, "step": 1}]
    MetricsLog(file, member=2).on_train_begin(None, state, None)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["member"], row["step"], row["loss"]) for row in rows] == [(1, 1, 1.0), (1, 2, 0.5), (2, 1, 2.0)]


def test_going_on_from_a_checkpoint_drops_what_was_logged_after_it(tmp_path: Path) -> None:
    """The third and fourth line are of updates that the checkpoint of the second does not know; the last is torn."""
    log, state = MetricsLog(tmp_path / "metrics.jsonl"), TrainerState()
    for step in (1, 2, 3, 4):
        state.global_step = step
        log.on_log(None, state, None, logs={"loss": float(step)})
        state.log_history.append({"loss": float(step), "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "lo')
    loaded = TrainerState(global_step=2, log_history=state.log_history[:2])
    resumed = MetricsLog(tmp_path / "metrics.jsonl")
    resumed.on_train_begin(None, loaded, None)
    loaded.global_step = 3
    resumed.on_log(None, loaded, None, logs={"loss": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_checkpoint_is_resumed_whatever_became_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A power cut has spoilt the first step's line; the others are told apart by their steps, not by their places.

    The second line of the third step came after the checkpoint, as that of an evaluation at the end may.
    """
    file = tmp_path / "metrics.jsonl"
    steps = [b'{"step": %d, "loss": %d.0}\n' % (step, step) for step in (2, 2, 3, 3, 4)]
    file.write_bytes(b'{"step": 1, "lo\0\0\0\n' + b"".join(steps) + b'{"step": [1]}\n{"step": 5')
    history = [{"loss": 1.0, "step": step} for step in (1, 2, 2, 3)]
    MetricsLog(file).on_train_begin(None, TrainerState(global_step=3, log_history=history), None)
    assert file.read_bytes() == b"".join(steps[:3])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b'{"step": 1, "lo\0\0\0\n'
    assert "1 line of metrics.jsonl cannot be read: now in metrics.jsonl.damaged" in capsys.readouterr().err


def test_a_run_from_the_start_needs_no_file_and_keeps_nothing_of_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    MetricsLog(file).on_train_begin(None, TrainerState(), None)
    assert not file.exists()
    file.write_text('{"step": 1, "loss": 1.0}\n')
    MetricsLog(file).on_train_begin(None, TrainerState(), None)
    assert file.read_text() == ""


def test_dropping_rows_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """Completions may hold characters at which Python, but not JSON, ends a line."""
    file = tmp_path / "samples.jsonl"
    texts = ["plain", "next\u0085line", "line\u2028separator", "form\x0cfeed", "émigré \U0001f642", "two\nlines"]
    rows = [json.dumps({"step": i // 2, "completion": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    keep_until(file, 2)
    assert file.read_text(encoding="utf-8").split("\n") == [*rows, ""]
    keep_until(file, 1)
    assert file.read_text(encoding="utf-8").split("\n") == [*rows[:4], ""]


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
