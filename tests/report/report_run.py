"""A run directory that was never run: every file that the report reads, with numbers that are known."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>document.title='hacked';console.error('hacked')</script></style></title></textarea>-->"
    "<img src=x onerror=\"console.error('hacked')\"><svg onload=alert(1)>{{ 7 * 7 }}{% raw %}&lt;b&gt;"
    "\"'><a href=javascript:alert(1)>x</a>\x00\x07\x1b[31m\x85\ud800\u202eRTL\u2066 שלום عالم $x^2$ \\N{BULLET}"
)
LONG = "W" * 100_000
POLICIES = ("base", "sft", "ppo", "dpo")
VERSIONS = {"trl": "1.12.0", "torch": "2.13.0"}


def write_lines(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(kind: str, steps: int) -> list[dict[str, Any]]:
    noise = random.Random(kind)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done, row = step / steps, {"step": step, "time": 1.8e9 + step, "learning_rate": 1e-3 * (1 - step / steps)}
        if kind == "ppo":
            row |= {
                "objective/kl": 3 * done, "objective/scores": 1 + done + noise.gauss(0, 0.1), "reply/length": 9.0,
                "reply/ended": 0.9, "reply/distinct_2": 0.5 - 0.1 * done, "reply/unique": 0.95,
                "policy/entropy_avg": 0.7, "policy/clipfrac_avg": 0.05, "val/clipfrac_avg": 0.1,
                "value/explained_variance": done - 2.5 * (1 - done), "loss/policy_avg": -0.01,
                "loss/value_avg": 1 - done,
            }  # fmt: skip
        else:
            row |= {"loss": 0.69 - 0.4 * done + noise.gauss(0, 0.02), "mean_token_accuracy": 0.5 + 0.3 * done}
        if kind == "reward":
            row |= {
                "accuracy": 0.5 + 0.3 * done,
                "margin": done,
                "min_reward": -1.0,
                "mean_reward": 0.0,
                "max_reward": 2.0,
            }
        if kind == "dpo":
            row |= {
                "rewards/accuracies": 0.8,
                "rewards/margins": done,
                "rewards/chosen": done,
                "rewards/rejected": -done,
            }
        rows.append(row)
    if kind == "ppo":
        rows += [
            {
                "step": step, "time": 1.8e9, "gold/judge_mean": judge, "gold/judge_mean_se": 0.03,
                "gold/score_mean": score, "gold/kl": 0.0,
            }
            for step, judge, score in ((0, 0.5, 1.0), (steps // 2, 0.8, 1.5), (steps, 0.9, 2.0))
        ]  # fmt: skip
    return rows


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Held-out pairs of a reward model that goes by length: a longer chosen reply is found more often."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        longer = draw.randint(-8, 8)
        margin = draw.gauss(0.6 + 0.15 * longer, 1.5)
        rejected = draw.gauss(0, 1)
        rows.append(
            {"chosen": rejected + margin, "rejected": rejected, "chosen_length": 10 + longer, "rejected_length": 10}
        )
    return rows


def comparison(count: int, text: str = "") -> dict[str, Any]:
    draw = random.Random(1)
    rows = [
        {
            "prompt": f"Question {i}? {text}" if i % 2 else [
                {"role": "system", "content": f"Be kind. {text}"}, {"role": "user", "content": f"Question {i}?"},
            ],
            "replies": {
                policy: {
                    "text": f"reply {i} of {policy} {text}", "tokens": 5 + i % 3, "ended": bool(i % 3), "kl": 0.1 * j,
                    "reward": j + draw.gauss(0, 1), "judge": float(draw.random() < 0.3 + 0.2 * j),
                }
                for j, policy in enumerate(POLICIES)
            },
        }
        for i in range(count)
    ]  # fmt: skip
    return {
        "run": "/elsewhere/run", "made_of": {}, "policies": list(POLICIES), "reference": "sft", "reward": "reward",
        "judge": "world:judge", "ai_judge": "base", "ai_judge_figures": {"judge/agreement": 0.8}, "rows": rows,
        "means": {},
        "settings": {"prompts": "evaluate.data", "n": count, "temperature": 0.7, "max_new_tokens": 24, "seed": 1},
        "win_rates": [
            {"a": a, "b": b, "by": by, "win_rate": 0.7, "low": 0.6, "high": 0.8, "ties": 0.1}
            for by in ("judge", "ai_judge", "reward") for a, b in (("ppo", "sft"), ("dpo", "sft"), ("dpo", "ppo"))
        ],
    }  # fmt: skip


def write(run: Path, *, steps: int = 60, text: str = "", name: str = "made-up") -> Path:
    """Write a finished run of all four kinds.

    Args:
        run: the folder to make.
        steps: of each stage.
        text: what prompts, replies, errors, settings and data names hold besides.
        name: of the run; anything, though no recipe could have it.
    """
    run.mkdir(parents=True)
    stages = {
        "sft": {"kind": "sft", "init": "base", "reward": None},
        "reward": {"kind": "reward", "init": "sft", "reward": None},
        "ppo": {"kind": "ppo", "init": "sft", "reward": "reward"},
        "dpo": {"kind": "dpo", "init": "sft", "reward": None},
    }
    recipe = {"name": name, "seed": 7, "model": {"path": f"/gone/model{text}", "quantization": "nf4"}, "stages": stages}
    (run / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for stage, made in stages.items():
        folder = run / stage
        folder.mkdir()
        record = {
            "name": stage, **made, "state": "done", "error": None, "wall_s": 61.0, "peak_memory_bytes": 3 * 2**30,
            "inputs": {"kind": stage, "model": "model@0123456789abcdef", "data": f"rows{text}.jsonl@{'ab' * 16}",
                       "trainer.learning_rate": 1e-3, "trainer.optim": f"adam{text}"},
            "judging": {"judge": "world:judge", "data": "heldout.jsonl@" + "cd" * 16}, "versions": VERSIONS,
            "started_at": "2026-01-02T03:04:05+00:00", "finished_at": "2026-01-02T03:05:06+00:00",
            "command": f"rlhf-pipeline run {text}", "git": {"commit": "f00d", "dirty": False},
            "machine": {"host": "there", "device": "one GPU"},
            "metrics": {} if stage == "reward" else {"judge_mean": 0.75},
            "parent_weights": {name: sha_of(name) for name in (made["init"], made["reward"]) if name in stages},
            "gates_ignored": {},
            "gates": {f"loss{text}": {"bound": "<= 1", "passed": True}} if stage == "sft" else {},
            "artifact": f"{stage}/adapter",
            "artifact_files": {"adapter_model.safetensors": [len(weights_of(stage)), sha_of(stage)]},
        }  # fmt: skip
        (folder / "stage.json").write_text(json.dumps(record), encoding="utf-8")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights_of(stage))
        write_lines(folder / "metrics.jsonl", metrics(stage, steps))
        if stage != "reward":
            judged = {"prompt": f"Q {text}", "completion": f"A of {stage} {text}", "judge": 1.0}
            write_lines(folder / "samples.jsonl", [judged])
    write_lines(run / "reward" / "pairs.jsonl", pairs(400))
    (run / "comparison.json").write_text(json.dumps(comparison(20, text)), encoding="utf-8")
    return run


def weights_of(stage: str) -> bytes:
    """What stands for a stage's weights."""
    return f"weights of {stage}".encode()


def sha_of(stage: str) -> str:
    """Their SHA-256."""
    return hashlib.sha256(weights_of(stage)).hexdigest()


def change(run: Path, stage: str, **values: Any) -> None:
    """Change a stage's record."""
    file = run / stage / "stage.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
