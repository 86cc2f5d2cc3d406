"""The base is loaded frozen, quantized where asked, with its heads whole and no surprise left in it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bitsandbytes as bnb
import huggingface_hub
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    Cohere2MoeConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    ViTConfig,
)

import rlhf_pipeline.models.tiny
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters, base, loading
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model

SHIPPED = Path(rlhf_pipeline.models.tiny.__file__).parent / "checkpoint"
BLOCKS = {"llama": 2 * 7, "qwen3": 2 * 7, "gpt2": 2 * 4}  # linear layers in two decoder layers


def layers_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


class TestQuantization:
    @pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
    def test_nf4_quantizes_the_blocks_and_no_head(self, checkpoints, tokenizer, shape):
        """All linear layers of the blocks are 4-bit NF4 with double quantization; the head is an ordinary layer."""
        model = base.load_base(Model(path=str(checkpoints[shape]), quantization="nf4"), tokenizer)
        quantized = layers_of(model, bnb.nn.Linear4bit)
        assert len(quantized) == BLOCKS[shape]
        assert layers_of(model, torch.nn.Linear) - quantized == {"lm_head"}
        assert model.lm_head.weight.dtype == torch.float32
        for name in quantized:
            weight = model.get_submodule(name).weight
            assert weight.dtype == torch.uint8
            assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)

    @pytest.mark.parametrize("shape", ["llama", "gpt2"])
    def test_nf4_leaves_the_score_head_whole(self, checkpoints, tokenizer, shape):
        """A sequence classifier's head has one output in full precision."""
        model = base.load_base(Model(path=str(checkpoints[shape]), quantization="nf4"), tokenizer, "score")
        assert layers_of(model, torch.nn.Linear) - layers_of(model, bnb.nn.Linear4bit) == {"score"}
        assert model.score.weight.shape == (1, 32)
        assert model.score.weight.dtype == torch.float32

    @torch.no_grad()
    @pytest.mark.parametrize(("quantization", "layer"), [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
    def test_quantized_shipped_checkpoint_speaks_nearly_as_the_whole_one(self, tokenizer, quantization, layer):
        """On a question of the tiny world, logits point where the unquantized ones point."""
        inputs = tokenizer("Q: What color is a lemon?\nA: It is yellow.", return_tensors="pt")
        whole = base.load_base(Model(path=str(SHIPPED), quantization="none"), tokenizer)
        quantized = base.load_base(Model(path=str(SHIPPED), quantization=quantization), tokenizer)
        assert layers_of(quantized, layer)
        assert not layers_of(whole, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        expected, logits = whole(**inputs).logits, quantized(**inputs).logits
        cosine = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
        assert cosine.min() > (0.99 if quantization == "int8" else 0.9)
        assert not torch.equal(logits, expected)


class TestLoadBase:
    @pytest.mark.parametrize("head", ["causal", "score"])
    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_base_is_frozen_in_evaluation_mode_with_our_padding(self, checkpoints, tokenizer, quantization, head):
        """Nothing trains, nothing drops out, and padding is the tokenizer's."""
        model = base.load_base(Model(path=str(checkpoints["gpt2"]), quantization=quantization), tokenizer, head)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.device == base.device()

    @torch.no_grad()
    def test_weights_are_those_of_the_checkpoint(self, checkpoints, tokenizer, batch):
        """Unquantized, the base says exactly what Transformers alone would say."""
        model = base.load_base(Model(path=str(checkpoints["qwen3"]), quantization="none"), tokenizer)
        expected = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"])(**batch).logits
        assert_close(model(**batch).logits, expected, rtol=0, atol=0)

    def test_generation_settings_are_reset(self, checkpoints, tokenizer, tmp_path):
        """No sampling setting of the checkpoint survives; what ends its texts does, beside the tokenizer's EOS."""
        spec = Model(path=str(checkpoints["llama"]), quantization="none")
        original = base.load_base(spec, tokenizer)
        original.generation_config.update(
            do_sample=True, repetition_penalty=3.0, top_p=0.5, temperature=0.2, eos_token_id=[1, 7]
        )
        original.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_p == 0.5
        settings = base.load_base(Model(path=str(tmp_path), quantization="none"), tokenizer).generation_config
        for name in ("do_sample", "repetition_penalty", "top_p", "temperature"):
            assert getattr(settings, name) is None, name
        assert (settings.eos_token_id, settings.pad_token_id) == ([tokenizer.eos_token_id, 7], tokenizer.pad_token_id)


class TestDtype:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")
    def test_cpu_computes_in_float32_and_refuses_float16(self):
        """`auto` on a CPU is float32; float16 is an input error with its place."""
        assert base.resolve_dtype("auto") == torch.float32
        with pytest.raises(InputError) as error:
            base.resolve_dtype("float16")
        assert error.value.place == "model.dtype"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="says what holds on a GPU")
    def test_gpu_computes_in_bfloat16_where_it_can(self):
        """`auto` on a GPU with bfloat16 is bfloat16, and float16 may be asked for."""
        expected = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        assert base.resolve_dtype("auto") == expected
        assert base.resolve_dtype("float16") == torch.float16

    @pytest.mark.parametrize("name", ["float32", "bfloat16"])
    def test_asked_dtype_is_the_dtype_of_the_weights(self, checkpoints, tokenizer, name):
        """An explicit dtype is what the base is loaded in."""
        spec = Model(path=str(checkpoints["llama"]), quantization="none", dtype=name)
        assert {p.dtype for p in base.load_base(spec, tokenizer).parameters()} == {getattr(torch, name)}


class TestLoadConfig:
    @pytest.mark.parametrize("config", [ViTConfig(), CLIPVisionConfig()], ids=["vit", "clip"])
    def test_model_that_reads_no_text_is_refused(self, tmp_path, config):
        """An image model is no causal LM."""
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=config.model_type) as error:
            base.load_config(Model(path=str(tmp_path)))
        assert str(tmp_path) in error.value.place

    def test_folder_without_a_model_is_refused(self, tmp_path):
        """A wrong path is the user's error, in one line."""
        with pytest.raises(InputError) as error:
            base.load_config(Model(path=str(tmp_path)))
        assert "\n" not in str(error.value)
        assert error.value.hint


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cached(tmp_path, monkeypatch, checkpoints):
    """A hub cache that holds two commits of one model, of which the newer has another architecture."""
    repository = tmp_path / "hub" / "models--org--base"
    shutil.copytree(checkpoints["qwen3"], repository / "snapshots" / OLD)
    shutil.copytree(checkpoints["llama"], repository / "snapshots" / NEW)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.fixture
def online(monkeypatch):
    """A function that lets the hub library ask at an address, which it otherwise settles when it is imported."""

    def reach(address):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()

    yield reach
    huggingface_hub.close_session()


@pytest.fixture
def closed(online):
    """The address of a hub behind which nobody listens."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        online(f"http://127.0.0.1:{port.getsockname()[1]}")


class TestHub:
    @pytest.mark.parametrize(("revision", "kind"), [(OLD, "qwen3"), (NEW, "llama"), (None, "llama")])
    def test_exactly_the_named_commit_is_loaded(self, cached, revision, kind):
        """Configuration, tokenizer, weights and the model without weights are all of that commit."""
        spec = Model(path="org/base", revision=revision, quantization="none")
        commit = revision or NEW
        config = json.loads((cached / "snapshots" / commit / "tokenizer_config.json").read_text())
        (cached / "snapshots" / commit / "tokenizer_config.json").write_text(json.dumps(config | {"own": commit}))
        assert base.load_config(spec).model_type == kind
        tokenizer = load_tokenizer(spec)
        assert tokenizer.init_kwargs["own"] == commit
        model = base.load_base(spec, tokenizer)
        theirs = AutoModelForCausalLM.from_pretrained(cached / "snapshots" / commit)
        assert base.checksum(list(model.parameters())) == base.checksum(list(theirs.parameters()))
        with torch.device("meta"):
            assert base.without_weights(spec, "score").config.model_type == kind

    def test_without_network_a_model_that_is_not_there_is_refused_at_once(self, closed, tmp_path, monkeypatch):
        """The library alone would try for half a minute."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        started = time.monotonic()
        for load in (base.load_config, load_tokenizer):
            with pytest.raises(InputError, match="can be reached") as error:
                load(Model(path="org/none"))
            assert error.value.place == "model.path: org/none" and "network" in error.value.hint
        assert time.monotonic() - started < 3

    def test_without_network_a_model_in_the_cache_is_loaded_at_once(self, closed, cached):
        """Also what the library would ask the hub for, because the cache does not know whether it exists."""
        spec = Model(path="org/base", revision=OLD, quantization="none")
        started = time.monotonic()
        model = base.load_base(spec, load_tokenizer(spec))
        assert time.monotonic() - started < 5
        assert model.config.model_type == "qwen3"

    def test_what_a_model_in_the_cache_lacks_is_told_without_loading_it(self, closed, cached):
        spec = Model(path="org/base", revision=OLD, quantization="none")
        config = cached / "snapshots" / OLD / "config.json"
        loading.require_weights(spec, base.load_config(spec))
        content = json.loads(config.read_text())
        layers = content["num_hidden_layers"]
        config.unlink()
        config.write_text(json.dumps(content | {"num_hidden_layers": layers + 1, "layer_types": None}))
        with pytest.raises(InputError, match=rf"lacks `model\.layers\.{layers}\.input_layernorm\.weight` and"):
            loading.require_weights(spec, base.load_config(spec))

    @pytest.mark.parametrize(
        ("files", "said", "hint"),
        [
            (
                ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
                r"pickle, pytorch_model-00001-of-00002\.bin, which can run any code",
                "save_pretrained",
            ),
            (["adapter_config.json", "adapter_model.safetensors"], "org/base is an adapter, not a model", "`init`"),
            (["README.md", "base-q4.gguf"], "org/base holds a model as GGUF", "config.json"),
        ],
    )
    def test_a_hub_model_in_another_format_is_refused_before_anything_is_downloaded(self, online, files, said, hint):
        """One question tells; the sentence says why and what to do."""
        asked = []

        class Hub(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                body = json.dumps({"id": "org/base", "sha": OLD, "siblings": [{"rfilename": file} for file in files]})
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
            threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
            online(f"http://127.0.0.1:{hub.server_address[1]}")
            with pytest.raises(InputError, match=said) as error:
                base.load_config(Model(path="org/base", revision=OLD))
            hub.shutdown()
        assert hint in error.value.hint
        assert [path for path in asked if "agent" not in path] == [f"/api/models/org/base/revision/{OLD}"]


class Marking:
    """A pickle of this leaves a mark where it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def marking(tmp_path, checkpoints):
    """A model folder to spoil, a mark that must not appear, and a function that writes a pickle that would make it."""
    folder, mark = Path(shutil.copytree(checkpoints["llama"], tmp_path / "model")), tmp_path / "mark"

    def write(file):
        torch.save({"weight": Marking(mark)}, file)
        torch.load(file, weights_only=False)
        mark.rmdir()  # it does leave its mark

    return folder, mark, write


class TestPickles:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
    def test_a_folder_of_pickles_is_refused_unopened(self, marking, tokenizer, name):
        folder, mark, write = marking
        write(folder / name)
        (folder / "model.safetensors").unlink()
        for load in (base.load_config, load_tokenizer, lambda spec: base.load_base(spec, tokenizer)):
            with pytest.raises(InputError, match="pickle") as error:
                load(Model(path=str(folder), quantization="none"))
            assert name in error.value.message and "save_pretrained" in error.value.hint
        assert not mark.exists()

    def test_beside_safetensors_a_pickle_is_not_opened(self, marking, tokenizer):
        folder, mark, write = marking
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            write(folder / name)
        assert base.load_base(Model(path=str(folder), quantization="none"), tokenizer)
        assert not mark.exists()

    def test_an_adapter_beside_the_model_is_refused_unopened(self, marking, tokenizer):
        """Transformers would put it on the base; where it has no safetensors, from a pickle."""
        folder, mark, write = marking
        write(folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
        with pytest.raises(InputError, match="adapter") as error:
            base.load_base(Model(path=str(folder), quantization="none"), tokenizer)
        assert "merge_and_unload" in error.value.hint
        assert not mark.exists()

    def test_an_artifact_is_never_read_from_a_pickle(self, marking, tokenizer, make_artifacts, tmp_path):
        _, mark, write = marking
        artifacts = make_artifacts()
        for artifact in (artifacts.init, artifacts.reward):
            folder = Path(shutil.copytree(artifact, tmp_path / artifact.name))
            (folder / "adapter_model.safetensors").unlink()
            write(folder / "adapter_model.bin")
            model = base.load_base(artifacts.spec, tokenizer)
            lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
            with pytest.raises(FileNotFoundError, match="adapter_model"):
                adapters.with_policy_adapter(model, lora, folder)
            with pytest.raises(FileNotFoundError, match="adapter_model"):
                adapters.load_head(folder)
        assert not mark.exists()


class TestCodeOfTheModelsOwn:
    @pytest.fixture
    def coded(self, tmp_path, checkpoints):
        """A function that says in a model's configuration that its classes come with it; the code leaves a mark."""
        folder = Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")

        def write(**changes):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changes))
            return Model(path=str(folder), quantization="none"), tmp_path / "mark"

        return write

    def test_it_is_not_run_unless_the_recipe_says_so(self, coded):
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        spec, mark = coded(model_type="own", auto_map=auto_map)
        with pytest.raises(InputError, match="Python code that comes with it") as error:
            base.load_config(spec)
        assert "`model.trust_remote_code: true`" in error.value.hint
        assert not mark.exists()

    def test_a_class_of_its_own_for_a_known_configuration_is_not_run_either(self, coded):
        """The configuration loads, and only the model's class would be the model's own."""
        spec, mark = coded(model_type="vit", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
        with pytest.raises(InputError, match="Python code that comes with it"):
            base.load_config(spec)
        assert not mark.exists()

    def test_where_transformers_has_the_class_too_it_takes_its_own(self, coded, tokenizer):
        spec, mark = coded(auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
        assert isinstance(base.load_base(spec, tokenizer), LlamaForCausalLM)
        assert not mark.exists()

    def test_trust_in_a_model_without_code_changes_nothing(self, coded, tokenizer):
        spec, mark = coded()
        trusting = spec.model_copy(update={"trust_remote_code": True})
        models = [base.load_base(one, load_tokenizer(one)) for one in (spec, trusting)]
        assert base.checksum(list(models[0].parameters())) == base.checksum(list(models[1].parameters()))
        assert not mark.exists()

    @pytest.mark.slow
    def test_of_a_hub_model_the_code_of_the_named_commit_is_run(self, checkpoints, tmp_path):
        """Wherever the model is made, with weights or without; in a process of its own, which keeps what it imports."""
        repository = tmp_path / "hf" / "hub" / "models--org--base"
        for commit in (OLD, NEW):
            folder = Path(shutil.copytree(checkpoints["llama"], repository / "snapshots" / commit))
            config = json.loads((folder / "config.json").read_text())
            own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
            (folder / "own.py").write_text(
                "from transformers import LlamaConfig, LlamaForCausalLM\n"
                "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
                "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
                f"print({commit!r})\n"
            )
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(NEW)
        program = (
            "from rlhf_pipeline.models import base\nfrom rlhf_pipeline.models.tokenizer import load_tokenizer\n"
            "from rlhf_pipeline.recipe.schema import Model\n"
            f"spec = Model(path='org/base', revision={OLD!r}, quantization='none', trust_remote_code=True)\n"
            "models = [base.without_weights(spec), base.without_weights(spec)]\n"
            "models += [base.load_base(spec, load_tokenizer(spec))]\n"
            "print(*(type(model).__name__ for model in models))\n"
        )
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        assert set(done.stdout.splitlines()) == {OLD, "OwnModel OwnModel OwnModel"}, done.stderr


SMALL = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def logits_and_states(model, batch):
    """A model's own logits of a row without padding, and the last hidden states it makes them of."""
    ids = batch["input_ids"][:1]
    output = model(input_ids=ids, output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


class TestFindHead:
    @torch.no_grad()
    @pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2", "mistral"])
    def test_plain_head_is_the_output_embedding(self, checkpoints, tokenizer, batch, shape):
        """Where nothing comes after the output embedding, it is the head itself."""
        model = base.load_base(Model(path=str(checkpoints[shape]), quantization="none"), tokenizer)
        head = base.find_head(model)
        assert head is model.get_output_embeddings()
        logits, states = logits_and_states(model, batch)
        assert_close(head(states), logits, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "config",
        [
            GraniteConfig(**SMALL, logits_scaling=4.0),
            CohereConfig(**SMALL, logit_scale=0.25),
            Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0),
            GraniteMoeConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, logits_scaling=4.0),
            Cohere2MoeConfig(**SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1, logit_scale=0.25),
            Gemma4TextConfig(
                **SMALL, num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=SMALL["vocab_size"], final_logit_softcapping=5.0,
            ),
        ],
        ids=["granite", "cohere", "gemma2", "granitemoe", "cohere2_moe", "gemma4"],
    )  # fmt: skip
    def test_scaled_and_capped_logits_are_the_models_own(self, batch, config):
        """What scales or caps logits after the output embedding is part of the head, for any number of rows."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        backbone, head = model.base_model, base.find_head(model)
        logits, states = logits_and_states(model, batch)
        assert not torch.allclose(model.get_output_embeddings()(states), logits, atol=1e-2)
        assert_close(head(states), logits, rtol=1e-5, atol=1e-5)
        assert_close(head(states[3:4]), logits[3:4], rtol=1e-5, atol=1e-5)
        assert model.base_model is backbone

    @torch.no_grad()
    def test_weak_cap_on_small_logits_is_seen(self, batch):
        """A cap of 30 moves the logits of an untrained model by next to nothing, and those of a trained one by much."""
        config = Gemma2Config(**SMALL | {"initializer_range": 0.02}, num_key_value_heads=2, head_dim=8)
        assert config.final_logit_softcapping == 30
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        head = base.find_head(model)
        states = 1000 * logits_and_states(model, batch)[1]
        assert model.get_output_embeddings()(states).abs().max() > 60
        assert head(states).abs().max() <= 30

    def test_backbone_returns_after_an_error(self, batch):
        """The stand-in is gone also when the head cannot compute."""
        model = AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=4.0)).eval()
        backbone, head = model.base_model, base.find_head(model)
        with pytest.raises(RuntimeError):
            head(torch.zeros(2, 31))
        assert model.base_model is backbone

    def test_gradient_by_hidden_states(self):
        """The head of a model that caps its logits is differentiated through the cap."""
        config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
        model = AutoModelForCausalLM.from_config(config).eval()
        states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (given,) = torch.autograd.grad(base.find_head(model)(states).sum(), states)
        (expected,) = torch.autograd.grad((5 * torch.tanh(model.lm_head(states) / 5)).sum(), states)
        assert_close(given, expected, rtol=1e-5, atol=1e-5)

    def test_model_that_uses_more_than_hidden_states_is_refused(self):
        """Logits that also depend on the row's tokens cannot be made of hidden states alone."""

        class Biased(LlamaForCausalLM):
            def forward(self, input_ids=None, **inputs):
                output = super().forward(input_ids=input_ids, **inputs)
                output.logits = output.logits + input_ids[..., None]
                return output

        model = Biased(LlamaConfig(**SMALL)).eval()
        with pytest.raises(ValueError, match="Biased"):
            base.find_head(model)


class TestRemoveDropout:
    @torch.no_grad()
    @pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModelForSequenceClassification])
    def test_training_mode_says_what_evaluation_mode_says(self, batch, head):
        """OPT passes its dropout to a function, where no module can be found to switch off."""
        config = OPTConfig(
            vocab_size=1024, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, dropout=0.5, attention_dropout=0.5, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = head.from_config(config)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = model.eval()(**inputs).logits
        assert not torch.allclose(model.train()(**inputs).logits, expected)
        base.remove_dropout(model)
        assert_close(model.train()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "config",
        [
            FalconConfig(
                **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
                hidden_dropout=0.5,
                attention_dropout=0.5,
            ),
            OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=64, dropout=0.0, layerdrop=0.5),
        ],
        ids=["read from the configuration", "of whole layers"],
    )
    def test_dropout_under_other_names(self, batch, config):
        """Falcon reads its dropout from the configuration at every call, and OPT can leave out whole layers."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = model.eval()(**inputs).logits
        model.train()
        assert not all(torch.allclose(model(**inputs).logits, expected, atol=1e-3) for _ in range(10))
        base.remove_dropout(model)
        for _ in range(10):
            assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_dropout_modules_are_switched_off(self, checkpoints, batch):
        """GPT-2 keeps its dropout in modules, and has some by default."""
        model = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
        expected = model.eval()(**batch).logits
        assert not torch.allclose(model.train()(**batch).logits, expected)
        base.remove_dropout(model)
        assert_close(model.train()(**batch).logits, expected, rtol=1e-5, atol=1e-5)


class TestChecksum:
    def test_equal_tensors_have_equal_checksums(self):
        """The checksum depends on the numbers alone."""
        tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
        assert base.checksum([tensor]) == base.checksum([tensor.clone()])
        assert base.checksum([tensor.T]) == base.checksum([tensor.T.contiguous()])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_single_change_shows(self, dtype):
        """A change of one number among many is noticed, whichever number it is."""
        tensor = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = base.checksum([tensor])
        unnoticed = []
        for i in range(len(tensor)):
            changed = tensor.clone()
            changed[i] += 1
            if base.checksum([changed]) == before:
                unnoticed.append(i)
        assert unnoticed == []

    def test_order_shows(self):
        """The same numbers in another place are another model, within a tensor and across tensors."""
        one, other = torch.arange(4.0), torch.arange(4.0) + 1
        assert base.checksum([one, other]) != base.checksum([other, one])
        assert base.checksum([one]) != base.checksum([one.flip(0)])
