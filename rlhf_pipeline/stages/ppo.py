"""Proximal policy optimization: policy, reference, rewards and value as roles on one base."""

from typing import Any

from transformers import set_seed

from rlhf_pipeline import ranks
from rlhf_pipeline.callbacks.metrics import MetricsLog, final
from rlhf_pipeline.data import prepare as rows
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.prompts import check_data
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe.watch import AUTO
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.rundir.layout import METRICS, SAMPLES
from rlhf_pipeline.stages import engine, soundness
from rlhf_pipeline.stages.evaluate import judge_policy
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.watch import watch

CONFIG = PPOConfig
read = rows.prompts  # the rows of such a stage


def prepare(job: Job) -> Inputs:
    """See `sft.prepare`."""
    args = job.trainer_config(CONFIG)
    measured = job.stage.watch is not None or args.target_kl == AUTO
    if job.stage.data.holds_out and args.eval_strategy == "no" and (job.recipe.evaluate or not measured):
        raise InputError(
            "prompts are held out, and nothing evaluates on them",
            place=f"stages.{job.name}.data.{'eval_data' if job.stage.data.eval_data else 'eval_fraction'}",
            hint="set `eval_steps` in `trainer`, or remove it",
        )
    tokens = job.reader.config.get_text_config().vocab_size
    stops = stop_tokens(job.reader.tokenizer, job.reader.generation_config, job.stage.trainer)
    wrong = [token for token in stops if not 0 <= token < tokens]
    if wrong and args.stop_token_id is not None:
        raise InputError(
            f"{wrong[0]} is no token of this model, which has {tokens:,}",
            place=f"stages.{job.name}.trainer.stop_token_id",
            hint="tokens are counted from 0; with a wrong one, no reply would end",
        )
    data = job.reader.read(rows.prompts_with_rows if job.reads_rows else read, job.stage.data)
    job.require_eval_data(args, data.held_out)
    ptx_data = job.reader.read(rows.demonstrations, job.stage.ptx_data) if job.stage.ptx_data else None
    try:
        check_data(args, data.train, data.held_out, ptx_data and ptx_data.train, job.recipe.processes(job.name))
    except ValueError as error:
        raise InputError(str(error), place=f"stages.{job.name}") from None
    return Inputs(args, job.reader.tokenizer, data, ptx_data)


def run(job: Job) -> dict[str, Any]:
    """Train, judge and save the policy's adapter, from the last checkpoint if there is one; returns the final metrics.

    Of several ranks the first one saves and judges; the others return nothing.

    Raises:
        RuntimeError: training moved a weight that must stay, or left one that must move.
    """
    job.progress.tell("loading")
    inputs = prepare(job)
    args, tokenizer, data, ptx_data = inputs
    set_seed(job.recipe.seed)
    base = load_base(job.recipe.model, tokenizer)
    one_trunk = job.stage.value_model == "head"
    shared = SharedBase(base, job.stage.lora, job.init, job.reward_models, one_trunk)
    if job.stage.reference is not None:
        shared.refer_to(job.reference)
    sampler = engine.while_training(job, inputs, args.response_length)
    some = data.train[: soundness.PROMPTS]["input_ids"]
    soundness.check_generation(shared.policy, some, tokenizer.pad_token_id, f"stages.{job.name}", sampler)
    trainer = PPOTrainer(
        args,
        tokenizer,
        shared,
        mixture.load(job.recipe, job.name, shared.rewards, tokenizer),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        ptx_dataset=ptx_data and ptx_data.train,
        callbacks=[MetricsLog(job.folder / METRICS), job.checkpoints(), job.progress],
        samples_file=job.folder / SAMPLES,
        engine=sampler,
    )
    watcher = watch(trainer, job, data.held_out)
    before = shared.checksums()
    trainer.train(resume_from_checkpoint=job.last_checkpoint())
    put_back = watcher is not None and watcher.kept_step <= args.value_warmup_updates  # where nothing had moved it yet
    check_weights(before, shared.checksums(), trainer.trained_roles - ({"policy"} if put_back else set()))
    if not ranks.is_first():
        return {}
    trainer.save_model(str(job.artifact))
    metrics = job.trained(final(trainer.state.log_history) | (watcher.outcome if watcher else {}))
    return metrics | judge_policy(job, shared.policy, tokenizer, sampler)


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
