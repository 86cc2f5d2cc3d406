"""Which run comes next: all combinations in their order, or those that Optuna proposes. No torch."""

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.yaml import parse_value
from rlhf_pipeline.sweep.goal import Goal
from rlhf_pipeline.sweep.keys import Combination, Listed, Swept, as_text, combination

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"  # in a sweep's folder: Optuna's storage
RUN = "run"  # the attribute of a trial that names its run
DIGITS = 4  # of a number that is proposed
UNPRUNED = 5  # trials that are finished before one is pruned
WARM_UP = 33  # percent of a stage's steps in which nothing is pruned
TRIALS = 20  # by default


class Proposal(NamedTuple):
    """A run that is to be made.

    Attributes:
        combination: its values.
        trial: of Optuna; None in a grid.
    """

    combination: Combination
    trial: "optuna.trial.Trial | None" = None


class Grid:
    """All combinations, in their order.

    Args:
        combinations: they.
    """

    def __init__(self, combinations: Sequence[Combination]) -> None:
        self.combinations = list(combinations)
        self._left: Iterator[Combination] = iter(self.combinations)

    @property
    def total(self) -> int:
        """How many runs there will be."""
        return len(self.combinations)

    def next(self) -> Proposal | None:
        """The next run; None where there is none left."""
        found = next(self._left, None)
        return Proposal(found) if found else None

    def report(self, proposal: Proposal, values: Mapping[int, float]) -> bool:
        """Whether a run should be stopped by what it has logged: never."""
        return False

    def done(self, proposal: Proposal, value: float) -> None:
        """Take the value that a run came to."""

    def pruned(self, proposal: Proposal) -> None:
        """Note that a run was stopped early."""

    def failed(self, proposal: Proposal) -> None:
        """Note that a run failed."""

    def earlier(self) -> list[tuple[Combination, str]]:
        """The runs of former sweeps that belong to this one: none."""
        return []


class Study:
    """Runs that Optuna proposes, one after the other, from what the former ones came to.

    The study lies in `study.db` in the sweep's folder. Its name holds a hash of all that makes values comparable, so a
    recipe that was changed begins a new one there. A trial that a killed sweep has left is taken up with the same
    values, and one that failed is tried again; both count.

    Args:
        folder: the sweep's.
        swept: the keys.
        words: from `words_for`.
        goal: what Optuna is told of each run.
        trials: how many runs there shall be, those of former sweeps among them.
        seed: of the sampler.
        inputs: what decides the results of each stage beside the values.
    """

    def __init__(
        self,
        folder: Path,
        swept: Sequence[Swept],
        words: Mapping[str, str],
        goal: Goal,
        trials: int,
        seed: int,
        inputs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.swept, self.words, self.file = swept, words, folder / STUDY
        self._states = optuna.trial.TrialState
        self._reported: dict[int, set[int]] = {}  # of each trial at work, by its number
        name = _name(swept, goal, inputs)
        storage = optuna.storages.RDBStorage(f"sqlite:///{self.file.absolute()}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                study_name=name, storage=storage, direction=goal.direction, load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=WARM_UP),
            )  # fmt: skip
            found = self.study.get_trials(deepcopy=False)
            # The sampler's first draws depend on its seed alone: another one each time, or they would come again.
            self.study.sampler = optuna.samplers.TPESampler(seed=(seed + len(found)) % 2**32)
        self._interrupted = [one for one in found if one.state == self._states.RUNNING]
        ended = [one for one in found if one.state in (self._states.COMPLETE, self._states.PRUNED)]
        self._earlier = [
            (self._named(one.params), one.state.name.lower()) for one in ended if self._has_all(one.params)
        ]
        self.total = max(trials, len(self._earlier) + len(self._interrupted))
        self._left = self.total - len(self._earlier)
        waiting = [one.system_attrs.get("fixed_params") for one in found if one.state == self._states.WAITING]
        good = [one.params for one in ended] + [one.params for one in self._interrupted] + waiting
        for one in [one for one in found if one.state == self._states.FAIL and self._has_all(one.params)]:
            if one.params not in good:
                good.append(one.params)
                self.study.enqueue_trial(one.params)

    @property
    def has_more(self) -> bool:
        """Whether runs are left to make."""
        return self._left > 0

    def next(self) -> Proposal | None:
        """The next run; None where there are as many as were asked for."""
        if self._left <= 0:
            return None
        self._left -= 1
        if self._interrupted:
            import optuna

            former = self._interrupted.pop(0)
            trial = optuna.trial.Trial(self.study, former._trial_id)
            self._reported[trial.number] = set(former.intermediate_values)
        else:
            trial = self.study.ask()
        found = self._named({one.key: _propose(one, trial) for one in self.swept})
        trial.set_user_attr(RUN, found.name)
        return Proposal(found, trial)

    def report(self, proposal: Proposal, values: Mapping[int, float]) -> bool:
        """Whether a run should be stopped by what it has logged.

        Args:
            proposal: it.
            values: what was logged of the goal's metric, by how much was done, in percent.
        """
        assert proposal.trial
        known = self._reported.setdefault(proposal.trial.number, set())
        new = sorted(values.keys() - known)
        for percent in new:
            proposal.trial.report(values[percent], percent)
        known.update(new)
        return bool(new) and proposal.trial.should_prune()

    def done(self, proposal: Proposal, value: float) -> None:
        """Take the value that a run came to."""
        self._tell(proposal, value, self._states.COMPLETE)

    def pruned(self, proposal: Proposal) -> None:
        """Note that a run was stopped early."""
        self._tell(proposal, None, self._states.PRUNED)

    def failed(self, proposal: Proposal) -> None:
        """Note that a run failed."""
        self._tell(proposal, None, self._states.FAIL)

    def earlier(self) -> list[tuple[Combination, str]]:
        """The runs of former sweeps that belong to this one, each with `complete` or `pruned`."""
        return self._earlier

    def _tell(self, proposal: Proposal, value: float | None, state: "optuna.trial.TrialState") -> None:
        assert proposal.trial
        self.study.tell(proposal.trial, value, state)

    def _has_all(self, params: Mapping[str, Any]) -> bool:
        return all(one.key in params for one in self.swept)

    def _named(self, params: Mapping[str, Any]) -> Combination:
        return combination({one.key: _value(one, params[one.key]) for one in self.swept}, self.words)


def require(written: str) -> None:
    """See that Optuna is there.

    Args:
        written: the argument that needs it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError(
            "Optuna is not installed, which proposes the values of a range",
            place=written,
            hint="pip install optuna, or list the values: all combinations of lists need no Optuna",
        )


def _propose(swept: Swept, trial: "optuna.trial.Trial") -> Any:
    """The value of a key in a trial: the one that it has, or a new one."""
    if isinstance(swept, Listed):
        return trial.suggest_categorical(swept.key, [as_text(value) for value in swept.values])
    if swept.whole:
        return trial.suggest_int(swept.key, int(swept.low), int(swept.high), log=swept.log)
    return trial.suggest_float(swept.key, swept.low, swept.high, log=swept.log)


def _value(swept: Swept, proposed: Any) -> Any:
    """The value of a run where Optuna proposes that: of a range so many digits, inside it."""
    if isinstance(swept, Listed):
        return parse_value(proposed)
    if swept.whole:
        return proposed
    return min(max(float(f"{proposed:.{DIGITS}g}"), swept.low), swept.high)


def _name(swept: Sequence[Swept], goal: Goal, inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """The study's: what a person looks for, and a hash of all that makes values comparable."""
    keys = [
        (one.key, [as_text(value) for value in one.values] if isinstance(one, Listed) else one.log) for one in swept
    ]
    content = json.dumps([keys, str(goal), goal.direction, inputs], sort_keys=True).encode()
    said = ", ".join(one.key for one in swept)
    return f"{goal.direction} {goal} over {said} ({hashlib.sha256(content).hexdigest()[:8]})"
