"""A run on the terminal as it goes: what is read, how often, and what of it reaches people."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_run
from rich.console import Console

from rlhf_pipeline import cli, recipe
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.pace import Pace
from rlhf_pipeline.terminal import live
from rlhf_pipeline.terminal.watching import MOST_BYTES, Growing, RunView

NOW = 1_800_000_000.0
UPDATE_S = 5.0


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tell(run: Path, stage: str, phase: str, step: int, of: int | None, at: float = NOW, **more: int) -> None:
    file = run / stage / "work" / "progress.json"
    file.write_text(json.dumps({"phase": phase, "step": step, "of": of, "time": at, **more}))
    os.utime(file, (at, at))


def put_to_work(run: Path, stage: str, began: float, **record: Any) -> None:
    """Have a stage be at work since then, as the runner does."""
    (run / stage / "work").mkdir(parents=True, exist_ok=True)
    kind = record.pop("kind", stage)
    written = {"name": stage, "kind": kind, "state": "running", "wall_s": 0.0} | record
    (run / stage / "stage.json").write_text(json.dumps(written))
    job = run / stage / "work" / "job.json"
    job.write_text("{}")
    os.utime(job, (began, began))


def finish(run: Path, stage: str, **record: Any) -> None:
    """Have a stage be done, as the runner does."""
    adapter = run / stage / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_text(f"weights of {stage}")
    written = {"name": stage, "kind": stage, "state": "done", "wall_s": 16.3, "artifact": f"{stage}/adapter"}
    written |= {"artifact_files": durable.contents(adapter)} | record
    (run / stage / "stage.json").write_text(json.dumps(written))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """PPO at update 120 of 312, 5 s each, after SFT and the reward model; DPO is to come."""
    loaded = recipe.load("tiny", [f"output_dir={tmp_path}", "ppo.trainer.kl_budget=8"])
    finish(loaded.run, "sft", metrics={"loss": 0.61, "judge_mean": 0.54})
    finish(loaded.run, "reward", metrics={"eval_accuracy": 0.87})
    (loaded.run / "recipe.yaml").write_text(recipe.to_yaml(loaded))
    put_to_work(loaded.run, "ppo", NOW - 120 * UPDATE_S - 10, inputs={"trainer.kl_budget": 8.0})
    rows = [
        {
            "step": step,
            "time": NOW - (120 - step) * UPDATE_S,
            "objective/scores": 1.82 * step / 120,
            "objective/kl": 3.1 * step / 120,
            "reply/length": 63.0,
            "reply/ended": 0.97,
        }
        for step in range(1, 121)
    ]
    write_rows(loaded.run / "ppo" / "metrics.jsonl", rows)
    sample = {"step": 118, "prompt": "Q: What\nis up?", "completion": " The sky.", "score": 3.28, "kl": 1.2}
    write_rows(loaded.run / "ppo" / "samples.jsonl", [{"step": 1, "prompt": "old", "completion": "older"}, sample])
    tell(loaded.run, "ppo", "training", 120, 312)
    return loaded.run


def seen(run: Path, now: float = NOW, going_on: bool = True) -> RunView:
    view = RunView(run, locked=lambda: going_on)
    view.refresh(now)
    return view


def frame(view: RunView, width: int = 80, height: int = 24, encoding: str = "utf-8", now: float = NOW) -> list[str]:
    """The display as a terminal of that size shows it, line by line."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=output, width=width, height=height, force_terminal=True, no_color=True)
    console.print(live.Display(view, now))
    assert isinstance(output.buffer, io.BytesIO)
    text = output.buffer.getvalue().decode(encoding)
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")][:-1]


def test_the_display_shows_every_stage_and_all_that_matters_of_the_one_at_work(run):
    lines = frame(seen(run))
    assert [line.split()[:3] for line in lines[:4]] == [
        ["✓", "sft", "done"],
        ["✓", "reward", "done"],
        ["▸", "ppo", "training"],
        ["·", "dpo", "missing"],
    ]
    assert "16 s   loss 0.61   judge 0.54" in lines[0] and "10 min 10 s" in lines[2]
    assert re.fullmatch(r"  ━+─+  ppo: step 120/312, 38%, 16 min left", lines[5])
    assert 0.34 < lines[5].count("━") / (lines[5].count("━") + lines[5].count("─")) < 0.42
    numbers = [line.split() for line in lines[6:10]]
    assert [words[0] for words in numbers] == ["score", "KL", "length", "ended"]
    assert numbers[0][1] == "1.82" and numbers[1][1:4] == ["3.1", "of", "8"]
    trend = numbers[0][-1]
    assert len(trend) == 30 and list(trend) == sorted(trend) and trend[0] == "▁" and trend[-1] == "▇"
    assert numbers[2][-1] == "▁" * 30
    assert "a sample: step 118, score 3.28, kl 1.2" in lines[11]
    assert [line.split(maxsplit=1) for line in lines[12:]] == [["prompt", "Q: What is up?"], ["reply", "The sky."]]


@pytest.mark.parametrize(
    ("width", "height"), [(12, 24), (24, 24), (40, 9), (80, 2), (80, 5), (80, 14), (140, 60), (250, 24)]
)
def test_the_display_fits_every_terminal(run, width, height):
    words = {"prompt": "word " * 300, "completion": "漢字" * 400 + " x" * 50, "step": 119}
    with (run / "ppo" / "samples.jsonl").open("a") as samples:
        samples.write(json.dumps(words) + "\n")
    lines = frame(seen(run), width, height)
    assert len(lines) <= height - 1
    assert all(Console().measure(line).maximum <= width for line in lines)
    assert any("120/312" in line for line in lines) or width < 24
    assert any("▸" in line for line in lines) or height < 9


def test_more_stages_than_lines_leave_the_one_at_work_in_sight(run):
    names = [f"sft{i}" for i in range(40)]
    text = (run / "recipe.yaml").read_text()
    stages = "".join(f"  {name}: {{kind: sft, init: base, data: {{path: x}}}}\n" for name in names)
    (run / "recipe.yaml").write_text(text[: text.index("stages:")] + "stages:\n" + stages)
    put_to_work(run, "sft25", NOW - 5, kind="sft")
    tell(run, "sft25", "training", 3, 9)
    lines = frame(seen(run), 80, 16)
    assert len(lines) <= 15
    assert any("▸ sft25" in line for line in lines) and "more" in "".join(lines)


def test_a_terminal_without_these_characters_gets_others(run):
    with (run / "ppo" / "samples.jsonl").open("a") as samples:
        samples.write(json.dumps({"step": 119, "prompt": "Größe — 漢字…", "completion": "é" * 300}) + "\n")
    text = "\n".join(frame(seen(run), encoding="ascii"))
    assert text.isascii() and "#" in text and "> ppo" in text and "step 120/312" in text


def test_text_of_data_cannot_steer_the_terminal(run):
    evil = "\x1b]0;owned\x07\x1b[2J\u202ebackwards\x9b31m [bold]not bold[/] [/nothing]\x00\u200b"
    write_rows(run / "ppo" / "samples.jsonl", [{"step": 1, "prompt": [{"role": evil, "content": evil}]}])
    record = {"kind": "dpo", "state": "failed", "error": evil}
    (run / "dpo").mkdir()
    (run / "dpo" / "stage.json").write_text(json.dumps(record))
    text = "\n".join(frame(seen(run), 140))
    assert "[bold]not bold[/] [/nothing]" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b]", text)


def test_states_are_honest(run):
    """A record that says `running` says so for ever where its run was killed; one is built on what is not there."""
    dead = seen(run, going_on=False)
    assert dead.at_work is None
    assert [stage.state for stage in dead.stages] == ["done", "done", "failed", "missing"]
    record = json.loads((run / "ppo" / "stage.json").read_text()) | {"wall_s": 0.0}  # of when it began
    (run / "ppo" / "stage.json").write_text(json.dumps(record))
    (killed,) = (line for line in frame(seen(run, going_on=False)) if "ppo" in line)
    assert killed.split() == ["✗", "ppo", "failed", *["the", "run", "ended", "before", "the", "stage", "did"]]
    finish(run, "dpo", init="sft", parent_weights={"sft": "those of then"})
    (dpo,) = (line for line in frame(seen(run)) if "dpo" in line)
    assert dpo.split() == ["✗", "dpo", "stale", "16", "s", "sft", "ran", "again"]
    (run / "ppo" / "stage.json").write_text('{"kind": "ppo", "state": "failed", "error": "stopped"}')
    stopped = seen(run)
    assert (stopped.stages[2].state, stopped.stages[2].reason) == ("failed", "stopped before its first checkpoint")


def test_what_an_earlier_worker_told_is_not_shown(run):
    put_to_work(run, "ppo", NOW + 100)
    view = seen(run, NOW + 103)
    assert view.at_work and view.at_work.phase == "starting" and view.at_work.left is None
    tell(run, "ppo", "training", 100, 312, at=NOW + 105)
    view.refresh(NOW + 105)
    assert (view.at_work.phase, view.at_work.step, view.at_work.left) == ("training", 100, None)
    assert any("32%, \N{EN DASH} left" in line for line in frame(view))
    tell(run, "ppo", "training", 102, 312, at=NOW + 125)
    view.refresh(NOW + 125)
    assert view.at_work.left == pytest.approx(10 * 210)


def test_within_the_runs_own_process_only_what_it_wrote_itself_is_at_work(run):
    """`run` has not taken the lock yet when it begins to show."""
    view = RunView(run, recipe.of_run(run))
    view.refresh(NOW)
    assert view.at_work is None
    put_to_work(run, "ppo", NOW - 3)
    os.utime(run / "ppo" / "stage.json", (NOW, NOW))
    view.refresh(NOW)
    assert view.at_work and view.at_work.name == "ppo"


def test_a_run_without_a_recipe_shows_the_stages_that_have_begun(run):
    (run / "recipe.yaml").unlink()
    (run / "sft.20260101-000000").mkdir()
    (run / "sft.20260101-000000" / "stage.json").write_text('{"kind": "sft"}')
    assert {stage.name for stage in seen(run).stages} == {"sft", "reward", "ppo"}


@pytest.mark.slow
def test_watching_needs_no_torch():
    """It is to answer at once, and on machines that only share the disk."""
    code = "import sys; import rlhf_pipeline.terminal.live; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Time left


def test_the_time_left_follows_the_recent_pace():
    pace = Pace()
    assert pace.seconds_left(100, 0.0) is None
    pace.note(0.0, 0)
    assert pace.seconds_left(100, 5.0) is None  # nobody can know yet
    for step in range(1, 11):  # the first are slow
        pace.note(step * 100.0, step)
    assert pace.seconds_left(100, 1000.0) == pytest.approx(90 * 100)
    for step in range(11, 90):
        pace.note(1000.0 + (step - 10) * 2.0, step)
    at = 1000.0 + 79 * 2.0
    assert pace.seconds_left(100, at) == pytest.approx(11 * 2)
    assert pace.seconds_left(100, at + 1.5) == pytest.approx(11 * 2 - 1.5)
    assert pace.seconds_left(100, at + 600) == pytest.approx(10 * 2)  # a step that hangs does not bring the end nearer
    assert pace.seconds_left(None, at) is None
    assert pace.seconds_left(89, at) == 0.0
    assert len(pace.marks) < 40


def test_what_is_no_news_does_not_change_the_pace():
    pace = Pace()
    for at, step in ((0.0, 0), (10.0, 1), (10.5, 1), (9.0, 5), (20.0, 2), (25.0, 2)):
        pace.note(at, step)
    assert pace.seconds_left(4, 25.0) == pytest.approx(15)


def test_of_an_ensemble_the_member_at_work_is_shown_and_the_time_of_those_after_it_is_left(run):
    put_to_work(run, "ppo", NOW, kind="reward")
    write_rows(run / "ppo" / "metrics.jsonl", [])
    view = seen(run)

    def at(step: int, member: int, after: float) -> str:
        tell(run, "ppo", "training", step, 10, NOW + after, member=member, members=3)
        view.refresh(NOW + after)
        return live.plain_line(view.at_work)

    at(8, 1, 0.0)
    assert at(9, 1, 3.0).strip() == "ppo     step 9/10 of member 1/3, 90%, 1 min left"
    at(0, 2, 10.0)
    assert at(1, 2, 12.0).strip() == "ppo     step 1/10 of member 2/3, 10%, 38 s left"
    assert at(10, 3, 20.0).strip().startswith("ppo     step 10/10 of member 3/3, 100%")


# Files that grow


def test_lines_are_read_once_and_only_when_they_are_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    growing = Growing(file)
    assert growing.read() == ([], False)
    file.write_text('{"step": 1}\n{"st')
    assert growing.read() == ([{"step": 1}], False)
    assert growing.read() == ([], False)
    with file.open("a") as lines:
        lines.write('ep": 2}\nnot json\n[3]\n{"step": 4}\n')
    assert growing.read() == ([{"step": 2}, {"step": 4}], False)


@pytest.mark.parametrize("steps", [(1, 2), (1, 2, 7), (1, 2, 7, 8, 9, 10, 11, 12, 13)])
def test_a_file_that_is_cut_or_replaced_is_read_anew(tmp_path, steps):
    """A run that goes on cuts what came after its checkpoint, and may have written more by the time one looks."""
    file = tmp_path / "metrics.jsonl"
    write_rows(file, [{"step": step} for step in (1, 2, 3, 4)])
    growing = Growing(file)
    growing.read()
    write_rows(tmp_path / "new", [{"step": step} for step in steps])
    (tmp_path / "new").replace(file)
    assert growing.read() == ([{"step": step} for step in steps], True)
    file.unlink()
    assert growing.read() == ([], True)
    assert growing.read() == ([], False)


def test_of_a_long_file_only_the_end_is_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, [{"step": step, "padding": "x" * 50} for step in range(100_000)])
    rows, _ = Growing(file).read()
    assert rows[-1]["step"] == 99_999
    assert 1000 < len(rows) < MOST_BYTES / 50
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], 100_000))


def test_a_resumed_stage_shows_no_values_of_steps_that_were_cut(run):
    view = seen(run)
    rows = [{"step": step, "time": NOW, "objective/scores": 0.5} for step in range(1, 11)]
    write_rows(run / "ppo" / "metrics.jsonl", rows)
    view.refresh(NOW)
    assert view.at_work and list(view.at_work.values["score"]) == [0.5] * 10


# Not on a terminal


def test_the_plain_line(run):
    stage = seen(run).at_work
    assert stage
    assert live.plain_line(stage) == (
        "ppo     step 120/312, 38%, 16 min left: score 1.82, KL 3.1 of 8, length 63, ended 0.97"
    )
    tell(run, "ppo", "judging", 40, 160)
    stage.read_work(NOW)
    assert live.plain_line(stage).startswith("ppo     judging 40/160, 25%: score")


def test_plain_lines_come_now_and_then_and_only_of_what_moved(run, monkeypatch):
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    said: list[str] = []
    plain = live._Plain(RunView(run, locked=lambda: True), said.append)

    def pass_by(seconds: int) -> list[str]:
        said.clear()
        for _ in range(seconds):
            plain.refresh()
            clock.seconds += 1
        return said

    assert pass_by(29) == []  # a stage that is shorter needs none
    assert ["120/312" in line for line in pass_by(2)] == [True]
    assert pass_by(100) == []  # nothing moves
    tell(run, "ppo", "training", 130, 312)
    assert ["130/312" in line for line in pass_by(25)] == [True]
    tell(run, "ppo", "training", 131, 312)
    assert pass_by(4) == []
    assert ["131/312" in line for line in pass_by(20)] == [True]


def test_without_a_terminal_lines_are_plain(run, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.01)
    monkeypatch.setattr(live, "PLAIN_EVERY_S", 0.05)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    said: list[str] = []
    deadline = time.monotonic() + 30
    with live.following(run, said.append, locked=lambda: True) as say:
        say("a line of the run's own")
        while len(said) < 2:
            time.sleep(0.01)
            assert time.monotonic() < deadline
    assert said[0] == "a line of the run's own" and said[1].startswith("ppo     step 120/312, 38%")
    assert sys.stderr.getvalue() == ""


def test_verbose_streams_the_log_without_secrets_or_control_characters(run, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.01)
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    log = run / "ppo" / "log.txt"
    log.write_text("of an earlier worker\n")
    said: list[str] = []
    with live.following(run, said.append, locked=lambda: True, verbose=True):
        with log.open("a") as lines:
            lines.write("first\x1b[31m line\n10%\r20%\nkey very-secret-value\nunfin")
        deadline = time.monotonic() + 30
        while len(said) < 4:
            time.sleep(0.01)
            assert time.monotonic() < deadline
        with log.open("a") as lines:
            lines.write("ished")
    assert said == ["first␛[31m line", "10%", "20%", "key ***", "unfinished"]


@contextlib.contextmanager
def terminal(width: int = 100, height: int = 30) -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: its two ends."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this platform")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    try:
        yield ours, theirs
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(end)


def drain(end: int, shown: str = "", until: str | None = None, timeout_s: float = 60.0) -> str:
    """What a terminal shows more, until it shows something, or as long as something comes."""
    deadline = time.monotonic() + timeout_s
    while until is None or until not in shown:
        assert until is None or time.monotonic() < deadline, shown[-5000:]
        if not select.select([end], [], [], 0.1 if until is None else 1.0)[0]:
            if until is None:
                break
            continue
        try:
            shown += os.read(end, 65536).decode("utf-8", "replace")
        except OSError:  # Linux says so that nobody writes any more
            break
    return shown


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_terminal_that_is_gone_harms_no_run(run, monkeypatch, plain_environment):
    monkeypatch.setattr(live, "REFRESH_S", 0.01)
    with terminal() as (ours, theirs), os.fdopen(theirs, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with live.following(run, print, locked=lambda: True) as say:
            say("before")
            assert "120/312" in drain(ours, until="120/312")
            os.close(ours)
            say("after")
            time.sleep(0.1)
            say("and later")
        monkeypatch.undo()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_display_harms_no_run(run, monkeypatch, plain_environment):
    def fail(view: RunView) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr(live, "REFRESH_S", 0.01)
    with terminal() as (ours, theirs), os.fdopen(theirs, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with live.following(run, print, locked=lambda: True) as say:
            drain(ours, until="120/312")
            monkeypatch.setattr(live.RunView, "refresh", fail)
            time.sleep(0.2)
            say("it goes on")
            shown = drain(ours, until="it goes on")
        shown = drain(ours, shown)
        monkeypatch.undo()
    assert "Traceback" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_plain_terminals_are_respected(run, monkeypatch, plain_environment, environment):
    monkeypatch.setattr(live, "REFRESH_S", 0.01)
    monkeypatch.setattr(live, "PLAIN_EVERY_S", 0.05)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with terminal() as (ours, theirs), os.fdopen(theirs, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with live.following(run, lambda line: print(line, file=sys.stderr, flush=True), locked=lambda: True):
            shown = drain(ours, until="120/312")
        monkeypatch.undo()
    if "TERM" in environment:
        assert "\x1b" not in shown and "ppo     step 120/312" in shown
    else:
        assert not re.search(r"\x1b\[[\d;]*[34]\d", shown) and "▸" in shown


# The commands


@pytest.fixture
def real(run: Path) -> Path:
    """The same with times of now, since a process of its own looks at the clock."""
    put_to_work(run, "ppo", time.time() - 30)
    tell(run, "ppo", "training", 120, 312, at=time.time())
    return run


@pytest.mark.slow
def test_watch_shows_a_run_of_another_process_until_it_ends(real, plain_environment):
    """And leaves it alone on Ctrl-C."""
    command = [sys.executable, "-m", "rlhf_pipeline", "watch", str(real)]
    with terminal() as (ours, theirs), terminal() as (other, their_other):
        with RunDirectory(real).locked():
            watching = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
            left = subprocess.Popen(command, stdin=their_other, stdout=their_other, stderr=their_other)
            shown = drain(ours, until="120/312")
            tell(real, "ppo", "training", 121, 312, at=time.time())
            shown = drain(ours, shown, until="121/312")
            drain(other, until="121/312")
            left.send_signal(signal.SIGINT)
            drain(other, until="the run continues")
            assert left.wait(30) == 0
            finish(real, "ppo", wall_s=42.0, metrics={"judge_mean": 0.97})
            assert watching.poll() is None
        shown = drain(ours, shown, until="has ended").rpartition("\x1b[?25h")[2]
        assert watching.wait(30) == 0
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "▸" not in shown and re.search(r"✓ ppo +done +42 s +judge 0.97", shown)


def test_watch_where_nothing_runs_shows_where_it_stands(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "watch", str(run)])
    with contextlib.suppress(SystemExit):
        cli.main()
    said = capfd.readouterr()
    assert [line.split()[1:3] for line in said.out.splitlines()][2] == ["ppo", "failed"]
    assert f"nothing is running in {run}" in said.err


def test_watch_waits_for_a_run_and_shows_its_check(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.05)
    directory, said, output = RunDirectory(tmp_path / "x"), [], io.StringIO()
    console = Console(file=output, width=80)
    watching = threading.Thread(target=live.watch, args=(directory.path, said.append, console), daemon=True)
    watching.start()

    def wait_for(lines: int) -> None:
        until = time.monotonic() + 20
        while len(said) < lines and time.monotonic() < until:
            time.sleep(0.02)

    wait_for(1)
    with directory.locked():
        directory.note("checking settings and data")
        wait_for(2)
        assert watching.is_alive()
        put_to_work(directory.path, "sft", time.time())
        finish(directory.path, "sft")
    watching.join(20)
    assert said == [
        f"there is no run in {directory.path} yet: waiting for one to begin; Ctrl-C leaves",
        "checking settings and data",
        f"the run in {directory.path} has ended",
    ]
    assert output.getvalue().split()[:3] == ["✓", "sft", "done"]
    assert "No alarms. " in output.getvalue()


def test_the_display_says_what_a_run_does_while_no_stage_is_at_work(run):
    put_to_work(run, "ppo", NOW)
    finish(run, "ppo")
    RunDirectory(run).note("comparing the policies")
    assert frame(seen(run))[-1] == "  comparing the policies"
    assert [line.split()[1] for line in frame(seen(run), height=3)] == ["sft", "the"]
    assert "comparing" not in "".join(frame(seen(run, going_on=False)))


def test_run_on_a_terminal_shows_the_stage_at_work_and_leaves_its_lines(
    tmp_path, warm_server: Launcher, monkeypatch, plain_environment, capsys
):
    short_run.write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(live, "REFRESH_S", 0.05)
    monkeypatch.setattr(runner, "Launcher", lambda log: contextlib.nullcontext(warm_server))
    monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "run", "tiny", *short_run.OVERRIDES, "--only", "sft"])
    with terminal() as (ours, theirs), os.fdopen(theirs, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown: list[str] = []
        over = threading.Event()

        def read() -> None:
            while not over.is_set():
                shown.append(drain(ours))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, "".join(shown)
        finally:
            time.sleep(0.3)
            over.set()
            reader.join()
            monkeypatch.undo()
    text = "".join(shown)
    assert re.search(r"sft: step \d/7, \d+%", text) and "token accuracy" in text
    for line in ("check   settings", "sft     training, from base", "sft     done in"):
        assert line in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    out = capsys.readouterr().out
    assert "token accuracy" in out and "\x1b" not in out
