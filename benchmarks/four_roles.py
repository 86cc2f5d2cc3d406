"""What PPO's roles hold in memory: one shared base with four adapters, beside four models loaded one by one.

And what four more reward models add to the shared base, as members of an ensemble.

The model is a 32nd of Llama-3.1-8B, randomly initialised, in NF4: one of its 32 layers and a 32nd of its vocabulary, so
that embedding, layers and adapters stand in the same proportion as in the whole model. Counted are the bytes of
distinct storages behind parameters, buffers and bitsandbytes' quantization states; how far the process grew is printed
beside them, and that includes what loading left behind. With a value head, the fourth role is a head on the policy's
trunk, without an adapter. Each way of loading is measured in a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model

TOKENIZER = Path(__file__).resolve().parents[1] / "rlhf_pipeline" / "models" / "tiny" / "checkpoint"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WAYS = ["base", "shared", "value head", "ensemble", "four models"]
MEMBERS = 5  # of the ensemble


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    print("making a base and two adapters", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="four-roles-") as name:
        folder = Path(name)
        parameters = make_artifacts(folder)
        measured = {way: in_a_process(way, folder) for way in WAYS}
    print(f"{parameters / 1e6:.0f} M parameters, NF4, LoRA r={LORA['r']} on all linear layers")
    one = measured["base"]["weight_bytes"]
    for way, numbers in measured.items():
        megabytes, grown = numbers["weight_bytes"] / 1e6, numbers["grown_bytes"] / 1e6
        ratio = numbers["weight_bytes"] / one
        print(f"{way:<12} weights {megabytes:7.1f} MB   {ratio:5.3f} x base   process grew by {grown:7.1f} MB")
    ratio = measured["ensemble"]["weight_bytes"] / measured["shared"]["weight_bytes"]
    print(f"an ensemble of {MEMBERS} reward models: weights {ratio:.3f} x those with one")
    print(json.dumps({"parameters": parameters, "measured": measured}))


def in_a_process(way: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def make_artifacts(folder: Path) -> int:
    """Save a base, an SFT adapter and a reward adapter with its head; returns the base's number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256 // 32,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    parameters = model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "base")
    spec = spec_of(folder)
    policy = adapters.with_policy_adapter(load_base(spec, tokenizer), LORA, None)
    adapters.save_adapter(policy, "default", folder / "sft", tokenizer)
    scorer = adapters.with_reward_adapter(load_base(spec, tokenizer, head="score"), LORA, None)
    adapters.save_adapter(scorer, "default", folder / "reward", tokenizer)
    for number in range(1, MEMBERS + 1):  # what they hold does not depend on their values
        member = folder / "ensemble" / (f"member-{number}" if number > 1 else "")
        shutil.copytree(folder / "reward", member, dirs_exist_ok=True)
    return parameters


def spec_of(folder: Path) -> Model:
    return Model(path=str(folder / "base"), quantization="nf4", dtype="bfloat16")


def measure(way: str, folder: Path) -> dict[str, int]:
    """Load one way, keep it, and count."""
    spec = spec_of(folder)
    tokenizer = load_tokenizer(spec.path)
    before = resident_bytes()
    modules = load(way, spec, tokenizer, folder)
    return {"weight_bytes": weight_bytes(modules), "grown_bytes": resident_bytes() - before}


def load(way: str, spec: Model, tokenizer: Any, folder: Path) -> list[torch.nn.Module]:
    """Everything that way keeps in memory, as modules."""
    if way == "base":
        return [load_base(spec, tokenizer)]
    if way in ("shared", "value head", "ensemble"):
        rewards = [(folder / ("ensemble" if way == "ensemble" else "reward"), LORA)]
        base = load_base(spec, tokenizer)
        shared = SharedBase(base, LORA, folder / "sft", rewards, one_trunk=way == "value head")
        return [shared.peft, shared.policy, shared.reference, *shared.rewards[0], shared.value]
    policy = PeftModel.from_pretrained(load_base(spec, tokenizer), folder / "sft", is_trainable=True)
    reference = PeftModel.from_pretrained(load_base(spec, tokenizer), folder / "sft")
    reward = PeftModel.from_pretrained(load_base(spec, tokenizer, head="score"), folder / "reward")
    value = PeftModel.from_pretrained(load_base(spec, tokenizer, head="score"), folder / "reward", is_trainable=True)
    return [policy, reference, reward, value]


def weight_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """The bytes of all distinct storages; tied and shared weights count once."""
    storages: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            for part in (tensor, *quantization_tensors(getattr(tensor, "quant_state", None))):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def quantization_tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of a bitsandbytes quantization state, and of the state that quantizes its scales in turn."""
    if state is None:
        return []
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return tensors + quantization_tensors(state.state2)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
