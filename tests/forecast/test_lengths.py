"""How long the texts of a stage are taken to be."""

import json

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.forecast import lengths, rows
from rlhf_pipeline.forecast.lengths import Lengths
from rlhf_pipeline.models.tokenizer import load_tokenizer


def test_rows_that_are_read_count_and_not_the_limits_above_them(tmp_path):
    recipe = recipes.load("tiny", [])
    tokenizer = load_tokenizer(recipe.model)
    data = tmp_path / "rows.jsonl"
    pairs = [("a b c", "d e", "f"), ("a", "b", "c d e f g"), ("a b", "c", "d")]
    data.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n"
                            for row in pairs))  # fmt: skip
    for stage in ("reward", "dpo", "sft", "ppo"):
        recipe.stages[stage].data.path, recipe.stages[stage].data.eval_fraction = str(data), 0.0

    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [tokens(prompt) for prompt, _, _ in pairs]
    wholes = [p + max(tokens(good), tokens(bad)) + 1 for p, (_, good, bad) in zip(prompts, pairs, strict=True)]
    found = rows.longest(recipe)
    assert found["dpo"] == (max(prompts), max(wholes))
    assert found["reward"][1] == max(wholes)
    assert found["ppo"] == (max(prompts), None)
    asked = lengths.of_stage(recipe.stages["ppo"], *found["ppo"])
    assert (asked.prompt, asked.reply, asked.assumed) == (max(prompts), 16, None)
    recipe.stages["dpo"].trainer["max_length"] = 5
    assert lengths.of_stage(recipe.stages["dpo"], *found["dpo"]).whole == 5


def test_rows_that_are_not_here_or_cannot_be_read_are_left_out(tmp_path):
    recipe = recipes.load("tiny-rlaif", [])
    recipe.stages["sft"].data.path = str(tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("no JSON\n")
    recipe.stages["critic"].data.path = "somebody/on-the-hub"
    assert rows.longest(recipe).keys() == {"candidates", "evaluate"}


def test_rows_that_another_stage_makes_are_as_long_as_it_may_make_them():
    recipe = recipes.load("tiny-rlaif", ["candidates.data.max_prompt_length=40"])
    reply = recipe.stages["candidates"].sampling.max_new_tokens
    assert lengths.of_made_rows(recipe, recipe.stages["feedback"]) == (40, 40 + reply)
    assert lengths.of_made_rows(recipe, recipe.stages["dpo"]) == (40, 40 + reply)
    assert lengths.of_made_rows(recipe, recipe.stages["sft"]) == (None, None)
    judged = lengths.of_stage(recipe.stages["feedback"], 40, 40 + reply)
    assert judged == Lengths(40, 40 + 2 * reply + lengths.QUESTION)  # a judge reads two replies


def test_a_policy_that_revises_reads_its_reply_and_the_critique():
    stage = recipes.load("tiny-constitution", []).stages["revisions"]
    most = stage.sampling.max_new_tokens
    found = lengths.of_stage(stage, 10)
    assert (found.prompt, found.reply) == (10 + 2 * most + lengths.QUESTION, most)


def test_a_folder_with_a_configuration_alone_is_enough_to_ask(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no"):
        recipes.load("tiny", [f"model.path={tmp_path}"])
    assert recipes.load("tiny", [f"model.path={tmp_path}"], weights=False).model.path == str(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        recipes.load("tiny", [f"model.path={tmp_path.parent}"], weights=False)
