"""Which stages would run, and why: records in a run directory held against a recipe."""

import json
import os
from pathlib import Path

import pytest

from rlhf_pipeline import plan, recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.run.directory import RunDirectory

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
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def make(folder: Path, *overrides: str) -> dict[str, plan.StagePlan]:
    return {stage.name: stage for stage in plan.make(recipe.load(str(folder / "r.yaml"), overrides))}


def states(plans: dict[str, plan.StagePlan]) -> dict[str, str]:
    return {name: stage.state for name, stage in plans.items()}


def finish(folder: Path, *names: str, **changes: object) -> None:
    """Record stages as the runner does when they are done."""
    directory = RunDirectory(folder / "runs" / "t")
    for name, stage in make(folder).items():
        if names and name not in names:
            continue
        adapter = directory.stage(name) / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_model.safetensors").touch()
        record = {"name": name, "kind": stage.kind, "state": "done", "fingerprint": stage.fingerprint}
        record |= {"inputs": stage.inputs, "judging": stage.judging, "metrics": {"train_loss": 1.0}, "wall_s": 2.0}
        record |= {"init": stage.init, "reward": stage.reward}
        directory.write_record(name, record | changes)


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
        ("dpo.data.eval_fraction=0.5", "dpo", "data.eval_fraction 0.0 → 0.5", set()),
        ("seed=2", "sft", "seed 1 → 2", {"reward", "ppo", "dpo"}),
        ("model.quantization=nf4", "sft", "model.quantization none → nf4", {"reward", "ppo", "dpo"}),
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
        "dpo.trainer.logging_first_step=true",
        "reward.trainer.log_level=debug",
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
    assert make(folder, "ppo.ptx_data=rows.jsonl")["ppo"].inputs["ptx_data"].startswith("rows.jsonl@")
    assert "ptx_data" not in make(folder)["ppo"].inputs
    first = make(folder, "ppo.ptx_data=shown.jsonl")["ppo"].fingerprint
    (folder / "shown.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    second = make(folder, "ppo.ptx_data=shown.jsonl")["ppo"].fingerprint
    shorter = make(folder, "ppo.ptx_data={path: shown.jsonl, max_completion_length: 3}")["ppo"].fingerprint
    assert len({first, second, shorter, make(folder)["ppo"].fingerprint}) == 4


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
    (folder / "base" / file).write_bytes(b"other!!")
    plans = make(folder)
    assert set(states(plans).values()) == {"stale"}
    assert plans["sft"].reason.startswith("model changed: base (")


def test_digests_are_remembered_only_where_a_run_directory_is(folder):
    finish(folder)
    make(folder)
    known = json.loads((folder / "runs" / "t" / ".digests.json").read_text())
    assert str(folder / "rows.jsonl") in known


def test_a_damaged_memory_of_digests_does_no_harm(folder):
    finish(folder)
    (folder / "runs" / "t" / ".digests.json").write_text("{")
    assert states(make(folder)) == ALL_DONE


def test_a_failed_stage_blocks_what_needs_it_and_nothing_else(folder):
    finish(folder)
    finish(folder, "reward", state="failed", error="RuntimeError: out of memory")
    plans = make(folder)
    assert states(plans) == {"sft": "done", "reward": "failed", "ppo": "blocked", "dpo": "done"}
    assert plans["reward"].reason == "RuntimeError: out of memory"
    assert plans["ppo"].reason == "waits for reward"


def test_being_blocked_is_passed_on(folder):
    finish(folder)
    finish(folder, "sft", state="failed")
    assert states(make(folder)) == {"sft": "failed", "reward": "blocked", "ppo": "blocked", "dpo": "blocked"}
    assert make(folder)["ppo"].reason == "waits for sft and reward"


def test_a_running_stage_runs_only_while_the_lock_is_held(folder):
    finish(folder, "sft", state="running")
    with RunDirectory(folder / "runs" / "t").locked():
        assert make(folder)["sft"].state == "running"
    left = make(folder)["sft"]
    assert (left.state, left.reason) == ("failed", "the run ended before the stage did")


def test_a_stage_whose_adapter_is_gone_has_to_run_and_its_dependants_too(folder):
    finish(folder)
    (folder / "runs" / "t" / "sft" / "adapter" / "adapter_model.safetensors").unlink()
    plans = make(folder)
    assert states(plans) == {"sft": "missing", "reward": "stale", "ppo": "stale", "dpo": "stale"}
    assert plans["sft"].reason == "its adapter is gone"
    assert plans["dpo"].reason == "sft will run again"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "don'])
def test_an_unreadable_record_says_so(folder, text):
    finish(folder)
    (folder / "runs" / "t" / "dpo" / "stage.json").write_text(text)
    dpo = make(folder)["dpo"]
    assert (dpo.state, dpo.reason) == ("missing", "its record cannot be read")


def test_a_changed_evaluation_judges_again_and_trains_nothing(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not any(stage.to_judge for stage in make(folder).values())
    plans = make(folder, "evaluate.n=5")
    assert states(plans) == ALL_DONE
    assert {name for name, stage in plans.items() if stage.to_judge} == {"sft", "ppo", "dpo"}
    assert "judged again" in plans["dpo"].reason
    assert plan.select(list(plans.values()), None, None, []) == []


def test_how_many_are_judged_at_once_changes_nothing(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not any(stage.to_judge for stage in make(folder, "evaluate.batch_size=1").values())


def test_a_stage_that_trains_anyway_is_not_judged_apart(folder):
    (folder / "r.yaml").write_text(EVALUATE + RECIPE)
    finish(folder)
    assert not make(folder, "evaluate.n=5", "dpo.trainer.beta=0.5")["dpo"].to_judge


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
    finish(folder, "reward", state="failed")
    assert chosen(folder) == ["reward", "ppo"]


def test_only_what_is_true_of_the_present_is_shown(folder):
    finish(folder)
    shown = make(folder)["sft"].summary()
    assert (shown["metrics"], shown["wall_s"], shown["state"]) == ({"train_loss": 1.0}, 2.0, "done")
    finish(folder, "sft", state="failed")
    shown = make(folder)["sft"].summary()
    assert (shown["metrics"], shown["wall_s"], shown["state"]) == ({}, None, "failed")


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_can_be_planned(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(name, [f"output_dir={tmp_path}"])
    plans = plan.make(loaded)
    assert [stage.name for stage in plans] == list(loaded.stages)
    assert plan.select(plans, None, None, []) == plans
    assert len({stage.fingerprint for stage in plans}) == len(plans)
