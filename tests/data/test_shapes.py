"""Every shape that rows come in becomes the same records, and a row that lacks something says what."""

import itertools
import json
import subprocess
import sys

import pytest

from rlhf_pipeline.data.carried import carried
from rlhf_pipeline.data.shapes import recognise, split_texts
from rlhf_pipeline.data.turns import RowError
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.yaml import parse_value

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}
MORE = {"role": "user", "content": "and you?"}
TOOL = {"role": "tool", "content": "42"}


def read(wanted, *rows, chat=None, pairs=None):
    """What a stage gets of rows: the name of their shape, and their records."""
    shape = recognise(rows, wanted, chat, pairs=pairs)
    records = [record for row in rows for record in shape.read(row)]
    if shape.of_replies is not None:
        together = itertools.groupby(sorted(records, key=lambda record: str(record[0])), key=lambda record: record[0])
        records = [
            (prompt, *record)
            for prompt, found in together
            for record in shape.of_replies([(reply, score) for _, reply, score in found])
        ]
    assert shape.says.startswith(shape.name)
    return shape.name, records


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [USER, REPLY]}),
        ("messages", {"messages": [USER, REPLY], "prompt": None, "completion": None}),
        ("messages", {"messages": [USER, REPLY], "prompt": "hi"}),
        ("conversations", {"conversations": sharegpt(USER, REPLY)}),
        ("conversations", {"conversations": [USER, REPLY]}),
        (
            "conversations",
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
        ),
        ("prompt/completion", {"prompt": [USER], "completion": [REPLY]}),
        ("prompt/completion", {"prompt": [{**USER, "name": None}], "completion": "hello"}),
        ("prompt/response", {"prompt": [USER], "response": "hello"}),
        ("question/answer", {"question": "hi", "answer": "hello"}),
        ("instruction/output", {"instruction": "hi", "output": "hello"}),
        ("instruction/input/output", {"instruction": "hi", "input": "", "output": "hello", "text": "### hi"}),
        ("prompt/chosen/rejected", {"prompt": [USER], "chosen": "hello", "rejected": "go away"}),
        ("chosen/rejected", {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}),
        (
            "chosen/rejected",
            {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
        ),
        ("question/preferred/rejected", {"question": "hi", "preferred": "hello", "rejected": "go away"}),
        ("ranking", {"question": "hi", "replies": ["hello", "go away"]}),
        ("ranking", {"question": "hi", "replies": ["go away", "hello"], "ranks": [2, 1]}),
        ("scores per reply", {"question": "hi", "replies": ["go away", "hello"], "scores": [0, 0.5]}),
    ],
)
def test_the_same_demonstration_in_every_shape(name, row):
    assert read("demonstrations", row) == (name, [([USER], "hello")])


def test_demonstrations_of_text_alone():
    assert read("demonstrations", {"prompt": "hi", "completion": "hello"}) == ("prompt/completion", [("hi", "hello")])
    assert read("demonstrations", {"text": "once upon a time"}) == ("text", [("", "once upon a time")])


def test_demonstrations_take_the_good_and_the_best_replies():
    rows = [
        {"question": "hi", "response": "hello", "label": True},
        {"question": "hi", "response": "go", "label": False},
    ]
    assert read("demonstrations", *rows)[1] == [([USER], "hello")]
    rows = [{"question": "hi", "response": text, "score": score} for text, score in (("go", 1), ("hello", 3), ("a", 2))]
    assert read("demonstrations", *rows)[1] == [([USER], "hello")]


TRANSCRIPT = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("prompt/chosen/rejected", [{"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}]),
        ("prompt/chosen/rejected", [{"prompt": [USER], "chosen": "hello", "rejected": "go away"}]),
        ("chosen/rejected", [{"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}]),
        ("question/chosen/rejected", [{"question": "hi", "chosen": "hello", "rejected": "go away"}]),
        ("instruction/chosen/rejected", [{"instruction": "hi", "chosen": "hello", "rejected": "go away"}]),
        ("question/preferred/rejected", [{"question": "hi", "preferred": "hello", "rejected": "go away"}]),
        ("chosen/rejected", [{"chosen": [USER, REPLY], "rejected": [USER, OTHER]}]),
        ("chosen/rejected", [{"chosen": TRANSCRIPT + " hello", "rejected": TRANSCRIPT + " go away"}]),
        (
            "conversations/chosen/rejected",
            [
                {
                    "conversations": sharegpt(USER),
                    "chosen": {"from": "gpt", "value": "hello"},
                    "rejected": {"from": "gpt", "value": "go away"},
                }
            ],
        ),
        ("messages/chosen/rejected", [{"messages": [USER], "chosen": "hello", "rejected": "go away"}]),
        ("ranking", [{"question": "hi", "replies": ["hello", "go away"]}]),
        ("ranking", [{"prompt": [USER], "completions": [[REPLY], [OTHER]]}]),
        ("ranking", [{"question": "hi", "responses": ["go away", "hello"], "ranks": [2, 1]}]),
        ("ranking", [{"question": "hi", "answers": [{"text": "go away", "rank": 2}, {"text": "hello", "rank": 1}]}]),
        ("scores per reply", [{"question": "hi", "answers": ["go away", "hello"], "scores": [-1, 0.25]}]),
        (
            "scores per reply",
            [{"question": "hi", "replies": [{"response": "go away", "score": 1}, {"response": "hello", "score": 2}]}],
        ),
        (
            "question/response/score",
            [
                {"question": "hi", "response": "go away", "score": 1},
                {"question": "hi", "response": "hello", "score": 2},
            ],
        ),
        (
            "question/reply/rating",  # as a CSV file has it
            [
                {"question": "hi", "reply": "hello", "rating": "4.5"},
                {"question": "hi", "reply": "go away", "rating": "1"},
            ],
        ),
        (
            "prompt/completion/label",
            [
                {"prompt": [USER], "completion": [OTHER], "label": False},
                {"prompt": [USER], "completion": [REPLY], "label": True},
            ],
        ),
        (
            "question/response/thumbs",
            [
                {"question": "hi", "response": "hello", "thumbs": "up"},
                {"question": "hi", "response": "go away", "thumbs": "Down"},
            ],
        ),
        (
            "question/response/label",
            [
                {"question": "hi", "response": "hello", "label": 1},
                {"question": "hi", "response": "go away", "label": "0"},
            ],
        ),
    ],
)
def test_the_same_preference_in_every_shape(name, rows):
    assert read("preferences", *rows) == (name, [([USER], "hello", "go away")])
    shape, both = read("feedback", *rows)
    assert shape == name and sorted(both, key=str) == [([USER], "go away", False), ([USER], "hello", True)]


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("label", True, False),
        ("thumb", "up", "👎"),
        ("rating", 1, 0),
        ("rating", "1", "-1"),
        ("kto_tag", "y", "n"),
    ],
)
def test_thumbs_need_no_pair(column, good, bad):
    rows = [{"prompt": f"q{i}", "completion": "a", column: value} for i, value in enumerate((good, bad, good))]
    name, records = read("feedback", *rows)
    assert (name, records) == (
        f"prompt/completion/{column}",
        [("q0", "a", True), ("q1", "a", False), ("q2", "a", True)],
    )
    turns = [{"messages": [USER, REPLY], column: value} for value in (good, bad)]
    assert read("feedback", *turns) == (f"messages/{column}", [([USER], "hello", True), ([USER], "hello", False)])


def test_of_a_ranking_the_best_is_good_and_the_worst_bad_and_what_is_between_is_neither():
    ranked = {"prompt": "hi", "replies": ["c", "a", "b", "d"], "scores": [1, 3, 2, 1]}
    assert read("feedback", ranked)[1] == [("hi", "c", False), ("hi", "a", True), ("hi", "d", False)]
    assert read("feedback", {"prompt": "hi", "replies": ["a", "b"], "scores": [3, 3.0]})[1] == []
    rows = [{"prompt": "hi", "completion": text, "score": score} for text, score in (("a", 2), ("b", 5), ("c", 3))]
    assert read("feedback", *rows)[1] == [("hi", "a", False), ("hi", "b", True)]
    assert read("feedback", {"prompt": "hi", "completion": "a", "score": 4})[1] == []  # better than what?


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_ranking_becomes_all_its_pairs(count):
    replies = [f"reply {i}" for i in range(count)]
    _, pairs = read("preferences", {"prompt": "hi", "replies": replies})
    assert pairs == [("hi", better, worse) for better, worse in itertools.combinations(replies, 2)]
    assert len(pairs) == count * (count - 1) / 2


def test_equal_ranks_and_scores_make_no_pair():
    _, pairs = read("preferences", {"prompt": "hi", "replies": ["a", "b", "c"], "ranks": [1, 2, 1]})
    assert pairs == [("hi", "a", "b"), ("hi", "c", "b")]
    assert read("preferences", {"prompt": "hi", "replies": ["a", "b"], "scores": [3, 3.0]})[1] == []
    rows = [{"prompt": "hi", "completion": text, "label": True} for text in "ab"]
    assert read("preferences", *rows)[1] == []


def test_of_best_and_worst_alone_there_is_one_pair_of_each_prompt():
    """Of a ranking, of scores, and of replies in several rows; none of equal ones."""
    of_best = {"pairs": "best_and_worst"}
    assert read("preferences", {"prompt": "hi", "replies": ["a", "b", "c"]}, **of_best)[1] == [("hi", "a", "c")]
    scored = {"prompt": "hi", "replies": ["a", "b", "c", "d", "e"], "scores": [1, 0, 3, 0, 3]}
    assert read("preferences", scored, **of_best)[1] == [("hi", "c", "b")]
    assert read("preferences", scored | {"scores": [2] * 5}, **of_best)[1] == []
    rows = [{"prompt": "hi", "completion": text, "score": score} for text, score in zip("abc", (2, 5, 1), strict=True)]
    assert read("preferences", *rows, **of_best)[1] == [("hi", "b", "c")]
    thumbs = [{"prompt": "hi", "completion": text, "label": text < "c"} for text in "acbd"]
    assert read("preferences", *thumbs, **of_best)[1] == [("hi", "a", "c")]
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert read("preferences", pair, **of_best)[1] == read("preferences", pair)[1]
    assert "the best with the worst" in recognise([scored], "preferences", **of_best).says
    assert "the best with the worst" in recognise(rows, "preferences", **of_best).says
    assert read("feedback", scored, **of_best) == read("feedback", scored)


@pytest.mark.parametrize("wanted", ["preferences", "feedback", "demonstrations"])
def test_sampled_replies_that_nobody_has_scored_are_in_no_order(wanted):
    """As a list from best to worst is read they would teach nonsense."""
    row = {"prompt": "hi", "replies": ["a", "b"], "sampled": {"policies": ["sft", "sft"], "tokens": [3, 4]}}
    with pytest.raises(InputError, match="`replies` were sampled, and nothing says which of them is better"):
        recognise([row], wanted)
    assert read("prompts", row)[1] == [("hi",)]
    assert read("candidates", row)[1] == [("hi", ["a", "b"])]
    assert read("preferences", row | {"scores": [1, 2]})[1] == [("hi", "b", "a")]


def test_columns_are_carried_that_change_nothing_of_how_rows_are_read():
    """What a function may read goes along, and what would be taken for a part of the prompt or a reply does not."""
    rows = [
        {"prompt": "hi", "solution_key": "x", "difficulty": 3, "answer": "hello", "chosen": "a", "rejected": "b",
         "label": None, "system": "Be brief.", "history": [], "votes": [1, 2], "best": 1, "weight": 0, "note": None,
         "background": "an old story", "messages": [USER], "tests": ["assert 1"], "id": 7}
        for _ in range(3)
    ]  # fmt: skip
    rows[2]["label"] = True
    made = [{"prompt": "hi", "replies": ["c", "d"], "scores": [1.0, 2.0]} for _ in rows]
    assert carried(rows, made) == ["solution_key", "difficulty", "votes", "best", "tests", "id"]
    sampled = [{"prompt": "hi", "replies": ["c", "d"], "sampled": {"policies": ["sft"] * 2}} for _ in rows]
    assert carried(rows, sampled) == ["solution_key", "difficulty", "votes", "tests", "id"]


def test_every_good_reply_meets_every_bad_one():
    rows = [{"prompt": "hi", "completion": text, "label": text < "c"} for text in "acbd"]
    assert sorted(read("preferences", *rows)[1]) == [("hi", good, bad) for good in "ab" for bad in "cd"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"prompt": [USER]}, [USER]),
        ({"question": "hi"}, [USER]),
        ({"instruction": "hi", "output": "hello"}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, REPLY]}, [USER]),
        ({"messages": [USER, REPLY, MORE]}, [USER, REPLY, MORE]),
        ({"conversations": sharegpt(SYSTEM, USER, REPLY)}, [SYSTEM, USER]),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "hi", "chosen": "hello", "rejected": "go away"}, "hi"),
    ],
)
def test_prompts_in_every_shape(row, expected):
    assert read("prompts", row)[1] == [(expected,)]


def test_an_instruction_has_its_input_after_an_empty_line():
    turn = {"role": "user", "content": "Add.\n\n1 and 2"}
    assert read("prompts", {"instruction": "Add.", "input": "1 and 2"})[1] == [([turn],)]


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({"prompt": "hi"}, None, "hi"),
        ({"prompt": "hi"}, True, [USER]),
        ({"question": "hi"}, False, "hi"),
        ({"instruction": "hi", "input": "there"}, False, "hi\n\nthere"),
        ({"prompt": "hi", "system": "Be brief."}, None, [SYSTEM, USER]),
        ({"prompt": "hi", "system": "Be brief."}, False, "Be brief.\n\nhi"),
        ({"prompt": [USER]}, False, [USER]),
        ({"chosen": "Q: hi\nA: hello", "rejected": "Q: hi\nA: go"}, None, "Q: hi\nA:"),
        ({"chosen": "hi hello", "rejected": "hi go"}, True, [USER]),
        ({"chosen": TRANSCRIPT + " hello", "rejected": TRANSCRIPT + " go"}, False, TRANSCRIPT),
        ({"chosen": TRANSCRIPT + " hello", "rejected": TRANSCRIPT + " go"}, None, [USER]),
    ],
)
def test_what_text_and_what_a_users_turn_is(row, chat, expected):
    """`prompt` is text as the model reads it, an instruction or a question somebody's turn, unless `chat` says so."""
    assert read("prompts", row, chat=chat)[1] == [(expected,)]


def test_a_row_without_a_system_prompt_among_others_is_a_conversation_all_the_same():
    rows = [{"prompt": "hi", "system": "Be brief."}, {"prompt": "hi", "system": ""}, {"prompt": "hi"}]
    assert read("prompts", *rows)[1] == [([SYSTEM, USER],), ([USER],), ([USER],)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, REPLY, MORE, OTHER]},
        {"system": "Be brief.", "messages": [USER, REPLY, MORE, OTHER]},
        {"system": "Be brief.", "messages": [SYSTEM, USER, REPLY, MORE, OTHER]},
        {"system": "Be brief.", "conversations": sharegpt(USER, REPLY, MORE, OTHER)},
        {"prompt": [SYSTEM, USER, REPLY, MORE], "completion": [OTHER]},
        {"system": "Be brief.", "chosen": [USER, REPLY, MORE, OTHER], "rejected": [USER, REPLY, MORE, REPLY]},
        {
            "system": "Be brief.",
            "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and you?\n\nAssistant: go away",
            "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and you?\n\nAssistant: a\n\nb",
        },
    ],
)
def test_system_turns_and_many_turns_are_kept(row):
    assert read("demonstrations", row)[1] == [([SYSTEM, USER, REPLY, MORE], "go away")]


def test_tool_turns_may_follow_the_assistant():
    turns = [USER, REPLY, TOOL, TOOL]
    assert read("demonstrations", {"messages": [*turns, OTHER]})[1] == [(turns, "go away")]
    assert read("prompts", {"messages": turns})[1] == [(turns,)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("I like cats", "I like cars", "I like"),
        ("I like cats", "I like cat", "I like"),
        ("Q: x\nA: yes", "Q: x\nA: no", "Q: x\nA:"),
        ("### Reply:\nyes", "### Reply:\nno", "### Reply:\n"),
        ("<|assistant|>yes", "<|assistant|>no", "<|assistant|>"),
        ("Q? yes.", "Q? yes. And no.", "Q?"),
        ("Q? yes", "Q? yes", "Q?"),
    ],
)
def test_whole_texts_are_split_at_a_whole_word(chosen, rejected, prompt):
    found = split_texts(chosen, rejected)
    assert found[0] == prompt
    assert (found[0] + found[1], found[0] + found[2]) == (chosen, rejected)


ROWS = {
    "demonstrations": {"prompt": "q", "completion": "a"},
    "conversations": {"messages": [USER, REPLY]},
    "preferences": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "whole": {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
    "texts": {"chosen": "Q: hi\nA: a", "rejected": "Q: hi\nA: b"},
    "ranking": {"prompt": "q", "replies": ["a", "b"]},
    "ranks": {"prompt": "q", "replies": ["a", "b"], "ranks": [1, 2]},
    "thumbs": {"prompt": "q", "completion": "a", "label": True},
    "scored": {"prompt": "q", "completion": "a", "score": 1},
}


@pytest.mark.parametrize(
    ("wanted", "kind", "change", "message"),
    [
        ("prompts", "demonstrations", {"prompt": ""}, "`prompt` is empty"),
        ("prompts", "demonstrations", {"prompt": " \n"}, "`prompt` is empty"),
        ("prompts", "demonstrations", {"prompt": []}, "`prompt` is empty"),
        ("prompts", "demonstrations", {"prompt": None}, "`prompt` is missing"),
        ("prompts", "demonstrations", {"prompt": 3}, "`prompt` should be text, and is 3"),
        ("prompts", "demonstrations", {"prompt": [{"role": "user"}]}, "a turn of `prompt` is not {role"),
        ("prompts", "demonstrations", {"prompt": ["hi"]}, "a turn of `prompt` is not {role"),
        ("prompts", "demonstrations", {"prompt": [USER, REPLY]}, "ends with a turn of assistant"),
        ("demonstrations", "demonstrations", {"completion": None}, "`completion` is missing"),
        ("demonstrations", "demonstrations", {"completion": ""}, "`completion` is empty"),
        ("demonstrations", "demonstrations", {"completion": 3}, "`completion` should be text, and is 3"),
        ("demonstrations", "demonstrations", {"completion": False}, "`completion` should be text, and is false"),
        ("demonstrations", "demonstrations", {"completion": {"a": 1}}, "a turn of `completion` is not {role"),
        ("demonstrations", "demonstrations", {"completion": [USER, REPLY]}, "one turn beside a prompt, and has 2"),
        ("demonstrations", "demonstrations", {"completion": [USER]}, "is the turn of user"),
        ("demonstrations", "demonstrations", {"system": 3}, "`system` should be text, and is 3"),
        ("prompts", "demonstrations", {"prompt": "q\ud83d"}, r"`prompt` has half of a character, \ud83d, which is no"),
        (
            "demonstrations",
            "demonstrations",
            {"completion": "\udf4b a"},
            r"`completion` has half of a character, \udf4b",
        ),
        ("demonstrations", "demonstrations", {"system": "\ud83d"}, r"`system` has half of a character, \ud83d"),
        (
            "demonstrations",
            "conversations",
            {"messages": [USER, {**REPLY, "content": "a\ud83d"}]},
            r"`messages` has half of a character, \ud83d",
        ),
        ("demonstrations", "conversations", {"messages": []}, "`messages` is empty"),
        ("demonstrations", "conversations", {"messages": "hi"}, 'should be a list of turns, and is "hi"'),
        ("demonstrations", "conversations", {"messages": [USER]}, "does not end with an assistant's reply"),
        ("demonstrations", "conversations", {"messages": [REPLY]}, "turn 1 of `messages` is of assistant"),
        ("demonstrations", "conversations", {"messages": [USER, USER, REPLY]}, "turn 2 of `messages` is of user"),
        ("demonstrations", "conversations", {"messages": [USER, SYSTEM, REPLY]}, "turn 2 of `messages` is of system"),
        ("demonstrations", "conversations", {"messages": [USER, TOOL, REPLY]}, "turn 2 of `messages` is of tool"),
        ("demonstrations", "conversations", {"messages": [USER, REPLY, OTHER]}, "turn 3 of `messages` is of assistant"),
        (
            "demonstrations",
            "conversations",
            {"messages": [USER, {**REPLY, "content": ""}]},
            "the reply in `messages` is empty",
        ),
        (
            "demonstrations",
            "conversations",
            {"messages": [{**USER, "content": ""}, REPLY]},
            "turn 1 of `messages`, of user, is empty",
        ),
        (
            "demonstrations",
            "conversations",
            {"messages": [USER, {"role": "assistant"}]},
            "a turn of `messages` is not {role",
        ),
        (
            "demonstrations",
            "conversations",
            {"messages": [USER, {**REPLY, "role": "narrator"}]},
            "has the role `narrator`",
        ),
        (
            "demonstrations",
            "conversations",
            {"messages": [SYSTEM, USER, REPLY], "system": "x"},
            "`system` is another one",
        ),
        ("preferences", "preferences", {"rejected": None}, "`rejected` is missing"),
        ("preferences", "preferences", {"chosen": " "}, "`chosen` is empty"),
        ("preferences", "whole", {"rejected": [SYSTEM, USER, OTHER]}, "differ before their last turn"),
        ("preferences", "whole", {"rejected": None}, "`rejected` is missing"),
        ("preferences", "whole", {"chosen": [REPLY]}, "there is no `prompt`"),
        ("preferences", "texts", {"rejected": "B"}, "no common beginning"),
        (
            "preferences",
            "texts",
            {"chosen": TRANSCRIPT + " x", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "differ before",
        ),
        (
            "preferences",
            "texts",
            {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + " b"},
            "the reply in `chosen` is empty",
        ),
        ("preferences", "ranking", {"replies": ["a"]}, "two replies or more, and has 1"),
        ("preferences", "ranking", {"replies": "a"}, "should be a list of replies"),
        ("preferences", "ranking", {"replies": ["a", 3]}, "`replies` should be text, and is 3"),
        ("preferences", "ranking", {"replies": ["a", {"score": 1}]}, "a reply of `replies` has no text"),
        ("preferences", "ranks", {"ranks": [1]}, "`replies` has 2 replies, and `ranks` 1 numbers"),
        ("preferences", "ranks", {"ranks": None}, "`ranks` is missing"),
        ("preferences", "ranks", {"ranks": [1, "x"]}, '`ranks` should be a number, and is "x"'),
        (
            "preferences",
            "thumbs",
            {"label": "maybe"},
            '`label` should be true or false, 1 or 0, up or down, and is "maybe"',
        ),
        ("preferences", "thumbs", {"label": 2}, "`label` should be true or false"),
        ("feedback", "thumbs", {"label": 2}, "`label` should be true or false"),
        ("feedback", "thumbs", {"label": None}, "`label` is missing"),
        ("feedback", "thumbs", {"completion": ""}, "`completion` is empty"),
        ("preferences", "thumbs", {"label": None}, "`label` is missing"),
        ("preferences", "scored", {"score": "nan"}, "`score` should be a number"),
        ("preferences", "scored", {"score": True}, "`score` should be a number, and is true"),
    ],
)
def test_a_row_that_lacks_something_says_what(wanted, kind, change, message):
    shape = recognise([ROWS[kind]], wanted)
    assert shape.read(ROWS[kind])
    with pytest.raises(RowError) as caught:
        shape.read(ROWS[kind] | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "records"),
    [
        ("replies", {"prompt": "hi ", "replies": ["a", "b", "a"]}, [("hi ", ["a", "b", "a"])]),
        ("replies", {"prompt": "hi ", "replies": ["a", "b"], "scores": [0, 1], "score": 3}, [("hi ", ["a", "b"])]),
        ("replies", {"question": "hi", "generations": ["a", "b"]}, [([USER], ["a", "b"])]),
        ("replies", {"prompt": [USER], "responses": [{"text": "a"}, REPLY]}, [([USER], ["a", "hello"])]),
        ("prompt/chosen/rejected", {"prompt": "hi ", "chosen": "a", "rejected": "b"}, [("hi ", ["a", "b"])]),
        ("chosen/rejected", {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, [([USER], ["hello", "go away"])]),
    ],
)
def test_candidates_in_every_shape(name, row, records):
    assert read("candidates", row) == (name, records)


def test_one_reply_with_a_score_is_a_demonstration_and_none_of_two():
    """A stage that makes rows leaves such a one where a reply was not changed."""
    row = {"prompt": "hi ", "replies": ["a"], "scores": [0]}
    assert read("demonstrations", row) == ("scores per reply", [("hi ", "a")])
    for wanted in ("preferences", "feedback", "candidates"):
        assert read(wanted, row)[1] == []
    with pytest.raises(RowError, match="`replies` should be one reply or more, and has 0"):
        read("demonstrations", row | {"replies": [], "scores": []})


def test_rows_with_one_reply_are_no_candidates():
    with pytest.raises(RowError, match="`replies` should be two replies or more, and has 1"):
        read("candidates", {"prompt": "hi ", "replies": ["a"]})
    with pytest.raises(
        InputError, match="are not candidates; those need a prompt with `replies`, two or more"
    ) as found:
        read("candidates", {"prompt": "hi ", "completion": "a"})
    assert "they are demonstrations" in found.value.hint


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_column_that_need_not_be_there_may_be_blank(blank):
    rows = [{"instruction": "q", "input": value, "system": value, "output": "a"} for value in ("x", blank)]
    assert recognise(rows, "demonstrations").read(rows[1]) == [([{"role": "user", "content": "q"}], "a")]


@pytest.mark.parametrize(
    ("wanted", "row", "needed", "hint"),
    [
        (
            "demonstrations",
            {"Query": "a", "Answer": "b"},
            "`messages`, or a prompt",
            "`columns: {prompt: Query, completion: Answer}`",
        ),
        ("demonstrations", {"promt": "a", "completion": "b"}, "`completion`", "`columns: {prompt: promt}`"),
        (
            "preferences",
            {"prompt": "a", "winner": "b", "loser": "c"},
            "`chosen` and `rejected`",
            "{chosen: winner, rejected: loser}",
        ),
        # What is read under its own name is not to be renamed, and what cannot be renamed is said to be something else.
        (
            "preferences",
            {"question": "a", "better": "b", "worse": "c"},
            "`chosen` and `rejected`",
            "`columns: {chosen: better, rejected: worse}`",
        ),
        ("preferences", {"prompt": "a", "preferred": "b", "loser": "c"}, "`chosen`", "`columns: {rejected: loser}`"),
        ("demonstrations", {"q": "a", "output": "b"}, "`prompt`", "`columns: {expected: yours}`"),
        (
            "preferences",
            {"prompt": "a", "completion": "b"},
            "its `score` or `label`",
            "they are demonstrations, which a stage of kind sft takes",
        ),
        (
            "demonstrations",
            {"prompt": "a"},
            "`completion`",
            "they are prompts, which a stage of kind ppo, grpo, rloo, sample or revise takes",
        ),
        ("demonstrations", {"prompt": "a", "answer": None}, "a reply", "`answer` is null in the first rows"),
        ("prompts", {"x": "a"}, "`question`", "`columns: {expected: yours}`"),
        ("prompts", {}, "the columns (none)", "columns"),
    ],
)
def test_columns_that_fit_no_shape_are_listed_with_what_is_needed(wanted, row, needed, hint):
    with pytest.raises(InputError) as caught:
        recognise([row], wanted, place="rows.jsonl")
    assert all(name in caught.value.message for name in row) and needed in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.place == "rows.jsonl"


def test_what_a_recipe_renames_already_stays_in_what_is_suggested() -> None:
    """`chosen` was `winner`, in a recipe that says so."""
    with pytest.raises(InputError) as caught:
        recognise([{"prompt": "a", "chosen": "b", "loser": "c"}], "preferences", columns={"chosen": "winner"})
    assert caught.value.hint == "perhaps `columns: {chosen: winner, rejected: loser}`"


@pytest.mark.parametrize("name", ["Winner: the reply", "#winner", "a, b", "win {ner}", "winner's", "yes", "7", "é ?"])
def test_a_suggested_name_is_yaml_that_means_it(name: str) -> None:
    with pytest.raises(InputError) as caught:
        recognise([{"prompt": "a", "chosen": "b", "loser": "c"}], "preferences", columns={"chosen": name})
    suggested = str(caught.value.hint).removeprefix("perhaps `columns: ").removesuffix("`")
    assert parse_value(suggested) == {"chosen": name, "rejected": "loser"}


def test_columns_that_are_null_everywhere_do_not_count():
    rows = [{"prompt": "q", "messages": None, "completion": None}, {"prompt": "q", "messages": None, "completion": "a"}]
    assert recognise(rows, "demonstrations").name == "prompt/completion"


def test_shapes_and_peeks_import_none_of_the_big_libraries(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    program = (
        "import sys\nfrom rlhf_pipeline.data import peek, shapes\nfrom rlhf_pipeline.recipe.schema import Source\n"
        f"rows = peek.first_rows(Source(path={str(tmp_path / 'rows.jsonl')!r}), 5)\n"
        "print(shapes.recognise(rows, 'demonstrations').name)\n"
        "sys.exit(len({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "question/answer\n"), done.stderr
