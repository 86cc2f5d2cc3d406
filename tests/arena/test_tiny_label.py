"""The whole loop: SFT, candidates, people who choose in the browser, a reward model, PPO; and that the policy gains."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import short_run
from arena_server import serving

from rlhf_pipeline.run.launch import Launcher

pytestmark = pytest.mark.slow

# Fewer prompts and updates than the recipe's own, and still enough to learn from.
SHORT = ("evaluate.along=0", "candidates.data.limit=160", "ppo.trainer.total_episodes=640")


def test_what_is_labelled_through_the_page_teaches_the_policy(
    tmp_path: Path, warm_server: Launcher, labeller: ModuleType
) -> None:
    code, said = short_run.run_warm(warm_server, tmp_path, "tiny-label", *SHORT)
    assert code == 3 and "stage `feedback` waits for people: 0 of 200 labels" in said
    with serving("label", "runs/tiny-label", folder=tmp_path) as server:
        made = labeller.label(server.links[""])
    assert made["progress"]["reached"] and made["labels"] == 200
    assert made["learner"]["tested"] > 10
    code, said = short_run.run_warm(warm_server, tmp_path, "tiny-label", *SHORT)
    assert code == 0, said
    _, out, _ = short_run.ask(tmp_path, "status", "runs/tiny-label", "--json")
    metrics = {stage["name"]: stage["metrics"] for stage in json.loads(out)["stages"]}
    assert metrics["feedback"]["label/labels"] == 200 and metrics["feedback"]["label/people"] == 1
    assert metrics["ppo"]["judge_mean"] >= metrics["sft"]["judge_mean"] + 0.2
