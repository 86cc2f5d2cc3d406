"""What decides a stage's result: its settings, and what files and hub repositories hold. No torch."""

import hashlib
import re
from collections.abc import Sequence, Set
from glob import has_magic
from pathlib import Path
from typing import Any

from rlhf_pipeline import hub, user_code
from rlhf_pipeline.recipe import BASE, Data, Model, Recipe, outside
from rlhf_pipeline.recipe.data_files import is_local, matching
from rlhf_pipeline.recipe.launch import launch_inputs
from rlhf_pipeline.recipe.library_keys import WITHOUT_EFFECT_ON_RESULT
from rlhf_pipeline.recipe.rewards import key_of
from rlhf_pipeline.recipe.schema import AIJudge, Reward, Rollout, Source, Stage, Watch
from rlhf_pipeline.recipe.watch import AUTO
from rlhf_pipeline.rundir.file_digests import FileDigests
from rlhf_pipeline.rundir.layout import members

# Files of a model folder that decide what is loaded: weights, configuration, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".txt")


class Digests(FileDigests):
    """Content digests of whatever a recipe names."""

    def of_data(self, data: Data) -> str:
        """What decides the rows of the sources, `eval_data` apart; of a mix of all of them, as "a + b"."""
        return " + ".join(self.decides(source) for source in data.sources)

    def decides(self, source: Source) -> str:
        """What decides the rows of a source: see `of_source`; of a stage's rows it is the recipe's word for them.

        What these are, the stage's own fingerprint says, also before they are made.
        """
        return source.path if source.stage is not None else self.of_source(source)

    def of_source(self, source: Source) -> str:
        """`name@digest` of a file, a glob or a folder; of a hub dataset its identity: `id@commit`, or what is known.

        Of several files, names and contents of all that match count.

        Raises:
            InputError: a file cannot be read.
        """
        if not is_local(source.files):
            return _on_hub(source)
        path, files = Path(source.files), matching(source.files)
        if files == [path]:
            return f"{path.name}@{self.of_file(path)}"
        start = path if path.is_dir() else next(parent for parent in path.parents if not has_magic(str(parent)))
        names = "".join(f"{file.relative_to(start).as_posix()}={self.of_file(file)}\n" for file in files)
        return f"{path.name}@{short_hash(names.encode())}"

    def of_model(self, model: Model) -> str:
        """`name@digest` of a model folder; of a hub model its identity, see `of_data`.

        The folder's Python files count where they would be run.
        """
        folder = Path(model.path)
        if not folder.is_dir():
            return _on_hub(model)
        files = [file for file in folder.iterdir() if file.suffix in MODEL_FILES]
        if model.trust_remote_code:
            files += folder.rglob("*.py")
        names = sorted((file.relative_to(folder).as_posix(), file) for file in files)
        digest = short_hash("".join(f"{name}={self.of_file(file)}\n" for name, file in names).encode())
        return f"{folder.name}@{digest}"

    def of_adapter(self, value: str) -> str:
        """`name@digest` of an adapter from outside: configuration and weights of all members; on the hub `id@commit`.

        Args:
            value: as `init` of a resolved recipe has it.

        Raises:
            InputError: a file of it cannot be read.
        """
        if outside.is_hub(value):
            return value
        folder = outside.folder(value)
        names = [
            (member / file).relative_to(folder)
            for member in members(folder)
            for file in (outside.CONFIG, outside.WEIGHTS)
        ]
        files = "".join(f"{name.as_posix()}={self.of_file(folder / name)}\n" for name in names)
        return f"{outside.label(value)}@{short_hash(files.encode())}"

    def other_base(self, value: str, model: Model) -> str | None:
        """The base that an adapter from outside was trained over, where that is certainly another one than `model`.

        The record of its run tells, else the name in its configuration. A name that cannot be compared, as a folder of
        another machine, tells nothing.

        Args:
            value: as `init` of a resolved recipe has it.
            model: the recipe's.
        """
        ours, theirs = self.of_model(model), outside.record(value).get("model")
        named = str(outside.config(value).get("base_model_name_or_path") or "")
        if theirs is None and (Path(named).is_dir() or outside.HUB_ID.fullmatch(named)):
            theirs = self.of_model(Model(path=named))
        if theirs is None:
            return None
        name, _, digest = str(theirs).partition("@")
        our_name, _, our_digest = ours.partition("@")
        in_folders = [re.fullmatch("[0-9a-f]{32}", one) is not None for one in (digest, our_digest)]
        if in_folders == [True, True]:
            return None if digest == our_digest else str(theirs)
        if in_folders == [False, False]:  # at another commit it may be the same model with another README
            return None if name == our_name else name
        return None

    def of_function(self, name: str, folders: Sequence[Path]) -> str | None:
        """`name@digest` of the file that a function `module:name` is in; None where there is none to be found.

        Args:
            name: of a judge, or of what rewards replies.
            folders: the recipe's; see `user_code`.
        """
        file = user_code.source(name, folders)
        return f"{file.name}@{self.of_file(file)}" if file else None


def _on_hub(spec: Model | Source) -> str:
    return f"{spec.path}@{spec.revision}" if spec.revision else spec.path


def pin(recipe: Recipe, commits: dict[tuple[str, str, str | None], str | None] | None = None) -> None:
    """Find out which commits a recipe's hub models, datasets and adapters have now, and write them in as `revision`.

    So all stages load the same, and the resolved recipe says what that was. The hub is asked at most once for each;
    where it does not answer, the commit that the local cache holds counts; where that has none, nothing changes.

    Args:
        recipe: the recipe.
        commits: the hub's answers, shared by several recipes that are to load the same.
    """
    commits = {} if commits is None else commits

    def pinned(kind: hub.Kind, path: str, revision: str | None) -> str | None:
        """The commit, or the revision as it is where nothing tells or nothing is to be asked."""
        if Path(path).is_absolute() or Path(path).exists() or hub.is_commit(revision):
            return revision
        key = (kind, path, revision)
        if key not in commits:
            commits[key] = hub.commit(*key)
        return commits[key] or revision

    recipe.model.revision = pinned("model", recipe.model.path, recipe.model.revision)
    everywhere = [data for stage in recipe.stages.values() for data in stage.tables.values()]
    if recipe.evaluate:
        everywhere.append(recipe.evaluate.data)
    for data in everywhere:
        for source in (*data.sources, data.eval_data):
            if source and source.stage is None:
                source.revision = pinned("dataset", source.path, source.revision)

    def pinned_adapter(value: Any) -> Any:
        """An adapter from the hub with its commit; any other value as it is."""
        if not outside.is_one(value) or not outside.is_hub(value):
            return value
        path, _, revision = value.partition("@")
        commit = pinned("model", path, revision or None)
        return f"{path}@{commit}" if commit else value

    for stage in recipe.stages.values():
        inits = [pinned_adapter(one) for one in stage.inits]
        stage.init = inits if isinstance(stage.init, list) else stage.init and inits[0]
        stage.reference, stage.reward = pinned_adapter(stage.reference), pinned_adapter(stage.reward)
        for reward in stage.rewards:
            reward.stage = pinned_adapter(reward.stage)
            if reward.model is not None:
                reward.revision = pinned("model", reward.model, reward.revision)


def stage_inputs(recipe: Recipe, name: str, earlier: dict[str, str], digests: Digests) -> dict[str, Any]:
    """Everything that decides a stage's result, as flat keys; where and how often things are written is left out.

    Args:
        recipe: the recipe.
        name: the stage's.
        earlier: the fingerprints of the stages before it.
        digests: tells what files and hub repositories hold.
    """
    stage = recipe.stages[name]
    inputs: dict[str, Any] = {
        "kind": stage.kind,
        "seed": recipe.seed,
        "model": digests.of_model(recipe.model),
        "model.quantization": recipe.model.quantization,
        "model.dtype": recipe.model.dtype,
    }
    for role, parent in stage.parents.items():
        inputs[role] = digests.of_adapter(parent) if outside.is_one(parent) else earlier.get(parent, BASE)
    inputs |= _reward_inputs(recipe, stage, digests)
    if stage.value_model == "head":
        inputs["value_model"] = stage.value_model
    if recipe.model.attention != "auto":  # like `dtype`, it decides the rounding, and with it where training ends
        inputs["model.attention"] = recipe.model.attention
    inputs |= _engine_inputs(stage.rollout)
    if recipe.model.trust_remote_code:
        inputs["model.trust_remote_code"] = True
    if recipe.model.chat_template:
        template = Path(recipe.model.chat_template)
        inputs["model.chat_template"] = f"{template.name}@{digests.of_file(template)}"
    inputs |= {f"model.chat_template_kwargs.{key}": value for key, value in recipe.model.chat_template_kwargs.items()}
    inputs |= {f"lora.{key}": value for key, value in stage.lora.items()}
    inputs |= {f"trainer.{key}": value for key, value in stage.trainer.items() if key not in WITHOUT_EFFECT_ON_RESULT}
    inputs |= launch_inputs(recipe, name, digests.of_file)
    for key, data in stage.tables.items():
        inputs |= data_inputs(key, data, digests)
    if stage.members:
        inputs |= {"members": stage.members} | ({"bootstrap": True} if stage.bootstrap else {})
    if (stage.watch and stage.watch.acts) or stage.trainer.get("target_kl") == AUTO:
        inputs |= _watch_inputs(recipe, name, earlier, digests)
    return inputs | _row_inputs(recipe, stage, digests)


def _engine_inputs(rollout: Rollout | None) -> dict[str, Any]:
    """What decides the random numbers of replies; nothing for Transformers. How many are sampled at once does not."""
    return {"rollout.engine": rollout.engine} if rollout is not None and rollout.is_vllm else {}


def _watch_inputs(recipe: Recipe, name: str, earlier: dict[str, str], digests: Digests) -> dict[str, Any]:
    """What decides where a stage is stopped, which policy it keeps, or how far it is steered."""
    watch = recipe.stages[name].watch or Watch()
    inputs = {f"watch.{key}": value for key, value in watch.model_dump(exclude_defaults=True).items()}
    judging = judging_inputs(recipe, name, earlier, digests) or {}
    if recipe.evaluate:
        inputs |= {f"watch.{key}": getattr(recipe.evaluate, key) for key in ("along", "batch_size")}
    return inputs | {f"watch.{key}": value for key, value in judging.items()}


def _row_inputs(recipe: Recipe, stage: Stage, digests: Digests) -> dict[str, Any]:
    """What decides the rows that a stage makes, beside its policies, rewards and data; nothing where it trains."""
    inputs = {key: value for key in ("n", "pairs", "ties", "passes") if (value := getattr(stage, key)) is not None}
    if stage.people:
        inputs |= {f"people.{key}": value for key, value in stage.people.says.items()}
    if stage.dimensions:
        inputs["dimensions"] = stage.dimensions
    if stage.principles:
        inputs["principles"] = _of_text(stage.principles, digests)
    if stage.sampling:
        settings = stage.sampling.model_dump(exclude={"batch_size"})
        inputs |= {f"sampling.{key}": value for key, value in settings.items()}
    if stage.judge:
        inputs |= {f"judge.{key}": value for key, value in of_ai_judge(recipe, stage.judge, digests).items()}
    return inputs


def of_ai_judge(recipe: Recipe, judge: AIJudge, digests: Digests) -> dict[str, Any]:
    """What decides the answers of an AI judge, as flat keys; where it is a stage, that stage's fingerprint does."""
    inputs: dict[str, Any] = {"model": judge.model} if judge.stage is None else {}
    if judge.served_model is not None:
        inputs["served_model"] = judge.served_model
    if judge.is_function:
        inputs["source"] = digests.of_function(judge.model, recipe.folders)
    if judge.has_own_text:
        inputs["template"] = judge.template
    for key in ("answers", "min_probability"):
        if getattr(judge, key) != AIJudge.model_fields[key].default:
            inputs[key] = getattr(judge, key)
    files = {
        key: getattr(judge, key) for key in ("rubric", "principles", *([] if judge.has_own_text else ["template"]))
    }
    return inputs | {key: _of_text(file, digests) for key, file in files.items() if file is not None}


def _of_text(file: str, digests: Digests) -> str:
    """`name@digest` of a file that the recipe names; the word itself where it is what ships with the package."""
    return file if file == "default" else f"{Path(file).name}@{digests.of_file(Path(file))}"


def _reward_inputs(recipe: Recipe, stage: Stage, digests: Digests) -> dict[str, Any]:
    """What decides the rewards beside the reward stages themselves; nothing where there is one, used as it is."""
    if not stage.rewards or stage.rewards == [Reward(stage=stage.rewards[0].stage)]:
        return {}
    inputs: dict[str, Any] = {}
    roles = {key_of(stage, role): role for role in stage.parents}
    for place, reward in enumerate(stage.rewards):
        found = reward.model_dump(exclude={"revision"}, exclude_defaults=True)
        if reward.stage is not None:
            found["stage"] = roles[f"rewards.{place}.stage"]
        if reward.function is not None:
            found["source"] = digests.of_function(reward.function, recipe.folders)
        if reward.model is not None:
            found["model"] = digests.of_model(Model(path=reward.model, revision=reward.revision))
        inputs |= {f"rewards.{place}.{key}": value for key, value in found.items()}
    return inputs


def judging_inputs(recipe: Recipe, name: str, earlier: dict[str, str], digests: Digests) -> dict[str, Any] | None:
    """What decides `judge_mean` and `win_rate` beside the weights; None for a stage that is not judged.

    Apart from the other inputs: when only these change, a stage is judged again, not trained again.

    Args:
        recipe: the recipe.
        name: the stage's.
        earlier: the fingerprints of the stages before it.
        digests: tells what files and hub repositories hold.
    """
    spec, ai = recipe.evaluate, recipe.ai_judge_of(name)
    if spec is None or not recipe.stages[name].facts.is_policy:
        return None
    settings = spec.model_dump(exclude={"data", "batch_size", "along", "samples", "judge", "ai_judge", "rollout"})
    settings |= _engine_inputs(spec.rollout)
    if spec.samples > 1:
        settings["samples"] = spec.samples
    if spec.judge is not None:
        settings["judge"] = spec.judge
        settings["judge_gets"] = "text"  # it got TRL's turns before: what was judged so is judged again
        settings["judge_source"] = digests.of_function(spec.judge, recipe.folders)
    if ai is not None:
        settings |= {f"ai_judge.{key}": value for key, value in of_ai_judge(recipe, ai, digests).items()}
        if ai.stage is not None:
            settings["ai_judge.stage"] = earlier.get(ai.stage, ai.stage)
    return settings | data_inputs("data", spec.data, digests)


def data_inputs(prefix: str, data: Data, digests: Digests) -> dict[str, Any]:
    """What decides which rows a stage gets: their content, and every setting that is not as by default."""
    inputs = {prefix: digests.of_data(data)} | _not_default(prefix, data, {"mix", "eval_data"})
    for i, source in enumerate(data.mix):
        inputs |= _not_default(f"{prefix}.mix.{i}", source)
    if data.eval_data:
        name = f"{prefix}.eval_data"
        inputs |= {name: digests.decides(data.eval_data)} | _not_default(name, data.eval_data)
    return inputs


def _not_default(prefix: str, source: Source, apart: Set[str] = frozenset()) -> dict[str, Any]:
    settings = source.model_dump(exclude={"path", "revision", *apart}, exclude_defaults=True)
    return {f"{prefix}.{key}": value for key, value in settings.items()}


def short_hash(content: bytes) -> str:
    """The first half of a SHA-256 in hexadecimal: enough to tell anything from anything else."""
    return hashlib.sha256(content).hexdigest()[:32]
