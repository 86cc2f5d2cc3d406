"""What differs between two runs, as an object and as a table."""

import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import short_run
from rich.console import Console

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir import diff
from rlhf_pipeline.rundir.layout import WEIGHTS, RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.terminal import diff as shown

DIGESTS = {"d1": "1" * 32, "d2": "2" * 32, "m1": "a" * 32}
RECORDS: dict[str, dict[str, Any]] = {
    "sft": {
        "name": "sft", "kind": "sft", "state": "done", "init": "base", "reward": None,
        "inputs": {
            "kind": "sft", "seed": 1, "model": f"base@{DIGESTS['m1']}", "model.dtype": "auto", "init": "base",
            "lora.r": 8, "trainer.learning_rate": 0.0001, "data": f"demos.jsonl@{DIGESTS['d1']}",
            "data.eval_fraction": 0.0,
        },
        "judging": {"judge": "a:b", "n": 10, "data": f"heldout.jsonl@{DIGESTS['d1']}"},
        "versions": {"trl": "1.12.0", "torch": "2.9.1"},
        "metrics": {"train_loss": 1.5, "judge_mean": 0.25, "entropy": 2.0},
    },
    "ppo": {
        "name": "ppo", "kind": "ppo", "state": "done", "init": "sft", "reward": "reward",
        "inputs": {
            "kind": "ppo", "seed": 1, "model": f"base@{DIGESTS['m1']}", "model.dtype": "auto", "init": "f" * 32,
            "reward": "e" * 32, "lora.r": 8, "trainer.kl_coef": 0.05,
            "data": f"prompts.jsonl@{DIGESTS['d1']}", "data.eval_fraction": 0.0,
        },
        "judging": None,
        "versions": {"trl": "1.12.0", "torch": "2.9.1"},
        "metrics": {"objective/kl": 3.0, "eps": 10.0, "rollout/seconds": 1.0, "optimise/seconds": 2.0, "lr": 0.0},
    },
}  # fmt: skip


def write(run: Path, records: dict[str, dict[str, Any]]) -> Path:
    for name, record in records.items():
        adapter = RunDirectory(run).adapter(name)
        adapter.mkdir(parents=True)
        (adapter / WEIGHTS).write_text(f"weights of {name}")
        RunDirectory(run).write_record(name, Record.model_validate(record))
    (run / "recipe.yaml").write_text("stages:\n" + "".join(f"  {name}: {{}}\n" for name in records))
    return run


@pytest.fixture
def runs(tmp_path: Path):
    """Two run directories, the second one changed by the caller."""

    def runs(change=lambda records: None) -> tuple[Path, Path]:
        second = copy.deepcopy(RECORDS)
        change(second)
        return write(tmp_path / "one", RECORDS), write(tmp_path / "two", second)

    return runs


def text(difference: dict[str, Any], width: int = 120) -> str:
    output = io.StringIO()
    shown.show(difference, Console(file=output, width=width))
    return output.getvalue()


def rows(difference: dict[str, Any]) -> list[list[str]]:
    """The table's lines as words, without those above it."""
    return [line.split() for line in text(difference).splitlines()[4:]]


def test_two_runs_alike_differ_in_nothing(runs):
    difference = diff.compare(*runs())
    assert (difference["same"], difference["stages"]) == (True, [])
    assert text(difference).splitlines()[-1] == "nothing differs"


def test_how_fast_it_went_is_no_difference(runs):
    def slower(records):
        records["ppo"]["metrics"] |= {"eps": 1.0, "rollout/seconds": 9.0, "optimise/seconds": 9.0,
                                      "rollout/sampling_seconds": 9.0, "train_mem_cpu_alloc_delta": 5}  # fmt: skip
        records["ppo"] |= {"wall_s": 3.5, "started_at": "later", "fingerprint": "another"}

    assert diff.compare(*runs(slower))["same"]


def test_settings_data_versions_and_metrics_that_differ_stand_under_their_stage(runs):
    def change(records):
        sft = records["sft"]
        sft["inputs"] |= {"trainer.learning_rate": 0.0002, "data": f"demos.jsonl@{DIGESTS['d2']}", "trainer.beta": None}
        del sft["inputs"]["lora.r"]
        sft["versions"]["trl"] = "1.12.1"
        sft["judging"] |= {"n": 20}
        sft["metrics"] = {"train_loss": 1.25, "judge_mean": None, "entropy": 2.0, "loss": 4}

    (stage,) = diff.compare(*runs(change))["stages"]
    assert stage == {
        "name": "sft",
        "kind": "sft",
        "only_in": None,
        "unreadable": {},
        "state": {},
        "settings": {
            "evaluate.n": {"a": 10, "b": 20},
            "lora.r": {"a": 8},
            "trainer.beta": {"b": None},
            "trainer.learning_rate": {"a": 0.0001, "b": 0.0002},
        },
        "data": {"data": {"a": f"demos.jsonl@{DIGESTS['d1']}", "b": f"demos.jsonl@{DIGESTS['d2']}"}},
        "versions": {"trl": {"a": "1.12.0", "b": "1.12.1"}},
        "metrics": {
            "judge_mean": {"a": 0.25, "b": None, "difference": None},
            "loss": {"b": 4, "difference": None},
            "train_loss": {"a": 1.5, "b": 1.25, "difference": -0.25},
        },
    }
    table = rows({"runs": {"a": "x", "b": "y"}, "same": False, "stages": [stage]})
    assert table == [
        ["sft", "evaluate.n", "10", "20"],
        ["sft", "lora.r", "8", "not", "set"],
        ["sft", "trainer.beta", "not", "set", "null"],
        ["sft", "trainer.learning_rate", "0.0001", "0.0002"],
        ["sft", "data", "demos.jsonl", "(11111111)", "demos.jsonl", "(22222222)"],
        ["sft", "trl", "1.12.0", "1.12.1"],
        ["sft", "loss", "none", "4"],  # the metrics that matter for the kind come first
        ["sft", "judge", "(judge_mean)", "0.25", "null"],
        ["sft", "train_loss", "1.5", "1.25", "-0.25"],
    ]


def test_the_table_has_a_heading_and_names_both_runs(runs):
    one, two = runs(lambda records: records["sft"]["inputs"].update(seed=2))
    lines = text(diff.compare(one, two), width=60).splitlines()
    assert lines[:2] == [f"A  {one}", f"B  {two}"]
    assert lines[3].split() == ["stage", "what", "A", "B", "B", "-", "A"]


def test_another_parent_is_called_by_its_name(runs):
    def change(records):
        records["ppo"]["inputs"] |= {"init": "0" * 32, "reward": "1" * 32}
        records["ppo"]["reward"] = "reward2"

    difference = diff.compare(*runs(change))
    assert difference["stages"][0]["settings"] == {
        "init": {"a": "sft", "b": "another sft"},
        "reward": {"a": "reward", "b": "reward2"},
    }
    assert rows(difference) == [["ppo", "init", "sft", "another", "sft"], ["ppo", "reward", "reward", "reward2"]]


def test_what_differs_alike_in_every_stage_stands_once_in_the_table(runs):
    def change(records):
        for record in records.values():
            record["inputs"]["seed"] = 2
            record["versions"]["torch"] = "2.10.0"
        records["sft"]["inputs"]["lora.r"] = 16
        records["ppo"]["inputs"]["lora.r"] = 32

    difference = diff.compare(*runs(change))
    assert [stage["settings"]["seed"] for stage in difference["stages"]] == [{"a": 1, "b": 2}] * 2
    assert rows(difference) == [
        ["all", "seed", "1", "2"],
        ["all", "torch", "2.9.1", "2.10.0"],
        ["sft", "lora.r", "8", "16"],
        ["ppo", "lora.r", "8", "32"],
    ]


def test_a_stage_that_only_one_has_and_a_state_are_shown(runs):
    def change(records):
        records["dpo"] = records.pop("ppo") | {"kind": "dpo"}
        records["sft"] |= {"state": "failed"}
        del records["sft"]["metrics"]  # of a stage that was interrupted: nothing to compare

    difference = diff.compare(*runs(change))
    shown = [(stage["name"], stage["only_in"], stage["state"], stage["metrics"]) for stage in difference["stages"]]
    assert shown == [
        ("sft", None, {"a": "done", "b": "failed"}, {}),
        ("ppo", "a", {"a": "done"}, {}),
        ("dpo", "b", {"b": "blocked"}, {}),
    ]
    assert rows(difference) == [
        ["sft", "state", "done", "failed"],
        ["ppo", "state", "done", "no", "such", "stage"],
        ["dpo", "state", "no", "such", "stage", "blocked"],
    ]


def test_a_stage_that_only_one_has_is_shown_though_its_record_says_nothing(runs):
    difference = diff.compare(*runs(lambda records: records.update(dpo={})))
    assert [(stage["name"], stage["only_in"], stage["state"]) for stage in difference["stages"]] == [
        ("dpo", "b", {"b": "missing"})
    ]
    assert rows(difference) == [["dpo", "state", "no", "such", "stage", "missing"]]


def test_a_stage_that_runs_is_running_only_while_a_run_goes_on(runs):
    one, two = runs(lambda records: records["sft"].update(state="running"))
    assert diff.compare(one, two)["stages"][0]["state"] == {"a": "done", "b": "failed"}
    with RunDirectory(two).locked():
        assert diff.compare(one, two)["stages"][0]["state"] == {"a": "done", "b": "running"}


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "is missing"), ("{", "cannot be read"), ("[1]", "cannot be read"), ("\x00", "cannot be read")],
)
def test_a_record_that_cannot_be_read_is_said(runs, content: str | None, why: str):
    one, two = runs(lambda records: records["ppo"]["inputs"].update(seed=2))
    record = two / "sft" / "stage.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    difference = diff.compare(one, two)
    sft, ppo = difference["stages"]
    assert (sft["name"], sft["unreadable"], sft["settings"]) == ("sft", {"b": f"stage.json {why}"}, {})
    assert ppo["settings"] == {"seed": {"a": 1, "b": 2}}
    assert f"stage.json {why}" in text(difference)


def test_a_record_of_another_shape_is_compared_as_far_as_it_goes(runs):
    def change(records):
        records["sft"] |= {"inputs": [1], "metrics": "none", "versions": None}

    (stage,) = diff.compare(*runs(change))["stages"]
    assert stage["settings"]["seed"] == {"a": 1}
    assert stage["metrics"] == {}


@pytest.mark.parametrize("content", [None, "stages: [", "stages: 3", "x: 1", "\x00"])
def test_a_recipe_that_cannot_be_read_does_not_matter(runs, content: str | None):
    one, two = runs(lambda records: records["sft"]["inputs"].update(seed=2))
    (two / "recipe.yaml").unlink()
    if content is not None:
        (two / "recipe.yaml").write_text(content)
    assert [stage["name"] for stage in diff.compare(one, two)["stages"]] == ["sft"]


def test_former_results_are_no_stages(runs):
    one, two = runs()
    (two / "sft").rename(two / "sft.20250102-030405")
    write(two / "new", {"sft": RECORDS["sft"]})
    (two / "new" / "sft").rename(two / "sft")
    assert diff.compare(one, two)["same"]


def test_a_table_of_80_columns_loses_nothing(runs):
    def change(records):
        records["ppo"]["inputs"]["trainer.local_rollout_forward_batch_size"] = 16
        records["ppo"]["inputs"]["lora.target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "[gate_proj]"]
        records["ppo"]["inputs"]["data"] = f"a-rather-long-name-of-prompts.jsonl@{DIGESTS['d2']}"
        records["ppo"]["metrics"]["objective/kl"] = 3.0000001

    lines = text(diff.compare(*runs(change)), width=80).splitlines()[3:]
    assert max(len(line) for line in lines) <= 80
    starts = [0, *(lines[0].index(column) for column in ("what", "A ", "B ")), 80]
    for column, expected in enumerate(
        [
            ["stage", *["ppo"] * 4],
            ["what", "lora.target_modules", "trainer.local_rollout_forward_batch_size", "data", "KL(objective/kl)"],
            ["A", "not set", "not set", "prompts.jsonl (11111111)", "3"],
        ]
    ):
        cells = [line[starts[column] : starts[column + 1]].strip() for line in lines]
        assert "".join(cells).replace(" ", "") == "".join(expected).replace(" ", "")
    squeezed = "".join(line[starts[3] :].strip() for line in lines)
    for part in ("[gate_proj]", "a-rather-long-name-of-prompts.jsonl(22222222)", "+1e-07"):
        assert part in squeezed, part


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    code, out, err = short_run.ask(folder, "diff", *arguments)
    return subprocess.CompletedProcess(arguments, code, out, err)


def test_the_command_prints_the_table_or_the_object_and_ends_well_either_way(runs, tmp_path: Path):
    one, two = runs(lambda records: records["sft"]["inputs"].update(seed=2))
    shown = command(tmp_path, "one", "two")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("A  one\nB  two\n")
    assert ["sft", "seed", "1", "2"] in [line.split() for line in shown.stdout.splitlines()]
    assert "\x1b" not in shown.stdout
    as_json = command(tmp_path, str(one), str(two), "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)) == (0, diff.compare(one, two))
    same = command(tmp_path, "one", "one")
    assert (same.returncode, same.stdout.splitlines()[-1]) == (0, "nothing differs")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("diff", "one", "two"), ("prune", "one")])
def test_looking_at_runs_imports_no_torch(runs, tmp_path: Path, arguments: tuple[str, ...]):
    runs(lambda records: records["sft"]["inputs"].update(seed=2))
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf_pipeline", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    ).stderr  # fmt: skip
    imported = set(re.findall(r"^import time:.*\|\s+(\S+)$", told, re.MULTILINE))
    assert "rlhf_pipeline.recipe" in imported
    assert not imported & {"torch", "trl", "transformers", "datasets", "peft"}


def test_a_run_is_meant_by_its_folder_or_its_recipe(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, _ = runs()
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: one\noutput_dir: .\nmodel: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations}\n")
    assert recipes.run_directory(str(one)) == one
    assert recipes.run_directory(str(recipe)) == one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder like any other does not hide the shipped recipe
    write(tmp_path / "runs" / "tiny", RECORDS)
    assert recipes.run_directory("tiny") == tmp_path / "runs" / "tiny"
    write(tmp_path / "tiny", RECORDS)
    assert recipes.run_directory("tiny") == Path("tiny")


def test_where_there_is_no_run_the_command_says_so(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations}\n")
    for given, message in (
        ("empty", "empty: this folder is not a run directory"),
        ("r.yaml", f"r.yaml: there is no run of it at {tmp_path / 'runs' / 'r'}"),
        ("gone", "gone: there is no such recipe"),
    ):
        done = command(tmp_path, given, given)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}\nhint: "), done.stderr
    with pytest.raises(InputError, match="not a run directory"):
        recipes.run_directory(str(tmp_path))
