"""What it takes to read preference pairs and encode them: ours, beside the datasets library's own way and plain lists.

Each contestant is a process of its own that starts with the same imports; what it needs beyond those is counted.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTESTANTS = ("ours", "ours, from its cache", "datasets", "lists")
WORDS = ("moo", "a cow", "Gladly!", "that would be", "Nairobi", "I am not sure.", "green", "tall", "It is", "a lamb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(load(options.contestant[0], Path(options.contestant[1]))))
        return
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for repeat in range(1, options.repeats + 1):
        with tempfile.TemporaryDirectory(prefix="data-") as scratch:
            write_pairs(Path(scratch) / "pairs.jsonl", options.pairs)
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--contestant", name, scratch]
                environment = os.environ | {"HF_DATASETS_CACHE": f"{scratch}/{name.partition(',')[0]}"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                taken[name].append(json.loads(done.stdout.splitlines()[-1]))
                row = taken[name][-1]
                print(f"{repeat}  {name:<22}{row['cpu_s']:8.1f} s CPU{row['peak_mib']:8.0f} MiB", flush=True)
    best = {
        name: {key: min(row[key] for row in rows) for key in ("cpu_s", "wall_s", "peak_mib")}
        for name, rows in taken.items()
    }
    ratios = {name: {key: best["ours"][key] / row[key] for key in row} for name, row in best.items() if name != "ours"}
    for name, ratio in ratios.items():
        print(f"ours / {name}: CPU {ratio['cpu_s']:.2f}, memory {ratio['peak_mib']:.2f}")
    print(json.dumps({"pairs": options.pairs, "best": best, "ratios": ratios}))


def write_pairs(file: Path, count: int) -> None:
    draw = random.Random(0)
    with file.open("w") as lines:
        for i in range(count):
            chosen, rejected = (" " + " ".join(draw.choices(WORDS, k=12)) for _ in range(2))
            row = {"prompt": f"Q: What sound does number {i} make?\nA:", "chosen": chosen, "rejected": rejected}
            lines.write(json.dumps(row) + "\n")


def load(name: str, scratch: Path) -> dict[str, float]:
    """Read and encode the pairs; returns seconds, and the resident memory in MiB beyond that of the imports."""
    import datasets

    from rlhf_pipeline.data import prepare
    from rlhf_pipeline.models.tokenizer import load_tokenizer
    from rlhf_pipeline.recipe import TINY
    from rlhf_pipeline.recipe.schema import Data

    datasets.disable_progress_bars()
    tokenizer, file = load_tokenizer(str(TINY / "checkpoint")), scratch / "pairs.jsonl"

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(rows["prompt"])["input_ids"]
        replies = [tokenizer(rows[key], add_special_tokens=False)["input_ids"] for key in ("chosen", "rejected")]
        closed = [[[*ids, tokenizer.eos_token_id] for ids in of_rows] for of_rows in replies]
        return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (prompts, *closed), strict=True))

    before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    if name.startswith("ours"):
        table = prepare.preferences(Data(path=str(file)), tokenizer, 0).train
    elif name == "datasets":
        table = datasets.load_dataset("json", data_files=str(file), split="train")
        table = table.map(encode, batched=True, remove_columns=table.column_names)
    else:
        rows = [json.loads(line) for line in file.open()]
        table = datasets.Dataset.from_dict(encode({key: [row[key] for row in rows] for key in rows[0]}))
    assert len(table[0]["chosen_ids"]) > 1
    spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return spent | {"peak_mib": peak_mib() - before}


def peak_mib() -> float:
    """The most memory that this process held; of it alone, as `getrusage` begins with that of what started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024


if __name__ == "__main__":
    main()
