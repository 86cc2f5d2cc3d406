"""Whether two machines were given the same recipe. No torch."""

import os
from collections.abc import Iterator
from typing import Any

from rlhf_pipeline import devices
from rlhf_pipeline.recipe.yaml import shown
from rlhf_pipeline.rundir.secrets import redact

# What one machine may say in another way than the next: where things are, and the commits that each has found.
OWN = ("output_dir", "machine_rank", "main_process_ip", "revision")


def difference(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """What a recipe says otherwise than another machine's, by which all train; None where nothing does.

    Args:
        here: the recipe of this machine, from `model_dump`.
        there: that of the first machine, from a job.

    Returns:
        One sentence, with the first key that differs, as on the command line, and both values.
    """
    mine, others = dict(_flat(here)), dict(_flat(there))
    keys = [key for key in {**others, **mine} if not _agree(key, mine.get(key), others.get(key), there)]
    if not keys:
        return None
    more = f" (and {len(keys) - 1} more key{'s' * (len(keys) > 2)})" if keys[1:] else ""
    mine_said, other_said = (shown(one[keys[0]]) if keys[0] in one else "nothing" for one in (mine, others))
    key = keys[0].removeprefix("stages.")
    return redact(f"`{key}` is {mine_said} in the recipe here, and {other_said} in that of machine 0{more}")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its key path."""
    if isinstance(value, dict | list | tuple):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in inner:
            yield from _flat(one, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _agree(key: str, mine: Any, other: Any, there: dict[str, Any]) -> bool:
    """Whether two values mean the same; in doubt they do."""
    *section, name = key.split(".")
    if mine == other or name in OWN:
        return True
    if isinstance(mine, str) and isinstance(other, str):
        if mine.startswith("/") and other.startswith("/"):  # the folders of two machines may have other names
            return mine.rpartition("/")[2] == other.rpartition("/")[2]
        return "@" in mine + other and mine.partition("@")[0] == other.partition("@")[0]  # an adapter's commit
    if name == "num_processes" and isinstance(mine, int) and isinstance(other, int):
        for one in section:
            there = there[one]
        machines, gpus = there.get("num_machines", 1), len(devices.gpus(os.environ))
        return mine == gpus * machines >= other  # as `auto` says where there are more of them
    return False
