"""The check of a recipe before its first stage trains: what is wrong with settings and data, and what the data are."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig

from rlhf_pipeline import kinds, stages
from rlhf_pipeline.data import measure, problems
from rlhf_pipeline.data.encode import encode_prompts, hash_of
from rlhf_pipeline.data.measure import Trainer
from rlhf_pipeline.data.prepare import column, first_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import ColumnsError, InputError, InputErrors
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.models import adapters, attention, experts, layers
from rlhf_pipeline.models.base import without_weights
from rlhf_pipeline.models.loading import require_weights
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.launch_keys import gathers_all_layers
from rlhf_pipeline.recipe.rewards import key_of, uses_of_columns
from rlhf_pipeline.recipe.schema import BASE, Data, Evaluate, Recipe, Stage
from rlhf_pipeline.rewards.trial import try_rewards
from rlhf_pipeline.rundir.layout import ANSWERS, members
from rlhf_pipeline.stages import embedded, engine, evaluate, judge, liger, revise, win_rates
from rlhf_pipeline.stages.job import Job, Reader
from rlhf_pipeline.stages.resumable import REFERENCE
from rlhf_pipeline.stages.trial import try_trainer

EVALUATE = "evaluate"  # among the names of stages: the prompts on which policies are judged
# Newer versions of TRL compute the losses of SFT and DPO from the output embedding's own weights, without its adapter.
FUSED_HEAD = liger.LAYERS_ALONE
FEW_PROMPTS = 32  # of a round: what is learned from fewer is more about them than about the rest
ROUTER_LOSS = "router_aux_loss_coef"
Asked = Sequence[tuple[Prompt, dict[str, Any]]]


def check(recipe: Recipe, names: Sequence[str], current: Sequence[str] = ()) -> list[str]:
    """Find what is wrong with the settings and data of every stage that shall run, before the first one trains.

    The tokenizer is loaded once, and each distinct reading of the data done once, however many stages have it.

    Args:
        recipe: the recipe.
        names: the stages.
        current: those of them that are up to date, whose rows can be read.

    Returns:
        Warnings: what may be as it should, and is worth a look.

    Raises:
        InputError: for all that is wrong, as far as that is known while other things are wrong.
    """
    reader = Reader(recipe)
    config = reader.config
    with torch.device("meta"):
        without_weights(recipe.model, config=config)  # of one that cannot be made, nothing else can be said
    found: list[InputError] = []

    def attempt(task: Callable[[], Any]) -> Any:
        try:
            return task()
        except InputError as error:
            found.append(error)

    attempt(lambda: require_weights(recipe.model, config))
    attempt(lambda: attention.require(recipe.model, config))
    attempt(lambda: embedded.check_special_tokens(reader.tokenizer, config, recipe.model.path))
    training = [name for name in names if recipe.stages[name].facts.trains]
    attempt(lambda: check_lora(recipe, training, config))
    attempt(lambda: check_router_loss(recipe, training, config))
    doubts = attempt(lambda: check_adapters_from_outside(recipe, names, config)) or []
    found += engine.check(recipe, names, config)
    to_make = [name for name in names if name not in current]
    readable = [name for name in names if not awaited(recipe, name, to_make)]  # the others' rows are made only then
    jobs = [Job(recipe, name, recipe.run, reader) for name in names]
    for job in jobs:
        place = f"stages.{job.name}.trainer"
        attempt(functools.partial(liger.require, job.stage.facts, job.stage.trainer, config, place))
        if job.name not in readable:
            attempt(functools.partial(check_settings, job))
        elif not job.stage.facts.trains:
            made = attempt(functools.partial(stages.BY_KIND[job.stage.kind].prepare, job))
            doubts += revise.doubts(job, made) if isinstance(made, revise.Inputs) else []
        elif inputs := attempt(functools.partial(stages.BY_KIND[job.stage.kind].prepare, job)):
            attempt(functools.partial(try_trainer, job, inputs))
            doubts += attempt(functools.partial(try_rewards, recipe, job.name, reader.tokenizer)) or []
    attempt(lambda: check_addresses(recipe, names))
    policies = [job for job in jobs if job.stage.facts.is_policy]
    judging = attempt(lambda: evaluate.prepare(policies[0])) if policies else None
    if judging:
        spec, function, asked = judging
        if function is not None:
            attempt(functools.partial(evaluate.try_judge, spec, function, asked))
        if any(recipe.ai_judge_of(job.name) for job in policies):
            attempt(functools.partial(win_rates.try_judge, recipe, asked, reader))
        attempt(functools.partial(_check_asked, spec, asked, reader))
    report, wrong = data_report(recipe, readable, reader, judging[2] if judging else [])
    # What a library says of all of `trainer` follows from what was said of one of its keys.
    found += [error for error in wrong if not any(str(one.place).startswith(f"{error.place}.") for one in found)]
    if found:
        raise InputErrors(found)
    doubts = [*judge_of_nobody(recipe), *all_layers_at_once(recipe, names), *doubts]
    return [*default_learning_rates(recipe, training), *levels_of_members(recipe, names), *doubts, *report["warnings"]]


def check_addresses(recipe: Recipe, names: Sequence[str]) -> None:
    """Ask a small question at every address at which a stage has a judge, before anything trains.

    Raises:
        InputError: for each that does not answer.
    """
    judges = {f"stages.{name}.judge": judge for name in names if (judge := recipe.stages[name].judge)}
    if recipe.evaluate and recipe.evaluate.ai_judge and any(recipe.ai_judge_of(name) for name in names):
        judges[win_rates.PLACE] = recipe.evaluate.ai_judge
    found: list[InputError] = []
    asked: list[dict[str, Any]] = []
    for place, judge in judges.items():
        same = judge.model_dump(include={"model", "served_model", "api_key_env", "template"})
        if judge.is_remote and same not in asked:
            from rlhf_pipeline.judges.remote import RemoteJudge  # with the client for HTTP, which nothing else needs

            asked.append(same)
            try:
                RemoteJudge(judge, recipe.run / ANSWERS, place).check()
            except InputError as error:
                found += error.all
    if found:
        raise InputErrors(found)


def awaited(recipe: Recipe, name: str, names: Sequence[str] = ()) -> list[str]:
    """The stages whose rows a stage reads and that are still to make them.

    Args:
        recipe: the recipe.
        name: the stage's.
        names: the stages that shall run.
    """
    sources = recipe.stages[name].sources
    there = {source.stage: Path(source.files).is_file() for source in sources if source.stage is not None}
    return [stage for stage, is_there in there.items() if stage in names or not is_there]


def check_settings(job: Job) -> None:
    """See that a stage whose rows are not there yet can use its settings, as far as the rows do not decide it.

    Raises:
        InputError: for what it cannot use; of a trainer, with the library's complaint.
    """
    config = stages.BY_KIND[job.stage.kind].CONFIG
    if config is not None:
        job.trainer_config(config)
    if job.stage.judge is not None:
        judge.check(job)
    if job.stage.principles is not None:
        revise.check(job)


def _check_asked(spec: Evaluate, asked: Asked, reader: Reader) -> None:
    """See that the model can read the prompts on which policies are judged."""
    prompts = encode_prompts(reader.tokenizer, spec.data, [prompt for prompt, _ in asked])
    embedded.check_prompts(prompts, reader.tokenizer, reader.config, f"{EVALUATE}.data")


def default_learning_rates(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A line for each stage without a learning rate of its own: the library's default, and the usual one with LoRA."""
    return [
        f"stages.{name}.trainer.learning_rate is not set, so the library's default is used: "
        f"{stages.BY_KIND[recipe.stages[name].kind].CONFIG.learning_rate:g}; usual is "
        f"{recipe.stages[name].facts.learning_rate} (`rlhf-pipeline docs {recipe.stages[name].kind}`): set it"
        for name in names
        if "learning_rate" not in recipe.stages[name].trainer
    ]


def levels_of_members(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A line for each ensemble whose members' scores have zero points that nothing holds together."""
    return [
        f"stages.{name}: the zero point of a reward model's scores is arbitrary, and each member has another, which "
        "counts as disagreement: set `trainer.center_rewards_coefficient: 0.01` (`rlhf-pipeline docs reward`)"
        for name in names
        if recipe.stages[name].members and not recipe.stages[name].trainer.get("center_rewards_coefficient")
    ]


def all_layers_at_once(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A line for each stage whose model FSDP2 divides as one, so that a pass gathers the whole of it."""
    return [
        f"stages.{name}: FSDP2 gathers all layers at once, and so saves little: set `fsdp_auto_wrap_policy: "
        "TRANSFORMER_BASED_WRAP` in `fsdp_config`, and it gathers one after the other"
        for name in names
        if gathers_all_layers(recipe.launch_of(name))
    ]


def judge_of_nobody(recipe: Recipe) -> list[str]:
    """A line where the AI of `evaluate` is a stage that comes after, or is, the last policy."""
    judge = recipe.evaluate.ai_judge if recipe.evaluate else None
    if judge is None or judge.stage is None or any(recipe.ai_judge_of(name) for name in recipe.stages):
        return []
    return [
        f"{win_rates.PLACE}: no policy has a `win_rate`, as none is trained after stage `{judge.stage}`, which judges; "
        "only the comparison at the end asks it: name an earlier stage, or another model"
    ]


def check_lora(recipe: Recipe, names: Sequence[str], config: PretrainedConfig) -> None:
    """See that each stage's `lora` makes an adapter, with room for the one it starts from, on models without weights.

    Raises:
        InputError: PEFT refuses it, it matches no layer, it is too small, or TRL would not train all of it.
    """
    known: dict[str, tuple[dict[str, torch.Size], bool]] = {}

    def made(name: str) -> tuple[dict[str, torch.Size], bool]:
        stage = recipe.stages[name]
        key = json.dumps([stage.facts.makes, stage.lora], sort_keys=True)
        if key not in known:
            try:
                known[key] = _made_without_weights(recipe, stage, config)
            except (TypeError, ValueError) as error:
                raise InputError(
                    str(error).strip().splitlines()[0],
                    place=_written_at(recipe, name),
                    hint="`target_modules: all-linear` fits every architecture",
                ) from None
        return known[key]

    def shapes_of(parent: str) -> dict[str, torch.Size]:
        if outside.is_one(parent):
            return adapters.stored_shapes(outside.folder(parent))
        return made(parent)[0] if parent in recipe.stages else {}

    for name in names:
        (ours, on_head), init = made(name), recipe.stages[name].start
        if FUSED_HEAD and on_head and not recipe.stages[name].facts.own_loop:
            raise InputError(
                f"an adapter on the output embedding cannot be trained in stage `{name}`: TRL computes the loss from "
                "the embedding's own weights",
                place=_written_at(recipe, name),
                hint="`target_modules: all-linear` leaves it out",
            )
        if problem := adapters.misfit(shapes_of(init), ours):
            raise InputError(
                f"the adapter of stage `{name}` cannot begin as that of `{init}`, which it starts from: {problem}",
                place=_written_at(recipe, name),
                hint=f"it needs every module of `{init}` at no smaller rank, or to start from the base: `init: {BASE}`",
            )
        reference = recipe.stages[name].reference
        if reference is not None and (problem := adapters.misfit(shapes_of(reference), ours)):
            raise InputError(
                f"the reference of stage `{name}` cannot compute as `{reference}`: {problem}",
                place=f"stages.{name}.reference",
                hint=f"`lora` of stage `{name}` needs every module of `{reference}` at no smaller rank",
            )


def check_router_loss(recipe: Recipe, names: Sequence[str], config: PretrainedConfig) -> None:
    """See that a model has the loss of its routers that a stage gives a weight to.

    Raises:
        InputError: it has none.
    """
    asking = [name for name in names if recipe.stages[name].trainer.get(ROUTER_LOSS)]
    if asking and hasattr(config.get_text_config(), "output_router_logits"):  # of other models, TRL says so itself
        with torch.device("meta"):
            model = without_weights(recipe.model, config=config)
        if not layers.gives_router_loss(model):
            raise InputError(
                f"`{config.model_type}` computes no auxiliary loss of its routers, so there is nothing to weigh",
                place=f"stages.{asking[0]}.trainer.{ROUTER_LOSS}",
                hint="remove it",
            )


def check_adapters_from_outside(recipe: Recipe, names: Sequence[str], config: PretrainedConfig) -> list[str]:
    """See that adapters from outside are such as the recipe's base has, on models without weights.

    Returns:
        Warnings: of a base that was quantized otherwise.

    Raises:
        InputError: for all that are of another base, or do not fit this one.
    """
    warnings: list[str] = []
    found: list[InputError] = []
    digests = Digests()
    for name in names:
        for role, value in recipe.stages[name].parents.items():
            if not outside.is_one(value):
                continue
            place, known = f"stages.{name}.{key_of(recipe.stages[name], role)}", outside.record(value)
            try:
                found += _misfit_of(recipe, value, place, config, digests)
            except InputError as error:
                found += error.all
            before, now = known.get("model.quantization"), recipe.model.quantization
            if before not in (None, now):
                warnings.append(
                    f"{place}: `{outside.label(value)}` was trained over a base with `quantization: {before}`, and "
                    f"here it is `{now}`: it computes something slightly different; set `model.quantization` to match"
                )
    if found:
        raise InputErrors(found)
    return warnings


def _misfit_of(recipe: Recipe, value: str, place: str, config: PretrainedConfig, digests: Digests) -> list[InputError]:
    """What keeps an adapter from outside from being one over the recipe's base."""
    hint = "an adapter only fits the base that it was trained over: set `model.path` to that, or take another adapter"
    other = digests.other_base(value, recipe.model)
    if other:
        ours = digests.of_model(recipe.model)
        said = f"`{outside.label(value)}` was trained over another base: {other}, and not {ours}"
        return [InputError(said, place=place, hint=hint)]
    theirs, makes = outside.config(value), outside.makes(outside.config(value))
    stored = adapters.stored_shapes(outside.folder(value), head=True)
    heads = {name: shape for name, shape in stored.items() if "lora_" not in name}
    try:
        with torch.device("meta"):
            model = without_weights(recipe.model, "score" if makes == "reward" else "causal", config)
            hidden = model.score.in_features if makes == "reward" else 0
            make = adapters.with_reward_adapter if makes == "reward" else adapters.with_policy_adapter
            ours_ = adapters.adapter_shapes(make(model, outside.lora(theirs), None), "default")
        problem = adapters.misfit({name: shape for name, shape in stored.items() if "lora_" in name}, ours_)
    except (TypeError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
    weights = [shape for name, shape in heads.items() if name.endswith(".weight")]
    if problem is None and makes == "reward" and weights != [torch.Size([1, hidden])]:
        problem = (
            f"it should have one score head of 1 x {hidden}, and has {[list(shape) for shape in weights] or 'none'}"
        )
    further = members(outside.folder(value))[1:]
    if problem is None and any(adapters.stored_shapes(member, head=True) != stored for member in further):
        problem = "its members have weights of other shapes than the first one has"
    if problem is None and makes == "policy" and heads:
        problem = f"it has weights that are not LoRA's: {next(iter(heads))}"
    said = f"`{outside.label(value)}` does not fit this recipe's model: {problem}"
    return [InputError(said, place=place, hint=hint)] if problem else []


def _made_without_weights(recipe: Recipe, stage: Stage, config: PretrainedConfig) -> tuple[dict[str, torch.Size], bool]:
    """The shapes of a stage's LoRA weights, and whether there are some on the output embedding.

    Raises:
        InputError: the model, or what is to be adapted, cannot have the adapter.
    """
    with torch.device("meta"):
        of_reward = stage.facts.makes == "reward"
        base = without_weights(recipe.model, "score" if of_reward else "causal", config)
        taken = [name for name in ("default", REFERENCE) if adapters.free_name(base, name) != name]
        if taken:
            raise InputError(
                f"a module of this model is called `{taken[0]}`, and so is an adapter that TRL trains or compares with",
                place=f"model.path: {recipe.model.path}",
                hint="rename the module in the model's own code",
            )
        make = adapters.with_reward_adapter if of_reward else adapters.with_policy_adapter
        model = make(base, stage.lora, None)
        _refuse_adapters_on_quantized_experts(recipe, model)
        on_head = not of_reward and isinstance(model.get_output_embeddings(), BaseTunerLayer)
        return adapters.adapter_shapes(model, "default"), on_head


def _refuse_adapters_on_quantized_experts(recipe: Recipe, model: PeftModel) -> None:
    """PEFT does not take its adapter off again from a parameter that is made whole when it is read.

    Raises:
        InputError: weights of experts have adapters, and the base is quantized.
    """
    wrapped = ((path, module) for path, module in model.get_base_model().named_modules() if "base_layer" not in path)
    adapted = [path for path, module in wrapped if isinstance(module, ParamWrapper) and any(experts.parameters(module))]
    if adapted and recipe.model.quantization != "none":
        raise InputError(
            f"`{adapted[0]}` cannot have an adapter where it is quantized, as with "
            f"`quantization: {recipe.model.quantization}`",
            place="model.quantization",
            hint="set `model.quantization: none`; or adapt other layers, as `target_modules: all-linear` does",
        )


def _written_at(recipe: Recipe, name: str) -> str:
    """The key under which a stage's `lora` was written: its own, or that of what it took the whole shape over from."""
    stage = recipe.stages[name]
    init = stage.start if stage.start in recipe.stages else None
    if outside.is_one(stage.start):
        own = stage.lora != outside.lora(outside.config(stage.start))
        return f"stages.{name}.lora" if own else f"stages.{name}.init"
    if stage.lora != (recipe.stages[init].lora if init else recipe.lora):
        return f"stages.{name}.lora"
    return _written_at(recipe, init) if init else "lora"


# What the trainers will see of the data


def data_report(
    recipe: Recipe, names: Sequence[str], reader: Reader | None = None, asked: Asked | None = None
) -> tuple[dict[str, Any], list[InputError]]:
    """The report on the data of some of a recipe's stages.

    Args:
        recipe: the recipe.
        names: the stages, and `evaluate` for the prompts on which policies are judged.
        reader: what has read some of the data already.
        asked: the first prompts of `evaluate`, by default read now.

    Returns:
        What `data --json` prints, see `docs/json.md`, and all that is wrong.
    """
    reader = reader or Reader(recipe)
    reports: list[dict[str, Any]] = []
    found: list[InputError] = []
    for name in names:
        if name == EVALUATE:
            report, wrong = _evaluate_report(recipe, reader)
        else:
            report, wrong = _stage_report(Job(recipe, name, recipe.run, reader))
        reports.append(report)
        found += wrong
    errors = InputErrors(found).all if found else []
    measured = {report["name"]: report["data"] for report in reports if report["data"] and report["name"] != EVALUATE}
    if asked is None:
        asked = _asked(recipe)
    warnings = [warning for report in reports for warning in report["warnings"]]
    warnings += problems.across(measured, [prompt for prompt, _ in asked])
    warnings += _judged_on_what_is_trained_on(recipe, list(measured), reader, asked)
    return {
        "recipe": recipe.name,
        "model": recipe.model.path,
        "stages": reports,
        "errors": [{"message": error.message, "place": error.place, "hint": error.hint} for error in errors],
        "warnings": list(dict.fromkeys(warnings)),
    }, errors


def _stage_report(job: Job) -> tuple[dict[str, Any], list[InputError]]:
    """The report on the rows of one stage, under each of `kinds.DATA_KEYS`, and all that is wrong with them."""
    stage, errors, warnings = job.stage, [], []
    found: dict[str, Any] = {"name": job.name, "kind": stage.kind, **dict.fromkeys(kinds.DATA_KEYS)}
    try:
        tokenizer = job.reader.tokenizer
        positions = getattr(job.reader.config.get_text_config(), "max_position_embeddings", None)
        trainer = Trainer(max_positions=positions)
        if stage.sampling and stage.n:
            stops = stop_tokens(tokenizer, job.reader.generation_config, {})
            trainer = trainer._replace(response_length=stage.sampling.max_new_tokens, stop_tokens=stops)
        if stage.facts.trains:
            args = job.trainer_config(stages.BY_KIND[stage.kind].CONFIG)
            trainer = Trainer.of(args, positions, stage.facts.reply_limit, job.recipe.processes(job.name))
        if stage.facts.samples:
            stops = stop_tokens(tokenizer, job.reader.generation_config, stage.trainer)
            trainer = trainer._replace(stop_tokens=stops)
    except InputError as error:
        return found | {"warnings": []}, error.all
    for key, kind, spec, seen_by in _tables(stage, trainer):
        if missing := [name for name in awaited(job.recipe, job.name) if name in {one.stage for one in spec.sources}]:
            makers = " and ".join(f"`{name}`" for name in missing)
            warnings.append(f"stages.{job.name}.{key}: nothing is known of it until {makers} has made its rows")
            continue
        try:
            prepared = job.reader.read(stages.BY_KIND[kind].read, spec)
        except ColumnsError as error:
            errors.append(error.in_recipe(job.recipe.place("stages", job.name, key)))
            continue
        except InputError as error:
            errors += error.all
            continue
        errors += embedded.check_rows(prepared, tokenizer, job.reader.config, f"stages.{job.name}.{key}")
        found[key] = measure.measure(kind, prepared, spec, tokenizer, seen_by)
        for source in found[key]["sources"] if key == "data" else []:
            source["used_as"] = uses_of_columns(stage, source["used_as"])
        if job.recipe.model.chat_template:
            found[key]["chat_template"] = "recipe"
        wrong, doubtful = problems.problems(found[key], f"stages.{job.name}.{key}")
        errors += wrong
        warnings += doubtful
        own = len(np.unique(column(prepared.table, "prompt_key")))
        if spec.part is not None and own < FEW_PROMPTS:
            warnings.append(
                f"stages.{job.name}.{key}: only {own} prompts are left to each of {spec.part[1]} rounds: give more, or "
                "the same ones to every round with `prompts: reuse` (`rlhf-pipeline docs rounds`)"
            )
    return found | {"warnings": warnings}, errors


def _evaluate_report(recipe: Recipe, reader: Reader) -> tuple[dict[str, Any], list[InputError]]:
    """The same of the rows of `evaluate`, as a stage that samples replies to prompts would see them."""
    assert recipe.evaluate is not None
    spec, like = recipe.evaluate.data, next(kind.name for kind in kinds.KINDS if kind.reads == "prompts")
    found: dict[str, Any] = {"name": EVALUATE, "kind": EVALUATE, **dict.fromkeys(kinds.DATA_KEYS)}
    try:
        tokenizer, prepared = reader.tokenizer, reader.read(stages.BY_KIND[like].read, spec)
    except InputError as error:
        return found | {"warnings": []}, error.all
    positions = getattr(reader.config.get_text_config(), "max_position_embeddings", None)
    stops = stop_tokens(tokenizer, reader.generation_config, {})
    seen_by = Trainer(response_length=recipe.evaluate.max_new_tokens, stop_tokens=stops, max_positions=positions)
    found["data"] = measure.measure(like, prepared, spec, tokenizer, seen_by)
    if recipe.model.chat_template:
        found["data"]["chat_template"] = "recipe"
    errors, warnings = problems.problems(found["data"], f"{EVALUATE}.data")
    errors += embedded.check_rows(prepared, tokenizer, reader.config, f"{EVALUATE}.data")
    return found | {"warnings": warnings}, errors


def _tables(stage: Stage, trainer: Trainer) -> list[tuple[str, str, Data, Trainer]]:
    """What a stage reads: the key, the kind of stage that reads such rows, the data, and what its trainer sees."""
    tables = [("data", stage.kind, stage.data, trainer)]
    for key, kind in stage.facts.further_data.items():
        if data := getattr(stage, key):
            tables.append((key, kind, data, Trainer(max_positions=trainer.max_positions)))
    return tables


def _asked(recipe: Recipe) -> Asked:
    """The prompts on which policies are judged; none where they cannot be read, which the check of `evaluate` says."""
    try:
        return first_prompts(recipe.evaluate.data, recipe.evaluate.n) if recipe.evaluate else []
    except InputError:
        return []


def _judged_on_what_is_trained_on(recipe: Recipe, names: Sequence[str], reader: Reader, asked: Asked) -> list[str]:
    """A warning for each stage that trains its policy on prompts on which `evaluate` judges it."""
    policies = [name for name in names if recipe.stages[name].facts.is_policy]
    if not asked or not policies:
        return []
    warnings, judged = [], np.unique(np.array([hash_of(prompt) for prompt, _ in asked], np.int64))
    for name in policies:
        stage = recipe.stages[name]
        table = reader.read(stages.BY_KIND[stage.kind].read, stage.data).table
        seen = int(np.isin(judged, column(table, "prompt_key")).sum())
        if seen:
            warnings.append(
                f"evaluate.data: {problems.out_of(seen, len(judged))} of its prompts are trained on in `{name}`, so "
                "the judge's mean looks too good: give `evaluate` prompts that no stage trains on"
            )
    return warnings
