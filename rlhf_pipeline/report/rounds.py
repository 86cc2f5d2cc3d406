"""The picture of rounds: what their policies came to, one round after the other. No torch."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import BASE
from rlhf_pipeline.report import charts
from rlhf_pipeline.report.charts import Line, Panel
from rlhf_pipeline.report.figures import Picture, entry
from rlhf_pipeline.report.gather import Run, Series, mapping, number, reply_numbers

NUMBERED = re.compile(r"(?P<name>.+)-(?P<round>[1-9]\d*)")  # what a recipe's `rounds` makes of a stage's name
CAPTION = (
    "The policy that each round ends with; round 0 is where the first one starts. Reward and judge should rise. Where "
    "the reward rises and the judge does not, the rounds please the reward model alone; where KL grows and neither "
    "rises, a further round is not worth it."
)


def of_rounds(runs: Sequence[Run]) -> list[Picture]:
    """Reward, judge and KL over the rounds of the runs that have some."""
    measures: tuple[tuple[str, Callable[[Run, str], float | None]], ...] = (
        ("reward", lambda run, policy: _mean(run, policy, "reward")),
        ("judge", _judged),
        ("KL", lambda run, policy: _mean(run, policy, "kl")),
    )
    found = [(i, run, policies(run)) for i, run in enumerate(runs)]
    panels = []
    for title, measure in measures:
        lines = []
        for i, run, names in found:
            values = [(at, value) for at, name in enumerate(names) if (value := measure(run, name)) is not None]
            if len(values) > 1:
                steps, heights = (np.array(column, dtype=np.float64) for column in zip(*values, strict=True))
                lines.append(Line(run.label if len(runs) > 1 else title, Series(steps, heights), i))
        if lines:
            panels.append(Panel(lines, title=title))
    if not panels:
        return []
    legend = {line.label: entry(line) for panel in panels for line in panel.lines} if len(runs) > 1 else {}
    return [Picture("Rounds", CAPTION, charts.curves("Rounds", *panels, x_label="round"), list(legend.values()))]


def policies(run: Run) -> list[str]:
    """The policy that the first round starts from, and those that the rounds end with; none without rounds."""
    numbered = {
        (match["name"], int(match["round"])): stage.name
        for stage in run.stages
        if (match := NUMBERED.fullmatch(stage.name)) and (kind := kinds.find(stage.kind)) and kind.is_policy
    }
    firsts = [name for name, number in numbered if number == 1 and (name, 2) in numbered]
    if not firsts:
        return []
    last, number, found = firsts[-1], 1, []
    while (last, number) in numbered:
        found.append(numbered[last, number])
        number += 1
    start, of_rounds = found[0], {numbered[name, 1] for name in firsts}
    while start in of_rounds:
        stage = run.stage(start)
        start = stage.parents.get("init", BASE) if stage else BASE
    return [start, *found]


def _mean(run: Run, policy: str, key: str) -> float | None:
    """What the comparison says of a policy's replies on average; None where it does not say."""
    value = number(mapping(mapping(run.comparison.get("means")).get(policy)).get(key))
    of_replies = reply_numbers(run, policy, key)
    return float(of_replies.mean()) if value is None and len(of_replies) else value


def _judged(run: Run, policy: str) -> float | None:
    """The judge's mean of a policy, as its stage was judged, else as the comparison has it."""
    stage = run.stage(policy)
    judged = stage.final(kinds.JUDGED) if stage else None
    return _mean(run, policy, "judge") if judged is None else judged
