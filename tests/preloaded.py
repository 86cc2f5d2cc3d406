"""What the process that tests fork others from imports: all that a worker needs, without searches for garbage."""

import gc
from importlib import import_module

gc.disable()  # a collector that walks what is being imported takes a fifth of the time
for name in ("rlhf_pipeline.run.worker", "rlhf_pipeline.cli"):
    import_module(name)
gc.enable()
gc.freeze()  # a fork's need not walk, and so copy, all that was imported; trainers call it often
