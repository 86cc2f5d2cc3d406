"""The tiny recipe: all four stages, what they learn, and what a second run does."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import short_run
import torch
from safetensors.torch import load_file

from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.run.launch import Launcher
from tests.arena.arena_server import serving

pytestmark = pytest.mark.slow

# Fewer rows and steps than the recipe's own, and still enough to learn from.
LEARNING = (
    "evaluate.along=0",
    "reward.data.limit=1200",
    "ppo.trainer.total_episodes=512",
    "ppo.trainer.num_sample_generations=4",
    "dpo.data.limit=2000",
    "dpo.trainer.max_steps=48",
)


def run_warm(server: Launcher, folder: Path, *arguments: str) -> str:
    """`run tiny` with workers from a server that has imported already; what it said."""
    code, said = short_run.run_warm(server, folder, "tiny", *arguments)
    assert code == 0, said
    return said


def stages_of(cwd: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, err = short_run.ask(cwd, "status", *arguments, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["run"].endswith("/runs/tiny")
    return {stage["name"]: stage for stage in shown["stages"]}


def logged(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def base_digest() -> str:
    return hashlib.sha256((TINY / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm_server: Launcher) -> tuple[Path, str]:
    """`run tiny` in an empty folder; the folder, and what the command said."""
    folder = tmp_path_factory.mktemp("tiny")
    before = base_digest()
    said = run_warm(warm_server, folder, *LEARNING)
    assert base_digest() == before
    return folder, said


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the short run, and its data."""
    shutil.copytree(tiny_run.parent, tmp_path / "runs")
    short_run.write_data(tmp_path)
    return tmp_path


def test_ends_with_a_table_of_all_stages(finished: tuple[Path, str]) -> None:
    lines = finished[1].splitlines()
    assert [line.split()[0] for line in lines if " done " in line and " done in " not in line] == [
        "sft",
        "reward",
        "ppo",
        "dpo",
    ]
    table = finished[1][finished[1].index("numbers, before → after") :]
    assert re.search(r"judge 0\.\d+ → 0\.\d+", table) and re.search(r"held-out accuracy 0\.\d+", table)


def test_learning_shows_in_gold_and_held_out_numbers(finished: tuple[Path, str]) -> None:
    stages = stages_of(finished[0], "tiny", *LEARNING)
    assert list(stages) == ["sft", "reward", "ppo", "dpo"]
    assert all(stage["state"] == "done" and stage["wall_s"] > 0 for stage in stages.values())
    gold = {name: stages[name]["metrics"]["judge_mean"] for name in ("sft", "ppo", "dpo")}
    assert 0.3 <= gold["sft"] <= 0.65
    assert gold["ppo"] >= gold["sft"] + 0.2
    assert gold["dpo"] >= gold["sft"] + 0.2
    assert 0.8 <= stages["reward"]["metrics"]["eval_accuracy"] < 1.0


def test_policy_and_reference_are_equal_at_the_first_step(finished: tuple[Path, str]) -> None:
    run = finished[0] / "runs" / "tiny"
    assert abs(logged(run, "ppo")[0]["objective/kl"]) < 1e-3
    assert abs(logged(run, "dpo")[0]["rewards/margins"]) < 1e-4
    # Later they are not: the numbers are of two different adapters.
    assert logged(run, "ppo")[-1]["objective/kl"] > 0.1
    assert logged(run, "dpo")[-3]["rewards/margins"] > 0.1


def test_every_artifact_is_an_adapter_of_its_own(finished: tuple[Path, str]) -> None:
    run = finished[0] / "runs" / "tiny"
    weights = {name: load_file(run / name / "adapter" / "adapter_model.safetensors") for name in ("sft", "ppo", "dpo")}
    assert list(weights["ppo"]) == list(weights["dpo"]) == list(weights["sft"])
    for name in ("ppo", "dpo"):
        assert any(not torch.equal(weights[name][key], weights["sft"][key]) for key in weights["sft"])
    head = load_file(run / "reward" / "adapter" / "adapter_model.safetensors")
    assert [tuple(head[key].shape) for key in head if "score" in key] == [(1, 128)]


def test_the_run_directory_holds_what_it_promises(finished: tuple[Path, str]) -> None:
    run = finished[0] / "runs" / "tiny"
    record = json.loads((run / "ppo" / "stage.json").read_text())
    assert record["state"] == "done" and record["init"] == "sft" and record["reward"] == "reward"
    assert record["inputs"]["trainer.kl_coef"] == 0.5 and record["versions"]["trl"] == importlib.metadata.version("trl")
    assert record["peak_memory_bytes"] > 100e6
    samples = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    judged = [sample["judge"] for sample in samples if "judge" in sample]
    assert sum(judged) / len(judged) == record["metrics"]["judge_mean"]
    along_the_way = samples[: -len(judged)]
    assert [sample["step"] for sample in along_the_way] == [step for step in range(1, 9, 2) for _ in range(4)]
    assert all(sample["completion"] and "score" in sample for sample in along_the_way)
    assert [row["step"] for row in logged(run, "ppo")] == list(range(1, 9))
    assert not (run / "ppo" / "work").exists() and (run / "ppo" / "log.txt").stat().st_size > 0
    again = short_run.ask(finished[0], "plan", str(run / "recipe.yaml"), "--json")
    assert {stage["state"] for stage in json.loads(again.out)["stages"]} == {"done"}


# Fewer prompts and updates than the recipe's own, and still enough to learn from.
LABELLED = ("evaluate.along=0", "candidates.data.limit=160", "ppo.trainer.total_episodes=640")


def test_what_is_labelled_through_the_page_teaches_the_policy(
    finished: tuple[Path, str], warm_server: Launcher, labeller: ModuleType
) -> None:
    """The whole loop: SFT, candidates, people who choose in the browser, a reward model, PPO.

    Its SFT is that of the run above, and is taken from there.
    """
    folder, _ = finished
    code, said = short_run.run_warm(warm_server, folder, "tiny-label", *LABELLED)
    assert code == 3 and "stage `feedback` waits for people: 0 of 200 labels" in said
    assert "training, from base" not in said
    with serving("label", "runs/tiny-label", folder=folder) as server:
        made = labeller.label(server.links[""])
    assert made["progress"]["reached"] and made["labels"] == 200
    assert made["learner"]["tested"] > 10
    code, said = short_run.run_warm(warm_server, folder, "tiny-label", *LABELLED)
    assert code == 0, said
    _, out, _ = short_run.ask(folder, "status", "runs/tiny-label", "--json")
    metrics = {stage["name"]: stage["metrics"] for stage in json.loads(out)["stages"]}
    assert metrics["feedback"]["label/labels"] == 200 and metrics["feedback"]["label/people"] == 1
    assert metrics["ppo"]["judge_mean"] >= metrics["sft"]["judge_mean"] + 0.2


@pytest.mark.slow
def test_a_second_run_does_nothing_at_once(copied: Path) -> None:
    before = (copied / "runs" / "tiny" / "ppo" / "stage.json").stat().st_mtime_ns
    probe = (
        "import sys; from rlhf_pipeline import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    arguments = ["run", "tiny", *short_run.OVERRIDES]
    done = subprocess.run([sys.executable, "-c", probe, *arguments], cwd=copied, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 5
    assert done.stdout.count(" done ") == 4
    assert (copied / "runs" / "tiny" / "ppo" / "stage.json").stat().st_mtime_ns == before


def test_a_changed_setting_runs_its_stage_and_no_other(copied: Path, warm_server: Launcher) -> None:
    changed = (*short_run.OVERRIDES, "ppo.trainer.total_episodes=8")
    said, _, table = run_warm(warm_server, copied, *changed).rpartition("ppo     done in")
    assert (
        "ppo     is retrained from the start: trainer.total_episodes 28 → 8; the former results are now in ppo." in said
    )
    assert "sft " not in said and "dpo " not in said and table
    (aside,) = (copied / "runs" / "tiny").glob("ppo.*")
    assert (aside / "adapter" / "adapter_model.safetensors").is_file()
    assert stages_of(copied, "tiny", *changed)["ppo"]["metrics"]["episode"] == 8


def test_a_changed_evaluation_judges_again_and_trains_nothing(
    tiny_run: Path, copied: Path, warm_server: Launcher
) -> None:
    said = run_warm(warm_server, copied, *short_run.OVERRIDES, "evaluate.n=4", "--only", "sft")
    assert "training, from" not in said and "sft     judged again" in said
    samples = (copied / "runs" / "tiny" / "sft" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4
    # The reloaded adapter is the one that was trained: the same seed gives the same first replies.
    former = (tiny_run / "sft" / "samples.jsonl").read_text().splitlines()[:4]
    assert [json.loads(line)["prompt"] for line in samples] == [json.loads(line)["prompt"] for line in former]


QUANTIZED = (
    *short_run.OVERRIDES,
    "model.quantization=nf4",
    "evaluate.along=0",
    "evaluate.n=2",
    "ppo.trainer.total_episodes=8",
    *(f"{stage}.trainer.max_steps=3" for stage in ("sft", "reward", "dpo")),
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on a 4-bit base."""
    folder = tmp_path_factory.mktemp("quantized")
    short_run.write_data(folder)
    # As `short_run.without_report`, which would import torch for it.
    command = (
        "from rlhf_pipeline import cli; from rlhf_pipeline.comparison import wanted\n"
        "cli.runs._report = lambda run: None; wanted.due = lambda run, recipe: None\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "run", "tiny", *QUANTIZED],
        cwd=folder, capture_output=True, text=True, timeout=400,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_all_stages_run_on_a_4_bit_base(quantized: Path) -> None:
    stages = stages_of(quantized, "tiny", *QUANTIZED)
    assert [stage["state"] for stage in stages.values()] == ["done"] * 4
    run = quantized / "runs" / "tiny"
    assert abs(logged(run, "ppo")[0]["objective/kl"]) < 1e-3
    assert abs(logged(run, "dpo")[0]["rewards/margins"]) < 1e-4
    weights = load_file(run / "dpo" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_adapters_and_another_does_not(
    quantized: Path, tmp_path: Path, warm_server: Launcher
) -> None:
    """Of another seed the first stage tells: all later ones would differ because they start from it.

    The first of the runs had a server of its own, in which Python orders sets otherwise.
    """

    def digests(folder: Path) -> dict[str, str]:
        files = (folder / "runs" / "tiny").glob("*/adapter/adapter_model.safetensors")
        return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    first = digests(quantized)
    same, other = tmp_path / "same", tmp_path / "other"
    for folder, *arguments in ((same, "seed=42"), (other, "seed=2", "--until", "sft")):
        folder.mkdir()
        short_run.write_data(folder)
        run_warm(warm_server, folder, *QUANTIZED, *arguments)
    assert set(first) == {"sft", "reward", "ppo", "dpo"} and first == digests(same)
    assert set(digests(other)) == {"sft"} and digests(other)["sft"] != first["sft"]
