"""What a recipe names on disk, made absolute and looked at: models, data, chat templates. No torch."""

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.local import expanded, resolved
from rlhf_pipeline.recipe import data_files, model_files, schema
from rlhf_pipeline.recipe.layers import KEYS_TIED_TO_PATH, OF_SOURCE
from rlhf_pipeline.recipe.origins import Problems
from rlhf_pipeline.recipe.schema import AIJudge, Data, Recipe, Stage
from rlhf_pipeline.recipe.shipped import TINY
from rlhf_pipeline.recipe.yaml import KeyPath, dump_inline

MODEL: KeyPath = ("model", "path")
OF_HELD_OUT = ("eval_fraction", "eval_data")
NOT_EVALUATED = "nothing evaluates on these rows"
NOT_SHARED_OUT = "all of these rows are read"
OF_FURTHER_ROWS = dict.fromkeys(OF_HELD_OUT, NOT_EVALUATED) | {"part": NOT_SHARED_OUT}
RELATIVE = "relative paths start from the folder of the file that they are written in"


def resolve_paths(recipe: Recipe, problems: Problems, weights: bool = True) -> None:
    """Make paths absolute, and see that what is named is there; what is wrong is noted.

    Args:
        recipe: the recipe.
        problems: takes what is wrong.
        weights: whether the model's folder must have weights.
    """
    origins = problems.origins
    functions: list[KeyPath] = [
        ("stages", name, "rewards", place, "function")
        for name, stage in recipe.stages.items()
        for place, reward in enumerate(stage.rewards)
        if reward.function is not None
    ]
    judges: dict[KeyPath, AIJudge | None] = {
        ("stages", name, "judge"): stage.judge for name, stage in recipe.stages.items()
    }
    judges["evaluate", "ai_judge"] = recipe.evaluate.ai_judge if recipe.evaluate else None
    functions += [(*path, "model") for path, judge in judges.items() if judge and judge.is_function]
    recipe._folders = list(dict.fromkeys(origins.folder(key) for key in [("evaluate", "judge"), *functions]))
    if recipe.output_dir.startswith("~") and not expanded(recipe.output_dir).is_absolute():
        whose = recipe.output_dir.partition("/")[0]
        problems.add(("output_dir",), f"there is no home folder `{whose}`", "name a folder, or set HOME for `~`")
    recipe.output_dir = str(resolved(origins.folder(("output_dir",)) / expanded(recipe.output_dir)))
    model = recipe.model
    model.path = str(TINY / "checkpoint") if model.path == "tiny" else _model_path(model.path, MODEL, problems, weights)
    _refuse_revision_of_folder(model.path, model.revision, ("model", "revision"), problems)
    if model.chat_template is not None and not problems.is_broken(("model", "chat_template")):
        model.chat_template = _template_path(model.chat_template, ("model", "chat_template"), problems)
    _check_template_settings(model.chat_template_kwargs, problems)
    for name, stage in recipe.stages.items():
        for key, data in stage.tables.items():
            without_effect = dict(stage.facts.unread if key == "data" else OF_FURTHER_ROWS)
            for own, of in (("loss", "demonstrations"), ("pairs", "preferences")):
                if stage.reads(key) != of:
                    without_effect[own] = f"it is of {of}, and this stage reads {stage.reads(key)}"
            _resolve_data(data, ("stages", name, key), without_effect, problems)
        for place, reward in enumerate(stage.rewards):
            if reward.model is not None:
                path: KeyPath = ("stages", name, "rewards", place)
                reward.model = _model_path(reward.model, (*path, "model"), problems)
                _refuse_revision_of_folder(reward.model, reward.revision, (*path, "revision"), problems)
        _resolve_texts(stage, ("stages", name), ("principles",), problems)
    for where, judge in judges.items():
        if judge:
            _resolve_texts(judge, where, ("rubric", "principles", "template"), problems)
    if recipe.evaluate:
        all_held_out, as_they_are = "all rows are held out here", "every prompt that is asked is judged"
        without_effect = {
            "eval_fraction": all_held_out, "eval_data": all_held_out, "too_long": as_they_are, "bad_rows": as_they_are,
            "max_completion_length": "only prompts are read here", "loss": "only prompts are read here",
            "pairs": "only prompts are read here", "part": NOT_SHARED_OUT,
        }  # fmt: skip
        _resolve_data(recipe.evaluate.data, ("evaluate", "data"), without_effect, problems)


def _resolve_data(data: Data, path: KeyPath, without_effect: dict[str, str], problems: Problems) -> None:
    """Check the keys of one section of data against each other, and make its paths absolute."""
    _refuse_without_effect(data, without_effect, path, problems)
    written = problems.origins.written
    if data.path and data.mix:
        problems.add(
            (*path, "mix"), "`path` and `mix` exclude each other", "give `path` of one source, or `mix` of several"
        )
    elif not data.path and not data.mix:
        if (*path, "mix") in written:
            problems.add((*path, "mix"), "`mix` is empty", "name at least one source")
        elif (*path, "path") in written:
            problems.add((*path, "path"), "`path` is empty", "name a file, a folder or a hub id")
        else:
            problems.add((*path, "path"), "`path` is missing", "give `path` of one source, or `mix` of several")
    if data.part is not None and not (len(data.part) == 2 and 1 <= data.part[0] <= data.part[1]):
        problems.add(
            (*path, "part"),
            f"expected [i, n], the i-th of n shares, got {dump_inline(data.part)}",
            "for example [1, 3]",
        )
    if data.eval_data is not None and data.eval_fraction > 0:
        problems.add(
            (*path, "eval_fraction"),
            "`eval_fraction` and `eval_data` exclude each other",
            "remove one of them: rows are held out, or come from elsewhere",
            of_key=True,
        )
    limits = [key for key in ("max_prompt_length", "max_completion_length") if key not in without_effect]
    if data.too_long == "drop" and not any(getattr(data, key) for key in limits):
        problems.add(
            (*path, "too_long"),
            "`too_long` has no effect: no length limits the rows",
            f"set {' or '.join(f'`{key}`' for key in limits)}, or remove it",
            of_key=True,
        )
    if data.mix:
        in_entries = "it belongs to each entry of `mix`"
        for key in OF_SOURCE:
            if key != "path" and _is_set(data, key):
                problems.add((*path, key), f"`{key}` has no effect beside `mix`", in_entries, of_key=True)
        _check_weights(data, path, problems)
        for i, source in enumerate(data.mix):
            _resolve_source(source, (*path, "mix", i), problems)
    elif data.path:
        _resolve_source(data, path, problems)
    if data.eval_data is not None:
        _resolve_source(data.eval_data, (*path, "eval_data"), problems)


def _check_weights(data: Data, path: KeyPath, problems: Problems) -> None:
    """All sources of a mix have a weight, or none."""
    without = [i for i, source in enumerate(data.mix) if source.weight is None]
    if any(problems.within((*path, "mix", i)) for i in without) or len(without) in (0, len(data.mix)):
        return
    for i in without:
        problems.add(
            (*path, "mix", i, "weight"),
            "`weight` is missing: other sources of this mix have one",
            "give each source a weight, or none: then all rows are used",
        )


def _resolve_source(source: schema.Source, path: KeyPath, problems: Problems) -> None:
    """Make one path absolute, and refuse what has no effect beside it."""
    for expected, column in source.columns.items():
        if not expected.strip() or not column.strip():
            problems.add(
                (*path, "columns", expected),
                "a column without a name",
                "columns are {expected name: the data's own name}",
                of_key=not expected.strip(),
            )
    if problems.is_broken((*path, "path")):
        return
    if source.stage is None:
        source.path = _data_path(source.path, (*path, "path"), problems)
    elif path[0] == "evaluate":
        said = "policies are judged on the same prompts before and after that stage, so its rows cannot be these"
        problems.add((*path, "path"), said, "name a file, a folder or a hub id")
    if data_files.is_local(source.path) or source.stage is not None:
        no = "a data file has no" if source.stage is None else "the rows of a stage have no"
        without_effect = {"split": f"{no} splits", "revision": f"{no} revisions", "subset": f"{no} subsets"}
        _refuse_without_effect(source, {key: without_effect[key] for key in KEYS_TIED_TO_PATH}, path, problems)


def _refuse_without_effect(
    source: schema.Source, without_effect: dict[str, str], path: KeyPath, problems: Problems
) -> None:
    """Refuse what would have no effect, each key for its reason: no setting is ignored in silence."""
    for key, reason in without_effect.items():
        if _is_set(source, key):
            problems.add((*path, key), f"`{key}` has no effect: {reason}", "remove it", of_key=True)


def _resolve_texts(holder: Stage | AIJudge, path: KeyPath, keys: Sequence[str], problems: Problems) -> None:
    """Make the paths of principles, rubrics and templates absolute, and see that they are there."""
    for key in keys:
        value = getattr(holder, key)
        if value is None or value == "default" or problems.is_broken((*path, key)):
            continue
        if key == "template" and isinstance(holder, AIJudge) and holder.has_own_text:
            continue
        file = problems.origins.folder((*path, key)) / expanded(value)
        if value.startswith("tiny:"):
            file = TINY / f"{value.removeprefix('tiny:')}.yaml"
            known = ", ".join(f"tiny:{other.stem}" for other in sorted(TINY.glob("*.yaml")))
            if not file.is_file():
                problems.add((*path, key), f"the tiny world has no file `{value}`", f"it has {known}")
        elif not file.is_file():
            problems.add((*path, key), _not_there("file", file), RELATIVE)
        setattr(holder, key, str(resolved(file)))


def _is_set(source: schema.Source, key: str) -> bool:
    """Whether a key has another value than it has by default."""
    default: Any = type(source).model_fields[key].default
    return getattr(source, key) != default


def _refuse_revision_of_folder(path: str, revision: str | None, key: KeyPath, problems: Problems) -> None:
    if Path(path).is_absolute() and revision is not None:
        problems.add(key, "`revision` has no effect: a model folder has no revisions", "remove it", of_key=True)


def _model_path(path: str, key: KeyPath, problems: Problems, weights: bool = True) -> str:
    """What a model's path means: an absolute folder, or a hub id; what is wrong is noted."""
    local = problems.origins.folder(key) / expanded(path)
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            problems.add(key, _not_there("model folder", local), RELATIVE)
        return path  # a hub id
    if not weights and (local / "config.json").is_file():
        return str(resolved(local))
    if found := model_files.no_model(local) or model_files.problem(local):
        hint = found.hint
        if key != MODEL and (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
            hint = "one over this recipe's base is named by `stage`, in place of `model`"
        problems.add(key, found.message, hint)
    return str(resolved(local))


def _template_path(path: str, key: KeyPath, problems: Problems) -> str:
    file = problems.origins.folder(key) / expanded(path)
    if not file.is_file():
        problems.add(key, _not_there("chat template", file), f"name a file with a Jinja template; {RELATIVE}")
        return path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.add(key, f"the chat template {file} cannot be read: {error}", "save it as plain UTF-8 text")
        return path
    if not text.strip():
        problems.add(key, f"the chat template {file} is empty", "write a template, or remove `chat_template`")
    elif problem := _template_problem(text):
        problems.add(key, f"the chat template {file} is no Jinja template: {problem}", "correct the template")
    return str(resolved(file))


# What a chat template is told in any case.
GIVEN = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "pad_token", "unk_token", "strftime_now", "raise_exception",
)  # fmt: skip


def _check_template_settings(settings: dict[str, Any], problems: Problems) -> None:
    """Note what of `chat_template_kwargs` no template could take."""
    for name in settings:
        path = ("model", "chat_template_kwargs", name)
        if name in GIVEN:
            problems.add(path, f"`{name}` cannot be set: every chat template is given it", "remove it", of_key=True)
        elif not (name.isascii() and name.isidentifier()):
            problems.add(
                path, f"`{name}` cannot be a name in a chat template", "use letters, digits and _", of_key=True
            )


def _template_problem(text: str) -> str | None:
    """What keeps a chat template from being compiled as Transformers compiles it; None where nothing does."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which Transformers adds to the language, read as what it encloses."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, jinja2.ext.loopcontrols]).from_string(text)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        return f"{error.message}{f' (line {line})' if line else ''}"
    return None


def _data_path(path: str, key: KeyPath, problems: Problems) -> str:
    """What a path means: an absolute file, folder or glob, or a hub id; what is wrong is noted."""
    if path.startswith("tiny:"):
        file = TINY / "data" / f"{path.removeprefix('tiny:')}.jsonl"
        if not file.is_file():
            there = sorted(other.stem for other in file.parent.glob("*.jsonl"))
            near = difflib.get_close_matches(file.stem, there, n=1)
            known = ", ".join(f"tiny:{name}" for name in there)
            hint = f"did you mean `tiny:{near[0]}`?" if near else f"it has {known}"
            problems.add(key, f"the tiny world has no data `{path}`", hint)
        return str(file)
    folder = problems.origins.folder(key)
    local = folder / expanded(path)
    if "://" in path:
        problems.add(key, "web addresses are not read", "download the file first, or name the hub dataset by its id")
    elif local.is_file():
        _check_file(local, key, problems)
    elif local.is_dir() or glob.has_magic(path):
        pattern = str(local) if local.is_dir() or expanded(path).is_absolute() else _inside(folder, path)
        _check_several(str(pattern), local, path, key, problems)
        return str(resolved(local)) if local.is_dir() else pattern
    elif local.is_symlink():
        _tell_of_broken_link(local, key, problems)
    elif _names_a_file(path):
        files = sorted(file for file in local.parent.iterdir() if file.exists()) if local.parent.is_dir() else []
        beside = {file.name.partition(".")[0]: file.name for file in files if data_files.file_type(file)}
        near = difflib.get_close_matches(local.name.partition(".")[0], beside, n=1)
        hint = f"did you mean `{beside[near[0]]}`?" if near else RELATIVE
        problems.add(key, _not_there("data file", local), hint)
    else:
        return path  # a hub dataset
    # A link keeps its own name: what it leads to, as in the hub's cache or in DVC's, may have none that tells a type.
    return str(resolved(local.parent) / local.name)


def _not_there(what: str, path: Path) -> str:
    """Why a path cannot be opened: nothing is there, or a link that leads nowhere."""
    return f"there is no {what} {path}" + (f", only a link to {path.readlink()}" if path.is_symlink() else "")


def _names_a_file(path: str) -> bool:
    """Whether a path that is not there can only have been meant as a file's."""
    suffix = Path(path).suffix.lower()
    known = data_files.file_type(Path(path)) or suffix in (*data_files.NOT_READ, *data_files.COMPRESSED)
    return bool(known) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _inside(folder: Path, pattern: str) -> str:
    """A pattern under a folder, whose own name is no pattern."""
    return f"{glob.escape(str(folder))}/{expanded(pattern)}"


def _check_file(file: Path, key: KeyPath, problems: Problems) -> None:
    if data_files.file_type(file) is None:
        problems.add(key, f"data files of type `{file.suffix}` are not read", _instead(file))
    elif file.stat().st_size == 0:
        problems.add(key, f"the data file {file} is empty", "put at least one row in it")


def _instead(file: Path) -> str:
    types = f"use {', '.join(data_files.SUFFIXES)}, also with {', '.join(data_files.COMPRESSED)}"
    return data_files.NOT_READ.get(file.suffix.lower(), types)


def _one_split(folder: Path, written: str, splits: dict[str, list[Path]]) -> str:
    """A path, or a list of paths, of the files of one split: those to train on, if there are such."""
    split = next((name for name in ("train", "") if name in splits), list(splits)[-1])
    group = splits[split]
    for pattern in (f"{split}*", f"*{split}*"):
        if split and sorted(folder.glob(pattern)) == sorted(group):
            return f"{written}/{pattern}"
    names = [f"{written}/{file.name}" for file in group]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def _tell_of_broken_link(link: Path, key: KeyPath, problems: Problems) -> None:
    problems.add(key, _not_there("data file", link), "fetch what it leads to, as with `dvc pull` or `git annex get`")


def _check_several(path: str, local: Path, written: str, key: KeyPath, problems: Problems) -> None:
    """Check the files of a folder or a glob; `written` is how the recipe names it."""
    files = data_files.matching(path)
    is_folder = local.is_dir()
    types = sorted({str(data_files.file_type(file)) for file in files})
    splits = data_files.splits(files)
    broken = [link for link in data_files.broken_links(path) if data_files.file_type(link)]
    if is_folder and data_files.is_saved_dataset(local):
        parts = sorted(one.name for one in local.iterdir() if (one / "state.json").is_file())
        part = next((f"[{one!r}]" for one in ("train", *parts) if one in parts), "")
        problems.add(
            key,
            f"{local} is a dataset that `save_to_disk` wrote, in Arrow files, which are not read",
            f'`python -c "import datasets; datasets.load_from_disk({str(local)!r}){part}.to_parquet('
            f'{str(local) + ".parquet"!r})"` writes a file that is: {written}.parquet',
        )
    elif broken:
        _tell_of_broken_link(broken[0], key, problems)
    elif not files:
        others = data_files.not_read(path)
        below = is_folder and any(data_files.file_type(one) for one in local.rglob("*") if one.is_file())
        what = f"there are no data files in {local}" if is_folder else f"no data file matches {local}"
        hint = _instead(others[0]) if others and others[0].suffix.lower() in data_files.NOT_READ else None
        if below:
            hint = f"there are some in folders below it: {local.name}/**/*.jsonl would match those of one type"
        problems.add(key, what, hint or (RELATIVE if not is_folder else _instead(Path("x"))))
    elif len(types) > 1:
        problems.add(
            key,
            f"{local} has files of several types: {', '.join(types)}",
            f"name those of one type: {local if is_folder else '...'}/*{types[-1]}",
        )
    elif is_folder and len(splits) > 1 and set(splits) != {"", "train"}:  # more to train on need not say so
        named = [
            split or f"and others, as {group[0].name}"
            for split, group in sorted(splits.items(), key=lambda one: (not one[0], one[0]))
        ]
        problems.add(
            key,
            f"the files in {local} look like splits: {', '.join(named)}",
            f"name one of them, as {_one_split(local, written.rstrip('/'), splits)}",
        )
    else:
        empty = next((file for file in files if file.stat().st_size == 0), None)
        if empty:
            problems.add(key, f"the data file {empty} is empty", "put at least one row in it, or remove it")
