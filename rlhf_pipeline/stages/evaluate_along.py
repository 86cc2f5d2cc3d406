"""The judge's scores of the policy while PPO trains it: do they rise with the reward model's?"""

import traceback
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline.data.encode import encode_prompts, row_of
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe.schema import Evaluate
from rlhf_pipeline.stages.evaluate import Asked, Judge, ask, prepare, summary
from rlhf_pipeline.stages.job import Job


def judge_along(trainer: PPOTrainer, job: Job) -> None:
    """Have a policy judged on its way, where the recipe says so and has a function for it."""
    prepared = prepare(job)
    if prepared is not None:
        spec, judge, asked = prepared
        if judge is not None and spec.along:
            trainer.add_callback(GoldAlong(trainer, spec, judge, asked))


class GoldAlong(TrainerCallback):
    """Judges the policy before the first update and `evaluate.along` times on its way, the last time at its end.

    Each time it replies to the same prompts with the same random numbers, none of training's. Logged are
    `gold/judge_mean`, the judge's mean, and `gold/judge_mean_se`, its standard error; `gold/score_mean`, the reward
    model's of the same replies; and `gold/kl`, the mean KL of a whole reply from the reference in nats, both at
    `evaluate.temperature` (at 1 where that is 0). A judge that fails leaves a gap, and its traceback in the log:
    training must not end for a picture.

    Args:
        trainer: whose policy is judged.
        spec: the recipe's `evaluate`.
        judge: the recipe's.
        asked: prompts, each with its row.
    """

    def __init__(self, trainer: PPOTrainer, spec: Evaluate, judge: Judge, asked: Asked) -> None:
        self.trainer, self.spec, self.judge = trainer, spec, judge
        self.asked = [one for _ in range(spec.samples) for one in asked]
        self.prompts = encode_prompts(trainer.processing_class, spec.data, [prompt for prompt, _ in self.asked])
        self.rows = [row_of(prompt, row) for prompt, row in self.asked]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Judge the start, unless training resumes from later."""
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Judge where a share of the way is done."""
        times, step, of = self.spec.along, state.global_step, state.max_steps
        if step * times // of > (step - 1) * times // of:
            wanted = control.should_log  # what is logged here takes it back
            self.measure()
            control.should_log = wanted

    @torch.no_grad()
    def measure(self) -> None:
        """Sample, score, judge and log."""
        trainer, spec = self.trainer, self.spec
        with torch.random.fork_rng():
            torch.manual_seed(trainer.args.seed)
            scores, kls, replies = [], [], []
            for start in range(0, len(self.prompts), spec.batch_size):
                part = slice(start, start + spec.batch_size)
                episodes = trainer.roll_out(self.prompts[part], spec.temperature, spec.max_new_tokens)
                scored = trainer.score(episodes, self.rows[part], spec.temperature or 1.0)
                scores += scored.scores.tolist()
                kls += scored.kl.sum(1).tolist()
                replies += trainer.processing_class.batch_decode(episodes.tokens, skip_special_tokens=True)
        try:
            judged = summary(ask(self.judge, self.asked, replies), spec.samples)
        except Exception:  # a user's function may fail in any way
            traceback.print_exc()
            return
        trainer.log(
            {
                **{f"gold/{name}": value for name, value in judged.items() if name != "judge_replies"},
                "gold/score_mean": sum(scores) / len(scores),
                "gold/kl": sum(kls) / len(kls),
            }
        )
