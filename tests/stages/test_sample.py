"""Sampled rows: the same whatever the batches, resumed without a difference, and read by every kind that learns."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data import prepare as data
from rlhf_pipeline.data.encode import row_of
from rlhf_pipeline.recipe.gates import known_metrics, possible_metrics
from rlhf_pipeline.recipe.schema import Data
from rlhf_pipeline.rundir.layout import MADE
from rlhf_pipeline.stages import sample
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.sample import Asked, metrics_of, rows_of

PROMPTS = [
    *({"prompt": f"Q: {'is it so? ' * i}\nA:", "key": f"answer {i}", "label": i % 2 == 0} for i in range(1, 6)),
    {"prompt": "Q: is it so? \nA:", "key": "answer 1 again", "label": True},
]
TEXT = """
name: run
model: {{path: {model}, quantization: none, dtype: float32}}
stages:
  sft: {{data: "tiny:demonstrations"}}
  twin: {{kind: sft, init: base, data: "tiny:demonstrations"}}
  reward: {{data: "tiny:preferences", init: sft}}
  candidates:
    kind: sample
    init: [sft, base]
    n: 3
    data: prompts.jsonl
    sampling: {{max_new_tokens: 6, batch_size: 6}}
    rewards:
      - {{stage: reward, weight: 2.0}}
      - {{function: "our_rewards_of_samples:length", weight: -0.5}}
"""
FUNCTION = """
def length(completions, key, **_):
    return [float(len(text) + 100 * ("4" in of)) for text, of in zip(completions, key, strict=True)]

def some(completions, key, **_):
    return [float(len(text)) if "1" not in of else None for text, of in zip(completions, key, strict=True)]
"""


@pytest.fixture
def make(tmp_path: Path, make_artifacts: Callable[..., Any]) -> Iterator[Callable[..., Job]]:
    """A function that makes the job of the sampling stage, in a run directory of its own, with what it starts from."""
    artifacts = make_artifacts()
    (tmp_path / "our_rewards_of_samples.py").write_text(FUNCTION)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "recipe.yaml").write_text(TEXT.format(model=artifacts.spec.path))

    def made(name: str, *overrides: str) -> Job:
        recipe = recipes.load(str(tmp_path / "recipe.yaml"), [f"output_dir={tmp_path / name}", *overrides])
        for stage, folder in (("sft", artifacts.init), ("twin", artifacts.init), ("reward", artifacts.reward)):
            shutil.copytree(folder, recipe.run / stage / "adapter", dirs_exist_ok=True)
        job = Job(recipe, "candidates", recipe.run)
        job.work.mkdir(parents=True, exist_ok=True)
        return job

    yield made


def rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.artifact / "rows.jsonl").read_text("utf-8").splitlines()]


def test_rows_do_not_depend_on_batches_and_a_resumed_run_ends_with_the_same(make: Callable[..., Job]) -> None:
    whole = make("whole")
    torch.manual_seed(1)
    metrics = sample.run(whole)
    torch.manual_seed(2)
    for size in (1, 7, 64):
        other = make(f"of-{size}", f"candidates.sampling.batch_size={size}")
        sample.run(other)
        for one, expected in zip(rows(other), rows(whole), strict=True):
            assert one.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-4)
            assert one["sampled"].pop("rewards").keys() == expected["sampled"].pop("rewards").keys()
            assert one == expected
    resumed = make("resumed")
    log = (whole.work / MADE).read_bytes().splitlines(keepends=True)
    assert len(log) == len(PROMPTS)
    (resumed.work / MADE).write_bytes(b"".join(log[:4]) + log[4][:30])  # killed while the third batch was written
    again = sample.run(resumed)
    assert (resumed.artifact / "rows.jsonl").read_bytes() == (whole.artifact / "rows.jsonl").read_bytes()
    assert {name: value for name, value in again.items() if name != "tokens_per_second"} == {
        name: value for name, value in metrics.items() if name != "tokens_per_second"
    }
    assert known_metrics(whole.recipe, "candidates") <= set(metrics)
    assert set(metrics) <= known_metrics(whole.recipe, "candidates") | possible_metrics(whole.recipe, "candidates")


def test_replies_are_of_each_policy_and_scored_by_the_weighted_sum(make: Callable[..., Job]) -> None:
    job = make("run")
    metrics = sample.run(job)
    made = rows(job)
    assert [row["prompt"] for row in made] == [row["prompt"] for row in PROMPTS]
    assert [row["key"] for row in made] == [row["key"] for row in PROMPTS]  # what functions read goes along
    assert all("label" not in row for row in made)  # it is of another reply
    for row in made:
        of = row["sampled"]
        assert of["policies"] == ["sft"] * 3 + ["base"] * 3
        assert len(set(row["replies"])) == 6
        assert of["rewards"]["length"] == [len(reply) + 100 * ("4" in row["key"]) for reply in row["replies"]]
        sums = [
            2 * one - 0.5 * other for one, other in zip(of["rewards"]["reward"], of["rewards"]["length"], strict=True)
        ]
        assert row["scores"] == pytest.approx(sums, abs=1e-4)
        assert max(of["tokens"]) <= 6
    assert not set(made[0]["replies"]) & set(made[5]["replies"])  # the same prompt again
    alone, twins, other = (
        make(name, "candidates.rewards=[]", f"candidates.init={init}", f"seed={seed}")
        for name, init, seed in (("alone", "sft", 42), ("twins", "[sft, twin]", 42), ("other", "sft", 7))
    )
    for one in (alone, twins, other):
        sample.run(one)
        assert all("scores" not in row for row in rows(one))
    assert [row["replies"] for row in rows(alone)] == [row["replies"][:3] for row in made]
    for row in rows(twins):  # policies that are the same give other replies
        assert len(set(row["replies"])) == 6
    texts, others = ({text for row in of for text in row["replies"]} for of in (made, rows(other)))
    assert not texts & others
    gains = [max(row["scores"]) - sum(row["scores"]) / 6 for row in made]
    assert metrics["scores/gain"] == pytest.approx(sum(gains) / len(gains))


def test_gold_is_measured_and_decides_nothing(make: Callable[..., Job]) -> None:
    """The rows are those without it, but for its own number; a reply that gold alone applies to has no score."""
    rewards = "{function: 'our_rewards_of_samples:some'}"
    gold = "{function: 'our_rewards_of_samples:length', weight: 0, name: gold}"
    settings = ("candidates.init=sft", "candidates.n=4")
    plain, with_gold = (
        make(name, *settings, f"candidates.rewards=[{listed}]")
        for name, listed in (("plain", rewards), ("gold", f"{rewards}, {gold}"))
    )
    before, after = sample.run(plain), sample.run(with_gold)
    lengths = []
    for row, expected in zip(rows(with_gold), rows(plain), strict=True):
        lengths.append(row["sampled"]["rewards"].pop("gold"))
        assert row == expected and len(lengths[-1]) == len(row["scores"])
    assert len(lengths) == len(PROMPTS) - 2 == len(PROMPTS) - after["prompts/left_out"]
    new = {name for name in after if name.startswith("best_of_n/")}
    assert {"best_of_n/order", "best_of_n/order_se", "best_of_n/gain", "best_of_n/gain_se"} <= new
    assert after.keys() - before.keys() == new | {"rewards/gold/mean", "rewards/gold/std"}
    assert new <= possible_metrics(with_gold.recipe, "candidates")
    assert not new & (known_metrics(plain.recipe, "candidates") | possible_metrics(plain.recipe, "candidates"))
    assert after["best_of_n/order"] == 1  # scores are lengths too
    gains = [max(own) - sum(own) / 4 for own in lengths]
    assert after["best_of_n/gain"] == pytest.approx(sum(gains) / len(gains))
    several = make("several", "candidates.n=4", f"candidates.rewards=[{rewards}, {gold}]")
    assert not any(name.startswith("best_of_n/") for name in sample.run(several))


def test_rows_are_read_by_all_kinds_that_learn(make: Callable[..., Job], tokenizer: Any) -> None:
    """Really read and encoded: `sft` the best reply, `dpo` best against worst, `reward` all pairs, `kto` two."""
    job = make("run")
    sample.run(job)
    spec, made = Data(path=str(job.artifact / "rows.jsonl")), rows(job)
    best = [row["replies"][row["scores"].index(max(row["scores"]))] for row in made]
    worst = [row["replies"][row["scores"].index(min(row["scores"]))] for row in made]

    def texts(ids: Any) -> list[str]:
        return [tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True) for row in ids]

    found = data.demonstrations(spec, tokenizer, 0).train
    assert texts(found["labels"]) == best
    both = data.preferences(spec.model_copy(update={"pairs": "best_and_worst"}), tokenizer, 0).train
    assert (texts(both["chosen_ids"]), texts(both["rejected_ids"])) == (best, worst)
    assert texts(both["prompt_ids"]) == [row["prompt"] for row in made]
    assert len(data.whole_preferences(spec, tokenizer, 0).train) == 15 * len(made)
    feedback = data.feedback(spec, tokenizer, 0).train
    good = dict(zip(texts(feedback["completion_ids"]), feedback["label"], strict=True))
    assert good == dict.fromkeys(best, True) | dict.fromkeys(worst, False)
    prompts = data.prompts_with_rows(spec, tokenizer, 0).train
    assert [json.loads(row)["columns"]["key"] for row in prompts["row"]] == [row["key"] for row in PROMPTS]
    candidates = data.candidates(spec, tokenizer, 0).train
    assert [json.loads(replies) for replies in candidates["replies"]] == [row["replies"] for row in made]


def item(*replies: str, scores: list[float | None] | None = None, **others: Any) -> dict[str, Any]:
    """What was sampled to a prompt."""
    count = len(replies)
    found = {
        "replies": list(replies), "policies": ["sft"] * count, "tokens": [3] * count, "ended": [True] * count,
        "distinct_2": 1.0, "unique": 1.0, "seconds": 2.0,
    }  # fmt: skip
    of_scores = {"scores": scores, "rewards": {"r": scores}, "disagreement": {}, "logged": {}}
    return found | (of_scores if scores else {}) | others


def asked(prompt: Any = "p", **columns: Any) -> Asked:
    return Asked(prompt, [1], row_of(prompt, {"prompt": prompt} | columns), 0)


def test_what_no_stage_could_read_is_left_out() -> None:
    """Empty replies, replies to which no reward applies, and prompts that have too few left."""
    found = rows_of(
        [asked(), asked("q"), asked("r")],
        [
            item("a", " ", "b", scores=[1.0, 5.0, None]),
            item("", "\n", scores=[1.0, 2.0]),
            item("c", "d", scores=[None] * 2),
        ],
    )
    assert [(row["prompt"], row["replies"], row["scores"]) for row in found] == [("p", ["a"], [1.0])]
    assert found[0]["sampled"] == {"policies": ["sft"], "tokens": [3], "ended": [True], "rewards": {"r": [1.0]}}
    unscored = [item("a", ""), item("a", "a"), item("a")]
    assert [row["replies"] for row in rows_of([asked(), asked("q"), asked("r")], unscored)] == [["a", "a"], ["a"]]


def test_replies_of_one_text_have_one_score_and_make_no_pair(tmp_path: Path, tokenizer: Any) -> None:
    """That of the one that ended, since later stages put an EOS behind it."""
    (row,) = rows_of([asked()], [item("a", "a", "b", scores=[-3.0, 2.0, 1.0], ended=[False, True, True])])
    assert row["scores"] == [2.0, 2.0, 1.0]
    assert row["sampled"]["rewards"] == {"r": [-3.0, 2.0, 1.0]}  # as it was given
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    pairs = data.preferences(Data(path=str(tmp_path / "rows.jsonl")), tokenizer, 0).train
    assert {
        (tokenizer.decode(pair["chosen_ids"][:-1]), tokenizer.decode(pair["rejected_ids"][:-1])) for pair in pairs
    } == {("a", "b")}


def test_a_conversation_is_read_again_as_it_was(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for source in ({"messages": turns, "tools": tools}, {"question": "u", "system": "s"}, {"prompt": "u"}):
        (tmp_path / "source.jsonl").write_text(json.dumps(source))
        ((prompt, row),) = data.first_prompts(Data(path=str(tmp_path / "source.jsonl")), 1)
        (made,) = rows_of([Asked(prompt, [1], row_of(prompt, row), 0)], [item("a", "b", scores=[1.0, 2.0])])
        (tmp_path / "rows.jsonl").write_text(json.dumps(made))
        ((again, _),) = data.first_prompts(Data(path=str(tmp_path / "rows.jsonl")), 1)
        assert again == prompt


def test_figures_by_hand() -> None:
    found = metrics_of([
        item("ab", "", scores=[1.0, 4.0], tokens=[3, 1], ended=[True, False], unique=0.5),
        item("c", "d", scores=[2.0, None]),
        item("e", "f", scores=[None, None]),
    ])  # fmt: skip
    expected = {
        "replies": 6, "reply/length": 16 / 6, "reply/ended": 5 / 6, "reply/empty": 1 / 6, "reply/distinct_2": 1.0,
        "reply/unique": 2.5 / 3, "tokens_per_second": 16 / 6, "scores/mean": 7 / 3, "scores/std": (14 / 9) ** 0.5,
        "scores/best": 3.0, "scores/gain": 0.75, "rewards/r/mean": 7 / 3, "rewards/r/std": (14 / 9) ** 0.5,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-6)
