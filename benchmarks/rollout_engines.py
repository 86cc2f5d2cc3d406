"""Tokens per second of processor time of both engines that sample, on prompts whose replies are of very unlike length.

Each engine samples the same prompts in turn, as often as asked; the stop tokens are such that
half of the replies end by themselves within about 60 tokens, and the longest are cut. Run it where vLLM is installed:

    make vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/rollout_engines.py --model tiny
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/rollout_engines.py --model 60m --prompts 64
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.ppo.rollout import Engine, Episodes, sample
from rlhf_pipeline.ppo.vllm_engine import VLLMEngine
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model, Rollout

SHAPES = {
    "tiny": LlamaConfig.from_pretrained(TINY / "checkpoint"),
    # Llama's shape: 60 million parameters, 5 of them in the embedding, which is tied.
    "60m": LlamaConfig(
        vocab_size=8192, hidden_size=640, intermediate_size=1792, num_hidden_layers=11, num_attention_heads=10,
        num_key_value_heads=10, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.05,
    ),
}  # fmt: skip
PROMPT, MEDIAN = (4, 64), 60  # tokens
SOME = 32  # prompts whose replies choose the stop tokens; these run to the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=256, help="replies in a batch of Transformers")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a reply")
    parser.add_argument("--times", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[options.model]).float()
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(TINY / "checkpoint").save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"))
    spec = Model(path=str(folder / "base"), quantization="none", dtype="float32")
    policy = StagedBase(spec, {"policy": folder / "adapter"}).policy("policy")
    tokens = SHAPES[options.model].vocab_size
    lengths = torch.randint(PROMPT[0], PROMPT[1] + 1, (options.prompts,)).tolist()
    prompts = [torch.randint(2, tokens, (length,)).tolist() for length in lengths]
    vllm = VLLMEngine(
        spec, Rollout(engine="vllm"), "--engine", rank=16, longest=PROMPT[1] + options.longest, shares_gpu=False
    )

    def replies(engine: Engine | None, prompts: list[list[int]], stops: list[int]) -> Episodes:
        torch.manual_seed(1)
        return sample(
            policy, prompts, response_length=options.longest, temperature=1.0, stop_token_id=stops, pad_token_id=0,
            at_once=options.at_once, engine=engine,
        )  # fmt: skip

    stops = stop_set(replies(vllm, prompts[:SOME], []), tokens)
    found: dict[str, list[float]] = {"transformers": [], "vllm": []}
    for _ in range(options.times):
        for name, engine in (("transformers", None), ("vllm", vllm)):
            start, cpu = time.perf_counter(), time.process_time()
            episodes = replies(engine, prompts, stops)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            own = sorted(episodes.reply_lengths.tolist())
            found[name].append(sum(own) / cpu)
            shown = {
                "model": options.model, "engine": name, "prompts": options.prompts, "tokens": sum(own),
                "median": own[len(own) // 2], "95 %": own[int(0.95 * len(own))], "cut": own.count(options.longest),
                "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
                "tokens_per_cpu_second": round(sum(own) / cpu),
            }  # fmt: skip
            print(json.dumps(shown), flush=True)
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    print(json.dumps(medians | {"ratio": round(medians["vllm"] / medians["transformers"], 2)}))


def stop_set(endless: Episodes, tokens: int) -> list[int]:
    """Tokens of which half of the replies have the first one within `MEDIAN` tokens, taken one by one in random order.

    How often a token comes depends on what is before it, so that lengths differ by more than those of a fair die.
    """
    order = torch.randperm(tokens).tolist()
    first = torch.full((len(endless),), endless.replies.shape[1])
    for count, token in enumerate(order, 1):
        hits = endless.replies == token
        first = torch.where(hits.any(1), torch.minimum(first, hits.int().argmax(1)), first)
        if first.median() < MEDIAN:
            return order[:count]
    return order


if __name__ == "__main__":
    main()
