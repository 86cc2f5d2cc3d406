"""One update by TRL's own PPOTrainer and one by ours: the same where TRL is right, and by hand where it is not.

TRL 1.12 is the last with a PPOTrainer; with a later one all of this is skipped. `make floor` runs it.

By hand means `learn_by_hand` below: PPO as the papers write it, one episode at a time, without padding or masks.
"""

import copy
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import TRAINED, SharedBase
from rlhf_pipeline.ppo.advantages import estimate_advantages
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Model

trl_ppo_trainer = pytest.importorskip(
    "trl.experimental.ppo.ppo_trainer", reason="TRL's own PPOTrainer, to compare with, is in TRL 1.12 alone"
)
TRLPPOTrainer = trl_ppo_trainer.PPOTrainer
pytestmark = [pytest.mark.floor, pytest.mark.slow]

SEED = 3  # of sampling
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Large enough for a KL that is no rounding error, and for ratios beyond the clip range after one step.
SPREADS = {"llama": 0.03, "trained": 0.1}
RATES = {"llama": 1.0, "trained": 0.5}
# Plain gradient descent, so that weights move in proportion to gradients: Adam would blow up the rounding errors of
# gradients that are nearly 0 to whole steps.
SETTINGS = {
    "max_steps": -1,
    "total_episodes": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_ppo_epochs": 1,
    "response_length": 6,
    "optim": "sgd",
    "max_grad_norm": 0.0,
}
UNENDING = {"stop_token": None}  # no padding, which is where TRL is right
# So hot that the trained checkpoint ends some replies after 4 to 8 tokens, and that others are cut.
ENDING = {"stop_token": "eos", "response_length": 8, "temperature": 2.0}
COMPARED = (
    "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
    "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "policy/entropy_avg", "val/ratio",
    "val/num_eos_tokens", "lr", "episode",
)  # fmt: skip

Moved = dict[str, dict[str, Tensor]]  # by how much each weight of policy and value moved
Episode = tuple[list[int], list[int]]  # a prompt's token ids and its reply's


class Update(NamedTuple):
    """What one update did.

    Attributes:
        numbers: as logged.
        replies: int64 `[B, T]`, as generated.
        steps: how many optimizer steps were taken.
        moved: by how much each weight of policy and value moved.
    """

    numbers: dict[str, float]
    replies: Tensor
    steps: int
    moved: Moved


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect() -> Iterator[None]:
    """TRL collects garbage twice an update, which takes most of its time if it goes through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def paths(checkpoints) -> dict[str, str]:
    """A random checkpoint, and the one that ships with the package, which knows how to end a reply."""
    return {"llama": str(checkpoints["llama"]), "trained": str(TINY / "checkpoint")}


@pytest.fixture(scope="module")
def trained_prompts(tokenizer) -> Dataset:
    """Eight prompts that the trained checkpoint knows, of three different lengths."""
    lines = (TINY / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    return Dataset.from_dict({"input_ids": tokenizer([json.loads(line)["prompt"] for line in lines])["input_ids"]})


@pytest.fixture(scope="module")
def make_roles(paths, tokenizer, randomise, tmp_path_factory) -> Callable[[str], SharedBase]:
    """A function that puts four roles on a checkpoint, every time with the same weights; none equals another."""
    made: dict[str, SharedBase] = {}

    def make(checkpoint: str) -> SharedBase:
        if checkpoint not in made:
            torch.manual_seed(0)
            spec = Model(path=paths[checkpoint], quantization="none", dtype="float32")
            model = adapters.with_reward_adapter(base.load_base(spec, tokenizer, "score"), LORA, None)
            randomise(model)
            reward = tmp_path_factory.mktemp("reward") / checkpoint
            adapters.save_adapter(model, "default", reward, tokenizer)
            shared = SharedBase(base.load_base(spec, tokenizer), LORA, None, [(reward, LORA)])
            with torch.no_grad():
                for role in TRAINED:
                    for name, parameter in adapters.adapter_parameters(shared.peft, role).items():
                        if "lora_B" in name:
                            parameter += SPREADS[checkpoint] * torch.randn_like(parameter)
            made[checkpoint] = shared
        return copy.deepcopy(made[checkpoint])

    return make


@pytest.fixture
def make_ours(make_trainer, make_roles, trained_prompts) -> Callable[..., PPOTrainer]:
    """A function that makes our trainer on a checkpoint; keywords are settings."""

    def make(checkpoint: str, **settings: Any) -> PPOTrainer:
        if checkpoint == "trained":
            settings.setdefault("train_dataset", trained_prompts)
        rate = {"learning_rate": RATES[checkpoint]}
        return make_trainer(shared=make_roles(checkpoint), **SETTINGS | rate | settings)

    return make


@pytest.fixture
def make_theirs(make_roles) -> Callable[..., Any]:
    """A function that makes TRL's trainer with the weights, settings and prompts that ours starts with."""

    def make(checkpoint: str, ours: PPOTrainer) -> Any:
        shared = make_roles(checkpoint)
        theirs = TRLPPOTrainer(
            args=copy.deepcopy(ours.args),
            processing_class=ours.processing_class,
            model=shared.policy,
            ref_model=shared.reference,
            reward_model=shared.reward,
            value_model=shared.value,
            train_dataset=ours.train_dataset,
        )
        theirs.dataloader = [ours.processing_class.pad({"input_ids": ours._prompts(0)[0]}, return_tensors="pt")]
        return theirs

    return make


@contextmanager
def recorded_replies(view: Any) -> Iterator[list[Tensor]]:
    """Note what a policy's `generate` returns."""
    rows: list[Tensor] = []
    generate = view.generate

    def recording(**inputs: Any) -> Any:
        output = generate(**inputs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        rows.append(sequences[:, inputs["input_ids"].shape[1] :])
        return output

    view.generate = recording
    try:
        yield rows
    finally:
        del view.generate


def rolled_out(trainer: PPOTrainer, prompts: list[list[int]]) -> Episodes:
    """Replies as TRL samples them, by `generate` from torch's own random numbers; ours draws in another way."""
    longest, args, pad = max(map(len, prompts)), trainer.args, trainer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    stops = trainer.stop_token_id if isinstance(trainer.stop_token_id, list) else [trainer.stop_token_id]
    settings = GenerationConfig(
        max_new_tokens=args.response_length, eos_token_id=stops, pad_token_id=pad, do_sample=True,
        temperature=args.temperature, top_k=0, top_p=1.0,
    )  # fmt: skip
    mask = (torch.arange(longest) >= longest - sizes[:, None]).long()
    whole = trainer.policy.generate(input_ids=padded, attention_mask=mask, generation_config=settings)
    at_stop = torch.isin(whole[:, longest:], torch.tensor(stops, dtype=torch.long))
    lengths = torch.where(at_stop.any(1), at_stop.int().argmax(1) + 1, at_stop.shape[1])
    ids = torch.full((len(prompts), int((sizes + lengths).max())), pad)
    for row, (start, length) in enumerate(zip((longest - sizes).tolist(), (sizes + lengths).tolist(), strict=True)):
        ids[row, :length] = whole[row, start : start + length]
    return Episodes(ids, sizes, lengths, at_stop.any(1), torch.zeros(len(prompts), int(lengths.max())))


def update(trainer: Any) -> Update:
    """Let a trainer make its one update, from the random numbers that every other gets."""
    if isinstance(trainer, PPOTrainer):
        trainer.roll_out = lambda prompts: rolled_out(trainer, prompts)
    shared = trainer.shared if isinstance(trainer, PPOTrainer) else trainer.policy_model.shared
    before, steps = weights(shared), 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    hook = register_optimizer_step_post_hook(count)
    np.random.seed(0)  # TRL's order of episodes
    torch.manual_seed(SEED)
    try:
        with recorded_replies(shared.policy) as replies:
            trainer.train()
    finally:
        hook.remove()
    assert trainer.state.global_step == len(replies) == 1
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return Update(logged, replies[0], steps, moved_from(before, shared))


def weights(shared: SharedBase) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights that train, by role and name."""
    return {
        role: {n: p.detach().clone() for n, p in getattr(shared, role).named_parameters() if p.requires_grad}
        for role in TRAINED
    }


def moved_from(before: dict[str, dict[str, Tensor]], shared: SharedBase) -> Moved:
    """By how much the weights that train have moved."""
    after = weights(shared)
    return {role: {name: after[role][name] - old for name, old in of.items()} for role, of in before.items()}


def distance(one: Moved, other: Moved, role: str) -> float:
    """How far two updates of a role's weights are apart, as a share of how far they went."""
    a, b = (torch.cat([tensor.flatten() for tensor in moved[role].values()]) for moved in (one, other))
    assert b.norm() > 0.01
    return float((a - b).norm() / b.norm())


def assert_same_weights(one: Moved, other: Moved, tolerance: float = 1e-4) -> None:
    for role in TRAINED:
        assert distance(one, other, role) < tolerance


def assert_same_numbers(one: dict[str, float], other: dict[str, float], names: Sequence[str]) -> None:
    """The same within 1e-4; what is 0 or nearly, as the first mean of whitened advantages, within 1e-5."""
    ours, theirs = ({name: numbers[name] for name in names} for numbers in (one, other))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def divided(micro_batch: int, parts: int) -> dict[str, int]:
    """The settings of a batch that is read in parts."""
    return {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": parts}


def untimed(numbers: dict[str, float]) -> list[str]:
    """The names of numbers that do not tell how long something took."""
    return [name for name in numbers if name != "eps" and not name.endswith(("seconds", "_per_second"))]


def episodes_of(trainer: PPOTrainer, replies: Tensor) -> list[Episode]:
    """Prompts and replies as plain lists, each reply up to its stop token."""
    stop = trainer.stop_token_id
    rows = replies.tolist()
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    return list(zip(trainer._prompts(0)[0], cut, strict=True))


def log_probs_by_hand(view: Any, episode: Episode, temperature: float) -> tuple[Tensor, Tensor]:
    """Of one reply's tokens under a policy, from all its logits; and the entropy before each."""
    prompt, reply = episode
    logits = view(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1] / temperature
    log_p = logits.log_softmax(-1)
    return log_p[range(len(reply)), reply], -(log_p.exp() * log_p).sum(-1)


def values_by_hand(view: Any, episode: Episode) -> Tensor:
    """Of the states before each of one reply's tokens."""
    prompt, reply = episode
    return view(input_ids=torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1, 0]


def score_by_hand(view: Any, episode: Episode) -> Tensor:
    """What a reward model says of one reply at its last token."""
    return view(input_ids=torch.tensor([[*episode[0], *episode[1]]]))[0, -1, 0]


def advantages_by_hand(shared: SharedBase, episode: Episode, args: PPOConfig) -> Tensor:
    """Of one reply: the sum over later temporal differences, the score being part of the last token's reward."""
    log_probs = log_probs_by_hand(shared.policy, episode, args.temperature)[0]
    rewards = -args.kl_coef * (log_probs - log_probs_by_hand(shared.reference, episode, args.temperature)[0])
    rewards[-1] += score_by_hand(shared.reward, episode)
    values = values_by_hand(shared.value, episode)
    differences = rewards + args.gamma * torch.cat([values[1:], torch.zeros(1)]) - values
    discount = args.gamma * args.lam
    return torch.stack(
        [sum(discount ** (k - t) * differences[k] for k in range(t, len(values))) for t in range(len(values))]
    )


def learn_by_hand(
    shared: SharedBase, episodes: list[Episode], args: PPOConfig, mini_batches: list[Sequence[int]] | None = None
) -> tuple[dict[str, float], Moved]:
    """PPO's update, by gradient descent on the mean loss per token of one mini-batch after another.

    Args:
        shared: whose policy and value learn.
        episodes: to learn from.
        args: the settings.
        mini_batches: the episodes of each step; by default all of them, `num_ppo_epochs` times.

    Returns:
        Means over all tokens of all steps by the names that trainers log, and how far the weights moved.
    """
    before = weights(shared)
    with torch.no_grad():
        old_log_probs = [log_probs_by_hand(shared.policy, episode, args.temperature)[0] for episode in episodes]
        old_values = [values_by_hand(shared.value, episode) for episode in episodes]
        advantages = [advantages_by_hand(shared, episode, args) for episode in episodes]
        returns = [one + value for one, value in zip(advantages, old_values, strict=True)]
        together = torch.cat(advantages)
        advantages = [(one - together.mean()) / together.std() for one in advantages]
    trained = [p for role in TRAINED for p in getattr(shared, role).parameters() if p.requires_grad]
    noted: dict[str, list[Tensor]] = defaultdict(list)
    for rows in mini_batches or [range(len(episodes))] * args.num_ppo_epochs:
        gained, wrong = [], []
        for row in rows:
            log_probs, entropy = log_probs_by_hand(shared.policy, episodes[row], args.temperature)
            ratio = (log_probs - old_log_probs[row]).exp()
            clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            gained.append(torch.minimum(ratio * advantages[row], clipped * advantages[row]))
            values = values_by_hand(shared.value, episodes[row])
            near = old_values[row] + (values - old_values[row]).clamp(-args.cliprange_value, args.cliprange_value)
            wrong.append(0.5 * torch.maximum((values - returns[row]) ** 2, (near - returns[row]) ** 2))
            noted["policy/entropy_avg"].append(entropy.detach())
            noted["policy/approxkl_avg"].append(0.5 * ratio.detach().log() ** 2)
            noted["val/ratio"].append(ratio.detach())
        noted["loss/policy_avg"] += [-one.detach() for one in gained]
        noted["loss/value_avg"] += [one.detach() for one in wrong]
        loss = -torch.cat(gained).mean() + args.vf_coef * torch.cat(wrong).mean()
        with torch.no_grad():
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter -= args.learning_rate * gradient
    return {name: torch.cat(tokens).mean().item() for name, tokens in noted.items()}, moved_from(before, shared)


class TestWhereTrlIsRight:
    """Every reply is as long as `response_length`, so there is no padding behind it; prompts differ in length."""

    @pytest.mark.parametrize("checkpoint", ["llama", "trained"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_ppo_epochs": 2},
            {"num_ppo_epochs": 2, "kl_estimator": "k3", "kl_coef": 0.5},
            {"num_ppo_epochs": 2, "whiten_rewards": True, "kl_coef": 0.5},
            {"num_ppo_epochs": 2, "gamma": 0.9, "lam": 0.5},
            {"num_ppo_epochs": 2, "temperature": 0.7},
            {"num_ppo_epochs": 2, "missing_eos_penalty": 2.0, "vf_coef": 0.5, "cliprange": 0.05},
            {"num_ppo_epochs": 2} | divided(2, 4),
            {"num_ppo_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-4},
        ],
        ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()) or "defaults",
    )
    def test_one_update(self, make_ours, make_theirs, checkpoint, settings):
        """The same replies give the same numbers, and the same weights afterwards."""
        ours = make_ours(checkpoint, **UNENDING, **settings)
        theirs = make_theirs(checkpoint, ours)
        ours, theirs = update(ours), update(theirs)
        assert_close(ours.replies, theirs.replies, rtol=0, atol=0)
        assert (theirs.replies != 0).all()  # a PAD that is sampled would be padding to TRL
        assert_same_numbers(ours.numbers, theirs.numbers, COMPARED)
        assert_same_weights(ours.moved, theirs.moved)
        assert abs(ours.numbers["objective/kl"]) > 1e-3
        if settings.get("num_ppo_epochs") == 2:
            assert ours.numbers["policy/clipfrac_avg"] > 0
            assert ours.numbers["val/clipfrac_avg"] > 0


class TestWhereTrlIsNot:
    """The trained checkpoint ends some of its replies before `response_length`."""

    def test_num_mini_batches_divides_a_batch(self, make_ours, make_theirs, make_roles):
        """Two mini-batches are two optimizer steps, each on its half of the episodes; TRL takes one step on all."""
        settings = ENDING | divided(1, 2) | {"total_episodes": 2, "num_mini_batches": 2}
        ours = make_ours("trained", **settings)
        mine, trl = update(ours), update(make_theirs("trained", ours))
        assert_close(mine.replies, trl.replies, rtol=0, atol=0)
        assert (mine.steps, trl.steps) == (2, 1)
        episodes = episodes_of(ours, mine.replies)
        # Which of the two comes first is drawn.
        orders = ([[0], [1]], [[1], [0]])
        moved = [learn_by_hand(make_roles("trained"), episodes, ours.args, steps)[1] for steps in (*orders, [[0, 1]])]
        apart = [distance(mine.moved, one, "policy") for one in moved]
        assert min(apart[:2]) < 1e-4
        assert max(apart[:2]) > 1e-2
        assert apart[2] > 1e-2

    def test_one_step_at_the_end_of_the_data(self, make_ours, make_theirs, make_roles):
        """A batch is one step, also the last of the data, where Accelerate lets TRL step after every micro-batch."""
        ours = make_ours("trained", **ENDING, **divided(2, 4))
        theirs = make_theirs("trained", ours)
        loader = DataLoader(
            [{"input_ids": prompt} for prompt in ours._prompts(0)[0]],
            batch_size=8,
            collate_fn=theirs.data_collator,
            generator=torch.Generator(),  # or it draws a number of those that sampling needs
        )
        theirs.dataloader = theirs.accelerator.prepare(loader)
        mine, trl = update(ours), update(theirs)
        assert_close(mine.replies, trl.replies, rtol=0, atol=0)
        assert (mine.steps, trl.steps) == (1, 4)
        _, moved = learn_by_hand(make_roles("trained"), episodes_of(ours, mine.replies), ours.args)
        assert_same_weights(mine.moved, moved)

    def test_missing_eos_penalty_looks_for_the_stop_token(self, make_ours, make_theirs, make_roles, tokenizer):
        """A reply that holds `stop_token_id` has ended; TRL looks for EOS, and takes the penalty off all others."""
        stop = tokenizer.encode(".")[-1]
        ours = make_ours("trained", stop_token_id=stop, response_length=5, missing_eos_penalty=1.0)
        mine, trl = update(ours), update(make_theirs("trained", ours))
        assert_close(mine.replies, trl.replies, rtol=0, atol=0)
        episodes, reward = episodes_of(ours, mine.replies), make_roles("trained").reward
        with torch.no_grad():
            scores = [score_by_hand(reward, episode).item() for episode in episodes]
        missing, without_eos = (
            [token not in reply for _, reply in episodes] for token in (stop, tokenizer.eos_token_id)
        )
        assert 0 < sum(missing) < sum(without_eos)
        expected, wrong = ((sum(scores) - sum(one)) / 8 for one in (missing, without_eos))
        assert mine.numbers["objective/scores"] == pytest.approx(expected, rel=1e-4)
        assert mine.numbers["reply/ended"] == 1 - sum(missing) / 8
        assert trl.numbers["objective/scores"] == pytest.approx(wrong, rel=1e-4)

    def test_score_of_a_reply_that_ended_is_its_last_tokens(self, make_ours, make_theirs, make_roles, monkeypatch):
        """Nothing is decided after the last token; TRL gives the score to the padding behind it.

        With lam = 0 a token's advantage is its own reward and the difference of two values, so what the last token
        gets shows where the score went: in TRL, the choice to end a reply never learns what the reply was worth.
        """
        ours = make_ours("trained", **ENDING, lam=0.0)
        theirs = make_theirs("trained", ours)
        seen: list[Tensor] = []
        whiten = trl_ppo_trainer.masked_whiten

        def recording(advantages: Tensor, *rest: Any) -> Tensor:
            seen.append(advantages)
            return whiten(advantages, *rest)

        monkeypatch.setattr(trl_ppo_trainer, "masked_whiten", recording)
        trl = update(theirs)
        torch.manual_seed(SEED)
        scored = ours.score(rolled_out(ours, ours._prompts(0)[0]))
        advantages, _ = estimate_advantages(ours.shape(scored)[1], scored.values, ours.args.gamma, ours.args.lam)
        shared, episodes = make_roles("trained"), episodes_of(ours, trl.replies)
        ended = [row for row, (_, reply) in enumerate(episodes) if len(reply) < 8]
        cut = [row for row, (_, reply) in enumerate(episodes) if len(reply) == 8 and reply[-1] != ours.stop_token_id]
        assert ended and cut
        with torch.no_grad():
            for row, episode in enumerate(episodes):
                last, expected = len(episode[1]) - 1, advantages_by_hand(shared, episode, ours.args)
                score = score_by_hand(shared.reward, episode)
                assert_close(advantages[row, : last + 1], expected, rtol=1e-4, atol=1e-5)
                assert not advantages[row, last + 1 :].any()
                if row in ended:  # TRL: the value at the padding, which stands for nothing, in place of the score
                    after = shared.value(input_ids=torch.tensor([[*episode[0], *episode[1]]]))[0, -1, 0]
                    assert_close(seen[0][row, last], expected[-1] - score + after, rtol=1e-4, atol=1e-5)
                    assert_close(seen[0][row, last + 1], score - after, rtol=1e-4, atol=1e-5)
        assert_close(seen[0][cut, 7], advantages[cut, 7], rtol=1e-4, atol=1e-5)

    def test_averages_leave_padding_out(self, make_ours, make_theirs, make_roles):
        """Entropy, approximate KL and ratio are means over replies' tokens; TRL's are over padding too.

        With gamma = lam = 1 the advantage is the sum of all later rewards less the value, wherever the score lands:
        TRL's policy is then right, and its averages can be told from ours.
        """
        ours = make_ours("trained", **ENDING, gamma=1.0, lam=1.0, num_ppo_epochs=2)
        mine, trl = update(ours), update(make_theirs("trained", ours))
        assert_close(mine.replies, trl.replies, rtol=0, atol=0)
        episodes = episodes_of(ours, mine.replies)
        numbers, moved = learn_by_hand(make_roles("trained"), episodes, ours.args)
        assert_same_numbers(mine.numbers, numbers, list(numbers))
        assert_same_weights(mine.moved, moved)
        assert distance(trl.moved, moved, "policy") < 1e-4
        share = sum(len(reply) for _, reply in episodes) / mine.replies.numel()  # of tokens among all places
        assert share < 0.9
        assert trl.numbers["policy/approxkl_avg"] == pytest.approx(share * numbers["policy/approxkl_avg"], rel=1e-3)
        assert trl.numbers["val/ratio"] - 1 == pytest.approx(share * (numbers["val/ratio"] - 1), rel=1e-3)
        assert trl.numbers["policy/entropy_avg"] != pytest.approx(numbers["policy/entropy_avg"], rel=0.05)


def test_how_a_batch_is_divided_changes_nothing(make_ours, make_theirs):
    """Every token weighs the same whatever the micro-batch; in TRL, more in one of short replies than of long ones."""
    all_ours = [
        make_ours("trained", **ENDING, num_ppo_epochs=2, **divided(*batch)) for batch in ((8, 1), (4, 2), (2, 4))
    ]
    ours = [update(trainer) for trainer in all_ours]
    for other in ours[1:]:
        assert_same_weights(other.moved, ours[0].moved, 1e-5)
        assert_same_numbers(other.numbers, ours[0].numbers, untimed(ours[0].numbers))
    whole, in_parts = (update(make_theirs("trained", all_ours[i])) for i in (0, 2))
    for role in TRAINED:
        assert distance(in_parts.moved, whole.moved, role) > 1e-2
    for other in (*ours, whole, in_parts):
        assert_close(other.replies, ours[0].replies, rtol=0, atol=0)


def test_padding_of_the_tokenizer_does_not_matter(make_ours, tokenizer, trained_prompts):
    """What is padding is known from lengths, so a tokenizer made for other purposes gives the same update.

    The prompts contain EOS, as conversations of several turns do, and one of them the pad token.
    """
    turn = [*tokenizer.encode(" Gladly!"), tokenizer.eos_token_id]
    prompts = [turn + prompt for prompt in trained_prompts["input_ids"]]
    prompts[3][0] = tokenizer.pad_token_id
    padded_with_eos, without_padding, padding_right = (copy.deepcopy(tokenizer) for _ in range(3))
    padded_with_eos.pad_token = tokenizer.eos_token
    without_padding.pad_token = None
    padding_right.padding_side = "right"
    settings = ENDING | {"num_ppo_epochs": 2, "missing_eos_penalty": 1.0}
    settings["train_dataset"] = Dataset.from_dict({"input_ids": prompts})
    expected, *others = (
        update(make_ours("trained", processing_class=other, **settings))
        for other in (tokenizer, padded_with_eos, without_padding, padding_right)
    )
    assert 0 < expected.numbers["reply/ended"] < 1
    for other in others:
        assert_same_numbers(other.numbers, expected.numbers, untimed(expected.numbers))
        assert_same_weights(other.moved, expected.moved, 1e-6)
