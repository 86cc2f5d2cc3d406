"""What files and hub repositories hold, as digests and commits that the plan compares. No torch."""

import hashlib
import importlib
import sys
from glob import has_magic
from pathlib import Path

from rlhf_pipeline import hub
from rlhf_pipeline.recipe import Data, Model, Recipe
from rlhf_pipeline.recipe.data_files import is_local, matching
from rlhf_pipeline.recipe.schema import Source
from rlhf_pipeline.rundir.file_digests import FileDigests

# Files of a model folder that decide what is loaded: weights, configuration, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".txt")


class Digests(FileDigests):
    """Content digests of whatever a recipe names."""

    def of_data(self, data: Data) -> str:
        """What the sources of the rows hold, `eval_data` apart: see `of_source`; of a mix all of them, as "a + b"."""
        return " + ".join(self.of_source(source) for source in data.sources)

    def of_source(self, source: Source) -> str:
        """`name@digest` of a file, a glob or a folder; of a hub dataset its identity: `id@commit`, or what is known.

        Of several files, names and contents of all that match count.

        Raises:
            InputError: a file cannot be read.
        """
        if not is_local(source.path):
            return _on_hub(source)
        path, files = Path(source.path), matching(source.path)
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

    def of_judge(self, judge: str, folder: Path) -> str | None:
        """`name@digest` of the file that a judge `module:function` is in; None where there is none to be found.

        The module is looked for as a worker does, in the installed packages, then in `folder`, then in the current
        one, but nothing is imported.
        """
        here = Path.cwd()
        search = [entry for entry in sys.path if Path(entry).resolve() != here]
        search += [str(folder), str(here)]
        importlib.invalidate_caches()
        top, *inner = judge.partition(":")[0].split(".")
        found = (finder.find_spec(top, search) for finder in sys.meta_path)
        spec = next((one for one in found if one), None)
        if spec is None:
            return None
        files = [Path(spec.origin)] if spec.has_location and spec.origin else []
        if inner:
            folders = [Path(location).joinpath(*inner) for location in spec.submodule_search_locations or []]
            files = [file for folder in folders for file in (folder / "__init__.py", folder.with_suffix(".py"))]
        file = next((file for file in files if file.is_file()), None)
        return f"{file.name}@{self.of_file(file)}" if file else None


def _on_hub(spec: Model | Source) -> str:
    return f"{spec.path}@{spec.revision}" if spec.revision else spec.path


def pin(recipe: Recipe) -> None:
    """Find out which commits a recipe's hub model and hub datasets have now, and write them in as `revision`.

    So all stages load the same, and the resolved recipe says what that was. The hub is asked at most once for each;
    where it does not answer, the commit that the local cache holds counts; where that has none, nothing changes.
    """
    specs: list[tuple[hub.Kind, Model | Source]] = [("model", recipe.model)]
    everywhere = [data for stage in recipe.stages.values() for data in (stage.data, stage.ptx_data) if data]
    if recipe.evaluate:
        everywhere.append(recipe.evaluate.data)
    for data in everywhere:
        specs += [("dataset", source) for source in (*data.sources, data.eval_data) if source]
    commits: dict[tuple[str, str, str | None], str | None] = {}
    for kind, spec in specs:
        local = Path(spec.path).is_absolute() or Path(spec.path).exists()
        if not local and not hub.is_commit(spec.revision):
            key = (kind, spec.path, spec.revision)
            if key not in commits:
                commits[key] = hub.commit(*key)
            spec.revision = commits[key] or spec.revision


def short_hash(content: bytes) -> str:
    """The first half of a SHA-256 in hexadecimal: enough to tell anything from anything else."""
    return hashlib.sha256(content).hexdigest()[:32]
