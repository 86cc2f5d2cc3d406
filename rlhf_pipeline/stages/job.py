"""What a stage is told: its settings, and where things are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import TrainingArguments

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import resolve_dtype
from rlhf_pipeline.recipe.schema import BASE, Recipe, Stage

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass(frozen=True)
class Job:
    """One stage of a recipe, in a run directory.

    Attributes:
        recipe: the resolved recipe.
        name: the stage's name in it.
        run: the run directory.
    """

    recipe: Recipe
    name: str
    run: Path

    @property
    def stage(self) -> Stage:
        """The stage's own settings."""
        return self.recipe.stages[self.name]

    @property
    def folder(self) -> Path:
        """Where the stage's record, numbers and log are."""
        return self.run / self.name

    @property
    def work(self) -> Path:
        """Where the stage may write until it is done."""
        return self.folder / "work"

    @property
    def artifact(self) -> Path:
        """Where the stage leaves its adapter for the runner to publish."""
        return self.work / "adapter"

    @property
    def init(self) -> Path | None:
        """The adapter the stage starts from; None for the bare base."""
        return None if self.stage.init in (None, BASE) else self.run / str(self.stage.init) / "adapter"

    @property
    def reward(self) -> Path:
        """The reward stage's artifact; for PPO."""
        return self.run / str(self.stage.reward) / "adapter"

    def trainer_config(self, config: type[Config], **decided: Any) -> Config:
        """Build TRL's config from the recipe's `trainer:` and what the pipeline decides.

        Raises:
            InputError: with TRL's or Transformers' own complaint.
        """
        dtype = resolve_dtype(self.recipe.model.dtype)
        settings = {
            "output_dir": str(self.work),
            "seed": self.recipe.seed,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **decided,
            **self.stage.trainer,
        }
        for what in ("logging", "eval", "save"):
            if f"{what}_steps" in self.stage.trainer and self.stage.trainer.get(f"{what}_strategy", "steps") != "steps":
                raise InputError(
                    f"`{what}_steps` has no effect unless `{what}_strategy` is `steps`",
                    place=f"stages.{self.name}.trainer.{what}_steps",
                    hint="remove one of the two",
                )
            if f"{what}_steps" in self.stage.trainer:
                settings[f"{what}_strategy"] = "steps"
        try:
            return config(**settings)
        except (AssertionError, ImportError, KeyError, TypeError, ValueError) as error:
            raise InputError(str(error).strip().splitlines()[0], place=f"stages.{self.name}.trainer") from None

    def require_eval_data(self, args: TrainingArguments, held_out: Dataset | None) -> None:
        """See that evaluation during training has something to evaluate on.

        Raises:
            InputError: `eval_strategy` is set and no rows are held out.
        """
        if args.eval_strategy != "no" and held_out is None:
            raise InputError(
                "there are no held-out rows to evaluate on",
                place=f"stages.{self.name}.trainer.eval_strategy",
                hint=f"set `eval_fraction` in stages.{self.name}.data",
            )

    def require(self, kept: int, total: int, limit: int | None) -> None:
        """See that a length limit leaves something to train on.

        Raises:
            InputError: it leaves nothing.
        """
        if kept == 0:
            raise InputError(
                f"none of the {total} rows fits in max_length {limit}",
                place=f"stages.{self.name}.trainer.max_length",
                hint="raise it, or shorten the data with `max_prompt_length` and `max_completion_length`",
            )
