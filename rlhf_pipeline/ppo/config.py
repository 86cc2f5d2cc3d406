"""TRL's PPOConfig, and what its PPO lacks. Every addition is off, or changes nothing, by default."""

from dataclasses import dataclass, field

from trl.experimental import ppo as trl_ppo


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    r"""TRL's `PPOConfig` with further keys; see `docs/ppo.md` for all that have an effect.

    Parameters:
        logging_steps (`float`): log every so many updates, means over them. 1, not TRL's 10: an update is long.
        save_total_limit (`int`): keep so many checkpoints. 2: one to go on from, and one should that be damaged.
        missing_eos_score (`float`, *optional*): the score of a reply that does not end, in place of the reward
            model's; `missing_eos_penalty` subtracts. Replacing is Huang et al. 2024, "The N+ Implementation Details of
            RLHF with PPO" (they use -1).
        normalize_scores (`bool`): subtract the running mean of all scores so far and divide by their running standard
            deviation (Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO").
        score_clip (`float`, *optional*): clip scores to ± this, after normalisation (the same).
        log_ratio_clamp (`float`, *optional*): clamp log-ratios of new to old probabilities to ± this before they are
            exponentiated; verl has 20.
        target_kl (`float`, *optional*): steer `kl_coef` so that KL stays near this (Ziegler et al. 2019, "Fine-Tuning
            Language Models from Human Preferences", section 2.2).
        kl_horizon (`int`): over how many episodes it is steered.
        kl_budget (`float`, *optional*): stop as soon as a batch's KL is over this, and go back to the policy that had
            the highest score within it.
        value_warmup_updates (`int`): updates at the start that train the value model alone.
        value_learning_rate (`float`, *optional*): the value model's learning rate; by default `learning_rate`.
        ptx_coef (`float`): weight of the language-model loss on demonstrations that is added to the policy's (Ouyang
            et al. 2022, "Training language models to follow instructions with human feedback", equation 2).
        max_skipped_steps (`int`): give up after so many optimizer steps in a row that were skipped because a gradient
            was not finite.
    """

    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates, means over them."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints."})
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
    target_kl: float | None = field(default=None, metadata={"help": "Steer kl_coef so that KL stays near this."})
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
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ValueError(f"`{key}` must be more than 0, and it is {value}")
        for key in ("gamma", "lam"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"`{key}` must be from 0 to 1, and it is {getattr(self, key)}")
        for one, other in (("missing_eos_score", "missing_eos_penalty"), ("stop_token", "stop_token_id")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"`{one}` and `{other}` exclude each other")
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError("`total_episodes` and `max_steps` exclude each other")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        mini_batch = batch // self.num_mini_batches
        if batch % self.num_mini_batches:
            raise ValueError(f"a batch of {batch} episodes cannot be divided into {self.num_mini_batches} mini-batches")
        if self.whiten_rewards and mini_batch < 8:
            raise ValueError(f"`whiten_rewards` needs mini-batches of at least 8 episodes, and they have {mini_batch}")
        if self.fp16:
            raise ValueError("PPO does not train in float16, whose gradients overflow: use bfloat16 or float32")
