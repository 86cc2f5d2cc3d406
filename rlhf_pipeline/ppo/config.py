"""The settings of PPO: Transformers' TrainingArguments, the keys of TRL's former PPOConfig, and some of our own."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    r"""The keys of TRL 1.12's `PPOConfig`, with its names and defaults, and further ones; see `docs/ppo.md`.

    TRL's keys that nothing reads here are kept, so that a recipe that sets one gets the reason why it has no effect.

    Parameters:
        logging_steps (`float`): log every so many updates, means over them. 1, not TRL's 10: an update is long.
        save_total_limit (`int`): keep so many checkpoints. 2: one to resume from, and one should that be damaged.
        learning_rate (`float`): of the policy, and of the value model unless `value_learning_rate` is set.
        bf16 (`bool`, *optional*): compute in bfloat16; by default unless `fp16` is set, which PPO refuses.
        gradient_checkpointing (`bool`): keep few activations, and compute the others again in the backward pass.
        num_ppo_epochs (`int`): passes over the episodes of an update.
        num_mini_batches (`int`): optimizer steps in each pass.
        total_episodes (`int`, *optional*): how many replies are sampled in all; the last update is made in full. By
            default `max_steps` updates or `num_train_epochs` passes over the prompts.
        local_rollout_forward_batch_size (`int`): how many replies are sampled together. They are scored in parts of
            2,048 tokens at most, and never more than so many of the longest reply have.
        num_sample_generations (`int`): how often some replies are written down in the course of training.
        response_length (`int`): the most tokens of a reply.
        stop_token (`"eos"`, *optional*): the tokenizer's EOS ends a reply, and so does what else ends a text by the
            model's own `generation_config.json`.
        stop_token_id (`int` or a list of them, *optional*): the token that ends a reply, or several, in their place;
            TRL takes one. With neither key, all replies have `response_length` tokens.
        temperature (`float`): that replies are sampled at.
        missing_eos_penalty (`float`, *optional*): is subtracted from the score of a reply that does not end.
        missing_eos_score (`float`, *optional*): the score of a reply that does not end, in place of the reward
            model's; `missing_eos_penalty` subtracts. Replacing is Huang et al. 2024, "The N+ Implementation Details of
            RLHF with PPO" (they use -1).
        normalize_scores (`bool`): subtract the running mean of all scores so far and divide by their running standard
            deviation (Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO").
        score_clip (`float`, *optional*): clip scores to ± this, after normalisation (the same).
        whiten_rewards (`bool`): divide the rewards of tokens by their standard deviation over the batch.
        kl_coef (`float`): β, the weight of KL in the reward.
        kl_estimator (`"k1"` or `"k3"`): KL of a token from its log-ratio r = log π - log π_ref: r itself, or
            exp(-r) - 1 + r (Schulman 2020, "Approximating KL Divergence").
        target_kl (`float` or `"auto"`, *optional*): steer `kl_coef` so that KL stays near this (Ziegler et al. 2019,
            "Fine-Tuning Language Models from Human Preferences", section 2.2). With `"auto"`, near the KL at which
            a forecast of what is watched has its peak, once there is one.
        kl_horizon (`int`): over how many episodes it is steered.
        kl_budget (`float`, *optional*): stop as soon as a batch's KL is over this, and go back to the policy that had
            the highest score within it.
        cliprange (`float`): ε of PPO's clipped objective.
        cliprange_value (`float`): a value that moved further than this since the rollout is clipped in its loss.
        log_ratio_clamp (`float`, *optional*): clamp log-ratios of new to old probabilities to ± this before they are
            exponentiated; verl has 20.
        vf_coef (`float`): weight of the value model's loss.
        value_warmup_updates (`int`): updates at the start that train the value model alone.
        value_learning_rate (`float`, *optional*): the value model's learning rate; by default `learning_rate`.
        gamma (`float`): discount of later rewards.
        lam (`float`): λ of generalised advantage estimation (Schulman et al. 2016).
        ptx_coef (`float`): weight of the language-model loss on demonstrations that is added to the policy's (Ouyang
            et al. 2022, "Training language models to follow instructions with human feedback", equation 2).
        max_skipped_steps (`int`): give up after so many optimizer steps in a row that were skipped because a gradient
            was not finite.
        world_size, num_total_batches, micro_batch_size, local_batch_size, batch_size, local_mini_batch_size,
            mini_batch_size (`int`, *optional*): `count` works them out.
    """

    # TRL's defaults where Transformers has others, and ours
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates, means over them."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints."})
    learning_rate: float = field(
        default=3e-6, metadata={"help": "The policy's learning rate, and by default the value model's."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; by default unless fp16 is set."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Save memory by computing activations again in the backward pass."}
    )

    # TRL's keys
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the prompts."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass over a batch."})
    total_episodes: int | None = field(default=None, metadata={"help": "How many replies are sampled in all."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "How many replies are sampled together."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "How often some replies are written down in the course of training."}
    )
    response_length: int = field(default=53, metadata={"help": "The most tokens of a reply."})
    stop_token: Literal["eos"] | None = field(
        default=None,
        metadata={
            "help": "`eos`: the tokenizer's EOS and the model's own ends of a text end a reply. Excludes stop_token_id."
        },
    )
    stop_token_id: int | list[int] | None = field(
        default=None, metadata={"help": "The token that ends a reply, or a list of several. Excludes stop_token."}
    )
    temperature: float = field(default=0.7, metadata={"help": "The temperature that replies are sampled at."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a reply that does not end; more than 0."}
    )
    sft_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "Path of the policy's start."})
    world_size: int | None = field(default=None, metadata={"help": "How many processes train."})
    num_total_batches: int | None = field(default=None, metadata={"help": "How many updates there are."})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "Episodes in one backward pass, of all processes together."}
    )
    local_batch_size: int | None = field(default=None, metadata={"help": "Episodes of an update in one process."})
    batch_size: int | None = field(default=None, metadata={"help": "Episodes of an update."})
    local_mini_batch_size: int | None = field(
        default=None, metadata={"help": "Episodes of an optimizer step in one process."}
    )
    mini_batch_size: int | None = field(default=None, metadata={"help": "Episodes of an optimizer step."})
    reward_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "Path of the reward model."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "The name of the policy's adapter."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "The name of the reference's adapter."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of an update."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide rewards by their standard deviation over the batch."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "The weight of KL in the reward."})
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1",
        metadata={"help": "How a token's KL is estimated: k1 is its log-ratio, k3 varies less and is never negative."},
    )
    cliprange: float = field(default=0.2, metadata={"help": "How far a probability ratio counts, from 1."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value model's loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value's move counts, from the rollout's."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "With DeepSpeed ZeRO-3, gather the policy's weights to sample."}
    )

    # Ours
    missing_eos_score: float | None = field(
        default=None, metadata={"help": "Score of a reply that does not end, in place of the reward model's."}
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Normalise scores by their running mean and standard deviation."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to ± this, after normalisation."})
    log_ratio_clamp: float | None = field(
        default=None, metadata={"help": "Clamp log-ratios of new to old probabilities to ± this."}
    )
    target_kl: float | Literal["auto"] | None = field(
        default=None,
        metadata={"help": "Steer kl_coef so that KL stays near this, or, with `auto`, near the forecast peak."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Over how many episodes kl_coef is steered."})
    kl_budget: float | None = field(
        default=None, metadata={"help": "Stop when KL is over this, and keep the best policy within it."}
    )
    value_warmup_updates: int = field(
        default=0, metadata={"help": "Updates at the start that train the value model alone."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "The value model's learning rate; by default learning_rate."}
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language-model loss on demonstrations."})
    max_skipped_steps: int = field(
        default=5, metadata={"help": "Give up after so many optimizer steps in a row without finite gradients."}
    )

    def __post_init__(self) -> None:
        """Check the values that would otherwise fail late, or not at all.

        Raises:
            ValueError: naming the key.
        """
        scheduler = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if scheduler in ("reduce_lr_on_plateau", "greedy"):  # Transformers would first ask for an `eval_strategy`
            raise ValueError(f"`lr_scheduler_type: {scheduler}` waits for a metric that PPO does not have")
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()
        at_least: dict[str, float] = {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
            "num_ppo_epochs": 1, "response_length": 1, "local_rollout_forward_batch_size": 1, "kl_horizon": 1,
            "max_skipped_steps": 1, "value_warmup_updates": 0, "num_sample_generations": 0, "kl_coef": 0, "ptx_coef": 0,
            "vf_coef": 0, "learning_rate": 0, "value_learning_rate": 0, "max_grad_norm": 0, "save_total_limit": 0,
            "per_device_eval_batch_size": 1,
        }  # fmt: skip
        more_than_zero = ("temperature", "cliprange", "cliprange_value", "score_clip", "log_ratio_clamp", "target_kl",
                          "kl_budget", "missing_eos_penalty", "total_episodes", "num_train_epochs")  # fmt: skip
        for key, least in at_least.items():
            if (value := getattr(self, key)) is not None and value < least:
                raise ValueError(f"`{key}` must be at least {least}, and it is {value}")
        for key in more_than_zero:
            if isinstance(value := getattr(self, key), (int, float)) and value <= 0:
                raise ValueError(f"`{key}` must be more than 0, and it is {value}")
        for key in ("gamma", "lam"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"`{key}` must be from 0 to 1, and it is {getattr(self, key)}")
        if isinstance(self.target_kl, str) and self.target_kl != "auto":
            raise ValueError(f"`target_kl` must be a number or `auto`, not {self.target_kl}")
        for key, choices in {"stop_token": (None, "eos"), "kl_estimator": ("k1", "k3")}.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, not {getattr(self, key)}")
        if self.stop_token_id == []:
            raise ValueError("`stop_token_id` is an empty list; with `stop_token: null`, nothing ends a reply")
        for one, other in (("missing_eos_score", "missing_eos_penalty"), ("stop_token", "stop_token_id")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"`{one}` and `{other}` exclude each other")
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError("`total_episodes` and `max_steps` exclude each other")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if batch % self.num_mini_batches:
            raise ValueError(f"a batch of {batch} episodes cannot be divided into {self.num_mini_batches} mini-batches")
        if self.fp16:
            raise ValueError("PPO does not train in float16, whose gradients overflow: use bfloat16 or float32")

    def count(self, prompts: int, processes: int) -> None:
        """Work out how many updates there are, and how many episodes each step takes, under TRL's names.

        Args:
            prompts: how many there are to train on.
            processes: how many train together; each has `local_batch_size` episodes of an update.
        """
        self.world_size = processes
        self.micro_batch_size = self.per_device_train_batch_size * processes
        self.local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.local_mini_batch_size = self.local_batch_size // self.num_mini_batches
        self.batch_size = self.local_batch_size * processes
        self.mini_batch_size = self.local_mini_batch_size * processes
        if self.max_steps > 0:
            self.total_episodes = self.max_steps * self.batch_size
        elif self.total_episodes is None:
            self.total_episodes = int(self.num_train_epochs * prompts)
        self.num_total_batches = math.ceil(self.total_episodes / self.batch_size)
