"""The same prompts through every policy of a run: what is due, and the sampling."""
