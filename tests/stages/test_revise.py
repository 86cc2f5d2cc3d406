"""The stage that criticises and revises: what is asked, what comes out, and that nothing depends on how it was run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data import prepare
from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.judges import principles
from rlhf_pipeline.judges.principles import Principle
from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.recipe.gates import known_metrics
from rlhf_pipeline.recipe.schema import Data
from rlhf_pipeline.rundir.layout import MADE
from rlhf_pipeline.stages import check, revise
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.revise import Asked, Written, critique_request, figures, revision_request, row_of

KIND = Principle("kind", "Which is kinder?", "What is unkind?", "Say it kindly.")
LONGEST = principles.load(TINY / "principles.yaml", "")[1]
RECIPE = """
name: short
model: {path: tiny, quantization: none, dtype: float32}
stages:
  revisions:
    kind: revise
    data: prompts.jsonl
    principles: tiny:principles
    passes: 2
    sampling: {max_new_tokens: 8, batch_size: 2}
"""
QUESTIONS = ["Q: What color is a lemon?\nA:", "Q: What sound does a cow make?\nA:", "Q: What color is a lemon?\nA:"]


def job_of(folder: Path, *overrides: str, prompts: list[Any] = QUESTIONS) -> Job:
    """The stage of a recipe over some prompts, in a run directory of its own."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = [{"prompt": prompt, "level": level} for level, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, "revisions", recipe.run)
    job.work.mkdir(parents=True)
    return job


def lines(job: Job, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.artifact / name).read_text().splitlines()]


def item(reply: str, *revisions: str | None, critique: str = "bad", ended: bool = True) -> dict[str, Any]:
    """What is noted of a prompt; None is a pass with an empty critique, after which nothing is asked."""
    passes = [
        {
            "principle": "kind",
            "critique_request": KIND.critique,
            "critique": Written("" if text is None else critique, 3, True),
            "revision_request": KIND.revision,
            "revision": None if text is None else Written(text, 2 * len(text), ended),
        }
        for text in revisions
    ]
    return {"prompt": "Q", "reply": Written(reply, len(reply), True), "passes": passes}


class TestRequests:
    def test_text_is_continued_as_text_and_ends_with_the_prompt(self):
        assert critique_request("Q:", " No.", KIND) == "Q: No.\n\nWhat is unkind?\n\n"
        asked = revision_request("Q:", " No.", " It is curt.\n", KIND)
        assert asked == "Q: No.\n\nWhat is unkind?\n\nIt is curt.\n\nSay it kindly.\n\nQ:"

    def test_a_conversation_is_continued_by_turns(self, tokenizer):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
        asked = revision_request(prompt, "No.", "It is curt.", KIND)
        assert [(turn["role"], turn["content"]) for turn in asked] == [
            ("system", "Be brief."), ("user", "Well?"), ("assistant", "No."), ("user", "What is unkind?"),
            ("assistant", "It is curt."), ("user", "Say it kindly."),
        ]  # fmt: skip
        assert asked[:-2] == critique_request(prompt, "No.", KIND)
        assert len(prompt) == 2
        (ids,) = encode_prompts(tokenizer, Data(path="x"), [asked])
        assert tokenizer.decode(ids).endswith("<|user|>Say it kindly.<|assistant|>")

    def test_the_tiny_model_is_taught_what_the_stage_asks(self):
        """`tiny:critiques` are answers to just these requests, by the principles that ship with the tiny world."""
        found = principles.load(TINY / "principles.yaml", "", ("judge", "critique", "revision"))
        assert {one.name: (one.critique, one.revision) for one in found} == world.PRINCIPLES
        rows = [json.loads(line) for line in (TINY / "data" / "critiques.jsonl").read_text().splitlines()]
        asked = {question.prompt: question.fact for question in world.split(0)[0]}
        for critique, revision in zip(rows[::2], rows[1::2], strict=True):
            prompt = critique["prompt"].partition("\nA:")[0] + "\nA:"
            (one,) = [one for one in found if critique["prompt"].endswith(f"\n\n{one.critique}\n\n")]
            reply = critique["prompt"].removeprefix(prompt).removesuffix(f"\n\n{one.critique}\n\n")
            assert critique["prompt"] == critique_request(prompt, reply, one)
            assert revision["prompt"] == revision_request(prompt, reply, critique["completion"], one)
            polite = world.is_polite(reply.replace("?", "."))  # asking back is no answer, and not impolite
            good = world.is_right(asked[prompt], reply), polite
            praised = critique["completion"] in ("Good answer.", "The sound is lovely.")
            assert praised == good[one.name == "manners"]
            assert world.judge([prompt], [revision["completion"]]) == [1.0]
            assert revision["completion"] == reply or not all(good)


class TestWhatComesOut:
    @pytest.mark.parametrize(
        ("noted", "replies"),
        [
            (item("a", "b", "c"), ["a", "b", "c"]),
            (item("a", "a"), ["a"]),
            (item("a", "b", "a"), ["b", "a"]),
            (item("a", "b", "b"), ["a", "b"]),
            (item("a", " ", "c"), ["a", "c"]),
            (item("a", "b", None), ["a", "b"]),
        ],
        ids=["all differ", "unchanged", "back to the first", "unchanged later", "an empty revision", "no critique"],
    )
    def test_distinct_replies_and_the_last_is_best(self, noted, replies):
        assert row_of(noted) == {"prompt": "Q", "replies": replies, "scores": list(range(len(replies)))}

    def test_an_empty_first_reply_gives_no_row(self):
        assert row_of(item(" \n")) is None

    def test_rows_are_demonstrations_of_the_last_reply_and_pairs_where_there_are_two(self, tmp_path, tokenizer):
        rows = [row_of(item("one", "two", "three")), row_of(item("four", "four")), row_of(item("five", "six"))]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"prompt": "Q:"}) + "\n" for row in rows))
        spec = Data(path=str(tmp_path / "rows.jsonl"))
        learned = prepare.demonstrations(spec, tokenizer, 0)
        texts = [
            tokenizer.decode([token for token in row["labels"] if token != -100], skip_special_tokens=True)
            for row in learned.train
        ]
        assert texts == ["three", "four", "six"]
        pairs = prepare.preferences(spec, tokenizer, 0)
        read = [[tokenizer.decode(row[name][:-1]) for name in ("chosen_ids", "rejected_ids")] for row in pairs.train]
        assert read == [["three", "two"], ["three", "one"], ["two", "one"], ["six", "five"]]
        assert pairs.counts["rows_without_pair"] == 1

    def test_a_conversation_with_tools_is_read_as_it_was(self):
        tools = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]
        prompt = [{"role": "system", "content": "Be brief.", "tools": tools}, {"role": "user", "content": "Well?"}]
        row = row_of(item("one", "two") | {"prompt": prompt})
        assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
        assert recognise([row], "prompts").read(row) == [(prompt,)]
        assert recognise([row], "preferences").read(row) == [(prompt, "two", "one")]

    def test_figures(self):
        found = figures([
            item("aa", "bbbb"), item("aa", "aa"), item("aa", None), item("aa", "Here is the revised reply:\n\nb"),
            item(" "), item("aa", "", ended=False),
        ])  # fmt: skip
        assert found["revised"] == 2 / 5
        assert found["first/length"] == 2.0
        assert found["reply/length"] == (8 + 4 + 2 + 2 * 29 + 2) / 5
        assert (found["first/ended"], found["reply/ended"]) == (1.0, 1.0)
        assert (found["critique/empty"], found["revision/empty"]) == (1 / 5, 1 / 4)
        assert found["revision/announced"] == 1 / 4
        assert found["prompts/empty_reply"] == 1

    @pytest.mark.parametrize(
        ("text", "announced"),
        [
            ("Here's the revised response:\n\nNo.", True),
            ("**Rewritten reply:**\nNo.", True),
            ("Improved version:\n", True),
            ("I revised the will: it is with my lawyer.", False),
            ("No.\nHere is the revised reply:\n", False),
            ("You need three things:\n- eggs", False),
        ],
    )
    def test_what_counts_as_talk_about_the_revision(self, text, announced):
        assert figures([item("aa", text)])["revision/announced"] == announced


def test_no_principle_comes_twice_to_a_prompt_until_all_have_come():
    found = [KIND._replace(name=name) for name in "abc"]

    def drawn(prompt: str, number: int, seed: int = 0) -> str:
        return "".join(revise._drawn(found, seed, Asked(prompt, [], "", number), of_pass).name for of_pass in range(6))

    orders = [drawn(prompt, 0) for prompt in QUESTIONS[:2] + [str(i) for i in range(40)]]
    assert all(sorted(order[:3]) == sorted(order[3:]) == ["a", "b", "c"] for order in orders)
    assert len({order[:3] for order in orders}) == 6
    assert any(order[:3] != order[3:] for order in orders)
    assert drawn("Q", 0) == drawn("Q", 0)
    assert len({drawn("Q", number) for number in range(9)}) > 1
    assert len({drawn("Q", 0, seed) for seed in range(9)}) > 1


class TestStage:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        """A stage of two passes over three prompts, two of which are the same, with the bare tiny model."""
        job = job_of(tmp_path_factory.mktemp("revise") / "whole")
        return job, revise.run(job)

    def test_rows_and_critiques(self, made):
        job, metrics = made
        rows, critiques = lines(job, "rows.jsonl"), lines(job, "critiques.jsonl")
        noted = [json.loads(line) for line in (job.work / MADE).read_text().splitlines()]
        assert [one["prompt"] for one in noted] == QUESTIONS
        assert rows == [row | {"level": level} for level, one in enumerate(noted) if (row := row_of(one))]
        assert metrics["rows"] == len(rows)
        assert metrics.keys() == known_metrics(job.recipe, job.name)
        asked = {(one["critique_request"], one["revision_request"]) for one in critiques}
        assert asked <= set(world.PRINCIPLES.values())
        assert [one["pass"] for one in critiques if one["prompt"] == QUESTIONS[1]] == [1, 2]
        assert len({one["principle"] for one in critiques if one["prompt"] == QUESTIONS[1]}) == 2

    def test_the_same_prompt_again_gets_a_reply_of_its_own(self, made):
        first, _, again = [json.loads(line) for line in (made[0].work / MADE).read_text().splitlines()]
        assert first["prompt"] == again["prompt"]
        assert first != again

    def test_rows_do_not_depend_on_the_batch(self, made, tmp_path):
        other = job_of(tmp_path / "other", "revisions.sampling.batch_size=3")
        revise.run(other)
        assert lines(other, "rows.jsonl") == lines(made[0], "rows.jsonl")
        assert lines(other, "critiques.jsonl") == lines(made[0], "critiques.jsonl")

    def test_an_interrupted_stage_goes_on_where_it_was(self, made, tmp_path):
        """What it has noted is taken as it is, and the rest comes out as it would have."""
        resumed = job_of(tmp_path / "resumed")
        first, *rest = (made[0].work / MADE).read_text().splitlines(keepends=True)
        noted = json.loads(first)
        noted["reply"][0] = " It is a lemon."
        (resumed.work / MADE).write_text(json.dumps(noted) + "\n" + rest[0][:20])
        revise.run(resumed)
        assert (resumed.work / MADE).read_text().splitlines(keepends=True)[1:] == rest
        assert lines(resumed, "rows.jsonl")[0]["replies"][0] == " It is a lemon."

    def test_prompts_that_may_outgrow_the_context_are_left_out_and_counted(self, tmp_path):
        """The prompt twice, the requests, and three texts of 8 tokens: one prompt is a token too long, another fits."""
        folder, prompt = tmp_path / "long", "Q: {}\nA:"
        tokenizer = load_tokenizer(str(TINY / "checkpoint"))
        tokens = len(tokenizer(revision_request(prompt.format(""), "x", "x", LONGEST))["input_ids"])
        room = (2048 - 24 - tokens) // 2
        prompts = [prompt.format(" moo" * (room + more)) for more in (1, 0)]
        job = job_of(folder, prompts=prompts)
        assert [one.prompt for one in revise.prepare(job).asked] == prompts[1:]
        (said,) = [warning for warning in check.check(job.recipe, [job.name]) if "left out" in warning]
        assert said == (
            "stages.revisions: 1 of 2 prompts are left out: with a reply, a critique and a revision they may outgrow "
            "the model's context of 2,048 tokens"
        )

    def test_chat_prompts_go_through_the_template(self, tmp_path):
        job = job_of(tmp_path / "chat", "revisions.data.chat=true", prompts=["Well?"])
        revise.run(job)
        (noted,) = [json.loads(line) for line in (job.work / MADE).read_text().splitlines()]
        assert noted["prompt"] == [{"role": "user", "content": "Well?"}]
