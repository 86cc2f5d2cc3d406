"""Direct preference optimization: TRL's DPOTrainer on preference pairs, the start as its reference."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base, remove_dropout
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.judge import judge_policy
from rlhf_pipeline.stages.resumable import Resumable


class EncodedDPOTrainer(Resumable, DPOTrainer):
    """TRL's DPOTrainer, from exact checkpoints, for encoded rows, which TRL's other trainers take and it does not."""

    def _prepare_dataset(self, dataset: Dataset, _tokenizer: Any, args: DPOConfig, _name: str) -> Dataset:
        limit = args.max_length
        if limit is None or args.truncation_mode != "keep_start":
            return dataset
        # As in TRL: where the prompt alone fills `max_length`, no token of the replies would be left.
        return dataset.filter(lambda ids: [len(one) < limit for one in ids], batched=True, input_columns="prompt_ids")


def prepare(job: Job) -> tuple[DPOConfig, PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """See `sft.prepare`."""
    args = job.trainer_config(DPOConfig)
    tokenizer = load_tokenizer(job.recipe.model)
    prepared = rows.preferences(job.stage.data, tokenizer, job.recipe.seed)
    job.require_eval_data(args, prepared.held_out)
    return args, tokenizer, prepared.train, prepared.held_out


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Goes on from the last checkpoint.

    The adapter is loaded under the name `default`, of which TRL makes a frozen copy, `ref`: the reference is what the
    stage starts from, not the bare base.
    """
    job.progress.tell("loading")
    args, tokenizer, train, held_out = prepare(job)
    set_seed(job.recipe.seed)
    model = adapters.with_policy_adapter(load_base(job.recipe.model, tokenizer), job.stage.lora, job.init)
    if args.disable_dropout:
        remove_dropout(model)  # TRL leaves the dropout that models pass to functions
    with adapters.exact_adapters(model):
        trainer = EncodedDPOTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[MetricsLog(job.folder / "metrics.jsonl"), job.checkpoints(), job.progress],
        )
    adapters.copy_adapter(model, "default", "ref")  # TRL's own copy leaves out what is not named `.default.` within
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if held_out is not None:
        trainer.evaluate()
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    dropped = len(train) - len(trainer.train_dataset)
    metrics = job.trained(final(trainer.state.log_history) | {"dropped_pairs": dropped})
    return metrics | judge_policy(job, model, tokenizer)
