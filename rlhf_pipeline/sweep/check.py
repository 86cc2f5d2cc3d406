"""What is wrong with any run of a sweep, found before the first one trains; and what all runs share. No torch here."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline import kinds, plan
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.fingerprint import Digests, judging_inputs, pin, short_hash, stage_inputs
from rlhf_pipeline.plan import StagePlan
from rlhf_pipeline.recipe import Recipe, load
from rlhf_pipeline.run import jobs, to_do, trackers
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir.layout import SWEEP
from rlhf_pipeline.sweep.keys import OWN, Combination, Range, Swept, combination, overrides, words_for

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One run, before it begins.

    Attributes:
        combination: its values.
        recipe: with them.
        fingerprints: of each stage.
        judgings: of each stage, a hash of what decides how it is judged.
        inputs: of each stage, all that decides its result and how it is judged.
    """

    combination: Combination
    recipe: Recipe
    fingerprints: dict[str, str]
    judgings: dict[str, str]
    inputs: dict[str, dict[str, Any]]

    def is_done(self) -> bool:
        """Whether `run` would have nothing to do."""
        wanted = to_do.find(self.recipe, plan.make(self.recipe))
        return not wanted.stages and not wanted.compares


@dataclass(frozen=True)
class Shared:
    """What the runs of a sweep have in common.

    Attributes:
        stages: those whose results are the same in all runs, in the recipe's order.
        varying: the others, and those that are judged in different ways.
        inputs: of each stage, what decides its result and its judgement in the same way in all runs.
    """

    stages: list[str]
    varying: list[str]
    inputs: dict[str, dict[str, Any]]


class Loader:
    """Loads the recipe of each run, and hashes what decides the results of its stages.

    Args:
        recipe: as on the command line.
        fixed: the overrides that hold for all runs.
        swept: the swept keys.

    Attributes:
        folder: the sweep's, once a recipe was loaded.
        words: for each swept key, its word in the names of runs; likewise.
    """

    def __init__(self, recipe: str, fixed: Sequence[str], swept: Sequence[Swept]) -> None:
        self.recipe, self.fixed, self.swept = recipe, fixed, swept
        self.folder, self.words = Path(), dict[str, str]()
        self._digests = Digests()
        self._commits: dict[tuple[str, str, str | None], str | None] = {}

    def all(self, several: Sequence[Mapping[str, Any]]) -> list[Planned]:
        """Load the runs of several combinations of values.

        Raises:
            InputError: for all that is wrong with any of them, each fault once.
        """
        loaded, problems = [], []
        for values in several:
            try:
                loaded.append((values, load(self.recipe, [*self.fixed, *overrides(values)])))
            except InputError as error:
                problems += self.as_written(error, values)
        places = [f"override `{one.written}`" for one in self.swept]
        _raise(sorted(problems, key=lambda one: places.index(one.place) if one.place in places else -1))
        _raise([error for _, one in loaded for error in _asks_machines(one)])
        first = loaded[0][1]
        self.folder = first.run.parent / f"{first.name}{SWEEP}"
        self.words = words_for(self.swept, first)
        return [self._planned(*one) for one in loaded]

    def one(self, values: Mapping[str, Any]) -> Planned:
        """Load the run of some values, after others.

        Raises:
            InputError: see `recipe.load`.
        """
        return self._planned(values, load(self.recipe, [*self.fixed, *overrides(values)]))

    def command(self, combination: Combination) -> list[str]:
        """What `run` takes after the recipe to make a run in its place."""
        where = [f"name={combination.name}", f"output_dir={self.folder.absolute()}"]
        return [*self.settings(combination), *where]

    def settings(self, combination: Combination) -> list[str]:
        """The overrides of a run, its name and place apart."""
        return [*(word for word in self.fixed if _key(word) not in OWN), *overrides(combination.values)]

    def as_written(self, error: InputError, values: Mapping[str, Any]) -> list[InputError]:
        """What is wrong with one run, at the arguments that were written for all."""
        places = dict(zip(overrides(values), (one.written for one in self.swept), strict=True))
        places = {f"override `{one}`": f"override `{written}`" for one, written in places.items()}
        return [
            InputError(one.message, place=places.get(one.place or "", one.place), hint=one.hint) for one in error.all
        ]

    def _planned(self, values: Mapping[str, Any], recipe: Recipe) -> Planned:
        found = combination(values, self.words)
        recipe.name, recipe.output_dir = found.name, str(self.folder.absolute())
        recipe.locate_rows()
        pin(recipe, self._commits)
        fingerprints: dict[str, str] = {}
        judgings: dict[str, str] = {}
        every: dict[str, dict[str, Any]] = {}
        for name in recipe.stages:
            judging = judging_inputs(recipe, name, fingerprints, self._digests)
            inputs = stage_inputs(recipe, name, fingerprints, self._digests)
            judgings[name], fingerprints[name] = _hash(judging), _hash(inputs)
            every[name] = inputs | {f"evaluate.{key}": value for key, value in (judging or {}).items()}
        return Planned(found, recipe, fingerprints, judgings, every)


def _key(word: str) -> str:
    return word.partition("=")[0]


def _hash(content: Any) -> str:
    return short_hash(json.dumps(content, sort_keys=True).encode())


def shared(planned: Sequence[Planned]) -> Shared:
    """What runs have in common."""
    names = list(planned[0].fingerprints)

    def differ(found: Sequence[dict[str, str]], name: str) -> bool:
        return len({one.get(name) for one in found}) > 1

    same = [name for name in names if not differ([one.fingerprints for one in planned], name)]
    judged = [name for name in names if differ([one.judgings for one in planned], name)]
    first, *others = planned
    inputs = {
        name: {
            key: value
            for key, value in first.inputs[name].items()
            if all(key in one.inputs[name] and one.inputs[name][key] == value for one in others)
        }
        for name in names
    }
    return Shared(same, [name for name in names if name not in same or name in judged], inputs)


def takes_fractions(recipe: str, fixed: Sequence[str], swept: Range) -> bool:
    """Whether a key whose range was written in whole numbers may have others, too: whether the recipe allows one."""
    for value in (swept.low + 0.5, swept.high - 0.5):
        with contextlib.suppress(InputError):
            load(recipe, [*fixed, f"{swept.key}={value}"])
            return True
    return False


def check(loader: Loader, planned: Sequence[Planned], say: Say) -> None:
    """Check settings and data of the stages that are still to run, as `run` does, each distinct one once.

    Args:
        loader: which loaded them.
        planned: the runs that are not done.
        say: takes the warnings.

    Raises:
        InputError: for all that is wrong with any of them, each fault once.
    """
    _raise([error for one in planned for error in _asks_people(one.recipe)])
    problems: list[InputError] = []
    warnings: dict[str, None] = {}
    checked: set[str] = set()
    for one in planned[:1]:
        trackers.require(one.recipe.report_to)
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-pipeline-") as folder,
        Launcher(Path(folder, "server.log")) as launcher,
    ):
        for one in planned:
            new = {name: one.fingerprints[name] + one.judgings[name] for name in one.recipe.stages}
            names = _with_rows(one.recipe, [name for name, digest in new.items() if digest not in checked])
            checked.update(new.values())
            if not names:
                continue
            try:
                plan.shapes(one.recipe)
                plans = plan.make(one.recipe)
                found = _ask(one.recipe, names, plans, launcher, Path(folder))
                warnings |= dict.fromkeys(one.recipe.as_written(warning) for warning in found)
            except InputError as error:
                problems += loader.as_written(error, one.combination.values)
    _raise(problems)
    for warning in warnings:
        say(f"warning: {warning}")


def _asks_people(recipe: Recipe) -> list[InputError]:
    """What is wrong with stages that wait for people: each run would ask them again."""
    return [
        InputError(
            f"each run of a sweep would ask people again for the labels of `{name}`",
            place=f"stages.{name}",
            hint=f"in one run, `rlhf-pipeline label RUN {name} --export labels.jsonl` writes them to a file: name that "
            f"in place of `stage:{name}`, and remove the stage",
        )
        for name, stage in recipe.stages.items()
        if stage.facts.by_people
    ]


def _asks_machines(recipe: Recipe) -> list[InputError]:
    """What is wrong with stages that several machines train: the others would not know which run is at work."""
    if recipe.machines == 1:
        return []
    message = f"the runs of a sweep are on one machine, and this recipe is run on {recipe.machines}"
    return [InputError(message, place="launch.num_machines", hint="set `launch.num_machines=1`, and fewer processes")]


def _ask(
    recipe: Recipe, names: Sequence[str], plans: Sequence[StagePlan], launcher: Launcher, folder: Path
) -> list[str]:
    """The warnings of a worker that checks some stages."""
    current = [stage.name for stage in plans if stage.is_current and stage.name in names]
    what = "the check of settings and data"
    job, log = folder / "check.json", folder / "check.log"
    done = jobs.do(recipe, launcher, "check", job, log, what, stages=list(names), current=current, card=None)
    return list(done.result["warnings"])


def _with_rows(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Stages, with those that make the rows which they read: the check has to know that these are still to be made."""
    wanted = set(names)
    for name in reversed(recipe.stages):
        if name in wanted:
            parents = recipe.stages[name].parents.values()
            wanted |= {parent for parent in parents if parent in recipe.stages and _makes_rows(recipe, parent)}
    return [name for name in recipe.stages if name in wanted]


def _makes_rows(recipe: Recipe, name: str) -> bool:
    return not kinds.get(recipe.stages[name].kind).trains


def _raise(problems: Sequence[InputError]) -> None:
    """End here if there are problems; those that are the same but for their hint are one."""
    if problems:
        found = InputErrors(problems)
        raise found.all[0] if len(found.all) == 1 else found
