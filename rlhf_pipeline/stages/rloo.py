"""REINFORCE leave-one-out: TRL's RLOOTrainer, on the shared base."""

from typing import Any

from trl import RLOOConfig, RLOOTrainer

from rlhf_pipeline import kinds
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.stages import groups
from rlhf_pipeline.stages.groups import GroupTrainer
from rlhf_pipeline.stages.job import Inputs, Job

CONFIG = RLOOConfig
read = rows.prompts  # the rows of such a stage


class SharedRLOOTrainer(GroupTrainer, RLOOTrainer):
    """TRL's RLOOTrainer on the shared base, from exact checkpoints."""

    kind = kinds.get("rloo")

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return self.sampled(prompt_ids)


TRAINER = SharedRLOOTrainer


def prepare(job: Job) -> Inputs:
    """See `groups.prepare`."""
    return groups.prepare(job, CONFIG)


def run(job: Job) -> dict[str, Any]:
    """See `groups.run`."""
    return groups.run(job, CONFIG, TRAINER)
