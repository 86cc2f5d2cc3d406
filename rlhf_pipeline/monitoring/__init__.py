"""Callbacks that observe training."""
