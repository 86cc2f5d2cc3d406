"""Doing it: the runner, the workers it starts, and the run directory they share. Torch only in workers."""
