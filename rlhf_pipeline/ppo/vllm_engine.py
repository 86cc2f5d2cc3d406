"""Sampling by vLLM: a second copy of the base, in this process, which is given adapters alone.

Nothing is merged into the base and nothing is quantized again: the policy's LoRA weights are handed over in memory, as
a new adapter each time they have changed, and the former one is dropped.
"""

import contextlib
import gc
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import resolve_dtype
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe.schema import BASE, Model, Rollout

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for: `MaxLoRARanks` of its `config.lora`
CACHE_ON_CPU = 2**32  # bytes, at most, for keys and values
TOKENS_ON_CPU = 2048  # of prompts that are read in one pass
BLOCK_ON_CPU = 128  # tokens: what a reply takes room by there
Weights = dict[str, Tensor]


class VLLMEngine:
    """vLLM over a recipe's base, for one adapter at a time.

    It runs in this process, so that nothing is left when the process ends, however it does. A request's random numbers
    follow from a seed of its own, and nothing is cached from one call to the next: what is sampled follows from
    weights, prompts and seeds alone. Only logits are rounded differently in batches of another shape.

    Args:
        spec: the base; the engine's copy is quantized as it is, and computes in its dtype.
        settings: what the recipe says of the engine.
        place: where.
        rank: the largest of an adapter.
        longest: the most tokens of a prompt and its reply.
        shares_gpu: whether the GPU's memory is needed for something else between two calls. Then the engine sleeps:
            its weights wait in the machine's memory, which is fast to copy from, and its cache is given up. They are
            those of a frozen base, so that nothing needs to be loaded again.

    Raises:
        InputError: vLLM cannot start, with its own words.
    """

    def __init__(
        self, spec: Model, settings: Rollout, place: str, *, rank: int, longest: int, shares_gpu: bool = True
    ) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
            "VLLM_NO_USAGE_STATS": "1",  # what runs here is nobody's business
        }
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_gpu = torch.cuda.is_available()
        self._sleeps = shares_gpu and on_gpu
        self.longest = longest
        self._held: Weights = {}  # the adapter that vLLM has
        self._number = 0  # its id
        options: dict[str, Any] = {"max_num_seqs": settings.max_num_seqs}
        if on_gpu:
            options |= {"gpu_memory_utilization": settings.gpu_memory_utilization, "enable_sleep_mode": self._sleeps}
        else:
            options |= {
                "kv_cache_memory_bytes": _cache_on_cpu(spec, settings, longest),
                # A prompt is read in one pass: of one read in parts, vLLM turns the random numbers back, which those
                # of a CPU cannot be.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(longest, TOKENS_ON_CPU),
            }
        if spec.quantization == "nf4":
            options["quantization"] = "bitsandbytes"
        with _as_it_was(), _uncompiled():
            from vllm import LLM

            try:
                self._llm = LLM(
                    model=spec.path,
                    revision=spec.revision,
                    trust_remote_code=spec.trust_remote_code,
                    dtype=str(resolve_dtype(spec.dtype)).removeprefix("torch."),
                    skip_tokenizer_init=True,  # it gets token ids, and returns some
                    generation_config="vllm",  # not the model's own, with other stop tokens
                    logprobs_mode="processed_logprobs",  # at the temperature of sampling
                    enable_lora=True,
                    max_lora_rank=next(one for one in RANKS if one >= rank),
                    max_model_len=longest,
                    enforce_eager=settings.enforce_eager or not on_gpu,
                    **options,
                )
            except Exception as error:  # it checks settings and memory in many ways
                raise InputError(
                    f"vLLM cannot start: {_last_line(error)}",
                    place=place,
                    hint="`rollout: {engine: transformers}` samples without it",
                ) from error
        self._sleep()

    @torch.no_grad()
    def sample(
        self,
        policy: Any,
        prompts: Sequence[Sequence[int]],
        response_length: int,
        temperature: float,
        stops: Sequence[int],
        pad_token_id: int,
        seeds: Sequence[int] | None,
    ) -> Episodes:
        """See `rollout.sample`, which this does for it; vLLM itself says how many replies are sampled together.

        Without `seeds`, they are drawn from torch's random numbers, which are the same whatever vLLM did before.

        Raises:
            ValueError: a prompt and its reply may outgrow the room that the engine was given.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        if seeds is None:
            seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
        longest = max(map(len, prompts)) + response_length
        if longest > self.longest:
            raise ValueError(f"prompt and reply may have {longest:,} tokens, and vLLM has room for {self.longest:,}")
        asked = [
            SamplingParams(
                temperature=temperature,
                seed=seed % (2**63 - 1),
                max_tokens=response_length,
                stop_token_ids=list(stops),
                ignore_eos=True,  # what ends a reply is said by `stops` alone
                logprobs=0,  # of the sampled tokens
                detokenize=False,
            )
            for seed in seeds
        ]
        self._wake()
        try:
            adapter = self._hold(lora_weights(policy))
            with _as_it_was(), _uncompiled(), torch.autocast(policy.device.type, enabled=False):
                self._llm.reset_prefix_cache()
                outputs = self._llm.generate(
                    [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                    asked,
                    lora_request=LoRARequest(str(adapter), adapter, "in memory") if adapter else None,
                    use_tqdm=False,
                )
        finally:
            self._sleep()
        replies = [list(output.outputs[0].token_ids) for output in outputs]
        log_probs = [
            [found[token].logprob for token, found in zip(reply, output.outputs[0].logprobs, strict=True)]
            for reply, output in zip(replies, outputs, strict=True)
        ]
        return _episodes(prompts, replies, log_probs, stops, pad_token_id, policy.device)

    def close(self) -> None:
        """Give up all memory that the engine has; it cannot sample after that."""
        with _as_it_was():
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        torch.cuda.empty_cache()

    def _hold(self, weights: Weights) -> int:
        """See that vLLM has an adapter of these weights; returns its id, 0 for none."""
        if not weights:
            return 0
        same = weights.keys() == self._held.keys()
        if not (same and all(torch.equal(tensor, self._held[name]) for name, tensor in weights.items())):
            self._llm.collective_rpc(_replace_adapter, args=(self._number, self._number + 1, weights))
            self._held, self._number = weights, self._number + 1
        return self._number

    def _wake(self) -> None:
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            torch.cuda.empty_cache()  # what training has given back is vLLM's now
            self._llm.wake_up()
            self._held = {}

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)


def lora_weights(policy: Any) -> Weights:
    """The LoRA weights that a policy samples with, each factor by its name, on the CPU; nothing for the bare base.

    The second factor has PEFT's scaling in it, which may be another one at each module; vLLM knows one for all.

    Args:
        policy: a `roles.PolicyView`, or a PEFT model.
    """
    if hasattr(policy, "role"):
        base, adapter = policy.shared.causal_lm, policy.shared.names.get(policy.role)
        if adapter is None and policy.role != BASE:
            raise ValueError(f"there is no adapter for `{policy.role}`")
    else:
        base, adapter = policy.get_base_model(), policy.active_adapter
    found: Weights = {}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            second = layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter]
            found[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().float().cpu().clone()
            found[f"{name}.lora_B.weight"] = second.cpu()
    return found


def _episodes(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    stops: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> Episodes:
    def rows(values: Sequence[Sequence[Any]], fill: float, dtype: torch.dtype) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], dtype=dtype, device=device)

    return Episodes(
        rows([[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)], pad_token_id, torch.int64),
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor([len(reply) for reply in replies], device=device),
        torch.tensor([reply[-1] in stops for reply in replies], device=device),
        rows(log_probs, 0.0, torch.float32),
    )


def _replace_adapter(worker: Any, old: int, new: int, weights: Weights) -> None:
    """In vLLM's worker: drop an adapter, and take another one from memory.

    As `LRUCacheWorkerLoRAManager` of vLLM's `lora.worker_manager` does with one from a file.

    Args:
        worker: vLLM's.
        old: the id of the adapter to drop; 0 for none.
        new: the id of the other one.
        weights: its factors, by name; the first has as many rows as the rank.

    Raises:
        ValueError: vLLM has no place for some of them, which it would leave out without a word.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    adapters = manager._adapter_manager
    mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
    rank = max(len(tensor) for name, tensor in weights.items() if ".lora_A." in name)
    lora = LoRAModel.from_lora_tensors(
        new,
        weights,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a scaling of 1
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=mapper and mapper.get_unstacked_mapper(),
    )
    packed = {name for names in adapters.packed_modules.values() for name in names}  # as q, k and v, in one layer
    if unplaced := sorted(lora.loras.keys() - adapters.modules.keys() - packed):
        raise ValueError(f"vLLM puts no adapter on `{unplaced[0]}` of this model")
    if old:
        adapters.remove_adapter(old)
    adapters.add_adapter(lora)
    adapters.activate_adapter(new)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave random numbers and torch's own functions as they are: vLLM seeds and replaces some for itself."""
    states, set_num_threads = (random.getstate(), np.random.get_state()), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads = set_num_threads


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """On the CPU, have what vLLM wants compiled computed as it is: compiling takes half a minute."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _cache_on_cpu(spec: Model, settings: Rollout, longest: int) -> int:
    """How many bytes of keys and values all replies need that are sampled together, if that is not too many."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
    ).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = settings.max_num_seqs * (-(-longest // BLOCK_ON_CPU) + 1) * BLOCK_ON_CPU
    of_token = 2 * config.num_hidden_layers * heads * size * resolve_dtype(spec.dtype).itemsize
    return min(tokens * of_token, CACHE_ON_CPU)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
