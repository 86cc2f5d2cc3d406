"""From a recipe with several values of some keys to a run for each, and what they came to. No torch."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline import plan, report
from rlhf_pipeline.errors import InputError, Interrupted, RunError
from rlhf_pipeline.run import signals
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import COMPARISON, RECORD, REPORT
from rlhf_pipeline.rundir.lock import Lock
from rlhf_pipeline.rundir.record import GATE_CLOSED
from rlhf_pipeline.rundir.words import duration
from rlhf_pipeline.sweep import goal, keys, proposals
from rlhf_pipeline.sweep.check import Loader, Planned, Shared, check, shared, takes_fractions
from rlhf_pipeline.sweep.child import STOPPED, Child, logged
from rlhf_pipeline.sweep.devices import environments
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.keys import Combination, Range
from rlhf_pipeline.sweep.proposals import STUDY, TRIALS, Grid, Proposal, Study
from rlhf_pipeline.sweep.results import PRUNED, Result, Results, read

LOCK = ".sweep"  # in a sweep's folder
LOOK_S = 0.2  # between two looks at the runs at work
Say = Callable[[str], None]


def sweep(
    recipe: str,
    words: Sequence[str],
    *,
    trials: int | None = None,
    maximize: str | None = None,
    minimize: str | None = None,
    at_once: int = 1,
    environment: Mapping[str, str],
    say: Say = print,
) -> Results:
    """Make a run for each combination of values, or as many as are asked for; what is done is not made again.

    Args:
        recipe: a path, the name of a shipped recipe, or a run directory.
        words: `KEY=V1,V2,…`, `KEY=low..high[:log]`, and `KEY=VALUE` for all runs alike.
        trials: how many runs Optuna shall propose; by default it does so only where a key has a range.
        maximize: `STAGE.METRIC`, of which the greatest is the best.
        minimize: the same, of which the smallest is.
        at_once: how many runs are at work at a time.
        environment: that of this process.
        say: takes one line at a time, about what is going on.

    Returns:
        What all runs came to, those that failed among them.

    Raises:
        InputError: something is wrong with the arguments, or with any of the runs; nothing was trained.
        Interrupted: it was asked to stop, and has.
        KeyboardInterrupt: it was asked twice, and has stopped at once.
        RunError: a stage that all runs share failed, or another sweep is at work here.
    """
    if maximize and minimize:
        raise InputError("a sweep has one goal", place="--minimize", hint="give either `--maximize` or `--minimize`")
    swept, fixed = keys.parse(words)
    swept = [
        dataclasses.replace(one, whole=False, low=float(one.low), high=float(one.high))
        if isinstance(one, Range) and one.whole and takes_fractions(recipe, fixed, one)
        else one
        for one in swept
    ]
    loader = Loader(recipe, fixed, swept)
    corners = loader.all(keys.grid(swept))
    common = shared(corners)
    if not common.varying:
        message = f"no stage's result depends on {' and '.join(one.key for one in swept)}"
        raise InputError(message, hint="every run would be the same")
    place = next((f"override `{one.written}`" for one in swept if isinstance(one, Range)), f"--trials {trials}")
    direction: goal.Direction = "minimize" if minimize else "maximize"
    aim = goal.find(corners[0].recipe, common.varying, maximize or minimize, direction)
    slots = environments(at_once, environment)
    folder, draws = loader.folder, trials is not None or any(isinstance(one, Range) for one in swept)
    if draws:
        proposals.require(place)
    if draws and aim is None:
        hint = "add `--maximize STAGE.METRIC` or `--minimize STAGE.METRIC`, or a judge: set `evaluate` in the recipe"
        raise InputError("nothing says which run is the best, so none can be proposed", place=place, hint=hint)
    with _held(folder):
        sweeping = _Sweep(loader, common, aim, slots, say)
        source: Grid | Study
        if aim is None or not draws:
            to_do = [one for one in corners if not one.is_done()]
            if to_do:
                sweeping.begins(len(corners))
                check(loader, to_do, say)
            source = Grid([one.combination for one in corners])
        else:
            is_new = not (folder / STUDY).exists()  # a new one is made once nothing is wrong
            if is_new:
                sweeping.begins(trials or TRIALS)
                check(loader, corners, say)
            source = Study(folder, swept, loader.words, aim, trials or TRIALS, corners[0].recipe.seed, common.inputs)
            if source.has_more and not is_new:
                sweeping.begins(source.total)
                check(loader, corners, say)
        sweeping.run(source)
        return sweeping.results(source)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder; one that is made for it, and stays empty, is removed in the end.

    Raises:
        RunError: another sweep is at work there.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        hint = "wait for it; a recipe with another `name` has a folder of its own"
        with Lock(folder, LOCK, hint).held(keep=not made):
            yield
    finally:
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()


@dataclass
class _AtWork:
    """A run at work.

    Attributes:
        child: its process.
        proposals: those that it answers: Optuna may propose the same values twice.
        number: of the run, from 1.
        environment: what it has of the machine.
        began: when, by `time.monotonic`.
    """

    child: Child
    proposals: list[Proposal]
    number: int
    environment: dict[str, str]
    began: float


class _Sweep:
    """The runs of a sweep, one or several at a time.

    Args:
        loader: loads the recipe of each.
        common: what they share.
        aim: by which they are compared.
        slots: the variables of each that is at work at a time.
        say: takes lines.
    """

    def __init__(
        self, loader: Loader, common: Shared, aim: Goal | None, slots: Sequence[dict[str, str]], say: Say
    ) -> None:
        self.loader, self.common, self.aim, self.say = loader, common, aim, say
        self.free = list(slots)
        self.several = len(slots) > 1
        self.at_work: dict[str, _AtWork] = {}
        self.made: dict[str, Combination] = {}
        self.failed: dict[str, str] = {}
        self.pruned: set[str] = set()
        self.stopping = False
        self.number = 0

    def begins(self, total: int) -> None:
        """Say what will be done."""
        names = ", ".join(one.key for one in self.loader.swept)
        of_all = f"; {_listed(self.common.stages)} the same in all" if self.common.stages else ""
        self.say(f"sweep   {total} runs over {names}, in {self.loader.folder}{of_all}")
        self.say("check   settings and data of every run")

    def run(self, source: Grid | Study) -> None:
        """Make all runs.

        Raises:
            Interrupted: it was asked to stop, and has.
            RunError: a stage that all share failed.
        """
        for combination, how in source.earlier():
            self.made[combination.name] = combination
            self.pruned |= {combination.name} if how == PRUNED else set()
        self.number = len(source.earlier())
        self.total = source.total
        with signals.stopping(lambda: bool(self.at_work) and not self.stopping, self.stop, self.say):
            try:
                while not self.stopping or self.at_work:
                    while self.free and not self.stopping and (proposal := source.next()):
                        self._begin(proposal, source)
                    if not self.at_work:
                        break
                    time.sleep(LOOK_S)
                    for name in list(self.at_work):
                        self._look(name, source)
            finally:
                for one in self.at_work.values():  # after an error, or a second Ctrl-C
                    one.child.kill()
        if self.stopping:
            raise Interrupted(f"stopped: {len(self._done())} of {self.total} runs are done")

    def stop(self) -> None:
        """Have every run at work stop with a checkpoint, and begin no other."""
        self.stopping = True
        for one in self.at_work.values():
            one.child.stop()

    def results(self, source: Grid | Study) -> Results:
        """What all runs came to, with a report over them."""
        why = self.failed | dict.fromkeys(self.pruned, PRUNED)
        folder, found = self.loader.folder, list[Result]()
        for name, combination in self.made.items():
            found.append(read(combination, folder / name, self.common.varying, self.aim, why))
        every = Results(
            folder,
            [one.key for one in self.loader.swept],
            self.common.stages,
            self.aim.stage if self.aim else self.common.varying[-1],
            self.aim,
            found,
            study=folder / STUDY if isinstance(source, Study) else None,
            failed=self.failed,
        )
        best = every.best
        command = best and ["rlhf-pipeline", "run", self.loader.recipe, *self.loader.settings(best.combination)]
        written = self._report([one.path for one in found if one.state != "missing"], best)
        return dataclasses.replace(every, command=shlex.join(command) if command else None, report=written)

    def _begin(self, proposal: Proposal, source: Grid | Study) -> None:
        """Start a run, unless it is done, or at work for another proposal."""
        combination = proposal.combination
        name = combination.name
        self.made[name] = combination
        self.number += 1
        if name in self.at_work:
            self.at_work[name].proposals.append(proposal)
            return
        said = f"run {self.number} of {self.total}"
        try:
            planned = self.loader.one(combination.values)
        except InputError as error:  # two settings that do not go together, which the ends of ranges do not show
            self._failed(name, [proposal], error.message, source)
            self.say(f"{said}  {combination}: {error.message}")
            return
        if planned.is_done():
            self.say(f"{said}  {combination}: is done")
            self._ended(name, [proposal], source)
            return
        self.say(f"{said}  {combination}")
        environment = self.free.pop()
        if self.several:
            self._share(planned, environment)
        if self.stopping:
            self.free.append(environment)
            return
        child = self._start(planned, environment)
        self.at_work[name] = _AtWork(child, [proposal], self.number, environment, time.monotonic())

    def _start(self, planned: Planned, environment: Mapping[str, str], *options: str) -> Child:
        combination = planned.combination
        directory = self.loader.folder / combination.name
        return Child(
            self.loader.recipe,
            self.loader.command(combination),
            directory,
            environment,
            list(planned.recipe.stages),
            options,
        )

    def _share(self, planned: Planned, environment: Mapping[str, str]) -> None:
        """Make what all runs share in this one, before others begin at the same time and make it as well."""
        for options in _left_to_share(planned, self.common.stages):
            child = self._start(planned, environment, *options)
            self.at_work[""] = one = _AtWork(child, [], self.number, {}, time.monotonic())
            while child.exit_code is None:
                time.sleep(LOOK_S)
                self._tell_news(one)
            self._tell_news(one)
            del self.at_work[""]
            if self.stopping:
                return
            if child.exit_code:
                self._refuse_if_shared_failed(child)
                return  # the run itself will say what is wrong

    def _look(self, name: str, source: Grid | Study) -> None:
        """See what a run has done, and how it has ended if it has."""
        one = self.at_work[name]
        code = one.child.exit_code
        self._tell_news(one)
        if code is None:
            if self.aim and not one.child.asked:
                values = logged(one.child.directory, self.aim)
                worse = [source.report(proposal, values) for proposal in one.proposals]
                if any(worse):
                    self.say(f"run {one.number} of {self.total}  is stopped: others were better by now")
                    one.child.stop()
            return
        del self.at_work[name]
        self.free.append(one.environment)
        took = duration(time.monotonic() - one.began)
        if code == 0:
            value = self._ended(name, one.proposals, source)
            self.say(f"run {one.number} of {self.total}  done in {took}{value}")
        elif code == STOPPED and self.stopping:
            return  # the same command goes on with it
        elif code == STOPPED and one.child.asked:
            self.pruned.add(name)
            for proposal in one.proposals:
                source.pruned(proposal)
        else:
            problem = one.child.problem()
            self._failed(name, one.proposals, problem, source)
            self.say(f"run {one.number} of {self.total}  failed after {took}: {problem}")
            self._refuse_if_shared_failed(one.child)

    def _ended(self, name: str, answered: Sequence[Proposal], source: Grid | Study) -> str:
        """Note what a run that is done came to; the goal's number, for the end of a line."""
        combination = answered[0].combination
        found = read(combination, self.loader.folder / name, self.common.varying, self.aim, {})
        if self.aim and found.value is None:
            self._failed(name, answered, f"stage `{self.aim.stage}` has no metric `{self.aim.metric}`", source)
        for proposal in answered:
            if found.value is not None:
                source.done(proposal, found.value)
        return "" if found.value is None else f", {self.aim} {found.value:.4g}"

    def _failed(self, name: str, answered: Sequence[Proposal], why: str, source: Grid | Study) -> None:
        self.failed[name] = why
        for proposal in answered:
            source.failed(proposal)

    def _refuse_if_shared_failed(self, child: Child) -> None:
        """End the sweep where a stage failed that all runs need.

        Raises:
            RunError: one has.
        """
        for stage in state.read(child.directory, by_size=True).stages:
            if stage.name in self.common.stages and stage.state in ("failed", GATE_CLOSED):
                raise RunError(
                    f"stage `{stage.name}`, which is the same in all runs: {child.problem()}",
                    hint=f"what it said is in {child.directory}; the same command goes on from here",
                )

    def _tell_news(self, one: _AtWork) -> None:
        for line in one.child.news():
            self.say(f"run {one.number} of {self.total}  {line}")

    def _done(self) -> list[str]:
        """The runs that are done."""
        return [name for name in self.made if state.read(self.loader.folder / name, by_size=True).state == "done"]

    def _report(self, runs: Sequence[Path], best: Result | None) -> Path | None:
        """Write the page over all runs where something is newer than it. It never changes how the sweep ends."""
        file = self.loader.folder / REPORT
        patterns = (f"*/{RECORD}", COMPARISON)
        newest = max((one.stat().st_mtime for run in runs for at in patterns for one in run.glob(at)), default=0.0)
        if not runs or (file.is_file() and file.stat().st_mtime >= newest):
            return file if file.is_file() else None
        try:
            report.write(runs, file, best.path if best else None)
        except Exception as error:  # a full disk, or a fault of ours
            self.say(f"warning: there is no new report: {type(error).__name__}: {error}")
        return file if file.is_file() else None


def _left_to_share(planned: Planned, stages: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The options of `run` that make, one after the other, those of some stages that are not there yet."""
    needed = [
        one.name for one in plan.make(planned.recipe) if one.name in stages and not one.is_current and not one.earlier
    ]
    first = next((i for i, name in enumerate(planned.recipe.stages) if name not in stages), len(stages))
    before = [name for name in list(planned.recipe.stages)[:first] if name in needed]
    if before:
        yield ("--until", before[-1])
    for name in needed:
        if name not in before:
            yield ("--only", name)


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"
