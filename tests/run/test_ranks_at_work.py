"""Two ranks that train a stage, and what can happen to one of them: a sentence that names it, no hang, and checkpoints.

The ranks are forks of the test's own process, in place of processes of `accelerate launch`, which import for seconds;
tests/test_two_processes.py has those. What watches them and makes one result of theirs is the real thing.
"""

import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from together import divide, divide_by_deepspeed

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.models import base
from rlhf_pipeline.run import jobs, meeting, rank, ranks, runner, worker
from rlhf_pipeline.run.launch import STOP_SIGNAL, adopt_orphans
from rlhf_pipeline.rundir.layout import JOB, LOG, RunDirectory, read_json
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.stages import evaluate, sft, sharded

RECIPE = """\
name: run
model: {path: tiny, quantization: none, dtype: float32}
launch: {num_processes: 2, use_cpu: true}
stages:
  sft:
    data: {path: tiny:demonstrations, limit: 64}
    trainer: {max_steps: 6, per_device_train_batch_size: 2, save_steps: 2, logging_steps: 1, learning_rate: 1.0e-3}
"""
Sabotage = Callable[[int], None]


class Launcher:
    """Starts what watches the ranks, and them, as forks.

    Args:
        sabotage: what each rank does before it begins, by its number.
        stop_after: a file after which to ask for a stop, once it is there.
    """

    def __init__(self, sabotage: Sabotage = lambda _: None, stop_after: Path | None = None) -> None:
        self.stopping, self._sabotage, self._stop_after = False, sabotage, stop_after

    def run(self, job: dict[str, Any], job_file: Path, log: Path) -> int:
        job_file.write_text(json.dumps(job))
        watcher = multiprocessing.get_context("fork").Process(target=_watch, args=(job_file, log, self._sabotage))
        signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})  # as the server has it
        watcher.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
        deadline = time.monotonic() + 60
        while watcher.is_alive() and time.monotonic() < deadline:
            if self._stop_after and self._stop_after.exists() and not self.stopping:
                self.stopping = True
                os.kill(watcher.pid, STOP_SIGNAL)
            time.sleep(0.02)
        assert not watcher.is_alive(), "it hangs"
        return watcher.exitcode


def _watch(job_file: Path, log: Path, sabotage: Sabotage) -> None:
    code = 1
    try:
        adopt_orphans()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        ranks._start = functools.partial(_start, sabotage)
        code = ranks.main(job_file)
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Running:
    """What is left of `accelerate launch` here: it is there until it is ended."""

    def poll(self) -> None:
        return None


def _start(sabotage: Sabotage, all_of_them: ranks.Ranks, port: int) -> _Running:
    for index in range(all_of_them.count):
        if os.fork():
            continue
        try:
            _be_rank(sabotage, index, all_of_them, port)
        finally:
            os._exit(1)
    return _Running()


def _be_rank(sabotage: Sabotage, index: int, all_of_them: ranks.Ranks, port: int) -> None:
    environment = {
        "RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": all_of_them.count, "LOCAL_WORLD_SIZE": all_of_them.count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in environment.items()})
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.set_num_threads(1)
    # A fork makes torch's pool of threads anew when it first uses it, which must not be in two threads at once.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    sabotage(index)
    rank.main(str(all_of_them.job_file))
    os._exit(0)


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    (tmp_path / "run.yaml").write_text(RECIPE)
    loaded = recipes.load(str(tmp_path / "run.yaml"))
    directory = RunDirectory(loaded.run)
    directory.prepare("sft", None)
    directory.write_record("sft", Record(name="sft", kind="sft", state="running", started_at="now"))
    return loaded


def train(recipe: recipes.Recipe, launcher: Launcher | None = None) -> jobs.Ended:
    directory = RunDirectory(recipe.run)
    return jobs.do(
        recipe, launcher or Launcher(), "train", directory.work("sft") / JOB, directory.stage("sft") / LOG,  # type: ignore[arg-type]
        "stage `sft`", stage="sft", record={"started_at": "now"}, launch=recipe.launch_of("sft"),
    )  # fmt: skip


def failure(recipe: recipes.Recipe, sabotage: Sabotage) -> str:
    """The sentence that a run says when something happens to a rank, with the lines below it."""
    began = time.monotonic()
    with pytest.raises(RunError) as failed:
        train(recipe, Launcher(sabotage))
    assert time.monotonic() - began < 40
    return failed.value.message


def at_step(rank_: int, step: int, happens: Callable[[], Any]) -> Sabotage:
    """Something happens to one rank when it has done so many steps."""

    def sabotage(index: int) -> None:
        usual = sft.TRAINER.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if index == rank_ and self.state.global_step == step:
                happens()
            return usual(self, *args, **kwargs)

        sft.TRAINER.training_step = training_step

    return sabotage


def kept(recipe: recipes.Recipe) -> int | None:
    progress = RunDirectory(recipe.run).progress("sft")
    return progress.step if progress else None


def test_both_train_and_one_writes(recipe):
    done = train(recipe)
    stage = recipe.run / "sft"
    assert done.result["metrics"]["loss"] > 0 and not done.stopped
    steps = [json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) or steps[:-1] == sorted(set(steps)), "nothing is written twice"
    assert read_json(stage / "work" / "ranks" / "1.result.json")["metrics"] == {}
    assert (stage / "work" / "adapter" / "adapter_model.safetensors").is_file()
    assert (stage / "log.rank-1.txt").exists()


def test_one_that_is_killed_is_named_and_the_next_run_resumes(recipe):
    said = failure(recipe, at_step(1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert said.startswith("stage `sft` failed in rank 1 of 2: its worker was ended by signal 9, from outside"), said
    assert f"the whole log: {recipe.run}/sft/log.rank-1.txt" in said
    assert kept(recipe) == 2
    assert train(recipe).result["metrics"]["loss"] > 0


def test_one_whose_memory_ran_out_is_named(recipe):
    def run_out() -> None:
        raise MemoryError("no room for it")

    said = failure(recipe, at_step(1, 3, run_out))
    assert said.startswith("stage `sft` failed in rank 1 of 2: the machine's memory ran out (no room for it)"), said
    assert kept(recipe) == 2


def test_what_one_raises_is_shown_with_the_end_of_its_own_log_and_without_secrets(recipe, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hush-hush-0123456789")

    def fail() -> None:
        raise ValueError("nobody foresaw hush-hush-0123456789")

    said = failure(recipe, at_step(1, 3, fail))
    assert said.startswith("stage `sft` failed in rank 1 of 2: ValueError: nobody foresaw ***\n  | "), said
    assert all("hush" not in log.read_text() for log in (recipe.run / "sft").glob("log*"))
    assert kept(recipe) == 2


def test_one_that_hangs_is_named_when_the_others_have_waited_long_enough(recipe, monkeypatch):
    monkeypatch.setenv(meeting.TIMEOUT, "4")
    said = failure(recipe, at_step(1, 3, lambda: time.sleep(1000)))
    assert said.startswith("stage `sft` failed in rank 1 of 2: it did not answer, and the others waited"), said
    assert re.search(r"in vain; it was in `\S+`, \S+test_ranks_at_work.py:\d+\n", said), said
    assert kept(recipe) == 2


def test_one_that_hangs_is_named_where_the_others_are_aborted_as_nccl_does_it(recipe):
    def sabotage(index: int) -> None:
        def abort() -> None:
            os.write(
                2, b"[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 300000 ms\n"
            )
            os.abort()

        at_step(index, 3, (lambda: time.sleep(1000)) if index else abort)(index)

    said = failure(recipe, sabotage)
    assert said.startswith("stage `sft` failed in rank 1 of 2: it did not answer, and the others waited"), said


def test_one_that_sees_other_data_is_named_before_anything_is_trained(recipe):
    def sabotage(index: int) -> None:
        usual = sft.read

        def read(data: Any, *args: Any) -> Any:
            data.limit = 64 - index
            return usual(data, *args)

        sft.read = read

    said = failure(recipe, sabotage)
    assert "rank 1 of 2 (on " in said and "has other data than rank 0" in said, said
    assert "63 rows" in said and "64 rows" in said and kept(recipe) is None


def test_one_with_other_libraries_is_named_before_anything_is_trained(recipe):
    def sabotage(index: int) -> None:
        usual = meeting.versions
        meeting.versions = lambda: usual() | ({"trl": "0.1"} if index else {})

    said = failure(recipe, sabotage)
    assert "has other versions of the libraries than rank 0" in said and "trl is 0.1 there" in said, said


EVALUATE = (
    "evaluate={data: tiny:prompts, judge: 'of_ranks:judge', ai_judge: {model: 'of_ranks:prefer'}, n: 3, batch_size: 2, "
    "max_new_tokens: 8, temperature: 0}"
)
JUDGE = """
def judge(completions):
    {}
    return [len(one) for one in completions]


def prefer(firsts):
    return [0.75 for _ in firsts]
"""


def divided(_index: int) -> None:
    """Have a rank divide the base, and see that it has when it judges."""
    divide()
    usual = evaluate.sample_replies

    def sample_replies(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        assert sharded.is_divided(model)
        return usual(model, *args, **kwargs)

    evaluate.sample_replies = sample_replies


def test_what_is_divided_is_judged_by_all_also_later(tmp_path, recipe):
    """Where the judge had failed, and where `evaluate` has changed."""
    judge, launch = tmp_path / "of_ranks.py", "launch={num_processes: 2, fsdp_config: {fsdp_version: 2}}"
    judge.write_text(JUDGE.format('raise ValueError(f"no opinion on {len(completions)}")'))
    said: list[str] = []

    def of(*overrides: str) -> tuple[Any, ...]:
        new = recipes.load(str(tmp_path / "run.yaml"), (launch, EVALUATE, *overrides))
        return new, plan.make(new)[0], RunDirectory(new.run)

    with pytest.raises(RunError, match="stage `sft` failed in rank 0 of 2: ValueError: no opinion on 3"):
        runner._train(*of(), Launcher(divided), said.append, True)
    trained = (recipe.run / "sft/work/adapter/adapter_model.safetensors").read_bytes()
    judge.write_text(JUDGE.format("pass"))
    record = runner._train(*of(), Launcher(divided), said.append, False)
    assert "sft     trained, to be judged" in said
    assert (recipe.run / "sft/adapter/adapter_model.safetensors").read_bytes() == trained
    assert record.metrics["judge_replies"] == 3 and record.metrics["loss"] > 0 and "win_rate" in record.metrics
    assert read_json(recipe.run / "sft/work/ranks/1.result.json")["metrics"] == {}
    again = runner._judge(*of("evaluate.n=5"), Launcher(divided), tmp_path, said.append)
    assert again.metrics["judge_replies"] == 5 and again.metrics["loss"] == record.metrics["loss"]
    assert read_json(recipe.run / "sft/work/judging/ranks/1.result.json")["metrics"] == {}


def reading(of_the_first: Callable[[], Any]) -> Sabotage:
    """Have the ranks divide the base, of which the first alone reads the weights; something happens when it has."""

    def sabotage(index: int) -> None:
        divide()
        usual = base.require_causal

        def require_causal(*args: Any) -> None:
            assert index == 0
            usual(*args)
            of_the_first()

        base.require_causal = require_causal

    return sabotage


def test_others_wait_for_the_first_one_however_long_it_reads(recipe, monkeypatch):
    monkeypatch.setenv(meeting.TIMEOUT, "3")
    assert train(recipe, Launcher(reading(lambda: time.sleep(4.5)))).result["metrics"]["loss"] > 0


def test_what_the_first_one_finds_wrong_with_a_base_is_what_the_run_says(recipe):
    def find() -> None:
        raise InputError("its weights are spoilt", place="model.path")

    said = failure(recipe, reading(find))
    assert said.startswith("stage `sft` failed in rank 0 of 2: model.path: its weights are spoilt\n"), said


def test_a_base_that_deepspeed_divides_is_trained(tmp_path, recipe):
    pytest.importorskip("deepspeed")
    recipe.stages["sft"].trainer |= {"max_steps": 2, "save_steps": 1}
    done = train(recipe, Launcher(lambda _: divide_by_deepspeed(3, tmp_path)))
    assert done.result["metrics"]["loss"] > 0
    work = recipe.run / "sft/work"
    assert (work / "adapter/adapter_model.safetensors").is_file() and (work / "checkpoint-2/global_step2").is_dir()


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("by_file", [False, True])
def test_accelerate_starts_the_ranks_of_one_machine_also_where_deepspeed_has_a_file_of_its_own(
    tmp_path, machines, by_file
):
    """Beside such a file it refuses `mixed_precision`; and DeepSpeed would start all machines from the first."""
    of_deepspeed = {"deepspeed_config_file": str(tmp_path / "zero.json")} if by_file else {"zero_stage": 3}
    launch = {"num_processes": 4, "num_machines": machines, "main_process_ip": "10.0.0.1"}
    launch["deepspeed_config"] = of_deepspeed | {"deepspeed_multinode_launcher": "pdsh"}
    job, file = tmp_path / JOB, tmp_path / "accelerate.json"
    job.write_text(json.dumps({"launch": launch, "log": LOG, "recipe": {"output_dir": "runs", "name": "run"}}))
    file.write_text(json.dumps(ranks.accelerate_config(ranks.Ranks(job), 29500)))
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "module"])
    args, _, says_precision = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    command, variables = prepare_deepspeed_cmd_env(args)
    assert (command, args.nproc_per_node) == (None, str(4 // machines))
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true" and says_precision is not by_file


def test_a_stop_leaves_one_checkpoint_of_all(recipe):
    slow = at_step(1, 3, lambda: time.sleep(1.0))
    done = train(recipe, Launcher(slow, stop_after=recipe.run / "sft/work/checkpoint-2"))
    assert done.stopped and done.result["step"] == kept(recipe) and 2 <= done.result["step"] < 6


def test_a_stop_before_they_listen_is_heard(recipe):
    done = train(recipe, Launcher(lambda _: time.sleep(0.5), stop_after=recipe.run / "sft/work" / JOB))
    assert done.stopped and done.result == {"step": None}


@pytest.mark.parametrize("machines", [1, 2])
def test_a_port_that_is_in_use(recipe, machines):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        recipe.launch |= {"main_process_port": port}
        if machines == 1:
            assert train(recipe).result["metrics"]["loss"] > 0, "another one is taken"
            return
        recipe.launch |= {"num_machines": 2, "main_process_ip": "127.0.0.1"}
        assert failure(recipe, lambda _: None) == (
            f"stage `sft` failed: port {port}, on which the machines find each other, is in use here\n"
            f"  the whole log: {recipe.run}/sft/log.txt"
        )


def test_the_digest_is_of_what_rows_hold():
    from datasets import Dataset, concatenate_datasets

    rows = Dataset.from_dict({"ids": [[1, 2], [3]], "weight": [1.0, 2.0], "text": ["a", None]})
    same = concatenate_datasets([rows.select([0]), rows.select([1])])
    assert meeting.digest(rows) == meeting.digest(same)
    others = [
        Dataset.from_dict({"ids": [[1], [2, 3]], "weight": [1.0, 2.0], "text": ["a", None]}),
        Dataset.from_dict({"ids": [[1, 2], [3]], "weight": [2.0, 1.0], "text": ["a", None]}),
        Dataset.from_dict({"ids": [[1, 2], [3]], "weight": [1.0, 2.0], "text": ["a", ""]}),
        rows.select([1, 0]),
    ]
    assert len({meeting.digest(one) for one in [rows, *others]}) == 5


assert worker  # imported here once, for all forks
