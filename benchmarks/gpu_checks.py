"""What must hold on a GPU and cannot be seen on a CPU, each as a function that returns its numbers or fails.

`benchmarks/gpu.py` goes through them, and so does pytest where there is a GPU (`tests/test_gpu.py`). They run on a CPU
as well, with what bitsandbytes has there.
"""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bits
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed
from trl import DPOConfig, SFTConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.kinds import get
from rlhf_pipeline.models import adapters, attention
from rlhf_pipeline.models.base import device, load_base, load_config
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.forward import reply_log_probs
from rlhf_pipeline.ppo.rollout import sample
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.stages import liger, soundness
from rlhf_pipeline.stages.dpo import EncodedDPOTrainer
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.sft import ResumableSFTTrainer

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
KERNELS = ("flash_attention_2", "flash_attention_3")
Numbers = dict[str, Any]


class NotHere(Exception):  # noqa: N818  it is no error: something is not installed, or the card does not have it
    """A check that cannot be made on this machine, and why."""


def tiny(quantization: str = "nf4", dtype: str = "bfloat16", kernel: str = "auto") -> tuple[Model, Any]:
    """The shipped checkpoint as a recipe's model, and its tokenizer."""
    spec = Model(path=str(TINY / "checkpoint"), quantization=quantization, dtype=dtype, attention=kernel)
    return spec, load_tokenizer(spec)


def drawn_ids(rows: int, length: int) -> list[list[int]]:
    return torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()


def with_random_adapter(base: PreTrainedModel) -> Any:
    """An adapter that changes something: PEFT's own begin as nothing."""
    torch.manual_seed(1)
    model = adapters.with_policy_adapter(base, LORA, None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


def settings(folder: Path, **more: Any) -> Numbers:
    return {
        "output_dir": str(folder), "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "bf16": True, "use_cpu": not torch.cuda.is_available(), "max_length": None, **more,
    }  # fmt: skip


@torch.no_grad()
def nf4_computes_with_its_dequantized_weights(folder: Path) -> Numbers:
    """A base in NF4 with an adapter, beside the same with its weights made whole again."""
    spec, tokenizer = tiny()
    packed = load_base(spec, tokenizer)
    whole = load_base(spec.model_copy(update={"quantization": "none"}), tokenizer)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert layers, "no layer is in 4 bits"
    for name, layer in layers.items():
        weight: Any = layer.weight
        assert weight.device.type == device().type and weight.dtype == torch.uint8
        target: Any = whole.get_submodule(name)
        target.weight.copy_(bits.dequantize_4bit(weight.data, weight.quant_state))
    ids = torch.tensor(drawn_ids(4, 24), device=device())
    ours, theirs = (with_random_adapter(base)(input_ids=ids).logits.float() for base in (packed, whole))
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    assert difference < 0.1, f"logits differ by {difference:.3f} of their spread"
    return {"layers": len(layers), "largest_difference_of_spread": difference}


def the_first_kl_is_zero(folder: Path) -> Numbers:
    """PPO's policy and its reference say the same of each token before the first update, to the bit."""
    spec, tokenizer = tiny()
    shared = SharedBase(load_base(spec, tokenizer), LORA, None, [], one_trunk=True)
    episodes = sample(
        shared.policy, drawn_ids(6, 9) + drawn_ids(2, 3), response_length=12, temperature=1.0, stop_token_id=None,
        pad_token_id=0, at_once=8,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
        policy, reference = (reply_log_probs(view, episodes, 1.0)[0] for view in (shared.policy, shared.reference))
    kl = (policy - reference).abs().max().item()
    assert kl == 0, f"the first KL is {kl}"
    prompts = drawn_ids(3, 20)
    gap = soundness.generation_gap(shared.policy, prompts, 0)
    assert gap < 0.1, f"it samples with other log-probabilities than it is trained on: {gap:.3f} nats a token"
    return {"largest_kl": kl, "generation_gap": gap}


def dpo_begins_at_ln_2(folder: Path) -> Numbers:
    """The first loss of DPO from an adapter, over NF4 in bfloat16."""
    spec, tokenizer = tiny()
    model = with_random_adapter(load_base(spec, tokenizer))
    ids = drawn_ids(8, 12)
    rows = Dataset.from_dict(
        {"prompt_ids": [one[:4] for one in ids], "chosen_ids": [one[4:8] for one in ids],
         "rejected_ids": [one[8:] for one in ids]}
    )  # fmt: skip
    args = DPOConfig(**settings(folder, max_steps=1, per_device_train_batch_size=8, gradient_checkpointing=True))
    trainer = EncodedDPOTrainer.over(model, args, tokenizer, rows, None)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert abs(loss - math.log(2)) < 1e-5, f"the first loss is {loss}"
    return {"loss": loss, "ln_2": math.log(2)}


def checkpointing_recomputes_under_the_right_adapter(folder: Path) -> Numbers:
    """Gradients with gradient checkpointing, where another role is active in the backward pass, and without it."""
    spec, tokenizer = tiny(quantization="none", dtype="float32")
    episodes, gradients = None, []
    for checkpointing in (False, True):
        set_seed(0)
        shared = SharedBase(load_base(spec, tokenizer), LORA, None, [], one_trunk=False)
        for parameter in adapters.adapter_parameters(shared.peft, shared.names["policy"]).values():
            parameter.data.add_(0.02)
        if episodes is None:
            episodes = sample(
                shared.policy, drawn_ids(4, 9), response_length=8, temperature=1.0, stop_token_id=None, pad_token_id=0,
                at_once=4,
            )  # fmt: skip
        if checkpointing:
            shared.enable_gradient_checkpointing()
        loss = reply_log_probs(shared.policy, episodes, 1.0)[0].sum()
        with shared.acting_as("value"):
            loss.backward()
        own = adapters.adapter_parameters(shared.peft, shared.names["policy"])
        gradients.append(torch.cat([one.grad.flatten() for one in own.values()]))
    difference = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
    assert gradients[0].abs().max() > 0 and difference < 1e-4, f"gradients differ by {difference:.2g}"
    return {"largest_difference_of_largest": difference}


def four_roles_are_a_base_and_adapters(folder: Path) -> Numbers:
    """The bytes of PPO's roles over those of the base alone; the tiny base is small, and its adapters are not."""
    from four_roles import weight_bytes

    spec, tokenizer = tiny()
    base = load_base(spec, tokenizer)
    alone = weight_bytes([base])
    shared = SharedBase(base, LORA, None, [], one_trunk=False)
    own = sum(
        parameter.numel() * parameter.element_size()
        for name in shared.names.values()
        for parameter in adapters.adapter_parameters(shared.peft, name).values()
    )
    together = weight_bytes([shared.peft])
    assert together == alone + own, f"{together} bytes, and the base has {alone} and the adapters {own}"
    return {"base_bytes": alone, "adapter_bytes": own}


def padding_free_is_padded(folder: Path) -> Numbers:
    """A step of SFT without padding, beside the same with it, in bfloat16 over NF4."""
    return _without_padding(folder, "auto")


def flash_attention(folder: Path) -> Numbers:
    """Each Flash Attention that there is: logits and sampling beside SDPA's, and rows without padding."""
    found: Numbers = {}
    for kernel in KERNELS:
        spec, tokenizer = tiny(kernel=kernel)
        said = attention.missing(spec)
        if said is None:
            attention.require(spec, load_config(spec))
            ids = torch.tensor(drawn_ids(4, 24), device=device())
            mask = torch.ones_like(ids)
            mask[0, :10] = 0  # padded on the left
            with torch.no_grad():
                one, other = (
                    load_base(spec.model_copy(update={"attention": name}), tokenizer)(
                        input_ids=ids, attention_mask=mask
                    ).logits.float()
                    for name in (kernel, "sdpa")
                )
            difference = ((one - other)[mask.bool()].abs().max() / other.std()).item()
            assert difference < 0.1, f"{kernel}: logits differ by {difference:.3f} of their spread"
            gap = soundness.generation_gap(load_base(spec, tokenizer), drawn_ids(3, 20), 0)
            assert gap < 0.1, f"{kernel} samples with other log-probabilities than it is trained on: {gap:.3f}"
            own = {"largest_difference_of_spread": difference, "generation_gap": gap} | _without_padding(folder, kernel)
            found |= {f"{kernel}/{name}": value for name, value in own.items()}
        else:
            found[kernel] = said
    if all(kernel in found for kernel in KERNELS):
        raise NotHere("; ".join(str(found[kernel]) for kernel in KERNELS))
    return found


def _without_padding(folder: Path, kernel: str) -> Numbers:
    spec, tokenizer = tiny(kernel=kernel)
    ids = [row[:length] for row, length in zip(drawn_ids(4, 40), (40, 7, 22, 13), strict=True)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    found = {}
    for free in (False, True):
        model = with_random_adapter(load_base(spec, tokenizer))
        args = SFTConfig(**settings(folder, max_steps=1, per_device_train_batch_size=4, padding_free=free))
        trainer = ResumableSFTTrainer.over(model, args, tokenizer, rows, None)
        if free:
            soundness.check_packing(model, trainer.data_collator, ids, "padding_free")
        trainer.train()
        found["free" if free else "padded"] = trainer.state.log_history[0]
    loss = {name: one["loss"] for name, one in found.items()}
    norm = {name: float(one["grad_norm"]) for name, one in found.items()}
    assert abs(loss["free"] - loss["padded"]) < 0.02, loss
    assert abs(norm["free"] / norm["padded"] - 1) < 0.1, norm
    return {"loss_padded": loss["padded"], "loss_without": loss["free"]}


def liger_layers(folder: Path) -> Numbers:
    """A step of SFT and one of the reward model with Liger's kernels, beside those without."""
    spec, tokenizer = tiny(quantization="none")
    try:
        liger.require(get("sft"), {liger.KEY: True}, load_config(spec), "trainer")
    except recipes.InputError as error:
        raise NotHere(error.message) from None
    ids = drawn_ids(4, 40)
    rows, losses = Dataset.from_dict({"input_ids": ids, "labels": ids}), {}
    for used in (False, True):
        model = with_random_adapter(load_base(spec, tokenizer))
        args = SFTConfig(**settings(folder, max_steps=1, per_device_train_batch_size=4, use_liger_kernel=used))
        trainer = ResumableSFTTrainer.over(model, args, tokenizer, rows, None)
        trainer.train()
        losses["liger" if used else "without"] = trainer.state.log_history[0]["loss"]
    assert abs(losses["liger"] - losses["without"]) < 0.02, losses
    return losses


CHECKS: tuple[Callable[[Path], Numbers], ...] = (
    nf4_computes_with_its_dequantized_weights,
    the_first_kl_is_zero,
    dpo_begins_at_ln_2,
    checkpointing_recomputes_under_the_right_adapter,
    four_roles_are_a_base_and_adapters,
    padding_free_is_padded,
    flash_attention,
    liger_layers,
)


# Resuming, which takes longer: stages of the tiny recipe, whole and from a checkpoint.

RESUMED = {
    "sft": ["max_steps=6", "save_steps=3", "gradient_checkpointing=true", "per_device_train_batch_size=8"],
    "ppo": [
        "total_episodes=24",
        "per_device_train_batch_size=8",
        "save_steps=1",
        "num_sample_generations=0",
        "response_length=8",
        "gradient_checkpointing=true",
    ],
}


def resumed_as_if_never_stopped(folder: Path, tell: Callable[[str, Numbers], None]) -> None:
    """Stages over NF4 in bfloat16: twice without a break, and once from a checkpoint amid it.

    What two runs without a break differ by is what the card's own kernels leave open; resuming must add nothing to it.
    """
    for kind, given in RESUMED.items():
        overrides = [
            "name=tiny", "model.quantization=nf4", "model.dtype=auto", "evaluate=null", "keep_checkpoints=true",
            "lora.lora_dropout=0.1", *(f"{kind}.trainer.{one}" for one in given), f"{kind}.trainer.save_total_limit=9",
        ]  # fmt: skip
        loaded = recipes.load("tiny", [*overrides, f"output_dir={folder}"])
        loaded.stages["ppo"].reward, loaded.stages["ppo"].init = None, "base"
        started = time.perf_counter()
        first, second = (_trained(loaded, kind, folder / name) for name in ("first", "second"))
        steps = sorted((first / "work").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        third = folder / "resumed" / kind
        (third / "work").mkdir(parents=True)
        shutil.copytree(steps[0], third / "work" / steps[0].name)
        resumed = _trained(loaded, kind, folder / "resumed")
        twice, after = _difference(first, second), _difference(first, resumed)
        tell(
            f"resume {kind}",
            {"from": steps[0].name, "bitwise": after == 0, "largest_difference": after, "of_two_whole_runs": twice,
             "seconds": time.perf_counter() - started},
        )  # fmt: skip
        assert after <= 10 * twice, f"{kind}: resumed weights are off by {after:.2g}, and two whole runs by {twice:.2g}"


def _trained(recipe: Any, name: str, run: Path) -> Path:
    """Run a stage in a run directory; returns the stage's folder."""
    recipe = copy.deepcopy(recipe)
    job = Job(recipe, name, run)
    job.work.mkdir(parents=True, exist_ok=True)
    stages.BY_KIND[recipe.stages[name].kind].run(job)
    return run / name


def _difference(one: Path, other: Path) -> float:
    """The largest between the weights that two stages made."""
    ours, theirs = (load_file(folder / "work" / "adapter" / WEIGHTS) for folder in (one, other))
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
