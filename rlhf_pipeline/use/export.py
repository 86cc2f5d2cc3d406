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
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.local import resolved
from rlhf_pipeline.recipe import BASE, Recipe, outside
from rlhf_pipeline.run.explain import recognise
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.finished import trained_with, warning
from rlhf_pipeline.rundir.layout import WEIGHTS, RunDirectory, members
from rlhf_pipeline.rundir.record import ROWS, Record
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.use import card

Say = Callable[[str], None]


def export(
    run: Path,
    stage: str,
    out: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    dequantized: bool = False,
    n: int | None = None,
    push_to: str | None = None,
    public: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Write the model of a stage that is done to a folder that Transformers loads without us; push it if asked.

    Args:
        run: the run directory.
        stage: the stage's name.
        out: the folder, which must be new or empty; it is there whole or not at all.
        merge: merge the adapter into the base, which is not quantized for it, instead of naming the base.
        dtype: of the merged weights; None for that of the base, or float32 where that would lose the change.
        dequantized: merge into what training computed with, the base rounded by `quantization`.
        n: on how many prompts to measure what merging changed; None for as many as `compare` takes, 0 for none.
        push_to: the hub repository to push it to; it is made where there is none.
        public: have that repository seen by all, if it is made.
        say: takes one line at a time, about what is going on.

    Returns:
        What `export --json` prints; see docs/json.md.

    Raises:
        InputError: there is no such stage that is done, or it cannot be exported so.
        RunError: the hub did not take it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already", hint="name a new or an empty folder")
    recipe = recipes.of_run(run)
    _refuse_options(recipe, merge, dtype, dequantized)
    record = _record(run, stage, recipe)
    count = len(members(RunDirectory(run).adapter(stage)))
    if merge and count > 1:
        raise InputError(
            f"the {count} members of an ensemble cannot be merged into one model: none is what they are together",
            place=stage,
            hint="export the adapters, without `--merge`",
        )
    about = warning(run, stage)
    if about:
        say(about)
    if push_to is not None:
        _refuse_push(push_to, recipe, merge)
    with _in_one_step(out) as folder:
        if merge:
            merged = _merge(run, stage, recipe, record, folder, dtype, dequantized, n, say)
        else:
            merged = None
            _write_adapter(run, stage, recipe, record, folder)
        text = card.text(
            run,
            stage,
            recipe,
            license=_license(recipe),
            merged=merged,
            own_class=(folder / "reward_model.py").is_file(),
            name=push_to or resolved(out).name,
            members=count,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
    if push_to is not None:
        say(f"pushing to {push_to}, {'public' if public else 'private'} if it is new")
        _push(out, push_to, public)
    return {
        "run": str(run.absolute()),
        "stage": stage,
        "folder": str(out.absolute()),
        "merged": merged,
        "pushed_to": push_to,
    }


def _refuse_options(recipe: Recipe, merge: bool, dtype: str | None, dequantized: bool) -> None:
    """See that the options go together.

    Raises:
        InputError: they do not.
    """
    for option, given in (("--dtype", dtype), ("--dequantized", dequantized)):
        if given and not merge:
            raise InputError("only a merged model has it", place=option, hint="add `--merge`")
    if dequantized and recipe.model.quantization == "none":
        raise InputError(
            "the base was not quantized in training",
            place="--dequantized",
            hint="`--merge` alone merges into that base",
        )


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
    if not recipe.stages[stage].facts.trains:
        models = [name for name, one in recipe.stages.items() if one.facts.trains]
        raise InputError(
            f"`{stage}` is a {recipe.stages[stage].kind} stage, which makes rows and no model",
            place=str(run),
            hint=f"its rows are in {directory.stage(stage) / ROWS}; stages with a model: {', '.join(models)}",
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


def _head(record: Record) -> Any:
    return "score" if kinds.get(record.kind).makes == "reward" else "causal"


def _write_adapter(run: Path, stage: str, recipe: Recipe, record: Record, folder: Path) -> None:
    """Write the adapter, configuration and tokenizer."""
    from rlhf_pipeline.use import weights

    weights.write_adapter(
        recipe.model, RunDirectory(run).adapter(stage), folder, _head(record), trained_with(run, stage)
    )


def _merge(
    run: Path, stage: str, recipe: Recipe, record: Record, folder: Path,
    dtype: str | None, dequantized: bool, n: int | None, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Write the merged model, and measure what merging changed.

    Returns:
        What `--json` has under `merged`.
    """
    from rlhf_pipeline.models import attention
    from rlhf_pipeline.use import merge_effect, weights

    model, instead = attention.available(recipe.model)
    if instead:
        say(f"note: {instead}")
        recipe = recipe.model_copy(update={"model": model})
    quantization = recipe.model.quantization
    since, start = _start(run, record)
    into = f"as training read it, in {quantization}" if dequantized else "as it is stored"
    say(f"merging into the base {into}, on the CPU: {recipe.model.path}")
    rounding = weights.write_merged(
        recipe.model,
        RunDirectory(run).adapter(stage),
        folder,
        _head(record),
        trained_with(run, stage),
        dtype=dtype,
        dequantized=dequantized,
        start=start,
    )
    merged: dict[str, Any] = {"base": "dequantized" if dequantized else "stored", "since": since, **rounding._asdict()}
    merged |= {"measured": None, "not_measured": None}
    say(card.said_of_rounding(stage, merged))
    if rounding.dtype == rounding.tried and rounding.kept is not None and rounding.kept < weights.merge.ENOUGH:
        say("warning: rounding loses the rest of it; `--dtype float32` keeps all")
    n = wanted.default_settings(recipe)["n"] if n is None else n
    try:
        if n == 0:
            merged["not_measured"] = "it was not asked for"
        elif _head(record) == "score":
            merged["measured"] = merge_effect.of_reward(run, recipe, stage, folder, n)
        else:
            merged["measured"] = merge_effect.of_policy(run, recipe, stage, start, folder, n)
    except InputError as error:
        merged["not_measured"] = f"{error.message} ({error.place})" if error.place else error.message
    except Exception as error:  # whatever it is, the merged model is there
        known = recognise(error, recipe, None, folder)
        merged["not_measured"] = known[0] if known else f"{type(error).__name__}: {error}".splitlines()[0]
    say(card.said_of_merging(merged))
    if quantization != "none" and not dequantized:
        say(f"training read the base rounded to {quantization}; `--dequantized` merges into that, and changes less")
    return merged


def _start(run: Path, record: Record) -> tuple[str, Path | None]:
    """What a stage started from, as people read it, and its adapter folder; `base` where that is gone or changed."""
    name, weights = record.init or BASE, None
    try:
        if outside.is_one(name):
            weights = outside.folder(name)
        elif name != BASE:
            parent = RunDirectory(run).record(name)
            same = parent and record.parent_weights.get(name) in (None, parent.weights)
            weights = RunDirectory(run).adapter(name) if same else None
    except InputError:
        pass
    there = weights is not None and (weights / WEIGHTS).is_file()
    return (outside.said(name), weights) if there else (BASE, None)


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
