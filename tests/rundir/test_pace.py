"""How long a stage will take yet."""

import json

import pytest

from rlhf_pipeline.rundir.layout import Progress, RunDirectory
from rlhf_pipeline.rundir.pace import ToGo, seconds_of_a_step, to_go


@pytest.fixture
def stage(tmp_path):
    """A stage that logged every second step, at 3 s each, broke off for an hour, and went on."""
    (tmp_path / "ppo" / "work").mkdir(parents=True)
    times = [(2, 100.0), (4, 106.0), (6, 112.0), (8, 3712.0), (10, 3718.0)]
    lines = [json.dumps({"step": step, "time": at}) for step, at in times]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines, '{"step": "x"}']))
    return tmp_path


def test_of_a_stage_that_broke_off_it_is_what_follows_the_checkpoint(stage):
    left = to_go(RunDirectory(stage), "ppo", Progress("checkpoint", step=8, of=108))
    assert left == ToGo(3.0, 100)
    assert left.seconds == 300.0
    assert to_go(RunDirectory(stage), "ppo", Progress("trained", step=8, of=108)) is None
    assert to_go(RunDirectory(stage), "ppo", Progress("checkpoint", step=8)) is None
    assert to_go(RunDirectory(stage), "ppo", Progress("checkpoint", step=8, of=108, makes_rows=True)) is None


def test_of_an_ensemble_the_members_after_this_one_train_as_long(stage):
    progress = Progress("checkpoint", step=8, of=10, member=1, members=3)
    assert to_go(RunDirectory(stage), "ppo", progress).steps == 2 + 2 * 10


def test_of_a_stage_at_work_it_is_what_it_says_itself(stage):
    assert to_go(RunDirectory(stage), "ppo", None) is None
    told = stage / "ppo" / "work" / "progress.json"
    told.write_text(json.dumps({"phase": "training", "step": 10, "of": 20, "time": 3718.0}))
    assert to_go(RunDirectory(stage), "ppo", None) == ToGo(3.0, 10)
    told.write_text(json.dumps({"phase": "judging", "step": 1, "of": 20, "time": 3718.0}))
    assert to_go(RunDirectory(stage), "ppo", None) is None


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([], None),
        ([{"step": 1, "time": 1.0}], None),
        ([{"step": 1, "time": 1.0}, {"step": 1, "time": 2.0}], None),
        ([{"step": 1, "time": 1.0}, {"step": 3, "time": 2.0}], 0.5),
        ([{"step": 9, "time": 1.0, "member": 1}, {"step": 10, "time": 5.0, "member": 2}], None),
    ],
)
def test_a_pace_needs_two_steps_of_one_training(rows, seconds):
    assert seconds_of_a_step(rows) == seconds
