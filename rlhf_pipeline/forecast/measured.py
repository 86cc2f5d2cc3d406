"""How long a stage's steps take on this machine: its own trainer takes a few, with the model itself."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline import ranks, stages
from rlhf_pipeline.data.measure import Trainer
from rlhf_pipeline.forecast import lengths, stage
from rlhf_pipeline.forecast.lengths import Known
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rundir.pace import ToGo
from rlhf_pipeline.stages.job import Job

STEPS = 2  # the first one also loads kernels and fills caches, and does not count


def step(recipe: Recipe, name: str, rows: Known) -> ToGo:
    """Time a stage's optimizer step, of PPO an update, on rows of the longest texts.

    Adapters are new ones, replies come from Transformers, and judging and checkpoints are left out.

    Args:
        recipe: from `recipe.load`.
        name: a stage that trains.
        rows: see `rows.longest`.

    Raises:
        InputError: the model cannot be loaded.
    """
    job = Job(recipe, name, recipe.run)
    args: Any = job.trainer_config(stages.BY_KIND[job.stage.kind].CONFIG)
    count = _steps(job, args) if name in rows else args.max_steps if args.max_steps > 0 else None
    times = _Times()
    with tempfile.TemporaryDirectory(prefix="rlhf-pipeline-") as folder:
        stage.only_train(args, STEPS, Path(folder))
        found = lengths.of_stage(job.stage, *rows.get(name, lengths.of_made_rows(recipe, job.stage)))
        trainer = trainer_of(job, args, found, Path(folder))
        trainer.add_callback(times)
        trainer.train()
    return ToGo(times.ended[-1] - times.ended[-2], count)


class _Times(TrainerCallback):
    """When steps began and ended, in seconds."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What comes now is the first step."""
        self.ended.append(time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step more."""
        self.ended.append(time.perf_counter())


def _steps(job: Job, args: Any) -> int:
    """How many steps a stage takes in all, by its rows."""
    rows = len(job.reader.read(stages.BY_KIND[job.stage.kind].read, job.stage.data).train)
    if job.stage.facts.own_loop:
        args.count(rows, job.recipe.processes(job.name))
        return int(args.num_total_batches)
    if args.max_steps > 0:
        return int(args.max_steps) * (job.stage.members or 1)
    batch = Trainer.of(args, processes=job.recipe.processes(job.name)).batch
    of_epoch = math.ceil(rows / batch) * getattr(args, "num_iterations", 1)
    return math.ceil(args.num_train_epochs * of_epoch) * (job.stage.members or 1)


def trainer_of(job: Job, args: Any, found: lengths.Lengths, folder: Path) -> Any:
    """A stage's trainer over the recipe's model, as `stage` has it over shapes, with rows enough for all ranks."""
    tokenizer = job.reader.tokenizer
    base = load_base(job.recipe.model, tokenizer, head="score" if job.stage.facts.makes == "reward" else "causal")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = stage.rows_of(job, max(STEPS * batch * ranks.count(), getattr(args, "generation_batch_size", 0) or 0), found)
    kind, lora = stages.BY_KIND[job.stage.kind], job.stage.lora
    if job.stage.facts.own_loop:
        args.total_episodes, args.num_sample_generations = None, 0
        args.stop_token = args.stop_token_id = None  # every reply is of full length
        args.whiten_rewards = False  # it takes no time, and may need the episodes of all processes
        stored = stage.reward_artifacts(job, base, folder)
        shared = SharedBase(base, lora, None, stored, one_trunk=job.stage.value_model == "head")
        return PPOTrainer(args, tokenizer, shared, stage.Rewards(shared), train_dataset=rows)
    if job.stage.facts.makes == "reward":
        return kind.TRAINER.over(adapters.with_reward_adapter(base, lora, None), args, tokenizer, rows, None)
    if job.stage.facts.reads == "feedback":
        args.desirable_weight = args.undesirable_weight = 1.0
    stored = stage.reward_artifacts(job, base, folder) if job.stage.facts.samples else []
    trainer: Any = kind.TRAINER.over(adapters.with_policy_adapter(base, lora, None), args, tokenizer, rows, None)
    if job.stage.facts.samples:
        trainer._stop_token_id = []
        for artifact, shape in stored:
            trainer.roles.add_reward(artifact, shape)
        trainer.score_with(stage.Rewards(trainer.roles), job.stage.scored_by)
    return trainer
