"""What was moved aside is listed in full and removed on request, and nothing else ever is."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import short_run
from rich.console import Console

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.rundir import asides as prune
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.terminal import asides as shown

RECORD = {"kind": "reward", "state": "done", "metrics": {"accuracy": 0.5, "eval_accuracy": 0.61}}
NOT_ASIDE = [
    "sft", "sft.20250102", "sft.20250102-0304", "sft.20250102-030405x", "sft.20250102-030405-", "sft.20250102-030405-1",
    "sft.20250102-030405-02", "sft.20251302-030405", "sft.20250102-250405", ".20250102-030405", "sft20250102-030405",
    "a.b.20250102-030405", "a b.20250102-030405", "sft.20250102-030405.bak", "-sft.20250102-030405",
    "sft.20250102-030405\n", "sft.\u0662\u0660\u0662\u0665\u0660\u0661\u0660\u0662-030405",
]  # fmt: skip
HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record
with RunDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a stage, and its former self moved aside by the run directory itself."""
    directory = RunDirectory(tmp_path / "run")
    for content in ("former", "now"):
        directory.stage("reward").mkdir(parents=True)
        directory.write_record("reward", Record.model_validate(RECORD))
        (directory.stage("reward") / "log.txt").write_text(content)
        if content == "former":
            directory.set_aside("reward")
    return directory.path


def aside(run: Path, name: str, size: int = 0) -> Path:
    (run / name / "adapter").mkdir(parents=True)
    (run / name / "adapter" / "weights").write_bytes(b"\0" * size)
    return run / name


def snapshot(run: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(run)): path.read_bytes() if path.is_file() else None
        for path in run.rglob("*")
        if path.name != ".lock"
    }


def text(asides: list[dict]) -> str:
    output = io.StringIO()
    shown.show(asides, Console(file=output, width=80))
    return output.getvalue()


def test_what_the_run_directory_moved_aside_is_found_and_removed_and_nothing_else(run: Path):
    for _ in range(2):  # the same second: the next ones are numbered
        aside(run, "sft")
        RunDirectory(run).set_aside("sft")
    before = snapshot(run)
    asides = prune.find(run)
    assert sorted(one["stage"] for one in asides) == ["reward", "sft", "sft"]
    prune.remove(run, [one["name"] for one in asides])
    assert prune.find(run) == []
    kept = {name: content for name, content in before.items() if "." not in name.split("/")[0]}
    assert snapshot(run) == kept
    assert "reward/log.txt" in kept


def test_a_folder_is_listed_with_what_it_was_its_size_and_its_time(run: Path):
    (former,) = prune.find(run)
    size = sum(path.stat().st_size for path in (run / former["name"]).iterdir())
    assert abs(time.time() - former.pop("moved_at")) < 60
    assert re.fullmatch(r"reward\.\d{8}-\d{6}", former["name"])
    assert former == {"name": former["name"], "stage": "reward", "bytes": size} | RECORD


def test_what_another_run_shares_is_not_in_the_size_for_it_stays(run: Path, tmp_path: Path):
    weights = aside(run, "sft.20250102-030405", 2000) / "adapter" / "weights"
    (weights.parent / "config").write_bytes(b"{}")
    (tmp_path / "other").hardlink_to(weights)
    assert prune.find(run)[0]["bytes"] == 2
    (tmp_path / "other").unlink()
    assert prune.find(run)[0]["bytes"] == 2002


def test_folders_are_listed_oldest_first_with_all_that_is_in_them(run: Path):
    shutil.rmtree(run / prune.find(run)[0]["name"])
    aside(run, "sft.20250102-030405-2", 1500)
    aside(run, "sft.20250102-030405", 10)
    aside(run, "test.20240102-030405-11", 2_500_000)
    asides = prune.find(run)
    assert [(one["name"], one["bytes"], one["state"], one["metrics"]) for one in asides] == [
        ("test.20240102-030405-11", 2_500_000, None, None),
        ("sft.20250102-030405", 10, None, None),
        ("sft.20250102-030405-2", 1500, None, None),
    ]
    assert asides[1]["moved_at"] == time.mktime((2025, 1, 2, 3, 4, 5, 0, 0, -1))


def test_the_table_tells_what_each_was_and_the_total(run: Path):
    now = time.time()
    asides = [
        {"name": "reward.1", "stage": "reward", "moved_at": now - 2 * 86400, "bytes": 2_500_000, **RECORD},
        {"name": "sft.2", "stage": "sft", "moved_at": now - 7300, "bytes": 40, "kind": None, "state": None,
         "metrics": None},
        {"name": "ppo.3", "stage": "ppo", "moved_at": now - 130, "bytes": 12_000, "kind": "ppo", "state": "failed",
         "metrics": {"objective/kl": None}},
    ]  # fmt: skip
    lines = text(asides).splitlines()
    assert lines[0].split() == ["moved", "aside", "was", "age", "size"]
    assert lines[1].split() == ["reward.1", "done,", "held-out", "accuracy", "0.61", "2", "d", "2.5", "MB"]
    assert lines[2].split() == ["sft.2", "without", "a", "record", "2", "h", "1", "min", "40", "B"]
    assert lines[3].split() == ["ppo.3", "failed", "2", "min", "10", "s", "12", "kB"]
    assert lines[4] == "3 folders, 2.5 MB"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12 kB"), (1_500_000, "1.5 MB"), (3e9, "3.0 GB"),
     (2e12, "2.0 TB")],
)  # fmt: skip
def test_sizes_are_readable(size: float, text: str):
    assert shown.size_text(size) == text


@pytest.mark.parametrize("name", NOT_ASIDE)
def test_a_name_that_is_not_exactly_one_is_neither_found_nor_removed(run: Path, name: str):
    if not (run / name).exists():
        aside(run, name)
    (run / name / "precious").touch()
    assert len(prune.find(run)) == 1
    with pytest.raises(RunError, match="not moved aside by a run"):
        prune.remove(run, [name])
    assert (run / name / "precious").exists()


@pytest.mark.parametrize("name", ["../outside.20250102-030405", "reward/in.20250102-030405/../../reward"])
def test_a_path_is_not_a_name(run: Path, name: str):
    target = aside(run, name)
    with pytest.raises(RunError, match="not moved aside by a run"):
        prune.remove(run, [name])
    assert target.is_dir()


def test_links_are_neither_followed_nor_counted(run: Path, tmp_path: Path):
    elsewhere = aside(tmp_path, "elsewhere", 5000)
    (run / "sft.20250102-030405").symlink_to(elsewhere)
    (former,) = prune.find(run)
    before = former["bytes"]
    (run / former["name"] / "link").symlink_to(elsewhere / "adapter" / "weights")
    (run / former["name"] / "folder").symlink_to(elsewhere)
    (former,) = prune.find(run)
    assert former["bytes"] - before < 1000
    with pytest.raises(RunError, match="not moved aside by a run"):
        prune.remove(run, ["sft.20250102-030405"])
    prune.remove(run, [former["name"]])
    assert (elsewhere / "adapter" / "weights").stat().st_size == 5000
    assert not (run / former["name"]).exists()
    assert (run / "sft.20250102-030405").is_symlink()


def test_a_file_with_such_a_name_stays(run: Path):
    (run / "sft.20250102-030405").write_text("mine")
    assert len(prune.find(run)) == 1


@pytest.mark.slow
def test_nothing_is_listed_or_removed_while_a_run_goes_on(run: Path):
    (former,) = prune.find(run)
    before = snapshot(run)
    with subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for attempt in (lambda: prune.find(run), lambda: prune.remove(run, [former["name"]])):
            with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
                attempt()
        done = command(run.parent, "run", "--yes")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"in use by process {holder.pid}" in done.stderr
        holder.kill()
    assert snapshot(run) == before


def test_what_broke_off_is_not_called_running(run: Path):
    (former,) = prune.find(run)
    RunDirectory(run).write_record(former["name"], Record.model_validate(RECORD | {"state": "running"}))
    assert prune.find(run)[0]["state"] == "failed"


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    code, out, err = short_run.ask(folder, "prune", *arguments)
    return subprocess.CompletedProcess(arguments, code, out, err)


def test_without_a_terminal_the_command_lists_and_says_how_to_remove(run: Path):
    before = snapshot(run)
    done = command(run.parent, "run")
    assert done.returncode == 0
    assert "held-out accuracy 0.61" in done.stdout
    assert "1 folder, " in done.stdout
    assert done.stderr == "to remove them: rlhf-pipeline prune run --yes\n"
    assert snapshot(run) == before


def test_with_yes_the_command_removes_and_a_second_time_there_is_nothing(run: Path):
    (former,) = prune.find(run)
    done = command(run.parent, "run", "--yes")
    assert (done.returncode, done.stderr) == (0, "removed\n")
    assert former["name"] in done.stdout
    assert not (run / former["name"]).exists()
    assert (run / "reward" / "log.txt").read_text() == "now"
    again = command(run.parent, "run", "--yes")
    assert (again.returncode, again.stdout, again.stderr) == (0, "run: nothing was moved aside\n", "")


def test_the_object_lists_and_removes_only_with_yes(run: Path):
    asides = prune.find(run)
    expected = {"run": str(run), "folders": asides, "bytes": asides[0]["bytes"]}
    done = command(run.parent, "run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == expected | {"removed": False}
    assert prune.find(run) == asides
    assert json.loads(command(run.parent, "run", "--json", "--yes").stdout) == expected | {"removed": True}
    assert json.loads(command(run.parent, "run", "--json").stdout)["folders"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("\n", False)])
def test_at_a_terminal_the_command_asks(run: Path, answer: str, removed: bool):
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this platform")
    ours, theirs = pty.openpty()
    (former,) = prune.find(run)
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", "prune", "run"],
        cwd=run.parent, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.write(ours, answer.encode())
        output, errors = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert "Remove them for good? [y/N]" in errors
    assert "Remove" not in output
    assert (run / former["name"]).exists() is not removed
