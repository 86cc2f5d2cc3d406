"""What safety costs: the tiny recipe by this checkout and by an earlier one in turn, and planning over 5 GB of data.

The earlier one is a git worktree, run by the same Python and libraries. All contestants have fresh folders for their
results and for every cache.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BEFORE = "7fcffd1"  # the last commit in which only PPO wrote checkpoints
OFTEN = [f"{stage}.trainer.save_steps=5" for stage in ("sft", "reward", "ppo", "dpo")]
RECIPE = """
name: large
model: {path: tiny, quantization: none}
stages:
  sft: {data: rows.jsonl}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", default=BEFORE, help="the revision to compare with")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="safety-") as scratch:
        planning = plan_over_large_data(Path(scratch), options.gigabytes)
        print(f"plan over {options.gigabytes:g} GB: {planning['first_s']:.2f} s, then {planning['second_s']:.2f} s")
        earlier = Path(scratch) / "before"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(earlier), options.before], check=True)
        try:
            contestants = {
                "before": (earlier, []),
                "now": (REPOSITORY, []),
                "now, a checkpoint every 5 steps": (REPOSITORY, OFTEN),
            }
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
            for repeat in range(1, options.repeats + 1):
                for name, (checkout, overrides) in contestants.items():
                    seconds[name].append(run_tiny(checkout, overrides))
                    wall_s, cpu_s = seconds[name][-1]
                    print(f"{repeat}  {name:<32}{wall_s:7.1f} s, CPU {cpu_s:.1f} s", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)
    ratios = {
        name: {what: ratio(of_name, seconds["before"], which) for which, what in enumerate(("wall", "cpu"))}
        for name, of_name in seconds.items()
        if name != "before"
    }
    for name, ratio_of in ratios.items():
        print(f"{name}: wall {ratio_of['wall']:.3f} of before, CPU {ratio_of['cpu']:.3f}")
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(json.dumps({"threads": threads, "ratios": ratios, "seconds": seconds, "planning": planning}))


def ratio(now: list[tuple[float, float]], before: list[tuple[float, float]], which: int) -> float:
    """The median over the rounds of a time now over that before."""
    return statistics.median(a[which] / b[which] for a, b in zip(now, before, strict=True))


def run_tiny(checkout: Path, overrides: list[str]) -> tuple[float, float]:
    """The wall and CPU time of the tiny recipe, in seconds."""
    with tempfile.TemporaryDirectory(prefix="safety-") as folder:
        used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command(["run", "tiny", *overrides], Path(folder), checkout)
        wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        return wall_s, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime


def plan_over_large_data(folder: Path, gigabytes: float) -> dict[str, float]:
    """The seconds that `plan` takes over a data file that was never read, and then once more."""
    (folder / "recipe.yaml").write_text(RECIPE)
    with (folder / "rows.jsonl").open("wb") as rows:
        rows.write(b'{"prompt": "a", "completion": "b"}\n')
        rows.truncate(int(gigabytes * 1e9))  # the rest takes no room on the disk; it is read and hashed all the same
    time.sleep(3)  # what was changed just now would be read again
    took = []
    for _ in range(2):
        began = time.perf_counter()
        command(["plan", "recipe.yaml"], folder, REPOSITORY)
        took.append(time.perf_counter() - began)
    (folder / "rows.jsonl").unlink()
    return {"gigabytes": gigabytes, "first_s": took[0], "second_s": took[1]}


def command(arguments: list[str], folder: Path, checkout: Path) -> None:
    caches = {"HF_DATASETS_CACHE": str(folder / "datasets"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = os.environ | caches | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    arguments = [sys.executable, "-P", "-m", "rlhf_pipeline", *arguments]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")


if __name__ == "__main__":
    main()
