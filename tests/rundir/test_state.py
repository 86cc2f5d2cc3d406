"""Every command says the same of a stage, in the same word; and reads what the version before has left."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_pipeline import cli
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record

STAGES = ("sft", "reward", "ppo", "dpo")


class Said(NamedTuple):
    """What a command left: its exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line, in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        # A process of its own would show no bars of Transformers'; this one has imported it before the command did.
        return Said(code, out, re.sub(r"\r*Loading weights[^\r\n]*\n?", "", err))

    return run


def edit(run: Path, stage: str, **changes: object) -> None:
    """Change keys of a stage's record; a value of None takes the key away."""
    file = run / stage / "stage.json"
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None or key not in changes}
    file.write_text(json.dumps(kept), encoding="utf-8")


def words_of(run: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in state.read(run).stages}


def from_status(command: Callable[..., Said], run: Path) -> dict[str, str]:
    """The words of `status`, which are held against those of all others."""
    said = command("status", run / "recipe.yaml", "--trust-versions", "--json")
    assert said.code == 0, said.err
    return {stage["name"]: stage["state"] for stage in json.loads(said.out)["stages"]}


# One word


@pytest.fixture
def harmed(recorded: Path) -> Path:
    """PPO was built on other SFT weights than are there; DPO was killed."""
    weights = json.loads((recorded / "ppo" / "stage.json").read_text())["built_on"]
    edit(recorded, "ppo", built_on=weights | {"sft": "0" * 64})
    edit(recorded, "dpo", state="running", artifact=None)
    return recorded


WORDS = {"sft": "done", "reward": "done", "ppo": "stale", "dpo": "failed"}
STALE, KILLED = "stale: sft ran again", "failed: the run ended before the stage did"


def test_status_watch_report_and_diff_say_the_same_word(recorded, harmed, command, tmp_path):
    assert from_status(command, harmed) == WORDS
    watched = command("watch", harmed).out.splitlines()
    shown = {line.split()[1]: line.split()[2] for line in watched if line.split()[1:2]}
    assert {stage: shown[stage] for stage in WORDS} == WORDS
    assert any("sft ran again" in line for line in watched)

    assert command("report", harmed).code == 0
    page = (harmed / "report.html").read_text(encoding="utf-8")
    badges = re.findall(r'<bdi>(\w+)</bdi></th>\s*<td><span class="badge (\w+)">(\w+)<', page)
    assert {name: word for name, _, word in badges} == WORDS and all(look == word for _, look, word in badges)
    assert "2 of 4 stages done" in page and "Stale: sft ran again" in page

    whole = shutil.copytree(harmed, tmp_path / "whole")
    for stage in ("ppo", "dpo"):
        shutil.copy(Path(__file__).parent / "recorded" / stage / "stage.json", whole / stage)
    difference = json.loads(command("diff", whole, harmed, "--json").out)
    assert {stage["name"]: stage["state"] for stage in difference["stages"]} == {
        "ppo": {"a": "done", "b": "stale"},
        "dpo": {"a": "done", "b": "failed"},
    }


def test_compare_says_what_it_leaves_out(harmed, command):
    said = command("compare", harmed, "-p", "Q: Hi\nA:", "--max-new-tokens", 2, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["policies"] == ["base", "sft"]
    assert f"`ppo` is left out: it is {STALE}; " in said.err and f"`dpo` is left out: it is {KILLED}; " in said.err


def test_chat_and_export_warn_of_a_stale_stage_and_refuse_one_that_is_not_done(harmed, command, tmp_path):
    warning = f"warning: stage `ppo` is {STALE}; `rlhf-pipeline run` brings it up to date\n"
    chat = ("chat", harmed, "-p", "Q: Hi\nA:", "--max-new-tokens", 2)
    export = command("export", harmed, "ppo", tmp_path / "out")
    assert (export.code, export.err.count(warning)) == (0, 1), export.err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    for stage in ((), ("--stage", "ppo")):
        said = command(*chat, *stage)
        assert (said.code, said.err) == (0, warning)
    assert command(*chat, "--stage", "sft").err == ""
    for refused in (command(*chat, "--stage", "dpo"), command("export", harmed, "dpo", tmp_path / "other")):
        assert refused.code == 2 and f"stage `dpo` is not done but {KILLED}" in refused.err


def test_score_warns_of_a_stale_reward_model(harmed, command, tmp_path):
    (tmp_path / "replies.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "warning" not in command("score", harmed, tmp_path / "replies.jsonl").err
    edit(harmed, "reward", built_on={"sft": "0" * 64})
    said = command("score", harmed, tmp_path / "replies.jsonl")
    assert said.code == 0 and json.loads(said.out)["row"] == 1
    assert said.err.startswith(f"warning: stage `reward` is {STALE}; ")
    assert from_status(command, harmed) == words_of(harmed) == WORDS | {"reward": "stale"}


def test_chat_warns_when_it_switches_to_a_stale_stage(harmed, command, monkeypatch):
    lines = iter(["/stage ppo", "/stage sft", "/stage ppo"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/exit"))
    assert command("chat", harmed, "--stage", "sft").err.count(f"warning: stage `ppo` is {STALE}") == 1


# One reading


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda run: None, dict.fromkeys(STAGES, "done")),
        (lambda run: shutil.rmtree(run / "ppo" / "adapter"), {"ppo": "missing"}),
        (lambda run: (run / "dpo" / "adapter" / "tokenizer.json").write_text("{}"), {"dpo": "stale"}),
        (lambda run: shutil.rmtree(run / "sft" / "adapter"), dict.fromkeys(("reward", "ppo", "dpo"), "stale")),
        (lambda run: shutil.rmtree(run / "sft"), {"sft": "missing", "reward": "stale", "ppo": "stale", "dpo": "stale"}),
        (
            lambda run: edit(run, "reward", built_on={"sft": "0" * 64}),
            {"reward": "stale", "ppo": "stale"},
        ),
        (
            lambda run: edit(run, "sft", state="failed", artifact=None, error="no memory"),
            dict.fromkeys(("reward", "ppo", "dpo"), "blocked") | {"sft": "failed"},
        ),
        (lambda run: (run / "dpo" / "stage.json").write_text("{"), {"dpo": "failed"}),
    ],
)
def test_the_run_directory_alone_says_what_the_plan_says(recorded, command, harm, words):
    harm(recorded)
    found = words_of(recorded)
    assert {name: found[name] for name in words} == words
    assert from_status(command, recorded) == found
    recipe = recorded / "recipe.yaml"
    for content in ("stages: [", ""):
        recipe.write_text(content)
        begun = {name: word for name, word in found.items() if (recorded / name).exists()}
        assert words_of(recorded) == begun or not (recorded / "sft").exists()


def test_a_running_record_is_believed_while_a_run_goes_on(recorded):
    for stage in ("sft", "dpo"):  # of the two only the last one that was written can be at work
        edit(recorded, stage, state="running", artifact=None)
    found = state.read(recorded)
    assert (found.state, words_of(recorded)["dpo"]) == ("failed", "stale")
    with RunDirectory(recorded).locked():
        found = state.read(recorded)
        assert (found.state, words_of(recorded)["sft"], words_of(recorded)["dpo"]) == ("running", "failed", "running")


CLOSED = "done, gate closed"


@pytest.mark.parametrize("written", [CLOSED, "failed"])  # the second is what earlier versions wrote
def test_a_closed_gate_is_one_word_and_keeps_a_stage_current(recorded, written):
    edit(recorded, "sft", state=written, error="a gate is closed: loss is 1, not < 1")
    found = state.read(recorded)
    sft, reward, ppo = (found.stage(name) for name in ("sft", "reward", "ppo"))
    assert (sft.state, sft.reason, sft.is_current) == (CLOSED, "loss is 1, not < 1", True)
    assert (reward.state, reward.reason) == ("blocked", "waits for sft, whose gate is closed")
    assert (ppo.state, ppo.is_current, found.state) == ("blocked", True, "gate closed")
    edit(recorded, "ppo", state="failed", artifact=None, error="no memory")
    ppo = state.read(recorded).stage("ppo")
    assert (ppo.state, ppo.reason, ppo.is_current) == ("failed", "no memory", False)


def test_a_stage_whose_gate_is_closed_can_be_looked_at_with_one_warning(recorded, command, tmp_path):
    closed = {"state": CLOSED, "error": "a gate is closed: x is 1, not < 1"}
    closed["gates"] = {"x": {"bound": "< 1", "value": 1.0, "passed": False}}
    edit(recorded, "reward", **closed)
    edit(recorded, "dpo", **closed)
    warning = "warning: stage `{}` is done, gate closed: x is 1, not < 1\n"
    short = ("-p", "Q: Hi\nA:", "--max-new-tokens", 2)
    said = command("chat", recorded, *short)
    assert (said.code, said.err) == (0, warning.format("dpo")) and said.out
    said = command("export", recorded, "dpo", tmp_path / "out")
    assert (said.code, said.err.count(warning.format("dpo"))) == (0, 1), said.err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Q: Hi", "completion": " Yes."}\n', encoding="utf-8")
    said = command("score", recorded, tmp_path / "rows.jsonl", "-o", tmp_path / "scores.jsonl")
    assert (said.code, said.err.count(warning.format("reward"))) == (0, 1), said.err
    said = command("compare", recorded, *short, "--json")
    assert json.loads(said.out)["policies"] == ["base", "sft", "ppo", "dpo"]
    assert [said.err.count(warning.format(stage)) for stage in ("reward", "dpo")] == [1, 1], said.err
    words = {"sft": "done", "reward": CLOSED, "ppo": "blocked", "dpo": CLOSED}
    watched = command("watch", recorded).out
    assert all(re.search(rf"\b{name} +{word} ", watched) for name, word in words.items()), watched
    command("report", recorded)
    page = (recorded / "report.html").read_text(encoding="utf-8")
    assert page.count(f'<span class="badge {CLOSED}">{CLOSED}</span>') == 2 and "3 of 4 stages done" in page


# A run directory in place of a recipe


def test_a_run_directory_stands_for_the_recipe_that_it_was_made_with(recorded, command, tmp_path):
    moved = recorded.rename(tmp_path / "moved")
    said = command("status", moved, "--trust-versions", "--json")
    assert json.loads(said.out)["run"] == str(moved)
    assert {stage["state"] for stage in json.loads(said.out)["stages"]} == {"done"}
    assert command("status", moved, "--trust-versions", "-q").code == 0
    said = command("plan", moved, "--trust-versions", "ppo.trainer.kl_coef=0.123", "--json")
    assert [stage["will_run"] for stage in json.loads(said.out)["stages"]] == [False, False, True, False]
    said = command("plan", moved, "--trust-versions", "name=another", "--json")
    assert {stage["state"] for stage in json.loads(said.out)["stages"]} == {"missing"}


def test_status_of_a_run_whose_data_are_gone_says_what_its_directory_says(recorded, command, tmp_path):
    shutil.rmtree(tmp_path / "data")
    edit(recorded, "dpo", state="running", artifact=None)
    said = command("status", recorded, "--json")
    assert {stage["name"]: stage["state"] for stage in json.loads(said.out)["stages"]} == WORDS | {"ppo": "done"}
    assert said.err.startswith("note: this is what the run directory alone says") and "data" in said.err
    assert command("status", recorded, "-q").code == 1
    assert command("status", recorded / "recipe.yaml").code == 2


# What the version before has left


def test_a_record_of_the_version_before_is_read_whole():
    for file in (Path(__file__).parent / "recorded").glob("*/stage.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        record = Record.model_validate(content)
        assert not record.model_extra
        content["parent_weights"] = content.pop("built_on")
        assert json.loads(json.dumps(record.as_json())) == content


def test_a_stop_that_was_recorded_as_an_error_is_a_stop():
    record = Record.model_validate({"state": "failed", "error": "stopped"})
    assert (record.stopped, record.error) == (True, None)
    record = Record.model_validate({"state": "failed", "error": "KeyError: 'stopped'"})
    assert (record.stopped, record.error) == (False, "KeyError: 'stopped'")


def test_a_broken_record_is_read_as_far_as_it_goes():
    text = """{"state": ["x"], "inputs": [], "metrics": 3, "versions": {"trl": 1, "torch": "2"}, "wall_s": 1e999,
        "kind": 3, "built_on": {"sft": "a", "reward": [1]}, "artifact_files": {"a": 3, "b": [1, "x"]}, "new": {"x": 1},
        "gates": {"x": 1}, "judging": "x", "log": "sft/log.txt"}"""
    record = Record.model_validate(json.loads(text))
    expected = {
        "versions": {"torch": "2"}, "parent_weights": {"sft": "a"}, "artifact_files": {"b": (1, "x")}, "new": {"x": 1},
        "log": "sft/log.txt",
    }  # fmt: skip
    assert {key: value for key, value in record.as_json().items() if value not in (None, {}, "")} == expected


def test_status_and_plan_of_a_former_run(recorded, command):
    assert from_status(command, recorded) == dict.fromkeys(STAGES, "done")
    recipe = recorded / "recipe.yaml"
    for stage in STAGES:
        versions = json.loads((recorded / stage / "stage.json").read_text())["versions"]
        edit(recorded, stage, versions=versions | {"trl": "1.11.0"})
    plan = json.loads(command("plan", recipe, "--json").out)["stages"]
    assert {stage["state"] for stage in plan} == {"stale"} and all(stage["will_run"] for stage in plan)
    assert all("trl 1.11.0 → " in stage["reason"] for stage in plan)
    plan = json.loads(command("plan", recipe, "--json", "--trust-versions").out)["stages"]
    assert {stage["name"]: stage["state"] for stage in plan} == dict.fromkeys(STAGES, "done")
    assert not any(stage["will_run"] for stage in plan if stage["reason"] == "up to date")


def test_report_and_diff_of_a_former_run(recorded, command, tmp_path):
    assert command("report", recorded).code == 0
    page = (recorded / "report.html").read_text(encoding="utf-8")
    assert "4 of 4 stages done" in page and "Stale" not in page
    other = shutil.copytree(recorded, tmp_path / "other")
    inputs = json.loads((other / "sft" / "stage.json").read_text())["inputs"]
    edit(other, "sft", inputs=inputs | {"seed": 7})
    (stage,) = json.loads(command("diff", recorded, other, "--json").out)["stages"]
    assert (stage["name"], stage["settings"]) == ("sft", {"seed": {"a": 42, "b": 7}})


def test_chat_and_export_of_a_former_run(recorded, command, tmp_path):
    said = command("chat", recorded, "-p", "Q: Hi\nA:", "--max-new-tokens", 4)
    assert (said.code, said.err) == (0, "") and said.out.strip()
    said = command("export", recorded, "dpo", tmp_path / "out")
    assert (said.code, said.out) == (0, f"{tmp_path / 'out'}\n"), said.err
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    record = json.loads((recorded / "dpo" / "stage.json").read_text())
    assert record["artifact_files"]["adapter_model.safetensors"][1] in card and record["fingerprint"] in card
