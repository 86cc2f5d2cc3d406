"""docs/json.md holds what `--json` prints: every key that is printed stands there, and every one there is printed."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import short_run
import typer

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.forecast import known
from rlhf_pipeline.forecast import result as forecasts
from rlhf_pipeline.forecast.result import Forecast, Phase, StageForecast
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.rundir.layout import Progress
from rlhf_pipeline.rundir.pace import ToGo
from rlhf_pipeline.smoke.run import Report, Smoked
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.keys import Combination
from rlhf_pipeline.sweep.results import Change, Result, Results
from rlhf_pipeline.terminal import tables

COMMANDS = typer.main.get_command(cli.app).commands
WITH_JSON = sorted(name for name, command in COMMANDS.items() if any("--json" in one.opts for one in command.params))
ROOT = Path(__file__).parents[1]
TYPES = {
    "text": str, "whole number": int, "number": (int, float), "true/false": bool, "list": list, "mapping": dict,
    "null": type(None),
}  # fmt: skip
RECIPE = """\
name: {name}
model: {{path: tiny, quantization: none, dtype: float32}}
stages:
  sft: {{data: demonstrations.jsonl, gates: {{train_loss: "<= 9"}}, trainer: {{learning_rate: {rate}}}}}
  reward: {{data: {{path: preferences.jsonl, eval_fraction: 0.2}}}}
  ppo: {{data: prompts.jsonl, ptx_data: pairs.jsonl, trainer: {{ptx_coef: 0.1}}}}
  kto: {{data: preferences.jsonl}}
"""
RECORD = {
    "name": "sft", "kind": "sft", "state": "done", "init": "base", "reward": None, "fingerprint": "0" * 32,
    "inputs": {"kind": "sft", "trainer.learning_rate": 1e-3, "data": "rows.jsonl@" + "a" * 32}, "judging": None,
    "metrics": {"train_loss": 1.5, "eval_loss": None}, "wall_s": 12.5, "peak_memory_bytes": 1000, "artifact": "adapter",
    "log": "sft/log.txt", "versions": {"trl": "1.12.0"}, "artifact_files": {},
    "gates": {"train_loss": {"bound": "<= 9", "value": 1.5, "passed": True}},
}  # fmt: skip


def documented(command: str) -> dict[tuple[str, ...], str]:
    """The type of each key that the page lists for a command, by its path."""
    found: dict[tuple[str, ...], str] = {}
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if command not in re.findall(r"`([\w-]+)`", section.splitlines()[0]):
            continue
        for keys, kind in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", section, re.MULTILINE):
            for key in re.findall(r"`([^`]+)`", keys):
                path = tuple(key.replace("…", "stages[].ROWS").replace("[]", ".[]").split("."))
                assert path not in found, key
                found[path] = kind
    return found


def promised_absolute(command: str) -> set[tuple[str, ...]]:
    """The keys whose value is an absolute path, as the page says."""
    rows = [line for line in (ROOT / "docs" / "json.md").read_text(encoding="utf-8").splitlines() if "absolute" in line]
    keys = {tuple(row.split("`")[1].replace("[]", ".[]").split(".")) for row in rows}
    return keys & documented(command).keys()


def nodes(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every value in an object, mappings and lists too, with its path."""
    items = (
        value.items()
        if isinstance(value, dict)
        else [("[]", item) for item in value]
        if isinstance(value, list)
        else []
    )
    below = [node for key, item in items for node in nodes(item, (*path, key))]
    return [(path, value), *below]


def is_of(kind: str, value: Any) -> bool:
    names = kind.split(" or ")
    exact = isinstance(value, bool) and "true/false" not in names  # in Python, true is a whole number
    return kind == "any" or (not exact and isinstance(value, tuple(flatten(TYPES[name] for name in names))))


def flatten(types: Any) -> list[type]:
    return [one for some in types for one in (some if isinstance(some, tuple) else (some,))]


def stands_for(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether a documented path, in which CAPITALS stand for any name, is that of a value."""
    return len(pattern) == len(path) and all(
        there == here or re.fullmatch("[A-Z]+", there) for there, here in zip(pattern, path, strict=True)
    )


def compare(command: str, outputs: list[dict[str, Any]]) -> None:
    """Hold outputs of a command against the page, both ways."""
    known, seen, absolute = documented(command), set(), promised_absolute(command)
    containers = {path[:end] for path in known for end in range(len(path))}
    for path, value in [node for output in outputs for node in nodes(output)]:
        fitting = [pattern for pattern in known if stands_for(pattern, path)]
        # The path that says most, where a name in capitals would do as well.
        best = min(fitting, key=lambda pattern: sum(part.isupper() for part in pattern), default=None)
        if best is not None:
            assert is_of(known[best], value), f"{command}: {path} is {value!r}, and not {known[best]}"
            assert best not in absolute or value is None or Path(value).is_absolute(), f"{command}: {path} is {value!r}"
            seen.add(best)
            continue
        within_any = any(known[one] == "any" and stands_for(one, path[: len(one)]) for one in known)
        inside = any(stands_for(one, path) for one in containers)
        assert within_any or (inside and isinstance(value, (dict, list))), f"{command}: {path} is not documented"
    assert known.keys() - seen == set(), f"{command} did not print them"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs that differ in everything, with something moved aside."""
    folder = tmp_path_factory.mktemp("runs")
    short_run.write_data(folder)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Which is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(20))
    )
    for name, rate in (("one", "1e-3"), ("two", "2e-3")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, rate=rate))
        write(folder / "runs" / name / "sft", RECORD if name == "one" else other(RECORD))
    write(folder / "runs" / "one" / "reward", {**RECORD, "name": "reward", "kind": "reward"})
    (folder / "runs" / "one" / "sft" / "adapter").mkdir()
    (folder / "runs" / "one" / "sft" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "runs" / "two" / "ppo").mkdir()
    (folder / "runs" / "two" / "ppo" / "stage.json").write_text("{")
    write(folder / "runs" / "one" / "ppo", {**RECORD, "name": "ppo", "kind": "ppo"})
    write(folder / "runs" / "one" / "sft.20260102-030405", RECORD)
    (folder / "runs" / "one" / "reward.20260102-030405").mkdir()
    return folder


def other(record: dict[str, Any]) -> dict[str, Any]:
    inputs = {"kind": "sft", "trainer.learning_rate": 2e-3, "data": "rows.jsonl@" + "b" * 32, "seed": 3}
    return record | {
        "inputs": inputs, "state": "failed", "metrics": {"train_loss": 1.25, "eval_loss": 2.0},
        "versions": {"trl": "1.12.1"},
    }  # fmt: skip


def write(stage: Path, record: dict[str, Any]) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "stage.json").write_text(json.dumps(record))


def output(folder: Path, *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_pipeline", *arguments, "--json"], cwd=folder, capture_output=True, text=True,
        env=os.environ, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == exit_code, done.stderr
    assert "\x1b" not in done.stdout
    return json.loads(done.stdout)


def output_here(folder: Path, *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    """The same in this process, of a command that imports for seconds."""
    said, environment, code = io.StringIO(), dict(os.environ), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["rlhf-pipeline", *arguments, "--json"])
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(environment)
    assert code == exit_code
    return json.loads(said.getvalue())


def test_every_command_with_json_is_documented_and_no_other():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    headings = {name for line in re.findall(r"^## (.*)", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}
    assert headings == set(WITH_JSON)


@pytest.mark.parametrize("command", ["plan", "status"])
def test_plan_and_status(command, folder, tmp_path):
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n{"step": 2, "time": 3.5}\n')
    begun = StagePlan("ppo", "ppo", {"init": "base"}, state="partial", progress=Progress("checkpoint", step=2, of=9))
    labelled = StagePlan("feedback", "label", {"init": "base"}, state="waiting", left_out=["eve"])
    phases = (Phase("backward", {"weights": 5}),)
    known.keep(recipes.load("tiny"), Forecast("a GPU", None, (StageForecast("sft", "sft", phases, 2, 4, 8),)))
    compare(
        command,
        [
            output(folder, command, "one.yaml"),
            output(folder, command, "tiny"),
            tables.as_json(tmp_path, [begun, labelled]),
        ],
    )


def test_runs(folder, tiny_run):
    compare("runs", [output(folder, "runs"), output(folder, "runs", str(tiny_run.parent))])


@pytest.mark.parametrize("command", ["plan", "status"])
def test_plan_and_status_of_a_run_name_logs_that_are_there(command, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))
    shown = output(tmp_path, command, "runs/tiny/recipe.yaml", f"output_dir={tmp_path / 'runs'}")
    assert shown["run"] == str(run)
    assert [stage["log"] for stage in shown["stages"]] == [
        str(run / name / "log.txt") for name in ("sft", "reward", "ppo", "dpo")
    ]
    assert all(Path(stage["log"]).is_file() for stage in shown["stages"])


def test_diff(folder):
    runs = "runs/one", "runs/two"
    compare("diff", [output(folder, "diff", *runs), output(folder, "diff", runs[0], runs[0])])


def test_prune(folder):
    compare("prune", [output(folder, "prune", "runs/one"), output(folder, "prune", "runs/two", "--yes")])


def test_show(folder):
    compare("show", [output(folder, "show", "one.yaml")])


def test_data(folder):
    """One process for all kinds of stages; a fault has the exit code 2."""
    (folder / "again.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n' * 20)
    text = (folder / "one.yaml").read_text()
    (folder / "bad.yaml").write_text(
        text + "  again: {kind: sft, data: {path: again.jsonl, eval_data: pairs.jsonl}}\n"
        "  short: {kind: sft, data: {path: pairs.jsonl, max_prompt_length: 2, too_long: drop, limit: 9}}\n"
        "  some: {kind: sft, data: {path: some.jsonl, bad_rows: drop}}\n"
        "  thumbs: {kind: sft, data: thumbs.jsonl}\n"
        "  turns: {kind: sft, data: turns.jsonl}\n"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "turns.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 2)
    labelled = [{"prompt": f"Q {i}:", "completion": " c", "label": i % 3 == 0} for i in range(9)]
    (folder / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (folder / "some.jsonl").write_text((folder / "pairs.jsonl").read_text() + '{"prompt": "a"}\n')
    opening = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{{ '<assistant><think>' }}"
    (folder / "thinking.jinja").write_text(opening)
    alone = ("bad.yaml", "turns", "model.chat_template=thinking.jinja")
    compare("data", [output_here(folder, "data", "bad.yaml", exit_code=2), output_here(folder, "data", *alone)])


def test_smoke():
    """The object alone: tests/run/test_smoke.py has the command make one, which takes its time."""
    stages = [Smoked("sft", "sft", "ok", 1.5, "loss", 6.5, 6.25), Smoked("dpo", "dpo", "failed", 1.5, error="it fell")]
    reports = (
        Report(stages, ["a note"], ["a warning"], 3.5, "it fell over", "pick it up"),
        Report([Smoked("ppo", "ppo")]),
    )
    compare("smoke", [{"recipe": "r.yaml", **report.as_json()} for report in reports])


def test_forecast():
    """The object alone: tests/forecast has the command make one, which takes its time."""
    phases = Phase("load", {"weights": 5, "overhead": 1}), Phase("backward", {"weights": 5, "logits": 7})
    change = forecasts.Change({"sft.trainer.max_length": 8}, 9, "shorter texts")
    one = StageForecast("sft", "sft", phases, 2, 4, 8, 16, (change,), ("a note",), uncounted=("fsdp_offload_params",))
    other = StageForecast("asked", "judge", phases, 2, 4, None)
    outputs = [Forecast("24 GB", 10, (one, other), ("a note",)).as_json(), Forecast("a GPU", None, (one,)).as_json()]
    for output in outputs:
        for stage, left in zip(output["stages"], (ToGo(1.5, 9), None), strict=False):
            stage["to_go"] = left and left.as_json()
    compare("forecast", outputs)


def test_sweep(tmp_path):
    """The object alone: tests/sweep has the command make one, which takes its time."""
    numbers = {"ppo": {"objective/kl": Change("KL", 0.0, 2.5, ""), "judge_mean": Change("judge", None, 0.7, "")}}
    one = Result(Combination("seed-1", {"seed": 1}), tmp_path / "seed-1", "done", None, 12.5, numbers, 0.7, 0.05)
    two = Result(Combination("seed-2", {"seed": 2}), tmp_path / "seed-2", "failed", "it fell over", 0.0, {})
    goal, files = Goal("ppo", "judge_mean", "maximize", ()), {name: tmp_path / name for name in ("report", "study")}
    full = Results(tmp_path, ["seed"], ["sft"], "ppo", goal, [one, two], "rlhf-pipeline run tiny seed=1", **files)
    compare("sweep", [full.as_json(), Results(tmp_path, ["seed"], [], "ppo", None, [two]).as_json()])


def test_compare(tiny_run, tmp_path):
    """What `run` has written, the same of some policies, with a note, and of two runs."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    written = json.loads((run / "comparison.json").read_text())
    (run / "comparison.json").write_text(json.dumps(written | {"notes": ["no judge: it is gone"]}))
    some = output_here(run, "compare", str(run), "--stages", "sft,ppo")
    both = output_here(run, "compare", str(tiny_run), str(shutil.copytree(tiny_run, tmp_path / "copy")))
    by_vllm = some | {"settings": {**some["settings"], "engine": "vllm"}}
    compare("compare", [output(run, "compare", str(tiny_run)), some, both, by_vllm])
    assert some["policies"] == ["sft", "ppo"]


def test_export(tiny_run, tmp_path):
    """The adapter; a merged policy and a merged reward model, measured; and one that is not."""
    asked = (
        ("sft",),
        ("dpo", "--merge", "--n", "2"),
        ("reward", "--merge", "--n", "2"),
        ("sft", "--merge", "--n", "0"),
    )
    found = [
        output_here(tmp_path, "export", str(tiny_run), stage, f"out{number}", *options)
        for number, (stage, *options) in enumerate(asked)
    ]
    compare("export", found)
    assert [one["merged"] is None for one in found] == [True, False, False, False]
    assert all(Path(one["folder"], "README.md").is_file() for one in found)


def test_a_relative_path_where_an_absolute_one_is_promised_is_found(folder):
    shown = output(folder, "status", "one.yaml")
    shown["stages"][0]["log"] = "sft/log.txt"
    with pytest.raises(AssertionError, match=r"'log'.* is 'sft/log.txt'"):
        compare("status", [shown])


def test_a_key_that_is_missing_or_new_or_of_another_type_is_found(folder):
    shown = output(folder, "prune", "runs/one")
    compare("prune", [shown])
    for wrong, message in (
        ({**shown, "new": 1}, "is not documented"),
        ({key: value for key, value in shown.items() if key != "bytes"}, "did not print"),
        ({**shown, "bytes": "many"}, "and not whole number"),
        ({**shown, "removed": 0}, "and not true/false"),
    ):
        with pytest.raises(AssertionError, match=message):
            compare("prune", [wrong])
