"""An adapter from outside the recipe, that a stage starts from or takes its reward from. No torch.

It is named by a folder as PEFT writes it (`path/to/adapter`), by a stage of another run (`runs/other:sft`), or by its
repository on the hub (`org/name`, `org/name@revision`).
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline import hub, kinds
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.local import expanded, resolved
from rlhf_pipeline.recipe import library_keys

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+(@[\w./-]+)?")
RELATIVE = "relative paths start from the recipe's folder"


def is_one(value: str | None) -> bool:
    """Whether a value of `init` or `reward` can only mean an adapter from outside: no stage's name looks like this."""
    return value is not None and (value.startswith((".", "~")) or "/" in value or ":" in value)


def is_hub(value: str) -> bool:
    """Whether it names a repository on the hub; of a value from `resolve`."""
    return not Path(value).is_absolute()


def resolve(value: str, start: Path) -> str:
    """What a value means: an absolute folder, `/absolute/run:stage`, or a hub id as it is.

    Args:
        value: see `is_one`.
        start: the folder that relative paths start from.

    Raises:
        InputError: there is no such adapter on disk, and it is no hub id either.
    """
    local = resolved(start / expanded(value))
    if local.is_dir():
        if (local / CONFIG).is_file():
            return str(local)
        hint = "name the folder that `save_pretrained` of PEFT wrote"
        if any(local.glob("*/stage.json")):
            hint = f"it is a run directory: name one of its stages, `{value}:STAGE`: {', '.join(_stages(local))}"
        raise InputError(f"{local} is not an adapter: it has no {CONFIG}", hint=hint)
    run, colon, stage = str(local).rpartition(":")
    if colon and "/" not in stage:
        return _resolve_stage(Path(run), stage)
    if not HUB_ID.fullmatch(value):
        raise InputError(f"there is no adapter folder {local}", hint=RELATIVE)
    return value


def _resolve_stage(run: Path, stage: str) -> str:
    stages = _stages(run)
    if not stages:
        raise InputError(f"there is no run directory {run}", hint=RELATIVE)
    if stage not in stages:
        near = difflib.get_close_matches(stage, stages, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"its stages are {', '.join(stages)}"
        raise InputError(f"the run {run} has no stage `{stage}`", hint=hint)
    if not (run / stage / "adapter" / CONFIG).is_file():
        raise InputError(
            f"stage `{stage}` of {run} is not done", hint=f"`rlhf-pipeline status {run}` says how far it has come"
        )
    return f"{run}:{stage}"


def _stages(run: Path) -> list[str]:
    return sorted(file.parent.name for file in run.glob("*/stage.json") if "." not in file.parent.name)


def label(value: str) -> str:
    """A short name for people: `other:sft`, the folder's name, or the hub id."""
    return value.partition("@")[0] if is_hub(value) else Path(value).name


def said_of_parents(parents: dict[str, str]) -> list[str]:
    """What a stage needs of others, by their roles: `sft`, `rows of candidates`, `judge critic`."""
    said_of = {kinds.ROWS: "rows of {}", "judge": "judge {}", "reference": "reference {}"}
    return [said_of.get(role.partition(".")[0], "{}").format(said(name)) for role, name in parents.items()]


def said(parent: str) -> str:
    """What people read of a stage's parent: a stage or `base` as it is, an adapter from outside by its short name."""
    return label(parent) if is_one(parent) else parent


def folder(value: str, files: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Path:
    """Where its files lie; those on the hub are downloaded, unless the cache has them.

    Raises:
        InputError: they cannot be had.
    """
    if is_hub(value):
        name, _, revision = value.partition("@")
        further = [f"member-*/{file}" for file in files]  # of an ensemble; see `rundir.layout.members`
        found = hub.download(name, revision or None, [*files, *further])
        missing = next((file for file in files if found is None or not (found / file).is_file()), None)
        if found is None or missing:
            raise InputError(
                f"`{value}` is no stage and no folder, and there is no adapter of that name on the hub or in its cache"
                if found is None
                else f"`{value}` on the hub is no adapter that can be read: it has no {missing}",
                hint=f"a stage's name has no `/`; a folder here is written ./{value}",
            )
        return found
    run, colon, stage = value.rpartition(":")
    return Path(run) / stage / "adapter" if colon and not Path(value).is_dir() else Path(value)


def config(value: str) -> dict[str, Any]:
    """Its `adapter_config.json`.

    Raises:
        InputError: it cannot be read, or is of no LoRA adapter with nothing but LoRA weights.
    """
    file = folder(value, (CONFIG,)) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{file} cannot be read", hint="it should be what PEFT wrote") from None
    if kind != "LORA":
        raise InputError(f"`{label(value)}` is no LoRA adapter but {kind or 'of no known kind'}")
    if not is_hub(value) and not (file.parent / WEIGHTS).is_file():
        raise InputError(
            f"{file.parent} has no {WEIGHTS}", hint="only safetensors are read: save it with a newer version of PEFT"
        )
    other = [key for key in ("modules_to_save", "trainable_token_indices") if found.get(key)]
    if (other and makes(found) == "policy") or found.get("bias", "none") != "none":
        raise InputError(
            f"`{label(value)}` has trained more than LoRA's matrices: {', '.join(other) or 'bias'}",
            hint="the base is shared by all roles and never changed; merge it into the base, and start from `base`",
        )
    return found


def makes(config: dict[str, Any]) -> Literal["policy", "reward"]:
    """What an adapter is of: a reward model has a score head."""
    return "reward" if config.get("task_type") == "SEQ_CLS" else "policy"


def lora(config: dict[str, Any]) -> dict[str, Any]:
    """Its shape, as a recipe's `lora` says it: what is not as by default."""
    known = library_keys.keys("lora")
    found = {
        key: value
        for key, value in config.items()
        if key in library_keys.settable("lora")
        and key != "init_lora_weights"
        and value not in (None, {}, [], known[key].default)
    }
    shape = {key: config[key] for key in ("r", "lora_alpha", "target_modules") if config.get(key) is not None}
    shape |= {key: found[key] for key in sorted(found)}
    if isinstance(shape.get("target_modules"), list):
        shape["target_modules"] = sorted(shape["target_modules"])  # PEFT writes them in any order
    return shape


def record(value: str) -> dict[str, Any]:
    """The inputs that its own run recorded for it; none where it was made otherwise."""
    if is_hub(value):
        return {}
    try:
        content = json.loads((folder(value).parent / "stage.json").read_text(encoding="utf-8"))
        return dict(content["inputs"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}
