"""Stages as tables for people and as JSON for programs."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from rich.console import Console

from rlhf_pipeline import cli
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.run.to_do import ToDo
from rlhf_pipeline.rundir.layout import Progress
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.words import duration
from rlhf_pipeline.terminal import tables


def stage(name: str, state: str = "done", **changes: object) -> StagePlan:
    record = {"wall_s": 12.4, "peak_memory_bytes": 10, "artifact": f"{name}/adapter", "log": f"{name}/log.txt"}
    record = changes.pop("record", record)
    record = Record.model_validate(record | {"metrics": changes.pop("metrics", {})})
    parents = {role: changes.pop(role) for role in ("init", "reward") if role in changes}
    settings = {"reason": "up to date", "parents": {"init": "base"} | parents}
    settings |= {"inputs": {"seed": 1}, "fingerprint": "f0"}
    settings |= {"kind": name, "judging": None, "record": record} | changes
    return StagePlan(name=name, state=state, **settings)


def printed(show, *arguments: object, width: int = 120) -> str:
    output = io.StringIO()
    show(*arguments, Console(file=output, width=width))
    return output.getvalue()


def test_results_show_state_time_and_the_numbers_that_matter_for_the_kind():
    text = printed(
        tables.results,
        Path("runs/t"),
        [
            stage("sft", metrics={"judge_mean": 0.51234, "loss": 1.5, "grad_norm": 9.0}),
            stage("reward", metrics={"eval_accuracy": 0.75, "eval_margin": None}),
        ],
    )
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "state", "time", "numbers"]
    assert lines[1].split() == ["sft", "done", "12", "s", "loss", "1.5", "judge", "0.512"]
    assert lines[2].split() == ["reward", "done", "12", "s", "held-out", "accuracy", "0.75"]
    assert lines[3] == "run directory: runs/t"


@pytest.mark.parametrize("state", ["stale", "failed", "missing", "blocked", "running", "partial"])
def test_results_show_the_reason_where_a_stage_is_not_done(state):
    text = printed(tables.results, Path("r"), [stage("dpo", state, reason="because", metrics={"judge_mean": 0.9})])
    assert state in text
    assert "because" in text
    assert "0.9" not in text


NOTHING = ToDo({}, compares=False)
NO_DATA: dict[str, list] = {"sft": [], "ppo": [], "dpo": []}


def test_intentions_say_what_the_data_are_read_as():
    says = "prompt/completion: text and the reply"
    sources = [
        {
            "key": "data",
            "path": "/data/a[1].jsonl",
            "shape": says,
            "used_as": {"id": None, "prompt": "prompt", "completion": "reply"},
        },
        {"key": "data.eval_data", "path": "someone/questions", "shape": None, "used_as": None},
    ]
    lines = [
        line.rstrip()
        for line in printed(
            tables.intentions, [stage("sft")], NOTHING, {"sft": sources}, {}, None, width=160
        ).splitlines()
    ]
    assert lines[-3].split(maxsplit=2) == ["sft", "a[1].jsonl", says]
    assert lines[-2].strip() == "columns: prompt (prompt), completion (reply); not used: id"
    assert lines[-1].split(maxsplit=3)[:3] == ["sft", "data.eval_data:", "someone/questions"]
    assert "once it is downloaded" in lines[-1]


def test_intentions_show_what_will_run_from_where_and_why():
    ppo = stage("ppo", "stale", init="sft", reward="reward", reason="trainer.kl_coef 0.1 → 0.2")
    wanted = ToDo({"ppo": "train"}, compares=True)
    lines = printed(tables.intentions, [stage("sft"), ppo], wanted, NO_DATA, {}, None).splitlines()
    assert lines[1].split() == ["sft", "sft", "base", "done", "nothing", "up", "to", "date"]
    assert lines[2].split()[:7] == ["ppo", "ppo", "sft", "+", "reward", "stale", "train"]
    assert lines[2].rstrip().endswith("trainer.kl_coef 0.1 → 0.2")
    assert "compares the policies" in lines[3]


def test_intentions_say_how_many_members_an_ensemble_has():
    lines = printed(tables.intentions, [stage("sft", inputs={"members": 4})], NOTHING, NO_DATA, {}, None).splitlines()
    assert "sft, 4 members" in lines[1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"desirable_weight": 2.3803, "undesirable_weight": 1.0, "good": 710, "bad": 1690},
         "kto: desirable_weight 2.38, undesirable_weight 1, for 710 good and 1,690 bad replies"),
        ({"desirable_weight": None, "undesirable_weight": None, "good": None, "bad": None},
         "kto: desirable_weight and undesirable_weight by the rows, when it runs"),
        ({"desirable_weight": 1.5, "undesirable_weight": None, "good": None, "bad": None},
         "kto: desirable_weight 1.5, undesirable_weight by the rows, when it runs"),
    ],
)  # fmt: skip
def test_intentions_say_how_good_and_bad_replies_are_weighed(weights, said):
    lines = printed(tables.intentions, [stage("sft")], NOTHING, NO_DATA, {"kto": weights}, None).splitlines()
    assert lines[-1] == said


def test_intentions_name_the_model_whose_own_code_would_run():
    assert "code that comes with a/model will be run" in printed(
        tables.intentions, [stage("sft")], NOTHING, NO_DATA, {}, "a/model"
    )
    assert "will be run" not in printed(tables.intentions, [stage("sft")], NOTHING, NO_DATA, {}, None)


def test_a_gate_that_was_ignored_is_not_passed_over_in_silence():
    done = stage("reward", metrics={"eval_accuracy": 0.75}, reason="up to date")
    assert "up to date" not in printed(tables.results, Path("r"), [done])
    done.record = done.record.updated(gates_ignored={"eval_accuracy": ">= 0.9"})
    done.reason = "gates ignored: eval_accuracy is 0.75, not >= 0.9"
    assert done.reason in printed(tables.results, Path("r"), [done])


def test_what_is_to_be_said_of_a_stage_that_is_done_is_said_beside_its_numbers():
    done = stage("feedback", metrics={"eval_accuracy": 0.75}, reason="none of the 3 labels", is_current=True)
    done.kind = "reward"
    for show in (tables.results, tables.finished):
        said = printed(show, Path("r"), [done])
        assert done.reason in said and "0.75" in said


def test_a_stage_whose_gate_is_closed_keeps_its_numbers_in_json():
    closed = stage("reward", "done, gate closed", metrics={"eval_accuracy": 0.75}, is_current=True)
    assert closed.summary()["metrics"] == {"eval_accuracy": 0.75}


def test_a_reason_with_brackets_is_shown_as_it_is():
    """A reason quotes recipes and errors; its brackets are text, not styling."""
    reason = "trainer.loss_type [sigmoid] → [ipo]"
    assert reason in printed(tables.intentions, [stage("dpo", "stale", reason=reason)], NOTHING, NO_DATA, {}, None)
    assert reason in printed(tables.results, Path("r"), [stage("dpo", "stale", reason=reason)])


def test_a_narrow_terminal_loses_no_word():
    reason = "trainer.learning_rate 0.001 → 0.002; trainer.max_steps default → 5"
    text = printed(tables.intentions, [stage("dpo", "stale", reason=reason)], NOTHING, NO_DATA, {}, None, width=60)
    assert "…" not in text
    assert "".join(text.split()).find("0.002;") > 0


def test_the_json_object_holds_every_stage_and_nothing_internal():
    shown = tables.as_json(Path("runs/t"), [stage("sft", metrics={"train_loss": 1.5}), stage("dpo", "failed")])
    assert json.loads(json.dumps(shown)) == shown
    assert shown["run"] == str(Path("runs/t").absolute())
    done, failed = shown["stages"]
    assert done["name"] == "sft"
    assert (done["state"], done["wall_s"], done["metrics"], done["artifact"]) == (
        "done",
        12.4,
        {"train_loss": 1.5},
        "sft/adapter",
    )
    assert (failed["state"], failed["wall_s"], failed["metrics"], failed["artifact"]) == ("failed", None, {}, None)
    assert failed["log"] == str(Path("runs/t/dpo/log.txt").absolute())
    assert not {"inputs", "record", "judging"} & set(done)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (0.43, "0.4 s"), (9.97, "10 s"), (16.3, "16 s"), (59.6, "1 min"), (200, "3 min 20 s"),
        (4320, "1 h 12 min"), (93600, "1 d 2 h"),
    ],
)  # fmt: skip
def test_times_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said


def made(run: Path, name: str, rows: list[dict], **changes: object) -> StagePlan:
    """A finished stage with what it logged."""
    (run / name).mkdir(parents=True)
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = stage(name, is_current=True, **changes)
    plan.record = plan.record.updated(wall_s=4320.0, peak_memory_bytes=3 * 2**29)
    return plan


@pytest.fixture
def plans(tmp_path: Path) -> list[StagePlan]:
    run = tmp_path / "my run"
    judged = {"step": 0, "gold/judge_mean": 0.5}
    ppo = [judged, *({"step": i, "objective/scores": 1.0 + i % 2 + i // 20} for i in range(40))]
    return [
        made(run, "sft", [{"loss": 2.5}, {"loss": 0.9}], metrics={"loss": 0.61, "judge_mean": 0.54, "lr": 0.1}),
        made(run, "reward", [{"accuracy": 0.5}], metrics={"accuracy": 0.5, "eval_accuracy": 0.87}, init="sft"),
        made(run, "ppo", ppo, metrics={"objective/scores": 3.5, "judge_mean": 0.97}, init="sft", reward="reward"),
        stage("dpo", "missing", reason="has not run yet", record={}),
    ]


def test_the_end_of_a_run_tells_what_each_stage_changed(plans, tmp_path):
    """Of what was logged, the mean over the first twentieth; of the judge, what it said of the start; then the end."""
    lines = [line.split() for line in printed(tables.finished, tmp_path / "my run", plans).splitlines()]
    assert lines[1] == ["sft", "done", "1", "h", "12", "min", "1.5", "GiB", "loss", "2.5", "→", "0.61"]
    assert lines[2] == ["judge", "0.54"]
    assert lines[3][:8] == ["reward", "done", "1", "h", "12", "min", "1.5", "GiB"]
    assert lines[3][8:] == ["held-out", "accuracy", "0.87"]
    assert lines[4] == ["accuracy", "0.5"]  # once: nothing has changed
    assert lines[5][-4:] == ["score", "1.5", "→", "3.5"]
    assert lines[6] == ["judge", "0.54", "→", "0.97"]
    assert lines[7] == ["dpo", "missing", "has", "not", "run", "yet"]


def test_the_end_of_a_run_names_commands_that_make_sense(plans, tmp_path, monkeypatch):
    """With a path that can be pasted into a shell; the last stage that made a policy is the one to export."""

    def commands(some: list[StagePlan], run: Path = tmp_path / "my run") -> list[str]:
        text = printed(tables.finished, run, some, width=60)
        return [re.split(r"\s+#", line)[0].strip() for line in text.splitlines() if "rlhf-pipeline " in line]

    monkeypatch.chdir(tmp_path)
    assert commands(plans) == [
        "rlhf-pipeline chat 'my run'",
        "rlhf-pipeline compare 'my run'",
        "rlhf-pipeline report 'my run' --open",
        "rlhf-pipeline export 'my run' ppo 'my run-ppo'",
    ]
    assert commands([plans[1]]) == ["rlhf-pipeline report 'my run' --open"]
    assert commands([plans[3]]) == []
    elsewhere = Path("/r")
    assert commands(plans, elsewhere)[0] == "rlhf-pipeline chat /r"  # shorter than the way there from here


def test_the_end_of_a_run_shows_gates_that_were_ignored_and_reasons(plans, tmp_path):
    plans[1].record = plans[1].record.updated(gates_ignored={"eval_accuracy": ">= 0.9"})
    plans[1].reason = "gates ignored: eval_accuracy is [0.87]"
    assert plans[1].reason in printed(tables.finished, tmp_path / "my run", plans)


def test_the_commands_that_are_named_exist(plans, tmp_path):
    text = printed(tables.finished, tmp_path / "my run", plans)
    group = typer.main.get_command(cli.app)
    for name, arguments in re.findall(r"rlhf-pipeline (\w+) (.*?)\s+#", text):
        group.commands[name].make_context(name, shlex.split(arguments))


def test_a_stage_that_has_begun_says_how_long_it_will_take_yet(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n{"step": 3, "time": 20.0}\n')
    begun = stage("sft", state="partial", progress=Progress("checkpoint", step=3, of=1203))
    text = printed(tables.say_what_is_left, tmp_path, [begun, stage("reward")])
    assert text == "sft: 3 h 20 min to go, 1,200 steps at 10 s each\n"
    assert text in printed(tables.results, tmp_path, [begun])


def test_measured_memory_stands_beside_its_forecast_where_there_is_one():
    on_gpu = stage("sft", record={"peak_memory_bytes": 10 * 2**30, "forecast_memory_bytes": 9 * 2**30})
    on_cpu = stage("dpo", record={"peak_memory_bytes": 2**30})
    text = printed(tables.results, Path("runs/t"), [on_gpu, on_cpu])
    assert "memory of sft: 10.0 GiB (forecast 9.0 GiB, \N{MINUS SIGN}10 %)" in text
    assert "memory of dpo" not in text
