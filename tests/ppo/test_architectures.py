"""What Transformers loads both as a causal LM and as a sequence classifier trains, with no line naming it."""

from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf_pipeline.models import adapters, base

pytestmark = pytest.mark.slow

SHAPES = ["llama", "qwen3", "mistral", "gpt2", "opt", "gemma2"]
COMBINATIONS = [
    (shape, quantization, checkpointing)
    for shape in SHAPES
    for quantization in ("none", "nf4")
    for checkpointing in (False, True)
    if not (quantization == "nf4" and checkpointing) or shape in ("llama", "gpt2")  # both together for two of them
]


class Trained(NamedTuple):
    """What is known of a short training.

    Attributes:
        logs: what was logged, an entry for each update.
        moved: of base and roles, those whose weights changed.
        weights: of policy and value, afterwards.
        unmoved: those of them that are what they were before.
        ranks: of their adapters.
        layer_calls: how often the first decoder layer was computed with gradients on.
        adapted: the classes of the base's layers that have adapters, by name.
    """

    logs: list[dict[str, float]]
    moved: set[str]
    weights: dict[str, Tensor]
    unmoved: set[str]
    ranks: dict[str, set[int]]
    layer_calls: int
    adapted: dict[str, type]


def watch_training(trainer: Any) -> Trained:
    shared, calls = trainer.shared, []
    layers = next(module for module in shared.causal_lm.modules() if isinstance(module, nn.ModuleList))
    attention = next(child for name, child in layers[0].named_children() if "attn" in name)
    attention.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    learning = {
        f"{role}.{name}": parameter
        for role in ("policy", "value")
        for name, parameter in getattr(shared, role).named_parameters()
    }
    start = {name: parameter.detach().clone() for name, parameter in learning.items()}
    before = shared.checksums()
    trainer.train()
    after = shared.checksums()
    return Trained(
        logs=trainer.state.log_history,
        moved={name for name in before if before[name] != after[name]},
        weights={name: parameter.detach() for name, parameter in learning.items()},
        unmoved={name for name, parameter in learning.items() if torch.equal(parameter, start[name])},
        ranks={
            role: {p.shape[0] for name, p in adapters.adapter_parameters(shared.peft, role).items() if "lora_A" in name}
            for role in ("policy", "value")
        },
        layer_calls=sum(calls),
        adapted={name: type(m.get_base_layer()) for name, m in shared.peft.named_modules() if m in shared.layers},
    )


@pytest.fixture(scope="module")
def unequal_prompts() -> Dataset:
    """Eight prompts of one to eight tokens, which are one batch, so that every batch has padding."""
    draw = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(5, 1024, (length,), generator=draw).tolist() for length in range(1, 9)]}
    )


@pytest.fixture(scope="module")
def trained_already() -> dict[tuple[str, str, bool], Trained]:
    return {}


@pytest.fixture
def train(make_trainer, unequal_prompts, trained_already):
    """A function that trains each combination once, for two updates with one pass and two micro-batches each."""

    def two_updates(*key: Any) -> Trained:
        if key not in trained_already:
            shape, quantization, checkpointing = key
            settings = {"gradient_checkpointing": checkpointing, "num_ppo_epochs": 1}
            trained_already[key] = watch_training(
                make_trainer(shape, quantization, train_dataset=unequal_prompts, **settings)
            )
        return trained_already[key]

    return two_updates


@pytest.mark.parametrize(("shape", "quantization", "checkpointing"), COMBINATIONS)
class TestTraining:
    def test_policy_starts_as_its_reference_and_without_dropout(self, train, shape, quantization, checkpointing):
        """First KL is 0 and the first ratio of new to old probabilities 1, also with layers in training mode."""
        first = train(shape, quantization, checkpointing).logs[0]
        assert first["objective/kl"] == 0
        assert first["val/ratio"] == pytest.approx(1, abs=1e-6)  # sums over batches of another size are rounded
        assert first["val/ratio_var"] < 1e-10

    def test_generation_and_training_agree_on_what_was_sampled(self, train, shape, quantization, checkpointing):
        """Cached steps after left padding and one pass over right padding give a token the same probability."""
        limit = 1e-4 if quantization == "none" else 0.05
        updates = train(shape, quantization, checkpointing).logs
        assert len(updates) == 2
        assert all(update["rollout/log_prob_gap_max"] < limit for update in updates)

    def test_policy_and_value_learn_and_nothing_else_moves(self, train, shape, quantization, checkpointing):
        """Two updates move every weight of two adapters of different rank, and no base, reference or reward."""
        trained = train(shape, quantization, checkpointing)
        assert trained.ranks == {"policy": {4}, "value": {8}}
        assert trained.moved == {"policy", "value"}
        assert trained.unmoved == set()
        assert all(weight.isfinite().all() for weight in trained.weights.values())
        assert trained.logs[1]["objective/kl"] != 0


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_changes_no_weight(train, shape):
    """Recomputed activations train to the same weights as kept ones."""
    kept, recomputed = train(shape, "none", False), train(shape, "none", True)
    # Two roles read two micro-batches in each of two updates, and once more to recompute.
    assert (kept.layer_calls, recomputed.layer_calls) == (8, 16)
    assert kept.weights.keys() == recomputed.weights.keys()
    assert max((kept.weights[name] - other).abs().max().item() for name, other in recomputed.weights.items()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
class TestQuantization:
    def test_every_adapted_layer_is_in_four_bits(self, train, shape):
        """In nf4 there is an NF4 layer under each adapter, for GPT-2's `Conv1D` layers too; without, there is none."""
        quantized, whole = (train(shape, name, False).adapted for name in ("nf4", "none"))
        assert quantized.keys() == whole.keys()
        assert len(whole) >= 2 * 4  # two decoder layers, with at least four layers each
        assert set(quantized.values()) == {bnb.nn.Linear4bit}
        assert bnb.nn.Linear4bit not in whole.values()

    @torch.no_grad()
    def test_four_bit_layers_compute_nearly_what_the_whole_ones_do(self, make_artifacts, tokenizer, shape):
        """NF4 weights are the checkpoint's, rounded; GPT-2's are turned round first."""
        specs = [make_artifacts(shape, quantization).spec for quantization in ("nf4", "none")]
        quantized, whole = (base.load_base(spec, tokenizer) for spec in specs)
        names = [name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert names
        for name in names:
            layer = quantized.get_submodule(name)
            states = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
            given, expected = layer(states), whole.get_submodule(name)(states)
            assert torch.nn.functional.cosine_similarity(given, expected, dim=-1).min() > 0.95, name
            assert not torch.equal(given, expected), name
