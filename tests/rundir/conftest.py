"""A run directory that the version before `rundir/record.py` has left (commit cb05b3b)."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.recipe import TINY

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A copy of it, to be written to, whose recipe names the files that are here."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(RECORDED, run, ignore=shutil.ignore_patterns("data"))
    shutil.copytree(RECORDED / "data", tmp_path / "data")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    for there, here in (
        ("/elsewhere/checkpoint", TINY / "checkpoint"),
        ("/elsewhere/runs", tmp_path / "runs"),
        ("/elsewhere/data", tmp_path / "data"),
    ):
        assert there in text
        text = text.replace(there, str(here))
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    for adapter in run.glob("*/adapter"):
        shutil.copy(TINY / "checkpoint" / "tokenizer.json", adapter)
    _judged_by_the_code_that_is_here(run)
    return run


def _judged_by_the_code_that_is_here(run: Path) -> None:
    """Note the judge of today in the records, its code and what it gets: else all is to be judged again."""
    recipe = recipes.of_run(run)
    for file in run.glob("*/stage.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["judging"]:
            content["judging"]["judge_gets"] = "text"
            content["judging"]["judge_source"] = Digests().of_function(content["judging"]["judge"], recipe.folders)
            file.write_text(json.dumps(content), encoding="utf-8")
