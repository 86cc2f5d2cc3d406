"""The wheel has all that `run tiny` needs, and the checkout's own recipes and commands stay in step."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.stat().st_size < 5e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_runs_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    probe = "import rlhf_pipeline; print(rlhf_pipeline.__file__)"
    where = subprocess.run([sys.executable, "-P", "-c", probe], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert where.stdout.startswith(str(unpacked))
    settings = ["sft.data.limit=32", "sft.trainer.max_steps=1", "evaluate.n=2", "--only", "sft"]
    run = [sys.executable, "-P", "-m", "rlhf_pipeline", "run", "tiny", *settings]
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "tiny" / "sft" / "stage.json").read_text())
    assert record["state"] == "done" and "judge_mean" in record["metrics"]
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


def test_the_wheel_holds_every_recipe_and_their_schema(unpacked: Path, tmp_path: Path) -> None:
    recipes = unpacked / "rlhf_pipeline" / "recipes"
    shipped = {path.name: path.read_bytes() for path in recipes.iterdir()}
    assert shipped == {path.name: path.read_bytes() for path in (ROOT / "recipes").iterdir()}
    assert {"tiny.yaml", "recipe.schema.json"} <= set(shipped)
    copy = [sys.executable, "-P", "-m", "rlhf_pipeline", "cp", "tiny"]
    subprocess.run(copy, env=os.environ | {"PYTHONPATH": str(unpacked)}, cwd=tmp_path, check=True)
    for name in ("tiny.yaml", "recipe.schema.json"):
        assert (tmp_path / name).read_bytes() == shipped[name]


def test_the_wheel_holds_the_documentation_and_prints_it(unpacked: Path, tmp_path: Path) -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.name for path in (unpacked / "rlhf_pipeline" / "docs").glob("*.md")}
    command = [sys.executable, "-P", "-m", "rlhf_pipeline", "docs", "json"]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == (ROOT / "docs" / "json.md").read_text(encoding="utf-8")


def test_the_wheel_holds_every_template_and_page(unpacked: Path) -> None:
    package = ROOT / "rlhf_pipeline"
    files = [*package.rglob("*.jinja"), *(package / "arena" / "page").iterdir()]
    assert {file.name for file in files} == {
        "arena.css",
        "arena.js",
        "card.md.jinja",
        "chat_template.jinja",
        "index.html",
        "page.html.jinja",
        "question.jinja",
    }
    for file in files:
        assert (unpacked / file.relative_to(ROOT)).read_bytes() == file.read_bytes()


def test_pins_lie_within_the_declared_ranges_and_serve_everywhere() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = (project["dependencies"], *(extras[name] for name in extras if name != "vllm"))  # which pins torch itself
    declared = [Requirement(line) for lines in lists for line in lines]
    assert {canonicalize_name(need.name) for need in declared} <= pins.keys()
    for need in declared:
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need
    for file in ("Makefile", "Dockerfile"):
        assert "--constraint constraints.txt" in (ROOT / file).read_text()


def test_readme_opens_with_the_two_commands_ci_runs() -> None:
    block = (ROOT / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["make demo", "make test"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in commands)
