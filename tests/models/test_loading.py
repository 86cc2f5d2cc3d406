"""A checkpoint gives the weights that are in it, all of them and as they are stored; anything else is an error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.models import base, loading
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.stages.check import check

Weights = dict[str, Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def with_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def with_another(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model with an output embedding of its own."""
    out = Path(shutil.copytree(TINY / "checkpoint", tmp_path / "model"))
    AutoModelForCausalLM.from_pretrained(out, tie_word_embeddings=False).save_pretrained(out)
    return out


@pytest.fixture
def change(folder: Path) -> Callable[[Callable[[Weights], Weights]], Model]:
    """A function that changes its weights."""

    def changed(how: Callable[[Weights], Weights]) -> Model:
        save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        return Model(path=str(folder), quantization="none")

    return changed


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (without("lm_head"), "it lacks `lm_head.weight`, which would be drawn at random"),
        (without("layers.1."), "it lacks `model.layers.1.input_layernorm.weight` and 8 more weights, which"),
        (without(LAYER), f"it lacks `{LAYER}`, which"),
        (
            with_prefix("module."),
            "and has `module.lm_head.weight` and 29 more weights, for which the model has no place",
        ),
        (
            with_another("model.layers.9.mlp.up_proj.weight"),
            "it has `model.layers.9.mlp.up_proj.weight`, for which the",
        ),
        (with_another("model.layers.0.self_attn.q_proj.bias"), "it has `model.layers.0.self_attn.q_proj.bias`, for"),
        (
            lambda weights: weights | {LAYER: torch.zeros(4, 128)},
            f"another shape: `{LAYER}` is [4, 128] and should be [",
        ),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_are_missing_or_others_are_named(change, how, said, quantization) -> None:
    """By the check, which reads no weight, and by what loads it, in the same words."""
    spec = change(how).model_copy(update={"quantization": quantization})
    messages = []
    for load in (
        lambda: loading.require_weights(spec, base.load_config(spec)),
        lambda: base.load_base(spec, load_tokenizer(spec)),
        lambda: base.load_base(spec, load_tokenizer(spec), head="score"),
    ):
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            load()
        messages.append(caught.value.message)
        assert "the checkpoint is not that of a LlamaForCausalLM: " in caught.value.message
    assert len(set(messages)) == 1


def test_weights_of_another_architecture(folder: Path) -> None:
    (folder / "config.json").unlink()
    AutoConfig.for_model(
        "opt", vocab_size=1024, hidden_size=128, num_attention_heads=4, num_hidden_layers=3
    ).save_pretrained(folder)
    spec = Model(path=str(folder), quantization="none")
    with pytest.raises(
        InputError, match=r"not that of a OPTForCausalLM: it lacks .* and has .* for which the model has"
    ):
        loading.require_weights(spec, base.load_config(spec))


@pytest.mark.parametrize(
    "how",
    [
        lambda weights: weights,
        lambda weights: {
            name.removeprefix("model."): weight for name, weight in weights.items()
        },  # Transformers adds it
        with_another("model.layers.0.self_attn.rotary_emb.inv_freq"),
        with_another("model.layers.0.attn.masked_bias"),
    ],
)
def test_whole_checkpoints_are_taken(change, how) -> None:
    spec = change(how)
    loading.require_weights(spec, base.load_config(spec))
    assert base.load_base(spec, load_tokenizer(spec)) is not None


def test_tied_weights_need_not_be_stored() -> None:
    assert "lm_head.weight" not in load_file(TINY / "checkpoint" / "model.safetensors")
    spec = Model(path=str(TINY / "checkpoint"), quantization="none")
    loading.require_weights(spec, base.load_config(spec))
    base.load_base(spec, load_tokenizer(spec))


def test_the_check_of_a_recipe_says_it_before_anything_runs(change, folder: Path) -> None:
    change(without("lm_head"))
    recipe = recipes.load("tiny", [f"model.path={folder}"])
    with pytest.raises(InputErrors, match=r"lacks `lm_head\.weight`"):
        check(recipe, list(recipe.stages))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path, kind: str) -> None:
    """Transformers loads BERT as a causal LM and only warns where it is none."""
    out = Path(shutil.copytree(TINY / "checkpoint", tmp_path / "model"))
    sizes = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for is_decoder in (False, True):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, intermediate_size=64, is_decoder=is_decoder, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(out)
        spec = Model(path=str(out), quantization="none")
        if is_decoder:
            base.load_base(spec, load_tokenizer(spec))
        else:
            with pytest.raises(InputError, match=r"(LMHeadModel|ForCausalLM) sees"):
                base.load_base(spec, load_tokenizer(spec))


def test_weights_that_are_not_numbers_are_refused(change) -> None:
    spec = change(lambda weights: weights | {LAYER: weights[LAYER] * torch.nan})
    with pytest.raises(InputError, match="it computes numbers that are not finite"):
        base.load_base(spec, load_tokenizer(spec))


# Weights that are stored in few bits


def stored(folder: Path, quantization: BitsAndBytesConfig) -> Path:
    """The tiny model as bitsandbytes stores it."""
    out = Path(shutil.copytree(TINY / "checkpoint", folder / "stored"))
    AutoModelForCausalLM.from_pretrained(out, quantization_config=quantization).save_pretrained(out)
    return out


def nf4(**more: object) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **more)


@pytest.mark.parametrize(
    ("quantization", "how", "kind"),
    [
        ("nf4", nf4(bnb_4bit_compute_dtype=torch.bfloat16), bnb.nn.Linear4bit),
        ("nf4", nf4(llm_int8_skip_modules=["lm_head"], bnb_4bit_use_double_quant=True), bnb.nn.Linear4bit),
        ("int8", BitsAndBytesConfig(load_in_8bit=True), bnb.nn.Linear8bitLt),
    ],
)
def test_stored_quantization_is_used_as_it_is_stored(tmp_path, quantization, how, kind) -> None:
    """Its logits are those of Transformers alone, computed in the recipe's dtype; the score head stays whole."""
    folder = stored(tmp_path, how)
    spec, ids = Model(path=str(folder), quantization=quantization, dtype="float32"), torch.arange(5, 25)[None]
    model = base.load_base(spec, load_tokenizer(spec))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, kind)
    if quantization == "nf4":
        assert layer.compute_dtype in (None, torch.float32)
        assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["bnb_4bit_compute_dtype"] = "float32"
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    scorer = base.load_base(spec, load_tokenizer(spec), head="score")
    assert type(scorer.score) is torch.nn.Linear
    assert scorer.score.weight.dtype == torch.float32


def test_four_bits_stay_as_they_are_on_a_processor_with_avx512_bf16(tokenizer, monkeypatch) -> None:
    """There bitsandbytes would pack them anew at the first pass without gradients, and let no gradient through."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = base.load_base(Model(path=str(TINY / "checkpoint"), quantization="nf4", dtype="float32"), tokenizer)
    layer = model.model.layers[0].mlp.up_proj
    before, ids = layer.weight.data.clone(), torch.arange(5, 25)[None]
    with torch.no_grad():
        one = model(input_ids=ids).logits
    assert torch.equal(layer.weight.data, before)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    again = model(inputs_embeds=embedded).logits
    assert torch.equal(again, one)
    (gradient,) = torch.autograd.grad(again.logsumexp(-1).sum(), embedded)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    ("quantization", "how", "said"),
    [
        ("none", nf4(), "stored in nf4, and `quantization` is none"),
        ("int8", nf4(), "stored in nf4, and `quantization` is int8"),
        ("nf4", BitsAndBytesConfig(load_in_8bit=True), "stored in int8, and `quantization` is nf4"),
        ("nf4", BitsAndBytesConfig(load_in_4bit=True), "stored in fp4, over which adapters are not trained"),
    ],
)
def test_stored_quantization_is_never_another(tmp_path, quantization, how, said) -> None:
    folder = stored(tmp_path, how)
    recipe = recipes.load("tiny", [f"model.path={folder}", f"model.quantization={quantization}"])
    with pytest.raises(InputErrors, match=said):
        check(recipe, list(recipe.stages))
    with pytest.raises(InputError, match=said):
        base.load_base(recipe.model, load_tokenizer(recipe.model))


QUANTIZED = {"nf4": nf4(bnb_4bit_use_double_quant=True), "int8": BitsAndBytesConfig(load_in_8bit=True)}


OF_BOTH = [
    (without("layers.1."), "it lacks `model.layers.1.input_layernorm.weight` and 8 more weights, which"),
    (without("model.norm"), "it lacks `model.norm.weight`, which would be drawn at random"),
    (with_another("model.layers.9.mlp.up_proj.weight"), "it has `model.layers.9.mlp.up_proj.weight`, for which"),
    (with_another("model.norm.weight"), "another shape: `model.norm.weight` is [3] and should be [128]"),
]


@pytest.mark.parametrize(
    ("quantization", "how", "said"),
    [
        *(("nf4", how, said) for how, said in OF_BOTH),
        *(("int8", how, said) for how, said in OF_BOTH),
        ("nf4", without(LAYER + ".absmax"), f"has `{LAYER}` only in part: `{LAYER}.absmax` is missing"),
        ("int8", without("1.mlp.up_proj.SCB"), f"has `{LAYER}` only in part: `model.layers.1.mlp.up_proj.SCB` is"),
    ],
)
def test_what_is_missing_from_weights_in_few_bits_is_named(tmp_path, quantization, how, said) -> None:
    """By the check, which reads no weight, and by what loads them, in the same words."""
    file = stored(tmp_path, QUANTIZED[quantization]) / "model.safetensors"
    save_file(how(load_file(file)), file, {"format": "pt"})
    spec = Model(path=str(file.parent), quantization=quantization)
    with pytest.raises(InputError, match=re.escape(said)):
        loading.require_weights(spec, base.load_config(spec))
    with pytest.raises(InputError, match=re.escape(said)):
        base.load_base(spec, load_tokenizer(spec))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_weight_that_is_whole_though_it_should_not_be(tmp_path, quantization) -> None:
    folder, whole = stored(tmp_path, QUANTIZED[quantization]), load_file(TINY / "checkpoint" / "model.safetensors")
    weights = without(LAYER.removesuffix("weight"))(load_file(folder / "model.safetensors")) | {LAYER: whole[LAYER]}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    spec = Model(path=str(folder), quantization=quantization)
    with pytest.raises(InputError, match=f"`{LAYER}` is stored whole") as caught:
        base.load_base(spec, load_tokenizer(spec))
    assert f"add `{LAYER.removesuffix('.weight')}` to `llm_int8_skip_modules`" in str(caught.value.hint)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_layers_that_are_stored_the_other_way_round(tmp_path, quantization) -> None:
    """GPT-2's, whose weights are transposed as they are quantized."""
    torch.manual_seed(0)
    out = Path(shutil.copytree(TINY / "checkpoint", tmp_path / "model"))
    config = AutoConfig.for_model("gpt2", vocab_size=1024, n_embd=64, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=QUANTIZED[quantization]).eval()
    theirs.save_pretrained(out)
    spec, ids = Model(path=str(out), quantization=quantization, dtype="float32"), torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert torch.equal(base.load_base(spec, load_tokenizer(spec))(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("method", "quantization"),
    [*((method, "none") for method in ("fp8", "gptq", "awq", "compressed-tensors", "mxfp4")),
     ("gptq", "nf4"), ("gptq", "int8")],
)  # fmt: skip
def test_other_stored_quantizations_are_refused(folder: Path, method: str, quantization: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    recipe = recipes.load("tiny", [f"model.path={folder}", f"model.quantization={quantization}"])
    with pytest.raises(InputErrors, match=f"stored quantized by `{method}`"):
        check(recipe, list(recipe.stages))
    with pytest.raises(InputError, match=f"stored quantized by `{method}`"):
        base.load_base(recipe.model, load_tokenizer(recipe.model))


def test_raw_values_of_eight_bits_are_refused(change, folder: Path) -> None:
    spec = change(lambda weights: weights | {LAYER: weights[LAYER].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=r"stored as F8_E4M3, and config\.json does not say how to read them"):
        base.load_base(spec, load_tokenizer(spec))


# Configurations


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "no_such_type"}, "does not know the model type `no_such_type`"),
        ({"hidden_size": 3}, "config.json cannot be used: Unrecognized model"),
        (
            {"model_type": "llama", "hidden_size": "wide"},
            "config.json cannot be used: Validation error for field 'hidden_s",
        ),
        ("{", "config.json cannot be used: It looks like the config file"),
    ],
)
def test_a_configuration_that_is_not_understood(folder: Path, content: object, said: str) -> None:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        base.load_config(Model(path=str(folder)))
    assert caught.value.place == f"model.path: {folder}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"pad_token_id": 1024}, "config.json has `pad_token_id` 1,024, and the model has 1,024 tokens"),
        ({"hidden_act": "no_such"}, "no llama model can be made of its config.json: 'no_such'"),
    ],
)
def test_a_configuration_of_which_no_model_can_be_made(folder: Path, content: dict[str, object], said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | content))
    recipe = recipes.load("tiny", [f"model.path={folder}"])
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        check(recipe, list(recipe.stages))
    assert caught.value.place == f"model.path: {folder}"


# Tokens beyond the embedding


@pytest.fixture
def longer(folder: Path) -> Callable[..., Path]:
    """A function that adds a token to the tokenizer and none to the model."""

    def add(**role: str) -> Path:
        tokenizer, model = load_tokenizer(Model(path=str(folder))), AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.add_special_tokens(dict(role) or {"extra_special_tokens": ["<new>"]})
        assert (tokenizer.convert_tokens_to_ids("<new>"), len(tokenizer)) == (964, 965)
        tokenizer.save_pretrained(folder)
        return folder

    return add


def said_of(folder: Path, *overrides: str) -> list[str]:
    recipe = recipes.load("tiny", [f"model.path={folder}", *overrides])
    with pytest.raises(InputErrors) as caught:
        check(recipe, list(recipe.stages))
    return [f"{error.place}: {error.message}" for error in caught.value.all]


@pytest.mark.parametrize(("name", "what"), [("pad_token", "padding token"), ("eos_token", "EOS")])
def test_a_special_token_beyond_the_embedding(longer, name: str, what: str) -> None:
    folder = longer(**{name: "<new>"})
    said = f"model.path: {folder}: the tokenizer's {what} `<new>` is token 964, and the model has 964 tokens"
    assert said in said_of(folder)


def test_a_token_of_the_data_or_their_template_beyond_the_embedding(longer, tmp_path: Path) -> None:
    folder, rows = longer(), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d <new> e"}\n' * 4)
    said = ": `<new>` is token 964 of the tokenizer, and the model has 964 tokens"
    assert f"stages.sft.data{said}" in said_of(folder, f"stages.sft.data={rows}")
    rows.write_text('{"prompt": "a <new>"}\n{"prompt": "c"}\n' * 80)
    judge = "evaluate.judge=builtins:len"
    assert f"evaluate.data{said}" in said_of(folder, f"evaluate.data={rows}", judge)
    recipe = recipes.load("tiny", [f"model.path={folder}"])
    check(recipe, list(recipe.stages))  # nothing has that token
