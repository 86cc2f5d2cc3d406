"""Stages that make rows, and stages that read the rows of others. No torch."""

import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence

from rlhf_pipeline import kinds
from rlhf_pipeline.recipe import gates
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import BASE, OF_STAGE, AIJudge, Evaluate, Recipe, Sampling, Source, Stage, Until
from rlhf_pipeline.recipe.yaml import KeyPath

LONGEST_DIMENSION = 40
DIMENSION = re.compile(rf"[^\W_][\w -]{{0,{LONGEST_DIMENSION - 1}}}")
DIMENSIONS = ("helpfulness", "honesty", "harmlessness", "conciseness")
FUNCTION = re.compile(r"[\w.]+:\w+")
OF_ADDRESS = ("served_model", "api_key_env", "concurrency", "timeout", "retries")
# Looks a stage's name up, at the place where it is written, among the earlier ones of some kinds; notes what is wrong.
Require = Callable[[KeyPath, str, tuple[str, ...], Problems], None]


def resolve_row_stage(recipe: Recipe, name: str, require: Require, problems: Problems) -> None:
    """Fill in what a stage that makes rows does by default; what is wrong is noted."""
    stage, path = recipe.stages[name], ("stages", name)
    takes = stage.facts.takes
    if "sampling" in takes:
        stage.sampling = stage.sampling or Sampling()
    if "n" in takes:
        stage.n = stage.n or 4
    if "passes" in takes:
        stage.passes = stage.passes or 1
        stage.principles = stage.principles or "default"
    if "ties" in takes:
        stage.ties = stage.ties or "drop"
    if stage.facts.by_people:
        stage.until = stage.until if stage.until and stage.until.says else Until(per_item=1)
        stage.dimensions = list(DIMENSIONS) if stage.dimensions is None else stage.dimensions
        _require_bound(stage.until, (*path, "until"), problems)
        if stage.people and stage.people.min_checks is not None and stage.check is None:
            said = "`min_checks` has no effect without `check`, which has the pairs whose answer is known"
            problems.add((*path, "people", "min_checks"), said, "name such pairs in `check`, or remove it", of_key=True)
        _require_dimensions(stage.dimensions, (*path, "dimensions"), problems)
    if "judge" in takes:
        if stage.judge is not None:
            _resolve_judge(stage.judge, (*path, "judge"), require, problems)
        else:
            problems.add((*path, "judge"), f"stage `{name}` names no judge", f"for example `judge: {{model: {BASE}}}`")
    sampling = stage.sampling
    if sampling and sampling.temperature == 0 and (stage.n or 1) > 1 and not problems.within((*path, "sampling")):
        problems.add(
            (*path, "n"), "at temperature 0 all replies of a policy to a prompt are the same",
            "set `sampling.temperature`, or `n: 1`",
        )  # fmt: skip


def _require_dimensions(dimensions: Sequence[str], path: KeyPath, problems: Problems) -> None:
    """See that each dimension has a name of its own, which the page has room for."""
    for place, name in enumerate(dimensions):
        if not DIMENSION.fullmatch(name):
            said = f"a dimension is a word or a few, of up to {LONGEST_DIMENSION} characters, got {name!r}"
            problems.add((*path, place), said, "for example `dimensions: [helpfulness, honesty]`")
        elif name in dimensions[:place]:
            problems.add((*path, place), f"the dimension `{name}` is named twice", "remove one")


def _require_bound(until: Until, path: KeyPath, problems: Problems) -> None:
    """See that the bound on the reward's accuracy is one: an operator and a number, which can hold."""
    bound = until.reward_accuracy
    if bound is None:
        return
    said = f"expected an operator and a number, got {bound!r}"
    try:
        gate = gates.parse("reward_accuracy", bound)
    except ValueError:
        gate = None
    if gate and not gate.needs_error:
        if gate.holds(0.0) or gate.holds(1.0):
            return
        said = f"{bound!r} never holds: an accuracy is between 0 and 1"
    problems.add((*path, "reward_accuracy"), said, "for example `reward_accuracy: '>= 0.7'`")


def resolve_ai_judge(evaluate: Evaluate, require: Require, problems: Problems) -> None:
    """See that policies have a judge, and that an AI is one that can be asked; what is wrong is noted."""
    if evaluate.ai_judge is not None:
        _resolve_judge(evaluate.ai_judge, ("evaluate", "ai_judge"), require, problems)
    elif evaluate.judge is None and not problems.within(("evaluate",)):
        problems.add(
            ("evaluate", "judge"), "`evaluate` names no judge",
            f"set `judge: module:function`, or `ai_judge: {{model: {BASE}}}`, or both",
        )  # fmt: skip


def _resolve_judge(judge: AIJudge, path: KeyPath, require: Require, problems: Problems) -> None:
    """See that a judge is one that can be asked, and that its keys have an effect."""
    if judge.is_remote and (fault := _fault_of_address(judge.model)):
        problems.add((*path, "model"), *fault)
    elif judge.is_remote and judge.served_model is None:
        problems.add(
            (*path, "served_model"), "`served_model` is missing: a server may have several models",
            "set it to the model's name there, as its /v1/models lists it",
        )  # fmt: skip
    elif judge.stage is not None:
        require((*path, "model"), judge.stage, kinds.makers("policy"), problems)
    elif judge.is_function and not FUNCTION.fullmatch(judge.model):
        said = f"expected `{BASE}`, a stage, an http(s) address or `module:function`, got {judge.model!r}"
        problems.add((*path, "model"), said)
    for key in [] if judge.is_remote else OF_ADDRESS:
        if getattr(judge, key) != AIJudge.model_fields[key].default:
            problems.add(
                (*path, key), f"`{key}` has no effect: the judge is not at an address", "remove it", of_key=True
            )
    if judge.min_probability != AIJudge.model_fields["min_probability"].default and not judge.is_local:
        said = "`min_probability` has no effect: only the probabilities of a model on this machine are read"
        problems.add((*path, "min_probability"), said, "remove it", of_key=True)
    if judge.answers != AIJudge.model_fields["answers"].default:
        why = None if judge.template else "the template that ships with the package asks for A or B"
        if judge.is_remote or judge.is_function:
            why = "only the probabilities of a model on this machine are read"
        if why:
            problems.add((*path, "answers"), f"`answers` has no effect: {why}", "remove it", of_key=True)
        elif judge.answers[0] == judge.answers[1]:
            problems.add((*path, "answers"), "the two answers are the same word", "for example `[A, B]`")
    if judge.rubric is not None and judge.principles is not None:
        problems.add(
            (*path, "principles"), "`rubric` and `principles` exclude each other", "remove one of them", of_key=True
        )


def _fault_of_address(address: str) -> tuple[str, str | None] | None:
    """What keeps an address from being used, and a hint; None where nothing does."""
    try:
        parts = urllib.parse.urlsplit(address)
        _ = parts.port
    except ValueError as error:
        return f"this is no address: {error}", "it is like http://localhost:8000/v1"
    if parts.scheme not in ("http", "https"):
        return "the address of a judge begins with http:// or https://", None
    if not parts.hostname:
        return "this address has no host", "it is like http://localhost:8000/v1"
    if parts.username or parts.password or parts.query:
        what = "`?`" if parts.query else "user or password"
        return (
            f"an address has no {what} here: it is written where others read it",
            "set `api_key_env` to the environment variable that holds the key",
        )
    return None


def resolve_rows(recipe: Recipe, name: str, earlier: Mapping[str, Stage], require: Require, problems: Problems) -> None:
    """See that the rows of other stages that a stage reads are such as it can read; what is wrong is noted."""
    stage = recipe.stages[name]
    for key, data in stage.tables.items():
        path: KeyPath = ("stages", name, key)
        reads = stage.reads(key)
        places: list[tuple[KeyPath, Source]] = [((*path, "mix", i), source) for i, source in enumerate(data.mix)]
        places += [(path, data)] if not data.mix else []
        places += [((*path, "eval_data"), data.eval_data)] if data.eval_data else []
        for place, source in places:
            if source.stage is not None and not problems.is_broken((*place, "path")):
                require((*place, "path"), source.stage, kinds.makers("rows"), problems)
                unknown: tuple[KeyPath, ...] = (*place, "path"), ("stages", source.stage, "kind")
                if not any(problems.is_broken(one) for one in unknown):
                    _require_fit(source.stage, earlier[source.stage], reads, (*place, "path"), problems)
        maker = earlier.get(str(data.stage))
        if data.chat is None and maker is not None and maker.data.chat is not None:
            data.chat = maker.data.chat
            problems.origins.derived[*path, "chat"] = f"as in stage {data.stage}"
        compares = data.pairs is None and reads == "preferences" and stage.facts.keeps_reference
        if compares and maker is not None and "n" in maker.facts.takes:
            data.pairs = "best_and_worst"
            problems.origins.derived[*path, "pairs"] = "of sampled replies"


def _require_fit(name: str, maker: Stage, reads: kinds.Rows, path: KeyPath, problems: Problems) -> None:
    """See that a stage's rows are what is read."""
    is_scored = bool(maker.weighed)
    if reads in (maker.facts.gives_scored if is_scored else maker.facts.gives):
        several = (maker.n or 2) * len(maker.inits) > 1
        if reads in ("prompts", "demonstrations") or several:
            return
        said = f"`{OF_STAGE}{name}` has one reply to each prompt, and {reads} need two or more"
        problems.add(path, said, f"set `n` in stage `{name}`")
        return
    choosers = [*kinds.takers("judge"), *(kind.name for kind in kinds.KINDS if kind.by_people)]
    problems.add(
        path,
        f"the replies that `{OF_STAGE}{name}` makes have no scores, so they are not {reads}",
        f"set `rewards` in stage `{name}`, or have a stage of kind {kinds.either(choosers)} choose",
    )
