"""Several runs as points: reward and gold over KL, with the frontier, the start and the best."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import report
from rlhf_pipeline.report import frontiers, gather
from rlhf_pipeline.rundir import durable


def write_run(
    folder: Path, name: str, kl: float, score: float, judge: float | None, weights: str = "", **changes: Any
) -> Path:
    """A run with an SFT and a PPO stage that came to these numbers."""
    judged = {} if judge is None else {"judge_mean": judge, "judge_mean_se": 0.05}
    ppo = {"objective/kl": kl, "objective/scores": score} | judged
    before = {} if judge is None else {"judge_mean": 0.5}
    for stage, init, metrics in (("sft", "base", before), ("ppo", "sft", ppo)):
        adapter = folder / name / stage / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_text(weights or name)
        record = {"name": stage, "kind": stage, "state": "done", "artifact": f"{stage}/adapter", "init": init}
        record |= {"metrics": metrics, "artifact_files": durable.contents(adapter)} | (
            changes if stage == "ppo" else {}
        )
        (folder / name / stage / "stage.json").write_text(json.dumps(record))
    rows = [{"step": 1, "objective/scores": 1.0, "objective/kl": 0.0}, {"step": 2, **ppo}]
    (folder / name / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name / "recipe.yaml").write_text(f"name: {name}\nstages: {{sft: {{}}, ppo: {{}}}}\n")
    return folder / name


def described(svg: str) -> str:
    return re.findall("<desc>(.*?)</desc>", svg)[0]


# A sweep over β as it goes where a reward model is gamed: `0.3` is beaten in both by `1.0`.
RUNS = {"kl_coef-0.01": (9.0, 4.0, 0.1), "kl_coef-0.1": (3.0, 3.5, 0.9), "kl_coef-0.3": (2.0, 2.5, 0.7),
        "kl_coef-1.0": (1.0, 3.0, 0.8)}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path, name, *numbers) for name, numbers in RUNS.items()]


def test_each_run_is_a_point_named_by_its_value_and_the_best_judged_is_marked(runs):
    reward, gold = frontiers.across(gather.read_runs(runs))
    assert [reward.title, gold.title] == ["ppo: reward over KL", "ppo: gold over KL"]
    assert described(reward.svg) == "0.01: 9, 4. 0.1: 3, 3.5, the best. 0.3: 2, 2.5. 1.0: 1, 3. Start: 1"
    assert described(gold.svg) == "0.01: 9, 0.1. 0.1: 3, 0.9, the best. 0.3: 2, 0.7. 1.0: 1, 0.8. Start: 0.5"
    assert reward.legend == gold.legend == [("the best", 1, 0, True)]


def test_the_best_by_another_number_is_the_one_that_is_marked(runs):
    reward, gold = frontiers.across(gather.read_runs(runs), runs[3])
    assert "1.0: 1, 3, the best" in described(reward.svg) and "1.0: 1, 0.8, the best" in described(gold.svg)


def test_the_frontier_is_of_the_runs_that_no_other_beats_in_both(runs):
    points = frontiers._points([(run, run.stage("ppo")) for run in gather.read_runs(runs)], "objective/scores")
    assert [one.label for one in frontiers._frontier(points)] == ["1.0", "0.1", "0.01"]


def test_without_a_judge_there_is_no_picture_of_one_and_no_run_is_marked(tmp_path):
    runs = [write_run(tmp_path, name, kl, score, None) for name, (kl, score, _) in RUNS.items()]
    (reward,) = frontiers.across(gather.read_runs(runs))
    assert "the best" not in described(reward.svg) and reward.legend == []


def test_there_is_nothing_to_draw_of_one_run_or_of_the_same_result_twice_or_of_what_is_not_done(tmp_path):
    one = write_run(tmp_path, "one", 1.0, 2.0, 0.5)
    same = write_run(tmp_path, "same", 1.0, 2.0, 0.6, weights="one")  # judged by other prompts
    failed = write_run(tmp_path, "failed", 2.0, 3.0, 0.5, state="failed", artifact=None)
    assert frontiers.across(gather.read_runs([one])) == []
    assert frontiers.across(gather.read_runs([one, same])) == []
    assert frontiers.across(gather.read_runs([one, failed])) == []


def test_of_many_runs_only_those_on_the_frontier_are_labelled(tmp_path):
    runs = [write_run(tmp_path, f"seed-{i}", 1 + i, 9 - i, None) for i in range(30)]
    (reward,) = frontiers.across(gather.read_runs(runs))
    assert ">0</text>" in reward.svg and ">17</text>" not in reward.svg


def test_the_page_of_one_run_has_no_such_section(tmp_path, runs):
    report.write(runs[:1], tmp_path / "one.html")
    report.write(runs, tmp_path / "all.html", runs[0])
    assert "Across runs" not in (tmp_path / "one.html").read_text()
    page = (tmp_path / "all.html").read_text()
    assert page.count('href="#frontiers"') == 1 and page.count('id="frontiers"') == 1
    assert "0.01: 9, 4, the best" in page


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["kl_coef-0.01", "kl_coef-0.1"], ["0.01", "0.1"]),
        (["kl_coef-0.1_seed-1", "kl_coef-0.1_seed-2"], ["1", "2"]),
        (["first", "second"], ["first", "second"]),
        (["tiny", "tiny (2)"], ["tiny", "tiny (2)"]),
        (["alone-1"], ["alone-1"]),
    ],
)
def test_labels_leave_out_the_words_that_all_have_in_common(labels, short):
    assert frontiers._short_labels(labels) == short
