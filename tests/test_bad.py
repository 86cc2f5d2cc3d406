"""Every recipe in `bad/`, with the messages that `bad/messages.txt` says it must give.

There, `== NAME.yaml` heads those of a recipe that is refused as it is read, and `== NAME.yaml, when checked` those of
one whose model or data have to be opened.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipeline import plan, recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.run import runner

BAD = Path(__file__).parent / "bad"
# The command for many recipes in one process, which is quicker than one for each; tells what each said and what the
# process has imported by then.
COMMANDS = """
import contextlib, io, json, sys
from rlhf_pipeline import cli
for file in sys.argv[1:]:
    sys.argv = ["rlhf-pipeline", "run", file]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "transformers", "trl", "datasets"} & sys.modules.keys())
    print(json.dumps({"file": file, "code": code, "out": out.getvalue(), "err": err.getvalue(), "imported": heavy}))
"""


def expectations() -> tuple[dict[str, str], dict[str, str]]:
    """What each recipe must say, as it is read and when it is checked."""
    parts = re.split(r"^== (.+)$\n", (BAD / "messages.txt").read_text(), flags=re.MULTILINE)[1:]
    said = dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))
    read = {name: text for name, text in said.items() if not name.endswith(", when checked")}
    return read, {name.removesuffix(", when checked"): text for name, text in said.items() if name not in read}


AS_READ, WHEN_CHECKED = expectations()


def as_printed(error: InputError) -> str:
    return "\n".join(f"error: {one}" + (f"\nhint: {one.hint}" if one.hint else "") for one in error.all)


def files(folder: Path) -> dict[str, bytes]:
    """What there is, without what Python keeps of modules that it imports."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A copy of `bad/`, in which nothing may be written."""
    return Path(shutil.copytree(BAD, tmp_path_factory.mktemp("bad") / "bad"))


@pytest.fixture(scope="module")
def said(bad) -> dict[str, dict]:
    """What `run` says to each recipe that is refused as it is read."""
    before = files(bad)
    environment = {key: value for key, value in os.environ.items() if key != "RLHF_PIPELINE_NOT_SET"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *AS_READ], cwd=bad, capture_output=True, text=True, timeout=120,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(bad) == before
    return {answer["file"]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.fixture
def check(warm_server, tmp_path):
    """Check a recipe in a worker, and return what it is refused with."""

    def refused(file: Path) -> str:
        loaded = recipe.load(str(file))
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        with pytest.raises(InputError) as caught:
            runner._check(loaded, plan.make(loaded), warm_server, scratch, None)
        assert "Traceback" not in (scratch / "check.log").read_text()
        return as_printed(caught.value).replace(f"{file.parent}/", "")

    return refused


def test_every_recipe_has_its_messages():
    assert AS_READ.keys() | WHEN_CHECKED.keys() == {file.name for file in BAD.glob("*.yaml")}
    assert not AS_READ.keys() & WHEN_CHECKED.keys()
    assert len(AS_READ) + len(WHEN_CHECKED) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_READ)
def test_a_recipe_that_is_wrong_is_refused_as_it_is_read(said, bad, name):
    """By the command, with exit code 2, nothing on standard output, and before torch is imported."""
    answer = said[name]
    assert answer["err"].strip().replace(f"{bad}/", "") == AS_READ[name]
    assert (answer["code"], answer["out"], answer["imported"]) == (2, "", [])


@pytest.mark.parametrize("name", WHEN_CHECKED)
def test_wrong_data_and_models_are_refused_before_anything_trains(check, bad, name):
    before = files(bad)
    assert check(bad / name) == WHEN_CHECKED[name]
    assert files(bad) == before


def test_one_broken_line_among_very_many_is_named(check, tmp_path):
    row = '{"prompt": "Q: What is the capital of Peru?", "completion": " It is Lima."}\n'
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", compresslevel=1) as file:
        for _ in range(2):
            file.write(row * 20_000)
        file.write(row.replace('"}', "}"))
        file.write(row * 20_000)
    said = check(recipe_of(tmp_path, "sft: {data: rows.jsonl.gz}"))
    assert said.startswith("error: rows.jsonl.gz:40001: this line is not JSON: ")


def test_a_tokenizer_without_eos_is_refused(check, tmp_path):
    """Nothing could tell that a reply is over."""
    model = shutil.copytree(TINY / "checkpoint", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert check(recipe_of(tmp_path, "sft: {data: tiny:demonstrations}", "./model")) == (
        "error: model.path: model: the tokenizer has no EOS token, so replies could never end\n"
        "hint: set `eos_token` in its tokenizer_config.json"
    )


def test_weights_in_a_pickle_are_refused_as_the_recipe_is_read(tmp_path):
    model = shutil.copytree(TINY / "checkpoint", tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match="as a pickle") as caught:
        recipe.load(str(recipe_of(tmp_path, "sft: {data: tiny:demonstrations}", "./model")))
    assert caught.value.place == f"{tmp_path / 'recipe.yaml'}:1:15: model.path"


def recipe_of(folder: Path, stage: str, model: str = "tiny") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"model: {{path: {model}, quantization: none, dtype: float32}}\nstages:\n  {stage}\n")
    return file
