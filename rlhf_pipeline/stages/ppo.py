"""Proximal policy optimization: policy, reference, reward and value as four roles on one base."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.prompts import check_data
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.judge import judge_policy
from rlhf_pipeline.stages.judge import prepare as prepare_judging
from rlhf_pipeline.stages.judge_along import GoldAlong


def prepare(job: Job) -> tuple[PPOConfig, PreTrainedTokenizerBase, dict[str, Dataset | None]]:
    """Build the trainer's config, the tokenizer, and the trainer's three datasets by their names.

    Raises:
        InputError: for settings or data that cannot work.
    """
    args = job.trainer_config(PPOConfig)
    if job.stage.data.holds_out and args.eval_strategy == "no":
        raise InputError(
            "prompts are held out, and nothing evaluates on them",
            place=f"stages.{job.name}.data.{'eval_data' if job.stage.data.eval_data else 'eval_fraction'}",
            hint="set `eval_steps` in `trainer`, or remove it",
        )
    tokenizer = load_tokenizer(job.recipe.model)
    prepared = rows.prompts(job.stage.data, tokenizer, job.recipe.seed)
    job.require_eval_data(args, prepared.held_out)
    demonstrations = None
    if job.stage.ptx_data:
        demonstrations = rows.demonstrations(job.stage.ptx_data, tokenizer, job.recipe.seed).train
    try:
        check_data(args, prepared.train, prepared.held_out, demonstrations)
    except ValueError as error:
        raise InputError(str(error), place=f"stages.{job.name}") from None
    return (
        args,
        tokenizer,
        {
            "train_dataset": prepared.train,
            "eval_dataset": prepared.held_out,
            "ptx_dataset": demonstrations,
        },
    )


def run(job: Job) -> dict[str, Any]:
    """Train, judge and save the policy's adapter, from the last checkpoint if there is one; returns the final metrics.

    Raises:
        RuntimeError: training moved a weight that must stay, or left one that must move.
    """
    job.progress.tell("loading")
    args, tokenizer, datasets = prepare(job)
    set_seed(job.recipe.seed)
    reward_lora = job.recipe.stages[str(job.stage.reward)].lora
    shared = SharedBase(load_base(job.recipe.model, tokenizer), job.stage.lora, job.init, job.reward, reward_lora)
    trainer = PPOTrainer(
        args,
        tokenizer,
        shared,
        **datasets,
        callbacks=[MetricsLog(job.folder / "metrics.jsonl"), job.checkpoints(), job.progress],
        samples_file=job.folder / "samples.jsonl",
    )
    judging = prepare_judging(job)
    if judging and judging[0].along:
        trainer.add_callback(GoldAlong(trainer, *judging))
    before = shared.checksums()
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    check_weights(before, shared.checksums(), trainer.trained_roles)
    trainer.save_model(str(job.artifact))
    metrics = job.trained(final(trainer.state.log_history))
    return metrics | judge_policy(job, shared.policy, tokenizer)


def check_weights(before: dict[str, int], after: dict[str, int], trained: set[str]) -> None:
    """See that PPO moved the weights of the roles it trains, and no others.

    Args:
        before: `SharedBase.checksums` before training.
        after: the same afterwards.
        trained: the roles that were to move.

    Raises:
        RuntimeError: it did not.
    """
    moved = {name for name in before if before[name] != after[name]}
    for name in sorted(moved - trained):
        raise RuntimeError(f"training changed the weights of `{name}`, which must stay")
    for name in sorted(trained - moved):
        raise RuntimeError(f"training left the weights of `{name}` as they were")
