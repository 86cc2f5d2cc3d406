"""An AI judge beside the function: each policy against the one that it starts from, and all of them in `compare`."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, Chat, Response, says, serving

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.comparison import measure, wanted
from rlhf_pipeline.errors import RunError
from rlhf_pipeline.judges.bias import Judged
from rlhf_pipeline.judges.verdicts import Verdict
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.gates import known_metrics
from rlhf_pipeline.recipe.schema import AIJudge
from rlhf_pipeline.rundir import jsonl, layout
from rlhf_pipeline.shares import interval
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.win_rates import against_start, is_legible, rate


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the short run, whose stages may be judged again."""
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / tiny_run.name))


@pytest.fixture
def recipe(run: Path) -> Recipe:
    found = recipes.of_run(run)
    found.output_dir = str(run.parent)
    return found


def replies_in(request: dict[str, Any]) -> tuple[str, str]:
    """The two replies in a question."""
    text = request["messages"][0]["content"]
    first, second = text.split("Reply A:\n")[1].split("\n\nReply B:\n")
    return first, second.split("\n\nWhich")[0]


def longer_is_better(request: dict[str, Any]) -> Response:
    first, second = replies_in(request)
    return says("A" if len(first) > len(second) else "B")


def use(recipe: Recipe, chat: Chat) -> Recipe:
    assert recipe.evaluate is not None
    recipe.evaluate.ai_judge = AIJudge(model=chat.address, served_model=MODEL, principles="default", retries=0)
    return recipe


def points(ours: list[str], theirs: list[str]) -> list[float]:
    """What a judge that likes the longer reply gives ours; where both are as long, it says B in both orders."""
    return [
        (math.copysign(1, len(a) - len(b)) + 1) / 2 if len(a) != len(b) else 0.5
        for a, b in zip(ours, theirs, strict=True)
    ]


def test_a_policy_is_compared_with_what_it_starts_from(run: Path, recipe: Recipe) -> None:
    with serving(longer_is_better) as chat:
        found = against_start(Job(use(recipe, chat), "dpo", run))
    ours, theirs = (
        [row["completion"] for row in jsonl.rows(run / stage / layout.SAMPLES) if "judge" in row]
        for stage in ("dpo", "sft")
    )
    rows = jsonl.rows(run / "dpo" / layout.JUDGEMENTS)
    assert [row["replies"] for row in rows] == [list(both) for both in zip(ours, theirs, strict=True)]
    expected = points(ours, theirs)
    assert 0 < sum(expected) < len(expected) and any(a != b for a, b in zip(ours, theirs, strict=True))
    assert found["win_rate"] == pytest.approx(sum(expected) / len(expected))
    assert (found["win_rate_low"], found["win_rate_high"]) == interval(sum(expected), len(expected))
    assert found["win_rate_ties"] == sum(point == 0.5 for point in expected) / len(expected)
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert found["judge/pairs"] == differ and len(chat.asked) == 2 * differ, "of two that are the same nobody is asked"
    assert found["judge/unread"] == 0
    assert known_metrics(recipe, "dpo") >= {name for name in found if name.startswith("win_rate")}


def test_a_judge_that_always_names_the_first_decides_nothing_and_its_figures_show_it(run: Path, recipe: Recipe) -> None:
    with serving(lambda _: says("A")) as chat:
        found = against_start(Job(use(recipe, chat), "dpo", run))
    assert (found["win_rate"], found["win_rate_ties"]) == (0.5, 1.0)
    assert (found["judge/first_position"], found["judge/agreement"]) == (1.0, 0.0)


def test_a_judge_that_cannot_be_read_is_an_error_and_not_a_win_rate(run: Path, recipe: Recipe) -> None:
    for row in (rows := jsonl.rows(run / "dpo" / layout.SAMPLES)):
        row["completion"] = row["completion"] + "!"  # no two replies are the same
    jsonl.rewrite(run / "dpo" / layout.SAMPLES, lambda row: False, rows)
    with serving(lambda _: says("I like both")) as chat, pytest.raises(RunError, match="none of the answers"):
        against_start(Job(use(recipe, chat), "dpo", run))


def test_a_stage_judges_on_the_base_that_samples_and_its_own_replies_are_counted(run: Path, recipe: Recipe) -> None:
    assert recipe.evaluate is not None
    template = "{{ question }} {{ first }} {{ second }}"
    recipe.evaluate.ai_judge = AIJudge(model="sft", principles="default", template=template, min_probability=0.0)
    found = against_start(Job(recipe, "dpo", run))
    rows = jsonl.rows(run / "dpo" / layout.JUDGEMENTS)
    asked = [answer for row in rows for answer in row["asked"]]
    assert len(asked) == 2 * found["judge/pairs"] > 0 and found["judge/unread"] == 0
    assert len({answer["probability"] for answer in asked}) > 2
    decided = [row["winner"] for row in rows if row["winner"] is not None]
    assert decided and found["judge/own_replies"] == sum(decided) / len(decided), "sft sampled the second ones"


def test_a_stage_that_comes_before_its_judge_has_none(recipe: Recipe) -> None:
    assert recipe.evaluate is not None
    recipe.evaluate.ai_judge = AIJudge(model="ppo")
    judged = [name for name in recipe.stages if recipe.ai_judge_of(name)]
    assert judged == ["dpo"]
    assert "win_rate" not in known_metrics(recipe, "sft")


def test_another_judge_has_policies_judged_again_and_nothing_trained_again(run: Path) -> None:
    def planned(**of_judge: object) -> dict[str, plan.StagePlan]:
        overrides = [f"evaluate.ai_judge.{key}={value}" for key, value in of_judge.items()]
        loaded = recipes.load(str(run), [f"output_dir={run.parent}", *overrides])
        return {stage.name: stage for stage in plan.make(loaded)}

    before = planned()
    assert {stage.state for stage in before.values()} == {"done"}
    one = {"model": "http://127.0.0.1:9", "served_model": "one"}
    judged = planned(**one)
    assert {name: stage.fingerprint for name, stage in judged.items()} == {
        name: stage.fingerprint for name, stage in before.items()
    }
    again = {name: stage.reason for name, stage in judged.items() if stage.state == "done, to be judged again"}
    assert list(again) == ["sft", "ppo", "dpo"]
    assert "evaluate.ai_judge.model default → http://127.0.0.1:9" in again["dpo"]
    assert planned(**one, concurrency=1, timeout=1.0, retries=0)["dpo"].judging == judged["dpo"].judging
    assert planned(**one | {"served_model": "two"})["dpo"].judging != judged["dpo"].judging


def compare(run: Path, recipe: Recipe, **changes: Any) -> dict[str, Any]:
    settings = wanted.default_settings(recipe) | changes
    asked, spec = measure.default_prompts(recipe, settings["n"])
    return measure.compare(recipe, run, asked, spec, settings)


def test_all_policies_are_compared_by_the_ai_beside_the_function_and_the_reward(run: Path, recipe: Recipe) -> None:
    without = wanted.default_settings(recipe)
    with serving(longer_is_better) as chat:
        found = compare(run, use(recipe, chat))
        asked = len(chat.asked)
        assert compare(run, recipe)["win_rates"] == found["win_rates"]
        assert len(chat.asked) == asked, "the answers are kept in the run directory"
    assert wanted.default_settings(recipe)["digest"] != without["digest"], "the one that is there has no AI judge"
    assert found["ai_judge"] == f"{MODEL} at {chat.address}" and found["notes"] == []
    texts = {name: [row["replies"][name]["text"] for row in found["rows"]] for name in found["policies"]}
    rates = {(one["a"], one["b"]): one for one in found["win_rates"] if one["by"] == "ai_judge"}
    assert set(rates) == {(b, a) for a, b in itertools.combinations(found["policies"], 2)}
    for (a, b), one in rates.items():
        expected = points(texts[a], texts[b])
        assert one["win_rate"] == pytest.approx(sum(expected) / len(expected))
        assert one["ties"] == sum(point == 0.5 for point in expected) / len(expected)
    assert len({one["win_rate"] for one in rates.values()}) > 1
    assert found["ai_judge_figures"]["judge/unread"] == 0


def test_a_comparison_goes_without_an_ai_that_does_not_answer(run: Path, recipe: Recipe) -> None:
    def fails(_: dict[str, Any]) -> Response:
        return Response("<html>", 500)

    with serving(fails) as chat:
        found = compare(run, use(recipe, chat), n=8)  # so many that some replies differ, and it is asked
    assert found["ai_judge"] is None
    assert len(found["notes"]) == 1 and "500 Internal Server Error" in found["notes"][0]
    assert {one["by"] for one in found["win_rates"]} == {"reward", "judge"}


@pytest.mark.parametrize(
    ("probabilities", "times", "expected"),
    [
        ([0.9, 0.1, 0.6, 0.7], 1, (0.75, 0.0)),
        ([0.9, None, 0.5, 0.1], 1, (0.5, 1 / 3)),
        ([0.9, 0.9, 0.9, 0.1], 2, (0.75, 0.0)),
        ([None, 0.9, None, 0.1], 2, (0.5, 0.0)),
    ],
)
def test_the_rate_and_its_interval(
    probabilities: list[float | None], times: int, expected: tuple[float, float]
) -> None:
    found = rate([Verdict(p, p == 0.5, {}, None, []) for p in probabilities], times)
    assert found is not None and (found["win_rate"], found["ties"]) == pytest.approx(expected)
    prompts = len({i % (len(probabilities) // times) for i, p in enumerate(probabilities) if p is not None})
    assert (found["low"], found["high"]) == interval(expected[0] * prompts, prompts)


def test_of_nothing_legible_there_is_no_rate() -> None:
    assert rate([Verdict(None, False, {}, None, [])] * 3) is None


def test_a_judge_that_cannot_be_read_has_no_rate_though_some_replies_are_the_same() -> None:
    unread = Judged(("a", "b"), Verdict(None, False, {}, None, []))
    same = Judged(("a", "a"), Verdict(0.5, True, {}, None, []))
    read = Judged(("a", "b"), Verdict(0.9, False, {}, None, []))
    assert not is_legible([unread, same])
    assert is_legible([same]) and is_legible([unread, read])
