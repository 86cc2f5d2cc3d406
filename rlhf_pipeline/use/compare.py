"""The comparison that somebody asks for, of one run or of several: what `run` has left, or a new one."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.comparison import joined, wanted
from rlhf_pipeline.comparison.joined import Part
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.recipe import Recipe, of_run
from rlhf_pipeline.run.explain import recognise
from rlhf_pipeline.rundir.finished import warning
from rlhf_pipeline.rundir.layout import RunDirectory

SAMPLING = ("n", "temperature", "max_new_tokens", "seed")  # settings that decide what is sampled, beside the prompts


def compare(
    run: Path,
    *,
    file: Path | None,
    texts: Sequence[str],
    stages: str | None,
    changes: dict[str, Any],
    quiet: Callable[[], contextlib.AbstractContextManager[None]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Send the same prompts through a run's models, or take what was written when that was done before.

    Args:
        run: the run directory.
        file: prompts, in any shape that recipes read.
        texts: further prompts. Without file and texts, prompts are those of `comparison.default_data`.
        stages: names of policies with commas between them; None for all.
        changes: settings that differ from `comparison.default_settings`, None where they do not.
        quiet: a context in which torch and what needs it is imported and used.
        say: takes a line.

    Returns:
        What `comparison.json` holds, of the policies that are asked for. That file is written too, where nothing is
        special.

    Raises:
        InputError: the prompts or the model cannot be read, or there is nothing to compare.
        RunError: for other faults that are known, such as memory that ran out.
    """
    recipe = of_run(run)
    weights = _weights(run, recipe, say)
    policies = wanted.choose(run, recipe, list(weights), stages)
    _warn(run, recipe, weights, policies, say)
    usual = wanted.default_settings(recipe)
    settings = usual | _given(changes) | _given_prompts(file, texts)
    asked_for = file is not None or bool(texts)
    found = None if asked_for else wanted.saved(run, weights, settings)
    if found is not None:
        return wanted.only(found, policies)
    say(f"sampling from {', '.join(policies)}")
    with quiet(), _known_faults(recipe, run):
        from rlhf_pipeline.comparison import measure as sampling

        if asked_for:
            asked, data = sampling.given_prompts(recipe, file, texts, settings["n"])
            settings["n"] = len(asked)
        else:
            asked, data = sampling.default_prompts(recipe, settings["n"])
        found = sampling.compare(recipe, run, asked, data, settings, policies)
    if settings == usual and stages is None:
        with contextlib.suppress(OSError):  # a run may be kept where nothing can be written
            wanted.write(run, found)
    return found


def compare_runs(
    runs: Sequence[Path],
    *,
    file: Path | None,
    texts: Sequence[str],
    stages: str | None,
    changes: dict[str, Any],
    quiet: Callable[[], contextlib.AbstractContextManager[None]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Send the same prompts through the models of several runs: the prompts, settings and judges of the first one.

    Where the `comparison.json` of a run is of these, its replies are taken from there. What several runs share is
    otherwise sampled in the first of them alone.

    Args:
        runs: the run directories.
        file: as of `compare`.
        texts: as of `compare`.
        stages: names of policies with commas between them, each of which some run has; None for all.
        changes: as of `compare`; the first run's settings are the default.
        quiet: as of `compare`.
        say: as of `compare`.

    Returns:
        What `comparison.joined.join` makes of them.

    Raises:
        InputError: as of `compare`; a run is given twice, or was asked other prompts.
        RunError: as of `compare`.
    """
    names = joined.labels(runs)
    recipes = [of_run(run) for run in runs]
    usual = wanted.default_settings(recipes[0])
    settings = usual | _given(changes) | _given_prompts(file, texts)
    asked_for = file is not None or bool(texts)
    parts = [_part(name, run, recipe, say) for name, run, recipe in zip(names, runs, recipes, strict=True)]
    parts = _chosen(parts, stages)
    for part, recipe in zip(parts, recipes, strict=True):
        _warn(part.run, recipe, part.made_of, part.policies, _labelled(part.label, say))
    notes, asked = [], None
    for i, (part, recipe) in enumerate(zip(parts, recipes, strict=True)):
        own = wanted.default_settings(recipe)
        other = _otherwise(own, usual, changes, asked_for)
        notes += [f"{part.label}: the settings of {names[0]} count for it: {', '.join(other)}"] if other else []
        is_usual = not asked_for and _same(own, settings)
        found = wanted.saved(part.run, part.made_of, own) if is_usual else None
        to_write = is_usual and stages is None and own["digest"] == usual["digest"]
        earlier = {(policy, one.identity(policy)) for one in parts[:i] for policy in one.policies}
        left = [policy for policy in part.policies if to_write or (policy, part.identity(policy)) not in earlier]
        if found is None and not left:  # an earlier run has all of it
            rows = [{"prompt": row["prompt"], "replies": {}} for row in parts[0].comparison["rows"]]
            found = joined.NOTHING | {"rows": rows}
        if found is None:
            say(f"{part.label}: sampling from {', '.join(left)}")
            judged = recipe.model_copy(update={"evaluate": recipes[0].evaluate})
            judged._folders = [*recipes[0].folders, *recipe.folders]  # where the first run's judge may be
            with quiet(), _known_faults(recipe, part.run):
                import torch

                from rlhf_pipeline.comparison import measure as sampling

                gc.collect()  # the former run's model is not needed any more
                torch.cuda.empty_cache()
                if asked is None and asked_for:
                    asked = sampling.given_prompts(recipes[0], file, texts, settings["n"])
                    settings["n"] = len(asked[0])
                elif asked is None:
                    asked = sampling.default_prompts(recipes[0], settings["n"])
                found = sampling.compare(judged, part.run, *asked, own if to_write else settings, left)
            if to_write:
                with contextlib.suppress(OSError):
                    wanted.write(part.run, found)
        parts[i] = part._replace(comparison=found)
    comparison = joined.join(parts, settings)
    return comparison | {"notes": notes + comparison["notes"]}


def _weights(run: Path, recipe: Recipe, say: Callable[[str], None]) -> dict[str, str]:
    """The weights of the stages that can be compared; those that have begun and cannot are said."""
    for stage in wanted.left_out(run, recipe):
        say(
            f"`{stage.name}` is left out: it is {stage.state}: {stage.reason}; `rlhf-pipeline run` brings it up to date"
        )
    return wanted.weights(run, recipe)


def _warn(run: Path, recipe: Recipe, weights: dict[str, str], policies: list[str], say: Callable[[str], None]) -> None:
    for name in weights:
        about = warning(run, name) if name in (*policies, wanted.roles(recipe, list(weights)).reward) else None
        if about:
            say(about)


def _labelled(label: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """The same, for lines on one of several runs."""
    return lambda line: say(f"{label}: {line}")


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _given_prompts(file: Path | None, texts: Sequence[str]) -> dict[str, Any]:
    """What settings say of prompts that are not the recipe's."""
    if file is not None and not file.exists():
        raise InputError("there is no such file", place=f"--prompts {file}")
    asked_for = [str(file.absolute())] if file else []
    asked_for += ["the command line"] if texts else []
    return {"prompts": " and ".join(asked_for), "digest": None} if asked_for else {}


@contextlib.contextmanager
def _known_faults(recipe: Recipe, run: Path) -> Iterator[None]:
    """Turn faults that are known, such as memory that ran out, into a sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = recognise(error, recipe, None, run)
        if known is None:
            raise
        raise RunError(known[0], hint=known[1]) from None


def _part(label: str, run: Path, recipe: Recipe, say: Callable[[str], None]) -> Part:
    """A run with all its policies, before it is sampled."""
    made_of = _weights(run, recipe, _labelled(label, say))
    policies = wanted.choose(run, recipe, list(made_of), None)
    _, reference, reward = wanted.roles(recipe, list(made_of))
    record = RunDirectory(run).record(next(iter(made_of)))
    model = {key: value for key, value in record.inputs.items() if key.partition(".")[0] == "model"} if record else {}
    base = json.dumps(model or recipe.model.path, sort_keys=True)
    return Part(label, run, base, made_of, policies, reference, reward, joined.NOTHING)


def _chosen(parts: list[Part], stages: str | None) -> list[Part]:
    """The runs with those of their policies alone that are meant.

    Raises:
        InputError: no run has one of the names, or a run has none of them.
    """
    if stages is None:
        return parts
    names = [name.strip() for name in stages.split(",")]
    there = list(dict.fromkeys(policy for part in parts for policy in part.policies))
    for name in names:
        if name not in there:
            hint = f"there are {', '.join(there)}"
            raise InputError(f"there is no `{name}` to compare in any of these runs", place="--stages", hint=hint)
    chosen = [part._replace(policies=[policy for policy in part.policies if policy in names]) for part in parts]
    for part, before in zip(chosen, parts, strict=True):
        if not part.policies:
            hint = f"it has {', '.join(before.policies)}"
            raise InputError(f"this run has none of {', '.join(names)}", place=str(part.run), hint=hint)
    return chosen


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs' settings are the same, as far as is known: data that cannot be read have no digest."""
    digests = a["digest"], b["digest"]
    return all(a[key] == b[key] for key in SAMPLING) and (None in digests or digests[0] == digests[1])


def _otherwise(own: dict[str, Any], usual: dict[str, Any], changes: dict[str, Any], asked_for: bool) -> list[str]:
    """In what a run's own settings differ from those of the first run, where these count."""
    found = [
        f"{key} {usual[key]} instead of {own[key]}"
        for key in SAMPLING
        if own[key] != usual[key] and changes.get(key) is None and not (key == "n" and asked_for)
    ]
    if not asked_for and None not in (own["digest"], usual["digest"]) and own["digest"] != usual["digest"]:
        found.append("other prompts or another judge")
    return found
