"""Artifacts are what PEFT itself loads, fit their base or are refused, and keep their exact weights."""

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer

from rlhf_pipeline.models import adapters, base

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def causal_lm(spec):
    return AutoModelForCausalLM.from_pretrained(spec.path).requires_grad_(False).eval()


def classifier(spec):
    return AutoModelForSequenceClassification.from_pretrained(spec.path, num_labels=1).requires_grad_(False).eval()


def relative_difference(one, other):
    return float((one - other).norm() / other.norm())


class TestSaveAdapter:
    @torch.no_grad()
    @pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
    def test_policy_artifact_loads_with_peft_alone(self, make_artifacts, tokenizer, randomise, batch, tmp_path, shape):
        """PEFT's own loader gives the model that was saved, and the folder has the tokenizer."""
        spec = make_artifacts(shape).spec
        model = adapters.with_policy_adapter(causal_lm(spec), LORA, None)
        fresh = model(**batch).logits
        randomise(model)
        adapters.save_adapter(model, "default", tmp_path / "adapter", tokenizer)
        loaded = PeftModel.from_pretrained(causal_lm(spec), str(tmp_path / "adapter"))
        assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
        assert not torch.allclose(loaded(**batch).logits, fresh, atol=1e-2)
        assert type(tokenizer).from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()

    @torch.no_grad()
    @pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
    def test_reward_artifact_loads_with_peft_alone(self, make_artifacts, tokenizer, randomise, batch, tmp_path, shape):
        """The head travels with the adapter: over a freshly drawn head, PEFT still gives the same scores."""
        spec = make_artifacts(shape).spec
        model = adapters.with_reward_adapter(classifier(spec), LORA, None)
        randomise(model)
        adapters.save_adapter(model, "default", tmp_path / "adapter", tokenizer)
        assert any("score" in name for name in load_file(tmp_path / "adapter" / adapters.WEIGHTS))
        loaded = PeftModel.from_pretrained(classifier(spec), str(tmp_path / "adapter"))
        assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)

    def test_saving_leaves_the_model_trainable(self, make_artifacts, tokenizer, tmp_path):
        """The artifact says it is for inference; the adapter in memory is not changed by that."""
        model = adapters.with_policy_adapter(causal_lm(make_artifacts().spec), LORA, None)
        adapters.save_adapter(model, "default", tmp_path / "adapter", tokenizer)
        assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).inference_mode
        assert not model.peft_config["default"].inference_mode

    def test_artifact_holds_no_base_weights(self, make_artifacts):
        """An artifact is small: LoRA weights, and one head in the reward stage's."""
        artifacts = make_artifacts()
        assert all("lora_" in name for name in load_file(artifacts.init / adapters.WEIGHTS))
        others = [name for name in load_file(artifacts.reward / adapters.WEIGHTS) if "lora_" not in name]
        assert len(others) == 1


class TestContinuing:
    @torch.no_grad()
    def test_policy_starts_as_a_trainable_copy_of_init(self, make_artifacts, batch):
        """Of the same shape, it is the same to the bit."""
        artifacts = make_artifacts(ranks=(4, 8))
        model = adapters.with_policy_adapter(causal_lm(artifacts.spec), LORA, artifacts.init).eval()
        expected = PeftModel.from_pretrained(causal_lm(artifacts.spec), str(artifacts.init))
        assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=0)
        assert all(p.requires_grad for p in adapters.adapter_parameters(model, "default").values())

    @torch.no_grad()
    @pytest.mark.parametrize(
        "larger",
        [
            {"r": 8},
            {"r": 7, "lora_alpha": 3},
            {"lora_alpha": 5},
            {"r": 6, "use_rslora": True},
            {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        ],
        ids=str,
    )
    def test_a_larger_adapter_begins_as_the_same_function(self, make_artifacts, batch, larger):
        """Another rank or scaling than those of the artifact changes nothing at first, and all of it can be trained."""
        artifacts = make_artifacts(ranks=(4, 8))
        model = adapters.with_policy_adapter(causal_lm(artifacts.spec), LORA | larger, artifacts.init).eval()
        expected = PeftModel.from_pretrained(causal_lm(artifacts.spec), str(artifacts.init))
        assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-5, atol=1e-5)
        for name, parameter in adapters.adapter_parameters(model, "default").items():
            rank = parameter.shape[0] if "lora_A" in name else parameter.shape[1]
            assert rank == (9 if "q_proj" in name and "rank_pattern" in larger else larger.get("r", 4))
            if "lora_A" in name:  # a row of zeros on both sides would never learn
                assert (parameter.abs().sum(1) > 0).all()

    @torch.no_grad()
    def test_more_modules_than_the_artifact_has_begin_as_no_change(self, make_artifacts, tokenizer, batch, tmp_path):
        spec = make_artifacts().spec
        small = adapters.with_policy_adapter(causal_lm(spec), LORA | {"target_modules": ["q_proj"]}, None).eval()
        for name, parameter in adapters.adapter_parameters(small, "default").items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        adapters.save_adapter(small, "default", tmp_path / "small", tokenizer)
        model = adapters.with_policy_adapter(causal_lm(spec), LORA, tmp_path / "small").eval()
        assert_close(model(**batch).logits, small(**batch).logits, rtol=1e-5, atol=1e-5)
        assert len(adapters.adapter_parameters(model, "default")) > len(adapters.adapter_parameters(small, "default"))

    def test_reward_starts_from_the_policy_adapter_with_a_trainable_head(self, make_artifacts):
        """The reward stage takes over the LoRA weights of an SFT artifact, bit by bit, and adds a head."""
        artifacts = make_artifacts()
        model = adapters.with_reward_adapter(classifier(artifacts.spec), LORA, artifacts.init)
        saved = load_file(artifacts.init / adapters.WEIGHTS)
        ours = {name.replace(".default", ""): p for name, p in adapters.adapter_parameters(model, "default").items()}
        assert ours.keys() == saved.keys()
        assert all(torch.equal(ours[name], saved[name]) for name in saved)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        heads = trainable - set(adapters.adapter_parameters(model, "default"))
        assert len(heads) == 1
        assert "score" in heads.pop()

    def test_first_rewards_have_about_unit_variance(self, make_artifacts):
        """The head is drawn with variance 1/(d+1): over normalized features of width d that gives about 1."""
        spec = make_artifacts().spec
        torch.manual_seed(0)
        heads = []
        for _ in range(20):
            model = classifier(spec)
            adapters.with_reward_adapter(model, LORA, None)
            heads.append(next(p for name, p in model.named_parameters() if "score.modules_to_save" in name))
        variance = torch.cat(heads).var() * (heads[0].shape[1] + 1)
        assert 0.75 < variance < 1.25  # five standard errors of 640 draws


# What differs between two adapters, `all-linear` and of rank 4 where nothing is said: before, after.
LARGER = {
    "from rank-stabilized": ({"use_rslora": True}, {"r": 8}),
    "within rank-stabilized": ({"use_rslora": True}, {"use_rslora": True, "r": 9}),
    "a layer": ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, {"r": 6}),
    "patterns before": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}}, {"r": 6}),
    "patterns after": ({}, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}}),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]},
                     {"target_modules": ["embed_tokens", "q_proj"], "r": 7, "lora_alpha": 5}),
    "magnitudes": ({"use_dora": True}, {"use_dora": True, "r": 8, "lora_alpha": 5}),
    "biases": ({"lora_bias": True}, {"lora_bias": True, "r": 8, "lora_alpha": 5}),
}  # fmt: skip


@pytest.fixture
def make_artifact(make_artifacts, tokenizer, tmp_path):
    """A function that makes a policy artifact whose every LoRA weight has an effect, and returns its folder."""

    @torch.no_grad()
    def make(changes, shape="llama"):
        torch.manual_seed(3)
        model = adapters.with_policy_adapter(causal_lm(make_artifacts(shape).spec), LORA | changes, None)
        for name, parameter in adapters.adapter_parameters(model, "default").items():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.2)
        adapters.save_adapter(model, "default", tmp_path / "adapter", tokenizer)
        return tmp_path / "adapter"

    return make


class TestGrowing:
    @torch.no_grad()
    @pytest.mark.parametrize("change", LARGER)
    def test_logits_stay_whatever_grows_and_however_it_is_scaled(self, make_artifacts, make_artifact, batch, change):
        """They are those of the artifact under PEFT's own loader, but for the rounding of scaled float32 weights."""
        before, after = LARGER[change]
        artifact, spec = make_artifact(before), make_artifacts().spec
        model = adapters.with_policy_adapter(causal_lm(spec).double(), LORA | after, artifact).eval()
        expected = PeftModel.from_pretrained(causal_lm(spec).double(), str(artifact))(**batch).logits
        assert relative_difference(model(**batch).logits, expected) < 1e-6
        assert relative_difference(causal_lm(spec).double()(**batch).logits, expected) > 0.05

    @torch.no_grad()
    def test_layers_stored_the_other_way_round(self, make_artifacts, make_artifact, batch):
        """GPT-2 transposes its weights; its adapters grow like any other."""
        artifact, spec = make_artifact({}, "gpt2"), make_artifacts("gpt2").spec
        model = adapters.with_policy_adapter(causal_lm(spec).double(), LORA | {"r": 6, "lora_alpha": 5}, artifact)
        expected = PeftModel.from_pretrained(causal_lm(spec).double(), str(artifact))(**batch).logits
        assert relative_difference(model.eval()(**batch).logits, expected) < 1e-6

    @torch.no_grad()
    def test_a_larger_reward_adapter_starts_on_the_policys_hidden_states(self, make_artifacts, make_artifact, batch):
        """The backbone under a reward adapter of its own size computes what it did under the SFT adapter."""
        artifact, spec = make_artifact({}), make_artifacts().spec
        model = adapters.with_reward_adapter(classifier(spec).double(), LORA | {"r": 6, "lora_alpha": 5}, artifact)
        expected = PeftModel.from_pretrained(causal_lm(spec).double(), str(artifact))
        ours, theirs = (one.base_model.model.base_model(**batch).last_hidden_state for one in (model, expected))
        assert relative_difference(ours, theirs) < 1e-6

    def test_new_ranks_and_modules_can_learn(self, make_artifacts, make_artifact, batch):
        """What changes nothing yet gets a gradient: of two factors only the second is zero."""
        artifact = make_artifact({"target_modules": ["q_proj"]})
        model = adapters.with_policy_adapter(causal_lm(make_artifacts().spec), LORA | {"r": 6}, artifact)
        model(**batch).logits.square().mean().backward()
        for name, parameter in adapters.adapter_parameters(model, "default").items():
            if "lora_B" in name:
                new = slice(4, None) if "q_proj" in name else slice(None)
                assert (parameter[:, new] == 0).all()
                assert (parameter.grad[:, new] != 0).any(), name

    @pytest.mark.parametrize("change", [{}, {"lora_alpha": 7, "r": 3}, {"use_rslora": True, "r": 3}, {"use_dora": True},
                                        {"target_modules": ["embed_tokens"]}, {"lora_bias": True}])  # fmt: skip
    def test_an_adapter_of_the_same_size_is_copied_bit_by_bit(self, make_artifacts, make_artifact, change):
        """Nothing is rounded on the way where nothing has to change."""
        artifact = make_artifact(change)
        model = adapters.with_policy_adapter(causal_lm(make_artifacts().spec), LORA | change, artifact)
        saved, ours = load_file(artifact / adapters.WEIGHTS), get_peft_model_state_dict(model)
        names = {name for name in saved if "lora_" in name}
        assert names == {name for name in ours if "lora_" in name}
        assert all(torch.equal(ours[name], saved[name]) for name in names)


class TestLoadWeights:
    def test_another_rank_is_refused(self, make_artifacts):
        """Weights of rank 8 do not go into an adapter of rank 4."""
        artifacts = make_artifacts(ranks=(4, 8))
        model = adapters.with_policy_adapter(causal_lm(artifacts.spec), LORA, None)
        with pytest.raises(ValueError, match=r"rank 4 at `model\.layers\.0.*` is less than 8"):
            adapters.load_weights(model, artifacts.reward, "default")

    def test_another_width_is_refused(self, make_artifacts):
        """The same names over a wider base are no larger adapter."""
        artifacts = make_artifacts()
        config = AutoConfig.from_pretrained(artifacts.spec.path)
        config.intermediate_size *= 2
        model = adapters.with_policy_adapter(AutoModelForCausalLM.from_config(config), LORA, None)
        with pytest.raises(ValueError, match="down_proj` have another size"):
            adapters.load_weights(model, artifacts.init, "default")

    def test_another_architecture_is_refused(self, make_artifacts):
        """An adapter over GPT-2 does not fit a Llama."""
        model = adapters.with_policy_adapter(causal_lm(make_artifacts("llama").spec), LORA, None)
        with pytest.raises(ValueError, match="no place for the weights of `transformer"):
            adapters.load_weights(model, make_artifacts("gpt2").init, "default")

    def test_other_target_modules_are_refused(self, make_artifacts):
        """An artifact with more weights than the adapter has is not loaded in part."""
        artifacts = make_artifacts()
        model = adapters.with_policy_adapter(causal_lm(artifacts.spec), LORA | {"target_modules": ["q_proj"]}, None)
        before = {name: p.clone() for name, p in adapters.adapter_parameters(model, "default").items()}
        with pytest.raises(ValueError, match="no place for the weights of `model"):
            adapters.load_weights(model, artifacts.init, "default")
        assert all(torch.equal(p, before[name]) for name, p in adapters.adapter_parameters(model, "default").items())

    def test_head_is_left_alone(self, make_artifacts):
        """Loading LoRA weights into a reward model keeps its own head."""
        artifacts = make_artifacts(ranks=(4, 4))
        model = adapters.with_reward_adapter(classifier(artifacts.spec), LORA, None)
        name = next(name for name, _ in model.named_parameters() if "score.modules_to_save" in name)
        before = model.get_parameter(name).clone()
        adapters.load_weights(model, artifacts.reward, "default")
        assert torch.equal(model.get_parameter(name), before)


class TestOurNames:
    """An artifact's weights where the backbone sits elsewhere."""

    def shapes(self, *modules: str, rank: int = 4, width: int = 8) -> dict[str, torch.Size]:
        return {
            f"base_model.model.{module}.lora_{part}": torch.Size(size)
            for module in modules
            for part, size in (("A.weight", (rank, width)), ("B.weight", (width, rank)))
        }

    def test_one_beginning_is_exchanged_for_another(self):
        theirs = self.shapes("model.language_model.layers.0.q_proj", "model.language_model.layers.1.q_proj")
        ours = self.shapes("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.v_proj", rank=6)
        names = adapters.our_names(theirs, ours)
        assert names == {name: name.replace("language_model.", "") for name in theirs}
        assert adapters.misfit(theirs, ours) is None
        assert adapters.our_names(self.shapes("model.layers.0.q_proj"), theirs) == {
            name: name.replace("model.layers", "model.language_model.layers")
            for name in self.shapes("model.layers.0.q_proj")
        }

    def test_sizes_tell_two_places_apart(self):
        """A vision model may have layers of the same names."""
        theirs = self.shapes("model.layers.0.q_proj")
        vision = self.shapes("model.vision.layers.0.q_proj", width=6)
        names = adapters.our_names(theirs, vision | self.shapes("model.language_model.layers.0.q_proj"))
        assert set(names.values()) == set(self.shapes("model.language_model.layers.0.q_proj"))

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (["model.layers.5.q_proj"], ["model.layers.0.q_proj"]),  # another layer
            (["model.layers.0.q_proj"], ["model.q_proj"]),  # no layer
            (["model.layers.0.q_proj"], ["model.a.layers.0.q_proj", "model.b.layers.0.q_proj"]),  # one of two
            (["model.text.layers.0.q_proj", "model.text.layers.0.o_proj"], ["model.layers.0.q_proj"]),  # too few
            (["transformer.h.0.c_attn"], ["model.layers.0.q_proj"]),  # another architecture
        ],
    )
    def test_nothing_is_guessed(self, theirs, ours):
        theirs, ours = self.shapes(*theirs), self.shapes(*ours)
        assert adapters.our_names(theirs, ours) == {name: name for name in theirs}
        assert "no place for the weights" in adapters.misfit(theirs, ours)


class TestHead:
    @pytest.mark.parametrize("shape", ["llama", "gpt2"])
    def test_loaded_head_is_the_saved_one(self, make_artifacts, shape):
        """`load_head` gives the numbers PEFT restores, in float32 and frozen."""
        artifacts = make_artifacts(shape)
        head = adapters.load_head(artifacts.reward)
        model = PeftModel.from_pretrained(classifier(artifacts.spec), str(artifacts.reward))
        restored = next(p for name, p in model.named_parameters() if "score.modules_to_save" in name)
        assert torch.equal(head.weight, restored)
        assert head.weight.dtype == torch.float32
        assert head.bias is None
        assert not head.weight.requires_grad


class TestExactAdapters:
    def test_cast_is_undone_exactly(self, make_artifacts):
        """After a cast to bfloat16 inside, every trainable weight is the float32 number it was."""
        artifacts = make_artifacts()
        model = adapters.with_reward_adapter(classifier(artifacts.spec), LORA, artifacts.init)
        before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        with adapters.exact_adapters(model):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
            assert any((model.get_parameter(name) != was).any() for name, was in before.items())  # rounded
        for name, was in before.items():
            assert model.get_parameter(name).dtype == torch.float32
            assert torch.equal(model.get_parameter(name), was)

    def test_dpo_trainer_on_a_quantized_base_keeps_float32(self, make_artifacts, tokenizer, tmp_path):
        """TRL's own cast, which its DPO trainer makes for QLoRA, does not reach the weights that train."""
        artifacts = make_artifacts("llama", "nf4")
        model = adapters.with_policy_adapter(base.load_base(artifacts.spec, tokenizer), LORA, artifacts.init)
        before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        rows = Dataset.from_list([{"prompt": "Q:", "chosen": " yes", "rejected": " no"}])
        args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        with adapters.exact_adapters(model):
            DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
        for name, was in before.items():
            assert model.get_parameter(name).dtype == torch.float32
            assert torch.equal(model.get_parameter(name), was)


class TestAdapterParameters:
    def test_names_that_contain_each_other_stay_apart(self, make_artifacts):
        """`ref` and `reference` are two adapters."""
        model = adapters.with_policy_adapter(causal_lm(make_artifacts().spec), LORA, None)
        model.add_adapter("ref", adapters.lora_config(LORA, None))
        model.add_adapter("reference", adapters.lora_config(LORA, None))
        names = [set(adapters.adapter_parameters(model, name)) for name in ("default", "ref", "reference")]
        assert all(names)
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
        assert set().union(*names) == {name for name, _ in model.named_parameters() if "lora_" in name}
