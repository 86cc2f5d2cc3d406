"""Runs that report to trackers: what those hold is what the run directory holds, and nothing is left running."""

import importlib.util
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import short_run
from processes import WarmLauncher

from rlhf_pipeline import plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.run import trackers
from rlhf_pipeline.run.launch import Launcher

pytestmark = pytest.mark.slow

RECIPE = """\
name: tracked
seed: 7
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, lora_alpha: 8, target_modules: all-linear}
stages:
  sft:
    data: {path: demonstrations.jsonl, eval_fraction: 0.1}
    trainer: {max_steps: 2, per_device_train_batch_size: 4, gradient_checkpointing: false, logging_steps: 1}
  reward:
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false, logging_steps: 1}
  ppo:
    data: prompts.jsonl
    trainer: {total_episodes: 8, per_device_train_batch_size: 4, response_length: 4, num_ppo_epochs: 1,
              gradient_checkpointing: false}
"""
INSTALLED = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]


def needs(name: str) -> Any:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed: pip install {name}")


def metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def renamed(row: dict[str, Any]) -> dict[str, float]:
    """A row of numbers under the names that Transformers reports them by."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in row.items()
        if name not in ("step", "time")
    }


def descendants() -> set[int]:
    """Every process below this one."""
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, more = set(), {os.getpid()}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, warm_server: Launcher) -> Path:
    """A folder with a run that reported to every tracker that is installed, none of which went to the network."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "tracked.yaml").write_text(RECIPE)
    (folder / "day.jinja").write_text("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    short_run.write_data(folder)
    before = descendants()
    code, said = short_run.run_warm(
        warm_server, folder, "tracked.yaml", f"report_to=[{', '.join(INSTALLED)}]", "model.chat_template=day.jinja"
    )
    assert code == 0, said
    assert descendants() == before
    return folder


def test_the_day_of_the_chat_template_is_recorded(tracked: Path) -> None:
    records = [json.loads(file.read_text()) for file in (tracked / "runs").glob("*/*/stage.json")]
    assert records and {record["template_day"] for record in records} == {"2024-07-26"}


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B wrote down of a run: protocol buffers in the format of LevelDB's log, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # all of one, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@needs("tensorboard")
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_tensorboard_holds_the_numbers_of_the_stage(stage: str, tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked / "runs" / "tracked" / stage
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    expected: dict[str, dict[int, float]] = {}
    for row in metrics(folder):
        for name, value in renamed(row).items():
            expected.setdefault(name, {})[row["step"]] = value
    assert set(events.Tags()["scalars"]) == set(expected)
    assert ("eval/loss" in expected) == (stage == "sft") and any(len(steps) == 2 for steps in expected.values())
    for name, steps in expected.items():
        assert {one.step: one.value for one in events.Scalars(name)} == pytest.approx(steps, rel=1e-6)


@needs("wandb")
def test_wandb_has_one_run_a_stage_in_a_group_named_after_the_recipe(tracked: Path) -> None:
    seen = {}
    for stage in ("sft", "reward", "ppo"):
        folder = tracked / "runs" / "tracked" / stage
        (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        logged: list[float] = []
        ended = []
        for record in wandb_records(file):
            if record.HasField("run"):
                seen[stage] = (record.run.project, record.run.run_group, record.run.display_name)
            for item in record.history.item:
                if (item.key or item.nested_key[0]) in ("train/loss", "train/objective/kl"):
                    logged.append(json.loads(item.value_json))
            ended += [record.exit.exit_code] if record.HasField("exit") else []
        expected = [row[name] for row in metrics(folder) for name in ("loss", "objective/kl") if name in row]
        assert logged and logged == pytest.approx(expected)
        assert ended == [0]
    assert seen == {stage: ("rlhf-pipeline", "tracked", f"tracked/{stage}") for stage in ("sft", "reward", "ppo")}


@needs("trackio")
def test_trackio_has_one_run_a_stage_in_a_project_named_after_the_recipe(
    tracked: Path, warm_server: WarmLauncher
) -> None:
    (database,) = Path(warm_server.environment["TRACKIO_DIR"]).glob("tracked*.db")
    with sqlite3.connect(database) as rows:
        found = rows.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in found} == {f"tracked/{stage}" for stage in ("sft", "reward", "ppo")}
    logged = [json.loads(numbers) for name, numbers in found if name == "tracked/ppo"]
    expected = [row["objective/kl"] for row in metrics(tracked / "runs" / "tracked" / "ppo")]
    assert [row["train/objective/kl"] for row in logged if "train/objective/kl" in row] == pytest.approx(expected)


def test_no_file_of_the_run_has_a_key_of_the_environment(tracked: Path, warm_server: WarmLauncher) -> None:
    key = warm_server.environment["WANDB_API_KEY"].encode()
    files = [file for file in tracked.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if key in file.read_bytes()]


def test_a_tracker_added_or_taken_away_runs_nothing_again(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tracked)
    for names in ("none", "tensorboard", "[wandb, trackio]"):
        plans = plan.make(recipes.load("tracked.yaml", [f"report_to={names}", "model.chat_template=day.jinja"]))
        assert {stage.state for stage in plans} == {"done"}


def test_a_package_that_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_server: Launcher
) -> None:
    (tmp_path / "tracked.yaml").write_text(RECIPE)
    short_run.write_data(tmp_path)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("no_such_package_as_this",))
    code, said = short_run.run_warm(warm_server, tmp_path, "tracked.yaml", "report_to=wandb")
    assert code == 2
    assert said == "error: report_to: `wandb` is not installed\nhint: pip install wandb\n"
    assert not (tmp_path / "runs").exists()


# What the block does by itself


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine" / "sft"
    (folder / "work").mkdir(parents=True)
    return folder


def test_the_user_s_environment_goes_first_and_comes_back(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/events")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    before = dict(os.environ)
    with trackers.reporting(["tensorboard"], "mine", stage, "then"):
        assert os.environ["WANDB_PROJECT"] == "theirs" and os.environ["WANDB_RUN_GROUP"] == "mine"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/events/mine/sft"  # or all stages would be one run
    assert dict(os.environ) == before


def test_a_stage_that_goes_on_has_the_same_wandb_run_and_one_begun_anew_another(stage: Path) -> None:
    def run_id(started_at: str, folder: Path = stage) -> str:
        with trackers.reporting(["wandb"], "mine", folder, started_at):
            return os.environ["WANDB_RUN_ID"]

    assert run_id("then") == run_id("then")
    assert len({run_id("then"), run_id("now"), run_id("then", stage.with_name("ppo"))}) == 3


def test_events_of_an_attempt_that_nothing_was_kept_of_go_and_others_stay(stage: Path) -> None:
    (stage / "tensorboard").mkdir()
    (stage / "work" / "checkpoint-2").mkdir()
    with trackers.reporting(["tensorboard"], "mine", stage, "then"):
        assert (stage / "tensorboard").exists()
    shutil.rmtree(stage / "work" / "checkpoint-2")
    with trackers.reporting(["tensorboard"], "mine", stage, "then"):
        assert not (stage / "tensorboard").exists()


# In a recipe


def load(folder: Path, said: str) -> recipes.Recipe:
    (folder / "recipe.yaml").write_text(f"{said}\n{RECIPE}")
    short_run.write_data(folder)
    return recipes.load(str(folder / "recipe.yaml"))


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("", []),
        ("report_to: none", []),
        ("report_to: wandb", ["wandb"]),
        ("report_to: [tensorboard, trackio]", ["tensorboard", "trackio"]),
    ],
)
def test_a_recipe_names_trackers_as_a_word_or_a_list(said: str, names: list[str], tmp_path: Path) -> None:
    assert load(tmp_path, said).report_to == names


def test_a_misspelt_tracker_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    for said, place in (("report_to: tensorbord", "report_to"), ("report_to: [wandb, tensorbord]", "report_to.1")):
        with pytest.raises(InputError, match="got 'tensorbord'") as caught:
            load(tmp_path, said)
        assert str(caught.value.place).endswith(f": {place}")
        assert caught.value.hint == "did you mean `tensorboard`?"


@pytest.mark.parametrize("key", ["report_to", "run_name", "project", "trackio_space_id"])
def test_under_trainer_the_keys_of_trackers_are_refused_with_where_to_set_them(key: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{max_steps: 2,", f"{{{key}: wandb, max_steps: 2,"))
    short_run.write_data(tmp_path)
    with pytest.raises(InputError, match=f"`{key}` cannot be set: .*set `report_to` at the top of the recipe"):
        recipes.load(str(tmp_path / "recipe.yaml"))
