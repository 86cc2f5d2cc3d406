"""What two processes that divide a base need in the memory of the machine, where the first alone reads it, and each.

The model is a random Llama of 344 million parameters with adapters of rank 16, on the disk in float32. It is loaded,
gets its adapters, is divided, and makes one pass. All numbers are growth, over what a process held before it loaded.

* `loaded`: when the model is there and not divided yet; on a GPU, its parts leave this memory then.
* `peak`: the most resident memory until the end (VmHWM). Here the CPU passes for the GPU, so parts are in it, too.
* `both`: what the two held together when loaded, where pages that they share count once (Pss). Weights in the dtype
  that they are stored in are the pages of the file itself, which the processes of a machine share; others are not.

The old way is `fsdp_cpu_ram_efficient_loading: false`; ZeRO-3 has no such key, and is told so here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import ENVIRONMENT, LORA, TOKENIZER
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_pipeline import ranks
from rlhf_pipeline.models import adapters, divided
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.stages import sharded

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from together import connect, divide, divide_by_deepspeed, together

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=4, metavar=("HOW", "READ", "DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(together(measure, *options.measure, seconds=500)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0, eos_token_id=1))
        model.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters())
        del model
        print(f"{size / 1e6:.0f} M parameters; MiB of rank 0 and of rank 1")
        print("| dtype | divided by | read by | loaded | peak | both, loaded |\n|---|---|---|---|---|---|")
        for dtype in ("float32", "bfloat16"):
            for how in ("FSDP2", "ZeRO-3"):
                for read in ("each", "the first"):
                    command = [sys.executable, __file__, "--measure", how, read, dtype, folder]
                    done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True)
                    one = json.loads(done.stdout.splitlines()[-1])
                    found[f"{dtype} {how} {read}"] = one
                    loaded, peak = (
                        "{:.0f}, {:.0f}".format(*(rank[name] for rank in one)) for name in ("loaded", "peak")
                    )
                    both = sum(rank["share"] for rank in one)
                    print(f"| {dtype} | {how} | {read} | {loaded} | {peak} | {both:.0f} |", flush=True)
    print(json.dumps(found))


def measure(how: str, read: str, dtype: str, folder: str) -> dict[str, float]:
    """Load a model and divide it, on this rank.

    Returns:
        `loaded` and `peak`, resident memory, and `share`, that of the pages shared with the other rank counted by half;
        MiB over what there was before.
    """
    connect()
    if how == "FSDP2":
        divide()
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(read != "each").lower()
    else:
        divide_by_deepspeed(3, Path(tempfile.mkdtemp()))
        divided.first_alone_reads = lambda: read != "each"
    spec = Model(path=folder, quantization="none", dtype=dtype)
    tokenizer = load_tokenizer(Model(path=str(TOKENIZER)))
    Path("/proc/self/clear_refs").write_text("5")
    before, before_share = kernel_says("status", "VmRSS"), kernel_says("smaps_rollup", "Pss")
    ranks.any_of(False)
    base = load_base(spec, tokenizer, to_divide=True)
    model = adapters.with_policy_adapter(base, LORA, None)
    ranks.any_of(False)
    loaded, share = kernel_says("status", "VmRSS"), kernel_says("smaps_rollup", "Pss")
    ranks.any_of(False)
    sharded.divide(model)
    peak = kernel_says("status", "VmHWM")
    return {"loaded": loaded - before, "peak": peak - before, "share": share - before_share}


def kernel_says(file: str, name: str) -> float:
    """A number of a file of this process, in MiB."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
