"""One update by PPOTrainer beside PPO as the papers write it: in float64, episode by episode, by PEFT's own models."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from given_replies import Given
from peft import PeftModel
from together import together
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_pipeline.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "max_steps": 1, "num_ppo_epochs": 3, "response_length": 12, "temperature": 0.4, "gamma": 0.9, "lam": 0.8,
    "kl_coef": 0.1, "cliprange": 0.1, "cliprange_value": 0.05, "vf_coef": 0.7, "missing_eos_penalty": 0.7,
    "local_rollout_forward_batch_size": 3, "optim": "sgd", "learning_rate": 0.05, "value_learning_rate": 0.3,
    "max_grad_norm": 0.5,
}  # fmt: skip
Episode = tuple[list[int], list[int], bool]  # a prompt's tokens, its reply's, and whether that has ended


class Reference:
    """The four roles as models of their own, and PPO's update by gradient descent.

    Args:
        artifacts: what policy, reference, reward and value begin as.
        value_model: `adapter`, or `head` for a value that is read from the policy's last hidden states.
        value_reaches_trunk: with `head`, whether the policy's adapter gets the gradient of the value's loss.
    """

    def __init__(self, artifacts: Any, value_model: str, value_reaches_trunk: bool = True) -> None:
        path, exact = artifacts.spec.path, {"dtype": torch.float64}
        causal = AutoModelForCausalLM.from_pretrained(path, **exact)
        scorer = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **exact)
        self.policy = PeftModel.from_pretrained(causal, artifacts.init, is_trainable=True).double()
        self.reference = copy.deepcopy(self.policy)
        self.value = PeftModel.from_pretrained(scorer, artifacts.reward, is_trainable=True).double()
        self.reward = copy.deepcopy(self.value)
        self.head = torch.zeros(1, causal.config.hidden_size, dtype=torch.float64, requires_grad=True)
        self.has_head, self.value_reaches_trunk = value_model == "head", value_reaches_trunk

    def trained(self) -> dict[str, dict[str, Tensor]]:
        """The weights that learn, by role and by the names that they have in our views."""
        found = {
            role: {name: p for name, p in getattr(self, role).named_parameters() if p.requires_grad}
            for role in ("policy", "value")
        }
        if self.has_head:
            found["value"] = {"score.weight": self.head}
        return {role: {_name_in_view(name, role): weight for name, weight in of.items()} for role, of in found.items()}

    def hidden(self, model: PeftModel, episode: Episode) -> Tensor:
        """The last hidden states of one episode, `[tokens, hidden]`."""
        return model.base_model.model.model(input_ids=torch.tensor([episode[0] + episode[1]])).last_hidden_state[0]

    def read(self, model: PeftModel, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies of the reply's tokens under a policy, and the states before each of them."""
        prompt, reply, _ = episode
        states = self.hidden(model, episode)[len(prompt) - 1 : -1]
        log_p = (model.base_model.model.lm_head(states) / SETTINGS["temperature"]).log_softmax(-1)
        return log_p[range(len(reply)), reply], -(log_p.exp() * log_p).sum(-1), states

    def values(self, episode: Episode, states: Tensor) -> Tensor:
        """Of the states before each of the reply's tokens; `states` are the policy's."""
        if self.has_head:
            return (states if self.value_reaches_trunk else states.detach()) @ self.head[0]
        states = self.hidden(self.value, episode)[len(episode[0]) - 1 : -1]
        return self.value.base_model.model.score(states)[:, 0]

    def score(self, episode: Episode) -> Tensor:
        """What the reward model says."""
        return self.reward.base_model.model.score(self.hidden(self.reward, episode)[-1])[0]

    def learn(self, episodes: list[Episode]) -> dict[str, float]:
        """Make the update; returns the numbers that are logged of it."""
        s, noted = SETTINGS, defaultdict(list)
        with torch.no_grad():
            first = [self.read(self.policy, episode) for episode in episodes]
            old = [one[0] for one in first]
            old_values = [self.values(episode, one[2]) for episode, one in zip(episodes, first, strict=True)]
            kl = [one - self.read(self.reference, episode)[0] for one, episode in zip(old, episodes, strict=True)]
            raw = [self.score(episode) for episode in episodes]
            scores = [
                one - s["missing_eos_penalty"] * (not ended) for one, (*_, ended) in zip(raw, episodes, strict=True)
            ]
            advantages = [_advantages(*one) for one in zip(kl, scores, old_values, strict=True)]
            returns = [one + values for one, values in zip(advantages, old_values, strict=True)]
            flat = torch.cat(advantages)
            advantages = [(one - flat.mean()) / flat.std() for one in advantages]
        for _ in range(s["num_ppo_epochs"]):
            for row, episode in enumerate(episodes):
                log_probs, entropy, states = self.read(self.policy, episode)
                ratio = (log_probs - old[row]).exp()
                clipped = ratio.clamp(1 - s["cliprange"], 1 + s["cliprange"])
                gain = torch.minimum(ratio * advantages[row], clipped * advantages[row])
                values = self.values(episode, states)
                near = torch.clamp(values - old_values[row], -s["cliprange_value"], s["cliprange_value"])
                wrong = torch.maximum((values - returns[row]) ** 2, (old_values[row] + near - returns[row]) ** 2)
                noted["loss/policy_avg"].append(-gain)
                noted["loss/value_avg"].append(0.5 * wrong)
                noted["policy/entropy_avg"].append(entropy.detach())
                noted["policy/approxkl_avg"].append(0.5 * ratio.detach().log() ** 2)
                noted["policy/clipfrac_avg"].append((clipped * advantages[row] < ratio * advantages[row] - 1e-12) * 1.0)
                noted["val/ratio"].append(ratio.detach())
            count = len(episodes)
            losses = [torch.cat(noted[f"loss/{role}_avg"][-count:]).mean() for role in ("policy", "value")]
            for role, norm in self._descend(losses[0] + s["vf_coef"] * losses[1]).items():
                noted[f"{role}/grad_norm"].append(norm[None])
        numbers = {name: torch.cat(parts).mean().item() for name, parts in noted.items()}
        target, values = torch.cat(returns), torch.cat(old_values)
        return numbers | {
            "value/explained_variance": 1 - ((target - values).var() / target.var()).item(),
            "val/ratio_var": torch.cat(noted["val/ratio"]).var(correction=0).item(),
            "objective/entropy": -torch.stack([one.sum() for one in old]).mean().item(),
            "objective/scores": torch.stack(scores).mean().item(),
            "reward/score_mean": torch.stack(raw).mean().item(),
            "reward/score_std": torch.stack(raw).std(correction=0).item(),
            "reply/length": sum(len(reply) for _, reply, _ in episodes) / len(episodes),
            "reply/ended": sum(ended for *_, ended in episodes) / len(episodes),
        }

    def _descend(self, loss: Tensor) -> dict[str, Tensor]:
        """A step of each role at its own rate, its gradient clipped by itself; returns the norms before that."""
        trained = self.trained()
        every = [weight for of in trained.values() for weight in of.values()]
        gradients = dict(zip(map(id, every), torch.autograd.grad(loss, every, materialize_grads=True), strict=True))
        norms = {}
        for role, rate in (("policy", "learning_rate"), ("value", "value_learning_rate")):
            of_role = [gradients[id(weight)] for weight in trained[role].values()]
            norms[role] = torch.cat([gradient.flatten() for gradient in of_role]).norm()
            scale = min(1.0, SETTINGS["max_grad_norm"] / norms[role].item())
            with torch.no_grad():
                for weight in trained[role].values():
                    weight -= SETTINGS[rate] * scale * gradients[id(weight)]
        return norms


def _name_in_view(name: str, role: str) -> str:
    if "score" in name:
        return "score.weight"
    return name.replace("default", role).replace(".", "_")


def _advantages(kl: Tensor, score: Tensor, values: Tensor) -> Tensor:
    """Of one reply: the sum over later temporal differences, the score being part of the last token's reward."""
    rewards = -SETTINGS["kl_coef"] * kl
    rewards[-1] += score
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + SETTINGS["gamma"] * following - values
    discount = SETTINGS["gamma"] * SETTINGS["lam"]
    return torch.stack(
        [sum(discount ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]
    )


def episodes_of(trainer: PPOTrainer) -> list[Episode]:
    """Let a trainer make its one update; what it learned from."""
    seen: list[Any] = []
    score = trainer.score

    def watched(episodes: Any, *rest: Any) -> Any:
        seen.append(episodes)
        return score(episodes, *rest)

    trainer.score = watched  # type: ignore[method-assign]
    trainer.train()
    (found,) = seen
    rows = zip(found.ids.tolist(), found.prompt_lengths.tolist(), found.reply_lengths.tolist(), strict=True)
    parts = [(ids[:start], ids[start : start + length]) for ids, start, length in rows]
    return [(*part, ended) for part, ended in zip(parts, found.ended.tolist(), strict=True)]


def worst(trainer: PPOTrainer, reference: Reference, role: str) -> float:
    """How far a role's weights are from the reference's, at most."""
    ours = {name: p for name, p in getattr(trainer.shared, role).named_parameters() if p.requires_grad}
    theirs = reference.trained()[role]
    assert ours.keys() == theirs.keys()
    return max((weight.detach() - theirs[name].detach()).abs().max().item() for name, weight in ours.items())


@pytest.mark.parametrize("value_model", ["adapter", "head"])
def test_an_update_is_that_of_an_independent_reference(make_trainer, make_artifacts, share, value_model: str) -> None:
    """Weights within 1e-6, and what is logged; with replies of unequal length, read in parts, and recomputed layers."""
    artifacts, has_head = make_artifacts(), value_model == "head"
    endless = episodes_of(make_trainer(shared=share(artifacts), **SETTINGS, stop_token_id=None))
    stop = endless[0][1][4]  # until a reply ends, the same tokens are drawn: so this one ends before its limit
    trainer = make_trainer(
        shared=share(artifacts, has_head), stop_token_id=stop, gradient_checkpointing=has_head, **SETTINGS
    )
    episodes = episodes_of(trainer)
    assert len({len(reply) for _, reply, _ in episodes}) > 1 and 0 < sum(ended for *_, ended in episodes) < 8
    reference = Reference(artifacts, value_model)
    before = {
        role: {name: weight.detach().clone() for name, weight in of.items()} for role, of in reference.trained().items()
    }
    expected = reference.learn(episodes)
    for role, of in before.items():
        moved = max((reference.trained()[role][name].detach() - old).abs().max().item() for name, old in of.items())
        assert moved > 5e-3
        assert worst(trainer, reference, role) < 1e-6
    (row,) = trainer.state.log_history
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert min(row["policy/clipfrac_avg"], row["val/clipfrac_avg"]) > 0
    if has_head:  # the policy's adapter does get the gradient of the value's loss
        apart = Reference(artifacts, value_model, value_reaches_trunk=False)
        apart.learn(episodes)
        assert worst(trainer, apart, "policy") > 1e-4


def test_two_ranks_make_the_update_of_an_independent_reference(make_trainer, make_artifacts, share) -> None:
    """Four episodes on each, of unequal length; the eight of one process are what the reference learns from."""
    artifacts = make_artifacts()
    endless = episodes_of(make_trainer(shared=share(artifacts), **SETTINGS, stop_token_id=None))
    stop = endless[0][1][4]
    episodes = episodes_of(make_trainer(shared=share(artifacts), stop_token_id=stop, **SETTINGS))
    assert len({len(reply) for _, reply, _ in episodes}) > 1
    given = {tuple(prompt): (reply, ended) for prompt, reply, ended in episodes}
    reference = Reference(artifacts, "adapter")
    expected = reference.learn(episodes)

    def train() -> tuple[dict[str, float], dict[str, float]]:
        half = SETTINGS | {"gradient_accumulation_steps": 1}
        trainer = make_trainer(shared=share(artifacts), stop_token_id=stop, **half)
        trainer.engine = Given(lambda prompt: given[tuple(prompt)])
        trainer.train()
        (row,) = trainer.state.log_history
        return {role: worst(trainer, reference, role) for role in ("policy", "value")}, row

    for off, row in together(train):
        assert max(off.values()) < 1e-6
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
