"""A stage's model as a folder of its own, with a card, and on the hub. Torch only where the weights are written."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_pipeline import hub, kinds
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.local import resolved
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.finished import trained_with, warning
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.use import card

Say = Callable[[str], None]


def export(
    run: Path,
    stage: str,
    out: Path,
    *,
    merge: bool = False,
    push_to: str | None = None,
    public: bool = False,
    say: Say = print,
) -> None:
    """Write the model of a stage that is done to a folder that Transformers loads without us; push it if asked.

    Args:
        run: the run directory.
        stage: the stage's name.
        out: the folder, which must be new or empty; it is there whole or not at all.
        merge: merge the adapter into the unquantized base, instead of naming the base.
        push_to: the hub repository to push it to; it is made where there is none.
        public: have that repository seen by all, if it is made.
        say: takes one line at a time, about what is going on.

    Raises:
        InputError: there is no such stage that is done, or it cannot be exported so.
        RunError: the hub did not take it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already", hint="name a new or an empty folder")
    recipe = recipes.of_run(run)
    record = _record(run, stage, recipe)
    about = warning(run, stage)
    if about:
        say(about)
    if push_to is not None:
        _refuse_push(push_to, recipe, merge)
    with _in_one_step(out) as folder:
        dtype = _write(run, stage, recipe, record, folder, merge, say)
        text = card.text(
            run,
            stage,
            recipe,
            license=_license(recipe),
            dtype=dtype,
            own_class=(folder / "reward_model.py").is_file(),
            name=push_to or resolved(out).name,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
    if push_to is not None:
        say(f"pushing to {push_to}, {'public' if public else 'private'} if it is new")
        _push(out, push_to, public)


def _record(run: Path, stage: str, recipe: Recipe) -> Record:
    """A stage's record, with its artifact and its base seen to be as the record says.

    Raises:
        InputError: it is not.
    """
    directory = RunDirectory(run)
    if stage not in recipe.stages:
        raise InputError(
            f"there is no stage `{stage}`", place=str(run), hint=f"the stages are {', '.join(recipe.stages)}"
        )
    found = state.read(run).stage(stage)
    record = found.record if found else Record()
    if found and not record.is_finished:
        why = ": it has not run yet" if found.state == "missing" else f" but {found.state}: {found.reason}"
        raise InputError(
            f"stage `{stage}` is not done{why}",
            place=str(run),
            hint="`rlhf-pipeline run` makes it",
        )
    digests = Digests()
    problem = directory.artifact_problem(stage, record, digests)
    if problem:
        raise InputError(f"stage `{stage}`: {problem}", place=str(run), hint="`rlhf-pipeline run` makes it again")
    base = Path(recipe.model.path)
    if base.is_absolute() and not base.is_dir():
        raise InputError(
            "the base is not there any more", place=f"model.path: {base}", hint="put it back where it was trained on"
        )
    trained_on, now = record.inputs.get("model"), digests.of_model(recipe.model)
    if trained_on != now:
        raise InputError(
            f"stage `{stage}` was trained on {trained_on}, and the base is now {now}",
            place=f"model.path: {recipe.model.path}",
            hint="put the base back that it was trained on, or run the stage again",
        )
    return record


def _write(run: Path, stage: str, recipe: Recipe, record: Record, folder: Path, merge: bool, say: Say) -> str | None:
    """Write weights, configuration and tokenizer; returns the dtype of merged weights."""
    from rlhf_pipeline.use import weights

    artifact = RunDirectory(run).adapter(stage)
    head: Any = "score" if kinds.get(record.kind).makes == "reward" else "causal"
    settings = trained_with(run, stage)
    if not merge:
        weights.write_adapter(recipe.model, artifact, folder, head, settings)
        return None
    say(f"merging into the unquantized base, on the CPU: {recipe.model.path}")
    return weights.write_merged(recipe.model, artifact, folder, head, settings)


@contextlib.contextmanager
def _in_one_step(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place if all goes well, and is gone if not."""
    out = resolved(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        for written in folder.rglob("*"):  # safetensors keeps its files from others
            written.chmod(0o755 if written.is_dir() else 0o644)
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _license(recipe: Recipe) -> dict[str, str]:
    """`license`, and `license_name` and `license_link` where there are, as the base's own card or the hub says."""
    folder = Path(recipe.model.path)
    if folder.is_relative_to(recipes.TINY):
        return {"license": "apache-2.0"}
    found: dict[str, Any] = {}
    if folder.is_dir():
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            text = (folder / "README.md").read_text(encoding="utf-8")
            if head := re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL):
                found = yaml.safe_load(head[1])
    else:
        with contextlib.suppress(Exception):  # offline, unreachable, no access: then it is not known
            about = hub.ask("model", recipe.model.path, recipe.model.revision)
            found = about.card_data.to_dict() if about.card_data else {}
    keys = ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if isinstance(found, dict) and isinstance(found.get(key), str)}


def _refuse_push(repo: str, recipe: Recipe, merge: bool) -> None:
    """See, before any work, that a push can succeed as far as that is known here.

    Raises:
        InputError: it cannot.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(str(error).splitlines()[0], place="--push-to-hub", hint="for example USER/NAME") from None
    if "/" not in repo:
        raise InputError(f"`{repo}` names no owner", place="--push-to-hub", hint=f"for example USER/{repo}")
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed", place="--push-to-hub", hint="unset it")
    if get_token() is None:
        raise InputError("nobody is logged in to the hub", place="--push-to-hub", hint="`hf auth login`")
    if not merge and Path(recipe.model.path).is_absolute():
        raise InputError(
            "the adapter's base is a folder of this machine, which nobody else could load",
            place="--push-to-hub",
            hint="add `--merge`",
        )


def _push(out: Path, repo: str, public: bool) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=out, commit_message="Model from rlhf-pipeline")
    except Exception as error:  # httpx, the hub's own, the operating system's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{out} is written, but the hub did not take it: {redact(reason)}",
            hint=f"`hf upload {repo} {out}` tries again",
        ) from None
