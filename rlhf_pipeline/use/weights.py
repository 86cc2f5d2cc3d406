"""A stage's model as files that Transformers and PEFT load by themselves: the adapter, or base and adapter as one."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters, score_head
from rlhf_pipeline.models.adapters import WEIGHTS
from rlhf_pipeline.models.base import Head, load_base, load_config, load_generation_config, without_weights
from rlhf_pipeline.models.reply_end import as_eos_token_id, stop_tokens
from rlhf_pipeline.models.score_head import HEAD, with_score_head
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rundir.layout import members
from rlhf_pipeline.use import merge
from rlhf_pipeline.use.merge import Rounding

OWN_CLASS = ("reward_model.py", "RewardModel")  # of reward models that Transformers has no class for
SHARD_SIZE = "5GB"  # what Transformers' files were long cut to, and what most tools expect


def write_adapter(spec: Model, artifact: Path, out: Path, head: Head, settings: dict[str, Any]) -> None:
    """Write an adapter that names its base, of an ensemble those of all members; see `_write_own_class`, too.

    Args:
        spec: the base.
        artifact: the stage's adapter folder.
        out: a folder that is there. Of an ensemble it gets the first member's adapter, and a folder for each other one.
        head: `causal`, or `score` for a reward model.
        settings: the `trainer` of the stage, which may say what ends a reply.
    """
    names = _names_in_transformers(spec, artifact) if head == "score" else {}
    if names is None:
        _write_own_class(without_weights(spec, "score"), out)
    for member in members(artifact):
        place = out / member.relative_to(artifact)
        place.mkdir(exist_ok=True)
        state = {(names or {}).get(name, name): tensor for name, tensor in load_file(member / WEIGHTS).items()}
        save_file(state, place / WEIGHTS, {"format": "pt"})
        config = json.loads((member / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": spec.path, "revision": spec.revision}
        if config["modules_to_save"]:
            config["modules_to_save"] = sorted(set(config["modules_to_save"]))
        _write_json(place / "adapter_config.json", config)
    _write_tokenizer(artifact, out, head)
    if head == "causal":
        tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=spec.trust_remote_code)
        checkpoint = load_generation_config(spec, load_config(spec))
        _generation_config(tokenizer, checkpoint, settings).save_pretrained(out)


def write_merged(
    spec: Model,
    artifact: Path,
    out: Path,
    head: Head,
    settings: dict[str, Any],
    *,
    dtype: str | None = None,
    dequantized: bool = False,
    start: Path | None = None,
) -> Rounding:
    """Write the base with the adapter merged into its weights, which are not quantized.

    The base is merged on the CPU, where there is room for one that was trained on in 4-bit. It is loaded in the
    recipe's `dtype`; `auto` is the one that its checkpoint is stored in.

    Args:
        spec: the base.
        artifact: the stage's adapter folder.
        out: a folder that is there.
        head: `causal`, or `score` for a reward model.
        settings: the `trainer` of the stage, which may say what ends a reply.
        dtype: that of the weights, as `float32`; None for that of the base, unless it would round the change away; see
            `merge.kept`.
        dequantized: take for the base what training computed with, rounded by `quantization`, and not what is stored.
        start: the adapter folder that the stage started from; None for the base. What it changed since counts.

    Returns:
        The dtype, and how much of the change it keeps.

    Raises:
        InputError: the base cannot be loaded, is itself quantized, or PEFT cannot merge such an adapter.
    """
    config = load_config(spec)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "the base is itself stored quantized, so there are no full weights to merge into",
            place=f"model.path: {spec.path}",
            hint="export the adapter, without `--merge`",
        )
    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=spec.trust_remote_code)
    wanted = getattr(torch, dtype) if dtype else None
    usual = getattr(torch, spec.dtype) if spec.dtype != "auto" else config.dtype or torch.float32
    if wanted not in (None, torch.float32):
        usual = wanted
    base = AutoModelForCausalLM.from_pretrained(
        spec.path,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        dtype=usual,
        use_safetensors=True,
        device_map={"": "cpu"},
    )
    changed = merge.dequantize(base, load_base(spec, tokenizer)) if dequantized else []
    if head == "score":
        base = with_score_head(base)
        base.score = adapters.load_head(artifact)
    model = _with_adapter(base, artifact)
    _untie(base)
    try:
        if start is not None:
            merge.add_start(model, start)
        merged, rounding = merge.merge(model, usual, wanted, changed)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"PEFT cannot merge this adapter: {str(error).strip().splitlines()[0]}",
            place=artifact.parent.name,
            hint="export the adapter, without `--merge`",
        ) from None
    if head == "score":
        merged.score.to(getattr(torch, rounding.dtype))
    for holder in (merged.config, merged.config.get_text_config()):
        holder.pad_token_id, holder.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if head == "causal":
        merged.generation_config = _generation_config(tokenizer, base.generation_config, settings)
    else:
        merged.config.problem_type = "regression"  # else Transformers' pipelines pass the score through a sigmoid
        theirs = _classifier_of_transformers(merged.config)
        if theirs is not None and _shapes(theirs) == _shapes(merged):
            merged.__class__ = type(theirs)
        else:
            _write_own_class(merged, out)
    merged.save_pretrained(out, max_shard_size=SHARD_SIZE)
    folder = Path(spec.path)
    if spec.trust_remote_code and folder.is_dir():
        for file in folder.rglob("*.py"):
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, out / file.relative_to(folder))
    _write_tokenizer(artifact, out, head)
    return rounding


def _with_adapter(base: PreTrainedModel, artifact: Path) -> PeftModel:
    """A model with the LoRA weights of an artifact."""
    model = get_peft_model(base, adapters.config_of(artifact))
    adapters.load_weights(model, artifact, "default")
    return model


def _classifier_of_transformers(config: PretrainedConfig) -> PreTrainedModel | None:
    """Transformers' sequence classifier for a configuration, without weights; None where it has none."""
    classes = AutoModelForSequenceClassification._model_mapping
    if type(config) not in classes or not classes[type(config)].__module__.startswith("transformers."):
        return None
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        return classes[type(config)](config)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _names_in_transformers(spec: Model, artifact: Path) -> dict[str, str] | None:
    """What the weights of a reward model's adapter are called in Transformers' class; None where it has no such class.

    Of a composite model, Transformers may have a classifier with the whole of it, and a causal LM with a part.
    """
    theirs = _classifier_of_transformers(load_config(spec))
    heads = [] if theirs is None else [name for name, _ in theirs.named_children() if name != theirs.base_model_prefix]
    if theirs is None or heads != [HEAD]:
        return None
    stored, config = adapters.stored_shapes(artifact), LoraConfig.from_pretrained(str(artifact))
    with torch.device("meta"):
        shapes = adapters.adapter_shapes(get_peft_model(theirs, config), "default")
    return None if adapters.misfit(stored, shapes) else adapters.our_names(stored, shapes)


def _write_own_class(model: PreTrainedModel, out: Path) -> None:
    """Write our class of a reward model as Python files, and name it in the configuration as code of the model's own.

    Args:
        model: from `with_score_head`.
        out: the folder.
    """
    causal, config = type(model).__mro__[2], type(model.config)
    places = [one.__module__ for one in (causal, config)]
    # Code that came with the base comes along.
    places = [f".{one.rpartition('.')[2]}" if one.startswith("transformers_modules.") else one for one in places]
    file, name = OWN_CLASS
    shutil.copy2(score_head.__file__, out / "score_head.py")
    (out / file).write_text(
        f'"""A reward model over {causal.__name__}."""\n\n'
        f"from {places[0]} import {causal.__name__}\n"
        f"from {places[1]} import {config.__name__}\n\n"
        "from .score_head import ScoreHead\n\n\n"
        f"class {name}(ScoreHead, {causal.__name__}):\n"
        '    """Its backbone under a head that reads one number."""\n\n'
        f"    config_class = {config.__name__}\n",
        encoding="utf-8",
    )
    auto = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = auto | {"AutoModelForSequenceClassification": f"{file.removesuffix('.py')}.{name}"}


def _untie(base: PreTrainedModel) -> None:
    """Part the output embedding from the input embedding where they share weights and an adapter is on one of the two.

    Merging it would change both.
    """
    embeddings = base.get_input_embeddings(), base.get_output_embeddings()
    if embeddings[1] is None or embeddings[0].weight is not embeddings[1].weight:
        return
    if not any(isinstance(embedding, BaseTunerLayer) for embedding in embeddings):
        return
    head: Any = embeddings[1]
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, checkpoint: GenerationConfig, settings: dict[str, Any]
) -> GenerationConfig:
    """What ends a reply, and no sampling settings: the base's own are not those that training sampled with."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=as_eos_token_id(stop_tokens(tokenizer, checkpoint, settings)),
        pad_token_id=tokenizer.pad_token_id,
    )


def _write_tokenizer(artifact: Path, out: Path, head: Head) -> None:
    """Copy the artifact's tokenizer; that of a reward model pads on the right, as its positions were in training."""
    for file in artifact.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, "adapter_config.json"):
            shutil.copy2(file, out / file.name)
    settings = out / "tokenizer_config.json"
    if head == "score":
        content = json.loads(settings.read_text(encoding="utf-8")) | {"padding_side": "right"}
        _write_json(settings, content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
