"""KTO's loss is the formula of its paper, on pairs that are mismatched, from the adapter that the stage starts from."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import KTOConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.stages.job import Job, Reader
from rlhf_pipeline.stages.kto import EncodedKTOTrainer, with_mismatched
from rlhf_pipeline.stages.trial import try_trainer

BETA, GOOD, BAD = 0.3, 2.5, 1.25
SEED_FOR = {True: 1, False: 20}  # of a change that leaves KL above 0, or not
ROWS = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 1], "label": True},
    {"prompt_ids": [5, 6], "completion_ids": [10, 1], "label": False},
    {"prompt_ids": [11], "completion_ids": [12, 13, 14, 15, 1], "label": False},
    {"prompt_ids": [16, 17, 18, 19], "completion_ids": [20, 1], "label": True},
    {"prompt_ids": [21, 22], "completion_ids": [23, 24, 1], "label": False},
]


@pytest.fixture
def make(tmp_path, tokenizer):
    """A function that gives a trainer whose policy has moved away from its reference, and that trainer's rows."""

    def of(rows: list[dict] = ROWS, **settings) -> EncodedKTOTrainer:
        torch.manual_seed(3)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
        model = adapters.with_policy_adapter(base, {"r": 4, "target_modules": "all-linear"}, None)
        move(model, 0.5)  # an adapter of an earlier stage
        args = KTOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
            beta=BETA, desirable_weight=GOOD, undesirable_weight=BAD,
            **({"router_aux_loss_coef": 0.0} | settings),
        )  # fmt: skip
        table = Dataset.from_list(rows)
        return EncodedKTOTrainer.over(model, args, tokenizer, table, table)

    return of


def move(model: PeftModel, by: float) -> None:
    with torch.no_grad():
        for weight in adapters.adapter_parameters(model, "default").values():
            weight.add_(torch.randn_like(weight) * by)


def log_probability(model: PeftModel, adapter: str, prompt: list[int], reply: list[int]) -> float:
    """Of a whole reply, in float64, token by token."""
    model.set_adapter(adapter)
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0].double()
    said = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(said[i, token].item() for i, token in enumerate(reply))


@torch.no_grad()
def by_hand(trainer: EncodedKTOTrainer, rows: list[dict], others: list[list[int]]) -> dict[str, float]:
    """Ethayarajh et al. 2024, eq. 7 and 8, and the mean rewards."""
    model = trainer.model.double()

    def ratio(prompt: list[int], reply: list[int]) -> float:
        return log_probability(model, "default", prompt, reply) - log_probability(model, "ref", prompt, reply)

    kl = max(0.0, sum(ratio(row["prompt_ids"], other) for row, other in zip(rows, others, strict=True)) / len(rows))
    rewards = [ratio(row["prompt_ids"], row["completion_ids"]) for row in rows]
    losses = []
    for row, reward in zip(rows, rewards, strict=True):
        above = BETA * (reward - kl) if row["label"] else BETA * (kl - reward)
        losses.append((GOOD if row["label"] else BAD) * (1 - 1 / (1 + math.exp(-above))))
    good = [BETA * reward for row, reward in zip(rows, rewards, strict=True) if row["label"]]
    bad = [BETA * reward for row, reward in zip(rows, rewards, strict=True) if not row["label"]]
    model.float().set_adapter("default")
    return {
        "loss": sum(losses) / len(losses), "kl": kl, "rewards/chosen": sum(good) / len(good),
        "rewards/rejected": sum(bad) / len(bad), "rewards/margins": sum(good) / len(good) - sum(bad) / len(bad),
    }  # fmt: skip


@pytest.mark.parametrize("above_0", [True, False])
def test_the_loss_is_that_of_the_paper_and_kl_that_of_replies_to_the_prompts_before(make, above_0):
    """Moved one way, KL is above 0; moved another it would be below, and counts as 0."""
    trainer = make()
    torch.manual_seed(SEED_FOR[above_0])
    move(trainer.model, 0.2)
    replies = [row["completion_ids"] for row in ROWS]
    expected = by_hand(trainer, ROWS, [replies[-1], *replies[:-1]])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()} | {"loss": loss.item()}
    assert expected == pytest.approx({name: found[name] for name in expected}, rel=1e-4, abs=1e-5)
    assert expected["kl"] > 0.01 if above_0 else expected["kl"] == 0.0


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_held_out_numbers_are_of_all_rows_whatever_the_batch(make, batch):
    trainer = make(per_device_eval_batch_size=batch)
    torch.manual_seed(SEED_FOR[True])
    move(trainer.model, 0.2)
    replies = [row["completion_ids"] for row in ROWS]
    expected = by_hand(trainer, ROWS, replies[2:] + replies[:2])
    found = trainer.evaluate()
    assert expected == pytest.approx({name: found[f"eval_{name}"] for name in expected}, rel=1e-4, abs=1e-5)
    assert expected["kl"] > 0.01


def test_nothing_has_moved_at_first_and_the_reference_is_what_the_stage_starts_from(make):
    trainer = make()
    ours, reference = (adapters.adapter_parameters(trainer.model, name) for name in ("default", "ref"))
    assert any(weight.abs().max() > 0.1 for name, weight in reference.items() if "lora_B" in name)
    assert all(torch.equal(weight, ours[name.replace(".ref", ".default")]) for name, weight in reference.items())
    found = trainer.evaluate()
    assert [found[f"eval_{name}"] for name in ("kl", "rewards/chosen", "rewards/rejected")] == [0.0, 0.0, 0.0]
    assert found["eval_loss"] == pytest.approx((2 * GOOD + 3 * BAD) / 5 / 2)


def test_each_epoch_has_an_order_of_its_own(make):
    torch.manual_seed(0)
    rows = [{"prompt_ids": [5], "completion_ids": [i, 1], "label": True} for i in range(10, 26)]
    batches = make(rows, per_device_train_batch_size=16).get_train_dataloader()
    first, second = ([i for batch in batches for i in batch["input_ids"][:, 1].tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10, 26))
    assert first != second and first != sorted(first)


def test_a_reply_is_matched_with_another_prompt_of_its_batch_and_one_alone_with_none():
    def columns(rows: list[dict]) -> list[list[int]]:
        return with_mismatched(lambda examples: [one["KL_completion_ids"] for one in examples], rows)

    assert columns(ROWS[:3]) == [[12, 13, 14, 15, 1], [8, 9, 1], [10, 1]]
    assert columns(ROWS[:1]) == [[]]
    assert columns([ROWS[0] | {"KL_completion_ids": [3]}]) == [[3]]  # of held-out rows


def test_a_row_alone_has_no_kl(make):
    trainer = make()
    move(trainer.model, 0.3)
    trainer.model.train()
    loss: Tensor = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))
    expected = by_hand(trainer, [ROWS[0], ROWS[1]], [[], []])
    assert trainer._metrics["train"]["kl"] == [0.0]
    reward = trainer._metrics["train"]["rewards/chosen"][0]
    assert reward == pytest.approx(expected["rewards/chosen"], rel=1e-4)
    assert loss.item() == pytest.approx(GOOD * (1 - 1 / (1 + math.exp(-reward))), rel=1e-4)


# What is refused, and what a recipe leaves to the rows


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(recipes.load("tiny-kto", []))


def job(reader: Reader, *settings: str) -> Job:
    recipe = recipes.load("tiny-kto", [f"stages.kto.{setting}" for setting in settings])
    return Job(recipe, "kto", recipe.run, reader)


def test_weights_are_those_of_the_rows_unless_the_recipe_has_its_own(reader):
    args = stages.BY_KIND["kto"].prepare(job(reader)).args
    assert (args.desirable_weight, args.undesirable_weight) == (2.3803, 1.0)
    args = stages.BY_KIND["kto"].prepare(job(reader, "trainer.undesirable_weight=0.5")).args
    assert (args.desirable_weight, args.undesirable_weight) == (1.1901, 0.5)


def test_a_batch_of_one_is_refused_with_the_reason_unless_the_loss_has_no_kl(reader):
    with pytest.raises(InputError, match="a batch of 1 leaves KTO nothing to compare with") as error:
        stages.BY_KIND["kto"].prepare(job(reader, "trainer.per_device_train_batch_size=1"))
    assert error.value.place == "stages.kto.trainer.per_device_train_batch_size" and error.value.hint
    alone = job(reader, "trainer.per_device_train_batch_size=1", "trainer.loss_type=apo_zero_unpaired")
    try_trainer(alone, stages.BY_KIND["kto"].prepare(alone))


def test_replies_of_one_kind_are_refused(reader, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a", "thumb": true}\n' * 3)
    with pytest.raises(InputError, match="all 3 replies are good, and KTO learns from both kinds") as error:
        stages.BY_KIND["kto"].prepare(job(reader, f"data={tmp_path / 'rows.jsonl'}"))
    assert error.value.place == "stages.kto.data" and "`sft` learns" in error.value.hint
