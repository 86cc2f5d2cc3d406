"""Every key that a recipe may set for PPO changes something, and the right thing.

There is one test for each key, named after it: short trainings that differ in that key alone.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo import decoding
from rlhf_pipeline.ppo.trainer import PPOTrainer, Scored
from rlhf_pipeline.recipe import library_keys

RATE = 1e-2
ONE_UPDATE = {"max_steps": 1, "num_ppo_epochs": 1, "learning_rate": RATE, "max_grad_norm": 0.0}
# Where only the number of updates counts, not what is learned.
THREE_UPDATES = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "response_length": 2,
}
PLAIN = {"optim": "sgd"}  # moves every weight by its gradient times the learning rate
HELD_OUT = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]})
DEMONSTRATIONS = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]], "labels": [[-100, -100, 7, 8]] * 2})


@dataclass
class Outcome:
    """What there is to see of a training.

    Attributes:
        logs: what was logged.
        moved: of `policy` and `value`, how far each weight went.
        prompts: of each rollout.
        scored, shaped, returns: of each update, what `score`, `shape` and `estimate_advantages` made.
        rows: of each forward pass of the base, while `sampling`, `scoring` and `training`.
        layer_passes: how often the first decoder layer was computed; counted inside it, where recomputing shows.
        steps: the optimizer's.
        folder: where it wrote.
    """

    logs: list[dict[str, float]]
    folder: Path
    moved: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[list[list[int]]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    shaped: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    returns: list[Tensor] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=lambda: {"sampling": [], "scoring": [], "training": []})
    layer_passes: int = 0
    steps: int = 0

    def logged(self, name: str) -> list[float]:
        """The values logged under a name."""
        return [row[name] for row in self.logs if name in row]

    def steps_with(self, name: str) -> list[float]:
        """After how many updates something was logged under a name."""
        return [row["step"] for row in self.logs if name in row]

    @property
    def base_passes(self) -> int:
        """How often the base was called."""
        return sum(map(len, self.rows.values()))

    @property
    def checkpoints(self) -> set[str]:
        return {path.name for path in self.folder.glob("checkpoint-*")}

    @property
    def samples(self) -> int:
        """How many lines of samples were written."""
        file = self.folder / "samples.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0


Run = Callable[..., Outcome]


@contextmanager
def watch(trainer: PPOTrainer, seen: Outcome) -> Iterator[None]:
    """Note what goes on inside the block."""
    model = trainer.shared.causal_lm
    roll_out, shape, optimise = trainer.roll_out, trainer.shape, trainer.optimise

    def watched_roll_out(prompts: list[list[int]]) -> Any:
        seen.prompts.append(prompts)
        return roll_out(prompts)

    def watched_shape(scored: Scored) -> Any:
        seen.scored.append(scored)
        seen.shaped.append(shape(scored))
        return seen.shaped[-1]

    def watched_optimise(scored: Scored, advantages: Tensor, returns: Tensor) -> Any:
        seen.returns.append(returns)
        return optimise(scored, advantages, returns)

    def base_called(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        doing = "training" if torch.is_grad_enabled() else "sampling" if inputs["use_cache"] else "scoring"
        seen.rows[doing].append(len(inputs["input_ids"]))

    def layer_called(*_: Any) -> None:
        seen.layer_passes += 1

    def stepped(*_: Any) -> None:
        seen.steps += 1

    trainer.roll_out, trainer.shape, trainer.optimise = watched_roll_out, watched_shape, watched_optimise
    with ExitStack() as hooks:
        for handle in (
            model.base_model.register_forward_pre_hook(base_called, with_kwargs=True),
            model.base_model.layers[0].self_attn.register_forward_pre_hook(layer_called),
            register_optimizer_step_post_hook(stepped),
        ):
            hooks.callback(handle.remove)
        yield


def trained_weights(shared: SharedBase, role: str) -> Tensor:
    """A copy of all that is trained of a role, as one vector."""
    weights = [one for one in getattr(shared, role).parameters() if one.requires_grad]
    return torch.cat([weight.detach().double().flatten() for weight in weights])


@pytest.fixture(scope="module")
def roles(make_artifacts, share) -> Callable[[], SharedBase]:
    """A function that gives back the same four roles each time, with the weights they had at first."""
    shared = share(make_artifacts())
    views = [getattr(shared, role) for role in ("policy", "value", "reference", "reward")]
    first = [copy.deepcopy(view.state_dict()) for view in views]

    def restored() -> SharedBase:
        for view, state in zip(views, first, strict=True):
            view.load_state_dict(state)
        return shared

    return restored


@pytest.fixture(scope="module")
def known() -> dict[Any, Outcome]:
    """Trainings that a test made, for others to compare with."""
    return {}


@pytest.fixture
def run(make_trainer, roles, known, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that trains with some settings, by default one update, and tells what happened."""

    def train(shared: SharedBase | None = None, **settings: Any) -> Outcome:
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if shared is not None or key not in known:
            folder = tmp_path_factory.mktemp("run")
            trainer = make_trainer(
                shared=shared or roles(),
                output_dir=str(folder),
                samples_file=folder / "samples.jsonl",
                **{**ONE_UPDATE, **settings},
            )
            before = {role: trained_weights(trainer.shared, role) for role in ("policy", "value")}
            seen = Outcome(trainer.state.log_history, folder)
            with watch(trainer, seen):
                trainer.train()
            seen.logs = trainer.state.log_history
            seen.moved = {role: trained_weights(trainer.shared, role) - weights for role, weights in before.items()}
            known[key] = seen
        return known[key]

    return train


def agree(one: Tensor, other: Tensor, rel: float = 1e-3) -> bool:
    """Whether two vectors are the same up to a small part of their length."""
    assert other.norm() > 0
    return ((one - other).norm() / other.norm()).item() < rel


def updates(outcome: Outcome) -> int:
    return len(outcome.returns)


def test_there_is_a_test_for_every_key_that_a_recipe_may_set() -> None:
    prefix = "test_key_"
    assert {name.removeprefix(prefix) for name in globals() if name.startswith(prefix)} == set(
        library_keys.settable("ppo")
    )


def test_the_same_settings_give_the_same_training(run: Run, known: dict[Any, Outcome]) -> None:
    """Else every difference below could be chance."""
    one = run()
    known.clear()
    other = run()
    assert one is not other
    for role in ("policy", "value"):
        assert torch.equal(one.moved[role], other.moved[role]) and one.moved[role].norm() > 0
    assert one.prompts == other.prompts


# The optimizer


def test_key_learning_rate(run: Run) -> None:
    one, twice = run(**PLAIN), run(**PLAIN, learning_rate=2 * RATE)
    assert (one.logged("lr"), twice.logged("lr")) == ([RATE], [2 * RATE])
    for role in ("policy", "value"):
        assert agree(twice.moved[role], 2 * one.moved[role])


def test_key_value_learning_rate(run: Run) -> None:
    one, other, still = run(**PLAIN), run(**PLAIN, value_learning_rate=3 * RATE), run(**PLAIN, value_learning_rate=0.0)
    assert [each.logged("lr_value") for each in (one, other, still)] == [[RATE], [3 * RATE], [0]]
    assert agree(other.moved["value"], 3 * one.moved["value"])
    assert not still.moved["value"].any()
    for outcome in (other, still):
        assert torch.equal(one.moved["policy"], outcome.moved["policy"])
        assert outcome.logged("lr") == [RATE]


def test_key_optim(run: Run) -> None:
    """Plain gradient descent goes as far as the gradient is long, Adam by the learning rate in every weight."""
    adam, plain = run(), run(**PLAIN)
    for role in ("policy", "value"):
        (norm,) = plain.logged(f"{role}/grad_norm")
        assert plain.moved[role].norm().item() == pytest.approx(RATE * norm, rel=1e-3)
        assert adam.moved[role].abs().median().item() == pytest.approx(RATE, rel=1e-2)


def test_key_optim_args(run: Run) -> None:
    """With momentum the second of two like steps is longer: 1 + 1.9 gradients instead of 1 + 1."""
    settings = {**PLAIN, "learning_rate": 1e-3, "num_ppo_epochs": 2}
    one, other = run(**settings), run(**settings, optim_args="momentum=0.9")
    assert other.moved["policy"].norm() / one.moved["policy"].norm() == pytest.approx(1.45, abs=0.1)


def test_key_adam_beta1(run: Run) -> None:
    """Without memory of earlier gradients, two steps go by the learning rate each, at most."""
    settings = {"num_ppo_epochs": 2, "adam_beta2": 0.0}
    assert run(**settings, adam_beta1=0.0).moved["policy"].abs().max() < 2.001 * RATE
    assert run(**settings).moved["policy"].abs().max() > 2.1 * RATE


def test_key_adam_beta2(run: Run) -> None:
    settings = {"num_ppo_epochs": 2, "adam_beta1": 0.0}
    assert run(**settings, adam_beta2=0.0).moved["policy"].abs().max() < 2.001 * RATE
    assert run(**settings).moved["policy"].abs().max() > 2.1 * RATE


def test_key_adam_epsilon(run: Run) -> None:
    """So large that it is all there is in the denominator, it leaves plain gradient descent."""
    settings = {"learning_rate": 10.0}
    plain, adam = run(**PLAIN), run(**settings, adam_epsilon=1000.0)
    assert agree(adam.moved["policy"], plain.moved["policy"])
    assert run(**settings).moved["policy"].abs().max() > 9


def test_key_weight_decay(run: Run, roles) -> None:
    plain, decayed = run(), run(weight_decay=1.0)
    for role in ("policy", "value"):
        assert agree(decayed.moved[role] - plain.moved[role], -RATE * trained_weights(roles(), role))


def test_key_lr_scheduler_type(run: Run) -> None:
    assert run(**THREE_UPDATES).logged("lr") == pytest.approx([RATE, RATE * 2 / 3, RATE / 3])
    constant = run(**THREE_UPDATES, lr_scheduler_type="constant", value_learning_rate=1e-4)
    assert constant.logged("lr") == pytest.approx([RATE] * 3)
    assert constant.logged("lr_value") == pytest.approx([1e-4] * 3)


def test_key_lr_scheduler_kwargs(run: Run) -> None:
    settings = {**THREE_UPDATES, "lr_scheduler_type": "polynomial"}
    assert run(**settings).logged("lr") == pytest.approx([RATE, RATE * 2 / 3, RATE / 3], rel=1e-3)
    squared = run(**settings, lr_scheduler_kwargs={"power": 2.0})
    assert squared.logged("lr") == pytest.approx([RATE, RATE * 4 / 9, RATE / 9], rel=1e-3)


def test_key_warmup_steps(run: Run) -> None:
    warm = run(**THREE_UPDATES, warmup_steps=2)
    assert warm.logged("lr") == warm.logged("lr_value") == pytest.approx([0, RATE / 2, RATE])
    assert run(**THREE_UPDATES).logged("lr")[0] == RATE


def test_key_max_grad_norm(run: Run) -> None:
    """Each role's gradient is cut to that length by itself; its length before that is logged."""
    plain, clipped = run(**PLAIN), run(**PLAIN, max_grad_norm=0.01)
    for role in ("policy", "value"):
        assert plain.logged(f"{role}/grad_norm") == clipped.logged(f"{role}/grad_norm")
        assert plain.logged(f"{role}/grad_norm")[0] > 0.1
        assert clipped.moved[role].norm().item() == pytest.approx(RATE * 0.01, rel=1e-2)


def test_key_max_skipped_steps(run: Run) -> None:
    """The first step goes so far that the gradients of the other three are not finite."""
    settings = {**PLAIN, "learning_rate": 1e38, "num_ppo_epochs": 4}
    ended = run(**settings, max_skipped_steps=4)
    assert (ended.steps, ended.logged("skipped_steps")) == (1, [3])
    with pytest.raises(RuntimeError, match="2 optimizer steps in a row"):
        run(**settings, max_skipped_steps=2)


# How much, and in which portions


def test_key_max_steps(run: Run) -> None:
    assert (updates(run()), updates(run(max_steps=2))) == (1, 2)


def test_key_total_episodes(run: Run) -> None:
    """Eight episodes an update; what is begun is finished."""
    one, two = (run(max_steps=-1, total_episodes=episodes) for episodes in (8, 9))
    assert (updates(one), one.logged("episode")) == (1, [8])
    assert (updates(two), two.logged("episode")) == (2, [8, 16])


def test_key_num_train_epochs(run: Run) -> None:
    """Of twenty prompts."""
    assert updates(run(max_steps=-1, num_train_epochs=0.4)) == 1
    assert updates(run(max_steps=-1, num_train_epochs=0.8)) == 2


def test_key_num_ppo_epochs(run: Run) -> None:
    one, three = run(), run(num_ppo_epochs=3)
    assert (one.steps, three.steps) == (1, 3)
    assert (one.rows["training"], three.rows["training"]) == ([4] * 4, [4] * 12)
    assert one.prompts == three.prompts


def test_key_num_mini_batches(run: Run) -> None:
    one, two = run(), run(num_mini_batches=2)
    assert (one.steps, two.steps) == (1, 2)
    assert one.rows["training"] == two.rows["training"] == [4] * 4
    assert not agree(one.moved["policy"], two.moved["policy"])


def test_key_per_device_train_batch_size(run: Run) -> None:
    """As many episodes are trained on at a time, and an update has that times `gradient_accumulation_steps`."""
    four, two = run(), run(per_device_train_batch_size=2)
    assert (four.logged("episode"), two.logged("episode")) == ([8], [4])
    assert (four.rows["training"], two.rows["training"]) == ([4] * 4, [2] * 4)


def test_key_gradient_accumulation_steps(run: Run) -> None:
    two, four = run(), run(gradient_accumulation_steps=4)
    assert (two.logged("episode"), four.logged("episode")) == ([8], [16])
    assert (two.rows["training"], four.rows["training"]) == ([4] * 4, [4] * 8)
    assert (two.steps, four.steps) == (1, 1)


def test_key_local_rollout_forward_batch_size(run: Run) -> None:
    run(seed=1)  # the first training on a base also reads single rows, to find its head
    all_at_once, three = run(), run(local_rollout_forward_batch_size=3)
    for doing in ("sampling", "scoring"):
        assert set(all_at_once.rows[doing]) == {8}
        assert set(three.rows[doing]) == {3, 2}
    assert all_at_once.prompts == three.prompts


def test_key_gradient_checkpointing(run: Run, make_artifacts, share) -> None:
    """Each training pass computes its layers once more, and the weights come out the same."""
    settings = {"num_ppo_epochs": 2}
    plain, recomputed = run(**settings), run(share(make_artifacts()), **settings, gradient_checkpointing=True)
    assert plain.rows["training"] == recomputed.rows["training"]
    assert plain.layer_passes == plain.base_passes
    assert recomputed.layer_passes == recomputed.base_passes + len(recomputed.rows["training"])
    for role in ("policy", "value"):
        assert torch.allclose(plain.moved[role], recomputed.moved[role], rtol=0, atol=1e-5)


# Sampling


def test_key_response_length(run: Run) -> None:
    for length in (2, 5):
        assert run(response_length=length).logged("reply/length") == [length]


def second_token(run: Run) -> int:
    """A token that some replies of the plain run hold, early in the first one."""
    return int(run().scored[0].episodes.replies[0, 1])


@pytest.fixture
def no_row_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended stay in the batch, so that the others get the same random numbers as without a stop."""
    monkeypatch.setattr(decoding, "FREE", 2.0)


def assert_stops_at(tokens: set[int], stopping: Outcome, endless: Outcome) -> None:
    """The replies are the same, up to the first stop token."""
    for row in range(8):
        reply = endless.scored[0].episodes.replies[row].tolist()
        length = next((i + 1 for i, token in enumerate(reply) if token in tokens), len(reply))
        assert stopping.scored[0].episodes.reply_lengths[row] == length
        assert stopping.scored[0].episodes.replies[row, :length].tolist() == reply[:length]
    assert stopping.logged("reply/length")[0] < endless.logged("reply/length")[0] == 5


@pytest.mark.usefixtures("no_row_leaves")
def test_key_stop_token_id(run: Run) -> None:
    token = second_token(run)
    assert_stops_at({token}, run(stop_token_id=token), run())
    other = int(run().scored[0].episodes.replies[1, 2])
    assert other != token
    assert_stops_at({token, other}, run(stop_token_id=[token, other]), run())


@pytest.mark.usefixtures("no_row_leaves")
def test_key_stop_token(run: Run, tokenizer) -> None:
    token = second_token(run)
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(token)
    assert other.eos_token_id == token
    own = tokenizer.eos_token_id  # by the generation settings of the checkpoint it ends a text as well
    assert_stops_at({token, own}, run(processing_class=other, stop_token="eos"), run(processing_class=other))


def test_key_temperature(run: Run) -> None:
    """Towards 0 the likeliest token is as good as certain."""
    cold, plain, hot = run(temperature=1e-3), run(), run(temperature=4.0)
    assert cold.logged("objective/entropy")[0] < 0.1
    assert cold.logged("policy/entropy_avg")[0] < 0.1 < plain.logged("policy/entropy_avg")[0]
    assert plain.logged("policy/entropy_avg")[0] < hot.logged("policy/entropy_avg")[0]


def test_key_data_seed(run: Run) -> None:
    assert sorted(run().prompts[0]) != sorted(run(data_seed=1).prompts[0])


def test_the_seed_decides_which_prompts_and_which_replies(run: Run) -> None:
    one, other, prompts_kept = run(), run(seed=1), run(seed=1, data_seed=42)
    assert one.prompts != other.prompts
    assert one.prompts == prompts_kept.prompts
    assert not torch.equal(one.scored[0].episodes.ids, prompts_kept.scored[0].episodes.ids)


@pytest.fixture
def determinism_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets, process and libraries are as before afterwards."""
    environment, cudnn = dict(os.environ), torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("determinism_restored")
def test_key_full_determinism(run: Run) -> None:
    class Note(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seen.append(torch.are_deterministic_algorithms_enabled())

    plain, full = Note(), Note()
    one, other = run(callbacks=[plain]), run(callbacks=[full], full_determinism=True)
    assert (plain.seen, full.seen) == ([False], [True])
    assert one.prompts == other.prompts  # seeded as without


# From scores to returns


@pytest.mark.usefixtures("no_row_leaves")
def test_key_missing_eos_penalty(run: Run) -> None:
    token = second_token(run)
    plain, penalized = run(stop_token_id=token), run(stop_token_id=token, missing_eos_penalty=2.0)
    ended = penalized.scored[0].episodes.ended
    assert ended.any() and not ended.all()
    assert torch.allclose(penalized.shaped[0][0], plain.shaped[0][0] - 2.0 * ~ended)
    assert not agree(plain.moved["policy"], penalized.moved["policy"])


def test_key_missing_eos_score(run: Run) -> None:
    token = second_token(run)
    plain, replaced = run(stop_token_id=token), run(stop_token_id=token, missing_eos_score=-1.0)
    ended = replaced.scored[0].episodes.ended
    assert torch.equal(replaced.shaped[0][0][ended], plain.shaped[0][0][ended])
    assert set(replaced.shaped[0][0][~ended].tolist()) == {-1.0}
    assert not agree(plain.moved["policy"], replaced.moved["policy"])


def test_key_normalize_scores(run: Run) -> None:
    plain, normal = run(), run(normalize_scores=True)
    scores = normal.shaped[0][0]
    assert (scores.mean().item(), scores.std().item()) == pytest.approx((0, 1), abs=1e-5)
    assert abs(plain.logged("objective/scores")[0]) > 0.1 > abs(normal.logged("objective/scores")[0])
    assert plain.logged("reward/score_mean") == normal.logged("reward/score_mean")
    assert not agree(plain.moved["value"], normal.moved["value"])


def test_key_score_clip(run: Run) -> None:
    plain, clipped = run(), run(score_clip=0.1)
    assert plain.shaped[0][0].abs().max() > 0.1
    assert torch.equal(clipped.shaped[0][0], plain.shaped[0][0].clamp(-0.1, 0.1))
    assert plain.logged("reward/score_mean") == clipped.logged("reward/score_mean")
    assert not agree(plain.moved["policy"], clipped.moved["policy"])


def test_key_whiten_rewards(run: Run) -> None:
    plain, white = run(), run(whiten_rewards=True)
    (before,), (after,) = ([rewards for _, rewards in outcome.shaped] for outcome in (plain, white))
    assert after.var().item() == pytest.approx(1, abs=1e-3)
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-5)
    assert not torch.equal(plain.returns[0], white.returns[0])


def test_key_kl_coef(run: Run) -> None:
    """Nothing at the first update, where KL is 0; at the second, that much more is taken off at each token."""
    plain, more = run(max_steps=2), run(max_steps=2, kl_coef=1.0)
    difference = more.shaped[1][1] - plain.shaped[1][1]
    kl = plain.scored[1].kl
    assert torch.equal(more.shaped[0][1], plain.shaped[0][1])
    assert torch.allclose(difference, -(1.0 - 0.05) * kl, atol=1e-5) and kl.abs().max() > 0.01
    assert more.logged("objective/kl_coef") == [1.0, 1.0]


def test_key_kl_estimator(run: Run) -> None:
    plain, other = run(max_steps=2), run(max_steps=2, kl_estimator="k3")
    assert torch.equal(plain.scored[1].episodes.ids, other.scored[1].episodes.ids)
    assert plain.scored[1].kl.min() < 0 <= other.scored[1].kl.min()
    log_ratio = plain.scored[1].kl
    assert torch.allclose(other.scored[1].kl, (-log_ratio).exp() - 1 + log_ratio, rtol=1e-3, atol=1e-5)
    assert not torch.equal(plain.returns[1], other.returns[1])


def test_key_target_kl(run: Run) -> None:
    """KL is 0 after the first update, far below any target, so the coefficient sinks: 8 of 10,000 episodes of 20 %."""
    assert run(max_steps=2).logged("objective/kl_coef") == [0.05, 0.05]
    steered = run(max_steps=2, target_kl=1.0)
    assert steered.logged("objective/kl_coef") == pytest.approx([0.05, 0.05 * (1 - 0.2 * 8 / 10_000)], rel=1e-9)


def test_key_kl_horizon(run: Run) -> None:
    steered = run(max_steps=2, target_kl=1.0, kl_horizon=16)
    assert steered.logged("objective/kl_coef") == pytest.approx([0.05, 0.05 * (1 - 0.2 * 8 / 16)], rel=1e-9)


def test_key_kl_budget(run: Run) -> None:
    """Training ends as soon as KL is over it: here after one update, which is too early to have a better policy."""
    settings = {"max_steps": 2, "kl_estimator": "k3"}
    assert updates(run(**settings, kl_budget=1e6)) == 2
    with pytest.raises(RuntimeError, match="over the `kl_budget` of 1e-06"):
        run(**settings, kl_budget=1e-6)


def test_key_lam(run: Run) -> None:
    """With 1 each token's return is the score itself, as KL is still 0; with less, the values have a say."""
    whole, plain = run(lam=1.0), run()
    assert torch.allclose(whole.returns[0], whole.shaped[0][0][:, None].expand(8, 5), atol=1e-5)
    assert torch.allclose(plain.returns[0][:, -1], plain.shaped[0][0], atol=1e-5)
    assert (plain.returns[0] - whole.returns[0])[:, 0].abs().min() > 1e-4


def test_key_gamma(run: Run) -> None:
    """A score counts half as much one token earlier."""
    half = run(lam=1.0, gamma=0.5)
    fading = 0.5 ** torch.arange(4, -1, -1)
    assert torch.allclose(half.returns[0], half.shaped[0][0][:, None] * fading, atol=1e-5)


# The losses


def test_key_cliprange(run: Run) -> None:
    """Nearly nothing is left of the second step of the policy; the value model does not notice."""
    settings = {**PLAIN, "num_ppo_epochs": 2}
    one, plain, clipped = run(**PLAIN), run(**settings), run(**settings, cliprange=1e-6)
    assert clipped.logged("policy/clipfrac_avg")[0] > plain.logged("policy/clipfrac_avg")[0]
    assert not agree(clipped.moved["policy"], plain.moved["policy"], rel=0.05)
    second = {name: (outcome.moved["policy"] - one.moved["policy"]).norm() for name, outcome in
              (("plain", plain), ("clipped", clipped))}  # fmt: skip
    assert second["clipped"] < second["plain"]
    assert torch.equal(plain.moved["value"], clipped.moved["value"])


def test_key_cliprange_value(run: Run) -> None:
    settings = {**PLAIN, "num_ppo_epochs": 2}
    one, plain, clipped = run(**PLAIN), run(**settings), run(**settings, cliprange_value=1e-6)
    assert clipped.logged("val/clipfrac_avg")[0] > plain.logged("val/clipfrac_avg")[0]
    second = {name: (outcome.moved["value"] - one.moved["value"]).norm() for name, outcome in
              (("plain", plain), ("clipped", clipped))}  # fmt: skip
    assert second["clipped"] < second["plain"]
    assert torch.equal(plain.moved["policy"], clipped.moved["policy"])


def test_key_log_ratio_clamp(run: Run) -> None:
    plain, clamped = run(num_ppo_epochs=2), run(num_ppo_epochs=2, log_ratio_clamp=1e-3)
    assert plain.logged("val/ratio_var")[0] > 1e-3
    assert clamped.logged("val/ratio_var")[0] < 1e-6
    assert not agree(plain.moved["policy"], clamped.moved["policy"])


def test_key_vf_coef(run: Run) -> None:
    one, twice = run(**PLAIN), run(**PLAIN, vf_coef=0.2)
    assert agree(twice.moved["value"], 2 * one.moved["value"])
    assert torch.equal(one.moved["policy"], twice.moved["policy"])
    assert one.logged("loss/value_avg") == twice.logged("loss/value_avg")


def test_key_value_warmup_updates(run: Run) -> None:
    plain, warming = run(), run(value_warmup_updates=1)
    assert plain.moved["policy"].any() and not warming.moved["policy"].any()
    assert torch.equal(plain.moved["value"], warming.moved["value"])


def test_key_ptx_coef(run: Run) -> None:
    """The policy's step is that of PPO and, times the coefficient, that of the demonstrations."""
    none = run(**PLAIN)
    one, three = (run(**PLAIN, ptx_coef=weight, ptx_dataset=DEMONSTRATIONS) for weight in (1.0, 3.0))
    step = one.moved["policy"] - none.moved["policy"]
    assert agree(three.moved["policy"] - none.moved["policy"], 3 * step)
    assert torch.equal(none.moved["value"], three.moved["value"])
    assert one.logged("loss/ptx") == three.logged("loss/ptx") != []


def test_bf16_computes_every_forward_pass_alike(run: Run) -> None:
    """`model.dtype` sets it. Rollout and training would otherwise differ, and the first ratio not be 1."""
    plain, low = run(), run(bf16=True)
    assert low.logged("objective/kl") == [0]
    assert low.logged("val/ratio") == [pytest.approx(1, abs=1e-6)]  # in bfloat16, the next number is 1.0078
    assert low.logged("val/ratio_var") == [pytest.approx(0, abs=1e-9)]
    assert not torch.equal(plain.scored[0].values, low.scored[0].values)
    assert not torch.equal(plain.moved["policy"], low.moved["policy"])


# Evaluating, logging, saving

EVALUATED = "eval_objective/scores"


def test_key_eval_strategy(run: Run) -> None:
    settings = {**THREE_UPDATES, "eval_dataset": HELD_OUT, "per_device_train_batch_size": 10}
    assert run(**settings).steps_with(EVALUATED) == []
    assert run(**settings, eval_strategy="steps").steps_with(EVALUATED) == [1, 2, 3]
    assert run(**settings, eval_strategy="epoch").steps_with(EVALUATED) == [2]  # ten prompts of twenty


def test_key_eval_steps(run: Run) -> None:
    settings = {**THREE_UPDATES, "eval_dataset": HELD_OUT, "eval_strategy": "steps"}
    assert run(**settings, eval_steps=1).steps_with(EVALUATED) == [1, 2, 3]
    assert run(**settings, eval_steps=2).steps_with(EVALUATED) == [2, 3]


def test_key_eval_delay(run: Run) -> None:
    settings = {**THREE_UPDATES, "eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 1}
    assert run(**settings, eval_delay=3).steps_with(EVALUATED) == [3]


def test_key_eval_on_start(run: Run) -> None:
    settings = {**THREE_UPDATES, "eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 1}
    assert run(**settings, eval_on_start=True).steps_with(EVALUATED) == [0, 1, 2, 3]


def test_key_per_device_eval_batch_size(run: Run) -> None:
    settings = {"eval_dataset": HELD_OUT, "eval_strategy": "steps"}
    one, other = run(**settings), run(**settings, per_device_eval_batch_size=2)
    assert [len(prompts) for prompts in one.prompts] == [8, 3]
    assert [len(prompts) for prompts in other.prompts] == [8, 2, 1]
    assert set(other.rows["sampling"]) == {8, 2, 1}


def test_key_logging_steps(run: Run) -> None:
    """What is left over at the end is logged there."""
    assert run(**THREE_UPDATES).steps_with("loss/policy_avg") == [1, 2, 3]
    assert run(**THREE_UPDATES, logging_steps=2).steps_with("loss/policy_avg") == [2, 3]


def test_key_logging_strategy(run: Run) -> None:
    assert run(**THREE_UPDATES, logging_strategy="no").steps_with("loss/policy_avg") == [3]
    epochs = {**THREE_UPDATES, "per_device_train_batch_size": 10, "logging_strategy": "epoch"}
    assert run(**epochs).steps_with("loss/policy_avg") == [2, 3]


def test_key_logging_first_step(run: Run) -> None:
    assert run(**THREE_UPDATES, logging_steps=3).steps_with("loss/policy_avg") == [3]
    assert run(**THREE_UPDATES, logging_steps=3, logging_first_step=True).steps_with("loss/policy_avg") == [1, 3]


def test_key_num_sample_generations(run: Run) -> None:
    """Each time, two episodes: an update has no more."""
    assert run(**THREE_UPDATES).samples == 0
    assert run(**THREE_UPDATES, num_sample_generations=1).samples == 2
    assert run(**THREE_UPDATES, num_sample_generations=3).samples == 6


def test_key_save_strategy(run: Run) -> None:
    settings = {**THREE_UPDATES, "save_steps": 1}
    assert run(**settings).checkpoints == set()
    assert run(**settings, save_strategy="steps").checkpoints == {"checkpoint-2", "checkpoint-3"}


def test_key_save_steps(run: Run) -> None:
    """And at the end, in any case."""
    settings = {**THREE_UPDATES, "save_strategy": "steps"}
    assert run(**settings).checkpoints == {"checkpoint-3"}
    assert run(**settings, save_steps=2).checkpoints == {"checkpoint-2", "checkpoint-3"}


def test_key_save_total_limit(run: Run) -> None:
    settings = {**THREE_UPDATES, "save_strategy": "steps", "save_steps": 1}
    assert run(**settings, save_total_limit=1).checkpoints == {"checkpoint-3"}
    assert len(run(**settings, save_total_limit=3).checkpoints) == 3
