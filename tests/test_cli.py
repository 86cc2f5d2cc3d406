"""The door: quick, readable without colour, data on standard output and everything else on standard error."""

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import short_run

from rlhf_pipeline import __version__, cli, recipe
from rlhf_pipeline.errors import InputError, Interrupted, RunError
from rlhf_pipeline.run import runner

RECIPE = """\
# A small one.
name: t
model: {path: tiny}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
"""
HEAVY = {"torch", "trl", "transformers", "datasets", "peft"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A command in this process, which has imported already what takes most of its time."""
    code, out, err = short_run.ask(folder, *arguments)
    return subprocess.CompletedProcess(arguments, code, out, err)


def run_real(folder: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str):
    """A command in a process of its own."""
    command = [sys.executable, *flags, "-m", "rlhf_pipeline", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False
    )


def imported(folder: Path, *arguments: str) -> set[str]:
    done = run_real(folder, *arguments, flags=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.MULTILINE))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_help_answers_at_once(folder):
    """Measured as processor time, which other work on the machine does not lengthen."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_real(folder, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    for command in ("run", "plan", "status", "validate", "diff", "prune", "ls", "cp", "env"):
        assert re.search(rf"^\s*{command}\b", done.stdout, re.MULTILINE), command
    assert min(times) < 0.3


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("ls",), ("plan", "r.yaml"), ("status", "r.yaml", "--json")],
)
@pytest.mark.slow
def test_what_looks_and_tells_imports_no_torch(folder, arguments):
    modules = imported(folder, *arguments)
    assert "rlhf_pipeline.cli" in modules
    assert not modules & HEAVY


def test_version_and_env_name_the_version(folder):
    assert run(folder, "--version").stdout == f"rlhf-pipeline {__version__}\n"
    done = run(folder, "env")
    shown = dict(line.removeprefix("- ").split(": ", 1) for line in done.stdout.splitlines())
    assert shown["rlhf-pipeline"] == __version__
    assert shown["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert shown["trl"] == importlib.metadata.version("trl")
    assert {"torch", "transformers", "peft", "bitsandbytes", "platform", "cpus", "gpu"} <= set(shown)
    assert "not installed" not in done.stdout


@pytest.mark.parametrize(("count", "said"), [(0, "no warnings"), (1, "1 warning"), (7, "7 warnings")])
def test_validate_ends_with_how_many_warnings_there_are(folder, monkeypatch, count, said):
    monkeypatch.setattr(runner, "check", lambda recipe, card: runner.Checked(["look at that"] * count, None))
    done = run(folder, "validate", "r.yaml")
    assert done.stdout == f"r.yaml: 3 stages, no errors, {said}\n"
    assert done.stderr == "warning: look at that\n" * count


def test_ls_lists_every_shipped_recipe_with_what_it_is(folder):
    """The first line of its comment, below the editors' hint."""
    lines = run(folder, "ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe.shipped())
    for line, path in zip(lines, recipe.shipped().values(), strict=True):
        about = line.split(maxsplit=1)[1]
        assert path.read_text().splitlines()[1] == f"# {about}"


def test_cp_copies_a_recipe_and_refuses_to_overwrite(folder):
    done = run(folder, "cp", "tiny")
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny.yaml\n", "")
    # With no path of this machine in it; what its first line names for editors lies beside it.
    assert (folder / "tiny.yaml").read_text() == recipe.shipped()["tiny"].read_text()
    hint, _, schema = (folder / "tiny.yaml").read_text().splitlines()[0].partition("=")
    assert (hint, schema) == ("# yaml-language-server: $schema", "recipe.schema.json")
    assert json.loads((folder / schema).read_text())["properties"]["stages"]
    (folder / schema).write_text("mine")
    assert run(folder, "cp", "tiny", "other.yaml").returncode == 0 and (folder / schema).read_text() == "mine"
    (folder / "tiny.yaml").write_text("mine")
    again = run(folder, "cp", "tiny")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: tiny.yaml exists already\nhint: name another file\n"
    assert (folder / "tiny.yaml").read_text() == "mine"


def test_cp_takes_a_name_or_a_folder_to_copy_to(folder):
    (folder / "sub").mkdir()
    assert run(folder, "cp", "tiny", "other.yaml").stdout == "other.yaml\n"
    assert run(folder, "cp", "tiny", "sub").stdout == "sub/tiny.yaml\n"
    assert (folder / "other.yaml").is_file()
    assert (folder / "sub" / "tiny.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tinny",), "no shipped recipe `tinny`"), (("tiny", "gone/my.yaml"), "there is no folder gone")],
)
def test_cp_refuses_what_it_cannot_do(folder, arguments, message):
    done = run(folder, "cp", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_json_of_a_fresh_directory(folder):
    shown = {command: json.loads(run(folder, command, "r.yaml", "--json").stdout) for command in ("plan", "status")}
    for command, object_ in shown.items():
        assert object_["run"] == str(folder / "runs" / "t")
        assert [stage["name"] for stage in object_["stages"]] == ["sft", "reward", "ppo"]
        for stage in object_["stages"]:
            keys = {"name", "kind", "state", "reason", "init", "reward", "rewards", "others", "fingerprint", "wall_s",
                    "metrics", "peak_memory_bytes", "forecast_memory_bytes", "artifact", "taken_from", "log", "step",
                    "gates", "to_go", "left_out"}  # fmt: skip
            of_plan = (
                {"will", "will_run", "data", "class_weights", "memory", "processes"} if command == "plan" else set()
            )
            assert set(stage) == keys | of_plan
            assert (stage["state"], stage["wall_s"], stage["metrics"], stage["artifact"]) == ("missing", None, {}, None)
    assert [(stage["init"], stage["reward"]) for stage in shown["status"]["stages"]] == [
        ("base", None),
        ("sft", None),
        ("sft", "reward"),
    ]
    assert not (folder / "runs").exists()


def test_status_q_only_exits(folder):
    """Whether all is up to date, for scripts."""
    done = run(folder, "status", "-q", "r.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_plan_takes_overrides_and_options_as_run_does(folder):
    done = run(folder, "plan", "r.yaml", "sft.trainer.learning_rate=1e-3", "--until", "reward", "--json")
    assert [stage["will_run"] for stage in json.loads(done.stdout)["stages"]] == [True, True, False]
    wrong = run(folder, "plan", "r.yaml", "--until", "rewrad")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --until: there is no stage `rewrad`\nhint: ")


@pytest.mark.slow
def test_output_that_is_no_terminal_has_no_escape_codes(folder):
    for arguments in (("plan", "r.yaml"), ("plan", "gone.yaml")):
        done = run_real(folder, *arguments)
        assert done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_errors_go_to_standard_error_and_data_to_standard_output(folder):
    good, bad = run_real(folder, "plan", "r.yaml"), run_real(folder, "plan", "r.yaml", "seed=x")
    assert (good.returncode, good.stderr) == (0, "")
    assert "has not run yet" in good.stdout
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: override `seed=x`: ")


@pytest.mark.slow
def test_what_cannot_be_written_is_said_in_one_line(folder):
    done = run(folder, "cp", "tiny", "n" * 300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {'n' * 300}: File name too long\n"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "rlhf_pipeline", "schema"]
        done = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_command_that_does_not_exist_is_refused(folder):
    done = run(folder, "trian", "r.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "trian" in done.stderr


# The report that ends a run


@pytest.mark.parametrize(
    "end", [None, RunError("a stage failed"), Interrupted("stopped"), InputError("nothing was trained")]
)
def test_a_run_leaves_a_report_however_it_ends(tiny_run, tmp_path, monkeypatch, capsys, end) -> None:
    """Unless it never began."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))
    (run / "report.html").unlink()

    def over(*_: object, **__: object) -> list:
        if end is not None:
            raise end
        return []

    monkeypatch.setattr(runner, "run", over)
    monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "run", "tiny", f"output_dir={tmp_path / 'runs'}"])
    with contextlib.suppress(SystemExit):
        cli.main()
    if isinstance(end, InputError):
        assert not (run / "report.html").exists()
    else:
        assert "Policies compared" in (run / "report.html").read_text(encoding="utf-8")


def test_a_report_is_written_again_where_something_is_newer_and_only_there(tiny_run, tmp_path, capsys) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    report = run / "report.html"
    report.write_text("as it was")
    cli.runs._report(run)
    assert report.read_text() == "as it was"
    for newer in ("comparison.json", "sft/stage.json", "ppo/metrics.jsonl"):
        report.write_text("as it was")
        later = report.stat().st_mtime + 1
        os.utime(run / newer, (later, later))
        cli.runs._report(run)
        assert "as it was" not in report.read_text()[:20], newer
        os.utime(run / newer, (0, 0))
    report.unlink()
    report.mkdir()
    (report / "in the way").touch()
    cli.runs._report(run)  # what cannot be written is a warning
    assert "warning: there is no new report" in capsys.readouterr().err
    cli.runs._report(tmp_path / "never began")
    assert not (tmp_path / "never began").exists()


# What is not ours cannot steer the terminal

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ebackwards\u2066\u061c"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069]")


def test_an_error_cannot_steer_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the recipe, of data, and of a fault that nobody expected, whatever raised it."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("sft:", json.dumps(EVIL) + ":"))
    (folder / "data.yaml").write_text(RECIPE.replace("tiny:demonstrations", "rows.jsonl"))
    (folder / "rows.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    said = [run(folder, "plan", "recipe.yaml"), run(folder, "plan", "data.yaml")]
    assert [done.returncode for done in said] == [2, 2]

    def fail() -> None:
        raise ValueError(EVIL)

    monkeypatch.setattr(cli, "app", fail)
    said.append(run(folder, "ls"))
    assert said[-1].returncode == 1 and "Traceback" in said[-1].stderr
    for done in said:
        assert "backwards" in done.stderr and not STEERS.search(done.stdout + done.stderr), done.stderr


@pytest.mark.parametrize("command", ["status", "plan", "diff"])
def test_a_record_cannot_steer_the_terminal(folder: Path, command: str) -> None:
    """The error of a stage is what somebody's judge raised."""
    stage = folder / "runs" / "t" / "sft"
    stage.mkdir(parents=True)
    failed = {"name": "sft", "kind": "sft", "state": "failed", "error": EVIL, "inputs": {"seed": EVIL}}
    (stage / "stage.json").write_text(json.dumps(failed))
    shutil.copytree(stage.parent, folder / "runs" / "u")
    (folder / "runs" / "u" / "sft" / "stage.json").write_text(json.dumps(failed | {"inputs": {"seed": 1}}))
    done = run(folder, command, *(("runs/t", "runs/u") if command == "diff" else ("r.yaml",)))
    assert done.returncode == 0, done.stderr
    assert "backwards" in done.stdout.replace("\n", "") and not STEERS.search(done.stdout)
