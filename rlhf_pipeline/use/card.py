"""The model card of an exported stage, from the run directory alone. No torch."""

import json
import re
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import TINY, Recipe
from rlhf_pipeline.recipe.data_files import is_local
from rlhf_pipeline.recipe.schema import BASE
from rlhf_pipeline.recipe.yaml import dump
from rlhf_pipeline.rundir.headline import order, shown_as
from rlhf_pipeline.rundir.jsonl import rows
from rlhf_pipeline.rundir.layout import SAMPLES, RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.secrets import redact

# Of the machine or of the moment, not of the model.
BOOKKEEPING = re.compile(r"seconds$|^eps$|^lr|^learning_rate$|^episode$|num_tokens$|^total_flos$")
QUESTION = "What is the capital of France?"


def text(
    run: Path, stage: str, recipe: Recipe, *, license: dict[str, str], dtype: str | None, name: str
) -> str:  # fmt: skip
    """The card, as Markdown with the head that the hub reads.

    Args:
        run: the run directory.
        stage: the stage that is exported.
        recipe: the run's.
        license: `license`, `license_name` and `license_link` of the base, as far as they are known.
        dtype: of the merged weights; None where the adapter is exported.
        name: what the model is loaded by: a hub id or a folder.
    """
    directory = RunDirectory(run)
    records = {one: directory.record(one) or Record() for one in _lineage(directory, stage)}
    record = records[stage]
    base = _Base(recipe)
    sections = [
        "---\n" + dump(_head(recipe, records, record, base, license, dtype)) + "---",
        f"# {_plain(name.rpartition('/')[2])}",
        _summary(recipe, record, base, dtype),
        "## How to use\n\n" + _how_to_use(run, recipe, records, record, base, dtype, name),
        "## Where it comes from\n\n" + _lineage_table(records, base),
        "## Data\n\n" + _data_table(records),
        "## Settings\n\n" + _settings_table(records),
        "## Numbers\n\n" + _numbers(records, record, stage, recipe.model.quantization, dtype),
        "## Limits\n\n" + _limits(record, records),
        "## Versions\n\n" + _table(["library", "version"], [[*pair] for pair in record.versions.items()]),
        "## Licence\n\n" + _licence(license, base),
    ]
    return redact("\n\n".join(sections) + "\n")


class _Base:
    """The base as a card names it: never by a path of the machine that trained."""

    def __init__(self, recipe: Recipe) -> None:
        path = Path(recipe.model.path)
        self.hub_id = None if path.is_absolute() else recipe.model.path
        self.tiny = path.is_relative_to(TINY)
        self.name = self.hub_id or path.name
        self.words = (
            "`tiny`, the checkpoint that ships with rlhf-pipeline"
            if self.tiny
            else f"[{_plain(self.hub_id)}](https://huggingface.co/{self.hub_id})"
            if self.hub_id
            else f"`{_code(path.name)}`, a folder of the machine that trained"
        )


def _lineage(directory: RunDirectory, stage: str) -> list[str]:
    """A stage's ancestors and itself, parents first."""
    found: list[str] = []

    def add(name: str | None) -> None:
        record = directory.record(name) if name and name != BASE else None
        if name and record and name not in found:
            add(record.init)
            add(record.reward)
            found.append(name)

    add(stage)
    return found


def _head(
    recipe: Recipe,
    records: dict[str, Record],
    record: Record,
    base: _Base,
    license: dict[str, str],
    dtype: str | None,
) -> dict[str, Any]:
    head: dict[str, Any] = dict(license)
    if base.hub_id:
        head["base_model"] = base.hub_id
        head["base_model_relation"] = "finetune" if dtype else "adapter"
    head["library_name"] = "transformers" if dtype else "peft"
    head["pipeline_tag"] = "text-classification" if kinds.get(record.kind).makes == "reward" else "text-generation"
    kind = kinds.get(record.kind)
    tag = "reward-model" if kind.makes == "reward" else kind.name
    head["tags"] = ["rlhf-pipeline", "trl", tag, *([] if dtype else ["lora"])]
    sources = [
        source.path
        for name in records
        if name in recipe.stages
        for data in (recipe.stages[name].data, recipe.stages[name].ptx_data)
        if data
        for source in (*data.sources, data.eval_data)
        if source and not is_local(source.path)
    ]
    if sources:
        head["datasets"] = list(dict.fromkeys(sources))
    return head


def _summary(recipe: Recipe, record: Record, base: _Base, dtype: str | None) -> str:
    what = "The reward model" if kinds.get(record.kind).makes == "reward" else "The policy"
    form = (
        f"The adapter is merged into the base's weights, in {dtype}."
        if dtype
        else "These are LoRA weights, which PEFT loads over their base."
    )
    said = [
        f"{what} that stage `{_code(record.name)}` ({kinds.get(record.kind).method}) of the run `{_code(recipe.name)}`",
        f"left, made by rlhf-pipeline over {base.words}.\n{form}",
    ]
    if dtype and recipe.model.quantization != "none":
        said.append(
            f"Training read the base rounded to {recipe.model.quantization}; the weights here are the adapter on the "
            "base as it is stored, so they compute slightly otherwise than what was measured below."
        )
    return "\n".join(said)


def _how_to_use(
    run: Path,
    recipe: Recipe,
    records: dict[str, Record],
    record: Record,
    base: _Base,
    dtype: str | None,
    name: str,
) -> str:
    chat, reward = _prompts_are_chats(run, recipe, records), kinds.get(record.kind).makes == "reward"
    style = (
        "In training, prompts went through the chat template, which the tokenizer has."
        if chat
        else "In training, prompts were plain text, as the model reads it, without the chat template."
    )
    code = _score_code(name, chat, dtype) if reward else _reply_code(name, chat, dtype)
    if recipe.model.trust_remote_code:
        code = code.replace("from_pretrained(name", "from_pretrained(name, trust_remote_code=True")
    parts = [style, f"```python\n{code}\n```"]
    if not reward:
        shell = json.dumps(name) if re.search(r"[^\w./-]", name) else name
        if dtype:
            served = f"vllm serve {shell}\ntext-generation-launcher --model-id {shell}"
        else:
            rank = record.inputs.get("lora.r", 16)
            of_base = base.hub_id or "PATH_OF_THE_BASE"
            served = f"vllm serve {of_base} --enable-lora --max-lora-rank {rank} --lora-modules {record.name}={shell}"
        parts.append(f"Served by vLLM{' or TGI' if dtype else ''}; a reply ends as `generation_config.json` says:")
        parts.append(f"```sh\n{served}\n```")
    return "\n\n".join(parts)


def _reply_code(name: str, chat: bool, dtype: str | None) -> str:
    if dtype:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f"name = {json.dumps(name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            'model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")',
        ]  # fmt: skip
    else:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer, GenerationConfig", "",
            f"name = {json.dumps(name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            'model = AutoPeftModelForCausalLM.from_pretrained(name, device_map="auto")',
            "model.generation_config = GenerationConfig.from_pretrained(name)  # what ends a reply",
        ]  # fmt: skip
    if chat:
        ask = [
            f'turns = [{{"role": "user", "content": "{QUESTION}"}}]',
            "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)',
        ]
    else:
        ask = [f'inputs = tokenizer("{QUESTION}", return_tensors="pt").to(model.device)']
    answer = [
        "output = model.generate(**inputs, max_new_tokens=128, do_sample=True)",
        'reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        "print(reply)",
    ]
    return "\n".join([*load, *ask, *answer])


def _score_code(name: str, chat: bool, dtype: str | None) -> str:
    auto = "AutoModelForSequenceClassification"
    if dtype:
        load = [
            "import torch",
            f"from transformers import {auto}, AutoTokenizer", "",
            f"name = {json.dumps(name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            f"model = {auto}.from_pretrained(name)",
        ]  # fmt: skip
    else:
        load = [
            "import torch",
            f"from peft import {auto.replace('Auto', 'AutoPeft', 1)}",
            "from transformers import AutoTokenizer", "",
            f"name = {json.dumps(name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            f"model = {auto.replace('Auto', 'AutoPeft', 1)}.from_pretrained(name, num_labels=1)",
            "model.config.pad_token_id = tokenizer.pad_token_id",
        ]  # fmt: skip
    asked = f'prompt, replies = "{QUESTION}", ["Paris.", "I do not know."]'
    if chat:
        ask = [
            asked,
            'turns = [{"role": "user", "content": prompt}]',
            "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
            "start = tokenizer(prompt, add_special_tokens=False).input_ids",
        ]
    else:
        ask = [asked, "start = tokenizer(prompt).input_ids"]
    score = [
        "# Prompt and reply are encoded apart, and a reply that is whole ends in EOS, where the score is read.",
        "ids = [",
        "    start + tokenizer(reply, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]",
        "    for reply in replies",
        "]",
        'batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(model.device)',
        "with torch.no_grad():",
        "    scores = model(**batch).logits[:, 0].tolist()",
        "print(scores)",
    ]
    return "\n".join([*load, *ask, *score])


def _prompts_are_chats(run: Path, recipe: Recipe, records: dict[str, Record]) -> bool:
    """Whether prompts were turns for the chat template: as the recipe says, or the replies that were judged show."""
    for name in reversed(records):
        said = records[name].inputs.get("data.chat")
        if said is not None:
            return bool(said)
    for name in reversed(records):
        for row in rows(run / name / SAMPLES):
            if "judge" in row:
                return isinstance(row.get("prompt"), list)
    return False


def _lineage_table(records: dict[str, Record], base: _Base) -> str:
    identity = next(iter(records.values())).inputs["model"]
    table = [["base", "", "", identity, ""]]
    for name, record in records.items():
        sha256 = record.weights or ""
        origin = record.init or BASE
        origin += f", scored by {record.reward}" if record.reward else ""
        table.append([name, record.kind, origin, record.fingerprint or "", sha256])
    return (
        "A fingerprint covers all that decides a stage's result: settings, data and what it starts from.\n\n"
        + _table(["stage", "kind", "from", "fingerprint", "SHA-256 of its weights"], table)
    )


def _data_table(records: dict[str, Record]) -> str:
    table = []
    for name, record in records.items():
        inputs = record.inputs
        for key in ("data", "data.eval_data", "ptx_data"):
            for source in str(inputs.get(key) or "").split(" + "):
                path, at, digest = source.rpartition("@")
                if source:
                    table.append([name, key, path if at else source, digest if at else ""])
    return _table(["stage", "key", "rows from", "digest or commit"], table)


def _settings_table(records: dict[str, Record]) -> str:
    prefixes = ("trainer.", "lora.", "model.quantization", "model.dtype", "seed")
    keys = dict.fromkeys(key for record in records.values() for key in record.inputs if key.startswith(prefixes))
    in_order = sorted(keys, key=lambda key: next(i for i, prefix in enumerate(prefixes) if key.startswith(prefix)))
    table = [[key, *(_value(record.inputs.get(key)) for record in records.values())] for key in in_order]
    return _table(["setting", *records], table)


def _numbers(records: dict[str, Record], record: Record, stage: str, quantization: str, dtype: str | None) -> str:
    metrics = {name: value for name, value in record.metrics.items() if not BOOKKEEPING.search(name)}
    parts = [f"The last that stage `{_code(stage)}` logged, in TRL's names."]
    judging = record.judging
    if judging and "judge_mean" in metrics:
        path = str(judging.get("data", "")).rpartition("@")[0]
        parts[0] += (
            f" `judge_mean` is the mean that `{_code(judging['judge'])}` gives replies to the first {judging['n']} "
            f"prompts of `{_code(path)}`, sampled at temperature {judging['temperature']}."
        )
        others = {
            name: one.metrics["judge_mean"]
            for name, one in records.items()
            if name != stage and "judge_mean" in one.metrics
        }
        parts[0] += "".join(f" For stage `{_code(name)}` it was {_value(mean)}." for name, mean in others.items())
    first = [metric for metric in order(record.kind) if metric in metrics]
    listed = [[shown_as(record.kind, name), _value(metrics[name])] for name in dict.fromkeys((*first, *metrics))]
    parts.append(_table(["metric", "value"], listed))
    gates = [
        [name, metric, outcome.get("bound", ""), _value(outcome.get("value")), "yes" if outcome["passed"] else "no"]
        for name, one in records.items()
        for metric, outcome in one.gates.items()
    ]
    if gates:
        parts += ["Gates:", _table(["stage", "metric", "wanted", "value", "passed"], gates)]
    return "\n\n".join(parts)


def _limits(record: Record, records: dict[str, Record]) -> str:
    limits = [
        "It was trained on the data above and on nothing else beyond its base, whose own limits it keeps, and was not "
        "evaluated beyond the numbers above: not for safety, truth, bias, or other languages and tasks."
    ]
    if kinds.get(record.kind).makes == "reward":
        limits.append(
            "A score compares replies to the same prompt; scores of different prompts, and replies unlike those of the "
            "data, mean little."
        )
    if any(parent.makes == "reward" for parent in kinds.get(record.kind).parents):
        limits.append("It was trained to please a reward model, which is only a stand-in for what is wanted of it.")
    return " ".join(limits)


def _licence(license: dict[str, str], base: _Base) -> str:
    if "license" in license:
        named = license.get("license_name") or license["license"]
        return f"The base has the licence `{_code(named)}`; the data may have terms of their own."
    return f"That of the base is not known here: look it up for {base.words}. The data may have terms of their own."


def _table(columns: list[str], table: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_plain(str(cell)) for cell in row] for row in table)]
    lines[0] = [_plain(column) for column in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is, on one line, and without the folders of a path."""
    text = re.sub(r"(?<![\w.:/])/(?:[^\s/,:'\"]+/)+([^\s/,'\"]*)", r"\1", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|<>#&~]", r"\\\g<0>", text)


def _code(text: str) -> str:
    """Text to stand between backticks."""
    return "".join(character if character.isprintable() and character != "`" else " " for character in str(text))
