"""Help that can be typed as it stands, and output that keeps to its streams, over every command there is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from rlhf_pipeline import cli, recipe
from rlhf_pipeline.sweep import check, keys

GROUP = typer.main.get_command(cli.app)
COMMANDS = sorted(GROUP.commands)
# What these examples do is tested elsewhere, and would take too long here: their options, overrides and recipes are
# checked instead.
LONG = {
    "run": "trains",
    "sweep": "trains",
    "smoke": "trains",
    "validate": "imports torch",
    "data": "imports torch",
    "forecast": "imports torch",
    "shrink": "imports torch",
    "chat": "imports torch",
    "score": "imports torch",
    "serve": "imports torch",
    "compare": "imports torch",
    "export": "imports torch",
    "label": "waits for people",
    "arena": "waits for people",
}
RECIPE = """\
name: {name}
model: {{path: tiny}}
stages:
  sft: {{data: tiny:demonstrations}}
  reward: {{data: tiny:preferences}}
  ppo: {{data: tiny:prompts}}
  dpo: {{data: tiny:preferences}}
"""


class Said(NamedTuple):
    exit_code: int
    out: str
    err: str


@pytest.fixture
def say(monkeypatch, capfd) -> Callable[..., Said]:
    """The command itself, in this process, which has imported already what takes most of its time."""

    def main(folder: Path, *arguments: str) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capfd.readouterr())

    return main


def examples(text: str) -> list[tuple[str, str]]:
    """The commands in a help text, each with the comment above it."""
    lines = [line.strip() for line in text.splitlines()]
    return [(lines[i], lines[i - 1]) for i in range(1, len(lines)) if lines[i].startswith("rlhf-pipeline ")]


def all_examples() -> list[str]:
    texts = [str(GROUP.epilog), *(str(GROUP.commands[name].epilog) for name in COMMANDS)]
    return list(dict.fromkeys(line for text in texts for line, _ in examples(text)))


def command_of(line: str) -> str:
    return line.split()[1]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: "-".join(command))
def test_help_has_worked_examples_and_fits_eighty_columns(command, say, tmp_path):
    text = say(tmp_path, *command, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    shown = examples(text)
    assert 2 <= len(shown) <= 4
    for line, comment in shown:
        assert re.fullmatch(r"# \S.*\w.*", comment), line
        assert line in all_examples()
    if command:
        assert command_of(shown[0][0]) == command[0]


def test_the_summary_of_commands_is_whole(say, tmp_path):
    """None of the one-line descriptions is too long for its place."""
    text = say(tmp_path, "--help").out.partition("Start:")[2].partition("Examples:")[0]
    summary = [line for line in text.splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in summary if line.strip()) == COMMANDS
    assert "..." not in text
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert ["Start", *titles] == ["Start", "Check", "Run", "Look", "Keep"]


COMPLETED = {
    "rlhf-pipeline cha": ["chat"],
    "rlhf-pipeline run tiny-g": ["tiny-grpo"],
    "rlhf-pipeline run fi": ["first.yaml"],
    "rlhf-pipeline watch runs/f": ["runs/first/"],
    "rlhf-pipeline run first.yaml --until r": ["reward"],
    "rlhf-pipeline chat first.yaml --stage ": ["sft", "reward", "ppo", "dpo"],
    "rlhf-pipeline export first.yaml d": ["dpo"],
    "rlhf-pipeline export gone.yaml d": [],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_a_shell_completes_commands_recipes_runs_and_stages(line, prepared, monkeypatch, capfd):
    """As the script that `--show-completion` prints asks for it."""
    monkeypatch.chdir(prepared)
    for name, value in (("_RLHF_PIPELINE_COMPLETE", "complete_bash"), ("COMP_WORDS", line)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    with pytest.raises(SystemExit):
        GROUP.main([], prog_name="rlhf-pipeline")
    assert capfd.readouterr().out.split() == COMPLETED[line]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with all that the examples name."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("my-recipe", "first", "second"):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name))
        for stage in ("sft", "sft.20260102-030405"):
            (folder / "runs" / name / stage).mkdir(parents=True)
            (folder / "runs" / name / stage / "stage.json").write_text('{"kind": "sft", "state": "done"}')
    return folder


@pytest.mark.parametrize("line", [line for line in all_examples() if command_of(line) not in LONG])
def test_an_example_does_what_it_says(line, say, prepared, tmp_path):
    """Those that a shell has a part in, in a shell, as they are typed."""
    folder = shutil.copytree(prepared, tmp_path / "folder")
    if command_of(line) == "cp":
        (folder / "my-recipe.yaml").unlink()  # which it is to make
    done = in_a_shell(folder, line) if re.search("[>&|$]", line) else say(folder, *shlex.split(line)[1:])
    not_done = " -q" in line  # that is all that it says
    assert done.exit_code == (1 if not_done else 0), done.err
    assert "error" not in done.err
    if not_done:
        assert done.out == ""
    elif ">" in line:
        assert (folder / line.rpartition(">")[2].strip()).stat().st_size > 100
    else:
        assert done.out.strip()


def in_a_shell(folder: Path, line: str) -> Said:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        env=os.environ | {"PATH": path}, check=False,
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("line", [line for line in all_examples() if command_of(line) in LONG])
def test_a_long_example_is_understood(line, prepared, tmp_path, monkeypatch):
    """Its options exist; its recipe loads with its overrides; its stages are in it."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "folder"))
    name, *arguments = [word for word in shlex.split(line)[1:] if word != ">"]
    with GROUP.commands[name].make_context(name, arguments) as context:
        given = context.params
    if "settings" in given:
        swept, fixed = keys.parse(given["settings"])
        assert check.Loader(given["recipe"], fixed, swept).all(keys.grid(swept))
    elif "recipe" in given:
        words = given.get("overrides") or given.get("stage_and_overrides") or []
        loaded = recipe.load(given["recipe"], [word for word in words if "=" in word])
        stages = [word for word in words if "=" not in word]
        stages += [given[key] for key in ("until", "only") if given.get(key)]
        assert set(stages) <= set(loaded.stages)


def test_an_example_that_is_not_understood_would_be_found(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(prepared)
    for arguments in (["my-recipe.yaml", "--unti", "sft"], []):
        with pytest.raises(Exception, match=r"unti|recipe") as caught:
            GROUP.commands["run"].make_context("run", arguments)
        assert type(caught.value).__name__ in ("NoSuchOption", "MissingParameter")


# Streams and colour

WRONG = {
    "run": ("gone.yaml",), "plan": ("gone.yaml",), "status": ("gone.yaml",), "validate": ("gone.yaml",),
    "sweep": ("gone.yaml", "seed=1,2"),
    "show": ("gone.yaml",), "data": ("gone.yaml",), "smoke": ("gone.yaml",), "cp": ("gone",), "diff": ("a", "b"),
    "prune": ("gone",), "compare": ("gone",), "report": ("gone",), "shrink": ("./gone", "out"),
    "export": ("gone", "ppo", "out"), "ls": ("too", "many"), "env": ("too", "many"),
    "docs": ("gone",), "runs": ("gone",), "forecast": ("gone.yaml",),
    "schema": ("too", "many"), "chat": ("gone",), "score": ("gone", "rows.jsonl"), "serve": ("gone",),
    "watch": ("gone",),
    "label": ("gone",), "arena": ("gone",),
}  # fmt: skip
RIGHT = {
    "plan": ("first.yaml",), "status": ("first.yaml",), "show": ("first.yaml",), "ls": (), "cp": ("tiny",), "env": (),
    "diff": ("runs/first", "runs/second"), "report": ("runs/first",), "prune": ("runs/first", "--yes"), "schema": (),
    "docs": (),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_go_to_standard_error_in_plain_text(command, say, tmp_path):
    for arguments in (WRONG[command], ("--no-such-option",)):
        done = say(tmp_path, command, *arguments)
        assert (done.exit_code, done.out) == (2, "")
        assert re.search("^error", done.err, re.IGNORECASE | re.MULTILINE)
        assert "\x1b" not in done.err and "Traceback" not in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", sorted(RIGHT.keys() & set(COMMANDS)))
def test_data_go_to_standard_output_in_plain_text(command, say, prepared, tmp_path):
    done = say(shutil.copytree(prepared, tmp_path / "folder"), command, *RIGHT[command])
    assert done.exit_code == 0
    assert done.err == ("removed\n" if command == "prune" else "")
    assert done.out.strip() and "\x1b" not in done.out


def on_a_terminal(folder: Path, *arguments: str, **environment: str) -> str:
    """What a command shows on a terminal, through both streams."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this platform")
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=theirs, env=plain | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:  # as it comes: a terminal holds little
        try:
            some = os.read(ours, 65536)
        except OSError:  # Linux says so that it is over
            break
        if not some:
            break
        shown += some
    os.close(ours)
    process.wait(timeout=60)
    return shown.decode()


COLOUR = re.compile(r"\x1b\[[\d;]*[34][0-9]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("status", "first.yaml"), ("plan", "gone.yaml"), ("plan", "--no-such-option"), ("plan", "--help")]
)
def test_no_color_is_honoured_on_a_terminal(words, prepared):
    """By data, our errors, typer's and its help."""
    shown = on_a_terminal(prepared, *words, NO_COLOR="1")
    assert shown.strip()
    assert not COLOUR.search(shown)


@pytest.mark.slow
def test_a_terminal_without_no_color_has_colour(prepared):
    """Else there would be nothing to honour."""
    assert COLOUR.search(on_a_terminal(prepared, "status", "first.yaml"))
