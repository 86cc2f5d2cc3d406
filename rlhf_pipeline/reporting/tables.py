"""Stages as a table on the terminal, and as one JSON object."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_pipeline.plan import StagePlan

# The numbers that matter for each kind, in order; those a stage does not have are left out.
KEY_METRICS = {
    "sft": ["train_loss", "eval_loss", "judge_mean"],
    "reward": ["eval_accuracy", "eval_margin", "accuracy"],
    "ppo": ["objective/kl", "objective/scores", "judge_mean"],
    "dpo": ["eval_rewards/accuracies", "rewards/margins", "judge_mean"],
}
STYLES = {
    "done": "green", "stale": "yellow", "partial": "yellow", "failed": "red", "blocked": "red", "running": "cyan",
}  # fmt: skip


def as_json(run: Path, plans: list[StagePlan]) -> dict[str, Any]:
    """The object that `plan --json` and `status --json` print: `{"run": …, "stages": [{…}, …]}`."""
    return {"run": str(run), "stages": [plan.summary() for plan in plans]}


def results(run: Path, plans: list[StagePlan], console: Console) -> None:
    """Print what each stage made: state, time, numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "state", "time", "numbers"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        summary = plan.summary()
        wall_s = summary["wall_s"]
        numbers = _numbers(plan.kind, summary["metrics"])
        unremarkable = plan.state == "done" and numbers and not plan.record.get("gates_ignored")
        about = numbers if unremarkable else escape(plan.reason)
        time = "" if wall_s is None else f"{wall_s:.0f} s"
        table.add_row(plan.name, f"[{STYLES.get(plan.state, 'default')}]{plan.state}[/]", time, about)
    console.print(table)
    console.print(f"run directory: {run}", style="dim", highlight=False, soft_wrap=True)


def intentions(
    plans: list[StagePlan],
    chosen: list[StagePlan],
    shapes: dict[str, list[dict[str, str | None]]],
    remote_code: str | None,
    console: Console,
) -> None:
    """Print what a run would do and why, and how its data are read.

    Args:
        plans: every stage.
        chosen: those that would run.
        shapes: from `plan.shapes`.
        remote_code: the model whose own code would be run; None where none would.
        console: where to.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "kind", "from", "state", "will run", "why"):
        table.add_column(column, overflow="fold")
    names = {plan.name for plan in chosen}
    for plan in plans:
        start = plan.init + (f" + {plan.reward}" if plan.reward else "")
        state = f"[{STYLES.get(plan.state, 'default')}]{plan.state}[/]"
        table.add_row(plan.name, plan.kind, start, state, "yes" if plan.name in names else "no", escape(plan.reason))
    console.print(table)
    console.print()
    read = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    read.add_column("stage", no_wrap=True)
    for column in ("data", "read as"):
        read.add_column(column, overflow="fold")
    for plan in plans:
        for source in shapes[plan.name]:
            key = "" if source["key"] == "data" else f"{source['key']}: "
            path = str(source["path"])
            known = source["shape"] or "what its columns say, once it is downloaded"
            read.add_row(
                plan.name, escape(key + (Path(path).name if Path(path).is_absolute() else path)), escape(known)
            )
    console.print(read)
    if remote_code:
        console.print(
            f"trust_remote_code: code that comes with {remote_code} will be run", style="bold", soft_wrap=True
        )


def _numbers(kind: str, metrics: dict[str, Any]) -> str:
    known = [(name, metrics[name]) for name in KEY_METRICS[kind] if isinstance(metrics.get(name), (int, float))]
    return "  ".join(f"{name} {value:.3g}" for name, value in known[:3])
