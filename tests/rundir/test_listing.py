"""`runs`: what there is in a folder, in the order that is asked for, without reading large files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipeline import cli
from rlhf_pipeline.rundir import file_digests, listing


@pytest.fixture
def folder(recorded: Path) -> Path:
    """Three runs, and what is none: a recorded one; a better and later one without PPO; one that has only begun."""
    runs = recorded.parent
    better = Path(shutil.copytree(recorded, runs / "better"))
    shutil.rmtree(better / "ppo" / "adapter")
    dpo = json.loads((better / "dpo" / "stage.json").read_text())
    dpo["metrics"]["judge_mean"] += 1
    (better / "dpo" / "stage.json").write_text(json.dumps(dpo))
    (runs / "begun").mkdir()
    (runs / "begun" / ".lock").touch()
    (runs / "none").mkdir()
    (runs / "notes.txt").touch()
    for run, at in ((recorded, 1_000), (better, 2_000)):
        for file in (*run.glob("*/stage.json"), *run.glob("*/metrics.jsonl")):
            os.utime(file, (at, at))
    return runs


def names(found: list[listing.Listed]) -> list[str]:
    return [one.name for one in found]


def test_runs_are_found_with_states_and_numbers_and_nothing_large_is_read(folder, monkeypatch):
    monkeypatch.setattr(file_digests.FileDigests, "of_file", lambda *_: pytest.fail("a file was read"))
    found = listing.find(folder)
    assert names(found) == ["better", "tiny", "begun"]
    assert [one.run.state for one in found] == ["unfinished", "done", "unfinished"]
    assert [one.changed_at for one in found] == [2_000, 1_000, None]
    better, tiny, _ = found
    assert tiny.bytes == sum(file.stat().st_size for file in (folder / "tiny").rglob("*") if file.is_file())
    assert "ppo" in tiny.numbers and "ppo" not in better.numbers
    assert [tiny.key_number(stage).metric for stage in tiny.run.stages] == [
        "judge_mean", "eval_accuracy", "judge_mean", "judge_mean"
    ]  # fmt: skip
    weights = folder / "tiny" / "dpo" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert listing.find(folder)[1].run.stage("dpo").state == "stale"  # its size tells


@pytest.mark.parametrize(
    ("key", "reverse", "order"),
    [
        ("age", False, ["better", "tiny", "begun"]),
        ("age", True, ["begun", "tiny", "better"]),
        ("name", False, ["begun", "better", "tiny"]),
        ("state", False, ["tiny", "begun", "better"]),
        ("size", False, ["tiny", "better", "begun"]),
        ("judge_mean", False, ["better", "tiny", "begun"]),
        ("judge_mean", True, ["tiny", "better", "begun"]),
        ("ppo.judge", True, ["tiny", "better", "begun"]),
        ("eval_accuracy", False, ["better", "tiny", "begun"]),
        ("other.judge_mean", False, ["better", "tiny", "begun"]),  # no run has such a stage
    ],
)
def test_runs_are_sorted_by_what_is_asked_for(folder, key, reverse, order):
    assert names(listing.by(listing.find(folder), key, reverse)) == order


def test_the_command_shows_a_table_and_says_what_is_wrong(folder, monkeypatch, capsys):
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "runs", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    lines = command(folder, "--sort", "judge_mean")[1].splitlines()
    assert lines[0].split() == ["run", "state", "age", "size", "judge_mean", "stages"]
    assert lines[1].startswith("better") and "ppo missing; dpo judge " in lines[1]
    assert lines[2].split()[:2] == ["tiny", "done"] and "reward held-out accuracy " in lines[2]
    code, _, said = command(folder, "--sort", "lossy")
    assert code == 2 and "runs have no number `lossy`" in said and "eval_accuracy" in said
    code, _, said = command(folder / "gone")
    assert code == 2 and "there is no such folder" in said
    assert command(folder / "none")[0::2] == (0, f"there is no run in {folder / 'none'}\n")


def test_it_imports_no_torch(folder):
    code = "import sys; from rlhf_pipeline.cli import app; app(['runs', sys.argv[1]], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, stdout=subprocess.DEVNULL)
