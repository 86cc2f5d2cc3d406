"""The tokenizer pads on the left, with a token that ends nothing, and has a chat template, if only a plain one."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.tokenizer import (
    TemplateError,
    begins_with_bos,
    end_of_turn,
    has_default_template,
    load_tokenizer,
    render,
)
from rlhf_pipeline.recipe.schema import Model

WORDS = ["a", "lemon", "is", "yellow"]


@pytest.fixture
def folder_with(tmp_path):
    """A function that writes a word-level tokenizer with the given special tokens, and a model's configuration."""

    def write(specials, spare_rows=0, **roles):
        """`roles` say which special token is EOS, pad and so on; `spare_rows` are embeddings without a token."""
        vocabulary = {token: i for i, token in enumerate([*specials, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(specials)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(tmp_path)
        LlamaConfig(vocab_size=len(vocabulary) + spare_rows).save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def check(tokenizer, pad):
    """`pad` is the padding, differs from EOS, is a row of the embedding, and comes on the left."""
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    rows = tokenizer(["a lemon is yellow", "a lemon"], padding=True)
    short, mask = rows["input_ids"][1], rows["attention_mask"][1]
    assert short[:2] == [tokenizer.pad_token_id] * 2
    assert mask == [0, 0, 1, 1]
    assert tokenizer.pad_token_id not in rows["input_ids"][0] + short[2:]


class TestPadding:
    def test_own_pad_token_stays(self, folder_with):
        """A pad token that is no other token is not replaced, whatever else could serve."""
        path = folder_with(["<blank>", "<pad>", "<end>"], eos_token="<end>", pad_token="<blank>")
        check(load_tokenizer(path), "<blank>")

    @pytest.mark.parametrize("pad", [{}, {"pad_token": "<end>"}], ids=["missing", "same as EOS"])
    @pytest.mark.parametrize(
        ("specials", "chosen"),
        [
            (["<unk>", "<|reserved_0|>", "<end>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
            (["<|reserved_0|>", "<unk>", "<end>"], "<unk>"),
            (["<end>", "<|tool|>", "<|reserved_0|>", "<|reserved_1|>"], "<|reserved_0|>"),
            (["<|RESERVED_0|>", "<end>"], "<|RESERVED_0|>"),
        ],
    )
    def test_special_tokens_serve_in_order(self, folder_with, specials, chosen, pad):
        """First a token named after padding, then the unknown token, then a reserved one; wherever they stand."""
        path = folder_with(specials, spare_rows=4, eos_token="<end>", **pad)
        tokenizer = load_tokenizer(path)
        check(tokenizer, chosen)
        assert len(tokenizer) == len(specials) + len(WORDS)

    @pytest.mark.parametrize("pad", [{}, {"pad_token": "<end>"}], ids=["missing", "same as EOS"])
    def test_spare_embedding_row_serves_next(self, folder_with, pad):
        """A new token takes the first row that no token has."""
        path = folder_with(["<end>"], spare_rows=1, eos_token="<end>", **pad)
        tokenizer = load_tokenizer(path)
        check(tokenizer, "<|pad|>")
        assert tokenizer.pad_token_id == 1 + len(WORDS)
        assert tokenizer.decode([tokenizer.pad_token_id], skip_special_tokens=True) == ""

    def test_nothing_to_pad_with_is_an_input_error(self, folder_with):
        """The embedding is never resized: without a row to use, the user is told what to do."""
        path = folder_with(["<end>"], spare_rows=0, eos_token="<end>")
        with pytest.raises(InputError, match="no pad token") as error:
            load_tokenizer(path)
        assert path in error.value.place
        assert error.value.hint

    def test_eos_and_bos_never_serve(self, folder_with):
        """Names that sound right do not make EOS or BOS padding."""
        path = folder_with(
            ["<bos_unk>", "<eos_pad>", "<|reserved_0|>"], spare_rows=0, eos_token="<eos_pad>", bos_token="<bos_unk>"
        )
        check(load_tokenizer(path), "<|reserved_0|>")


class TestRefusals:
    def test_no_eos_is_an_input_error(self, folder_with):
        """Replies that can never end are refused at once."""
        with pytest.raises(InputError, match="EOS") as error:
            load_tokenizer(folder_with(["<pad>"], pad_token="<pad>"))
        assert "eos_token" in error.value.hint

    def test_a_folder_without_a_tokenizer_s_files_has_none(self, tmp_path):
        """Transformers makes one that knows no tokens of some, to which every text is empty."""
        Qwen2Config().save_pretrained(tmp_path)
        assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1
        with pytest.raises(InputError, match="no tokenizer could be loaded"):
            load_tokenizer(str(tmp_path))

    def test_folder_without_tokenizer_is_an_input_error(self, tmp_path):
        """A model without its tokenizer files is refused in one line."""
        LlamaConfig().save_pretrained(tmp_path)
        with pytest.raises(InputError) as error:
            load_tokenizer(str(tmp_path))
        assert str(tmp_path) in error.value.place
        assert "\n" not in str(error.value)

    def test_code_of_the_tokenizers_own_is_not_run(self, folder_with, tmp_path):
        """Its module would leave a mark as soon as it is imported."""
        path = Path(folder_with(["<pad>", "<end>"], eos_token="<end>", pad_token="<pad>"))
        (path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match="Python code that comes with it") as error:
            load_tokenizer(str(path))
        assert "`model.trust_remote_code: true`" in error.value.hint
        assert not (tmp_path / "mark").exists()


def test_shipped_tokenizer_keeps_its_own_padding(tokenizer):
    """The tiny checkpoint needs no stand-in."""
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.padding_side == "left"


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is a lemon?"}
REPLY = {"role": "assistant", "content": "A fruit."}
AGAIN = {"role": "user", "content": "Which colour?"}
# As Gemma's, which refuses system turns.
REFUSING = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<turn>' + message['content'] }}
{%- endfor %}
"""


@pytest.fixture
def plain(folder_with):
    """A tokenizer whose model has no chat template."""
    return load_tokenizer(folder_with(["<pad>", "<end>"], eos_token="<end>", pad_token="<pad>"))


class TestDefaultTemplate:
    def test_it_is_taken_where_there_is_none_and_can_be_told(self, plain, tokenizer):
        assert has_default_template(plain)
        assert not has_default_template(tokenizer)

    def test_turns_are_plain_text_and_replies_end_in_eos(self, plain):
        rendered = render(plain, [SYSTEM, USER, REPLY, AGAIN])
        assert rendered == (
            "System:\nBe brief.\n\nUser:\nWhat is a lemon?\n\nAssistant:\nA fruit.<end>\n\n"
            "User:\nWhich colour?\n\nAssistant:\n"
        )
        assert end_of_turn(plain) == "<end>"

    @pytest.mark.parametrize("content", ["  indented\n\n", "{{ messages }}", "User:\nfaked"])
    def test_what_was_said_is_kept_to_the_letter(self, plain, content):
        assert render(plain, [{"role": "user", "content": content}]) == f"User:\n{content}\n\nAssistant:\n"

    @pytest.mark.parametrize(
        ("turns", "words"),
        [
            ([USER, REPLY, {"role": "tool", "content": "42"}], "a turn of `tool`"),
            ([USER, REPLY, SYSTEM, AGAIN], "a system turn only at the beginning"),
        ],
    )
    def test_what_it_has_no_place_for_is_refused(self, plain, turns, words):
        with pytest.raises(TemplateError, match=words):
            render(plain, turns)

    def test_prompts_begin_with_bos_where_the_tokenizer_begins_texts_so(self, folder_with, tmp_path):
        path = folder_with(["<pad>", "<s>", "<end>"], eos_token="<end>", pad_token="<pad>", bos_token="<s>")
        without = load_tokenizer(path)
        assert render(without, [USER]).startswith("User:")

        backend = without.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        adding = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", bos_token="<s>"
        )
        adding.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
        ids = tokenizer(render(tokenizer, [USER]), add_special_tokens=False)["input_ids"]
        assert begins_with_bos(tokenizer, ids)
        assert not begins_with_bos(tokenizer, ids, times=2)
        assert has_default_template(tokenizer)


class TestOwnTemplate:
    def test_the_recipes_file_stands_in_for_the_tokenizers_and_is_saved_with_an_adapter(
        self, folder_with, tmp_path, make_artifacts
    ):
        file = tmp_path / "mine.jinja"
        file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}|{% endfor %}")
        spec = make_artifacts().spec.model_copy(update={"chat_template": str(file)})
        tokenizer = load_tokenizer(spec)
        # A template that knows no `add_generation_prompt` gets the beginning of the assistant's turn.
        assert render(tokenizer, [USER, REPLY, AGAIN]) == (
            "[user] What is a lemon?|[assistant] A fruit.|[user] Which colour?|[assistant]"
        )
        assert not has_default_template(tokenizer)
        assert end_of_turn(tokenizer) == "|"

        lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        model = adapters.with_policy_adapter(load_base(spec, tokenizer), lora, None)
        adapters.save_adapter(model, "default", tmp_path / "adapter", tokenizer)
        published = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        assert published.apply_chat_template([USER], tokenize=False) == "[user] What is a lemon?|"

    def test_the_default_is_saved_with_the_tokenizer(self, plain, tmp_path):
        plain.save_pretrained(tmp_path / "adapter")
        published = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        assert published.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == render(
            plain, [USER]
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{% for m in messages %}\n{{ m.content }", "not valid Jinja"),
            (b"\xff\xfe", "not UTF-8"),
            (b" \n", "is empty"),
            (None, "No such file"),
        ],
    )
    def test_a_file_that_is_no_template_is_an_input_error(self, folder_with, tmp_path, content, message):
        path = folder_with(["<pad>", "<end>"], eos_token="<end>", pad_token="<pad>")
        file = tmp_path / "mine.jinja"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_tokenizer(Model(path=path, chat_template=str(file)))
        assert error.value.place.startswith(str(file))

    def test_a_refusal_is_passed_on_in_the_templates_words(self, folder_with, tmp_path):
        path = folder_with(["<pad>", "<end>"], eos_token="<end>", pad_token="<pad>")
        (tmp_path / "mine.jinja").write_text(REFUSING)
        tokenizer = load_tokenizer(Model(path=path, chat_template=str(tmp_path / "mine.jinja")))
        assert render(tokenizer, [USER]) == "<turn>What is a lemon?<turn>"
        with pytest.raises(TemplateError, match="System role not supported"):
            render(tokenizer, [SYSTEM, USER])

    @pytest.mark.parametrize(
        "fault", ["{{ messages[7].content }}", "{{ 'a' + 1 }}", "{{ messages[0].content.nope() }}"]
    )
    def test_a_template_that_fails_is_no_traceback(self, folder_with, tmp_path, fault):
        path = folder_with(["<pad>", "<end>"], eos_token="<end>", pad_token="<pad>")
        (tmp_path / "mine.jinja").write_text(fault)
        tokenizer = load_tokenizer(Model(path=path, chat_template=str(tmp_path / "mine.jinja")))
        with pytest.raises(TemplateError, match=r"cannot render this conversation: \S"):
            render(tokenizer, [USER])
        assert end_of_turn(tokenizer) is None
