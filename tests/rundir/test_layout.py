"""The run directory: the old truth or the new one, nothing lost, and where a stage that was interrupted goes on."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.layout import RESULT, TRAINED, WEIGHTS, Progress, RunDirectory, read_json
from rlhf_pipeline.rundir.record import Record


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def work(directory):
    """The working folder of a stage `sft`."""
    directory.work("sft").mkdir(parents=True)
    return directory.work("sft")


def save(work: Path, step: int, of: int | None = 9) -> Path:
    """A checkpoint as a trainer leaves it."""

    def write(folder: Path) -> None:
        (folder / "trainer_state.json").write_text(json.dumps({"max_steps": of} if of else {}))
        (folder / WEIGHTS).write_text(f"weights of step {step}")

    durable.write_folder(work / f"checkpoint-{step}", write)
    return work / f"checkpoint-{step}"


def train(work: Path) -> None:
    """What a worker leaves when training is over."""
    (work / "adapter" / "inner").mkdir(parents=True)
    (work / "adapter" / WEIGHTS).write_text("final weights")
    (work / "adapter" / "inner" / "tokenizer.json").write_text("{}")
    note = {"metrics": {"loss": 1.0}, "files": durable.contents(work / "adapter")}
    durable.write_text(work / TRAINED, json.dumps(note))


def finish(work: Path) -> None:
    """What a worker leaves when nothing is left to do."""
    train(work)
    durable.write_text(work / RESULT, json.dumps({"metrics": {"loss": 1.0}}))


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# Records


def test_a_record_is_read_back_as_written(directory):
    directory.stage("sft").mkdir(parents=True)
    record = Record(state="done", metrics={"loss": 0.5, "nan": None}, error="é → ü")
    directory.write_record("sft", record)
    assert directory.record("sft") == record
    assert directory.unreadable("sft") is None
    assert (directory.stage("sft") / "stage.json").read_text(encoding="utf-8").endswith("}\n")
    assert directory.record("dpo") is None
    assert directory.unreadable("dpo") is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cannot be read"),
        (b'{"state"', "cannot be read"),
        (b"[1]", "holds no record but list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_record_that_cannot_be_read_is_what_the_stage_was_started_with(directory, work, content, why):
    (directory.stage("sft") / "stage.json").write_bytes(content)
    assert directory.record("sft") is None
    assert why in directory.unreadable("sft")
    durable.write_text(work / "job.json", json.dumps({"task": "train", "record": {"state": "running"}}))
    assert directory.record("sft") == Record(state="running")
    assert directory.unreadable("sft") is None
    (work / "job.json").write_text('{"task"')
    assert directory.record("sft") is None
    assert why in directory.unreadable("sft")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_json_that_is_no_object_is_none(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert read_json(tmp_path / "file") is None
    assert read_json(tmp_path / "none") is None
    (tmp_path / "file").write_text('{"a": 1}')
    assert read_json(tmp_path / "file") == {"a": 1}


# Where a stage goes on


def test_a_stage_that_left_nothing_has_no_progress(directory, work):
    assert directory.progress("sft") is None
    assert directory.progress("dpo") is None


@pytest.mark.parametrize(("of", "said"), [(9, "resumes from step 6 of 9"), (None, "resumes from step 6")])
def test_progress_is_the_newest_sound_checkpoint(directory, work, of, said):
    for step in (2, 4, 6):
        save(work, step, of)
    progress = directory.progress("sft")
    assert progress == Progress("checkpoint", 6, of)
    assert str(progress) == said
    (work / "checkpoint-6" / WEIGHTS).unlink()
    progress = directory.progress("sft")
    assert progress == Progress("checkpoint", 4, of, {"checkpoint-6": f"{WEIGHTS} is missing"})
    assert str(progress).endswith(f"; checkpoint-6 is damaged: {WEIGHTS} is missing")
    for step in (2, 4):
        (work / f"checkpoint-{step}" / durable.MANIFEST).write_text("{")
    assert directory.progress("sft") is None


def test_a_stage_that_is_trained_needs_no_checkpoint(directory, work):
    save(work, 6)
    train(work)
    assert directory.progress("sft") == Progress("trained")
    assert str(directory.progress("sft")) == "trained, to be judged"
    (work / RESULT).write_text(json.dumps({"step": 3}))  # it was asked to stop while it was judged
    assert directory.progress("sft") == Progress("trained")
    (work / RESULT).write_text(json.dumps({"metrics": {}}))
    assert directory.progress("sft") == Progress("finished")
    assert str(directory.progress("sft")) == "trained, to be published"


@pytest.mark.parametrize("point", [train, finish])
@pytest.mark.parametrize(
    "harm",
    [
        lambda work: (work / "adapter" / WEIGHTS).write_text("final weightz"),
        lambda work: (work / "adapter" / WEIGHTS).write_text("final"),
        lambda work: (work / "adapter" / "inner" / "tokenizer.json").unlink(),
        lambda work: (work / TRAINED).write_text((work / TRAINED).read_text()[:-9]),
        lambda work: (work / TRAINED).write_text(json.dumps({"metrics": {}})),
        lambda work: (work / TRAINED).write_text(json.dumps({"metrics": {}, "files": {}})),
        lambda work: (work / TRAINED).unlink(),
        lambda work: shutil.rmtree(work / "adapter"),
    ],
    ids=["other bytes", "truncated", "a file is gone", "half a note", "no files", "empty", "no note", "no adapter"],
)
def test_an_adapter_that_is_not_what_was_trained_is_not_taken_for_it(directory, work, point, harm):
    save(work, 6)
    point(work)
    harm(work)
    assert directory.progress("sft") == Progress("checkpoint", 6, 9)
    shutil.rmtree(work / "checkpoint-6")
    assert directory.progress("sft") is None


# Preparing


def test_prepare_for_a_start_leaves_nothing(directory, work):
    save(work, 6)
    finish(work)
    directory.prepare("sft", None)
    assert list(work.iterdir()) == []
    directory.prepare("dpo", None)
    assert list(directory.work("dpo").iterdir()) == []


def test_prepare_for_a_checkpoint_leaves_sound_ones_and_no_result(directory, work):
    for step in (2, 4, 6, 8):
        save(work, step)
    for step in (6, 8):
        (work / f"checkpoint-{step}" / WEIGHTS).write_text("?")
    finish(work)
    (work / "adapter" / WEIGHTS).write_text("?")
    before = tree(work)
    progress = directory.progress("sft")
    assert progress.step == 4
    directory.prepare("sft", progress)
    assert {path.name for path in work.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "damaged-checkpoint-6", "damaged-checkpoint-8"
    }  # fmt: skip
    assert tree(work / "checkpoint-4") == {
        name.partition("/")[2]: text for name, text in before.items() if name.startswith("checkpoint-4/")
    }
    assert directory.progress("sft") == Progress("checkpoint", 4, 9)
    # A second one of the same name is put away as well.
    save(work, 8)
    (work / "checkpoint-8" / durable.MANIFEST).unlink()
    directory.prepare("sft", directory.progress("sft"))
    assert directory.progress("sft") == Progress("checkpoint", 4, 9)


def test_prepare_for_judging_leaves_the_adapter_and_no_old_answer(directory, work):
    train(work)
    before = tree(work)
    (work / RESULT).write_text(json.dumps({"step": 3}))
    directory.prepare("sft", directory.progress("sft"))
    assert tree(work) == before
    assert directory.progress("sft") == Progress("trained")


def test_prepare_for_publishing_touches_nothing(directory, work):
    finish(work)
    before = tree(work)
    directory.prepare("sft", directory.progress("sft"))
    assert tree(work) == before


def test_set_aside_keeps_every_former_result(directory):
    assert directory.set_aside("sft") is None
    asides = []
    for attempt in range(4):  # faster than the clock's second, by which they are named
        directory.stage("sft").mkdir(parents=True)
        (directory.stage("sft") / "log.txt").write_text(str(attempt))
        asides.append(directory.set_aside("sft"))
    assert not directory.stage("sft").exists()
    assert [(aside / "log.txt").read_text() for aside in asides] == ["0", "1", "2", "3"]
    assert all(aside.parent == directory.path and aside.name.startswith("sft.") for aside in asides)


# Publishing


def test_publish_moves_the_adapter_into_place_and_says_what_it_holds(directory, work):
    finish(work)
    adapter = tree(work / "adapter")
    expected = durable.contents(work / "adapter")
    assert directory.publish("sft") == expected
    assert tree(directory.stage("sft") / "adapter") == adapter
    assert not (work / "adapter").exists()
    assert directory.progress("sft") == Progress("finished")  # until the record says so
    assert directory.publish("sft") == expected
    assert tree(directory.stage("sft") / "adapter") == adapter
    directory.clear("sft")
    assert not work.exists()
    directory.clear("sft")


def test_a_stage_without_an_adapter_is_not_published(directory, work):
    with pytest.raises(FileNotFoundError):
        directory.publish("sft")
    assert not (directory.stage("sft") / "adapter").exists()


@pytest.mark.slow
def test_killed_before_or_after_any_step_of_publishing_the_next_run_finishes(directory):
    """What the runner does once a worker is done: publish, record, clear; killed at each of its calls to the system."""
    names = ("fsync", "rename", "replace", "rmdir", "unlink", "open")
    for end in range(200):
        directory = RunDirectory(directory.path.with_name(str(end)))
        work = directory.work("sft")
        work.mkdir(parents=True)
        save(work, 6)
        finish(work)
        expected = tree(work / "adapter")
        directory.write_record("sft", Record(state="running"))

        def go_on(directory: RunDirectory = directory) -> None:
            if directory.record("sft").state == "running":
                assert directory.progress("sft") == Progress("finished")
                directory.prepare("sft", directory.progress("sft"))
                files = directory.publish("sft")
                directory.write_record("sft", Record(state="done", artifact_files=files))
            directory.clear("sft")

        child = os.fork()
        if child == 0:
            try:
                kill_at(names, end)
                go_on()
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        record = directory.record("sft")
        if record.state == "done":
            assert directory.artifact_problem("sft", record, FileDigests()) is None
        if code == 0:
            break
        assert code == -signal.SIGKILL
        go_on()
        assert tree(directory.stage("sft") / "adapter") == expected
        assert directory.artifact_problem("sft", directory.record("sft"), FileDigests()) is None
        assert not work.exists()
    assert end > 10


def kill_at(names: tuple[str, ...], end: int) -> None:
    """Have this process killed before its call number `end` of the named functions of `os`."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > end:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))


def digest(path: Path) -> str:
    return durable.contents(path.parent)[path.name][1][:32]


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: (run / "adapter" / WEIGHTS).write_text("?"),
        lambda run: (run / "work" / RESULT).write_text("{"),
        lambda run: (run / "work" / TRAINED).write_text("{"),
    ],
    ids=["adapter", "result", "note"],
)
def test_what_was_published_and_not_recorded_makes_room_if_it_cannot_be_trusted(directory, work, harm):
    """The stage resumes from its checkpoint, and must be able to publish again."""
    save(work, 6)
    finish(work)
    directory.publish("sft")
    harm(directory.stage("sft"))
    progress = directory.progress("sft")
    assert progress == Progress("checkpoint", 6, 9)
    directory.prepare("sft", progress)
    finish(work)
    expected = tree(work / "adapter")
    directory.publish("sft")
    assert tree(directory.stage("sft") / "adapter") == expected


# What was published


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda adapter: None, None),
        (lambda adapter: (adapter / WEIGHTS).write_text("final weightz"), f"its adapter/{WEIGHTS} is not what"),
        (lambda adapter: (adapter / WEIGHTS).write_text("final"), f"its adapter/{WEIGHTS} is not what"),
        (lambda adapter: (adapter / WEIGHTS).unlink(), "its adapter is gone"),
        (lambda adapter: shutil.rmtree(adapter), "is gone"),
        (lambda adapter: (adapter / "inner" / "tokenizer.json").unlink(), "its adapter/inner/tokenizer.json is gone"),
        (
            lambda adapter: (adapter / "inner" / "tokenizer.json").write_text("[]"),
            "its adapter/inner/tokenizer.json is",
        ),
    ],
)
def test_an_artifact_is_held_against_its_record(directory, work, harm, problem):
    finish(work)
    record = Record(artifact_files=directory.publish("sft"))
    harm(directory.stage("sft") / "adapter")
    found = directory.artifact_problem("sft", record, FileDigests())
    assert found is None if problem is None else problem in found


def test_a_record_that_names_no_files_wants_the_weights_alone(directory, work):
    finish(work)
    directory.publish("sft")
    assert directory.artifact_problem("sft", Record(), FileDigests()) is None
    (directory.stage("sft") / "adapter" / WEIGHTS).unlink()
    assert directory.artifact_problem("sft", Record(), FileDigests()) == "its adapter is gone"


# The lock, of which tests/rundir/test_lock.py says more


def test_the_directory_is_made_and_locked(directory):
    assert not directory.is_locked()
    assert not directory.path.exists()
    with directory.locked():
        assert directory.is_locked()
        assert [path.name for path in directory.path.iterdir()] == [".lock"]
    assert not directory.is_locked()
    assert not directory.path.exists()  # nothing came into it
    with directory.locked():
        (directory.path / "something").touch()
        directory.note("comparing")
    assert {path.name for path in directory.path.iterdir()} == {".lock", "something"}
    with directory.locked():
        (directory.path / "something").unlink()
    assert [path.name for path in directory.path.iterdir()] == [".lock"]  # it was there before
    directory.refuse_if_locked()
