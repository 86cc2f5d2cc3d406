"""One file per kind of stage. Each has `prepare`, which finds what is wrong with settings and data, and `run`.

A stage file reads like a short script: load data, load model, build TRL's config and trainer, train, evaluate, save.
"""

from types import ModuleType

from rlhf_pipeline.stages import dpo, ppo, reward, sft

BY_KIND: dict[str, ModuleType] = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}
