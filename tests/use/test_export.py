"""Exported models, loaded by Transformers and PEFT alone, say what the stage's own model says."""

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    pipeline,
)

from rlhf_pipeline.data.encode import encode_records
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Data, Model
from rlhf_pipeline.use.export import export
from rlhf_pipeline.use.weights import write_adapter, write_merged

IDS = torch.randint(5, 1024, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def of_policy(spec: Model, artifact: Path) -> torch.Tensor:
    """The logits of the model as the pipeline itself runs it."""
    staged = StagedBase(spec, {"sft": artifact})
    with staged.acting_as("sft"):
        return logits(staged.causal_lm)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.3  # so that the tolerance is small beside it
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
def test_a_policy_says_the_same_merged_and_as_an_adapter(shape: str, make_artifacts: Callable, tmp_path: Path) -> None:
    """Llama has embeddings of its own, Qwen3 and GPT-2 tied ones, GPT-2 transposed layers."""
    artifacts = make_artifacts(shape)
    expected = of_policy(artifacts.spec, artifacts.init)
    for name in ("merged", "adapter"):
        (tmp_path / name).mkdir()
    write_merged(artifacts.spec, artifacts.init, tmp_path / "merged", "causal", {})
    write_adapter(artifacts.spec, artifacts.init, tmp_path / "adapter", "causal", {})
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert_same(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    bare = logits(AutoModelForCausalLM.from_pretrained(artifacts.spec.path))
    assert (bare - expected).abs().max() > 0.1
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_what_was_trained_in_four_bits_is_merged_into_the_unquantized_base(make_artifacts: Callable, out: Path) -> None:
    artifacts = make_artifacts("llama", "nf4")
    assert write_merged(artifacts.spec, artifacts.init, out, "causal", {}).dtype == "float32"
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    assert_same(merged, of_policy(artifacts.spec.model_copy(update={"quantization": "none"}), artifacts.init))
    assert (merged - of_policy(artifacts.spec, artifacts.init)).abs().max() > 0.05
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_weights_are_in_the_recipe_s_dtype_or_that_of_the_checkpoint(
    tiny_run: Path, make_artifacts: Callable, tmp_path: Path
) -> None:
    tiny = Model(path=str(TINY / "checkpoint"), quantization="none")  # stored in bfloat16
    stored = make_artifacts("llama")
    for spec, artifact, wanted in (
        (tiny, tiny_run / "sft" / "adapter", torch.bfloat16),
        (stored.spec, stored.init, torch.float32),
        (stored.spec.model_copy(update={"dtype": "float16"}), stored.init, torch.float16),
    ):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        assert f"torch.{write_merged(spec, artifact, folder, 'causal', {}).dtype}" == str(wanted)
        assert {one.dtype for one in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {wanted}


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_an_adapter_on_one_of_two_tied_embeddings_changes_that_one_alone(
    targets: list[str], checkpoints: Any, tokenizer: PreTrainedTokenizerBase, randomise: Callable, tmp_path: Path
) -> None:
    spec = Model(path=str(checkpoints["qwen3"]), quantization="none")
    torch.manual_seed(0)
    model = adapters.with_policy_adapter(base.load_base(spec, tokenizer), {"r": 2, "target_modules": targets}, None)
    randomise(model)
    for parameter in adapters.adapter_parameters(model, "default").values():
        parameter.data = parameter.data.abs()  # an embedding's first factor begins as zeros, its second as noise
        parameter.data += 0.1
    expected = logits(model)
    adapters.save_adapter(model, "default", tmp_path / "artifact", tokenizer)
    (tmp_path / "out").mkdir()
    write_merged(spec, tmp_path / "artifact", tmp_path / "out", "causal", {})
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_reward_model_gives_the_scores_that_ppo_reads(
    shape: str, make_artifacts: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    artifacts = make_artifacts(shape)
    prompt, replies = [7, 8, 9], [[20, 21, 22, 23, 1], [30, 1]]
    rows = [prompt + reply for reply in replies]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (8 - len(row)) for row in rows])
    episodes = Episodes(
        ids=ids,
        prompt_lengths=torch.tensor([3, 3]),
        reply_lengths=torch.tensor([5, 2]),
        ended=torch.tensor([True, True]),
        sampled_log_probs=torch.zeros(2, 5),
    )
    staged = StagedBase(artifacts.spec, {"reward": artifacts.reward})
    with torch.no_grad():
        expected = reply_scores(staged.reward("reward")[0], episodes)
    for name in ("merged", "adapter"):
        (tmp_path / name).mkdir()
    write_merged(artifacts.spec, artifacts.reward, tmp_path / "merged", "score", {})
    write_adapter(artifacts.spec, artifacts.reward, tmp_path / "adapter", "score", {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = theirs.pad({"input_ids": rows}, return_tensors="pt")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    adapter.config.pad_token_id = theirs.pad_token_id
    for model in (merged, adapter):
        with torch.no_grad():
            assert_same(model.eval()(**batch).logits[:, 0], expected)
    scored = pipeline("text-classification", model=merged, tokenizer=theirs)("of the whole text")
    with torch.no_grad():
        raw = merged(**theirs("of the whole text", return_tensors="pt")).logits.item()
    assert scored[0]["score"] == pytest.approx(raw, abs=1e-5)  # not squeezed between 0 and 1


def test_nothing_is_left_of_an_export_that_fails(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = run / "sft" / "adapter" / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"alora_invocation_tokens": [5, 6]}
    config.write_text(json.dumps(changed))
    record = json.loads((run / "sft" / "stage.json").read_text())
    del record["artifact_files"]["adapter_config.json"]  # else the change is found at once
    (run / "sft" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="cannot merge"):
        export(run, "sft", tmp_path / "out", merge=True, n=0)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


# Of a run


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The head of a model card, and what is under it."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_generation_stops_at_the_end_of_a_reply(run: Path, tmp_path: Path) -> None:
    export(run, "ppo", tmp_path / "out", merge=True, n=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = [json.loads(line)["prompt"] for line in (run / "sft" / "samples.jsonl").read_text().splitlines()]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    replies = model.generate(**inputs, max_new_tokens=60, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ended = [reply.tolist() for reply in replies if tokenizer.eos_token_id in reply]
    assert ended
    for reply in ended:
        after = reply[reply.index(tokenizer.eos_token_id) + 1 :]
        assert set(after) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_the_card_says_what_is_recorded_and_its_code_runs(
    stage: str, merge: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    export(run, stage, tmp_path / "of the run", merge=merge, n=4)
    head, text = card_of(tmp_path / "of the run")
    assert head["library_name"] == ("transformers" if merge else "peft")
    assert head["pipeline_tag"] == ("text-classification" if stage == "reward" else "text-generation")
    assert head["license"] == "apache-2.0" and "base_model" not in head
    for name in ("sft", stage):
        record = json.loads((run / name / "stage.json").read_text())
        for fact in (
            record["fingerprint"],
            record["artifact_files"]["adapter_model.safetensors"][1],
            *record["inputs"]["data"].split("@"),
        ):
            assert fact in text
    assert f"| trl | {record['versions']['trl']} |" in text
    other = ("eval_loss", "eval_loss") if stage == "reward" else ("judge_mean", "judge (judge_mean)")
    for metric, shown in (("train_loss", "train_loss"), other):
        assert f"| {shown} | {record['metrics'][metric]:.6g}" in text
    for path in (tmp_path, run, TINY, Path.home()):
        assert str(path) not in text
    if merge:
        told = "4 of 4 pairs stayed in the same order" if stage == "reward" else "4 of 4 greedy replies stayed the same"
        assert told in text and "The merged weights are in float32." in text
    assert "ppo" not in text  # it is no part of how this came about
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, found := {})
    assert capsys.readouterr().out.strip()
    assert len(found["scores"]) == 2 if stage == "reward" else isinstance(found["reply"], str)


def test_the_code_of_a_card_scores_as_the_stage_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With conversations, which go through the chat template."""
    record = json.loads((run / "reward" / "stage.json").read_text())
    record["inputs"]["data.chat"] = True
    (run / "reward" / "stage.json").write_text(json.dumps(record))
    export(run, "reward", tmp_path / "scorer", merge=True, n=0)
    text = card_of(tmp_path / "scorer")[1]
    assert "through the chat template" in text
    monkeypatch.chdir(tmp_path)
    exec(re.findall("```python\n(.*?)```", text, re.DOTALL)[0], found := {})
    staged = StagedBase(
        Model(path=str(TINY / "checkpoint"), quantization="none", dtype="float32"),
        {"reward": run / "reward" / "adapter"},
    )
    view = staged.reward("reward")[0]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ((prompt, *replies),) = encode_records(staged.tokenizer, Data(path="x"), [(turns, *found["replies"])])
    assert found["ids"] == [prompt + reply for reply in replies]
    for row, score in zip(found["ids"], found["scores"], strict=True):
        assert row[-1] == staged.tokenizer.eos_token_id
        with torch.no_grad():
            assert view.scores(view.hidden_states(torch.tensor([row]))[0, -1]).item() == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_the_card_of_a_reward_model_that_transformers_has_no_class_for(
    merge: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code loads the class that came along, and gives the scores of the same model in Transformers' class."""
    classes = AutoModelForSequenceClassification._model_mapping
    monkeypatch.setattr(classes, "_extra_content", {})  # where the class is registered when it is loaded
    monkeypatch.chdir(tmp_path)
    scores = []
    for name in ("known", "unknown"):
        if name == "unknown":
            monkeypatch.setattr(classes, "_model_mapping", {**classes._model_mapping})
            del classes._model_mapping["llama"]
        export(run, "reward", tmp_path / name, merge=merge)
        text = card_of(tmp_path / name)[1]
        assert ("Transformers has no class for such a reward model" in text) is (name == "unknown")
        exec(re.findall("```python\n(.*?)```", text, re.DOTALL)[0], found := {})
        scores.append(found["scores"])
    assert type(found["model"].get_base_model() if not merge else found["model"]).__name__ == "RewardModel"
    assert scores[1] == pytest.approx(scores[0], abs=1e-2)  # in bfloat16


def test_a_card_shows_text_as_text_and_no_secret_or_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "do-not-tell-this")
    record = json.loads((run / "sft" / "stage.json").read_text())
    record["metrics"]["a|b<script>"] = 1.0
    record |= {"template_day": "2024-07-26", "inputs": record["inputs"] | {"data.chat": True}}
    recipe = (run / "recipe.yaml").read_text()
    told = "model:\n  chat_template_kwargs: {enable_thinking: false}\n"
    (run / "recipe.yaml").write_text(recipe.replace("model:\n", told, 1))
    record["inputs"]["trainer.note"] = "/home/me/secret/plan.txt do-not-tell-this\n| x |"
    (run / "sft" / "stage.json").write_text(json.dumps(record))
    export(run, "sft", tmp_path / "out")
    text = card_of(tmp_path / "out")[1]
    assert r"| a\|b\<script\> | 1 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| trainer.note")]
    assert line == r"| trainer.note | plan.txt \*\*\* \| x \| |" or line == r"| trainer.note | plan.txt *** \| x \| |"
    assert "do-not-tell-this" not in text and "/home" not in text
    assert 'It was told `{"enable_thinking": false}`' in text and "it writes 2024-07-26, as in training" in text


def test_the_licence_is_that_of_the_base_s_own_card(
    run: Path, checkpoints: Any, tmp_path: Path, make_artifacts: Callable
) -> None:
    from rlhf_pipeline.fingerprint import Digests

    folder = Path(shutil.copytree(checkpoints["llama"], tmp_path / "their base"))
    shutil.rmtree(run / "sft" / "adapter")
    shutil.copytree(make_artifacts("llama").init, run / "sft" / "adapter")
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub("(?m)^  path: .*checkpoint$", f"  path: {folder}", recipe.read_text(), count=1))
    record = json.loads((run / "sft" / "stage.json").read_text()) | {"artifact_files": {}}
    record["inputs"]["model"] = Digests().of_model(Model(path=str(folder)))
    (run / "sft" / "stage.json").write_text(json.dumps(record))
    export(run, "sft", tmp_path / "unknown")
    assert "license" not in card_of(tmp_path / "unknown")[0]
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: their-own\ntags: [x]\n---\n# Theirs\n")
    export(run, "sft", tmp_path / "known")
    head, text = card_of(tmp_path / "known")
    assert (head["license"], head["license_name"]) == ("other", "their-own")
    assert "`their-own`" in text and "`their base`" in text


def test_what_cannot_be_exported_is_said_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage `pop`") as caught:
        export(run, "pop", tmp_path / "out")
    assert caught.value.hint == "the stages are sft, reward, ppo, dpo"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        export(run, "sft", tmp_path / "full")
    record = json.loads((run / "dpo" / "stage.json").read_text())
    (run / "dpo" / "stage.json").write_text(json.dumps(record | {"state": "failed", "artifact": None}))
    with pytest.raises(InputError, match="`dpo` is not done but failed"):
        export(run, "dpo", tmp_path / "out")
    shutil.rmtree(run / "dpo")
    with pytest.raises(InputError, match="`dpo` is not done: it has not run yet"):
        export(run, "dpo", tmp_path / "out")
    with (run / "ppo" / "adapter" / "adapter_model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"?")
    with pytest.raises(InputError, match="is not what the stage wrote"):
        export(run, "ppo", tmp_path / "out")
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub("(?m)^  path: .*checkpoint$", f"  path: {tmp_path / 'gone'}", recipe.read_text(), count=1))
    with pytest.raises(InputError, match="base is not there any more"):
        export(run, "sft", tmp_path / "out")
    other = Path(shutil.copytree(TINY / "checkpoint", tmp_path / "gone"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"was trained on checkpoint@.* and the base is now gone@"):
        export(run, "sft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_stored_quantized_is_not_merged_into(
    make_artifacts: Callable, tmp_path: Path, out: Path
) -> None:
    artifacts = make_artifacts("llama")
    folder = Path(shutil.copytree(artifacts.spec.path, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="itself stored quantized"):
        write_merged(artifacts.spec.model_copy(update={"path": str(folder)}), artifacts.init, out, "causal", {})


# To the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as takes a new repository and small files."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False
        super().__init__(("127.0.0.1", 0), _Answers)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}/me/model"
        if self.server.refuses:
            return self._answer(403, {"error": "not yours"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(content))
            return self._answer(200, {"url": url, "id": "me/model", "name": "me/model"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(200, {"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self._answer(200, {"message": "valid"})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": [], "name": "me"})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_notarealtoken")
        yield server
        server.shutdown()


@pytest.mark.parametrize("public", [False, True])
def test_a_push_takes_every_file_to_the_hub_and_is_private_unless_asked(
    public: bool, run: Path, tmp_path: Path, hub: Hub
) -> None:
    export(run, "sft", tmp_path / "out", merge=True, n=0, push_to="me/model", public=public)
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("me", "model")
    assert (made.get("visibility") == "private" or made.get("private") is True) == (not public)
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert 'name = "me/model"' in written["README.md"].decode()


def test_a_push_that_fails_leaves_the_folder_and_one_sentence(run: Path, tmp_path: Path, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(RunError) as caught:
        export(run, "sft", tmp_path / "out", merge=True, n=0, push_to="me/model")
    assert "is written, but the hub did not take it" in caught.value.message
    assert "\n" not in caught.value.message and "hf_notarealtoken" not in caught.value.message
    assert str(caught.value.hint).startswith("`hf upload me/model")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_push_that_cannot_be_is_refused_before_any_work(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str, merge: bool = True) -> str:
        with pytest.raises(InputError) as caught:
            export(run, "sft", tmp_path / "out", merge=merge, n=0, push_to=repo)
        assert not (tmp_path / "out").exists()
        return caught.value.message

    assert "names no owner" in refused("model")
    assert "a b/c" in refused("a b/c")
    assert "a folder of this machine" in refused("me/model", merge=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "logged in" in refused("me/model")
    assert not hub.made
