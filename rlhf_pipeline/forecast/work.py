"""A recipe's forecast. Here torch lives."""

import contextlib
import copy
import gc
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PretrainedConfig
from transformers.utils import logging

from rlhf_pipeline.forecast import advice, lengths, stage
from rlhf_pipeline.forecast.cards import CONTEXT, Card
from rlhf_pipeline.forecast.divided import MOMENT, most_gathered
from rlhf_pipeline.forecast.lengths import EVALUATE, Known
from rlhf_pipeline.forecast.result import (
    PARTS,
    PHASES,
    Change,
    Forecast,
    Part,
    Phase,
    StageForecast,
    not_counted,
)
from rlhf_pipeline.models import layer_count
from rlhf_pipeline.models.base import load_config
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.deepspeed import offloads, zero_stage
from rlhf_pipeline.recipe.launch_keys import SHARDING
from rlhf_pipeline.recipe.schema import Model, Recipe


def forecast(
    recipe: Recipe, card: Card, *, advise: bool = True, rows: Known | None = None, on_gpu: bool = True
) -> Forecast:
    """How much memory each stage takes that holds a model.

    Args:
        recipe: from `recipe.load`.
        card: the GPU; without `usable`, nothing is said of what fits.
        advise: also find the largest batch that fits, and what to change where it does not fit.
        rows: how long the rows of stages are, where that is known; see `rows.longest`.
        on_gpu: count what CUDA itself takes; and `dtype: auto` is bfloat16.

    Raises:
        InputError: the configuration of the model cannot be had.
    """
    recipe, work = _begin(recipe, rows or {}, on_gpu, card.usable)
    stages = []
    for name, one in recipe.stages.items():
        if one.facts.trains or one.sampling is not None or (one.judge is not None and one.judge.is_local):
            found = work.stage(recipe, name)
            if advise:
                found = advice.advised(recipe, found, card.usable, work.stage)
            stages.append(found)
    unread = [one.name for one in stages if one.name not in work.rows]
    whose = "all stages" if len(unread) == len(stages) else ", ".join(f"`{name}`" for name in unread)
    notes = [f"of {whose}, lengths are those of the recipe's limits, not of rows"] if unread else []
    return Forecast(card.name, card.usable, tuple(stages), tuple(notes), advised=advise)


def first_change(recipe: Recipe, name: str, rows: Known) -> tuple[StageForecast, Change | None]:
    """A stage's forecast, and the cheapest change that makes it take less, whether it fits or not.

    Args:
        recipe: from `recipe.load`.
        name: the stage.
        rows: see `forecast`.

    Raises:
        InputError: the configuration of the model cannot be had.
    """
    recipe, work = _begin(recipe, rows, on_gpu=True)
    found = work.stage(recipe, name)
    saving = advice.first_saving(recipe, found, work.stage)
    return found, saving[0] if saving else None


def _begin(recipe: Recipe, rows: Known, on_gpu: bool, usable: int | None = None) -> tuple[Recipe, "_Work"]:
    recipe = copy.deepcopy(recipe)
    if recipe.model.dtype == "auto":
        recipe.model.dtype = "bfloat16" if on_gpu else "float32"
    gc.freeze()  # trainers look for garbage, which takes longer than all else here
    return recipe, _Work(load_config(recipe.model), rows, CONTEXT if on_gpu else 0, usable)


class _Work:
    """The forecasts of a recipe's stages, and of what they would be with other settings.

    Args:
        config: of the model.
        rows: see `forecast`.
        overhead: bytes that CUDA itself takes.
        usable: bytes of the card; None where there is none.
    """

    def __init__(self, config: PretrainedConfig, rows: Known, overhead: int, usable: int | None = None) -> None:
        self.config, self.rows, self.overhead, self.usable = config, rows, overhead, usable
        self.done: dict[tuple[str, str], StageForecast] = {}
        self.tokenizer = load_tokenizer(Model(path=str(TINY / "checkpoint")))

    def stage(self, recipe: Recipe, name: str) -> StageForecast:
        """One stage as the recipe has it."""
        key = name, recipe.model_dump_json()
        if key not in self.done:
            self.done[key] = self._stage(recipe, name)
        return self.done[key]

    def _stage(self, recipe: Recipe, name: str) -> StageForecast:
        one = recipe.stages[name]
        found = lengths.of_stage(one, *self.rows.get(name, lengths.of_made_rows(recipe, one)))
        notes = [f"{found.assumed} are taken for granted: nothing limits them"] if found.assumed else []
        notes += [
            f"`rewards.{place}.model` is loaded beside the base, and is not counted"
            for place, reward in enumerate(one.rewards)
            if reward.model is not None
        ]
        launch, processes = recipe.launch_of(name), recipe.processes(name)
        divided_by = next(filter(launch.get, SHARDING), None) if processes > 1 else None
        uncounted = _uncounted(launch) if divided_by else []
        if processes > 1:
            how = f", and {_divider(launch)} divides it among them" if divided_by else ""
            notes.append(f"it is trained by {processes} processes{how}: each takes this")
        if uncounted:
            notes.append(not_counted(uncounted))
        split = self._all_layers(lambda layers: self._peaks(recipe, name, found, layers))
        if zero_stage(launch.get("deepspeed_config") or {}) == 3:
            text, dtype = self.config.get_text_config(), getattr(torch, recipe.model.dtype)
            most = most_gathered(launch["deepspeed_config"], text.hidden_size, text.vocab_size, dtype)
            for parts in split.values():
                parts["gathered"] = min(parts.get("gathered", 0), most)
        phases = tuple(Phase(phase, self._with_overhead(split[phase])) for phase in PHASES if phase in split)
        sampled = one.sampling.batch_size if one.sampling else one.judge.batch_size if one.judge else None
        batch = advice.batch_size(one) if one.facts.trains else sampled
        share = one.rollout.gpu_memory_utilization if one.rollout is not None and one.rollout.is_vllm else 0.0
        if share and self.usable is None:
            notes.append(
                f"vLLM takes {share:.0%} of the card while it samples, which is not counted: name one with `--gpu`"
            )
        texts = found.prompt, found.whole
        made = StageForecast(name, one.kind, phases, *texts, batch, notes=tuple(notes), engine_share=share,
                             divided_by=divided_by, processes=processes, uncounted=tuple(uncounted))  # fmt: skip
        return made.on(self.usable)

    def _with_overhead(self, split: dict[str, int]) -> dict[Part, int]:
        return {part: value for part in PARTS if (value := split.get(part, 0) or (part == "overhead") * self.overhead)}

    def _peaks(self, recipe: Recipe, name: str, found: lengths.Lengths, layers: int) -> dict[str, dict[str, int]]:
        with _quietly(), _without_gpu(), stage.tiles_in_place() if self.overhead else contextlib.nullcontext():
            asked, _ = self.rows.get(EVALUATE, (None, None))
            return stage.peaks(recipe, name, self.config, self.tokenizer, found, layers, asked)

    def _all_layers(self, peaks: Callable[[int], dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
        """The peaks of the whole model, from those of it with few layers and with some more.

        Whatever one layer, or one turn of the pattern of layers, holds at the peak, the next one holds, too: so all
        parts grow by the same for each.
        """
        text = self.config.get_text_config()
        layers, few = text.num_hidden_layers, layer_count.of_every_kind(text)
        more = few + layer_count.period(text)
        if layers <= more:
            return _by_phase(peaks(layers))
        least, some = peaks(few), peaks(more)
        share = (layers - more) / (more - few)
        moments = {
            phase: {
                part: max(0, round(split.get(part, 0) + share * (split.get(part, 0) - least[phase].get(part, 0))))
                for part in {*split, *least[phase]}
            }
            for phase, split in some.items()
        }
        return _by_phase(moments)


def _by_phase(moments: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Of each phase the moment at which most is held."""
    found: dict[str, dict[str, int]] = {}
    for name, split in sorted(moments.items(), key=lambda one: sum(one[1].values())):
        found[name.partition(MOMENT)[0]] = split
    return found


def _divider(launch: dict[str, Any]) -> str:
    """What divides a model among processes, in words."""
    stage = zero_stage(launch.get("deepspeed_config") or {})
    return "FSDP2" if stage is None else f"DeepSpeed's ZeRO-{stage}"


def _uncounted(launch: dict[str, Any]) -> list[str]:
    """Keys by which processes hold less than is forecast."""
    fsdp = launch.get("fsdp_config") or {}
    return [*filter(fsdp.get, ("fsdp_offload_params",)), *offloads(launch.get("deepspeed_config") or {})]


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """As on a machine without a GPU, whatever this process has used: tensors without numbers can be on none."""
    states = PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state
    before = [dict(state) for state in states]
    usual, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    for state in states:
        state.clear()
    try:
        yield
    finally:
        torch.cuda.is_available = usual
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the libraries print of a training that is none."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(before)
