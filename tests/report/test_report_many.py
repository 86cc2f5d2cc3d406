"""A page of more runs than there are colours: small, quick, and with every run in it."""

import html
import json
import random
import re
import time
from pathlib import Path

import pytest
import report_run

from rlhf_pipeline import report
from rlhf_pipeline.report import gather, many
from rlhf_pipeline.report.charts import SERIES


def sweep(folder: Path, count: int, *, steps: int = 20) -> list[Path]:
    """Runs that share all stages but ppo, in another order than that of their kl_coef."""
    runs = []
    for i in range(count):
        run = report_run.write(folder / f"run-{i}", steps=steps, name=f"run-{i}")
        beta = 0.01 * 1.1 ** ((7 * i) % count)
        change_weights(run, "ppo", f"ppo {i}".encode())
        record = json.loads((run / "ppo" / "stage.json").read_text())
        report_run.change(
            run, "ppo", metrics={"judge_mean": 0.5 + i / 1000}, inputs=record["inputs"] | {"trainer.kl_coef": beta}
        )
        runs.append(run)
    return runs


def change_weights(run: Path, stage: str, weights: bytes) -> None:
    (run / stage / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    report_run.change(run, stage, artifact_files={"adapter_model.safetensors": [len(weights), weights.hex()]})


def page(runs: list[Path], folder: Path) -> str:
    report.write(runs, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(part: str) -> str:
    return " ".join(html.unescape(re.sub("<style.*?</style>|<[^>]*>", " ", part, flags=re.DOTALL)).split())


def rows_of(text: str, label: str) -> list[list[str]]:
    """The cells of a table, in the order of its rows."""
    table = re.search(rf'aria-label="{label}">\s*<table.*?</table>', text, re.DOTALL)
    assert table is not None
    rows = re.findall("<tr>(.*?)</tr>", table[0], re.DOTALL)
    return [[text_of(cell) for cell in re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> list[Path]:
    return sweep(tmp_path_factory.mktemp("sweep"), 8)


def test_a_run_has_a_row_with_what_differs_in_the_order_of_the_setting(eight, tmp_path):
    head, *rows = rows_of(page(eight, tmp_path), "Runs")
    assert head[:3] == ["run", "state", "ppo: kl_coef"] and "ppo: judge" in head
    assert not any("sft" in name or "learning_rate" in name for name in head)
    assert sorted(row[0] for row in rows) == [f"run-{i}" for i in range(8)]
    values = [float(row[2]) for row in rows]
    assert values == sorted(values) and len(set(values)) == 8
    judged = head.index("ppo: judge")
    assert {row[0]: row[judged] for row in rows} == {f"run-{i}": f"{0.5 + i / 1000:.3g}" for i in range(8)}


def test_colours_go_from_the_least_to_the_greatest_and_the_page_says_so(eight, tmp_path):
    runs = gather.read_runs(eight)
    order = many.order(runs, many.settings(runs))
    assert (order.words, order.ends) == ("ppo: kl_coef", ("0.01", "0.0195"))
    assert [order.shades[run.label] for run in order.runs] == pytest.approx([i / 7 for i in range(8)])
    text = page(eight, tmp_path)
    assert "Colours follow ppo: kl_coef" in text_of(text)
    chart = next(one for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "<title>ppo: Score</title>" in one)
    strokes = re.findall(r"stroke:(#\w{6})", chart)
    assert len(strokes) == len(set(strokes)) == 8 and "var(--s" not in chart
    assert "<desc>8 lines, which begin between" in chart


def test_what_runs_share_is_drawn_once_and_in_full(eight, tmp_path):
    text = page(eight, tmp_path)
    summary = rows_of(text, "Summary of the stages")
    assert [row[:2] for row in summary[1:]] == [[name, "all 8 runs"] for name in ("sft", "reward", "dpo")]
    assert text.count("<title>reward: calibration</title>") == 1
    means = rows_of(text, "Means by policy")
    assert [row[:2] for row in means[1:]] == [[name, "all 8 runs"] for name in report_run.POLICIES]
    # Some share one SFT and the rest another.
    others = [Path(run) for run in sweep(tmp_path / "others", 8)]
    for run in others[:3]:
        change_weights(run, "sft", b"other")
    summary = rows_of(page(others, tmp_path), "Summary of the stages")
    assert [row[1] for row in summary if row[0] == "sft"] == ["run-0 and 2 more", "run-7 and 4 more"]


def test_up_to_as_many_runs_as_colours_the_page_is_the_overlaid_one(eight, tmp_path):
    text = page(eight[:SERIES], tmp_path)
    assert "Colours follow" not in text_of(text) and "What differs" in text_of(text)
    assert 'aria-label="Runs"' not in text
    assert 'aria-label="Runs"' in page(eight[: SERIES + 1], tmp_path)


def test_alarms_of_the_same_kind_are_one_and_runs_in_other_states_are_told(eight, tmp_path):
    runs = sweep(tmp_path / "runs", 8)
    for run in runs[2:5]:
        report_run.change(run, "ppo", state="failed", error="no memory", artifact=None)
    (tmp_path / "runs" / "empty").mkdir()
    text = text_of(page([*runs, tmp_path / "runs" / "empty"], tmp_path))
    assert "a failure in ppo (3)" in text and text.count("no memory") == 1
    assert "ppo, in 3 runs: " in text and "5 done, 3 failed, 1 unfinished" in text
    nothing = [tmp_path / f"nothing-{i}" for i in range(8)]
    for folder in nothing:
        folder.mkdir()
    assert "8 runs, overlaid" in text_of(page(nothing, tmp_path))


def test_without_a_number_among_the_settings_the_judge_orders_and_without_one_the_command():
    runs = []
    for i, value in enumerate(["b", "a", "c"]):
        record = gather.Record(
            name="ppo", kind="ppo", inputs={"trainer.optim": value}, metrics={"judge_mean": 1.0 - i / 10}
        )
        stage = gather.Stage("ppo", "ppo", "done", "", {}, record)
        runs.append(gather.Run(Path(f"run-{i}"), f"run-{i}", "done", {}, [stage], {}, []))
    differing = many.settings(runs)
    assert [(one.name, one.values) for one in differing] == [("ppo: optim", ["b", "a", "c"])]
    assert [run.label for run in many.order(runs, differing).runs] == ["run-2", "run-1", "run-0"]
    for run in runs:
        run.stages[0].record = gather.Record(name="ppo", kind="ppo")
    assert [run.label for run in many.order(runs, []).runs] == ["run-0", "run-1", "run-2"]


def test_where_all_stages_differ_the_numbers_that_matter_most_have_the_room(tmp_path):
    runs = sweep(tmp_path / "runs", 8)
    for i, run in enumerate(runs):
        for stage in ("sft", "reward", "ppo", "dpo"):
            change_weights(run, stage, f"{stage} {i}".encode())
            record = json.loads((run / stage / "stage.json").read_text())
            report_run.change(run, stage, inputs=record["inputs"] | {"seed": i})
    text = page(runs, tmp_path)
    head = rows_of(text, "Runs")[0]
    assert head[2:4] == ["ppo: kl_coef", "seed"] and len(head) == 4 + many.MOST_NUMBERS
    assert {"sft: judge", "reward: loss", "ppo: score", "ppo: judge", "dpo: judge"} <= {*head}
    assert "They share none." in text_of(text)


def test_seeds_give_the_order_only_where_nothing_else_differs():
    def run(i: int, **inputs: float) -> gather.Run:
        record = gather.Record(name="ppo", kind="ppo", inputs=inputs)
        return gather.Run(Path("x"), str(i), "done", {}, [gather.Stage("ppo", "ppo", "done", "", {}, record)], {}, [])

    runs = [run(i, seed=i, **{"trainer.beta": [0.2, 0.1][i % 2]}) for i in range(8)]
    assert many.order(runs, many.settings(runs)).words == "ppo: beta"
    runs = [run(i, seed=7 - i) for i in range(8)]
    assert [one.label for one in many.order(runs, many.settings(runs)).runs] == list("76543210")


@pytest.mark.slow
def test_sixty_runs_are_a_small_page_in_a_short_time(tmp_path):
    """A guard against an order of magnitude: benchmarks/README.md has the figures."""
    runs = sweep(tmp_path / "runs", 60, steps=300)
    random.Random(0).shuffle(runs)
    began = time.perf_counter()
    text = page(runs, tmp_path)
    assert time.perf_counter() - began < 20
    assert len(text.encode()) < 5e6
    head, *rows = rows_of(text, "Runs")
    assert {row[0] for row in rows} == {f"run-{i}" for i in range(60)} and "ppo: kl_coef" in head
