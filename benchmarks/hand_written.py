"""The stages of recipes/tiny.yaml as one would write them by hand: plain TRL, PEFT and Transformers.

What `overhead.py` measures the pipeline against. Numbers come from the recipe, so that both do the same work; nothing
of `rlhf_pipeline` is imported, only the tiny checkpoint and its data are read. The recipe's `evaluate` is left out.
Needs TRL 1.12, the last with a PPOTrainer: an environment that `make floor` made.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "rlhf_pipeline" / "models" / "tiny"
MODEL = str(TINY / "checkpoint")


def number(value: Any) -> Any:
    """PyYAML reads `2e-5` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def rows(recipe: dict[str, Any], stage: str) -> tuple[Dataset, Dataset | None]:
    """The stage's rows to train on and to hold out; split by prompt, so that none stands on both sides."""
    data = recipe["stages"][stage]["data"]
    if isinstance(data, str):
        data = {"path": data}
    file = TINY / "data" / f"{data['path'].removeprefix('tiny:')}.jsonl"
    table = load_dataset("json", data_files=str(file), split="train")
    if not data.get("eval_fraction"):
        return table, None
    prompts = sorted(set(table["prompt"]))
    random.Random(recipe["seed"]).shuffle(prompts)
    held_out = set(prompts[: round(len(prompts) * data["eval_fraction"])])
    return table.filter(lambda row: row["prompt"] not in held_out), table.filter(lambda row: row["prompt"] in held_out)


def settings(recipe: dict[str, Any], stage: str, out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out / stage),
        "seed": recipe["seed"],
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **{key: number(value) for key, value in recipe["stages"][stage]["trainer"].items()},
    }


def causal_lm() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")


def classifier(tokenizer: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        MODEL, dtype="float32", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )


def sft(recipe: dict[str, Any], out: Path, tokenizer: Any) -> None:
    train, held_out = rows(recipe, "sft")
    trainer = SFTTrainer(
        model=causal_lm(),
        args=SFTConfig(**settings(recipe, "sft", out)),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(**recipe["lora"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(out / "sft" / "adapter")


def reward(recipe: dict[str, Any], out: Path, tokenizer: Any) -> None:
    train, held_out = rows(recipe, "reward")
    config = LoraConfig(**recipe["lora"], task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(classifier(tokenizer), config)
    learned = load_peft_weights(str(out / "sft" / "adapter"), device="cpu")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | learned)  # the fresh head stays
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings(recipe, "reward", out)),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    model.save_pretrained(out / "reward" / "adapter")


def ppo(recipe: dict[str, Any], out: Path, tokenizer: Any) -> None:
    prompts = rows(recipe, "ppo")[0].map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]})
    policy = PeftModel.from_pretrained(causal_lm(), out / "sft" / "adapter", is_trainable=True)
    reference = PeftModel.from_pretrained(causal_lm(), out / "sft" / "adapter")
    scorer = PeftModel.from_pretrained(classifier(tokenizer), out / "reward" / "adapter").merge_and_unload()
    critic = PeftModel.from_pretrained(classifier(tokenizer), out / "reward" / "adapter", is_trainable=True)
    trainer = PPOTrainer(
        args=PPOConfig(**settings(recipe, "ppo", out), stop_token="eos", num_sample_generations=0),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic.get_base_model(),  # TRL looks for the backbone and the head under their own names
        train_dataset=prompts.select_columns("input_ids"),
    )
    trainer.train()
    policy.save_pretrained(out / "ppo" / "adapter")


def dpo(recipe: dict[str, Any], out: Path, tokenizer: Any) -> None:
    train, held_out = rows(recipe, "dpo")
    # TRL copies the adapter `default` as the frozen reference.
    model = PeftModel.from_pretrained(causal_lm(), out / "sft" / "adapter", is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(recipe, "dpo", out)),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    model.save_pretrained(out / "dpo" / "adapter", selected_adapters=["default"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=["sft", "reward", "ppo", "dpo"])
    parser.add_argument("--out", type=Path, required=True, help="folder for adapters; earlier ones are read from it")
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "tiny.yaml")
    options = parser.parse_args()
    recipe = yaml.safe_load(options.recipe.read_text())
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    seconds = {}
    for stage in options.stages:
        set_seed(recipe["seed"])
        {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}[stage](recipe, options.out, tokenizer)
        seconds[stage] = time.perf_counter() - begun
        begun = time.perf_counter()
    with (options.out / "seconds.jsonl").open("a") as lines:
        lines.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
