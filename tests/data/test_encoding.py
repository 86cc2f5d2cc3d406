"""One encoding for all stages: what SFT, reward, PPO and DPO read of the same rows."""

import json
from pathlib import Path

import pytest

from rlhf_pipeline.data import prepare
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Data

USER = {"role": "user", "content": "What sound does a cow make?"}
GOOD = {"role": "assistant", "content": " Gladly! It is moo."}
BAD = {"role": "assistant", "content": " Ugh."}


@pytest.fixture
def spec(tmp_path):
    """Write rows to a file of its own and describe it."""
    count = iter(range(100))

    def of(*table: dict, **settings: object) -> Data:
        file: Path = tmp_path / f"rows{next(count)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        return Data(path=str(file), **settings)

    return of


TEXT = {"prompt": "Q: What sound does a cow make?\nA:", "chosen": GOOD["content"], "rejected": BAD["content"]}


def test_the_same_demonstration_is_encoded_alike_from_every_shape(spec, tokenizer):
    shapes = [
        spec({"messages": [USER, GOOD]}),
        spec({"prompt": [USER], "completion": [GOOD]}),
        spec({"prompt": [USER], "completion": GOOD["content"]}),
        spec({"prompt": [USER], "completion": GOOD["content"] + tokenizer.eos_token}),
        spec({"turns": [USER, GOOD]}, columns={"messages": "turns"}),
        spec({"prompt": f"<|user|>{USER['content']}<|assistant|>", "completion": GOOD["content"]}),
    ]
    encoded = [prepare.demonstrations(shape, tokenizer, seed=0).train.to_list() for shape in shapes]
    assert all(rows == encoded[0] for rows in encoded[1:])


def test_the_same_preference_is_encoded_alike_from_every_shape(spec, tokenizer):
    shapes = [
        spec({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        spec({"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        spec({"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]}),
        spec({"better": [USER, GOOD], "worse": [USER, BAD]}, columns={"chosen": "better", "rejected": "worse"}),
    ]
    for read in (prepare.preferences, prepare.whole_preferences):
        encoded = [read(shape, tokenizer, seed=0).train.to_list() for shape in shapes]
        assert all(rows == encoded[0] for rows in encoded[1:])


@pytest.mark.parametrize("turns", [False, True])
def test_all_stages_read_the_same_tokens_and_end_at_the_same_one(spec, tokenizer, turns):
    prompt = [USER] if turns else TEXT["prompt"]
    table = {"prompt": prompt, "chosen": TEXT["chosen"], "rejected": TEXT["rejected"]}
    sft = prepare.demonstrations(spec(table, columns={"completion": "chosen"}), tokenizer, seed=0).train[0]
    dpo = prepare.preferences(spec(table), tokenizer, seed=0).train[0]
    reward = prepare.whole_preferences(spec(table), tokenizer, seed=0).train[0]
    ppo = prepare.prompts(spec({"prompt": prompt}), tokenizer, 0).train[0]
    good, bad = prepare.feedback(spec(table), tokenizer, seed=0).train
    thumb = {"prompt": prompt, "completion": TEXT["rejected"], "thumb": "down"}
    assert prepare.feedback(spec(thumb), tokenizer, seed=0).train[0] == bad
    assert (good["label"], bad["label"]) == (True, False)
    assert good["prompt_ids"] == bad["prompt_ids"] == dpo["prompt_ids"]
    assert (good["completion_ids"], bad["completion_ids"]) == (dpo["chosen_ids"], dpo["rejected_ids"])
    assert set(dpo) == {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert set(reward) == {"chosen_ids", "rejected_ids"}
    assert set(ppo) == {"input_ids"}

    assert sft["input_ids"] == reward["chosen_ids"] == dpo["prompt_ids"] + dpo["chosen_ids"]
    assert reward["rejected_ids"] == dpo["prompt_ids"] + dpo["rejected_ids"]
    assert ppo["input_ids"] == dpo["prompt_ids"]
    for reply in (dpo["chosen_ids"], dpo["rejected_ids"]):
        assert reply[-1] == tokenizer.eos_token_id
        assert reply.count(tokenizer.eos_token_id) == 1
    assert dpo["prompt_ids"][-1] != tokenizer.eos_token_id


def test_labels_are_hidden_exactly_on_the_prompt(spec, tokenizer):
    row = prepare.demonstrations(
        spec({"prompt": TEXT["prompt"], "completion": TEXT["chosen"]}), tokenizer, seed=0
    ).train[0]
    prompt = tokenizer(TEXT["prompt"])["input_ids"]
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert -100 not in row["labels"][len(prompt) :]
    assert tokenizer.decode(row["labels"][len(prompt) :]) == TEXT["chosen"] + tokenizer.eos_token


def test_the_tokens_decode_to_prompt_and_reply(spec, tokenizer):
    row = prepare.preferences(spec({"chosen": [USER, GOOD], "rejected": [USER, BAD]}), tokenizer, seed=0).train[0]
    assert tokenizer.decode(row["prompt_ids"]) == f"<|user|>{USER['content']}<|assistant|>"
    assert tokenizer.decode(row["chosen_ids"]) == GOOD["content"] + tokenizer.eos_token


def test_long_prompts_keep_their_end_and_long_replies_their_start(spec, tokenizer):
    whole = prepare.preferences(spec(TEXT), tokenizer, seed=0).train[0]
    limits = {"max_prompt_length": 3, "max_completion_length": 4}
    cut = prepare.preferences(spec(TEXT, **limits), tokenizer, seed=0).train[0]
    assert cut["prompt_ids"] == whole["prompt_ids"][-3:]
    assert cut["chosen_ids"] == whole["chosen_ids"][:4]
    assert tokenizer.eos_token_id not in cut["chosen_ids"]
    assert prepare.prompts(spec(TEXT, **limits), tokenizer, 0).train[0]["input_ids"] == whole["prompt_ids"][-3:]
    reward = prepare.whole_preferences(spec(TEXT, **limits), tokenizer, seed=0).train[0]
    assert reward["chosen_ids"] == cut["prompt_ids"] + cut["chosen_ids"]


def test_limits_that_nothing_exceeds_change_nothing(spec, tokenizer):
    whole = prepare.preferences(spec(TEXT), tokenizer, seed=0).train[0]
    limits = {
        "max_prompt_length": len(whole["prompt_ids"]),
        "max_completion_length": max(len(whole["chosen_ids"]), len(whole["rejected_ids"])),
    }
    assert prepare.preferences(spec(TEXT, **limits), tokenizer, seed=0).train[0] == whole


def test_a_conversation_that_the_chat_template_refuses_is_a_bad_row(spec):
    strict = load_tokenizer(str(TINY / "checkpoint"))
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ messages | string }}"
    )
    rows = [{"messages": [USER, GOOD]}, {"messages": [{"role": "system", "content": "Be brief."}, USER, GOOD]}]
    with pytest.raises(InputError, match="no system turns") as caught:
        prepare.demonstrations(spec(*rows), strict, seed=0)
    assert caught.value.place.endswith("row 2")
    prepared = prepare.demonstrations(spec(*rows, bad_rows="drop"), strict, seed=0)
    assert (len(prepared.train), prepared.counts["bad_rows"]) == (1, 1)


PAIRS = [
    {"prompt": f"Q: {i % 10}?\nA:", "chosen": f" yes {i}.", "rejected": f" no {i}."} for i in range(30)
]  # ten prompts, three rows each


def test_the_split_is_by_prompt_and_the_same_for_reward_and_dpo(spec, tokenizer):
    table = spec(*PAIRS, eval_fraction=0.3)
    dpo = prepare.preferences(table, tokenizer, seed=7)
    prompts = [{tuple(row["prompt_ids"]) for row in side} for side in (dpo.train, dpo.held_out)]
    assert not prompts[0] & prompts[1]
    assert (len(prompts[0]), len(prompts[1])) == (7, 3)
    assert (len(dpo.train), len(dpo.held_out)) == (21, 9)

    reward = prepare.whole_preferences(table, tokenizer, seed=7)
    for dpo_rows, reward_rows in ((dpo.train, reward.train), (dpo.held_out, reward.held_out)):
        joined = [row["prompt_ids"] + row["chosen_ids"] for row in dpo_rows]
        assert joined == list(reward_rows["chosen_ids"])


def held_out_prompts(table: Data, tokenizer, seed: int = 1) -> set[str]:
    held_out = prepare.preferences(table, tokenizer, seed).held_out
    return {tokenizer.decode(row["prompt_ids"]) for row in held_out}


def test_the_split_depends_on_the_seed_and_not_on_the_order(spec, tokenizer):
    first, again, other = (held_out_prompts(spec(*PAIRS, eval_fraction=0.3), tokenizer, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert held_out_prompts(spec(*reversed(PAIRS), eval_fraction=0.3), tokenizer) == first


def test_a_prompt_stays_on_its_side_when_rows_are_added(spec, tokenizer):
    """Ten times as many prompts: of the old ones, those that change sides are few, and only those at the border."""
    old = [{"prompt": f"Q: {i}?", "chosen": " a", "rejected": " b"} for i in range(50)]
    new = [{"prompt": f"Q: {i}?", "chosen": " a", "rejected": " b"} for i in range(50, 500)]
    before = held_out_prompts(spec(*old, eval_fraction=0.3), tokenizer)
    after = held_out_prompts(spec(*new, *old, eval_fraction=0.3), tokenizer) & {row["prompt"] for row in old}
    assert before <= after or after <= before
    assert len(before ^ after) <= 8
    assert before & after


def test_without_a_fraction_nothing_is_held_out(spec, tokenizer):
    prepared = prepare.preferences(spec(*PAIRS), tokenizer, seed=7)
    assert len(prepared.train) == len(PAIRS)
    assert prepared.held_out is None and prepared.held_out_table is None


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 0.5, 1), (3, 0.1, 1), (3, 0.9, 2)])
def test_a_split_leaves_a_prompt_on_each_side(spec, tokenizer, count, fraction, held_out):
    prepared = prepare.preferences(spec(*PAIRS[:count], eval_fraction=fraction), tokenizer, seed=7)
    assert (len(prepared.train), len(prepared.held_out)) == (count - held_out, held_out)


def test_parts_share_the_prompts_out_by_seed_and_not_by_order(spec, tokenizer):
    """Each prompt is in one part with all its rows, parts are as equal as can be, and what is held out is in none."""

    def parts(rows: list[dict], seed: int = 7) -> list[list[str]]:
        tables = [prepare.preferences(spec(*rows, part=[i, 3]), tokenizer, seed) for i in (1, 2, 3)]
        return [[tokenizer.decode(row["prompt_ids"]) for row in one.train] for one in tables]

    found = parts(PAIRS)
    assert sorted(prompt for part in found for prompt in part) == sorted(row["prompt"] for row in PAIRS)
    assert sorted(len(set(part)) for part in found) == [3, 3, 4]
    assert sum(len(set(part)) for part in found) == 10
    assert [set(part) for part in parts(list(reversed(PAIRS)))] == [set(part) for part in found]
    assert [set(part) for part in parts(PAIRS, seed=8)] != [set(part) for part in found]
    whole = prepare.preferences(spec(*PAIRS, eval_fraction=0.3), tokenizer, seed=7)
    some = [prepare.preferences(spec(*PAIRS, eval_fraction=0.3, part=[i, 2]), tokenizer, seed=7) for i in (1, 2)]
    assert all(one.held_out.to_list() == whole.held_out.to_list() for one in some)
    rows = sorted((row for one in some for row in one.train.to_list()), key=str)
    assert rows == sorted(whole.train.to_list(), key=str) and len(some[0].train) != len(rows)


def test_rows_of_one_prompt_cannot_be_split(spec, tokenizer):
    table = spec(PAIRS[0], PAIRS[10], PAIRS[20], eval_fraction=0.5)
    with pytest.raises(InputError, match="all rows have the same prompt") as caught:
        prepare.preferences(table, tokenizer, seed=7)
    assert caught.value.place == table.path
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "read"),
    [("demonstrations", prepare.demonstrations), ("preferences", prepare.preferences), ("prompts", prepare.prompts),
     ("thumbs", prepare.feedback)],
)  # fmt: skip
def test_the_shipped_rows_can_be_read_by_their_stage(name, read, tokenizer):
    spec = Data(path=str(TINY / "data" / f"{name}.jsonl"))
    table = read(spec, tokenizer, 0).train
    assert len(table) > 100


def test_a_cache_that_cannot_be_written_to_is_named(spec, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="encoded rows cannot be written there: Not a directory") as caught:
        prepare.preferences(spec(TEXT), tokenizer, seed=0)
    assert caught.value.place == str(tmp_path / "cache" / "rlhf-pipeline")
    assert "HF_DATASETS_CACHE" in caught.value.hint


def test_files_of_one_folder_are_rankings_of_the_same_columns(spec, tokenizer, tmp_path):
    """Their shape has one name, and yet the columns of one would not be read in the other."""
    spec({"prompt": "Q:", "replies": [" a", " b"]}), spec({"prompt": "Q:", "responses": [" a", " b"], "ranks": [2, 1]})
    with pytest.raises(
        InputError, match=r"`responses` with their ranks, 1 the best, under `ranks`, and those of rows0"
    ) as caught:
        prepare.preferences(Data(path=str(tmp_path)), tokenizer, seed=0)
    assert caught.value.place == str(tmp_path / "rows1.jsonl")
