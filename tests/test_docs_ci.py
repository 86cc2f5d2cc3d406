"""The workflow in docs/ci.md is one, and its commands do what it says, in a repository with a recipe."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RECIPE = """\
model: {path: tiny, quantization: none}
lora: {r: 4, target_modules: all-linear}
stages:
  sft: {data: rows.jsonl, trainer: {num_train_epochs: 3}}
"""
# These install from the network what the tests' own environment has.
NOT_RUN = {"Install"}


@pytest.fixture(scope="module")
def workflow() -> dict:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(block)


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / "recipes").mkdir()
    for name in ("first", "second"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(RECIPE)
    rows = ({"prompt": f"{i} and {i}?", "completion": f" {2 * i}"} for i in range(8))
    (tmp_path / "recipes" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does, with the `rlhf-pipeline` of the tests' own environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=folder, env=os.environ | environment | {"PATH": path}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_it_is_a_workflow_of_steps_that_github_takes(workflow):
    assert workflow["name"] == "recipes"
    assert set(workflow[True]) == {"pull_request", "push"}  # YAML 1.1 reads the key `on` as true
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert len(step.keys() & {"uses", "run"}) == 1
            assert step.keys() <= {"name", "id", "uses", "run", "with"}
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
    smoke = workflow["jobs"]["smoke"]
    assert smoke["timeout-minutes"] <= 30
    assert {step.get("uses", "").split("@")[0] for step in smoke["steps"]} >= {"actions/cache", "actions/setup-python"}


@pytest.mark.skipif(shutil.which("jq") is None, reason="the step needs jq, which GitHub's machines have")
def test_every_recipe_becomes_a_job(workflow, repository):
    job = workflow["jobs"]["recipes"]
    (step,) = (step for step in job["steps"] if "run" in step)
    done = shell(step["run"], repository, GITHUB_OUTPUT=str(repository / "output"))
    assert done.returncode == 0, done.stderr
    name, _, value = (repository / "output").read_text().partition("=")
    assert job["outputs"][name] == f"${{{{ steps.{step['id']}.outputs.{name} }}}}"
    assert f"needs.recipes.outputs.{name}" in workflow["jobs"]["smoke"]["strategy"]["matrix"]["recipe"]
    assert json.loads(value) == ["recipes/first.yaml", "recipes/second.yaml"]


def test_its_commands_stop_at_a_bad_recipe(workflow, repository):
    smoke = workflow["jobs"]["smoke"]
    commands = {step["name"]: step["run"] for step in smoke["steps"] if "run" in step}
    assert commands.keys() - NOT_RUN == {"Validate", "Smoke"}
    print(f"not run: {NOT_RUN}, which installs from the network what is installed already")
    assert smoke["env"]["RECIPE"] == "${{ matrix.recipe }}"
    # Of a good recipe smoke/test_smoke.py tells what it does.
    for name in commands.keys() - NOT_RUN:
        (line,) = commands[name].splitlines()
        assert shlex.split(line)[0] == "rlhf-pipeline" and '"$RECIPE"' in line
    (repository / "recipes" / "first.yaml").write_text(RECIPE.replace("num_train_epochs", "num_train_epoch"))
    for name in commands.keys() - NOT_RUN:
        done = shell(commands[name], repository, RECIPE="recipes/first.yaml")
        assert done.returncode == 2 and "did you mean `num_train_epochs`?" in done.stderr
