"""Adapters: made fresh or from an earlier stage's artifact, and saved as PEFT itself would load them."""

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf_pipeline import ranks
from rlhf_pipeline.models import divided
from rlhf_pipeline.models.layers import untouched
from rlhf_pipeline.models.score_head import HEAD, draw
from rlhf_pipeline.rundir.layout import WEIGHTS as WEIGHTS

_PREFIX = "base_model.model."  # of PEFT's names for a base's modules
# The parts of an artifact's names behind `.lora_`: the axis of the rank, and what is multiplied by the scaling alone.
_RANK_AXIS = {"A.weight": 0, "B.weight": 1, "embedding_A": 0, "embedding_B": 1}
_SECOND_FACTOR = ("B.weight", "B.bias", "embedding_B")


class DivergedError(ArithmeticError):
    """Training left the finite numbers."""


def lora_config(lora: dict[str, Any], model: PreTrainedModel | None = None) -> LoraConfig:
    """The shape of a stage's adapter as PEFT takes it.

    Args:
        lora: the recipe's keys.
        model: what it shall be for; of this, `all-linear` means the linear layers but the output embedding, routers and
            whatever else `layers.untouched` names.
    """
    config = LoraConfig(**lora, task_type=TaskType.CAUSAL_LM)
    if model is not None and str(config.target_modules).lower() == "all-linear":
        config.target_modules = _all_linear(model, config)
    return config


def config_of(folder: Path) -> LoraConfig:
    """The shape of an artifact's LoRA weights, for a causal LM: of a reward model's, without its score head."""
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save = TaskType.CAUSAL_LM, None
    return config


def _all_linear(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The names of the linear layers that `all-linear` means.

    Of a mixture, PEFT would give the experts' parameters and the router an adapter as well, and take layers that are
    called as experts once were for experts; these are left out, so that what is saved is read alike everywhere.
    """
    apart, head = {HEAD, *untouched(model)}, model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):  # of another adapter
            apart |= {f"{name}.{inner}" for inner, _ in module.named_modules() if inner}
    config = copy.deepcopy(config)
    config.target_modules = {
        name
        for name, module in model.named_modules()
        if name not in apart and module is not head and isinstance(_adapted(module), (torch.nn.Linear, Conv1D))
    }
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return {*config.target_modules}


def _adapted(module: torch.nn.Module) -> torch.nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def with_policy_adapter(base: PreTrainedModel, lora: dict[str, Any], init: Path | None) -> PeftModel:
    """The base with one trainable adapter named `default`, which computes what `init` does, or changes nothing yet.

    TRL's DPOTrainer makes the frozen reference from the adapter of that name.
    """
    model = get_peft_model(base, lora_config(lora, base))
    if init is not None:
        load_weights(model, init, "default")
    return model


def with_reward_adapter(base: PreTrainedModel, lora: dict[str, Any], init: Path | None) -> PeftModel:
    """A model of `score_head` with a trainable adapter `default`, started from `init`, and a trainable, new head."""
    draw(base.get_submodule(HEAD))
    config = lora_config(lora, base)
    # PEFT's class for classifiers would train every module called `classifier`, too, as LongCat-Flash's routers are.
    config.task_type, config.modules_to_save = None, [HEAD]
    model = get_peft_model(base, config)
    model.peft_config["default"].task_type = TaskType.SEQ_CLS  # what a saved adapter says it is
    if init is not None:
        load_weights(model, init, "default")
    return model


def load_weights(model: PeftModel, folder: Path, adapter: str) -> None:
    """Copy an artifact's LoRA weights (not its score head) into a fresh adapter, which then computes the same.

    The adapter may be larger. What the artifact does not fill, modules or ranks, stays as it was drawn and changes
    nothing yet: one factor of each product is zero. Where PEFT scales the two differently, the second factor makes up
    for it. An adapter of the same size gets the artifact's weights bit for bit.

    Raises:
        ValueError: the adapter has less room than the artifact needs.
    """
    theirs = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "lora_" in name}
    shapes, ours = {name: tensor.shape for name, tensor in theirs.items()}, adapter_shapes(model, adapter)
    problem = misfit(shapes, ours)
    if problem:
        raise ValueError(f"{folder} does not fit: {problem}")
    config = LoraConfig.from_pretrained(str(folder))
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    for their_name, name in our_names(shapes, ours).items():
        tensor, (module, part) = theirs[their_name], _split(name)
        if part in _SECOND_FACTOR:
            layer: Any = model.get_submodule(module)
            tensor = tensor * (_scaling(config, _split(their_name)[0]) / layer.scaling[adapter])
        larger = state[name].detach().clone()
        larger[tuple(slice(size) for size in tensor.shape)] = tensor.to(larger)
        state[name] = larger
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def adapter_shapes(model: PeftModel, adapter: str) -> dict[str, torch.Size]:
    """The shapes of one adapter's LoRA weights, by their names in an artifact."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.shape for name, tensor in state.items() if "lora_" in name}


def stored_shapes(folder: Path, head: bool = False) -> dict[str, torch.Size]:
    """The shapes of the LoRA weights in an artifact, by their names there; with `head`, of all else as well."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        names = [name for name in weights.keys() if head or "lora_" in name]  # noqa: SIM118  (it is no mapping)
        return {name: torch.Size(weights.get_slice(name).get_shape()) for name in names}


def misfit(theirs: dict[str, torch.Size], ours: dict[str, torch.Size]) -> str | None:
    """Why an adapter of the shapes `ours` cannot begin as one of the shapes `theirs`; None where it can."""
    names = our_names(theirs, ours)
    return _misfit({names[name]: shape for name, shape in theirs.items()}, ours)


def our_names(theirs: dict[str, torch.Size], ours: dict[str, torch.Size]) -> dict[str, str]:
    """What each of an artifact's weights is called in a model; other than there, where the backbone has another place.

    The layers of one composite model are at `model.layers` in its causal LM and at `model.language_model.layers` in
    its sequence classifier. So the beginning of all names may be another one, where only one makes them fit.
    """
    names = {name: name for name in theirs}
    if _misfit(theirs, ours) is None:
        return names
    found: list[dict[str, str]] = []
    for begin, other in _beginnings(min(theirs), ours):
        moved = {name: other + name.removeprefix(begin) for name in names}
        fits = all(name.startswith(begin) for name in names)
        fits = fits and _misfit({moved[name]: shape for name, shape in theirs.items()}, ours) is None
        if fits and moved not in found:
            found.append(moved)
    return found[0] if len(found) == 1 else names


def _beginnings(name: str, ours: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Beginnings of a name, each with another that makes it one of `ours`; none of them as far as a layer's number."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        if parts[count - 1].isdigit():
            return
        begin, rest = (".".join(some) for some in (parts[:count], parts[count:]))
        for our in ours:
            other = our.removesuffix(f".{rest}")
            if other != our and not any(part.isdigit() for part in other.split(".")):
                yield begin, other


def _misfit(theirs: dict[str, torch.Size], ours: dict[str, torch.Size]) -> str | None:
    for name, needed in sorted(theirs.items()):
        module, part = _split(name)
        module = module.removeprefix(_PREFIX)
        if name not in ours:
            return f"there is no place for the weights of `{module}`"
        axis, room = _RANK_AXIS.get(part), list(ours[name])
        if axis is not None and len(room) > axis:
            if room[axis] < needed[axis]:
                return f"rank {room[axis]} at `{module}` is less than {needed[axis]}"
            room[axis] = needed[axis]
        if room != list(needed):
            return f"the weights of `{module}` have another size: {list(ours[name])}, not {list(needed)}"
    return None


def _split(name: str) -> tuple[str, str]:
    """The module that a weight of an artifact belongs to, and which of the adapter's weights it is there."""
    module, _, part = name.rpartition(".lora_")
    return module, part


def _scaling(config: LoraConfig, module: str) -> float:
    """What PEFT multiplies an adapter's change by at a module."""

    def at_module(pattern: dict[str, int] | None, default: int) -> int:
        pattern = pattern or {}
        return pattern.get(get_pattern_key(list(pattern), module.removeprefix(_PREFIX)), default)

    r, alpha = at_module(config.rank_pattern, config.r), at_module(config.alpha_pattern, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def load_head(folder: Path) -> torch.nn.Linear:
    """A reward artifact's score head in float32, from `hidden` to 1, without bias where it has none; not trainable."""
    weights = load_file(folder / WEIGHTS)
    # PEFT stores an embedding that has an adapter beside it, as `base_layer`.
    names = [name for name in weights if "lora_" not in name and ".base_layer." not in name]
    head = {name.rsplit(".", 1)[1]: weights[name].float() for name in names}
    linear = torch.nn.Linear(head["weight"].shape[1], 1, bias="bias" in head)
    linear.load_state_dict(head)
    return linear.requires_grad_(False)


def save_adapter(model: PeftModel, adapter: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write one adapter as an artifact: weights, configuration, tokenizer; what PEFT's own loader reads.

    Of several ranks the first one writes; where they have divided the model among them, each must take part.

    Raises:
        DivergedError: see `write_weights`.
    """
    weights = whole_weights(model, adapter)
    if ranks.is_first():
        folder.mkdir(parents=True)
        write_weights(weights, model, adapter, folder)
        tokenizer.save_pretrained(str(folder))


def whole_weights(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """One adapter's weights by their names in an artifact, on the CPU.

    Where ranks have divided the model among them, each must take part in collecting them.
    """
    return divided.whole(get_peft_model_state_dict(model, model.state_dict(keep_vars=True), adapter))


def save_weights(model: PeftModel, adapter: str, folder: Path) -> None:
    """Write one adapter's weights and configuration into a folder; see `write_weights`."""
    write_weights(whole_weights(model, adapter), model, adapter, folder)


def write_weights(weights: dict[str, torch.Tensor], model: PeftModel, adapter: str, folder: Path) -> None:
    """Write weights from `whole_weights`, and their adapter's configuration, into a folder.

    Raises:
        DivergedError: a weight is not finite.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                f"the weights at `{_split(name)[0].removeprefix(_PREFIX)}` are no longer finite numbers"
            )
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = model.peft_config[adapter]
    was, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was


def restore(model: PeftModel, adapter: str, folder: Path) -> None:
    """Give an adapter, with its score head where it has one, the very weights that `save_weights` wrote.

    Where ranks have divided the model among them, each must take part.
    """
    weights, own = load_file(folder / WEIGHTS), get_peft_model_state_dict(model, adapter_name=adapter)
    for name, tensor in weights.items():
        place = own.get(name)
        if isinstance(place, DTensor):
            weights[name] = distribute_tensor(tensor.to(place.device), place.device_mesh, place.placements)
    set_peft_model_state_dict(model, weights, adapter_name=adapter)


def free_name(model: torch.nn.Module, wanted: str) -> str:
    """A name for an adapter that no module of a model has, as RWKV has `value`: PEFT tells the two apart by nothing."""
    taken = {part for name, _ in model.named_modules() for part in name.split(".")}
    while wanted in taken:
        wanted += "_"
    return wanted


def adapter_parameters(model: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The LoRA parameters that belong to one adapter, by name."""
    belongs = re.compile(rf"\.lora_\w+\.{re.escape(adapter)}(\.|$)")
    return {name: parameter for name, parameter in model.named_parameters() if belongs.search(name)}


def copy_adapter(model: torch.nn.Module, source: str, target: str) -> None:
    """Give one adapter the weights of another of the same shape."""
    theirs = adapter_parameters(model, source)
    for name, parameter in adapter_parameters(model, target).items():
        parameter.data.copy_(theirs[re.sub(rf"\.{re.escape(target)}(?=\.|$)", f".{source}", name)].data)


def replace_weights(model: PeftModel, adapter: str, folder: Path | None) -> None:
    """Give an adapter what a fresh one of its shape would have of an artifact, in place of its own weights.

    Args:
        model: with the adapter, whose parameters stay the same tensors.
        adapter: its name.
        folder: the artifact; None for an adapter that changes nothing.

    Raises:
        ValueError: see `load_weights`.
    """
    fresh = free_name(model, "fresh")
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():  # what is drawn for it changes nothing
        model.add_adapter(fresh, copy.deepcopy(model.peft_config[adapter]))
    if folder is not None:
        load_weights(model, folder, fresh)
    copy_adapter(model, fresh, adapter)
    model.delete_adapter(fresh)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])  # PEFT 0.20 freezes other adapters when it adds or deletes one


@contextlib.contextmanager
def exact_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Keep trainable weights in float32 while a TRL trainer is built.

    TRL's trainers cast the adapters of a quantized base to bfloat16. That rounds the weights a stage starts from, so
    that a policy would no longer equal its reference at step 0, and at the learning rates of DPO and PPO most updates
    would round to nothing. Leaving this block restores what was there before.
    """
    before = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
