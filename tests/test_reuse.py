"""What was made before is taken and not trained again: by another run beside this one, or by this one formerly."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_plan import EVALUATE, RECIPE, begun, break_off, finish, folder, harm_weights, make, run_of, states

from rlhf_pipeline import cli, plan, recipe
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.run import runner, to_do
from rlhf_pipeline.rundir import durable, earlier, layout
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.layout import WEIGHTS, RunDirectory

__all__ = ["folder"]
STAGES = ("sft", "reward", "ppo", "dpo")
TAKE_ALL = dict.fromkeys(STAGES, "take")


def tasks(folder: Path, *overrides: str, reuse: bool = True, **options: Any) -> dict[str, str]:
    """What `run` would do with each stage that it does something with, in a run `u` beside the run `t`."""
    loaded = recipe.load(str(folder / "r.yaml"), ["name=u", *overrides])
    plans = plan.make(loaded, reuse=reuse, trust_versions=options.get("trust_versions", False))
    return dict(to_do.find(loaded, plans, **options).stages)


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a recipe where nothing can be trained or judged, and returns what was said."""

    def train_nothing(job: dict[str, Any], *_: object) -> int:
        raise AssertionError(f"a worker was asked to {job['task']}")

    launcher = SimpleNamespace(run=train_nothing, stop=train_nothing, stopping=False, at_work=False)
    monkeypatch.setattr(runner, "Launcher", lambda *_, **__: contextlib.nullcontext(launcher))

    def start(*overrides: str, **options: Any) -> list[str]:
        said: list[str] = []
        runner.run(recipe.load(str(folder / "r.yaml"), overrides), compare=False, say=said.append, **options)
        return said

    return start


def content(stage: Path) -> dict[str, bytes]:
    return {path.relative_to(stage).as_posix(): path.read_bytes() for path in stage.rglob("*") if path.is_file()}


def change(folder: Path, name: str, **changes: object) -> None:
    """Change the record of a stage of the run `t`."""
    run_of(folder).write_record(name, run_of(folder).record(name).updated(**changes))


def test_a_new_run_takes_what_another_has_made(folder, run):
    """Nothing is trained; the record says from where, and all else is as it was made."""
    finish(folder)
    first = run_of(folder)
    for file in ("metrics.jsonl", "samples.jsonl", "log.txt", "pairs.jsonl"):
        (first.stage("ppo") / file).write_text(file)
    (first.work("ppo") / "checkpoint-9").mkdir(parents=True)
    before = content(first.path)
    plans = make(folder, "name=u")
    assert set(states(plans).values()) == {"missing"}
    assert {name: stage.summary()["taken_from"] for name, stage in plans.items()} == {
        name: f"t/{name}" for name in STAGES
    }
    assert tasks(folder) == TAKE_ALL
    assert not (folder / "runs" / "u").exists()

    keep = "keep_checkpoints=true"
    assert run("name=u", keep) == [f"{name:<7} is taken from t/{name}" for name in STAGES]
    second = RunDirectory(folder / "runs" / "u")
    for name in STAGES:
        ours, theirs = content(second.stage(name)), content(first.stage(name))
        record, made = json.loads(ours.pop("stage.json")), json.loads(theirs.pop("stage.json"))
        assert ours == theirs
        assert record.pop("taken_from") == f"t/{name}" and record.pop("taken_at") > "2026"
        made |= {"error": None, "gates": {}, "gates_ignored": {}, "log": f"{name}/log.txt"}
        assert record == made | {"recipe_folder": str(folder), "reward": made.get("reward")}
    assert not second.work("ppo").exists()
    assert content(first.path) == before
    assert tasks(folder) == {}
    assert set(states(make(folder, "name=u")).values()) == {"done"}
    assert make(folder, "name=u")["ppo"].summary()["taken_from"] == "t/ppo"
    assert run("name=u", keep) == []


def test_weights_are_shared_and_nothing_else_is(folder, run):
    """What may be edited or appended to is a copy: what happens to one run never shows in another."""
    finish(folder, "sft")
    (run_of(folder).stage("sft") / "log.txt").write_text("trained\n")
    run("name=u", until="sft")
    ours, theirs = folder / "runs" / "u" / "sft", run_of(folder).stage("sft")
    shared = {name for name in content(ours) if (ours / name).samefile(theirs / name)}
    assert shared == {f"adapter/{WEIGHTS}"}
    shutil.rmtree(run_of(folder).path)
    assert states(make(folder, "name=u"))["sft"] == "done"


def test_where_no_link_can_be_made_the_weights_are_copied(folder, run, monkeypatch):
    finish(folder, "sft")

    def another_disk(self: Path, source: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", another_disk)
    run("name=u", until="sft")
    ours, theirs = (run / "sft" / "adapter" / WEIGHTS for run in (folder / "runs" / "u", run_of(folder).path))
    assert ours.read_bytes() == theirs.read_bytes() and not ours.samefile(theirs)
    assert states(make(folder, "name=u"))["sft"] == "done"


def test_only_what_depends_on_another_setting_is_trained(folder):
    finish(folder)
    other = "ppo.trainer.kl_coef=0.3"
    assert tasks(folder, other) == TAKE_ALL | {"ppo": "train"}
    assert tasks(folder, "reward.trainer.max_steps=5") == TAKE_ALL | {"reward": "train", "ppo": "train"}
    assert set(tasks(folder, "seed=2").values()) == {"train"}
    assert set(tasks(folder, reuse=False).values()) == {"train"}
    assert tasks(folder, "output_dir=elsewhere") == dict.fromkeys(STAGES, "train")
    assert tasks(folder, force=["reward"]) == TAKE_ALL | {"reward": "train", "ppo": "train"}
    assert tasks(folder, until="reward") == {"sft": "take", "reward": "take"}


def test_going_back_to_earlier_settings_brings_the_former_results_back(folder, run):
    """There and back again, as often as one likes: no result is lost, and none is there twice."""
    directory, other = run_of(folder), RECIPE.replace("ppo: {data", "ppo: {trainer: {kl_coef: 0.3}, data")
    finish(folder)
    directory.set_aside("ppo")
    (folder / "r.yaml").write_text(other)
    finish(folder, "ppo")
    (directory.work("ppo")).mkdir()
    (directory.stage("ppo") / "log.txt").write_text("with 0.3")
    for text, log in ((RECIPE, None), (other, "with 0.3"), (RECIPE, None)):
        (folder / "r.yaml").write_text(text)
        stage = make(folder)["ppo"]
        assert stage.state == "stale" and stage.earlier.name.startswith("t/ppo.20")
        (said,) = run()
        former = [path.name for path in directory.path.glob("ppo.*")]
        assert len(former) == 1
        assert said.startswith(f"ppo     is taken from {stage.earlier.name}: trainer.kl_coef ")
        assert said.endswith(f"; the former results are now in {former[0]}/")
        assert set(states(make(folder)).values()) == {"done"}
        assert directory.record("ppo").taken_from == stage.earlier.name
        found = directory.stage("ppo") / "log.txt"
        assert (found.read_text() if found.exists() else None) == log


def test_a_stage_is_known_by_what_it_is_and_not_by_its_name(folder, run):
    finish(folder)
    (folder / "r.yaml").write_text(RECIPE.replace("  sft: {", "  warm-up: {kind: sft, "))
    said = run("name=u")
    assert said[0] == "warm-up is taken from t/sft"
    assert set(states(make(folder, "name=u")).values()) == {"done"}
    record = RunDirectory(folder / "runs" / "u").record("dpo")
    assert (record.init, list(record.parent_weights)) == ("warm-up", ["warm-up"])
    # A stage that was renamed is taken from its former folder, which stays.
    assert run()[0] == "warm-up is taken from t/sft"
    assert {path.name for path in run_of(folder).path.iterdir()} >= {"sft", "warm-up"}


def new_weights(folder: Path, name: str) -> None:
    """Give a stage of the run `t` other weights from the same inputs, as another machine would."""
    adapter = run_of(folder).adapter(name)
    (adapter / WEIGHTS).unlink()  # other runs may share them
    (adapter / WEIGHTS).write_text(f"other weights of {name}")
    change(folder, name, artifact_files=durable.contents(adapter))


def test_a_stage_is_taken_only_over_the_weights_that_it_was_built_on(folder, run):
    finish(folder)
    run("name=u", until="sft")
    assert tasks(folder) == {"reward": "take", "ppo": "take", "dpo": "take"}
    new_weights(folder, "sft")  # as if `t` had been trained elsewhere, with another result
    for name in ("reward", "ppo", "dpo"):
        change(folder, name, parent_weights=begun(folder, name)["parent_weights"])
    assert tasks(folder) == {"reward": "train", "ppo": "train", "dpo": "train"}
    shutil.rmtree(folder / "runs" / "u" / "sft" / "adapter")
    assert tasks(folder) == TAKE_ALL  # with its own parents


def test_nothing_is_taken_over_weights_that_nobody_knows_yet(folder):
    finish(folder)
    change(folder, "dpo", parent_weights={})
    harm_weights(run_of(folder).adapter("sft"), "Weights of sft")
    assert [stage.earlier for stage in make(folder, "name=u").values()] == [None] * 4


def test_both_parents_of_ppo_have_to_be_those_it_was_built_on(folder, run):
    finish(folder)
    run("name=u", until="reward")
    new_weights(folder, "reward")
    change(folder, "ppo", parent_weights=begun(folder, "ppo")["parent_weights"])
    assert tasks(folder) == {"ppo": "train", "dpo": "take"}


def test_what_a_taken_parent_makes_current_is_left_alone(folder, run):
    """Its adapter was lost, and the very same one is found: nothing that was built on it is trained again."""
    finish(folder)
    run("name=u")
    shutil.rmtree(run_of(folder).adapter("sft"))
    plans = make(folder)
    assert states(plans) == {"sft": "missing", "reward": "done", "ppo": "done", "dpo": "done"}
    assert plan.select(list(plans.values()), None, None, []) == [plans["sft"]]
    assert [line.partition(":")[0] for line in run()] == ["sft     is taken from u/sft"]
    assert set(states(make(folder)).values()) == {"done"}


UNFIT = {
    "at work": lambda folder: change(folder, "dpo", state="running", artifact=None),
    "broken off": lambda folder: break_off(folder, "dpo", 3),
    "stopped": lambda folder: change(folder, "dpo", stopped=True),
    "damaged": lambda folder: harm_weights(run_of(folder).adapter("dpo"), "Weights of dpo"),
    "without its weights": lambda folder: (run_of(folder).adapter("dpo") / WEIGHTS).unlink(),
    "without its digests": lambda folder: change(folder, "dpo", artifact_files={}),
    "of unknown parents": lambda folder: change(folder, "dpo", parent_weights={}),
    "of another version": lambda folder: change(folder, "dpo", versions=plan.versions() | {"trl": "0.9.0"}),
    "no record": lambda folder: (run_of(folder).stage("dpo") / "stage.json").unlink(),
    "no JSON": lambda folder: (run_of(folder).stage("dpo") / "stage.json").write_text('{"fingerprint": '),
    "no text": lambda folder: (run_of(folder).stage("dpo") / "stage.json").write_bytes(b"\xff\xfe"),
    "hidden": lambda folder: run_of(folder).stage("dpo").rename(run_of(folder).path / ".new-dpo"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_is_not_whole_or_not_sure_is_passed_over(folder, what):
    finish(folder)
    assert tasks(folder)["dpo"] == "take"
    UNFIT[what](folder)
    assert tasks(folder) == TAKE_ALL | {"dpo": "train"}
    if what == "of another version":
        assert tasks(folder, trust_versions=True) == TAKE_ALL


def test_what_cannot_be_read_is_passed_over(folder, monkeypatch):
    finish(folder)
    (folder / "runs" / "notes.txt").write_text("no run")
    (folder / "runs" / "gone").symlink_to(folder / "nowhere")
    assert tasks(folder) == TAKE_ALL
    real = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "t":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert set(tasks(folder).values()) == {"train"}


def test_what_is_finished_is_taken_from_a_run_that_is_at_work(folder, run):
    finish(folder, "sft", "reward")
    break_off(folder, "dpo", state="running")
    with run_of(folder).locked():
        assert tasks(folder) == {"sft": "take", "reward": "take", "ppo": "train", "dpo": "train"}
        assert len(run("name=u", until="reward")) == 2


def test_files_of_other_results_are_not_looked_at(folder, monkeypatch):
    """Neither where the fingerprint is another one, nor where there is nothing to look for."""
    finish(folder)
    looked_at: list[str] = []
    of_file = FileDigests.of_file
    monkeypatch.setattr(
        FileDigests, "of_file", lambda self, path: (looked_at.append(str(path)), of_file(self, path))[1]
    )
    assert tasks(folder, "ppo.trainer.kl_coef=0.3")["ppo"] == "train"
    assert any("/t/dpo/" in path for path in looked_at) and not any("/t/ppo/" in path for path in looked_at)
    looked_at.clear()
    reads: list[Path] = []
    monkeypatch.setattr(earlier, "read_json", reads.append)
    make(folder)
    assert reads == []
    make(folder, "seed=2")
    assert {path.parent.name for path in reads} == set(STAGES)


def test_the_latest_result_is_taken_and_a_run_s_own_before_others(folder):
    finish(folder)
    change(folder, "sft", finished_at="2026-01-01T00:00:00+00:00")
    for name, time in (("a", "2026-01-02"), ("b", "2026-01-03"), ("c", "2026-01-01")):
        shutil.copytree(run_of(folder).path, folder / "runs" / name)
        record = run_of(folder).record("sft").updated(finished_at=f"{time}T00:00:00+00:00")
        RunDirectory(folder / "runs" / name).write_record("sft", record)
    assert make(folder, "name=u")["sft"].earlier.name == "b/sft"
    aside = RunDirectory(folder / "runs" / "c").set_aside("sft")
    assert make(folder, "name=c")["sft"].earlier.name == f"c/{aside.name}"


def test_what_another_run_has_moved_aside_is_copied(folder, run):
    finish(folder, "sft")
    aside = run_of(folder).set_aside("sft")
    assert run("name=u", until="sft") == [f"sft     is taken from t/{aside.name}"]
    assert (aside / "adapter" / WEIGHTS).is_file()
    assert states(make(folder, "name=u"))["sft"] == "done"


# Judging and gates, by the recipe of now


def test_what_was_judged_otherwise_is_judged_again(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert tasks(folder) == TAKE_ALL
    again = dict.fromkeys(STAGES, "take, judge again") | {"reward": "take"}
    assert tasks(folder, "evaluate.n=5") == again
    change(folder, "sft", judging=None)
    assert tasks(folder)["sft"] == "take, judge again"


def test_the_gates_of_now_count(folder, run):
    """Not those of the run that it is taken from, nor what was decided about them there."""
    finish(folder, state="done, gate closed", error="a gate is closed: train_loss is 1, not < 0.5")
    change(folder, "reward", gates_ignored={"train_loss": "< 0.1"}, state="done", error=None)
    assert tasks(folder) == TAKE_ALL
    gate = "reward.gates={train_loss: '< 0.1'}"
    assert make(folder, "name=u", gate)["ppo"].reason == "waits for reward, whose gate is closed"
    with pytest.raises(RunError, match=r"stage `reward`: a gate is closed: train_loss is 1, not < 0\.1"):
        run("name=u", gate)
    assert states(make(folder, "name=u", gate))["reward"] == "done, gate closed"
    assert run("name=u", gate, ignore_gates=True)[-2:] == [
        f"{name:<7} is taken from t/{name}" for name in ("ppo", "dpo")
    ]
    assert set(states(make(folder, "name=u", gate)).values()) == {"done"}


# Whatever happens in between


def test_killed_at_any_moment_a_stage_is_there_whole_or_not_at_all(folder, run, monkeypatch):
    """Whichever write is the last one: the next run takes it, and all is as if nothing had happened."""
    finish(folder, "sft")
    directory = run_of(folder)
    (directory.stage("sft") / "log.txt").write_text("trained")
    for name in ("copy2", "hardlink_to", "rename", "replace", "mkdir"):
        for count in itertools.count(1):
            left = {"calls": count}
            owner = shutil if name == "copy2" else Path
            real = getattr(owner, name)

            def die(*arguments: Any, real=real, left=left, **options: Any) -> Any:
                left["calls"] -= 1
                if left["calls"] == 0:
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, die)
                try:
                    run("name=u", until="sft")
                    died = False
                except KeyboardInterrupt:
                    died = True
            state = states(make(folder, "name=u"))["sft"]
            assert state in ("missing", "done")
            run("name=u", until="sft")
            assert states(make(folder, "name=u"))["sft"] == "done"
            ours = {name for name in content(folder / "runs" / "u") if not name.endswith(".new")}  # half of a write
            assert ours == {".lock", "recipe.yaml", *(f"sft/{file}" for file in content(directory.stage("sft")))}
            shutil.rmtree(folder / "runs" / "u")
            if not died:
                assert count > 1, f"{name} was never called"
                break


def test_what_goes_away_while_it_is_copied_is_no_result(folder, monkeypatch):
    finish(folder, "sft")
    directory, other = run_of(folder), RunDirectory(folder / "runs" / "u")
    files = directory.record("sft").artifact_files
    assert other.copy_of("sft", directory.path / "gone", files) is None
    real = layout._link

    def move(source: Path, target: Path) -> None:
        real(source, target)
        directory.set_aside("sft")

    (directory.stage("sft") / "log.txt").write_text("trained")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "_link", move)
        assert other.copy_of("sft", directory.stage("sft"), files) is None
    assert list(other.path.iterdir()) == []
    finish(folder, "sft")
    (directory.adapter("sft") / WEIGHTS).write_text("other weights")  # another result has taken its place
    assert other.copy_of("sft", directory.stage("sft"), files) is None
    assert list(other.path.iterdir()) == []


def test_a_full_disk_is_no_reason_to_train(folder, run, monkeypatch):
    finish(folder, "sft")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(RunError, match="is full"):
        run("name=u", until="sft")
    assert [path.name for path in (folder / "runs" / "u").iterdir() if path.is_dir()] == []


def test_plan_and_status_say_what_will_be_taken(folder, monkeypatch, capsys):
    finish(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["rlhf-pipeline", words[0], str(folder / "r.yaml"), "name=u", *words[1:]])
        with contextlib.suppress(SystemExit):
            cli.main()
        return capsys.readouterr().out

    row = said("plan", "ppo.trainer.kl_coef=0.3").splitlines()[1].split()
    assert row[:5] == ["sft", "sft", "base", "missing", "take"]
    assert " ".join(row[5:]) == "has not run yet; to be taken from t/sft"
    stages = json.loads(said("plan", "ppo.trainer.kl_coef=0.3", "--json"))["stages"]
    assert [(stage["will"], stage["will_run"], stage["taken_from"]) for stage in stages] == [
        ("take", False, "t/sft"),
        ("take", False, "t/reward"),
        ("train", True, None),
        ("take", False, "t/dpo"),
    ]
    assert "take" not in said("plan", "--no-reuse")
    assert [stage["taken_from"] for stage in json.loads(said("plan", "--force", "sft", "--json"))["stages"]] == [
        None
    ] * 4
    assert "has not run yet; to be taken from t/sft" in said("status")


def test_a_sweep_takes_from_runs_beside_it_and_they_from_it(folder, run):
    """`runs/t.sweep` holds runs, and lies beside `runs/t`."""
    finish(folder)
    in_sweep = ("name=seed-1", f"output_dir={folder / 'runs' / 't.sweep'}")
    assert run(*in_sweep, "keep_checkpoints=true") == [f"{name:<7} is taken from t/{name}" for name in STAGES]
    shutil.rmtree(folder / "runs" / "t")
    assert make(folder, "name=u")["ppo"].summary()["taken_from"] == "t.sweep/seed-1/ppo"
    beside = ("name=seed-2", in_sweep[1])
    assert make(folder, *beside)["ppo"].summary()["taken_from"] == "t.sweep/seed-1/ppo"
    other = ("name=seed-1", f"output_dir={folder / 'runs' / 'other.sweep'}")
    assert make(folder, *other)["ppo"].summary()["taken_from"] == "t.sweep/seed-1/ppo"
    assert tasks(folder, "output_dir=elsewhere") == dict.fromkeys(STAGES, "train")
