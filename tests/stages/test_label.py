"""The stage that people do: what they are shown, when it goes on, and what becomes of what they chose."""

import json
from pathlib import Path
from typing import Any

import pytest

import rlhf_pipeline.models.tiny
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.errors import InputError, Waiting
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.gates import known_metrics, possible_metrics
from rlhf_pipeline.rundir import agreement, items
from rlhf_pipeline.rundir.labels import Label, Labels, Pair
from rlhf_pipeline.stages import label
from rlhf_pipeline.stages.job import Job

CHECKPOINT = Path(rlhf_pipeline.models.tiny.__file__).parent / "checkpoint"
ROWS = [{"prompt": f"Q{i}:", "replies": [" yes", " no", " yes"]} for i in range(4)]
CHECKS = [{"prompt": "P:", "chosen": " right", "rejected": " wrong"}]


@pytest.fixture
def make_job(tmp_path: Path):
    """A stage of kind label with its rows, and with checks."""

    def make(rows: list[dict[str, Any]] = ROWS, **stage: Any) -> Job:
        for name, of_file in {"candidates": rows, "checks": CHECKS}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
        own = {"until": {"labels": 3}, "data": {"path": str(tmp_path / "candidates.jsonl")}} | stage
        recipe = Recipe.model_validate(
            {
                "name": "run",
                "output_dir": str(tmp_path),
                "model": {"path": str(CHECKPOINT), "quantization": "none", "dtype": "float32"},
                "stages": {"f": {"kind": "label", "init": "base", **own}},
            }
        )
        (recipe.run / "f" / "work").mkdir(parents=True, exist_ok=True)
        return Job(recipe, "f", recipe.run)

    return make


def choose(job: Job, person: str, choices: list[Any], **more: Any) -> None:
    """Have a person label the first pair of as many items, in their order; None passes one over."""
    with Labels(job.run / "labels.db") as labels:
        for item, choice in zip(items.read(job.work / "items.jsonl"), choices, strict=False):
            better = {0: "first", 1: "second", None: None}[item.better]
            pair = Pair.of(item.key, item.prompt, *item.replies[:2], better)
            if choice is not None:
                labels.add(Label(f"{person} {pair.key}", pair.key, "f", person, choice, **more), pair)


def written(job: Job, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.artifact / name).read_text().splitlines()]


def test_it_waits_until_there_are_labels_enough_and_reads_the_replies_once(make_job) -> None:
    job = make_job(check={"path": str(make_job().recipe.run.parent / "checks.jsonl")})
    with pytest.raises(Waiting, match=r"^0 of 3 labels$"):
        label.run(job)
    asked = items.read(job.work / "items.jsonl")
    assert [len(one.replies) for one in asked] == [2, 2, 2, 2, 2] and [one.better for one in asked] == [None] * 4 + [0]
    features = job.work / "features.safetensors"
    before = features.stat().st_mtime_ns
    choose(job, "ann", ["first", "skip", "second"])
    with pytest.raises(Waiting, match=r"^2 of 3 labels$"):
        label.run(job)
    assert features.stat().st_mtime_ns == before
    choose(job, "bob", ["first"])
    metrics = label.run(job)
    assert metrics == {
        "rows": 2, "label/labels": 3, "label/people": 2, "label/ties": 0, "label/bad": 0,
        "label/alpha": pytest.approx(1.0),
    }  # fmt: skip
    expected = {"confidence": 1.0, "dimensions": {}}
    assert written(job) == [
        {"prompt": "Q0:", "chosen": " yes", "rejected": " no", **expected},
        {"prompt": "Q2:", "chosen": " no", "rejected": " yes", **expected},
    ]
    assert [one["choice"] for one in written(job, "choices.jsonl")] == ["first", "skip", "second", "first"]
    assert (job.artifact / "items.jsonl").read_bytes() == (job.work / "items.jsonl").read_bytes()
    assert (job.artifact / "features.safetensors").read_bytes() == features.read_bytes()


def test_what_counts_is_what_most_people_chose(make_job) -> None:
    job = make_job(until={"labels": 11})
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "ann", ["first", "first", "bad", "first"], dimensions={"brief": "first", "kind": "tie"})
    choose(job, "bob", ["first", "second", "bad", "tie"], dimensions={"brief": "second"})
    choose(job, "cem", ["second", None, "first", "first"], dimensions={"brief": "second"})
    metrics = label.run(job)
    assert [(row["prompt"], row["chosen"], row["confidence"]) for row in written(job)] == [
        ("Q0:", " yes", pytest.approx(2 / 3)),
        ("Q3:", " yes", pytest.approx(5 / 6)),  # a tie is half of each
    ]
    assert written(job)[0]["dimensions"] == {"brief": 0.0, "kind": 0.5}
    assert metrics["label/ties"] == 1 and metrics["label/bad"] == 1


def test_a_conversation_with_tools_keeps_them(make_job) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    prompt = [{"role": "user", "content": "Well?", "tools": tools}]
    job = make_job(until={"labels": 1})
    items.write(job.work / "items.jsonl", [items.item(prompt, ["a", "b"])])
    (job.work / "features.safetensors").touch()
    choose(job, "ann", ["second"])
    label.run(job)
    (row,) = written(job)
    assert recognise([row], "preferences").read(row) == [(prompt, "b", "a")]


def test_replies_that_differ_in_space_at_their_ends_are_one(make_job) -> None:
    rows = [{"prompt": "Q:", "replies": [" yes", "yes\n", " no"]}, {"prompt": "R:", "replies": [" yes", " yes "]}]
    checks = make_job().recipe.run.parent / "checks.jsonl"
    job = make_job(rows=rows, check={"path": str(checks)})
    checks.write_text(json.dumps({"prompt": "P:", "chosen": " right", "rejected": " right "}) + "\n")
    assert [one.replies for one in label.prepare(job)] == [[" yes", " no"]]


def test_people_below_a_bound_are_left_out() -> None:
    def of(name: str, agrees: float | None, right: int, asked: int) -> dict[str, Any]:
        return {"name": name, "agreement": agrees, "checks": {"right": right, "of": asked}}

    known = [of("ann", 0.9, 4, 4), of("bob", 0.4, 3, 4), of("cem", None, 0, 0), of("dan", 0.8, 1, 4)]
    out = agreement.left_out
    assert out({}, known) == set()
    assert out({"min_agreement": 0.8}, known) == {"bob"}
    assert out({"min_checks": 0.75}, known) == {"dan"}
    all_three = {"min_agreement": 0.5, "min_checks": 0.9, "leave_out": ["ann", "eve"]}
    assert out(all_three, known) == {"ann", "bob", "dan"}


def test_those_who_are_left_out_count_for_nothing(make_job) -> None:
    job = make_job(people={"leave_out": ["bob"]})
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "bob", ["first", "first", "first"])
    with pytest.raises(Waiting, match=r"^0 of 3 labels; those of bob do not count$"):
        label.run(job)
    choose(job, "ann", ["second", "tie", "tie"])
    metrics = label.run(job)
    assert [row["chosen"] for row in written(job)] == [" no"] and metrics["label/left_out"] == 1
    assert json.loads((job.artifact / "people.json").read_text())["left_out"] == ["bob"]


def test_where_nothing_is_better_the_stage_waits_for_more(make_job) -> None:
    job = make_job()
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "ann", ["tie", "bad", "tie"])
    with pytest.raises(Waiting, match=r"^3 of 3 labels; in no pair is one reply chosen more often than all else"):
        label.run(job)
    choose(job, "bob", [None, None, None, "second"])
    label.run(job)
    assert [row["chosen"] for row in written(job)] == [" no"]


def test_checks_measure_people_and_make_no_rows(make_job) -> None:
    checks = {"path": str(make_job().recipe.run.parent / "checks.jsonl")}
    job = make_job(check=checks, people={"min_checks": 0.5}, until={"labels": 2})
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "bob", ["second", None, None, None, "second"])
    with pytest.raises(Waiting, match=r"^0 of 2 labels; those of bob do not count$"):
        label.run(job)
    choose(job, "ann", ["first", None, None, None, "first"], how="check")
    metrics = label.run(job)
    assert [(row["prompt"], row["chosen"]) for row in written(job)] == [("Q0:", " yes")]
    assert metrics["label/checks"] == 0.5 and metrics["label/left_out"] == 1


@pytest.mark.parametrize("wanted", ["preferences", "demonstrations", "feedback", "prompts", "candidates"])
def test_its_rows_are_read_by_every_later_stage(make_job, wanted) -> None:
    job = make_job()
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "ann", ["first", "second", "first"], dimensions={"brief": "first"})
    label.run(job)
    rows = written(job)
    shape = recognise(rows, wanted)
    assert len([record for row in rows for record in shape.read(row)]) == 3 * (2 if wanted == "feedback" else 1)


def test_a_gate_may_be_on_any_number_that_it_has(make_job) -> None:
    job = make_job(check={"path": str(make_job().recipe.run.parent / "checks.jsonl")})
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "ann", ["first", "tie", "bad", "first", "first"])
    choose(job, "bob", ["first", "tie", "bad", "second", "first"])
    metrics = label.run(job)
    certain, all_of_them = (
        known_metrics(job.recipe, "f"),
        known_metrics(job.recipe, "f") | possible_metrics(job.recipe, "f"),
    )
    assert certain <= metrics.keys() <= all_of_them
    assert {number.metric for number in job.stage.facts.numbers} <= all_of_them


def test_replies_that_are_all_the_same_leave_nothing_to_choose(make_job) -> None:
    with pytest.raises(InputError, match="no row has two replies that differ") as error:
        label.prepare(make_job([{"prompt": "Q:", "replies": [" a", " a"]}]))
    assert error.value.place == "stages.f.data"


def test_a_prompt_that_comes_twice_with_the_same_replies_is_asked_about_once(make_job) -> None:
    assert len(label.prepare(make_job([*ROWS, *ROWS[:2]]))) == 4


def test_labels_of_what_is_not_asked_any_more_stay_and_make_no_rows(make_job) -> None:
    job = make_job()
    with pytest.raises(Waiting):
        label.run(job)
    choose(job, "ann", ["first", "first", "first"])
    (job.work / "items.jsonl").unlink()
    job = make_job([*ROWS[2:], {"prompt": "new:", "replies": [" a", " b"]}])
    with pytest.raises(Waiting, match=r"^1 of 3 labels$"):  # of the prompt that came again
        label.run(job)
    choose(job, "bob", [None, "second", "first"])
    label.run(job)
    assert [(row["prompt"], row["chosen"]) for row in written(job)] == [
        ("Q2:", " yes"), ("Q3:", " no"), ("new:", " a"),
    ]  # fmt: skip
    assert len(written(job, "choices.jsonl")) == 3
    with Labels(job.run / "labels.db") as labels:
        assert labels.count("f") == 5
