"""The picture of rounds: which policies it is of, and which numbers of theirs."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.report import gather, page, rounds

# Name, kind, what it starts from, and the judge's mean of those that were judged.
CHAIN = (
    ("sft", "sft", "base", 0.5), ("reward", "reward", "sft", None),
    ("candidates-1", "sample", "sft", None), ("best-1", "sft", "sft", 0.55), ("dpo-1", "dpo", "best-1", 0.6),
    ("candidates-2", "sample", "dpo-1", None), ("best-2", "sft", "dpo-1", 0.65), ("dpo-2", "dpo", "best-2", 0.7),
    ("dpo-4", "dpo", "sft", 0.1), ("other-1", "dpo", "sft", 0.2),
)  # fmt: skip
MEANS = {
    "base": {"reward": -1.0}, "sft": {"reward": 0.0, "kl": 0.0, "judge": 0.4},
    "dpo-1": {"reward": 1.5, "kl": 2.0, "judge": 0.4}, "dpo-2": {"reward": 1.0, "kl": 5.0, "judge": 0.4},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write down a run of such stages; returns its folder."""

    def run(name: str = "run", chain: Any = CHAIN, means: Any = MEANS, **judged: float) -> Path:
        folder: Path = tmp_path / name
        for stage, kind, init, judge in chain:
            (folder / stage).mkdir(parents=True)
            metrics = {} if judge is None else {"judge_mean": judged.get(stage.replace("-", "_"), judge)}
            record: dict[str, Any] = {"name": stage, "kind": kind, "state": "done", "init": init, "metrics": metrics}
            if stage == "dpo-2":
                record["others"] = {"reference": "sft", "rows": "candidates-2"}
            (folder / stage / "stage.json").write_text(json.dumps(record))
        stages = {stage: {"kind": kind, "init": init} for stage, kind, init, _ in chain}
        (folder / "recipe.yaml").write_text(json.dumps({"name": name, "stages": stages}))
        comparison = {"policies": list(means), "rows": [], "means": means, "win_rates": []}
        (folder / "comparison.json").write_text(json.dumps(comparison))
        return folder

    return run


def test_the_policies_are_the_last_of_each_round_from_where_the_first_one_starts(write):
    """Names without a second round, or without those between, are no rounds."""
    assert rounds.policies(gather.read_run(write())) == ["sft", "dpo-1", "dpo-2"]
    assert rounds.policies(gather.read_run(write("short", CHAIN[:5]))) == []


def test_reward_judge_and_kl_are_drawn_over_the_rounds(write):
    """The judge's mean is that of the stages, which are judged on more prompts than are compared."""
    (picture,) = rounds.of_rounds(gather.read_runs([write()]))
    assert "reward: 0 at round 0, 1 at round 2, between 0 and 1.5" in picture.svg
    assert "judge: 0.5 at round 0, 0.7 at round 2, between 0.5 and 0.7" in picture.svg
    assert "KL: 0 at round 0, 5 at round 2, between 0 and 5" in picture.svg
    assert picture.legend == []


def test_without_a_comparison_there_is_the_judge_alone(write):
    (picture,) = rounds.of_rounds(gather.read_runs([write(means={})]))
    assert "judge: 0.5 at round 0" in picture.svg and "reward" not in picture.svg and "KL" not in picture.svg
    assert rounds.of_rounds(gather.read_runs([write("short", CHAIN[:5])])) == []


def test_two_runs_lie_on_top_of_each_other(write):
    runs = gather.read_runs([write(), write("other", dpo_2=0.9), write("short", CHAIN[:5])])
    (picture,) = rounds.of_rounds(runs)
    assert [(label, color) for label, color, _, _ in picture.legend] == [("run", 0), ("other", 1)]
    assert "other: 0.5 at round 0, 0.9 at round 2" in picture.svg


def test_the_page_shows_it_and_what_each_stage_is_built_on(write):
    html = page.render(gather.read_runs([write()]))
    assert "<strong>Rounds</strong>" in html
    assert "dpo-2 from best-2 (weights); dpo-2 from sft (reference); dpo-2 from candidates-2 (rows)" in html
