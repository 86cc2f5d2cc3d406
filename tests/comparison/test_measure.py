"""The policies of a short run side by side, held against models that are loaded one by one."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_run
import torch
from peft import PeftModel

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.comparison import measure as comparing
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.comparison.rates import win_rate
from rlhf_pipeline.data import prepare
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.schema import Source
from rlhf_pipeline.rundir import layout

POLICIES = ["base", "sft", "ppo", "dpo"]
TEMPERATURE = 0.7


@pytest.fixture
def recipe(tiny_run: Path) -> Recipe:
    return recipes.of_run(tiny_run)


def compare(run: Path, recipe: Recipe, **changes: Any) -> dict[str, Any]:
    settings = wanted.default_settings(recipe) | changes
    asked, spec = comparing.default_prompts(recipe, settings["n"])
    return comparing.compare(recipe, run, asked, spec, settings)


def separately(recipe: Recipe, run: Path, policy: str) -> torch.nn.Module:
    """A policy as PEFT loads it by itself."""
    base = load_base(recipe.model, load_tokenizer(recipe.model))
    return base if policy == "base" else PeftModel.from_pretrained(base, str(run / policy / "adapter")).eval()


def tokens(recipe: Recipe, row: dict[str, Any], reply: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The token ids of a prompt and of a reply to it."""
    tokenizer = load_tokenizer(recipe.model)
    ids = tokenizer(reply["text"], add_special_tokens=False)["input_ids"]
    return tokenizer(row["prompt"])["input_ids"], ids + [tokenizer.eos_token_id] * reply["ended"]


@torch.no_grad()
def log_prob(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> float:
    """Of a whole reply, at the temperature of sampling."""
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(1)[range(len(reply)), reply].sum().item()


def test_scores_kl_and_judgement_are_those_of_models_loaded_one_by_one(tiny_run: Path, recipe: Recipe) -> None:
    found = compare(tiny_run, recipe, temperature=TEMPERATURE)
    assert (found["policies"], found["reference"], found["reward"]) == (POLICIES, "sft", "reward")
    assert found["judge"] == recipe.evaluate.judge and found["notes"] == []
    assert {name: found["made_of"][name] for name in short_run.STAGES} == {
        name: hashlib.sha256((tiny_run / name / "adapter" / short_run.WEIGHTS).read_bytes()).hexdigest()
        for name in short_run.STAGES
    }
    asked = short_run.rows(Path(recipe.evaluate.data.path))
    assert [row["prompt"] for row in found["rows"]] == [row["prompt"] for row in asked]
    models = {name: separately(recipe, tiny_run, name) for name in POLICIES}
    base = load_base(recipe.model, load_tokenizer(recipe.model), "score")
    scorer = PeftModel.from_pretrained(base, str(tiny_run / "reward" / "adapter")).eval()
    compared = 0
    for row in found["rows"]:
        for name, reply in row["replies"].items():
            prompt, ids = tokens(recipe, row, reply)
            if len(ids) != reply["tokens"]:
                continue  # its text is encoded otherwise than it was sampled
            compared += 1
            with torch.no_grad():
                score = scorer(input_ids=torch.tensor([prompt + ids])).logits.item()
            assert reply["reward"] == pytest.approx(score, abs=1e-4)
            kl = log_prob(models[name], prompt, ids) - log_prob(models["sft"], prompt, ids)
            assert reply["kl"] == pytest.approx(kl, abs=1e-3)
            assert reply["kl"] == 0.0 or name != "sft"
    assert compared >= 16
    for name in ("base", "ppo", "dpo"):
        assert sum(abs(row["replies"][name]["kl"]) for row in found["rows"]) > 0.01
    for name in POLICIES:
        replies = [row["replies"][name] for row in found["rows"]]
        for measure in ("reward", "judge", "kl", "tokens", "ended"):
            mean = sum(reply[measure] for reply in replies) / len(replies)
            assert found["means"][name][measure] == pytest.approx(mean)
    pairs = {(rate["a"], rate["b"], rate["by"]) for rate in found["win_rates"]}
    assert len(found["win_rates"]) == len(pairs) == 2 * 6 and ("dpo", "ppo", "judge") in pairs


def test_one_seed_gives_one_comparison_and_another_gives_another(tiny_run: Path, recipe: Recipe) -> None:
    written = json.loads((tiny_run / layout.COMPARISON).read_text())
    assert wanted.saved(tiny_run, written["made_of"], wanted.default_settings(recipe)) is not None
    # What the worker made, in batches of the same size.
    assert [row["replies"]["ppo"]["text"] for row in compare(tiny_run, recipe)["rows"]] == [
        row["replies"]["ppo"]["text"] for row in written["rows"]
    ]
    other = compare(tiny_run, recipe, seed=recipe.seed + 1)
    assert [row["replies"] for row in other["rows"]] != [row["replies"] for row in written["rows"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_this_machine_has_no_attention_for_is_compared_with_its_own(tiny_run: Path, recipe: Recipe) -> None:
    usual = compare(tiny_run, recipe, n=2)
    recipe.model.attention = "flash_attention_2"
    found = compare(tiny_run, recipe, n=2)
    assert found["rows"] == usual["rows"]
    (note,) = found["notes"]
    assert note.startswith("`flash_attention_2` needs an NVIDIA GPU") and "is used instead" in note


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_greedy_replies_are_those_of_models_loaded_one_by_one(
    tiny_run: Path, recipe: Recipe, quantization: str
) -> None:
    recipe.model.quantization = quantization
    found = compare(tiny_run, recipe, temperature=0.0, n=3)
    tokenizer = load_tokenizer(recipe.model)
    for name in ("base", "dpo"):
        model = separately(recipe, tiny_run, name)
        for row in found["rows"]:
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
            )
            said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert row["replies"][name]["text"] == said
    assert len(found["rows"]) == 3
    assert {row["replies"]["sft"]["kl"] for row in found["rows"]} == {0.0}
    for row in found["rows"]:  # greedy policies often say the same, and then neither is better
        for one in POLICIES:
            for other in POLICIES:
                a, b = row["replies"][one], row["replies"][other]
                if (a["text"], a["ended"]) == (b["text"], b["ended"]):
                    assert a["reward"] == b["reward"]


@pytest.mark.parametrize(
    ("module", "note"),
    [
        ("no_such_module", "no judge: `no_such_module` cannot be imported"),
        ("failing_judge", "no judge: `failing_judge:judge` failed on these prompts: ValueError: no opinion for ***"),
    ],
)
def test_without_the_judge_all_else_is_there_and_a_note_says_why(
    tiny_run: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, note: str
) -> None:
    (tmp_path / "failing_judge.py").write_text(
        "import os\ndef judge(*_, **__): raise ValueError('no opinion for ' + os.environ['THEIR_TOKEN'])\n"
    )
    monkeypatch.setenv("THEIR_TOKEN", "planted-and-secret")
    monkeypatch.syspath_prepend(tmp_path)
    recipe.evaluate.judge = f"{module}:judge"
    asked, spec = comparing.default_prompts(recipe, 2)
    settings = wanted.default_settings(recipe) | {"max_new_tokens": 2}
    found = comparing.compare(recipe, tiny_run, asked, spec, settings, ["sft", "ppo"])
    assert found["judge"] is None and found["notes"][0].startswith(note)
    assert found["policies"] == list(found["means"]) == ["sft", "ppo"]
    assert {rate["by"] for rate in found["win_rates"]} == {"reward"}
    for row in found["rows"]:
        assert all(reply["judge"] is None and reply["reward"] is not None for reply in row["replies"].values())


def test_prompts_of_a_stage_are_distinct_and_held_out_ones_come_first(recipe: Recipe, tmp_path: Path) -> None:
    recipe.evaluate = None
    del recipe.stages["ppo"]
    spec = recipe.stages["dpo"].data
    assert wanted.default_data(recipe) == ("dpo.data", spec) and spec.eval_fraction > 0
    tokenizer = load_tokenizer(recipe.model)
    rows = prepare.preferences(spec, tokenizer, recipe.seed)
    texts = [
        list(dict.fromkeys(tokenizer.batch_decode(list(table["prompt_ids"])))) for table in (rows.held_out, rows.train)
    ]
    asked, _ = comparing.default_prompts(recipe, len(texts[0]) + 3)
    assert [prompt for prompt, _ in asked] == texts[0] + texts[1][:3]
    assert len(comparing.default_prompts(recipe, 1)[0]) == 1

    apart = tmp_path / "apart.jsonl"
    lines = Path(spec.path).read_text(encoding="utf-8").splitlines(keepends=True)
    apart.write_text("".join([lines[-1], *reversed(lines)]), encoding="utf-8")
    spec.eval_data = Source(path=str(apart), limit=3)
    asked, _ = comparing.default_prompts(recipe, 2 + len(texts[0]))
    first = list(dict.fromkeys(row["prompt"] for row in short_run.rows(apart)[:3]))
    assert [prompt for prompt, _ in asked][: len(first)] == first and len(asked) == 2 + len(texts[0])


def test_a_text_is_a_users_turn_where_the_recipes_prompts_are_conversations(
    tiny_run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "One?"}\n{"question": "Two?"}\n')
    asked, _ = comparing.given_prompts(recipe, file, ["Hello"], 1)
    assert [prompt for prompt, _ in asked] == [[{"role": "user", "content": "One?"}], "Hello"]
    recipe.evaluate.data.path = str(file)
    assert comparing.given_prompts(recipe, None, ["Hello"], 1)[0] == [(turns, {})]
    recipe.evaluate.data.path = str(tmp_path / "gone.jsonl")
    assert comparing.given_prompts(recipe, None, ["Hello"], 1)[0] == [("Hello", {})]


def test_win_rates_of_known_cases() -> None:
    """Eight of eight shows that it is more than half, and not that it is always."""
    all_won = win_rate([1.0] * 8, [0.0] * 8)
    assert all_won == {"win_rate": 1.0, "low": pytest.approx(0.598, abs=1e-3), "high": 1.0, "ties": 0.0}
    assert win_rate([0.0] * 8, [1.0] * 8)["high"] == pytest.approx(0.402, abs=1e-3)
    all_tied = win_rate([1.0, 2.0], [1.0, 2.0])
    assert (all_tied["win_rate"], all_tied["ties"]) == (0.5, 1.0)
    found = win_rate([1.0, 0.0, 5.0, None, 1.0], [0.0, 1.0, 5.0, 0.0, None])
    assert (found["win_rate"], found["ties"]) == (0.5, 1 / 3) and found["low"] < 0.15 and found["high"] > 0.85
    assert win_rate([None], [1.0]) is None


@pytest.mark.parametrize("ties", [0.0, 0.06])
@pytest.mark.parametrize("truth", [0.5, 0.85, 0.965])
@pytest.mark.parametrize("prompts", [8, 16, 64])
def test_the_interval_of_a_win_rate_covers_the_truth(prompts: int, truth: float, ties: float) -> None:
    """Of 4,000 comparisons of two policies of which the first wins so often, ties counting half."""
    draw = np.random.default_rng(prompts)
    chances = [truth - ties / 2, ties, 1 - truth - ties / 2]
    covered = 0
    for won, tied, lost in draw.multinomial(prompts, chances, 4000).tolist():
        ours = [1.0] * won + [0.5] * tied + [0.0] * lost
        rate = win_rate(ours, [0.5] * prompts)
        assert rate is not None
        covered += rate["low"] <= truth <= rate["high"]
    assert covered / 4000 >= 0.93


def test_the_command_with_settings_of_its_own_leaves_what_run_has_written(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tiny_run / layout.COMPARISON).read_bytes()
    arguments = [
        "-p",
        r"Q: What sound does a cow make?\nA:",
        "-p",
        "Hi",
        "--stages",
        "ppo,sft",
        "--max-new-tokens",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "compare", str(tiny_run), *arguments, "--seed", "5", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["policies"] == ["sft", "ppo"]
    assert [row["prompt"] for row in found["rows"]] == ["Q: What sound does a cow make?\nA:", "Hi"]
    assert all(reply["tokens"] <= 3 for row in found["rows"] for reply in row["replies"].values())
    assert found["settings"] == {
        "prompts": "the command line", "n": 2, "temperature": 0.7, "max_new_tokens": 3, "seed": 5, "digest": None
    }  # fmt: skip
    assert (tiny_run / layout.COMPARISON).read_bytes() == before
