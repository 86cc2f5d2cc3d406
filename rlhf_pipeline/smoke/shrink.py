"""A tiny random checkpoint of a model's own architecture and tokenizer, made from its configuration alone."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import layer_count
from rlhf_pipeline.models.base import check_files, load_config, refuse_untrusted_code
from rlhf_pipeline.recipe.schema import Model

SEED = 0
HIDDEN = 64  # a block of NF4; and every other width is a multiple or a divisor of it
HEAD_DIM = 16
LARGEST = 8_000_000  # parameters beside those that the vocabulary takes

# The most that each size may be. Names are those of Transformers' configurations, where one means the same in all.
_SMALL = {
    # widths of feed-forward layers
    "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 256, "n_inner": 128, "mlp_dim": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size_mlp": 128,
    "shared_intermediate_size": 64, "expert_ffn_hidden_size": 64, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128,
    # mixtures of experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "moe_top_k": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 16,
    # linear attention and state-space layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16, "mamba_d_state": 8, "mamba_dt_rank": 4, "adapter_rank": 16,
    # tables and gates beside the layers
    "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    "num_heads": 8,
    # of an encoder and a decoder
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    # of images
    "base_channels": 32,
    # short enough to be felt by the few tokens that such a model gets to read
    "sliding_window": 32, "attention_chunk_size": 32, "window_size": 32,
    "rotary_dim": HEAD_DIM,
}  # fmt: skip
# Heads of Mamba 2: together as wide as its inner states, which are twice as wide as the hidden ones.
_MAMBA = {
    "mamba_n_heads": 8, "n_mamba_heads": 8, "mamba_num_heads": 8, "mamba_d_head": HEAD_DIM, "mamba_headdim": HEAD_DIM,
    "mamba_head_dim": HEAD_DIM, "mamba_d_ssm": 8 * HEAD_DIM,
}  # fmt: skip
_HIDDEN = (  # what must be as wide as the hidden states
    "hidden_size", "embed_dim", "projection_dim", "out_hidden_size", "vision_output_dim", "projector_input_dim",
    "projector_output_dim",
)  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")


def shrink(spec: Model, out: Path, tokenizer: str | None = None, *, all_layers: bool = False) -> list[str]:
    """Write a tiny random checkpoint that Transformers loads as the same classes as a model, with the same options.

    Kept are activation, rotary embedding, ties, biases, caps, the pattern of layers and, where the widths allow it, the
    ratio of heads to key-value heads; widths, layers and experts become few. No weight of the model is read.

    Args:
        spec: the model: a folder or hub id, whose weights need not be there.
        out: the folder to write, which must not hold anything.
        tokenizer: a folder or hub id with the tokenizer to use instead of the model's own.
        all_layers: keep as many layers as the model has.

    Returns:
        What differs from the model beside its size, in sentences.

    Raises:
        InputError: model or tokenizer is not available, the model brings its own code, or it cannot be made small.
    """
    refuse_full(out)
    config = load_config(spec)
    if not type(config).__module__.startswith("transformers."):
        raise InputError(
            f"`{config.model_type}` is not a class of Transformers but comes with the model, and what its sizes are "
            "called cannot be known",
            place=f"model.path: {spec.path}",
            hint="make a small checkpoint of it yourself and name that one",
        )
    words = _tokenizer(spec if tokenizer is None else Model(path=tokenizer))
    notes = []
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
        notes.append("the checkpoint's weights are quantized already; those of the small one are not")
    small, model = _first_that_works(config, words, spec.path, all_layers, own=tokenizer is None)
    _save(model, words, out)
    _save_generation_config(spec, small, out, own=tokenizer is None)
    return notes


def stand_in(out: Path, tokenizer: str) -> None:
    """Write a tiny random Llama with a given tokenizer, for a model that is not available.

    Args:
        out: the folder to write.
        tokenizer: a folder or hub id.

    Raises:
        InputError: there is no such tokenizer.
    """
    words = _tokenizer(Model(path=tokenizer))
    config = smaller(LlamaConfig(num_key_value_heads=8, bos_token_id=None, eos_token_id=None))
    _fit_vocabulary(config, words, own=False)
    _save(_build(config, "the replacement"), words, out)


def refuse_full(out: Path) -> None:
    """See that a checkpoint can be written without touching anything.

    Raises:
        InputError: there is a file of that name, or a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already", hint="name a new or an empty folder")


def _first_that_works(
    config: PretrainedConfig, words: PreTrainedTokenizerBase, name: str, all_layers: bool, own: bool
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """A small configuration and its model: as like the large one as its sizes allow.

    Some classes want heads that divide the hidden states, and some layers in numbers that nothing here knows of. So the
    ratio of heads is given up next, and the small number of layers last.
    """
    failed = None
    for layers in dict.fromkeys((all_layers, True)):
        for any_ratio in (True, False):
            try:
                small = smaller(config, all_layers=layers, any_ratio=any_ratio)
                _fit_vocabulary(small, words, own)
                small = type(small).from_dict(small.to_dict())  # as it will be read: some compute sizes from others
                return small, _build(small, name)
            except Exception as error:  # sizes that do not go together show in as many ways as there are models
                failed = failed or error
    if isinstance(failed, InputError):
        raise failed
    reason = " ".join(str(failed).split()) or type(failed).__name__
    raise InputError(f"a small `{config.model_type}` cannot be made: {reason}", place=f"model.path: {name}") from failed


def smaller(config: PretrainedConfig, *, all_layers: bool = False, any_ratio: bool = True) -> PretrainedConfig:
    """A copy of a configuration, and of those nested in it, with small sizes.

    Args:
        config: of any model that Transformers has a class for.
        all_layers: keep the number of layers.
        any_ratio: keep the ratio of heads to key-value heads also where it is no power of two, so that the heads do not
            divide the hidden states.
    """
    config = copy.deepcopy(config)
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            setattr(config, name, smaller(inner, all_layers=all_layers, any_ratio=any_ratio))
    keys = config.to_dict()
    # Some layers may have sizes of their own, by their numbers; Gemma 4's have wider heads.
    own = {int(layer): sizes for layer, sizes in (keys.get("per_layer_config") or {}).items()}
    if own:
        config.per_layer_config = None
        keys = config.to_dict()
    old_hidden = _given(config, "hidden_size")
    old_heads, head_dim = _given(config, "num_attention_heads"), _head_dim(config)
    if old_heads:
        _shrink_heads(config, old_heads, keys, any_ratio)
    elif head_dim:  # of Mamba 2, which has heads but no attention
        config.head_dim = HEAD_DIM
    else:  # those of keys and values alone: those of queries are in the configuration around this one
        for name in _KV_HEADS:
            if name in keys:
                setattr(config, name, 1)
    if embedding := keys.get("word_embed_proj_dim"):  # of OPT: perhaps narrower than the hidden states
        config.word_embed_proj_dim = HIDDEN if embedding == config.hidden_size else 2 * HIDDEN
    for name in _HIDDEN:
        if _given(config, name):
            setattr(config, name, HIDDEN)
    if old_hidden and (width := keys.get("attention_hidden_size")):  # once or twice as wide
        config.attention_hidden_size = width * HIDDEN // old_hidden
        if keys.get("attention_head_dim"):
            config.attention_head_dim = config.attention_hidden_size // config.num_attention_heads
    for name, size in _MAMBA.items():
        if _given(config, name) and name in keys:
            setattr(config, name, size)
    for name, most in _SMALL.items():
        value = _given(config, name)
        if value and value > most and (name in keys or name in config.attribute_map):
            setattr(config, name, most)
        elif isinstance(by_layer := keys.get(name), list) and all(isinstance(one, int) for one in by_layer):
            setattr(config, name, [min(one, most) for one in by_layer])
    if head_dim:
        _shorten_rope_factors(config, head_dim, _head_dim(config))
    if not all_layers and _given(config, "num_hidden_layers"):
        layer_count.keep(config, layer_count.of_every_kind(config))
    if own:
        config.per_layer_config = {
            layer: {name: max(1, size * getattr(config, name) // keys[name]) for name, size in sizes.items()}
            for layer, sizes in own.items()
            if layer < config.num_hidden_layers
        }
    return config


def _given(config: PretrainedConfig, name: str) -> int | None:
    """A size by its name or alias; None where the configuration has none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _head_dim(config: PretrainedConfig) -> int:
    """How wide a head is; 0 where the configuration has no heads."""
    hidden, heads = _given(config, "hidden_size"), _given(config, "num_attention_heads")
    return _given(config, "head_dim") or (hidden // heads if hidden and heads else 0)


def _shrink_heads(config: PretrainedConfig, heads: int, keys: dict[str, Any], any_ratio: bool) -> None:
    """Few heads, in the same ratio to those of keys and values where the widths allow it."""
    names = [name for name in _KV_HEADS if name in keys or name in config.attribute_map]
    ratio = max((heads // kv for name in names if (kv := _given(config, name))), default=1)
    if keys.get("head_dim") and (any_ratio or ratio & (ratio - 1) == 0):  # heads of any number may be of any width
        width = HEAD_DIM if ratio & (ratio - 1) == 0 else HIDDEN
        new = ratio if ratio > 4 else 4 // ratio * ratio
        config.head_dim = width
    else:
        ratio = min(8, 1 << (ratio.bit_length() - 1))
        new = max(4, ratio)
        if keys.get("head_dim"):
            config.head_dim = HEAD_DIM
    config.num_attention_heads = new
    for name in names:
        setattr(config, name, new // ratio)


def _shorten_rope_factors(config: PretrainedConfig, old: int, new: int) -> None:
    """Keep as many of the factors of a rotary embedding, one for each pair of dimensions, as there are pairs left."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        for name, value in parameters.items():
            if isinstance(value, list) and name.endswith("_factor"):
                parameters[name] = value[: max(1, len(value) * new // old)]
            elif name == "mrope_section":  # its sections make up all pairs
                sections = [max(1, section * new // old) for section in value]
                sections[0] += sum(value) * new // old - sum(sections)
                parameters[name] = sections


def _tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """A tokenizer as it is, with nothing made fit: what a stage would make of it, it shall make of this one too."""
    check_files(spec)
    try:
        return AutoTokenizer.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        refuse_untrusted_code(spec.model_copy(update={"trust_remote_code": False}), error)
        raise InputError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            place=spec.path,
            hint="it needs its tokenizer files; `--tokenizer` names another one",
        ) from None


def _fit_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, own: bool) -> None:
    """As many embedding rows as the tokenizer has tokens, and some to spare where the model has some."""
    text = config.get_text_config()
    if own:
        spare = HIDDEN if text.vocab_size > len(tokenizer) else 0
        special = [token for name in ("bos", "eos", "pad") for token in _ids(getattr(text, f"{name}_token_id", None))]
        rows = min(text.vocab_size, max(len(tokenizer) + spare, *(token + 1 for token in [0, *special])))
    else:
        rows = len(tokenizer) + HIDDEN
        for holder in {id(one): one for one in (config, text)}.values():
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                try:
                    setattr(holder, name, getattr(tokenizer, name))
                except StrictDataclassFieldValidationError:  # some must have one, and the tokenizer has none
                    setattr(holder, name, tokenizer.eos_token_id)
    text.vocab_size = rows
    for holder in {id(one): one for one in (config, text)}.values():
        for name, value in holder.to_dict().items():  # those of images and the like, which text never has
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= rows:
                setattr(holder, name, rows - 1)
            elif name.startswith("vocab_size_") and isinstance(value, int):
                setattr(holder, name, rows)
            elif name.endswith("_vocab_size") and isinstance(value, int):
                setattr(holder, name, min(value, rows))


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _build(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model with weights drawn from a seed, once it has been seen to be small and to work."""
    place, what = f"model.path: {name}", f"a small `{config.model_type}` cannot be made"
    rows = config.get_text_config().vocab_size
    causal = AutoModelForCausalLM._model_mapping[type(config)]
    # Of a composite model, stages load the part that is a causal LM, and the checkpoint holds the whole.
    is_part = causal.config_class is config.sub_configs.get("text_config")
    whole = AutoModelForMultimodalLM if is_part else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            shape = whole.from_config(config)
        shapes = {key: value.shape for key, value in shape.named_parameters()}
        shapes = {key: sizes for key, sizes in shapes.items() if not any(0 <= size - rows <= HIDDEN for size in sizes)}
        small = sum(size.numel() for size in shapes.values()) <= LARGEST
        if small:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                model = whole.from_config(config, dtype=torch.float32).eval()
                stage = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() if is_part else model
            with torch.no_grad():
                logits = stage(input_ids=torch.arange(8)[None] % rows, use_cache=False).logits
    except Exception as error:  # sizes that do not go together show in as many ways as there are models
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}: {reason}", place=place) from error
    if not small:
        largest = max(shapes, key=lambda key: shapes[key].numel())
        raise InputError(f"{what}: its `{largest}` would still be {list(shapes[largest])}", place=place)
    if not logits.isfinite().all():
        raise InputError(f"{what}: it computes no finite numbers", place=place)
    return model.to(config.dtype or torch.float32)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    model.generation_config = GenerationConfig()  # that of the model, if it has one, is written beside it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _save_generation_config(spec: Model, config: PretrainedConfig, out: Path, own: bool) -> None:
    try:
        generation = GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
    except (OSError, ValueError):  # most base models have none
        generation = GenerationConfig.from_model_config(config)
    if not own:  # to another tokenizer those numbers are other tokens
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(generation, name, getattr(config.get_text_config(), name))
    generation.to_json_file(out / "generation_config.json")  # as it is: saving it would refuse what some models have
