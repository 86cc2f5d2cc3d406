"""Sweeps from end to end: the classic table where its numbers are known, and sweeps that are killed and go on."""

import json
import os
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import optuna
import pytest
import torch
from sweeping import Started, descendants, is_alive, records, sweep
from torch import Tensor

from rlhf_pipeline import plan, recipe
from rlhf_pipeline.models.base import load_base, load_config
from rlhf_pipeline.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

BETAS = (0.3, 3.0)
KEY = "ppo.trainer.kl_coef"
SWEEP = (f"{KEY}={','.join(map(str, BETAS))}", "--minimize", "ppo.objective/kl")


class Table(NamedTuple):
    """A sweep that has ended: its folder, and what it said."""

    folder: Path
    found: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def table(written: Path) -> Table:
    """The sweep over β."""
    code, out, err = sweep(written, "words.yaml", *SWEEP, "--json")
    assert code == 0, err
    return Table(written / "runs" / "words.sweep", json.loads(out), err)


@pytest.fixture(scope="module")
def log_ref(table: Table, closed_form: ModuleType) -> Tensor:
    """Log-probabilities of the trained reference, `[prompts, vocabulary]`."""
    from peft import PeftModel

    loaded = recipe.load(str(table.folder.parents[1] / "words.yaml"))
    tokenizer = load_tokenizer(loaded.model.path)
    model = PeftModel.from_pretrained(load_base(loaded.model, tokenizer), table.folder / "kl_coef-0.3/sft/adapter")
    model.eval()
    with torch.no_grad():
        prompts = [torch.tensor([ids]) for ids in tokenizer(closed_form.PROMPTS)["input_ids"]]
        return torch.stack([model(prompt).logits[0, -1] for prompt in prompts]).double().log_softmax(-1)


@pytest.fixture(scope="module")
def rewards(table: Table, closed_form: ModuleType) -> Tensor:
    """The reward of every token as the reply to every prompt, `[prompts, vocabulary]`."""
    loaded = recipe.load(str(table.folder.parents[1] / "words.yaml"))
    words = torch.tensor(load_tokenizer(loaded.model.path)(closed_form.WORDS)["input_ids"])[:, 0]
    return closed_form.word_rewards(words, load_config(loaded.model).vocab_size).double()


@pytest.mark.parametrize("beta", BETAS)
def test_reward_and_kl_of_the_table_are_those_of_the_optimum(table, closed_form, log_ref, rewards, beta):
    """π* ∝ π_ref exp(r/β). The last 192 replies are a sample; and training has the benchmark's own allowance."""
    (run,) = [one for one in table.found["runs"] if one["values"] == {KEY: beta}]
    log_p = (log_ref + rewards / beta).log_softmax(-1)
    p, replies = log_p.exp(), 192
    for metric, value in (("objective/scores", rewards), ("objective/kl", log_p - log_ref)):
        means = (p * value).sum(1)
        exact = means.mean().item()
        within = (p * (value - means[:, None]) ** 2).sum(1).mean().item()  # each prompt is asked equally often
        allowed = max(closed_form.WITHIN * abs(exact), closed_form.WITHIN_ABSOLUTE) + 4 * (within / replies) ** 0.5
        assert run["numbers"]["ppo"][metric]["after"] == pytest.approx(exact, abs=allowed), metric
    start = (log_ref.exp() * rewards).sum(1).mean().item()
    assert run["numbers"]["ppo"]["objective/scores"]["before"] == pytest.approx(start, abs=0.3)
    assert run["numbers"]["ppo"]["objective/kl"]["before"] == pytest.approx(0, abs=0.02)


def test_kl_falls_as_beta_rises_and_the_best_is_what_was_asked_for(table):
    kls = [run["numbers"]["ppo"]["objective/kl"]["after"] for run in table.found["runs"]]
    assert kls == sorted(kls, reverse=True)
    assert table.found["best"] == "kl_coef-3.0"
    assert table.found["command"] == f"rlhf-pipeline run words.yaml {KEY}=3.0"
    assert [run["value"] for run in table.found["runs"]] == kls


def test_what_no_swept_key_touches_is_trained_a_single_time(table):
    found = records(table.folder)
    assert table.found["shared"] == ["sft"]
    taken = {name: record.get("taken_from") for name, record in found.items()}
    assert [name for name, at in taken.items() if at is None and name.endswith("/sft")] == ["kl_coef-0.3/sft"]
    assert all(at is None for name, at in taken.items() if name.endswith("/ppo"))
    assert len({record["artifact_files"]["adapter_model.safetensors"][1] for name, record in found.items()
                if name.endswith("/sft")}) == 1  # fmt: skip
    weights = [file.stat() for file in table.folder.glob("*/sft/adapter/adapter_model.safetensors")]
    assert {one.st_nlink for one in weights} == {len(BETAS)}  # on the disk, too, there is one


def test_the_same_command_again_trains_nothing_and_prints_the_table(table):
    before = {file: file.stat().st_mtime_ns for file in table.folder.rglob("*") if file.name != ".sweep"}
    began = time.process_time()
    code, out, err = sweep(table.folder.parents[1], "words.yaml", *SWEEP)
    assert time.process_time() - began < 3
    assert code == 0, err
    assert err.splitlines() == [f"run {i} of 2  {KEY}={beta}: is done" for i, beta in enumerate(BETAS, 1)]
    assert {file: file.stat().st_mtime_ns for file in table.folder.rglob("*") if file.name != ".sweep"} == before
    lines = out.splitlines()
    assert lines[0] == "stage ppo, start → end; sft is the same in all"
    assert lines[1].split() == ["kl_coef", "score", "KL", "time", "state"]
    assert [line.split()[0] for line in lines[2:4]] == ["0.3", "3.0"]
    assert lines[3].rstrip().endswith("done, best")
    assert lines[4] == f"the best by ppo.objective/kl: {KEY}=3.0"
    assert lines[5].startswith(f"  rlhf-pipeline run words.yaml {KEY}=3.0 ")


def test_the_command_for_the_best_takes_all_from_the_sweep(table):
    plans = recipe.load(str(table.folder.parents[1] / "words.yaml"), [f"{KEY}=3.0"])
    assert [one.earlier and one.earlier.name for one in plan.make(plans)] == [
        "words.sweep/kl_coef-3.0/sft", "words.sweep/kl_coef-3.0/ppo",
    ]  # fmt: skip


def test_the_report_has_the_frontier_over_all_runs(table):
    page = (table.folder / "report.html").read_text()
    assert table.found["report"] == str(table.folder / "report.html")
    assert "ppo: reward over KL" in page and "gold over KL" not in page
    assert "3.0: " in page and ", the best. Start: " in page


SHORT = (
    "sft.trainer.max_steps=20",
    "ppo.trainer.max_steps=8",
    "ppo.trainer.save_steps=1",
    "ppo.trainer.per_device_train_batch_size=48",
)
TWO = ("words.yaml", f"{KEY}=0.3,3.0", *SHORT)


def test_a_sweep_that_is_killed_or_stopped_goes_on_and_trains_nothing_twice(folder):
    runs = folder / "runs" / "words.sweep"
    first, second = runs / "kl_coef-0.3", runs / "kl_coef-3.0"

    killed = Started(folder, *TWO)
    try:
        killed.wait_for(lambda: (first / "ppo" / "work" / "checkpoint-2" / "manifest.json").exists())
        family = descendants(killed.pid)
        assert len(family) >= 3  # the run, what forks its worker, the worker
    finally:
        killed.kill()
    killed.wait()
    deadline = time.monotonic() + 2
    while any(map(is_alive, family)):
        assert time.monotonic() < deadline, "what it has started outlives it"
        time.sleep(0.01)
    before = records(runs)
    assert before["kl_coef-0.3/sft"]["state"] == "done" and before["kl_coef-0.3/ppo"]["state"] == "running"

    stopped = Started(folder, *TWO)
    try:
        stopped.wait_for(lambda: (second / "ppo" / "work" / "checkpoint-2" / "manifest.json").exists())
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(60) == 130, stopped.said
    finally:
        stopped.kill()
    said = stopped.said.splitlines()
    assert said[-2:] == ["stopped: 1 of 2 runs are done", "the same command resumes from here"]
    assert "stopping after this step, with a checkpoint; Ctrl-C once more stops at once" in said
    assert any(line.startswith("run 1 of 2  ppo     training, resumed from step ") for line in said)
    after = records(runs)
    assert after["kl_coef-0.3/sft"] == before["kl_coef-0.3/sft"]
    assert after["kl_coef-0.3/ppo"]["state"] == "done" and after["kl_coef-0.3/ppo"]["resumed_from_step"] >= 2
    assert after["kl_coef-3.0/sft"]["taken_from"] == "words.sweep/kl_coef-0.3/sft"
    assert after["kl_coef-3.0/ppo"]["stopped"]

    code, _, err = sweep(folder, *TWO)
    assert code == 0, err
    ended = records(runs)
    assert {name: ended[name] for name in ended if name != "kl_coef-3.0/ppo"} == {
        name: after[name] for name in after if name != "kl_coef-3.0/ppo"
    }
    assert ended["kl_coef-3.0/ppo"]["state"] == "done" and ended["kl_coef-3.0/ppo"]["resumed_from_step"] >= 2
    assert f"run 1 of 2  {KEY}=0.3: is done" in err.splitlines()


def test_two_at_a_time_share_what_was_trained_before_and_a_closed_gate_ends_one_run_alone(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gate = "ppo.gates.objective/kl='<= 0.5'"
    code, out, err = sweep(folder, *TWO, gate, "--jobs", "2")
    assert code == 1, err
    found = records(folder / "runs" / "words.sweep")
    assert [name for name, one in found.items() if name.endswith("/sft") and "taken_from" not in one] == [
        "kl_coef-0.3/sft"
    ]
    slow, fast = (found[f"kl_coef-{beta}/ppo"] for beta in ("0.3", "3.0"))
    assert slow["started_at"] <= fast["finished_at"] and fast["started_at"] <= slow["finished_at"]
    assert slow["machine"]["device"] == "1 CPU thread"
    assert fast["state"] == "done" and slow["state"] == "done, gate closed"
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: 1 of 2 runs failed: kl_coef-0.3: stage `ppo`: a gate is closed: objective/kl")
    assert "gate closed: stage `ppo`: a gate is closed" in " ".join(out.split())


def test_optuna_proposes_runs_and_the_same_command_with_more_trials_adds_to_them(folder):
    words = ("words.yaml", f"{KEY}=0.3..3.0:log", *SHORT, "--maximize", "objective/scores")
    code, out, err = sweep(folder, *words, "--trials", "2", "--json")
    assert code == 0, err
    few = json.loads(out)
    code, out, err = sweep(folder, *words, "--trials", "3", "--json")
    assert code == 0, err
    more = json.loads(out)
    assert more["runs"][:2] == few["runs"]
    assert len({run["values"][KEY] for run in more["runs"]}) == 3
    assert all(0.3 <= run["values"][KEY] <= 3 for run in more["runs"])
    assert "run 3 of 3" in err and "run 2 of 3" not in err
    assert sweep(folder, *words, "--trials", "3", "--json") == (0, out, "")  # nothing is checked either
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{more['study']}")
    loaded = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{more['study']}")
    assert [trial.state.name for trial in loaded.trials] == ["COMPLETE"] * 3
    assert [trial.value for trial in loaded.trials] == [run["value"] for run in more["runs"]]
    assert loaded.best_trial.user_attrs["run"] == more["best"]
