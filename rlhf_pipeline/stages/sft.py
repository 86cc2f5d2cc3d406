"""Supervised fine-tuning: TRL's SFTTrainer on demonstrations, loss on replies only."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf_pipeline import kinds, ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Over
from rlhf_pipeline.models import adapters, divided
from rlhf_pipeline.models.base import hide_router_logits, load_base
from rlhf_pipeline.rundir.layout import METRICS
from rlhf_pipeline.stages import soundness
from rlhf_pipeline.stages.evaluate import judge_policy
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.resumable import Resumable

CONFIG = SFTConfig
WRAPPED = "wrapped"  # the `packing_strategy` that cuts rows anywhere, and has them see each other
read = rows.demonstrations  # the rows of such a stage


class ResumableSFTTrainer(Resumable, SFTTrainer):
    """TRL's SFTTrainer, from exact checkpoints."""

    kind = kinds.get("sft")

    def counts(self, inputs: Mapping[str, Tensor]) -> dict[Over, float]:
        """The tokens with loss; the first of a row has none before it that could say it."""
        return {"rows": len(inputs["input_ids"]), "tokens": (inputs["labels"][:, 1:] != -100).sum().item()}


TRAINER = ResumableSFTTrainer


class AtStart(TrainerCallback):
    """Looks at the model when it is ready to be trained."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Look at it, and leave it in the mode that it is in."""
        was_training = model.training
        self.check()
        model.train(was_training)


def prepare(job: Job) -> Inputs:
    """Build the trainer's config, load the tokenizer, and read the rows to train on and to hold out.

    Raises:
        InputError: for settings or data that cannot work.
    """
    args = job.trainer_config(CONFIG)
    if args.eval_packing and not (args.packing or args.padding_free) and args.packing_strategy != WRAPPED:
        raise InputError(
            "held-out rows would see each other: TRL tells the model where packed rows begin only where those that are "
            "trained on are packed or padding-free, too",
            place=f"stages.{job.name}.trainer.eval_packing",
            hint="set `packing: true` as well, or remove it",
        )
    data = job.reader.read(read, job.stage.data)
    job.require_eval_data(args, data.held_out)
    return Inputs(args, job.reader.tokenizer, data)


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, save the adapter and judge it; returns the final metrics. Resumes from the last checkpoint."""
    job.progress.tell("loading")
    args, tokenizer, data, _ = prepare(job)
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, tokenizer, to_divide=True)
    model = adapters.with_policy_adapter(base, job.stage.lora, job.init)
    callbacks = [MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress]
    trainer = ResumableSFTTrainer.over(model, args, tokenizer, data.train, data.held_out, callbacks)
    if args.padding_free or (args.packing and args.packing_strategy != WRAPPED):
        place = f"stages.{job.name}.trainer.{'packing' if args.packing else 'padding_free'}"
        some = data.train[: soundness.ROWS]["input_ids"]
        check = functools.partial(soundness.check_packing, model, trainer.data_collator, some, place)
        if divided.by_fsdp() or divided.by_zero_3():
            trainer.add_callback(AtStart(check))  # only then it is divided, and is on the GPU
        else:
            check()
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    if data.held_out is not None:
        trainer.evaluate()
    hide_router_logits(model)
    adapters.save_adapter(model, "default", job.artifact, tokenizer)
    metrics = final(trainer.state.log_history)
    return (job.trained(metrics) if ranks.is_first() else {}) | judge_policy(job, model, tokenizer)
