"""Does the tiny recipe learn what it should, seed after seed? Exits with 1 where it does not.

Runs `rlhf-pipeline run tiny` afresh for each seed and reads its numbers back through `status --json` and the logs.
Overrides may follow, for example `model.quantization=nf4`.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_pipeline.recipe import TINY


def first_logged(run: Path, stage: str, metric: str) -> float:
    with (run / stage / "metrics.jsonl").open() as lines:
        return json.loads(lines.readline())[metric]


def base_digest() -> str:
    return hashlib.sha256((TINY / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def measure(seed: int, overrides: list[str]) -> dict[str, float]:
    """One fresh run; its numbers."""
    settings = [f"seed={seed}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf_pipeline"]
        before = base_digest()
        subprocess.run([*command, "run", "tiny", *settings], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if base_digest() != before:
            raise SystemExit("the base's weights changed")
        status = [*command, "status", "tiny", *settings, "--json"]
        shown = json.loads(subprocess.run(status, cwd=folder, check=True, capture_output=True).stdout)
        stages = {stage["name"]: stage for stage in shown["stages"]}
        run = Path(shown["run"])
        return {
            "seed": seed,
            "gold sft": stages["sft"]["metrics"]["judge_mean"],
            "gold ppo": stages["ppo"]["metrics"]["judge_mean"],
            "gold dpo": stages["dpo"]["metrics"]["judge_mean"],
            "reward accuracy": stages["reward"]["metrics"]["eval_accuracy"],
            "first KL": first_logged(run, "ppo", "objective/kl"),
            "last KL": stages["ppo"]["metrics"]["objective/kl"],
            "first margin": first_logged(run, "dpo", "rewards/margins"),
            "seconds": sum(stage["wall_s"] for stage in stages.values()),
        }


def holds(row: dict[str, float]) -> bool:
    """Whether a run's numbers are those of a pipeline that works."""
    return (
        0.3 <= row["gold sft"] <= 0.65
        and min(row["gold ppo"], row["gold dpo"]) >= row["gold sft"] + 0.25
        and row["reward accuracy"] >= 0.85
        and abs(row["first KL"]) < 1e-3
        and abs(row["first margin"]) < 1e-4
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_intermixed_args()
    rows = []
    for seed in arguments.seeds:
        rows.append(measure(seed, arguments.overrides))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        print("| " + " | ".join(f"{value:.3g}" for value in rows[-1].values()) + " |", flush=True)
    if len(rows) > 1:
        for name, of in (("mean", statistics.mean), ("deviation", statistics.stdev), ("least", min), ("most", max)):
            print(
                f"| {name} | " + " | ".join(f"{of([row[key] for row in rows]):.3g}" for key in list(rows[0])[1:]) + " |"
            )
    print(json.dumps(rows))
    trivial = all(row["reward accuracy"] == 1.0 for row in rows)
    sys.exit(0 if all(holds(row) for row in rows) and not trivial else 1)


if __name__ == "__main__":
    main()
