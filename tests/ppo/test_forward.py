"""Log-probabilities, values and scores are those of the libraries' own models, in a fraction of their memory."""

from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo import forward
from rlhf_pipeline.ppo.rollout import Episodes

SHAPES = ["llama", "gpt2", "opt", "gemma2"]
PROMPTS, REPLIES = (3, 9, 1, 5), (4, 1, 6, 3)  # lengths
EXACT = {"rtol": 1e-4, "atol": 1e-5}


class Models(NamedTuple):
    """Four roles on one base, and beside them the libraries' own models under the same artifacts."""

    shared: SharedBase
    causal_lm: PeftModel
    classifier: PeftModel


@pytest.fixture(scope="module", params=SHAPES)
def models(request, make_artifacts, share) -> Models:
    artifacts = make_artifacts(request.param)
    path = artifacts.spec.path
    causal_lm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path), str(artifacts.init), is_trainable=True
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    return Models(
        share(artifacts), causal_lm.eval(), PeftModel.from_pretrained(classifier, str(artifacts.reward)).eval()
    )


@pytest.fixture(scope="module")
def shared(make_artifacts, share) -> SharedBase:
    return share(make_artifacts())


def random_rows(vocabulary: int = 1024) -> list[tuple[list[int], list[int]]]:
    """Prompts and replies of random tokens, none of them special."""
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(5, vocabulary, (m,), generator=draw).tolist(),
            torch.randint(5, 1024, (n,), generator=draw).tolist(),
        )
        for m, n in zip(PROMPTS, REPLIES, strict=True)
    ]


def episodes_of(rows: list[tuple[list[int], list[int]]], pad_token_id: int = 0, columns_more: int = 0) -> Episodes:
    """Episodes with these prompts and replies."""
    longest = max(len(prompt + reply) for prompt, reply in rows) + columns_more
    ids = [prompt + reply + [pad_token_id] * (longest - len(prompt + reply)) for prompt, reply in rows]
    lengths = torch.tensor([len(reply) for _, reply in rows])
    return Episodes(
        torch.tensor(ids),
        torch.tensor([len(prompt) for prompt, _ in rows]),
        lengths,
        torch.zeros(len(rows), dtype=torch.bool),
        torch.zeros(len(rows), int(lengths.max())),
    )


def reply_distributions(model: Any, rows: Any, temperature: float) -> list[torch.distributions.Categorical]:
    """What a causal LM says of each reply token's place; every row by itself, without padding."""
    each = []
    for prompt, reply in rows:
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        each.append(torch.distributions.Categorical(logits=logits / temperature))
    return each


def spread(values: list[Tensor], width: int) -> Tensor:
    """One row for each reply, 0 behind it."""
    return torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in values])


def gradients(loss: Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def policy_parameters(shared: SharedBase) -> dict[str, torch.nn.Parameter]:
    """By the names that PEFT gives them in a model with one adapter."""
    named = adapters.adapter_parameters(shared.peft, "policy")
    return {name.replace(".policy", ".default"): parameter for name, parameter in named.items()}


class TestReplyLogProbs:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_log_probs_and_entropy_are_those_of_full_logits(self, models, temperature):
        """Each reply token has the probability that the row alone gives it; outside replies everything is 0."""
        rows = random_rows()
        with torch.no_grad():
            each = reply_distributions(models.causal_lm, rows, temperature)
        log_probs = [one.log_prob(torch.tensor(reply)) for one, (_, reply) in zip(each, rows, strict=True)]
        given, entropy = forward.reply_log_probs(models.shared.policy, episodes_of(rows), temperature)
        assert_close(given.detach(), spread(log_probs, 6), **EXACT)
        assert_close(entropy, spread([one.entropy() for one in each], 6), **EXACT)
        assert given.dtype == entropy.dtype == torch.float32
        assert not entropy.requires_grad

    def test_gradient_of_the_adapter_is_that_of_full_logits(self, models):
        """A weighted sum of log-probabilities moves every weight of the policy as plain autograd would."""
        rows, weights = random_rows(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        each = reply_distributions(models.causal_lm, rows, 0.7)
        log_probs = [one.log_prob(torch.tensor(reply)) for one, (_, reply) in zip(each, rows, strict=True)]
        expected = gradients(
            (spread(log_probs, 6) * weights).sum(), adapters.adapter_parameters(models.causal_lm, "default")
        )
        given, _ = forward.reply_log_probs(models.shared.policy, episodes_of(rows), 0.7)
        ours = gradients((given * weights).sum(), policy_parameters(models.shared))
        assert ours.keys() == expected.keys()
        for name, gradient in ours.items():
            assert expected[name].norm() > 0, name
            assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name

    @torch.no_grad()
    def test_padding_may_be_any_token_and_any_wide(self, models):
        """What stands behind a reply changes nothing, also where replies hold the padding token or end in it."""
        rows = random_rows()
        rows[0][1][1] = rows[3][1][-1] = 7
        plain = forward.reply_log_probs(models.shared.policy, episodes_of(rows), 1.0)[0]
        for pad_token_id, columns_more in ((7, 0), (0, 3), (7, 3)):
            episodes = episodes_of(rows, pad_token_id, columns_more)
            assert_close(forward.reply_log_probs(models.shared.policy, episodes, 1.0)[0], plain, **EXACT)

    def test_without_gradients_there_is_no_graph_and_no_entropy(self, shared):
        """For a rollout the log-probabilities are the same but for rounding."""
        episodes = episodes_of(random_rows())
        expected, _ = forward.reply_log_probs(shared.policy, episodes, 1.0)
        with torch.no_grad():
            log_probs, entropy = forward.reply_log_probs(shared.policy, episodes, 1.0)
        assert expected.requires_grad
        assert not log_probs.requires_grad
        assert_close(log_probs, expected.detach(), rtol=0, atol=5e-6)
        assert not entropy.any()

    def test_reference_keeps_its_own_adapter(self, make_artifacts, share):
        """After the policy has moved, the reference still says what the init adapter says."""
        shared, episodes = share(make_artifacts()), episodes_of(random_rows())
        before = forward.reply_log_probs(shared.reference, episodes, 1.0)[0]
        with torch.no_grad():
            for parameter in shared.policy.parameters():
                parameter.add_(0.1)
        assert torch.equal(forward.reply_log_probs(shared.reference, episodes, 1.0)[0], before)
        assert not torch.allclose(forward.reply_log_probs(shared.policy, episodes, 1.0)[0], before, atol=1e-2)


class TestValuesAndScores:
    @torch.no_grad()
    def test_value_is_what_the_reward_model_says_of_the_text_so_far(self, models):
        """Before training, the value of a token's state is the classifier's score of all that comes before it."""
        rows = random_rows()
        values = [
            torch.cat([models.classifier(torch.tensor([prompt + reply[:t]])).logits[0] for t in range(len(reply))])
            for prompt, reply in rows
        ]
        given = forward.reply_values(models.shared.value, episodes_of(rows))
        assert_close(given, spread(values, 6), **EXACT)
        assert given[given != 0].std() > 0.05

    @torch.no_grad()
    def test_score_is_what_the_reward_model_says_of_the_whole(self, models):
        """A reply is scored at its last token, however long its prompt is and whatever pads it."""
        rows = random_rows()
        expected = torch.cat([models.classifier(torch.tensor([prompt + reply])).logits[0] for prompt, reply in rows])
        for episodes in (episodes_of(rows), episodes_of(rows, 7, 3)):
            assert_close(forward.reply_scores(models.shared.reward, episodes), expected, **EXACT)

    def test_value_gradient_reaches_adapter_and_head(self, shared):
        """The value model's every weight has a gradient, and no other role's has one."""
        parameters = list(shared.value.parameters())
        loss = forward.reply_values(shared.value, episodes_of(random_rows())).square().sum()
        assert all(gradient.norm() > 0 for gradient in torch.autograd.grad(loss, parameters))
        loss = forward.reply_values(shared.value, episodes_of(random_rows())).sum()
        unused = torch.autograd.grad(loss, list(shared.policy.parameters()), allow_unused=True)
        assert all(gradient is None for gradient in unused)

    @torch.no_grad()
    def test_bfloat16_base_still_gives_float32(self, make_artifacts, share):
        """Heads compute in float32 over hidden states of any precision, also inside autocast."""
        artifacts = make_artifacts()
        shared = share(artifacts._replace(spec=artifacts.spec.model_copy(update={"dtype": "bfloat16"})))
        episodes = episodes_of(random_rows())
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                hidden = shared.value.hidden_states(episodes.ids)
                values = forward.reply_values(shared.value, episodes)
                scores = forward.reply_scores(shared.reward, episodes)
                log_probs = forward.reply_log_probs(shared.policy, episodes, 1.0)[0]
            assert hidden.dtype == torch.bfloat16
            assert values.dtype == scores.dtype == log_probs.dtype == torch.float32
            exact = hidden[0, 2].float() @ shared.value.score.weight[0]  # the last token of the first prompt
            assert_close(values[0, 0], exact, rtol=1e-5, atol=1e-5)


class TestDemonstrationLoss:
    def test_loss_and_gradient_are_those_of_transformers(self, models):
        """The sum over labelled tokens of what the causal LM's own loss averages; a first token is never predicted."""
        rows = random_rows()
        longest = max(len(prompt + reply) for prompt, reply in rows)
        ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
        for i, (prompt, reply) in enumerate(rows):
            whole = torch.tensor(prompt + reply)
            ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
            labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
        labels[1, 0] = ids[1, 0]
        count = int((labels[:, 1:] != -100).sum())
        assert count == sum(REPLIES)
        expected = models.causal_lm(input_ids=ids, attention_mask=mask, labels=labels).loss * count
        loss = forward.demonstration_loss(models.shared.policy, ids, labels)
        assert_close(loss, expected, rtol=1e-5, atol=1e-4)
        theirs = gradients(expected, adapters.adapter_parameters(models.causal_lm, "default"))
        for name, gradient in gradients(loss, policy_parameters(models.shared)).items():
            assert (gradient - theirs[name]).norm() < 1e-4 * theirs[name].norm(), name


TOKENS = 13


@pytest.fixture(scope="module")
def chosen() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the tokens that follow them, and weights for a sum of their log-probabilities."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 32, generator=draw)
    return hidden, torch.randint(5, 1024, (TOKENS,), generator=draw), torch.randn(TOKENS, generator=draw)


def compare(policy: Any, chosen: Any, temperature: float, logits_of: Any, tolerance: float) -> None:
    """Hold values, entropies and the gradient by hidden states against autograd through all logits at once."""
    start, tokens, weights = chosen
    hidden, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    log_p = (logits_of(hidden).float() / temperature).log_softmax(-1)
    expected = log_p.gather(1, tokens[:, None])[:, 0]
    (expected * weights).sum().backward()
    log_probs, entropy = forward.token_log_probs(policy, ours, tokens, temperature)
    (log_probs * weights).sum().backward()
    assert_close(log_probs, expected, rtol=tolerance, atol=tolerance)
    entropies = torch.distributions.Categorical(logits=log_p.detach()).entropy()
    assert_close(entropy, entropies, rtol=tolerance, atol=tolerance)
    assert not entropy.requires_grad
    assert ours.grad.dtype == start.dtype
    assert ours.grad.isfinite().all()
    assert (ours.grad - hidden.grad).norm() <= tolerance * hidden.grad.norm()


class TestTokenLogProbs:
    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
    @pytest.mark.parametrize("rows_at_once", [0.5, 1, 5, TOKENS, 1000])
    def test_values_and_gradient_are_those_of_plain_autograd(
        self, shared, chosen, monkeypatch, rows_at_once, temperature
    ):
        """However the tokens are divided, and if not even one row of logits has room."""
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", int(rows_at_once * 1024))
        weight = shared.causal_lm.lm_head.weight
        compare(shared.policy, chosen, temperature, lambda hidden: hidden @ weight.T, 1e-5)

    @pytest.mark.parametrize("rows_at_once", [1, 5, TOKENS])
    def test_capped_logits_are_differentiated_through_the_cap(
        self, make_artifacts, share, chosen, monkeypatch, rows_at_once
    ):
        """Gemma 2's logits are 5 tanh(Wh/5) here."""
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", rows_at_once * 1024)
        shared = share(make_artifacts("gemma2"))
        weight = shared.causal_lm.lm_head.weight
        compare(shared.policy, chosen, 0.7, lambda hidden: 5 * torch.tanh(hidden @ weight.T / 5), 1e-5)

    def test_bfloat16_states(self, make_artifacts, share, chosen, monkeypatch):
        """In bfloat16 the sums are still taken in float32, and the gradient comes back in bfloat16."""
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 5 * 1024)
        artifacts = make_artifacts()
        shared = share(artifacts._replace(spec=artifacts.spec.model_copy(update={"dtype": "bfloat16"})))
        weight, (hidden, *others) = shared.causal_lm.lm_head.weight, chosen
        assert weight.dtype == torch.bfloat16
        compare(shared.policy, (hidden.bfloat16(), *others), 0.7, lambda states: states @ weight.T, 1e-2)
        log_probs, _ = forward.token_log_probs(shared.policy, hidden.bfloat16(), others[0], 1.0)
        expected = (hidden.bfloat16() @ weight.T).float().log_softmax(-1).gather(1, others[0][:, None])[:, 0]
        assert_close(log_probs.detach(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("trained", [False, True])
    def test_tokens_that_cannot_be_chosen_give_no_nan(self, make_artifacts, share, chosen, trained):
        """Logits of -inf have probability 0, count nothing towards the entropy and leave the gradient finite."""
        shared = share(make_artifacts())
        shared.causal_lm.lm_head = head = torch.nn.Linear(32, 1024)
        head.requires_grad_(trained)
        with torch.no_grad():
            head.bias[:5] = -torch.inf  # the tokens are others
        compare(shared.policy, chosen, 0.7, lambda hidden: hidden @ head.weight.T + head.bias, 1e-4)

    def test_adapter_on_the_output_embedding_is_trained(self, make_artifacts, tokenizer, chosen):
        """With LoRA on the head, its factors get the gradient that autograd through W + 2BA gives them."""
        spec, _, reward = make_artifacts()
        lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
        reward_lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        shared = SharedBase(base.load_base(spec, tokenizer), lora, None, [(reward, reward_lora)])
        layer = shared.causal_lm.lm_head
        factors = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
        with torch.no_grad():
            factors[1].normal_(std=0.3)  # the reference's stays 0
        assert shared.policy.trains_head

        def adapted(hidden: Tensor) -> Tensor:
            return hidden @ (layer.base_layer.weight + 2 * factors[1] @ factors[0]).T

        compare(shared.policy, chosen, 0.7, adapted, 1e-5)
        hidden, tokens, weights = chosen
        compare(shared.reference, chosen, 0.7, lambda states: states @ layer.base_layer.weight.T, 1e-5)
        expected = (adapted(hidden) / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        given, _ = forward.token_log_probs(shared.policy, hidden, tokens, 0.7)
        sums = ((log_probs * weights).sum() for log_probs in (given, expected))
        ours, theirs = (torch.autograd.grad(one, factors) for one in sums)
        for gradient, its in zip(ours, theirs, strict=True):
            assert its.norm() > 0
            assert (gradient - its).norm() < 1e-5 * its.norm()


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is allocated."""

    def __init__(self, parameters: Any) -> None:
        super().__init__()
        self.elements = 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.weights:  # views of weights
                self.elements = max(self.elements, one.numel())
        return result


class TestMemory:
    VOCABULARY = 50_000

    @pytest.fixture(scope="class")
    def wide(self, tmp_path_factory, tokenizer) -> SharedBase:
        """Four roles on a base with a large vocabulary and little else."""
        lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
        config = LlamaConfig(
            vocab_size=self.VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            num_labels=1,
        )
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("reward") / "adapter"
        reward = adapters.with_reward_adapter(LlamaForSequenceClassification(config), lora, None)
        adapters.save_adapter(reward, "default", folder, tokenizer)
        return SharedBase(LlamaForCausalLM(config).requires_grad_(False).eval(), lora, None, [(folder, lora)])

    @pytest.mark.parametrize("rows_at_once", [1, 3])
    def test_no_more_logits_than_allowed_are_ever_there(self, wide, monkeypatch, rows_at_once):
        """Forward and backward pass never allocate logits of all tokens; the model's own forward pass does."""
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", rows_at_once * self.VOCABULARY)
        rows = random_rows(self.VOCABULARY)
        episodes = episodes_of(rows)
        assert wide.head is wide.causal_lm.lm_head  # found with a few logits, once
        lengths = (episodes.prompt_lengths + episodes.reply_lengths)[:, None]
        labels = episodes.ids.masked_fill(torch.arange(episodes.ids.shape[1]) >= lengths, -100)
        parameters = list(wide.peft.parameters())
        with LargestTensor(parameters) as watched:
            loss = forward.reply_log_probs(wide.policy, episodes, 0.7)[0].sum()
            loss = loss + forward.demonstration_loss(wide.policy, episodes.ids, labels)
            loss = loss + forward.reply_values(wide.value, episodes).sum()
            loss.backward()
            with torch.no_grad():
                forward.reply_log_probs(wide.reference, episodes, 0.7)
                forward.reply_scores(wide.reward, episodes)
        assert watched.elements == rows_at_once * self.VOCABULARY
        with LargestTensor(parameters) as watched, torch.no_grad():
            wide.policy(input_ids=episodes.ids)
        assert watched.elements == episodes.ids.numel() * self.VOCABULARY

    def test_no_logits_wait_for_the_backward_pass(self, wide):
        """What the forward pass saves is hidden states and weights, although all logits had room at once."""
        episodes, saved = episodes_of(random_rows(self.VOCABULARY)), []
        weights = {parameter.untyped_storage().data_ptr() for parameter in wide.peft.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
            forward.reply_log_probs(wide.policy, episodes, 0.7)[0].sum()
        own = [one.numel() for one in saved if one.untyped_storage().data_ptr() not in weights]
        assert own
        assert max(own) < self.VOCABULARY
