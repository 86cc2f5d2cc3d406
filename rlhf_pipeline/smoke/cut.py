"""What a smoke changes of a recipe: a tiny checkpoint, few rows, few steps and short sequences. No torch."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.recipe import BASE, TINY, Data, Recipe, Stage, outside
from rlhf_pipeline.recipe.data_files import matching
from rlhf_pipeline.recipe.schema import AIJudge, Source, Until
from rlhf_pipeline.recipe.watch import AUTO
from rlhf_pipeline.run.launch import environment
from rlhf_pipeline.rundir.layout import JOB, LOG, RESULT, read_json

OF_TINY = {"feedback": "thumbs", "candidates": "preferences"}  # what rows of the tiny world are called otherwise
ROWS = 64  # of each source
EVAL_ROWS = 8
STEPS = 2
BATCH = 2
REPLY = 16  # tokens that are sampled
PROMPT_LIMIT, COMPLETION_LIMIT = 128, 64  # tokens that are read: with a large vocabulary they are what takes time
MAX_LENGTH = 256  # more than both together
# Settings that need a GPU, or a compiler and minutes; each is left out where it is set.
GPU_ONLY = (
    "use_liger_kernel", "liger_kernel_config", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32",
    "activation_offloading",
)  # fmt: skip
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LAYER_KEYS = (
    "layers_to_transform", "layers_pattern", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern",
)  # fmt: skip


def cut_recipe(recipe: Recipe, folder: Path, tokenizer: str | None) -> tuple[Recipe, Recipe, dict[str, str], list[str]]:
    """The recipe as it is smoked.

    Args:
        recipe: as it was written.
        folder: where its model, its rows and its run directory shall be.
        tokenizer: see `smoke`.

    Returns:
        The recipe; the same with the original's lengths, batches and steps, by which its rows are checked; which path
        of both replaces which of the original; and what all of it leaves untested.
    """
    cut = recipe.model_copy(deep=True)
    notes: list[str] = []
    cut.output_dir, cut.keep_checkpoints, cut.report_to = str(folder / "runs"), False, []
    cut.launch = None
    for stage in cut.stages.values():
        stage.launch = None
    if any(recipe.processes(name) > 1 for name in recipe.stages):
        notes.append("`launch` is left out: one process runs each stage")
    cut.locate_rows()
    _replace_what_is_outside(cut, notes)
    sources = _sources(cut)
    (folder / "data").mkdir()
    rows = {name: first_rows(_raw(source), n) for name, (source, n, _) in sources.items()}
    on_hub = [name for name, found in rows.items() if found is None]
    model = folder / "model"
    answer = _ask_worker(
        folder / "prepare",
        {
            "model": recipe.model.model_dump(),
            "out": str(model),
            "tokenizer": tokenizer,
            "all_layers": any(_names_layers(lora) for lora in _loras(cut)),
            "n": ROWS,
            "hub": [
                {"source": _as_source(sources[name][0]), "file": str(folder / "data" / f"{name}.jsonl")}
                for name in on_hub
            ],
        },
    )
    # The hub's rows came out of the user's own cache; what follows must not go into it.
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache" / "datasets")
    origins = {str(model): recipe.model.path}
    _tell_of_model(cut, answer, tokenizer, notes)
    missing = dict(zip(on_hub, answer["rows"], strict=True))
    for name, (source, n, wanted) in sources.items():
        file, found, path = folder / "data" / f"{name}.jsonl", rows[name], source.path
        if missing.get(name):
            if wanted == "heldout":
                cut.evaluate = None
                _leave_out_what_is_watched(cut)
                notes.append(f"{path} is not available ({missing[name]}): the judge is not tested")
                continue
            with (TINY / "data" / f"{OF_TINY.get(wanted, wanted)}.jsonl").open(encoding="utf-8") as ours:
                file.write_text("".join(line for line, _ in zip(ours, range(n), strict=False)), encoding="utf-8")
            source.columns = {}
            notes.append(
                f"{path} is not available ({missing[name]}): rows of the tiny world are used instead; its "
                "shape and its `columns` are not tested"
            )
        elif found is not None:
            file = _write(found, file, source)
            first = matching(path)
            path = str(first[0]) if len(first) == 1 else path
        source.path, source.subset, source.revision, source.split = str(file), None, None, "train"
        origins[str(file)] = path
    _leave_out_what_needs_a_gpu(cut, notes)
    uncut = cut.model_copy(deep=True)
    _cut_settings(cut)
    return cut, uncut, origins, notes


def _leave_out_what_is_watched(recipe: Recipe) -> None:
    """Without the prompts of `evaluate`, nothing is measured while a policy trains."""
    for stage in recipe.stages.values():
        stage.watch = None
        if stage.trainer.get("target_kl") == AUTO:
            del stage.trainer["target_kl"]
            stage.trainer.pop("kl_horizon", None)


def _replace_what_is_outside(recipe: Recipe, notes: list[str]) -> None:
    """Start from the base in place of adapters that do not fit the tiny one, and train a reward model of that shape.

    In place of a judge behind an address, the base judges.
    """
    for holder, key in [(recipe.evaluate, "ai_judge"), *((stage, "judge") for stage in recipe.stages.values())]:
        judge: AIJudge | None = getattr(holder, key, None)
        if judge and judge.is_remote:
            notes.append(f"{judge.model} is not asked: the base judges in its place")
            of_base = {"model": BASE, "served_model": None, "api_key_env": None}
            setattr(holder, key, judge.model_copy(update=of_base))
    stages: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        if stage.facts.by_people:
            notes.append(f"nobody is asked for the labels of `{name}`: they are drawn at random")
        for init in filter(outside.is_one, stage.inits):
            notes.append(f"`{outside.label(init)}` is of another base: `{name}` starts from the bare one")
            others = [one for one in stage.inits if one not in (init, BASE)]
            stage.init = [BASE, *others] if others else BASE
        if outside.is_one(stage.reference):
            notes.append(
                f"`{outside.label(str(stage.reference))}` is of another base: `{name}` measures from the bare one"
            )
            stage.reference = BASE if stage.start != BASE else None
        for reward in [stage, *stage.rewards]:
            key = "reward" if reward is stage else "stage"
            value = getattr(reward, key)
            if outside.is_one(value):
                notes.append(f"`{outside.label(value)}` is of another base: a new reward model stands in for it")
                shape, rows = outside.lora(outside.config(value)), Data(path=str(TINY / "data" / "preferences.jsonl"))
                new = f"reward-{len(stages)}-of-{name}" if stage.rewards else f"reward-of-{name}"
                setattr(reward, key, new)
                stages[new] = Stage(kind="reward", init=BASE, data=rows, lora=shape)
        for reward in stage.rewards:
            if reward.model is not None:
                notes.append(f"`{reward.model}` is a model of its own: a new reward model stands in for it")
                new = f"reward-{len(stages)}-of-{name}"
                reward.name, reward.stage, reward.model, reward.revision = reward.label, new, None, None
                rows = Data(path=str(TINY / "data" / "preferences.jsonl"))
                stages[new] = Stage(kind="reward", init=BASE, data=rows, lora=recipe.lora)
        stages[name] = stage
    recipe.stages = stages


def _sources(recipe: Recipe) -> dict[str, tuple[Source, int, str]]:
    """Every source of rows by a name for its file, with how many rows are taken, and the tiny world's like."""
    data: list[tuple[str, Data, str]] = []
    for name, stage in recipe.stages.items():
        for key, spec in stage.tables.items():
            data.append((name if key == "data" else f"{name}-{key}", spec, stage.reads(key)))
    if recipe.evaluate:
        data.append(("evaluate", recipe.evaluate.data, "heldout"))
    found: dict[str, tuple[Source, int, str]] = {}
    for name, spec, wanted in data:
        for number, source in enumerate(spec.sources, 1):
            if source.stage is None:  # else a stage of the smoke run makes them
                found[f"{name}-{number}"] = (source, ROWS, wanted)
        if spec.eval_data and spec.eval_data.stage is None:
            found[f"{name}-eval"] = (spec.eval_data, EVAL_ROWS, wanted)
    return found


def _raw(source: Source) -> Source:
    """The source without `columns`: its rows keep their names, and the stage maps them as in a run."""
    return source.model_copy(update={"columns": {}})


def _as_source(source: Source) -> dict[str, Any]:
    return {name: getattr(source, name) for name in Source.model_fields}


def _write(rows: list[dict[str, Any]], file: Path, source: Source) -> Path:
    """Write rows down: as CSV, whose types a reader guesses, where they were CSV, else as JSON Lines."""
    if all(".csv" in one.suffixes for one in matching(source.files)):
        file = file.with_suffix(".csv")
        names = list(dict.fromkeys(name for row in rows for name in row))
        with file.open("w", encoding="utf-8", newline="") as lines:
            table = csv.DictWriter(lines, names)
            table.writeheader()
            table.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
    return file


def _loras(recipe: Recipe) -> list[dict[str, Any]]:
    return [recipe.lora, *(stage.lora for stage in recipe.stages.values())]


def _names_layers(lora: dict[str, Any]) -> bool:
    """Whether a LoRA tells layers apart by their numbers, so that the checkpoint needs all of them."""
    named = [lora.get(key) for key in ("target_modules", *LAYER_KEYS) if key != "layers_to_transform"]
    return lora.get("layers_to_transform") is not None or bool(re.search(r"[.(\[|]\d", repr(named)))


def _ask_worker(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Have the tiny checkpoint made and hub datasets read, where torch may be imported.

    Raises:
        InputError: model or data cannot be used.
        RunError: it failed otherwise.
    """
    folder.mkdir()
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    log = folder / LOG
    with log.open("w") as output:
        command = [sys.executable, "-P", "-m", "rlhf_pipeline.smoke.worker", str(folder / JOB)]
        code = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    result = read_json(folder / RESULT)
    if code == 2 and result is not None:
        raise InputError(result["message"], place=result["place"], hint=result["hint"])
    if code or result is None:
        tail = "".join(f"\n  | {line[:200]}" for line in log.read_text(errors="replace").splitlines()[-8:])
        raise RunError(f"no tiny checkpoint of the model could be made{tail}")
    shutil.rmtree(folder)
    return result


def _tell_of_model(recipe: Recipe, answer: dict[str, Any], tokenizer: str | None, notes: list[str]) -> None:
    """Put the tiny checkpoint in the model's place, and note what that leaves untested."""
    path, spec = recipe.model.path, recipe.model
    if answer["missing"]:
        words = (
            "the shipped tokenizer" if str(TINY) in answer["tokenizer"] else f"the tokenizer of {answer['tokenizer']}"
        )
        own = "its own architecture is" if answer["tokenizer"] == path else "its own architecture and tokenizer are"
        notes.append(
            f"{path} is not available ({answer['missing']}): {words} and a Llama are used instead; {own} not tested"
        )
        changed = [_fit_llama(lora) for lora in _loras(recipe)]
        if any(changed):
            notes.append("`lora` names modules of its own architecture: `all-linear` is used instead")
    elif tokenizer:
        notes.append(f"the tokenizer of {tokenizer} is used instead; that of {path} is not tested")
    notes += [f"{path}: {note}" for note in answer["notes"]]
    if answer["missing"] or tokenizer:
        for stage in recipe.stages.values():
            if stage.trainer.pop("stop_token_id", None) is not None:
                stage.trainer["stop_token"] = "eos"
                notes.append("`stop_token_id` belongs to the model's own tokenizer: EOS is used instead")
        if spec.chat_template_kwargs and spec.chat_template is None:
            spec.chat_template_kwargs = {}
            notes.append("`chat_template_kwargs` belong to the model's own chat template: they are left out")
    if spec.dtype == "float16":
        spec.dtype = "bfloat16"
        notes.append("`dtype: float16` needs a GPU: bfloat16 is used instead")
    if spec.needs_kernel:
        notes.append(f"`attention: {spec.attention}` needs a GPU: `auto` is used instead")
        spec.attention = "auto"
    spec.path, spec.revision, spec.trust_remote_code = str(Path(recipe.output_dir).with_name("model")), None, False


def _fit_llama(lora: dict[str, Any]) -> bool:
    """Change a LoRA where it names modules that a Llama does not have; whether that was so."""
    before, targets = dict(lora), lora.get("target_modules")
    if isinstance(targets, list) and not LLAMA_LAYERS.issuperset(targets):
        lora["target_modules"] = [name for name in targets if name in LLAMA_LAYERS] or "all-linear"
    elif isinstance(targets, str):
        lora["target_modules"] = "all-linear"
    for key in LAYER_KEYS:
        lora.pop(key, None)
    return lora != before


def _leave_out_what_needs_a_gpu(recipe: Recipe, notes: list[str]) -> None:
    left_out: dict[str, None] = {}
    for stage in recipe.stages.values():
        for key in GPU_ONLY:
            if stage.trainer.pop(key, False):
                left_out[key] = None
    if left_out:
        notes.append(f"{', '.join(f'`{key}`' for key in left_out)}: left out, since a CPU does not use them")


def _cut_settings(recipe: Recipe) -> None:
    """Few steps, small batches and short sequences in every stage."""
    for stage in recipe.stages.values():
        kind = kinds.get(stage.kind)
        if not kind.trains:
            _cut_rows(stage)
        elif kind.own_loop:
            _cut_ppo(stage.trainer)
        else:
            _cut_trainer(stage.trainer, stage.data.holds_out)
            if kind.samples:
                _cut_groups(stage.trainer)
        for key, data in stage.tables.items():
            _cut_data(data, replies="max_completion_length" not in kind.unread and stage.reads(key) != "prompts")
    if recipe.evaluate:
        _cut_data(recipe.evaluate.data, replies=False)
        recipe.evaluate.n = min(recipe.evaluate.n, BATCH)
        recipe.evaluate.samples = min(recipe.evaluate.samples, 2)
        recipe.evaluate.max_new_tokens = min(recipe.evaluate.max_new_tokens, REPLY)


def _cut_data(data: Data, replies: bool) -> None:
    """Short prompts and replies; where that cuts them shorter than the recipe does, none is dropped for it."""
    before = data.max_prompt_length, data.max_completion_length
    data.max_prompt_length = min(data.max_prompt_length or PROMPT_LIMIT, PROMPT_LIMIT)
    if replies:
        data.max_completion_length = min(data.max_completion_length or COMPLETION_LIMIT, COMPLETION_LIMIT)
    if before != (data.max_prompt_length, data.max_completion_length):
        data.too_long = "cut"


def _cut_rows(stage: Stage) -> None:
    """Few short replies, a pair of each prompt, and one pass."""
    if stage.sampling:
        stage.sampling.max_new_tokens = min(stage.sampling.max_new_tokens, REPLY)
    stage.n = stage.n and min(stage.n, 2)
    stage.passes = stage.passes and 1
    if stage.facts.by_people:
        stage.until, stage.people = Until(per_item=1), None
    if stage.judge:
        stage.pairs, stage.ties = 1, "keep"
        if stage.judge.is_local:
            stage.judge.min_probability = 0.0  # random weights give the two words next to nothing


def _cut_common(trainer: dict[str, Any]) -> None:
    """Log every step; evaluate, and write a checkpoint, once, after the last one, where the recipe does so at all."""
    trainer |= {"logging_strategy": "steps", "logging_steps": 1}
    trainer["per_device_train_batch_size"] = min(trainer.get("per_device_train_batch_size", BATCH), BATCH)
    if trainer.get("warmup_steps", 0) > 1:
        trainer["warmup_steps"] = 1
    if trainer.get("save_strategy") != "no":
        trainer |= {"save_strategy": "steps", "save_steps": STEPS}
    trainer.pop("eval_delay", None)
    if trainer.get("eval_strategy", "steps" if "eval_steps" in trainer else "no") != "no":
        trainer |= {"eval_strategy": "steps", "eval_steps": STEPS}
        trainer["per_device_eval_batch_size"] = min(trainer.get("per_device_eval_batch_size", BATCH), BATCH)


def _cut_trainer(trainer: dict[str, Any], evaluates: bool) -> None:
    """Two steps of a stage that TRL trains."""
    _cut_common(trainer)
    trainer |= {"max_steps": STEPS, "gradient_accumulation_steps": 1}
    if evaluates:
        trainer["per_device_eval_batch_size"] = min(trainer.get("per_device_eval_batch_size", BATCH), BATCH)
    if trainer.get("max_length") or trainer.get("packing") or trainer.get("eval_packing"):
        trainer["max_length"] = min(trainer.get("max_length") or MAX_LENGTH, MAX_LENGTH)
    trainer.pop("dataset_num_proc", None)


def _cut_groups(trainer: dict[str, Any]) -> None:
    """Groups of two short replies; as many steps on each batch of them as the recipe has, up to two."""
    for key in ("generation_batch_size", "num_generations_eval"):
        trainer.pop(key, None)
    trainer |= {
        "num_generations": BATCH,
        "per_device_train_batch_size": BATCH,
        "max_completion_length": min(trainer.get("max_completion_length", REPLY), REPLY),
        "steps_per_generation": 1,
        "num_iterations": min(trainer.get("num_iterations", 1), 2),
    }
    if "per_device_eval_batch_size" in trainer:
        trainer["per_device_eval_batch_size"] = BATCH


def _cut_ppo(trainer: dict[str, Any]) -> None:
    """Two updates of PPO, of as few episodes as its rules of divisibility allow."""
    _cut_common(trainer)
    mini_batches = min(trainer.get("num_mini_batches", 1), 2)
    micro_batches = -(-8 // trainer["per_device_train_batch_size"]) if trainer.get("whiten_rewards") else 1
    for key in ("max_steps", "num_train_epochs"):
        trainer.pop(key, None)
    trainer |= {
        "num_mini_batches": mini_batches,
        "gradient_accumulation_steps": mini_batches * micro_batches,
        "total_episodes": STEPS * mini_batches * micro_batches * trainer["per_device_train_batch_size"],
        "num_ppo_epochs": min(trainer.get("num_ppo_epochs", 4), 2),
        "response_length": min(trainer.get("response_length", REPLY), REPLY),
        "local_rollout_forward_batch_size": min(trainer.get("local_rollout_forward_batch_size", BATCH), BATCH),
    }
    if trainer.get("value_warmup_updates"):
        trainer["value_warmup_updates"] = 1
