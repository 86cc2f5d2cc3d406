"""One file per kind of stage. Each has `prepare`, which finds what is wrong with settings and data, and `run`.

`CONFIG` is the class of its trainer's settings, `read` the function of `data.prepare` that makes rows for it. Where TRL
trains, `TRAINER` is the trainer's class.

A stage file reads like a short script: load data, load model, build TRL's config and trainer, train, evaluate, save.
"""

import importlib
from types import ModuleType

from rlhf_pipeline.kinds import NAMES

# All are imported at once, so that a fork of the warm server has them.
BY_KIND: dict[str, ModuleType] = {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}
