"""Rows as what a stage leaves: counted while they are made, published, looked at, and read by later stages."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import MADE, RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.rows import Made, publish
from rlhf_pipeline.use.export import export

ROWS = [{"prompt": "a", "replies": ["b", "é"], "scores": [1.0, 0.0]}, {"prompt": "c", "replies": ["d", "e"]}]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A stage that makes rows, with its record, as the runner leaves both for its worker."""
    stages = {
        "candidates": {"kind": "sample", "data": {"path": "/prompts.jsonl"}, "n": 2},
        "reward": {"kind": "reward", "data": {"path": "stage:candidates"}},
    }
    recipe = Recipe.model_validate(
        {"name": "run", "output_dir": str(tmp_path), "model": {"path": "tiny"}, "stages": stages}
    )
    (recipe.run / "candidates" / "work").mkdir(parents=True)
    (recipe.run / "recipe.yaml").write_text(json.dumps(recipe.model_dump()))
    record = Record(name="candidates", kind="sample", state="running", fingerprint="f", inputs={"n": 2})
    RunDirectory(recipe.run).write_record("candidates", record)
    return Job(recipe, "candidates", recipe.run)


def made(job: Job) -> Made:
    return Made(job, 5, "sampling")


def result(job: Job) -> None:
    """What the worker writes last."""
    (job.work / "result.json").write_text(json.dumps({"metrics": {"rows": 2}}))


def record_as_done(job: Job) -> RunDirectory:
    directory = RunDirectory(job.run)
    publish(job, ROWS, {"reply/length": 3.0}, {"more.jsonl": [{"x": 1}]})
    result(job)
    files = directory.publish("candidates")
    found = directory.record("candidates")
    assert found
    done = found.updated(state="done", artifact="candidates/rows.jsonl", artifact_files=files)
    directory.write_record("candidates", done)
    return directory


def test_what_was_made_is_there_after_a_kill_but_for_what_was_being_written(job: Job) -> None:
    with made(job) as first:
        first.add([{"i": 0}, {"i": 1}])
        first.add([{"i": 2, "text": "é\u2028x"}])
    for torn in (b'{"i": 3, "te', b'{"i": 3}', b"\x00\x00\n"):
        with (job.work / MADE).open("ab") as file:
            file.write(torn)
        assert str(RunDirectory(job.run).progress("candidates")) == "resumes after 3 of 5"
        with made(job) as second:
            assert second.items == [{"i": 0}, {"i": 1}, {"i": 2, "text": "é\u2028x"}]
    with made(job) as third:
        third.add([{"i": 3}])
    assert [item["i"] for item in made(job).items] == [0, 1, 2, 3]


def test_a_request_to_stop_waits_for_the_batch_and_is_then_granted(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REQUEST, "noted", False)
    with pytest.raises(Stopped) as stopped, made(job) as now:
        now.add([{"i": 0}])
        REQUEST._take(0, None)  # in the middle of a batch: nothing is raised here
        now.add([{"i": 1}])
    assert stopped.value.step == 2
    assert len(made(job).items) == 2
    assert not REQUEST.training


def test_rows_are_published_with_what_is_beside_them(job: Job) -> None:
    directory = record_as_done(job)
    folder = job.run / "candidates"
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()] == ROWS
    found = directory.record("candidates")
    assert found and set(found.artifact_files) == {"rows.jsonl", "more.jsonl"}
    assert found.weights == found.artifact_files["rows.jsonl"][1]
    assert state.read(job.run).stage("candidates").state == "done"


def test_a_stage_that_made_nothing_says_so(job: Job) -> None:
    with pytest.raises(InputError, match="stage `candidates` has made no rows"):
        publish(job, [], {})


def test_a_kill_in_the_middle_of_publishing_loses_nothing(job: Job) -> None:
    directory = RunDirectory(job.run)
    publish(job, ROWS, {}, {"more.jsonl": [{"x": 1}]})
    assert directory.progress("candidates").point == "trained"
    result(job)
    assert directory.progress("candidates").point == "finished"
    (job.work / "rows" / "more.jsonl").rename(job.run / "candidates" / "more.jsonl")
    progress = directory.progress("candidates")
    assert progress.point == "finished" and str(progress) == "its rows are to be published"
    directory.prepare("candidates", progress)
    files = directory.publish("candidates")
    assert set(files) == {"rows.jsonl", "more.jsonl"}
    assert all((job.run / "candidates" / name).is_file() for name in files)


def test_what_is_left_of_publishing_goes_where_the_stage_goes_on_making_rows(job: Job) -> None:
    directory = RunDirectory(job.run)
    with made(job) as now:
        now.add([{"i": 0}])
    publish(job, ROWS, {}, {"more.jsonl": [{"x": 1}]})
    (job.work / "rows" / "more.jsonl").rename(job.run / "candidates" / "more.jsonl")
    (job.work / "rows" / "rows.jsonl").write_text("damaged")
    progress = directory.progress("candidates")
    assert progress.point == "checkpoint" and progress.step == 1
    directory.prepare("candidates", progress)
    assert {file.name for file in (job.run / "candidates").iterdir()} == {"stage.json", "work"}
    assert [item["i"] for item in made(job).items] == [0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "rows.jsonl").unlink(), ("missing", "its rows.jsonl is gone")),
        (lambda folder: (folder / "more.jsonl").unlink(), ("missing", "its more.jsonl is gone")),
        (
            lambda folder: (folder / "rows.jsonl").write_text("{}\n"),
            ("stale", "its rows.jsonl is not what the stage wrote"),
        ),
    ],
)
def test_rows_that_are_not_what_the_stage_wrote_are_noticed(job: Job, change: Any, expected: tuple[str, str]) -> None:
    record_as_done(job)
    change(job.run / "candidates")
    stage = state.read(job.run).stage("candidates")
    assert (stage.state, stage.reason) == expected


def test_a_stage_that_was_trained_on_other_rows_is_stale(job: Job) -> None:
    directory = record_as_done(job)
    digest = directory.record("candidates").weights
    adapter = job.run / "reward" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    built_on = {"state": "done", "kind": "reward", "others": {"rows": "candidates"}, "init": "base"}
    directory.write_record("reward", Record(**built_on, parent_weights={"candidates": digest}))
    assert state.read(job.run).stage("reward").state == "done"
    assert state.read(job.run).stage("reward").parents == {"init": "base", "rows": "candidates"}
    directory.write_record("reward", Record(**built_on, parent_weights={"candidates": "other"}))
    stage = state.read(job.run).stage("reward")
    assert (stage.state, stage.reason) == ("stale", "candidates ran again")


def test_a_stage_without_a_record_waits_for_the_rows_that_the_recipe_names(job: Job) -> None:
    stages = {stage.name: stage for stage in state.read(job.run).stages}
    assert stages["reward"].parents == {"rows": "candidates"}


def test_rows_that_another_run_made_are_taken(job: Job) -> None:
    directory = record_as_done(job)
    record = directory.record("candidates")
    other = RunDirectory(job.run.with_name("other"))
    other.path.mkdir()
    copy = other.copy_of("candidates", job.run / "candidates", record.artifact_files)
    other.put("candidates", copy, record)
    assert other.artifact_problem("candidates", record, None) is None
    (job.run / "candidates" / "rows.jsonl").write_text("{}\n")
    assert other.copy_of("again", job.run / "candidates", record.artifact_files) is None


def test_a_stage_that_makes_rows_is_not_exported(job: Job, tmp_path: Path) -> None:
    record_as_done(job)
    with pytest.raises(InputError, match="`candidates` is a sample stage, which makes rows and no model") as caught:
        export(job.run, "candidates", tmp_path / "out")
    assert str(job.run / "candidates" / "rows.jsonl") in str(caught.value.hint)


def test_the_rows_of_a_stage_are_named_with_their_digest() -> None:
    record = Record(
        inputs={"data": "a.jsonl@12 + stage:candidates", "ptx_data": "stage:other"},
        parent_weights={"candidates": "abc", "sft": "def", "other": None},
    )
    assert record.data("data") == ["a.jsonl@12", "stage:candidates@abc"]
    assert record.data("ptx_data") == ["stage:other"]
    assert record.data("data.eval_data") == []
