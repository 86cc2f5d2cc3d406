"""A step of a stage's trainer on a model of a few weights: what the libraries refuse, they refuse before anything runs.

TRL, Transformers and torch refuse settings in many places: when a trainer is built, its optimizer, its schedule or its
batches are, or with the first loss. The check of a recipe goes through all of them, so that no stage is refused after
hours of another one.
"""

import copy
import gc
import re
import tempfile
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.kinds import Encoding
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.score_head import with_score_head
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.stages import liger
from rlhf_pipeline.stages.job import Inputs, Job

# A row as a trainer gets it.
ROWS: dict[Encoding, dict[str, list[int] | bool]] = {
    "demonstrations": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    "pairs": {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4, 3]},
    "whole_pairs": {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4, 3]},
    "replies": {"prompt_ids": [1], "completion_ids": [2, 3], "label": True},
    "prompts": {"input_ids": [1, 2, 3]},
}
COUNT = 16
REPLY = 4  # tokens that are sampled


def try_trainer(job: Job, inputs: Inputs) -> None:
    """Build a stage's trainer and take a step; of PPO, build the optimizer and the schedule.

    Args:
        job: the stage.
        inputs: what its `prepare` gave; its rows are not read.

    Raises:
        InputError: a library refuses the settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(inputs.args)
        args.output_dir, args.report_to, args.max_steps = folder, [], 1
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.use_liger_kernel = args.use_liger_kernel and liger.is_here()  # `liger.require` says what is missing
        gc.freeze()  # training begins with a search for garbage, which takes longer than all else here
        try:
            trainer = _trainer(job, args, inputs)
            if job.stage.facts.own_loop:
                trainer.create_optimizer_and_scheduler(num_training_steps=1)
            elif not (args.optim_target_modules or args.torch_compile) and len(trainer.train_dataset):
                # Else they are modules of the real model, it takes a minute, or `max_length` has left no row.
                trainer.train()
        except Exception as error:  # a library's refusal may be of any type
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            place = ".".join(("stages", job.name, "trainer", *_key(said, job.stage.trainer)))
            raise InputError(f"it is refused by the library that trains: {said}", place=place) from None
        finally:
            gc.unfreeze()


def _trainer(job: Job, args: Any, inputs: Inputs) -> Trainer:
    """The trainer of a stage's kind over a small random Llama; of PPO, what it has of Transformers' own."""
    facts = job.stage.facts
    row = ROWS[facts.encoding]
    rows = Dataset.from_dict({name: [value] * COUNT for name, value in row.items()})
    if facts.own_loop:
        return Trainer(model=nn.Linear(1, 1), args=args, train_dataset=rows)
    config = LlamaConfig(
        vocab_size=len(inputs.tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, pad_token_id=inputs.tokenizer.pad_token_id,
    )  # fmt: skip
    if hasattr(job.reader.config.get_text_config(), "output_router_logits"):
        args.router_aux_loss_coef = 0.0  # a Llama has no routers; `check.check_router_loss` looks at the model itself
    base, lora = LlamaForCausalLM(config), {"r": 1, "target_modules": ["q_proj"]}
    if facts.makes == "reward":
        model = adapters.with_reward_adapter(with_score_head(base), lora, None)
    else:
        model = adapters.with_policy_adapter(base, lora, None)
    held_out = rows if inputs.data.held_out is not None else None
    if facts.samples:  # one group of short replies
        args.per_device_train_batch_size = args.generation_batch_size = args.num_generations
        args.gradient_accumulation_steps = args.steps_per_generation = 1
        args.max_completion_length = min(args.max_completion_length, REPLY)
    trainer = stages.BY_KIND[job.stage.kind].TRAINER.over(model, args, inputs.tokenizer, rows, held_out)
    if facts.samples:
        trainer.score_with(_no_rewards, job.stage.scored_by)
    return trainer


def _no_rewards(episodes: Episodes, _rows: Any, **_: Any) -> Scores:
    """In the place of rewards, which the check tries by themselves."""
    none = torch.zeros(len(episodes))
    return Scores(none, defaultdict(lambda: none), {})


def _key(said: str, trainer: dict[str, Any]) -> list[str]:
    """The key of the recipe that a message names, if any: the longest of several."""
    words = re.sub(r"\W+", "_", said.lower())
    return sorted((key for key in trainer if key in words), key=len)[-1:]
