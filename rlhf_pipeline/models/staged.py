"""The models that a run made, side by side: one base, and the adapter of every stage, switched and never reloaded."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import PolicyView, ScoreView, of_member
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.schema import BASE, Model
from rlhf_pipeline.rundir.layout import ADAPTER, members


class StagedBase:
    """A frozen base under the adapters of several stages, in evaluation mode.

    Args:
        spec: the base.
        artifacts: each stage's adapter folder, by the stage's name, with those of all members of an ensemble in it;
            none leaves the bare base.

    Attributes:
        tokenizer: from `load_tokenizer`.
        causal_lm: the base with all adapters; under which it computes, `acting_as` says.

    Raises:
        InputError: the model cannot be loaded; see `base.load_base`.
        ValueError: an adapter is not one over this base.
    """

    def __init__(self, spec: Model, artifacts: dict[str, Path]) -> None:
        self.tokenizer = load_tokenizer(spec)
        self.causal_lm = base.load_base(spec, self.tokenizer)
        self.causal_lm.get_input_embeddings().register_forward_pre_hook(self._require_rows)
        self.names: dict[str, str] = {}  # PEFT's of each adapter, which takes no name with a dot
        self._members = {name: members(folder) for name, folder in artifacts.items()}
        self._in_bfloat16 = base.resolve_dtype(spec.dtype) == torch.bfloat16
        self._active: list[str] = []
        self.peft: torch.nn.Module = self.causal_lm
        for role, folder in self._adapters():
            config = adapters.config_of(folder)  # a score head is loaded separately
            self.names[role] = f"adapter{len(self.names)}"
            if isinstance(self.peft, PeftModel):
                self.peft.add_adapter(self.names[role], config)
            else:
                self.peft = get_peft_model(self.causal_lm, config, adapter_name=self.names[role])
            adapters.load_weights(self.peft, folder, self.names[role])
        self.causal_lm.requires_grad_(False).eval()
        self._layers = [module for module in self.causal_lm.modules() if isinstance(module, BaseTunerLayer)]
        self._switch([])

    def _adapters(self) -> Iterator[tuple[str, Path]]:
        """The folder of each adapter, by the stage's name; of an ensemble's further members with their number."""
        for name, folders in self._members.items():
            for number, folder in enumerate(folders, 1):
                yield of_member(name, number), folder

    def _require_rows(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """See that the embedding has a row for each token of a text that no recipe's check has seen.

        Raises:
            InputError: it lacks one.
        """
        tokens = inputs[0]
        if tokens.is_cuda and tokens.shape[-1] == 1:
            return  # sampled by the model itself, and to look at each one would be to wait for the GPU
        largest = int(tokens.max()) if tokens.numel() else None
        error = base.beyond_embedding(largest, self.tokenizer, self.causal_lm.config, "the text")
        if error:
            raise error

    def _switch(self, names: list[str]) -> None:
        for layer in self._layers:
            layer._active_adapter = names
        self._active = names

    @contextlib.contextmanager
    def acting_as(self, stage: str) -> Iterator[None]:
        """Have the base compute as a stage's model, or as itself for `base`, inside the block: as in training.

        There, adapters over a bfloat16 base compute in bfloat16, too.
        """
        before = self._active
        self._switch([] if stage == BASE else [self.names[stage]])
        try:
            with torch.autocast(self.causal_lm.device.type, torch.bfloat16, enabled=self._in_bfloat16):
                yield
        finally:
            self._switch(before)

    @cached_property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits of last hidden states; see `base.find_head`."""
        with self.acting_as(BASE):
            return base.find_head(self.causal_lm)

    def policy(self, stage: str) -> PolicyView:
        """A stage's model, or the `base`, as a causal LM for `rollout.sample` and `forward.reply_log_probs`."""
        return PolicyView(self, stage)

    def reward(self, stage: str) -> list[ScoreView]:
        """A reward stage's model, for `forward.reply_scores`: the views of its members, of which most have one."""
        device = self.causal_lm.device
        return [
            ScoreView(self, of_member(stage, number), adapters.load_head(folder).to(device))
            for number, folder in enumerate(self._members[stage], 1)
        ]


def artifacts(run: Path, stages: Sequence[str]) -> dict[str, Path]:
    """The adapter folders of stages of a run, and of adapters from outside, by name; without those not there."""
    folders = {name: outside.folder(name) if outside.is_one(name) else run / name / ADAPTER for name in stages}
    return {name: folder for name, folder in folders.items() if (folder / adapters.WEIGHTS).is_file()}
