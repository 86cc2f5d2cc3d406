"""What is said of the data is what the trainers read, and what would spoil training is found."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from trl import DPOConfig, RewardConfig, SFTConfig

from rlhf_pipeline import recipe, stages
from rlhf_pipeline.data import measure as measures
from rlhf_pipeline.data import prepare, problems
from rlhf_pipeline.data.measure import Trainer
from rlhf_pipeline.models.tokenizer import DEFAULT_TEMPLATE, load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.schema import Data, Model, Source
from rlhf_pipeline.stages.dpo import EncodedDPOTrainer

EOS = 1  # of the shipped tokenizer


CHATS = [
    {"messages": [{"role": "user", "content": f"Q {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(5)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    """A function that writes rows to a file of its own and describes them."""
    count = iter(range(100))

    def of(rows: list[dict], **settings: object) -> Data:
        file: Path = tmp_path / f"rows{next(count)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Data(path=str(file), **settings)

    return of


@pytest.fixture
def measure(tokenizer):
    """A function that measures data as a kind of stage reads them."""

    def of(kind: str, spec: Data, trainer: Trainer = Trainer(), seed: int = 0, tokenizer=tokenizer) -> dict:  # noqa: B008
        return measures.measure(kind, stages.BY_KIND[kind].read(spec, tokenizer, seed), spec, tokenizer, trainer)

    return of


def demonstrations(n: int, words: int = 3) -> list[dict]:
    return [{"prompt": f"Q {i}:", "completion": " is" * words} for i in range(n)]


def pairs(n: int, longer: int = 0) -> list[dict]:
    """Pairs of which so many have the longer reply chosen, and the others the shorter one."""
    return [
        {"prompt": f"Q {i}:", "chosen": " is is is" if i < longer else " is", "rejected": " not not"} for i in range(n)
    ]


def found(numbers: dict) -> tuple[list[str], list[str]]:
    errors, warnings = problems.problems(numbers, "stages.x.data")
    assert all(error.place == "stages.x.data" for error in errors)
    assert all(warning.startswith("stages.x.data: ") for warning in warnings)
    return [error.message for error in errors], warnings


class TestNumbers:
    def test_lengths_are_those_before_any_cut(self, data, measure, tokenizer):
        rows = [{"prompt": "Q:", "completion": " is" * n} for n in range(1, 101)]
        numbers = measure("sft", data(rows, max_completion_length=50))
        prompt = len(tokenizer("Q:")["input_ids"])
        assert numbers["lengths"] == {
            "prompt": {"p50": prompt, "p90": prompt, "p99": prompt, "max": prompt},
            "reply": {"p50": 51, "p90": 91, "p99": 100, "max": 101},  # with their EOS
        }
        assert numbers["cut"] == {"prompt": 0, "reply": 51}
        assert numbers["replies"]["without_eos"] == 51
        assert numbers["loss_tokens"] == sum(min(n + 1, 50) for n in range(1, 101))
        assert numbers["tokens"] == numbers["loss_tokens"] + 100 * prompt

    def test_max_length_of_sft_is_what_trl_does(self, data, measure, tokenizer, checkpoints, tmp_path):
        """Against the rows of a real SFTTrainer."""
        from rlhf_pipeline.stages.sft import ResumableSFTTrainer as Trl

        rows = [{"prompt": "Q: " + " is" * (i % 7), "completion": " not" * (1 + i % 5)} for i in range(40)]
        spec = data(rows)
        args = SFTConfig(output_dir=str(tmp_path), max_length=7, report_to="none", use_cpu=True, bf16=False)
        numbers = measure("sft", spec, Trainer.of(args))
        train = prepare.demonstrations(spec, tokenizer, 0).train
        read = Trl(model=str(checkpoints["llama"]), args=args, train_dataset=train, processing_class=tokenizer)
        kept = read.train_dataset
        assert 0 < len(kept) < len(rows)
        assert numbers["max_length"]["left_out"] == len(rows) - len(kept)
        assert numbers["tokens"] == sum(map(len, kept["input_ids"]))
        assert numbers["loss_tokens"] == sum(label != -100 for row in kept["labels"] for label in row[1:])
        ending = sum(row[-1] == EOS for row in kept["input_ids"])
        assert numbers["replies"]["count"] - numbers["replies"]["without_eos"] == ending
        assert numbers["max_length"]["cut"] == len(kept) - ending

    def test_max_length_of_dpo_is_what_trl_does(self, data, measure, tokenizer, checkpoints, tmp_path):
        """Against the rows and the collated batch of a real DPOTrainer."""
        rows = [
            {"prompt": "Q: " + " is" * (i % 7), "chosen": " not" * (1 + i % 5), "rejected": " not" * (1 + i % 3)}
            for i in range(40)
        ]
        spec = data(rows)
        args = DPOConfig(output_dir=str(tmp_path), max_length=7, report_to="none", use_cpu=True, bf16=False)
        numbers = measure("dpo", spec, Trainer.of(args))
        train = prepare.preferences(spec, tokenizer, 0).train
        trainer = EncodedDPOTrainer(
            model=str(checkpoints["llama"]), args=args, train_dataset=train, processing_class=tokenizer
        )
        kept = trainer.train_dataset
        batch = trainer.data_collator(kept.to_list())
        assert 0 < len(kept) < len(rows)
        assert numbers["max_length"]["left_out"] == len(rows) - len(kept)
        assert numbers["tokens"] == int(batch["attention_mask"].sum())
        assert numbers["loss_tokens"] == int(batch["completion_mask"].sum())

    def test_pairs_that_the_reward_trainer_drops_are_counted(self, data, measure, tokenizer, tmp_path):
        rows = [{"prompt": "Q:", "chosen": " is" * n, "rejected": " not"} for n in range(1, 21)]
        args = RewardConfig(output_dir=str(tmp_path), max_length=10, report_to="none", use_cpu=True, bf16=False)
        spec = data(rows)
        whole = prepare.whole_preferences(spec, tokenizer, 0).train
        fitting = sum(max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 10 for row in whole)
        numbers = measure("reward", spec, Trainer.of(args))
        assert 0 < fitting < 20
        assert numbers["max_length"] == {"cut": 0, "left_out": 20 - fitting}
        assert numbers["loss_tokens"] is None

    def test_repetition_and_equal_pairs(self, data, measure):
        rows = [*pairs(10), *pairs(3), {"prompt": "Q 0:", "chosen": " so", "rejected": " so"}]
        for kind in ("reward", "dpo"):
            numbers = measure(kind, data(rows))
            assert (numbers["rows"], numbers["prompts"]) == (14, 10)
            assert numbers["duplicates"] == {"rows": 3, "prompts": 4}
            assert numbers["equal_pairs"] == 1

    def test_replies_of_equal_length_are_not_equal(self, data, measure):
        rows = [{"prompt": "Q:", "chosen": " is", "rejected": " not"}]
        assert measure("dpo", data(rows))["equal_pairs"] == 0

    def test_a_split_shares_no_prompt_and_eval_data_may(self, data, measure):
        assert measure("dpo", data([*pairs(10)] * 2, eval_fraction=0.3))["both_sides"] == {
            "prompts": 0,
            "held_out_rows": 0,
        }
        seen = data([*pairs(2), *pairs(2), {"prompt": "new", "chosen": " is", "rejected": " not"}])
        numbers = measure("dpo", data(pairs(10), eval_data={"path": seen.path}))
        assert numbers["both_sides"] == {"prompts": 2, "held_out_rows": 4}
        assert numbers["held_out_rows"] == 5

    def test_only_rows_to_train_on_are_counted(self, data, measure, tokenizer):
        rows = [{"prompt": f"Q {i}:", "completion": " is" * (1 + i)} for i in range(30)]
        for changes in ({"eval_fraction": 0.4}, {"mix": [{"path": data(rows).path}] * 2, "path": ""}):
            spec = Data.model_validate({"path": data(rows).path} | changes)
            train = prepare.demonstrations(spec, tokenizer, 0).train
            numbers = measure("sft", spec)
            assert numbers["tokens"] == sum(map(len, train["input_ids"]))
            assert numbers["replies"]["count"] == len(train) != 30
            assert numbers["example"]["text"]["ids"] == train[0]["input_ids"]

    def test_length_and_being_chosen(self, data, measure):
        """Against NumPy's own correlation coefficient."""
        rows = [
            {"prompt": f"Q {i}:", "chosen": " is" * (1 + i % 5), "rejected": " not" * (1 + i % 3)} for i in range(30)
        ]
        numbers = measure("reward", data(rows))["pairs"]
        chosen, rejected = np.arange(30) % 5, np.arange(30) % 3
        lengths, label = np.concatenate([chosen, rejected]), np.repeat([1, 0], 30)
        assert numbers["length_correlation"] == pytest.approx(np.corrcoef(lengths, label)[0, 1])
        assert numbers["chosen_longer"] == pytest.approx((chosen > rejected).mean())
        assert numbers["rejected_longer"] == pytest.approx((chosen < rejected).mean())
        assert numbers["length_accuracy"] == pytest.approx((chosen > rejected).mean() + (chosen == rejected).mean() / 2)

    def test_all_replies_of_one_length_have_no_correlation(self, data, measure):
        rows = [{"prompt": f"Q {i}:", "chosen": " is", "rejected": " not"} for i in range(3)]
        assert measure("reward", data(rows))["pairs"]["length_correlation"] is None

    def test_more_rows_than_one_batch_are_counted_alike(self, data, measure, monkeypatch):
        spec = data([*pairs(50), *pairs(4, longer=4)], eval_fraction=0.2)
        whole = {kind: measure(kind, spec) for kind in ("sft", "reward", "dpo", "ppo")}
        monkeypatch.setattr(measures, "AT_ONCE", 7)
        assert {kind: measure(kind, spec) for kind in whole} == whole

    def test_numbers_are_json(self, data, measure):
        for kind in ("sft", "reward", "dpo", "ppo"):
            numbers = measure(kind, data(pairs(10), eval_fraction=0.2))
            assert json.loads(json.dumps(numbers)) == numbers


class TestExample:
    def test_marked_tokens_are_those_that_carry_loss(self, data, measure, tokenizer):
        row = {"prompt": "Q: what?", "completion": " is, of course"}
        shown = measure("sft", data([row]))["example"]["text"]
        assert tokenizer.decode(shown["ids"]) == row["prompt"] + row["completion"] + tokenizer.eos_token
        marked = [token for token, loss in zip(shown["tokens"], shown["loss"], strict=True) if loss]
        assert "".join(marked) == row["completion"] + tokenizer.eos_token
        assert "".join(shown["tokens"]) == row["prompt"] + row["completion"] + tokenizer.eos_token

    def test_the_first_token_of_a_text_without_prompt_is_predicted_by_nothing(self, data, measure):
        shown = measure("sft", data([{"text": "yes no yes"}]))
        assert shown["example"]["text"]["loss"] == [False] + [True] * (len(shown["example"]["text"]["ids"]) - 1)
        assert shown["loss_tokens"] == shown["tokens"] - 1

    def test_the_first_row_that_is_not_left_out_is_shown(self, data, measure):
        rows = [{"prompt": "Q:" + " is" * 20, "completion": " not"}, {"prompt": "Q:", "completion": " so"}]
        numbers = measure("sft", data(rows), Trainer(max_length=10))
        assert numbers["max_length"]["left_out"] == 1
        assert "".join(numbers["example"]["text"]["tokens"]).startswith("Q: so")

    def test_a_score_is_read_at_the_last_token(self, data, measure):
        example = measure("reward", data(pairs(1)))["example"]
        for reply in ("chosen", "rejected"):
            assert example[reply]["score_at"] == len(example[reply]["ids"]) - 1
            assert example[reply]["ids"][-1] == EOS
            assert not any(example[reply]["loss"])

    def test_ppo_shows_the_prompt_and_what_ends_a_reply(self, data, measure, tokenizer):
        example = measure("ppo", data(pairs(1)), Trainer(stop_tokens=[EOS], response_length=4))["example"]
        assert tokenizer.decode(example["prompt"]["ids"]) == "Q 0:"
        assert example["stop_token"] == tokenizer.eos_token

    @pytest.mark.parametrize("text", ["Größe 🐘🐘, naïve 漢字!\n", "plain words", "🐘", " \n\n x"])
    def test_pieces_put_together_are_the_text(self, tokenizer, text):
        """Also where one character is several tokens."""
        ids = tokenizer(text)["input_ids"]
        pieces = measures.pieces(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)


class TestErrors:
    def test_sound_data_have_none(self, data, measure):
        for kind in ("sft", "reward", "dpo", "ppo"):
            assert found(measure(kind, data(pairs(40, longer=20)))) == ([], [])

    def test_replies_that_are_all_cut(self, data, measure):
        for kind, count in (("sft", 10), ("reward", 20), ("dpo", 20)):
            errors, _ = found(measure(kind, data(pairs(10), max_completion_length=1)))
            assert len(errors) == 1
            assert f"none of the {count} replies ends in EOS" in errors[0]
        assert found(measure("sft", data(demonstrations(10)), Trainer(max_length=5)))[0]

    def test_rows_that_max_length_leaves_nothing_of(self, data, measure):
        for kind in ("sft", "reward", "dpo"):
            assert found(measure(kind, data(pairs(10)), Trainer(max_length=2)))[0] == [
                "none of the 10 rows fits in max_length 2"
            ]

    def test_all_labels_masked(self, data, measure, tokenizer):
        """As no reader of ours makes them; the rows are masked by hand."""
        spec = data(demonstrations(10))
        ready = prepare.demonstrations(spec, tokenizer, 0)

        def masked(some: range) -> dict:
            def mask(row: dict, i: int) -> dict:
                return {"labels": [-100] * len(row["labels"]) if i in some else row["labels"]}

            changed = prepare.Prepared(
                ready.train, None, ready.table.map(mask, with_indices=True), None, ready.shapes, ready.counts
            )
            return measures.measure("sft", changed, spec, tokenizer, Trainer())

        errors, _ = found(masked(range(10)))
        assert errors == ["all labels of all 10 rows are masked: there is nothing to learn"]
        errors, warnings = found(masked(range(4)))
        assert errors == []
        assert [warning for warning in warnings if "labels are masked in 4 of 10" in warning]

    def test_empty_replies(self, data, measure, tokenizer):
        """A reply that is nothing but EOS."""
        bad = {"prompt": "Q:", "chosen": tokenizer.eos_token, "rejected": " not"}
        for kind, what in (("sft", "replies"), ("reward", "chosen replies"), ("dpo", "chosen replies")):
            errors, _ = found(measure(kind, data([*pairs(9), bad])))
            assert errors == [f"1 of 10 (10%) {what} are empty"]

    def test_more_than_half_duplicates(self, data, measure):
        for kind in ("sft", "reward", "dpo"):
            assert found(measure(kind, data(pairs(10) * 2)))[0] == []
            errors, _ = found(measure(kind, data([*pairs(10) * 2, *pairs(1)])))
            assert errors == ["11 of 21 (52%) rows repeat an earlier one"]

    def test_prompts_of_several_pairs_are_no_error(self, data, measure):
        """Four replies to a prompt make six pairs, and PPO may read its prompts from there."""
        errors, warnings = found(measure("ppo", data(pairs(5) * 6)))
        assert errors == []
        assert len([warning for warning in warnings if "25 of 30 (83%) prompts repeat an earlier one" in warning]) == 1

    def test_all_pairs_equal(self, data, measure):
        rows = [{"prompt": f"Q {i}:", "chosen": " so", "rejected": " so"} for i in range(10)]
        for kind in ("reward", "dpo"):
            errors, _ = found(measure(kind, data(rows)))
            assert errors == ["in all 10 pairs the two replies are the same"]
            errors, warnings = found(measure(kind, data([*rows, *pairs(1)])))
            assert errors == []
            assert len([warning for warning in warnings if "10 of 11 (91%) pairs the two replies" in warning]) == 1


class TestHeldOut:
    @pytest.mark.parametrize("kind", ["reward", "dpo"])
    def test_rows_none_of_which_fits_are_an_error(self, data, measure, kind):
        """The trainer would have nothing left to evaluate on."""
        long = [row | {"prompt": "long " * 30 + str(i)} for i, row in enumerate(pairs(3))]
        spec = data(pairs(20, longer=10))
        spec.eval_data = Source(path=data(long).path)
        errors, _ = found(measure(kind, spec, Trainer(max_length=20)))
        assert errors == ["none of the 3 held-out rows fits in max_length 20"]
        numbers = measure(kind, spec, Trainer(max_length=200))
        assert numbers["held_out_max_length"] == {"cut": 0, "left_out": 0}
        assert found(numbers)[0] == []


class TestLabels:
    def test_good_and_bad_replies_are_counted(self, data, measure):
        rows = [{"prompt": f"Q {i // 2}:", "completion": f" {i}", "label": i % 2 == 0 or i < 4} for i in range(12)]
        assert measure("dpo", data(rows))["labels"] == {"good": 8, "bad": 4}
        numbers = measure("sft", data(rows))
        assert (numbers["labels"], numbers["left_out"], numbers["rows"]) == (
            {"good": 8, "bad": 4},
            {"bad_replies": 4},
            8,
        )
        assert measure("dpo", data(pairs(4)))["labels"] is None


class TestWarnings:
    @pytest.mark.parametrize(("long", "warned"), [(2, False), (3, True)])
    def test_more_than_a_tenth_cut(self, data, measure, long, warned):
        rows = [*demonstrations(20 - long), *[{"prompt": f"long {i}", "completion": " is" * 9} for i in range(long)]]
        for limits, trainer, words in (
            (
                {"max_completion_length": 6},
                Trainer(),
                "length 6, and have no EOS: raise `max_completion_length`, or",
            ),
            ({}, Trainer(max_length=9), "max_length 9, and are cut there: raise it, or set"),
        ):
            errors, warnings = found(measure("sft", data(rows, **limits), trainer))
            assert errors == []
            assert any(words in warning and f"{long} of 20" in warning for warning in warnings) == warned
        rows = [*pairs(20 - long), *[row | {"prompt": " is" * 9 + str(i)} for i, row in enumerate(pairs(long))]]
        _, warnings = found(measure("ppo", data(rows, max_prompt_length=8)))
        assert any("max_prompt_length 8, and lose their beginning" in warning for warning in warnings) == warned

    @pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
    @pytest.mark.parametrize(
        ("prompt", "reply", "warned"),
        [("What is {}?", "A cow.", True), ("What is {}?", " A cow.", False), ("What is {}?\n", "A cow.", False)],
    )
    def test_a_reply_with_nothing_between_it_and_its_prompt(self, data, measure, kind, prompt, reply, warned):
        rows = [
            {"prompt": prompt.format(f"it, {i},"), "completion": reply, "chosen": reply, "rejected": " Not so."}
            for i in range(20)
        ]
        for spec in (data(rows), data(rows, max_prompt_length=4)):
            numbers = measure(kind, spec)
            assert (numbers["run_together"]["rows"], numbers["run_together"]["of"]) == (20 if warned else 0, 20)
            assert any("?A cow" in warning for warning in found(numbers)[1]) == warned
        assert measure(kind, data(rows, chat=True))["run_together"] is None

    @pytest.mark.parametrize(("twice", "warned"), [(2, False), (3, True)])
    def test_more_than_a_twentieth_repeated(self, data, measure, twice, warned):
        _, warnings = found(measure("sft", data([*demonstrations(38), *demonstrations(twice)])))
        assert any(f"{twice} of {38 + twice}" in warning for warning in warnings) == warned

    @pytest.mark.parametrize(("longer", "said"), [(13, None), (16, "longer"), (4, "shorter")])
    def test_length_that_tells_the_chosen_reply(self, data, measure, longer, said):
        _, warnings = found(measure("dpo", data(pairs(20, longer=longer))))
        assert len(warnings) == (said is not None)
        if said:
            assert f"the {said} reply is the chosen one in 80% of the pairs (correlation" in warnings[0]

    def test_prompts_on_both_sides(self, data, measure):
        spec = data(pairs(20, longer=10))
        seen = data(pairs(3))
        _, warnings = found(measure("dpo", spec.model_copy(update={"eval_data": seen})))
        assert warnings == [
            "stages.x.data: the prompts of 3 of 3 (100%) held-out rows are trained on too, so evaluation looks too "
            "good: hold out other prompts; `eval_fraction` does"
        ]

    def test_fewer_rows_than_a_batch(self, data, measure):
        assert found(measure("sft", data(demonstrations(7)), Trainer(batch=7)))[1] == []
        _, warnings = found(measure("sft", data(demonstrations(7)), Trainer(batch=8)))
        assert warnings == [
            "stages.x.data: 7 rows are fewer than one batch of 8: lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`, or add rows"
        ]

    def test_fewer_rows_than_a_batch_of_several_processes(self, data, measure, tmp_path):
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
        _, warnings = found(measure("sft", data(demonstrations(10)), Trainer.of(args, processes=4)))
        assert len(warnings) == 1 and "10 rows are fewer than one batch of 16, which 4 processes share: " in warnings[0]

    @pytest.mark.parametrize("kind", ["sft", "reward", "ppo", "dpo"])
    def test_rows_beyond_the_models_positions(self, data, measure, kind, tokenizer):
        spec = data(pairs(30, longer=15))
        longest = 3 if kind == "ppo" else max(map(len, prepare.demonstrations(spec, tokenizer, 0).train["input_ids"]))
        prompt = measure("ppo", spec)["lengths"]["prompt"]["max"]
        longest = prompt + 4 if kind == "ppo" else longest
        assert found(measure(kind, spec, Trainer(max_positions=longest, response_length=4)))[1] == []
        _, warnings = found(measure(kind, spec, Trainer(max_positions=longest - 1, response_length=4)))
        assert len(warnings) == 1
        assert f"longer than the {longest - 1} tokens that the model has positions for" in warnings[0]

    def test_a_second_bos(self, data, measure, tmp_path):
        """The text brings one, and the tokenizer adds one."""
        from tokenizers import processors

        tokenizer = load_tokenizer(str(recipe.TINY / "checkpoint"))
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        rows = demonstrations(20)
        rows[3]["prompt"] = "<bos>" + rows[3]["prompt"]
        _, warnings = found(measure("sft", data(rows), tokenizer=tokenizer))
        assert [warning for warning in warnings if "1 of 20 (5%) rows begin with BOS twice" in warning]

    def test_every_one_says_what_to_do(self, data, measure):
        numbers = measure("dpo", data(pairs(20, longer=20)))
        numbers |= {
            "batch": 99, "conversations": 3, "cut": {"prompt": 9, "chosen": 9}, "max_length": {"cut": 9, "left_out": 9},
            "beyond_model": 2, "duplicates": {"rows": 3, "prompts": 3}, "equal_pairs": 1, "held_out_rows": 4,
            "both_sides": {"prompts": 1, "held_out_rows": 1}, "bos_doubled": 1,
            "held_out_max_length": {"cut": 0, "left_out": 0},
            "run_together": {"rows": 20, "of": 20, "example": "a:b"},
            "replies": numbers["replies"] | {"without_loss": 2},
            "limits": numbers["limits"] | {"max_prompt_length": 8, "max_completion_length": 8, "max_positions": 64},
        }  # fmt: skip
        warnings = found(numbers)[1]
        assert len(warnings) == 14
        to_do = r"(: |; else |; |, )(lower|raise|set|write|take|remove|hold|add|end prompts|if not meant, remove) "
        assert [warning for warning in warnings if not re.search(to_do, warning + " ")] == []


class TestAcross:
    def test_text_and_conversations(self, data, measure):
        chat, text = measure("sft", data(CHATS)), measure("dpo", data(pairs(5)))
        assert problems.across({"sft": chat}) == []
        (warning,) = problems.across({"sft": chat, "dpo": text})
        assert "the prompts of sft are conversations, and those of dpo plain text" in warning
        (warning,) = problems.across({"a": chat, "b": chat, "c": chat, "d": text})
        assert "the prompts of a, b and c are conversations, and those of d plain text" in warning

    def test_the_prompts_that_policies_are_judged_on(self, data, measure):
        chat, text = measure("sft", data(CHATS)), measure("dpo", data(pairs(5), chat=False))
        turns = [[{"role": "user", "content": f"Q {i}"}] for i in range(3)]
        assert problems.across({"sft": chat}, turns) == problems.across({"sft": text}, ["Q"] * 3) == []
        (warning,) = problems.across({"sft": chat, "dpo": chat}, ["Q", *turns])
        assert warning == (
            "evaluate.data: the prompts of 1 of 4 (25%) rows are plain text, and those of sft and dpo conversations: "
            "policies are judged in a format that they were not trained on; set `chat: true` there if they are a "
            "user's turns"
        )
        (warning,) = problems.across({"sft": text}, turns)
        assert "3 of 3 (100%) rows are conversations, and those of sft plain text" in warning
        (warning,) = problems.across({"sft": chat, "dpo": text}, ["Q"])  # there is one format too many already
        assert "two formats" in warning

    def test_a_stage_that_people_do_trains_no_model(self, data, measure):
        texts = data([{"prompt": "Q", "replies": ["a", "b"]}] * 4, chat=False)
        chats = data([{"prompt": [{"role": "user", "content": "Q"}], "replies": ["a", "b"]}] * 4)
        mix = Data(mix=[{"path": texts.path, "weight": 1}, {"path": chats.path, "weight": 1}])
        (warning,) = (one for one in found(measure("label", mix))[1] if "conversations" in one)
        (other,) = problems.across({"feedback": measure("label", chats), "dpo": measure("dpo", data(pairs(5)))})
        for said in (warning, other):
            assert "plain text, which are two formats: write all in one" in said and "train" not in said

    def test_text_and_conversations_in_one_stage(self, data, measure):
        """Of each source as many as are in use; rows of `eval_data` count, too."""
        chats, texts = data(CHATS * 4).path, data(demonstrations(30)).path
        mix = [{"path": chats, "weight": 1}, {"path": texts, "weight": 3}]
        numbers = measure("sft", Data(mix=mix))
        assert (numbers["rows"], numbers["conversations"]) == (40, 10)
        assert any("10 of 40 (25%) rows are conversations" in warning for warning in found(numbers)[1])
        numbers = measure("sft", Data(path=chats, eval_data={"path": chats, "limit": 3}))
        assert (numbers["rows"], numbers["held_out_rows"], numbers["conversations"]) == (20, 3, 23)
        assert not any("two formats" in warning for warning in found(numbers)[1])

    @pytest.mark.parametrize(("chat", "warned"), [(None, True), (False, False), (True, False)])
    def test_a_template_that_no_prompt_goes_through(self, data, measure, chat, warned):
        warnings = problems.across({"dpo": measure("dpo", data(pairs(5), chat=chat))})
        assert any("all prompts are plain text" in warning for warning in warnings) == warned

    def test_the_default_template_is_said_where_it_is_used(self, data, measure):
        tokenizer = load_tokenizer(str(recipe.TINY / "checkpoint"))
        tokenizer.chat_template = DEFAULT_TEMPLATE
        numbers = measure("sft", data(CHATS), tokenizer=tokenizer)
        assert ["plain default" in warning for warning in problems.across({"sft": numbers})] == [True]
        assert problems.across({"dpo": measure("dpo", data(pairs(5)), tokenizer=tokenizer)}) == []

    def test_prompt_and_reply_that_are_not_the_templates_text_are_shown_beside_it(self, data, measure, tmp_path):
        opening = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{{ '<assistant><think>' }}"
        (tmp_path / "t.jinja").write_text(opening)
        tokenizer = load_tokenizer(Model(path=str(TINY / "checkpoint"), chat_template=str(tmp_path / "t.jinja")))
        numbers = measure("sft", data(CHATS), tokenizer=tokenizer)
        assert numbers["unlike_template"]["rows"] == 5
        (warning,) = (one for one in problems.problems(numbers, "sft.data")[1] if "another text" in one)
        assert "'<user>Q 0<assistant><think>yes'" in warning
        assert "'<user>Q 0<assistant>yes<assistant><think>'" in warning
        assert measure("sft", data(CHATS))["unlike_template"] is None

    def test_a_day_that_stands_still_is_said(self, data, measure, tmp_path):
        (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
        tokenizer = load_tokenizer(Model(path=str(TINY / "checkpoint"), chat_template=str(tmp_path / "t.jinja")))
        numbers = measure("sft", data(CHATS), tokenizer=tokenizer)
        assert numbers["template_day"] == "2024-07-26"
        assert ["2024-07-26" in warning for warning in problems.across({"sft": numbers}) if "today" in warning] == [
            True
        ]
        assert measure("sft", data(CHATS))["template_day"] is None

    @pytest.mark.parametrize(
        ("reply", "within", "foreign"),
        [(" yes.<|end|>\n", 0, 0), (" yes.<|end|> And on.", 1, 0), (" yes.</s>\n", 0, 1), (" <p>yes.</p>", 0, 0)],
    )
    def test_ends_in_and_behind_a_reply_are_counted(self, data, measure, reply, within, foreign):
        numbers = measure("sft", data([{"prompt": "Q:", "completion": reply}, *demonstrations(3)]))
        assert (numbers["eos_within"], numbers["foreign_end"]) == (within, foreign)
        warnings = problems.problems(numbers, "sft.data")[1]
        assert len([one for one in warnings if "EOS before its end" in one]) == within
        assert len([one for one in warnings if "another model's end" in one]) == foreign

    def test_a_template_with_another_end(self, data, measure):
        tokenizer = load_tokenizer(str(recipe.TINY / "checkpoint"))
        tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}<stop>{% endfor %}"
        (warning,) = problems.across({"sft": measure("sft", data(CHATS), tokenizer=tokenizer)})
        assert "ends the assistant's turns in '<stop>'" in warning
        assert repr(tokenizer.eos_token) in warning
