"""What a kind of stage is: what it reads, makes and needs, TRL's keys for it, and the numbers that matter. No torch.

One entry here and one file in `stages/` make a kind. No field has a default: a fact that is missing fails at import.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Rows = Literal["demonstrations", "preferences", "prompts", "feedback", "candidates"]
Makes = Literal["policy", "reward", "rows"]
Encoding = Literal["demonstrations", "pairs", "whole_pairs", "prompts", "replies"]
# What a number of an evaluation is over: all rows, all tokens of replies, or those of the good or of the bad replies;
# else it is the least, the most or the last of what its batches have.
Over = Literal[
    "rows", "chosen rows", "rejected rows", "tokens", "chosen tokens", "rejected tokens", "least", "most", "last"
]  # fmt: skip
ROWS = "rows"  # the role of a stage whose rows are read
JUDGED = "judge_mean"  # the mean of the judge's scores, of every policy where the recipe has `evaluate`
REPLIES = "judge_replies"  # how many replies that is the mean of
WIN_RATE = "win_rate"  # how often an AI finds its replies better than those of the policy that it started from
GAP = "generation_gap"  # how far it samples from what whole passes give, in nats a token
MOST_GAP = 0.1  # of it that is sound: bfloat16 and 4 bits give less than 0.03
PAIRS = "eval_pairs"  # how many held-out pairs an accuracy is the share of
# What is watched of a policy while it trains. Means over prompts, which should not fall: the judge's, the share of
# prompts won by an AI judge, the rewards less an ensemble's disagreement, and their sum;
MEANS = ("gold", "judge", "pessimistic", "reward")
# and measures of its replies, each of which should stay where it was at first.
MEASURES = (
    "disagreement", "length", "length_correlation", "distinct_1", "distinct_2", "self_bleu", "repetition",
    "new_phrases", "flattery", "hedging", "refusals", "ended",
)  # fmt: skip
WATCHED = (*MEANS, *MEASURES)


@dataclass(frozen=True)
class Number:
    """A number that shows how a stage is going and what it came to.

    Attributes:
        name: what people read.
        metric: its name among the final metrics of `stage.json`.
        logged: its name in the rows of `metrics.jsonl`; None where training does not log it.
        changes: show where it began as well: the mean of the first twentieth of what was logged. The number of the
            judge began at that of the stage that this one starts from.
    """

    name: str
    metric: str
    logged: str | None
    changes: bool


@dataclass(frozen=True)
class Parent:
    """An earlier stage that a stage needs.

    Attributes:
        role: what its adapter does here, and the key of the recipe that names it.
        makes: what it must have made.
    """

    role: str
    makes: Makes


@dataclass(frozen=True)
class Config:
    """The class whose fields are the keys of `trainer:`.

    Attributes:
        sources: where its source code is, and that of the classes that it inherits keys from: package, file
            and class. They are read, not imported.
        documented: what to look its keys up under.
        reads: the only keys that have an effect; None where all have that are not refused.
        refused: keys that a recipe may not set, each with the reason, beyond those that no kind takes.
    """

    sources: tuple[tuple[str, str, str], ...]
    documented: str
    reads: frozenset[str] | None
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        name: the word in the recipe.
        title: for headings.
        method: in the middle of a sentence.
        reads: what its rows are.
        encoding: the form in which its trainer gets them: a pair is prompt and replies apart, a whole pair is prompt
            and reply as one; `replies` are prompt and one reply apart.
        makes: what its artifact is.
        artifact: the folder, or the file, in the stage's own that holds what it made.
        doing: what it does while it is at work, for a line that begins so.
        gives: what its rows can be read as; empty where it trains.
        gives_scored: what they can be read as where replies have scores.
        parents: the earlier stages that it needs, the one whose adapter it starts from first.
        begins: a later stage starts from the latest such one unless the recipe says otherwise.
        keeps_reference: it keeps a reference, by default what it starts from.
        samples: it samples replies while it trains.
        own_loop: the training loop is ours, not TRL's.
        by_people: people choose, and a run waits for them.
        takes: the keys of a stage that have an effect, beside `kind`, `data` and `gates`, which have one in all.
        further_data: keys of the stage with more rows, each with the kind that reads such rows.
        unread: keys of `data:` that have no effect, each with the reason.
        reply_limit: the key of `trainer:` that says how many tokens a sampled reply may have; None where none is.
        held_back_by: the key of `trainer:` that keeps the policy near its reference; None where it has none.
        learning_rate: the usual one with LoRA, as `docs/<name>.md` has it with its source.
        config: the keys of `trainer:`.
        batch_metrics: what its trainer logs of batches, the `loss` among it, each with what it is over. In evaluation,
            with `eval_` before it, it is of all held-out rows.
        accuracy: which of these is the share of pairs that are told apart rightly; None where there is none.
        numbers: those that matter, the first one most.
        example: what the data report says above the first row.
        color: the number of its colour in the report.
    """

    name: str
    title: str
    method: str
    reads: Rows
    encoding: Encoding
    makes: Makes
    artifact: str
    doing: str
    gives: frozenset[Rows]
    gives_scored: frozenset[Rows]
    parents: tuple[Parent, ...]
    begins: bool
    keeps_reference: bool
    samples: bool
    own_loop: bool
    by_people: bool
    takes: frozenset[str]
    further_data: Mapping[str, str]
    unread: Mapping[str, str]
    reply_limit: str | None
    held_back_by: str | None
    learning_rate: str
    config: Config
    batch_metrics: Mapping[str, Over]
    accuracy: str | None
    numbers: tuple[Number, ...]
    example: str
    color: int

    @property
    def is_policy(self) -> bool:
        """Whether what it makes answers prompts."""
        return self.makes == "policy"

    @property
    def trains(self) -> bool:
        """Whether it trains an adapter; else it makes rows."""
        return self.makes != "rows"

    @property
    def trains_value(self) -> bool:
        """Whether a value model learns beside the policy, as in our own loop."""
        return self.own_loop


_TRAINING_ARGUMENTS = (
    ("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/base_config.py", "_BaseConfig"),
)  # fmt: skip
_TRAINED = frozenset({"init", "lora", "trainer", "launch"})
_ALL_ROWS: frozenset[Rows] = frozenset(typing.get_args(Rows))
_NO_TRAINER = Config((), "", reads=frozenset(), refused={})
_COMPARED = _TRAINED | {"reference"}
_INIT = Parent("init", makes="policy")
_REFERENCE = Parent("reference", makes="policy")  # by default what the stage starts from
_REWARD = Parent("reward", makes="reward")  # `rewards` may name others, or several, or none
_JUDGE = Number("judge", JUDGED, logged=None, changes=True)
_WIN_RATE = Number("win rate", WIN_RATE, logged=None, changes=False)
_NAMED = "the pipeline names the adapters"
_COMPUTED = "it is computed"
_LOADED = "the pipeline loads one base for all stages; see the recipe's `model`"
_NOTHING_TO_LOAD = "prompts are encoded before training starts: there is nothing left to load or to spread over workers"
_PROMPTS_ONLY = "only prompts are read here"
_ROWS_MADE_OF_ALL = {
    "max_completion_length": _PROMPTS_ONLY,
    "eval_fraction": "nothing is evaluated here: rows are made of all prompts",
    "eval_data": "nothing is evaluated here: rows are made of all prompts",
}
_SAMPLED = "replies are sampled from the policy's whole distribution, of which the log-probabilities are"
_ALIKE = "replies are sampled by one function for all kinds of stages"
_NO_VLLM = "the stage's `rollout` says what samples: `rollout: {engine: vllm}`"
_WRITTEN = "some replies are written to `samples.jsonl` in every stage that samples"
_WHOLE_GROUPS = (
    "batches are made of whole groups: the prompts of an epoch that make no whole batch wait for a later one"
)
_BUDGET = "set `kl_budget`, which keeps the best policy within it"
_DRAWN = "KTO compares prompts with replies of the same batch, and batches are drawn anew in each epoch"

_GROUPS_REFUSED = {
    "reward_weights": "a reward has its `weight` in the stage's `rewards`",
    "top_p": _SAMPLED, "top_k": _SAMPLED, "min_p": _SAMPLED, "repetition_penalty": _SAMPLED,
    "generation_kwargs": _SAMPLED,
    "cache_implementation": _ALIKE, "use_transformers_continuous_batching": _ALIKE,
    "transformers_continuous_batching_config": _ALIKE, "use_transformers_paged": _ALIKE,
    "chat_template_kwargs": "set `model.chat_template_kwargs`, which holds for all stages",
    "disable_dropout": "there is none: replies are sampled, and the reference and the rewards read, without it",
    "neftune_noise_alpha": "its noise would be in log-probabilities that are compared with each other",
    "label_smoothing_factor": "the loss is not one of labels",
    "include_num_input_tokens_seen": "tokens are counted anyway, as `num_tokens`",
    "dataloader_drop_last": _WHOLE_GROUPS, "train_sampling_strategy": _WHOLE_GROUPS,
    "log_completions": _WRITTEN, "log_multimodal": _WRITTEN, "num_completions_to_print": _WRITTEN,
    "log_unique_prompts": _WRITTEN,
    **dict.fromkeys((
        "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
    ), _NO_VLLM),
}  # fmt: skip
_GRPO_REFUSED = {
    "max_tool_calling_iterations": "policies call no tools here", "log_completions_hub_repo": _WRITTEN,
    "cast_lm_head_to_fp32": "the recipe's `model.dtype` decides the precision of every stage",
    **dict.fromkeys((
        "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap",
        "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    ), _NO_VLLM),
}  # fmt: skip
# What each rollout is logged as, of GRPO and RLOO alike; the first six by PPO's names.
_OF_GROUPS: dict[str, Over] = {
    "objective/scores": "rows", "objective/kl": "rows", "reply/length": "rows", "reply/ended": "rows",
    "reply/distinct_2": "rows", "reply/unique": "rows",
    "rollout/log_prob_gap_mean": "rows", "rollout/log_prob_gap_max": "most",
    "loss": "rows", "reward": "rows", "reward_std": "rows", "frac_reward_zero_std": "rows", "entropy": "rows",
    "completions/mean_length": "rows", "completions/min_length": "least", "completions/max_length": "most",
    "completions/clipped_ratio": "rows", "completions/mean_terminated_length": "rows",
    "completions/min_terminated_length": "least", "completions/max_terminated_length": "most", "num_tokens": "last",
}  # fmt: skip
_OF_POLICIES_THAT_SAMPLE = (
    Number("score", "objective/scores", logged="objective/scores", changes=True),
    Number("KL", "objective/kl", logged="objective/kl", changes=True),
    Number("length", "reply/length", logged="reply/length", changes=True),
    Number("ended", "reply/ended", logged="reply/ended", changes=True),
    Number("judge", JUDGED, logged="gold/judge_mean", changes=True),
    _WIN_RATE,
)

KINDS: tuple[Kind, ...] = (
    Kind(
        name="sft",
        title="Supervised fine-tuning",
        method="supervised fine-tuning",
        reads="demonstrations",
        encoding="demonstrations",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT,),
        begins=True,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=_TRAINED,
        further_data={},
        unread={},
        reply_limit=None,
        held_back_by=None,
        learning_rate="2e-4 up to 13B, 1e-4 above",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/sft_config.py", "SFTConfig")), "trl.SFTConfig", reads=None,
            refused={},
        ),
        batch_metrics={
            "loss": "tokens", "entropy": "tokens", "mean_token_accuracy": "tokens", "num_tokens": "last",
        },
        accuracy=None,
        numbers=(
            Number("loss", "loss", logged="loss", changes=True),
            Number("token accuracy", "mean_token_accuracy", logged="mean_token_accuracy", changes=True),
            Number("held-out loss", "eval_loss", logged=None, changes=False),
            _JUDGE,
            _WIN_RATE,
        ),
        example="the first row; every [token] carries loss",
        color=0,
    ),
    Kind(
        name="reward",
        title="Reward model",
        method="reward modelling",
        reads="preferences",
        encoding="whole_pairs",
        makes="reward",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT,),
        begins=False,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=_TRAINED | {"members", "bootstrap"},
        further_data={},
        unread={},
        reply_limit=None,
        held_back_by=None,
        learning_rate="1e-4 with LoRA",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/reward_config.py", "RewardConfig")), "trl.RewardConfig", reads=None,
            refused={"label_smoothing_factor": "TRL's reward loss does not read it"},
        ),
        batch_metrics={
            "loss": "rows", "accuracy": "rows", "margin": "rows", "min_reward": "least", "mean_reward": "rows",
            "max_reward": "most", "num_tokens": "last",
        },
        accuracy="accuracy",
        numbers=(
            Number("held-out accuracy", "eval_accuracy", logged=None, changes=False),
            Number("held-out margin", "eval_margin", logged=None, changes=False),
            Number("disagreement", "eval_disagreement", logged=None, changes=False),  # of an ensemble's members
            Number("loss", "loss", logged="loss", changes=True),
            Number("accuracy", "accuracy", logged="accuracy", changes=True),
            Number("margin", "margin", logged="margin", changes=True),
        ),
        example="the first pair; the score is read at the [token]",
        color=3,
    ),
    Kind(
        name="ppo",
        title="PPO",
        method="proximal policy optimization",
        reads="prompts",
        encoding="prompts",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT, _REFERENCE, _REWARD),
        begins=False,
        keeps_reference=True,
        samples=True,
        own_loop=True,
        by_people=False,
        takes=_COMPARED | {"reward", "rewards", "value_model", "ptx_data", "rollout", "watch"},
        further_data={"ptx_data": "sft"},
        unread={"max_completion_length": _PROMPTS_ONLY},
        reply_limit="response_length",
        held_back_by="kl_coef",
        learning_rate="3e-6; with LoRA up to ten times that",
        config=Config(
            (
                ("transformers", "training_args.py", "TrainingArguments"),
                ("rlhf_pipeline", "ppo/config.py", "PPOConfig"),
            ),
            "`rlhf-pipeline docs ppo`",
            reads=frozenset({
                "learning_rate", "value_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
                "optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm",
                "max_skipped_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
                "gradient_checkpointing", "num_mini_batches", "total_episodes", "max_steps", "num_train_epochs",
                "num_ppo_epochs", "local_rollout_forward_batch_size", "response_length", "stop_token",
                "stop_token_id", "temperature", "missing_eos_penalty", "missing_eos_score", "normalize_scores",
                "score_clip", "whiten_rewards", "kl_coef", "kl_estimator", "target_kl", "kl_horizon", "kl_budget",
                "cliprange", "cliprange_value", "log_ratio_clamp", "vf_coef", "value_warmup_updates", "ptx_coef",
                "gamma", "lam", "data_seed", "full_determinism", "eval_strategy", "eval_steps", "eval_delay",
                "eval_on_start", "per_device_eval_batch_size", "logging_strategy", "logging_steps",
                "logging_first_step", "num_sample_generations", "save_strategy", "save_steps", "save_total_limit",
            }),
            refused={
                "gradient_checkpointing_kwargs":
                    "the shared base needs its own, so that each layer is recomputed for its own role",
                "model_adapter_name": _NAMED, "ref_adapter_name": _NAMED, "world_size": _COMPUTED,
                "num_total_batches": _COMPUTED, "micro_batch_size": _COMPUTED, "local_batch_size": _COMPUTED,
                "batch_size": _COMPUTED, "local_mini_batch_size": _COMPUTED, "mini_batch_size": _COMPUTED,
                "sft_model_path": _LOADED, "reward_model_path": _LOADED,
                "dataset_num_proc": _NOTHING_TO_LOAD, "dataloader_num_workers": _NOTHING_TO_LOAD,
                "dataloader_pin_memory": _NOTHING_TO_LOAD, "dataloader_prefetch_factor": _NOTHING_TO_LOAD,
                "dataloader_persistent_workers": _NOTHING_TO_LOAD, "dataloader_drop_last": _NOTHING_TO_LOAD,
                "load_best_model_at_end": _BUDGET, "metric_for_best_model": _BUDGET, "greater_is_better": _BUDGET,
                "tf32": "the recipe's `model.dtype` decides the precision of every stage",
            },
        ),
        batch_metrics={},
        accuracy=None,
        numbers=_OF_POLICIES_THAT_SAMPLE,
        example="the first prompt, and where the policy goes on",
        color=1,
    ),
    Kind(
        name="dpo",
        title="DPO",
        method="direct preference optimization",
        reads="preferences",
        encoding="pairs",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT, _REFERENCE),
        begins=False,
        keeps_reference=True,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=_COMPARED,
        further_data={},
        unread={},
        reply_limit=None,
        held_back_by="beta",
        learning_rate="5e-6 to 1e-5",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/dpo_config.py", "DPOConfig")), "trl.DPOConfig", reads=None,
            refused={
                "label_smoothing_factor": "DPO's losses do not read it; some read `label_smoothing`",
                "padding_free": "TRL's DPOTrainer has it switched off, and pads all the same",
                "dataset_num_proc": "the rows are encoded before: TRL has nothing left to process",
            },
        ),
        batch_metrics={
            "loss": "rows", "rewards/chosen": "rows", "rewards/rejected": "rows", "rewards/accuracies": "rows",
            "rewards/margins": "rows", "logps/chosen": "rows", "logps/rejected": "rows", "entropy": "tokens",
            "mean_token_accuracy": "chosen tokens", "logits/chosen": "chosen tokens",
            "logits/rejected": "rejected tokens", "num_tokens": "last",
        },
        accuracy="rewards/accuracies",
        numbers=(
            Number("held-out accuracy", "eval_rewards/accuracies", logged=None, changes=False),
            Number("loss", "loss", logged="loss", changes=True),
            Number("accuracy", "rewards/accuracies", logged="rewards/accuracies", changes=True),
            Number("margin", "rewards/margins", logged="rewards/margins", changes=True),
            _JUDGE,
            _WIN_RATE,
        ),
        example="the first pair; every [token] carries loss",
        color=2,
    ),
    Kind(
        name="kto",
        title="KTO",
        method="Kahneman-Tversky optimization",
        reads="feedback",
        encoding="replies",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT, _REFERENCE),
        begins=False,
        keeps_reference=True,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=_COMPARED,
        further_data={},
        unread={},
        reply_limit=None,
        held_back_by="beta",
        learning_rate="5e-6 to 1e-5",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/kto_config.py", "KTOConfig")), "trl.KTOConfig", reads=None,
            refused={
                "label_smoothing_factor": "KTO's losses do not read it",
                "dataset_num_proc": "the rows are encoded before: TRL has nothing left to process",
                "train_sampling_strategy": "rows come in a new order in each epoch, replies of all lengths together",
                "precompute_ref_log_probs": _DRAWN, "precompute_ref_batch_size": _DRAWN,
            },
        ),
        batch_metrics={
            "loss": "rows", "kl": "rows", "rewards/chosen": "chosen rows", "rewards/rejected": "rejected rows",
            "rewards/margins": "rows", "logps/chosen": "chosen rows", "logps/rejected": "rejected rows",
            "entropy": "tokens", "logits/chosen": "chosen tokens", "logits/rejected": "rejected tokens",
            "num_tokens": "last",
        },
        accuracy=None,
        numbers=(
            Number("held-out margin", "eval_rewards/margins", logged=None, changes=False),
            Number("loss", "loss", logged="loss", changes=True),
            Number("margin", "rewards/margins", logged="rewards/margins", changes=True),
            Number("KL", "kl", logged="kl", changes=True),
            _JUDGE,
            _WIN_RATE,
        ),
        example="the first reply; every [token] carries loss",
        color=4,
    ),
    Kind(
        name="grpo",
        title="GRPO",
        method="GRPO against the mean of a group of replies",
        reads="prompts",
        encoding="prompts",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT, _REFERENCE, _REWARD),
        begins=False,
        keeps_reference=True,
        samples=True,
        own_loop=False,
        by_people=False,
        takes=_COMPARED | {"reward", "rewards", "rollout", "watch"},
        further_data={},
        unread={"max_completion_length": _PROMPTS_ONLY},
        reply_limit="max_completion_length",
        held_back_by="beta",
        learning_rate="1e-5",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/grpo_config.py", "GRPOConfig")), "trl.GRPOConfig", reads=None,
            refused=_GROUPS_REFUSED | _GRPO_REFUSED,
        ),
        batch_metrics=_OF_GROUPS,
        accuracy=None,
        numbers=_OF_POLICIES_THAT_SAMPLE,
        example="the first prompt, and where the policy goes on",
        color=3,
    ),
    Kind(
        name="rloo",
        title="RLOO",
        method="RLOO against the other replies of a group",
        reads="prompts",
        encoding="prompts",
        makes="policy",
        artifact="adapter",
        doing="training",
        gives=frozenset(),
        gives_scored=frozenset(),
        parents=(_INIT, _REFERENCE, _REWARD),
        begins=False,
        keeps_reference=True,
        samples=True,
        own_loop=False,
        by_people=False,
        takes=_COMPARED | {"reward", "rewards", "rollout", "watch"},
        further_data={},
        unread={"max_completion_length": _PROMPTS_ONLY},
        reply_limit="max_completion_length",
        held_back_by="beta",
        learning_rate="1e-5",
        config=Config(
            (*_TRAINING_ARGUMENTS, ("trl", "trainer/rloo_config.py", "RLOOConfig")), "trl.RLOOConfig", reads=None,
            refused=_GROUPS_REFUSED,
        ),
        batch_metrics=_OF_GROUPS | {
            f"clip_ratio/{of}": "rows" for of in ("low_mean", "high_mean", "region_mean")
        } | {"clip_ratio/low_min": "least", "clip_ratio/high_max": "most"},
        accuracy=None,
        numbers=_OF_POLICIES_THAT_SAMPLE,
        example="the first prompt, and where the policy goes on",
        color=1,
    ),
    Kind(
        name="sample",
        title="Sampled replies",
        method="sampling replies",
        reads="prompts",
        encoding="prompts",
        makes="rows",
        artifact="rows.jsonl",
        doing="sampling",
        gives=frozenset({"prompts", "candidates"}),
        gives_scored=_ALL_ROWS,
        parents=(_INIT, _REWARD),
        begins=False,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=frozenset({"init", "n", "sampling", "reward", "rewards", "rollout"}),
        further_data={},
        unread=_ROWS_MADE_OF_ALL,
        reply_limit=None,
        held_back_by=None,
        learning_rate="",
        config=_NO_TRAINER,
        batch_metrics={},
        accuracy=None,
        numbers=(
            Number("rows", "rows", logged=None, changes=False),
            Number("score", "scores/mean", logged=None, changes=False),  # with `rewards`
            Number("gain of the best", "scores/gain", logged=None, changes=False),
            Number("length", "reply/length", logged=None, changes=False),
            Number("ended", "reply/ended", logged=None, changes=False),
            Number("distinct", "reply/unique", logged=None, changes=False),
        ),
        example="the first prompt, and where the policy goes on",
        color=4,
    ),
    Kind(
        name="judge",
        title="AI feedback",
        method="choosing the better of two replies",
        reads="candidates",
        encoding="prompts",
        makes="rows",
        artifact="rows.jsonl",
        doing="judging",
        gives=_ALL_ROWS,
        gives_scored=_ALL_ROWS,
        parents=(),
        begins=False,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=frozenset({"judge", "pairs", "ties", "human"}),
        further_data={"human": "dpo"},
        unread=_ROWS_MADE_OF_ALL,
        reply_limit=None,
        held_back_by=None,
        learning_rate="",
        config=_NO_TRAINER,
        batch_metrics={},
        accuracy=None,
        numbers=(
            Number("pairs", "judge/pairs", logged=None, changes=False),
            Number("order agreement", "judge/agreement", logged=None, changes=False),
            Number("first position", "judge/first_position", logged=None, changes=False),
        ),
        example="the first prompt",
        color=2,
    ),
    Kind(
        name="revise",
        title="Revised replies",
        method="criticising and revising replies",
        reads="prompts",
        encoding="prompts",
        makes="rows",
        artifact="rows.jsonl",
        doing="revising",
        gives=_ALL_ROWS,
        gives_scored=_ALL_ROWS,
        parents=(_INIT,),
        begins=False,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=False,
        takes=frozenset({"init", "sampling", "principles", "passes", "rollout"}),
        further_data={},
        unread=_ROWS_MADE_OF_ALL,
        reply_limit=None,
        held_back_by=None,
        learning_rate="",
        config=_NO_TRAINER,
        batch_metrics={},
        accuracy=None,
        numbers=(
            Number("rows", "rows", logged=None, changes=False),
            Number("revised", "revised", logged=None, changes=False),
            Number("length", "reply/length", logged=None, changes=False),
            Number("ended", "reply/ended", logged=None, changes=False),
        ),
        example="the first prompt, and where the policy goes on",
        color=3,
    ),
    Kind(
        name="label",
        title="People's choices",
        method="people choosing the better of two replies",
        reads="candidates",
        encoding="prompts",
        makes="rows",
        artifact="rows.jsonl",
        doing="waiting for labels",
        gives=_ALL_ROWS,
        gives_scored=_ALL_ROWS,
        parents=(_INIT,),
        begins=False,
        keeps_reference=False,
        samples=False,
        own_loop=False,
        by_people=True,
        takes=frozenset({"init", "until", "dimensions", "check", "people"}),
        further_data={"check": "dpo"},
        unread=_ROWS_MADE_OF_ALL,
        reply_limit=None,
        held_back_by=None,
        learning_rate="",
        config=_NO_TRAINER,
        batch_metrics={},
        accuracy=None,
        numbers=(
            Number("labels", "label/labels", logged=None, changes=False),
            Number("people", "label/people", logged=None, changes=False),
            Number("pairs", "rows", logged=None, changes=False),
            Number("agreement", "label/alpha", logged=None, changes=False),  # of two people or more
            Number("consistency", "label/consistency", logged=None, changes=False),
            Number("checks right", "label/checks", logged=None, changes=False),
            Number("reward accuracy", "label/reward_accuracy", logged=None, changes=False),
        ),
        example="the first prompt",
        color=1,
    ),
)  # fmt: skip

NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
SHARES = frozenset(f"eval_{kind.accuracy}" for kind in KINDS if kind.accuracy)  # of as many pairs as `PAIRS` says
KEYS: tuple[str, ...] = tuple(dict.fromkeys(key for kind in KINDS for key in sorted(kind.takes)))  # of some kinds only
DATA_KEYS = ("data", *dict.fromkeys(key for kind in KINDS for key in kind.further_data))  # those that name rows
ROLES: tuple[str, ...] = tuple(dict.fromkeys(parent.role for kind in KINDS for parent in kind.parents))


def get(name: str) -> Kind:
    """The kind of that name.

    Raises:
        KeyError: there is none.
    """
    kind = find(name)
    if kind is None:
        raise KeyError(name)
    return kind


def find(name: object) -> Kind | None:
    """The kind of that name; None where there is none, as in a run directory of a later version."""
    return next((kind for kind in KINDS if kind.name == name), None)


def numbered(role: str, number: int) -> str:
    """The name of the first parent in a role, and of the second and further ones: `reward`, `reward.2`."""
    return role if number == 1 else f"{role}.{number}"


def either(names: Sequence[str]) -> str:
    """Names as a choice: `a`, `a or b`, `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def takers(key: str) -> tuple[str, ...]:
    """The names of the kinds in which a key of a stage has an effect."""
    return tuple(kind.name for kind in KINDS if key in kind.takes)


def makers(makes: Makes) -> tuple[str, ...]:
    """The names of the kinds that make that."""
    return tuple(kind.name for kind in KINDS if kind.makes == makes)
