"""What `deepspeed_config` says, in Accelerate's own keys or in a file of DeepSpeed's. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
