"""A model from its checkpoint: with the weights that are stored there, all of them, and no others.

Where a weight is missing, Transformers draws it at random; where one has no place, it leaves it out; where weights are
stored in few bits and another quantization is asked for, it uses some of them for what they are not. All of that goes
to a log. Here it is an error.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import divided
from rlhf_pipeline.recipe import model_files
from rlhf_pipeline.recipe.schema import Model

STORED = ("quantization_config", "compression_config")  # what says in a configuration how weights are stored
# What older versions of Transformers and fairseq saved beside the weights: masks, positions, a number.
NO_WEIGHT = re.compile(r"\.(masked_bias|attn(\.attention)?\.bias|inv_freq|position_ids|version)$")


def require_quantization(config: PretrainedConfig, spec: Model) -> None:
    """See that weights that are stored in few bits are used as they are stored.

    Raises:
        InputError: the recipe wants them otherwise, or adapters are not trained over such weights.
    """
    folder = _folder(spec)
    found = model_files.dtypes(folder) if folder else {}
    problem = model_files.quantization_problem(stored_quantization(config), spec.quantization, found)
    if problem:
        raise InputError(problem.message, place=spec.place, hint=problem.hint)


def stored_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """How the weights are stored, in the words of the configuration or of the text model's inside it."""
    for one in (config, config.get_text_config()):
        for name in STORED:
            if (found := getattr(one, name, None)) is not None:
                return dict(found) if isinstance(found, dict) else dict(found.to_dict())
    return None


def _folder(spec: Model) -> Path | None:
    """Where a model's files are: its folder, or one of the hub's cache that has all of them; None where none has."""
    if Path(spec.path).is_dir():
        return Path(spec.path)
    cached = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    if not isinstance(cached, str):
        return None
    folder = Path(cached).parent
    return folder if model_files.no_model(folder) is None and model_files.problem(folder) is None else None


def require_weights(spec: Model, config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> None:
    """See that all weights of a model are there, by names and shapes, and as the recipe has it; no weight is read.

    Weights that are stored in 4 bits have other shapes; of them, the names alone are compared.

    Args:
        spec: the recipe's `model`. Of one on the hub that is not here yet, nothing is asked.
        config: from `base.load_config`.
        auto: the class of Transformers that loads it.

    Raises:
        InputError: some are missing, or there are others; or see `require_quantization`.
    """
    require_quantization(config, spec)
    if _folder(spec) is None:
        return
    packed = stored_quantization(config) is not None
    config = copy.deepcopy(config)
    for one in (config, config.get_text_config()):
        for name in STORED:
            vars(one).pop(name, None)
    _load(spec, config, torch.device("meta"), {}, packed, auto)


def load(
    spec: Model,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    auto: Any = AutoModelForCausalLM,
    whole: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Load a model, quantized as it is stored or as the recipe has it.

    Args:
        spec: the recipe's `model`.
        config: from `base.load_config`.
        device: where its weights shall be.
        dtype: of weights that are not quantized, and of what is computed with those that are.
        auto: the class of Transformers that loads it.
        whole: modules that are not to be quantized, by name; None for the output embedding of a causal LM.

    Raises:
        InputError: see `require_weights`.
    """
    require_weights(spec, config, auto)  # shapes, too, which are not looked at where weights become 4 bits
    config = copy.deepcopy(config)
    stored = stored_quantization(config)
    options: dict[str, Any] = {"dtype": dtype}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if stored is None:
        options["quantization_config"] = quantization_config(spec, dtype)
        if whole is not None and options["quantization_config"] is not None:
            options["quantization_config"].llm_int8_skip_modules = [*whole]  # whatever the name says: of nf4, too
    else:
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    model = _load(spec, config, device, options, auto=auto)
    if stored is not None:
        _require_packed(model, spec)
    _keep_exact(model)
    return model


def _keep_exact(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew on a CPU with AVX512-BF16.

    It does so at the first pass without gradients: from then on scales are rounded and products computed in bfloat16,
    no gradient passes through, and a layer whose outputs are not a multiple of 32 fails.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _require_packed(model: PreTrainedModel, spec: Model) -> None:
    """See that the layers that are to be in few bits were stored so; else they cannot compute.

    Raises:
        InputError: one was not.
    """
    for name, module in model.named_modules():
        four = isinstance(module, bnb.nn.Linear4bit) and getattr(module.weight, "quant_state", None) is None
        eight = isinstance(module, bnb.nn.Linear8bitLt) and getattr(module.weight, "SCB", None) is None
        if four or eight:
            raise InputError(
                f"`{name}.weight` is stored whole, and config.json says that it is in {spec.quantization}",
                place=spec.place,
                hint=f"add `{name}` to `llm_int8_skip_modules` under `quantization_config` in config.json",
            )


def quantization_config(spec: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes shall quantize what is loaded; None for `none`.

    NF4 with double quantization, as in QLoRA (Dettmers et al. 2023, section 3). Transformers leaves the output
    embedding as it is.
    """
    if spec.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP divides what is stored as numbers of 16 or 32 bits, and would leave bytes whole.
            bnb_4bit_quant_storage=dtype if divided.by_fsdp() else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None


def _load(
    spec: Model,
    config: PretrainedConfig,
    device: torch.device,
    options: dict[str, Any],
    packed: bool = False,
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Load a model, and compare its weights with those that are stored.

    With `packed`, some are stored in few bits, and beside them is what makes numbers of them: in 4 bits as
    `[bytes, 1]`, in 8 in their own shape, but for GPT-2's layers, which are stored the other way round.
    """
    try:
        model, found = auto.from_pretrained(
            spec.path,
            config=copy.deepcopy(config),  # a model changes its own
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
            **options,
        )
    except SafetensorError as error:
        place = spec.place
        raise InputError(f"its weights cannot be read: {error}", place=place, hint=model_files.DAMAGED) from None
    missing = sorted(found["missing_keys"])
    # Of a model for several kinds of input, the text model alone may be what is loaded; what is missing still shows.
    of_text = config.get_text_config() is config
    others = sorted(name for name in found["unexpected_keys"] if of_text and not NO_WEIGHT.search(name))
    shapes = [
        f"`{key}` is {list(theirs)} and should be {list(ours)}"
        for key, theirs, ours in found["mismatched_keys"]
        if not (packed and (list(theirs)[1:] == [1] or theirs == ours[::-1]))
    ]
    if packed:
        others = [name for name in others if not model_files.packed_weights([name])]
    said = []
    if missing:
        said.append(f"lacks {_named(missing)}, which would be drawn at random")
    if others:
        said.append(f"has {_named(others)}, for which the model has no place")
    if shapes:
        said.append(f"has weights of another shape: {sorted(shapes)[0]}")
    if said:
        raise InputError(
            f"the checkpoint is not that of a {type(model).__name__}: it {', and '.join(said)}",
            place=spec.place,
            hint="config.json and weights must be of one model, as `save_pretrained` writes them",
        )
    return model


def _named(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 1:,} more weights" if len(names) > 1 else ""
    return f"`{names[0]}`{more}"
