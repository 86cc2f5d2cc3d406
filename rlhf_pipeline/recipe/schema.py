"""What a recipe may say. The words are explained in the README; TRL's and PEFT's keys are theirs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

KINDS = ("sft", "reward", "ppo", "dpo")
BASE = "base"  # as a value of `init`: start from the bare base


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Model(_Strict):
    """The base: a hub id, a folder, or `tiny`, the checkpoint that ships with the package.

    `revision` is the branch, tag or commit of a hub model; in the resolved recipe, the commit that was found there.
    `trust_remote_code` lets a model run Python code that it brings along.
    """

    path: str = Field(min_length=1)
    revision: str | None = Field(default=None, min_length=1)
    trust_remote_code: bool = False
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Data(_Strict):
    """Rows for a stage: a file (`.jsonl`, `.json`, `.csv`, `.parquet`), a hub dataset, or `tiny:NAME`.

    `revision` is the branch, tag or commit of a hub dataset; in the resolved recipe, the commit that was found there.
    `columns` maps the names a stage expects to the file's own. `eval_fraction` of the prompts, with all their rows, are
    held out. Prompts keep their last `max_prompt_length` tokens, replies their first `max_completion_length`.
    """

    path: str = Field(min_length=1)
    revision: str | None = Field(default=None, min_length=1)
    split: str = "train"
    columns: dict[str, str] = {}
    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    max_prompt_length: int | None = Field(default=None, ge=1)
    max_completion_length: int | None = Field(default=None, ge=1)


def _path_only(value: Any) -> Any:
    """`data: FILE` is short for `data: {path: FILE}`."""
    return {"path": value} if isinstance(value, str) else value


DataField = Annotated[Data, BeforeValidator(_path_only)]


class Evaluate(_Strict):
    """After every policy stage: replies to held-out prompts, judged by a function of yours.

    `judge` is `module:function` with the signature of TRL's GRPO reward functions: lists of `prompts` and
    `completions`, every other column of the data as a keyword, a list of floats back.
    """

    data: DataField
    judge: str = Field(pattern=r"^[\w.]+:\w+$")
    n: int = Field(default=100, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    batch_size: int = Field(default=16, ge=1)


class Stage(_Strict):
    """One step of a recipe. `init` and `reward` name earlier stages; once loaded, they are always filled in.

    `ptx_data` are demonstrations that PPO mixes in, with the weight `ptx_coef`.

    `lora` is what this stage's adapter has otherwise than the one it starts from, or than the recipe's `lora` where it
    starts from the base; once loaded, it is the whole shape.

    `gates` are conditions on final metrics, as `eval_accuracy: ">= 0.65"`, that must hold before a stage that needs
    this one may start.
    """

    kind: Literal["sft", "reward", "ppo", "dpo"]
    init: str | None = None
    reward: str | None = None
    data: DataField
    ptx_data: DataField | None = None
    lora: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    gates: dict[str, str] = {}


class Recipe(_Strict):
    """A whole recipe, with every default visible; the folder that its relative paths start from is `folder`.

    `keep_checkpoints` leaves a stage's `work/` in place when it is done.
    """

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    output_dir: str = "runs"
    seed: int = 42
    model: Model
    lora: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    evaluate: Evaluate | None = None
    keep_checkpoints: bool = False
    stages: dict[str, Stage] = Field(min_length=1)
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from, and a judge's module is looked for in."""
        return self._folder

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.output_dir) / self.name
