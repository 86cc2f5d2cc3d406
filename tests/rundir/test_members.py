"""An ensemble in the run directory: where it resumes, what its weights are, and its lines among the numbers."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.headline import over_members, series
from rlhf_pipeline.rundir.layout import TRAINED, WEIGHTS, Progress, RunDirectory, members
from rlhf_pipeline.rundir.record import Record


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run directory with a stage `reward` of three members that has begun."""
    directory = RunDirectory(tmp_path / "run")
    directory.work("reward").mkdir(parents=True)
    directory.write_record("reward", Record(state="running", inputs={"members": 3}))
    return directory


def save(directory: RunDirectory, member: int, step: int) -> Path:
    """A checkpoint of a member."""

    def write(folder: Path) -> None:
        (folder / durable.STATE).write_text(json.dumps({"max_steps": 9}))

    folder = directory.work("reward") / f"member-{member}" / f"checkpoint-{step}"
    durable.write_folder(folder, write)
    return folder


def train(directory: RunDirectory, member: int) -> Path:
    """A member that is trained."""
    folder = directory.work("reward") / f"member-{member}" / "adapter"
    durable.write_folder(folder, lambda to: to.joinpath(WEIGHTS).write_text(f"member {member}") and None)
    return folder


def test_an_ensemble_resumes_at_the_first_member_that_is_not_trained(directory: RunDirectory) -> None:
    assert directory.progress("reward") is None
    save(directory, 1, 6)
    assert directory.progress("reward") == Progress("checkpoint", 6, 9, member=1, members=3)
    assert str(directory.progress("reward")) == "resumes from step 6 of 9 of member 1 of 3"
    train(directory, 1)
    progress = directory.progress("reward")
    assert (str(progress), progress.left) == ("resumes with member 2 of 3", "member-1/adapter")
    save(directory, 2, 3)
    progress = directory.progress("reward")
    assert (str(progress), progress.left) == (
        "resumes from step 3 of 9 of member 2 of 3", "member-2/checkpoint-3",
    )  # fmt: skip
    train(directory, 2), train(directory, 3)
    progress = directory.progress("reward")
    assert (str(progress), progress.left) == ("its 3 members are trained, to be put together", "member-3/adapter")
    for path in (progress.left, "member-2/checkpoint-3"):
        assert (directory.work("reward") / path).exists()


def test_what_is_damaged_of_a_member_is_named_put_away_and_not_used(directory: RunDirectory) -> None:
    train(directory, 1), save(directory, 2, 3)
    for folder in (save(directory, 2, 6), train(directory, 2)):
        next(file for file in folder.iterdir() if file.name != durable.MANIFEST).write_text("?")
    train(directory, 3)
    progress = directory.progress("reward")
    assert progress is not None and (progress.member, progress.step) == (2, 3)
    assert list(progress.damaged) == ["member-2/checkpoint-6", "member-2/adapter"]
    assert "; member-2/adapter is damaged: " in str(progress)
    directory.prepare("reward", progress)
    assert sorted(path.name for path in (directory.work("reward") / "member-2").iterdir()) == [
        "checkpoint-3", "damaged-adapter", "damaged-checkpoint-6",
    ]  # fmt: skip
    assert directory.progress("reward") == Progress("checkpoint", 3, 9, member=2, members=3)


def test_a_first_member_of_which_nothing_is_sound_begins_anew(directory: RunDirectory) -> None:
    (save(directory, 1, 3) / durable.MANIFEST).unlink()
    assert directory.progress("reward") is None
    assert directory.damaged("reward") == {"member-1/checkpoint-3": "manifest.json is missing"}
    assert durable.holds_some(directory.work("reward"))
    assert not durable.holds_some(directory.stage("reward"))


def test_a_checkpoint_that_cannot_be_used_is_named_with_its_member() -> None:
    error = durable.CheckpointError(Path("work/member-2/checkpoint-3"), "why")
    assert error.checkpoint == "member-2/checkpoint-3"
    assert durable.CheckpointError(Path(error.checkpoint), "why").checkpoint == error.checkpoint  # as the runner does
    assert durable.CheckpointError(Path("work/checkpoint-3"), "why").checkpoint == "checkpoint-3"


def put_together(directory: RunDirectory, name: str, count: int) -> Path:
    """The artifact of an ensemble, published, with a record of what it holds."""
    artifact = directory.adapter(name)
    for number in range(1, count + 1):
        folder = artifact if number == 1 else artifact / f"member-{number}"
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_text(f"member {number}")
    directory.write_record(name, Record(state="done", artifact="x", artifact_files=durable.contents(artifact)))
    return artifact


def test_the_weights_of_an_ensemble_are_those_of_all_its_members(directory: RunDirectory) -> None:
    artifact = put_together(directory, "reward", 12)
    assert [folder.name for folder in members(artifact)] == ["adapter", *(f"member-{i}" for i in range(2, 13))]
    record = directory.record("reward")
    assert record is not None and directory.artifact_problem("reward", record, None) is None
    put_together(directory, "alone", 1)
    alone = directory.record("alone")
    assert alone is not None and alone.weights == alone.artifact_files[WEIGHTS][1] != record.weights
    (artifact / "member-3" / WEIGHTS).write_text("another")
    other = record.updated(artifact_files=durable.contents(artifact))
    assert other.weights != record.weights  # so that what was built on it is stale
    shutil.rmtree(artifact / "member-3")
    assert directory.artifact_problem("reward", record, None) == f"its adapter/member-3/{WEIGHTS} is gone"


def test_the_weights_of_an_ensemble_are_shared_with_a_copy(directory: RunDirectory, tmp_path: Path) -> None:
    artifact = put_together(directory, "reward", 2)
    record = directory.record("reward")
    assert record is not None
    copy = RunDirectory(tmp_path / "other")
    copy.path.mkdir()
    found = copy.copy_of("reward", artifact.parent, record.artifact_files)
    assert found is not None
    for name in (WEIGHTS, f"member-2/{WEIGHTS}"):
        assert (found / "adapter" / name).samefile(artifact / name)


def test_numbers_of_members_are_shown_as_their_means() -> None:
    rows = [
        {"step": 1, "time": 1.0, "member": 1, "loss": 0.8, "grad_norm": 1.0},
        {"step": 2, "time": 2.0, "member": 1, "loss": 0.6},
        {"step": 2, "time": 3.0, "member": 1, "eval_loss": 0.5},
        {"step": 1, "time": 4.0, "member": 2, "loss": 0.4, "grad_norm": None},
        {"step": 2, "time": 5.0, "member": 2, "loss": 0.2},
    ]
    assert over_members(rows) == [
        {"step": 1, "time": 1.0, "loss": pytest.approx(0.6), "grad_norm": None},
        {"step": 2, "time": 2.0, "loss": pytest.approx(0.4)},
        {"step": 2, "time": 3.0, "eval_loss": 0.5},
    ]
    assert series("reward", rows)["loss"] == pytest.approx([0.6, 0.4])
    alone = [{"step": 1, "loss": 0.8}, {"step": 1, "loss": 0.4}]
    assert over_members(alone) == alone


def test_an_ensemble_that_is_trained_is_only_to_be_published(directory: RunDirectory) -> None:
    artifact = directory.work("reward") / "adapter"
    (artifact / "member-2").mkdir(parents=True)
    for folder in members(artifact):
        (folder / WEIGHTS).write_text("weights")
    durable.write_text(directory.work("reward") / TRAINED, json.dumps({"files": durable.contents(artifact)}))
    assert directory.progress("reward") == Progress("trained")
    (artifact / "member-2" / WEIGHTS).write_text("other")
    assert directory.progress("reward") is None
