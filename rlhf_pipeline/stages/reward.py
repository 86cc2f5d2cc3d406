"""Reward modelling: TRL's RewardTrainer (Bradley-Terry) on preference pairs, from the SFT adapter."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import RewardConfig, RewardTrainer

from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base, remove_dropout
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.monitoring.metrics import MetricsLog, final
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.resumable import Resumable


class ResumableRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer, from exact checkpoints."""


def prepare(job: Job) -> tuple[RewardConfig, PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """See `sft.prepare`."""
    args = job.trainer_config(RewardConfig)
    tokenizer = load_tokenizer(job.recipe.model)
    prepared = rows.whole_preferences(job.stage.data, tokenizer, job.recipe.seed)
    job.require_eval_data(args, prepared.held_out)
    return args, tokenizer, prepared.train, prepared.held_out


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs and save the adapter with its score head; returns the final metrics.

    Goes on from the last checkpoint.
    """
    args, tokenizer, train, held_out = prepare(job)
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, tokenizer, head="score")
    model = adapters.with_reward_adapter(base, job.stage.lora, job.init)
    if args.disable_dropout:
        remove_dropout(model)  # TRL leaves the dropout that models pass to functions
    with adapters.exact_adapters(model):
        trainer = ResumableRewardTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[MetricsLog(job.folder / "metrics.jsonl"), job.checkpoints()],
        )
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    # TRL drops pairs longer than `max_length` without a word.
    dropped = len(train) - len(trainer.train_dataset)
    return job.trained(final(trainer.state.log_history) | {"dropped_pairs": dropped})
