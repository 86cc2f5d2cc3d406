"""What the check before a run takes: CPU seconds beyond those of the imports, and how often it opens each data file.

Of the tiny recipe, and of one that trains a reward model and DPO on many pairs; each with an empty cache, and once more
with what the first check left there. Several checkouts take turns: `--package` names their folders.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data_loading import write_pairs

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = """\
name: pairs
model: {path: tiny, quantization: none, dtype: float32}
stages:
  reward: {init: base, data: {path: pairs.jsonl, chat: false, eval_fraction: 0.01}}
  dpo: {init: base, data: {path: pairs.jsonl, chat: false, eval_fraction: 0.01}}
"""
# In a process of its own. The check stood in `run.worker` once.
PROGRAM = """
import collections, json, sys, time
opened, listening = collections.Counter(), False

def note(event, arguments):
    if listening and event == "open" and str(arguments[0]).endswith(".jsonl"):
        opened[str(arguments[0]).rpartition("/")[2]] += 1

sys.addaudithook(note)
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.run import worker
check = getattr(worker.check, "check", worker.check)
recipe = recipes.load(sys.argv[1], ["output_dir=" + sys.argv[2]])
listening, began, cpu = True, time.perf_counter(), time.process_time()
check(recipe, list(recipe.stages))
print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began, "opened": opened}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--package", type=Path, nargs="+", default=[REPOSITORY], help="checkouts, by default this one")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        recipes = {"tiny": "tiny"}
        if options.pairs:
            write_pairs(Path(folder) / "pairs.jsonl", options.pairs)
            (Path(folder) / "pairs.yaml").write_text(RECIPE)
            recipes[f"{options.pairs:,} pairs"] = f"{folder}/pairs.yaml"
        for repeat in range(1, options.repeats + 1):
            for name, recipe in recipes.items():
                for package in options.package:
                    with tempfile.TemporaryDirectory(prefix="check-") as cache:
                        for state in ("cold", "warm"):
                            row = {"recipe": name, "package": str(package), "cache": state}
                            row |= check(recipe, package.resolve(), Path(cache))
                            rows.append(row)
                            print(
                                f"{repeat}  {name:<16}{state:<6}{row['cpu_s']:8.2f} s CPU{row['wall_s']:8.2f} s"
                                f"   {package}   opened {row['opened']}",
                                flush=True,
                            )
    print(json.dumps(rows))


def check(recipe: str, package: Path, cache: Path) -> dict[str, object]:
    """Check a recipe with a checkout's code, in a process that has imported all it needs before the clock starts."""
    folders = {"PYTHONPATH": str(package), "HF_DATASETS_CACHE": f"{cache}/datasets", "XDG_CACHE_HOME": f"{cache}/home"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, recipe, f"{cache}/runs"]
    done = subprocess.run(command, env=os.environ | quiet | folders, cwd=cache, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr[-3000:])
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
