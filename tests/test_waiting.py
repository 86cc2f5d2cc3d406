"""A stage that waits for people, as plan, status and run see it; and a whole run with such a stage."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import short_run
import yaml

from rlhf_pipeline import cli, plan, recipe
from rlhf_pipeline.arena import sources
from rlhf_pipeline.errors import InputError, Waiting
from rlhf_pipeline.run import runner, to_do
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir import durable, items, state, waiting
from rlhf_pipeline.rundir.items import item
from rlhf_pipeline.rundir.labels import Label, Labels, Pair
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record

RECIPE = """\
name: t
model: {path: tiny, quantization: none, dtype: float32}
stages:
  feedback: {kind: label, data: candidates.jsonl, until: {labels: 2}, dimensions: []}
  dpo: {data: stage:feedback, trainer: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-3}}
  sft: {data: rows.jsonl, trainer: {max_steps: 1, per_device_train_batch_size: 1, learning_rate: 1e-3}}
"""
ROWS = [{"prompt": f"Q{i}:", "replies": [" yes", " no"]} for i in range(4)]
ASKED = [item(row["prompt"], row["replies"]) for row in ROWS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def make(folder: Path, *overrides: str) -> dict[str, plan.StagePlan]:
    return {stage.name: stage for stage in plan.make(recipe.load(str(folder / "r.yaml"), overrides))}


def wait(folder: Path, **changes: Any) -> RunDirectory:
    """Leave what the runner leaves where people have to label."""
    stage, directory = make(folder)["feedback"], RunDirectory(folder / "runs" / "t")
    work = directory.work("feedback")
    work.mkdir(parents=True, exist_ok=True)
    items.write(work / "items.jsonl", ASKED)
    (work / "features.safetensors").write_bytes(b"")
    (directory.path / "recipe.yaml").write_text(recipe.to_yaml(recipe.load(str(folder / "r.yaml"), [])))
    record = {"name": "feedback", "kind": "label", "state": "waiting", "inputs": stage.inputs, **stage.parents}
    record |= {"fingerprint": stage.fingerprint, "versions": plan.versions(), "wall_s": 1.0}
    directory.write_record("feedback", Record.model_validate(record | changes))
    return directory


def choose(directory: RunDirectory, numbers: range, stage: str = "feedback", undo: bool = False) -> None:
    with Labels(directory.path / "labels.db") as labels:
        for number in numbers:
            pair = Pair.of(ASKED[number].key, ASKED[number].prompt, *ASKED[number].replies)
            labels.add(Label(f"{stage} {number}", pair.key, stage, "ann", "first"), pair)
        if undo:
            labels.undo("ann", stage)


def publish(directory: RunDirectory) -> None:
    """Finish the stage as its worker and the runner do."""
    folder, made = directory.stage("feedback"), waiting.of_stage(directory, "feedback", {})
    (folder / "rows.jsonl").write_text("{}\n")
    shutil.copy(directory.work("feedback") / "items.jsonl", folder)
    (folder / "choices.jsonl").write_text(waiting.lines(made.labels))
    files = {name: durable.contents(folder)[name] for name in ("rows.jsonl", "items.jsonl", "choices.jsonl")}
    directory.clear("feedback")
    record = directory.record("feedback")
    metrics = {"label/labels": made.progress.labels}
    assert record is not None
    directory.write_record(
        "feedback",
        record.updated(state="done", artifact="feedback/rows.jsonl", artifact_files=files, metrics=metrics),
    )


def told(folder: Path, *overrides: str) -> tuple[str, str]:
    stage = make(folder, *overrides)["feedback"]
    return stage.state, stage.reason


def test_it_waits_while_labels_are_missing_and_all_that_needs_it_is_blocked(folder):
    directory = wait(folder)
    assert told(folder) == ("waiting", "0 of 2 labels")
    choose(directory, range(1))
    plans = make(folder)
    assert plans["feedback"].reason == "1 of 2 labels"
    assert (plans["dpo"].state, plans["dpo"].reason) == ("blocked", "waits for feedback")
    read = state.read(directory.path)
    assert {stage.name: stage.state for stage in read.stages} == {
        "feedback": "waiting", "dpo": "blocked", "sft": "missing",
    }  # fmt: skip
    assert read.state == "waiting" and read.stage("feedback").reason == "1 of 2 labels"
    assert told(folder, "feedback.until={labels: 1}") == ("partial", "1 of 1 labels; makes rows of its labels")


def test_labels_of_another_stage_and_those_that_were_taken_back_do_not_count(folder):
    directory = wait(folder)
    choose(directory, range(4), stage="other")
    choose(directory, range(2), undo=True)
    assert told(folder) == ("waiting", "1 of 2 labels")


def test_with_labels_enough_it_goes_on(folder):
    directory = wait(folder)
    choose(directory, range(2))
    assert told(folder) == ("partial", "2 of 2 labels; makes rows of its labels")
    stage = state.read(directory.path).stage("feedback")
    assert (stage.state, stage.reason) == told(folder)


def test_labels_of_people_who_do_not_count_are_not_waited_for_in_vain(folder):
    directory = wait(folder)
    choose(directory, range(3))
    assert told(folder)[0] == "partial"
    people = "feedback.people={leave_out: [ann, eve]}"
    directory.write_record(
        "feedback", directory.record("feedback").updated(inputs=make(folder, people)["feedback"].inputs)
    )
    assert told(folder, people) == ("waiting", "0 of 2 labels; those of ann do not count")


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ("labels: 2", "labels: many", "of stage `feedback` cannot be read: Input should be a valid integer"),
        ("until:\n      labels: 2", "until: [2]", "`until` or `people` of stage `feedback` cannot be read"),
        ("labels: 2", "reward_accuracy: high", "'high' is not a condition on `reward_accuracy`"),
        ("labels: 2", "labels: 2\n    people: [ann]", "`until` or `people` of stage `feedback` cannot be read"),
    ],
)
def test_what_a_hand_has_spoiled_in_the_runs_recipe_is_said(folder, was, now, says, is_done, monkeypatch, capsys):
    directory = wait(folder)
    choose(directory, range(2))
    if is_done:
        publish(directory)
    file = directory.path / "recipe.yaml"
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, now))
    stage = state.read(directory.path).stage("feedback")
    assert stage.state == "failed" and says in stage.reason and str(file) in stage.reason
    monkeypatch.setattr("sys.argv", ["rlhf-pipeline", "status", str(directory.path)])
    with contextlib.suppress(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err


def test_a_bound_on_checks_without_checks_is_refused(folder):
    with pytest.raises(InputError, match="`min_checks` has no effect without `check`"):
        make(folder, "feedback.people={min_checks: 0.5}")


def test_run_ends_where_it_waits_and_goes_past_nothing(folder):
    wait(folder)
    loaded = recipe.load(str(folder / "r.yaml"), [])
    found = to_do.find(loaded, plan.make(loaded))
    assert found.stages == {"feedback": "wait for people"} and not found.compares
    again = to_do.find(loaded, plan.make(loaded), force=["feedback"])
    assert again.stages == {"feedback": "make rows", "dpo": "train", "sft": "train"}
    assert to_do.find(loaded, plan.make(loaded), only="sft").stages == {"sft": "train"}


def test_other_inputs_make_it_stale_while_it_waits(folder):
    wait(folder)
    with (folder / "candidates.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Q9:", "replies": ["a", "b"]}) + "\n")
    state_, reason = told(folder)
    assert state_ == "stale" and "data changed" in reason and "it waited for labels" in reason


def test_a_stage_that_died_before_it_waited_reads_the_replies_again_or_not(folder):
    directory = wait(folder, state="running")
    assert told(folder)[0] == "partial"
    (directory.work("feedback") / "items.jsonl").unlink()
    assert told(folder)[0] == "failed"


def test_labels_that_come_when_it_is_done_make_it_stale(folder):
    directory = wait(folder)
    choose(directory, range(2))
    publish(directory)
    assert told(folder) == ("done", "up to date")
    choose(directory, range(3))
    assert told(folder) == ("stale", "labels 2 → 3")
    choose(directory, range(0), undo=True)
    assert told(folder) == ("done", "up to date")
    choose(directory, range(0), undo=True)
    choose(directory, range(2, 4))
    assert told(folder)[0] == "stale"


def test_raised_until_it_waits_again_and_keeps_its_rows_until_there_are_new_ones(folder):
    directory = wait(folder)
    choose(directory, range(2))
    publish(directory)
    raised = "feedback.until={labels: 3}"
    said = "2 of 3 labels; its former rows stay until then"
    stages = make(folder, raised)
    assert (stages["feedback"].state, stages["feedback"].reason) == ("waiting", said)
    assert (stages["dpo"].state, stages["dpo"].reason) == ("blocked", "waits for feedback")
    summary = stages["feedback"].summary()
    assert summary["metrics"] == {"label/labels": 2} and summary["artifact"] == "feedback/rows.jsonl"
    loaded = recipe.load(str(folder / "r.yaml"), [raised])
    with pytest.raises(Waiting, match=said):
        runner.run(loaded)
    assert (directory.stage("feedback") / "rows.jsonl").is_file() and not list(directory.path.glob("feedback.*"))
    (directory.path / "recipe.yaml").write_text(recipe.to_yaml(loaded))
    setup = sources.of_stage(directory.path, loaded, None)
    assert (setup.stage, len(setup.items), setup.target.labels) == ("feedback", 4, 3)
    later = yaml.safe_load((directory.path / "recipe.yaml").read_text())
    later["stages"]["later"] = later["stages"]["feedback"]
    (directory.path / "recipe.yaml").write_text(yaml.safe_dump(later, sort_keys=False))
    (directory.path / "later").mkdir()
    shutil.copy(directory.stage("feedback") / "items.jsonl", directory.path / "later")
    assert sources.of_stage(directory.path, recipe.of_run(directory.path), None).stage == "feedback"
    choose(directory, range(3))
    assert told(folder, raised) == ("stale", "labels 2 → 3")
    choose(directory, range(0), undo=True)
    choose(directory, range(0), undo=True)
    assert told(folder) == ("waiting", "1 of 2 labels; its former rows stay until then")


@pytest.mark.parametrize("taken_from", [None, "other/feedback"])
def test_labels_that_are_gone_are_said_unless_it_was_taken_from_another_run(folder, taken_from):
    directory = wait(folder)
    choose(directory, range(2))
    publish(directory)
    directory.write_record("feedback", directory.record("feedback").updated(taken_from=taken_from))
    (directory.path / "labels.db").unlink()
    gone = "none of the 2 labels that its rows were made of is in labels.db any more"
    assert told(folder) == ("done", "up to date" if taken_from else gone)


def test_names_of_people_who_do_not_count_are_in_the_json(folder):
    directory = wait(folder)
    people = "feedback.people={leave_out: [ann]}"
    directory.write_record(
        "feedback", directory.record("feedback").updated(inputs=make(folder, people)["feedback"].inputs)
    )
    choose(directory, range(1))
    assert make(folder, people)["feedback"].summary()["left_out"] == ["ann"]
    assert make(folder)["dpo"].summary()["left_out"] == []


def test_what_was_made_of_fewer_labels_is_not_taken_again(folder):
    directory = wait(folder)
    choose(directory, range(2))
    publish(directory)
    directory.set_aside("feedback")
    assert make(folder)["feedback"].earlier is None
    (directory.path / "labels.db").unlink()
    assert make(folder)["feedback"].earlier is not None


def test_a_sweep_asks_nobody(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["rlhf-pipeline", "sweep", "r.yaml", "dpo.trainer.beta=0.1,0.2"])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "each run of a sweep would ask people again for the labels of `feedback`" in said and "--export" in said


@pytest.mark.slow
def test_a_run_waits_with_exit_code_3_and_the_same_command_goes_on(folder, warm_server: Launcher):
    overrides = ("--until", "dpo")
    code, said = short_run.run_warm(warm_server, folder, "r.yaml", *overrides)
    run = folder / "runs" / "t"
    assert code == 3
    assert "stage `feedback` waits for people: 0 of 2 labels" in said
    assert f"`rlhf-pipeline label {run} feedback --open` opens the page" in said
    record = RunDirectory(run).record("feedback")
    assert record.state == "waiting" and record.error is None and not record.is_finished
    features = run / "feedback" / "work" / "features.safetensors"
    before = features.stat().st_mtime_ns
    assert short_run.run_warm(warm_server, folder, "r.yaml", *overrides)[0] == 3
    assert features.stat().st_mtime_ns == before
    choose(RunDirectory(run), range(3))
    code, said = short_run.run_warm(warm_server, folder, "r.yaml", *overrides)
    assert code == 0 and "feedback makes rows of its labels" in said
    assert make(folder)["feedback"].state == make(folder)["dpo"].state == "done"
    rows = [json.loads(line) for line in (run / "feedback" / "rows.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [" yes"] * 3
    code, said = short_run.run_warm(warm_server, folder, "r.yaml", *overrides)
    assert code == 0 and "feedback makes" not in said
    choose(RunDirectory(run), range(4))
    code, said = short_run.run_warm(warm_server, folder, "r.yaml", *overrides)
    assert code == 0 and "labels 3 → 4" in said
    assert len((run / "feedback" / "rows.jsonl").read_text().splitlines()) == 4
