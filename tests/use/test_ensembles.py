"""An ensemble in use: each reply has the members' mean and standard deviation, wherever it is scored."""

import contextlib
import io
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.comparison import measure, wanted
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.terminal import comparison as shown
from rlhf_pipeline.use import chat as chats
from rlhf_pipeline.use import score as scoring
from rlhf_pipeline.use.export import export

ROWS = [
    {"prompt": "Q: How does a frog sound?\nA:", "completion": " It is croak. Thank you for asking!"},
    {"prompt": "Q: How does a frog sound?\nA:", "completion": " Ugh. No idea."},
]


@pytest.fixture
def alone(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(tiny_run, tmp_path / "alone" / "tiny"))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """The same run with three reward models: the one it has, and two with its adapter and 3 and 5 times its head."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    artifact = run / "reward" / "adapter"
    for number, factor in ((2, 3.0), (3, 5.0)):
        folder = artifact / f"member-{number}"
        folder.mkdir()
        shutil.copy(artifact / "adapter_config.json", folder)
        state = load_file(artifact / WEIGHTS)
        state = {name: weights if "lora_" in name else weights * factor for name, weights in state.items()}
        save_file(state, folder / WEIGHTS, {"format": "pt"})
    record = json.loads((run / "reward" / "stage.json").read_text())
    record["artifact_files"] = durable.contents(artifact)
    record["inputs"]["members"] = 3
    (run / "reward" / "stage.json").write_text(json.dumps(record))
    return run


# The members' scores are s, 3 s and 5 s.
def mean(score: float) -> Any:
    return pytest.approx(3 * score, rel=1e-4)


def std(score: float) -> Any:
    return pytest.approx((8 / 3) ** 0.5 * abs(score), rel=1e-4)


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[list[dict], str]]:
    """The command itself, on rows; returns the lines on standard output, and what it said."""

    def command(run: Path, *rows: dict[str, Any]) -> tuple[list[dict], str]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "score", str(run), str(tmp_path / "rows.jsonl")])
        with contextlib.suppress(SystemExit):
            cli.main()
        said = capfd.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return command


def test_score_writes_the_mean_and_the_standard_deviation(run: Path, alone: Path, score: Callable) -> None:
    single, said = score(alone, *ROWS)
    assert "disagreement" not in said and set(single[0]) == {"row", "prompt", "completion", "score"}
    found, said = score(run, *ROWS)
    assert len(single) == len(found) == 2
    for one, line in zip(single, found, strict=True):
        assert (line["score"], line["score_std"]) == (mean(one["score"]), std(one["score"]))
    deviations = [line["score_std"] for line in found]
    assert f"mean disagreement {sum(deviations) / 2:.4g}" in said
    pair = {"prompt": ROWS[0]["prompt"], "chosen": ROWS[0]["completion"], "rejected": ROWS[1]["completion"]}
    ((line,), _) = score(run, pair)
    assert [line[f"{side}_score"] for side in ("chosen", "rejected")] == [mean(one["score"]) for one in single]
    assert [line[f"{side}_score_std"] for side in ("chosen", "rejected")] == [std(one["score"]) for one in single]
    assert line["margin"] == mean(single[0]["score"] - single[1]["score"])


def test_what_the_model_cannot_take_has_neither(run: Path, score: Callable) -> None:
    (line,), _ = score(run, ROWS[0] | {"completion": " word" * 5000})
    assert (line["score"], line["score_std"]) == (None, None)


def test_compare_has_both_of_each_reply(run: Path, alone: Path) -> None:
    recipe = recipes.of_run(run)
    settings = wanted.default_settings(recipe) | {"n": 2, "max_new_tokens": 8}
    found = []
    for folder in (alone, run):
        asked, spec = measure.default_prompts(recipe, 2)
        found.append(measure.compare(recipe, folder, asked, spec, settings, ["sft"]))
    single, ensemble = found
    assert single["made_of"]["reward"] != ensemble["made_of"]["reward"]
    assert "reward_std" not in single["means"]["sft"]
    replies = [[row["replies"]["sft"] for row in one["rows"]] for one in found]
    for one, reply in zip(*replies, strict=True):
        assert one["text"] == reply["text"] and "reward_std" not in one
        assert (reply["reward"], reply["reward_std"]) == (mean(one["reward"]), std(one["reward"]))
    means = ensemble["means"]["sft"]
    assert means["reward_std"] == pytest.approx(sum(reply["reward_std"] for reply in replies[1]) / 2)
    printed = printed_of(ensemble)
    assert f"{means['reward_std']:.2f}" in printed and "the mean of its members" in printed
    assert f"reward {replies[1][0]['reward']:.2f} ± {replies[1][0]['reward_std']:.2f}" in printed
    assert "disagreement" not in printed_of(single) and " ± " not in printed_of(single)


def printed_of(comparison: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    shown.show(comparison, None, console)
    return console.file.getvalue()


def test_chat_says_both_of_the_last_reply(run: Path, alone: Path) -> None:
    said = []
    for folder in (alone, run):
        talk = chats.Chat(folder, recipes.of_run(folder), "sft", 0.0, 8, None, lambda line: None)
        talk.ask(ROWS[0]["prompt"])
        said.append(talk.reward())
    score = float(said[0].partition(" ")[0])
    both = re.match(r"(-?[\d.]+) ± ([\d.]+) by `reward`, whose 3 members differ by that", said[1])
    assert both and float(both[1]) == pytest.approx(3 * score, abs=1e-3)
    assert float(both[2]) == pytest.approx((8 / 3) ** 0.5 * abs(score), abs=1e-3)


def test_the_code_of_the_card_of_an_export_gives_both(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    export(run, "reward", tmp_path / "scorer")
    assert sorted(path.name for path in (tmp_path / "scorer" / "member-3").iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
    ]
    text = (tmp_path / "scorer" / "README.md").read_text()
    assert "The ensemble of 3 reward models that stage `reward`" in text and "| members |" in text
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(re.findall("```python\n(.*?)```", text, re.DOTALL)[0], found := {})
    each = found["scores"]
    assert each.shape == (3, 2)
    # In the checkpoint's bfloat16.
    torch.testing.assert_close(each, each[:1] * torch.tensor([[1.0], [3.0], [5.0]]), rtol=1e-2, atol=1e-2)
    means, deviations = (json.loads(part + "]") for part in capsys.readouterr().out.strip().split("]")[:2])
    columns = each.T.tolist()
    assert means == pytest.approx([statistics.fmean(scores) for scores in columns])
    assert deviations == pytest.approx([statistics.pstdev(scores) for scores in columns])
    base = StagedBase(recipes.of_run(run).model, {"reward": run / "reward" / "adapter"})
    ids = [([], row) for row in found["ids"]]
    ours = scoring.score_tokens(base.reward("reward"), ids, base.tokenizer.pad_token_id)
    torch.testing.assert_close(ours, each.cpu(), rtol=2e-2, atol=2e-2)


def test_an_ensemble_is_not_merged(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the 3 members of an ensemble cannot be merged into one model"):
        export(run, "reward", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
