"""A reply ends with the same token for SFT, reward model, PPO and DPO, whatever the tokenizer."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_pipeline import recipe, stages
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import end_of_turn, has_default_template, load_tokenizer
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.stages.job import Inputs, Job

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
TEXT = "which colour has a lemon ? it is yellow . no idea be brief User Assistant System : <|user|> <|assistant|>"
# Ends every turn with a token of its own, as ChatML does, which is not the EOS.
CHATML = """\
{%- for message in messages %}{{ '<start>' + message['role'] + ' ' + message['content'] + '<stop>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}
"""
USER = {"role": "user", "content": "which colour has a lemon ?"}
CHATS = {
    "prompt": [{"role": "system", "content": "be brief"}, USER],
    "chosen": "it is yellow .",
    "rejected": "no idea",
}
LONG_CHATS = CHATS | {"prompt": [USER, {"role": "assistant", "content": "no idea"}, USER]}
TEXTS = CHATS | {"prompt": "which colour has a lemon ? :"}


def save_model(folder: Path, specials: list[str], template: str | None, bos: str | None) -> Path:
    """A small model with a tokenizer of whole words."""
    vocabulary = {token: i for i, token in enumerate([*specials, *TEXT.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", bos_token=bos,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=vocabulary["<eos>"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoints):
    """Models by what is special about their tokenizers."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    return {
        "shipped": checkpoints["llama"],
        "BOS and no template": save_model(place / "bos", ["<unk>", "<pad>", "<bos>", "<eos>"], None, "<bos>"),
        "turns end otherwise": save_model(
            place / "chatml", ["<unk>", "<pad>", "<eos>", "<start>", "<stop>"], CHATML, None
        ),
    }


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A function that makes a recipe of four stages with the same data, and gives their jobs."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(model: Path, rows: list[dict]) -> dict[str, Job]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"path": "rows.jsonl"}
        one = {"per_device_train_batch_size": 1}
        content = {
            "model": {"path": str(model), "quantization": "none", "dtype": "float32"},
            "lora": LORA,
            "stages": {
                "sft": {"data": data},
                "reward": {"data": data},
                "ppo": {"data": data, "trainer": one | {"total_episodes": 1, "response_length": 4}},
                "dpo": {"data": data},
            },
        }
        (tmp_path / "r.yaml").write_text(json.dumps(content))
        loaded = recipe.load(str(tmp_path / "r.yaml"))
        return {name: Job(loaded, name, loaded.run) for name in loaded.stages}

    return make


def prepared(jobs: dict[str, Job]) -> dict[str, Inputs]:
    """What each stage's `prepare` gives."""
    return {name: stages.BY_KIND[name].prepare(job) for name, job in jobs.items()}


@pytest.mark.parametrize("rows", [[CHATS], [LONG_CHATS], [TEXTS]], ids=["chats", "many turns", "texts"])
@pytest.mark.parametrize("which", ["shipped", "BOS and no template", "turns end otherwise"])
def test_all_stages_end_a_reply_with_the_same_token(folders, jobs, tmp_path, which, rows):
    made = jobs(folders[which], rows)
    ready = prepared(made)
    tokenizer = ready["sft"].tokenizer
    sft, reward, dpo = (ready[name].data.train[0] for name in ("sft", "reward", "dpo"))

    # PPO as its trainer is set up: with this token a sampled reply ends, and is scored there.
    spec, folder = made["ppo"].recipe.model, tmp_path / "artifacts"
    policy = adapters.with_policy_adapter(load_base(spec, tokenizer), LORA, None)
    adapters.save_adapter(policy, "default", folder / "init", tokenizer)
    scorer = adapters.with_reward_adapter(load_base(spec, tokenizer, "score"), LORA, None)
    adapters.save_adapter(scorer, "default", folder / "reward", tokenizer)
    shared = SharedBase(load_base(spec, tokenizer), LORA, folder / "init", [(folder / "reward", LORA)])
    end = PPOTrainer(
        ready["ppo"].args,
        tokenizer,
        shared,
        Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer),
        train_dataset=ready["ppo"].data.train,
    ).stop_token_id

    assert end is not None
    endings = {
        "sft": sft["labels"][-1],
        "sft, as it is read": sft["input_ids"][-1],
        "reward, chosen": reward["chosen_ids"][-1],
        "reward, rejected": reward["rejected_ids"][-1],
        "dpo, chosen": dpo["chosen_ids"][-1],
        "dpo, rejected": dpo["rejected_ids"][-1],
    }
    assert endings == dict.fromkeys(endings, end)
    # It is there once, and what stands before the reply is the same for all.
    assert dpo["chosen_ids"].count(end) == dpo["rejected_ids"].count(end) == 1
    assert sft["input_ids"] == reward["chosen_ids"] == dpo["prompt_ids"] + dpo["chosen_ids"]
    assert reward["rejected_ids"] == dpo["prompt_ids"] + dpo["rejected_ids"]
    assert ready["ppo"].data.train[0]["input_ids"] == dpo["prompt_ids"]
    assert dpo["prompt_ids"][-1] != end


@pytest.mark.parametrize("rows", [[CHATS], [TEXTS]], ids=["chats", "texts"])
def test_a_bos_stands_once_at_the_beginning(folders, jobs, rows):
    """By the tokenizer's hand before text, and by the template's before turns."""
    _, tokenizer, data, _ = stages.BY_KIND["sft"].prepare(jobs(folders["BOS and no template"], rows)["sft"])
    ids = data.train[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_tokenizers_differ_in_what_matters(folders):
    """Else the tests above would show less than they seem to."""
    loaded = {name: load_tokenizer(str(folder)) for name, folder in folders.items()}
    assert [name for name, one in loaded.items() if has_default_template(one)] == ["BOS and no template"]
    assert loaded["BOS and no template"]("a")["input_ids"][0] == loaded["BOS and no template"].bos_token_id
    assert {name: end_of_turn(one) == one.eos_token for name, one in loaded.items()} == {
        "shipped": True,
        "BOS and no template": True,
        "turns end otherwise": False,
    }
