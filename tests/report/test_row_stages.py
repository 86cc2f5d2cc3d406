"""Stages that make rows in the report: their numbers, their rows, their pictures, and the alarms about a judge."""

import html
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import report_run

from rlhf_pipeline.report import alarms, charts, gather, page
from rlhf_pipeline.rundir.words import short

HOSTILE = report_run.HOSTILE


def add(run: Path, name: str, kind: str, rows: list[dict[str, Any]], metrics: dict[str, Any], **inputs: Any) -> None:
    """Add a stage that is done to a run."""
    (run / name).mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / name / "rows.jsonl").write_text(text)
    record = {
        "name": name, "kind": kind, "state": "done", "artifact": f"{name}/rows.jsonl", "metrics": metrics,
        "inputs": inputs, "init": "sft" if kind == "sample" else None, "started_at": "2030-01-01",
        "others": {"rows": "candidates", "judge": "sft"} if kind == "judge" else {},
    }  # fmt: skip
    (run / name / "stage.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = report_run.write(tmp_path / "run")
    draw = random.Random(0)
    rows = [
        {"prompt": f"question {i}", "replies": ["one", HOSTILE], "scores": [draw.gauss(0, 1), draw.gauss(0, 1)],
         "sampled": {"policies": ["sft", "dpo"]}}
        for i in range(40)
    ]  # fmt: skip
    add(run, "candidates", "sample", rows, {"rows": 40, "reply/length": 7.5, "reply/ended": 1.0}, n=2)
    pairs = [
        {"prompt": [{"role": "user", "content": "hello"}], "chosen": "the better one", "rejected": "the worse one",
         "confidence": 0.875, "dimensions": {"honesty": 0.75}, "principle": "Be kind."}
    ]  # fmt: skip
    add(run, "feedback", "judge", pairs, fair(0.52))
    return run


def fair(first: float, **others: float) -> dict[str, float]:
    shares = {"judge/first_position": first, "judge/agreement": 0.9, **others}
    found = {"judge/pairs": 100.0, "judge/unread": 0.0, **shares}
    for name, share in shares.items():
        found |= {f"{name}_low": share - 0.05, f"{name}_high": share + 0.05}
    return found


def section(text: str, name: str) -> str:
    """The part of a page about one stage."""
    found = re.search(rf"<h2 id=\"stage-\d+\"><bdi>{name}</bdi>.*?</section>", text, re.DOTALL)
    assert found
    return found[0]


def test_rows_numbers_and_pictures_are_shown(run: Path) -> None:
    text = page.render(gather.read_runs([run]))
    sampled, judged = section(text, "candidates"), section(text, "feedback")
    assert '<code>reply/length</code></th><td class="n">7.5</td>' in sampled
    assert "reply 2, of dpo" in sampled and "Scores of the replies" in sampled and "question 0" in sampled
    assert "question 12" not in sampled  # of many rows, the first ones
    assert all(words in judged for words in ("the better one", "the worse one", "hello", "Be kind.", "0.875", "0.75"))
    assert "The judge&#39;s bias" in judged and "the first reply wins" in html.unescape(judged)
    assert "metrics.jsonl has no rows" not in sampled + judged
    assert "no numbers have been logged" not in sampled + judged
    assert "<script>document.title" not in text


def test_the_scores_are_of_all_replies_and_of_the_best_of_each_prompt(run: Path) -> None:
    stage = gather.read_run(run).stage("candidates")
    scores = [row["scores"] for row in stage.rows]
    everything = sum(map(sum, scores)) / 80
    best = sum(map(max, scores)) / 40
    sampled = section(page.render(gather.read_runs([run])), "candidates")
    assert f"mean {short(everything)}" in sampled and f"mean {short(best)}" in sampled


def test_a_fair_judge_raises_no_alarm(run: Path) -> None:
    assert [one for one in alarms.read(run) if one.where in ("candidates", "feedback")] == []


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (fair(1.0), ("bad", "position bias", "The reply shown first wins 100%")),
        (fair(0.3), ("look", "position bias", "The reply shown second wins 70%")),
        (fair(0.5) | {"judge/unread": 0.4}, ("bad", "answers that cannot be read", "40% of the judge's answers")),
        (fair(0.5, **{"judge/own_replies": 0.8}), ("look", "self-preference", "its own stage")),
        ({"reply/ended": 0.5}, ("look", "cut replies", "Only 50% of the replies end")),
        ({"reply/unique": 0.05}, ("look", "replies that are all alike", "Only 5%")),
    ],
)
def test_what_is_doubtful_about_rows_is_an_alarm(run: Path, metrics: Any, expected: tuple[str, str, str]) -> None:
    file = run / "feedback" / "stage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": metrics}))
    (found,) = [one for one in alarms.read(run) if one.where == "feedback"]
    assert (found.level, found.what) == expected[:2] and expected[2] in found.text


def test_two_runs_with_rows_are_overlaid(run: Path, tmp_path: Path) -> None:
    other = report_run.write(tmp_path / "other")
    add(other, "candidates", "sample", [{"prompt": "a", "replies": ["b", "c"], "scores": [0, 1]}], {"rows": 1}, n=2)
    text = section(page.render(gather.read_runs([run, other])), "candidates")
    assert "made-up (1): all replies" in text and "made-up (2): all replies" in text


def test_the_lineage_says_who_judged_which_rows(run: Path) -> None:
    text = html.unescape(page.render(gather.read_runs([run])))
    assert "candidates from sft (weights)" in text
    assert "feedback from candidates (rows)" in text and "feedback from sft (judge)" in text
    assert "feedback from base" not in text


def test_a_line_goes_over_the_nodes_that_it_does_not_lead_to() -> None:
    nodes = [(name, "x", "done") for name in "abc"]
    near, far = [("a", "b", "weights"), ("b", "c", "rows")], ("a", "c", "reference")
    plain, arched = charts.lineage("x", nodes, near), charts.lineage("x", nodes, [*near, far])
    assert "H" not in "".join(re.findall(r'class="edge [^>]*d="([^"]*)"', plain))
    (line,) = re.findall(r'class="edge reference" d="M[\d.]+ ([\d.]+)C\S+ ([\d.]+) [^"]*H', arched)
    top = min(float(y) for y in re.findall(r'<rect x="\d+" y="(\d+)"', arched))
    assert float(line[1]) < top < float(line[0])


def of_person(name: str, **known: Any) -> dict[str, Any]:
    nothing = {"right": 0, "of": 0}, {"same": 0, "of": 0}
    none = {"labels": 3, "seconds_median": None, "checks": nothing[0], "agreement": None, "consistency": nothing[1]}
    return {"name": name} | none | known


def test_people_are_shown_with_what_is_known_of_them(run: Path) -> None:
    add(run, "chosen", "label", [{"prompt": "q", "chosen": "a", "rejected": "b"}], {"rows": 1, "label/alpha": 0.5})
    ann = of_person(
        "<b>ann</b>", labels=41, seconds_median=4.25, checks={"right": 3, "of": 4}, agreement=0.875,
        consistency={"same": 5, "of": 6},
    )  # fmt: skip
    (run / "chosen" / "people.json").write_text(
        json.dumps({"people": [ann, of_person("bob"), of_person("eve")], "left_out": ["eve"]})
    )
    text = page.render(gather.read_runs([run]))
    own = section(text, "chosen")
    rows = re.findall(r'<tr><th scope="row"><bdi>(.*?)</bdi></th>(.*?)</tr>', own)
    cells = {html.unescape(name): re.findall(r'<td class="n">(.*?)</td>', line) for name, line in rows}
    nothing = ["3", "", "", "", ""]
    assert cells == {
        "<b>ann</b>": ["41", "4.25", "3 of 4", "88%", "5 of 6"],
        "bob": nothing,
        "eve (labels do not count)": nothing,
    }
    assert "People (3)" not in section(text, "feedback")


@pytest.mark.parametrize(
    "content", ["[]", '{"people": 3}', '{"people": [3, {"name": [], "checks": "x"}], "left_out": 3}', "{"]
)
def test_odd_people_do_not_keep_the_report_from_being_written(run: Path, content: str) -> None:
    add(run, "chosen", "label", [{"prompt": "q", "chosen": "a", "rejected": "b"}], {"rows": 1})
    (run / "chosen" / "people.json").write_text(content)
    assert 'aria-label="People"' not in section(page.render(gather.read_runs([run])), "feedback")
