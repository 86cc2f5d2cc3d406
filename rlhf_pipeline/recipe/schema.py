"""What a recipe may say. TRL's and PEFT's keys are theirs.

The text under each key is its description in the JSON Schema that editors read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from rlhf_pipeline.kinds import NAMES, ROWS, WATCHED, Kind, Rows, get, numbered
from rlhf_pipeline.recipe.deepspeed import zero_stage
from rlhf_pipeline.recipe.yaml import KeyPath

BASE = "base"  # as a value of `init`: start from the bare base
GOLD = "gold"  # the name of a reward of weight 0 that the other rewards are measured by
PREVIOUS = "previous"  # as a value of `reference` in a round: the policy that the stage starts from
MOST_ROUNDS = 100
OF_STAGE = "stage:"  # how `path` of data begins that names the rows of an earlier stage


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True)


class Model(_Strict):
    """The base: loaded frozen, shared by all roles, never written."""

    path: str = Field(min_length=1)
    """A hub id, a folder, or `tiny`, the checkpoint that ships with the package."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a hub model; in the resolved recipe, the commit that was found there."""

    trust_remote_code: bool = False
    """Let the model run Python code that it brings along."""

    chat_template: str | None = Field(default=None, min_length=1)
    """A file with the Jinja chat template to use instead of the tokenizer's own."""

    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template is told beside the conversation: {enable_thinking: false}."""

    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the base is loaded: 4-bit NF4, 8-bit, or not quantized."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The precision of every stage; `auto` is bfloat16 where the GPU computes in it, else float32."""

    attention: str = Field(
        default="auto",
        pattern=r"^(auto|sdpa|eager|flash_attention_[23]|kernels-community/[\w.-]+)$",
        examples=["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"],
    )
    """What computes attention in every stage: `sdpa`, `eager`, `flash_attention_2`, `flash_attention_3`, or
    `kernels-community/NAME`, a kernel from the hub; `auto` is `sdpa` where the model has it, else `eager`."""

    _key: str = PrivateAttr("model.path")

    @property
    def place(self) -> str:
        """The key that names it, and what that says: for messages."""
        return f"{self._key}: {self.path}"

    @property
    def is_base(self) -> bool:
        """Whether it is the recipe's `model`, and not that of a reward."""
        return self._key == "model.path"

    @property
    def needs_kernel(self) -> bool:
        """Whether attention is computed by what does not come with PyTorch and needs a GPU."""
        return self.attention not in ("auto", "sdpa", "eager")


class Source(_Strict):
    """Where rows come from."""

    path: str = Field(min_length=1)
    """Rows: a file (.jsonl, .json, .csv, .parquet; also .gz, .bz2, .xz), a glob, a folder, a hub id, `tiny:NAME`, or
    `stage:NAME`, the rows that an earlier stage makes."""

    subset: str | None = Field(default=None, min_length=1)
    """The configuration of a hub dataset that has several."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a hub dataset; in the resolved recipe, the commit that was found there."""

    split: str = "train"
    """The split of a hub dataset, as the datasets library reads it (`train`, `train[:10%]`)."""

    columns: dict[str, str] = {}
    """Names that are expected, with the data's own names for them: {prompt: question}."""

    limit: int | None = Field(default=None, ge=1)
    """Use the first rows only, this many."""

    _rows: Path | None = PrivateAttr(None)

    @property
    def stage(self) -> str | None:
        """The earlier stage whose rows these are; None where they come from elsewhere."""
        return self.path.removeprefix(OF_STAGE) if self.path.startswith(OF_STAGE) else None

    @property
    def files(self) -> str:
        """The path of the files: `path`, or where the stage's rows are, or will be."""
        return self.path if self._rows is None else str(self._rows)


class MixedSource(Source):
    """One of several sources of rows."""

    weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """This source's share of the mix, relative to the others' weights; without any weights, all rows are used."""


def _path_only(value: Any) -> Any:
    """`data: FILE` is short for `data: {path: FILE}`."""
    return {"path": value} if isinstance(value, str) else value


def _path_or_mix(value: Any) -> Any:
    """`data: FILE` is short for `data: {path: FILE}`, and `data: [A, B]` for `data: {mix: [A, B]}`."""
    return {"mix": value} if isinstance(value, list) else _path_only(value)


class Data(Source):
    """Rows for a stage: of one source, given by `path`, or of several, given by `mix`."""

    path: str = ""
    """Rows: a file (.jsonl, .json, .csv, .parquet; also .gz, .bz2, .xz), a glob, a folder, a hub id, `tiny:NAME`, or
    `stage:NAME`, the rows that an earlier stage makes."""

    mix: list[Annotated[MixedSource, BeforeValidator(_path_only)]] = []
    """Several sources, each as a path or with keys of its own, mixed by `weight`."""

    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Hold out this share of the prompts, at least one, with all their rows, to evaluate on."""

    eval_data: Annotated[Source, BeforeValidator(_path_only)] | None = None
    """Rows to evaluate on, instead of `eval_fraction`."""

    chat: bool | None = None
    """Whether a prompt given as text is a user's turn, which goes through the chat template. By default that is so
    under `instruction`, `question`, `query`, `input` and beside `system` or `history`, and not under `prompt`, which is
    text as the model reads it."""

    max_prompt_length: int | None = Field(default=None, ge=1)
    """In tokens: a longer prompt keeps its last ones."""

    max_completion_length: int | None = Field(default=None, ge=1)
    """In tokens: a longer reply keeps its first ones, and has no EOS."""

    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a row that is over one of the two lengths: it is cut, or left out and counted."""

    loss: Literal["last", "all"] = "last"
    """Demonstrations only. Which of the assistant's turns of a conversation are learned: the last one, or all of them.
    One of weight 0 never is."""

    pairs: Literal["all", "best_and_worst"] | None = None
    """Preferences only. Which pairs are made of a list of replies: `all` of a better and a worse one, the default; or
    of the best and the worst alone, as `dpo` does by default with the rows of a stage of kind `sample`."""

    part: list[int] | None = None
    """[i, n]: of the prompts, with all their rows, only the i-th of n equal shares, as `rounds` gives each round one.
    The recipe's `seed` and the prompts decide which. Rows that are held out are not shared out."""

    bad_rows: Literal["error", "drop"] = "error"
    """What becomes of a row that lacks something: it ends the check, or is left out and counted."""

    @property
    def sources(self) -> Sequence[Source]:
        """Where the rows come from, one or several; those of `eval_data` apart."""
        return self.mix or [self]

    @property
    def holds_out(self) -> bool:
        """Whether there will be rows to evaluate on."""
        return self.eval_fraction > 0 or self.eval_data is not None


DataField = Annotated[Data, BeforeValidator(_path_or_mix)]


class Reward(_Strict):
    """One of the rewards of a reply: a reward stage, a function of yours, or a sequence classifier."""

    stage: str | None = Field(default=None, min_length=1)
    """An earlier reward stage, or a reward model from outside, named as for `reward`."""

    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:function`, with TRL's signature for reward functions: gets `prompts`, `completions`, `completion_ids` and
    every other column of the data, as keywords; returns a list of numbers, None where it does not apply."""

    model: str | None = Field(default=None, min_length=1)
    """A sequence classifier with one label, as a hub id or a folder, with its own tokenizer and chat template."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of `model` on the hub; in the resolved recipe, the commit that was found there."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """What it is multiplied by before all are added up; below 0, it is a penalty; at 0, it is measured alone."""

    combine: str = "mean"
    """Of a reward stage with several members: `mean`, `min`, or `mean - k*std`, as `mean - 0.5*std`."""

    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What it is logged under; by default the name of the stage, of the function, or of the model."""

    @property
    def label(self) -> str:
        """What it is logged under."""
        if self.stage is not None:
            own = self.stage.partition("@")[0].rstrip("/").rpartition("/")[2].replace(":", ".")
        elif self.function is not None:
            own = self.function.partition(":")[2]
        else:
            own = str(self.model).rstrip("/").rpartition("/")[2]
        return self.name or own


class Sampling(_Strict):
    """How replies are sampled that become rows."""

    temperature: float = Field(default=1.0, ge=0.0)
    """0 is greedy."""

    max_new_tokens: int = Field(default=128, ge=1)
    """In tokens: where a reply is cut."""

    batch_size: int = Field(default=16, ge=1)
    """How many replies are sampled at once; the rows do not depend on it."""


class Rollout(_Strict):
    """What samples replies."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers` samples with the base that trains; `vllm` with a copy of it, which is given the adapters."""

    gpu_memory_utilization: float = Field(default=0.5, gt=0.0, le=1.0)
    """Engine `vllm`, on a GPU: the share of its memory that the engine may use while it samples."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Engine `vllm`: the most replies that are sampled together."""

    enforce_eager: bool = False
    """Engine `vllm`, on a GPU: do without CUDA graphs: slower, and less memory and a faster start."""

    @property
    def is_vllm(self) -> bool:
        """Whether vLLM samples."""
        return self.engine == "vllm"


class AIJudge(_Strict):
    """An AI that says which of two replies is better."""

    model: str = Field(min_length=1)
    """Who is asked: `base`, an earlier stage, the http(s) address of an OpenAI-compatible server, or `module:function`.
    """

    served_model: str | None = Field(default=None, min_length=1)
    """The model's name at the address."""

    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """The environment variable that holds the key of the address; what it holds is never written."""

    rubric: str | None = Field(default=None, min_length=1)
    """A YAML file of questions, each with a weight, that are asked apart; `default`, the default, ships with the
    package."""

    principles: str | None = Field(default=None, min_length=1)
    """In place of `rubric`: a file of principles, of which each comparison draws one; `default` ships with the
    package."""

    template: str | None = Field(default=None, min_length=1)
    """The Jinja template of what is asked, or a file with it; it gets `prompt`, `turns`, `first`, `second` and
    `question`."""

    answers: list[str] = Field(default=["A", "B"], min_length=2, max_length=2)
    """Of a model on this machine with a `template` of your own: the two words, each one token, that are the answer: the
    first reply, or the second."""

    min_probability: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Of a model on this machine: an answer counts as unread where both words together have less than this."""

    batch_size: int = Field(default=16, ge=1)
    """How many questions a model on this machine reads at once."""

    concurrency: int = Field(default=8, ge=1)
    """How many questions are under way at the address at once."""

    timeout: float = Field(default=60.0, gt=0.0)
    """In seconds: how long an answer of the address may take."""

    retries: int = Field(default=5, ge=0)
    """How often a question is asked again that the address did not answer."""

    @property
    def is_remote(self) -> bool:
        """Whether it is asked at an address."""
        return "://" in self.model

    @property
    def is_function(self) -> bool:
        """Whether it is a function of the user's."""
        return ":" in self.model and not self.is_remote

    @property
    def is_local(self) -> bool:
        """Whether it is asked on the shared base, as which, or under which, it answers."""
        return ":" not in self.model

    @property
    def has_own_text(self) -> bool:
        """Whether `template` is the template itself, and no file."""
        return self.template is not None and "{{" in self.template

    @property
    def stage(self) -> str | None:
        """The earlier stage that is asked; None where it is another one."""
        return None if self.model == BASE or ":" in self.model else self.model


class Evaluate(_Strict):
    """After every policy stage: replies to held-out prompts, judged by a function of yours, by an AI, or by both."""

    data: DataField
    """Rows with prompts; the judge gets their other columns as keywords."""

    judge: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:function`: gets lists of texts, `prompts` and `completions`, of the turns, `messages`, and of every other
    column of the data, as keywords; returns a list of floats, None where it has no opinion."""

    ai_judge: AIJudge | None = None
    """An AI that compares the replies of each policy with those of the policy that it starts from, and in `compare`
    those of all: win rates."""

    n: int = Field(default=100, ge=1)
    """How many prompts are asked: the first ones."""

    samples: int = Field(default=1, ge=1)
    """How often each prompt is answered and judged: more make `judge_mean` steadier."""

    max_new_tokens: int = Field(default=128, ge=1)
    """In tokens: where a reply is cut."""

    temperature: float = Field(default=1.0, ge=0.0)
    """Of the sampled replies; 0 is greedy."""

    batch_size: int = Field(default=16, ge=1)
    """How many prompts are answered at once."""

    rollout: Rollout | None = None
    """What samples the replies, of `compare` as well; by default Transformers, whatever samples while a stage trains.
    """

    along: int = Field(default=10, ge=0)
    """How often a policy that samples while it trains is measured on the way, too, at even distances: by `judge`, by
    its rewards, and by what its replies are like. 0 never does."""


class Rounds(_Strict):
    """Stages that are repeated."""

    n: int = Field(ge=1, le=MOST_ROUNDS)
    """How many rounds."""

    stages: list[str] = Field(min_length=1)
    """The stages of a round, in the order in which they run. At least one trains a policy."""

    prompts: Literal["split", "reuse"] | None = None
    """Where stages of a round read prompts from elsewhere: `split`, the default, gives each round an equal share of
    them, and `reuse` gives all of them to every round."""


class Watch(_Strict):
    """What is done about what is measured while a policy trains: of its rewards, of its replies, and by judges."""

    stop: list[Literal[WATCHED]] = []  # type: ignore[valid-type]  # it is a tuple of words
    """Training ends with a confirmed alarm of one of these measures: two measurements in a row, or one by far."""

    keep: Literal["best", "last"] | None = None
    """Which policy the stage leaves: that of the `best` measurement, the default with `stop`, or the `last` one."""

    best_by: Literal["gold", "judge", "pessimistic"] | None = None
    """What says which measurement is the best: `gold`, the mean of `evaluate.judge`, the default where there is one;
    `judge`, how often `evaluate.ai_judge` prefers the replies to those that the policy gave at first; or `pessimistic`,
    the rewards less what the members of an ensemble disagree by."""

    every: float = Field(default=0.3, gt=0.0, allow_inf_nan=False)
    """A measurement is made whenever √KL has grown by this, in nats^½ of a whole reply; and `evaluate.along` times at
    even distances."""

    @property
    def acts(self) -> bool:
        """Whether it may decide which policy the stage leaves."""
        return bool(self.stop) or self.keep == "best"


class Until(_Strict):
    """When people have labelled enough; all that is set must hold."""

    labels: int | None = Field(default=None, ge=1)
    """So many labels in all."""

    per_item: int | None = Field(default=None, ge=1)
    """So many labels of each prompt, each by another person where there are several."""

    reward_accuracy: str | None = None
    """A bound, as `">= 0.7"`, on the accuracy of the reward that learns along, on pairs that were drawn at random."""

    @property
    def says(self) -> dict[str, Any]:
        """What is set."""
        return self.model_dump(exclude_none=True)


class People(_Strict):
    """Whose labels count: those of a person who is below a bound are left out."""

    min_agreement: float | None = Field(default=None, ge=0.0, le=1.0)
    """On pairs that others labelled too: the share of the others' labels that say the same."""

    min_checks: float | None = Field(default=None, ge=0.0, le=1.0)
    """Of the rows of `check`: the share that was answered right."""

    leave_out: list[str] = []
    """Names of people."""

    @property
    def says(self) -> dict[str, Any]:
        """What is set."""
        return self.model_dump(exclude_defaults=True)


class Stage(_Strict):
    """One step of a recipe."""

    kind: Literal[NAMES]  # type: ignore[valid-type]  # it is a tuple of words
    """What the stage does; by default, what its name says."""

    init: str | list[str] | None = None
    """The earlier stage whose adapter this one starts from, or `base`; by default the latest earlier `sft` stage. Or an
    adapter from outside: a folder (`./my-adapter`), a stage of another run (`runs/other:sft`), or a hub id. Of a stage
    of kind `sample` it is the policy that replies, or a list of several."""

    reference: str | None = None
    """Kinds `ppo`, `dpo`, `kto`, `grpo` and `rloo`: the policy that KL is measured from, and that `beta` or `kl_coef`
    hold the policy near to: an earlier stage, `base`, or an adapter from outside, named as for `init`. By default what
    the stage starts from; from the second of `rounds` on what the first one starts from, unless it is `previous`."""

    reward: str | None = None
    """PPO, GRPO, RLOO and `sample` only: the reward stage whose model scores the replies; by default the latest earlier
    one, and of `sample` none. Or a reward model from outside, named as for `init`."""

    rewards: list[Reward] = []
    """PPO, GRPO, RLOO and `sample` only, in place of `reward`: several rewards, whose weighted sum is what the policy
    learns from, or the score of a sampled reply."""

    value_model: Literal["adapter", "head"] | None = None
    """PPO only: what tells the value of a reply so far. `adapter`, the default, is an adapter of its own; `head` is a
    head on the policy's own trunk, which costs one pass of the base less, and a policy that learns two things."""

    watch: Watch | None = None
    """PPO, GRPO and RLOO only: stop where the policy games its rewards, and keep the best one."""

    data: DataField
    """Rows: a path, keys with a path, or a list of several."""

    ptx_data: DataField | None = None
    """PPO only: demonstrations that are mixed in with the weight `ptx_coef`."""

    members: int | None = Field(default=None, ge=2, le=32)
    """Reward models only: train an ensemble of so many, each with its own head and order of data, on one base."""

    bootstrap: bool = False
    """With `members`: each trains on a sample of the pairs, as many as there are, drawn with replacement."""

    n: int | None = Field(default=None, ge=1)
    """Kind `sample`: how many replies each prompt gets from each policy; by default 4."""

    sampling: Sampling | None = None
    """Kinds `sample` and `revise`: how replies are sampled."""

    rollout: Rollout | None = None
    """Kinds `ppo`, `grpo`, `rloo`, `sample` and `revise`: what samples the replies; by default Transformers."""

    judge: AIJudge | None = None
    """Kind `judge`: the AI that says which of two replies is better."""

    pairs: int | None = Field(default=None, ge=1)
    """Kind `judge`: of so many pairs of replies to each prompt it is asked, which are drawn; by default of all."""

    ties: Literal["drop", "keep"] | None = None
    """Kind `judge`: what becomes of a pair of which the judge says something else in the other order. `drop`, the
    default, leaves it out; `keep` takes the reply that it found better on average."""

    human: DataField | None = None
    """Kind `judge`: pairs that people have judged, on which the judge is compared with them."""

    until: Until | None = None
    """Kind `label`: when there are labels enough; by default one of each prompt."""

    dimensions: list[str] | None = Field(default=None, max_length=9)
    """Kind `label`: in what else the replies may be compared; by default helpfulness, honesty, harmlessness and
    conciseness. `[]` asks for nothing else."""

    check: DataField | None = None
    """Kind `label`: pairs whose better reply is known, which people are shown among the others."""

    people: People | None = None
    """Kind `label`: whose labels count; by default everybody's."""

    principles: str | None = Field(default=None, min_length=1)
    """Kind `revise`: a file of principles, of which each revision draws one; `default`, the default, ships with the
    package."""

    passes: int | None = Field(default=None, ge=1)
    """Kind `revise`: how often each reply is criticised and revised; by default once."""

    lora: dict[str, Any] = {}
    """peft.LoraConfig's own keys, where this stage's adapter differs from the one it starts from, or from the recipe's
    `lora` where it starts from the base; once loaded, the whole shape."""

    trainer: dict[str, Any] = {}
    """The keys of TRL's own config class for the stage's kind."""

    launch: dict[str, Any] | None = None
    """Kinds that train: how many processes train it, as at the top of the recipe, which this replaces."""

    gates: dict[str, str] = {}
    """Conditions on final metrics, as `eval_accuracy: ">= 0.65"`, that must hold before a stage that needs this one may
    start."""

    @property
    def facts(self) -> Kind:
        """What a stage of this kind is."""
        return get(self.kind)

    @property
    def parents(self) -> dict[str, str]:
        """The stage, or `base`, that it has in each role; further ones in the same role are `reward.2`, and so on.

        A stage whose rows it reads has the role `rows`, and one that judges them the role `judge`.
        """
        roles = [parent.role for parent in self.facts.parents]
        named = {
            "init": self.inits if "init" in roles else [],
            "reference": [self.reference] if self.reference is not None else [],
            "reward": [reward.stage for reward in self.scored_by if reward.stage is not None and "reward" in roles],
            "judge": [self.judge.stage] if self.judge and self.judge.stage else [],
            ROWS: list(dict.fromkeys(source.stage for source in self.sources if source.stage is not None)),
        }
        return {numbered(role, place): name for role, names in named.items() for place, name in enumerate(names, 1)}

    @property
    def inits(self) -> list[str]:
        """The stages, or `base`, whose policies it starts from; only one where it trains."""
        return self.init if isinstance(self.init, list) else [self.init or BASE]

    @property
    def start(self) -> str:
        """The stage, or `base`, that it starts from; of several the first."""
        return self.inits[0]

    @property
    def tables(self) -> dict[str, Data]:
        """Its sections of data by their keys."""
        found = {"data": self.data, **{key: getattr(self, key) for key in self.facts.further_data}}
        return {key: data for key, data in found.items() if data is not None}

    def reads(self, key: str) -> Rows:
        """What the rows are that it reads under a key of its data."""
        return self.facts.reads if key == "data" else get(self.facts.further_data[key]).reads

    @property
    def sources(self) -> list[Source]:
        """Everything that its rows come from."""
        apart = [data.eval_data for data in self.tables.values() if data.eval_data]
        return [source for data in self.tables.values() for source in data.sources] + apart

    @property
    def scored_by(self) -> list[Reward]:
        """What scores its replies: `rewards`, or the one stage that `reward` names."""
        return self.rewards or ([] if self.reward is None else [Reward(stage=self.reward)])

    @property
    def weighed(self) -> list[Reward]:
        """Those of its rewards that decide the scores; the others, of weight 0, are measured."""
        return [reward for reward in self.scored_by if reward.weight]

    @property
    def gold(self) -> str | None:
        """The name of its reward that is the truth to measure the others by: one of weight 0 that is called so."""
        return next((one.label for one in self.scored_by if not one.weight and one.label == GOLD), None)


def _list_of_trackers(value: Any) -> Any:
    """`report_to: wandb` is short for `report_to: [wandb]`, and `none` for no tracker."""
    return [] if value in (None, "none") else [value] if isinstance(value, str) else value


class Recipe(_Strict):
    """A recipe for rlhf-pipeline: from a base model to adapters, stage by stage."""

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    """The run directory is <output_dir>/<name>; by default the recipe's file name."""

    output_dir: str = "runs"
    """Where run directories are; a relative path starts from the recipe's folder."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds everything random in every stage."""

    model: Model
    """The base that all stages share."""

    lora: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    """peft.LoraConfig's own keys: the shape of an adapter that starts from the base."""

    launch: dict[str, Any] | None = None
    """How many processes train a stage, and where: Accelerate's own keys, as {num_processes: 4}; the path of a file
    that `accelerate config` wrote; or `auto`, all devices that are visible. By default it is one process."""

    evaluate: Evaluate | None = None
    """A judge for every policy stage."""

    report_to: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_list_of_trackers)] = []
    """Trackers that the numbers of every stage go to as well, one or several: `tensorboard`, `wandb`, `trackio`."""

    keep_checkpoints: bool = False
    """Leave a stage's `work/`, with its checkpoints, in place when it is done."""

    stages: dict[str, Stage] = Field(min_length=1)
    """The stages by name, in the order in which they run."""

    rounds: Rounds | None = None
    """Stages that are repeated; each round becomes stages of its own, as `dpo-1` and `dpo-2`."""

    _folders: list[Path] = PrivateAttr(default_factory=lambda: [Path.cwd()])
    _place: Callable[[KeyPath], str] | None = PrivateAttr(None)
    _as_written: Callable[[str], str] = PrivateAttr(str)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folders[0]

    @property
    def folders(self) -> list[Path]:
        """Where the modules of judge and reward functions are looked for: beside the files that name them."""
        return self._folders

    def place(self, *path: str) -> str:
        """Where a value was written, as messages show it; its key path alone in a worker, which does not know more."""
        return self._place(path) if self._place else ".".join(path)

    @property
    def has_judge(self) -> bool:
        """Whether a function judges policies."""
        return self.evaluate is not None and self.evaluate.judge is not None

    def ai_judge_of(self, name: str) -> AIJudge | None:
        """The AI that compares a stage's policy with the one that it starts from.

        None where there is none, and where it is itself a stage that does not come before that one.
        """
        judge = self.evaluate.ai_judge if self.evaluate and self.stages[name].facts.is_policy else None
        names = list(self.stages)
        return None if judge and judge.stage in names[names.index(name) :] else judge

    def launch_of(self, name: str) -> dict[str, Any]:
        """Accelerate's keys by which a stage is trained; empty where one process trains it as without them."""
        stage = self.stages[name]
        keys = (stage.launch if stage.launch is not None else self.launch) if stage.facts.trains else None
        by_accelerate = keys and (
            keys.get("num_processes", 1) != 1
            or any(keys.get(key) for key in ("use_cpu", "fsdp_config", "deepspeed_config"))
        )
        return {**keys, "machine_rank": self.machine_rank} if keys and by_accelerate else {}

    def divides(self, name: str) -> bool:
        """Whether the processes that train a stage divide its base among them; then they judge its policy together."""
        keys = self.launch_of(name)
        return bool(keys.get("fsdp_config")) or zero_stage(keys.get("deepspeed_config") or {}) == 3

    def processes(self, name: str) -> int:
        """How many processes train a stage, on all machines together."""
        return self.launch_of(name).get("num_processes", 1)

    @property
    def machines(self) -> int:
        """How many machines it is run on."""
        said = [self.launch, *(stage.launch for stage in self.stages.values() if stage.facts.trains)]
        return max((launch or {}).get("num_machines", 1) for launch in said)

    @property
    def machine_rank(self) -> int:
        """Which of several machines this is; the first one, 0, decides all that happens."""
        return (self.launch or {}).get("machine_rank", 0)

    def as_written(self, text: str) -> str:
        """A text in which the stages of `rounds` have the names that were written, as `dpo` for `dpo-2`."""
        return self._as_written(text)

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.output_dir) / self.name

    def locate_rows(self, run: Path | None = None) -> None:
        """Note where the rows are, or will be, that stages read of each other.

        Args:
            run: the run directory, where it is another one than the recipe's.
        """
        for stage in self.stages.values():
            for source in stage.sources:
                if source.stage is not None:
                    source._rows = (run or self.run) / source.stage / get(self.stages[source.stage].kind).artifact
