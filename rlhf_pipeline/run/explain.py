"""What went wrong in a stage, in one sentence, and what to do about it. No torch."""

import errno
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

from rlhf_pipeline.errors import RunError
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rundir.layout import ADAPTER, TRAINED, WORK
from rlhf_pipeline.user_code import FunctionError

SAFE = "stages that are done stay usable; the same command resumes from here"
TRAINING_IS_KEPT = "the trained adapter is kept; the same command resumes with judging it"
RETRAINS = "after that change the stage is retrained from the start; stages that are done stay usable"
_SAY_WHAT_TO_CHANGE = ("optimizer steps in a row had gradients", "over the `kl_budget`")  # PPO's own errors
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# How PyTorch and safetensors, whose writers are not Python's, say that they could not write; PyTorch does not say why.
_FAILED_WRITERS = ("PytorchStreamWriter", "inline_container", "Error while serializing")
_ROOM = 2**20  # less free space than this, in bytes, is a full disk


def explain(
    error: BaseException, recipe: Recipe, name: str | None, folder: Path, saving: str | None = None
) -> tuple[str, str]:
    """A message and a hint for what ended a stage; see `recognise`."""
    safe = TRAINING_IS_KEPT if _is_trained(recipe, name) else SAFE
    return recognise(error, recipe, name, folder, saving) or (f"{type(error).__name__}: {_first_line(error)}", safe)


def recognise(
    error: BaseException, recipe: Recipe, name: str | None, folder: Path, saving: str | None = None
) -> tuple[str, str] | None:
    """A message and a hint for something that is known to happen to runs; None for anything else.

    Args:
        error: what was raised, in a worker or in the runner.
        recipe: the recipe.
        name: the stage; None where none was at work.
        folder: where it was at work, on the disk that may be full.
        saving: what saves memory by the forecast, in words; see `memory_hint`.
    """
    safe = TRAINING_IS_KEPT if _is_trained(recipe, name) else SAFE
    text, kind = _first_line(error), type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if _is_of_memory(error):
        where = "the GPU's memory" if is_of_gpu_memory(error) else "the machine's memory"
        return f"{where} ran out ({text})", memory_hint(recipe, name, saving) if name else SAFE
    if kind == "DivergedError":
        return text, f"lower `learning_rate`, set `max_grad_norm`, or look for odd rows in the data; {RETRAINS}"
    if isinstance(error, RunError):
        return error.message, f"{error.hint}; {safe}" if error.hint else safe
    if isinstance(error, FunctionError):
        if error.place.startswith("evaluate."):
            return text, f"correct the function that `{error.place}` names; {safe}"
        return text, (
            f"correct the function that `{error.place}` names: the stage is then retrained from the start, since "
            f"another reward makes another policy; as it is, {safe}"
        )
    if kind == "ClassifierError":
        return text, f"set `model.dtype: float32` where 16 bits are too few for it, or name another one; {RETRAINS}"
    if any(words in text for words in _SAY_WHAT_TO_CHANGE):
        return text, RETRAINS
    if number in _NO_ROOM or any(words in text for words in _FAILED_WRITERS):
        return explain_no_room(recipe, folder, text)
    if number in _READ_ONLY:
        place = Path(error.filename or folder) if isinstance(error, OSError) else folder
        return f"{place if place.exists() else place.parent} cannot be written to ({text})", (
            f"make it writable, or set `output_dir` to a folder that is; {safe}"
        )
    if number in _TOO_MANY_FILES:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many files are open at once, and the limit is {limit}", f"raise it: `ulimit -n 4096`; {safe}"
    if name is None and number in (errno.ENOENT, errno.ENOTDIR) and _is_above(error, recipe.run):
        return (
            f"the run directory {recipe.run} cannot be made ({text})",
            "set `output_dir` to a folder that can be made",
        )
    if number == errno.ENOENT and "temporary directory" in text:
        return "there is no folder to write temporary files to", f"set TMPDIR to one that has room; {safe}"
    return None


def explain_signal(number: int, memory_ran_out: bool, recipe: Recipe, name: str | None) -> tuple[str, str]:
    """A message and a hint for a worker that a signal ended.

    Args:
        number: the signal's.
        memory_ran_out: whether the kernel has killed a process for memory meanwhile.
        recipe: the recipe.
        name: the stage; None for the check before the first one.
    """
    if number != signal.SIGKILL:
        return f"its worker was ended by signal {number} ({signal.strsignal(number)})", SAFE
    if not memory_ran_out:
        return "its worker was ended by signal 9, from outside", SAFE
    hint = memory_hint(recipe, name) if name else SAFE
    return "the kernel killed its worker, because the machine's memory ran out", hint


def explain_vanished(code: int, last_line: str | None, recipe: Recipe, name: str | None) -> tuple[str, str]:
    """A message and a hint for a worker that ended by itself and left no result, whatever its exit code.

    Args:
        code: its exit code.
        last_line: of its log, if there is one.
        recipe: the recipe.
        name: the stage; None for the check before the first one, and for the comparison.
    """
    said = f"; the last line of its log: {last_line}" if last_line else ""
    safe = TRAINING_IS_KEPT if _is_trained(recipe, name) else SAFE
    return f"its worker ended without a result, with exit code {code}{said}", (
        f"a judge that calls `os._exit`, or a library that does, ends its worker so; {safe}"
    )


def explain_no_room(recipe: Recipe, folder: Path, said: str) -> tuple[str, str]:
    """A message and a hint for something that could not be written whole.

    Args:
        recipe: the recipe.
        folder: where it was to be.
        said: by the library or the system.
    """
    full, limit = full_disk(folder), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if full is None and limit != resource.RLIM_INFINITY:
        return f"a file reached the limit of {limit} bytes for one file ({said})", (
            f"raise it: `ulimit -f unlimited`; {SAFE}"
        )
    asides = any(recipe.run.glob("*.[0-9]*-[0-9]*"))
    free = f"`rlhf-pipeline prune {recipe.run}` removes former results" if asides else "free some space there"
    return f"the disk of {full or folder} is full ({said})", f"{free}; {SAFE}"


def full_disk(folder: Path) -> Path | None:
    """`folder`, or else the folder for temporary files, if its disk is full."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        places = (there, Path(tempfile.gettempdir()))
        return next((place for place in places if shutil.disk_usage(place).free < _ROOM), None)
    except OSError:
        return None


def memory_hint(recipe: Recipe, name: str, saving: str | None = None) -> str:
    """Which settings to lower, the cheapest first: those that cost only time, then precision, then training text.

    Those that cannot be lowered any more are left out; so is what training takes, once the stage is trained and only
    its judging is to be done.

    Args:
        recipe: the recipe.
        name: the stage.
        saving: the change that the forecast would make first, with what it saves; None where nobody knows.
    """
    stage = recipe.stages[name]
    trainer, kind = stage.trainer, stage.facts
    judging = []
    if recipe.evaluate is not None and kind.is_policy:
        if recipe.evaluate.batch_size > 1:
            judging.append("a lower `evaluate.batch_size` (costs time only)")
        if recipe.evaluate.max_new_tokens > 1:
            judging.append("a lower `evaluate.max_new_tokens`")
    if _is_trained(recipe, name):
        return f"try, in this order, {', '.join([*judging, 'a judge that takes less memory'])}; {TRAINING_IS_KEPT}"
    steps = []
    if not trainer.get("gradient_checkpointing", True):
        steps.append("`gradient_checkpointing: true` (costs time only, and the stage resumes from its checkpoint)")
    if kind.own_loop and trainer.get("local_rollout_forward_batch_size", 64) > 1:
        steps.append("a lower `local_rollout_forward_batch_size` (costs time only)")
    if trainer.get("per_device_train_batch_size", 8) > 1:
        sorts = "aot" in str(trainer.get("loss_type", ""))  # the pairs that are read together
        steps.append(
            "half the `per_device_train_batch_size` with twice the `gradient_accumulation_steps` "
            f"({'changes what `aot` sorts' if sorts else 'costs time only'})"
        )
    if stage.data.holds_out and trainer.get("per_device_eval_batch_size", 8) > 1:
        steps.append("a lower `per_device_eval_batch_size` (costs time only)")
    if recipe.model.dtype == "float32":
        steps.append("`model.dtype: bfloat16`")
    if recipe.model.quantization != "nf4":
        steps.append("`model.quantization: nf4`")
    if stage.lora.get("r", 8) > 1:
        steps.append("a lower `lora.r`")
    if trainer.get("steps_per_generation", 1) > 1 or trainer.get("generation_batch_size", 1) > 1:
        steps.append("fewer replies at once by `steps_per_generation` or `generation_batch_size`")
    steps.append(f"shorter texts by `{kind.reply_limit or 'max_length'}`")
    tried = f"{f'set {saving}; or ' if saving else ''}try, in this order, {', '.join(steps)}"
    return f"{tried}; a change of any other setting retrains the stages that use it, and the rest stays usable"


def _is_above(error: BaseException, run: Path) -> bool:
    """Whether an error is of a run directory or of a folder that it would be in."""
    file = getattr(error, "filename", None)
    return isinstance(file, str | os.PathLike) and run.is_relative_to(file)


def oom_kills() -> int:
    """How many processes the kernel has killed for memory so far, here or in this container."""
    total = 0
    for file in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def _is_trained(recipe: Recipe, name: str | None) -> bool:
    """Whether a stage's training is over and kept, so that what went wrong did so in its judging."""
    if name is None:
        return False
    return (recipe.run / name / WORK / TRAINED).exists() or (recipe.run / name / ADAPTER).exists()


def is_of_gpu_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU ran out."""
    text = _first_line(error)
    return _is_of_memory(error) and (type(error).__name__ == "OutOfMemoryError" or "CUDA" in text or "CUBLAS" in text)


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, FunctionError) and error.__cause__ is not None:  # in it, but not its fault
        return _is_of_memory(error.__cause__)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
