"""The tokenizer pads on the left, with a token that ends nothing and that no text contains."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tokenizer import load_tokenizer

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
