"""The recipes for one card say what they will take, and stay under it."""

import re
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.forecast import cards, work

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / "configs"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [("llama-3.1-8b-rlhf", "llama-3.1-8b")])
def test_a_recipe_for_24_gb_fits_and_its_comment_says_how_much_it_takes(name, config, tmp_path):
    file = ROOT / "recipes" / f"{name}.yaml"
    recipe = recipes.load(str(file), [])
    (tmp_path / "config.json").write_text((CONFIGS / f"{config}.json").read_text())
    recipe.model.path, recipe.model.revision = str(tmp_path), None
    found = work.forecast(recipe, cards.find("24GB"), advise=False)
    assert found.fits
    said = re.findall(r"^# forecast: (\w+) ([\d.]+) GiB", file.read_text(encoding="utf-8"), re.MULTILINE)
    expected = {stage.name: pytest.approx(stage.peak / 2**30, abs=0.2) for stage in found.stages}
    assert {name: float(size) for name, size in said} == expected
