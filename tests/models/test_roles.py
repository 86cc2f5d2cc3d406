"""Four roles on one base behave as four separately loaded models, in what they say and in what they learn."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, RwkvConfig

from rlhf_pipeline.models import adapters, base, loading
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe.schema import Model

pytestmark = pytest.mark.slow

SHAPES = ["llama", "qwen3", "gpt2"]
ROLES = ["policy", "reference", "reward", "value"]
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
# What TRL's PPOTrainer samples with.
SAMPLING = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=1.0 + 1e-7, top_k=0, top_p=1.0)


def plain_policy(spec, adapter):
    """A base of its own under a policy adapter, by the libraries' own loaders."""
    quantization = loading.quantization_config(spec, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(spec.path, quantization_config=quantization)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def plain_reward(spec, adapter):
    """A sequence classifier of its own under a reward adapter, by the libraries' own loaders."""
    classifier = AutoModelForSequenceClassification.from_pretrained(
        spec.path, num_labels=1, quantization_config=loading.quantization_config(spec, torch.float32)
    )
    return PeftModel.from_pretrained(classifier, str(adapter)).eval()


def real(values, batch):
    """`values` at the tokens that are not padding."""
    return values[batch["attention_mask"].bool()]


def relative_difference(one, other):
    return float((one - other).norm() / other.norm())


def active_roles(shared):
    """The adapters that the LoRA layers would apply now."""
    return {tuple(layer.active_adapters) for layer in shared.layers}


def move(tensor):
    """Change a tensor's numbers in place; also one of 4-bit numbers, two to a byte."""
    with torch.no_grad():
        tensor += 1


@pytest.fixture
def shared(share, make_artifacts) -> SharedBase:
    return share(make_artifacts())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstSeparateModels:
    @torch.no_grad()
    def test_policy_and_reference_give_the_logits_of_the_init_adapter(
        self, share, make_artifacts, batch, shape, quantization
    ):
        """Both are the base under the init adapter, and that adapter matters."""
        artifacts = make_artifacts(shape, quantization)
        shared, plain = share(artifacts), plain_policy(artifacts.spec, artifacts.init)
        expected = plain(**batch).logits
        with plain.disable_adapter():
            assert relative_difference(plain(**batch).logits, expected) > 0.05
        for view in (shared.policy, shared.reference):
            assert_close(real(view(**batch).logits, batch), real(expected, batch), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_reward_and_value_give_the_scores_of_the_reward_model(
        self, share, make_artifacts, batch, shape, quantization
    ):
        """Reward and value score every token as the reward stage's own model does, and start equal."""
        artifacts = make_artifacts(shape, quantization)
        shared, plain = share(artifacts), plain_reward(artifacts.spec, artifacts.reward)
        classifier = plain.get_base_model()
        head = classifier.score
        expected = head(classifier.base_model(**batch).last_hidden_state)
        assert real(expected, batch).std() > 0.05
        assert_close(real(shared.reward(**batch), batch), real(expected, batch), rtol=1e-5, atol=1e-5)
        assert_close(shared.value(**batch), shared.reward(**batch), rtol=0, atol=0)

    @torch.no_grad()
    def test_ppo_reads_the_score_that_the_reward_model_gives(self, share, make_artifacts, batch, shape, quantization):
        """PPO and the classifier take the score at the same token: the last real one."""
        artifacts = make_artifacts(shape, quantization)
        shared, plain = share(artifacts), plain_reward(artifacts.spec, artifacts.reward)
        ids, mask = moved_right(batch)
        lengths, replies = mask.sum(1), torch.tensor([4, 3, 2])
        episodes = Episodes(ids, lengths - replies, replies, torch.ones(3, dtype=torch.bool), torch.zeros(3, 4))
        expected = plain(input_ids=ids, attention_mask=mask).logits.squeeze(1)
        assert lengths.tolist() == [10, 8, 5]
        assert_close(reply_scores(shared.reward, episodes), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_base_gives_float32_logits_and_scores(share, make_artifacts, batch):
    """TRL takes log-probabilities of these logits, and bfloat16 is too coarse for them."""
    artifacts = make_artifacts()
    shared = share(artifacts._replace(spec=artifacts.spec.model_copy(update={"dtype": "bfloat16"})))
    assert shared.causal_lm.dtype == torch.bfloat16
    assert {shared.policy(**batch).logits.dtype, shared.reference(**batch).logits.dtype} == {torch.float32}
    assert {shared.reward(**batch).dtype, shared.value(**batch).dtype} == {torch.float32}


def moved_right(batch):
    """Ids and attention mask of the batch with its padding on the right."""
    lengths = batch["attention_mask"].sum(1)
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    ids = torch.zeros_like(batch["input_ids"])
    ids[mask.bool()] = real(batch["input_ids"], batch)
    return ids, mask


@pytest.mark.parametrize("shape", [*SHAPES, "gemma2"])
class TestParts:
    @torch.no_grad()
    def test_states_and_head_give_the_logits_of_the_init_adapter(self, share, make_artifacts, batch, shape):
        """Taken apart into last hidden states and head, policy and reference are still the init adapter."""
        artifacts = make_artifacts(shape)
        shared, (ids, mask) = share(artifacts), moved_right(batch)
        expected = real(plain_policy(artifacts.spec, artifacts.init)(**batch).logits, batch)
        for view in (shared.policy, shared.reference):
            with shared.acting_as("value"):
                states = view.hidden_states(ids)
                assert states.shape == (3, 10, 32)
                assert_close(view.head(states[mask.bool()]), expected, rtol=1e-5, atol=1e-5)
                assert active_roles(shared) == {("value",)}

    @torch.no_grad()
    def test_states_and_scores_give_those_of_the_reward_model(self, share, make_artifacts, batch, shape):
        """A number for each hidden state, of whatever shape the states are."""
        artifacts = make_artifacts(shape)
        shared, (ids, mask) = share(artifacts), moved_right(batch)
        classifier = plain_reward(artifacts.spec, artifacts.reward).get_base_model()
        head = classifier.score
        expected = real(head(classifier.base_model(**batch).last_hidden_state).squeeze(-1), batch)
        for view in (shared.reward, shared.value):
            with shared.acting_as("reference"):
                states = view.hidden_states(ids)
                assert active_roles(shared) == {("reference",)}
            assert view.scores(states).shape == (3, 10)
            assert_close(view.scores(states)[mask.bool()], expected, rtol=1e-5, atol=1e-5)
            assert_close(view.scores(states[mask.bool()]), expected, rtol=1e-5, atol=1e-5)


class TestTrainsHead:
    @pytest.mark.parametrize(
        ("target_modules", "trained"), [("all-linear", False), (["q_proj"], False), (["q_proj", "lm_head"], True)]
    )
    def test_tells_whether_an_adapter_sits_on_the_output_embedding(
        self, make_artifacts, tokenizer, batch, target_modules, trained
    ):
        """`all-linear` leaves the output embedding out; a recipe may name it."""
        spec, _, reward = make_artifacts()
        lora = {"r": 4, "lora_alpha": 8, "target_modules": target_modules}
        reward_lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        shared = SharedBase(base.load_base(spec, tokenizer), lora, None, [(reward, reward_lora)])
        assert shared.policy.trains_head == trained
        states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(shared.policy.head(states), shared.reference.head(states))
        with torch.no_grad():
            for parameter in shared.policy.parameters():
                parameter.add_(0.1)
        # The head's adapter is the one of the role that asks, also when the head was found under another.
        assert torch.equal(shared.policy.head(states), shared.reference.head(states)) != trained


class TestWithoutInit:
    @torch.no_grad()
    def test_reference_is_the_bare_base(self, checkpoints, make_artifacts, tokenizer, batch):
        """Without an SFT stage, policy and reference both start as the bare base."""
        spec, _, reward = make_artifacts()
        lora, reward_lora = ({"r": r, "lora_alpha": 16, "target_modules": "all-linear"} for r in (2, 8))
        shared = SharedBase(base.load_base(spec, tokenizer), lora, None, [(reward, reward_lora)])
        expected = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])(**batch).logits
        for view in (shared.policy, shared.reference):
            assert_close(real(view(**batch).logits, batch), real(expected, batch), rtol=1e-5, atol=1e-5)


class TestLargerPolicy:
    @torch.no_grad()
    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_policy_of_another_rank_than_init_and_value(self, make_artifacts, tokenizer, batch, quantization):
        """Policy and reference are one function, bit by bit, and that of the smaller adapter they start from."""
        spec, init, reward = make_artifacts("llama", quantization)
        ranks = {"policy": 16, "reference": 16, "reward": 8, "value": 8}
        lora, reward_lora = ({"r": r, "lora_alpha": 16, "target_modules": "all-linear"} for r in (16, 8))
        shared = SharedBase(base.load_base(spec, tokenizer), lora, init, [(reward, reward_lora)])
        for role, rank in ranks.items():
            named = adapters.adapter_parameters(shared.peft, role).items()
            assert {parameter.shape[0] for name, parameter in named if "lora_A" in name} == {rank}
        logits = shared.policy(**batch).logits
        assert torch.equal(shared.reference(**batch).logits, logits)
        expected = plain_policy(spec, init)(**batch).logits
        assert_close(real(logits, batch), real(expected, batch), rtol=1e-5, atol=1e-5)
        assert_close(shared.value(**batch), shared.reward(**batch), rtol=0, atol=0)


class TestNames:
    """RWKV has modules called `value`, and so is a role."""

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory, tokenizer):
        folder = tmp_path_factory.mktemp("rwkv")
        torch.manual_seed(0)
        sizes = {"vocab_size": 1024, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
        AutoModelForCausalLM.from_config(RwkvConfig(**sizes, bos_token_id=None, eos_token_id=1)).save_pretrained(folder)
        spec, lora = Model(path=str(folder), quantization="none"), {"r": 4, "target_modules": ["key", "value"]}
        for head, make in (("causal", adapters.with_policy_adapter), ("score", adapters.with_reward_adapter)):
            model = make(base.load_base(spec, tokenizer, head), lora, None)
            for name, parameter in adapters.adapter_parameters(model, "default").items():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
            adapters.save_adapter(model, "default", folder / head, tokenizer)
        shared = SharedBase(base.load_base(spec, tokenizer), lora, folder / "causal", [(folder / "score", lora)])
        return shared, spec, folder

    def test_each_role_has_all_weights_of_its_artifact_and_its_own(self, made, tmp_path):
        shared, _, folder = made
        assert shared.names == {"policy": "policy", "value": "value_", "reference": "reference", "reward": "reward"}
        for role, origin in (("policy", "causal"), ("reference", "causal"), ("value", "score"), ("reward", "score")):
            (tmp_path / role).mkdir()
            adapters.save_weights(shared.peft, shared.names[role], tmp_path / role)
            saved, theirs = (load_file(one / adapters.WEIGHTS) for one in (tmp_path / role, folder / origin))
            theirs = {name: weight for name, weight in theirs.items() if "lora_" in name}
            assert any(".value.lora_" in name for name in theirs)
            assert saved.keys() == theirs.keys()
            assert all(torch.equal(saved[name], weight) for name, weight in theirs.items())

    def test_policy_and_value_alone_can_be_trained(self, made):
        shared, *_ = made
        trainable = {name for name, parameter in shared.peft.named_parameters() if parameter.requires_grad}
        named = [set(adapters.adapter_parameters(shared.peft, shared.names[role])) for role in ("policy", "value")]
        assert all(named) and trainable == named[0] | named[1] and not named[0] & named[1]

    @torch.no_grad()
    def test_policy_computes_what_its_artifact_does(self, made):
        shared, spec, folder = made
        ids = torch.arange(5, 15)[None]
        expected = plain_policy(spec, folder / "causal")(input_ids=ids).logits
        assert_close(shared.policy(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


class TestSwitching:
    def test_no_switch_changes_what_is_trainable(self, shared, batch):
        """Calls, nested calls and generation leave every `requires_grad` as it was."""
        before = {name: parameter.requires_grad for name, parameter in shared.peft.named_parameters()}
        trainable = {name for name, on in before.items() if on}
        policy, value = (adapters.adapter_parameters(shared.peft, role) for role in ("policy", "value"))
        assert trainable == {*policy, *value}
        for role in ROLES:
            with shared.acting_as(role):
                for other in ROLES:
                    getattr(shared, other)(**batch)
                shared.policy.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=GREEDY
                )
        assert {name: parameter.requires_grad for name, parameter in shared.peft.named_parameters()} == before
        assert all(p.requires_grad for p in shared.value.score.parameters())
        assert not any(p.requires_grad for p in shared.reward.score.parameters())

    def test_former_role_returns_after_a_block_and_after_an_exception(self, shared, batch):
        """The innermost role holds inside its block only, also when the block or the model fails."""
        with shared.acting_as("value"):
            assert active_roles(shared) == {("value",)}
            with pytest.raises(ZeroDivisionError), shared.acting_as("reward"):
                assert active_roles(shared) == {("reward",)}
                _ = 1 / 0
            assert active_roles(shared) == {("value",)}
            with pytest.raises(IndexError):
                shared.reference(input_ids=torch.tensor([[5000]]))  # beyond the vocabulary
            assert active_roles(shared) == {("value",)}
        assert active_roles(shared) == {("policy",)}

    @torch.no_grad()
    def test_roles_do_not_disturb_each_other(self, shared, batch):
        """What a view says does not depend on the view called before it, nor on the role outside."""
        alone = shared.policy(**batch).logits, shared.reward(**batch)
        with shared.acting_as("value"):
            shared.reference(**batch)
            assert_close(shared.policy(**batch).logits, alone[0], rtol=0, atol=0)
            assert_close(shared.reward(**batch), alone[1], rtol=0, atol=0)


def joint_gradients(shared, batch, backward_as):
    """Gradients of a joint loss of policy and value, with backward inside another role."""
    generator = torch.Generator().manual_seed(1)
    values, output = shared.value(**batch), shared.policy(**batch)
    with torch.no_grad():
        shared.reference(**batch)
        shared.reward(**batch)
    logits, values = real(output.logits, batch), real(values, batch)
    loss = (logits * torch.randn(logits.shape, generator=generator)).mean()
    loss = loss + (values * torch.randn(values.shape, generator=generator)).mean()
    with shared.acting_as(backward_as):
        loss.backward()
    return {
        f"{role}.{name}": parameter.grad
        for role in ("policy", "value")
        for name, parameter in getattr(shared, role).named_parameters()
    }


def count_layer_calls(shared):
    """Count the forward passes of the first decoder layer's attention from now on."""
    layers = next(module for module in shared.causal_lm.modules() if isinstance(module, torch.nn.ModuleList))
    attention = next(child for name, child in layers[0].named_children() if "attn" in name)
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestGradientCheckpointing:
    # With equal ranks a wrong recomputation passes without a word; with unequal ones torch sees other shapes.
    @pytest.mark.parametrize(
        ("shape", "quantization", "ranks", "backward_as"),
        [
            ("llama", "none", (4, 4), "policy"),
            ("llama", "none", (4, 4), "reference"),
            ("llama", "none", (4, 8), "policy"),
            ("llama", "none", (4, 8), "reference"),
            ("llama", "nf4", (4, 4), "reference"),
            ("qwen3", "none", (4, 4), "policy"),
            ("gpt2", "none", (4, 4), "policy"),
        ],
    )
    def test_gradients_are_those_without_it(
        self, share, make_artifacts, batch, shape, quantization, ranks, backward_as
    ):
        """Each layer is recomputed under the adapter that computed it, whatever role backward runs in."""
        artifacts = make_artifacts(shape, quantization, ranks)
        expected = joint_gradients(share(artifacts), batch, backward_as)
        shared = share(artifacts)
        shared.enable_gradient_checkpointing()
        calls = count_layer_calls(shared)
        gradients = joint_gradients(shared, batch, backward_as)
        # Four roles forward, and the two that learn once more: else nothing was recomputed and nothing is shown.
        assert len(calls) == 6
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert expected[name].norm() > 0, name
            assert relative_difference(gradient, expected[name]) < 1e-5, name
        assert active_roles(shared) == {("policy",)}

    def test_generation_is_unchanged_and_training_mode_returns(self, share, make_artifacts, batch):
        """Generating between two updates neither suffers from checkpointing nor switches it off."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        plain, shared = share(make_artifacts()), share(make_artifacts())
        shared.enable_gradient_checkpointing()
        expected = plain.policy.generate(**inputs, generation_config=GREEDY)
        assert torch.equal(shared.policy.generate(**inputs, generation_config=GREEDY), expected)
        assert shared.causal_lm.training
        assert not plain.causal_lm.training


class TestOwnership:
    @pytest.mark.parametrize("role", ROLES)
    def test_view_lists_its_own_parameters_once(self, shared, role):
        """A view owns its adapter, and its head if it has one, and nothing of the base or of another role."""
        view = getattr(shared, role)
        owned = list(adapters.adapter_parameters(shared.peft, role).values())
        if role in ("reward", "value"):
            owned += list(view.score.parameters())
        listed = [parameter for _, parameter in view.named_parameters(remove_duplicate=False)]
        assert len(listed) == len(owned) > 0
        assert {id(parameter) for parameter in listed} == {id(parameter) for parameter in owned}
        assert all(parameter.requires_grad == (role in ("policy", "value")) for parameter in listed)

    def test_state_of_policy_and_value_holds_no_base_weights(self, shared):
        """What PPO trains is the two adapters and the value head."""
        wrapper = torch.nn.ModuleDict({"policy": shared.policy, "value": shared.value})
        state = wrapper.state_dict()
        trained = [*shared.policy.parameters(), *shared.value.parameters()]
        assert sorted(tensor.data_ptr() for tensor in state.values()) == sorted(p.data_ptr() for p in trained)
        assert {id(p) for p in wrapper.parameters()} == {id(p) for p in trained}

    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_checksum_changes_for_exactly_the_role_that_moves(self, share, make_artifacts, quantization):
        """A change of any tensor of a role's adapter, of its head or of the base shows under that name alone."""
        shared = share(make_artifacts("llama", quantization))
        movable = {role: [] for role in (*ROLES, "base")}
        for role in ROLES:
            movable[role] += adapters.adapter_parameters(shared.peft, role).values()
        movable["reward"].append(shared.reward.score.weight)
        movable["value"].append(shared.value.score.weight)
        movable["base"].append(shared.causal_lm.get_input_embeddings().weight)
        movable["base"].append(shared.layers[0].get_base_layer().weight)  # bytes of 4-bit numbers under nf4
        sums = shared.checksums()
        assert set(sums) == set(movable)
        assert shared.checksums() == sums
        for name, tensors in movable.items():
            for tensor in tensors:
                move(tensor)
                after = shared.checksums()
                assert {other for other in sums if after[other] != sums[other]} == {name}
                sums = after

    def test_checksums_of_some_are_those_of_all(self, shared):
        """Only what is named is summed up, with the same result."""
        everything = shared.checksums()
        for names in (("reference", "reward"), ("base",), ("value", "policy")):
            assert shared.checksums(*names) == {name: everything[name] for name in names}
        with pytest.raises(KeyError):
            shared.checksums("critic")

    def test_learning_moves_policy_and_value_alone(self, shared, batch):
        """An optimizer over all of their parameters moves the two roles that learn, and leaves what the others say."""
        with torch.no_grad():
            before = shared.reference(**batch).logits, shared.reward(**batch)
        sums = shared.checksums()
        views = torch.nn.ModuleDict({role: getattr(shared, role) for role in ROLES})
        optimizer = torch.optim.SGD([p for p in views.parameters() if p.requires_grad], lr=0.1)
        output, values = shared.policy(**batch), shared.value(**batch)
        (output.logits.logsumexp(-1).mean() + values.square().mean()).backward()
        optimizer.step()
        after = shared.checksums()
        assert {name for name in sums if sums[name] != after[name]} == {"policy", "value"}
        with torch.no_grad():
            assert_close(shared.reference(**batch).logits, before[0], rtol=0, atol=0)
            assert_close(shared.reward(**batch), before[1], rtol=0, atol=0)
            assert relative_difference(shared.policy(**batch).logits, before[0]) > 1e-4
            assert relative_difference(shared.value(**batch), before[1]) > 1e-4

    @torch.no_grad()
    def test_trained_policy_loads_with_peft_alone(self, shared, make_artifacts, tokenizer, batch, tmp_path):
        """The policy's adapter, saved from among the four, is an artifact like any other."""
        for name, parameter in adapters.adapter_parameters(shared.peft, "policy").items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        adapters.save_adapter(shared.peft, "policy", tmp_path / "adapter", tokenizer)
        plain = plain_policy(make_artifacts().spec, tmp_path / "adapter")
        logits = shared.policy(**batch).logits
        assert_close(real(plain(**batch).logits, batch), real(logits, batch), rtol=1e-5, atol=1e-5)
        assert relative_difference(shared.reference(**batch).logits, logits) > 0.05


class TestGeneration:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_greedy_reply_is_that_of_a_separate_model(self, share, make_artifacts, batch, shape):
        """The policy generates under its own adapter, also while another role is active outside."""
        artifacts = make_artifacts(shape)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        shared, plain = share(artifacts), plain_policy(artifacts.spec, artifacts.init)
        expected = plain.generate(**inputs, generation_config=GREEDY)
        with plain.disable_adapter():
            assert not torch.equal(plain.generate(**inputs, generation_config=GREEDY), expected)
        with shared.acting_as("reward"):
            assert torch.equal(shared.policy.generate(**inputs, generation_config=GREEDY), expected)
            assert active_roles(shared) == {("reward",)}

    @torch.no_grad()
    def test_settings_of_the_checkpoint_do_not_leak_into_sampling(self, share, make_artifacts, batch, tmp_path):
        """Tokens are drawn from the very logits that log-probabilities are taken of."""
        artifacts = make_artifacts()
        folder = tmp_path / "checkpoint"
        shutil.copytree(artifacts.spec.path, folder)
        own = {"do_sample": True, "repetition_penalty": 3.0, "top_p": 0.5, "min_p": 0.1, "eos_token_id": [1, 7]}
        (folder / "generation_config.json").write_text(json.dumps(own))
        artifacts = artifacts._replace(spec=artifacts.spec.model_copy(update={"path": str(folder)}))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

        def sampled_and_forward(model, forward):
            """The scores tokens were drawn from, and the logits of a forward pass over the same tokens."""
            torch.manual_seed(0)
            output = model.generate(
                **inputs, generation_config=SAMPLING, return_dict_in_generate=True, output_scores=True
            )
            new = len(output.scores)
            mask = torch.cat([batch["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
            logits = forward(input_ids=output.sequences, attention_mask=mask, position_ids=mask.cumsum(1) - mask).logits
            return torch.stack(output.scores, 1)[:, :1], logits[:, -new - 1 : -new]

        plain = plain_policy(artifacts.spec, artifacts.init)
        scores, logits = sampled_and_forward(plain, plain)
        assert not torch.allclose(scores, logits)  # so they would leak
        shared = share(artifacts)
        scores, logits = sampled_and_forward(shared.policy, shared.policy)
        assert_close(scores, logits, rtol=1e-5, atol=1e-5)
        assert shared.policy.generation_config.eos_token_id == [1, 7]


def test_policy_artifact_cannot_stand_in_for_a_reward_artifact(make_artifacts, tokenizer):
    """A policy adapter has no head to score with."""
    spec, init, _ = make_artifacts()
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    with pytest.raises((KeyError, ValueError)):
        SharedBase(base.load_base(spec, tokenizer), lora, init, [(init, lora)])
