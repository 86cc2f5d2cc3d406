"""How long the rows of a recipe are, where they are files on this machine and its tokenizer is here."""

from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset

from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.forecast.lengths import EVALUATE, Known
from rlhf_pipeline.recipe.data_files import is_local, matching
from rlhf_pipeline.recipe.schema import Data, Recipe
from rlhf_pipeline.stages.job import Reader

MOST = 100 * 10**6  # bytes of files: to encode more takes too long for a question


def longest(recipe: Recipe) -> Known:
    """The longest rows of each stage that reads files, and of `evaluate`; of others nothing.

    Rows are encoded as for a run, which takes them from the cache then.
    """
    reader, found = Reader(recipe), dict[str, tuple[int, int | None]]()
    tables = {name: (stage.data, stages.BY_KIND[stage.kind].read) for name, stage in recipe.stages.items()}
    if recipe.evaluate is not None:
        tables[EVALUATE] = recipe.evaluate.data, stages.BY_KIND["ppo"].read
    for name, (data, read) in tables.items():
        if _is_here(data):
            try:
                found[name] = _longest(reader.read(read, data).train)
            except InputError:  # a forecast says nothing of what is wrong with rows, or of a tokenizer that is not here
                continue
    return found


def _is_here(data: Data) -> bool:
    if not all(source.stage is None and is_local(source.files) for source in data.sources):
        return False
    files = [file for source in data.sources for file in matching(source.files)]
    return sum(Path(file).stat().st_size for file in files) <= MOST


def _longest(rows: Dataset) -> tuple[int, int | None]:
    """Tokens of the longest prompt, and of the longest prompt with its reply; None where rows have no replies."""

    def lengths(column: str) -> list[int]:
        return pc.list_value_length(rows.with_format("arrow")[column][:]).to_pylist()

    has = rows.column_names
    if "labels" in has:
        whole = lengths("input_ids")
        return max(max(whole) // 2, 1), max(whole)
    if "input_ids" in has:
        return max(lengths("input_ids")), None
    replies = [lengths(column) for column in ("chosen_ids", "rejected_ids", "completion_ids") if column in has]
    if "prompt_ids" not in has:
        most = max(map(max, replies))
        return max(most // 2, 1), most
    prompts = lengths("prompt_ids")
    return max(prompts), max(prompt + max(of) for prompt, *of in zip(prompts, *replies, strict=True))
