"""Every causal LM gives a reward model; its scores are those that PPO reads, and those of Transformers' own class."""

import copy

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    dynamic_module_utils,
)

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.score_head import ScoreHead, backbone_name, with_score_head
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.smoke import shrink
from rlhf_pipeline.use.score import score_tokens
from rlhf_pipeline.use.weights import write_adapter, write_merged

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ROWS = [([7, 8, 9], [20, 21, 22, 23, 1]), ([7, 8, 9], [30, 1])]  # prompts and replies, as tokens
# Transformers has no sequence classifier for the first three; the last five are composite.
ARCHITECTURES = ["granite", "cohere2", "llama4", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4"]


@pytest.fixture(scope="module")
def make_base(tmp_path_factory, tokenizer):
    """A function that writes a small checkpoint of an architecture as its makers would publish it."""
    made: dict[str, Model] = {}

    def make(architecture: str) -> Model:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            config = AutoConfig.for_model(architecture)
            if architecture != "gemma4":  # which reads the number in every forward pass
                config.pad_token_id = config.get_text_config().pad_token_id = None
            config.save_pretrained(folder / "large")
            tokenizer.save_pretrained(folder / "large")
            shrink.shrink(Model(path=str(folder / "large")), folder / "base")
            assert type(AutoConfig.from_pretrained(folder / "base")) is type(config)  # composite if it was
            made[architecture] = Model(path=str(folder / "base"), quantization="none", dtype="float32")
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def make_reward(make_base, randomise, tmp_path_factory):
    """A function that makes a reward model that starts from an SFT adapter, and both of their artifacts."""
    made = {}

    def make(architecture: str):
        if architecture not in made:
            spec, folder = make_base(architecture), tmp_path_factory.mktemp("artifacts")
            words = load_tokenizer(spec)
            torch.manual_seed(0)
            policy = adapters.with_policy_adapter(base.load_base(spec, words), LORA, None)
            randomise(policy)
            adapters.save_adapter(policy, "default", folder / "sft", words)
            reward = adapters.with_reward_adapter(base.load_base(spec, words, "score"), LORA, folder / "sft")
            adapters.save_adapter(reward, "default", folder / "reward", words)
            made[architecture] = spec, words, reward.eval(), folder
        return made[architecture]

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_from_sft_scores_as_ppo_does(architecture, make_reward):
    """The reward stage's own model, on a padded batch, and PPO's view of the causal LM, under adapters of one name."""
    spec, words, reward, folder = make_reward(architecture)
    assert adapters.stored_shapes(folder / "reward") == adapters.stored_shapes(folder / "sft")
    rows = [prompt + reply for prompt, reply in ROWS]
    for side in ("left", "right"):
        batch = words.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            scores = reward(**batch).logits[:, 0]
        staged = StagedBase(spec, {"reward": folder / "reward"})
        expected = score_tokens(staged.reward("reward"), ROWS, words.pad_token_id)[0]
        assert expected.abs().max() > 0.05
        assert_close(scores, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_reward_adapter_over_the_class_of_transformers_is_read_and_written(make_base, randomise, tmp_path):
    """As earlier versions made them: there, the layers of a composite model have other names than in its causal LM."""
    spec = make_base("qwen3_5")
    words = load_tokenizer(spec)
    theirs = AutoModelForSequenceClassification.from_pretrained(spec.path, num_labels=1, dtype=torch.float32)
    theirs.config.get_text_config().pad_token_id = words.pad_token_id
    model = adapters.with_reward_adapter(theirs, LORA, None).eval()
    randomise(model)
    adapters.save_adapter(model, "default", tmp_path / "reward", words)
    assert all("language_model" in name for name in adapters.stored_shapes(tmp_path / "reward"))
    batch = words.pad({"input_ids": [prompt + reply for prompt, reply in ROWS]}, return_tensors="pt")
    expected = model(**batch).logits[:, 0]
    staged = StagedBase(spec, {"reward": tmp_path / "reward"})
    assert_close(score_tokens(staged.reward("reward"), ROWS, words.pad_token_id)[0], expected, rtol=0, atol=1e-5)
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    write_adapter(spec, tmp_path / "reward", tmp_path / "adapter", "score", {})
    write_merged(spec, tmp_path / "reward", tmp_path / "merged", "score", {})
    for loaded in (
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"),
    ):
        loaded.config.get_text_config().pad_token_id = words.pad_token_id
        assert_close(loaded.eval()(**batch).logits[:, 0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["granite", "qwen3_5", "qwen3_5_moe", "gemma3"])
def test_an_exported_reward_model_is_loaded_elsewhere(architecture, make_reward, tmp_path, monkeypatch):
    """By Transformers' own class where that has the same weights, else by the class that comes along, in batches."""
    monkeypatch.setattr(AutoModelForSequenceClassification._model_mapping, "_extra_content", {})
    spec, words, reward, folder = make_reward(architecture)
    batch = words.pad({"input_ids": [prompt + reply for prompt, reply in ROWS]}, return_tensors="pt")
    expected = reward(**batch).logits
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    write_adapter(spec, folder / "reward", tmp_path / "adapter", "score", {})
    write_merged(spec, folder / "reward", tmp_path / "merged", "score", {})
    own = architecture in ("granite", "qwen3_5_moe")
    assert [(tmp_path / name / "reward_model.py").exists() for name in ("adapter", "merged")] == [own, own]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", trust_remote_code=own)
    if own:
        code = dynamic_module_utils.get_class_from_dynamic_module("reward_model.RewardModel", str(tmp_path / "adapter"))
        adapter = PeftModel.from_pretrained(code.from_pretrained(spec.path), str(tmp_path / "adapter"))
    else:
        adapter = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
        adapter.config.get_text_config().pad_token_id = words.pad_token_id
    for loaded in (merged, adapter):
        assert_close(loaded.eval()(**batch).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen3_5_text", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_it_computes_what_the_class_of_transformers_does(architecture, mask, make_base):
    """Of the same weights, whether a mask or the padding token tells which token is the last."""
    model = base.load_base(make_base(architecture), load_tokenizer(make_base(architecture)), "score")
    theirs = AutoModelForSequenceClassification.from_config(copy.deepcopy(model.config)).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])
    inputs = {"input_ids": ids} | ({"attention_mask": (ids != 0).long()} if mask else {})
    assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert (model(**inputs).logits[0] - model(**inputs).logits[1]).abs() > 1e-3


def test_the_output_embedding_is_gone_and_the_head_is_as_wide_as_what_it_reads():
    """OPT's last hidden states may be narrower than those within; the head takes float32 over any backbone."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    model = with_score_head(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    assert isinstance(model, ScoreHead)
    assert [name for name, _ in model.named_children()] == ["model", "score"]
    assert (model.score.in_features, model.score.out_features, model.score.weight.dtype) == (16, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.tensor([[3, 4]])).logits.dtype == torch.float32


def test_one_that_was_saved_is_loaded_by_its_class(tmp_path):
    """All weights are those that were saved, and none is missing or left over."""
    config = GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = with_score_head(GraniteForCausalLM(config))
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_backbone_is_found_where_a_class_has_the_prefix_of_another():
    """Llama 4's causal LM has the prefix that it has within the composite model, and its backbone is `model`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink.smaller(AutoConfig.for_model("llama4_text")))
    assert model.base_model is model  # which is why the prefix does not tell
    assert backbone_name(model) == "model"
    with pytest.raises(ValueError, match="no backbone"):
        backbone_name(model.model)


def test_a_loaded_model_has_the_prefix_of_its_backbone(make_base):
    """TRL computes SFT's and DPO's losses from what that prefix names: of Llama 4 the causal LM itself, which fails."""
    spec = make_base("llama4")
    model = base.load_base(spec, load_tokenizer(spec))
    assert model.base_model is model.model


def test_nothing_but_adapter_and_head_is_trained_whatever_other_modules_are_called(tokenizer):
    """PEFT trains a classifier's modules called `classifier`: in LongCat-Flash the routers, which PPO does not read."""
    config = shrink.smaller(AutoConfig.for_model("longcat_flash"))
    config.vocab_size = len(tokenizer)
    causal = AutoModelForCausalLM.from_config(config)
    assert any(name.endswith(".classifier") for name, _ in causal.named_modules())
    model = adapters.with_reward_adapter(with_score_head(causal), {"r": 2, "target_modules": ["q_a_proj"]}, None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name in trained if "lora_" not in name}
    assert trained - others and others == {"base_model.model.score.modules_to_save.default.weight"}
    assert model.peft_config["default"].task_type == "SEQ_CLS"
