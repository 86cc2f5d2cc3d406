"""What `deepspeed_config` says, in Accelerate's own keys or in a file of DeepSpeed's. No torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What DeepSpeed takes where neither keys nor a file say it: deepspeed/runtime/zero/config.py, of version 0.19. Numbers
# are of weights or gradients, not bytes.
DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 5e8, "contiguous_gradients": True, "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5, "stage3_max_reuse_distance": 1e9,
}  # fmt: skip
# Of a model's hidden size, what Accelerate puts in the place of `auto`.
AUTO: dict[str, Callable[[int], float]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: 0.9 * hidden * hidden,
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def zero_settings(config: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """What decides the memory that ZeRO takes: `DEFAULTS`, and whether gradients are sent while others are made.

    Args:
        config: of a stage's `launch`.
        hidden: the model's hidden size.
    """
    found = DEFAULTS | {"overlap_comm": zero_stage(config) == 3}
    for name, value in _of_file(config).items():
        if value == "auto" and name in AUTO:
            found[name] = AUTO[name](hidden)
        elif name in found and isinstance(value, int | float):  # what is none, DeepSpeed says better
            found[name] = value
    return found


def offloads(config: Mapping[str, Any]) -> list[str]:
    """The keys by which DeepSpeed moves something off the GPU."""
    keys = [f"offload_{what}_device" for what in ("optimizer", "param")]
    found = [key for key in keys if str(config.get(key) or "none") != "none"]
    file = _of_file(config)
    keys = [f"offload_{what}" for what in ("optimizer", "param")]
    return found + [key for key in keys if str((file.get(key) or {}).get("device") or "none") not in ("none", "auto")]


def _of_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """`zero_optimization` of a file of DeepSpeed's own; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(Path(config["deepspeed_config_file"]).read_text(encoding="utf-8"))["zero_optimization"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def zero_stage(config: Mapping[str, Any]) -> int | None:
    """Which stage of ZeRO it is, as Accelerate reads it: a file counts for more. None where a file does not tell.

    Args:
        config: of a stage's `launch`; empty where there is none.
    """
    found = config.get("zero_stage", 2 if config else None)
    file = config.get("deepspeed_config_file")
    if isinstance(file, str):
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # what is wrong with it, DeepSpeed says better
    return int(found) if str(found).isdecimal() else None
