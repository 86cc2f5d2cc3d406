"""Tiny checkpoints of real architectures: the same classes and options, and fit for every stage."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.smoke import shrink

pytestmark = pytest.mark.slow

LORA = {"r": 4, "target_modules": "all-linear"}
# What differs from the library's defaults, which are mostly of 7B models.
ARCHITECTURES = {
    "llama": {
        "num_key_value_heads": 8, "attention_bias": True, "hidden_act": "gelu",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"sliding_window": 4096},
    "ministral3": {},
    "qwen2": {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "tie_word_embeddings": True},
    "qwen2_moe": {},
    "qwen3": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8},
    "qwen3_next": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {},
    "gemma3": {},  # with a text model and a vision model nested in it
    "qwen3_5": {},  # the same, and its causal LM is the text model alone
    "phi": {},
    "phi3": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        },
    },
    "mixtral": {},
    "gpt_oss": {},
    "deepseek_v3": {},
    "gpt2": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt_neox": {},
    "gpt_neo": {},
    "gptj": {},
    "opt": {"hidden_size": 1024, "word_embed_proj_dim": 512, "num_hidden_layers": 24, "num_attention_heads": 16},
    "falcon": {"multi_query": True, "num_kv_heads": 1},
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "mpt": {"d_model": 4096, "n_heads": 32, "n_layers": 32},
    "olmo2": {},
    "olmo3": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    "smollm3": {},
}  # fmt: skip


@pytest.fixture
def write_config(tmp_path, tokenizer):
    """A function that writes a model's configuration and a tokenizer, and no weights."""

    def write(architecture: str, **options) -> Path:
        folder = tmp_path / architecture
        AutoConfig.for_model(architecture, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


def settings(config) -> dict:
    """The parts of a configuration that are no sizes: flags, names and fractions."""
    plain = {name: value for name, value in config.to_dict().items() if isinstance(value, (bool, str, float))}
    return {name: value for name, value in plain.items() if name not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shrunk_model_has_the_same_options_and_serves_every_stage(architecture, write_config, tmp_path):
    folder = write_config(architecture, **ARCHITECTURES[architecture])
    shrink.shrink(Model(path=str(folder)), tmp_path / "small")

    large, small = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(tmp_path / "small")
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(large)
    assert type(small) is type(large)
    for ours, theirs in ((small, large), (small.get_text_config(), large.get_text_config())):
        assert settings(ours) | {"dtype": None, "architectures": None} == settings(theirs) | {
            "dtype": None, "architectures": None
        }  # fmt: skip
    assert sum(parameter.numel() for parameter in real.parameters()) > 1e8

    spec = Model(path=str(tmp_path / "small"), quantization="nf4")
    words = load_tokenizer(spec)
    model = base.load_base(spec, words)
    assert type(model) is type(real)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e7
    ids = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    policy = adapters.with_policy_adapter(model, LORA, None)
    reply = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    assert reply.shape == (2, 43)
    loss = policy(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters() if p.requires_grad)
    reward = adapters.with_reward_adapter(base.load_base(spec, words, "score"), LORA, None)
    assert reward(input_ids=ids).logits.shape == (2, 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "opt", "mixtral"])
def test_every_module_that_lora_may_name_is_there(architecture, write_config, tmp_path):
    folder = write_config(architecture, **ARCHITECTURES[architecture])
    shrink.shrink(Model(path=str(folder)), tmp_path / "small")

    def names(path: Path) -> set[str]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        return {name.split(".")[-1] for name, _ in model.named_modules() if not name.split(".")[-1].isdigit()}

    assert names(tmp_path / "small") == names(folder)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (28, 4), (24, 8), (40, 8), (16, 1), (64, 4)])
def test_ratio_of_heads_is_kept(heads, kv_heads):
    large = AutoConfig.for_model("qwen3", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128)
    small = shrink.smaller(large)
    assert small.num_attention_heads / small.num_key_value_heads == heads / kv_heads
    assert (small.num_attention_heads * small.head_dim) % 64 == 0


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        # Llama's heads must divide the hidden states, and three cannot divide 64.
        ("llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}),
        ("cwm", {}),  # must have a token for the beginning of a text, and the tokenizer has none
        ("bamba", {"attn_layer_indices": [9, 18, 27]}),  # its heads of Mamba 2 make up its inner states
        ("zamba2", {}),  # its second hybrid layer shares the attention of the first
        ("dory", {}),  # its layers come in three parts, whose sizes make up their number
        ("kimi_linear", {}),
        ("dbrx", {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}, "n_heads": 48, "d_model": 6144}),
    ],
)
def test_sizes_that_depend_on_each_other_go_together(architecture, options, tmp_path):
    AutoConfig.for_model(architecture, **options).save_pretrained(tmp_path / "a")
    shrink.shrink(Model(path=str(tmp_path / "a")), tmp_path / "b", str(TINY / "checkpoint"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.num_parameters() < 2e6
    assert model(input_ids=torch.arange(5, 45)[None]).logits.isfinite().all()


def test_layers_that_take_keys_and_values_of_others_are_as_many_in_proportion():
    small = shrink.smaller(AutoConfig.for_model("gemma3n_text"))  # of 35 layers 15
    own = small.num_hidden_layers - small.num_kv_shared_layers
    assert 0 < small.num_kv_shared_layers < own
    assert set(small.layer_types[:own]) == {"sliding_attention", "full_attention"}
    assert set(small.intermediate_size) == {128}
    assert len(small.intermediate_size) == small.num_hidden_layers


def test_a_decoder_has_as_many_layers_as_its_cache():
    small = shrink.smaller(AutoConfig.for_model("bart"))
    assert small.decoder_layers == small.num_hidden_layers == 2


def test_sizes_that_do_not_go_together_are_said_in_one_sentence(tmp_path):
    AutoConfig.for_model("xlnet").save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"a small `xlnet` cannot be made: .*d_head"):
        shrink.shrink(Model(path=str(tmp_path / "a")), tmp_path / "b", str(TINY / "checkpoint"))


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("recurrent_gemma", "layers_block_type"),
        ("gemma3_text", "layer_types"),
        ("qwen3_next", "layer_types"),
        ("smollm3", "no_rope_layers"),
    ],
)
def test_every_kind_of_layer_is_there(architecture, key):
    large = AutoConfig.for_model(architecture)
    small = shrink.smaller(large)
    kinds = getattr(small, key)
    assert len(kinds) == small.num_hidden_layers < large.num_hidden_layers
    assert set(kinds) == set(getattr(large, key))
    assert shrink.smaller(large, all_layers=True).num_hidden_layers == large.num_hidden_layers


def test_same_model_gives_the_same_weights_and_files_that_load_anywhere(write_config, tmp_path):
    folder = write_config("llama", pad_token_id=0, eos_token_id=1, bos_token_id=None, vocab_size=1024)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 2]}))
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        shrink.shrink(Model(path=str(folder)), tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert json.loads((tmp_path / "first" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    words, own = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "first", folder))
    assert words.get_vocab() == own.get_vocab()
    assert words.chat_template == own.chat_template
    assert AutoConfig.from_pretrained(tmp_path / "first").vocab_size == 1024  # none to spare, as in the model


def test_another_tokenizer_brings_its_vocabulary_and_its_special_tokens(tmp_path):
    AutoConfig.for_model("llama", bos_token_id=31999, eos_token_id=31998, pad_token_id=31997).save_pretrained(
        tmp_path / "a"
    )
    shrink.shrink(Model(path=str(tmp_path / "a")), tmp_path / "b", str(TINY / "checkpoint"))
    config = AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    assert 1024 <= config.vocab_size < 2000


def test_checkpoint_with_quantized_weights_is_shrunk_and_says_so(write_config, tmp_path):
    folder = write_config("llama")
    file = folder / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantized}))
    notes = shrink.shrink(Model(path=str(folder)), tmp_path / "small")
    assert "quantized already" in notes[0]
    assert "quantization_config" not in (tmp_path / "small" / "config.json").read_text()


class TestRefusals:
    def test_folder_that_holds_something(self, write_config, tmp_path):
        folder, out = write_config("llama"), tmp_path / "out"
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        with pytest.raises(InputError, match="exists already"):
            shrink.shrink(Model(path=str(folder)), out)
        assert [file.name for file in out.iterdir()] == ["mine.txt"]

    def test_model_without_tokenizer(self, tmp_path):
        AutoConfig.for_model("llama").save_pretrained(tmp_path / "a")
        with pytest.raises(InputError, match="no tokenizer could be loaded"):
            shrink.shrink(Model(path=str(tmp_path / "a")), tmp_path / "b")
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize(("trusted", "message"), [(False, "not run unless"), (True, "comes with the model")])
    def test_model_that_brings_its_own_code(self, tmp_path, tokenizer, trusted, message):
        folder = tmp_path / "a"
        tokenizer.save_pretrained(folder)
        auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
        (folder / "own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
            "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        with pytest.raises(InputError, match=message):
            shrink.shrink(Model(path=str(folder), trust_remote_code=trusted), tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_model_that_stays_large(self, write_config, tmp_path, monkeypatch):
        folder = write_config("llama")
        monkeypatch.setattr(shrink, "LARGEST", 10_000)
        with pytest.raises(InputError, match=r"would still be \[\d+, \d+\]"):
            shrink.shrink(Model(path=str(folder)), tmp_path / "b")
