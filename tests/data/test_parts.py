"""What turns hold beside their text: parts, calls of tools, reasoning, weights, and the roles that people write."""

import pytest

from rlhf_pipeline.data.parts import RowError
from rlhf_pipeline.data.shapes import recognise
from rlhf_pipeline.errors import ColumnsError

USER = {"role": "user", "content": "Weather in Rome?"}
CALL = {"id": "c7", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLED = {"id": "c7", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "tool_call_id": "c7", "content": "sun"}
REPLY = {"role": "assistant", "content": "It is sunny."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def read(row, wanted="demonstrations"):
    return recognise([row], wanted).read(row)


@pytest.mark.parametrize("words", [{}, {"content": None}, {"content": ""}], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("calls", [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}], ids=["new", "former"])
def test_calls_of_tools_stay_in_the_prompt_with_arguments_as_a_mapping(words, calls):
    asking = {"role": "assistant"} | words | calls
    ((prompt, reply),) = read({"messages": [USER, asking, RESULT, REPLY], "tools": [TOOL]})
    call = CALLED if "tool_calls" in calls else {"type": "function", "function": CALLED["function"]}
    assert prompt == [
        USER | {"tools": [TOOL]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        RESULT,
    ]
    assert reply == "It is sunny."


def test_a_reply_that_calls_a_tool_is_a_turn():
    ((prompt, reply),) = read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]})
    assert (prompt, reply) == ([USER], {"role": "assistant", "content": "", "tool_calls": [CALLED]})


def test_calls_that_are_turns_belong_to_the_assistants_turn_before_them():
    said = [
        {"from": "human", "value": "Weather in Rome and Oslo?"},
        {"from": "gpt", "value": "Let me look."},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "function_call", "value": '{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'},
        {"from": "observation", "value": "sun"},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Sun and rain."},
    ]
    ((prompt, reply),) = read({"conversations": said, "tools": "[]"})
    cities = [call["function"]["arguments"]["city"] for call in prompt[1]["tool_calls"]]
    assert (prompt[1]["content"], cities) == ("Let me look.", ["Rome", "Oslo"])
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "tool", "tool"]
    assert "tools" not in prompt[0]
    assert reply == "Sun and rain."


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]',
        [{"name": "weather", "parameters": {"type": "object", "properties": {}, "required": None}}],
        ['{"name": "weather", "parameters": {"type": "object", "properties": {}}}'],
    ],
    ids=["list", "JSON", "functions with nulls of a table", "list of JSON"],
)
def test_tools_come_in_several_ways(tools):
    assert read({"messages": [USER, REPLY], "tools": tools})[0][0] == [USER | {"tools": [TOOL]}]


def test_reasoning_is_part_of_the_reply_whatever_its_name():
    whole = {"role": "assistant", "content": "2", "reasoning_content": "One and one."}
    for turn in (
        whole,
        *({"role": "assistant", "content": "2", name: "One and one."} for name in ("thinking", "thought", "cot")),
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "One and one."}, {"type": "text", "text": "2"}],
        },
    ):
        assert read({"messages": [USER, turn]}) == [([USER], whole)]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Rome?", "image_url": None}],
        ["Weather in Rome?"],
        [{"text": "Weather in Rome?"}],
    ],
)
def test_parts_that_are_text_are_text(content):
    assert read({"messages": [{"role": "user", "content": content}, REPLY]}) == [([USER], "It is sunny.")]
    assert read(
        {"prompt": [USER], "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]}
    )


def test_contents_of_roles_user_and_model_are_a_conversation():
    row = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello."}]}]}
    assert read(row) == [([{"role": "user", "content": "Hi"}], "Hello.")]


@pytest.mark.parametrize("role", ["Assistant", "ASSISTANT", "bot", "ai", "agent", "chatbot"])
def test_other_names_of_the_assistant(role):
    assert read({"messages": [USER, {"role": role, "content": "Sunny."}]}) == [([USER], "Sunny.")]
    assert (
        read({"conversations": [{"from": "Human", "value": "Hi"}, {"from": role, "value": "Sunny.", "weight": 0}]})
        == []
    )


@pytest.mark.parametrize("content", [None, "", " "])
def test_an_empty_system_turn_is_none(content):
    assert read({"messages": [{"role": "system", "content": content}, USER, REPLY]}) == [([USER], "It is sunny.")]


def test_a_developer_is_the_system():
    row = {"messages": [{"role": "developer", "content": "Be brief."}, USER, REPLY]}
    assert read(row)[0][0] == [{"role": "system", "content": "Be brief."}, USER]


BAD, GOOD = {"role": "assistant", "content": "Go away.", "weight": 0}, REPLY | {"weight": 1}


@pytest.mark.parametrize(
    ("turns", "reply", "before"),
    [
        ([USER, BAD, USER, GOOD], "It is sunny.", 3),
        ([USER, GOOD, USER, BAD], "It is sunny.", 1),
        ([USER, REPLY | {"train": True}, USER, REPLY | {"train": False}], "It is sunny.", 1),
    ],
    ids=["earlier", "last", "train: false"],
)
def test_a_reply_of_weight_0_is_not_trained(turns, reply, before):
    ((prompt, found),) = read({"messages": turns})
    assert (found, len(prompt)) == (reply, before)


@pytest.mark.parametrize(
    "mark",
    [
        *({name: value} for name in ("weight", "loss", "loss_weight", "calculate_loss") for value in (0, 0.0, "0")),
        *({name: value} for name in ("train", "train_on_turn", "trainable", "trained") for value in (False, "false")),
        *({name: value} for name in ("masked", "ignore", "no_loss") for value in (True, 1)),
        *({name: False} for name in ("learnable", "training", "is_correct")),
        {"label": "bad"}, {"rating": -1}, {"score": 0}, {"thumbs": "down"}, {"feedback": "negative"},
        {"quality": "Bad"}, {"label": "\N{THUMBS DOWN SIGN}"}, {"thumbs": "thumbs_down"}, {"weight": "0.0"},
    ],
    ids=str,
)  # fmt: skip
def test_marks_of_a_turn_say_that_it_is_not_trained(mark):
    bad = {"role": "assistant", "content": "Go away."} | mark
    assert read({"messages": [USER, REPLY, USER, bad]}) == [([USER], "It is sunny.")]
    assert read({"messages": [USER, bad]}) == []
    good = {"True": "False", "1": "0", "0": "1", "0.0": "1", "False": "1", "false": "true", "-1": "1"}
    ((name, value),) = mark.items()
    kept = bad | {name: good.get(str(value), "good")}
    assert read({"messages": [USER, kept]}) == [([USER], "Go away.")]


def test_a_row_of_weight_0_is_not_trained_as_a_whole():
    rows = [{"messages": [USER, REPLY], "weight": weight} for weight in (0, 1, "0")]
    shape = recognise(rows, "demonstrations")
    assert [len(shape.read(row)) for row in rows] == [0, 1, 0]
    assert shape.used_as == {"messages": "conversation", "weight": "whether the row is trained"}


def test_functions_are_the_former_name_of_tools():
    row = {"messages": [USER, REPLY], "functions": [TOOL["function"]]}
    assert read(row)[0][0] == [USER | {"tools": [TOOL]}]
    assert recognise([row], "demonstrations").used_as["functions"] == "tools"
    other = {"prompt": "What does it define?", "completion": "f", "functions": "def f"}
    assert recognise([other], "demonstrations").used_as["functions"] is None


def test_keys_of_turns_that_are_not_looked_at_are_listed():
    row = {"messages": [USER | {"id": 3}, REPLY | {"emotion": "joy", "weight": 1}], "tools": [TOOL]}
    used_as = recognise([row], "demonstrations").used_as
    assert used_as.pop("tools") == "tools"
    assert used_as == {"messages": "conversation", "messages[].id": None, "messages[].emotion": None}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "thought", "cot", "rationale"])
def test_reasoning_beside_a_reply_is_not_lost(name):
    row = {"question": "1+1?", name: "One and one.", "answer": "2"}
    with pytest.raises(ColumnsError, match=f"`{name}` may be the reasoning") as caught:
        read(row)
    assert f"unused: {name}" in caught.value.hint
    assert read(row | {"answer": "One and one. So 2."})
    assert read(row, "prompts")


@pytest.mark.parametrize("weight", [0.5, 2])
def test_a_share_of_a_row_is_refused_by_name(weight):
    with pytest.raises(ColumnsError, match="`weight` may say how much a row counts"):
        read({"messages": [USER, REPLY], "weight": weight})


def test_other_words_about_a_turn_are_no_marks():
    assert read({"messages": [USER, REPLY | {"label": "joy", "feedback": "Well said!"}]}) == [([USER], "It is sunny.")]


def test_a_row_of_weight_0_alone_gives_nothing():
    assert read({"messages": [USER, BAD]}) == []


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]}, "`image_url`"),
        ({"messages": [USER | {"content": [{"type": "text", "text": None, "audio": "x"}]}, REPLY]}, "`text`"),
        ({"messages": [USER | {"images": ["x.png"]}, REPLY]}, "`images`"),
        ({"messages": [USER | {"reasoning_content": "Hm."}, REPLY]}, "`reasoning_content`, which is an assistant's"),
        ({"messages": [USER, REPLY | {"weight": 0.5}]}, "the weight 0.5"),
        ({"messages": [USER, REPLY | {"weight": "half"}]}, 'the weight "half"'),
        ({"messages": [USER, REPLY | {"mask": 1}]}, "`mask`, of which 1 may mean"),
        ({"messages": [USER, REPLY | {"rating": 4}]}, "the `rating` 4, which may mean"),
        ({"messages": [USER, REPLY], "tools": "a weather service"}, "`tools` should be a list of functions"),
        ({"messages": [USER, REPLY], "tools": [{"type": "retrieval"}]}, "an entry of `tools`"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "c7"}]}]}, "a call of a tool in `messages`"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f(1)"}]}, "not JSON"),
        ({"prompt": "Weather?", "completion": "Sun.", "tools": [TOOL]}, "`tools` go through a chat template"),
        ({"prompt": [USER], "completion": [REPLY | {"label": "bad"}]}, "says of itself that it is a bad one"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "`rejected` has the weight 0"),
        ({"chosen": [USER, BAD], "rejected": [USER, GOOD]}, "`chosen` has the weight 0"),
    ],
)
def test_what_no_stage_can_use_is_refused_by_name(row, names):
    with pytest.raises(RowError, match="^.*" + names.replace("(", r"\(")):
        read(row, "preferences" if "rejected" in row else "demonstrations")
