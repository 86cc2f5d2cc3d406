"""What becomes of a job, by how its worker ends and what it leaves. The process itself is played here."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.run import jobs
from rlhf_pipeline.run.launch import STOP_SIGNAL, STOPPED, WAITING

TASKS = ("check", "train", "judge", "compare")


class Played:
    """A launcher whose worker leaves `result` and `log`, and ends with `code`."""

    log = "it began\nthe last thing it did\n"

    def __init__(self, code: int, result: dict[str, Any] | None = None, stopping: bool = False) -> None:
        self.code, self.result, self.stopping = code, result, stopping

    def run(self, job: dict[str, Any], job_file: Path, log: Path) -> int:
        with log.open("a") as file:
            file.write(self.log)
        if self.result is not None:
            job_file.with_name("result.json").write_text(json.dumps(self.result))
        return self.code


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipes.load("tiny")


@pytest.fixture
def do(tmp_path: Path, recipe: Recipe) -> Any:
    """A function that has a task done, where an earlier job has left its result."""

    def done(task: str, played: Played) -> jobs.Ended:
        (tmp_path / "result.json").write_text('{"metrics": {"judge_mean": 1}, "warnings": ["of an earlier job"]}')
        stage = {"stage": "sft"} if task in ("train", "judge") else {}
        return jobs.do(recipe, played, task, tmp_path / "job.json", tmp_path / "log.txt", "the work", **stage)

    return done


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("code", [0, 1, 2, STOPPED, WAITING, 113])
def test_a_worker_that_ends_without_a_result_is_one_sentence_whatever_its_exit_code(
    do: Any, task: str, code: int
) -> None:
    with pytest.raises(RunError) as caught:
        do(task, Played(code))
    first, *rest = caught.value.message.splitlines()
    assert first == (
        f"the work failed: its worker ended without a result, with exit code {code}; "
        "the last line of its log: the last thing it did"
    )
    assert rest[:2] == ["  | it began", "  | the last thing it did"] and "os._exit" in str(caught.value.hint)
    assert any("the whole log" in line for line in rest) == (task == "train")


@pytest.mark.parametrize("task", TASKS)
def test_a_result_is_the_one_of_this_job_and_a_stop_is_no_failure(do: Any, task: str) -> None:
    assert do(task, Played(0, {"warnings": []})) == ({"warnings": []}, False, None)
    assert do(task, Played(STOPPED, {"step": 4})) == ({"step": 4}, True, None)
    assert do(task, Played(STOPPED, stopping=True)) == ({}, True, None)  # asked before its job began
    assert do(task, Played(-STOP_SIGNAL, stopping=True)) == ({}, True, None)  # or before it listened


def test_a_stage_that_waits_for_people_is_no_failure(do: Any) -> None:
    assert do("train", Played(WAITING, {"waits": "1 of 2 labels"})) == ({}, False, "1 of 2 labels")


def test_a_worker_that_says_what_is_wrong_is_believed(do: Any) -> None:
    fault = {"message": "no such file", "place": "stages.sft.data", "hint": None}
    said = {"message": "stages.sft.data: no such file", "hint": None, "problems": [fault]}
    with pytest.raises(InputError) as wrong:
        do("check", Played(2, said))
    assert (wrong.value.message, wrong.value.place) == ("no such file", "stages.sft.data")
    for task in TASKS[1:]:
        with pytest.raises(RunError, match=r"failed: stages\.sft\.data: no such file") as failed:
            do(task, Played(2, said))
        assert failed.value.hint
    # A checkpoint that could not be written is a failure, though the stage was asked to stop.
    with pytest.raises(RunError, match="failed: no room"):
        do("train", Played(1, {"message": "no room", "hint": "free some", "known": True}, stopping=True))
    with pytest.raises(RunError, match="ended by signal 11"):
        do("judge", Played(-11))


def test_of_a_log_what_an_earlier_attempt_has_written_is_not_shown(do: Any) -> None:
    with pytest.raises(RunError):
        do("train", Played(-9))
    played = Played(-9)
    played.log = "it began again\n"
    with pytest.raises(RunError) as caught:
        do("train", played)
    assert caught.value.message.splitlines()[1:-1] == ["  | it began again"]


def test_of_a_log_progress_bars_and_warnings_are_not_shown(do: Any) -> None:
    played = Played(-9)
    played.log = (
        "it began\n"
        "\rLoading weights:   0%|          | 0/29 [00:00<?, ?it/s]\rLoading weights: 100%|██████| 29/29 [00:00<00:00]\n"
        "/x/modeling_utils.py:3312: FutureWarning: `a` is deprecated\n  warnings.warn(\n"
        "[rank1]:[W1129 17:16:35.900249701 reducer.cpp:1529] Warning: find_unused_parameters=True\n"
        "  3%|▎         | 3/100 [00:00<00:05, 18it/s]Traceback (most recent call last):\n"
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please install it\n"
        "UserWarning: which somebody raised\n"
    )
    with pytest.raises(RunError) as caught:
        do("judge", played)
    assert caught.value.message.splitlines()[1:] == [
        "  | it began", "  | Traceback (most recent call last):", "  | UserWarning: which somebody raised"
    ]  # fmt: skip
