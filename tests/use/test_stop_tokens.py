"""Whatever ends a policy's reply ends it everywhere: while PPO samples, judged, compared, in a chat, and exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.comparison import measure, wanted
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.rewards.mixture import Part, Rewards
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.stages.evaluate import judge_artifact, judge_policy
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.use.chat import Chat
from rlhf_pipeline.use.export import export

LIMIT = 12  # tokens of a reply
Ids = list[list[int]]


def test_the_definition(tokenizer) -> None:
    """EOS and the checkpoint's own; those of the recipe in their place; or none."""
    assert tokenizer.eos_token_id == 1
    for own, expected in ((None, [1]), (1, [1]), (7, [1, 7]), ([7, 1, 9], [1, 7, 9])):
        checkpoint = GenerationConfig(eos_token_id=own)
        for settings in ({}, {"stop_token": "eos"}, {"stop_token": "eos", "stop_token_id": None}):
            assert stop_tokens(tokenizer, checkpoint, settings) == expected
        assert stop_tokens(tokenizer, checkpoint, {"stop_token_id": 5}) == [5]
        assert stop_tokens(tokenizer, checkpoint, {"stop_token_id": [5, 6]}) == [5, 6]
        assert stop_tokens(tokenizer, checkpoint, {"stop_token": None}) == []


@pytest.fixture(scope="module")
def endless(tiny_run: Path) -> Ids:
    """What the PPO stage's model says to the prompts of `evaluate` when nothing ends it, greedily."""
    recipe = recipes.of_run(tiny_run)
    tokenizer = load_tokenizer(recipe.model)
    shared = four_roles(recipe, tiny_run)
    prompts = [row["prompt"] for row in rows_of(Path(recipe.evaluate.data.path))]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    output = shared.policy.generate(**inputs, max_new_tokens=LIMIT, do_sample=False, eos_token_id=[])
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def four_roles(recipe: Recipe, run: Path) -> SharedBase:
    """The models of the PPO stage, its policy as it was trained."""
    model = load_base(recipe.model, load_tokenizer(recipe.model))
    return SharedBase(model, recipe.lora, run / "ppo" / "adapter", [(run / "reward" / "adapter", recipe.lora)])


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def cut(replies: Ids, stops: list[int]) -> Ids:
    """Replies up to the first of some tokens, with it."""
    ends = [next((i + 1 for i, token in enumerate(reply) if token in stops), LIMIT) for reply in replies]
    return [reply[:end] for reply, end in zip(replies, ends, strict=True)]


@pytest.fixture
def trained_until(tiny_run: Path, tmp_path: Path) -> Callable[..., Job]:
    """A function that gives a run whose PPO stage was trained with some settings of what ends a reply."""

    def make(**settings: Any) -> Job:
        run = shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
        recipe = recipes.of_run(run)
        recipe.output_dir = str(tmp_path / "runs")
        recipe.evaluate.temperature, recipe.evaluate.max_new_tokens = 0.0, LIMIT
        stage = recipe.stages["ppo"]
        stage.lora = recipe.lora
        del stage.trainer["stop_token"]
        stage.trainer |= settings
        (run / "recipe.yaml").write_text(recipes.to_yaml(recipe))
        record = json.loads((run / "ppo" / "stage.json").read_text())
        del record["inputs"]["trainer.stop_token"]
        record["inputs"] |= {f"trainer.{key}": value for key, value in settings.items()}
        (run / "ppo" / "stage.json").write_text(json.dumps(record))
        return Job(recipe, "ppo", run)

    return make


@pytest.mark.parametrize("which", ["one", "two", "none"])
def test_a_reply_ends_with_the_same_token_wherever_it_is_sampled(
    which: str, endless: Ids, trained_until: Callable[..., Job], tmp_path: Path
) -> None:
    eos, first, second = 1, endless[0][2], endless[1][1]
    assert eos not in (first, second) and first != second and any(eos in reply for reply in endless)
    stops = {"one": [first], "two": [first, second], "none": []}[which]
    expected = cut(endless, stops)
    assert (expected == endless) is (which == "none") and expected != cut(endless, [eos])
    job = trained_until(**({"stop_token_id": first if which == "one" else stops} if stops else {"stop_token": None}))
    recipe, run = job.recipe, job.run
    tokenizer = load_tokenizer(recipe.model)
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in expected]

    def judged() -> list[str]:
        rows = [row["completion"] for row in rows_of(job.folder / "samples.jsonl") if "judge" in row]
        jsonl.rewrite(job.folder / "samples.jsonl", lambda row: "judge" not in row, [])
        return rows

    # Right after training, on the model that PPO has sampled from.
    args, _, data, _ = stages.BY_KIND["ppo"].prepare(job)
    shared = four_roles(recipe, run)
    before = shared.causal_lm.generation_config.to_dict()
    trainer = PPOTrainer(
        args, tokenizer, shared, Rewards([Part("reward", 1.0, shared.rewards[0])], tokenizer), train_dataset=data.train
    )
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows_of(Path(recipe.evaluate.data.path))]
    episodes = trainer.roll_out(prompts, temperature=0.0, response_length=LIMIT)
    sampled = [
        row[:length] for row, length in zip(episodes.replies.tolist(), episodes.reply_lengths.tolist(), strict=True)
    ]
    assert sampled == expected
    assert episodes.ended.tolist() == [reply[-1] in stops for reply in expected]
    assert shared.causal_lm.generation_config.to_dict() == before
    at_first = judge_policy(job, shared.policy, tokenizer)
    assert judged() == texts

    # Later, from the adapter, as where judging had failed.
    assert judge_artifact(job, job.published) == at_first
    assert judged() == texts

    settings = wanted.default_settings(recipe)
    found = measure.compare(recipe, run, *measure.default_prompts(recipe, settings["n"]), settings, ["sft", "ppo"])
    of_ppo_here = [row["replies"]["ppo"] for row in found["rows"]]
    assert [reply["text"] for reply in of_ppo_here] == texts
    assert [(reply["tokens"], reply["ended"]) for reply in of_ppo_here] == [
        (len(reply), reply[-1] in stops) for reply in expected
    ]
    assert all(row["replies"]["sft"]["ended"] for row in found["rows"])  # by EOS, whatever ends those of `ppo`

    talk = Chat(run, recipe, "ppo", 0.0, LIMIT, None, lambda line: None)
    for row, reply in zip(rows_of(Path(recipe.evaluate.data.path)), expected, strict=True):
        talk.ask(row["prompt"])
        assert talk.last is not None and talk.last[1] == reply
        assert ("no end" in talk.reward()) is (reply[-1] not in stops)

    export(run, "ppo", tmp_path / "adapter")
    export(run, "ppo", tmp_path / "merged", merge=True, n=0)
    written = [json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("adapter", "merged")]
    assert written[0]["eos_token_id"] == written[1]["eos_token_id"] == (stops[0] if which == "one" else stops)
    model, words = (auto.from_pretrained(tmp_path / "merged") for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = words(
        [row["prompt"] for row in rows_of(Path(recipe.evaluate.data.path))], padding=True, return_tensors="pt"
    )
    output = model.float().generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    whole = [reply + [words.pad_token_id] * (LIMIT - len(reply)) for reply in expected]
    longest = max(len(reply) for reply in expected)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], torch.tensor(whole)[:, :longest])
