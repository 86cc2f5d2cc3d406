"""Group relative policy optimization: TRL's GRPOTrainer, on the shared base."""

from typing import Any

from trl import GRPOConfig, GRPOTrainer

from rlhf_pipeline import kinds
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.stages import groups
from rlhf_pipeline.stages.groups import GroupTrainer
from rlhf_pipeline.stages.job import Inputs, Job

CONFIG = GRPOConfig
read = rows.prompts  # the rows of such a stage


class SharedGRPOTrainer(GroupTrainer, GRPOTrainer):
    """TRL's GRPOTrainer on the shared base, from exact checkpoints."""

    kind = kinds.get("grpo")

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.sampled(prompt_ids), None


TRAINER = SharedGRPOTrainer


def prepare(job: Job) -> Inputs:
    """See `groups.prepare`."""
    return groups.prepare(job, CONFIG)


def run(job: Job) -> dict[str, Any]:
    """See `groups.run`."""
    return groups.run(job, CONFIG, TRAINER)
