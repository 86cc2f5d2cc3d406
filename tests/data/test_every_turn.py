"""`loss: all`: each of the assistant's turns carries loss on the tokens on which it would as the last one."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from trl import SFTConfig

from rlhf_pipeline.data import measure, prepare, problems
from rlhf_pipeline.data.encode import encode_records
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Data
from rlhf_pipeline.stages.sft import ResumableSFTTrainer

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = """\
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}
{{- eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""
# The number of each turn, which those in a shorter conversation do not have.
NUMBERED = """\
{%- for m in messages %}{{ '<|turn|>' + m.role + loop.index | string + '\\n' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant' + (messages | length + 1) | string + '\\n' }}{% endif %}"""
WITHOUT_EARLIER_THOUGHTS = """\
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' }}
{%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""
COUNTED = """\
{{- messages | length }}{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""
SYSTEM_IN_LAST_QUESTION = """\
{%- set n = messages | selectattr('role', 'equalto', 'user') | list | length %}{% set seen = namespace(n=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set seen.n = seen.n + 1 %}
{{- '[INST]' + (messages[0].content if seen.n == n and messages[0].role == 'system' else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
ENDS_WITHIN_A_WORD = """\
{%- for m in messages %}{{ ('Th' if m.role == 'assistant' else '<|turn|>') + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Th' }}{% endif %}"""
MARKED = """\
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}
{{- m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""


def chat(n: int, **first_reply: object) -> list[dict]:
    """A conversation of n questions, each with its reply."""
    turns = [
        {"role": role, "content": f"{word} {i}, is it yellow?"}
        for i in range(n)
        for role, word in (("user", "A lemon"), ("assistant", "That"))
    ]
    turns[1] |= first_reply
    return turns


@pytest.fixture
def rows(tmp_path):
    """Write rows to a file of their own and describe it."""

    def of(*table: list[dict] | dict, **settings: object) -> Data:
        file: Path = tmp_path / f"rows{len(list(tmp_path.glob('rows*')))}.jsonl"
        lines = [json.dumps({"messages": row} if isinstance(row, list) else row) + "\n" for row in table]
        file.write_text("".join(lines))
        return Data(path=str(file), **settings)

    return of


def one_by_one(tokenizer, turns: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation's tokens and labels, each reply encoded as the last one of a conversation that ends there."""

    def encoded(end: int) -> list[list[int]]:
        reply = turns[end]
        said = reply["content"] if set(reply) == {"role", "content"} else reply
        return encode_records(tokenizer, Data(path="rows"), [(turns[:end], said)])[0]

    prompt, reply = encoded(len(turns) - 1)
    ids, labels = prompt + reply, [-100] * len(prompt) + reply
    for end, turn in enumerate(turns[:-1]):
        if turn["role"] == "assistant":
            before, learned = encoded(end)
            assert ids[: len(before + learned)] == before + learned
            labels[len(before) : len(before + learned)] = learned
    return ids, labels


def with_end(loaded, name: str, kind: str = "bytes"):
    """A tokenizer whose EOS is what its template ends turns in."""
    tokenizer = loaded(name, kind)
    if name in ("chatml", "llama 3", "qwen 3"):
        tokenizer.eos_token = "<|stop|>"
    return tokenizer


def runs(labels: list[int]) -> list[list[int]]:
    """The stretches of labels that are not -100."""
    return [list(run) for has_loss, run in itertools.groupby(labels, lambda label: label != -100) if has_loss]


def learned(tokenizer, row: dict) -> list[str]:
    """The texts that carry loss, each up to EOS."""
    text = tokenizer.decode([label for label in row["labels"] if label != -100], clean_up_tokenization_spaces=False)
    return text.split(tokenizer.eos_token)


class TestWhichTokens:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    @pytest.mark.parametrize("name", ["chatml", "llama 2", "llama 3", "vicuna", "no generation prompt", NUMBERED])
    def test_they_are_those_of_each_turn_as_the_last_one(self, loaded, rows, name, kind):
        tokenizer = with_end(loaded, name, kind)
        conversations = [chat(n) for n in (2, 3, 7)]
        encoded = prepare.demonstrations(rows(*conversations, loss="all"), tokenizer, 0).train.to_list()
        wanted = [one_by_one(tokenizer, turns) for turns in conversations]
        assert [(row["input_ids"], row["labels"]) for row in encoded] == wanted
        as_last = prepare.demonstrations(rows(*conversations), tokenizer, 0).train
        assert [row["input_ids"] for row in encoded] == list(as_last["input_ids"])

    def test_the_default_template_of_the_shipped_tokenizer(self, tokenizer, rows):
        (row,) = prepare.demonstrations(rows([SYSTEM, *chat(3)], loss="all"), tokenizer, 0).train
        assert (row["input_ids"], row["labels"]) == one_by_one(tokenizer, [SYSTEM, *chat(3)])
        assert learned(tokenizer, row) == [*(f"That {i}, is it yellow?" for i in range(3)), ""]

    def test_calls_of_tools_are_replies_and_what_tools_say_is_not(self, loaded, rows):
        tokenizer = loaded(CALLS)
        call, result = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}
        turns = [*chat(1), chat(1)[0], call, result, *chat(1)[1:], *chat(1)]
        (row,) = prepare.demonstrations(rows(turns, loss="all"), tokenizer, 0).train
        assert (row["input_ids"], row["labels"]) == one_by_one(tokenizer, turns)
        assert learned(tokenizer, row)[1] == 'weather{"city": "Rome"}'

    def test_a_conversation_with_one_reply_is_the_same_row_in_all_columns(self, tokenizer, rows):
        table = [chat(1), [SYSTEM, *chat(1)]]
        every, last = (prepare.demonstrations(rows(*table, loss=loss), tokenizer, 0) for loss in ("all", "last"))
        assert every.table.to_list() == last.table.to_list()

    def test_one_file_that_is_read_in_both_ways_gives_both(self, tokenizer, rows):
        spec = rows(chat(2), loss="all")
        every, last = (
            prepare.demonstrations(spec.model_copy(update={"loss": loss}), tokenizer, 0) for loss in ("all", "last")
        )
        assert [len(learned(tokenizer, one.train[0])) for one in (every, last)] == [3, 2]
        assert every.table["prompt_key"][0] == last.table["prompt_key"][0]


class TestShapes:
    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": chat(2)[:-1], "completion": chat(2)[-1]["content"]},
            {"history": [["A lemon 0, is it yellow?", "That 0, is it yellow?"]],
             "instruction": "A lemon 1, is it yellow?", "output": "That 1, is it yellow?"},
            {"chosen": chat(2), "rejected": [*chat(2)[:-1], {"role": "assistant", "content": "No."}]},
            {"messages": chat(2), "label": True},
            {"messages": json.dumps(chat(2))},
        ],
        ids=lambda row: "/".join(row),
    )  # fmt: skip
    def test_all_shapes_of_conversations(self, tokenizer, rows, row):
        (found,) = prepare.demonstrations(rows(row, loss="all"), tokenizer, 0).train
        assert (found["input_ids"], found["labels"]) == one_by_one(tokenizer, chat(2))

    @pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}, {"rating": -1}])
    def test_a_turn_that_may_not_be_trained_carries_no_loss(self, tokenizer, rows, mark):
        whole, marked = chat(3), chat(3, **mark)
        worse = [*marked[:-1], {"role": "assistant", "content": "No."}]
        apart = {"prompt": marked[:-1], "completion": marked[-1]["content"]}
        as_text = {"messages": json.dumps(marked)}
        for row in (marked, apart, {"chosen": marked, "rejected": worse}, as_text):
            prepared = prepare.demonstrations(rows(row, loss="all"), tokenizer, 0)
            assert learned(tokenizer, prepared.train[0]) == ["That 1, is it yellow?", "That 2, is it yellow?", ""]
            plain = prepare.demonstrations(rows(whole, loss="all"), tokenizer, 0)
            assert prepared.train["input_ids"][0] == plain.train["input_ids"][0]
            assert prepared.table["row_key"][0] == plain.table["row_key"][0]

    def test_a_call_that_is_a_turn_of_its_own_counts_with_the_turn_before_it(self, loaded, rows):
        call = {"role": "function_call", "content": json.dumps(CALL["function"]), "weight": 0}
        turns = [*chat(1), call, {"role": "tool", "content": "sun"}, *chat(1)[1:], *chat(1)]
        (row,) = prepare.demonstrations(rows(turns, loss="all"), loaded(CALLS), 0).train
        assert learned(loaded(CALLS), row) == ["That 0, is it yellow?", "That 0, is it yellow?", ""]

    def test_a_turn_that_may_mean_either_is_an_error_only_where_it_would_be_learned(self, tokenizer, rows):
        assert len(prepare.demonstrations(rows(chat(2, weight=0.5)), tokenizer, 0).train) == 1
        with pytest.raises(InputError, match=r"has the weight 0\.5") as caught:
            prepare.demonstrations(rows(chat(2), chat(2, weight=0.5), loss="all"), tokenizer, 0)
        assert caught.value.place.endswith("row 2")


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("name", "turns", "says"),
        [
            ("qwen 3", chat(2), r"turn 2 .* in another way where more turns follow: .* and not .*<think>"),
            ("opens thinking", chat(2), r"turn 2 .* in another way where more turns follow"),
            (COUNTED, chat(2), r"in another way where more turns follow: '3<\|turn\|>user\\nA.*, and not '1<"),
            (SYSTEM_IN_LAST_QUESTION, [SYSTEM, *chat(2)], r"turn 3 .* in another way where more turns follow"),
            # The reply is another one in a shorter conversation, too, and is not one of those that are always compared.
            (WITHOUT_EARLIER_THOUGHTS, [*chat(3), chat(1)[0], chat(1)[1] | {"reasoning_content": "Sour."}, *chat(3)],
             r"turn 8 .* in another way where more turns follow"),
            ("no end", chat(2), r"turn 2 .* is followed by '<\|stop\|>' .* reply that is learned by EOS, '</s>'"),
            (ENDS_WITHIN_A_WORD, chat(2, content="at is it."), "turn 2 .* other tokens where more turns follow"),
        ],
    )  # fmt: skip
    def test_a_row_is_refused_in_one_sentence_or_left_out(self, loaded, rows, name, turns, says):
        tokenizer = loaded("chatml") if name == "no end" else with_end(loaded, name)
        table = [chat(1), turns]
        with pytest.raises(InputError, match=says) as caught:
            prepare.demonstrations(rows(*table, loss="all"), tokenizer, 0)
        assert caught.value.place.endswith("row 2")
        assert "`loss: last`" in caught.value.hint and "\n" not in caught.value.message
        kept = prepare.demonstrations(rows(*table, loss="all", bad_rows="drop"), tokenizer, 0)
        assert (len(kept.train), kept.counts["bad_rows"]) == (1, 1)
        assert len(prepare.demonstrations(rows(*table), tokenizer, 0).train) == 2

    def test_what_is_not_to_be_learned_may_be_written_in_another_way(self, loaded, rows):
        tokenizer = loaded(WITHOUT_EARLIER_THOUGHTS)
        turns = chat(3, reasoning_content="Sour.", weight=0)
        (row,) = prepare.demonstrations(rows(turns, loss="all"), tokenizer, 0).train
        assert learned(tokenizer, row) == ["That 1, is it yellow?", "That 2, is it yellow?", ""]

    def test_looking_at_a_row_takes_time_that_grows_with_its_turns_and_not_their_square(
        self, tokenizer, rows, monkeypatch
    ):
        """By the number of turns that are rendered: eight times as many turns would be 64 times as much."""
        write, rendered = tokenizer.apply_chat_template, []

        def counted(turns, *args, **kwargs):
            rendered.append(len(turns))
            return write(turns, *args, **kwargs)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
        counts = []
        for n in (10, 80):
            rendered.clear()
            prepare.demonstrations(rows(chat(n), loss="all"), tokenizer, 0)
            counts.append(sum(rendered))
        assert counts[1] < 12 * counts[0]


class TestLengths:
    def test_an_earlier_reply_has_loss_on_as_many_tokens_as_the_last_one_may_have(self, tokenizer, rows):
        whole = prepare.demonstrations(rows(chat(2), loss="all"), tokenizer, 0).train[0]
        cut = prepare.demonstrations(rows(chat(2), loss="all", max_completion_length=4), tokenizer, 0).train[0]
        first, last = runs(whole["labels"])
        assert runs(cut["labels"]) == [first[:4], last[:4]]
        assert cut["input_ids"] == whole["input_ids"][: len(cut["input_ids"])]

    def test_a_turn_that_lost_its_beginning_carries_no_loss(self, tokenizer, rows):
        whole = prepare.demonstrations(rows(chat(3), loss="all"), tokenizer, 0)
        labels, prompt = whole.train[0]["labels"], whole.table["prompt_length"][0]
        second = labels.index(-100, next(i for i, label in enumerate(labels) if label != -100))
        second = next(i for i in range(second, len(labels)) if labels[i] != -100)  # where the second reply begins
        for lost, replies in ((second, 2), (second + 1, 1)):
            cut = prepare.demonstrations(rows(chat(3), loss="all", max_prompt_length=prompt - lost), tokenizer, 0)
            assert cut.train[0]["input_ids"] == whole.train[0]["input_ids"][lost:]
            assert len(learned(tokenizer, cut.train[0])) - 1 == replies
            assert cut.train[0]["labels"][-10:] == labels[-10:]

    def test_a_row_with_any_reply_that_is_too_long_is_left_out(self, tokenizer, rows):
        long = chat(2, content="That is it. " * 20)
        spec = rows(chat(2), long, loss="all", too_long="drop", max_completion_length=30)
        prepared = prepare.demonstrations(spec, tokenizer, 0)
        assert (len(prepared.train), prepared.counts["too_long"]) == (1, 1)
        whole = prepare.demonstrations(rows(long, loss="all"), tokenizer, 0)
        assert whole.table["reply_length"][0] == len(tokenizer(long[1]["content"])["input_ids"]) + 1


def test_the_report_counts_every_reply_and_shows_where_the_loss_is(tokenizer, rows):
    spec = rows(*[chat(n) for n in (1, 2, 3)], loss="all", max_completion_length=9)
    prepared = prepare.demonstrations(spec, tokenizer, 0)
    numbers = measure.measure("sft", prepared, spec, tokenizer, measure.Trainer())
    assert numbers["loss"] == "all"
    assert numbers["replies"] == {"count": 6, "without_eos": 6, "empty": 0, "without_loss": 0}
    assert numbers["loss_tokens"] == 6 * 9
    (error,), _ = problems.problems(numbers, "stages.sft.data")
    assert "none of the 6 replies ends in EOS" in error.message
    assert "the assistant's turns before it are learned, too" in numbers["sources"][0]["says"]

    whole = rows(chat(3), loss="all")
    numbers = measure.measure("sft", prepare.demonstrations(whole, tokenizer, 0), whole, tokenizer, measure.Trainer())
    assert numbers["replies"] == {"count": 3, "without_eos": 0, "empty": 0, "without_loss": 0}
    shown = numbers["example"]["text"]
    marked = "".join(token for token, loss in zip(shown["tokens"], shown["loss"], strict=True) if loss)
    assert marked == "".join(f"That {i}, is it yellow?{tokenizer.eos_token}" for i in range(3))
    last = measure.measure(
        "sft", prepare.demonstrations(rows(chat(3)), tokenizer, 0), rows(chat(3)), tokenizer, measure.Trainer()
    )
    assert (last["loss"], last["replies"]["count"], last["tokens"]) == ("last", 1, numbers["tokens"])


def test_rows_without_a_prompt_are_a_reply_each(tokenizer, rows):
    """One begins with loss where the one before it ended."""
    spec = rows({"text": "That is it."}, {"text": "It is yellow."})
    numbers = measure.measure("sft", prepare.demonstrations(spec, tokenizer, 0), spec, tokenizer, measure.Trainer())
    assert numbers["replies"] == {"count": 2, "without_eos": 0, "empty": 0, "without_loss": 0}


def test_of_what_max_length_leaves_each_reply_is_counted(tokenizer, rows):
    spec = rows(chat(4), loss="all")
    prepared = prepare.demonstrations(spec, tokenizer, 0)
    labels = prepared.train[0]["labels"]
    ends = [i for i, label in enumerate(labels) if label == tokenizer.eos_token_id]
    for limit, count, without_eos in ((ends[1] + 1, 2, 0), (ends[1], 2, 1), (ends[3] + 1, 4, 0)):
        numbers = measure.measure("sft", prepared, spec, tokenizer, measure.Trainer(max_length=limit))
        assert (numbers["replies"]["count"], numbers["replies"]["without_eos"]) == (count, without_eos)


@pytest.fixture
def trainer(checkpoints, tokenizer, tmp_path):
    """A function that makes an SFT trainer of a tiny model."""

    def of(train: Dataset, tokenizer=tokenizer, **settings: object) -> ResumableSFTTrainer:
        args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)
        return ResumableSFTTrainer(
            model=str(checkpoints["llama"]), args=args, train_dataset=train, processing_class=tokenizer
        )

    return of


@pytest.mark.parametrize("template", ["ours", "llama3_training"])
def test_labels_are_those_of_trl_where_the_template_marks_what_the_assistant_writes(
    loaded, rows, trainer, tokenizer, template
):
    text = MARKED if template == "ours" else _trls(template)
    theirs = loaded(text)
    if template != "ours":
        theirs.eos_token = "<|stop|>"
        theirs.chat_template = theirs.chat_template.replace("<|eot_id|>", "<|stop|>")
    conversations = [chat(1), chat(4), [SYSTEM, *chat(2)]]
    ours = prepare.demonstrations(rows(*conversations, loss="all"), theirs, 0).train
    table = Dataset.from_list([{"messages": turns} for turns in conversations])
    trained = trainer(table, theirs, assistant_only_loss=True, max_length=None, per_device_train_batch_size=1)
    for row, encoded in zip(ours, trained.train_dataset, strict=True):
        batch = trained.data_collator([encoded])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert ids[: len(row["input_ids"])] == row["input_ids"]
        assert labels[: len(row["labels"])] == row["labels"]
        assert set(labels[len(row["labels"]) :]) <= {-100}


def _trls(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_the_loss_of_sft_is_the_mean_over_the_marked_tokens(tokenizer, rows, trainer):
    train = prepare.demonstrations(rows(*[chat(n) for n in (1, 3, 2)], loss="all"), tokenizer, 0).train
    made = trainer(train, max_length=None)
    batch = made.data_collator([made.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        loss = made.compute_loss(made.model, dict(batch)).item()
        logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits.log_softmax(-1)
    found = []
    for i, row in enumerate(train):
        begin = batch["attention_mask"][i].tolist().index(1)  # it is padded
        found += [
            -log_probs[i, begin + at - 1, label].item() for at, label in enumerate(row["labels"]) if label != -100
        ]
    assert len(found) == sum(label != -100 for row in train for label in row["labels"]) > 50
    assert loss == pytest.approx(sum(found) / len(found), rel=1e-5)
