"""Many roles on one base: policy, reference, rewards and value are views that switch adapters for one call.

Where TRL's PPOTrainer expects four models, it gets four modules. There is one: a frozen base with an adapter for each,
and score heads. A view makes its adapter active for the length of a call and puts the former one back.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rlhf_pipeline import kinds
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.score_head import new_head, zero_head
from rlhf_pipeline.recipe.schema import BASE
from rlhf_pipeline.rundir.layout import members

TRAINED = ("policy", "value")
REFERENCE = "reference"

# An adapter on disk: its folder, and its shape as a recipe's `lora` says it.
Stored = tuple[Path, dict[str, Any]]


class Roles:
    """A base with an adapter for each role, and the switching between them.

    Args:
        peft: the base with adapters.
        names: the adapter's name of each role.

    Attributes:
        causal_lm: the base.
        rewards: the reward models, in the order in which they were added: each the views of its members.
    """

    def __init__(self, peft: PeftModel, names: dict[str, str]) -> None:
        self.peft, self.names = peft, dict(names)
        self.causal_lm: PreTrainedModel = peft.get_base_model()
        self.rewards: list[list[ScoreView]] = []
        self._active = next(iter(names))
        self._find_layers()

    def _find_layers(self) -> None:
        self.layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]

    def add_reward(self, artifact: Path, lora: dict[str, Any]) -> list["ScoreView"]:
        """Load a reward model, of an ensemble all members, as frozen adapters beside the others.

        Args:
            artifact: the reward stage's.
            lora: its shape.

        Returns:
            The views of its members, whose roles are `reward` or, of further reward models, `reward.2`, with the
            member's number from the second on: `reward/2`.
        """
        role = kinds.numbered("reward", len(self.rewards) + 1)
        views = []
        for number, folder in enumerate(members(artifact), 1):
            own = of_member(role, number)
            self._add(own, folder, lora)
            head = adapters.load_head(folder).to(self.causal_lm.device)
            views.append((own, head))
        self._find_layers()
        self.rewards.append([ScoreView(self, own, head) for own, head in views])
        return self.rewards[-1]

    def add_frozen(self, role: str, artifact: Path, lora: dict[str, Any]) -> None:
        """Load an adapter for a role of its own beside the others, of which those that train go on training."""
        trained = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        self._add(role, artifact, lora)
        self._find_layers()
        self.peft.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_()

    def _add(self, role: str, artifact: Path, lora: dict[str, Any]) -> None:
        self.names[role] = adapters.free_name(self.causal_lm, re.sub(r"\W", "_", role))
        config = adapters.lora_config({**lora, "lora_dropout": 0.0}, self.causal_lm)
        self.peft.add_adapter(self.names[role], config)
        adapters.load_weights(self.peft, artifact, self.names[role])
        self._store_as_computed(self.names[role])

    def _store_as_computed(self, adapter: str) -> None:
        """Keep a frozen adapter in bfloat16 where the base computes in that: autocast rounds it so at every use."""
        if self.causal_lm.dtype == torch.bfloat16:
            for parameter in adapters.adapter_parameters(self.peft, adapter).values():
                parameter.data = parameter.data.to(torch.bfloat16)

    @contextlib.contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Make a role's adapter, or none for `base`, the active one inside the block, and then those of before."""
        before, active = self._active, [layer._active_adapter for layer in self.layers]
        self._switch(role)
        try:
            yield
        finally:
            for layer, names in zip(self.layers, active, strict=True):
                layer._active_adapter = names
            self._active = before

    def _switch(self, role: str) -> None:
        for layer in self.layers:
            layer._active_adapter = [] if role == BASE else [self.names[role]]
        self._active = role

    @cached_property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits of last hidden states; see `base.find_head`."""
        with self.acting_as(REFERENCE if REFERENCE in self.names else self._active):
            return base.find_head(self.causal_lm)


class SharedBase(Roles):
    """PPO's roles: the policy and its reference, reward models, and the value model, each an adapter of its own.

    With `one_trunk` the value model has none: it is a head that reads the policy's last hidden states.

    Args:
        model: the frozen causal LM.
        lora: the shape of policy and reference.
        init: the adapter that policy and reference start from; None for the bare base.
        rewards: the reward models: of each the stage's artifact and its shape.
        one_trunk: whether the value is a head on the policy's trunk.

    Attributes:
        peft: the PEFT model, for saving adapters.
        names: the adapter's name of each role: the role's, unless the model has a module of that name.
        policy, reference, value: the views of these roles. The value model starts from the first reward model; where
            there is none, from what the policy starts from, with a new head. On the policy's trunk it starts at 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: dict[str, Any],
        init: Path | None,
        rewards: Sequence[Stored],
        one_trunk: bool = False,
    ) -> None:
        self.one_trunk = one_trunk
        policy_config = adapters.lora_config(lora, model)
        own = ("policy", REFERENCE) if one_trunk else (*TRAINED, REFERENCE)
        names = {role: adapters.free_name(model, role) for role in own}
        peft = get_peft_model(model, policy_config, adapter_name=names["policy"])
        peft.add_adapter(names[REFERENCE], policy_config)
        if not one_trunk:
            value_config = adapters.lora_config(rewards[0][1], model) if rewards else policy_config
            peft.add_adapter(names["value"], value_config)
        if init is not None:
            adapters.load_weights(peft, init, names["policy"])
        # A copy by parameter, not a second start: rows that a larger rank adds are drawn, and differ between two draws.
        adapters.copy_adapter(peft, names["policy"], names[REFERENCE])
        if rewards and not one_trunk:
            adapters.load_weights(peft, rewards[0][0], names["value"])
        elif not one_trunk:
            adapters.copy_adapter(peft, names["policy"], names["value"])
        super().__init__(peft, names)
        self._store_as_computed(names[REFERENCE])
        for artifact, shape in rewards:
            self.add_reward(artifact, shape)
        base.remove_dropout(self.peft)
        # Once, and never again: PEFT's own way of switching also toggles requires_grad, and the critic stops learning.
        for role, adapter in self.names.items():
            for parameter in adapters.adapter_parameters(self.peft, adapter).values():
                parameter.requires_grad_(role in TRAINED)
        self._switch("policy")
        self.policy = PolicyView(self, "policy")
        self.reference = PolicyView(self, REFERENCE)
        if one_trunk:
            self.value = ScoreView(self, "policy", zero_head(model).to(model.device), adapter_is_own=False)
        else:
            head = adapters.load_head(rewards[0][0]) if rewards else new_head(model)
            self.value = ScoreView(self, "value", head.to(model.device))
        self.value.score.requires_grad_()

    def refer_to(self, artifact: Path | None) -> None:
        """Have the reference compute as another adapter than the one that the policy starts from; as the base for None.

        Raises:
            ValueError: the adapter has no room in one of the policy's shape.
        """
        adapters.replace_weights(self.peft, self.names[REFERENCE], artifact)

    @property
    def reward(self) -> "ScoreView":
        """The first reward model, of an ensemble its first member."""
        return self.rewards[0][0]

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

    def checksums(self, *names: str) -> dict[str, int]:
        """Checksums of `base` and of roles' adapters and heads, to show what training did and did not touch.

        Args:
            names: of which; by default of all.
        """
        owned = {role: list(adapters.adapter_parameters(self.peft, name).values()) for role, name in self.names.items()}
        ours = {id(parameter) for parameters in owned.values() for parameter in parameters}
        owned["value"] = list(self.value.parameters())
        for view in (view for members_ in self.rewards for view in members_):
            owned[view.role] += list(view.score.parameters())
        owned["base"] = [parameter for parameter in self.causal_lm.parameters() if id(parameter) not in ours]
        return {name: base.checksum(owned[name]) for name in names or owned}

    @property
    def frozen(self) -> list[str]:
        """The roles that training leaves as they are."""
        return [role for role in self.names if role not in TRAINED]


def of_member(role: str, number: int) -> str:
    """The role of a member of an ensemble: that of the first is the ensemble's own."""
    return role if number == 1 else f"{role}/{number}"


class Shared(Protocol):
    """What a view needs of the base that it looks at: `Roles`, or `staged.StagedBase`."""

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

    def __init__(self, shared: Shared, role: str, adapter_is_own: bool = True) -> None:
        super().__init__()
        self.shared = shared  # no module itself, so nothing of it is registered here
        self.role = role
        adapter = shared.names.get(role, role)
        if adapter_is_own:
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

    @contextlib.contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The base, under this role's adapter and in evaluation mode inside the block, so that it keeps a cache."""
        model = self.shared.causal_lm
        was_training = model.training
        model.eval()  # a layer that checkpoints its activations drops the cache
        try:
            with self.shared.acting_as(self.role):
                yield model
        finally:
            model.train(was_training)

    def generate(self, **inputs: Any) -> Any:
        """Sample under this role's adapter; see `transformers.GenerationMixin.generate`."""
        with self.generating() as model:
            return model.generate(**inputs)

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
    """The base's backbone under one adapter, and a head that reads one number per token: `reward` or `value`.

    Args:
        shared: the base.
        role: whose adapter it reads with.
        score: the head.
        adapter_is_own: whether that adapter's weights are this view's own; else they are another view's alone.
    """

    base_model_prefix = "backbone"

    def __init__(self, shared: Shared, role: str, score: nn.Linear, adapter_is_own: bool = True) -> None:
        super().__init__(shared, role, adapter_is_own)
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
