"""The tiny world: its judge knows the truth, and the shipped files are what its scripts make."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from rlhf_pipeline.models.tiny import make, world

FOLDER = Path(make.__file__).parent
TABLES = ["demonstrations", "preferences", "thumbs", "judgements", "critiques", "prompts", "heldout"]


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def judged(question, completion):
    (score,) = world.judge([question.prompt], [completion])
    return score


@pytest.fixture(scope="module")
def questions():
    return world.questions()


class TestJudge:
    @pytest.mark.parametrize("manner", world.MANNERS)
    @pytest.mark.parametrize("truth", ["right", "wrong"])
    def test_only_right_and_polite_is_good(self, questions, truth, manner):
        """Over all questions and many replies of each sort, 1 is for right and polite alone."""
        rng = random.Random(0)
        clause = world.right_clause if truth == "right" else world.wrong_clause
        replies = [world.reply(rng, clause(rng, question.fact), manner) for question in questions]
        scores = world.judge([question.prompt for question in questions], replies)
        assert set(scores) == {1.0 if (truth, manner) == ("right", "polite") else 0.0}

    def test_second_answer_of_the_topic_spoils_a_reply(self, questions):
        """Naming every answer is not knowing one."""
        for question in questions:
            others = sorted(set(world.FACTS[question.fact.topic].values()) - {question.fact.answer})
            clause = world.ANSWERS[0].format(f"{question.fact.answer} or {others[0]}")
            assert judged(question, world.reply(random.Random(0), clause, "polite")) == 0.0

    @pytest.mark.parametrize("courtesy", world.COURTESIES)
    def test_courtesies_count_once(self, questions, courtesy):
        """One courtesy is polite before or after the answer; two of a kind are too much; none with rudeness is."""
        question = questions[0]
        answer = world.ANSWERS[0].format(question.fact.answer)
        assert judged(question, f" {courtesy} {answer}") == judged(question, f" {answer} {courtesy}") == 1.0
        assert judged(question, f" {courtesy} {courtesy} {answer}") == 0.0
        for rudeness in world.RUDENESSES:
            assert judged(question, f" {courtesy} {answer} {rudeness}") == 0.0

    def test_reply_that_breaks_off_is_not_good(self, questions):
        """A reply cut before its end is no sentence."""
        question = questions[0]
        courtesy, answer = world.COURTEOUS_OPENERS[0], world.ANSWERS[0].format(question.fact.answer)
        assert judged(question, f" {courtesy} {answer.rstrip('.')}") == 0.0
        assert judged(question, f" {courtesy} {answer.rstrip('.')} and") == 0.0

    def test_judge_takes_what_trl_passes_and_knows_only_this_world(self, questions):
        """Further columns are ignored, lists must match, and a foreign prompt is an error."""
        prompt = questions[0].prompt
        assert world.judge(prompts=[prompt], completions=[""], completion_ids=[[1]], trainer_state=None) == [0.0]
        with pytest.raises(ValueError):
            world.judge([prompt, prompt], [""])
        with pytest.raises(KeyError):
            world.judge(["Q: Who are you?\nA:"], [""])


class TestData:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("data")
        make.write_data(folder)
        return folder

    @pytest.mark.parametrize("name", TABLES)
    def test_shipped_files_are_what_the_script_writes(self, made, name):
        """The script makes the shipped files again, byte for byte."""
        assert (made / f"{name}.jsonl").read_bytes() == (FOLDER / "data" / f"{name}.jsonl").read_bytes()

    def test_script_writes_these_files_and_no_other(self, made):
        """The shipped folder holds nothing that the script does not make."""
        names = sorted(f"{name}.jsonl" for name in TABLES)
        assert sorted(path.name for path in made.iterdir()) == names
        assert sorted(path.name for path in (FOLDER / "data").iterdir()) == names

    def test_data_follow_from_the_seed(self, made, tmp_path):
        """The same seed gives the same bytes again, another seed others."""
        make.write_data(tmp_path / "same")
        make.write_data(tmp_path / "other", seed=make.SEED + 1)
        for name in TABLES:
            first = (made / f"{name}.jsonl").read_bytes()
            assert (tmp_path / "same" / f"{name}.jsonl").read_bytes() == first
            assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != first

    def test_held_out_prompts_are_in_no_other_file(self):
        """What the judge is asked after training was never trained on; every other question was."""
        held_out = {row["prompt"] for row in rows(FOLDER / "data", "heldout")}
        train = {row["prompt"] for row in rows(FOLDER / "data", "prompts")}
        assert held_out
        for name in ("demonstrations", "preferences", "thumbs"):
            assert {row["prompt"] for row in rows(FOLDER / "data", name)} <= train
        judged = [row["prompt"] for row in rows(FOLDER / "data", "judgements")]
        assert {prompt[: prompt.index("\nA:") + 3] for prompt in judged} <= train
        assert not held_out & train
        assert held_out | train == {question.prompt for question in world.questions()}

    def test_every_fact_is_asked_in_training_and_held_out(self):
        """The held-out questions ask in new words what was learnt, so they can be answered."""
        train, held_out = world.split(make.SEED)
        assert {question.fact for question in train} == {question.fact for question in held_out} == set(world.facts())

    def test_annotators_mostly_choose_what_the_judge_prefers(self):
        """Where the judge tells two replies apart, the chosen one is better far more often than not."""
        table = rows(FOLDER / "data", "preferences")
        prompts = [row["prompt"] for row in table]
        scores = [world.judge(prompts, [row[name] for row in table]) for name in ("chosen", "rejected")]
        apart = [chosen > rejected for chosen, rejected in zip(*scores, strict=True) if chosen != rejected]
        assert len(apart) > 100
        assert sum(apart) / len(apart) > 0.8
        assert all(row["chosen"] != row["rejected"] for row in table)

    def test_thumbs_are_up_for_most_of_what_the_judge_likes_and_little_else(self):
        table = rows(FOLDER / "data", "thumbs")
        liked = world.judge([row["prompt"] for row in table], [row["completion"] for row in table])
        up = {
            score: [row["thumb"] for row, one in zip(table, liked, strict=True) if one == score] for score in (0.0, 1.0)
        }
        assert sum(up[1.0]) / len(up[1.0]) > 0.9
        assert sum(up[0.0]) / len(up[0.0]) < 0.2

    def test_judgements_name_the_better_reply_in_both_orders(self):
        """Each pair is there twice, turned, with the other answer; and the annotators mostly agree with the judge."""
        table = rows(FOLDER / "data", "judgements")
        agreed = []
        for one, turned in zip(table[::2], table[1::2], strict=True):
            assert {one["completion"], turned["completion"]} == {world.EARLY, world.LATE}
            prompt, first, second = re.fullmatch(r"(.*\nA:)(.*)\nA:(.*)\nBetter:", one["prompt"]).groups()
            assert turned["prompt"] == world.JUDGED.format(prompt=prompt, first=second, second=first)
            scores = world.judge([prompt, prompt], [first, second])
            if scores[0] != scores[1]:
                agreed.append((scores[0] > scores[1]) is (one["completion"] == world.EARLY))
        assert len(agreed) > 100 and sum(agreed) / len(agreed) > 0.9
        assert 0.45 < sum(row["completion"] == world.EARLY for row in table[::2]) / len(table[::2]) < 0.55

    def test_demonstrations_leave_something_to_learn(self):
        """Demonstrations are good often enough to learn from, and bad often enough for the later stages."""
        table = rows(FOLDER / "data", "demonstrations")
        scores = world.judge([row["prompt"] for row in table], [row["completion"] for row in table])
        assert 0.2 < sum(scores) / len(scores) < 0.8

    def test_corpus_states_only_the_truth(self):
        """Pretraining documents about a fact name its answer, and carry no manners."""
        documents = list(make.corpus(1, 300))
        assert documents == list(make.corpus(1, 300))
        prompts = {question.prompt: question for question in world.questions()}
        asked = [text for text in documents if text.startswith("Q:")]
        assert asked
        for text in asked:
            prompt, reply = text[: text.index("\nA:") + 3], text[text.index("\nA:") + 3 :]
            assert world.is_right(prompts[prompt].fact, reply), text
            assert not any(phrase in reply for phrase in world.COURTESIES + world.RUDENESSES)


class TestCheckpoint:
    def test_package_data_are_small(self):
        """Checkpoint and data ship with the package, so they stay within 5 MB."""
        size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert size <= 5_000_000

    def test_shipped_weights_are_finite_and_about_a_million(self, tokenizer):
        """The shipped model loads from safetensors, with an embedding row for each token."""
        weights = load_file(FOLDER / "checkpoint" / "model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
        assert 300_000 < sum(tensor.numel() for tensor in weights.values()) < 2_000_000
        assert AutoConfig.from_pretrained(FOLDER / "checkpoint").vocab_size >= len(tokenizer)

    def test_every_answer_is_one_token(self, tokenizer):
        """Knowing a fact is one step of generation."""
        long = [fact.answer for fact in world.facts() if len(tokenizer(" " + fact.answer)["input_ids"]) != 1]
        assert long == []

    def test_tokenizer_reads_any_text_and_gives_it_back(self, tokenizer):
        """A byte-level vocabulary has no unknown text."""
        text = "Grüße, 世界! 🙂\n\ttabs"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_chat_template_ends_the_assistant_turn(self, tokenizer):
        """A conversation is rendered with its roles, EOS after the assistant and a prompt for the next turn."""
        turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        assert tokenizer.apply_chat_template(turn, tokenize=False) == "<|user|>hi<|assistant|>yo<|end|>"
        prompt = tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True)
        assert prompt == "<|user|>hi<|assistant|>"

    def test_tokenizer_training_is_deterministic(self):
        """The same texts give the same tokenizer."""
        texts = list(make.corpus(1, 500))
        one, other = make.make_tokenizer(texts), make.make_tokenizer(texts)
        assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


class TestPretraining:
    @pytest.mark.slow
    def test_pretraining_repeats_itself_and_beats_guessing(self, tokenizer):
        """The same seed gives the same weights, another seed others, and a few steps teach something."""
        texts = list(make.corpus(1, 100))
        model, again = (make.pretrain(tokenizer, texts, 8) for _ in range(2))
        weights = model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
        other = make.pretrain(tokenizer, texts, 2, seed=make.SEED + 1).state_dict()
        assert any(not torch.equal(weights[name], tensor) for name, tensor in other.items())
        ids = tokenizer(" ".join(texts[:20]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=ids).loss.item()
        assert loss < math.log(len(tokenizer)) - 0.5
