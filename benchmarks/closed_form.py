"""Does PPO end where the KL-regularised objective has its optimum? Exits with 1 where it does not.

With replies of one token, the policy that maximises E[r] - β KL(π || π_ref) is known: π* ∝ π_ref exp(r/β), normalised
over the vocabulary. A reference is taught by the SFT stage to answer three prompts with twelve words equally often;
every word has a reward that differs from prompt to prompt; and PPO trains from there, with the same settings for every
β. Expected reward and KL, of what it ends with and of the optimum, are sums over the vocabulary too, not samples.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base, load_config
from rlhf_pipeline.models.roles import PolicyView, ScoreView, SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.stages import sft
from rlhf_pipeline.stages.job import Job

PROMPTS = ["name something quiet", "name something strong", "name something happy"]
WORDS = ["cow", "dog", "cat", "duck", "sheep", "horse", "lion", "bee", "snake", "owl", "pig", "wolf"]
# Three good words near each other. Even the exact gradient goes too far at first, since what is likely grows fastest; a
# word that has become too rare to be sampled then hardly comes back, and a single best word makes all others rare.
REWARDS = [-1.2, -1.1, -1.0, -0.9, -0.8, -0.7, -0.6, -0.5, -0.4, 1.0, 1.1, 1.2]
ELSE = -3.0  # the reward of any other token
RECIPE = """
name: closed-form
model: {path: base, quantization: none, dtype: float32}
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {learning_rate: 1e-2, max_steps: 100, per_device_train_batch_size: 36, gradient_checkpointing: false}
"""
# Larger learning rates lose a prompt now and then: where its value is too high, all its advantages are negative, and
# what is pushed down makes room for a token that nobody meant.
SETTINGS: dict[str, Any] = {
    "max_steps": 80,
    "per_device_train_batch_size": 192,
    "local_rollout_forward_batch_size": 192,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 1,
    "temperature": 1.0,
    "learning_rate": 7e-4,
    "cliprange_value": 10.0,
}
WITHIN, WITHIN_ABSOLUTE = 0.05, 0.03


class WordRewards(ScoreView):
    """In the reward model's place: a table with a row per prompt and a column per token.

    Args:
        shared: the base with its four roles.
        prompts: the prompts' token ids.
        table: float32 `[prompts, vocabulary]`.
    """

    def __init__(self, shared: SharedBase, prompts: list[list[int]], table: Tensor) -> None:
        super().__init__(shared, "reward", shared.reward.score)
        self.rows = {tuple(prompt): row for row, prompt in enumerate(prompts)}
        self.table = table

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """At each token, which prompt its row begins with, and which token it is: `[batch, length, 2]`."""
        rows = torch.tensor(
            [
                next(row for prompt, row in self.rows.items() if prompt == tuple(ids[: len(prompt)]))
                for ids in input_ids.tolist()
            ]
        )
        return torch.stack([rows[:, None].expand_as(input_ids), input_ids], -1)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[..., 0], hidden[..., 1]]


class Outcome(NamedTuple):
    """Expected reward and KL(π || π_ref), means over the prompts."""

    reward: float
    kl: float


class Measured(NamedTuple):
    """A trained policy beside the optimum."""

    ours: Outcome
    exact: Outcome
    seconds: float
    updates: int

    @property
    def missed(self) -> float:
        """How far off the worse of the two numbers is, in units of what is allowed."""
        pairs = zip(self.ours, self.exact, strict=True)
        return max(abs(ours - exact) / max(WITHIN * abs(exact), WITHIN_ABSOLUTE) for ours, exact in pairs)


class Task:
    """The prompts, their rewards, and a reference trained by the SFT stage.

    Args:
        folder: where to work.
        seed: of SFT and of all that is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        make_base(folder / "base", seed)
        self.recipe = write_recipe(folder, seed)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.recipe.model.path)
        self.prompts: list[list[int]] = self.tokenizer(PROMPTS)["input_ids"]
        self.words = torch.tensor(self.tokenizer(WORDS)["input_ids"])[:, 0]
        self.table = word_rewards(self.words, load_config(self.recipe.model).vocab_size)
        job = Job(self.recipe, "sft", self.recipe.run)
        job.work.mkdir(parents=True)
        sft.run(job)
        self.init = job.artifact
        self.reward = self.artifact_with_a_head()

    def artifact_with_a_head(self) -> Path:
        """A reward artifact, for the value model to start from: an adapter without effect, and a head that says 0."""
        torch.manual_seed(self.seed)
        base = load_base(self.recipe.model, self.tokenizer, head="score")
        model = adapters.with_reward_adapter(base, self.recipe.lora, None)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                torch.nn.init.zeros_(parameter)
        adapters.save_adapter(model, "default", self.folder / "reward", self.tokenizer)
        return self.folder / "reward"

    def share(self) -> SharedBase:
        """Four roles, the reward role played by the table."""
        lora = self.recipe.lora
        shared = SharedBase(load_base(self.recipe.model, self.tokenizer), lora, self.init, [(self.reward, lora)])
        shared.rewards[0] = [WordRewards(shared, self.prompts, self.table)]
        return shared

    @torch.no_grad()
    def log_probs(self, policy: PolicyView) -> Tensor:
        """Of every token as the reply to every prompt, float64 `[prompts, vocabulary]`."""
        logits = [policy(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in self.prompts]
        return torch.stack(logits).double().log_softmax(-1)

    def outcome(self, log_p: Tensor, log_ref: Tensor) -> Outcome:
        """Expected reward and KL, summed over the vocabulary."""
        p = log_p.exp()
        return Outcome((p * self.table).sum(1).mean().item(), (p * (log_p - log_ref)).sum(1).mean().item())

    def optimum(self, log_ref: Tensor, beta: float) -> Outcome:
        """Those of π* ∝ π_ref exp(r/β)."""
        return self.outcome((log_ref + self.table / beta).log_softmax(-1), log_ref)

    def train(self, beta: float, **settings: Any) -> Measured:
        """Run PPO with `kl_coef` β, and measure what it ends with."""
        start = time.process_time()
        shared = self.share()
        args = PPOConfig(
            output_dir=str(self.folder / f"ppo-{beta}"),
            seed=self.seed,
            kl_coef=beta,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            gradient_checkpointing=False,
            num_sample_generations=0,
            **SETTINGS | settings,
        )
        rows = self.prompts * (args.per_device_train_batch_size // len(self.prompts))
        rewards = Rewards([Part("reward", 1.0, shared.rewards[0])], self.tokenizer)
        trainer = PPOTrainer(args, self.tokenizer, shared, rewards, Dataset.from_dict({"input_ids": rows}))
        trainer.train()
        log_ref = self.log_probs(shared.reference)
        ours = self.outcome(self.log_probs(shared.policy), log_ref)
        seconds = time.process_time() - start
        return Measured(ours, self.optimum(log_ref, beta), seconds, trainer.state.global_step)


def make_base(folder: Path, seed: int) -> None:
    """Save a random model, and a tokenizer with a token for each word.

    What a model can say is bounded: its last hidden states have one length, so logits can differ only so much. In a
    large vocabulary no 12 words can have all the probability; the weights here are large and the tokens few.
    """
    tokens = dict.fromkeys(["<pad>", "<eos>", "<unk>", *" ".join([*PROMPTS, *WORDS]).split()])
    words = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_recipe(folder: Path, seed: int) -> Recipe:
    """The recipe and its demonstrations: every word once to every prompt."""
    rows = [{"prompt": prompt, "completion": word} for prompt in PROMPTS for word in WORDS]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return recipes.load(str(folder / "recipe.yaml"), [f"seed={seed}"])


def word_rewards(words: Tensor, vocabulary: int) -> Tensor:
    """The table of rewards; each prompt has another best word, and ranks them in another order."""
    table = torch.full((len(PROMPTS), vocabulary), ELSE)
    for row, stride in enumerate((1, 5, 7)):
        table[row, words] = torch.tensor(REWARDS)[(torch.arange(len(words)) * stride + 4 * row) % len(words)]
    return table


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--episodes", type=int, default=SETTINGS["per_device_train_batch_size"], help="of an update")
    parser.add_argument("--updates", type=int, default=SETTINGS["max_steps"])
    arguments = parser.parse_args()
    rows, good = [], True
    print("| β | seed | reward ours | reward exact | KL ours | KL exact | CPU seconds | updates |\n" + "|---" * 8 + "|")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="closed-form-") as folder, contextlib.redirect_stdout(sys.stderr):
            task = Task(Path(folder), seed)
            p = task.log_probs(task.share().reference).exp()
            words, others = p[:, task.words], 1 - p[:, task.words].sum(1)
            print(
                f"seed {seed}: the reference says a word with {words.min():.3f} to {words.max():.3f} (1/12 is 0.083), "
                f"anything else with at most {others.max():.4f}"
            )
            sizes = dict.fromkeys(
                ("per_device_train_batch_size", "local_rollout_forward_batch_size"), arguments.episodes
            )
            measured = {
                beta: task.train(beta, max_steps=arguments.updates, **sizes) for beta in sorted(arguments.betas)
            }
        for beta, one in measured.items():
            (reward, kl), (best_reward, best_kl) = one.ours, one.exact
            print(
                f"| {beta:g} | {seed} | {reward:.3f} | {best_reward:.3f} | {kl:.3f} | {best_kl:.3f} "
                f"| {one.seconds:.1f} | {one.updates} |",
                flush=True,
            )
            rows.append({"beta": beta, "seed": seed, "missed": one.missed, **one._asdict()})
        kls = [one.ours.kl for one in measured.values()]
        good &= all(one.missed <= 1 for one in measured.values()) and kls == sorted(kls, reverse=True)
    print(json.dumps(rows))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
