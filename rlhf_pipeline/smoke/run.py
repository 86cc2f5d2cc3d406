"""A recipe proved without a GPU: its stages on a tiny checkpoint and a few rows, in a temporary directory. No torch.

What is changed of the recipe stands in `_cut`, `_cut_data` and the functions that they call; all else is as in a run.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_pipeline import kinds, plan
from rlhf_pipeline.data.peek import first_rows
from rlhf_pipeline.errors import InputError, InputErrors, RunError
from rlhf_pipeline.recipe import TINY, Data, Recipe
from rlhf_pipeline.recipe.data_files import matching
from rlhf_pipeline.recipe.schema import Source
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import environment
from rlhf_pipeline.rundir import jsonl
from rlhf_pipeline.rundir.headline import headline, series
from rlhf_pipeline.rundir.layout import JOB, LOG, METRICS, RESULT, RunDirectory, read_json

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

Say = Callable[[str], None]


@dataclass
class Smoked:
    """What became of one stage.

    Attributes:
        state: `ok`, `failed` or `not run`.
        seconds: how long it took, if it ran.
        metric: the name of the number that is shown.
        first: that number at the first step; None where there is none.
        last: the same at the last step.
        error: what happened, if it failed.
    """

    name: str
    kind: str
    state: str = "not run"
    seconds: float | None = None
    metric: str = "loss"
    first: float | None = None
    last: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.name:<7}", self.state]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        if self.state == "ok" and self.first is not None and self.last is not None:
            parts.append(f"{self.metric} {self.first:.4g} → {self.last:.4g}")
        return "  ".join([*parts, *([self.error] if self.error else [])])


@dataclass
class Report:
    """What a smoke found.

    Attributes:
        stages: those of the recipe, in its order.
        notes: what was not tested, or stood in for something else.
        seconds: how long all of it took.
        failure: the whole message of what failed.
        hint: what to do about it.
    """

    stages: list[Smoked]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str | None = None
    hint: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every stage went through."""
        return self.failure is None

    def as_json(self) -> dict[str, Any]:
        """The report as `smoke --json` prints it."""
        return {"ok": self.ok, **asdict(self)}


def smoke(recipe: Recipe, *, tokenizer: str | None = None, keep: Path | None = None, say: Say = print) -> Report:
    """Run every stage of a recipe for two steps on a tiny checkpoint of its model's architecture.

    Args:
        recipe: from `recipe.load`; it is not changed.
        tokenizer: a folder or hub id with the tokenizer to use instead of the model's own.
        keep: a new or empty folder to work in, which stays; by default a temporary one, which does not.
        say: takes one line at a time, about what is going on.

    Raises:
        InputError: something is wrong with the recipe, its model or the first rows of its data.
        Interrupted: it was asked to stop, and has.
    """
    began = time.perf_counter()
    plan.shapes(recipe)  # what the first rows show needs no model
    with _folder(keep) as folder, _environment(folder):
        cut, origins, notes = _cut(recipe, folder, tokenizer)
        for note in notes:
            say(f"note: {note}")
        report = Report([Smoked(name, stage.kind) for name, stage in recipe.stages.items()], notes)
        try:
            runner.run(
                cut, ignore_gates=True, compare=False, say=lambda line: None if _of_the_real_run(line) else say(line)
            )
        except InputError as error:
            raise _in_their_words(error, origins) from None
        except RunError as error:
            lines = error.message.splitlines()
            kept = [line for line in lines if keep or not line.startswith("  the whole log: ")]
            report.failure = _replaced("\n".join(kept), origins)
            report.hint = None if keep else "`--keep FOLDER` keeps the whole log, and all else that it made"
        for stage in report.stages:
            _see(stage, RunDirectory(cut.run), origins)
    report.seconds = round(time.perf_counter() - began, 1)
    return report


def _of_the_real_run(line: str) -> bool:
    """Whether a line is about gates, or about what all rows together are like, of which there are only a few here."""
    return line.startswith("warning: ") or "gates ignored" in line


def _see(stage: Smoked, directory: RunDirectory, origins: dict[str, str]) -> None:
    """Fill in what a run directory says of a stage."""
    record = directory.record(stage.name)
    if record is None or record.state == "running":
        return
    stage.state = "ok" if record.state == "done" else "failed"
    stage.seconds = round(record.wall_s or 0.0, 1)
    if record.error:
        said = record.error.removeprefix(f"stage `{stage.name}` failed: ")
        stage.error = _replaced(said, origins)
    logged = series(stage.kind, jsonl.rows(directory.stage(stage.name) / METRICS))
    numbers = headline(stage.kind, record.metrics, logged)
    for number in [number for number in numbers if number.before is not None][:1]:
        stage.metric, stage.first, stage.last = number.name, number.before, number.after


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where a smoke may write; what it finds there on an end by SIGTERM is removed too.

    Raises:
        InputError: the folder to keep holds something already.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise InputError(f"{keep} exists already", place="--keep", hint="name a new or an empty folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="rlhf-smoke-") as folder:
            yield Path(folder).resolve()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Have our processes use no GPU, which others may need, and keep what they remember in the smoke's folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = {
        "HF_HOME": os.environ.get("HF_HOME") or str(caches / "huggingface"),  # else it would follow the next one
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # so little work is only slower on several
    }
    before = {name: os.environ.get(name) for name in (*own, "HF_DATASETS_CACHE")}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _in_their_words(error: InputError, origins: dict[str, str]) -> InputError:
    """An error with the paths of what stands in replaced by those of the recipe."""
    ours = [
        InputError(
            _replaced(one.message, origins),
            place=one.place and _replaced(one.place, origins),
            hint=one.hint and _replaced(one.hint, origins),
        )
        for one in error.all
    ]
    return ours[0] if len(ours) == 1 else InputErrors(ours)


def _replaced(text: str, origins: dict[str, str]) -> str:
    for ours, theirs in origins.items():
        text = text.replace(ours, theirs)
    return text


def _cut(recipe: Recipe, folder: Path, tokenizer: str | None) -> tuple[Recipe, dict[str, str], list[str]]:
    """The recipe as it is smoked.

    Args:
        recipe: as it was written.
        folder: where its model, its rows and its run directory shall be.
        tokenizer: see `smoke`.

    Returns:
        The recipe; which path of it stands in for which of the original; and what that leaves untested.
    """
    cut = recipe.model_copy(deep=True)
    notes: list[str] = []
    cut.output_dir, cut.keep_checkpoints, cut.report_to = str(folder / "runs"), False, []
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
                notes.append(f"{path} cannot be had ({missing[name]}): the judge is not tested")
                continue
            with (TINY / "data" / f"{wanted}.jsonl").open(encoding="utf-8") as ours:
                file.write_text("".join(line for line, _ in zip(ours, range(n), strict=False)), encoding="utf-8")
            source.columns = {}
            notes.append(
                f"{path} cannot be had ({missing[name]}): rows of the tiny world stand in; its shape and its "
                "`columns` are not tested"
            )
        elif found is not None:
            file = _write(found, file, source)
            first = matching(path)
            path = str(first[0]) if len(first) == 1 else path
        source.path, source.subset, source.revision, source.split = str(file), None, None, "train"
        origins[str(file)] = path
    _cut_settings(cut, notes)
    return cut, origins, notes


def _sources(recipe: Recipe) -> dict[str, tuple[Source, int, str]]:
    """Every source of rows by a name for its file, with how many rows are taken, and the tiny world's like."""
    data: list[tuple[str, Data, str]] = []
    for name, stage in recipe.stages.items():
        kind = kinds.get(stage.kind)
        data.append((name, stage.data, kind.reads))
        if stage.ptx_data:
            data.append((f"{name}-ptx", stage.ptx_data, kinds.get(kind.further_data["ptx_data"]).reads))
    if recipe.evaluate:
        data.append(("evaluate", recipe.evaluate.data, "heldout"))
    found: dict[str, tuple[Source, int, str]] = {}
    for name, spec, wanted in data:
        for number, source in enumerate(spec.sources, 1):
            found[f"{name}-{number}"] = (source, ROWS, wanted)
        if spec.eval_data:
            found[f"{name}-eval"] = (spec.eval_data, EVAL_ROWS, wanted)
    return found


def _raw(source: Source) -> Source:
    """The source without `columns`: its rows keep their names, and the stage maps them as in a run."""
    return source.model_copy(update={"columns": {}})


def _as_source(source: Source) -> dict[str, Any]:
    return {name: getattr(source, name) for name in Source.model_fields}


def _write(rows: list[dict[str, Any]], file: Path, source: Source) -> Path:
    """Write rows down: as CSV, whose types a reader guesses, where they were CSV, else as JSON Lines."""
    if all(".csv" in one.suffixes for one in matching(source.path)):
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
    result: dict[str, Any] = read_json(folder / RESULT) or {}
    if code == 2 and result:
        raise InputError(result["message"], place=result["place"], hint=result["hint"])
    if code:
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
        notes.append(f"{path} cannot be had ({answer['missing']}): {words} and a Llama stand in; {own} not tested")
        changed = [_fit_llama(lora) for lora in _loras(recipe)]
        if any(changed):
            notes.append("`lora` names modules of its own architecture: `all-linear` stands in")
    elif tokenizer:
        notes.append(f"the tokenizer of {tokenizer} stands in; that of {path} is not tested")
    notes += [f"{path}: {note}" for note in answer["notes"]]
    if answer["missing"] or tokenizer:
        for stage in recipe.stages.values():
            if stage.trainer.pop("stop_token_id", None) is not None:
                stage.trainer["stop_token"] = "eos"
                notes.append("`stop_token_id` is of its own tokenizer: EOS stands in")
    if spec.dtype == "float16":
        spec.dtype = "bfloat16"
        notes.append("`dtype: float16` needs a GPU: bfloat16 stands in")
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


def _cut_settings(recipe: Recipe, notes: list[str]) -> None:
    """Few steps, small batches and short sequences in every stage."""
    left_out: dict[str, None] = {}
    for stage in recipe.stages.values():
        for key in GPU_ONLY:
            if stage.trainer.pop(key, False):
                left_out[key] = None
        kind = kinds.get(stage.kind)
        if kind.own_loop:
            _cut_ppo(stage.trainer)
        else:
            _cut_trainer(stage.trainer, stage.data.holds_out)
        _cut_data(stage.data, replies=kind.reads != "prompts")
        if stage.ptx_data:
            _cut_data(stage.ptx_data, replies=True)
    if left_out:
        notes.append(f"{', '.join(f'`{key}`' for key in left_out)}: left out, since a CPU does without")
    if recipe.evaluate:
        _cut_data(recipe.evaluate.data, replies=False)
        recipe.evaluate.n = min(recipe.evaluate.n, BATCH)
        recipe.evaluate.max_new_tokens = min(recipe.evaluate.max_new_tokens, REPLY)


def _cut_data(data: Data, replies: bool) -> None:
    """Short prompts and replies; where that cuts them shorter than the recipe does, none is dropped for it."""
    before = data.max_prompt_length, data.max_completion_length
    data.max_prompt_length = min(data.max_prompt_length or PROMPT_LIMIT, PROMPT_LIMIT)
    if replies:
        data.max_completion_length = min(data.max_completion_length or COMPLETION_LIMIT, COMPLETION_LIMIT)
    if before != (data.max_prompt_length, data.max_completion_length):
        data.too_long = "cut"


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
    """Two steps of SFT, reward modelling or DPO."""
    _cut_common(trainer)
    trainer |= {"max_steps": STEPS, "gradient_accumulation_steps": 1}
    if evaluates:
        trainer["per_device_eval_batch_size"] = min(trainer.get("per_device_eval_batch_size", BATCH), BATCH)
    if trainer.get("max_length") or trainer.get("packing") or trainer.get("eval_packing"):
        trainer["max_length"] = min(trainer.get("max_length") or MAX_LENGTH, MAX_LENGTH)
    trainer.pop("dataset_num_proc", None)


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
