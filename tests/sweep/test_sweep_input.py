"""What is wrong with a sweep is said once, at the argument that was written, before anything trains."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import short_run
from sweeping import sweep

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.sweep import check, devices, goal, keys, proposals
from rlhf_pipeline.sweep import run as sweeps
from rlhf_pipeline.sweep.check import Loader
from rlhf_pipeline.sweep.goal import Goal

KL = "ppo.trainer.kl_coef=0.1,0.3,1.0"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a sweep of the shipped recipe says that no worker has to find."""

    def launch(*_: object) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(Launcher, "__enter__", launch)

    def ask(*words: str) -> list[str]:
        code, out, err = short_run.ask(tmp_path, "sweep", "tiny", *words)
        assert code == 2 and out == "", err
        assert not (tmp_path / "runs").exists()
        return err.splitlines()

    return ask


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["ppo.trainer.kl_cof=0.1,0.3,1.0"], "override `ppo.trainer.kl_cof=0.1,0.3,1.0`: unknown key `kl_cof`",
         "did you mean `kl_coef`?"),
        (["ppo.trainer.kl_coef=0.1,much"], "override `ppo.trainer.kl_coef=0.1,much`: expected a number, got 'much'",
         "see `rlhf-pipeline docs ppo`"),
        (["seed=-5..3"], "override `seed=-5..3`: expected a number of at least 0, got -5", None),
        (["pp.trainer.kl_coef=0.1,0.3"], "override `pp.trainer.kl_coef=0.1,0.3`: unknown key `pp`", None),
        ([KL, "dpo.data.limt=5"], "override `dpo.data.limt=5`: unknown key `limt`", "did you mean `limit`?"),
        ([KL, "--maximize", "ppo.judge_men"], "--maximize ppo.judge_men: stage `ppo` will have no metric `judge_men`",
         "did you mean `judge_mean`?"),
        ([KL, "--maximize", "pppo.judge_mean"], "--maximize pppo.judge_mean: there is no stage `pppo`",
         "did you mean `ppo.judge_mean`?"),
        ([KL, "--minimize", "judge_men"], "--minimize judge_men: no stage writes a metric `judge_men`",
         "did you mean `judge_mean`?"),
        ([KL, "--maximize", "dpo.judge_mean"],
         "--maximize dpo.judge_mean: no swept key changes what stage `dpo` makes", "what the swept keys change is ppo"),
        ([KL, "--maximize", "ppo.judge_mean", "--minimize", "ppo.loss"], "--minimize: a sweep has one goal",
         "give either `--maximize` or `--minimize`"),
        ([KL, "launch={num_processes: 2, num_machines: 2, main_process_ip: a, use_cpu: true}"],
         "launch.num_machines: the runs of a sweep are on one machine, and this recipe is run on 2",
         "set `launch.num_machines=1`, and fewer processes"),
        (["ppo.trainer.save_steps=5,10"], "no stage's result depends on ppo.trainer.save_steps",
         "every run would be the same"),
    ],
)  # fmt: skip
def test_one_sentence_one_place_one_hint(refused, words, error, hint):
    said = refused(*words)
    assert said[0] == f"error: {error}"
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert hint is None or said[1].startswith(f"hint: {hint}")


def test_all_values_that_are_wrong_are_named_once_however_many_runs_have_them(refused):
    errors = [line for line in refused("ppo.trainer.kl_coef=a,b,0.1", "seed=1,2,x") if line.startswith("error: ")]
    assert errors == [
        "error: override `ppo.trainer.kl_coef=a,b,0.1`: expected a number, got 'a'",
        "error: override `ppo.trainer.kl_coef=a,b,0.1`: expected a number, got 'b'",
        "error: override `seed=1,2,x`: expected a whole number, got 'x'",
    ]


def test_what_is_wrong_with_all_runs_alike_is_said_beside_what_is_wrong_with_some(refused):
    errors = [line for line in refused("ppo.trainer.kl_coef=a,b", "dpo.data.limt=5") if line.startswith("error: ")]
    assert errors == [
        "error: override `dpo.data.limt=5`: unknown key `limt`",
        "error: override `ppo.trainer.kl_coef=a,b`: expected a number, got 'a'",
        "error: override `ppo.trainer.kl_coef=a,b`: expected a number, got 'b'",
    ]


def test_optuna_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(proposals.importlib.util, "find_spec", lambda name: None)
    assert refused("ppo.trainer.kl_coef=1..2") == [
        "error: override `ppo.trainer.kl_coef=1..2`: Optuna is not installed, which proposes the values of a range",
        "hint: pip install optuna, or list the values: all combinations of lists need no Optuna",
    ]
    assert refused(KL, "--trials", "2")[0].startswith("error: --trials 2: Optuna is not installed")


def test_nothing_can_be_proposed_where_nothing_says_what_is_best(refused, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: {path: tiny, quantization: none}\nstages: {sft: {data: tiny:demonstrations}}\n"
    )
    code, _, err = short_run.ask(tmp_path, "sweep", "r.yaml", "sft.trainer.learning_rate=1e-4..1e-3:log")
    assert code == 2
    assert err.startswith(
        "error: override `sft.trainer.learning_rate=1e-4..1e-3:log`: nothing says which run is the best, so none can "
        "be proposed\nhint: add `--maximize STAGE.METRIC` or `--minimize STAGE.METRIC`, or a judge"
    )


@pytest.mark.parametrize(
    ("jobs", "visible", "smi", "found", "most"),
    [
        (3, "0,1", "", None, "3 runs at a time need a GPU each, and CUDA_VISIBLE_DEVICES names 2"),
        (2, "GPU-abc", "", None, "2 runs at a time need a GPU each, and CUDA_VISIBLE_DEVICES names 1"),
        (2, None, "GPU 0: H\n", None, "2 runs at a time need a GPU each, and there is 1 GPU"),
        (2, "3,5,7", "", [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}], None),
        (2, None, "GPU 0: H\nGPU 1: H\n", [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}], None),
        (5, "", "", None, "5 runs at a time need a core each, and there are 4 cores and no GPU"),
        (5, "-1", "GPU 0: H\n", None, "5 runs at a time need a core each, and there are 4 cores and no GPU"),
        (3, "", "", [{"OMP_NUM_THREADS": "1"}] * 3, None),
        (2, "", "", [{"OMP_NUM_THREADS": "2"}] * 2, None),
        (1, "0,1", "", [{}], None),
    ],
)
def test_as_many_runs_at_a_time_as_there_are_devices(monkeypatch, tmp_path, jobs, visible, smi, found, most):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(4)))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{smi}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    if found:
        assert devices.environments(jobs, environment) == found
        return
    with pytest.raises(InputError) as raised:
        devices.environments(jobs, environment)
    assert str(raised.value) == f"--jobs {jobs}: {most}"


def test_the_threads_that_the_user_has_set_stay(monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(4)))
    assert devices.environments(2, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}) == [{}, {}]


def load(*words: str, of: str = "tiny") -> tuple[list[check.Planned], check.Shared, Loader]:
    swept, fixed = keys.parse(words)
    loader = Loader(of, fixed, swept)
    found = loader.all(keys.grid(swept))
    return found, check.shared(found), loader


@pytest.mark.parametrize(
    ("words", "same", "varying"),
    [
        ([KL], ["sft", "reward", "dpo"], ["ppo"]),
        (["ppo.trainer.kl_coef=0.01..1:log"], ["sft", "reward", "dpo"], ["ppo"]),
        (["reward.trainer.learning_rate=1e-3,2e-3"], ["sft", "dpo"], ["reward", "ppo"]),
        (["sft.data.limit=64,128"], [], ["sft", "reward", "ppo", "dpo"]),
        (["seed=1,2"], [], ["sft", "reward", "ppo", "dpo"]),
        (["evaluate.temperature=0.5,1.0"], ["sft", "reward", "ppo", "dpo"], ["sft", "ppo", "dpo"]),
        ([KL, "dpo.trainer.beta=0.1,0.2"], ["sft", "reward"], ["ppo", "dpo"]),
    ],
)
def test_what_runs_share_is_what_no_swept_key_decides(words, same, varying):
    _, shared, _ = load(*words)
    assert shared.stages == same and shared.varying == varying


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([KL], [("--until", "reward"), ("--only", "dpo")]),
        (["reward.trainer.learning_rate=1e-3,2e-3"], [("--until", "sft"), ("--only", "dpo")]),
        (["dpo.trainer.beta=0.1,0.2"], [("--until", "ppo")]),
        (["seed=1,2"], []),
        (["evaluate.temperature=0.5,1.0"], [("--until", "dpo")]),
    ],
)
def test_what_several_runs_at_a_time_share_is_made_before(tmp_path, words, options):
    planned, shared, _ = load(*words, f"output_dir={tmp_path}")
    assert list(sweeps._left_to_share(planned[0], shared.stages)) == options


def test_what_values_are_comparable_by_does_not_depend_on_how_wide_a_range_is():
    _, narrow, _ = load("ppo.trainer.kl_coef=0.1..0.2")
    _, wide, _ = load("ppo.trainer.kl_coef=0.01..2.0")
    _, other, _ = load("ppo.trainer.kl_coef=0.01..2.0", "ppo.trainer.lam=0.5")
    _, judged, _ = load("ppo.trainer.kl_coef=0.01..2.0", "evaluate.n=5")
    assert narrow.inputs == wide.inputs != other.inputs
    assert judged.inputs != wide.inputs
    assert "trainer.kl_coef" not in wide.inputs["ppo"] and wide.inputs["ppo"]["trainer.response_length"] == 16


def test_the_usual_goal_is_the_judges_number_of_the_last_policy_that_differs(tmp_path):
    (planned, *_), shared, _ = load(KL)
    found = goal.find(planned.recipe, shared.varying, None, "maximize")
    assert found == Goal("ppo", "judge_mean", "maximize", ("gold/judge_mean", "judge_mean", "watch/judge_mean"))
    (planned, *_), shared, _ = load("seed=1,2")
    assert str(goal.find(planned.recipe, shared.varying, None, "maximize")) == "dpo.judge_mean"
    assert str(goal.find(planned.recipe, shared.varying, "objective/kl", "minimize")) == "ppo.objective/kl"
    bare = tmp_path / "r.yaml"
    bare.write_text("model: {path: tiny}\nstages: {sft: {data: tiny:demonstrations}}\n")
    (planned, *_), shared, _ = load("seed=1,2", of=str(bare))
    assert goal.find(planned.recipe, shared.varying, None, "maximize") is None


def test_a_range_written_in_whole_numbers_has_fractions_where_its_key_takes_them():
    for word, takes in (("ppo.trainer.kl_coef=0..1", True), ("ppo.trainer.num_ppo_epochs=1..4", False),
                        ("lora.r=4..64:log", False)):  # fmt: skip
        ((found,), _) = keys.parse([word])
        assert isinstance(found, keys.Range)
        assert check.takes_fractions("tiny", [], found) is takes


def test_a_run_is_an_ordinary_one_whose_name_and_place_are_given(tmp_path):
    planned, _, loader = load(KL, "name=other", f"output_dir={tmp_path}", "seed=3")
    assert loader.folder == tmp_path / "other.sweep"
    for one in planned:
        ordinary = recipe.load("tiny", loader.command(one.combination))
        assert ordinary.run == one.recipe.run == tmp_path / "other.sweep" / one.combination.name
        assert ordinary.seed == 3
    assert loader.settings(planned[0].combination) == ["seed=3", "ppo.trainer.kl_coef=0.1"]


@pytest.mark.slow
def test_settings_and_data_of_every_run_are_checked_and_each_fault_is_said_once(folder):
    """By a worker: what only TRL's classes, or all rows, tell."""
    (folder / "few.jsonl").write_text((folder / "prompts.jsonl").read_text() + "{")
    words = ("words.yaml", "ppo.trainer.kl_coef=0.1,-1,-2", "ppo.data=prompts.jsonl,few.jsonl")
    code, _, err = sweep(folder, *words)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {folder}/few.jsonl:193: this line is not JSON: Expecting property name enclosed in double quotes at "
        "column 2",
        "error: stages.ppo.trainer: `kl_coef` must be at least 0, and it is -1",
        "error: stages.ppo.trainer: `kl_coef` must be at least 0, and it is -2",
    ]
    assert not (folder / "runs").exists()


def test_two_sweeps_in_one_folder_are_refused_as_two_runs_are(tmp_path):
    folder = tmp_path / "runs" / "tiny.sweep"
    with sweeps._held(folder):
        code, _, err = short_run.ask(tmp_path, "sweep", "tiny", KL)
        assert code == 1
        assert err.startswith(f"error: {folder} is in use by process {os.getpid()}, since 20")
        assert "\nhint: wait for it; a recipe with another `name` has a folder of its own" in err
        assert not recipe.is_run(folder)  # `runs` must not list it as one
    assert not folder.parent.exists()  # it was made for this, and stayed empty
