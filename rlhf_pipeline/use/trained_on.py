"""Which pairs a reward model was trained on: its accuracy on them says little of others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import hash_of
from rlhf_pipeline.data.prepare import column, whole_preferences
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, data_inputs
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rundir.layout import RunDirectory

Knows = Callable[[Any, str, str], bool]  # takes a prompt and two replies


def trained_on(run: Path, recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase) -> Knows | str:
    """Tell whether a reward stage was trained on a prompt with two replies, whichever of them was the better one.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: a reward stage.
        tokenizer: the run's, with which the data are encoded if they are not in the cache.

    Returns:
        What tells it; or why that cannot be known, where the data are not those of training any more.
    """
    data = recipe.stages[stage].data
    directory = RunDirectory(run)
    record = directory.record(stage)
    then = {key: value for key, value in (record.inputs if record else {}).items() if key.split(".")[0] == "data"}
    try:
        now = data_inputs("data", data, Digests())
        differs = next((key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)), None)
        if differs:
            return f"`{differs}` is not what it was in training"
        for maker in filter(None, (source.stage for source in data.sources)):
            rows = directory.record(maker)
            if record is None or rows is None or record.parent_weights.get(maker) != rows.weights:
                return f"the rows of stage `{maker}` are not what they were in training"
        table = whole_preferences(data, tokenizer, recipe.seed).table
    except InputError as error:
        return f"its training data cannot be read: {error}"
    keys = frozenset(column(table, "row_key").tolist())
    return lambda prompt, one, other: hash_of([prompt, one, other]) in keys or hash_of([prompt, other, one]) in keys
