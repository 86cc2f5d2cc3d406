"""`rounds`: stages that are repeated, written out as ordinary stages before anything else looks at a recipe. No torch.

`{n: 2, stages: [candidates, dpo]}` makes `candidates-1`, `dpo-1`, `candidates-2` and `dpo-2` of two stages. What a
stage of a round is built on is then said by name, in the keys that any stage has; docs/rounds.md has the rules.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.kinds import Kind
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.origins import Origins, Problems
from rlhf_pipeline.recipe.schema import BASE, MOST_ROUNDS, OF_STAGE, PREVIOUS
from rlhf_pipeline.recipe.yaml import KeyPath, dump_inline

Stages = dict[str, Any]


def repeated_in(content: dict[str, Any]) -> tuple[int, list[str]] | None:
    """How many rounds there are, and of which stages; None where there are none, or it is not said as it should be."""
    spec, stages = content.get("rounds"), content.get("stages")
    if not isinstance(spec, dict) or not isinstance(stages, dict):
        return None
    n, names = spec.get("n"), spec.get("stages")
    if type(n) is not int or not 1 <= n <= MOST_ROUNDS or not isinstance(names, list) or not names:
        return None
    return (n, names) if all(isinstance(name, str) for name in names) else None


def round_of(override: str, content: dict[str, Any]) -> tuple[str, int] | None:
    """The stage and the round that an override is for, as `dpo-2.trainer.beta=0.2`; None where it is for all rounds."""
    repeated = repeated_in(content)
    found = re.match(r"(?:stages\.)?([\w-]+)-(\d+)(?=[.=])", override)
    if repeated is None or found is None or f"{found[1]}-{found[2]}" in content["stages"]:
        return None
    return (found[1], int(found[2])) if found[1] in repeated[1] else None


def expand(content: dict[str, Any], origins: Origins, problems: Problems) -> None:
    """Write out the stages of every round in place of those that are repeated.

    `rounds` itself stays, for the schema to look at.

    Args:
        content: the whole recipe, which is changed; data are mappings.
        origins: where each value was written; a stage of a round has those of the stage that is repeated.
        problems: where to note what is wrong; then nothing is written out.
    """
    repeated = repeated_in(content)
    if repeated is None or not _can_be_repeated(*repeated, content["stages"], problems):
        return
    n, names = repeated
    stages: Stages = content["stages"]
    rounds = _Rounds(n, names, stages, origins)
    _split_prompts(rounds, content["rounds"], problems)
    written_out: Stages = {}
    for name, stage in stages.items():
        if name == names[0]:
            for number in range(1, n + 1):
                written_out |= {f"{one}-{number}": rounds.stage(one, number) for one in names}
        elif name not in names:
            written_out[name] = stage
    evaluate = content.get("evaluate")
    judge = {"judge": evaluate.get("ai_judge")} if isinstance(evaluate, dict) else {}
    for section in (judge, *(stage for name, stage in stages.items() if name not in names)):
        for holder, key, before in _references(section):
            if (of := holder[key].removeprefix(before)) in names:
                holder[key] = f"{before}{of}-{n}"
    for name in names:
        origins.forget(("stages", name))
    origins.repeated = {f"{name}-{number}": name for name in names for number in range(1, n + 1)}
    content["stages"] = written_out


class _Rounds:
    """What the stages of a round are made from.

    Attributes:
        first: the first stage of a round that starts from a policy.
        start: the policy that the first round starts from; None where that is not sound.
        last: the stage whose policy the next round starts from.
        split: the stages of which each round gets prompts of its own.
    """

    def __init__(self, n: int, names: Sequence[str], stages: Stages, origins: Origins) -> None:
        self.n, self.names, self.stages, self.origins = n, names, stages, origins
        self.kinds = {name: _kind(name, stages[name]) for name in names}
        self.first = next(name for name in names if self.starts_from_policy(name))
        self.last = [name for name in names if self._makes(name) == "policy"][-1]
        self.start = self._start()
        self.split: list[str] = []

    def _makes(self, name: str) -> str | None:
        kind = self.kinds[name]
        return kind.makes if kind else None

    def _takes(self, name: str, key: str) -> bool:
        kind = self.kinds[name]
        return kind is not None and key in kind.takes

    def starts_from_policy(self, name: str) -> bool:
        """Whether a stage starts from a policy as the round does. A reward model starts from where it always does."""
        return self._takes(name, "init") and self._makes(name) != "reward"

    def _is_ahead(self, name: str, of: Any) -> bool:
        """Whether a stage names itself or one that comes later in the round: that of the round before is meant."""
        return of in self.names and self.names.index(of) >= self.names.index(name)

    def _start(self) -> str | None:
        said = self.stages[self.first].get("init")
        wanted = next((one for one in said if one not in self.names), None) if isinstance(said, list) else said
        if wanted is None or self._is_ahead(self.first, wanted):
            earlier = list(self.stages)[: list(self.stages).index(self.names[0])]
            found = {name: _kind(name, self.stages[name]) for name in reversed(earlier)}
            return next((name for name, kind in found.items() if kind and kind.begins), BASE)
        if wanted == BASE or outside.is_one(wanted):
            return str(wanted)
        kind = _kind(wanted, self.stages[wanted]) if wanted in self.stages and wanted not in self.names else None
        return wanted if kind and kind.is_policy else None

    def stage(self, name: str, number: int) -> Any:
        """A stage as it is in one round, whose origins are noted."""
        stage, path = copy.deepcopy(self.stages[name]), ("stages", f"{name}-{number}")
        self.origins.copy(("stages", name), path)
        if "kind" not in stage and name in kinds.NAMES:
            stage["kind"] = name
            self.origins.derived[*path, "kind"] = "from the stage's name"
        goes_on = self.starts_from_policy(name) and self._go_on(name, number, stage, path)
        for holder, key, before in _references(stage):
            of = holder[key].removeprefix(before)
            if of in self.names and not (holder is stage and key == "init" and goes_on):
                holder[key] = f"{before}{of}-{number}"
        if self._takes(name, "reference"):
            self._refer(number, stage, path, goes_on)
        if name in self.split and "part" not in stage["data"]:
            stage["data"]["part"] = [number, self.n]
            self.origins.derived[*path, "data", "part"] = f"round {number} of {self.n}: its own prompts"
        return stage

    def _go_on(self, name: str, number: int, stage: Any, path: KeyPath) -> bool:
        """Have a stage start from where its round starts, unless it says otherwise; whether it does."""
        said, before = stage.get("init"), f"{self.last}-{number - 1}" if number > 1 else self.start
        if isinstance(said, list):
            self._go_on_in_list(name, number, stage, path, before)
            return False
        earlier = self.names[: self.names.index(name)]
        if said is None and any((kind := self.kinds[one]) and kind.begins for one in earlier):
            return False  # by default it is the stage of this round that begins
        is_ahead = self._is_ahead(name, said)
        if not is_ahead and said not in (None, self.start):
            return False
        if is_ahead and number > 1:
            before = f"{said}-{number - 1}"
        if before is None or said == before:
            return True
        self.origins.forget((*path, "init"))
        if number == 1 and name == self.first:
            stage.pop("init", None)  # as by default
        else:
            where = "where the first round starts" if number == 1 else "where the round before ends"
            stage["init"], self.origins.derived[*path, "init"] = before, where
        return True

    def _go_on_in_list(self, name: str, number: int, stage: Any, path: KeyPath, before: str | None) -> None:
        """The same of several policies that are sampled from: those of later stages are the round before's."""
        said = stage["init"]
        ahead = [one for one in said if self._is_ahead(name, one)]
        if ahead:
            kept = [one for one in said if one not in ahead or number > 1]
            stage["init"] = [f"{one}-{number - 1}" if one in ahead else one for one in kept]
        else:
            stage["init"] = [before if one == self.start else one for one in said]
        if stage["init"] != said:
            for place in range(len(said)):
                self.origins.forget((*path, "init", place))

    def _refer(self, number: int, stage: Any, path: KeyPath, goes_on: bool) -> None:
        """Have a stage that goes on from the round before measure from where the first round starts."""
        if stage.get("reference") == PREVIOUS:
            del stage["reference"]
            self.origins.forget((*path, "reference"))
            self.origins.derived[*path, "reference"] = "`previous`: what it starts from"
        elif stage.get("reference") is None and goes_on and number > 1 and self.start is not None:
            stage["reference"] = self.start
            self.origins.derived[*path, "reference"] = "where the first round starts"


def _kind(name: str, stage: Any) -> Kind | None:
    """The kind of a stage as it is written; None where that is wrong."""
    return kinds.find(stage.get("kind", name)) if isinstance(stage, dict) else None


def _references(stage: Any) -> Iterator[tuple[Any, Any, str]]:
    """Where a stage names others: a mapping or a list, the key in it, and what comes before the name."""
    if not isinstance(stage, dict):
        return
    for key in ("init", "reward", "reference"):
        if isinstance(stage.get(key), str):
            yield stage, key, ""
    if isinstance(stage.get("init"), list):
        yield from ((stage["init"], i, "") for i, one in enumerate(stage["init"]) if isinstance(one, str))
    rewards = stage.get("rewards")
    holders = [(one, "stage") for one in rewards] if isinstance(rewards, list) else []
    holders.append((stage.get("judge"), "model"))
    yield from ((one, key, "") for one, key in holders if isinstance(one, dict) and isinstance(one.get(key), str))
    for data in (stage.get(key) for key in kinds.DATA_KEYS):
        for source in sources_of(data):
            if isinstance(source.get("path"), str) and source["path"].startswith(OF_STAGE):
                yield source, "path", OF_STAGE


def sources_of(data: Any) -> list[dict[str, Any]]:
    """The mappings of `data` that say where rows come from: it, its `eval_data` and those of its `mix`."""
    if not isinstance(data, dict):
        return []
    mix = data.get("mix")
    found = [data, data.get("eval_data"), *(mix if isinstance(mix, list) else ())]
    return [one for one in found if isinstance(one, dict)]


def _can_be_repeated(n: int, names: list[str], stages: Stages, problems: Problems) -> bool:
    """Whether these stages can be repeated as they are; what is wrong is noted."""
    path: KeyPath = ("rounds", "stages")
    for place, name in enumerate(names):
        if name not in stages:
            near = difflib.get_close_matches(name, stages, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the stages there are {', '.join(map(str, stages))}"
            problems.add((*path, place), f"there is no stage `{name}` to repeat", hint)
        elif name in names[:place]:
            problems.add((*path, place), f"stage `{name}` is named twice", "a stage runs once in each round: remove it")
    if problems.within(path):
        return False
    order = [name for name in stages if name in names]
    if names != order:
        problems.add(
            path, "the stages of a round are in another order than under `stages`", f"write {dump_inline(order)}"
        )
    listed = list(stages)
    between = [name for name in listed[listed.index(order[0]) : listed.index(order[-1])] if name not in names]
    if between:
        problems.add(
            path,
            f"stage `{between[0]}` comes between stages that are repeated, and is not repeated itself",
            "name it here, or move it before or behind them",
        )
    for name in names:
        for number in range(1, n + 1):
            if f"{name}-{number}" in stages:
                problems.add(
                    ("stages", f"{name}-{number}"),
                    f"`{name}-{number}` is what `{name}` is called in round {number}",
                    "give this stage another name",
                    of_key=True,
                )
                return False
    found = [_kind(name, stages[name]) for name in names]
    if None not in found and not any(kind and kind.is_policy for kind in found):
        problems.add(
            path,
            "no stage of a round trains a policy, so each round would do the same again",
            f"name one of kind {kinds.either(kinds.makers('policy'))} too",
        )
    return not problems.within(path) and any(kind and kind.is_policy for kind in found)


def _split_prompts(rounds: _Rounds, spec: dict[str, Any], problems: Problems) -> None:
    """Find out whose prompts are shared out among the rounds."""
    asking = [name for name in rounds.names if (kind := rounds.kinds[name]) and kind.reads == "prompts"]
    asking = [
        name
        for name in asking
        if (sources := sources_of(rounds.stages[name].get("data")))
        and not any(one.get("path") in [f"{OF_STAGE}{other}" for other in rounds.names] for one in sources)
    ]
    if spec.get("prompts") is not None and not asking:
        problems.add(
            ("rounds", "prompts"),
            "`prompts` has no effect: no stage of a round reads prompts from elsewhere",
            "remove it",
            of_key=True,
        )
    if spec.get("prompts") != "reuse" and rounds.n > 1:
        rounds.split = asking
