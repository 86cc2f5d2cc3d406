"""`compare` over runs: what it samples, what it takes from them, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import short_run
from safetensors.torch import load_file, save_file

from rlhf_pipeline.comparison.rates import win_rate
from rlhf_pipeline.rundir import durable, layout


@pytest.fixture(scope="module")
def runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, of which the PPO stages alone differ; the second is compared by nobody yet."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_run, folder / "first")
    shutil.copytree(tiny_run, folder / "second")
    adapter = folder / "second" / "ppo" / "adapter"
    tensors = load_file(adapter / short_run.WEIGHTS)
    weaker = {name: tensor * 0.5 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(weaker, adapter / short_run.WEIGHTS, metadata={"format": "pt"})
    edit(folder / "second" / "ppo" / "stage.json", artifact_files=durable.contents(adapter))
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def said(err: str) -> list[str]:
    """The lines without the bars of Transformers, which here was imported before anything could silence it."""
    return [line for line in err.splitlines() if line and "Loading weights" not in line]


def test_two_runs_are_sampled_and_joined(runs: Path) -> None:
    """The second one's comparison is made and left there, as `compare` of it alone would."""
    old = (runs / "second" / layout.COMPARISON).read_bytes()
    done = short_run.ask(runs, "compare", "first", "second", "--json")
    assert done.code == 0, done.err
    assert said(done.err) == ["second: sampling from base, sft, ppo, dpo"]
    found = json.loads(done.out)
    assert found["policies"] == ["base", "sft", "dpo", "first: ppo", "second: ppo"] and found["notes"] == []
    made = [json.loads((runs / name / layout.COMPARISON).read_text()) for name in ("first", "second")]
    assert (runs / "second" / layout.COMPARISON).read_bytes() != old
    judged = {by: [[row["replies"]["ppo"][by] for row in one["rows"]] for one in made] for by in ("reward", "judge")}
    assert judged["reward"][0] != judged["reward"][1]
    for by, (ours, theirs) in judged.items():
        rate = next(
            one for one in found["win_rates"] if (one["a"], one["b"], one["by"]) == ("second: ppo", "first: ppo", by)
        )
        assert rate.items() >= win_rate(theirs, ours).items()
    again = short_run.ask(runs, "compare", "first", "second", "--stages", "ppo")
    assert (again.code, again.err) == (0, "") and "second: ppo beats first: ppo" in again.out


def test_prompts_of_ones_own_are_sent_through_what_is_shared_once(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "second", tmp_path / "other")
    edit_recipe(tmp_path / "other", "temperature: 0.7", "temperature: 0.9")
    edit_recipe(tmp_path / "other", "tiny.world:judge", "tiny.world:no_such_judge")
    asked = json.loads((runs / "first" / layout.COMPARISON).read_text())["rows"][0]["prompt"]
    done = short_run.ask(
        runs, "compare", "first", str(tmp_path / "other"), "-p", asked, "--max-new-tokens", "3", "--seed", "5"
    )
    assert done.code == 0, done.err
    assert said(done.err) == [
        "first: sampling from base, sft, ppo, dpo",
        "other: sampling from ppo",
        "note: other: the settings of first count for it: temperature 0.7 instead of 0.9",
    ]
    assert done.out.startswith("1 prompt of the command line; temperature 0.7, at most 3 tokens, seed 5")
    assert done.out.count(asked.split("\n")[0]) == 1 and "  other: ppo  reward" in done.out
    assert re.search(r"\n  other: ppo +reward \S+ +judge [01]", done.out)


def edit_recipe(run: Path, old: str, new: str) -> None:
    text = (run / "recipe.yaml").read_text()
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new))


def test_what_cannot_be_compared_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "first", unfinished)
    for stage in ("sft", "ppo", "dpo"):
        shutil.rmtree(unfinished / stage)
    for arguments, sentence in (
        (("first", "first"), "first: this run is given twice"),
        (("first", str(unfinished)), f"{unfinished}: no policy stage of this run is done"),
        (("first", "gone"), "gone"),
        (("first", "second", "--stages", "ppo,pdo"), "--stages: there is no `pdo` to compare in any of these runs"),
    ):
        done = short_run.ask(runs, "compare", *arguments)
        assert done.code == 2 and sentence in done.err and "hint:" in done.err, done.err
        assert done.out == ""
