"""How long the sampling and the scoring of one update take, beside the way in which both were done before.

Before, `generate` computed every row of a batch until its longest reply had ended, prompts were read once for each
reply, and replies were scored in parts of as many rows as are sampled together. Reply lengths have a real spread: half
have up to 60 tokens, 95 % up to 400. They are drawn once, and both ways stop at them, so that both write the same
number of tokens: every row forbids the stop token until its length is reached, and has nothing else then.

The weights are random, with adapters of rank 16 for policy, reference, value and reward: a Llama of 60 million
parameters with a vocabulary of 32,000, or the tiny recipe's shape. Both ways take turns in this one process.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging

from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo import rollout
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.decoding import Choice
from rlhf_pipeline.ppo.forward import member_scores, reply_log_probs, reply_values
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.mixture import Part, Rewards

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SHAPES: dict[str, dict[str, Any]] = {
    "60M": {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None,
    },
    "tiny": AutoConfig.from_pretrained(TINY / "checkpoint").to_dict(),
}  # fmt: skip
MEDIAN, SPREAD = 60, 1.153  # a log-normal distribution; its 95th percentile is 400
STOP, PAD = 1, 0
WAYS = ("before", "now")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--at-once", type=int, help="as many are sampled together; by default all")
    parser.add_argument("--group", type=int, default=1, help="replies to each prompt")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a reply")
    parser.add_argument(
        "--prompt", type=int, nargs=2, default=(16, 96), help="tokens of a prompt, at least and at most"
    )
    parser.add_argument("--phases", nargs="+", choices=("sampling", "scoring"), default=("sampling", "scoring"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    lengths = torch.exp(torch.randn(options.episodes, generator=draw) * SPREAD + torch.tensor(MEDIAN).log())
    lengths = lengths.ceil().long().clamp(max=options.longest)
    distinct = [
        torch.randint(5, 1000, (int(size),), generator=draw).tolist()
        for size in torch.randint(*options.prompt, (options.episodes // options.group,), generator=draw)
    ]
    prompts = [prompt for prompt in distinct for _ in range(options.group)]
    with tempfile.TemporaryDirectory(prefix="rollout-speed-") as name:
        trainer = trainer_of(Path(name), options)
        print(
            f"{trainer.shared.causal_lm.num_parameters() / 1e6:.1f} M parameters with adapters, "
            f"{torch.get_num_threads()} threads; {options.episodes} replies of {lengths.sum()} tokens in all, "
            f"median {lengths.median()}, longest {lengths.max()}; CPU seconds, wall seconds"
        )
        measured = measure(trainer, prompts, lengths, options)
    ratios = {}
    for phase in (*options.phases, *(["together"] if len(options.phases) > 1 else [])):
        for place, clock in enumerate(("CPU", "wall")):
            of = {
                way: statistics.median(
                    sum(one[part][place] for part in (options.phases if phase == "together" else [phase]))
                    for one in every
                )
                for way, every in measured.items()
            }
            ratios[f"{phase}, {clock}"] = of["before"] / of["now"]
    for what, ratio in ratios.items():
        print(f"before / now, {what}: {ratio:.2f}")
    print(json.dumps({"options": vars(options), "tokens": int(lengths.sum()), "ratios": ratios, "measured": measured}))


def measure(
    trainer: PPOTrainer, prompts: list[list[int]], lengths: Tensor, options: argparse.Namespace
) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """The seconds of each phase, by both ways in turn; and sees that both wrote replies of these lengths."""
    measured: dict[str, list[dict[str, tuple[float, float]]]] = {way: [] for way in WAYS}
    drawn = made_up(prompts, lengths)
    sampling = {"before": sample_before, "now": sample_now}
    scoring: dict[str, Callable[[PPOTrainer, Episodes], Any]] = {"before": score_before, "now": PPOTrainer.score}
    sampling["now"](trainer, prompts[:2], lengths[:2].clamp(max=2))  # what libraries set up once
    for number in range(options.repeats):
        for way in WAYS:
            found = {}
            if "sampling" in options.phases:
                with seconds() as found["sampling"]:
                    episodes = sampling[way](trainer, prompts, lengths)
                assert torch.equal(episodes.reply_lengths, lengths) and bool(
                    episodes.ended[lengths < options.longest].all()
                )
            if "scoring" in options.phases:
                with seconds() as found["scoring"]:
                    scoring[way](trainer, drawn)
            measured[way].append({phase: tuple(of) for phase, of in found.items()})
            said = "  ".join(f"{phase} {cpu:7.2f} {wall:7.2f}" for phase, (cpu, wall) in found.items())
            print(f"{number + 1}  {way:<7} {said}", flush=True)
    return measured


@contextlib.contextmanager
def seconds() -> Any:
    """CPU and wall seconds of the block, in a list."""
    begun, taken = (time.process_time(), time.perf_counter()), []
    yield taken
    taken += [time.process_time() - begun[0], time.perf_counter() - begun[1]]


def trainer_of(folder: Path, options: argparse.Namespace) -> PPOTrainer:
    """A trainer over a base and a reward model of random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape])).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "checkpoint")
    tokenizer.save_pretrained(folder / "base")
    spec = Model(path=str(folder / "base"), quantization="none", dtype="float32")
    scorer = adapters.with_reward_adapter(load_base(spec, tokenizer, head="score"), LORA, None)
    adapters.save_adapter(scorer, "default", folder / "reward", tokenizer)
    shared = SharedBase(load_base(spec, tokenizer), LORA, None, [(folder / "reward", LORA)])
    args = PPOConfig(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=options.episodes, temperature=1.0,
        gradient_accumulation_steps=1, response_length=options.longest, bf16=False, report_to="none", stop_token="eos",
        local_rollout_forward_batch_size=options.at_once or options.episodes, disable_tqdm=True,
        save_strategy="no", num_sample_generations=0, gradient_checkpointing=False,
    )  # fmt: skip
    rewards = Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)
    prompts = Dataset.from_dict({"input_ids": [[5]] * options.episodes})
    return PPOTrainer(args, tokenizer, shared, rewards, prompts)


def made_up(prompts: Sequence[Sequence[int]], lengths: Tensor) -> Episodes:
    """Replies of random tokens and of these lengths."""
    draw = torch.Generator().manual_seed(1)
    rows = [
        [*prompt, *torch.randint(5, 1000, (int(length),), generator=draw).tolist()]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    width, longest = max(map(len, rows)), int(lengths.max())
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    return Episodes(ids, sizes, lengths, torch.ones_like(lengths, dtype=torch.bool), torch.zeros(len(rows), longest))


# Now


class EndingChoice(Choice):
    """Chooses as ever, but for the stop token, which comes where a row's length is reached."""

    lengths: Tensor

    def __call__(self, logits: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(ending(logits, places + 1 == self.lengths[rows]), rows, places)


def ending(logits: Tensor, at_end: Tensor) -> Tensor:
    """Logits that allow nothing but the stop token in some rows, and anything else in the others."""
    logits[:, STOP] = -torch.inf
    logits[at_end] = -torch.inf
    logits[at_end, STOP] = 0.0
    return logits


def sample_now(trainer: PPOTrainer, prompts: list[list[int]], lengths: Tensor) -> Episodes:
    EndingChoice.lengths = lengths
    with mock.patch.object(rollout, "Choice", EndingChoice):
        return trainer.roll_out(prompts)


# Before


class Ending(LogitsProcessor):
    """The same ends, for `generate`."""

    def __init__(self, lengths: Tensor, start: int) -> None:
        self.lengths, self.start = lengths, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return ending(scores, input_ids.shape[1] - self.start + 1 == self.lengths)


class LogProbs(LogitsProcessor):
    """Notes the log-probability of each sampled token when the next one is asked for."""

    def __init__(self) -> None:
        self.noted: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.note(input_ids)
        self.last = scores.float() / 1.0
        return scores

    def note(self, input_ids: Tensor) -> None:
        if self.last is not None:
            self.noted.append(self.last.gather(1, input_ids[:, -1:])[:, 0] - self.last.logsumexp(1))


@torch.no_grad()
def sample_before(trainer: PPOTrainer, prompts: list[list[int]], lengths: Tensor) -> Episodes:
    """By `generate`, in batches of prompts of like length."""
    at_once, parts = trainer.args.local_rollout_forward_batch_size, []
    order = torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)
    for rows in order.split(at_once):
        some = [prompts[row] for row in rows]
        longest = max(map(len, some))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in some])
        sizes = torch.tensor([len(prompt) for prompt in some])
        noted = LogProbs()
        settings = GenerationConfig(
            max_new_tokens=trainer.args.response_length, eos_token_id=[STOP], pad_token_id=PAD, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0,
        )  # fmt: skip
        whole = trainer.policy.generate(
            input_ids=ids,
            attention_mask=(torch.arange(longest) >= longest - sizes[:, None]).long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([Ending(lengths[rows], longest), noted]),
        )
        noted.note(whole)
        at_stop = whole[:, longest:] == STOP
        found = torch.where(at_stop.any(1), at_stop.int().argmax(1) + 1, at_stop.shape[1])
        parts.append(Episodes(whole, sizes, found, at_stop.any(1), torch.stack(noted.noted, 1)))
    return rollout.concatenate(parts, PAD).select(order.argsort())


@torch.no_grad()
def score_before(trainer: PPOTrainer, episodes: Episodes) -> None:
    """In parts of as many rows as are sampled together."""
    shared, at_once = trainer.shared, trainer.args.local_rollout_forward_batch_size
    for part in episodes.by_length().split(at_once):
        some = episodes.select(part)
        for policy in (shared.policy, shared.reference):
            reply_log_probs(policy, some, 1.0)
        reply_values(shared.value, some)
    for part in episodes.by_length().split(at_once):
        member_scores(shared.rewards[0], episodes.select(part))


if __name__ == "__main__":
    main()
