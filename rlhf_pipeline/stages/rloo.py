"""REINFORCE leave-one-out: TRL's RLOOTrainer, on the shared base."""

from typing import Any

from torch import Tensor
from trl import RLOOConfig, RLOOTrainer
from trl.trainer import rloo_trainer

from rlhf_pipeline import kinds, ranks
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.model.training or ranks.count() == 1:
            return super()._generate_and_score_completions(inputs)
        # TRL gathers KL, and only that, by a function of Accelerate's; in evaluation each rank has rewards of its own.
        gather, rloo_trainer.gather = rloo_trainer.gather, lambda values: values
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            rloo_trainer.gather = gather


TRAINER = SharedRLOOTrainer


def prepare(job: Job) -> Inputs:
    """See `groups.prepare`."""
    return groups.prepare(job, CONFIG)


def run(job: Job) -> dict[str, Any]:
    """See `groups.run`."""
    return groups.run(job, CONFIG, TRAINER)
