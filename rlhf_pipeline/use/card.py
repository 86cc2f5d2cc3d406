"""The model card of an exported stage, from the run directory alone: the facts for card.md.jinja. No torch."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import TINY, Recipe, outside
from rlhf_pipeline.recipe.data_files import is_local
from rlhf_pipeline.recipe.schema import BASE
from rlhf_pipeline.rundir.headline import order, rests_on, shown_as
from rlhf_pipeline.rundir.jsonl import rows
from rlhf_pipeline.rundir.layout import MEMBER, SAMPLES, RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.rundir.strict_json import is_number
from rlhf_pipeline.rundir.words import one_line

# Of the machine or of the moment, not of the model.
BOOKKEEPING = re.compile(r"seconds$|^eps$|^lr|^learning_rate$|^episode$|num_tokens$|^total_flos$")
SETTINGS = (
    "trainer.",
    "members",
    "bootstrap",
    "rewards.",
    "lora.",
    "model.quantization",
    "model.dtype",
    "model.attention",
    "seed",
)  # in this order
Records = dict[str, Record]


def text(
    run: Path, stage: str, recipe: Recipe, *, license: dict[str, str], merged: dict[str, Any] | None, own_class: bool,
    name: str, members: int = 1,
) -> str:  # fmt: skip
    """The card, as Markdown with the head that the hub reads.

    Args:
        run: the run directory.
        stage: the stage that is exported.
        recipe: the run's.
        license: `license`, `license_name` and `license_link` of the base, as far as they are known.
        merged: how it was merged, as `export --json` says it; None where the adapter is exported.
        own_class: whether its class comes with it, as Transformers has none.
        name: what the model is loaded by: a hub id or a folder.
        members: how many members an ensemble has.
    """
    directory = RunDirectory(run)
    records = {one: directory.record(one) or Record() for one in _lineage(directory, stage)}
    record, inputs = records[stage], {name: one.inputs for name, one in records.items()}
    base = Path(recipe.model.path)  # a path of the machine that trained, or a hub id
    hub_id = None if base.is_absolute() else recipe.model.path
    metrics = {name: one.metrics for name, one in records.items()}
    dtype = merged["dtype"] if merged else None
    kind, judging = kinds.get(record.kind), record.judging or {}
    logged = [name for name in metrics[stage] if not BOOKKEEPING.search(name)]
    listed = dict.fromkeys((*(name for name in order(kind.name) if name in logged), *logged))
    settings = dict.fromkeys(
        key for prefix in SETTINGS for one in inputs.values() for key in one if key.startswith(prefix)
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "code": _code, "value": _value, "quoted": json.dumps}
    environment.filters["capitalised"] = lambda sentence: sentence[:1].upper() + sentence[1:]
    card = environment.get_template("card.md.jinja").render(
        head=_head(recipe, records, record, license, dtype, hub_id),
        name=name,
        shell=json.dumps(name) if re.search(r"[^\w./-]", name) else name,
        recipe=recipe,
        record=record,
        records=list(records),
        method=kind.method,
        reward=kind.makes == "reward",
        by_reward=any(parent.makes == "reward" for parent in kind.parents),
        dtype=dtype,
        own_class=own_class,
        members=members,
        folder_of_members=MEMBER,
        dequantized=merged is not None and merged["base"] == "dequantized",
        rounding=said_of_rounding(stage, merged) if merged else "",
        merging=_without_folders(said_of_merging(merged)) if merged else "",
        hub_id=hub_id,
        folder=base.name,
        tiny=base.is_relative_to(TINY),
        license=license,
        chat=_prompts_are_chats(run, recipe, records),
        rank=inputs[stage].get("lora.r", 16),
        origins=_origins(records),
        sources=_sources(records),
        settings=[[key, *(_value(one.get(key)) for one in inputs.values())] for key in settings],
        metrics=[[shown_as(kind.name, name), _number(metrics[stage], name)] for name in listed],
        judging=judging | {"prompts": str(judging.get("data", "")).rpartition("@")[0]},
        judged=bool(judging) and "judge_mean" in metrics[stage],
        judged_before=[
            (name, one["judge_mean"]) for name, one in metrics.items() if name != stage and "judge_mean" in one
        ],
        gates=[
            [name, metric, gate.get("bound", ""), _value(gate.get("value")), "yes" if gate["passed"] else "no"]
            for name, one in records.items()
            for metric, gate in one.gates.items()
        ],
        versions=record.versions,
    )
    return redact(card)


def said_of_rounding(stage: str, merged: dict[str, Any]) -> str:
    """In which dtype a stage's model was merged, and what rounding to 16 bits keeps of what training changed.

    Args:
        stage: the stage.
        merged: what `export --json` has under that name.
    """
    dtype, tried, kept = merged["dtype"], merged["tried"], merged["kept"]
    if kept is None:
        return f"the merged weights are in {dtype}"
    share = f"{100 * kept:.3g} % of what `{stage}` changed since `{merged['since']}`"
    if dtype != tried:
        return f"the merged weights are in {dtype}, and to be loaded so: in {tried} they would keep {share}"
    return f"the merged weights are in {dtype}, which keeps {share}"


def said_of_merging(merged: dict[str, Any]) -> str:
    """What merging changed on real prompts, in a sentence.

    Args:
        merged: what `export --json` has under that name.
    """
    found = merged["measured"]
    if found is None:
        return f"what merging changed was not measured: {merged['not_measured']}"
    n, prompts = found["n"], f"`{found['prompts']}`"
    if found["equal_replies"] is not None:
        training = f"(what it changed since `{merged['since']}`: {_value(found['kl_of_training'])})"
        return (
            f"on {n} prompts of {prompts}, merging changed {_value(found['kl'])} nats of KL per token {training}, and "
            f"{found['equal_replies']} of {n} greedy replies stayed the same"
        )
    return (
        f"on {n} pairs of {prompts}, merging changed scores by {_value(found['score_difference'])} on average and "
        f"{_value(found['score_difference_max'])} at most (their standard deviation: {_value(found['score_spread'])}), "
        f"and {found['same_order']} of {n} pairs stayed in the same order"
    )


def _lineage(directory: RunDirectory, stage: str) -> list[str]:
    """A stage's ancestors and itself, parents first."""
    found: list[str] = []

    def add(name: str | None) -> None:
        record = directory.record(name) if name and name != BASE else None
        if name and record and name not in found:
            for parent in record.parents.values():
                add(parent)
            found.append(name)

    add(stage)
    return found


def _head(
    recipe: Recipe,
    records: Records,
    record: Record,
    license: dict[str, str],
    dtype: str | None,
    hub_id: str | None,
) -> str:
    """What the hub reads, as YAML."""
    datasets = dict.fromkeys(
        source.path
        for name in records
        if name in recipe.stages
        for source in recipe.stages[name].sources
        if source.stage is None and not is_local(source.path)
    )
    kind = kinds.get(record.kind)
    reward = kind.makes == "reward"
    head = ModelCardData(
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        base_model=hub_id,
        base_model_relation=("finetune" if dtype else "adapter") if hub_id else None,
        library_name="transformers" if dtype else "peft",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["rlhf-pipeline", "trl", "reward-model" if reward else kind.name, *([] if dtype else ["lora"])],
        datasets=list(datasets) or None,
    )
    return head.to_yaml()


def _prompts_are_chats(run: Path, recipe: Recipe, records: Records) -> bool:
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


def _origins(records: Records) -> Iterator[list[Any]]:
    """Stage, kind, what it was made from, fingerprint and digest of its weights; the base first."""
    yield ["base", "", "", next(iter(records.values())).inputs["model"], ""]
    for name, record in records.items():
        by_role = record.parents
        rewards = [outside.said(by_role.pop(role)) for role in list(by_role) if role.startswith("reward")]
        origin = ", ".join(outside.said_of_parents(by_role)) or BASE
        rewards += [
            str(value).partition("@")[0]
            for key, value in record.inputs.items()
            if re.fullmatch(r"rewards\.\d+\.(function|model)", key)
        ]
        origin += f", scored by {', '.join(rewards)}" if rewards else ""
        yield [name, record.kind, origin, record.fingerprint or "", record.weights or ""]


def _sources(records: Records) -> Iterator[list[str]]:
    """Stage, key, where the rows are from, and the digest or commit of that."""
    for name, record in records.items():
        for key in ("data", "data.eval_data", "ptx_data", "human"):
            for source in record.data(key):
                path, at, digest = source.rpartition("@")
                yield [name, key, path if at else source, digest if at else ""]


def _number(metrics: dict[str, Any], name: str) -> str:
    """A final number with what it rests on, where that is known."""
    value = metrics[name]
    return _value(value) + (rests_on(name, value, metrics) if is_number(value) else "")


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(text: Any) -> str:
    """Text as Markdown that shows it as it is, on one line, and without the folders of a path."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|<>#&~]", r"\\\g<0>", one_line(_without_folders(str(text))))


def _without_folders(text: str) -> str:
    return re.sub(r"(?<![\w.:/])/(?:[^\s/,:'\"]+/)+([^\s/,'\"]*)", r"\1", text)


def _code(text: str) -> str:
    """Text for between backticks."""
    return one_line(str(text)).replace("`", " ")
