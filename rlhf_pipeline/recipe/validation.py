"""A recipe's content compared with the schema, and `trainer:` and `lora:` with TRL's and PEFT's own keys."""

import copy
import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_pipeline.kinds import DATA_KEYS, KEYS, NAMES
from rlhf_pipeline.recipe import library_keys, schema
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import (
    BASE,
    AIJudge,
    Data,
    Evaluate,
    MixedSource,
    Model,
    People,
    Recipe,
    Reward,
    Rollout,
    Rounds,
    Sampling,
    Stage,
    Until,
    Watch,
)  # fmt: skip
from rlhf_pipeline.recipe.yaml import KeyPath, dump_inline, parse_value, shown

# What people write for a key that has another name here, or in TRL and PEFT.
OTHER_WORDS = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "per_gpu_batch_size": "per_device_train_batch_size", "per_gpu_train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "max_new_tokens": "response_length", "max_seq_length": "max_length", "rank": "r", "lora_r": "r",
    "alpha": "lora_alpha", "dropout": "lora_dropout", "modules": "target_modules", "type": "kind", "dataset": "data",
    "file": "path", "files": "path", "name_or_path": "path", "model_name_or_path": "path", "id": "path",
    "load_in_4bit": "quantization", "torch_dtype": "dtype", "from": "init", "base": "extends", "include": "extends",
    "inherits": "extends", "max_rows": "limit", "max_samples": "limit", "datasets": "mix", "reward_model": "reward",
    "trackers": "report_to", "tracker": "report_to", "log_with": "report_to", "loggers": "report_to",
}  # fmt: skip
EXPECTED = {
    "string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "dict_type": "a mapping", "model_type": "a mapping", "list_type": "a list",
    "finite_number": "a finite number", "string_unicode": "text in UTF-8",
}  # fmt: skip
PATTERNS = {
    "attention": (
        "auto, sdpa, eager, flash_attention_2, flash_attention_3 or kernels-community/NAME",
        "`rlhf-pipeline docs recipes` says what each needs",
    ),
    "name": ("letters, digits, _, - and .", "the run directory is named after it; by default it is the file's name"),
    "judge": ("`module:function`", "for example my_judges:is_polite, in a file my_judges.py beside the recipe"),
    "api_key_env": (
        "the name of an environment variable",
        "for example JUDGE_KEY; the key itself belongs in no recipe",
    ),
    "function": ("`module:function`", "for example my_rewards:short_enough, in a file my_rewards.py beside the recipe"),
}
SECRETS = ("api_key_env",)  # keys under which somebody may have written a secret: it is not shown
# Used in place of what is missing or invalid, so that all else can be checked; the key is broken then.
STAND_INS: dict[str, Any] = {
    "name": "name", "path": "tiny", "judge": "module:function", "kind": "sft", "model": {"path": "tiny"},
    "data": {"path": "tiny:prompts"}, "rewards": {"function": "module:function"},
    "stages": {"sft": {"kind": "sft", "data": {"path": "tiny:prompts"}}}, "stop": "reward",
}  # fmt: skip
BOUNDS = {
    "greater_than_equal": ("ge", "of at least"), "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "of at most"), "less_than": ("lt", "less than"),
}  # fmt: skip
MISSING = {
    "model": "for example `model: {path: tiny}`, the checkpoint that ships with the package",
    "stages": "for example `stages: {sft: {data: FILE}}`",
    "data": "for example `data: rows.jsonl`",
    "path": "a file, a folder, or a hub id",
    "judge": PATTERNS["judge"][1],
}
OF_ROUNDS = "for example `rounds: {n: 3, stages: [candidates, dpo]}`, with stages that are there"
BOOLEANS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
SCALAR = re.compile(r"[-+\w.]+")
FOLLOWS_FROM_KIND = ("kind", *KEYS, "gates")


def validate(content: dict[str, Any], problems: Problems) -> Recipe:
    """Make a recipe of its content; what is wrong is noted, and left out or replaced.

    Args:
        content: of `layers.read`, which is changed.
        problems: where to note what is wrong.

    Raises:
        InputError: what is wrong leaves nothing to check further.
    """
    _name_kinds(content, problems)
    for _ in range(10):  # repairing one thing can show another
        try:
            return Recipe.model_validate(content)
        except ValidationError as error:
            # A key misspelt comes before the one that it leaves missing.
            for one in sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden"):
                _note(one, content, problems)
                _repair(one, content)
    problems.raise_if_any()
    raise AssertionError("a recipe in which nothing is wrong, but that cannot be read")


def _name_kinds(content: dict[str, Any], problems: Problems) -> None:
    """Fill in each stage's kind from its name, and catch names that cannot be told apart from the recipe's keys."""
    stages = content.get("stages")
    if not isinstance(stages, dict):
        return
    for name, stage in list(stages.items()):
        path: KeyPath = ("stages", name)
        if not re.fullmatch(r"\w[\w-]*", name):
            problems.add(path, f"`{name}` cannot name a stage", "use letters, digits, _ and -", of_key=True)
        elif name in Recipe.model_fields or name == BASE:
            problems.add(
                path,
                f"a stage cannot be named `{name}`, which has a meaning of its own",
                "give it another name, and set its `kind:`",
                of_key=True,
            )
        elif not isinstance(stage, dict):
            given = "nothing" if stage is None else shown(stage)
            message = f"expected a mapping with the stage's keys, got {given}"
            problems.add(path, message, f"for example `{name}: {{data: FILE}}`", of_key=stage is None)
        elif "kind" in stage:
            continue
        elif name in NAMES:
            stage["kind"] = name
            problems.origins.derived[*path, "kind"] = "from the stage's name"
            continue
        else:
            alike = difflib.get_close_matches(name, NAMES, n=1)
            add = f"add `kind:` with one of {', '.join(NAMES)}, or name the stage after its kind"
            hint = f"did you mean `{alike[0]}`? Else {add}" if alike else add
            misspelt = next((key for key in stage if difflib.get_close_matches(str(key), ["kind"])), None)
            if misspelt is None:  # else pydantic names that key
                problems.add((*path, "kind"), f"the kind of stage `{name}` is not given", hint)
            stage["kind"] = STAND_INS["kind"]
            _break_what_follows(path, problems)
            continue
        stages[name] = {"kind": name if name in NAMES else STAND_INS["kind"], "data": STAND_INS["data"]}


def _break_what_follows(path: KeyPath, problems: Problems) -> None:
    """A stage whose kind is unknown: nothing can be said of what depends on it."""
    for key in FOLLOWS_FROM_KIND:
        problems.break_((*path, key))


def _note(error: ErrorDetails, content: dict[str, Any], problems: Problems) -> None:
    """Turn one of pydantic's complaints into ours."""
    path = _path_of(error)
    if path[0] == "report_to" and not isinstance(content.get("report_to", []), list):
        path = path[:1]  # one word, short for a list of one
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if problems.is_broken(path):
        return
    if kind == "extra_forbidden":
        hint, stands_for = _suggest(str(path[-1]), path[:-1], content)
        problems.add(path, f"unknown key `{path[-1]}`", hint, of_key=True)
        if stands_for and stands_for not in _at(content, path[:-1]):
            problems.break_((*path[:-1], stands_for))
    elif kind == "missing":
        example = OF_ROUNDS if path[0] == "rounds" else MISSING.get(str(path[-1]))
        problems.add(path, f"`{path[-1]}` is missing", example)
    else:
        problems.add(path, _message(kind, path, given, context), _hint(kind, path, given, context))
        if len(path) == 3 and path[-1] == "kind":
            _break_what_follows(path[:-1], problems)


def _message(kind: str, path: KeyPath, given: Any, context: dict[str, Any]) -> str:
    """What was expected of a value, and what was given."""
    if kind == "string_too_short" or (kind == "too_short" and not given):
        return f"`{path[-1]}` is empty"
    if path[-1] in SECRETS:
        return f"expected {_expected(kind, path, given, context)}"
    return f"expected {_expected(kind, path, given, context)}, got {shown(given)}"


def _expected(kind: str, path: KeyPath, given: Any, context: dict[str, Any]) -> str:
    """What was expected of a value."""
    if kind in EXPECTED:
        return EXPECTED[kind]
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        if len(words) <= 8 or path[-1] == "kind":
            return str(context["expected"])
        text = given if isinstance(given, str) else ""
        near = [word for word in words if word.startswith(text)] or difflib.get_close_matches(text, words) or words
        return "a name such as " + ", ".join(f"'{word}'" for word in near[:3])
    if kind == "string_pattern_mismatch" and path[-1] in PATTERNS:
        return PATTERNS[str(path[-1])][0]
    if kind in ("too_long", "too_short"):
        least = kind == "too_short"
        return f"at {'least' if least else 'most'} {context['min_length' if least else 'max_length']} entries"
    if kind in BOUNDS:
        name, bound = BOUNDS[kind]
        return f"a number {bound} {context[name]:,.12g}"
    raise AssertionError(f"no words for pydantic's `{kind}`")


def _hint(kind: str, path: KeyPath, given: Any, context: dict[str, Any]) -> str | None:
    """What to write instead."""
    if kind == "literal_error":
        near = difflib.get_close_matches(str(given).lower(), re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"did you mean `{near[0]}`?" if near else None
    if kind in ("string_pattern_mismatch", "string_unicode") and path[-1] in PATTERNS:
        of_reward = path[-1] == "name" and len(path) > 1
        return "it is a part of the names of what is logged" if of_reward else PATTERNS[str(path[-1])][1]
    if isinstance(given, str) and "rewards" in path[-2:] and kind in ("list_type", "model_type"):
        entry = dump_inline({"function" if ":" in given else "stage": given})
        return f"write {entry}" if kind == "model_type" else f"write [{entry}]"
    if kind == "list_type" and isinstance(given, dict):
        return "put [ ] around it, or `- ` before it"
    if kind == "list_type" and isinstance(given, (str, int, float)):
        return f"write [{shown(given)}]"
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        gate = len(path) == 5 and path[3] == "gates"
        return f"a gate is an operator and a number, as '>= {given}'" if gate else "put it in quotes"
    if kind in ("int_type", "float_type", "bool_type"):
        return _written_otherwise(given, boolean=kind == "bool_type")
    if path == ("rounds",):
        return OF_ROUNDS
    if path[-1] == "launch" and kind == "dict_type":
        processes = given if type(given) is int and given > 0 else 2
        return f"write {{num_processes: {processes}}}, or `auto`, or the path of a file of `accelerate config`"
    if kind in ("model_type", "dict_type") and given is None:
        return "is what belongs to it indented?"
    if path == ("model",) and isinstance(given, str):
        return f"write `model: {dump_inline({'path': given})}`"
    if path[-1] == "members" and kind in BOUNDS:
        return "from 2 to 32 reward models make an ensemble; without `members` there is one alone"
    if path == ("stages",):
        return "for example `stages: {sft: {data: FILE}}`"
    return None


def _written_otherwise(given: Any, *, boolean: bool) -> str | None:
    """A hint on text that would be a number or a boolean, were it written as one."""
    if boolean and str(given).lower() in BOOLEANS:
        return f"write {BOOLEANS[str(given).lower()]}"
    if isinstance(given, str) and not isinstance(parse_value(given) if SCALAR.fullmatch(given) else "", str):
        return "remove the quotes: between them it is text"
    return None


def _repair(error: ErrorDetails, content: dict[str, Any]) -> None:
    """Take out of the content what pydantic refused, or put in what it missed."""
    path = _path_of(error)
    if path[0] == "report_to":
        content.pop("report_to", None)
        return
    above = _at(content, path[:-1])
    if isinstance(above, dict) and isinstance(path[-1], str) and path[-1] in STAND_INS and _is_needed(path):
        above[path[-1]] = copy.deepcopy(STAND_INS[path[-1]])
    elif isinstance(above, dict):
        above.pop(path[-1], None)
    elif isinstance(above, list) and isinstance(path[-1], int):
        above[path[-1]] = copy.deepcopy(STAND_INS[str(path[-2]) if path[-2] in STAND_INS else "data"])


def _is_needed(path: KeyPath) -> bool:
    """Whether a key of the schema cannot be left out."""
    model = _model_at(path[:-1])
    return model is not None and path[-1] in model.model_fields and model.model_fields[str(path[-1])].is_required()


def _path_of(error: ErrorDetails) -> KeyPath:
    """Where an error is, without the steps that only pydantic knows."""
    return tuple(part for part in error["loc"] if not str(part).startswith(("function-before[", "list[", "dict[")))


def _at(content: Any, path: KeyPath) -> Any:
    """The value at a key path; None where there is none."""
    for part in path:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    """The part of the schema that describes a mapping; None for those with the keys of a library or of the user."""
    if not path:
        return Recipe
    if path[-1] in DATA_KEYS and len(path) > 1:
        return Data
    if path[-1] == "eval_data":
        return schema.Source
    if isinstance(path[-1], int):
        return Reward if path[-2] == "rewards" else MixedSource
    of_stage: dict[Any, type[BaseModel]] = {
        "judge": AIJudge, "sampling": Sampling, "rollout": Rollout, "watch": Watch, "until": Until, "people": People,
    }  # fmt: skip
    if path[0] == "stages":
        return Stage if len(path) == 2 else of_stage.get(path[2])
    sections: dict[KeyPath, type[BaseModel]] = {
        ("model",): Model, ("evaluate",): Evaluate, ("evaluate", "ai_judge"): AIJudge,
        ("evaluate", "rollout"): Rollout, ("rounds",): Rounds,
    }  # fmt: skip
    return sections.get(path)


def _suggest(key: str, above: KeyPath, content: dict[str, Any]) -> tuple[str, str | None]:
    """A hint on an unknown key of ours, and the key beside it that is probably meant."""
    model = _model_at(above)
    own = list(model.model_fields) if model else []
    if not above:
        own.append("extends")
    if OTHER_WORDS.get(key) in own:
        return f"did you mean `{OTHER_WORDS[key]}`?", OTHER_WORDS[key]
    if not above and key in NAMES:
        return "stages belong under `stages`", None
    others = _elsewhere(above, content)
    for other in (key, OTHER_WORDS.get(key)):
        for where, keys in others:
            if other in keys:
                belongs = "it belongs" if other == key else f"did you mean `{other}`? It belongs"
                return f"{belongs} {where}", None
    near = difflib.get_close_matches(key, own, n=1)
    if near:
        return f"did you mean `{near[0]}`?", near[0]
    for where, keys in others:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        if near:
            return f"did you mean `{near[0]}`? It belongs {where}", None
    return f"the keys here are {', '.join(own)}", None


def _elsewhere(above: KeyPath, content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The valid keys of the other levels, the near ones first, with words for where they belong."""
    top = [
        ("at the top of the recipe", [*Recipe.model_fields, "extends"]),
        ("under `model`", list(Model.model_fields)),
    ]
    evaluate = [("under `evaluate`", list(Evaluate.model_fields))]
    lora, launch = library_keys.settable("lora"), ("under `launch`", library_keys.settable("launch"))
    if above[:1] == ("stages",) and len(above) > 1:
        kind = _at(content, (*above[:2], "kind"))
        trainer = library_keys.settable(kind) if kind in NAMES else []
        here = [
            ("under the stage itself", list(Stage.model_fields)),
            ("under the stage's `data`", list(Data.model_fields)),
            ("under the stage's `trainer`", trainer),
            ("under the stage's `lora`", lora),
        ]
        levels = [*here, *top, *evaluate, launch]
    else:
        trainers = sorted({key for kind in NAMES for key in library_keys.settable(kind)})
        stages = [
            ("under a stage", list(Stage.model_fields)),
            ("under the `data` of a stage", list(Data.model_fields)),
            ("under the `trainer` of a stage", trainers),
        ]
        levels = [*top, ("under `lora`", lora), *stages, *evaluate, launch]
    if above and isinstance(above[-1], int) and above[-2] != "rewards":
        levels.insert(0, ("beside `mix`", list(Data.model_fields)))
    return levels


def check_library_keys(recipe: Recipe, content: dict[str, Any], problems: Problems) -> None:
    """Compare `trainer:` and every `lora:` with TRL's and PEFT's own classes; what is wrong is taken out.

    Args:
        recipe: its stages' `lora` as written, not yet filled in.
        content: what the recipe was made of, for hints.
        problems: where to note what is wrong.
    """
    check_section("lora", recipe.lora, ("lora",), content, problems, holds_out=False)
    for name, stage in recipe.stages.items():
        path = ("stages", name)
        holds_out = stage.data.holds_out or problems.within((*path, "data"))
        for config, values, key in (("lora", stage.lora, "lora"), (stage.kind, stage.trainer, "trainer")):
            if key in stage.facts.takes and not problems.is_broken((*path, key)):
                check_section(config, values, (*path, key), content, problems, holds_out)


def check_section(
    config: str, values: dict[str, Any], path: KeyPath, content: dict[str, Any], problems: Problems, holds_out: bool
) -> None:
    """Compare a section with a library's own class; what is wrong is noted and taken out.

    Args:
        config: the name of a kind, or `lora`, or `launch`.
        values: the section.
        path: its key path.
        content: what the recipe was made of, for hints.
        problems: where to note what is wrong.
        holds_out: whether there are rows to evaluate on.
    """
    known, owner, written = library_keys.accepted(config), library_keys.documented(config), dict(values)
    without_value = problems.within(path)
    for key, value in written.items():
        here = (*path, key)
        if key not in known:
            problems.add(here, f"unknown key `{key}`", _suggest_library_key(key, config, path, content), of_key=True)
        elif reason := library_keys.refusal(config, key):
            advice = library_keys.instead(config, key, value)
            problems.add(here, f"`{key}` cannot be set: {reason}", advice, of_key=True)
        elif errors := library_keys.type_errors(known[key], value):
            _note_type(errors, value, here, f"see {owner}", problems)
            problems.break_(here)
        elif expected := library_keys.out_of_range(key, value):
            problems.add(here, f"expected {expected}, got {shown(value)}")
            problems.break_(here)
        elif config == "lora" and key == "init_lora_weights" and value not in (True, "gaussian"):
            problems.add(
                here,
                "this initialisation changes the base's weights, or its output from the start",
                "use true or `gaussian`: then the adapter changes nothing at first; the base itself is never changed",
            )
        if problems.is_broken(here):
            del values[key]
    if written.keys() - known.keys() or without_value:
        return  # a key may seem without effect only because another one is misspelt, or has no value
    for key, reason in library_keys.without_effect(config, written, holds_out).items():
        problems.add((*path, key), f"`{key}` has no effect {reason}", "remove it", of_key=True)


def _note_type(errors: list[ErrorDetails], given: Any, path: KeyPath, hint: str, problems: Problems) -> None:
    """Note why a value is of none of the types that a library takes: each of them has its error."""
    part = next((error for error in errors if error["input"] is not given), None)
    if part:  # the value is of the right type, and one that it holds is not
        errors, given, path = [part], part["input"], (*path, *_path_of(part))
    expected: dict[str, str | None] = {}
    for kind, context in ((error["type"], error.get("ctx", {})) for error in errors):
        # Where something else than text is taken as well, quotes are not what is missing.
        advice = None if kind == "string_type" and len(errors) > 1 else _hint(kind, path, given, context)
        expected[_expected(kind, path, given, context)] = advice
    # `typing` keeps no order: to it, `Union[list, str]` and `Union[str, list]` are the same.
    types = sorted(expected, reverse=True)
    advice = next((expected[type_] for type_ in types if expected[type_]), hint)
    problems.add(path, f"expected {' or '.join(types)}, got {shown(given)}", advice)


def _suggest_library_key(key: str, config: str, path: KeyPath, content: dict[str, Any]) -> str:
    """A hint on an unknown key under `trainer` or `lora`."""
    own = library_keys.settable(config)
    if OTHER_WORDS.get(key) in own:
        return f"did you mean `{OTHER_WORDS[key]}`?"
    for where, keys in _elsewhere(path, content):
        if key in keys:
            return f"it belongs {where}"
    kinds = [kind for kind in NAMES if config in NAMES and key in library_keys.settable(kind)]
    if kinds:
        return f"it is a key of {' and '.join(kinds)}, and this stage is of kind `{config}`"
    near = difflib.get_close_matches(key, own, n=1)
    if near and "eval" not in key and (training := near[0].replace("_eval_", "_train_")) in own:
        near = [training]  # of a pair of keys, the one that a stage cannot do without
    return f"did you mean `{near[0]}`?" if near else f"the keys are those of {library_keys.documented(config)}"
