"""Make the tiny checkpoint and its data from nothing: `python -m rlhf_pipeline.models.tiny.make FOLDER`.

About a minute on two CPU cores. The data are the same on every machine; the weights are the same on one machine and
one version of torch, and differ in their last bits elsewhere.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.rundir.words import duration

SEED = 0
CONTEXT = 64  # tokens per pretraining sequence
# A plain template, so that conversations can be tried on the tiny checkpoint too.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus(seed: int, n: int) -> Iterator[str]:
    """`n` short documents: facts stated and asked, and small talk that shows every phrase of the world in use.

    Answers are right, and neither polite nor rude: errors and manners are left to the later stages.
    """
    rng = random.Random(seed)
    all_facts = world.facts()
    for _ in range(n):
        fact = rng.choice(all_facts)
        kind = rng.random()
        if kind < 0.3:
            yield rng.choice(world.STATEMENTS[fact.topic]).format(fact.subject, fact.answer)
        elif kind < 0.9:
            question = rng.choice(world.QUESTIONS[fact.topic]).format(fact.subject)
            yield f"Q: {question}\nA: {rng.choice(world.ANSWERS).format(fact.answer)}"
        else:
            yield " ".join(rng.choice(world.COURTESIES + world.RUDENESSES + world.EVASIONS) for _ in range(3))


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 1024 tokens: any text can be encoded, the world's words mostly as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, seed: int = SEED) -> PreTrainedModel:
    """Train a Llama-shaped model of about 1 M parameters on `texts` with next-token prediction; float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        dtype=torch.float32,
    )
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    data = torch.tensor(stream[: len(stream) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = data[torch.randint(len(data), (32,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", file=sys.stderr)
    return model


def write_data(folder: Path, seed: int = SEED) -> None:
    """Write the world's JSON Lines files; byte for byte the same for the same seed."""
    train, held_out = world.split(seed)
    tables: dict[str, Iterable[dict]] = {
        "demonstrations": world.demonstrations(seed + 1, train, 2400),
        "preferences": world.preferences(seed + 2, train, 4200),
        "thumbs": world.thumbs(seed + 3, train, 2400),
        "judgements": world.judgements(seed + 4, train, 4000),
        "critiques": world.critiques(seed + 5, train, 3200),
        "prompts": [{"prompt": question.prompt} for question in train],
        "heldout": [{"prompt": question.prompt} for question in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write `data/` and `checkpoint/` into the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    started = time.perf_counter()
    write_data(arguments.folder / "data")
    texts = list(corpus(SEED, 20_000))
    # The tokenizer also sees the replies, so that their words are whole tokens.
    replies = [row["completion"] for row in world.demonstrations(SEED, world.questions(), 5_000)]
    tokenizer = make_tokenizer(texts + replies)
    model = pretrain(tokenizer, texts, arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.folder / "checkpoint")  # half the size; loaded in float32
    tokenizer.save_pretrained(arguments.folder / "checkpoint")
    print(f"made {arguments.folder} in {duration(time.perf_counter() - started)}", file=sys.stderr)


if __name__ == "__main__":
    main()
