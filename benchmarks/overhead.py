"""What the pipeline costs: `rlhf-pipeline run` beside the same TRL calls written by hand, in one script and in four.

All three run in turn, A B C A B C, so that a change of the machine's load meets them alike. Each has fresh folders for
its results and for the cache of `datasets`. Our command also judges three policies, which the scripts do not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ["sft", "reward", "ppo", "dpo"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
WITHOUT_A_STAGE = "rest"  # imports, the check of settings and data, the comparison, the report, the ends of processes


@dataclass
class Measurement:
    """One contestant, once: seconds of wall and CPU time, the largest process's peak, and where the wall time went."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    stages: dict[str, float]
    rest: dict[str, float] = field(default_factory=dict)  # of our command, what `rest` is made of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "tiny.yaml")
    options = parser.parse_args()
    contestants = {"ours": run_ours, "one script": run_one_script, "four scripts": run_four_scripts}
    measured: dict[str, list[Measurement]] = {name: [] for name in contestants}
    for repeat in range(1, options.repeats + 1):
        for name, contestant in contestants.items():
            with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
                measurement = contestant(options.recipe.resolve(), Path(folder))
            measured[name].append(measurement)
            print(f"{repeat}  {name:<13}{row(measurement)}", flush=True)
            if measurement.rest:
                parts = "  ".join(f"{part} {seconds:.2f}" for part, seconds in measurement.rest.items())
                print(f"   of its rest: {parts}", flush=True)
    result = {
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "ours_over_one_script": compare(measured["ours"], measured["one script"]),
        "ours_over_four_scripts": compare(measured["ours"], measured["four scripts"]),
        "measured": {name: [asdict(measurement) for measurement in all_] for name, all_ in measured.items()},
    }
    for name in ("ours_over_one_script", "ours_over_four_scripts"):
        print(f"{name}: wall {result[name]['wall']:.3f}, cpu {result[name]['cpu']:.3f}")
    print(json.dumps(result))


def compare(ours: list[Measurement], theirs: list[Measurement]) -> dict[str, float]:
    """The medians of the ratios within each round."""
    rounds = list(zip(ours, theirs, strict=True))
    return {
        "wall": statistics.median(a.wall_s / b.wall_s for a, b in rounds),
        "cpu": statistics.median(a.cpu_s / b.cpu_s for a, b in rounds),
    }


def row(measurement: Measurement) -> str:
    stages = "  ".join(f"{name} {seconds:.1f}" for name, seconds in measurement.stages.items())
    memory = measurement.peak_bytes / 2**20
    return f"wall {measurement.wall_s:6.1f} s  cpu {measurement.cpu_s:6.1f} s  peak {memory:4.0f} MiB   {stages}"


def run_ours(recipe: Path, folder: Path) -> Measurement:
    command = [str(Path(sys.executable).with_name("rlhf-pipeline"))]
    measurement = run([*command, "run", str(recipe), f"output_dir={folder}/runs"], folder)
    for name in STAGES:
        (record,) = folder.glob(f"runs/*/{name}/stage.json")
        measurement.stages[name] = json.loads(record.read_text())["wall_s"]
    measurement.rest = parts_of_rest(folder, measurement.wall_s)
    return with_rest(measurement)


def parts_of_rest(folder: Path, wall_s: float) -> dict[str, float]:
    """The seconds of our command outside the stages, by what they went to, from the times of its lines and files.

    `imports` is measured apart, in a process that does nothing else; the check waits for as much.
    """
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    said = {
        what: [line["at"] for line in lines if words in line["text"]]
        for what, words in (("check", "settings and data of"), ("begins", " training, from "), ("ends", " done in "))
    }
    (comparison,) = folder.glob("runs/*/comparison.json")
    started = lines[0]["started"]
    compared, reported = (file.stat().st_mtime - started for file in (comparison, comparison.with_name("report.html")))
    imports = run([sys.executable, "-c", "import rlhf_pipeline.run.worker"], folder).wall_s
    check = said["begins"][0] - said["check"][0]
    between = sum(begin - end for end, begin in zip(said["ends"], said["begins"][1:], strict=False))
    return {
        "start": said["check"][0],
        "imports": min(imports, check),
        "check": max(0.0, check - imports),
        "between stages": between,
        "comparison": compared - said["ends"][-1],
        "report": reported - compared,
        "end": wall_s - reported,
    }


def run_one_script(recipe: Path, folder: Path) -> Measurement:
    measurement = run(by_hand(STAGES, recipe, folder), folder)
    (line,) = (folder / "runs" / "seconds.jsonl").read_text().splitlines()
    measurement.stages |= {name: seconds for name, seconds in json.loads(line).items() if name in STAGES}
    return with_rest(measurement)


def run_four_scripts(recipe: Path, folder: Path) -> Measurement:
    parts = [run(by_hand([name], recipe, folder), folder) for name in STAGES]
    lines = [json.loads(line) for line in (folder / "runs" / "seconds.jsonl").read_text().splitlines()]
    return with_rest(
        Measurement(
            sum(part.wall_s for part in parts),
            sum(part.cpu_s for part in parts),
            max(part.peak_bytes for part in parts),
            {name: line[name] for name, line in zip(STAGES, lines, strict=True)},
        )
    )


def by_hand(stages: list[str], recipe: Path, folder: Path) -> list[str]:
    script = str(Path(__file__).with_name("hand_written.py"))
    return [sys.executable, script, *stages, "--out", f"{folder}/runs", "--recipe", str(recipe)]


def with_rest(measurement: Measurement) -> Measurement:
    measurement.stages[WITHOUT_A_STAGE] = measurement.wall_s - sum(measurement.stages.values())
    return measurement


def run(command: list[str], folder: Path) -> Measurement:
    """Run a command to its end; what it and the processes it waited for used is in its `rusage`.

    What it says is written to `lines.jsonl` in the folder, each line with the seconds since the start.
    """
    environment = os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": f"{folder}/cache"}
    lines: list[dict[str, Any]] = []
    started, began = time.perf_counter(), time.time()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout
    for line in process.stdout:
        lines.append({"at": time.perf_counter() - started, "started": began, "text": line})
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        last = "".join(line["text"] for line in lines)[-3000:]
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    if lines:
        (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kib = 1 if sys.platform == "darwin" else 1024
    return Measurement(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kib, {})


if __name__ == "__main__":
    main()
