"""Parts of a prompt in columns of their own, marks of replies, their order, lists as text: each is used or refused."""

import json
import re

import pytest
import yaml

from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.data.turns import RowError
from rlhf_pipeline.errors import ColumnsError
from rlhf_pipeline.recipe.schema import Source

ASKS, SAYS = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def read(wanted, *rows, chat=None):
    """What becomes of rows: records of all of them, and what each column was taken for."""
    shape = recognise(rows, wanted, chat)
    return [record for row in rows for record in shape.read(row)], shape.used_as


def refused(wanted, *rows) -> ColumnsError:
    with pytest.raises(ColumnsError) as caught:
        recognise(rows, wanted, place="rows.jsonl")
    return caught.value


def ways_out(error: ColumnsError) -> list[dict[str, str]]:
    """The `columns` that a hint gives, as YAML reads them."""
    return [yaml.safe_load(text)["columns"] for text in re.findall(r"`(columns: \{.*?\})`", error.hint)]


def pasted(tmp_path, rows, columns):
    """The rows with `columns` of a hint in the recipe."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return first_rows(Source(path=str(tmp_path / "rows.jsonl"), columns=columns))


# Parts of the prompt


@pytest.mark.parametrize(
    ("row", "prompt", "use"),
    [
        ({"instruction": "When?", "context": "In 1910."}, [user("When?\n\nIn 1910.")], {"context": "under the prompt"}),
        ({"question": "When?", "context": "In 1910."}, [user("In 1910.\n\nWhen?")], {"context": "before the prompt"}),
        ({"prompt": "When?", "passage": "In 1910."}, "In 1910.\n\nWhen?", {"passage": "before the prompt"}),
        ({"question": "When?", "contexts": ["A.", "B."]}, [user("A.\n\nB.\n\nWhen?")], {}),
        ({"question": "When?", "contexts": "['A.', 'B.']"}, [user("A.\n\nB.\n\nWhen?")], {}),
        ({"prompt": "Add.", "input": "1 and 2"}, "Add.\n\n1 and 2", {"input": "under the prompt"}),
        ({"instruction": "a", "input": "b", "context": "c"}, [user("a\n\nb\n\nc")], {}),
        ({"prompt": "Text: In 1910. When?", "context": "In 1910."}, "Text: In 1910. When?",
         {"context": "repeats a part of `prompt`"}),
        ({"input": "When?"}, [user("When?")], {"input": "prompt"}),
        ({"query": "When?"}, [user("When?")], {"query": "prompt"}),
        ({"question": "hi", "system_prompt": "Arr."}, [{"role": "system", "content": "Arr."}, ASKS],
         {"system_prompt": "system prompt"}),
        ({"prompt": "hi", "system_message": "Arr."}, [{"role": "system", "content": "Arr."}, ASKS], {}),
        ({"query": "hi", "history": [["a", "b"]]}, [user("a"), {"role": "assistant", "content": "b"}, ASKS],
         {"history": "turns before the prompt"}),
        ({"prompt": "hi", "history": [user("a"), SAYS], "system": "S"},
         [{"role": "system", "content": "S"}, user("a"), SAYS, ASKS], {"system": "system prompt"}),
        ({"question": "hi", "history": "[['a', 'b']]"}, [user("a"), {"role": "assistant", "content": "b"}, ASKS], {}),
        ({"prompt": "hi", "history": [], "images": []}, "hi", {"history": None, "images": None}),
    ],
)  # fmt: skip
def test_all_of_the_prompt_is_read_for_every_kind_of_stage(row, prompt, use):
    for wanted, more, record in (
        ("demonstrations", {"response": "hello"}, (prompt, "hello")),
        ("preferences", {"chosen": "hello", "rejected": "go"}, (prompt, "hello", "go")),
        ("prompts", {}, (prompt,)),
    ):
        records, used_as = read(wanted, {**row, **more, "id": 1})
        assert records == [record]
        assert list(used_as) == [*row, *more, "id"] and used_as["id"] is None
        assert use.items() <= used_as.items()


def test_the_first_answer_of_squad_is_the_reply():
    row = {"question": "hi", "context": "C.", "answers": {"text": ["hello", "hey"], "answer_start": [0, 5]}}
    assert read("demonstrations", row)[0] == [([user("C.\n\nhi")], "hello")]
    assert read("demonstrations", row | {"answers": str(row["answers"])})[0] == [([user("C.\n\nhi")], "hello")]
    none = row | {"answers": {"text": [], "answer_start": []}}
    with pytest.raises(RowError, match="`answers` is empty"):
        recognise([row], "demonstrations").read(none)


@pytest.mark.parametrize(
    ("row", "name", "after"),
    [
        ({"instruction": "Answer.", "question": "hi", "output": "x"}, "question", ([user("Answer.\n\nhi")], "x")),
        ({"prompt": "hi", "history": "before", "output": "x"}, "history", ("hi\n\nbefore", "x")),
        ({"messages": [ASKS, SAYS], "context": "C."}, "context",
         ([{"role": "system", "content": "C."}, ASKS], "hello")),
        ({"question": "hi", "Context": "C.", "output": "x"}, "Context", ([user("C.\n\nhi")], "x")),
        ({"question": "hi", "Origin": "C.", "System Prompt": "S", "output": "x"}, "System Prompt",
         ([{"role": "system", "content": "S"}, ASKS], "x")),
        ({"question": "hi", "options": ["a", "b"], "output": "x"}, "options", ([ASKS], "x")),
        ({"question": "hi", "background": "C.", "output": "x"}, "background", ([user("C.\n\nhi")], "x")),
        ({"instruction": "hi", "Retrieved Docs": ["C.", "D."], "output": "x"}, "Retrieved Docs",
         ([user("hi\n\nC.\n\nD.")], "x")),
        ({"prompt": "hi", "chat_history": [user("a"), SAYS], "output": "x"}, "chat_history",
         ([user("a"), SAYS, ASKS], "x")),
        ({"prompt": "hi", "dialogue": [["a", "hello"]], "output": "x"}, "dialogue", ([user("a"), SAYS, ASKS], "x")),
        ({"question": "hi", "persona": "S", "output": "x"}, "persona",
         ([{"role": "system", "content": "S"}, ASKS], "x")),
        ({"messages": [ASKS, SAYS], "knowledge": "C."}, "knowledge",
         ([{"role": "system", "content": "C."}, ASKS], "hello")),
        ({"question": "hi", "images": ["a.png"], "output": "x"}, "images", ([ASKS], "x")),
        ({"question": "hi", "context": {"title": ["t"]}, "output": "x"}, "context", ([ASKS], "x")),
        ({"question": "hi", "system": "S", "system_prompt": "T", "output": "x"}, "system_prompt",
         ([{"role": "system", "content": "S"}, ASKS], "x")),
        ({"text": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'}, "text",
         ([ASKS], "hello")),
    ],
)  # fmt: skip
def test_a_part_of_the_prompt_without_a_place_is_refused_and_the_hint_can_be_pasted(row, name, after, tmp_path):
    error = refused("demonstrations", row)
    assert f"`{name}`" in error.message
    for columns in ways_out(error):
        assert read("demonstrations", *pasted(tmp_path, [row], columns))[0]
    assert read("demonstrations", *pasted(tmp_path, [row], ways_out(error)[0]))[0] == [after]


def test_a_hint_for_other_names_takes_the_context_along():
    error = refused("demonstrations", {"Question": "hi", "Context": "C.", "Answer": "x"})
    assert ways_out(error) == [{"prompt": "Question", "completion": "Answer", "context": "Context"}]
    error = refused("demonstrations", {"Context": "hi", "Response": "x"})
    assert ways_out(error) == [{"prompt": "Context", "completion": "Response"}]


def test_two_columns_can_be_left_out(tmp_path):
    row = {"question": "hi", "images": ["a"], "options": ["b"], "output": "x"}
    with pytest.raises(ColumnsError) as caught:
        recognise(pasted(tmp_path, [row], {"unused": "options"}), "demonstrations", columns={"unused": "options"})
    assert ways_out(caught.value) == [{"unused": "options", "unused_2": "images"}]
    assert read("demonstrations", *pasted(tmp_path, [row], ways_out(caught.value)[0]))[0] == [([ASKS], "x")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("context", "C."), ("history", [["a", "b"]]), ("system_prompt", "S"), ("images", ["a.png"]), ("label", False)],
)
def test_a_column_that_is_filled_in_only_later_is_not_left_out_in_silence(name, value):
    plain = {"question": "hi", "output": "x"}
    blanks = [None] if name == "system_prompt" else [None, [] if isinstance(value, list) else " "]
    for first in (plain, *({**plain, name: blank} for blank in blanks)):
        shape = recognise([first] * 3, "demonstrations")
        assert shape.read(first) == [([ASKS], "x")]
        with pytest.raises(RowError, match=f"`{name}` is filled in here and in none of the first 3 rows"):
            shape.read(plain | {name: value})


# Chosen and rejected without a known prompt


def test_replies_that_begin_alike_by_chance_have_their_prompt_in_another_column(tmp_path):
    rows = [{"input": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "It is unknown."} for n in range(3)]
    assert read("preferences", *rows)[0][1] == ([user("What is 1?")], "It is 1.", "It is unknown.")
    rows = [{"the post": row.pop("input"), **row} for row in rows]
    error = refused("preferences", *rows)
    assert ways_out(error) == [{"prompt": "the post"}]
    assert read("preferences", *pasted(tmp_path, rows, ways_out(error)[0]))[0][1][0] == "What is 1?"
    error = refused("preferences", {"chosen": "Red.", "rejected": "Blue."})
    assert "do not begin with one prompt" in error.message and "bad_rows" not in error.hint


def test_turns_under_another_name_come_before_the_replies(tmp_path):
    rows = [{"dialogue": [ASKS], "chosen": "It is so.", "rejected": "It is not."}]
    assert ways_out(refused("preferences", *rows)) == [{"messages": "dialogue"}]
    assert read("preferences", *pasted(tmp_path, rows, {"messages": "dialogue"}))[0] == [
        ([ASKS], "It is so.", "It is not.")
    ]
    assert ways_out(refused("demonstrations", {"dialogue": [ASKS, SAYS]})) == [{"messages": "dialogue"}]
    two = {"conversation_a": [ASKS, BAD], "conversation_b": [ASKS, SAYS], "winner": "b"}
    assert "conversation_a" not in refused("demonstrations", two).hint  # which may be the worse one


def test_whole_texts_may_have_other_columns():
    row = {"source": "of some people", "chosen": "Q: hi\nA: yes", "rejected": "Q: hi\nA: no"}
    assert read("preferences", row)[0] == [("Q: hi\nA:", " yes", " no")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKS, SAYS], "rejected_response": "go away"},
        {"query": "hi", "response": "hello", "rejected_response": "go away"},
    ],
)
def test_a_rejected_response_beside_the_reply(row):
    assert read("preferences", row)[0] == [([ASKS], "hello", "go away")]
    assert read("demonstrations", row)[0] == [([ASKS], "hello")]


@pytest.mark.parametrize("name", ["prompt", "input", "question"])
def test_replies_that_begin_with_their_prompt_are_not_read_behind_it(name, tmp_path):
    rows = [{name: f"What is {n}?", "chosen": f"What is {n}? It is.", "rejected": f"What is {n}? No."} for n in (1, 2)]
    error = refused("preferences", *rows)
    assert f"begin with the text of `{name}`" in error.message and ways_out(error) == [{"unused": name}]
    assert read("preferences", *pasted(tmp_path, rows, {"unused": name}))[0][0] == ("What is 1?", " It is.", " No.")
    only_one = [row | {"rejected": "No."} for row in rows]
    assert read("preferences", *only_one)[0][0][1:] == ("What is 1? It is.", "No.")


def test_a_completion_that_begins_with_its_prompt_is_not_read_behind_it(tmp_path):
    rows = [{"prompt": "Q: hi\nA:", "completion": "Q: hi\nA: hello", "score": score} for score in (2, 1)]
    for wanted in ("demonstrations", "preferences"):
        error = refused(wanted, *rows)
        assert "`completion` begins with the text of `prompt`" in error.message
        assert ways_out(error) == [{"question": "prompt"}]
        assert read(wanted, *pasted(tmp_path, rows, {"question": "prompt"}))[0][0][1] == "Q: hi\nA: hello"
    for reply in ("Q: hi\nA:", "Q: hi\nA:  ", "Q: hi\nB: hello"):
        assert read("demonstrations", rows[0] | {"completion": reply})[0][0][1] == reply
    assert read("demonstrations", {"prompt": "hi", "completion": "high up"})[0] == [("hi", "high up")]


def test_pairs_whose_scores_say_the_opposite_are_refused(tmp_path):
    rows = [
        {"prompt": "hi", "chosen": "go", "rejected": "hello", "chosen_score": n, "rejected_score": 5} for n in (1, 7)
    ]
    assert len(read("preferences", *rows)[0]) == 2  # half of them are no pattern
    error = refused("preferences", rows[0])
    assert "`chosen_score` is smaller than `rejected_score`" in error.message
    assert read("preferences", *pasted(tmp_path, rows[:1], ways_out(error)[0]))[0] == [("hi", "go", "hello")]


# Marks of single replies


def marked(name, values, **more):
    return [{"prompt": "hi", "completion": f"reply {n}", name: value, **more} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("label", True, False), ("label", 1.0, 0), ("label", "1.0", "0.0"), ("label", "good", "Bad"),
        ("label", "Yes", "no"), ("label", 1, -1), ("label", "+1", "-1"), ("label", "👍", "👎"),
        ("label", "👍🏽", "👎🏿"),
        ("label", "✅", "❌"), ("label", "❤️", "👎"), ("label", "y", "n"), ("thumbs", "thumbs_up", "Thumbs Down"),
        ("label", "chosen", "rejected"), ("kto_tag", "true", "false"), ("feedback", "like", "dislike"),
        ("is_correct", True, False), ("score", 1, 0), ("score", True, False), ("rating", "good", "bad"),
        ("reward", -1, 1),
    ],
)  # fmt: skip
def test_replies_that_are_marked_bad_are_not_learned(name, good, bad):
    if name == "reward":  # whichever comes first, the greater is the better
        good, bad = bad, good
    for first, second, learned in ((good, bad, "reply 0"), (bad, good, "reply 1")):
        rows = marked(name, [first, second])
        assert read("demonstrations", *rows) == (
            [("hi", learned)],
            {"prompt": "prompt", "completion": "reply", name: "label"},
        )
        scores = {reply: score for _, reply, score in read("preferences", *rows)[0]}
        assert max(scores, key=scores.__getitem__) == learned and len(set(scores.values())) == 2


@pytest.mark.parametrize(("name", "values"), [("label", (True, False)), ("score", (5, 2)), ("label", ("👍", "👎"))])
def test_marks_beside_whole_conversations(name, values):
    rows = [{"messages": [ASKS, turn], name: value} for turn, value in zip((SAYS, BAD), values, strict=True)]
    shape = recognise(rows, "demonstrations")
    found = [record for row in rows for record in shape.read(row)]
    if shape.of_replies:
        found = [([ASKS], *best) for best in shape.of_replies([(reply, score) for _, reply, score in found])]
    assert found == [([ASKS], "hello")]
    better, worse = read("preferences", *rows)[0]
    assert (better[1], worse[1]) == ("hello", "go away") and better[2] > worse[2]
    assert shape.used_as == {"messages": "conversation", name: "score" if name == "score" else "label"}


@pytest.mark.parametrize(
    ("name", "values"), [("label", ["?", 0, 1, 0]), ("label", [3, 0, 1, 0]), ("score", ["N/A", 0.5, 0.1, 0.7])]
)
def test_one_odd_row_does_not_decide_how_the_others_are_read(name, values):
    rows = marked(name, values)
    shape = recognise(rows, "demonstrations")
    assert shape.name == f"prompt/completion/{name}"
    with pytest.raises(RowError, match=f"`{name}` should be .*, and is"):
        shape.read(rows[0])
    assert sum(len(shape.read(row)) for row in rows[1:]) == (1 if name == "label" else 3)


def test_one_odd_row_does_not_decide_what_a_list_is():
    rows = [{"prompt": "hi", "replies": "none"}, *[{"prompt": "hi", "replies": ["hello", "go"]}] * 3]
    assert recognise(rows, "preferences").read(rows[1]) == [("hi", "hello", "go")]
    rows = [{"chosen": "x", "rejected": "y"}, *[{"chosen": [ASKS, SAYS], "rejected": [ASKS, BAD]}] * 3]
    assert recognise(rows, "preferences").says == "chosen/rejected: conversations that differ in their last turn"


@pytest.mark.parametrize(
    ("values", "ways"),
    [
        ([0, 1, 2], [{"score": "label"}, {"unused": "label"}]),
        ([-1, 0, 1], [{"score": "label"}, {"unused": "label"}]),
        (["yes", "perhaps", "later", "never"], [{"unused": "label"}]),
    ],
)
def test_what_may_be_a_mark_and_may_not_is_refused(values, ways, tmp_path):
    rows = marked("label", values)
    error = refused("demonstrations", *rows)
    assert "`label` may say whether a reply is good" in error.message
    assert ways_out(error) == ways
    for columns in ways:
        assert len(read("demonstrations", *pasted(tmp_path, rows, columns))[0]) == len(rows)


def test_a_class_that_is_the_reply_itself_is_no_mark():
    rows = [{"prompt": "Spam?", "completion": said, "label": said} for said in ("yes", "no")]
    assert read("demonstrations", *rows)[0] == [("Spam?", "yes"), ("Spam?", "no")]
    assert "are not preferences" in refused("preferences", *rows).message


def test_a_mark_in_other_letters_is_refused(tmp_path):
    rows = marked("Label", [True, False])
    error = refused("demonstrations", *rows)
    assert read("demonstrations", *pasted(tmp_path, rows, ways_out(error)[0]))[0] == [("hi", "reply 0")]


@pytest.mark.parametrize(
    ("name", "good", "bad", "way"),
    [
        ("approved", True, False, "label"), ("preferred", True, False, "label"), ("is_chosen", 1, 0, "label"),
        ("Thumbs", "up", "down", "label"), ("annotation", "👍", "👎", "label"), ("status", "good", "bad", "label"),
        ("human_label", "yes", "no", "label"), ("helpfulness", 4, 0, "score"), ("votes", 10, -3, "score"),
        ("label", "ja", "nein", None), ("kto_tag", "A", "B", None), ("score", "5/5", "1/5", None),
        ("rating", "4,5", "1,5", None), ("verdict", "fine", "poor", None),
        ("flagged", False, True, None), ("is_bad", 0, 1, None), ("rejected", False, True, None),
        ("rank", 1, 2, None), ("hallucination", "no", "yes", None),
    ],
)  # fmt: skip
def test_a_mark_that_is_not_read_is_refused_and_no_hint_turns_it_round(name, good, bad, way, tmp_path):
    rows = marked(name, [good, bad])
    error = refused("demonstrations", *rows)
    assert f"`{name}` may say how good the replies are" in error.message
    assert ways_out(error) == [*([{way: name}] if way else []), {"unused": name}]
    if way:
        scores = [score for *_, score in read("preferences", *pasted(tmp_path, rows, {way: name}))[0]]
        assert scores[0] > scores[1]
    assert len(read("demonstrations", *pasted(tmp_path, rows, {"unused": name}))[0]) == 2


@pytest.mark.parametrize("name", ["rank", "is_harmful", "toxicity"])
def test_preferences_are_not_told_to_take_for_a_score_what_is_better_when_less(name):
    assert ways_out(refused("preferences", *marked(name, [1, 2]))) == []
    assert ways_out(refused("preferences", *marked("votes", [1, 2]))) == [{"score": "votes"}]


@pytest.mark.parametrize(
    "more",
    [{"rejected": "go"}, {"correct_answer": "good"}, {"source": "web"}, {"is_long": True}, {"num_votes": 3},
     {"feedback": "The reply says what was asked for."}, {"wrong_answer": "no"}],
)  # fmt: skip
def test_a_column_that_is_no_mark_is_not_used(more):
    rows = [{"prompt": "hi", "completion": "hello", **more}] * 2
    assert read("demonstrations", *rows)[0] == [("hi", "hello")] * 2


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"response_a": "go", "response_b": "hello", "chosen": "response_b", "rejected": "response_a"}, "chosen"),
        ({"response_a": "go", "response_b": "hello", "chosen": "b", "rejected": "a"}, "chosen"),
        ({"answer1": "go", "answer2": "hello", "preferred": "2", "rejected": "1"}, "preferred"),
        ({"A": "go", "B": "hello", "chosen": "B", "rejected": "A"}, "chosen"),
        ({"A": "go", "B": "hello", "answer": "B"}, "answer"),
        ({"option_a": "go", "option_b": "hello", "completion": "B"}, "completion"),
    ],
)
def test_the_name_of_a_reply_is_not_the_reply(row, column):
    error = refused("demonstrations" if "rejected" not in row else "preferences", {"question": "hi", **row})
    assert f"`{column}` names other columns" in error.message and "write the replies" in error.hint


@pytest.mark.parametrize(("chosen", "rejected", "way"), [(1, 0, "best_from_0"), ("2", "1", "best_from_1")])
def test_the_number_of_a_reply_is_not_the_reply(chosen, rejected, way, tmp_path):
    row = {"prompt": "hi", "responses": ["go", "hello"], "chosen": chosen, "rejected": rejected}
    error = refused("preferences", row)
    assert "`chosen` holds numbers of the replies in `responses`" in error.message
    columns = {way: "chosen", "unused": "rejected"}
    assert columns in ways_out(error)
    assert read("preferences", *pasted(tmp_path, [row], columns))[0] == [("hi", "hello", "go")]


@pytest.mark.parametrize("more", [{"label": 0}, {"role": "prompter"}])
def test_text_that_is_marked_or_is_one_turn_is_not_all_learned(more, tmp_path):
    rows = [{"text": "a b c", **more}, {"text": "d e f", **more}]
    error = refused("demonstrations", *rows)
    assert read("demonstrations", *pasted(tmp_path, rows, ways_out(error)[0]))[0] == [("", "a b c"), ("", "d e f")]


# The order of several replies


@pytest.mark.parametrize(
    ("row", "decides"),
    [
        ({"completions": [{"response": "go", "overall_score": 3.0, "fine-grained_score": 9},
                          {"response": "hello", "overall_score": 7}]}, None),
        ({"responses": ["go", "hello"], "ratings": [2, 5]}, "ratings"),
        ({"responses": ["go", "hello"], "rating": "[2, 5]"}, "rating"),
        ({"completions": ["go", "hello"], "rewards": [0.1, 0.9]}, "rewards"),
        ({"generations": ["go", "hello"], "ratings": [2.0, 5.0], "models": ["a", "b"]}, "ratings"),
        ({"answers": ["go", "hello"], "best_answer_id": 2}, "best_answer_id"),
        ({"answers": ["go", "hello"], "best_from_0": "1"}, "best_from_0"),
        ({"answers": ["go", "hello"], "best": 2}, "best"),  # as many as there are replies, so counted from 1
        ({"answers": ["go", "hello"], "best_response": "hello"}, "best_response"),
        ({"replies": '["go", "hello"]', "ranks": "[2, 1]"}, "ranks"),
        ({"replies": "['go', 'hello']", "scores": "[0, 1]"}, "scores"),
        ({"answers": {"text": ["go", "hello"], "score": [1, 5]}}, None),  # as a table of columns holds rows
        ({"replies": ["hello", "go"]}, None),
        ({"replies": [{"text": "hello", "tokens": 1, "seed": 3}, {"text": "go", "tokens": 2, "seed": 1}]}, None),
    ],
)  # fmt: skip
def test_the_column_that_gives_the_order_decides_and_is_said(row, decides):
    row = {"question": "hi", **row}
    records, used_as = read("preferences", row)
    assert records == [([ASKS], "hello", "go")]
    assert read("demonstrations", row)[0] == [([ASKS], "hello")]
    assert [name for name, use in used_as.items() if use == "order of the replies"] == ([decides] if decides else [])
    says = recognise([row], "preferences").says
    assert (f"`{decides}`" in says) if decides else ("in each" in says or "from best to worst" in says)


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"replies": ["go", "hello"], "quality": [1, 4]}, "quality", "scores"),
        ({"replies": ["go", "hello"], "is_right": [False, True]}, "is_right", "scores"),
        ({"replies": ["go", "hello"], "my votes: #1": ["1", "4"]}, "my votes: #1", "scores"),
        ({"completions": ["go", "hello"], "labels": [False, True]}, "labels", "scores"),
        ({"responses": ["go", "hello"], "choice": 1}, "choice", "best_from_0"),
        ({"responses": ["go", "hello"], "best_index": 1}, "best_index", "best_from_0"),
        ({"responses": ["hello", "go"], "winner": "1"}, "winner", "best_from_1"),
        ({"responses": ["hello", "go"], "place": [1, 2]}, "place", "ranks"),
        ({"responses": ["hello", "go"], "is_harmful": [False, True]}, "is_harmful", "ranks"),
        ({"generations": ["hello", "go"]}, "generations", "replies"),
    ],
)
def test_no_order_is_guessed_where_a_column_may_give_it(row, name, expected, tmp_path):
    row = {"question": "hi", **row}
    for wanted in ("preferences", "demonstrations"):
        error = refused(wanted, row)
        assert f"`{name}`" in error.message
        assert {expected: name} in ways_out(error)
        assert ({"scores": name} in ways_out(error)) == (expected == "scores")
    for columns in ways_out(error):
        assert read("preferences", *pasted(tmp_path, [row], columns))[0]
    assert read("preferences", *pasted(tmp_path, [row], {expected: name}))[0] == [([ASKS], "hello", "go")]


@pytest.mark.parametrize(
    "value",
    [{"ratings": [2, 5]}, {"a": {"ratings": ["2", "5"]}}, [{"rating": 2}, {"rating": 5}], [[2, 5], [1, 4], [2, 3]],
     {"reply_1": 2, "reply_2": 5}, "[2, 5]", '{"ratings": [2, 5]}'],
)  # fmt: skip
def test_no_order_is_guessed_where_it_may_be_within_a_mapping_or_a_list(value, tmp_path):
    row = {"question": "hi", "replies": ["go", "hello"], "annotations": value}
    error = refused("preferences", row)
    assert "`annotations`" in error.message and ways_out(error)[-1] == {"unused": "annotations"}
    assert read("preferences", *pasted(tmp_path, [row], {"unused": "annotations"}))[0] == [([ASKS], "go", "hello")]


@pytest.mark.parametrize(
    "value", [{"lengths": [2, 5]}, {"model": "a", "seed": 1}, [{"model": "a"}, {"model": "b"}], "[x]"]
)
def test_what_else_is_within_a_mapping_or_a_list_is_no_order(value):
    row = {"question": "hi", "replies": ["hello", "go"], "annotations": value}
    assert read("preferences", row)[0] == [([ASKS], "hello", "go")]


def test_ranks_and_scores_that_say_the_opposite_are_refused(tmp_path):
    row = {"question": "hi", "replies": ["go", "hello"], "scores": [1, 2], "ranks": [1, 2]}
    error = refused("preferences", row)
    assert ways_out(error) == [{"unused": "scores"}, {"unused": "ranks"}]
    after = [read("preferences", *pasted(tmp_path, [row], columns))[0][0] for columns in ways_out(error)]
    assert after == [([ASKS], "go", "hello"), ([ASKS], "hello", "go")]
    assert read("preferences", row | {"ranks": [2, 1]})[0] == [([ASKS], "hello", "go")]
    within = [{"text": "go", "score": 1, "rank": 1}, {"text": "hello", "score": 2, "rank": 2}]
    assert "different orders" in refused("preferences", {"question": "hi", "replies": within}).message


@pytest.mark.parametrize("more", [{"votes": 1}, {"annotations": {"helpfulness": {"Rating": "3"}}}, {"right": True}])
def test_no_order_is_guessed_where_each_reply_may_have_its_own_mark(more):
    error = refused("preferences", {"question": "hi", "replies": [{"text": "go", **more}, {"text": "hello", **more}]})
    assert f"`{next(iter(more))}` in each of `replies`" in error.message and "`score`" in error.hint


def test_the_number_of_the_best_reply_has_to_be_one():
    rows = [{"question": "hi", "answers": ["go", "hello"], "best_id": best} for best in (0, 1, 2)]
    shape = recognise(rows, "preferences")
    assert "counted from 0" in shape.says
    with pytest.raises(RowError, match="`best_id` should be a number from 0 to 1"):
        shape.read(rows[2])


# Lists written as text


PAIR = {"chosen": [ASKS, SAYS], "rejected": [ASKS, BAD]}


@pytest.mark.parametrize("write", [json.dumps, repr, lambda value: " " + json.dumps(value, indent=1)])
@pytest.mark.parametrize(
    ("wanted", "row", "record"),
    [
        ("demonstrations", {"messages": [ASKS, SAYS]}, ([ASKS], "hello")),
        ("demonstrations", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
         ([ASKS], "hello")),
        ("demonstrations", {"prompt": [ASKS], "completion": SAYS}, ([ASKS], "hello")),
        ("preferences", PAIR, ([ASKS], "hello", "go away")),
        ("preferences", {"question": "hi", **PAIR}, ([ASKS], "hello", "go away")),
        ("preferences", {"prompt": [ASKS], "chosen": [SAYS], "rejected": [BAD]}, ([ASKS], "hello", "go away")),
        ("preferences", {"prompt": [ASKS], "replies": ["hello", "go away"]}, ([ASKS], "hello", "go away")),
        ("prompts", {"messages": [ASKS, SAYS]}, ([ASKS],)),
        ("prompts", {"prompt": [ASKS]}, ([ASKS],)),
    ],
)  # fmt: skip
def test_a_list_in_a_cell_of_text_is_that_list(wanted, row, record, write):
    cells = {name: value if isinstance(value, str) else write(value) for name, value in row.items()}
    assert read(wanted, cells)[0] == [record]


@pytest.mark.parametrize(
    "reply",
    ['["a", "b"]', '{"name": "a"}', "[1] says so", "['a' 'b']", "{x}", '{"value": 42}', '[{"content": "x"}]',
     '{"role": "admin", "level": 3}', '{"from": "Oslo", "to": "Bergen"}',
     '{"role": "admin", "notes": [{"content": "x"}]}'],
)  # fmt: skip
def test_a_reply_that_is_written_as_a_list_stays_text(reply):
    assert read("demonstrations", {"prompt": "hi", "completion": reply})[0] == [("hi", reply)]


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("messages", "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant', 'content': 'hello'}]"),
        ("messages", '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "he'),
        ("replies", "['hello' 'go away']"),  # numpy's way; Python would read it as one text
        ("replies", "[hello, go away]"),
    ],
)
def test_a_list_as_text_that_cannot_be_read_is_no_text(column, cell):
    row = {"prompt": "hi", column: cell} if column == "replies" else {column: cell}
    wanted = "preferences" if column == "replies" else "demonstrations"
    with pytest.raises((RowError, ColumnsError)) as caught:
        recognise([row], wanted).read(row)
    assert f"`{column}` begins as a list does, and is neither JSON nor a list of Python" in str(caught.value)


def test_what_is_not_used_may_be_anything():
    row = {"prompt": "hi", "replies": "['a' 'b']", "notes": "[{'role': 'user'"}
    assert read("prompts", row)[0] == [("hi",)]
