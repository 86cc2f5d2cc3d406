"""What is told of a run by how its process has ended."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.sweep import check, keys
from rlhf_pipeline.sweep import run as sweeps
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.proposals import Proposal

KL = "ppo.trainer.kl_coef=0.1,0.3"
GOAL = Goal("ppo", "judge_mean", "maximize", ("gold/judge_mean",))


class Source:
    """In a study's place: what it was told."""

    def __init__(self, worse: bool = False) -> None:
        self.told: list[tuple[str, ...]] = []
        self.worse = worse

    def report(self, proposal: Proposal, values: dict[int, float]) -> bool:
        return self.worse

    def done(self, proposal: Proposal, value: float) -> None:
        self.told.append(("done", str(value)))

    def failed(self, proposal: Proposal) -> None:
        self.told.append(("failed",))

    def pruned(self, proposal: Proposal) -> None:
        self.told.append(("pruned",))


@pytest.fixture
def sweeping(tmp_path: Path) -> sweeps._Sweep:
    """A sweep over β whose first run is at work."""
    swept, fixed = keys.parse([KL, f"output_dir={tmp_path}"])
    loader = check.Loader("tiny", fixed, swept)
    corners = loader.all(keys.grid(swept))
    found = sweeps._Sweep(loader, check.shared(corners), GOAL, [{}], lambda line: None)
    found.total = 2
    return found


def at_work(sweeping: sweeps._Sweep, code: int | None, asked: bool) -> Any:
    combination = keys.combination({"ppo.trainer.kl_coef": 0.1}, sweeping.loader.words)
    child = SimpleNamespace(
        exit_code=code, asked=asked, news=list, problem=lambda: "it fell over", stops=0,
        directory=sweeping.loader.folder / combination.name,
    )  # fmt: skip
    child.stop = lambda: setattr(child, "stops", child.stops + 1)
    child.directory.mkdir(parents=True)
    proposals = [Proposal(combination), Proposal(combination)]  # the same values, proposed twice
    sweeping.made[combination.name] = combination
    sweeping.at_work[combination.name] = sweeps._AtWork(child, proposals, 1, {"CUDA_VISIBLE_DEVICES": "3"}, 0.0)
    return child


def write(child: Any, stage: str, **record: Any) -> None:
    (child.directory / stage).mkdir()
    (child.directory / stage / "stage.json").write_text(json.dumps({"name": stage, "kind": stage} | record))


@pytest.mark.parametrize(
    ("code", "asked", "stopping", "told", "why"),
    [
        (0, False, False, ("done", "0.5"), None),
        (130, True, True, None, None),  # the same command goes on with it
        (130, True, False, ("pruned",), None),
        (130, False, False, ("failed",), "it fell over"),  # somebody else has stopped it
        (1, False, False, ("failed",), "it fell over"),
        (1, True, False, ("failed",), "it fell over"),  # while it was about to stop
        (-9, False, False, ("failed",), "it fell over"),
        (0, True, False, ("done", "0.5"), None),  # it was done before it heard that it should stop
    ],
)
def test_what_is_told(sweeping, code, asked, stopping, told, why):
    child, source = at_work(sweeping, code, asked), Source()
    write(child, "ppo", state="done", artifact="ppo/adapter", metrics={"judge_mean": 0.5})
    sweeping.stopping = stopping
    sweeping._look("kl_coef-0.1", source)
    assert source.told == ([told] * 2 if told else [])
    assert sweeping.failed == ({"kl_coef-0.1": why} if why else {})
    assert sweeping.pruned == ({"kl_coef-0.1"} if told == ("pruned",) else set())
    assert sweeping.at_work == {} and sweeping.free == [{}, {"CUDA_VISIBLE_DEVICES": "3"}]


def test_a_run_without_the_metric_has_failed(sweeping):
    child, source = at_work(sweeping, 0, False), Source()
    write(child, "ppo", state="done", artifact="ppo/adapter", metrics={})
    sweeping._look("kl_coef-0.1", source)
    assert source.told == [("failed",)] * 2
    assert sweeping.failed == {"kl_coef-0.1": "stage `ppo` has no metric `judge_mean`"}


@pytest.mark.parametrize("worse", [True, False])
def test_one_that_is_worse_than_others_is_asked_to_stop_once(sweeping, worse):
    child = at_work(sweeping, None, False)
    sweeping._look("kl_coef-0.1", Source(worse))
    assert child.stops == int(worse) and "kl_coef-0.1" in sweeping.at_work
    child.asked = worse
    sweeping._look("kl_coef-0.1", Source(worse))
    assert child.stops == int(worse)


@pytest.mark.parametrize(
    ("stage", "record", "ends"),
    [
        ("sft", {"state": "failed", "error": "x"}, True),
        ("sft", {"state": "done, gate closed", "artifact": "sft/adapter", "error": "a gate is closed: x"}, True),
        ("ppo", {"state": "failed", "error": "x"}, False),
    ],
)
def test_the_sweep_ends_where_a_stage_fails_that_all_runs_share(sweeping, stage, record, ends):
    child = at_work(sweeping, 1, False)
    write(child, stage, **record)
    if stage == "sft" and "artifact" in record:
        (child.directory / "sft" / "adapter").mkdir()
        (child.directory / "sft" / "adapter" / "adapter_model.safetensors").write_bytes(b"w")
    if not ends:
        sweeping._look("kl_coef-0.1", Source())
        return
    with pytest.raises(RunError, match="stage `sft`, which is the same in all runs: it fell over") as raised:
        sweeping._look("kl_coef-0.1", Source())
    assert "the same command goes on from here" in raised.value.hint
