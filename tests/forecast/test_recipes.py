"""The recipes for one card say what they will take, and stay under it."""

import re
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.forecast import cards, work

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / "configs"
CONFIG_OF = {"meta-llama/Llama-3.1-8B": "llama-3.1-8b", "Qwen/Qwen3-4B-Base": "qwen3-4b",
             "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b"}  # fmt: skip
FOR_A_GPU = [name for name in recipes.shipped() if recipes.load(name, []).model.path in CONFIG_OF]


def _forecast(name, folder, *overrides):
    """By the model's configuration, which is here, in place of that on the hub."""
    recipe = recipes.load(name, list(overrides))
    config = CONFIGS / f"{CONFIG_OF[recipe.model.path]}.json"
    (folder / "config.json").write_text(config.read_text())
    recipe.model.path, recipe.model.revision = str(folder), None
    return work.forecast(recipe, cards.find("24GB"), advise=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_A_GPU)
def test_a_recipe_for_24_gb_fits_and_its_comment_says_how_much_it_takes(name, tmp_path):
    found = _forecast(name, tmp_path)
    assert found.fits
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    said = re.findall(r"^# forecast: ([\w-]+) ([\d.]+) GiB", text, re.MULTILINE)
    expected = {stage.name: pytest.approx(stage.peak / 2**30, abs=0.1) for stage in found.stages}
    assert {name: float(size) for name, size in said} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-best-of-n", "tiny-constitution", "tiny-ensemble", "tiny-rlaif"])
def test_every_stage_that_holds_a_model_is_forecast(name):
    recipe = recipes.load(name, [])
    assert [one.name for one in work.forecast(recipe, cards.ANY, advise=False).stages] == list(recipe.stages)
