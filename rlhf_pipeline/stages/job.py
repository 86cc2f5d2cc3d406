"""What a stage gets: its settings, and where things are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from rlhf_pipeline.callbacks.checkpoints import SECONDS_BETWEEN, Checkpoints
from rlhf_pipeline.callbacks.progress import ProgressFile
from rlhf_pipeline.data.cache import Known
from rlhf_pipeline.data.prepare import Prepared
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import load_config, load_generation_config, resolve_dtype
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import library_keys, outside
from rlhf_pipeline.recipe.schema import BASE, Data, Recipe, Stage
from rlhf_pipeline.rundir import durable, strict_json
from rlhf_pipeline.rundir.layout import ADAPTER, STAGED_ROWS, TRAINED, WORK
from rlhf_pipeline.stages import liger, sharded

Config = TypeVar("Config", bound=TrainingArguments)
Read = Callable[[Data, PreTrainedTokenizerBase, int, Known | None], Prepared]  # a function of `data.prepare`


class Inputs(NamedTuple):
    """What a stage of any kind trains with.

    Attributes:
        args: TRL's config.
        tokenizer: the recipe's.
        data: the rows of `data`.
        ptx_data: those of PPO's `ptx_data`; None where there are none.
    """

    args: Any
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    ptx_data: Prepared | None = None


class Reader:
    """Loads a recipe's configuration and tokenizer once, and reads its rows, each distinct reading once.

    For all stages of a process.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.known = Known()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """From `load_tokenizer`, which see for what it raises."""
        return load_tokenizer(self.recipe.model)

    @cached_property
    def config(self) -> PretrainedConfig:
        """From `load_config`, which see for what it raises."""
        return load_config(self.recipe.model)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The model's own, from `load_generation_config`."""
        return load_generation_config(self.recipe.model, self.config)

    def read(self, read: Read, data: Data) -> Prepared:
        """Rows as a function of `data.prepare` makes them."""
        return read(data, self.tokenizer, self.recipe.seed, self.known)


@dataclass(frozen=True)
class Job:
    """One stage of a recipe, in a run directory.

    Attributes:
        recipe: the resolved recipe.
        name: the stage's name in it.
        run: the run directory.
        shared: the reader of all stages, where one process has several.
    """

    recipe: Recipe
    name: str
    run: Path
    shared: Reader | None = None

    @property
    def stage(self) -> Stage:
        """The stage's own settings."""
        return self.recipe.stages[self.name]

    @cached_property
    def reader(self) -> Reader:
        """What loads the tokenizer and reads rows."""
        return self.shared or Reader(self.recipe)

    @property
    def folder(self) -> Path:
        """Where the stage's record, numbers and log are."""
        return self.run / self.name

    @property
    def work(self) -> Path:
        """Where the stage may write until it is done."""
        return self.folder / WORK

    @cached_property
    def progress(self) -> ProgressFile:
        """Tells those who watch where the stage is; a callback for its trainer too."""
        return ProgressFile(self.work)

    @property
    def artifact(self) -> Path:
        """The folder in which the stage leaves what it made, for the runner to publish."""
        return self.work / (ADAPTER if self.stage.facts.trains else STAGED_ROWS)

    @property
    def published(self) -> Path:
        """Where the runner has put the adapter of a stage that is done."""
        return self.folder / ADAPTER

    @property
    def init(self) -> Path | None:
        """The adapter the stage starts from; None for the bare base."""
        return None if self.stage.start == BASE else self._adapter_of(self.stage.start)

    @property
    def reference(self) -> Path | None:
        """The adapter that the stage's KL is measured from; None for the bare base."""
        named = self.stage.reference
        return self.init if named is None else None if named == BASE else self._adapter_of(named)

    @property
    def reward_models(self) -> list[tuple[Path, dict[str, Any]]]:
        """The adapters, and their shapes, of the reward stages that score its replies, in the recipe's order."""
        names = [reward.stage for reward in self.stage.scored_by if reward.stage is not None]
        return [(self._adapter_of(name), self._lora_of(name)) for name in names]

    @property
    def reads_rows(self) -> bool:
        """Whether something that rewards its replies reads more than token ids."""
        return any(reward.stage is None for reward in self.stage.scored_by)

    def _lora_of(self, name: str) -> dict[str, Any]:
        return outside.lora(outside.config(name)) if outside.is_one(name) else self.recipe.stages[name].lora

    def _adapter_of(self, name: str) -> Path:
        return outside.folder(name) if outside.is_one(name) else self.run / name / ADAPTER

    def trainer_config(self, config: type[Config], **decided: Any) -> Config:
        """Build TRL's config from the recipe's `trainer:` and what the pipeline decides.

        Raises:
            InputError: with TRL's or Transformers' own complaint.
        """
        dtype = resolve_dtype(self.recipe.model.dtype)
        accepted = library_keys.accepted(self.stage.kind)
        reentrant = (self.stage.trainer.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", False)
        settings = {
            **{key: default for key, (default, _) in library_keys.OURS.items() if key in accepted},
            "output_dir": str(self.work),
            "seed": self.recipe.seed,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": self.recipe.report_to or "none",
            "run_name": f"{self.recipe.name}/{self.name}",
            "project": self.recipe.name,
            "save_strategy": "no",  # unless the recipe says when, `checkpoints` does
            "save_total_limit": 2,  # the last one, and one before it should that be damaged
            "logging_nan_inf_filter": False,  # a loss that is not finite ends the stage
            "disable_tqdm": True,
            "ddp_broadcast_buffers": False,  # they are constants
            # Of a mixture's adapters, or those of a part that reads pictures, some may be without use in a batch; but
            # reentrant checkpoints do not get along with looking for them.
            "ddp_find_unused_parameters": not reentrant,
            **decided,
            **self.stage.trainer,
        }
        for what in ("logging", "eval", "save"):
            if f"{what}_steps" in self.stage.trainer:
                settings[f"{what}_strategy"] = "steps"
        if self.stage.trainer.get(liger.KEY):
            settings[liger.OPTIONS] = liger.options(self.stage.facts, self.stage.trainer)
        if settings["save_strategy"] == "best":
            raise InputError(
                "no checkpoint is kept for being the best",
                place=f"stages.{self.name}.trainer.save_strategy",
                hint="use `steps` or `epoch`; PPO has `kl_budget`",
            )
        try:
            return sharded.with_fitting_checkpoints(config(**settings))
        except (AssertionError, ImportError, KeyError, TypeError, ValueError) as error:
            raise InputError(str(error).strip().splitlines()[0], place=f"stages.{self.name}.trainer") from None

    def checkpoints(self) -> Checkpoints:
        """The callback that asks for checkpoints, by time where the recipe's `save_*` keys say nothing."""
        decided = {"save_strategy", "save_steps"} & self.stage.trainer.keys()
        return Checkpoints(None if decided else SECONDS_BETWEEN)

    def last_checkpoint(self, folder: Path | None = None) -> str | None:
        """The checkpoint that the stage resumes from; the runner has put away what cannot be trusted.

        Args:
            folder: where checkpoints are, by default in `work/`.
        """
        return next((str(path) for path in durable.newest_first(folder or self.work)), None)

    def trained(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Note that training is over and the artifact whole: whatever comes now, it need not be done again.

        Args:
            metrics: the final numbers so far.

        Returns:
            The same.
        """
        durable.sync_folder(self.artifact)
        note = {"metrics": metrics, "files": durable.contents(self.artifact)}
        durable.write_text(self.work / TRAINED, strict_json.dumps(note))
        return metrics

    def require_eval_data(self, args: TrainingArguments, held_out: Dataset | None) -> None:
        """See that evaluation during training has something to evaluate on.

        Raises:
            InputError: `eval_strategy` is set and no rows are held out.
        """
        if args.eval_strategy != "no" and held_out is None:
            raise InputError(
                "there are no held-out rows to evaluate on",
                place=f"stages.{self.name}.trainer.eval_strategy",
                hint=f"set `eval_fraction` or `eval_data` in stages.{self.name}.data",
            )
