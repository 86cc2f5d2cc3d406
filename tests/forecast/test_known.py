"""What was forecast before, and where it is shown."""

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.cli import app
from rlhf_pipeline.forecast import known
from rlhf_pipeline.forecast.cards import ANY, Card
from rlhf_pipeline.forecast.result import Change, Forecast, Phase, StageForecast
from rlhf_pipeline.run import runner
from rlhf_pipeline.rundir.words import memory_beside

GIB = 2**30
CARD = Card("24 GB", 24 * GIB)
CHANGE = Change({"sft.trainer.per_device_train_batch_size": 4}, 20 * GIB, "time alone")
SFT = StageForecast("sft", "sft", (Phase("backward", {"weights": 25 * GIB, "overhead": GIB}),), 2, 4, 8, 0, (CHANGE,))
FOUND = Forecast(CARD.name, CARD.usable, (SFT,), ("a note",), advised=True)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: tiny, quantization: none}\nstages: {sft: {data: rows.jsonl}}\n")

    def load(*overrides):
        return recipes.load(str(file), list(overrides))

    load.file = file
    return load


def test_it_is_found_again_with_its_advice_on_its_card_and_without_on_another(recipe):
    assert known.find(recipe(), CARD) is None
    known.keep(recipe(), FOUND)
    assert known.find(recipe(), CARD) == FOUND
    other = known.find(recipe(), Card("big", 80 * GIB))
    assert (other.card, other.fits, other.advised, other.stages[0].changes) == ("big", True, False, ())
    assert known.find(recipe(), ANY).fits is None
    assert known.find(recipe(), ANY).stages[0].peak == 26 * GIB


def test_what_decides_it_makes_it_another(recipe, tmp_path, monkeypatch):
    known.keep(recipe(), FOUND)
    assert known.find(recipe("name=another"), CARD) == FOUND
    assert known.find(recipe("sft.trainer.per_device_train_batch_size=2"), CARD) is None
    assert known.find(recipe("lora.r=4"), CARD) is None
    moved = recipe()
    moved.model.path = str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    known.keep(moved, FOUND)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert known.find(moved, CARD) is None
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "much longer"}\n')
    assert known.find(recipe(), CARD) is None


def test_other_versions_of_the_libraries_make_it_another(recipe, monkeypatch):
    known.keep(recipe(), FOUND)
    monkeypatch.setattr(known.plan, "versions", lambda: {"trl": "99"})
    assert known.find(recipe(), CARD) is None


def test_a_damaged_one_and_a_place_that_cannot_be_written_to_are_no_error(recipe, tmp_path, monkeypatch):
    known.keep(recipe(), FOUND)
    for file in (known.local.caches() / "rlhf-pipeline" / "forecasts").glob("*.json"):
        file.write_text(file.read_text()[:-9])
    assert known.find(recipe(), CARD) is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    known.keep(recipe(), FOUND)
    assert known.find(recipe(), CARD) is None


def test_the_oldest_are_forgotten(recipe, monkeypatch):
    monkeypatch.setattr(known, "MOST", 4)
    known.keep(recipe(), FOUND)
    for file in (known.local.caches() / "rlhf-pipeline" / "forecasts").glob("*.json"):
        os.utime(file, (1, 1))
    for r in range(1, 4):
        known.keep(recipe(f"lora.r={r}"), replace(FOUND, advised=False))
    assert known.find(recipe("lora.r=3"), CARD) is not None
    assert len(list((known.local.caches() / "rlhf-pipeline" / "forecasts").glob("*.json"))) == 4


def test_plan_shows_it_or_says_which_command_tells(recipe):
    asked = ["plan", str(recipe.file), "--gpu", "24GB"]
    assert f"GPU memory: `rlhf-pipeline forecast {recipe.file}` says how much" in CliRunner().invoke(app, asked).stdout
    known.keep(recipe(), FOUND)
    said = CliRunner().invoke(app, asked).stdout
    assert "GPU memory: sft 26.0 GiB; too much for the 23.5 GiB of 24 GB: sft" in said
    shown = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["stages"][0]["memory"]
    assert shown == {"peak": 26 * GIB, "phase": "backward", "fits": False}


def test_a_stage_that_does_not_fit_is_a_doubt():
    assert FOUND.doubts == [
        "stages.sft is forecast to take 26.0 GiB in backward, and 24 GB has 24.0 GiB: `rlhf-pipeline forecast` says "
        "what to change"
    ]
    assert replace(FOUND, usable=26 * GIB).doubts == []
    assert replace(FOUND, usable=None).doubts == []


def test_a_record_has_what_the_allocator_should_have_counted_where_one_counted(recipe):
    assert runner._foreseen(recipe(), "sft", allocator=True) == {}
    known.keep(recipe(), FOUND)
    assert runner._foreseen(recipe(), "sft", allocator=True) == {"forecast_memory_bytes": 25 * GIB}  # not CUDA's own
    assert runner._foreseen(recipe(), "sft", allocator=False) == {}  # a resident set is something else


@pytest.mark.parametrize(
    ("measured", "forecast", "said"),
    [
        (10 * GIB, 11 * GIB, "10.0 GiB (forecast 11.0 GiB, +10 %)"),
        (10 * GIB, 8 * GIB, "10.0 GiB (forecast 8.0 GiB, \N{MINUS SIGN}20 %)"),
        (10 * GIB, None, "10.0 GiB"),
        (None, 10 * GIB, ""),
        (0, 10 * GIB, ""),
    ],
)
def test_forecast_beside_measured(measured, forecast, said):
    assert memory_beside(measured, forecast) == said
