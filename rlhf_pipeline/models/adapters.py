"""Adapters: made fresh or from an earlier stage's artifact, and saved as PEFT itself would load them."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"


def lora_config(lora: dict[str, Any], init: Path | None, task: TaskType = TaskType.CAUSAL_LM) -> LoraConfig:
    """The shape of a stage's adapter: that of the adapter it starts from, else the recipe's `lora`."""
    if init is None:
        return LoraConfig(**lora, task_type=task)
    config = LoraConfig.from_pretrained(str(init))
    config.task_type, config.inference_mode, config.modules_to_save = task, False, None
    return config


def with_policy_adapter(base: PreTrainedModel, lora: dict[str, Any], init: Path | None) -> PeftModel:
    """The base with one trainable adapter named `default`: a copy of `init`, or a fresh one that changes nothing.

    TRL's DPOTrainer makes the frozen reference from the adapter of that name.
    """
    model = get_peft_model(base, lora_config(lora, init))
    if init is not None:
        load_weights(model, init, "default")
    return model


def with_reward_adapter(base: PreTrainedModel, lora: dict[str, Any], init: Path | None) -> PeftModel:
    """A one-label sequence classifier with a trainable adapter `default`, started from `init`, and a trainable head.

    The head is drawn from N(0, 1/(d+1)), d the hidden size, so that first rewards have about unit variance
    (Stiennon et al. 2020, "Learning to summarize from human feedback"; Huang et al. 2024, "The N+ Implementation
    Details of RLHF with PPO").
    """
    name = head_name(base)
    head = base.get_submodule(name)
    torch.nn.init.normal_(head.weight, std=(head.weight.shape[-1] + 1) ** -0.5)
    config = lora_config(lora, init, TaskType.SEQ_CLS)
    config.modules_to_save = [name]
    model = get_peft_model(base, config)
    if init is not None:
        load_weights(model, init, "default")
    return model


def head_name(classifier: PreTrainedModel) -> str:
    """The name of a sequence classifier's head: its one child with weights beside the backbone."""
    names = [
        name
        for name, child in classifier.named_children()
        if name != classifier.base_model_prefix and any(True for _ in child.parameters())
    ]
    if len(names) != 1:
        raise ValueError(f"{type(classifier).__name__} has no single head: {names}")
    return names[0]


def load_weights(model: PeftModel, folder: Path, adapter: str) -> None:
    """Copy an artifact's LoRA weights (not its score head) into an adapter the model already has.

    Raises:
        ValueError: the artifact's weights and the adapter's do not match one to one.
    """
    lora = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "lora_" in name}
    present = get_peft_model_state_dict(model, adapter_name=adapter)
    ours = {(name, tensor.shape) for name, tensor in present.items() if "lora_" in name}
    differing = sorted({name for name, _ in ours ^ {(name, tensor.shape) for name, tensor in lora.items()}})
    if differing:
        raise ValueError(f"{folder} does not fit this base: {len(differing)} weights differ, first {differing[0]}")
    set_peft_model_state_dict(model, present | lora, adapter_name=adapter)


def load_head(folder: Path) -> torch.nn.Linear:
    """A reward artifact's score head in float32, from `hidden` to 1, without bias where it has none; not trainable."""
    weights = load_file(folder / WEIGHTS)
    head = {name.rsplit(".", 1)[1]: tensor.float() for name, tensor in weights.items() if "lora_" not in name}
    linear = torch.nn.Linear(head["weight"].shape[1], 1, bias="bias" in head)
    linear.load_state_dict(head)
    return linear.requires_grad_(False)


def save_adapter(model: PeftModel, adapter: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write one adapter as an artifact: weights, configuration, tokenizer; what PEFT's own loader reads."""
    folder.mkdir(parents=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    config = model.peft_config[adapter]
    was, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was
    tokenizer.save_pretrained(str(folder))


def adapter_parameters(model: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The LoRA parameters that belong to one adapter, by name."""
    belongs = re.compile(rf"\.lora_\w+\.{re.escape(adapter)}(\.|$)")
    return {name: parameter for name, parameter in model.named_parameters() if belongs.search(name)}


@contextlib.contextmanager
def exact_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Keep trainable weights in float32 while a TRL trainer is built.

    TRL's trainers cast the adapters of a quantized base to bfloat16. That rounds the weights a stage starts from, so
    that a policy would no longer equal its reference at step 0, and at the learning rates of DPO and PPO most updates
    would round to nothing. Leaving this block restores what was there before.
    """
    before = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
