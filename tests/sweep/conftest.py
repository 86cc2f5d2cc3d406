"""The task of `benchmarks/closed_form.py` as a recipe."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sweeping import RECIPE, REWARD

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "closed_form.py"


@pytest.fixture(scope="package")
def closed_form() -> Iterator[ModuleType]:
    """`benchmarks/closed_form.py` as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("closed_form", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(spec.name, None)  # each of two folders has such a fixture


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
