"""The task of `benchmarks/closed_form.py` as a recipe."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from sweeping import RECIPE, REWARD


@pytest.fixture(scope="package")
def written(closed_form: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, its data, its reward, and its model."""
    folder = tmp_path_factory.mktemp("words")
    closed_form.make_base(folder / "base", seed=1)
    closed_form.write_recipe(folder, seed=1)  # with the demonstrations
    rows = [{"prompt": prompt} for prompt in closed_form.PROMPTS * 64]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {name: getattr(closed_form, name) for name in ("PROMPTS", "WORDS", "REWARDS", "ELSE")}
    (folder / "words.py").write_text("".join(f"{name} = {value!r}\n" for name, value in tables.items()) + REWARD)
    (folder / "words.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same, of a test's own."""
    return Path(shutil.copytree(written, tmp_path / "words", ignore=shutil.ignore_patterns("runs")))
