"""The sum of several rewards, of ensembles' members, and what functions of the user's are given."""

import datetime
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from shared import lora_of
from torch.testing import assert_close

from rlhf_pipeline.data.encode import row_of
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import Roles, SharedBase
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.numbers import of_rewards, write_samples
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.rewards.functions import Function
from rlhf_pipeline.rewards.mixture import Part, Rewards, combined

PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15], [16]]


def episodes_of(replies: list[list[int]], prompts: list[list[int]] = PROMPTS) -> Episodes:
    rows = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, rows))
    lengths = torch.tensor([len(prompt) for prompt in prompts]), torch.tensor([len(reply) for reply in replies])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Episodes(ids, *lengths, lengths[1] > 0, torch.zeros(len(rows), int(lengths[1].max())))


EPISODES = episodes_of([[20, 21], [22], [23, 24, 25, 26], [27, 28, 29]])
ROWS = [row_of(f"prompt {i}", {"prompt": f"prompt {i}", "answer": i, "level": None}) for i in range(4)]


@pytest.fixture(scope="module")
def ensemble(make_artifacts, tmp_path_factory, tokenizer) -> tuple[Any, Path]:
    """Artifacts, and a reward model of three members that differ."""
    made = make_artifacts("llama", "none")
    folder = tmp_path_factory.mktemp("ensemble") / "adapter"
    shutil.copytree(made.reward, folder)
    model = adapters.with_reward_adapter(base.load_base(made.spec, tokenizer, "score"), lora_of(made.reward), None)
    for number in (2, 3):
        torch.manual_seed(number)
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
        adapters.save_adapter(model, "default", folder / f"member-{number}", tokenizer)
    return made, folder


def shared_with(made: Any, tokenizer: Any, *rewards: Path) -> SharedBase:
    model = base.load_base(made.spec, tokenizer)
    return SharedBase(model, lora_of(made.init), made.init, [(reward, lora_of(made.reward)) for reward in rewards])


def function(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Function:
    name = f"rewards_{abs(hash(code))}"
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    return Function(f"{name}:given", [folder], "rewards.0.function")


class TestEnsemble:
    def test_each_member_scores_as_it_does_alone(self, ensemble, tokenizer) -> None:
        made, folder = ensemble
        shared = shared_with(made, tokenizer, folder)
        assert [view.role for view in shared.rewards[0]] == ["reward", "reward/2", "reward/3"]
        for number, view in enumerate(shared.rewards[0], 1):
            own = folder if number == 1 else folder / f"member-{number}"
            alone = shared_with(made, tokenizer, shutil.copytree(own, folder.parent / f"alone-{number}"))
            expected = reply_scores(alone.rewards[0][0], EPISODES)
            assert_close(reply_scores(view, EPISODES), expected, rtol=0, atol=0)

    def test_the_sum_is_that_of_the_members_by_hand(self, ensemble, tokenizer) -> None:
        made, folder = ensemble
        shared = shared_with(made, tokenizer, folder)
        rewards = Rewards([Part("reward", 2.0, shared.rewards[0], "mean - 0.5*std")], tokenizer)
        scores = rewards(EPISODES, at_once=2)
        each = [[reply_scores(view, EPISODES)[row].item() for view in shared.rewards[0]] for row in range(4)]
        for row, own in enumerate(each):
            mean = sum(own) / 3
            std = math.sqrt(sum((one - mean) ** 2 for one in own) / 3)
            assert scores.by_name["reward"][row].item() == pytest.approx(mean - 0.5 * std, abs=1e-5)
            assert scores.disagreement["reward"][row].item() == pytest.approx(std, abs=1e-5)
            assert scores.total[row].item() == pytest.approx(2 * (mean - 0.5 * std), abs=1e-5)
        assert min(scores.disagreement["reward"]) > 0.01

    def test_samples_say_how_far_the_members_differ(self, ensemble, tokenizer, make_trainer, tmp_path) -> None:
        made, folder = ensemble
        shared = shared_with(made, tokenizer, folder)
        rewards = Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)
        trainer = make_trainer(
            shared=shared, rewards=rewards, max_steps=1, num_sample_generations=1, samples_file=tmp_path / "s.jsonl"
        )
        scored = trainer.score(trainer.roll_out(trainer._prompts(0)[0]))
        write_samples(tmp_path / "s.jsonl", scored, scored.episodes.ended, tokenizer, "train", 1)
        rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
        expected = scored.rewards.disagreement["reward"][: len(rows)].tolist()
        assert [row["disagreement"]["reward"] for row in rows] == expected
        assert "rewards" not in rows[0]

    def test_a_member_that_is_there_alone_disagrees_with_nobody(self, ensemble, tokenizer) -> None:
        made, _ = ensemble
        shared = shared_with(made, tokenizer, made.reward)
        assert Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)(EPISODES, at_once=4).disagreement == {}

    @pytest.mark.parametrize(
        ("combine", "expected"),
        [("mean", 2.0), ("min", 0.0), ("mean - std", 2 - math.sqrt(1.5)), ("mean - 2*std", 2 - 2 * math.sqrt(1.5))],
    )
    def test_combine(self, combine: str, expected: float) -> None:
        members = torch.tensor([[0.0], [2.0], [3.0], [3.0]])  # their variance is (4 + 0 + 1 + 1) / 4
        assert combined(members, combine)[0].item() == pytest.approx(expected)

    def test_training_leaves_every_member_as_it_was(self, ensemble, tokenizer, make_trainer) -> None:
        made, folder = ensemble
        shared = shared_with(made, tokenizer, folder)
        before = shared.checksums()
        trainer = make_trainer(
            shared=shared, rewards=Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer), max_steps=1
        )
        trainer.train()
        moved = {role for role, checksum in shared.checksums().items() if checksum != before[role]}
        assert moved == {"policy", "value"}
        assert {"reward", "reward/2", "reward/3"} <= set(before)

    def test_reward_adapters_beside_those_of_a_trl_trainer(self, ensemble, tokenizer) -> None:
        made, folder = ensemble
        expected = [reply_scores(view, EPISODES) for view in shared_with(made, tokenizer, folder).rewards[0]]
        lora = {**lora_of(made.init), "lora_dropout": 0.5}
        model = adapters.with_policy_adapter(base.load_base(made.spec, tokenizer), lora, made.init).eval()
        policy = model(EPISODES.ids).logits
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        roles = Roles(model, {"policy": "default"})
        views = roles.add_reward(folder, lora_of(made.reward))
        for view, scores in zip(views, expected, strict=True):
            assert_close(reply_scores(view, EPISODES), scores, rtol=0, atol=0)
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
        assert model.active_adapter == "default"
        assert_close(model(EPISODES.ids).logits, policy, rtol=0, atol=0)


class TestSum:
    def test_a_reward_that_does_not_apply_counts_for_nothing(self, ensemble, tokenizer, tmp_path, monkeypatch) -> None:
        made, _ = ensemble
        shared = shared_with(made, tokenizer, made.reward)
        code = "def given(answer, **_): return [None if one == 1 else float(one) for one in answer]"
        parts = [
            Part("reward", 0.5, shared.rewards[0]),
            Part("given", -2.0, function(tmp_path, code, monkeypatch)),
        ]
        scores = Rewards(parts, tokenizer)(EPISODES, ROWS, at_once=4)
        model = reply_scores(shared.rewards[0][0], EPISODES)
        assert_close(scores.total, 0.5 * model - 2.0 * torch.tensor([0.0, 0.0, 2.0, 3.0]))
        assert_close(scores.by_name["given"], torch.tensor([0.0, torch.nan, 2.0, 3.0]), equal_nan=True)
        numbers = of_rewards(scores)
        assert numbers["rewards/given/mean"] == pytest.approx(5 / 3)
        assert numbers["rewards/given/std"] == pytest.approx(torch.tensor([0.0, 2.0, 3.0]).std(correction=0).item())
        assert numbers["rewards/reward/mean"] == pytest.approx(model.mean().item())

    def test_a_reward_that_never_applies_has_no_numbers(self, ensemble, tokenizer, tmp_path, monkeypatch) -> None:
        part = Part(
            "given", 1.0, function(tmp_path, "def given(prompts, **_): return [None] * len(prompts)", monkeypatch)
        )
        scores = Rewards([part], tokenizer)(EPISODES, ROWS, at_once=4)
        assert of_rewards(scores) == {}
        assert_close(scores.total, torch.zeros(4))

    def test_a_score_that_is_no_number_stays_one(self, ensemble, tokenizer) -> None:
        """Training must see it, and not a reward of 0."""
        made, _ = ensemble
        shared = shared_with(made, tokenizer, made.reward)
        with torch.no_grad():
            shared.rewards[0][0].score.weight.fill_(torch.nan)
        assert Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer)(EPISODES, at_once=4).total.isnan().all()

    def test_what_a_function_is_given(self, ensemble, tokenizer, tmp_path, monkeypatch) -> None:
        code = "seen = {}\ndef given(**all): seen.update(all); return [0] * len(all['prompts'])"
        own = function(tmp_path, code, monkeypatch)
        turns = [{"role": "system", "content": "s", "tools": [{"name": "t"}]}, {"role": "user", "content": "u"}]
        rows = [ROWS[0], row_of(turns, {"messages": turns, "answer": 5, "extra": "e"}), ROWS[2], ROWS[3]]
        Rewards([Part("given", 1.0, own)], tokenizer)(EPISODES, rows, at_once=4, step=3, max_steps=9)
        seen = own.call.__globals__["seen"]
        assert seen["prompts"][:2] == ["prompt 0", [{"role": "system", "content": "s"}, turns[1]]]
        texts = [tokenizer.decode(ids) for ids in ([20, 21], [22])]
        assert seen["completions"][:2] == [texts[0], [{"role": "assistant", "content": texts[1]}]]
        assert seen["completion_ids"] == [[20, 21], [22], [23, 24, 25, 26], [27, 28, 29]]
        assert (seen["answer"], seen["extra"]) == ([0, 5, 2, 3], [None, "e", None, None])
        assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (3, 9)
        assert "prompt" not in seen

    def test_what_json_has_no_word_for_is_text(self) -> None:
        row = json.loads(row_of("p", {"day": datetime.date(2026, 1, 2), "n": 3}))
        assert row == {"prompt": "p", "columns": {"day": "2026-01-02", "n": 3}}


class TestWithoutRewardModel:
    def test_the_value_model_starts_from_the_policy_with_a_head_of_its_own(self, make_artifacts, tokenizer) -> None:
        made = make_artifacts("llama", "none")
        shared = SharedBase(base.load_base(made.spec, tokenizer), lora_of(made.init), made.init, [])
        hidden = [view.hidden_states(EPISODES.ids) for view in (shared.policy, shared.value, shared.reference)]
        assert_close(hidden[1], hidden[0], rtol=0, atol=0)
        assert_close(hidden[2], hidden[0], rtol=0, atol=0)
        assert shared.value.score.weight.std().item() == pytest.approx(
            (shared.value.score.in_features + 1) ** -0.5, rel=0.4
        )
        assert shared.value.score.weight.requires_grad
        assert shared.frozen == ["reference"]

    def test_ppo_trains_on_what_a_function_says_of_the_rows(
        self, make_artifacts, make_trainer, tokenizer, tmp_path, monkeypatch
    ) -> None:
        made = make_artifacts("llama", "none")
        shared = SharedBase(base.load_base(made.spec, tokenizer), lora_of(made.init), made.init, [])
        before = shared.checksums()
        own = function(tmp_path, "def given(answer, **_): return [10.0 + one for one in answer]", monkeypatch)
        rewards = Rewards([Part("given", 1.0, own)], tokenizer)
        rows = Dataset.from_dict({"input_ids": PROMPTS * 2, "row": ROWS * 2})  # of which one batch has all
        trainer = make_trainer(shared=shared, rewards=rewards, train_dataset=rows, eval_dataset=rows, max_steps=1)
        trainer.train()
        logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
        assert (logged["rewards/given/mean"], logged["objective/scores"]) == (11.5, 11.5)
        assert trainer.evaluate()["eval_rewards/given/mean"] == 11.5
        assert {role for role, one in shared.checksums().items() if one != before[role]} == {"policy", "value"}
