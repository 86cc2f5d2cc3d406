"""Prompt and reply are what the chat template writes, in the tokens that it has as a whole."""

import json

import datasets
import pytest
from transformers import AutoTokenizer, LlamaConfig

from rlhf_pipeline.data import prepare
from rlhf_pipeline.data.encode import encode_prompts, encode_records
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tokenizer import begins_with_space, load_tokenizer, pinned_day, render
from rlhf_pipeline.recipe.schema import Data, Model

QUESTION = {"role": "user", "content": "What is a lemon?"}
REPLIES = ["That is yellow.", "  indented, and\n\nlong \n", "\nOn a new line", "7 of 12"]
SPEC = Data(path="rows")


def tokens(tokenizer, turns, reply):
    ((prompt, ids),) = encode_records(tokenizer, SPEC, [(turns, reply)])
    assert encode_prompts(tokenizer, SPEC, [turns]) == [prompt]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    return prompt, ids[:-1]


def text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", ["chatml", "llama 2", "llama 3", "qwen 3", "vicuna", "no generation prompt"])
def test_prompt_and_reply_are_the_templates_own_text_and_tokens(loaded, name, kind, reply):
    tokenizer = loaded(name, kind)
    prompt, ids = tokens(tokenizer, [QUESTION], reply)
    whole = tokenizer.apply_chat_template([QUESTION, {"role": "assistant", "content": reply}], tokenize=False)
    there = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert text(tokenizer, there).startswith(text(tokenizer, prompt + ids))
    assert text(tokenizer, there)[len(text(tokenizer, prompt + ids)) :].strip() in ("", "<|stop|>", "</s>")
    if not reply.startswith(("\n", " ")):  # the others share a token with the prompt, and may not
        assert there[: len(prompt + ids)] == prompt + ids
    assert tokenizer(render(tokenizer, [QUESTION]), add_special_tokens=False)["input_ids"] == prompt


def test_sentencepiece_adds_no_second_space(loaded):
    tokenizer = loaded("chatml", "sentencepiece")
    assert text(tokenizer, tokenizer("That", add_special_tokens=False)["input_ids"]) == "That"
    _, ids = tokens(tokenizer, [QUESTION], "That is yellow.")
    assert tokenizer.convert_ids_to_tokens(ids)[0][0] == "T"
    ((_, after_text),) = encode_records(tokenizer, SPEC, [("Question: what?\nAnswer:\n", "That")])
    assert tokenizer.convert_ids_to_tokens(after_text)[0][0] == "T"
    ((_, after_space),) = encode_records(tokenizer, SPEC, [("Question: what?\nAnswer: ", "That")])
    assert tokenizer.convert_ids_to_tokens(after_space)[0][0] == "T"
    ((_, after_colon),) = encode_records(tokenizer, SPEC, [("Question: what?\nAnswer:", " That")])
    assert "".join(tokenizer.convert_ids_to_tokens(after_colon)) == "▁That</s>"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_header_is_not_lost_without_a_generation_prompt_and_travels_with_the_tokenizer(loaded, kind, tmp_path):
    tokenizer = loaded("no generation prompt", kind)
    prompt, ids = tokens(tokenizer, [QUESTION], "Yellow.")
    assert render(tokenizer, [QUESTION]).endswith("</s>\n<|turn|>assistant\n")
    assert prompt == tokenizer(render(tokenizer, [QUESTION]), add_special_tokens=False)["input_ids"]
    assert text(tokenizer, ids) == "Yellow."
    tokenizer.save_pretrained(tmp_path / "adapter")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert elsewhere.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False) == render(
        tokenizer, [QUESTION]
    )
    LlamaConfig(vocab_size=1024).save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template == tokenizer.chat_template


def test_a_reply_after_a_colon_has_the_templates_space(loaded):
    tokenizer = loaded("vicuna")
    prompt, ids = tokens(tokenizer, [QUESTION], "That")
    assert (text(tokenizer, prompt), text(tokenizer, ids)) == ("USER: What is a lemon? ASSISTANT:", " That")


def test_spaces_around_a_reply_are_the_templates(loaded):
    assert text(loaded("llama 2"), tokens(loaded("llama 2"), [QUESTION], "That")[1]) == " That "


THOUGHT = "<think>\nSour.\n</think>\n\nA fruit."


def test_thinking_that_the_prompt_opens_is_opened_once(loaded):
    tokenizer = loaded("opens thinking")
    prompt, ids = tokens(tokenizer, [QUESTION], THOUGHT)
    assert text(tokenizer, prompt).endswith("<|turn|><think>\n")
    assert text(tokenizer, ids) == THOUGHT.removeprefix("<think>\n")


def test_a_template_that_opens_what_the_reply_opens_too(loaded):
    both = """\
{%- for m in messages %}{{ '<|turn|>' + ('<think>' if m.role == 'assistant' else '') + m.content }}{% endfor %}"""
    tokenizer = loaded(both + "{% if add_generation_prompt %}{{ '<|turn|><think>' }}{% endif %}")
    prompt, ids = tokens(tokenizer, [QUESTION], THOUGHT)
    assert text(tokenizer, prompt + ids).count("<think>") == 1


def test_reasoning_goes_through_the_template(loaded):
    tokenizer = loaded("qwen 3")
    turn = {"role": "assistant", "content": "A fruit.", "reasoning_content": "Sour."}
    assert text(tokenizer, tokens(tokenizer, [QUESTION], turn)[1]) == THOUGHT
    assert tokens(tokenizer, [QUESTION], turn) == tokens(tokenizer, [QUESTION], THOUGHT)


def test_what_the_recipe_says_to_the_template_holds_wherever_the_tokenizer_goes(loaded, tmp_path):
    tokenizer = loaded("qwen 3", enable_thinking=False)
    prompt, ids = tokens(tokenizer, [QUESTION], "A fruit.")
    assert text(tokenizer, prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text(tokenizer, ids) == "A fruit."
    tokenizer.save_pretrained(tmp_path / "adapter")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    asked = {"add_generation_prompt": True, "tokenize": False}
    assert elsewhere.apply_chat_template([QUESTION], **asked) == render(tokenizer, [QUESTION])
    assert elsewhere.apply_chat_template([QUESTION], enable_thinking=True, **asked).endswith("assistant\n")
    LlamaConfig(vocab_size=1024).save_pretrained(tmp_path / "adapter")
    again = load_tokenizer(Model(path=str(tmp_path / "adapter"), chat_template_kwargs={"enable_thinking": False}))
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("value", [None, True, 7, 0.5, 'a "quoted"\nü%}', ["a", {"b": None}]])
def test_a_setting_arrives_as_it_was_written(loaded, value):
    tokenizer = loaded("{{ [said] | tojson }}{{ messages[0].content }}", said=value)
    assert render(tokenizer, [QUESTION]).startswith(json.dumps([value], ensure_ascii=False))


def test_a_setting_that_the_template_does_not_use_is_an_error(loaded):
    with pytest.raises(InputError, match="does not use `enable_thinkin`") as caught:
        loaded("qwen 3", enable_thinkin=False)
    assert caught.value.place == "model.chat_template_kwargs.enable_thinkin"


def test_today_is_the_same_day_always_and_everywhere(loaded, tmp_path):
    tokenizer = loaded("llama 3")
    assert "Today: 26 Jul 2024<" in render(tokenizer, [QUESTION])
    assert pinned_day(tokenizer.chat_template) == "2024-07-26"
    assert pinned_day(loaded("chatml").chat_template) is None
    tokenizer.save_pretrained(tmp_path / "adapter")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert "Today: 26 Jul 2024<" in elsewhere.apply_chat_template([QUESTION], tokenize=False)
    other = loaded("{{ strftime_now('%A, %-d %B %Y; %Y-%m-%d %H:%M') }}{{ messages[0].content }}")
    assert render(other, [QUESTION]).startswith("Friday, 26 July 2024; 2024-07-26 00:00")


@pytest.mark.parametrize(
    ("end", "left"), [("</s>", ""), ("</s>\n", ""), ("</s> \n</s>", ""), (" </s> ", " "), ("<|stop|>\n", ""), ("", "")]
)
def test_a_reply_has_one_end(loaded, end, left):
    tokenizer = loaded("chatml")
    _, ids = tokens(tokenizer, [QUESTION], "Yellow." + end)
    assert text(tokenizer, ids) == "Yellow." + left
    if "stop" not in end:
        ((_, ids),) = encode_records(tokenizer, SPEC, [("Q:", " Yellow." + end)])
        assert text(tokenizer, ids) == " Yellow." + left + "</s>"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
# Two ways of templates: arguments as a mapping, and as text.
AS_MAPPING = """\
{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}
{{- '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""
AS_TEXT = """\
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}
{{- m.content + '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize("template", [AS_MAPPING, AS_TEXT], ids=["mapping", "text"])
def test_calls_of_tools_are_written_as_the_template_takes_them(loaded, template):
    tokenizer = loaded(template)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    prompt, ids = tokens(tokenizer, [QUESTION], call)
    assert text(tokenizer, ids) == 'weather{"city": "Rome"}'
    prompt, ids = tokens(tokenizer, [QUESTION, call, {"role": "tool", "content": "sun"}], "Sunny.")
    assert 'weather{"city": "Rome"}<|stop|><|turn|>tool\nsun<|stop|>' in text(tokenizer, prompt)


def test_tools_are_written_by_the_template(loaded):
    prompt, _ = tokens(loaded(AS_MAPPING), [QUESTION | {"tools": [TOOL]}], "Sunny.")
    assert text(loaded(AS_MAPPING), prompt).startswith('[{"type": "function", "function": {"name": "weather"')


CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {"role": "assistant", "content": "2", "reasoning_content": "1+1"}
WITHOUT_RESULTS = """\
{%- for m in messages if m.role != 'tool' %}{{ m.role + m.content + (m.tool_calls or '') | string }}{% endfor %}"""
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ '<|turn|>' + m.content }}{% endfor %}"
LAST_ALONE = "{{ messages[-2].content if messages[-1].role == 'assistant' }}{{ '<|turn|>' + messages[-1].content }}"
WITHOUT_ARGUMENTS = """\
{%- for m in messages %}{{ '<|turn|>' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"""
CALLS_WITHOUT_WORDS = """\
{%- for m in messages %}{{ '<|turn|>' + (m.content if not m.tool_calls else m.tool_calls | string) }}{% endfor %}"""
SYSTEM = {"role": "system", "content": "e"}  # a letter that is elsewhere in the text too


@pytest.mark.parametrize(
    ("template", "record", "names"),
    [
        ("chatml", ([QUESTION | {"tools": [TOOL]}], "Yes."), "does not write `tools`"),
        ("chatml", ([QUESTION], CALLING), "`tool_calls`"),
        ("chatml", ([QUESTION, CALLING, QUESTION], "Yes."), "`tool_calls`"),
        ("chatml", ([QUESTION | {"content": "The weather?"}], CALLING), "`tool_calls`"),
        ("chatml", ([QUESTION], THINKING), "`reasoning_content`"),
        ("opens thinking", ([QUESTION], THINKING), "`reasoning_content`"),
        ("chatml", ("1+1=", THINKING), "goes through no chat template"),
        (WITHOUT_RESULTS, ([QUESTION, CALLING, {"role": "tool", "content": "5"}], "Yes."), "the turns of tools"),
        (WITHOUT_SYSTEM, ([SYSTEM, QUESTION], "Yes."), "the system turn"),
        (WITHOUT_SYSTEM, ([SYSTEM, QUESTION],), "the system turn"),
        (LAST_ALONE, ([QUESTION, {"role": "assistant", "content": "l"}, QUESTION], "Yes."), "turn 1, of user"),
        (WITHOUT_ARGUMENTS, ([QUESTION], CALLING), "the arguments of `weather`"),
        (WITHOUT_ARGUMENTS, ([QUESTION, CALLING, QUESTION], "Yes."), "the arguments of `weather`"),
        (CALLS_WITHOUT_WORDS, ([QUESTION, CALLING | {"content": "l"}, QUESTION], "Yes."), "beside `tool_calls`"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(loaded, template, record, names):
    with pytest.raises(InputError, match=names):
        encode_records(loaded(template), SPEC, [record])


def test_where_a_template_writes_something_else_both_are_shown(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": reply}]} for reply in ("A fruit.", THOUGHT)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = Data(path=str(tmp_path / "rows.jsonl"))
    prepared = prepare.demonstrations(spec, loaded("opens thinking"), 0)
    assert prepared.counts["unlike_template"] == 1
    assert prepared.unlike_template == {
        "prompt_and_reply": "What is a lemon?<|turn|><think>\nA fruit.",
        "template": "What is a lemon?<|turn|>A fruit.</s>",
    }
    assert prepare.demonstrations(spec, loaded("chatml"), 0).unlike_template is None


def test_what_a_model_says_after_a_colon_is_not_given_two_spaces_in_the_next_turn(loaded):
    assert begins_with_space(loaded("vicuna")) and begins_with_space(loaded("llama 2"))
    assert not begins_with_space(loaded("chatml"))
