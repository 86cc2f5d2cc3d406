"""What the process that tests fork others from has done: all that they would else do anew, for a second."""

import gc
from importlib.util import find_spec
from pathlib import Path

gc.disable()  # a collector that walks what is being imported takes a fifth of the time

# Accelerate imports it, where it is, to see what wraps a model. It looks for GPUs, which forks then could not use.
if find_spec("deepspeed") and not Path("/proc/driver/nvidia").exists():
    import deepspeed  # noqa: F401
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import rlhf_pipeline.cli
import rlhf_pipeline.run.worker  # noqa: F401
from rlhf_pipeline.recipe import TINY

tqdm.monitor_interval = 0  # without a thread: a fork would not have it
# With its first model, Transformers compiles the patterns of all architectures.
AutoModelForCausalLM.from_pretrained(TINY / "checkpoint")

gc.enable()
gc.freeze()  # a fork's need not walk, and so copy, all that was imported; trainers call it often
