"""A judge behind `transformers serve`, which is the real server of the tiny checkpoint, on this machine's CPU."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.question import Question, read_template, render
from rlhf_pipeline.judges.remote import RemoteJudge
from rlhf_pipeline.recipe.schema import AIJudge

CHECKPOINT = Path(__file__).parents[2] / "rlhf_pipeline" / "models" / "tiny" / "checkpoint"
START_S = 120
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server, which needs what `pip install transformers[serving]` brings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        run,
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    log = model.with_name("serve.log")
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        until = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_a_judge_behind_transformers_serve(tmp_path):
    # A copy that can say nothing but A or B, by which of the two its weights find likelier.
    model = shutil.copytree(CHECKPOINT, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    letters = tokenizer.convert_tokens_to_ids(["A", "B"])
    others = [number for number in range(len(tokenizer)) if number not in letters]
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": letters, "suppress_tokens": others})
    )
    questions = [Question(f"What is {i} plus 3?", f"It is {i + 3}.", "No", "Which is right?", {}) for i in range(12)]
    kept = tmp_path / "run" / "judge-answers.jsonl"
    with served(model) as address:
        spec = AIJudge(model=address, served_model=str(model))
        judge = RemoteJudge(spec, kept, "stages.feedback.judge")
        judge.check()
        answers = judge(questions)
        assert judge(questions[:1]) == answers[:1]
        wrong = RemoteJudge(AIJudge(model=address, served_model="nobody"), kept, "stages.feedback.judge")
        with pytest.raises(
            InputError, match=r"refuses the question \(400 Bad Request\): `Server is pinned to"
        ) as error:
            wrong.check()
    assert {answer.text for answer in answers} <= {"A", "B"}
    assert [answer.first for answer in answers] == [float(answer.text == "A") for answer in answers]
    assert error.value.place == "stages.feedback.judge.model"
    # The server is gone, and what it has answered is there.
    assert RemoteJudge(spec, kept, "stages.feedback.judge")(questions) == answers
    assert [answer.text for answer in answers] == [likelier(model, question) for question in questions]


@torch.no_grad()
def likelier(folder: Path, question: Question) -> str:
    """Which of the two letters the checkpoint itself finds likelier to come next."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": render(question, read_template(None, ""))}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    a, b = model(**inputs).logits[0, -1, tokenizer.convert_tokens_to_ids(["A", "B"])].tolist()
    return "A" if a > b else "B"
