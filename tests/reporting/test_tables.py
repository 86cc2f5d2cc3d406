"""Stages as tables for people and as JSON for programs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.reporting import tables


def stage(name: str, state: str = "done", **changes: object) -> StagePlan:
    record = {"wall_s": 12.4, "peak_memory_bytes": 10, "artifact": f"{name}/adapter", "log": f"{name}/log.txt"}
    record["metrics"] = changes.pop("metrics", {})
    settings = {"reason": "up to date", "init": "base", "reward": None, "inputs": {"seed": 1}, "fingerprint": "f0"}
    settings |= {"kind": name, "judging": None, "record": record} | changes
    return StagePlan(name=name, state=state, **settings)


def printed(show, *arguments: object, width: int = 120) -> str:
    output = io.StringIO()
    show(*arguments, Console(file=output, width=width))
    return output.getvalue()


def test_results_show_state_time_and_the_numbers_that_matter_for_the_kind():
    text = printed(
        tables.results,
        Path("runs/t"),
        [
            stage("sft", metrics={"judge_mean": 0.51234, "train_loss": 1.5, "grad_norm": 9.0}),
            stage("reward", metrics={"eval_accuracy": 0.75, "eval_margin": None}),
        ],
    )
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "state", "time", "numbers"]
    assert lines[1].split() == ["sft", "done", "12", "s", "train_loss", "1.5", "judge_mean", "0.512"]
    assert lines[2].split() == ["reward", "done", "12", "s", "eval_accuracy", "0.75"]
    assert lines[3] == "run directory: runs/t"


@pytest.mark.parametrize("state", ["stale", "failed", "missing", "blocked", "running", "partial"])
def test_results_show_the_reason_where_a_stage_is_not_done(state):
    text = printed(tables.results, Path("r"), [stage("dpo", state, reason="because", metrics={"judge_mean": 0.9})])
    assert state in text
    assert "because" in text
    assert "0.9" not in text


NO_DATA: dict[str, list] = {"sft": [], "ppo": [], "dpo": []}


def test_intentions_say_what_the_data_are_read_as():
    says = "prompt/completion: text and the reply"
    sources = [
        {"key": "data", "path": "/data/a[1].jsonl", "shape": says},
        {"key": "data.eval_data", "path": "someone/questions", "shape": None},
    ]
    lines = [
        line.rstrip()
        for line in printed(tables.intentions, [stage("sft")], [], {"sft": sources}, None, width=160).splitlines()
    ]
    assert lines[-2].split(maxsplit=2) == ["sft", "a[1].jsonl", says]
    assert lines[-1].split(maxsplit=3)[:3] == ["sft", "data.eval_data:", "someone/questions"]
    assert "once it is downloaded" in lines[-1]


def test_intentions_show_what_will_run_from_where_and_why():
    ppo = stage("ppo", "stale", init="sft", reward="reward", reason="trainer.kl_coef 0.1 → 0.2")
    lines = printed(tables.intentions, [stage("sft"), ppo], [ppo], NO_DATA, None).splitlines()
    assert lines[1].split() == ["sft", "sft", "base", "done", "no", "up", "to", "date"]
    assert lines[2].split()[:7] == ["ppo", "ppo", "sft", "+", "reward", "stale", "yes"]
    assert lines[2].endswith("trainer.kl_coef 0.1 → 0.2")


def test_intentions_name_the_model_whose_own_code_would_run():
    assert "code that comes with a/model will be run" in printed(
        tables.intentions, [stage("sft")], [], NO_DATA, "a/model"
    )
    assert "will be run" not in printed(tables.intentions, [stage("sft")], [], NO_DATA, None)


def test_a_gate_that_was_ignored_is_not_passed_over_in_silence():
    done = stage("reward", metrics={"eval_accuracy": 0.75}, reason="gates ignored: eval_accuracy is 0.75, not >= 0.9")
    assert "gates ignored" not in printed(tables.results, Path("r"), [done])
    done.record["gates_ignored"] = {"eval_accuracy": ">= 0.9"}
    assert done.reason in printed(tables.results, Path("r"), [done])


def test_a_stage_whose_gate_is_closed_keeps_its_numbers_in_json():
    closed = stage("reward", "failed", metrics={"eval_accuracy": 0.75}, stands=True)
    assert closed.summary()["metrics"] == {"eval_accuracy": 0.75}


def test_a_reason_with_brackets_is_shown_as_it_is():
    """A reason quotes recipes and errors; its brackets are text, not styling."""
    reason = "trainer.loss_type [sigmoid] → [ipo]"
    assert reason in printed(tables.intentions, [stage("dpo", "stale", reason=reason)], [], NO_DATA, None)
    assert reason in printed(tables.results, Path("r"), [stage("dpo", "stale", reason=reason)])


def test_a_narrow_terminal_loses_no_word():
    reason = "trainer.learning_rate 0.001 → 0.002; trainer.max_steps default → 5"
    text = printed(tables.intentions, [stage("dpo", "stale", reason=reason)], [], NO_DATA, None, width=60)
    assert "…" not in text
    assert "".join(text.split()).find("0.002;") > 0


def test_the_json_object_holds_every_stage_and_nothing_internal():
    shown = tables.as_json(Path("runs/t"), [stage("sft", metrics={"train_loss": 1.5}), stage("dpo", "failed")])
    assert json.loads(json.dumps(shown)) == shown
    assert shown["run"] == "runs/t"
    done, failed = shown["stages"]
    assert done["name"] == "sft"
    assert (done["state"], done["wall_s"], done["metrics"], done["artifact"]) == (
        "done",
        12.4,
        {"train_loss": 1.5},
        "sft/adapter",
    )
    assert (failed["state"], failed["wall_s"], failed["metrics"], failed["artifact"]) == ("failed", None, {}, None)
    assert failed["log"] == "dpo/log.txt"
    assert not {"inputs", "record", "judging"} & set(done)
