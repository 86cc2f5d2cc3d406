"""Supervised fine-tuning: TRL's SFTTrainer on demonstrations, loss on the reply only."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.judge import judge_policy
from rlhf_pipeline.stages.resumable import Resumable


class ResumableSFTTrainer(Resumable, SFTTrainer):
    """TRL's SFTTrainer, from exact checkpoints."""


def prepare(job: Job) -> tuple[SFTConfig, PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """Build the trainer's config, the tokenizer, and the rows to train on and to hold out.

    Raises:
        InputError: for settings or data that cannot work.
    """
    args = job.trainer_config(SFTConfig)
    tokenizer = load_tokenizer(job.recipe.model)
    prepared = rows.demonstrations(job.stage.data, tokenizer, job.recipe.seed)
    job.require_eval_data(args, prepared.held_out)
    return args, tokenizer, prepared.train, prepared.held_out


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Goes on from the last checkpoint."""
    job.progress.tell("loading")
    args, tokenizer, train, held_out = prepare(job)
    set_seed(job.recipe.seed)
    model = adapters.with_policy_adapter(load_base(job.recipe.model, tokenizer), job.stage.lora, job.init)
    with adapters.exact_adapters(model):
        trainer = ResumableSFTTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[MetricsLog(job.folder / "metrics.jsonl"), job.checkpoints(), job.progress],
        )
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    metrics = job.trained(final(trainer.state.log_history))
    return metrics | judge_policy(job, model, tokenizer)
