"""REINFORCE leave-one-out: TRL's RLOOTrainer, on the shared base."""

from typing import Any

from transformers import set_seed
from trl import RLOOConfig, RLOOTrainer

from rlhf_pipeline import kinds
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.rundir.layout import METRICS, SAMPLES
from rlhf_pipeline.stages import groups, soundness
from rlhf_pipeline.stages.groups import GroupTrainer
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.judge import judge_policy
from rlhf_pipeline.stages.judge import prepare as prepare_judging
from rlhf_pipeline.stages.judge_along import GoldAlong

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
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Resumes from the last checkpoint.

    The reference is what the stage starts from, as in `dpo.run`.
    """
    job.progress.tell("loading")
    args, tokenizer, data, _ = prepare(job)
    set_seed(job.recipe.seed)
    model = adapters.with_policy_adapter(load_base(job.recipe.model, tokenizer), job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = SharedRLOOTrainer.over(model, args, tokenizer, data.train, data.held_out, callbacks)
    for artifact, shape in job.reward_models:
        trainer.roles.add_reward(artifact, shape)
    rewards = mixture.load(job.recipe, job.name, trainer.roles.rewards, tokenizer)
    trainer.score_with(rewards, job.stage.scored_by)
    trainer.samples_file = job.folder / SAMPLES
    some = data.train[: soundness.PROMPTS]["input_ids"]
    soundness.check_generation(trainer.policy, some, tokenizer.pad_token_id, f"stages.{job.name}")
    judging = prepare_judging(job)
    if judging and judging[0].along:
        trainer.add_callback(GoldAlong(trainer, *judging))
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if data.held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    metrics = job.trained(final(trainer.state.log_history))
    return metrics | judge_policy(job, model, tokenizer)
