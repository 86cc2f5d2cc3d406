"""Which stages would run, and why: records in a run directory held against a recipe."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import cli, plan, recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.run import to_do
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import WEIGHTS, Progress, RunDirectory
from rlhf_pipeline.rundir.record import Record

RECIPE = """\
name: t
seed: 1
model: {path: base, quantization: none}
lora: {r: 4, target_modules: all-linear}
stages:
  sft: {data: rows.jsonl, trainer: {learning_rate: 1e-3}}
  reward: {data: pairs.jsonl}
  ppo: {data: rows.jsonl}
  dpo: {data: pairs.jsonl}
"""
EVALUATE = "evaluate: {data: rows.jsonl, judge: 'a:b', n: 3}\n"


@pytest.fixture
def folder(tmp_path):
    """A recipe with its data and a model folder; planning reads bytes, and never loads the model."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # a header of nothing
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def make(folder: Path, *overrides: str, **options: bool) -> dict[str, plan.StagePlan]:
    return {stage.name: stage for stage in plan.make(recipe.load(str(folder / "r.yaml"), overrides), **options)}


def states(plans: dict[str, plan.StagePlan]) -> dict[str, str]:
    return {name: stage.state for name, stage in plans.items()}


def run_of(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "runs" / "t")


def begun(folder: Path, name: str) -> dict[str, Any]:
    """The record that the runner starts a stage with."""
    stage = make(folder)[name]
    record = {"name": name, "kind": stage.kind, "state": "running", "fingerprint": stage.fingerprint}
    record |= {"inputs": stage.inputs, "judging": stage.judging, **stage.parents}
    parents = [parent for parent in stage.parents.values() if parent != "base"]
    weights = {parent: (run_of(folder).record(parent) or Record()).weights for parent in parents}
    return record | {"parent_weights": weights, "versions": plan.versions(), "wall_s": 0.0}


def finish(folder: Path, *names: str, **changes: object) -> None:
    """Record stages as the runner does when they are done."""
    directory = run_of(folder)
    for name in names or ("sft", "reward", "ppo", "dpo"):
        adapter = directory.stage(name) / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / WEIGHTS).write_text(f"weights of {name}")
        (adapter / "adapter_config.json").write_text("{}")
        done = {"state": "done", "artifact": f"{name}/adapter", "artifact_files": durable.contents(adapter)}
        done |= {"metrics": {"train_loss": 1.0}, "wall_s": 2.0}
        directory.write_record(name, Record.model_validate(begun(folder, name) | done | changes))


def break_off(folder: Path, name: str, *steps: int, **changes: object) -> Path:
    """Leave a stage as one that ended early after checkpoints at some steps of 9; returns its working folder."""
    directory = run_of(folder)
    shutil.rmtree(directory.stage(name), ignore_errors=True)
    work = directory.work(name)
    work.mkdir(parents=True)
    record = begun(folder, name)
    durable.write_text(work / "job.json", json.dumps({"task": "train", "record": record}))
    directory.write_record(
        name, Record.model_validate(record | {"state": "failed", "error": "it was interrupted"} | changes)
    )
    for step in steps:

        def write(checkpoint: Path, step: int = step) -> None:
            (checkpoint / WEIGHTS).write_text(f"weights of step {step}")
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))

        durable.write_folder(work / f"checkpoint-{step}", write)
    return work


def train(work: Path, *, judged: bool) -> None:
    """Leave in a working folder what there is when training is over, or when nothing is left to do."""
    (work / "adapter").mkdir()
    (work / "adapter" / WEIGHTS).write_text("final weights")
    note = {"metrics": {"train_loss": 1.0}, "files": durable.contents(work / "adapter")}
    durable.write_text(work / "trained.json", json.dumps(note))
    if judged:
        durable.write_text(work / "result.json", json.dumps({"metrics": {"train_loss": 1.0}}))


ALL_DONE = dict.fromkeys(("sft", "reward", "ppo", "dpo"), "done")


def test_a_fresh_run_directory_has_everything_to_do(folder):
    plans = make(folder)
    assert set(states(plans).values()) == {"missing"}
    assert plans["sft"].reason == "has not run yet"
    assert not (folder / "runs").exists()


def test_what_is_recorded_with_the_same_inputs_is_done(folder):
    finish(folder)
    plans = make(folder)
    assert states(plans) == ALL_DONE
    assert plan.select(list(plans.values()), None, None, []) == []


@pytest.mark.parametrize(
    ("override", "stage", "reason", "others"),
    [
        ("sft.trainer.learning_rate=0.002", "sft", "trainer.learning_rate 0.001 → 0.002", {"reward", "ppo", "dpo"}),
        ("reward.trainer.max_steps=5", "reward", "trainer.max_steps default → 5", {"ppo"}),
        ("ppo.trainer.kl_coef=0.3", "ppo", "trainer.kl_coef default → 0.3", set()),
        ("dpo.data.eval_fraction=0.5", "dpo", "data.eval_fraction default → 0.5", set()),
        ("seed=2", "sft", "seed 1 → 2", {"reward", "ppo", "dpo"}),
        ("model.quantization=nf4", "sft", "model.quantization none → nf4", {"reward", "ppo", "dpo"}),
        ("model.attention=eager", "sft", "model.attention default → eager", {"reward", "ppo", "dpo"}),
        ("lora.r=8", "sft", "lora.r 4 → 8", {"reward", "ppo", "dpo"}),
        ("reward.lora.r=8", "reward", "lora.r 4 → 8", {"ppo"}),
        ("dpo.lora.r=8", "dpo", "lora.r 4 → 8", set()),
        ("sft.lora.lora_alpha=3", "sft", "lora.lora_alpha default → 3", {"reward", "ppo", "dpo"}),
    ],
)
def test_a_changed_setting_makes_its_stage_stale_and_what_depends_on_it(folder, override, stage, reason, others):
    finish(folder)
    plans = make(folder, override)
    assert {name for name, state in states(plans).items() if state == "stale"} == {stage} | others
    assert set(states(plans).values()) <= {"done", "stale"}
    assert reason in plans[stage].reason.split("; ")
    for name in others:
        assert plans[name].reason


def test_a_shape_said_twice_is_the_same_shape(folder):
    """What counts is the adapter that comes out, not where its keys were written."""
    finish(folder)
    assert states(make(folder, "dpo.lora.r=4", "sft.lora={target_modules: all-linear}")) == ALL_DONE
    assert states(make(folder, "lora.r=2", "sft.lora.r=4")) == ALL_DONE


def test_the_reason_names_the_parent_whose_change_it_is(folder):
    finish(folder)
    plans = make(folder, "reward.trainer.max_steps=5")
    assert plans["ppo"].reason == "reward changed"
    assert make(folder, "sft.trainer.max_steps=5")["dpo"].reason == "sft changed"


def test_another_parent_is_told_from_a_parent_that_changed(folder):
    finish(folder)
    dpo = make(folder, "dpo.init=base")["dpo"]
    assert (dpo.state, dpo.reason) == ("stale", "init sft → base")


@pytest.mark.parametrize(
    "override",
    [
        "sft.trainer.logging_steps=3",
        "sft.trainer.dataloader_num_workers=2",
        "ppo.trainer.logging_steps=3",
        "ppo.trainer.num_sample_generations=2",
        "ppo.trainer.save_steps=3",
        "ppo.trainer.save_total_limit=1",
        "sft.trainer.save_steps=3",
        "dpo.trainer.save_strategy=epoch",
        "reward.trainer.save_total_limit=1",
        "dpo.trainer.logging_first_step=true",
        "reward.trainer.log_level=debug",
        "dpo.trainer.gradient_checkpointing=false",
    ],
)
def test_how_often_things_are_logged_changes_nothing(folder, override):
    finish(folder)
    assert states(make(folder, override)) == ALL_DONE


def test_where_the_run_is_does_not_enter_the_fingerprint(folder):
    before = {name: stage.fingerprint for name, stage in make(folder).items()}
    after = {name: stage.fingerprint for name, stage in make(folder, "output_dir=elsewhere", "name=u").items()}
    assert before == after


def test_the_content_of_data_counts_and_not_its_time(folder):
    finish(folder)
    os.utime(folder / "pairs.jsonl", (1, 1))
    assert states(make(folder)) == ALL_DONE
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "B", "rejected": "c"}\n')
    plans = make(folder)
    assert states(plans) == {"sft": "done", "reward": "stale", "ppo": "stale", "dpo": "stale"}
    assert plans["dpo"].reason.startswith("data changed: pairs.jsonl (")
    assert " → pairs.jsonl (" in plans["dpo"].reason


def test_demonstrations_for_ppo_count_by_their_content(folder):
    (folder / "shown.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert (
        make(folder, "ppo.trainer.ptx_coef=0.1", "ppo.ptx_data=rows.jsonl")["ppo"]
        .inputs["ptx_data"]
        .startswith("rows.jsonl@")
    )
    assert "ptx_data" not in make(folder)["ppo"].inputs
    first = make(folder, "ppo.trainer.ptx_coef=0.1", "ppo.ptx_data=shown.jsonl")["ppo"].fingerprint
    (folder / "shown.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    second = make(folder, "ppo.trainer.ptx_coef=0.1", "ppo.ptx_data=shown.jsonl")["ppo"].fingerprint
    shorter = make(folder, "ppo.trainer.ptx_coef=0.1", "ppo.ptx_data={path: shown.jsonl, max_completion_length: 3}")[
        "ppo"
    ].fingerprint
    assert len({first, second, shorter, make(folder)["ppo"].fingerprint}) == 4


def test_members_count_where_there_are_some(folder):
    alone = make(folder)["reward"]
    assert not {"members", "bootstrap"} & alone.inputs.keys()
    prints = {
        make(folder, *overrides)["reward"].fingerprint
        for overrides in (["reward.members=2"], ["reward.members=3"], ["reward.members=3", "reward.bootstrap=true"])
    }
    assert len(prints | {alone.fingerprint}) == 4
    assert make(folder, "reward.members=null", "reward.bootstrap=false")["reward"].fingerprint == alone.fingerprint


def test_the_same_content_under_another_folder_is_the_same_data(folder):
    finish(folder)
    (folder / "moved").mkdir()
    (folder / "pairs.jsonl").rename(folder / "moved" / "pairs.jsonl")
    text = RECIPE.replace("pairs.jsonl", "moved/pairs.jsonl")
    (folder / "r.yaml").write_text(text)
    assert states(make(folder)) == ALL_DONE


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_content_of_the_model_counts_for_every_stage(folder, file):
    finish(folder)
    os.utime(folder / "base" / "config.json", (1, 1))
    assert states(make(folder)) == ALL_DONE
    (folder / "base" / file).write_bytes(b"\x03" + bytes(7) + b"{ }")  # as weights, a header of nothing too
    plans = make(folder)
    assert set(states(plans).values()) == {"stale"}
    assert plans["sft"].reason.startswith("model changed: base (")


def test_the_content_of_the_chat_template_counts(folder):
    (folder / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    finish(folder)
    assert set(states(make(folder, "model.chat_template=chat.jinja")).values()) == {"stale"}
    before = {name: stage.fingerprint for name, stage in make(folder, "model.chat_template=chat.jinja").items()}
    (folder / "chat.jinja").write_text("{{ messages[-1]['content'] }}")
    after = {name: stage.fingerprint for name, stage in make(folder, "model.chat_template=chat.jinja").items()}
    assert not set(before.values()) & set(after.values())


def test_what_the_chat_template_is_told_counts(folder):
    finish(folder)
    plans = make(folder, "model.chat_template_kwargs={enable_thinking: false}")
    assert set(states(plans).values()) == {"stale"}
    assert plans["sft"].reason.startswith("model.chat_template_kwargs.enable_thinking")


@pytest.mark.parametrize(
    "changed",
    [
        "{mix: [{path: pairs.jsonl, weight: 3}, {path: more.jsonl, weight: 1}]}",
        "{mix: [{path: more.jsonl, weight: 1}, {path: pairs.jsonl, weight: 1}]}",
        "{mix: [{path: pairs.jsonl, weight: 1}, {path: more.jsonl, weight: 1, limit: 1}]}",
        "{mix: [{path: pairs.jsonl, weight: 1}, {path: other.jsonl, weight: 1}]}",
        "{mix: [{path: pairs.jsonl, weight: 1}, {path: more.jsonl, weight: 1}], eval_data: pairs.jsonl}",
        "{mix: [{path: pairs.jsonl, weight: 1}, {path: more.jsonl, weight: 1}], max_prompt_length: 9, too_long: drop}",
    ],
)
def test_every_part_of_a_mix_counts(folder, changed):
    for name in ("more", "other"):
        (folder / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "chosen": "b", "rejected": "c"}}\n')
    mix = "dpo.data={mix: [{path: pairs.jsonl, weight: 1}, {path: more.jsonl, weight: 1}]}"
    assert make(folder, mix)["dpo"].fingerprint != make(folder, f"dpo.data={changed}")["dpo"].fingerprint


def test_the_content_of_eval_data_counts(folder):
    held_out = "dpo.data={path: pairs.jsonl, eval_data: held_out.jsonl}"
    (folder / "held_out.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    before = make(folder, held_out)["dpo"].fingerprint
    (folder / "held_out.jsonl").write_text('{"prompt": "z", "chosen": "b", "rejected": "c"}\n')
    assert make(folder, held_out)["dpo"].fingerprint != before


def test_what_is_as_by_default_makes_no_difference(folder):
    """So that a key which a later version adds leaves former results as they are."""
    said = "dpo.data={path: pairs.jsonl, split: train, eval_fraction: 0.0, too_long: cut}"
    assert make(folder, said)["dpo"].fingerprint == make(folder)["dpo"].fingerprint
    assert [key for key in make(folder)["dpo"].inputs if key.startswith("data")] == ["data"]


def test_which_turns_are_learned_counts(folder):
    last, every = (make(folder, f"sft.data.loss={loss}")["sft"] for loss in ("last", "all"))
    assert last.fingerprint == make(folder)["sft"].fingerprint != every.fingerprint
    assert every.inputs.keys() - last.inputs.keys() == {"data.loss"}


def shapes(folder: Path, *overrides: str) -> dict[str, list[tuple[str, str, str | None]]]:
    """For each stage the key, the file's name and what its rows are read as."""
    found = plan.shapes(recipe.load(str(folder / "r.yaml"), overrides))
    return {
        stage: [(one["key"], Path(one["path"]).name, (one["shape"] or "").partition(":")[0] or None) for one in sources]
        for stage, sources in found.items()
    }


def test_the_shape_of_every_source_is_said(folder):
    (folder / "asked.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    found = shapes(folder, "sft.data=[rows.jsonl, {path: asked.jsonl}]", "dpo.data.eval_data=pairs.jsonl",
                   "ppo.ptx_data=asked.jsonl", "ppo.trainer.ptx_coef=0.1")  # fmt: skip
    pairs = "prompt/chosen/rejected"
    assert found == {
        "sft": [("data", "rows.jsonl", "prompt/completion"), ("data", "asked.jsonl", "question/answer")],
        "reward": [("data", "pairs.jsonl", pairs)],
        "ppo": [("data", "rows.jsonl", "prompt"), ("ptx_data", "asked.jsonl", "question/answer")],
        "dpo": [("data", "pairs.jsonl", pairs), ("data.eval_data", "pairs.jsonl", pairs)],
    }


def test_the_shape_of_a_hub_dataset_is_not_known_yet(folder):
    assert shapes(folder, "sft.data=nobody/nothing")["sft"] == [("data", "nothing", None)]


def test_all_data_that_do_not_fit_their_stage_are_refused_at_once(folder):
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError) as caught:
        shapes(folder, "reward.data=rows.jsonl", "dpo.data=rows.jsonl", "ppo.data=empty.jsonl")
    places = ["override `reward.data=rows.jsonl`", str(folder / "empty.jsonl"), "override `dpo.data=rows.jsonl`"]
    assert [one.place for one in caught.value.all] == places
    assert caught.value.all[0].message.startswith(f"{folder / 'rows.jsonl'}: the columns (")


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def test_planning_writes_nothing(folder):
    """Neither in a folder without a run, nor where every state is to be seen."""
    before = everything_in(folder)
    make(folder)
    assert everything_in(folder) == before
    finish(folder)
    (break_off(folder, "reward", 3, 6) / "checkpoint-6" / WEIGHTS).write_text("?")
    (run_of(folder).stage("dpo") / "stage.json").write_text("{")
    before = everything_in(folder)
    assert set(states(make(folder)).values()) == {"done", "partial", "blocked", "failed"}
    assert set(states(make(folder, "seed=2")).values()) == {"stale", "failed"}
    assert everything_in(folder) == before


def test_a_failed_stage_blocks_what_needs_it_and_nothing_else(folder):
    finish(folder)
    break_off(folder, "reward", error="RuntimeError: out of memory")
    plans = make(folder)
    assert states(plans) == {"sft": "done", "reward": "failed", "ppo": "blocked", "dpo": "done"}
    assert plans["reward"].reason == "RuntimeError: out of memory"
    assert plans["ppo"].reason == "waits for reward"


def test_being_blocked_is_passed_on(folder):
    finish(folder)
    break_off(folder, "sft")
    assert states(make(folder)) == {"sft": "failed", "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert make(folder)["ppo"].reason == "waits for sft and reward"


def test_a_stage_that_never_ran_waits_as_well(folder):
    finish(folder, "sft", "reward")
    break_off(folder, "sft", 3)
    assert states(make(folder)) == {"sft": "partial", "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert make(folder)["dpo"].reason == "waits for sft"


def test_a_running_stage_runs_only_while_the_lock_is_held(folder):
    break_off(folder, "sft", state="running", error=None)
    with run_of(folder).locked():
        sft = make(folder)["sft"]
        assert (sft.state, sft.reason) == ("running", "at work now")
        assert make(folder, at_work=False)["sft"].state == "failed"
    left = make(folder)["sft"]
    assert (left.state, left.reason) == ("failed", "the run ended before the stage did")
    assert make(folder, at_work=True)["sft"].state == "running"


# The artifact


def harm_weights(adapter: Path, content: str) -> None:
    """Other bytes with the same times, as a disk that forgets would have it."""
    stamps = (adapter / WEIGHTS).stat()
    (adapter / WEIGHTS).write_text(content)
    os.utime(adapter / WEIGHTS, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "state", "reason"),
    [
        (lambda adapter: (adapter / WEIGHTS).unlink(), "missing", "its adapter is gone"),
        (lambda adapter: shutil.rmtree(adapter), "missing", "adapter_config.json is gone"),
        (
            lambda adapter: (adapter / "adapter_config.json").unlink(),
            "missing",
            "its adapter/adapter_config.json is gone",
        ),
        (
            lambda adapter: harm_weights(adapter, "WEIGHTS of sft"),
            "stale",
            f"its adapter/{WEIGHTS} is not what the stage wrote",
        ),
        (
            lambda adapter: harm_weights(adapter, "weights"),
            "stale",
            f"its adapter/{WEIGHTS} is not what the stage wrote",
        ),
        (
            lambda adapter: (adapter / "adapter_config.json").write_text("[]"),
            "stale",
            "its adapter/adapter_config.json is not what the stage wrote",
        ),
    ],
    ids=["no weights", "no adapter", "no configuration", "other weights", "truncated", "other configuration"],
)
def test_a_stage_whose_adapter_is_not_what_it_made_has_to_run_and_its_dependants_too(folder, harm, state, reason):
    finish(folder)
    harm(run_of(folder).stage("sft") / "adapter")
    plans = make(folder)
    assert states(plans) == {"sft": state, "reward": "stale", "ppo": "stale", "dpo": "stale"}
    assert plans["sft"].reason.endswith(reason)
    assert plans["dpo"].reason == "sft will run again"
    assert plans["ppo"].reason == "sft and reward will run again"


def test_a_parent_of_other_weights_makes_a_stage_stale(folder):
    """Its inputs are the same, but it was trained anew, and the same again only to the last bit of its sums."""
    finish(folder)
    adapter = run_of(folder).stage("sft") / "adapter"
    (adapter / WEIGHTS).write_text("other weights of sft")
    record = run_of(folder).record("sft")
    run_of(folder).write_record("sft", record.updated(artifact_files=durable.contents(adapter)))
    plans = make(folder)
    assert states(plans) == {"sft": "done", "reward": "stale", "ppo": "stale", "dpo": "stale"}
    assert plans["reward"].reason == plans["dpo"].reason == "sft ran again"
    finish(folder, "reward")
    assert make(folder)["ppo"].reason == "sft ran again"
    finish(folder, "ppo", "dpo")
    assert states(make(folder)) == ALL_DONE


def test_a_stage_that_broke_off_does_not_go_on_over_a_parent_of_other_weights(folder):
    finish(folder, "sft")
    break_off(folder, "dpo", 3)
    assert make(folder)["dpo"].state == "partial"
    adapter = run_of(folder).stage("sft") / "adapter"
    (adapter / WEIGHTS).write_text("other weights of sft")
    record = run_of(folder).record("sft")
    run_of(folder).write_record("sft", record.updated(artifact_files=durable.contents(adapter)))
    dpo = make(folder)["dpo"]
    assert (dpo.state, dpo.progress) == ("stale", None)
    assert dpo.reason.startswith("sft ran again")


# The libraries


def made_with(folder: Path, *names: str, key: str = "versions", **versions: str) -> None:
    """Have records name other versions of some libraries; `_` stands for `-`."""
    for name in names:
        record = run_of(folder).record(name)
        made = plan.versions() | {library.replace("_", "-"): version for library, version in versions.items()}
        run_of(folder).write_record(name, record.updated(**{key: made}))


@pytest.fixture
def installed(monkeypatch) -> Callable[..., None]:
    """A function that says which versions are installed, whatever is."""

    def install(**versions: str) -> None:
        real = importlib.metadata.version
        fake = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: fake.get(name) or real(name))
        monkeypatch.setattr(plan, "_version", plan._version.__wrapped__)

    return install


@pytest.mark.parametrize(
    ("library", "then", "now", "counts"),
    [
        ("trl", "1.12.0", "1.16.0", True),
        ("trl", "1.16.0", "2.16.0", True),
        ("trl", "1.16.0", "1.16.1", False),
        ("trl", "1.16.1", "1.16.1+local", False),
        ("torch", "2.13.0", "2.14.0", True),
        ("torch", "2.13.0+cpu", "2.13.1", False),
        ("torch", "2.13.0+cpu", "2.13.0+cu130", False),
        ("accelerate", "1.9.0", "1.9.1", False),
        ("accelerate", "1.9.0", "1.10.0", True),
        ("transformers", "5.1.0", "6.1.0", True),
        ("peft", "0.18.0", "0.19.0", True),
        ("peft", "0.18.0", "0.18.1", False),
        ("bitsandbytes", "0.48.0", "0.49.0", True),
        ("bitsandbytes", "not installed", "0.49.0", True),
        ("rlhf_pipeline", "0.1.0", "0.2.0", True),
        ("rlhf_pipeline", "0.1.0", "0.1.1", False),
        ("datasets", "3.0.0", "4.0.0", False),
    ],
)
def test_another_version_of_what_trains_is_a_reason(folder, installed, library, then, now, counts):
    installed(**{library: now})
    finish(folder)
    made_with(folder, "dpo", **{library: then})
    dpo = make(folder)["dpo"]
    assert (dpo.state, dpo.reason) == (
        ("stale", f"{library.replace('_', '-')} {then} → {now}") if counts else ("done", "up to date")
    )
    assert states(make(folder, trust_versions=True)) == ALL_DONE


def test_versions_that_were_said_to_do_as_well_count_in_place_of_those_it_was_made_with(folder, installed):
    installed(trl="1.16.0")
    finish(folder)
    made_with(folder, "sft", trl="1.12.0")
    assert states(make(folder))["sft"] == "stale"
    made_with(folder, "sft", key="trusted_versions", trl="1.16.2")
    assert states(make(folder)) == ALL_DONE
    made_with(folder, "sft", key="trusted_versions", trl="1.15.1")
    assert make(folder)["sft"].reason == "trl 1.15.1 → 1.16.0"


def test_a_record_without_versions_stands(folder):
    finish(folder, versions=None)
    assert states(make(folder)) == ALL_DONE


def test_a_stage_that_broke_off_under_other_versions_starts_over_unless_they_are_trusted(folder, installed):
    installed(torch="2.14.0")
    break_off(folder, "sft", 3)
    made_with(folder, "sft", torch="2.13.0")
    sft = make(folder)["sft"]
    assert (sft.state, sft.reason) == ("stale", "torch 2.13.0 → 2.14.0; before that, it was interrupted")
    assert make(folder, trust_versions=True)["sft"].state == "partial"


# Gates

CLOSED = "done, gate closed"
GATED = RECIPE.replace(
    "learning_rate: 1e-3}}", "learning_rate: 1e-3, logging_steps: 1}, gates: {train_loss: '<= 0.5', loss: '> 0'}}"
)


@pytest.fixture
def gated(folder):
    """All stages done, the first with a loss that its gate does not let pass."""
    (folder / "r.yaml").write_text(GATED)
    finish(folder, metrics={"train_loss": 1.0, "loss": 1.0})
    return folder


def test_a_closed_gate_blocks_what_needs_the_stage(gated):
    plans = make(gated)
    assert states(plans) == {"sft": CLOSED, "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert plans["sft"].reason == "train_loss is 1, not <= 0.5"
    assert all(stage.is_current for stage in plans.values())  # nothing has to be trained
    assert plans["dpo"].reason == "waits for sft, whose gate is closed"
    assert plans["ppo"].reason == "waits for sft, whose gate is closed"
    break_off(gated, "dpo", 3)
    assert (make(gated)["dpo"].state, make(gated)["dpo"].is_current) == ("blocked", False)
    assert make(gated, ignore_gates=True)["dpo"].state == "partial"


@pytest.mark.parametrize(("bound", "state"), [("<= 1.0", "done"), ("<= 2", "done"), ("< 1", "done, gate closed")])
def test_another_bound_opens_it_or_not(gated, bound, state):
    plans = make(gated, f"sft.gates.train_loss='{bound}'")
    assert plans["sft"].state == state
    assert set(states(plans).values()) == ({"done"} if state == "done" else {CLOSED, "blocked"})


def test_a_gate_that_came_later_counts(folder):
    finish(folder, metrics={"train_loss": 1.0})
    assert states(make(folder)) == ALL_DONE
    plans = make(folder, "reward.gates={train_loss: '< 0.5'}")
    assert states(plans) == {"sft": "done", "reward": CLOSED, "ppo": "blocked", "dpo": "done"}


def test_a_gate_can_be_ignored(gated):
    plans = make(gated, ignore_gates=True)
    assert states(plans) == ALL_DONE
    assert plans["sft"].reason == "gates ignored: train_loss is 1, not <= 0.5"
    assert plans["dpo"].reason == "up to date"


def test_a_gate_that_was_ignored_stays_so_for_its_bound_alone(gated):
    record = run_of(gated).record("sft")
    run_of(gated).write_record("sft", record.updated(gates_ignored={"train_loss": "<= 0.5"}))
    plans = make(gated)
    assert states(plans) == ALL_DONE
    assert plans["sft"].reason == "gates ignored: train_loss is 1, not <= 0.5"
    assert make(gated, "sft.gates.train_loss='<= 0.4'")["sft"].state == CLOSED
    assert make(gated, "sft.gates.loss='> 3'")["sft"].state == CLOSED  # another one was not ignored
    assert make(gated, "sft.gates.train_loss='<= 3'")["sft"].reason == "up to date"


def test_a_gate_does_not_hide_that_a_stage_is_stale(gated):
    assert states(make(gated, "seed=2"))["sft"] == "stale"
    assert states(make(gated, "seed=2", ignore_gates=True))["sft"] == "stale"


# Where a stage that was interrupted goes on


def test_a_stage_resumes_from_its_newest_checkpoint(folder):
    break_off(folder, "sft", 3, 6)
    plans = make(folder)
    assert states(plans) == {"sft": "partial", "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert plans["sft"].reason == "it was interrupted; resumes from step 6 of 9"
    assert plans["sft"].progress == Progress("checkpoint", 6, 9)
    assert plans["sft"].summary()["step"] == 6
    assert not plans["sft"].is_current
    run_of(folder).write_record("sft", run_of(folder).record("sft").updated(state="running", error=None))
    assert make(folder)["sft"].reason == "the run ended before the stage did; resumes from step 6 of 9"


DAMAGES = {
    "truncated": (lambda checkpoint: os.truncate(checkpoint / WEIGHTS, 3), f"{WEIGHTS} has 3 bytes, not 17"),
    "one bit": (
        lambda checkpoint: (checkpoint / WEIGHTS).write_text("weights of step 7"),
        f"{WEIGHTS} has other content than was written",
    ),
    "a file is gone": (lambda checkpoint: (checkpoint / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no manifest": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest without JSON": (
        lambda checkpoint: (checkpoint / "manifest.json").write_text("{"),
        "manifest.json cannot be read: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(folder, damage):
    harm, said = DAMAGES[damage]
    work = break_off(folder, "sft", 3, 6)
    harm(work / "checkpoint-6")
    sft = make(folder)["sft"]
    assert sft.state == "partial"
    assert sft.reason.startswith(f"it was interrupted; resumes from step 3 of 9; checkpoint-6 is damaged: {said}")
    assert sft.progress.step == 3 and list(sft.progress.damaged) == ["checkpoint-6"]
    harm(work / "checkpoint-3")
    sft = make(folder)["sft"]
    assert (sft.state, sft.progress) == ("failed", None)
    assert (
        sft.reason.startswith("it was interrupted; checkpoint-6 is damaged: ")
        and "checkpoint-3 is damaged: " in sft.reason
    )


@pytest.mark.parametrize(("judged", "said"), [(False, "trained, to be judged"), (True, "trained, to be published")])
def test_a_stage_that_is_trained_is_not_trained_again(folder, judged, said):
    work = break_off(folder, "sft", 9)
    train(work, judged=judged)
    sft = make(folder)["sft"]
    assert (sft.state, sft.reason) == ("partial", f"it was interrupted; {said}")
    assert sft.summary()["step"] is None
    if judged:
        (work / "adapter").rename(run_of(folder).stage("sft") / "adapter")  # killed before the record was written
        assert make(folder)["sft"].reason == f"it was interrupted; {said}"
    else:
        (work / "adapter" / WEIGHTS).write_text("final weightz")
        assert make(folder)["sft"].reason == "it was interrupted; resumes from step 9 of 9"


def test_a_stage_whose_settings_changed_meanwhile_starts_over(folder):
    break_off(folder, "sft", 3)
    sft = make(folder, "sft.trainer.learning_rate=0.002")["sft"]
    assert (sft.state, sft.progress) == ("stale", None)
    assert sft.reason == "trainer.learning_rate 0.001 → 0.002; before that, it was interrupted"
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert make(folder)["sft"].reason.startswith("data changed: rows.jsonl (")


def test_a_stage_whose_parent_will_run_again_starts_over(folder):
    finish(folder, "sft")
    break_off(folder, "dpo", 3)
    dpo = make(folder, "sft.trainer.learning_rate=0.002")["dpo"]
    assert (dpo.state, dpo.progress) == ("stale", None)
    assert dpo.reason == "sft changed; sft will run again; before that, it was interrupted"


SPOILT = ["", "{", "[]", '{"state": "don']


@pytest.mark.parametrize("text", SPOILT)
def test_a_spoilt_record_of_a_stage_that_broke_off_costs_nothing(folder, text):
    break_off(folder, "sft", 3)
    (run_of(folder).stage("sft") / "stage.json").write_text(text)
    sft = make(folder)["sft"]
    assert (sft.state, sft.reason) == ("partial", "the run ended before the stage did; resumes from step 3 of 9")
    assert sft.record == Record.model_validate(begun(folder, "sft"))
    assert make(folder, "seed=2")["sft"].state == "stale"


@pytest.mark.parametrize("text", SPOILT)
def test_a_spoilt_record_of_a_finished_stage_says_so(folder, text):
    finish(folder)
    (run_of(folder).stage("sft") / "stage.json").write_text(text)
    plans = make(folder)
    assert states(plans) == {"sft": "failed", "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert plans["sft"].reason.startswith(
        "stage.json " + ("holds no record but list" if text == "[]" else "cannot be read: ")
    )
    assert (run_of(folder).stage("sft") / "adapter" / WEIGHTS).is_file()


# Judging


def test_a_changed_evaluation_judges_again_and_trains_nothing(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not any(stage.needs_judging for stage in make(folder).values())
    plans = make(folder, "evaluate.n=5")
    judged = dict.fromkeys(("sft", "ppo", "dpo"), "done, to be judged again")
    assert states(plans) == judged | {"reward": "done"}
    assert {name for name, stage in plans.items() if stage.needs_judging} == {"sft", "ppo", "dpo"}
    assert plans["dpo"].reason == "evaluate.n 3 → 5"
    assert plan.select(list(plans.values()), None, None, []) == []


def test_how_many_are_judged_at_once_changes_nothing(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not any(stage.needs_judging for stage in make(folder, "evaluate.batch_size=1").values())


def test_a_stage_that_trains_anyway_is_not_judged_apart(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not make(folder, "evaluate.n=5", "dpo.trainer.beta=0.5")["dpo"].needs_judging


def chosen(folder: Path, *overrides: str, **options: object) -> list[str]:
    settings = {"until": None, "only": None, "force": []} | options
    return [stage.name for stage in plan.select(list(make(folder, *overrides).values()), **settings)]


def test_select_until_stops_after_the_stage(folder):
    assert chosen(folder, until="reward") == ["sft", "reward"]
    finish(folder, "sft")
    assert chosen(folder, until="reward") == ["reward"]


def test_select_force_takes_a_done_stage_and_its_dependants(folder):
    finish(folder)
    assert chosen(folder, force=["reward"]) == ["reward", "ppo"]
    assert chosen(folder, force=["dpo"]) == ["dpo"]
    assert chosen(folder, force=["sft"], until="reward") == ["sft", "reward"]


def test_select_only_takes_one_stage_if_what_it_needs_is_done(folder):
    finish(folder, "sft")
    assert chosen(folder, only="dpo") == ["dpo"]
    with pytest.raises(InputError, match="`ppo` needs `reward`, which is missing") as caught:
        chosen(folder, only="ppo")
    assert caught.value.hint == "run `--until ppo` instead"
    finish(folder)
    assert chosen(folder, only="dpo") == []
    assert chosen(folder, only="dpo", force=["dpo"]) == ["dpo"]


@pytest.mark.parametrize(("option", "value"), [("until", "spt"), ("only", "spt"), ("force", ["sft", "spt"])])
def test_select_refuses_a_name_that_is_no_stage(folder, option, value):
    with pytest.raises(InputError, match="no stage `spt`") as caught:
        chosen(folder, **{option: value})
    assert caught.value.place == f"--{option}"
    assert "sft, reward, ppo, dpo" in caught.value.hint


def test_a_blocked_stage_runs_with_the_failed_one_it_waits_for(folder):
    finish(folder)
    break_off(folder, "reward")
    assert chosen(folder) == ["reward", "ppo"]
    break_off(folder, "reward", 3)
    assert chosen(folder) == ["reward", "ppo"]


def test_a_closed_gate_ends_the_run_unless_its_stage_is_forced(gated):
    """Nothing behind it is trained, though the stage itself has nothing to do."""
    assert chosen(gated) == []
    assert chosen(gated, force=["sft"]) == ["sft", "reward", "ppo", "dpo"]
    assert chosen(gated, force=["dpo"]) == []
    with pytest.raises(InputError, match="`dpo` needs `sft`, which is done, gate closed") as caught:
        chosen(gated, only="dpo")
    assert "--ignore-gates" in str(caught.value.hint)


LEFT_BY_A_KILL = "work/ is left"


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ((), {}, {}),
        (("evaluate.n=5",), {}, dict.fromkeys(("sft", "ppo", "dpo"), "judge again")),
        (("evaluate.n=5",), {"only": "dpo"}, {"dpo": "judge again"}),
        (("evaluate.n=5", "dpo.trainer.beta=0.5"), {"until": "reward"}, {"sft": "judge again"}),
        (("evaluate.n=5", "dpo.trainer.beta=0.5"), {"only": "dpo"}, {"dpo": "train"}),
        (("dpo.gates={train_loss: '< 2'}",), {}, {"dpo": "update record"}),
        (("reward.gates={train_loss: '< 1'}",), {}, {"reward": "stop: gate closed"}),
        (("reward.gates={train_loss: '< 1'}", "dpo.gates={train_loss: '< 2'}"), {}, {"reward": "stop: gate closed"}),
        (("reward.gates={train_loss: '< 1'}",), {"only": "dpo"}, {}),
        (("reward.gates={train_loss: '< 1'}",), {"ignore_gates": True}, {"reward": "update record"}),
        (("seed=2", "reward.gates={train_loss: '< 1'}"), {}, dict.fromkeys(ALL_DONE, "train")),
        ((), {"force": ["reward"]}, {"reward": "train", "ppo": "train"}),
        ((LEFT_BY_A_KILL,), {}, {"ppo": "remove checkpoints"}),
        ((LEFT_BY_A_KILL, "keep_checkpoints=true"), {}, {}),
    ],
)
def test_plan_run_and_status_agree_on_what_is_to_do(folder, overrides, options, expected, monkeypatch, capsys):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    if LEFT_BY_A_KILL in overrides:
        run_of(folder).work("ppo").mkdir()
    overrides = [one for one in overrides if one != LEFT_BY_A_KILL]
    loaded = recipe.load(str(folder / "r.yaml"), overrides)
    plans = plan.make(loaded, ignore_gates=options.get("ignore_gates", False))
    found = to_do.find(loaded, plans, **options)
    assert found.stages == expected
    assert found.compares == ("stop: gate closed" not in expected.values())  # there is no comparison yet

    def command(name: str, *more: str) -> int:
        monkeypatch.setattr("sys.argv", ["rlhf-pipeline", name, str(folder / "r.yaml"), *overrides, *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    given = [
        "--ignore-gates" if name is True else f"--{option}={name}"
        for option, names in options.items()
        for name in (names if isinstance(names, list) else [names])
    ]
    assert command("plan", "--json", *given) == 0
    shown = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert {name: stage["will"] for name, stage in shown.items() if stage["will"]} == expected
    assert {name for name, stage in shown.items() if stage["will_run"]} == {
        name for name, task in expected.items() if task in ("train", "judge again")
    }
    quiet = command("status", "-q")
    capsys.readouterr()
    command("status", "--json")
    words = {stage["state"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert quiet == (words != {"done"})
    if not options:
        assert quiet == any(task not in ("update record", "remove checkpoints") for task in expected.values())


def test_only_what_is_true_of_the_present_is_shown(folder):
    finish(folder)
    shown = make(folder)["sft"].summary()
    assert (shown["metrics"], shown["wall_s"], shown["state"]) == ({"train_loss": 1.0}, 2.0, "done")
    assert (shown["step"], shown["artifact"]) == (None, "sft/adapter")
    break_off(folder, "sft", wall_s=3.0)
    shown = make(folder)["sft"].summary()
    assert (shown["metrics"], shown["wall_s"], shown["state"]) == ({}, None, "failed")
    json.dumps(shown)  # as `plan --json` prints it


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_can_be_planned(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(name, [f"output_dir={tmp_path}"])
    plans = plan.make(loaded)
    assert [stage.name for stage in plans] == list(loaded.stages)
    assert plan.select(plans, None, None, []) == plans
    assert len({stage.fingerprint for stage in plans}) == len(plans)


def test_a_stage_that_makes_rows_is_not_said_to_train(tmp_path: Path) -> None:
    stages = "sft: {data: tiny:demonstrations}\n  candidates: {kind: sample, data: tiny:prompts}"
    (tmp_path / "r.yaml").write_text(f"model: {{path: tiny, quantization: none}}\nstages:\n  {stages}\n")
    loaded = recipe.load(str(tmp_path / "r.yaml"))
    found = to_do.find(loaded, plan.make(loaded))
    assert found.stages == {"sft": "train", "candidates": "make rows"}


def test_a_product_of_rows_and_processes_is_not_shown_as_what_somebody_wrote(folder):
    """Done by two processes of 4 rows each, then planned for one, with `launch` and without it."""
    text = (folder / "r.yaml").read_text().replace("learning_rate: 1e-3", "per_device_train_batch_size: 4")
    (folder / "r.yaml").write_text(text + "launch: {num_processes: 2, use_cpu: true}\n")
    finish(folder, "sft", machine={"processes": 2})
    said = "rows at once of all processes 8 → 4"
    assert make(folder, "launch.num_processes=1")["sft"].reason == said
    (folder / "r.yaml").write_text(text)
    assert make(folder)["sft"].reason == said
    finish(folder, "sft")
    assert make(folder, "sft.trainer.per_device_train_batch_size=8")["sft"].reason == (
        "trainer.per_device_train_batch_size 4 → 8"
    )
