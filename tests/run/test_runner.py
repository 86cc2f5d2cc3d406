"""What the runner does when a stage, or its process, goes wrong; and workers that are spawned, not forked."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_run
import torch
from processes import Started, call, start_a_thread

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, Interrupted, RunError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.report import alarms
from rlhf_pipeline.run import runner, server
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record

pytestmark = pytest.mark.slow

RECIPE = """
name: short
model: {path: tiny, quantization: none}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
  dpo:
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
"""


@pytest.fixture
def warm(warm_server: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `runner.run` fork its workers from a server that has imported already."""
    monkeypatch.setattr(runner, "Launcher", lambda log: contextlib.nullcontext(warm_server))


def write(folder: Path, judge: str) -> Recipe:
    """A recipe of two short stages, judged by a module of the user's beside it."""
    short_run.write_data(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "my_judge.py").write_text("import os, signal\n\n\n" + textwrap.dedent(judge))
    return recipes.load(str(folder / "recipe.yaml"))


@pytest.mark.parametrize(
    ("error", "stopped", "said"),
    [
        (KeyboardInterrupt(), True, None),
        (Interrupted("stage `sft` stopped, with a checkpoint at step 3"), True, None),
        (RunError("stage `sft` failed: no memory\n  | its log"), False, "stage `sft` failed: no memory"),
        (OSError(errno.ENOSPC, "No space left on device"), False, "is full"),
        (KeyError("peak_memory_bytes"), False, "KeyError: 'peak_memory_bytes'"),
    ],
)
def test_what_ends_a_stage_is_recorded_as_what_it_is(tmp_path: Path, error: BaseException, stopped: bool, said: str):
    """A fault of the runner's own is no stop."""
    recipe = write(tmp_path, FINE)

    def fail(*arguments: object) -> int:
        raise error

    directory, (sft, _) = RunDirectory(recipe.run), plan.make(recipe)
    with pytest.raises((Interrupted, type(error))) as raised:
        runner._train(recipe, sft, directory, SimpleNamespace(run=fail, stopping=False), lambda line: None, False)
    assert raised.type is (Interrupted if stopped else type(error))
    record = directory.record("sft")
    assert (record.state, record.stopped) == ("failed", stopped)
    assert record.error is None if said is None else said in record.error
    sft = plan.make(recipe)[0]
    assert (sft.state, sft.reason) == ("failed", "stopped before its first checkpoint" if stopped else record.error)
    if isinstance(error, KeyboardInterrupt):
        assert str(raised.value) == "stage `sft` stopped before its first checkpoint" and raised.value.at_once
        assert raised.value.then.endswith("the same command begins this one again")


def test_the_record_says_by_how_many_processes_a_stage_is_trained(tmp_path: Path):
    recipe = write(tmp_path, FINE)
    recipe.launch = {"num_processes": 2, "use_cpu": True}
    stage, directory = plan.make(recipe)[0], RunDirectory(recipe.run)
    assert runner._opening_record(recipe, stage, directory, None, Record()).machine["processes"] == 2
    recipe.launch = None
    assert "processes" not in runner._opening_record(recipe, stage, directory, None, Record()).machine


FINE = """
    def judge(prompts, completions, **columns):
        return [1.0 for _ in prompts]
"""
FAILS_AFTER_SFT = """
    def judge(prompts, completions, **columns):
        stop = os.path.join(os.path.dirname(__file__), "stop")
        if len(prompts) < 3:  # the check's
            return [0.5, 0.5]
        if os.path.exists(stop):
            print("the judge is about to give up")
            raise ValueError("no opinion")
        open(stop, "w").close()
        return [0.5 for _ in prompts]
"""
ENDS_ITS_PROCESS = """
    def judge(prompts):
        if len(prompts) < 3:  # the check's
            return [0.5, 0.5]
        {}
"""
SAYS_THE_SAME = """
    def judge(prompts):
        return [2] * len(prompts)
"""


@pytest.mark.usefixtures("warm")
def test_a_failing_stage_is_named_and_leaves_the_others_usable(tmp_path: Path) -> None:
    recipe = write(tmp_path, FAILS_AFTER_SFT)
    with pytest.raises(RunError) as error:
        runner.run(recipe, say=lambda line: None)
    message = error.value.message
    assert message.startswith("stage `dpo` failed: ValueError: no opinion")
    assert "| ValueError: no opinion" in message and str(recipe.run / "dpo" / "log.txt") in message
    assert "the judge is about to give up" in (recipe.run / "dpo" / "log.txt").read_text()
    sft, dpo = (json.loads((recipe.run / name / "stage.json").read_text()) for name in ("sft", "dpo"))
    assert (sft["state"], dpo["state"]) == ("done", "failed")
    assert sft["metrics"]["judge_mean"] == 0.5 and "no opinion" in dpo["error"]
    assert not (recipe.run / "dpo" / "adapter").exists()

    (tmp_path / "stop").unlink()
    said: list[str] = []
    plans = runner.run(recipe, say=said.append)
    assert [plan.state for plan in plans] == ["done", "done"]
    assert not any(line.startswith("sft") for line in said)
    assert said[-1] == "compare no judge: `my_judge:judge` failed on these prompts: ValueError: no opinion"


@pytest.mark.usefixtures("warm")
def test_a_closed_gate_ends_the_run_and_what_opens_it_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, FINE)  # judge_mean is 1
    said: list[str] = []

    def run(*overrides: str, **settings: bool) -> dict[str, Any]:
        said.clear()
        runner.run(recipes.load("recipe.yaml", overrides), say=said.append, **settings)
        return record("sft")

    def record(stage: str) -> dict[str, Any]:
        return json.loads((tmp_path / "runs" / "short" / stage / "stage.json").read_text())

    adapter = tmp_path / "runs" / "short" / "sft" / "adapter" / "adapter_model.safetensors"
    closed = "sft.gates={judge_mean: '> 1'}"
    for attempt in range(2):
        with pytest.raises(
            RunError, match=r"stage `sft`: a gate is closed: judge_mean is 1 \(95 %: 0.7 to 1\), not > 1"
        ) as error:
            run(closed)
        assert "--ignore-gates" in str(error.value.hint) and str(adapter.parent) in str(error.value.hint)
        assert any("training" in line for line in said) == (attempt == 0)
        assert record("sft")["state"] == "done, gate closed" and record("sft")["gates"]["judge_mean"]["value"] == 1.0
        assert not (tmp_path / "runs" / "short" / "dpo").exists()
    trained = adapter.stat().st_mtime_ns

    done = run(closed, ignore_gates=True)
    assert (done["state"], done["gates_ignored"]) == ("done", {"judge_mean": "> 1"})
    assert (
        "sft     gates ignored: judge_mean is 1 (95 %: 0.7 to 1), not > 1" in said and record("dpo")["state"] == "done"
    )
    assert run(closed)["gates_ignored"] == {"judge_mean": "> 1"}  # it was said once
    with pytest.raises(RunError, match="a gate is closed"):  # but not of this one
        run("sft.gates={judge_mean: '>= 2'}")
    opened = run("sft.gates={judge_mean: '>= 1'}")
    assert (opened["state"], opened["gates_ignored"], opened["error"]) == ("done", {}, None)
    assert adapter.stat().st_mtime_ns == trained


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "stage `sft` failed: its worker was ended by signal 9"),
        ("os._exit(0)", "stage `sft` failed: its worker ended without a result, with exit code 0"),
    ],
)
def test_a_worker_that_vanishes_is_one_sentence_however_it_ended(tmp_path: Path, ends: str, said: str) -> None:
    """And nothing that was trained is lost."""
    recipe = write(tmp_path, ENDS_ITS_PROCESS.format(ends))
    with pytest.raises(RunError, match=said):
        runner.run(recipe, say=lambda line: None)
    record = RunDirectory(recipe.run).record("sft")
    assert record.state == "failed" and "failed" in record.error
    assert plan.make(recipe)[0].reason.endswith("trained, to be judged")


@pytest.mark.usefixtures("warm")
def test_a_judge_that_says_the_same_of_all_replies_is_a_thing_to_look_at(tmp_path: Path) -> None:
    """In the report and the verdict, which stay; and no gate with a margin believes it."""
    recipe = write(tmp_path, SAYS_THE_SAME)
    recipe.evaluate.n = 12
    recipe.stages["sft"].gates = {"judge_mean": ">= 1 + 2 se"}
    with pytest.raises(RunError, match="judge_mean has no standard error"):
        runner.run(recipe, only="sft", say=lambda line: None)
    found = alarms.read(recipe.run)
    assert next(alarm.text for alarm in found if alarm.what.startswith("the same number")).startswith(
        "The judge gave all 12 replies the same number, 2: "
    )


@pytest.mark.usefixtures("warm")
def test_a_fault_in_a_later_stage_is_found_before_the_first_one_trains(tmp_path: Path) -> None:
    recipe = write(tmp_path, FINE)
    recipe.stages["dpo"].trainer["lr_scheduler_type"] = "zigzag"
    directory = RunDirectory(recipe.run)
    seen: list[tuple[bool, str | None]] = []  # by those who watch, while it is checked
    with pytest.raises(InputError) as error:
        runner.run(recipe, say=lambda line: seen.append((directory.is_locked(), directory.doing())))
    assert error.value.place == "stages.dpo.trainer" and "zigzag" in error.value.message
    assert seen == [(True, "checking settings and data")]
    assert not recipe.run.parent.exists()


TELLS = """
    def judge(prompts):
        raise ValueError("not let in with " + os.environ["WANDB_API_KEY"])
"""


@pytest.mark.usefixtures("warm")
def test_a_judge_that_fails_when_it_is_tried_ends_the_run_before_it_begins_and_tells_no_secret(tmp_path: Path) -> None:
    recipe = write(tmp_path, TELLS)
    with pytest.raises(InputError) as error:
        runner.run(recipe, say=lambda line: None)
    assert error.value.place == "evaluate.judge" and "ValueError: not let in with ***" in error.value.message
    assert not (recipe.run / "sft").exists()


def refuse(job: str, answers: Path) -> None:
    """In a process of its own: a server. For its first fork CUDA is spoiled; before its second there is a thread."""

    def requests() -> Iterator[str]:
        yield job
        start_a_thread()
        yield job

    output = os.open(answers, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    torch.cuda._is_in_bad_fork = lambda: True
    sys.stdin = requests()
    server.serve(os.getppid(), fork=True)


def test_the_server_refuses_to_fork_where_that_is_not_safe(tmp_path: Path) -> None:
    job = json.dumps({"job": str(tmp_path / "job.json"), "log": str(tmp_path / "log.txt")})
    call(refuse, job, tmp_path / "answers")
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [answer["unsafe"] for answer in answers if "worker" not in answer] == [
        "CUDA was touched before the fork", "2 Python threads are running"
    ]  # fmt: skip
    assert not (tmp_path / "result.json").exists()


LONGER = """
name: longer
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: all-linear}
stages:
  reward:
    init: base
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
  ppo:
    init: base
    data: prompts.jsonl
    trainer: {max_steps: 6, per_device_train_batch_size: 8, gradient_accumulation_steps: 2, response_length: 12,
              learning_rate: 1e-3, save_steps: 1, num_sample_generations: 6, gradient_checkpointing: false}
"""


def finish(warm_server: Launcher, folder: Path, *arguments: str) -> str:
    """The command on the same recipe to its end; what it said."""
    code, said = short_run.run_warm(warm_server, folder, "recipe.yaml", *arguments)
    assert code == 0, said
    return said


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file without what depends on the clock."""
    timing = ("eps", "seconds", "tokens_per_second", "time")
    loaded = [json.loads(line) for line in file.open(encoding="utf-8")]
    return [{name: value for name, value in row.items() if not name.endswith(timing)} for row in loaded]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which PPO's worker was killed from outside as soon as its first checkpoint was there."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "recipe.yaml").write_text(LONGER)
    short_run.write_data(folder)
    with (folder / "said.txt").open("w") as output:
        command = Started(["run", "recipe.yaml"], folder, {}, output.fileno(), prepare=short_run.without_report)
    work, deadline = folder / "runs" / "longer" / "ppo" / "work", time.monotonic() + 240
    while not (work / "checkpoint-1").is_dir():
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    (parent,) = children(command.pid)
    (worker,) = children(parent)
    os.kill(worker, signal.SIGKILL)
    assert command.wait(300) == 1
    said = (folder / "said.txt").read_text()
    assert "stage `ppo` failed: its worker was ended by signal 9" in said
    assert not (work / "checkpoint-6").exists()
    return folder


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies that folder."""
    return lambda name: Path(shutil.copytree(killed, tmp_path / name))


def test_a_stage_whose_worker_was_killed_goes_on_and_ends_as_if_it_was_not(
    copied: Callable[[str], Path], warm_server: Launcher
) -> None:
    """Going on, starting afresh because it is asked for, and starting afresh because a setting changed."""
    resumed, forced, changed = (copied(name) for name in ("resumed", "forced", "changed"))
    log = (resumed / "runs/longer/ppo/log.txt").read_text()
    said = [
        finish(warm_server, resumed),
        finish(warm_server, forced, "--force", "ppo"),
        finish(warm_server, changed, "ppo.trainer.max_steps=1", "ppo.trainer.kl_coef=0.1"),
    ]
    runs = [folder / "runs" / "longer" for folder in (resumed, forced, changed)]

    assert "ppo     resumes from step " in said[0] and "former results" not in said[0]
    assert not list(runs[0].glob("ppo.*"))
    after = (runs[0] / "ppo" / "log.txt").read_text()
    assert after.startswith(log) and len(after) > len(log)

    for text, run in zip(said[1:], runs[1:], strict=True):
        assert "ppo     resumes" not in text and "the former results are now in ppo." in text
        (aside,) = run.glob("ppo.*")
        assert (aside / "work" / "checkpoint-1").is_dir() and (aside / "log.txt").read_text() == log
    assert [row["step"] for row in rows(runs[2] / "ppo" / "metrics.jsonl")] == [1]

    # The one that was forced is a run that nothing interrupted.
    assert digest(runs[0] / "ppo") == digest(runs[1] / "ppo") != digest(runs[2] / "ppo")
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rows(runs[0] / "ppo" / file) == rows(runs[1] / "ppo" / file)
    assert [row["step"] for row in rows(runs[0] / "ppo" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    records = [json.loads((run / "ppo" / "stage.json").read_text()) for run in runs]
    assert [record["state"] for record in records] == ["done"] * 3
    assert records[0]["metrics"]["objective/kl"] == records[1]["metrics"]["objective/kl"]
    assert not any((run / "ppo" / "work").exists() for run in runs)


def test_a_stage_whose_record_still_says_running_goes_on_too(
    copied: Callable[[str], Path], warm_server: Launcher
) -> None:
    """As after a power cut: the runner itself had no time to write down that the stage failed."""
    folder = copied("cut")
    run = folder / "runs" / "longer"
    record = json.loads((run / "ppo" / "stage.json").read_text()) | {"state": "running"}
    (run / "ppo" / "stage.json").write_text(json.dumps(record))
    (run / "ppo" / "work" / "adapter").mkdir()
    (run / "ppo" / "work" / "adapter" / "half").write_text("of an adapter")
    (run / "ppo" / "work" / "result.json").write_text('{"metrics": {"half": 1}}')
    said = finish(warm_server, folder)
    assert "ppo     resumes from step " in said
    assert [row["step"] for row in rows(run / "ppo" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not (run / "ppo" / "adapter" / "half").exists()
    assert "half" not in json.loads((run / "ppo" / "stage.json").read_text())["metrics"]


def test_a_stage_goes_on_only_from_a_whole_checkpoint_of_its_own_inputs(copied: Callable[[str], Path]) -> None:
    folder = copied("early")
    work = folder / "runs" / "longer" / "ppo" / "work"

    def ppo(*overrides: str) -> plan.StagePlan:
        return plan.make(recipes.load(str(folder / "recipe.yaml"), overrides))[1]

    saved = max(int(path.name.split("-")[1]) for path in work.glob("checkpoint-*"))
    for stage in (ppo(), ppo("ppo.trainer.save_steps=3")):
        assert stage.state == "partial" and stage.progress is not None and stage.progress.step == saved
    for override in ("ppo.trainer.kl_coef=0.1", "reward.trainer.max_steps=2"):
        stage = ppo(override)
        assert stage.state == "stale" and stage.progress is None
    for checkpoint in work.glob("checkpoint-*"):
        checkpoint.rename(checkpoint.with_name(f".new-{checkpoint.name}"))
    assert ppo().state == "failed" and ppo().progress is None
