"""Four roles on one base: policy, reference, reward and value are views that switch adapters for one call.

Where TRL's PPOTrainer expects four models, it gets four modules. There is one: a frozen base with four adapters, and
two score heads. A view makes its adapter active for the length of a call and puts the former one back.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rlhf_pipeline.models import adapters, base

TRAINED = ("policy", "value")
FROZEN = ("reference", "reward")


class SharedBase:
    """One PEFT model with an adapter for each role.

    Args:
        model: the frozen causal LM.
        lora: the shape of policy and reference.
        init: the adapter that policy and reference start from; None for the bare base.
        reward: the reward stage's artifact; adapter and head of `reward`, and what `value` starts from.
        reward_lora: the shape of that artifact, for reward and value.

    Attributes:
        peft: the PEFT model, for saving adapters.
        names: the adapter's name of each role: the role's, unless the model has a module of that name.
        policy, reference, reward, value: the views that TRL's PPOTrainer takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: dict[str, Any],
        init: Path | None,
        reward: Path,
        reward_lora: dict[str, Any],
    ) -> None:
        self.causal_lm = model
        policy_config = adapters.lora_config(lora, model)
        reward_config = adapters.lora_config(reward_lora, model)
        self.names = {role: adapters.free_name(model, role) for role in (*TRAINED, *FROZEN)}
        self.peft: PeftModel = get_peft_model(model, policy_config, adapter_name=self.names["policy"])
        self.peft.add_adapter(self.names["reference"], policy_config)
        self.peft.add_adapter(self.names["reward"], reward_config)
        self.peft.add_adapter(self.names["value"], reward_config)
        if init is not None:
            adapters.load_weights(self.peft, init, self.names["policy"])
        # A copy by parameter, not a second start: rows that a larger rank adds are drawn, and differ between two draws.
        adapters.copy_adapter(self.peft, self.names["policy"], self.names["reference"])
        adapters.load_weights(self.peft, reward, self.names["reward"])
        adapters.load_weights(self.peft, reward, self.names["value"])
        base.remove_dropout(self.peft)
        self.layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        # Once, and never again: PEFT's own way of switching also toggles requires_grad, and the critic stops learning.
        for role, adapter in self.names.items():
            for parameter in adapters.adapter_parameters(self.peft, adapter).values():
                parameter.requires_grad_(role in TRAINED)
        self._active = "policy"
        self._switch("policy")
        device = model.device
        self.policy = PolicyView(self, "policy")
        self.reference = PolicyView(self, "reference")
        self.reward = ScoreView(self, "reward", adapters.load_head(reward).to(device))
        self.value = ScoreView(self, "value", adapters.load_head(reward).to(device).requires_grad_())

    def _switch(self, role: str) -> None:
        for layer in self.layers:
            layer._active_adapter = [self.names[role]]
        self._active = role

    @contextlib.contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Make a role's adapter the active one inside the block."""
        before = self._active
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, each under the adapter that computed it first.

        Backward may run while another role is active; recomputing with its adapter would give wrong gradients
        without a word. Non-reentrant checkpointing lets the forward pass leave a context for the recomputation.
        """
        self.causal_lm.gradient_checkpointing_enable(
            {
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), self.acting_as(self._active)),
            }
        )
        self.causal_lm.train()  # layers checkpoint in training mode only; there is no dropout left to wake

    @cached_property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits of last hidden states; see `base.find_head`."""
        with self.acting_as("reference"):
            return base.find_head(self.causal_lm)

    def checksums(self, *names: str) -> dict[str, int]:
        """Checksums of `base` and of roles' adapters and heads, to show what training did and did not touch.

        Args:
            names: of which; by default of all.
        """
        owned = {role: list(adapters.adapter_parameters(self.peft, name).values()) for role, name in self.names.items()}
        ours = {id(parameter) for parameters in owned.values() for parameter in parameters}
        owned["reward"] += list(self.reward.score.parameters())
        owned["value"] += list(self.value.score.parameters())
        owned["base"] = [parameter for parameter in self.causal_lm.parameters() if id(parameter) not in ours]
        return {name: base.checksum(owned[name]) for name in names or owned}


class Shared(Protocol):
    """What a view needs of the base that it looks at: `SharedBase`, or `staged.StagedBase`."""

    causal_lm: PreTrainedModel
    names: dict[str, str]  # the adapter of each role

    @property
    def peft(self) -> nn.Module:
        """The module that holds the adapters."""

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits of last hidden states."""

    def acting_as(self, role: str) -> contextlib.AbstractContextManager[None]:
        """Make an adapter the active one."""


class _View(nn.Module):
    """What both views share: the adapter's own parameters, and the base without registering it.

    Registering the base would list and save every parameter of the four adapters once per view.
    """

    def __init__(self, shared: Shared, role: str) -> None:
        super().__init__()
        self.shared = shared  # no module itself, so nothing of it is registered here
        self.role = role
        adapter = shared.names.get(role, role)
        for name, parameter in adapters.adapter_parameters(shared.peft, adapter).items():
            self.register_parameter(name.replace(".", "_"), parameter)

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.shared.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.shared.causal_lm.device

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states under this role's adapter, `[batch, length, hidden]`, in the base's dtype.

        Args:
            input_ids: int64 `[batch, length]`, padded on the right only. A causal model does not look ahead, so that
                padding is seen by nothing but padding; without a mask, faster attention kernels apply.
        """
        with self.shared.acting_as(self.role):
            return self.shared.causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


class PolicyView(_View):
    """The base under one adapter as a causal LM: `policy` or `reference`."""

    def forward(self, **inputs: Any) -> Any:
        """Logits `[batch, length, vocabulary]` in float32 under this role's adapter.

        TRL asks for the hidden states of every layer and reads none of them; they are not kept. It takes
        log-probabilities of these logits, which in bfloat16 would be off by more than one update moves them.
        """
        inputs.pop("output_hidden_states", None)
        with self.shared.acting_as(self.role):
            output = self.shared.causal_lm(**inputs, use_cache=False)
        output.logits = output.logits.float()
        return output

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits `[N, vocabulary]` that follow last hidden states `[N, hidden]`, as the model itself makes them."""
        with self.shared.acting_as(self.role):
            return self.shared.head(hidden)

    @property
    def trains_head(self) -> bool:
        """Whether an adapter sits on the output embedding."""
        return any(parameter.requires_grad for parameter in self.shared.causal_lm.get_output_embeddings().parameters())

    def generate(self, **inputs: Any) -> Any:
        """Sample under this role's adapter; see `transformers.GenerationMixin.generate`."""
        model = self.shared.causal_lm
        was_training = model.training
        model.eval()  # a layer that checkpoints its activations drops the cache
        try:
            with self.shared.acting_as(self.role):
                return model.generate(**inputs)
        finally:
            model.train(was_training)

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's generation settings; TRL writes the stop token into them."""
        return self.shared.causal_lm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.shared.causal_lm.generation_config = value

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Always False for TRL, which would switch checkpointing off and on around generation without our context."""
        return False


class ScoreView(_View):
    """The base's backbone under one adapter, and a head that reads one number per token: `reward` or `value`."""

    base_model_prefix = "backbone"

    def __init__(self, shared: Shared, role: str, score: nn.Linear) -> None:
        super().__init__(shared, role)
        self.score = score

    def backbone(self, **inputs: Any) -> BaseModelOutput:
        """The last hidden states, float32 `[batch, length, hidden]`, as the one entry of `hidden_states`."""
        inputs.pop("output_hidden_states", None)
        inputs["use_cache"] = False
        with self.shared.acting_as(self.role):
            output = self.shared.causal_lm.base_model(**inputs)
        return BaseModelOutput(hidden_states=(output.last_hidden_state.to(self.score.weight.dtype),))

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's number for each hidden state, float32 `[...]` of `[..., hidden]`, whatever dtype that has."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Scores `[batch, length, 1]`, float32."""
        return self.score(self.backbone(**inputs).hidden_states[-1])
