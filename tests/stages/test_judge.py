"""The stage that has a judge choose: what it writes, what it says of the judge, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

import rlhf_pipeline.models.tiny
from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.judges.bias import figures
from rlhf_pipeline.judges.verdicts import Verdict
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.gates import OF_JUDGE, known_metrics, possible_metrics
from rlhf_pipeline.run.explain import explain
from rlhf_pipeline.stages import judge
from rlhf_pipeline.stages.check import check_settings
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.user_code import FunctionError

CHECKPOINT = Path(rlhf_pipeline.models.tiny.__file__).parent / "checkpoint"
JUDGES = '''
def shorter(firsts, seconds):
    """Fair: it knows what it likes, in whatever order."""
    return ["A" if len(first) < len(second) else "B" for first, second in zip(firsts, seconds)]

def always_a(firsts):
    return ["A"] * len(firsts)

def leaning(firsts, seconds):
    """It likes short replies, and favours the one shown first, unless that is far longer."""
    longer = [len(first) - len(second) for first, second in zip(firsts, seconds)]
    return [0.9 if more < 0 else 0.7 if more < 15 else 0.2 for more in longer]

def mute(firsts):
    return [None] * len(firsts)

def broken(firsts):
    if len(firsts) > 8:
        raise ValueError("too many")
    return ["A"] * len(firsts)
'''
ROWS = [
    {"prompt": f"Q{i}:", "replies": [" a", " the second", " a", f" one of {i} longer replies"], "topic": i}
    for i in range(6)
]
PAIRS = [{"prompt": f"P{i}:", "chosen": " yes", "rejected": " no, not at all"} for i in range(4)]


@pytest.fixture
def make_job(tmp_path: Path):
    """A stage of kind judge with its data, and with judges that are functions."""
    (tmp_path / "judges_of_these_tests.py").write_text(JUDGES)
    (tmp_path / "rubric.yaml").write_text("- {name: brief, question: Which is shorter}")

    def make(model: str, rows: list[dict[str, Any]] = ROWS, human: bool = False, **stage: Any) -> Job:
        files = {"candidates": rows, "human": PAIRS}
        for name, of_file in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
        own = {"judge": {"model": model, "rubric": str(tmp_path / "rubric.yaml")}, "ties": "drop"}
        own |= {"human": {"path": str(tmp_path / "human.jsonl")}} if human else {}
        recipe = Recipe.model_validate(
            {
                "name": "run",
                "output_dir": str(tmp_path),
                "model": {"path": str(CHECKPOINT), "quantization": "none", "dtype": "float32"},
                "stages": {
                    "f": {"kind": "judge", "data": {"path": str(tmp_path / "candidates.jsonl")}, **own, **stage}
                },
            }
        )
        recipe._folders = [tmp_path]
        (recipe.run / "f" / "work").mkdir(parents=True, exist_ok=True)
        return Job(recipe, "f", recipe.run)

    return make


def written(job: Job, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.artifact / name).read_text().splitlines()]


def test_a_fair_judge_makes_a_row_of_each_pair_of_different_replies(make_job) -> None:
    job = make_job("judges_of_these_tests:shorter", human=True)
    metrics = judge.run(job)
    rows = written(job)
    assert len(rows) == metrics["rows"] == metrics["judge/pairs"] == 6 * 3
    assert rows[:3] == [
        {
            "prompt": "Q0:",
            "chosen": chosen,
            "rejected": rejected,
            "confidence": 1.0,
            "margin": 1.0,
            "dimensions": {"brief": 1.0},
        }
        for chosen, rejected in [
            (" a", " the second"),
            (" a", " one of 0 longer replies"),
            (" the second", " one of 0 longer replies"),
        ]
    ]
    assert metrics["judge/agreement"] == 1 and metrics["judge/first_position"] == 0.5
    assert metrics["judge/length_coefficient_high"] < 0
    assert metrics["judge/human_agreement"] == 1 == metrics["judge/human_kappa"]
    judgements = written(job, "judgements.jsonl")
    assert len(judgements) == 18 + 4 and [one.get("people") for one in judgements] == [None] * 18 + [0] * 4
    assert judgements[0]["winner"] == 0 and [asked["answer"] for asked in judgements[0]["asked"]] == ["A", "B"]
    assert judgements[-1]["prompt"] == "P3:" and judgements[-1]["replies"] == [" yes", " no, not at all"]


@pytest.mark.parametrize("wanted", ["preferences", "demonstrations", "feedback", "prompts", "candidates"])
@pytest.mark.parametrize("principles", [False, True])
def test_its_rows_are_read_by_every_later_stage(make_job, wanted, principles) -> None:
    spec = {"model": "judges_of_these_tests:shorter", "principles": "default"}
    job = make_job("judges_of_these_tests:shorter", rows=ROWS[:2], **({"judge": spec} if principles else {}))
    judge.run(job)
    rows = written(job)
    shape = recognise(rows, wanted)
    assert len([record for row in rows for record in shape.read(row)]) == 6 * (2 if wanted == "feedback" else 1)
    assert ("principle" in rows[0]) is principles


def test_a_conversation_with_tools_keeps_them() -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    prompt = [{"role": "user", "content": "Well?", "tools": tools}]
    row = judge.preference(judge.Compared(prompt, ("a", "bb"), {}), Verdict(0.1, False, {}, None, []), False)
    assert recognise([row], "preferences").read(row) == [(prompt, "bb", "a")]


def test_pairs_on_which_the_orders_disagree_are_dropped_or_kept(make_job) -> None:
    dropped = make_job("judges_of_these_tests:leaning")
    metrics = judge.run(dropped)
    assert metrics["judge/ties"] == pytest.approx(2 / 3) and metrics["judge/first_position_low"] > 0.5
    assert len(written(dropped)) == 6
    kept = make_job("judges_of_these_tests:leaning", ties="keep")
    kept.work.joinpath("made.jsonl").unlink()
    judge.run(kept)
    assert len(written(kept)) == 18 and all(len(row["chosen"]) < len(row["rejected"]) for row in written(kept))
    assert {round(row["confidence"], 6) for row in written(kept)} == {0.6, 0.85}


def test_a_judge_that_always_says_a_is_stopped_or_shows_in_its_figures(make_job) -> None:
    with pytest.raises(RunError, match=r"no pair has a winner: 100% are ties, 0% of .* and 100% of the others favour"):
        judge.run(make_job("judges_of_these_tests:always_a"))
    with pytest.raises(RunError, match="100% of the answers could not be read"):
        (job := make_job("judges_of_these_tests:mute")).work.joinpath("made.jsonl").unlink()
        judge.run(job)


def test_a_function_that_fails_in_the_middle_is_named_and_what_is_made_stays(make_job) -> None:
    job = make_job("judges_of_these_tests:broken")
    with pytest.raises(FunctionError, match="`judges_of_these_tests:broken` raised ValueError: too many") as caught:
        judge.run(job)
    message, _ = explain(caught.value, job.recipe, "f", job.folder)
    assert "too many" in message and "judges_of_these_tests.py:" in message


def test_a_stop_in_the_middle_changes_nothing(make_job, monkeypatch) -> None:
    whole = make_job("judges_of_these_tests:leaning", human=True)
    expected = judge.run(whole), written(whole), written(whole, "judgements.jsonl")
    monkeypatch.setattr(judge, "OF_FUNCTION", 10)
    halves = make_job("judges_of_these_tests:leaning", human=True)
    halves.work.joinpath("made.jsonl").unlink()
    monkeypatch.setattr(REQUEST, "noted", True)
    with pytest.raises(Stopped) as stopped:
        judge.run(halves)
    assert stopped.value.step == 5
    monkeypatch.setattr(REQUEST, "noted", False)
    assert (judge.run(halves), written(halves), written(halves, "judgements.jsonl")) == expected


def test_the_base_judges_and_its_own_replies_are_counted(make_job) -> None:
    rows = [row | {"sampled": {"policies": ["base", "other", "base", "other"]}} for row in ROWS]
    template = "{{ prompt }}{{ first }}\n{{ prompt }}{{ second }}\nA:"
    spec = {"model": "base", "template": template, "answers": ["It", "That"], "batch_size": 4}
    job = make_job("base", rows=rows, judge=spec, ties="keep")
    metrics = judge.run(job)
    assert metrics["judge/unread"] == 0 and 0 <= metrics["judge/own_replies"] <= 1
    assert all(list(row["dimensions"]) == ["overall"] for row in written(job))
    again = [row | {"sampled": {"policies": ["sft", "other", "sft", "other"]}} for row in ROWS]
    assert not any(one.own is not None for one in judge.prepare(make_job("base", rows=again, judge=spec)))


def test_at_most_so_many_pairs_of_each_prompt(make_job) -> None:
    job = make_job("judges_of_these_tests:shorter", pairs=2)
    assert judge.run(job)["judge/pairs"] == 12


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "replies": ["b"]}], "two replies or more, and has 1"),
        ([{"prompt": "a", "replies": ["b", "b"]}], "no row has two replies that differ"),
        ([{"prompt": "a", "completion": "b"}], "are not candidates; those need a prompt with `replies`"),
    ],
)
def test_rows_with_nothing_to_compare_are_refused(make_job, rows, said) -> None:
    with pytest.raises(InputError, match=said):
        judge.prepare(make_job("judges_of_these_tests:shorter", rows=rows))


@pytest.mark.parametrize(
    ("spec", "place", "said"),
    [
        ({"principles": "empty.txt"}, "principles", "holds no principle"),
        ({"rubric": "empty.txt"}, "rubric", "holds no dimension"),
        ({"template": "{{ first }}"}, "template", "does not use `second`"),
        ({"template": "{{ first }}{{ second }}", "answers": ["A", "antidisestablish"]}, "answers", "has no token"),
        ({"model": "judges_of_these_tests:nothing"}, "model", "has no function `nothing`"),
    ],
)
def test_a_judge_that_cannot_ask_is_found_before_its_rows_are_made(make_job, tmp_path, spec, place, said) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n")
    spec = {key: str(tmp_path / value) if value == "empty.txt" else value for key, value in spec.items()}
    job = make_job("base", judge={"model": "base"} | spec)
    (tmp_path / "candidates.jsonl").unlink()
    with pytest.raises(InputError, match=said) as caught:
        check_settings(job)
    assert caught.value.place == f"stages.f.judge.{place}"


def test_a_gate_may_name_every_figure(make_job) -> None:
    job = make_job("judges_of_these_tests:leaning", human=True, ties="keep")
    metrics = judge.run(job)
    known = known_metrics(job.recipe, "f") | possible_metrics(job.recipe, "f")
    assert set(metrics) <= known and set(figures([])) <= known
    assert {f"judge/{name}" for name in ("human_kappa_low", "own_replies", "length_coefficient_high")} <= OF_JUDGE
