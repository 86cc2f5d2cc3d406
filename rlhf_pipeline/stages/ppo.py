"""Proximal policy optimization: TRL's PPOTrainer with its four models as four roles on one base."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf_pipeline import data
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import FROZEN, TRAINED, SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.monitoring.metrics import MetricsLog, final
from rlhf_pipeline.stages.evaluation import judge_policy
from rlhf_pipeline.stages.job import Job


def prepare(job: Job) -> tuple[PPOConfig, PreTrainedTokenizerBase, Dataset]:
    """Build the trainer's config, the tokenizer and the prompts.

    Raises:
        InputError: for settings or data that cannot work.
    """
    args = job.trainer_config(PPOConfig, num_sample_generations=0)
    tokenizer = load_tokenizer(job.recipe.model.path)
    prompts = data.prompts(job.stage.data, tokenizer)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if len(prompts) < batch:  # TRL would wait for a full batch for ever
        raise InputError(
            f"{len(prompts)} prompts are fewer than one batch of {batch}",
            place=f"stages.{job.name}.data",
            hint="lower `per_device_train_batch_size` or `gradient_accumulation_steps`, or give more prompts",
        )
    if args.whiten_rewards and batch < 8:
        raise InputError(
            f"`whiten_rewards` needs a batch of at least 8, and it is {batch}", place=f"stages.{job.name}.trainer"
        )
    return args, tokenizer, prompts


def run(job: Job) -> dict[str, Any]:
    """Train, judge and save the policy's adapter; returns the final metrics.

    Raises:
        RuntimeError: training moved a weight that must stay, or left one that must move.
    """
    args, tokenizer, prompts = prepare(job)
    set_seed(job.recipe.seed)
    shared = SharedBase(load_base(job.recipe.model, tokenizer), job.recipe.lora, job.init, job.reward)
    if args.gradient_checkpointing:
        shared.enable_gradient_checkpointing()
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=shared.policy,
        ref_model=shared.reference,
        reward_model=shared.reward,
        value_model=shared.value,
        train_dataset=prompts,
        callbacks=[MetricsLog(job.folder / "metrics.jsonl")],
    )
    # Else the last batch of each pass over the prompts takes an optimizer step per micro-batch.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    before = shared.checksums()
    trainer.train()
    check_weights(before, shared.checksums())
    adapters.save_adapter(shared.peft, "policy", job.artifact, tokenizer)
    return final(trainer.state.log_history) | judge_policy(job, shared.policy, tokenizer)


def check_weights(before: dict[str, int], after: dict[str, int]) -> None:
    """See that PPO moved policy and value and nothing else.

    Args:
        before: `SharedBase.checksums` before training.
        after: the same afterwards.

    Raises:
        RuntimeError: it did not.
    """
    moved = {name for name in before if before[name] != after[name]}
    for name in ("base", *FROZEN):
        if name in moved:
            raise RuntimeError(f"training changed the weights of `{name}`, which must stay")
    for name in TRAINED:
        if name not in moved:
            raise RuntimeError(f"training left the weights of `{name}` as they were")
