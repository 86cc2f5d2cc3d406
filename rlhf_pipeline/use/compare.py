"""The comparison that somebody asks for: the one that `run` has left, or a new one."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.recipe import of_run
from rlhf_pipeline.run.explain import recognise
from rlhf_pipeline.rundir.finished import warning


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
    for stage in wanted.left_out(run, recipe):
        say(
            f"`{stage.name}` is left out: it is {stage.state}: {stage.reason}; `rlhf-pipeline run` brings it up to date"
        )
    weights = wanted.weights(run, recipe)
    policies = wanted.choose(run, recipe, list(weights), stages)
    for name in weights:
        about = warning(run, name) if name in (*policies, wanted.roles(recipe, list(weights)).reward) else None
        if about:
            say(about)
    usual = wanted.default_settings(recipe)
    settings = usual | {name: value for name, value in changes.items() if value is not None}
    if file is not None and not file.exists():
        raise InputError("there is no such file", place=f"--prompts {file}")
    asked_for = [str(file.absolute())] if file else []
    asked_for += ["the command line"] if texts else []
    if asked_for:
        settings |= {"prompts": " and ".join(asked_for), "digest": None}
    else:
        found = wanted.saved(run, weights, settings)
        if found is not None:
            return wanted.only(found, policies)
    say(f"sampling from {', '.join(policies)}")
    try:
        with quiet():
            from rlhf_pipeline.comparison import measure as sampling

            if asked_for:
                asked, data = sampling.given_prompts(recipe, file, texts, settings["n"])
                settings["n"] = len(asked)
            else:
                asked, data = sampling.default_prompts(recipe, settings["n"])
            found = sampling.compare(recipe, run, asked, data, settings, policies)
    except InputError:
        raise
    except Exception as error:
        known = recognise(error, recipe, None, run)
        if known is None:
            raise
        raise RunError(known[0], hint=known[1]) from None
    if settings == usual and stages is None:
        with contextlib.suppress(OSError):  # a run may be kept where nothing can be written
            wanted.write(run, found)
    return found
