"""Every causal architecture of the installed Transformers, made small at random: what holds of it, and what does not.

    python benchmarks/architectures.py [NAME ...] [--page docs/architectures.md]

Each goes through all four stages, without quantization and in NF4, and nine questions are asked of it; the page says
what they are. It has a process of its own, so that one that crashes or hangs takes no other with it.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import bitsandbytes
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.data import prepare
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.smoke.shrink import shrink
from rlhf_pipeline.stages import soundness
from rlhf_pipeline.stages.job import Job

SECONDS = 240  # that an architecture may take
EXACT = 1e-4  # nats, or a weight: what is equal but for rounding in float32
SHORT = {
    "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
    "logging_steps": 1,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "seed": 7,
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "stages": {
        "sft": {"data": {"path": "tiny:demonstrations", "limit": 16}, "trainer": SHORT},
        "reward": {
            "data": {"path": "tiny:preferences", "limit": 16, "eval_fraction": 0.4},
            "trainer": SHORT | {"per_device_eval_batch_size": 4},
        },
        "ppo": {
            "data": {"path": "tiny:prompts", "limit": 8},
            "trainer": {
                "learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 2, "num_ppo_epochs": 1,
                "gradient_accumulation_steps": 2, "response_length": 6, "gradient_checkpointing": False,
            },
        },
        "dpo": {"data": {"path": "tiny:preferences", "limit": 16}, "trainer": SHORT | {"learning_rate": 1e-3}},
    },
}  # fmt: skip
# What a configuration needs where its defaults make no model, or one without attention.
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 5 + ["full_attention"]) * 5 + ["linear_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
}  # fmt: skip
MEASURED = ("<!-- measured -->", "<!-- end of what is measured -->")  # what of the page is written anew
COLUMNS = {
    "stages": "stages",
    "kl": "KL 0",
    "dpo": "ln 2",
    "padded": "padded",
    "checkpointing": "checkpointing",
    "packed": "packed",
    "cache": "cache",
    "merged": "merged",
    "reward": "reward",
    "resume": "resume",
    "nf4": "NF4",
}


class Survey:
    """One architecture.

    Attributes:
        found: for each column `yes`, a number that should be 0, `no`, or a dash where it could not be asked.
        notes: what went wrong, in one line each.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.found: dict[str, str] = {}
        self.notes: list[str] = []
        self.model = ""

    def ask(self, column: str, question: Callable[[], float | None]) -> None:
        """Note the answer to one question: how far two things are apart that should be equal, None where they are."""
        try:
            off = question()
        except (FileNotFoundError, StopIteration):  # the stage that it is asked of has failed, which is said
            self.found[column] = "-"
            return
        except Exception as error:  # a model may fail in any way
            said = (str(error).strip().splitlines() or [""])[0]
            self.found[column] = "no"
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            if not any(note.endswith(said[:200]) for note in self.notes):
                self.notes.append(f"{COLUMNS[column]}: {kind}{said[:200]}")
            return
        self.found[column] = "yes" if off is None or off <= EXACT else f"{off:.1g}"

    def run(self) -> None:
        """Ask everything."""
        checkpoint = self.folder / "model"
        try:
            self.model = small(self.name, checkpoint)
        except Exception as error:
            self.notes.append((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
            return
        self.file = self.folder / "zoo.yaml"
        model = {"path": str(checkpoint), "quantization": "none", "dtype": "float32"}
        self.file.write_text(json.dumps({"name": "zoo", "model": model, **RECIPE}))
        self.ask("stages", lambda: self.all_stages("none"))
        self.ask("kl", lambda: self.first("none", "ppo", "objective/kl"))
        self.ask("dpo", lambda: abs(self.first("none", "dpo", "loss") - 0.6931471805599453))
        self.ask("padded", self.padded)
        self.ask("checkpointing", self.checkpointing)
        self.ask("packed", self.packed)
        self.ask("cache", self.cache)
        self.ask("merged", self.merged)
        self.ask("reward", self.reward)
        self.ask("resume", self.resume)
        self.ask("nf4", self.nf4)

    # What is asked

    def all_stages(self, quantization: str) -> None:
        """Train all four."""
        failed: dict[str, list[str]] = {}
        for stage in ("sft", "reward", "ppo", "dpo"):
            try:
                self.train(stage, f"model.quantization={quantization}", f"name={quantization}")
            except FileNotFoundError:  # of a stage that it needs
                continue
            except Exception as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                failed.setdefault(said[:160], []).append(stage)
        if failed:
            raise InputError("; ".join(f"{', '.join(names)}: {said}" for said, names in failed.items()))

    def nf4(self) -> float:
        """The same in 4 bits, and that the first KL is 0 and DPO's first loss ln 2 there, too."""
        self.all_stages("nf4")
        kl, loss = self.first("nf4", "ppo", "objective/kl"), self.first("nf4", "dpo", "loss")
        return max(abs(kl), abs(loss - 0.6931471805599453))

    def padded(self) -> float:
        """Rows alone, and padded on the right beside a longer one, with a mask as in training and without as in PPO."""
        model, rows = self.policy(), self.rows()
        width, off = max(map(len, rows)), 0.0
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            alone = [log_probs(model, torch.tensor([row]))[0] for row in rows]
            for inputs in ({"attention_mask": mask}, {}):
                together = log_probs(model, ids, **inputs)
                for row, expected, got in zip(rows, alone, together, strict=True):
                    off = max(off, (got[: len(row) - 1] - expected).abs().max().item())
        return off

    def checkpointing(self) -> float:
        """The adapter of SFT, with recomputed activations and with kept ones."""
        self.train("sft", "name=recomputed", "stages.sft.trainer.gradient_checkpointing=true")
        return difference(self.adapter("none", "sft"), self.adapter("recomputed", "sft"))

    def packed(self) -> float | None:
        """Rows alone, and packed as TRL packs them."""
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        leak = soundness.packing_leak(self.policy(), collate, self.rows())
        return leak.packed if leak.packed > 1e-3 * leak.as_one_text else None

    def cache(self) -> float:
        """Log-probabilities of generation, from its cache after left padding, and of a whole pass."""
        return soundness.generation_gap(self.policy(), self.rows(), 0)

    def merged(self) -> float:
        """The adapter on the base, and merged into it."""
        model, ids = self.policy(), torch.tensor([self.rows()[0]])
        with torch.no_grad():
            before = log_probs(model, ids)
            return (log_probs(model.merge_and_unload(), ids) - before).abs().max().item()

    def reward(self) -> float:
        """The scores of held-out replies, as the reward stage wrote them down and as PPO reads them on the base."""
        recipe = recipes.load(str(self.file), ["name=none"])
        job = Job(recipe, "ppo", recipe.run)
        tokenizer = load_tokenizer(recipe.model)
        pairs = prepare.preferences(recipe.stages["reward"].data, tokenizer, recipe.seed).held_out
        shared = SharedBase(load_base(recipe.model, tokenizer), job.stage.lora, job.init, job.reward_models)
        written, off = jsonl.rows(recipe.run / "reward" / "pairs.jsonl"), 0.0
        for row, known in zip(pairs, written, strict=True):
            for which in ("chosen", "rejected"):
                prompt, reply = row["prompt_ids"], row[f"{which}_ids"]
                lengths, none = torch.tensor([[len(prompt)], [len(reply)]]), torch.zeros(1, len(reply))
                episodes = Episodes(torch.tensor([prompt + reply]), *lengths, none > 0, none)
                with torch.no_grad():
                    off = max(off, abs(reply_scores(shared.reward, episodes).item() - known[which]))
        return off

    def resume(self) -> float:
        """The adapter of SFT that went on from its first checkpoint, and of one that was not interrupted."""
        saving = ("name=resumed", "stages.sft.trainer.save_steps=1", "keep_checkpoints=true")
        job = self.train("sft", *saving)
        kept = job.work / "checkpoint-1"
        shutil.copytree(kept, self.folder / "kept")
        whole = self.folder / "whole"
        shutil.move(job.folder / "adapter", whole)
        shutil.rmtree(job.folder)
        shutil.copytree(self.folder / "kept", kept)
        self.train("sft", *saving, resume=True)
        return difference(load_file(whole / adapters.WEIGHTS), self.adapter("resumed", "sft"))

    # With what

    def train(self, stage: str, *overrides: str, resume: bool = False) -> Job:
        """Run one stage in this process and publish its adapter."""
        recipe = recipes.load(str(self.file), overrides)
        job = Job(recipe, stage, recipe.run)
        job.work.mkdir(parents=True, exist_ok=resume)
        stages.BY_KIND[job.stage.kind].run(job)
        job.artifact.rename(job.folder / "adapter")
        return job

    def first(self, run: str, stage: str, metric: str) -> float:
        """The first number that a stage logged under a name."""
        rows = jsonl.rows(self.folder / "runs" / run / stage / "metrics.jsonl")
        return float(next(row[metric] for row in rows if metric in row))

    def adapter(self, run: str, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "runs" / run / stage / "adapter" / adapters.WEIGHTS)

    def policy(self) -> Any:
        """The base with the adapter that SFT left."""
        recipe = recipes.load(str(self.file), ["name=none"])
        base = load_base(recipe.model, load_tokenizer(recipe.model))
        folder = recipe.run / "sft" / "adapter"
        return adapters.with_policy_adapter(base, recipe.lora, folder).eval().requires_grad_(False)

    def rows(self) -> list[list[int]]:
        """Token ids of three rows of unlike length."""
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(5, 500, (length,), generator=draw).tolist() for length in (50, 13, 37)]


def small(name: str, out: Path) -> str:
    """Write a small random checkpoint of an architecture; returns its class."""
    config = AutoConfig.for_model(name, **OPTIONS.get(name, {}))
    source = out.with_name("source")
    config.save_pretrained(source)
    shrink(Model(path=str(source)), out, str(TINY / "checkpoint"))
    # So small weights as models begin with make next to nothing of their input: all tokens would be as likely.
    model, ids = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), torch.arange(8, 40)[None]
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    for factor in (3.0, 2.0, 1.0):
        model.load_state_dict({key: value * factor if value.dim() > 1 else value for key, value in drawn.items()})
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        if logits.isfinite().all() and logits.std() < 30:
            break
    model.save_pretrained(out)
    return type(model).__name__


def log_probs(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Of each token but the first, `[batch, length - 1]`."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between the weights of two adapters."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def survey(name: str, answer: Any) -> None:
    """Ask one architecture, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        one = Survey(name, Path(folder))
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            one.run()
        answer.send({"name": name, "model": one.model, "found": one.found, "notes": one.notes})


def surveyed(names: list[str], at_once: int) -> list[dict[str, Any]]:
    """The answers of all, some at a time."""
    context, left, running, answers = multiprocessing.get_context("fork"), list(names), {}, {}
    while left or running:
        while left and len(running) < at_once:
            name = left.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=survey, args=(name, send))
            process.start()
            send.close()
            running[name] = (process, receive, time.monotonic())
        for name, (process, receive, since) in list(running.items()):
            late = time.monotonic() - since > SECONDS
            if not (receive.poll() or late or not process.is_alive()):
                continue
            try:
                answers[name] = receive.recv() if receive.poll() else None
            except EOFError:
                answers[name] = None
            if answers[name] is None:
                ended = f"it took more than {SECONDS} s" if late else f"its process ended with {process.exitcode}"
                answers[name] = {"name": name, "model": "", "found": {}, "notes": [ended]}
            process.kill()
            process.join()
            del running[name]
            print(f"{time.monotonic() - since:6.1f} s", json.dumps(answers[name]), file=sys.stderr, flush=True)
        time.sleep(0.1)
    return [answers[name] for name in names]


def page(answers: list[dict[str, Any]], seconds: float) -> str:
    """The part of docs/architectures.md that is measured: versions, a table, and what fails and why."""
    versions = ", ".join(
        f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl, peft, bitsandbytes)
    )
    asked = [answer for answer in answers if answer["found"]]
    whole = sum(all(value == "yes" for value in answer["found"].values()) for answer in asked)
    lines = [
        f"Of {datetime.date.today():%Y-%m-%d}, with {versions}, on the CPU, in {seconds / 60:.0f} minutes: of "
        f"{len(answers)} architectures {len(asked)} could be made small, and for {whole} of them all holds.",
        "",
        f"| `model_type` | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for answer in asked:
        cells = [answer["found"].get(column, "-").replace("yes", "✓") for column in COLUMNS]
        lines.append(f"| `{answer['name']}` | {' | '.join(cells)} |")
    lines += ["", "## What fails, and why", ""]
    for answer in answers:
        if answer["notes"]:
            said = "; ".join(
                re.sub(r"(model\.path: )?/\S*?/(model|source)\b:? ?", "", note) for note in answer["notes"]
            )
            lines.append(f"* `{answer['name']}`: {said.replace('|', '/')}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; by default all")
    parser.add_argument("--page", type=Path, help="write the page there")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = chosen.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    began = time.monotonic()
    answers = surveyed(names, chosen.at_once)
    if chosen.page:
        text, seconds = chosen.page.read_text(encoding="utf-8"), time.monotonic() - began
        before, _, rest = text.partition(MEASURED[0])
        after = rest.partition(MEASURED[1])[2]
        middle = f"{MEASURED[0]}\n{page(answers, seconds)}{MEASURED[1]}"
        chosen.page.write_text(f"{before}{middle}{after}", encoding="utf-8")
    print(json.dumps({"seconds": round(time.monotonic() - began), "answers": answers}))


if __name__ == "__main__":
    main()
