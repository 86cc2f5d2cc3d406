"""A stage's model as files that Transformers and PEFT load by themselves: the adapter, or base and adapter as one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.adapters import WEIGHTS
from rlhf_pipeline.models.base import Head, load_config, load_generation_config
from rlhf_pipeline.models.reply_end import as_eos_token_id, stop_tokens
from rlhf_pipeline.recipe.schema import Model

SHARD_SIZE = "5GB"  # what Transformers' files were long cut to, and what most tools expect


def write_adapter(spec: Model, artifact: Path, out: Path, head: Head, settings: dict[str, Any]) -> None:
    """Write an adapter that names its base.

    Args:
        spec: the base.
        artifact: the stage's adapter folder.
        out: a folder that is there.
        head: `causal`, or `score` for a reward model.
        settings: the `trainer` of the stage, which may say what ends a reply.
    """
    shutil.copy2(artifact / WEIGHTS, out / WEIGHTS)
    config = json.loads((artifact / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": spec.path, "revision": spec.revision}
    if config["modules_to_save"]:
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))
    _write_json(out / "adapter_config.json", config)
    _write_tokenizer(artifact, out, head)
    if head == "causal":
        tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=spec.trust_remote_code)
        checkpoint = load_generation_config(spec, load_config(spec))
        _generation_config(tokenizer, checkpoint, settings).save_pretrained(out)


def write_merged(spec: Model, artifact: Path, out: Path, head: Head, settings: dict[str, Any]) -> str:
    """Write the base with the adapter merged into its weights, never quantized.

    This happens on the CPU, where there is room for a base that was trained on in 4-bit. Weights are in the recipe's
    `dtype`; `auto` is the one that the base's checkpoint is stored in.

    Args:
        spec: the base.
        artifact: the stage's adapter folder.
        out: a folder that is there.
        head: `causal`, or `score` for a reward model.
        settings: the `trainer` of the stage, which may say what ends a reply.

    Returns:
        The dtype.

    Raises:
        InputError: the base cannot be loaded, is itself quantized, or PEFT cannot merge such an adapter.
    """
    config = load_config(spec, head)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "the base is itself stored quantized, so there are no full weights to merge into",
            place=f"model.path: {spec.path}",
            hint="export the adapter, without `--merge`",
        )
    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=spec.trust_remote_code)
    dtype = getattr(torch, spec.dtype) if spec.dtype != "auto" else config.dtype or torch.float32
    if head == "score":
        config.num_labels = 1
        config.problem_type = "regression"  # else Transformers' pipelines pass the score through a sigmoid
    auto: Any = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    base = auto.from_pretrained(
        spec.path,
        config=config,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        dtype=dtype,
        use_safetensors=True,
        device_map={"": "cpu"},
    )
    model = PeftModel.from_pretrained(base, str(artifact))
    _untie(base)
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"PEFT cannot merge this adapter: {str(error).strip().splitlines()[0]}",
            place=artifact.parent.name,
            hint="export the adapter, without `--merge`",
        ) from None
    merged.config.pad_token_id, merged.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if head == "causal":
        merged.generation_config = _generation_config(tokenizer, base.generation_config, settings)
    merged.save_pretrained(out, max_shard_size=SHARD_SIZE)
    folder = Path(spec.path)
    if spec.trust_remote_code and folder.is_dir():
        for file in folder.rglob("*.py"):
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, out / file.relative_to(folder))
    _write_tokenizer(artifact, out, head)
    return str(dtype).removeprefix("torch.")


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
        if file.name not in (WEIGHTS, "adapter_config.json"):
            shutil.copy2(file, out / file.name)
    settings = out / "tokenizer_config.json"
    if head == "score":
        content = json.loads(settings.read_text(encoding="utf-8")) | {"padding_side": "right"}
        _write_json(settings, content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
