"""`score`: the numbers that the reward model itself gives, for rows of every shape, in their order."""

import csv
import gzip
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data import prepare
from rlhf_pipeline.recipe.schema import Data, Source
from rlhf_pipeline.use import score as scoring
from rlhf_pipeline.use.part import Part

PROMPT, GOOD, BAD = "Q: How does a frog sound?\nA:", " It is croak. Thank you for asking!", " Ugh. No idea."
TURNS = [{"role": "user", "content": "How does a frog sound?"}]


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A run of one's own, without its data."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def load_once(monkeypatch, load_staged) -> None:
    """Have the tests of this file share one base with its adapters, which are the same in every copy of the run."""
    monkeypatch.setattr(scoring, "StagedBase", load_staged)


@pytest.fixture
def score(tmp_path, monkeypatch, capfd, load_once) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """The command itself; returns its exit code, the lines on standard output, and what it said."""

    def command(*arguments: str | Path) -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "score", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return code, [json.loads(line) for line in said.out.splitlines()], said.err

    return command


@pytest.fixture(scope="module")
def by_transformers(tiny_run) -> Callable[[list[int]], float]:
    """The reward model as Transformers and PEFT load it: the score of one row of tokens."""
    base = AutoModelForSequenceClassification.from_pretrained(recipes.TINY / "checkpoint", num_labels=1)
    model = PeftModel.from_pretrained(base.float(), str(tiny_run / "reward" / "adapter")).eval()

    def of_tokens(ids: list[int]) -> float:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits.item()

    return of_tokens


@pytest.fixture(scope="module")
def by_text(tiny_run, by_transformers) -> Callable[[str, str], float]:
    """The same of a text prompt and a reply."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "reward" / "adapter")

    def of_text(prompt: str, reply: str) -> float:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, reply)]
        return by_transformers([*ids[0], *ids[1], tokenizer.eos_token_id])

    return of_text


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_scores_are_those_of_the_trained_model_on_the_rows_of_training(
    run, tiny_run, score, tmp_path, by_transformers, tokenizer, monkeypatch
):
    """On the very tokens that the reward trainer gets; in order, whatever the batches."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tiny_run.parent.parent / "preferences.jsonl"
    code, lines, said = score(run, file, "--batch-size", "7")
    assert code == 0, said
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["row"], line["prompt"], line["chosen"], line["rejected"]) for line in lines] == [
        (number, row["prompt"], row["chosen"], row["rejected"]) for number, row in enumerate(rows, 1)
    ]
    trained = prepare.whole_preferences(Data(path=str(file), chat=False), tokenizer, seed=0).train
    expected = [(by_transformers(row["chosen_ids"]), by_transformers(row["rejected_ids"])) for row in trained]
    found = [(line["chosen_score"], line["rejected_score"]) for line in lines]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
    assert len({score for pair in found for score in pair}) > len(rows) / 2
    assert all(line["margin"] == line["chosen_score"] - line["rejected_score"] for line in lines)
    accuracy = sum(chosen > rejected for chosen, rejected in expected) / len(expected)
    assert f"{len(rows)} rows" in said and f"accuracy {accuracy:.4g}" in said


def test_scores_are_those_that_ppo_wrote(run, score, tmp_path):
    """Of its samples that ended; they keep their order, and their old scores beside them do not matter."""
    samples = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    samples = [row for row in samples if row.get("ended")]
    assert len(samples) >= 3
    _, lines, said = score(run, write(tmp_path / "samples.jsonl", *samples))
    assert [line["completion"] for line in lines] == [row["completion"] for row in samples], said
    for line, row in zip(lines, samples, strict=True):
        assert line["score"] == pytest.approx(row["score"], abs=1e-4)


SHAPES: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": PROMPT, "completion": GOOD},
    "with a label that says nothing here": {"prompt": PROMPT, "completion": GOOD, "label": "biology"},
    "with a bad label": {"prompt": PROMPT, "response": GOOD, "label": False},
    "with a score": {"question": PROMPT, "answer": GOOD, "score": None},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES.keys())
def test_a_reply_in_a_row_is_one_line(row, run, score, tmp_path, by_text):
    code, lines, said = score(run, write(tmp_path / "rows.jsonl", row))
    assert code == 0, said
    (line,) = lines
    assert line == {"row": 1, "prompt": PROMPT, "completion": GOOD, "score": line["score"]}
    assert line["score"] == pytest.approx(by_text(PROMPT, GOOD), abs=1e-5)


def test_conversations_go_through_the_chat_template(run, score, tmp_path, by_text):
    written = [{"messages": [*TURNS, {"role": "assistant", "content": GOOD}]}]
    _, (line,), _ = score(run, write(tmp_path / "rows.jsonl", *written))
    assert (line["prompt"], line["completion"]) == (TURNS, GOOD)
    rendered = f"<|user|>{TURNS[0]['content']}<|assistant|>"
    assert line["score"] == pytest.approx(by_text(rendered, GOOD), abs=1e-5)


def test_text_is_a_users_turn_where_it_was_in_training(run, score, tmp_path, by_text):
    """Here the rows of training say so, which are conversations."""
    turns = [*TURNS, {"role": "assistant", "content": GOOD}]
    data = write(tmp_path / "training.jsonl", {"chosen": turns, "rejected": [*TURNS, turns[1] | {"content": BAD}]})
    loaded = recipes.of_run(run)
    loaded.stages["reward"].data = Data(path=str(data))
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    _, (line,), _ = score(run, write(tmp_path / "rows.jsonl", {"prompt": TURNS[0]["content"], "completion": GOOD}))
    assert line["prompt"] == TURNS
    rendered = f"<|user|>{TURNS[0]['content']}<|assistant|>"
    assert line["score"] == pytest.approx(by_text(rendered, GOOD), abs=1e-5)


def test_a_ranking_is_its_pairs(run, score, tmp_path, by_text):
    middle = " Not sure."
    rows = [{"prompt": PROMPT, "replies": [GOOD, middle, BAD]}, {"prompt": PROMPT, "replies": [BAD, GOOD]}]
    _, lines, said = score(run, write(tmp_path / "rows.jsonl", *rows))
    pairs = [(GOOD, middle), (GOOD, BAD), (middle, BAD), (BAD, GOOD)]
    assert [(line["row"], line["chosen"], line["rejected"]) for line in lines] == [
        (number, *pair) for number, pair in zip((1, 1, 1, 2), pairs, strict=True)
    ]
    for line in lines:
        assert line["chosen_score"] == pytest.approx(by_text(PROMPT, line["chosen"]), abs=1e-5)
    assert said.splitlines()[-1].startswith("2 rows") and "of 4 pairs" in said


def test_every_type_of_file_and_columns_of_other_names(run, score, tmp_path, by_text):
    rows = [{"q": PROMPT, "a": reply} for reply in (GOOD, BAD, GOOD)]
    data = tmp_path / "data"
    data.mkdir()
    with gzip.open(data / "1.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]))
    with (data / "2.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["q", "a"], [PROMPT, BAD]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), data / "3.parquet")
    code, lines, said = score(run, data, "--columns", "prompt=q,completion=a", "-o", "scores.jsonl")
    assert (code, lines) == (0, []), said
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in written] == [1, 2, 3]
    expected = [by_text(PROMPT, row["a"]) for row in rows]
    assert [line["score"] for line in written] == pytest.approx(expected, abs=1e-5)
    assert not list(tmp_path.glob("*.new"))


def test_nothing_is_cut(run, score, tmp_path, by_text):
    """Not to the lengths of training; what is over the model's context has no score, and is counted."""
    loaded = recipes.of_run(run)
    data = loaded.stages["reward"].data
    data.max_prompt_length, data.max_completion_length = 3, 2
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    rows = [{"prompt": PROMPT, "completion": reply} for reply in (GOOD, " croak" * 3000, BAD)]
    code, lines, said = score(run, write(tmp_path / "rows.jsonl", *rows))
    assert code == 0
    assert lines[0]["score"] == pytest.approx(by_text(PROMPT, GOOD), abs=1e-5)
    assert lines[1]["score"] is None and lines[1]["completion"] == rows[1]["completion"]
    assert lines[2]["score"] == pytest.approx(by_text(PROMPT, BAD), abs=1e-5)
    assert "1 replies have no score" in said and "2048 tokens" in said


def test_a_bad_row_is_named_and_leaves_no_file(run, score, tmp_path):
    bad = [{"prompt": PROMPT, "completion": GOOD}, {"prompt": PROMPT, "completion": None}]
    write(tmp_path / "bad.jsonl", *bad)
    code, _, said = score(run, "bad.jsonl", "-o", "scores.jsonl")
    assert code == 2
    assert "bad.jsonl: row 2: `completion` is missing" in said
    assert "--columns" in said
    (tmp_path / "broken.jsonl").write_text(json.dumps(bad[0]) + "\n{")
    code, _, said = score(run, "broken.jsonl", "-o", "scores.jsonl")
    assert code == 2 and "broken.jsonl:2: this line is not JSON" in said
    assert not list(tmp_path.glob("scores*"))


def test_a_row_that_the_chat_template_refuses_is_named(run, score, tmp_path):
    refused = [{"role": "system", "content": "a"}, *TURNS, {"role": "assistant", "content": GOOD}]
    template = run / "reward" / "adapter" / "chat_template.jinja"
    written = "{% for message in messages %}{{ message.content }}{% endfor %}"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + written)
    rows = [{"messages": refused[1:]}, {"messages": refused}]
    code, _, said = score(run, write(tmp_path / "rows.jsonl", *rows))
    assert code == 2
    assert "rows.jsonl: row 2: " in said and "no system" in said


def test_rows_are_not_held_in_memory(run, load_once, tmp_path, monkeypatch):
    """The first ones are scored before the last ones are read."""
    monkeypatch.setattr(scoring, "BATCHES_AT_ONCE", 1)
    write(tmp_path / "rows.jsonl", *[{"prompt": PROMPT, "completion": GOOD}] * 400)
    taken = itertools.count()
    rows, _ = scoring.read(Source(path=str(tmp_path / "rows.jsonl")), None)
    scorer = scoring.Scorer(run, recipes.of_run(run), "reward", None)
    lines = scorer.lines((row for row in rows if next(taken) >= 0), 4, None, lambda come: None)
    assert len(next(lines)) == 4 and next(taken) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_from_a_machine_with_another_attention_is_scored_all_the_same(run, score, tmp_path):
    file = write(tmp_path / "rows.jsonl", {"prompt": PROMPT, "completion": GOOD})
    usual = score(run, file)
    loaded = recipes.of_run(run)
    loaded.model.attention = "kernels-community/flash-attn2"
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    code, lines, said = score(run, file)
    assert (code, lines) == usual[:2] and code == 0
    assert "note: `kernels-community/flash-attn2` needs an NVIDIA GPU" in said


class Batches:
    """Counts the batches that go through the model, and ends the command as Ctrl-C does before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at, self.score = 0, -1, scoring.score_tokens
        monkeypatch.setattr(scoring, "score_tokens", self)
        monkeypatch.setattr(scoring, "BATCHES_AT_ONCE", 1)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        self.count += 1
        return self.score(*arguments)


def test_a_score_that_was_stopped_goes_on_to_the_same_lines(run, score, tmp_path, monkeypatch):
    rows = [{"prompt": PROMPT, "completion": f"{GOOD} {number}"} for number in range(10)]
    command = (run, write(tmp_path / "rows.jsonl", *rows), "--batch-size", "4", "-o", "scores.jsonl")
    batches, out, part = Batches(monkeypatch), tmp_path / "scores.jsonl", tmp_path / "scores.jsonl.part"
    assert score(*command)[0] == 0 and batches.count == 3
    whole, said_before = out.read_bytes(), score(*command)[2]
    assert len(whole.splitlines()) == 10
    out.write_text("of another time\n")

    batches.count, batches.stop_at = 0, 2
    code, _, said = score(*command)
    assert code == 130 and f"the scores so far are in {part}" in said.replace("in scores", f"in {tmp_path}/scores")
    assert "the same command resumes from here" in said
    assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8]) and out.read_text() == "of another time\n"
    with part.open("ab") as file:
        file.write(whole.splitlines(keepends=True)[8] + whole.splitlines()[9][:20])  # as a kill would leave it
    batches.count, batches.stop_at = 0, -1
    code, _, said = score(*command)
    assert (code, batches.count) == (0, 1) and "8 of 10 lines are in scores.jsonl.part already" in said
    assert out.read_bytes() == whole and said.splitlines()[-1] == said_before.splitlines()[-1]
    assert not list(tmp_path.glob("scores.jsonl.*"))

    batches.count, batches.stop_at = 0, 2
    assert score(*command)[0] == 130
    write(tmp_path / "rows.jsonl", *rows[::-1])
    batches.count, batches.stop_at = 0, -1
    code, _, said = score(*command)
    assert (code, batches.count) == (0, 3) and "of other rows or another model: it is begun anew" in said
    assert json.loads(out.read_text().splitlines()[0])["completion"] == rows[-1]["completion"]


def test_two_cannot_write_one_file_and_progress_is_told(run, score, tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", *[{"prompt": PROMPT, "completion": f"{GOOD} {number}"} for number in range(4)])
    other = Part(tmp_path / "scores.jsonl", {}, 1, print)
    code, _, said = score(run, "rows.jsonl", "-o", tmp_path / "scores.jsonl")
    assert code == 2 and "another `score` is writing this file" in said
    other.close(keep=False)
    monkeypatch.setattr(scoring, "PLAIN_EVERY_S", 0.0)
    said = score(run, "rows.jsonl", "--batch-size", "2", "-o", tmp_path / "scores.jsonl")[2]
    assert "scored 2 of 4 lines, " in said and "scored 4 of 4 lines, 0 s left" in said


def test_the_accuracy_on_pairs_of_training_is_told_apart(run, score, tmp_path, monkeypatch, tiny_run):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tiny_run.parent.parent / "preferences.jsonl"
    given = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "reward" / "adapter")
    loaded = recipes.of_run(run)
    prepared = prepare.whole_preferences(loaded.stages["reward"].data, tokenizer, loaded.seed)
    assert prepared.held_out is not None
    swapped = given[0] | {"chosen": given[0]["rejected"], "rejected": given[0]["chosen"]}
    new = [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}, {"prompt": PROMPT, "chosen": BAD, "rejected": GOOD}]
    code, lines, said = score(run, write(tmp_path / "rows.jsonl", *given, *new))
    assert code == 0, said
    seen = [line["trained_on"] for line in lines]
    assert (sum(seen), len(seen) - sum(seen)) == (len(prepared.train), len(prepared.held_out) + 2)
    assert seen[-2:] == [False, False]

    def accuracy(known: bool) -> str:
        margins = [line["margin"] for line, is_known in zip(lines, seen, strict=True) if is_known == known]
        return f"{sum(margin > 0 for margin in margins) / len(margins):.4g}"

    assert f": {accuracy(True)} on the {sum(seen)} that the model was trained on, {accuracy(False)} on the " in said
    _, lines, said = score(run, write(tmp_path / "rows.jsonl", swapped))
    assert lines[0]["trained_on"] == seen[0] and (("all of them" if seen[0] else "none of them") in said)

    loaded.stages["reward"].data.path = str(tmp_path / "gone.jsonl")
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    code, lines, said = score(run, tmp_path / "rows.jsonl")
    assert code == 0 and "trained_on" not in lines[0] and "note: nobody knows which of these pairs" in said
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "gone.jsonl")
    assert "is not what it was in training" in score(run, tmp_path / "rows.jsonl")[2]


def forget(run: Path) -> None:
    (run / "reward" / "adapter" / "adapter_model.safetensors").unlink()


def lose_model(run: Path) -> None:
    loaded = recipes.of_run(run)
    loaded.model.path = "/nowhere/model"
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))


WRONG: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "no such stage": (["--stage", "gone"], lambda _: None, "there is no stage `gone`\nhint: stages with a reward"),
    "another kind": (["--stage", "ppo"], lambda _: None, "`ppo` is a ppo stage\nhint: stages with a reward model: rew"),
    "not done": (["--stage", "reward"], forget, "stage `reward` is not done"),
    "none done": ([], forget, "no stage with a reward model is done"),
    "no model": ([], lose_model, "model.path: /nowhere/model: this is neither a model folder"),
    "no columns": (["--columns", "prompt"], lambda _: None, "--columns: `prompt` names no columns"),
    "the file itself": (["-o", "rows.jsonl"], lambda _: None, "this is the file that is read"),
    "a folder": (["-o", "."], lambda _: None, "--out .: this is a folder"),
    "no folder": (["-o", "no/scores.jsonl"], lambda _: None, "there is no folder no"),
}


@pytest.mark.parametrize(("options", "spoil", "expected"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_error(options, spoil, expected, run, score, tmp_path):
    spoil(run)
    write(tmp_path / "rows.jsonl", {"prompt": PROMPT, "completion": GOOD})
    code, lines, said = score(run, "rows.jsonl", *options)
    assert (code, lines) == (2, [])
    assert expected in said and said.count("error:") == 1 and "Traceback" not in said


def test_rows_without_replies_are_refused(run, score, tmp_path):
    code, _, said = score(run, write(tmp_path / "rows.jsonl", {"prompt": PROMPT}))
    assert code == 2 and "the columns (prompt) hold no replies" in said
