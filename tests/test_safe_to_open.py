"""What a run leaves behind holds no secrets; it runs no code that the recipe does not trust, and calls nobody."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import short_run
import torch

from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.run.launch import Launcher

RECIPE = """
name: short
model: {path: MODEL, quantization: none}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
"""
FINE = """
    def judge(prompts, completions, **columns):
        return [1.0 for _ in prompts]
"""
TALKATIVE = """
    import os, sys

    def judge(prompts, completions, **columns):
        print(os.environ)
        print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\\n", file=sys.stderr)
        if len(prompts) < 3:  # the check's
            return [0.5, 1.0]
        if os.path.exists("judged"):
            raise ValueError("401 Unauthorized: Bearer " + os.environ["HF_TOKEN"] + os.environ["MY_SERVICE_PASSWORD"])
        open("judged", "w").close()
        return [1.0 for _ in prompts]
"""
# What follows a stage that ended well.
DPO = """
  dpo:
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
"""
SECRETS = {
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPlanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SERVICE_PASSWORD": 'planted "pass" word\'7',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe of one short stage of the tiny model."""
    short_run.write_data(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", "tiny"))
    (tmp_path / "my_judge.py").write_text(textwrap.dedent(FINE))
    return tmp_path


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a folder, with a standard input that answers yes to everything."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf_pipeline", *arguments], cwd=folder, env=os.environ | environment,
        input="y\n" * 9, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def files_with(folder: Path, secret: str) -> list[str]:
    """The files of a folder that hold a secret as it is, or as JSON or Python would write it."""
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], secret.replace("'", "\\'")}
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and any(form.encode() in file.read_bytes() for form in forms)
    ]


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the requests it has had."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.slow
def test_a_run_tells_nobody_and_no_file_of_it_holds_a_secret(
    folder: Path, hub: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stage that ended well, and of one that failed, whose error says the token; nor does what the command says.

    The hub is asked nothing, not even told how many people use which version of what.
    """
    address, asked = hub
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    probe = "from huggingface_hub import HfApi\ntry: HfApi().model_info('a/b')\nexcept OSError: pass"
    environment = SECRETS | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
    subprocess.run([sys.executable, "-c", probe], env=os.environ | environment, timeout=60, check=True)
    assert asked, "the server is where the library asks"
    asked.clear()

    (folder / "my_judge.py").write_text(textwrap.dedent(TALKATIVE))
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", "tiny").rstrip() + DPO)
    failed = command(folder, "run", "recipe.yaml", **environment)
    assert failed.returncode == 1 and "401 Unauthorized" in failed.stderr, failed.stderr
    run = folder / "runs" / "short"
    states = [json.loads((run / stage / "stage.json").read_text())["state"] for stage in ("sft", "dpo")]
    assert states == ["done", "failed"]
    assert "401 Unauthorized: Bearer ***" in (run / "dpo" / "stage.json").read_text()
    assert "401 Unauthorized: Bearer ***" in (run / "dpo" / "log.txt").read_text()
    assert "401 Unauthorized: Bearer ***" in (run / "report.html").read_text()
    log = (run / "sft" / "log.txt").read_text()
    assert "WANDB_API_KEY=***" in log and f"HOME={os.environ['HOME']}" in log
    for name, secret in SECRETS.items():
        assert files_with(run, secret) == [], name
        assert secret not in failed.stdout + failed.stderr, name
    assert command(folder, "status", "recipe.yaml", **environment).returncode == 0
    assert asked == []


class Marking:
    """A pickle of this leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def model(folder: Path) -> Path:
    """A copy of the tiny model, which the recipe names."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", "model"))
    return Path(shutil.copytree(TINY / "checkpoint", folder / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickled_model_is_refused_unopened(folder: Path, model: Path, name: str) -> None:
    mark = folder / "mark"
    torch.save({"weight": Marking(mark)}, model / name)
    torch.load(model / name, weights_only=False)
    mark.rmdir()  # whoever opens it so leaves a mark
    (model / "model.safetensors").unlink()
    code, out, err = short_run.ask(folder, "run", "recipe.yaml")
    assert (code, out) == (2, "")
    error, hint = err.strip().splitlines()
    assert error.startswith("error: recipe.yaml:3:15: model.path: ") and f"a pickle, {name}" in error
    assert "can run any code when it is opened" in error
    assert hint.startswith("hint: ") and "save_pretrained" in hint
    assert not mark.exists() and not (folder / "runs").exists()


OWN_MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from .own_parts import scaled

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

Path(MARK).touch()
"""
OWN_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

Path(MARK).touch()
"""


def test_code_that_comes_with_a_model_runs_only_where_the_recipe_trusts_it(
    folder: Path, model: Path, warm_server: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [folder / "ran-model", folder / "ran-tokenizer"]
    (model / "own.py").write_text(OWN_MODEL.replace("MARK", repr(str(marks[0]))))
    (model / "own_parts.py").write_text("def scaled(x):\n    return x\n")
    (model / "own_tokenizer.py").write_text(OWN_TOKENIZER.replace("MARK", repr(str(marks[1]))))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for file, changes in (
        ("config.json", {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}},
        ),
    ):
        settings = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(settings | changes))

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # an answer that nobody may ask for
    code, refused = short_run.run_warm(warm_server, folder, "recipe.yaml")
    assert code == 2, refused
    assert "Python code that comes with it" in refused and "[y/N]" not in refused
    assert "hint: if you have read that code and trust it, set `model.trust_remote_code: true`" in refused
    assert not any(mark.exists() for mark in marks) and not (folder / "runs").exists()

    code, said = short_run.run_warm(warm_server, folder, "recipe.yaml", "model.trust_remote_code=true")
    assert code == 0, said
    assert all(mark.exists() for mark in marks)
    record = json.loads((folder / "runs" / "short" / "sft" / "stage.json").read_text())
    assert record["state"] == "done" and record["inputs"]["model.trust_remote_code"] is True

    def planned() -> dict[str, Any]:
        out = short_run.ask(folder, "plan", "recipe.yaml", "model.trust_remote_code=true", "--json").out
        (stage,) = json.loads(out)["stages"]
        return stage

    assert planned()["state"] == "done"
    (model / "own_parts.py").write_text("def scaled(x):\n    return 2 * x\n")
    assert planned()["state"] == "stale"
    assert planned()["reason"].startswith("model changed: model (")
