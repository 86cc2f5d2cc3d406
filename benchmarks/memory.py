"""What the benchmarks of memory share: how it is read, and a random base with a large vocabulary."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from rlhf_pipeline.models import adapters, loading
from rlhf_pipeline.models.base import device, frozen, resolve_dtype
from rlhf_pipeline.recipe.schema import Model

TOKENIZER = Path(__file__).resolve().parents[1] / "rlhf_pipeline" / "models" / "tiny" / "checkpoint"
VOCABULARY_SIZE = 128_256  # of Llama-3
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Freed memory goes back to the system at once, for both alike; else a peak would depend on what was freed before it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
}


class ResidentMemory:
    """This process's resident memory. The kernel notes the peak, or where it may not be reset, a thread that looks."""

    reserved = 0

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.highest = 0
        self.noted_by_kernel = self._reset_kernel()
        if not self.noted_by_kernel:
            threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        return self.process.memory_info().rss

    def restart(self) -> None:
        self.highest = self.now()
        if self.noted_by_kernel:
            self._reset_kernel()

    def peak(self) -> int:
        if not self.noted_by_kernel:
            return max(self.highest, self.now())
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def _reset_kernel(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        while True:
            self.highest = max(self.highest, self.now())
            time.sleep(0.001)


class AllocatedMemory:
    """What PyTorch has allocated on the GPU, and the most it ever held for that."""

    reserved = 0

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        return torch.cuda.max_memory_allocated()


def llama_config(shape: dict[str, Any], dtype: str) -> LlamaConfig:
    """A Llama of a shape, with the vocabulary of Llama-3 and the special tokens of the tiny checkpoint."""
    return LlamaConfig(
        **shape,
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=8192,
        num_labels=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )


def random_base(config: LlamaConfig, spec: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Llama as `load_base` gives one, made on the device layer by layer: no weight is on a disk or on the CPU.

    Args:
        config: from `llama_config`.
        spec: how it shall be loaded; its path is not read.
        tokenizer: see `load_base`.
    """
    dtype, place = resolve_dtype(spec.dtype), device()
    options = {} if spec.attention == "auto" else {"attn_implementation": spec.attention}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options).to(dtype)
    quantizer = None
    if asked := loading.quantization_config(spec, dtype):
        quantizer = AutoHfQuantizer.from_config(asked)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": place})
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.ones(parameter.shape, dtype=dtype, device=place)
            if parameter.ndim > 1:
                made.normal_(std=0.02)
            if isinstance(parameter, bnb.nn.Params4bit):  # quantized as it goes to its device, as Transformers does it
                made = bnb.nn.Params4bit(made, requires_grad=False, **vars(parameter)).to(place)
                setattr(module, name, made)
            else:
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    with torch.device(place):
        for module in model.modules():  # rotations, which are computed
            if buffers := {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}:
                fresh = type(module)(config)
                for name in buffers:
                    module.register_buffer(name, getattr(fresh, name), persistent=False)
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer  # by which trainers see that adapters can be trained over it
    return frozen(model, tokenizer)


def save_random_base(folder: Path, shape: dict[str, Any], dtype: str) -> LlamaConfig:
    """Save a random Llama with the tokenizer of the tiny checkpoint; returns its configuration.

    Weights are drawn and written one layer at a time, so that the whole model is never in memory.
    """
    config = llama_config(shape, dtype)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    files = {name: f"{name.split('.')[2] if '.layers.' in name else name}.safetensors" for name in weights}
    for file in dict.fromkeys(files.values()):
        tensors = {name: drawn(tensor, dtype) for name, tensor in weights.items() if files[name] == file}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def save_random_reward(folder: Path, config: LlamaConfig) -> None:
    """Save a random reward adapter with its head, as a reward stage leaves it."""
    with torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(config)
        reward = adapters.with_reward_adapter(scorer, LORA, None)
    folder.mkdir()
    state = {name: drawn(tensor, "float32") for name, tensor in get_peft_model_state_dict(reward).items()}
    save_file(state, folder / adapters.WEIGHTS, {"format": "pt"})
    reward.peft_config["default"].save_pretrained(str(folder))


def drawn(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Weights of a tensor's shape: ones for a norm's, else random; drawn on the GPU where there is one."""
    if tensor.ndim == 1:
        return torch.ones(tensor.shape, dtype=getattr(torch, dtype))
    return (torch.randn(tensor.shape, dtype=getattr(torch, dtype), device=device()) * 0.02).cpu()
