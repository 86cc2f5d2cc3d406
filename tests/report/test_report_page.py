"""report.html: what is read of a run directory, what is counted, and what the page says of it."""

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report_run

from rlhf_pipeline import cli, report, shares
from rlhf_pipeline.recipe import gates
from rlhf_pipeline.recipe.yaml import dump, parse_document
from rlhf_pipeline.report import alarms, charts, figures, gather, measures
from rlhf_pipeline.report.gather import Series
from rlhf_pipeline.rundir import layout
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.words import short

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """The elements and the visible text of a page; what is opened has to be closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.html = file.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def page_of(*runs: Path, to: Path) -> Page:
    report.write(list(runs), to)
    return Page(to)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    return report_run.write(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def written(made_up, tmp_path_factory) -> Path:
    """Its page, and nothing else in the folder."""
    file = tmp_path_factory.mktemp("written") / "report.html"
    before = digests(made_up)
    report.write([made_up], file)
    assert digests(made_up) == before  # reading changes nothing
    return file


@pytest.fixture
def run(made_up, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made_up, tmp_path / "run")


@pytest.fixture
def small(run) -> Path:
    """A copy of which little is left to draw: the run was interrupted while its last stage was PPO."""
    for stage in ("sft", "reward", "dpo"):
        shutil.rmtree(run / stage)
    (run / "comparison.json").unlink()
    rows = [{"step": i, "objective/kl": value} for i, value in enumerate((0.0, 1.0, 4.0, 2.0), start=1)]
    report_run.write_lines(run / "ppo" / "metrics.jsonl", rows)
    return run


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def alarms_of(run: Path) -> str:
    return "\n".join(f"{one.level} {one.where} {one.text}" for one in alarms.alarms(gather.read_run(run)))


# The page of a real run


def test_the_page_of_a_real_run(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    start = time.process_time()
    page = page_of(run, to=run / layout.REPORT)
    assert time.process_time() - start < 2
    assert (run / layout.REPORT).stat().st_size < 1.5e6
    said = page.text
    for stage in ("sft", "reward", "ppo", "dpo"):
        record = json.loads((run / stage / "stage.json").read_text())
        digest = record["inputs"]["data"].rpartition("@")[2]
        assert digest in said
        assert record["versions"]["trl"] in said
        if "judge_mean" in record["metrics"]:
            assert short(record["metrics"]["judge_mean"]) in said
    assert "4 of 4 stages done" in said
    assert {"Reward and KL", "Calibration", "Accuracy by length", "Explained variance"} <= {
        one.strip() for one in page.texts
    }
    prompt = json.loads((run / "sft" / "samples.jsonl").read_text().splitlines()[-1])["prompt"]
    assert re.sub(r"\s+", " ", prompt) in said


def test_one_file_and_nothing_else(written):
    page = Page(written)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not page.names() & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("href", "src", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)
    assert [file.name for file in written.parent.iterdir()] == ["report.html"]


def test_ids_are_unique_links_lead_somewhere_and_headings_are_in_order(written):
    page = Page(written)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 8
    assert {attrs["href"][1:] for _, attrs in page.tags if "href" in attrs} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(levels))


def test_every_picture_has_a_name_and_says_what_it_shows(written):
    html = Page(written).html
    pictures = re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)
    assert len(pictures) > 25
    for picture in pictures:
        assert 'role="img"' in picture
        assert re.search(r"<title>[^<]+</title><desc>[^<]+\d[^<]*</desc>", picture)


def test_the_same_run_gives_the_same_page(made_up, written, tmp_path):
    report.write([made_up], tmp_path / "again.html")
    made_at = re.compile(r"Made \S+ \S+ UTC")
    first, again = (made_at.subn("", file.read_text()) for file in (written, tmp_path / "again.html"))
    assert first == again and first[1] == 1


@pytest.mark.slow
def test_no_torch():
    code = (
        "import sys; from rlhf_pipeline import report;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# Numbers


def test_calibration_is_that_of_the_pairs(made_up):
    """Counted again, one pair after the other."""
    rows = [json.loads(line) for line in (made_up / "reward" / "pairs.jsonl").read_text().splitlines()]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        margin = row["chosen"] - row["rejected"]
        predicted = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(int((predicted - 0.5) / 0.1 + 1e-12), 4), []).append((predicted, margin > 0))
    pairs = gather.read_run(made_up).stage("reward").pairs
    found = measures.calibration(pairs)
    assert [one.count for one in found] == [len(bins[i]) for i in sorted(bins)]
    for one, i in zip(found, sorted(bins), strict=True):
        assert one.x == pytest.approx(sum(predicted for predicted, _ in bins[i]) / len(bins[i]))
        assert one.share == pytest.approx(sum(right for _, right in bins[i]) / len(bins[i]))
        assert one.low < one.share < one.high


def test_accuracy_by_length_is_that_of_the_pairs(made_up):
    rows = [json.loads(line) for line in (made_up / "reward" / "pairs.jsonl").read_text().splitlines()]
    longer = [row["chosen"] > row["rejected"] for row in rows if row["chosen_length"] > row["rejected_length"]]
    pairs = gather.read_run(made_up).stage("reward").pairs
    found = measures.by_length(pairs)
    assert found["longer"].count == len(longer) and found["longer"].share == pytest.approx(sum(longer) / len(longer))
    assert sum(one.count for one in found.values()) == len(rows)
    bins = measures.accuracy_by(pairs.chosen_length - pairs.rejected_length, measures.right(pairs))
    assert sum(one.count for one in bins) == len(rows)
    assert [one.x for one in bins] == sorted(one.x for one in bins)
    assert sum(one.share * one.count for one in bins) == pytest.approx(
        sum(row["chosen"] > row["rejected"] for row in rows)
    )


def test_an_ensemble_is_shown_by_the_pairs_on_which_its_members_disagree(tmp_path):
    """Where they do, it is wrong here; a reward model alone has no such picture."""
    folder = report_run.write(tmp_path / "run")
    file = folder / "reward" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    titles = [picture.title for picture in figures.of_stage([gather.read_run(folder)], "reward")]
    assert "Accuracy by disagreement" not in titles and "Accuracy by length" in titles
    for row in rows:
        row["margin_std"] = 0.5 if row["chosen"] > row["rejected"] else 2.0
    report_run.write_lines(file, rows)
    run = gather.read_run(folder)
    pairs = run.stage("reward").pairs
    assert pairs.margin_std.tolist() == [row["margin_std"] for row in rows]
    pictures = {picture.title: picture for picture in figures.of_stage([run], "reward")}
    assert "standard deviation of the members" in pictures["Accuracy by disagreement"].svg
    bins = measures.accuracy_by(pairs.margin_std, measures.right(pairs))
    assert [(one.x, one.share) for one in bins] == [(0.5, 1.0), (2.0, 0.0)]


def test_equal_values_are_in_one_bin_and_ties_are_half_right():
    values, correct = np.array([0.0] * 100 + [1.0] * 100), np.array([1.0, 0.0] * 100)
    assert [(one.x, one.count) for one in measures.accuracy_by(values, correct)] == [(0.0, 100), (1.0, 100)]
    same = gather.Pairs(np.ones(3), np.array([1.0, 0.0, 2.0]), np.empty(0), np.empty(0))
    assert measures.right(same).tolist() == [0.5, 1.0, 0.0]


def test_the_interval_of_a_share_covers_it_as_often_as_it_says():
    """Exactly, for whatever share: at 20 draws of 0.9 the plain one covers it in 88 %."""
    low_high = [shares.interval(k, 20) for k in range(21)]
    for share in np.linspace(0.01, 0.99, 197):
        chances = [math.comb(20, k) * share**k * (1 - share) ** (20 - k) for k in range(21)]
        covered = sum(chance for chance, (low, high) in zip(chances, low_high, strict=True) if low <= share <= high)
        assert covered > 0.95
    # Newcombe's own examples, table I of his paper.
    examples = {
        (81, 263): (0.2535, 0.3682),
        (15, 148): (0.0598, 0.1644),
        (0, 20): (0, 0.2005),
        (1, 29): (0.0018, 0.1963),
    }
    for (successes, count), expected in examples.items():
        assert shares.interval(successes, count) == pytest.approx(expected, abs=6e-5)
    assert shares.interval(20, 20)[1] == 1.0 and shares.interval(0, 20)[0] == 0.0


def test_the_error_of_a_share_is_never_nothing():
    """Else three of three pairs would pass any gate with a margin beyond the noise."""
    assert shares.standard_error(15, 20) == pytest.approx(math.sqrt(0.75 * 0.25 / 20))
    for successes in (0, 3):
        assert shares.standard_error(successes, 3) == pytest.approx(math.sqrt(2 / 7 * 5 / 7 / 7))
    accuracy = {"eval_accuracy": 1.0, "eval_accuracy_se": shares.standard_error(3, 3)}
    assert not gates.outcomes({"eval_accuracy": ">= 0.9 + 2 se"}, accuracy)["eval_accuracy"]["passed"]


def test_thinning_keeps_every_extreme_and_both_ends():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 54_321]] = [50.0, -50.0]
    series = Series(np.arange(100_000.0), values)
    thin = charts.thinned(series)
    assert len(thin) <= charts.DRAWN + 2
    assert (thin.values.max(), thin.values.min()) == (50.0, -50.0)
    assert (thin.steps[0], thin.steps[-1]) == (0.0, 99_999.0)
    assert np.all(np.diff(thin.steps) > 0)
    assert np.array_equal(values[thin.steps.astype(int)], thin.values)
    few = Series(np.arange(10.0), values[:10])
    assert charts.thinned(few) is few


def test_the_strong_line_is_the_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=1000)
    smooth = charts.smoothed(Series(np.arange(1000.0), values))
    for step, mean in zip(smooth.steps.astype(int), smooth.values, strict=True):
        assert mean == pytest.approx(values[max(0, step - 25) : step + 26].mean())
    assert charts.smoothed(Series(np.arange(10.0), values[:10])) is None


@pytest.mark.slow
def test_a_long_run_is_drawn_in_time(small, tmp_path):
    rows = report_run.metrics("ppo", 50_000)
    rows[31_234]["objective/kl"] = 987.5
    report_run.write_lines(small / "ppo" / "metrics.jsonl", rows)
    start = time.process_time()
    page = page_of(small, to=tmp_path / "report.html")
    assert time.process_time() - start < 5
    assert len(page.html) < 1.5e6
    kl = re.search(r"<title>ppo: KL from the reference</title><desc>([^<]*)</desc>", page.html)
    assert "50,000" in kl[1] and "988" in kl[1]


def test_the_points_of_a_curve_are_the_logged_ones(small, tmp_path):
    """The line of KL, read back from the picture: its heights are in proportion to the file's numbers."""
    html = page_of(small, to=tmp_path / "report.html").html
    picture = re.search(r"<title>ppo: KL from the reference.*?</svg>", html, re.DOTALL)[0]
    drawn = [
        np.array([pair.split() for pair in re.split("[ML]", path) if pair.strip()], dtype=float)
        for path, style in re.findall(r'<path d="([ML\d. -]+)" style="([^"]*)"', picture)
        if "var(--s0)" in style
    ]
    (line,) = [points for points in drawn if len(points) == 4]
    heights = (line[0, 1] - line[:, 1]) / (line[0, 1] - line[2, 1])
    assert heights == pytest.approx([0, 0.25, 1, 0.5], abs=0.01)
    assert np.diff(line[:, 0]) == pytest.approx(line[1, 0] - line[0, 0], abs=0.2)


def test_the_numbers_at_the_axes_are_where_the_data_have_them(small, tmp_path):
    """Heights of the level lines' numbers and places of the steps, by those of the line of KL: 0, 1, 4, 2."""
    html = page_of(small, to=tmp_path / "report.html").html
    picture = re.search(r"<title>ppo: KL from the reference.*?</svg>", html, re.DOTALL)[0]
    (line,) = [path.split("L") for path in re.findall(r'd="M([\d. L]+)" style="[^"]*stroke:', picture)]
    (first_x, zero), (third_x, four) = ([float(part) for part in line[i].split()] for i in (0, 2))
    shown = re.findall(r'<text class="(end|middle)" x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', picture)
    heights = {float(number): float(y) - 3.5 for look, _, y, number in shown if look == "end"}
    places = {float(number): float(x) for look, x, _, number in shown if look == "middle"}
    assert {0.0, 1.0, 2.0, 3.0, 4.0} == set(heights) and {1.0, 2.0, 3.0, 4.0} == set(places)
    for number, y in heights.items():
        assert y == pytest.approx(zero + (four - zero) * number / 4, abs=0.2)
    for step, x in places.items():
        assert x == pytest.approx(first_x + (third_x - first_x) * (step - 1) / 2, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "whole", "wanted"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.3, 2.6, False, [0, 1, 2]), (3, 4, True, [3, 4]),
        (0.95, 2.05, True, [1, 2]), (0.7011, 0.7012, False, [0.7011, 0.70112, 0.70114, 0.70116, 0.70118, 0.7012]),
        (-1e99, 1e99, False, [-1e99, -5e98, 0, 5e98, 1e99]),
        (1, 50_000, True, [10_000, 20_000, 30_000, 40_000, 50_000]),
    ],
)  # fmt: skip
def test_numbers_at_an_axis_are_round(low, high, whole, wanted):
    assert charts.ticks(low, high, 5, whole) == pytest.approx(wanted)


# Alarms


def test_a_sound_run_has_no_alarms(run):
    report_run.write_lines(
        run / "reward" / "pairs.jsonl",
        [{"chosen": 1.0, "rejected": 0.0, "chosen_length": 5, "rejected_length": 5}] * 60,
    )
    assert alarms_of(run) == ""


@pytest.mark.parametrize(
    ("stage", "record", "rows", "said"),
    [
        ("dpo", {"state": "failed", "artifact": None, "error": "no memory"}, [], "bad dpo Failed: no memory"),
        ("dpo", {"state": "running", "artifact": None}, [], "bad dpo Failed: the run ended before the stage did"),
        ("dpo", {"state": "failed", "artifact": None, "stopped": True}, [], "look dpo Stopped before its first"),
        ("sft", {"gates": {"loss": {"bound": "<= 0.1", "passed": False}}}, [], "bad sft A gate is closed: loss"),
        ("sft", {"gates_ignored": {"loss": "<= 0.1"}}, [], "look sft A closed gate was ignored: loss"),
        ("ppo", {"built_on": {"sft": "other"}}, [], "look ppo Stale: sft ran again"),
        ("ppo", {"versions": {"trl": "2"}}, [], "look the run Stages were made with different versions"),
        ("ppo", {"inputs": {"trainer.kl_budget": 2.5}}, [], "bad ppo KL is over its budget of 2.5: it reached 3"),
        ("ppo", {}, [{"reply/ended": 0.2}] * 5, "bad ppo Only 20% of the replies end"),
        ("ppo", {}, [{"reply/unique": 0.1}] * 5, "bad ppo Diversity collapsed: distinct replies fell from 95% to 10%"),
        ("ppo", {}, [{"policy/clipfrac_avg": 0.6}] * 5, "look ppo 60% of the policy's updates are clipped"),
        ("ppo", {}, [{"gold/judge_mean": 0.3, "gold/score_mean": 9.0}], "bad ppo Reward hacking: since step 60"),
        ("sft", {}, [{"loss": None}] * 3, "bad sft Not a finite number, 3 times at most: loss"),
        ("reward", {"metrics": {"eval_accuracy": 0.51}}, [], "bad reward Held-out accuracy is 0.51, 204 of 400 pairs"),
        ("reward", {}, [], "look reward Prefers longer replies"),
        ("dpo", {}, [{"rewards/accuracies": 0.5}] * 5, "look dpo Accuracy is 0.5"),
    ],
)  # fmt: skip
def test_what_raises_an_alarm(run, stage, record, rows, said):
    assert said not in alarms_of(run) or not (record or rows)
    report_run.change(run, stage, **record)
    with (run / stage / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 61 + i, **row}) + "\n" for i, row in enumerate(rows))
    assert said in alarms_of(run)


def test_hacking_needs_score_up_and_gold_down(run):
    """A judge who falls along with the score is no hacking, nor a score that rises with the judge, nor noise."""
    for judge, score, rings in ((0.5, 0.5, False), (0.95, 9.0, False), (0.89, 9.0, False), (0.5, 9.0, True)):
        with (run / "ppo" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 99, "gold/judge_mean": judge, "gold/score_mean": score}) + "\n")
        assert ("Reward hacking" in alarms_of(run)) == rings
        report_run.write_lines(run / "ppo" / "metrics.jsonl", report_run.metrics("ppo", 60))


@pytest.mark.parametrize(("replies", "rings"), [(13, False), (400, True)])
def test_hacking_is_more_than_a_few_replies(run, replies, rings):
    """A fall of 0.08 is one reply of thirteen."""
    recipe = run / "recipe.yaml"
    asked = {"data": {"path": "x.jsonl"}, "judge": "a:b", "n": replies}
    recipe.write_text(dump(parse_document(recipe.read_text(), "")[0] | {"evaluate": asked}))
    steps = ((0, 0.58, 1.0), (30, 0.6, 2.0), (60, 0.52, 3.0))
    (run / "ppo" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "gold/judge_mean": judge, "gold/score_mean": score}) + "\n"
            for step, judge, score in steps
        )
    )
    assert ("Reward hacking" in alarms_of(run)) == rings


def test_the_first_accuracy_of_dpo_is_no_alarm(run):
    """It is 0 before anything has moved, and counts for much in a short run."""
    rows = [{"step": i, "rewards/accuracies": float(i > 1)} for i in (1, 2)]
    report_run.write_lines(run / "dpo" / "metrics.jsonl", rows)
    assert alarms_of(run).count("dpo Accuracy") == 0


def test_a_comparison_of_other_weights_is_said(run):
    for weights, rings in ((report_run.sha_of("ppo"), False), ("sha-of-another", True)):
        comparison = report_run.comparison(1) | {"made_of": {"sft": report_run.sha_of("sft"), "ppo": weights}}
        (run / "comparison.json").write_text(json.dumps(comparison))
        assert ("look the run comparison.json compares other weights of ppo than" in alarms_of(run)) == rings


# Runs that are not whole


def test_a_run_that_has_only_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run", to=tmp_path / "report.html")
    assert "No stage has written anything" in page.text and "recipe.yaml is missing" in page.text


def test_a_run_made_elsewhere_and_killed(small, tmp_path):
    report_run.change(small, "ppo", state="running", artifact=None, finished_at=None, wall_s=0.0, metrics=None)
    with (small / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "objective/kl": 12')
    page = page_of(small, to=tmp_path / "report.html")
    assert "stale" in page.text and "missing" in page.text and "0 of 4 stages done" in page.text
    assert "from what the judge saw" in page.text
    assert "cannot be read" not in page.text  # a line that is half written is no fault
    assert "0 s" not in page.text  # how long it took, nobody knows


def test_a_run_at_work_says_where_it_is(small, tmp_path):
    report_run.change(small, "ppo", state="running", artifact=None)
    (small / "ppo" / "work").mkdir()
    (small / "ppo" / "work" / "progress.json").write_text('{"phase": "training", "step": 12, "of": 60, "time": 1.0}')
    with RunDirectory(small).locked():
        page = page_of(small, to=tmp_path / "report.html")
    assert "ppo: training, step 12 of 60" in page.text


BROKEN = {
    "recipe.yaml": [
        b"\xff\xfe\x00", b"stages: [1, 2", b"- a\n- b\n",
        b"stages: {sft: 3, x: {kind: [1]}}\nname: [a]\nmodel: 3",
    ],
    "reward/stage.json": [
        b"{", b"[]", b"\xff", b'{"state": ["x"], "inputs": [], "metrics": 3, "versions": "x", "gates": [1]}',
        b'{"kind": ["sft"], "started_at": 3, "wall_s": "long", "gates": {"x": 1}, "built_on": {"ppo": 3, "sft": [1]}}',
        b'{"wall_s": 1e999, "peak_memory_bytes": -1, "artifact_files": {"adapter_model.safetensors": 3}}',
    ],
    "ppo/metrics.jsonl": [
        b"\xff\xfe\n{}\n[1]\nnull\n",
        b'{"step": "x", "objective/kl": 1e308, "objective/scores": "2"}\n',
        b'{"step": 1}\n',
        b'{"step": 1, "objective/kl": ' + b"9" * 400 + b', "objective/scores": 1}\n',
        b'{"step": 3, "objective/kl": NaN, "objective/scores": Infinity, "gold/judge_mean": 1}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 2, "objective/kl": 1, "objective/scores": 1}\n' * 3,
        b'{"step": -5, "objective/kl": 1e99, "objective/scores": -1e99}\n{"objective/kl": 0, "objective/scores": 0}\n',
    ],
    "ppo/samples.jsonl": [
        b'{"judge": 1, "completion": [{"content": 3}], "prompt": {"a": [1]}}\n', b'{"judge": "x"}\n3\n',
    ],
    "reward/pairs.jsonl": [
        b"{}\n", b'{"chosen": 1, "rejected": null}\n', b'{"chosen": 1, "rejected": 1}\n',
        b'{"chosen": 1e99, "rejected": -1e99, "chosen_length": 1, "rejected_length": "x"}\n' * 30,
    ],
    "comparison.json": [
        b"{", b"[]", b'{"rows": 3, "means": [], "policies": "ppo", "win_rates": {}, "settings": []}',
        b'{"rows": [3, {"replies": 3}, {"prompt": [3, {"role": 1}], "replies": {"a": 3, "b": {"text": 3, "kl": []}}}]}',
        b'{"rows": [{"replies": {"a": {"reward": 1, "judge": 1}, "b": {"reward": 1}}}], "win_rates": [3, {}]}',
        b'{"rows": [], "policies": [[], {}], "win_rates": [{"by": "judge", "win_rate": 1, "low": 1, "high": NaN}]}',
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(max(map(len, BROKEN.values()))))
def test_broken_files_break_nothing(turn, run, tmp_path):
    """Every file in some wrong way at once; two stages are left, for the time that drawing takes."""
    for stage in ("sft", "dpo"):
        shutil.rmtree(run / stage)
    for name, contents in BROKEN.items():
        (run / name).write_bytes(contents[turn % len(contents)])
    page = page_of(run, to=tmp_path / "report.html")
    assert "Summary" in page.text and "Alarms" in page.text
    if turn == 0:
        for name in ("recipe.yaml", "stage.json", "metrics.jsonl", "comparison.json"):
            assert re.search(f"{name} (cannot be read|has .* that cannot be read)", page.text), name


@pytest.mark.slow
def test_folders_in_the_place_of_files(run, tmp_path):
    for name in BROKEN:
        (run / name).unlink()
        (run / name).mkdir()
    assert page_of(run, to=tmp_path / "report.html").text.count("cannot be read") >= 4


# Text that is not ours


@pytest.mark.slow
def test_hostile_text_stays_text_and_long_text_is_cut(tmp_path):
    hostile = report_run.HOSTILE
    run = report_run.write(tmp_path / "run", text=hostile + report_run.LONG, name=hostile)
    report_run.change(run, "dpo", state="failed", error=hostile)
    page = page_of(run, to=tmp_path / "report.html")
    assert not page.names() & {"script", "img", "textarea"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.html.count("<style>") == 1 and page.html.count("</style>") == 1
    assert "<script>document.title='hacked'" in page.text  # as text, for a person to read
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page.html)
    assert len(page.html) < 1.5e6
    assert "more characters" in page.text


# Several runs


@pytest.mark.slow
def test_several_runs_are_overlaid(made_up, tmp_path):
    other = shutil.copytree(made_up, tmp_path / "other")
    report_run.change(other, "ppo", inputs={"kind": "ppo", "trainer.kl_coef": 0.25, "data": "rows.jsonl@" + "ee" * 16})
    shutil.rmtree(other / "dpo")
    page = page_of(made_up, other, to=tmp_path / "both.html")
    assert "made-up (1)" in page.text and "made-up (2)" in page.text
    assert "trainer.kl_coef" in page.text and "0.25" in page.text and "rows.jsonl (eeeeeeee)" in page.text
    loss = re.search(r"<title>ppo: Score</title><desc>([^<]*)</desc>.*?</svg>", page.html, re.DOTALL)
    assert "made-up (1)" in loss[1] and "made-up (2)" in loss[1]
    assert "var(--s0)" in loss[0] and "var(--s1)" in loss[0]
    assert len(re.findall(r"<title>dpo: Loss</title>", page.html)) == 1


# The command


def test_labels_of_points_close_together_are_apart():
    """Also of points in the same place, at the edges, and of as many as four runs have."""
    points = np.array([[60, 185], [60, 185], [61, 185], [330, 165], [330, 165], [330, 15], [200, 105], [202, 104]] * 2)
    labels = [f"run {i}: ppo" for i in range(len(points))]
    corners = charts._apart(labels, points, 195)
    boxes = [(x, y, x + 7 * len(label), y + 12) for label, (x, y) in zip(labels, corners, strict=True)]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(left > 46 and right < charts.WIDTH and bottom < 195 for left, _, right, bottom in boxes)


@pytest.mark.slow
def test_scores_of_different_reward_models_are_not_to_be_compared(made_up, tmp_path):
    other = shutil.copytree(made_up, tmp_path / "other")
    said = "compare scores only within a run"
    assert said not in page_of(made_up, other, to=tmp_path / "same.html").text
    report_run.change(other, "reward", artifact_files={"adapter_model.safetensors": [10, "another"]})
    assert page_of(made_up, other, to=tmp_path / "two.html").text.count(said) == 2


def test_a_reply_without_visible_text_is_said_to_be_one(small, tmp_path):
    comparison = report_run.comparison(1)
    comparison["rows"][0]["replies"]["ppo"]["text"] = " \n"
    (small / "comparison.json").write_text(json.dumps(comparison))
    assert page_of(small, to=tmp_path / "report.html").text.count("no visible text") == 1


def test_the_command(small, tmp_path, monkeypatch, capsys):
    run, other = small, shutil.copytree(small, tmp_path / "other")
    monkeypatch.chdir(tmp_path)

    def say(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "report", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    assert say(str(run)) == (0, f"{run / 'report.html'}\n", "")
    assert say(str(run), str(other)) == (0, f"{tmp_path / 'report.html'}\n", "")
    assert say(str(run), "-o", "mine.html") == (0, "mine.html\n", "")
    for file in (run / "report.html", tmp_path / "report.html", tmp_path / "mine.html"):
        assert file.read_text().startswith("<!DOCTYPE html>")
    code, out, err = say(str(run), "-o", "gone/mine.html")
    assert (code, out, err) == (2, "", "error: --out gone/mine.html: there is no folder gone\n")
    assert say(str(tmp_path / "no-run"))[:2] == (2, "")
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    code, _, err = say(str(run), "--open")
    assert (code, err) == (0, "there is no browser here to open it with\n")
    assert opened == [(run / "report.html").as_uri()]


def test_a_page_that_cannot_be_written_leaves_the_old_one(small, monkeypatch):
    run = small
    (run / "report.html").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        report.write([run], run / "report.html")
    assert (run / "report.html").read_text() == "old"


def test_what_a_run_took_from_another_is_said_to_be_from_there(tmp_path):
    run = report_run.write(tmp_path / "second")
    report_run.change(run, "reward", taken_from="first/reward", taken_at="2026-01-03T00:00:00+00:00")
    said = page_of(run, to=tmp_path / "report.html").text
    assert "reward from first/reward" in said and "sft from first" not in said


def test_adapters_from_outside_are_in_the_lineage(tmp_path):
    run = report_run.write(tmp_path / "second")
    report_run.change(run, "ppo", init="/runs/other:sft", reward="/models/scorer")
    said = page_of(run, to=tmp_path / "report.html").text
    assert "ppo from other:sft (weights); ppo from scorer (reward)" in said and "dpo from sft (weights)" in said
