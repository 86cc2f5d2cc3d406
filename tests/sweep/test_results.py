"""What runs came to, as the table of a sweep and its JSON show it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from rlhf_pipeline import cli
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir import strict_json
from rlhf_pipeline.sweep import run as sweeps
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.keys import Combination
from rlhf_pipeline.sweep.results import Result, Results, read
from rlhf_pipeline.terminal import sweeps as shown
from rlhf_pipeline.terminal.console import Console

GOAL = Goal("ppo", "judge_mean", "maximize", ())
KEY = "ppo.trainer.kl_coef"


def write(run: Path, stage: str, kind: str, rows: list[dict[str, Any]], **record: Any) -> None:
    folder = run / stage / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"w")
    done = {"name": stage, "kind": kind, "state": "done", "artifact": f"{stage}/adapter", "wall_s": 60.0}
    (run / stage / "stage.json").write_text(json.dumps(done | record))
    (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(folder: Path, beta: float, judge: float, error: float = 0.01, **ppo: Any) -> Result:
    name = f"kl_coef-{beta}"
    write(folder / name, "sft", "sft", [], init="base", metrics={"judge_mean": 0.5}, taken_from="x/sft", wall_s=900.0)
    rewards = {"rewards/model/mean": 1, "rewards/rule/mean": 4}
    rows = [{"step": i, "objective/scores": i, "objective/kl": i / beta, **rewards} for i in range(3)]
    rows[2]["rewards/model/mean"] = 3
    metrics = {"judge_mean": judge, "judge_mean_se": error, **rows[-1]}
    write(folder / name, "ppo", "ppo", rows, init="sft", **{"metrics": metrics} | ppo)
    return read(Combination(name, {KEY: beta}), folder / name, ["ppo"], GOAL, {})


def every(folder: Path, runs: list[Result], **changes: Any) -> Results:
    return Results(**{"folder": folder, "keys": [KEY], "shared": ["sft"], "stage": "ppo", "goal": GOAL, "runs": runs,
                      "command": f"rlhf-pipeline run tiny {KEY}=0.1"} | changes)  # fmt: skip


def table(found: Results) -> list[str]:
    out = io.StringIO()
    shown.show(found, Console(file=out, width=160))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_run_has_kl_and_every_reward_from_start_to_end_and_the_time_of_its_own_stages(tmp_path):
    found = run_of(tmp_path, 0.5, 0.75)
    changes = {metric: (one.before, one.after) for metric, one in found.numbers["ppo"].items()}
    assert changes == {
        "objective/scores": (0, 2), "objective/kl": (0, 4), "judge_mean": (0.5, 0.75), "rewards/model/mean": (1, 3),
        "rewards/rule/mean": (4, 4),
    }  # fmt: skip
    assert (found.state, found.value, found.error, found.wall_s) == ("done", 0.75, 0.01, 60.0)


def test_the_table(tmp_path):
    runs = [run_of(tmp_path, 0.1, 0.75, 0.02), run_of(tmp_path, 0.5, 0.72, 0.02), run_of(tmp_path, 1.0, 0.6, 0.02)]
    failed = Result(Combination("kl_coef-9.0", {KEY: 9.0}), tmp_path, "failed", "it fell over", 0.0, {})
    lines = table(every(tmp_path, [*runs, failed]))
    assert lines[0] == "stage ppo, start → end; sft is the same in all"
    assert lines[1].split("  ")[0] == "kl_coef"
    assert lines[1].split() == ["kl_coef", "score", "KL", "judge", "model", "rule", "time", "state"]
    assert " ".join(lines[2].split()) == "0.1 0 → 2 0 → 20 0.5 → 0.75 ± 0.02 1 → 3 4 → 4 1 min done, best"
    assert lines[5].split() == ["9.0", "failed:", "it", "fell", "over"]
    assert lines[6] == f"the best by ppo.judge_mean: {KEY}=0.1; within the noise as good: {KEY}=0.5"
    assert lines[7].strip().split("  ")[0] == f"rlhf-pipeline run tiny {KEY}=0.1"
    assert lines[8].strip().startswith("rlhf-pipeline chat ")


def test_the_least_is_the_best_where_that_was_asked_for_and_only_what_is_done_counts(tmp_path):
    runs = [run_of(tmp_path, 0.1, 0.75), run_of(tmp_path, 0.5, 0.2), run_of(tmp_path, 1.0, 0.1, state="failed")]
    least = every(tmp_path, runs, goal=Goal("ppo", "judge_mean", "minimize", ()))
    assert runs[2].state == "failed" or runs[2].value is None or runs[2].state != "done"
    assert least.best is runs[1] and every(tmp_path, runs).best is runs[0]
    assert every(tmp_path, runs, goal=None).best is None


def test_a_metric_that_is_no_headline_number_has_a_column_of_its_own(tmp_path):
    runs = [run_of(tmp_path, 0.1, 0.75)]
    goal = Goal("ppo", "reply/unique", "maximize", ())
    one = Result(runs[0].combination, runs[0].path, "done", None, 60.0, runs[0].numbers, 0.375)
    lines = table(every(tmp_path, [one], goal=goal))
    assert "reply/unique" in lines[1] and "0.375" in lines[2]


def test_a_pruned_run_and_one_that_never_began(tmp_path):
    write(tmp_path / "a", "ppo", "ppo", [], state="failed", stopped=True, artifact=None, metrics={})
    pruned = read(Combination("a", {KEY: 1}), tmp_path / "a", ["ppo"], GOAL, {"a": "pruned"})
    missing = read(Combination("b", {KEY: 2}), tmp_path / "b", ["ppo"], GOAL, {})
    assert (pruned.state, pruned.why, missing.state) == ("pruned", None, "missing")
    lines = table(every(tmp_path, [pruned, missing], command=None))
    assert lines[2].split() == ["1", "1", "min", "pruned"] and lines[3].split() == ["2", "missing"]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_runs_that_failed_are_said_after_the_table_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys, words):
    runs = [run_of(tmp_path, 0.1, 0.75)]
    why = {"kl_coef-9.0": "it fell over", "kl_coef-8.0": "so did this"}
    monkeypatch.setattr(sweeps, "sweep", lambda *_, **__: every(tmp_path, runs, failed=why))
    command = typer.main.get_command(cli.app)
    with pytest.raises(RunError) as raised:
        command(["sweep", "tiny", f"{KEY}=0.1,9.0", *words], standalone_mode=False)
    assert raised.value.message == "2 of 1 runs failed: kl_coef-9.0: it fell over, and 1 more"
    out = capsys.readouterr().out
    assert json.loads(out)["best"] == "kl_coef-0.1" if words else "done, best" in out


def test_json_has_no_numbers_that_json_has_not(tmp_path):
    found = every(tmp_path, [run_of(tmp_path, 0.1, 0.75)], study=tmp_path / "study.db", report=tmp_path / "report.html")
    strict_json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert found.as_json()["goal"] == {"stage": "ppo", "metric": "judge_mean", "direction": "maximize"}
