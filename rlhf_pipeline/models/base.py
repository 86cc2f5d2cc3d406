"""The base: loaded frozen, in 4-bit where asked, as a causal LM or under a score head."""

import copy
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_pipeline import hub
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import divided, experts, loading
from rlhf_pipeline.models.reply_end import as_eos_token_id, stop_tokens
from rlhf_pipeline.models.score_head import backbone_name, with_score_head
from rlhf_pipeline.recipe import model_files
from rlhf_pipeline.recipe.schema import Model

Head = Literal["causal", "score"]
OTHER_TOKENIZER = (
    "the tokenizer is another model's, or tokens were added without `resize_token_embeddings`: save both of one model "
    "to a folder"
)


def device() -> torch.device:
    """The one device a stage runs on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the GPU computes in it, else float32.

    Raises:
        InputError: float16 on a CPU, which lacks most of its kernels.
    """
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if name == "float16" and not torch.cuda.is_available():
        raise InputError("float16 needs a GPU", place="model.dtype", hint="use auto, float32 or bfloat16")
    return getattr(torch, name)


def load_config(spec: Model) -> PretrainedConfig:
    """The configuration of a causal LM.

    Raises:
        InputError: see `read_config`; or it is not that of a causal LM.
    """
    config = read_config(spec)
    if type(config) not in AutoModelForCausalLM._model_mapping and not _brings_class(config, spec):
        raise InputError(f"Transformers cannot load `{config.model_type}` as a causal language model", place=spec.place)
    return config


def read_config(spec: Model) -> PretrainedConfig:
    """The configuration of a model of any kind.

    Raises:
        InputError: it cannot be loaded, brings code that the recipe does not trust, or is not safe to open.
    """
    check_files(spec)
    try:
        return AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # also of what checks the types of a configuration
        refuse_untrusted_code(spec, error)
        if Path(spec.path).is_dir() or "model type" in str(error):
            raise _not_understood(spec, error) from None
        if not isinstance(error, OSError | ValueError):
            raise
        raise _unreachable(spec, error) from None


def without_weights(spec: Model, head: Head = "causal", config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A model with the shapes of the base and nothing read from its weights; for `with torch.device("meta")`.

    Args:
        spec: the recipe's `model`.
        head: see `load_base`.
        config: from `load_config`, which is called where this is None.

    Raises:
        InputError: see `load_config`; or no model can be made of the configuration.
    """
    config = load_config(spec) if config is None else config
    try:
        model = from_config(spec, config)
    except Exception as error:  # Transformers' classes, and those that come with models, check it in many ways
        raise _makes_no_model(spec, config, error) from None
    return with_score_head(model) if head == "score" else model


def from_config(spec: Model, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A causal LM of a configuration, with weights as they are drawn.

    Args:
        spec: the recipe's `model`.
        config: from `load_config`.
        options: further ones of Transformers' `from_config`.

    Raises:
        Exception: of any type, where no such model can be made.
    """
    known = type(config) in AutoModelForCausalLM._model_mapping
    registered = known and not type(config).__module__.startswith("transformers.")
    if _brings_class(config, spec) and not registered:
        options["code_revision"] = spec.revision  # else Transformers takes the code of the newest commit
    own = copy.deepcopy(config)  # a model changes its own
    return AutoModelForCausalLM.from_config(own, trust_remote_code=spec.trust_remote_code, **options)


def _makes_no_model(spec: Model, config: PretrainedConfig, error: Exception) -> InputError:
    """Of a configuration that is understood."""
    pad, tokens = (getattr(config.get_text_config(), name, None) for name in ("pad_token_id", "vocab_size"))
    place = spec.place
    if "adding_idx" in str(error) and pad is not None and tokens is not None:
        return InputError(
            f"config.json has `pad_token_id` {pad:,}, and the model has {tokens:,} tokens: Transformers refuses that",
            place=place,
            hint="set `pad_token_id` in config.json to null: the tokenizer's is used here",
        )
    said = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"no {config.model_type} model can be made of its config.json: {said}",
        place=place,
        hint="see that config.json is the one that came with the weights",
    )


def refuse_untrusted_code(spec: Model, error: Exception) -> None:
    """Raise an `InputError` where `error` is Transformers' refusal to run a model's own code."""
    if not spec.trust_remote_code and "trust_remote_code" in str(error):
        raise _untrusted(spec) from None


def _untrusted(spec: Model) -> InputError:
    if not spec.is_base:
        said = "this model needs Python code that comes with it, and only that of the recipe's `model` may be run"
        return InputError(said, place=spec.place, hint="take one that Transformers has a class for")
    return InputError(
        "this model needs Python code that comes with it, which is not run unless the recipe says so",
        place=spec.place,
        hint="if you have read that code and trust it, set `model.trust_remote_code: true`",
    )


def _brings_class(config: PretrainedConfig, spec: Model) -> bool:
    """Whether the model's class comes with it, and may be used.

    Raises:
        InputError: it does, may not be used, and Transformers has none instead.
    """
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        return False
    if type(config) not in AutoModelForCausalLM._model_mapping and not spec.trust_remote_code:
        raise _untrusted(spec)
    return spec.trust_remote_code


def check_files(spec: Model) -> None:
    """See that a model can be had, is safe to open, and has no adapter that Transformers would put on it.

    Raises:
        InputError: it is on the hub, which does not answer, and not in the local cache; or a file is not as it should.
    """
    names, place = _file_names(spec), spec.place
    if found := model_files.other_format(spec.path, names):
        raise InputError(found.message, place=place, hint=found.hint)
    if "adapter_config.json" in names:
        raise InputError(
            "there is an adapter beside the model, which would silently become part of it",
            place=place,
            hint="merge it with PEFT's `merge_and_unload` and save the result, or remove it",
        )


def _file_names(spec: Model) -> list[str]:
    """The files of a model folder or hub model, but not of folders below it.

    None where the hub does not say and the cache may have the model.
    """
    folder = Path(spec.path)
    if folder.is_dir():
        return [file.name for file in folder.iterdir()]
    try:
        found = hub.ask("model", spec.path, spec.revision)
        return [file.rfilename for file in found.siblings or [] if "/" not in file.rfilename]
    except HfHubHTTPError:
        return []  # it answers; what is wrong, loading says better
    except HFValidationError as error:  # a path, which no cache has either
        raise _unreachable(spec, error) from None
    except Exception as error:
        if not isinstance(try_to_load_from_cache(spec.path, "config.json", revision=spec.revision), str):
            raise _unreachable(spec, error) from None
        # From here on the cache alone: for each file that may not even exist, the library would try as long.
        hub.go_offline()
        return []


def _not_understood(spec: Model, error: Exception) -> InputError:
    """Of a configuration that is there."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    place = spec.place
    if unknown := re.search(r"model type `([^`]*)`", said[0]):
        return InputError(
            f"Transformers {transformers.__version__} does not know the model type `{unknown[1]}`",
            place=place,
            hint="a newer one may: `pip install --upgrade transformers`; or the model brings code of its own, which "
            "`model.trust_remote_code: true` allows",
        )
    return InputError(
        f"its config.json cannot be used: {' '.join(said[:2])}",
        place=place,
        hint="see that the folder is a whole model, as `save_pretrained` writes it",
    )


def _unreachable(spec: Model, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return hub.unreachable(spec.place, reason)


def load_base(
    spec: Model,
    tokenizer: PreTrainedTokenizerBase,
    head: Head = "causal",
    to_divide: bool = False,
    computes_whole: bool = False,
) -> PreTrainedModel:
    """Load the base and freeze it.

    Args:
        spec: the recipe's `model`.
        tokenizer: the one from `load_tokenizer`; its pad becomes the model's, and its EOS one of what ends a text.
        head: `causal`, or `score` for a reward model, whose head is freshly drawn; see `score_head`.
        to_divide: ranks divide it among them, where they train so: until then it is in the memory of the machine, of
            the first rank alone, see `divided.from_first`; but for one that is quantized.
        computes_whole: before it is divided, each rank makes passes through it.

    Returns:
        The model on `device()`, but for that, in evaluation mode, no parameter trainable.

    Raises:
        InputError: see `load_config`, `loading.load` and `require_causal`.
    """
    # What is divided later goes to the GPU in parts. In few bits it is small, and GPUs alone quantize fast.
    later = to_divide and spec.quantization == "none" and (divided.by_fsdp() or divided.by_zero_3())

    def load(place: torch.device) -> PreTrainedModel:
        with experts.quantized_as_well(), divided.loading_whole():
            model = loading.load(spec, load_config(spec), place, resolve_dtype(spec.dtype))
        if later:
            vars(model).pop("hf_device_map", None)  # by which Transformers would take it for one that is to stay there
        if to_divide and divided.by_fsdp():
            divided.fit_for_fsdp(model)
        if place.type != "meta":
            require_causal(model, spec)
        return model

    if later and divided.first_alone_reads() and not computes_whole:
        model = divided.from_first(load)
    else:
        model = load(torch.device("cpu") if later else device())
    return frozen(model, tokenizer, head)


def frozen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: Head = "causal") -> PreTrainedModel:
    """Make a base of a causal LM: frozen, with its heads, and with no settings of a checkpoint's own.

    Args:
        model: the causal LM, which is changed.
        tokenizer: see `load_base`.
        head: see `load_base`.

    Returns:
        The model in evaluation mode.
    """
    model.base_model_prefix = backbone_name(model)  # Llama 4 has that of a model it is a part of, and TRL goes by it
    if head == "score":
        model = with_score_head(model)
    model.requires_grad_(False)
    hide_router_logits(model)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    # A checkpoint's own sampling settings (top-p, repetition penalty) would make what is sampled differ from what the
    # log-probabilities are taken of. What ends a text by them stays: see `reply_end.stop_tokens`.
    checkpoint = getattr(model, "generation_config", None) or GenerationConfig()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=as_eos_token_id(stop_tokens(tokenizer, checkpoint, {})),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def hide_router_logits(model: PreTrainedModel | PeftModel) -> None:
    """Have a mixture of experts compute its routers' loss for those alone who ask for it.

    Some checkpoints, and TRL's SFTTrainer, switch it on for all, and then sampling fails: the loss is of whole texts.
    """
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


@torch.no_grad()
def require_causal(model: PreTrainedModel, spec: Model) -> None:
    """See that no token sees those after it, as BERT's do unless its configuration says that it is a decoder.

    Raises:
        InputError: they do: a loss would be of what the model has before its eyes. Or its logits are not finite.
    """
    ids = torch.arange(8, device=model.device).repeat(2, 1)
    ids[1, 4:] += 4  # two texts that begin alike
    one, other = model.eval()(input_ids=ids, use_cache=False).logits[:, :4].float()
    if not one.isfinite().all():
        raise InputError(
            "it computes numbers that are not finite, so some of its weights are not",
            place=spec.place,
            hint="download it again, or set `model.dtype: float32` where 16 bits are too few for it",
        )
    if (one - other).abs().max() > 16 * torch.finfo(model.dtype).eps * one.abs().max():  # else it is rounding
        raise InputError(
            f"a {type(model).__name__} sees the tokens that follow, so it cannot be trained to write them",
            place=spec.place,
            hint="take a model that was trained to write text from left to right",
        )


def load_generation_config(spec: Model, config: PretrainedConfig) -> GenerationConfig:
    """A checkpoint's own generation settings, as Transformers gives them to a model that it loads.

    Args:
        spec: the recipe's `model`.
        config: from `load_config`.
    """
    try:
        return GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
    except (OSError, ValueError):  # most base models have none
        return GenerationConfig.from_model_config(config)


def beyond_embedding(
    largest: int | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: str
) -> InputError | None:
    """What is wrong with texts whose largest token id is this; None where the embedding has a row for it."""
    tokens = config.get_text_config().vocab_size
    if largest is None or largest < tokens:
        return None
    word = tokenizer.convert_ids_to_tokens(largest)
    said = f"`{word}` is token {largest:,} of the tokenizer, and the model has {tokens:,} tokens"
    return InputError(said, place=place, hint=OTHER_TOKENIZER)


def find_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a causal LM makes of its last hidden states: a function from `[N, hidden]` to logits `[N, vocabulary]`.

    For most models that is the output embedding. Some scale or cap its logits; for them the model itself is called,
    with a replaced backbone that returns the given states. Which it is, the model's own logits decide.

    Raises:
        ValueError: neither gives the model's own logits.
    """
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
        name = backbone_name(model)
        backbone = getattr(model, name)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        embedding = model.get_output_embeddings()
        # To the bit: an untrained model's logits are so small that a cap on them hardly shows.
        if torch.equal(embedding(hidden[None])[0], expected):
            return embedding

        def with_stand_in(states: torch.Tensor) -> torch.Tensor:
            model._modules[name] = _StandIn(states[None])
            try:
                return model(input_ids=ids[:, :1], use_cache=False).logits[0]
            finally:
                model._modules[name] = backbone

        try:
            same = torch.allclose(with_stand_in(hidden), expected, rtol=1e-3, atol=1e-3)
        except (AttributeError, RuntimeError, TypeError):
            same = False
    if not same:
        raise ValueError(f"{type(model).__name__} makes its logits in a way that cannot be found out from outside")
    return with_stand_in


class _StandIn(torch.nn.Module):
    """In a backbone's place: returns hidden states that are there already."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=self.states)


@dataclass
class _Output(BaseModelOutputWithPast):
    """A backbone's output that has whatever else a model passes on, as routers' logits: None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def remove_dropout(model: PreTrainedModel | PeftModel) -> None:
    """Switch dropout off for good: modules, numbers passed to functions, and what is read from the configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        for name, value in vars(holder).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):  # `layerdrop`, routers' noise
                setattr(holder, name, 0.0)


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """The CRC-32 of the tensors' bytes, one after the other."""
    total = 0
    for tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
        total = zlib.crc32(data.numpy().data, total)
    return total
