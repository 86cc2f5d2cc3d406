"""Do the tiny recipes learn what they should, seed after seed? Exits with 1 where one does not.

Runs each recipe afresh for each seed, as `rlhf-pipeline run tiny seed=1`, and reads its numbers back through `status
--json` and the logs. Overrides may follow, for example `model.quantization=nf4`.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import labeller

from rlhf_pipeline.recipe import TINY

WAITS = 3  # the exit code of a run that waits for people
GOLD_SFT = (0.3, 0.65)  # what is outside has learned too little, or leaves nothing to learn
FIRST_ZERO = {"objective/kl": 1e-3, "rewards/margins": 1e-4, "kl": 1e-4}  # 0 where the policy is its reference


@dataclass(frozen=True)
class Case:
    """A recipe, and what it should come to.

    Attributes:
        recipe: its name.
        overrides: what is changed.
        until: the last stage to run; None for all.
        gain: how much better than SFT every later policy must be, by the judge.
        of: which policies those are; by default all but SFT.
        accuracy: the least held-out accuracy of its reward stages.
        sft: between what the judge's mean after SFT must be.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    until: str | None = None
    gain: float = 0.20
    of: tuple[str, ...] = ()
    accuracy: float = 0.0
    sft: tuple[float, float] = GOLD_SFT


FUNCTION = 'ppo.rewards=[{function: "rlhf_pipeline.models.tiny.world:judge"}]'
CASES = {
    "tiny": Case("tiny", gain=0.25, accuracy=0.85),
    "function": Case("tiny", (FUNCTION,), until="ppo"),
    "kto": Case("tiny-kto"),
    "grpo": Case("tiny-grpo"),
    "rloo": Case("tiny-rloo"),
    "ensemble": Case("tiny-ensemble"),
    "best-of-n": Case("tiny-best-of-n", gain=0.15),
    "rlaif": Case("tiny-rlaif", of=("dpo",)),  # its critic answers no questions
    "rounds": Case("tiny-rounds", of=("dpo-3",)),
    "label": Case("tiny-label"),  # a labeller with the gold judge's mind clicks 200 times
    "constitution": Case("tiny-constitution", sft=(0.4, 0.75)),  # its SFT sees right and polite revisions, too
}


def first_logged(run: Path, stage: str, metric: str) -> float | None:
    """The first value of a number in a stage's log; None where its first row has none, or where it trains nothing."""
    file = run / stage / "metrics.jsonl"
    if not file.exists():
        return None
    with file.open() as lines:
        value = json.loads(lines.readline()).get(metric)
        return None if value is None else float(value)


def base_digest() -> str:
    return hashlib.sha256((TINY / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def choose(command: list[str], folder: str, seed: int) -> None:
    """Open the page of a run that waits, and have it labelled."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            labeller.label(server.stdout.readline().split()[-1], seed=seed)
        finally:
            server.terminate()


def measure(case: Case, seed: int, overrides: list[str]) -> dict[str, float]:
    """One fresh run; its numbers."""
    settings = [f"seed={seed}", *case.overrides, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf_pipeline"]
        until = ["--until", case.until] if case.until else []
        before = base_digest()
        run = [*command, "run", case.recipe, *settings, *until]
        while (code := subprocess.run(run, cwd=folder, stdout=subprocess.DEVNULL, check=False).returncode) == WAITS:
            choose([*command, "label", f"runs/{case.recipe}"], folder, seed)
        if code:
            raise SystemExit(f"{case.recipe} ended with {code}")
        if base_digest() != before:
            raise SystemExit("the base's weights changed")
        status = [*command, "status", case.recipe, *settings, "--json"]
        shown = json.loads(subprocess.run(status, cwd=folder, check=True, capture_output=True).stdout)
        row: dict[str, float] = {"seed": seed}
        for stage in shown["stages"]:
            name, metrics = stage["name"], stage["metrics"]
            if "judge_mean" in metrics:
                row[f"gold {name}"] = metrics["judge_mean"]
            elif "eval_accuracy" in metrics:
                row[f"accuracy {name}"] = metrics["eval_accuracy"]
            for metric in FIRST_ZERO if metrics else ():
                value = first_logged(Path(shown["run"]), name, metric)
                if value is not None:
                    row[f"first {metric} {name}"] = value
            if "objective/kl" in metrics:
                row[f"last KL {name}"] = metrics["objective/kl"]
        row["seconds"] = sum(stage["wall_s"] or 0.0 for stage in shown["stages"])
        return row


def wrong(case: Case, row: dict[str, float]) -> list[str]:
    """What in a run's numbers is not as in a pipeline that works."""
    found = []
    sft = row["gold sft"]
    if not case.sft[0] <= sft <= case.sft[1]:
        found.append(f"gold sft {sft:.3g}")
    for name, value in row.items():
        what, _, rest = name.partition(" ")
        if (
            (what == "gold" and rest != "sft" and rest in (case.of or rest) and value < sft + case.gain)
            or (what == "accuracy" and value < case.accuracy)
            or (what == "first" and abs(value) >= FIRST_ZERO[rest.partition(" ")[0]])
        ):
            found.append(f"{name} {value:.3g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--case", choices=CASES, action="append", help="which, once or several times; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_intermixed_args()
    all_wrong = []
    for name in arguments.case or CASES:
        case, rows = CASES[name], []
        print(f"\n{name}: {' '.join([case.recipe, *case.overrides, *arguments.overrides])}\n")
        for seed in arguments.seeds:
            rows.append(measure(case, seed, arguments.overrides))
            if len(rows) == 1:
                print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
            print("| " + " | ".join(f"{value:.3g}" for value in rows[-1].values()) + " |", flush=True)
            all_wrong += [f"{name}, seed {seed}: {what}" for what in wrong(case, rows[-1])]
        if len(rows) > 1:
            for word, of in (("mean", statistics.mean), ("least", min), ("most", max)):
                print(
                    f"| {word} | " + " | ".join(f"{of(row[key] for row in rows):.3g}" for key in [*rows[0]][1:]) + " |"
                )
        print(json.dumps(rows), flush=True)
    print("\n".join(["", *all_wrong] if all_wrong else ["", "all as it should be"]))
    sys.exit(1 if all_wrong else 0)


if __name__ == "__main__":
    main()
