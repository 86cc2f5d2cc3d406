"""What the process that tests fork others from imports: all that a worker needs, without searches for garbage."""

import gc

gc.disable()  # a collector that walks what is being imported takes a fifth of the time

import rlhf_pipeline.cli
import rlhf_pipeline.run.worker  # noqa: F401

gc.enable()
gc.freeze()  # that of a fork need not walk, and so copy, all that was imported; trainers call it often
