"""Several reward models as one: what each trains with, what it leaves behind, and the numbers of all together."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pipeline import kinds
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.ppo.forward import disagreement
from rlhf_pipeline.rundir import durable, strict_json
from rlhf_pipeline.rundir.layout import MEMBER
from rlhf_pipeline.shares import standard_error
from rlhf_pipeline.stages.job import Inputs

SAID = "member.json"  # beside a member's weights until the artifact is put together: what `Trained` has
OWN = tuple(number.metric for number in kinds.get("reward").numbers)  # those that are kept of each member


@dataclass(frozen=True)
class Trained:
    """What a member that is trained leaves beside its weights.

    Attributes:
        metrics: its final numbers, under TRL's names.
        pairs: its scores of the held-out pairs that are written down, `chosen` and `rejected`; nothing without any.
        held_out: its scores of the held-out pairs that it was evaluated on, chosen and rejected, `[2][pairs]`.
    """

    metrics: dict[str, Any]
    pairs: dict[str, list[float]]
    held_out: list[list[float]]


def seed_of(member: int, seed: int) -> int:
    """The seed of a member, which that of the recipe and its number decide; the first one has the recipe's own."""
    return seed if member == 1 else int(np.random.SeedSequence((seed, member)).generate_state(1)[0])


def inputs_of(member: int, inputs: Inputs, folder: Path, seed: int, bootstrap: bool) -> Inputs:
    """What a member trains with.

    Args:
        member: its number, from 1.
        inputs: the stage's.
        folder: for its checkpoints.
        seed: the recipe's.
        bootstrap: give it a sample of the pairs to train on, as many as there are, drawn with replacement.
    """
    args, data = copy.copy(inputs.args), inputs.data
    args.output_dir, args.seed = str(folder), seed_of(member, seed)
    if args.data_seed is not None:
        args.data_seed = seed_of(member, args.data_seed)
    if member > 1:
        args.report_to = []  # to a tracker, all would be one series
    if bootstrap:
        drawn = np.random.default_rng((seed, member)).integers(len(data.train), size=len(data.train))
        data = replace(data, train=data.train.select(drawn))
    return inputs._replace(args=args, data=data)


def write_member(folder: Path, trained: Trained) -> None:
    """Put what a member leaves beside its weights."""
    (folder / SAID).write_text(json.dumps(asdict(trained)), encoding="utf-8")


def read_member(folder: Path) -> Trained:
    """What `write_member` wrote."""
    return Trained(**json.loads((folder / SAID).read_text(encoding="utf-8")))


def put_together(folders: Sequence[Path], artifact: Path) -> None:
    """Make one artifact of the members' adapters: the first one is its own, and the further ones are within it."""
    for number, folder in enumerate(folders, 1):
        place = artifact if number == 1 else artifact / f"{MEMBER}{number}"
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(SAID, durable.MANIFEST))


def metrics(trained: Sequence[Trained], center: float | None) -> dict[str, Any]:
    """The final numbers of an ensemble, under TRL's names.

    Of training they are the means of the members' own. On the held-out pairs they are those of the members' mean
    scores, the loss among them; `eval_disagreement` is the standard deviation of the members' scores of a reply, and
    `eval_margin_disagreement` that of their margins, the mean over all. Under `member/<number>/` is what each member
    came to by itself.

    Args:
        trained: the members.
        center: `center_rewards_coefficient`.
    """
    names = dict.fromkeys(name for member in trained for name in member.metrics)
    found: dict[str, Any] = {name: _mean([member.metrics.get(name) for member in trained]) for name in names}
    if trained[0].held_out:
        found |= held_out_metrics(torch.tensor([member.held_out for member in trained]), center)
    for number, member in enumerate(trained, 1):
        found |= {f"member/{number}/{name}": member.metrics[name] for name in OWN if name in member.metrics}
    return found


def held_out_metrics(scores: Tensor, center: float | None) -> dict[str, float]:
    """The numbers of an ensemble on held-out pairs; see `metrics`.

    Args:
        scores: `[members, 2, pairs]`, those of chosen and of rejected replies.
        center: the weight of the mean of (chosen + rejected)² in the loss (Eisenstein et al. 2023, "Helping or
            Herding?", equation 2); None for none.
    """
    scores = scores.double()
    chosen, rejected = mean = scores.mean(0)
    loss = -logsigmoid(chosen - rejected).mean() + (center or 0.0) * (chosen + rejected).square().mean()
    right, pairs = int((chosen > rejected).sum()), len(chosen)
    return {
        "eval_loss": loss.item(),
        "eval_accuracy": right / pairs,
        "eval_accuracy_se": standard_error(right, pairs),
        "eval_pairs": pairs,
        "eval_margin": (chosen - rejected).mean().item(),
        "eval_min_reward": mean.min().item(),
        "eval_mean_reward": mean.mean().item(),
        "eval_max_reward": mean.max().item(),
        "eval_disagreement": disagreement(scores).mean().item(),
        "eval_margin_disagreement": disagreement(scores[:, 0] - scores[:, 1]).mean().item(),
    }


def _mean(values: Sequence[Any]) -> float | None:
    """The mean of numbers; None where one of them is not known."""
    return None if None in values else sum(values) / len(values)


def of_pairs(trained: Sequence[Trained]) -> dict[str, list[float]]:
    """The members' mean scores of pairs, `chosen` and `rejected`, and the standard deviations, of margins too."""
    chosen, rejected = (
        torch.tensor([member.pairs[side] for member in trained], dtype=torch.float64) for side in ("chosen", "rejected")
    )
    spread = {"chosen_std": chosen, "rejected_std": rejected, "margin_std": chosen - rejected}
    return {"chosen": chosen.mean(0).tolist(), "rejected": rejected.mean(0).tolist()} | {
        name: disagreement(values).tolist() for name, values in spread.items()
    }


def write_pairs(scores: dict[str, list[float]], pairs: rows.Prepared, file: Path) -> None:
    """Write what a reward model says of held-out pairs: one JSON object a line, in the data's order.

    Each has what `scores` has, and the tokens of both replies with their EOS, before any cut, `chosen_length` and
    `rejected_length`.
    """
    table, count = pairs.held_out_table, len(scores["chosen"])
    assert table is not None
    lengths = {
        f"{name}_length": rows.column(table, f"{name}_length")[:count].tolist() for name in ("chosen", "rejected")
    }
    lines = zip(*(scores | lengths).values(), strict=True)
    written = (strict_json.dumps(dict(zip(scores | lengths, line, strict=True))) + "\n" for line in lines)
    durable.write_text(file, "".join(written))


def too_long(train: Dataset, limit: int | None) -> int:
    """How many pairs have a reply, with its prompt, of more tokens than `max_length`: TRL drops them without a word."""
    if limit is None:
        return 0
    columns = train.with_format("arrow")
    lengths = [pyarrow.compute.list_value_length(columns[f"{side}_ids"][:]) for side in ("chosen", "rejected")]
    return int((np.maximum(*(length.to_numpy() for length in lengths)) > limit).sum())
