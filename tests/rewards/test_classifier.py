"""Classifiers as rewards: what they read, that padding changes nothing, and which are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

from rlhf_pipeline.data.encode import row_of
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards import classifier
from rlhf_pipeline.rewards.batch import Batch
from rlhf_pipeline.rewards.classifier import Classifier, ClassifierError, check, encoded, shortened
from rlhf_pipeline.rewards.mixture import Part, Rewards

WORDS = re.findall(r"\w+", "what color is a lemon it yellow who are you i am an apple red green of the sky and blue")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
HEADS = {"llama": "score.weight", "bert": "classifier.weight"}
TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"


def make(folder: Path, kind: str, labels: int = 1, template: str | None = None, **settings: Any) -> Path:
    """A small classifier with random weights: `llama` with the tiny model's tokenizer, else with one of BERT's."""
    torch.manual_seed(1)
    if kind == "llama":
        tokenizer: Any = AutoTokenizer.from_pretrained(TINY / "checkpoint")
    else:
        special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*special, *WORDS])})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        kind,
        **SIZES | {"vocab_size": len(tokenizer), "num_labels": labels, "initializer_range": 0.5} | settings,
    )
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def spec_of(folder: Path, quantization: Any = "none") -> Model:
    spec = Model(path=str(folder), quantization=quantization, dtype="float32")
    spec._key = "stages.ppo.rewards.1.model"
    return spec


def batch_of(*pairs: tuple[str, str], chat: bool = False) -> Batch:
    prompts: list[Any] = [prompt for prompt, _ in pairs]
    replies: list[Any] = [reply for _, reply in pairs]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        replies = [[{"role": "assistant", "content": reply}] for reply in replies]
    return Batch(prompts, replies, [[1]] * len(pairs), {}, 0)


PAIRS = [
    ("what color is a lemon", " it is yellow"),
    ("who are you", " i am a lemon"),
    ("what", " red"),
    ("what color is the sky and what color is an apple and who are you", " the sky is blue and an apple is red"),
    ("is a lemon red", " a lemon is yellow"),
    ("a", " a"),
    ("what color is an apple", " red and green"),
    ("who", " i am an apple and you are a lemon of the sky"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("classifiers")
    return {
        "llama": make(out / "llama", "llama"),
        "llama of chats": make(out / "chats", "llama", template=TEMPLATE),
        "bert": make(out / "bert", "bert"),
        "roberta": make(out / "roberta", "roberta", max_position_embeddings=26),
    }


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama of chats", "bert", "roberta"])
def test_one_by_one_is_as_all_at_once(folders: dict[str, Path], kind: str, chat: bool) -> None:
    reward = Classifier(spec_of(folders[kind]))
    together = reward(batch_of(*PAIRS, chat=chat))
    alone = [reward(batch_of(pair, chat=chat))[0] for pair in PAIRS]
    divided = reward(batch_of(*PAIRS, chat=chat), at_once=3)
    assert together == pytest.approx(alone, abs=1e-4) == divided
    assert torch.tensor(together).std() > 0.05
    assert not any(weight.requires_grad for weight in reward.model.parameters()) and not reward.model.training


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_its_score_is_the_models_own_number(folders: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    model = AutoModelForSequenceClassification.from_pretrained(folders[kind]).eval()
    texts = [tokenizer(prompt + reply, return_tensors="pt") for prompt, reply in PAIRS]
    expected = [model(**text).logits.item() for text in texts]
    assert Classifier(spec_of(folders[kind]))(batch_of(*PAIRS)) == pytest.approx(expected, abs=1e-4)


def test_padding_that_is_the_end_of_a_text_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """Many decoders have no pad token; Transformers then takes the last token that is not EOS."""
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        content = {key: value for key, value in content.items() if key not in ("pad_token", "pad_token_id")}
        (folder / name).write_text(json.dumps(content))
    reward = Classifier(spec_of(folder))
    assert reward.tokenizer.pad_token == reward.tokenizer.eos_token
    together = reward(batch_of(*PAIRS))
    assert together == pytest.approx([reward(batch_of(pair))[0] for pair in PAIRS], abs=1e-4)


def test_a_chat_template_is_its_own_and_text_is_a_users_turn(folders: dict[str, Path]) -> None:
    tokenizer = classifier.load_tokenizer(spec_of(folders["llama of chats"]), AutoConfig.for_model("llama"))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]
    reply = [{"role": "assistant", "content": "i"}]
    written = "<system>be brief\n<user>who\n<assistant>i\n"
    assert tokenizer.decode(encoded(tokenizer, turns, reply)) == written
    assert tokenizer.decode(encoded(tokenizer, "who", " i")) == "<user>who\n<assistant>i\n"


def test_a_chat_template_alone_writes_special_tokens(tmp_path: Path) -> None:
    tokenizer = classifier.load_tokenizer(
        spec_of(make(tmp_path, "bert", template="{{ cls_token }} " + TEMPLATE)), AutoConfig.for_model("bert")
    )
    ids = encoded(tokenizer, "who", "i")
    assert ids.count(tokenizer.cls_token_id) == 1 and tokenizer.sep_token_id not in ids


def test_without_a_chat_template_it_reads_prompt_and_reply(folders: dict[str, Path]) -> None:
    tokenizer = classifier.load_tokenizer(spec_of(folders["bert"]), AutoConfig.for_model("bert"))
    for prompt, reply in (("who", " i am"), ([{"role": "user", "content": "who"}], [{"role": "x", "content": "i am"}])):
        assert tokenizer.decode(encoded(tokenizer, prompt, reply)) == "[CLS] who i am [SEP]"


def test_the_day_in_a_chat_template_is_fixed(tmp_path: Path) -> None:
    """Else the same reply would have another score tomorrow."""
    template = "{{ strftime_now('%Y') }} " + TEMPLATE
    tokenizer = classifier.load_tokenizer(
        spec_of(make(tmp_path, "llama", template=template)), AutoConfig.for_model("llama")
    )
    assert tokenizer.decode(encoded(tokenizer, "who", "i")).startswith("2024 ")


def test_what_is_too_long_lacks_the_beginning_of_the_prompt(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """RoBERTa's table of 26 positions is for 24 tokens: the first two are the padding's, and what is before it."""
    reward = Classifier(spec_of(folders["roberta"]))
    assert reward.longest == 24
    begin = "red green blue "
    ends = ("what color is a lemon " * 3 + "who are you", " i am a lemon")  # 24 tokens with [CLS] and [SEP]
    longer, exact = (begin * 9 + ends[0], ends[1]), ends
    ids = encoded(reward.tokenizer, *exact)
    assert len(ids) <= reward.longest < len(encoded(reward.tokenizer, *longer))
    cut = shortened(encoded(reward.tokenizer, *longer), reward.longest, reward.tokenizer)
    assert len(cut) == reward.longest and cut[0] == reward.tokenizer.cls_token_id and cut[-len(ids) + 1 :] == ids[1:]
    for _ in range(2):
        scores = reward(batch_of(longer, PAIRS[2]))
    assert scores[1] == pytest.approx(reward(batch_of(PAIRS[2]))[0], abs=1e-4)
    assert capsys.readouterr().out.count("the beginning of the prompt is left out") == 1


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_is_quantized_as_the_base_but_for_its_head(folders: dict[str, Path], kind: str) -> None:
    """It scores as one whose backbone alone has the weights that 4 bits leave."""
    whole, packed = Classifier(spec_of(folders[kind])), Classifier(spec_of(folders[kind], "nf4"))
    assert whole(batch_of(*PAIRS)) != pytest.approx(packed(batch_of(*PAIRS)), abs=1e-2)
    rounded = 0
    for name, module in packed.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.model.get_submodule(name).weight.data = weight
            rounded += 1
    head = whole.model.score if kind == "llama" else whole.model.classifier
    assert rounded > 10 and head.weight.shape == (1, 32)
    assert torch.equal(head.weight, load_file(folders[kind] / "model.safetensors")[HEADS[kind]])
    assert whole(batch_of(*PAIRS)) == pytest.approx(packed(batch_of(*PAIRS)), abs=1e-4)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def of_two(out: Path) -> Path:
    return make(out, "llama", labels=2)


def causal(out: Path) -> Path:
    return Path(shutil.copytree(TINY / "checkpoint", out, dirs_exist_ok=True))


def causal_said_to_be_one(out: Path) -> Path:
    folder = make(out, "llama")
    model = AutoModelForCausalLM.from_pretrained(TINY / "checkpoint")
    AutoModelForSequenceClassification.from_config(model.config)  # so that its configuration fits
    config = model.config.to_dict() | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    shutil.copy(TINY / "checkpoint" / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0"}}))
    return folder


def without_head(out: Path) -> Path:
    return changed(make(out, "bert"), lambda weights: weights.pop("classifier.weight"))


def with_more(out: Path) -> Path:
    return changed(make(out, "llama"), lambda weights: weights.update(value=torch.zeros(3)))


def of_code(out: Path) -> Path:
    folder = make(out, "llama")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "a.py").write_text("raise SystemExit('it was run')")
    return folder


def of_another_tokenizer(out: Path) -> Path:
    return make(out, "llama", vocab_size=40)


def without_tokenizer(out: Path) -> Path:
    folder = make(out, "llama")
    for file in folder.glob("token*"):
        file.unlink()
    return folder


def with_a_template_that_refuses(out: Path) -> Path:
    return make(out, "llama", template="{{ raise_exception('no users here') }}")


@pytest.mark.parametrize(
    ("made", "message", "hint"),
    [
        (of_two, "it has 2 labels (LABEL_0, LABEL_1), and a reward is one number", "`function`"),
        (causal, "a LlamaForCausalLM is no sequence classifier", "ForSequenceClassification"),
        (
            causal_said_to_be_one,
            "the checkpoint is not that of a LlamaForSequenceClassification: it lacks `score.weight`, which would be "
            "drawn at random",
            "of one model",
        ),
        (
            without_head,
            "the checkpoint is not that of a BertForSequenceClassification: it lacks `classifier.weight`, which would "
            "be drawn at random",
            "of one model",
        ),
        (
            with_more,
            "the checkpoint is not that of a LlamaForSequenceClassification: it has `value`, for which the model has "
            "no place",
            "of one model",
        ),
        (
            of_code,
            "this model needs Python code that comes with it, and only that of the recipe's `model` may be run",
            "a class for",
        ),
        (of_another_tokenizer, "`", "another model's"),
        (without_tokenizer, "no tokenizer could be loaded: ", "tokenizer files"),
        (
            with_a_template_that_refuses,
            "it cannot read a prompt of `data`: the chat template cannot render this conversation: no users here",
            "chat template",
        ),
    ],
)
def test_what_cannot_score_is_refused_before_anything_trains(
    tmp_path: Path, made: Callable[[Path], Path], message: str, hint: str
) -> None:
    spec = spec_of(made(tmp_path))
    with pytest.raises(InputError) as caught:
        check(spec, ["who are you", "what color is a lemon"])
    assert caught.value.message.startswith(message)
    assert caught.value.place == spec.place == f"stages.ppo.rewards.1.model: {tmp_path}"
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["llama", "llama of chats", "bert", "roberta"])
def test_a_sound_one_passes(folders: dict[str, Path], kind: str) -> None:
    check(spec_of(folders[kind]), ["who are you", [{"role": "user", "content": "what color is a lemon"}]])


def test_weights_that_are_not_finite_are_refused_when_it_is_loaded(tmp_path: Path) -> None:
    folder = changed(make(tmp_path, "llama"), lambda weights: weights["score.weight"].fill_(torch.nan))
    with pytest.raises(InputError, match="computes numbers that are not finite"):
        Classifier(spec_of(folder))


def test_a_score_that_is_not_finite_ends_training_with_a_sentence(folders: dict[str, Path]) -> None:
    reward = Classifier(spec_of(folders["bert"]))
    with torch.no_grad():
        reward.model.get_input_embeddings().weight[reward.tokenizer.convert_tokens_to_ids("red")] = torch.nan
    with pytest.raises(ClassifierError) as caught:
        reward(batch_of(*PAIRS[:3]))
    said = "gave nan for reply 3, to the prompt 'what': it computes numbers that are not finite"
    assert str(caught.value) == f"`{folders['bert']}` {said}"


def test_a_token_without_a_row_in_the_embedding_ends_training_with_a_sentence(tmp_path: Path) -> None:
    reward = Classifier(spec_of(make(tmp_path, "llama")))
    reward.model.config.vocab_size = 3
    with pytest.raises(ClassifierError, match=r"cannot read a reply: `.*` is token .* and the model has 3 tokens"):
        reward(batch_of(*PAIRS))


def test_it_is_one_of_the_sum(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "checkpoint")
    asked, said = tokenizer(["who are you", "what"])["input_ids"], tokenizer([" i am", " a lemon"])["input_ids"]
    lengths = [torch.tensor([len(ids) for ids in part]) for part in (asked, said)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(a + b) for a, b in zip(asked, said, strict=True)], True)
    episodes = Episodes(ids, *lengths, torch.tensor([True, True]), torch.zeros(2, int(lengths[1].max())))
    reward = Classifier(spec_of(folders["bert"]))
    rewards = Rewards([Part("safety", -2.0, reward)], tokenizer)
    assert rewards.need_rows
    rows = [row_of(prompt, {"prompt": prompt}) for prompt in ("who are you", "what")]
    found = rewards(episodes, rows, at_once=1)
    expected = reward(batch_of(("who are you", " i am"), ("what", " a lemon")))
    assert found.by_name["safety"].tolist() == pytest.approx(expected, abs=1e-4)
    assert found.total.tolist() == pytest.approx([-2 * one for one in expected], abs=1e-3)
