"""Alarms where people look: at the end of `run`, in `status` and `watch`, and in the display of a run at work."""

import io
import json
import shutil
from pathlib import Path

import pytest
import short_run
from rich.console import Console

from rlhf_pipeline.report.alarms import Alarm
from rlhf_pipeline.terminal import alarms as shown
from rlhf_pipeline.terminal import live
from rlhf_pipeline.terminal.watching import RunView

HACKED = "1 alarm: reward hacking in ppo."
TEXT = "  alarm  ppo: Reward hacking: since step 30 the judge's mean fell from 0.9 to 0"


def verdict_in(out: str) -> int:
    """The number of the line with the verdict; what is worth a look in so short a run follows on the same line."""
    return next(i for i, line in enumerate(out.splitlines()) if line.startswith(HACKED))


def write_hacked(run: Path) -> None:
    """Have PPO's log tell of a judge who falls while the score rises."""
    rows = [
        {"step": 10 * i, "gold/judge_mean": judge, "gold/judge_mean_se": 0.05, "gold/score_mean": float(i)}
        for i, judge in enumerate((0.4, 0.6, 0.8, 0.9, 0.6, 0.3, 0.0))
    ]
    (run / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hacked(tiny_run, tmp_path) -> Path:
    """The folder of a finished run whose PPO was hacked."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))
    write_hacked(run)
    return tmp_path


@pytest.fixture
def of_it(hacked) -> tuple[str, str]:
    return str(hacked / "runs" / "tiny" / "recipe.yaml"), f"output_dir={hacked / 'runs'}"


def test_status_and_watch_end_with_the_verdict_and_a_line_for_each_alarm(hacked, of_it):
    for arguments in (("status", *of_it), ("watch", "runs/tiny")):
        code, out, _ = short_run.ask(hacked, *arguments)
        lines, verdict = out.splitlines(), verdict_in(out)
        assert code == 0
        assert lines[verdict + 1].startswith(TEXT)
        assert "Raise kl_coef" in lines[verdict + 1]


def test_status_as_json_has_them(hacked, of_it):
    found = json.loads(short_run.ask(hacked, "status", *of_it, "--json")[1])
    assert found["verdict"].startswith(HACKED)
    assert all(set(alarm) == {"level", "where", "what", "text"} for alarm in found["alarms"])
    assert [found["alarms"][0][key] for key in ("level", "where", "what")] == ["bad", "ppo", "reward hacking"]


def test_run_ends_with_them_and_fails_if_it_is_strict(hacked, of_it):
    code, out, err = short_run.ask(hacked, "run", *of_it)
    assert code == 0
    assert out.splitlines()[verdict_in(out) + 1].startswith(TEXT)
    code, again, err = short_run.ask(hacked, "run", *of_it, "--strict")
    assert (code, again) == (1, out)
    assert err.splitlines()[-2].startswith(f"error: --strict: {HACKED}")


def test_a_strict_run_without_alarms_is_done(tiny_run, tmp_path):
    """A thing to look at is none."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "reward/score_std": null}\n')
    arguments = (str(run / "recipe.yaml"), f"output_dir={run.parent}", "--strict")
    code, out, err = short_run.ask(tmp_path, "run", *arguments)
    assert code == 0, err
    assert "No alarms. " in out
    assert "numbers that are not finite in ppo" in out


def test_a_run_that_fails_shows_them_before_its_error(hacked, of_it):
    """DPO's gate is one that it cannot pass."""
    code, _, err = short_run.ask(hacked, "run", *of_it, "dpo.gates.loss=< 0")
    lines = err.splitlines()
    assert code == 1
    assert any(line.startswith("2 alarms: reward hacking in ppo, a closed gate in dpo.") for line in lines[:-2])
    assert lines[-2].startswith("error: stage `dpo`")


def test_the_display_of_a_run_at_work_has_those_of_stages_that_are_finished(hacked):
    run = hacked / "runs" / "tiny"
    record = json.loads((run / "dpo" / "stage.json").read_text())
    (run / "dpo" / "stage.json").write_text(json.dumps(record | {"state": "running", "artifact": None}))
    view = RunView(run, locked=lambda: True)
    view.refresh()
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, no_color=True)
    said = [line.plain.strip() for line in live.Display(view).lines(console, console.options)]
    assert said[4].startswith(HACKED)  # below the stages
    lines: list[str] = []
    plain = live._Plain(view, lines.append)
    plain.refresh()
    plain.refresh()
    assert [line[: len(HACKED)] for line in lines] == [HACKED]
    record = json.loads((run / "ppo" / "stage.json").read_text())
    (run / "ppo" / "stage.json").write_text(json.dumps(record | {"state": "running", "artifact": None}))
    view.refresh()
    assert not any(alarm.where == "ppo" for alarm in view.alarms)


def test_what_an_alarm_quotes_cannot_steer_the_terminal():
    output = io.StringIO()
    found = [Alarm("bad", "sft\x1b[2J", "x", "Failed: \x1b]0;title\x07\nand [red]more[/red]")]
    shown.show_alarms(found, Console(file=output, width=40, force_terminal=True, no_color=True))
    lines = output.getvalue().splitlines()
    assert "\x1b]" not in output.getvalue() and "\x1b[2J" not in output.getvalue()
    assert len(lines) == 2
    assert "and [red]more[/red]" in lines[1]
