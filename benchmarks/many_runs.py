"""What a report over many runs takes: seconds, and the size of the page.

The runs are copies of one real run whose PPO stage has another `kl_coef` and learning rate in each, with 300 logged
steps to a stage and numbers that follow the settings. Each report is made by a process of its own, with an empty cache.
Several checkouts take turns: `--package` names their folders.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 300
PPO = "ppo"


def write_run(source: Path, run: Path, number: int) -> None:
    """Write one of the runs: the stages of a real one, whose PPO stage differs.

    Args:
        source: the run directory that it is made of.
        run: the folder to make.
        number: of the run; every second one has the same `kl_coef`.
    """
    draw = random.Random(number)
    kl_coef, learning_rate = 0.01 * 1.12 ** (number // 2), (1e-3, 2e-3)[number % 2]
    loosened = math.exp(-3 * kl_coef)
    made_of: dict[str, str] = {}
    stages = [file.parent.name for file in sorted(source.glob("*/stage.json"))]
    for name in (one for one in stages if "." not in one):
        folder = run / name
        (folder / "adapter").mkdir(parents=True)
        weights = f"{name} {number if name == PPO else ''}".encode()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
        made_of[name] = hashlib.sha256(weights).hexdigest()
        for extra in ("samples.jsonl", "pairs.jsonl"):
            if (source / name / extra).exists():
                shutil.copy(source / name / extra, folder / extra)
        rows = [json.loads(line) for line in (source / name / "metrics.jsonl").read_text().splitlines()]
        steps = random.Random(f"{name} {number if name == PPO else ''}")
        longer = [
            varied(rows[step * len(rows) // STEPS], steps, loosened * step / STEPS if name == PPO else 0.0, step)
            for step in range(STEPS)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    for name, digest in made_of.items():
        record = json.loads((source / name / "stage.json").read_text())
        size = (run / name / "adapter" / "adapter_model.safetensors").stat().st_size
        record["artifact_files"] = {"adapter_model.safetensors": [size, digest]}
        record["parent_weights"] = {parent: made_of[parent] for parent in record["parent_weights"]}
        if name == PPO:
            record["inputs"] |= {"trainer.kl_coef": kl_coef, "trainer.learning_rate": learning_rate}
            record["metrics"] = varied(record["metrics"], draw, 0.3 * loosened, STEPS)
        (run / name / "stage.json").write_text(json.dumps(record))
    recipe = (source / "recipe.yaml").read_text().splitlines()
    named = [f"name: {run.name}" if line.startswith("name:") else line for line in recipe]
    (run / "recipe.yaml").write_text("\n".join(named) + "\n")
    comparison = json.loads((source / "comparison.json").read_text()) | {"made_of": made_of}
    for row in comparison["rows"]:
        row["replies"][PPO]["reward"] += draw.gauss(0, 0.3)
    rewards = [row["replies"][PPO]["reward"] for row in comparison["rows"]]
    comparison["means"][PPO]["reward"] = sum(rewards) / len(rewards)
    (run / "comparison.json").write_text(json.dumps(comparison))


def varied(row: dict[str, Any], draw: random.Random, by: float, step: int) -> dict[str, Any]:
    """A row of metrics, each number times one and a bit, and some noise."""
    found = {
        key: value * (1 + by) * (1 + draw.gauss(0, 0.03)) if isinstance(value, float) and key != "time" else value
        for key, value in row.items()
    }
    return found | ({"step": step + 1} if "step" in row else {})


def measured(package: Path, runs: list[Path], folder: Path) -> dict[str, float]:
    """Seconds of wall time and of the processor, and the MB of the page."""
    out = folder / "report.html"
    environment = os.environ | {"PYTHONPATH": str(package.absolute()), "XDG_CACHE_HOME": str(folder / "cache")}
    shutil.rmtree(folder / "cache", ignore_errors=True)
    before, began = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "rlhf_pipeline", "report", *map(str, runs), "-o", str(out)]
    subprocess.run(
        command, env=environment, cwd=folder, check=True, capture_output=True
    )  # not a checkout: it would win
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "MB": round(out.stat().st_size / 1e6, 2)}


def main() -> None:
    """Measure, and print a table and a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of `rlhf-pipeline run tiny`")
    parser.add_argument("--counts", default="1,2,8,60")
    parser.add_argument("--package", type=Path, action="append", help="a checkout; may be given several times")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = [folder / f"run-{number}" for number in range(max(counts))]
        for number, run in enumerate(runs):
            write_run(arguments.run, run, number)
        for count in counts:
            for package in arguments.package or [REPOSITORY]:
                one = measured(package, runs[:count], folder)
                found.setdefault(str(package), {})[count] = one
                print(
                    f"{package}  {count:3} runs  {one['wall_s']:7.2f} s  CPU {one['cpu_s']:7.2f} s  {one['MB']:6.2f} MB"
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
