"""Chat templates in the manner of well-known ones, and tokenizers that have them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf_pipeline.recipe import TINY

SPECIALS = ["<unk>", "<pad>", "<s>", "</s>", "<|turn|>", "<|stop|>", "<think>", "</think>"]
# Written for these tests, each in the manner of a family of models.
TEMPLATES = {
    "chatml": """\
{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content + '<|stop|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}""",
    "llama 2": """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama 3": """\
{{- bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|turn|>system\\n\\nToday: ' + day + '<|stop|>' }}
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n\\n' + m.content | trim + '<|stop|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n\\n' }}{% endif %}""",
    "qwen 3": """\
{%- for m in messages %}{% set thought = m.reasoning_content or '' %}{% set said = m.content %}
{%- if m.role == 'assistant' and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set said = said.split('</think>')[-1].lstrip() %}{% endif %}
{{- '<|turn|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- said + '<|stop|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
    "vicuna": """\
{%- for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    "no generation prompt": """\
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}""",
    "opens thinking": """\
{%- for m in messages %}{% if m.role == 'assistant' %}
{{- '<|turn|>' + m.content.split('</think>')[-1].strip() + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|><think>\\n' }}{% endif %}""",
}


def save(folder: Path, kind: str, template: str | None) -> Path:
    """A tokenizer of one of two kinds, trained on the tiny world: "sentencepiece" writes a space before each text."""
    rows = (TINY / "data" / "demonstrations.jsonl").read_text().splitlines()[:200]
    texts = [text for row in map(json.loads, rows) for text in (str(row["prompt"]), str(row["completion"]))]
    if kind == "sentencepiece":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.pre_tokenizer = pre_tokenizers.Split(
            "▁", "merged_with_next"
        )  # while it learns: words begin with a space
        alphabet = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=alphabet,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if kind == "sentencepiece":
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    LlamaConfig(vocab_size=1024).save_pretrained(folder)
    return folder
