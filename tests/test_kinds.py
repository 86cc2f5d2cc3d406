"""One truth about kinds: no table or branch names them outside `kinds.py`, and a new one is one entry there."""

import ast
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import rlhf_pipeline
from rlhf_pipeline import kinds, plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.report import gather, page
from rlhf_pipeline.run.to_do import ToDo
from rlhf_pipeline.rundir.headline import headline, series
from rlhf_pipeline.rundir.jsonl import rows
from rlhf_pipeline.rundir.words import short
from rlhf_pipeline.terminal import asides, tables
from rlhf_pipeline.terminal.watching import RunView
from rlhf_pipeline.use import card

PACKAGE = Path(rlhf_pipeline.__file__).parent
NAMES = set(kinds.NAMES)
OF_OTHERS = {"reward", "judge", "label"}  # they are roles, keys, columns and numbers of a reply, too


def words(nodes: list[ast.expr | None]) -> set[str]:
    return NAMES & {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def wrong(tree: ast.AST) -> list[int]:
    """The lines with a table of kinds, or with a comparison of a kind's name."""
    found = []
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else []
        elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else []
        if any(len(named) > 1 and named - OF_OTHERS for named in (words(keys), words(elements))):
            found.append(node.lineno)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = words([*sides, *(one for side in sides for one in getattr(side, "elts", ()))])
            # There the other side tells.
            of_kind = any(ast.unparse(side).rstrip("']").endswith("kind") for side in sides)
            if named - OF_OTHERS or (named and of_kind):
                found.append(node.lineno)
    return found


def test_no_other_file_has_a_table_of_kinds_or_asks_for_one_by_name():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        if file.name == "figures.py":  # curves that add to a default
            tree.body = [node for node in tree.body if not ast.unparse(node).startswith("CURVES = ")]
        if file != PACKAGE / "kinds.py" and (lines := wrong(tree)):
            found[str(file.relative_to(PACKAGE))] = lines
    assert found == {}


@pytest.mark.parametrize(
    "code",
    ["x = {'sft': 1, 'ppo': 2}", "x = ('sft', 'dpo')", "{'reward', 'ppo'}", "kind != 'reward'", "s.kind == 'ppo'",
     "record['kind'] == 'reward'", "kind in ('sft', 'dpo')", "config == 'sft'"],
)  # fmt: skip
def test_such_code_is_found(code):
    assert set(wrong(ast.parse(code))) == {1}


@pytest.mark.parametrize("code", ["kinds.get(k).makes == 'reward'", "'reward' in roles", "('init', 'reward')"])
def test_other_code_is_not(code):
    assert wrong(ast.parse(code)) == []


def test_no_fact_has_a_default():
    for fact in (kinds.Kind, kinds.Number, kinds.Parent, kinds.Config):
        assert all(field.default is field.default_factory is dataclasses.MISSING for field in dataclasses.fields(fact))


def test_every_kind_has_its_file_and_the_parents_that_it_needs_can_be_made():
    for kind in kinds.KINDS:
        assert (PACKAGE / "stages" / f"{kind.name}.py").is_file()
        assert all(kinds.makers(parent.makes) for parent in kind.parents)
        assert all(kinds.find(reader) for reader in kind.further_data.values())
        assert kind.numbers and len({number.name for number in kind.numbers}) == len(kind.numbers)


# One finished run, seen by all


def printed(show, *arguments) -> str:
    console = Console(file=io.StringIO(), width=400)
    show(*arguments, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def plans(tiny_run) -> list[plan.StagePlan]:
    plans = plan.make(recipes.of_run(tiny_run), trust_versions=True)
    for planned in plans:  # what counts here is what is shown of a stage that is done
        planned.state, planned.is_current = "done", True
    return plans


def test_all_views_show_the_same_numbers_of_a_stage(tiny_run, plans):
    ended, status = (printed(show, tiny_run, plans) for show in (tables.finished, tables.results))
    watched = RunView(tiny_run)
    run = gather.read_runs([tiny_run])[0]
    for planned in plans:
        metrics = planned.record.metrics
        logged = series(planned.kind, rows(tiny_run / planned.name / "metrics.jsonl"))
        numbers = headline(planned.kind, metrics, logged)
        assert len(numbers) > 2 and [metrics[number.metric] for number in numbers] == [one.after for one in numbers]
        shown = {number.name: number.text for number in numbers}
        for name, value in shown.items():
            assert f"{name} {value}" in status
            assert any(line.startswith(name) or f"  {name} " in line for line in ended.splitlines() if value in line)
        stage = next(stage for stage in watched.stages if stage.name == planned.name)
        assert stage.final == shown
        summary = page._summary(run, run.stage(planned.name))["numbers"]
        assert {name: after + rests_on for name, _, after, rests_on in summary} == shown
        aside = {"name": "x", "kind": planned.kind, "state": "done", "metrics": metrics, "moved_at": 0, "bytes": 1}
        assert f"done, {numbers[0].name} {shown[numbers[0].name]}" in printed(asides.show, [aside])
        text = card.text(
            tiny_run, planned.name, recipes.of_run(tiny_run), license={}, merged=None, own_class=False, name="x"
        )
        table = text[text.index("| metric | value |") :].splitlines()[2 : 2 + len(numbers)]
        for number, line in zip(numbers, table, strict=True):
            metric, value = (cell.strip() for cell in line.strip("|").split("|"))
            assert number.metric in metric and value.endswith(number.rests_on)
            assert float(value.removesuffix(number.rests_on)) == pytest.approx(number.after, rel=1e-2)


def test_where_a_number_began_is_the_mean_of_what_was_logged_first():
    metrics = {"loss": 0.5, "eval_loss": 0.6, "mean_token_accuracy": 0.7, "judge_mean": 0.8}
    logged = [{"loss": 2.0}, {"loss": 1.0, "mean_token_accuracy": 0.1}, {"loss": None}, {"loss": 0.7}]
    found = headline("sft", metrics, series("sft", logged), 0.4)
    assert {one.name: (one.before, one.after) for one in found} == {
        "loss": (2.0, 0.5), "token accuracy": (None, 0.7), "held-out loss": (None, 0.6), "judge": (0.4, 0.8),
    }  # fmt: skip
    long = headline("sft", metrics, {"loss": [3.0, 1.0, *[0.5] * 38]})
    assert long[0].before == 2.0
    assert headline("sft", {"loss": float("nan"), "judge_mean": True}) == []


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"eval_accuracy": 0.875, "eval_pairs": 8, "eval_accuracy_se": 0.117}, "0.875 (7 of 8 pairs)"),
        ({"eval_accuracy": 0.8726, "eval_pairs": 628, "eval_accuracy_se": 0.0133}, "0.873 ± 0.013"),
        ({"eval_accuracy": 0.8125, "eval_pairs": 8}, "0.812 (6.5 of 8 pairs)"),  # a tie counts half
        ({"eval_accuracy": 0.875}, "0.875"),  # of an earlier version
    ],
)
def test_a_share_of_few_is_shown_with_their_number_and_one_of_many_with_its_error(metrics, said):
    assert [number.text for number in headline("reward", metrics)] == [said]


def test_the_mean_of_the_judge_is_shown_with_its_error():
    (number,) = headline("sft", {"judge_mean": 0.5385, "judge_mean_se": 0.0489, "judge_replies": 104}, None, 0.25)
    assert number.change == "0.25 → 0.538 ± 0.049"


# A kind that this version does not know, and a new one


@pytest.fixture
def foreign(tiny_run, tmp_path) -> Path:
    """A run whose last stage a later version made."""
    run = shutil.copytree(tiny_run, tmp_path / "tiny")
    file = run / "dpo" / "stage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": "later"}))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("kind: dpo", "kind: later"))
    return run


def test_a_kind_of_a_later_version_is_shown_as_unknown(foreign):
    html = page.render(gather.read_runs([foreign]))
    assert "Unknown kind" in html and "Supervised fine-tuning" in html
    view = RunView(foreign)
    view.refresh()
    later = next(stage for stage in view.stages if stage.name == "dpo")
    assert later.kind == "later" and later.final == later.logged == {}
    assert headline("later", {"loss": 1.0}) == []
    assert "done" in printed(
        asides.show, [{"name": "x", "kind": "later", "state": "done", "metrics": {}, "moved_at": 0, "bytes": 1}]
    )


def test_a_new_kind_is_one_entry(tiny_run, monkeypatch, plans):
    new = dataclasses.replace(kinds.get("dpo"), name="made_up", title="Made up", begins=False)
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, new))
    made_up = dataclasses.replace(plans[-1], kind="made_up")
    loss = f"loss {short(plans[-1].record.metrics['loss'])}"
    assert loss in printed(tables.results, tiny_run, [made_up])
    assert "made_up" in printed(tables.intentions, [made_up], ToDo({}, compares=False), {made_up.name: []}, {}, None)
    run = gather.read_runs([tiny_run])[0]
    stage = dataclasses.replace(run.stages[-1], kind="made_up")
    assert page._summary(run, stage)["numbers"]
    run.stages[-1] = stage
    assert "Made up" in page.render([run])


@pytest.mark.slow
def test_a_recipe_with_a_new_kind_loads_and_plans(tmp_path):
    """In a process of its own: the schema lists the kinds when it is imported."""
    (tmp_path / "r.yaml").write_text(
        "model: {path: tiny, quantization: none}\n"
        "stages:\n"
        "  sft: {data: tiny:demonstrations}\n"
        '  later: {kind: made_up, data: tiny:preferences, trainer: {beta: 0.2}, gates: {rewards/margins: "> 0"}}\n'
    )
    program = (
        "import dataclasses\n"
        "from rlhf_pipeline import kinds\n"
        "kinds.KINDS += (dataclasses.replace(kinds.get('dpo'), name='made_up'),)\n"
        "kinds.NAMES += ('made_up',)\n"
        "from rlhf_pipeline import cli\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", program, "plan", "r.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, later = json.loads(done.stdout)["stages"]
    assert (later["kind"], later["init"], later["state"], later["will_run"]) == ("made_up", "sft", "missing", True)
    assert later["data"][0]["shape"].startswith("prompt/chosen/rejected")
