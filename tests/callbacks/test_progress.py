"""What a stage tells those who watch: where it is, often enough and no more, and never at the run's expense."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline.callbacks import progress
from rlhf_pipeline.callbacks.progress import ProgressFile


def told(work: Path) -> dict[str, Any]:
    return json.loads((work / "progress.json").read_text())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The seconds that have passed, to be set by hand."""
    passed = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(
        progress, "time", SimpleNamespace(monotonic=lambda: passed.seconds, time=lambda: 1e9 + passed.seconds)
    )
    return passed


class Loop:
    """What a trainer calls, as Transformers' does."""

    def __init__(self, file: ProgressFile, max_steps: int) -> None:
        self.file, self.state = file, TrainerState(max_steps=max_steps)

    def __call__(self, event: str, **given: Any) -> None:
        getattr(self.file, event)(TrainingArguments(), self.state, TrainerControl(), **given)

    def step(self) -> None:
        self.state.global_step += 1
        self("on_step_end")


def test_steps_are_told_once_a_second_and_a_new_phase_at_once(tmp_path, clock):
    file = ProgressFile(tmp_path)
    loop = Loop(file, max_steps=50)
    file.tell("loading")
    assert told(tmp_path) == {"phase": "loading", "step": 0, "of": None, "time": 1e9 + 1000}
    loop("on_train_begin")
    assert (told(tmp_path)["phase"], told(tmp_path)["step"], told(tmp_path)["of"]) == ("training", 0, 50)
    seen = []
    for _ in range(49):
        clock.seconds += 0.25
        loop.step()
        seen.append(told(tmp_path)["step"])
    assert sorted(set(seen)) == [0, *range(4, 50, 4)]
    loop.step()
    assert told(tmp_path)["step"] == 50  # the last step is told, however soon


def test_the_member_of_an_ensemble_at_work_is_told(tmp_path, clock):
    file = ProgressFile(tmp_path)
    for number in (1, 2):
        file.member = number, 3
        Loop(file, max_steps=9)("on_train_begin")
        assert told(tmp_path) == {
            "phase": "training", "step": 0, "of": 9, "time": 1e9 + 1000, "member": number, "members": 3,
        }  # fmt: skip


def test_evaluation_within_training_counts_its_batches_and_goes_back_to_training(tmp_path, clock):
    loop = Loop(ProgressFile(tmp_path), max_steps=9)
    loop("on_train_begin")
    for time_after in ("training", "evaluating"):
        loop.step()
        for batch in range(1, 4):
            clock.seconds += 2
            loop("on_prediction_step", eval_dataloader=[0, 1, 2])
            assert (told(tmp_path)["phase"], told(tmp_path)["step"], told(tmp_path)["of"]) == ("evaluating", batch, 3)
        if time_after == "evaluating":
            loop("on_train_end")
        loop("on_evaluate")
        assert told(tmp_path)["phase"] == time_after


def test_rows_that_are_streamed_have_no_known_number(tmp_path):
    loop = Loop(ProgressFile(tmp_path), max_steps=9)
    loop("on_prediction_step", eval_dataloader=iter([]))
    assert told(tmp_path)["of"] is None
    loop("on_prediction_step")
    assert told(tmp_path)["phase"] == "evaluating"


def test_a_place_that_takes_nothing_harms_no_run(tmp_path):
    ProgressFile(tmp_path / "gone").tell("loading")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "progress.json").mkdir()
    ProgressFile(tmp_path).tell("loading")
    full = tmp_path / "full"
    full.mkdir()
    (full / "progress.json.new").symlink_to("/dev/full")
    ProgressFile(full).tell("loading")
    assert not (full / "progress.json").exists()


def test_a_reader_never_finds_half_a_file(tmp_path):
    """It is replaced, not written to."""
    file = ProgressFile(tmp_path)
    file.tell("judging", 0, 10)
    with (tmp_path / "progress.json").open() as opened:
        file.tell("judging", 10, 10)
        assert json.loads(opened.read())["step"] == 0
    assert told(tmp_path)["step"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
